"""Converts weights of torchvision and mmdetection to our variables and back.

Pure functions: a flat dict of arrays in, `params` and `batch_stats` out; `weight_files` reads the
files. The match is strict: each of our leaves gets the tensor with its name and shape, and every
tensor is either used or known not to belong to the network.

In all sources, as here, head outputs are ordered by anchor, then class or coordinate. So only the
axes of kernels change: [out, in, height, width] there, [height, width, in, out] here.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ghm_jax.json_text import parse_json
from ghm_jax.models.weight_names import (
    BACKBONE,
    DETECTORS,
    TORCHVISION,
    TORCHVISION_2020,
    Naming,
    find_naming,
)

Tensors = Mapping[str, np.ndarray]
"""Arrays by their names in a PyTorch state dict."""
Path = tuple[str, ...]

_CLASS_OUTPUT, _BOX_OUTPUT = ("class_head", "output"), ("box_head", "output")


def import_backbone(tensors: Tensors, like: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone of an ImageNet classifier, without its last layer `fc`.

    Args:
        tensors: of torchvision or timm.
        like: `params` and `batch_stats` of a RetinaNet (arrays or ShapeDtypeStructs); only
            `backbone` is used.

    Returns:
        `params` and `batch_stats`, each with a `backbone` of f32 arrays.

    Raises:
        ValueError: as for `import_detector`.
    """
    like = {kind: {"backbone": tree.get("backbone", {})} for kind, tree in like.items()}
    return _import(tensors, like, _require(tensors, (BACKBONE,)), None)


