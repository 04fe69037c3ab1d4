"""Gradient-harmonized losses as pure functions of arrays and an explicit state."""

from ghm_jax.harmonizing import REFERENCE, Harmonizing
from ghm_jax.losses.baselines import (
    asl1_loss,
    cross_entropy_loss,
    focal_loss,
    ohem_loss,
    smooth_l1_loss,
)
from ghm_jax.losses.density import gradient_density
from ghm_jax.losses.ghm import BACKGROUND, IGNORE, ghm_c_loss, ghm_r_loss, ghm_softmax_loss
from ghm_jax.losses.harmonize import GHMState, LossStats, harmonize, init_ghm_state

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "REFERENCE",
    "GHMState",
    "Harmonizing",
    "LossStats",
    "asl1_loss",
    "cross_entropy_loss",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "ghm_softmax_loss",
    "gradient_density",
    "harmonize",
    "init_ghm_state",
    "ohem_loss",
    "smooth_l1_loss",
]
