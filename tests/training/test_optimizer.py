"""Learning rates at chosen steps, and one update of each optimizer, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghm_jax.config import Config, Model, Optimizer
from ghm_jax.training.optimizer import frozen_parameters, learning_rate, make_optimizer


def rates(config: Optimizer, *steps: int) -> list[float]:
    rate = learning_rate(config)
    return [float(rate(jnp.array(step))) for step in steps]


def test_published_schedule():
    got = rates(Optimizer(), 0, 250, 499, 500, 58_639, 58_640, 80_629, 80_630, 87_959)
    first = 0.01 / 3
    halfway = (first + 0.01) / 2
    last = first + (0.01 - first) * 499 / 500
    want = [first, halfway, last, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_cosine_falls_from_the_peak_to_zero():
    config = Optimizer(schedule="cosine", steps=1100, warmup_steps=100, warmup_factor=0.1)
    got = rates(config, 0, 100, 350, 600, 850, 1100)
    quarter = 0.5 * (1 + np.cos(np.pi / 4))
    want = 0.01 * np.array([0.1, 1, quarter, 0.5, 1 - quarter, 0])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


def test_without_warmup_the_first_rate_is_the_peak():
    config = Optimizer(warmup_steps=0, steps=10, drops=(4, 8), learning_rate=1.0)
    np.testing.assert_allclose(rates(config, 0, 3, 4, 7, 8, 9), [1, 1, 0.1, 0.1, 0.01, 0.01])
    config = Optimizer(warmup_steps=0, steps=10, schedule="cosine", learning_rate=1.0)
    np.testing.assert_allclose(rates(config, 0, 5, 10), [1, 0.5, 0], atol=1e-7)


def test_warmup_may_fill_the_whole_run():
    config = Optimizer(warmup_steps=10, steps=10, schedule="cosine", warmup_factor=0.0)
    np.testing.assert_allclose(rates(config, 0, 9), [0, 0.009], rtol=1e-6)


PARAMS = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}
GRADS = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}


def updated(config: Optimizer, steps: int = 1) -> dict:
    optimizer = make_optimizer(Config(optimizer=config))
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def network_params():
    names = {"backbone": ("stem_conv", "stage1_block1", "stage2_block1"), "fpn": ("p6",)}
    kernel = {"kernel": jnp.ones((2, 2))}
    return {module: dict.fromkeys(names[module], kernel) for module in names}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_are_not_decayed_and_take_no_optimizer_state(name):
    optimizer = make_optimizer(
        Config(
            model=Model(frozen_stages=1),
            optimizer=Optimizer(name=name, learning_rate=0.1, weight_decay=0.1, warmup_steps=0),
        )
    )
    params = network_params()
    state = optimizer.init(params)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert len(arrays) == (2 if name == "sgd" else 4)  # of stage 2 and P6 only
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    for module, still in (("stem_conv", True), ("stage1_block1", True), ("stage2_block1", False)):
        assert bool((after["backbone"][module]["kernel"] == 1).all()) == still
    assert (after["fpn"]["p6"]["kernel"] < 1).all()


def test_which_parameters_are_frozen():
    for stages, expected in ((0, [False] * 4), (1, [True, True, False, False])):
        frozen = frozen_parameters(network_params(), stages)
        stem, one, two = (frozen["backbone"][k]["kernel"] for k in network_params()["backbone"])
        assert [stem, one, two, frozen["fpn"]["p6"]["kernel"]] == expected


@pytest.mark.parametrize(("clip_norm", "gradient"), [(100.0, 3.0), (3.0, 1.5)])
def test_sgd_clips_then_adds_the_penalty_then_the_momentum(clip_norm, gradient):
    config = Optimizer(
        learning_rate=0.1, momentum=0.5, weight_decay=0.01, clip_norm=clip_norm, warmup_steps=0
    )
    kernel, bias, speed, bias_speed = 2.0, 1.0, 0.0, 0.0
    for _ in range(2):  # the global norm of the gradients is 6
        speed = 0.5 * speed + gradient + 0.01 * kernel
        bias_speed = 0.5 * bias_speed + 0.01 * bias
        kernel, bias = kernel - 0.1 * speed, bias - 0.1 * bias_speed
    params = updated(config, steps=2)
    np.testing.assert_allclose(params["kernel"], np.full((2, 2), kernel), rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [bias] * 2, rtol=1e-5)


def test_adamw_decays_kernels_only():
    config = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.01, warmup_steps=0)
    params = updated(config)
    # The first step of Adam has size 1 in every direction; decay is decoupled from it.
    np.testing.assert_allclose(params["kernel"], np.full((2, 2), 2 - 0.1 * (1 + 0.02)), rtol=1e-5)
    np.testing.assert_array_equal(params["bias"], [1, 1])
