"""Tensors of published detectors: which names and shapes a network's variables have there."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ghm_jax.models import RetinaNet

MMDET_BUFFERS = {  # of a GHM checkpoint
    "bbox_head.loss_cls.edges": (31,),
    "bbox_head.loss_cls.acc_sum": (30,),
    "bbox_head.loss_bbox.edges": (11,),
    "bbox_head.loss_bbox.acc_sum": (10,),
}


def shapes(**settings):
    """`params` and `batch_stats` of a RetinaNet, as shapes."""
    model = RetinaNet(**{"num_classes": 3, "anchors_per_cell": 2, **settings})
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def tiny_shapes(**settings):
    return shapes(**{"backbone_name": "resnet18", "width": 2, "channels": 4, **settings})


def leaves_by_tensor(naming, variables):
    """(path, leaf) of every leaf by the name that its tensor has."""
    flat = traverse_util.flatten_dict(variables)
    return {naming.tensor(path[1:]): (path, leaf) for path, leaf in flat.items()}


def torch_shape(leaf):
    return leaf.shape if len(leaf.shape) < 4 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))


def published_shapes(naming, variables):
    found = leaves_by_tensor(naming, variables)
    return {name: torch_shape(leaf) for name, (_, leaf) in found.items()}


def random_tensors(rng, naming, variables):
    """Tensors that fit `variables`, each with other numbers."""
    shapes = published_shapes(naming, variables)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
