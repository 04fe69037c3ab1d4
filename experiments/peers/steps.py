"""The training step of one library, timed on command; runs in that library's own environment.

    python -m experiments.peers.steps torchvision --size 256 256 --batch 2 --threads 2

Prints one JSON line when the first step, with all compilation, is done, and one more with the
seconds of a step for each line that comes in. `python -m experiments.peers` drives it. For another
library it needs NumPy and that library only.

Every library trains a RetinaNet-R50 with 80 classes on the same noise with seven boxes per image,
with SGD, momentum 0.9 and weight decay 1e-4. No stage is frozen, but the norms are each library's
own: stored statistics with trained scales here, all of it fixed in torchvision, and statistics of
the batch in keras-hub.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from ghm_jax.bench.noise import make_noise
from ghm_jax.bench.torchvision import import_torchvision

CLASSES = 80
PACKAGES = ("jax", "torch", "torchvision", "keras", "keras-hub")

Step = Callable[[], Any]


def ghm_jax(args: argparse.Namespace) -> Step:
    """This project, with GHM-C and GHM-R."""
    from ghm_jax.bench.train import TrainCase, prepare_step

    case = TrainCase(
        backbone="resnet50",
        padded_size=tuple(args.size),
        batch_size=args.batch,
        dtype=args.dtype,
        num_classes=CLASSES,
    )
    return prepare_step(case).run


def torchvision(args: argparse.Namespace) -> Step:
    """Channels last; with bfloat16 under autocast; `--compile` for `torch.compile`."""
    import torch  # pyright: ignore[reportMissingImports]

    library, _ = import_torchvision()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    norm = library.ops.FrozenBatchNorm2d
    backbone = library.models.resnet50(weights=None, norm_layer=norm)
    pyramid = library.models.detection.backbone_utils._resnet_fpn_extractor(
        backbone,
        5,
        returned_layers=[2, 3, 4],
        extra_blocks=library.ops.feature_pyramid_network.LastLevelP6P7(256, 256),
    )
    model = library.models.detection.RetinaNet(
        pyramid, CLASSES, min_size=min(args.size), max_size=max(args.size)
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    images, boxes, labels = make_noise(args.batch, tuple(args.size), CLASSES)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 255
    batch = list(batch.contiguous(memory_format=torch.channels_last))
    truth = [
        {"boxes": torch.from_numpy(b).to(device), "labels": torch.from_numpy(c).long().to(device)}
        for b, c in zip(boxes, labels, strict=True)
    ]
    network = torch.compile(model) if args.compile else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss: Any = sum(network(batch, truth).values())
        loss.backward()
        optimizer.step()
        float(loss)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def keras_hub(args: argparse.Namespace) -> Step:
    """On JAX, with its own losses (focal and smooth L1), compiled by Keras."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras  # pyright: ignore[reportMissingImports]
    import keras_hub as library  # pyright: ignore[reportMissingImports]

    if args.dtype == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    encoder = library.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
        image_shape=(None, None, 3),
    )
    backbone = library.models.RetinaNetBackbone(
        image_encoder=encoder, min_level=3, max_level=7, use_p5=False, image_shape=(None, None, 3)
    )
    model = library.models.RetinaNetObjectDetector(
        backbone, num_classes=CLASSES, bounding_box_format="xyxy", preprocessor=None
    )
    model.compile(optimizer=keras.optimizers.SGD(1e-4, momentum=0.9, weight_decay=1e-4))
    images, boxes, labels = make_noise(args.batch, tuple(args.size), CLASSES)
    images = images.astype(np.float32) / 255
    truth = {"boxes": boxes, "labels": labels}
    return lambda: model.fit(images, truth, batch_size=args.batch, verbose=0)


PEERS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "ghm_jax": ghm_jax,
    "torchvision": torchvision,
    "keras_hub": keras_hub,
}


def main() -> None:
    """Compiles, then a step for each line that comes in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    step = PEERS[args.peer](args)
    step()
    say(first_step=time.perf_counter() - start, versions=versions())
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        say(seconds=time.perf_counter() - start)


def versions() -> dict[str, str]:
    """Of the interpreter and of what is installed of the libraries that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def say(**values: Any) -> None:
    """One line, with the largest memory so far in MiB, of the accelerator or of the process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**values, "peak_mib": _accelerator_mib() or peak}), flush=True)


def _accelerator_mib() -> float:
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        return cuda.max_memory_allocated() / 2**20 if cuda.is_available() else 0.0
    stats = sys.modules["jax"].devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**20


if __name__ == "__main__":
    main()
