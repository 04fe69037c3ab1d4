"""The settings type, the keywords of the functions that take it, and their defaults agree."""

import dataclasses
import inspect
import math
import types
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from ghm_jax import losses
from ghm_jax.losses import (
    REFERENCE,
    Harmonizing,
    ghm_c_loss,
    ghm_r_loss,
    ghm_softmax_loss,
    harmonize,
)

FUNCTIONS = (harmonize, ghm_c_loss, ghm_r_loss, ghm_softmax_loss)
# Where a function's default is its own: GHM-R is published with another momentum.
OWN_DEFAULTS = {ghm_r_loss: {"momentum": 0.7}}
FIELDS = [field.name for field in dataclasses.fields(Harmonizing)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_setting_is_a_keyword_with_the_same_type_and_default(function):
    keywords = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    defaults = {name: parameter.default for name, parameter in keywords.items()}
    expected = dict(Harmonizing()) | OWN_DEFAULTS.get(function, {})
    assert {name: defaults[name] for name in FIELDS} == expected
    assert set(keywords) - set(FIELDS) - {"mu"} == {"batch_counts", "axis_name"}
    hints = typing.get_type_hints(function)
    fields = typing.get_type_hints(Harmonizing)
    assert {name: hints[name] for name in FIELDS} == {name: fields[name] for name in FIELDS}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_takes_keywords_that_its_signature_does_not_name(function):
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_settings_unpack_into_all_their_fields():
    settings = Harmonizing(bins=7, strength=0.5)
    assert dict(**settings) == dataclasses.asdict(settings)
    assert Harmonizing(**settings) == settings
    with pytest.raises(KeyError):
        settings["keys"]


def test_unpacked_settings_all_reach_harmonize(rng):
    """All but `density` have a value that is not the default, so that none can get lost."""
    settings = Harmonizing(
        bins=7,
        momentum=0.5,
        normalizer="bins",
        bias_correction=False,
        min_count=3.0,
        strength=0.5,
    )
    norm = jnp.asarray(rng.uniform(size=400) ** 3, jnp.float32)
    seen = np.histogram(np.asarray(norm), 7, (0, 1))[0]
    state = losses.init_ghm_state(7)
    _, state, stats = harmonize(norm, None, state, **settings)
    # Equation 12 from zero, then the printed equation 10 with floor and strength.
    average = 0.5 * seen
    np.testing.assert_allclose(state.counts, average, rtol=1e-5)
    want = (400 / (7 * np.maximum(average, 3.0))) ** 0.5
    np.testing.assert_allclose(np.asarray(stats.weights)[seen > 0], want[seen > 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (ghm_c_loss, jnp.zeros((2000, 4))),
        (ghm_r_loss, jnp.zeros((2000, 4))),
        (ghm_softmax_loss, jnp.zeros(2000, int)),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        {"bins": 7},
        {"normalizer": "bins"},
        {"min_count": 0.0},
        {"strength": 0.5},
        {"density": "exact"},
    ],
)
def test_every_setting_of_a_batch_alone_reaches_the_loss(rng, loss, targets, change):
    values = jnp.asarray(rng.normal(0, 1, (2000, 4)), jnp.float32)
    assert loss(values, targets, **change)[0] != loss(values, targets)[0]


@pytest.mark.parametrize("loss", [ghm_c_loss, ghm_r_loss])
@pytest.mark.parametrize("change", [{"momentum": 0.1}, {"bias_correction": False}])
def test_every_setting_of_the_average_reaches_the_loss(rng, loss, change):
    values = jnp.asarray(rng.normal(0, 1, (2000, 4)), jnp.float32)
    state = losses.GHMState(jnp.full(30, 50.0), jnp.array(2))
    changed, plain = (loss(values, 0 * values, None, state, **how)[0] for how in (change, {}))
    assert changed != plain


def test_reference_holds_settings_that_fit_any_momentum_and_number_of_bins():
    assert isinstance(REFERENCE, types.MappingProxyType)  # nobody can change it globally
    published = Harmonizing(bins=10, momentum=0.7, **REFERENCE)
    assert set(FIELDS) - set(REFERENCE) == {"bins", "momentum", "density"}
    assert (published.min_count, published.bias_correction) == (0.0, False)


def test_a_state_corrects_itself_for_its_start_at_zero():
    state = losses.GHMState(jnp.array([3.0, 1.0]), jnp.array(2))
    settings = Harmonizing(momentum=0.5)
    np.testing.assert_allclose(state.average(settings), [4.0, 4 / 3])
    np.testing.assert_array_equal(
        state.average(dataclasses.replace(settings, bias_correction=False)), state.counts
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("bins", 0), ("momentum", 1.0), ("min_count", math.nan), ("density", "kernel")],
)
@pytest.mark.parametrize("loss", [ghm_c_loss, ghm_r_loss])
def test_a_setting_out_of_range_is_refused_by_name(loss, setting, value):
    with pytest.raises(ValueError, match=f"^{setting}: "):
        loss(jnp.zeros((3, 4)), jnp.zeros((3, 4)), **{setting: value})
