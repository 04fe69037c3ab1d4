"""Importing torchvision where its compiled operators do not load. Needs neither JAX nor ours."""

import importlib
import sys
from typing import Any

_OPERATORS = (  # of torchvision: looked up when it is imported
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int batch_size, int channels, int height, int width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


def import_torchvision() -> tuple[Any, bool]:
    """torchvision, and whether it has its compiled operators.

    Raises:
        ImportError: torch or torchvision is not installed.
    """
    torch: Any = importlib.import_module("torch")
    try:
        return importlib.import_module("torchvision"), True
    except RuntimeError:  # builds for GPUs have no operators on machines without one
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = declare_operators(torch)
        torchvision: Any = importlib.import_module("torchvision")
        torchvision.declared = library  # keeps the declarations alive
        return torchvision, False


def declare_operators(torch: Any) -> Any:
    """Declares torchvision's compiled operators, so that it can be imported without them, for as
    long as the returned library is alive."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPERATORS:
        library.define(schema)
    return library
