"""The settings of gradient harmonizing, as the losses take them and the config holds them.

A separate module below both, because importing `ghm_jax.losses` would start JAX in every process
that reads a config.
"""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ghm_jax.bounds import BelowOne, Fraction, NotNegative, Positive

Normalizer = Literal["nonempty", "bins"]
Density = Literal["histogram", "exact"]


@dataclass(frozen=True, kw_only=True)
class Harmonizing:
    """How a histogram of gradient norms becomes weights.

    With S_j the averaged number of examples in bin j, D_j = max(S_j, min_count) and tau the
    strength, an example in bin j has the weight

        w_j = D_j**-tau * sum_k S_k / sum_k S_k D_k**-tau,

    whose mean over the averaged histogram is 1. Without a floor (min_count = 0), at tau = 1, it is
    beta of equation 10 with the number of filled bins in place of M. The floor is ours: a bin with
    fewer than `min_count` examples is treated as if it had that many, so that single examples
    never dominate the training; a batch in which no bin reaches the floor gets weights of 1.

    Each field is a keyword of `harmonize` and of the GHM losses; `**settings` passes all of them:
    `ghm_c_loss(logits, targets, state=state, **settings)`. There, `momentum`, `min_count` and
    `strength` may be traced, for a schedule.
    """

    bins: Positive[int] = 30
    """Bins of gradient norm (M of equation 9, which calls them unit regions)."""
    momentum: BelowOne[float] = 0.75
    """Share of the old histogram that a step keeps (alpha of equation 12)."""
    normalizer: Normalizer = "nonempty"
    """`nonempty`: divide by the filled bins, as in the formula and the published code. `bins`: by
    all M bins, as in the paper: `w_j = (N / (M D_j))**tau` with N examples in the batch."""
    bias_correction: bool = True
    """Divide the moving histogram by `1 - momentum**step`, so that the first steps are unbiased.
    False: as in the published code, it starts at zero (the first weights are 1 / (1 - momentum)
    times too large), bins without an example keep their value, and only bins filled in this batch
    count as filled."""
    min_count: NotNegative[float] = 10.0
    """Density floor in examples of the whole batch, all replicas; 0 (as published): none."""
    strength: Fraction[float] = 1.0
    """Power of the density in the weights (tau); 0: all weights are 1."""
    density: Density = "histogram"
    """`histogram`: of bins, averaged over steps. `exact`: of each batch alone; S is the number of
    examples within 1 / (2 bins) of the example's own gradient norm, scaled to a full bin at the
    ends of [0, 1] (equations 4-6). Every example has its own weight. Slow: it sorts the batch."""

    def keys(self) -> tuple[str, ...]:
        """Names of the fields; together with `[name]` it makes `**settings` work."""
        return tuple(field.name for field in dataclasses.fields(self))

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


REFERENCE: Mapping[str, Any] = types.MappingProxyType(
    {"normalizer": "nonempty", "bias_correction": False, "min_count": 0.0, "strength": 1.0}
)
"""The fields of `Harmonizing` that make any loss behave as the published PyTorch code.

`ghm_c_loss(..., **REFERENCE)`, or in a config `Harmonizing(**REFERENCE)`. Bins and momentum are
not included: in the published code they are 30 and 0.75 for GHM-C, 10 and 0.7 for GHM-R.
"""
