"""Settings as data: round trips, and every check by name."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from ghm_jax.config import (
    Config,
    Harmonizing,
    Loss,
    differences,
    flatten,
    from_dict,
    to_dict,
    unknown_key,
)
from ghm_jax.exceptions import ConfigError


def changed(**settings) -> Config:
    """The default config with some settings changed, by dotted name (`__` for the dot)."""
    config = Config()
    for key, value in settings.items():
        config = replaced(config, key.split("__"), value)
    return config


def replaced(section, names, value):
    name, *inner = names
    value = replaced(getattr(section, name), inner, value) if inner else value
    return dataclasses.replace(section, **{name: value})


def test_defaults_pass_the_checks_on_any_common_number_of_devices():
    for devices in (1, 2, 4, 8, 16):
        assert Config().check(devices) == Config()


def test_json_and_back_gives_the_same_config():
    config = changed(
        seed=3, data__classes=("a", "b"), data__buckets=((160, 160),), anchors__ratios=(1.0,)
    )
    back = from_dict(json.loads(json.dumps(to_dict(config))))
    assert back == config
    assert hash(back) == hash(config)  # lists would have become tuples again
    assert from_dict({}) == Config()


def test_integers_become_floats_where_a_float_is_expected():
    config = from_dict({"loss": {"ghm_c": {"momentum": 0}}, "optimizer": {"clip_norm": 10}})
    assert isinstance(config.loss.ghm_c.momentum, float)
    assert config.optimizer.clip_norm == 10.0


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"loss": {"momentun": 0.9}}, "loss.momentun", "loss.ghm_c.momentum"),
        ({"loss": {"ghm_r": {"momentun": 0.9}}}, "loss.ghm_r.momentun", "loss.ghm_r.momentum"),
        ({"loss": {"min_count": 9, "ghm_c": {}}}, "loss.min_count", "loss.ghm_c.min_count"),
        ({"optimiser": {}}, "optimiser", "optimizer"),
        ({"loss": {"learning_rate": 0.9}}, "loss.learning_rate", "optimizer.learning_rate"),
    ],
)
def test_unknown_keys_are_one_line_with_the_nearest_name(values, key, near):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: no such setting") as error:
        from_dict(values)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_unlike_any_setting_points_to_the_help():
    assert "`help`" in str(unknown_key("qqqq"))


def test_missing_settings_have_the_defaults_of_their_section():
    loss = from_dict({"loss": {"ghm_r": {"bins": 5}}}).loss
    assert loss == Loss(ghm_r=Harmonizing(bins=5, momentum=0.7))


@pytest.mark.parametrize("name", ["bins", "momentum"])
def test_values_of_the_wrong_type_in_a_nested_section_name_their_key(name):
    with pytest.raises(ConfigError, match=rf"^loss\.ghm_c\.{name}: "):
        from_dict({"loss": {"ghm_c": {name: "9"}}})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("anchors", "octaves", 3.5),
        ("anchors", "octaves", True),
        ("anchors", "octaves", "3"),
        ("loss", "ghm_c", 30),
        ("loss", "weight", "0.9"),
        ("loss", "weight", None),
        ("loss", "weight", False),
        ("model", "norm", "layer"),
        ("model", "backbone", 50),
        ("model", "remat", 1),
        ("model", "frozen_stages", True),
        ("anchors", "ratios", 1.0),
        ("anchors", "ratios", ["1"]),
        ("data", "buckets", [[800, 1344, 3]]),
        ("data", "buckets", [800, 1344]),
        ("data", "classes", "abc"),
    ],
)
def test_values_of_the_wrong_type_name_their_key(section, name, value):
    with pytest.raises(ConfigError, match=rf"^{section}\.{name}: ") as error:
        from_dict({section: {name: value}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("anchors.negative_iou", 10**400, "is too large"),
        ("anchors.ratios", [1, -(10**400)], "is too large"),
        ("optimizer.steps", 2**31, "does not fit in 32 bits"),
        ("optimizer.steps", 10**400, "does not fit in 32 bits"),
        ("optimizer.drops", [10**20], "does not fit in 32 bits"),
        ("data.buckets", [[2**63, 32]], "does not fit in 32 bits"),
        ("loss.ghm_c.bins", -(2**40), "does not fit in 32 bits"),
        ("data.dir", "a\0", "no text that a file name can hold"),
        ("data.classes", ["a", "\ud800"], "no text that a file name can hold"),
        pytest.param(
            "data.dir",
            9**9999,
            "a value of the type int is not of the type <class 'str'>",
            id="digits",
        ),
        ("data.dir", ["x" * 9999] * 99, "is not of the type <class 'str'>"),
    ],
)
def test_a_value_that_nothing_can_compute_with_is_one_short_line(key, value, words):
    values = value
    for name in reversed(key.split(".")):
        values = {name: values}
    frozen = tuple(map(tuple, value)) if key == "data.buckets" else value
    for action in (lambda: from_dict(values), changed(**{key.replace(".", "__"): frozen}).check):
        with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: ") as error:
            action()
        assert words in str(error.value)
        assert len(str(error.value)) < 250


def test_a_seed_has_all_32_bits_and_no_more():
    assert from_dict({"seed": 2**32 - 1}).check().seed == 2**32 - 1
    with pytest.raises(ConfigError, match=r"^seed: .*32 bits"):
        from_dict({"seed": 2**32})


@pytest.mark.parametrize("value", [1e39, -1e308, math.inf])
def test_a_float_that_devices_cannot_hold_is_refused(value):
    with pytest.raises(ConfigError, match=r"^loss\.weight: must be a finite number of 32 bits"):
        changed(loss__weight=value).check()


@pytest.mark.parametrize("key", ["a\nb", "x" * 10**6, "\ud800"])
def test_an_unknown_key_of_any_text_is_one_short_line(key):
    with pytest.raises(ConfigError, match="no such setting") as error:
        from_dict({key: 1})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_section_must_be_a_section():
    with pytest.raises(ConfigError, match=r"^loss: "):
        from_dict({"loss": 3})


POSITIVE = """data.short_side data.max_boxes model.width model.stem_kernel model.channels
    anchors.octaves anchors.scale loss.ghm_c.bins loss.ghm_r.bins loss.mu optimizer.steps
    optimizer.learning_rate optimizer.clip_norm predict.candidates predict.max_detections
    run.log_every run.checkpoint_every run.keep run.max_skipped optimizer.batch_size
    optimizer.accumulate predict.batch_size"""
NOT_NEGATIVE = """seed model.head_convs loss.ghm_c.min_count loss.ghm_r.min_count loss.weight
    loss.box_weight optimizer.weight_decay optimizer.warmup_steps run.workers run.devices
    predict.nms_sigma run.keep_best run.eval_every run.peak_teraflops"""
SHARES = """anchors.positive_iou anchors.negative_iou predict.nms_iou data.flip
    predict.score_threshold optimizer.warmup_factor loss.ghm_c.strength loss.ghm_r.strength"""
BELOW_ONE = "loss.ghm_c.momentum loss.ghm_r.momentum optimizer.momentum optimizer.ema"
CHOICES = """model.norm model.head_norm model.dtype model.p6_from anchors.convention anchors.crowd
    data.on_error loss.ghm_c.normalizer loss.ghm_r.density
    loss.classification loss.box loss.ghm_scope loss.ghm_c.density loss.ghm_r.normalizer
    optimizer.name optimizer.schedule predict.nms_classes run.wrapper"""

BROKEN = [
    *[(key, 0) for key in POSITIVE.split()],
    *[(key, -1) for key in (POSITIVE + " " + NOT_NEGATIVE).split()],
    *[(key, -0.1) for key in (SHARES + " " + BELOW_ONE).split() if "positive" not in key],
    *[(key, 1.1) for key in SHARES.split() if key != "anchors.negative_iou"],
    *[(key, 1.0) for key in BELOW_ONE.split()],
    *[(key, "nonsense") for key in CHOICES.split()],
    *[(key, math.nan) for key, value in flatten(Config()).items() if isinstance(value, float)],
    ("seed", 2**32),
    ("model.backbone", "resnet-50"),
    ("model.stem_kernel", 4),
    ("model.frozen_stages", -1),
    ("model.frozen_stages", 5),
    ("model.prior", 0.0),
    ("model.prior", 1.0),
    ("data.buckets", ()),
    ("data.buckets", ((800, 1333),)),
    ("data.buckets", ((0, 32),)),
    ("data.buckets", ((800,),)),
    ("data.buckets", ((1344, 1344), (1344, 1344))),
    ("data.min_short_side", -1),
    ("data.min_short_side", 801),
    *[("data.zoom", zoom) for zoom in ((0.0, 1.0), (2.0, 1.0), (1.0, 11.0), (1.0, math.nan))],
    ("data.long_side", 1345),
    ("data.short_side", 1334),
    ("anchors.negative_iou", 0.6),
    ("anchors.ratios", ()),
    ("anchors.ratios", (1.0, 0.0)),
    ("anchors.ratios", (1.0, math.nan)),
    ("optimizer.warmup_steps", 90_000),
    ("optimizer.accumulate", 3),
]


@pytest.mark.parametrize(("key", "value"), BROKEN)
def test_every_rule_names_its_key_in_one_line(key, value):
    config = changed(**{key.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: ") as error:
        config.check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, 0) for key in NOT_NEGATIVE.split()],
        *[(key, 1.0) for key in SHARES.split() if key != "anchors.negative_iou"],
        *[(key, 0.0) for key in (SHARES + " " + BELOW_ONE).split() if "positive" not in key],
        ("anchors.negative_iou", 0.5),
        ("optimizer.warmup_steps", 87_960),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(key, value):
    changed(**{key.replace(".", "__"): value}).check()


def test_batches_must_divide_over_the_devices():
    message = "optimizer.batch_size: 16 images cannot be split over 6 devices.*for example 12"
    with pytest.raises(ConfigError, match=message):
        Config().check(num_devices=6)
    with pytest.raises(ConfigError, match="for example 32"):
        Config().check(num_devices=32)
    with pytest.raises(ConfigError, match=r"predict\.batch_size"):
        changed(predict__batch_size=4).check(num_devices=8)


def test_a_misspelt_backbone_gets_the_right_one_as_a_hint():
    with pytest.raises(ConfigError, match=r"did you mean resnet50\?"):
        changed(model__backbone="resnet-50").check()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classification", "ghmc", "did you mean ghm_c?"),
        ("box", "smoothl1", "did you mean smooth_l1?"),
        ("classification", "my_losses.py", "module:function"),
        ("box", ":f", "module:function"),
        ("classification", "a b:f", "module:function"),
        ("classification", "module:function:more", "module:function"),
    ],
)
def test_a_loss_is_one_of_ours_or_names_a_function(key, value, words):
    with pytest.raises(ConfigError, match=rf"^loss.{key}: unknown loss ") as error:
        Config(loss=Loss(**{key: value})).check()
    assert words in str(error.value)
    Config(loss=Loss(**{key: "package.module:function"})).check()


def test_a_resnext_needs_a_width_that_its_groups_divide():
    with pytest.raises(ConfigError, match=r"^model\.width: 24 .*multiple of 16$"):
        changed(model__backbone="resnext50_32x4d", model__width=24).check()
    changed(model__backbone="resnext50_32x4d", model__width=16).check()
    changed(model__backbone="resnet50", model__width=24).check()


def test_differences_name_the_settings_that_affect_a_result():
    new = changed(seed=1, loss__ghm_c__momentum=0.9, run__devices=4, data__dir="elsewhere")
    assert differences(Config(), new) == {"seed": (0, 1), "loss.ghm_c.momentum": (0.75, 0.9)}
    assert differences(new, new) == {}


# What `to_dict` wrote before there were `loss.ghm_c` and `loss.ghm_r`; other sections are the same.
OLD_CONFIG = """{
  "seed": 3,
  "loss": {
    "classification": "ghm_c",
    "weight": 3.0,
    "bins": 20,
    "momentum": 0.8,
    "min_count": 100,
    "strength": 0.9,
    "box": "ghm_r",
    "box_weight": 5.0,
    "box_bins": 12,
    "box_momentum": 0.6,
    "box_min_count": 7.0,
    "box_strength": 0.5,
    "mu": 0.05,
    "density": "exact",
    "ghm_scope": "level",
    "normalizer": "bins",
    "bias_correction": false,
    "preset": "default"
  },
  "optimizer": {"name": "adamw", "batch_size": 4}
}"""


def test_the_config_of_an_old_run_is_read():
    config = from_dict(json.loads(OLD_CONFIG))
    both = {"density": "exact", "normalizer": "bins", "bias_correction": False}
    assert config.loss == Loss(
        weight=3.0,
        box_weight=5.0,
        mu=0.05,
        ghm_scope="level",
        ghm_c=Harmonizing(bins=20, momentum=0.8, min_count=100.0, strength=0.9, **both),
        ghm_r=Harmonizing(bins=12, momentum=0.6, min_count=7.0, strength=0.5, **both),
    )
    assert (config.seed, config.optimizer.name) == (3, "adamw")


def test_an_old_run_of_the_reference_preset_has_the_values_that_it_used():
    loss = from_dict(json.loads(OLD_CONFIG.replace('"default"', '"reference"'))).loss
    used = {"normalizer": "nonempty", "bias_correction": False, "min_count": 0.0, "strength": 1.0}
    assert loss.ghm_c == Harmonizing(bins=20, momentum=0.8, density="exact", **used)
    assert loss.ghm_r == Harmonizing(bins=12, momentum=0.6, density="exact", **used)


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("loss.bins", "did you mean loss.ghm_c.bins?"),
        ("loss.box_min_count", "did you mean loss.ghm_r.min_count?"),
        ("loss.normalizer", "did you mean loss.ghm_c.normalizer or loss.ghm_r.normalizer?"),
        ("loss.preset", "bias_correction False and min_count 0 in loss.ghm_c and loss.ghm_r"),
    ],
)
def test_an_old_name_gets_the_new_one_as_a_hint(key, now):
    assert re.fullmatch(rf"{key}: no such setting; .*{re.escape(now)}", str(unknown_key(key)))


def test_reading_a_config_does_not_start_jax():
    """Every process that decodes images reads one."""
    code = "import sys, ghm_jax.config; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
