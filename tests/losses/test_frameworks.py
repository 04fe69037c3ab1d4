"""The losses in training loops of other frameworks: the state is passed by hand, nothing else."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ghm_jax.losses import ghm_c_loss, init_ghm_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES, STEPS = 3, 150


def data() -> tuple[jax.Array, jax.Array]:
    """Points of three clusters, among many of the background (-1)."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.uniform(size=400) < 0.1, rng.integers(0, CLASSES, 400), -1)
    centers = np.array([[2.0, 0.0], [-2.0, 1.0], [0.0, -2.0], [0.0, 0.0]])
    points = centers[labels] + 0.4 * rng.normal(size=(400, 2))
    return jnp.asarray(points, jnp.float32), jnp.asarray(labels)


def train_bare():
    points, labels = data()
    params = {"w": jnp.zeros((2, CLASSES)), "b": jnp.full((1, CLASSES), -2.0)}
    ghm = init_ghm_state(bins=10)
    for _ in range(STEPS):
        params, ghm, plain = bare_step(params, ghm, points, labels)
        yield plain


@jax.jit
def bare_step(params, ghm, points, labels):
    def loss(params):
        logits = points @ params["w"] + params["b"]
        value, new, stats = ghm_c_loss(logits, labels, state=ghm)
        return value, (new, stats.plain_loss)

    (_, (ghm, plain)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), ghm, plain


def train_linen():
    points, labels = data()
    model, optimizer = nn.Dense(CLASSES), optax.sgd(0.5)
    params = model.init(jax.random.key(0), points)
    opt_state, ghm = optimizer.init(params), init_ghm_state(bins=10)

    @jax.jit
    def step(params, opt_state, ghm):
        def loss(params):
            value, new, stats = ghm_c_loss(model.apply(params, points), labels, state=ghm)
            return value, (new, stats.plain_loss)

        (_, (ghm, plain)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, ghm, plain

    for _ in range(STEPS):
        params, opt_state, ghm, plain = step(params, opt_state, ghm)
        yield plain


def train_nnx():
    points, labels = data()
    model = nnx.Linear(2, CLASSES, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    ghm = init_ghm_state(bins=10)

    @nnx.jit
    def step(model, optimizer, ghm):
        def loss(model):
            value, new, stats = ghm_c_loss(model(points), labels, state=ghm)
            return value, (new, stats.plain_loss)

        (_, (ghm, plain)), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return ghm, plain

    for _ in range(STEPS):
        ghm, plain = step(model, optimizer, ghm)
        yield plain


def train_equinox():
    points, labels = data()
    model, optimizer = eqx.nn.Linear(2, CLASSES, key=jax.random.key(0)), optax.sgd(0.5)
    opt_state, ghm = optimizer.init(eqx.filter(model, eqx.is_array)), init_ghm_state(bins=10)

    @eqx.filter_jit
    def step(model, opt_state, ghm):
        def loss(model):
            value, new, stats = ghm_c_loss(jax.vmap(model)(points), labels, state=ghm)
            return value, (new, stats.plain_loss)

        (_, (ghm, plain)), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, ghm, plain

    for _ in range(STEPS):
        model, opt_state, ghm, plain = step(model, opt_state, ghm)
        yield plain


@pytest.mark.parametrize("train", [train_bare, train_linen, train_nnx, train_equinox])
def test_the_loss_trains_a_model_of_any_framework(train):
    plain = [float(value) for value in train()]
    assert len(plain) == STEPS
    assert plain[-1] < 0.6 * plain[0]
