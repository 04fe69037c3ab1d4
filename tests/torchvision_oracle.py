"""torchvision as the reference: imported even if its compiled operators do not load.

torchvision from a package index may be built for GPUs; on a machine without one its operators do
not load, and neither does the package. Of these its RetinaNet needs only suppression, so their
names are declared, and suppression is written here in five lines.
"""

import math
import warnings

import numpy as np
import pytest

from ghm_jax.bench import torchvision as torchvision_import

torch = pytest.importorskip("torch", reason="needs the extra `parity`", exc_type=ImportError)


def import_torchvision():
    """torchvision with its detection models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module, complete = torchvision_import.import_torchvision()
        except ImportError:
            pytest.skip("needs the extra `parity`: torchvision", allow_module_level=True)
    if not complete:
        module.ops.boxes.nms = nms
    return module


def nms(boxes, scores, iou_threshold):
    """Indices of the boxes that are kept, by descending score."""
    overlap, stay = torchvision.ops.box_iou(boxes, boxes), []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not any(overlap[i, j] > iou_threshold for j in stay):
            stay.append(i)
    return torch.tensor(stay, dtype=torch.int64)


torchvision = import_torchvision()


def randomize(model, seed):
    """Weights that keep activations near 1 and every output different; random BN statistics."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.data.uniform_(low, high, generator=generator)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = math.prod(module.weight.shape[1:])
            module.weight.data.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                uniform(module.bias, -0.5, 0.5)
        elif hasattr(module, "running_var"):
            last = name.endswith("bn3")  # of a residual branch: otherwise the sum doubles with each
            uniform(module.weight, *((0.1, 0.3) if last else (0.5, 1.5)))
            uniform(module.bias, -0.2, 0.2)
            uniform(module.running_mean, -0.2, 0.2)
            uniform(module.running_var, 0.5, 1.5)
        elif isinstance(module, torch.nn.GroupNorm):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, -0.2, 0.2)
    return model.eval()


def tensors_of(model):
    """The state dict as NumPy arrays."""
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def to_torch(images):
    """[B, H, W, 3] -> [B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_numpy(features):
    """[B, C, H, W] -> [B, H, W, C]."""
    return features.detach().numpy().transpose(0, 2, 3, 1)