def import_detector(
    tensors: Tensors, like: Mapping[str, Any], class_rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """A whole detector of torchvision or mmdetection.

    Args:
        tensors: of torchvision's RetinaNet (v1, v2) or of mmdetection's (1.x to 3.x, GHM too).
        like: `params` and `batch_stats` of a RetinaNet (arrays or ShapeDtypeStructs).
        class_rows: for each of our classes, its index among the classes of the tensors, see
            `class_rows_of`; None: the same classes.

    Returns:
        `params` and `batch_stats` of f32 arrays.

    Raises:
        ValueError: names or shapes do not match `like`, a tensor is not of floats, or a value is
            NaN or infinite. One line that names the first such tensors.
    """
    return _import(tensors, like, _require(tensors, DETECTORS), class_rows)


def export_detector(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A RetinaNet under torchvision's current names: f32 arrays that `import_detector` reads.

    With K classes of ours, torchvision's model must be built with `num_classes=K`.

    Raises:
        ValueError: a module that torchvision does not have, such as GroupNorm in the backbone.
    """
    return {
        tensor: np.ascontiguousarray(_to_torch(path, np.asarray(_leaf(variables, path))))
        for tensor, path in _leaves_by_tensor(TORCHVISION, variables).items()
    }


def class_names_of(classes: Any) -> tuple[str, ...] | None:
    """The class names that a file of weights gives: a JSON list, or the list itself; None: none.

    Raises:
        ValueError: something else, or no names.
    """
    if classes is None:
        return None
    names = classes
    if isinstance(classes, str):
        with contextlib.suppress(ValueError):  # no JSON: no list either
            names = parse_json(classes)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("gives its classes in a form that is not a list of names")
    return tuple(names)


def class_rows_of(
    tensors: Tensors,
    class_names: Sequence[str],
    coco_ids: Mapping[str, int],
    names_in_file: Sequence[str] | None = None,
) -> list[int]:
    """For each class name, its index among the classes of a detector's tensors.

    The names in the file decide, if it has any; each class must be among them. Without them
    three layouts are supported: the 80 COCO classes in the usual order; torchvision's 91, indexed
    by COCO category id, where background (0) and ten unused ids are skipped; and as many classes as
    there are names (in torchvision one more, for background), in that order.

    Args:
        tensors: of a detector.
        class_names: wanted, in label order.
        coco_ids: category id of each of COCO's 80 class names, in their order.
        names_in_file: see `class_names_of`.

    Raises:
        ValueError: a class is not in the file, or the number of classes matches none of these.
    """
    naming = _require(tensors, DETECTORS)
    found = _num_classes(tensors, naming)
    of_torchvision = naming in (TORCHVISION, TORCHVISION_2020)
    if names_in_file is not None:
        first = found - len(names_in_file)  # 1: background comes before them
        if first != 0 and not (first == 1 and of_torchvision):
            named = f"{len(names_in_file)} classes ({_some(names_in_file)})"
            raise ValueError(f"names {named}, but has outputs for {found}")
        return [first + place for place in _places(class_names, names_in_file)]
    if set(class_names) <= set(coco_ids):
        order = list(coco_ids)
        if found == max(coco_ids.values()) + 1 and of_torchvision:
            return [coco_ids[name] for name in class_names]
        if found == len(order):
            return [order.index(name) for name in class_names]
    if found == len(class_names):
        return list(range(found))
    if found == len(class_names) + 1 and of_torchvision:
        return list(range(1, found))
    raise ValueError(
        f"holds {naming.title} with {found} classes, the data set has {len(class_names)}: "
        f"{_some(class_names)}"
    )


def _places(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Where each wanted name stands among the names."""
    if list(wanted) == list(names):
        return list(range(len(names)))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(
            f"has the classes {_some(names)}, and lacks those of the data set: {_some(missing)}"
        )
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise ValueError(f"names a class twice: {_some(twice)}")
    return [names.index(name) for name in wanted]


def _num_classes(tensors: Tensors, naming: Naming) -> int:
    outputs = (_CLASS_OUTPUT, _BOX_OUTPUT)
    names = [naming.tensor((*module, "bias")) or "" for module in outputs]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"lacks {_some(missing)}")
    logits, deltas = (tensors[name].size for name in names)
    return logits // max(1, deltas // 4)


def _require(tensors: Tensors, namings: Sequence[Naming]) -> Naming:
    naming = find_naming(tensors, namings)
    if naming is None:
        wanted = " or ".join(naming.title for naming in namings)
        other = find_naming(tensors, (BACKBONE, *DETECTORS))
        found = f"holds {other.title}" if other else f"has unknown names ({_some(list(tensors))})"
        raise ValueError(f"{found}; expected {wanted}")
    return naming


def _import(
    tensors: Tensors,
    like: Mapping[str, Any],
    naming: Naming,
    class_rows: Sequence[int] | None,
) -> dict[str, Any]:
    wanted = _leaves_by_tensor(naming, like)
    missing = [name for name in wanted if name not in tensors]
    unused = [name for name in tensors if name not in wanted and not naming.is_ignored(name)]
    if missing or unused:
        problems = [f"lacks {_some(missing)}"] * bool(missing)
        problems += [f"has {_some(unused)}, for which the model has no place"] * bool(unused)
        raise ValueError(f"looks like {naming.title}, but {' and '.join(problems)}")

    imported = {}
    for name, path in wanted.items():
        tensor = np.asarray(tensors[name])
        if not is_float(tensor.dtype):
            raise ValueError(
                f"{name} is {tensor.dtype}, not floating-point: quantized weights are not supported"
            )
        tensor = tensor.astype(np.float32)
        if class_rows is not None and path[1:3] == _CLASS_OUTPUT:
            tensor = _select_classes(tensor, class_rows, _num_classes(tensors, naming))
        value, shape = _to_flax(path, tensor), tuple(_leaf(like, path).shape)
        if value.shape != shape:
            ours = _to_torch(path, np.empty(shape, np.bool_)).shape
            raise ValueError(f"{name} is {tensor.shape}, in the model {ours}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds values that are not finite; get the file again")
        imported[path] = np.ascontiguousarray(value)
    return {kind: {} for kind in like} | traverse_util.unflatten_dict(imported)


def _leaves_by_tensor(naming: Naming, variables: Mapping[str, Any]) -> dict[str, Path]:
    """Path of each leaf of our variables by the name of its tensor, in sorted order."""
    leaves = {}
    for path in traverse_util.flatten_dict(dict(variables)):
        name = naming.tensor(path[1:])  # without params or batch_stats
        if name is None:
            raise ValueError(f"{naming.title} has no {'/'.join(path[1:])}, but the model does")
        leaves[name] = path
    return dict(sorted(leaves.items()))


def _select_classes(tensor: np.ndarray, rows: Sequence[int], num_classes: int) -> np.ndarray:
    """The outputs of some classes: [anchors * num_classes, ...] -> [anchors * len(rows), ...]."""
    if not (tensor.ndim and num_classes) or tensor.shape[0] % num_classes:
        return tensor  # wrong shape: the caller compares it and raises
    by_class = tensor.reshape(-1, num_classes, *tensor.shape[1:])[:, list(rows)]
    return by_class.reshape(-1, *tensor.shape[1:])


def _to_flax(path: Path, tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0) if _is_kernel(path, tensor) else tensor


def _to_torch(path: Path, value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1) if _is_kernel(path, value) else value


def _is_kernel(path: Path, value: np.ndarray) -> bool:
    return path[-1] == "kernel" and value.ndim == 4


def _leaf(tree: Mapping[str, Any], path: Path) -> Any:
    node: Any = tree
    for name in path:
        node = node[name]
    return node


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are, on one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(x if x.isprintable() else repr(x) for x in names[:most]) + more


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of a type are floating-point of at least 16 bits; fewer are quantized."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize > 1
