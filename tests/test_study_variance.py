"""Noise of the gradient by bin, and scores at rest: on examples whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_batch, tiny_config

from experiments.study.summary import noise_table, rest_table
from experiments.study.variance import BINS, Measured, by_bin, noise, rest
from ghm_jax.detection.outputs import loss_inputs
from ghm_jax.losses import cross_entropy_loss
from ghm_jax.training.build import build


def test_the_gradients_of_all_bins_add_up_to_that_of_cross_entropy(rng):
    trainer = build(tiny_config(), 3)
    state = jax.jit(trainer.init_state)()
    batch = tiny_batch(rng, 2)
    params = state.params

    def total(head):
        variables = {**state.variables, "params": {**params, "class_head": head}}
        logits, _, targets = loss_inputs(
            variables, batch, config=trainer.config, model=trainer.model
        )
        loss, _, stats = cross_entropy_loss(logits, targets.classes)
        return loss * stats.num_valid, stats

    want, stats = jax.jit(jax.grad(total, has_aux=True))(params["class_head"])
    found = jax.jit(lambda variables: by_bin(trainer, variables, batch))(state.variables)
    assert found.counts.sum() == stats.num_valid
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(want)])
    np.testing.assert_allclose(found.gradients.sum(0), flat, rtol=1e-3, atol=1e-4)


def test_the_variance_of_a_bin_falls_as_one_over_its_examples(rng):
    counts = np.float32(10 ** rng.uniform(0, 4, BINS).round(1)).round()
    measured = []
    for _ in range(400):  # sums of independent examples with mean 1 and variance 4
        sums = counts[:, None] + 2 * np.sqrt(counts)[:, None] * rng.normal(size=(BINS, 25))
        measured.append(Measured(counts, counts, np.float32(sums)))
    found = noise(measured)
    np.testing.assert_allclose(found["counts"], counts, rtol=1e-6)
    free, floored = (found[name] for name in ("no floor", "floor 100"))
    np.testing.assert_allclose(
        free["variance"], 25 * 4 / BINS**2 / counts, rtol=0.2
    )  # a bin has 1 / BINS of the weight, whatever it holds
    assert np.corrcoef(np.log(free["variance"]), np.log(counts))[0, 1] < -0.99
    sparse = counts < 30
    ratio = np.array(floored["variance"]) / np.array(free["variance"])
    assert ratio[sparse].max(initial=0) < ratio[counts > 1000].min(initial=1)


def test_shares_of_positives_are_measured_and_predicted_by_score():
    counts, positive = (np.zeros(BINS) for _ in range(2))
    bin_of_score, mirrored = (
        BINS - 5,
        4,
    )  # scores in [25/30, 26/30) and the norms of their positives
    counts[bin_of_score], counts[mirrored], positive[mirrored] = 60.0, 900.0, 20.0
    found = rest([Measured(counts, positive, np.zeros((BINS, 1)))] * 2)
    assert found["positive"][bin_of_score] == 20 / 80
    p = (bin_of_score + 0.5) / BINS
    for name, low in (("no floor", 60), ("floor 100", 100)):  # of D(p); D(1 - p) is 900
        q = found["at_rest"][name][bin_of_score]
        np.testing.assert_allclose(q * (1 - p) / 900, (1 - q) * p / low, rtol=1e-9)


def test_the_tables_have_noise_over_signal_and_the_slope_of_independent_examples(rng):
    counts = 10.0 ** np.linspace(0.2, 4, BINS)
    norms = (np.arange(BINS) + 0.5) / BINS
    variance = norms**2 / counts
    figures = {"variance": variance.tolist(), "mean_squared": (variance / 2).tolist()}
    row = {"trained with": "A", "counts": counts.tolist(), "score": norms.tolist()}
    row |= {"positive": [0.0] * 10 + [0.25] * 20, "no floor": figures}
    row |= {"at_rest": {"no floor": [0.75] * BINS}}
    share = variance[counts < 10].sum() / variance.sum()
    last = noise_table([row]).splitlines()[-1]
    assert last == f"| A | no floor | 2.00 | {share:.0%} | -1.00 |"
    _, _, first, *_, end = rest_table([row]).splitlines()
    assert (first, end) == ("| 0.05 |  |  |", "| 0.95 | 0.250 | 0.750 |")
