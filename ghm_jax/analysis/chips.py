"""What accelerators can do at most, from their data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Published limits of a TPU chip."""

    name: str
    """In the name of a slice, as in "v5e:4x4"."""
    device_kind: str
    """JAX's name of it."""
    flops: float
    """Dense bfloat16 operations per second, with float32 sums."""
    memory: float
    """Bytes of main memory (HBM)."""
    bandwidth: float
    """Bytes per second from and to main memory."""
    link: float
    """Bytes per second from and to other chips of the slice, all links together."""


# Cloud TPU documentation, pages "TPU v4", "v5e", "v5p" and "v6e", per chip; links are given there
# in gigabits per second (2,400, 1,600, 4,800 and 3,200).
TPUS = (
    Chip("v4", "TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9),
    Chip("v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1638e9, 400e9),
)

# Substring of a device's name in JAX -> dense bfloat16 operations per second with float32 sums; the
# first match counts. NVIDIA: the data sheets "H100 Tensor Core GPU" (with sparsity, twice as much:
# SXM 1,979, NVL 1,671, PCIe 1,513), "H200 Tensor Core GPU" (SXM 1,979, NVL 1,671), "A100 Tensor
# Core GPU" (312 dense), "L4 Tensor Core GPU" (242 with sparsity) and "T4" (65 in float16, as it has
# no bfloat16).
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("T4", 65e12),
    *((chip.device_kind, chip.flops) for chip in TPUS),
    *((f"TPU {chip.name}", chip.flops) for chip in TPUS),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak operations per second of a device by its `device_kind` in JAX; None: unknown."""
    words = f"{device_kind} ".replace("-", " ")
    return next((peak for name, peak in _PEAKS if f"{name} " in words), None)
