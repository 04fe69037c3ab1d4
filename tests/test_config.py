"""Settings as data: there and back again, and every check by name."""

import dataclasses
import json
import math
import re

import pytest

from ghm_jax.config import Config, differences, flatten, from_dict, to_dict, unknown_key
from ghm_jax.exceptions import ConfigError


def changed(**settings) -> Config:
    """The default config with some settings changed, by dotted name (`__` for the dot)."""
    config = Config()
    for key, value in settings.items():
        *section, name = key.split("__")
        if section:
            part = dataclasses.replace(getattr(config, section[0]), **{name: value})
            config = dataclasses.replace(config, **{section[0]: part})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def test_defaults_pass_the_checks_on_any_usual_number_of_devices():
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


def test_whole_numbers_are_floats_where_a_float_is_meant():
    config = from_dict({"loss": {"momentum": 0}, "optimizer": {"clip_norm": 10}})
    assert isinstance(config.loss.momentum, float)
    assert config.optimizer.clip_norm == 10.0


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"loss": {"momentun": 0.9}}, "loss.momentun", "loss.momentum"),
        ({"optimiser": {}}, "optimiser", "optimizer"),
        ({"loss": {"learning_rate": 0.9}}, "loss.learning_rate", "optimizer.learning_rate"),
    ],
)
def test_unknown_keys_are_one_line_with_the_nearest_name(values, key, near):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: no such setting") as error:
        from_dict(values)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_like_no_other_points_to_the_list():
    assert "--help" in unknown_key("qqqq")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("loss", "bins", 30.5),
        ("loss", "bins", True),
        ("loss", "bins", "30"),
        ("loss", "momentum", "0.9"),
        ("loss", "momentum", None),
        ("loss", "momentum", False),
        ("loss", "box", "l2"),
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


def test_a_section_must_be_a_section():
    with pytest.raises(ConfigError, match=r"^loss: "):
        from_dict({"loss": 3})


POSITIVE = """data.short_side data.max_boxes model.width model.stem_kernel model.channels
    anchors.octaves anchors.scale loss.bins loss.box_bins loss.mu optimizer.steps
    optimizer.learning_rate optimizer.clip_norm predict.candidates predict.max_detections
    run.log_every run.checkpoint_every run.keep optimizer.batch_size predict.batch_size"""
NOT_NEGATIVE = """seed model.head_convs loss.min_count loss.box_min_count loss.weight
    loss.box_weight optimizer.weight_decay optimizer.warmup_steps run.workers run.devices
    predict.nms_sigma"""
SHARES = """anchors.positive_iou anchors.negative_iou predict.nms_iou data.flip
    predict.score_threshold optimizer.warmup_factor loss.strength loss.box_strength"""
BELOW_ONE = "loss.momentum loss.box_momentum optimizer.momentum"
CHOICES = """model.norm model.head_norm model.dtype model.p6_from anchors.convention anchors.crowd
    loss.classification loss.box loss.preset loss.density loss.ghm_scope loss.normalizer
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
    ("data.long_side", 1345),
    ("data.short_side", 1334),
    ("anchors.negative_iou", 0.6),
    ("anchors.ratios", ()),
    ("anchors.ratios", (1.0, 0.0)),
    ("anchors.ratios", (1.0, math.nan)),
    ("optimizer.warmup_steps", 90_000),
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


def test_a_misspelt_backbone_is_met_with_the_right_one():
    with pytest.raises(ConfigError, match=r"did you mean resnet50\?"):
        changed(model__backbone="resnet-50").check()


def test_a_resnext_needs_a_width_that_its_groups_divide():
    with pytest.raises(ConfigError, match=r"^model\.width: 24 .*multiple of 16$"):
        changed(model__backbone="resnext50_32x4d", model__width=24).check()
    changed(model__backbone="resnext50_32x4d", model__width=16).check()
    changed(model__backbone="resnet50", model__width=24).check()


def test_differences_name_what_decides_a_result():
    new = changed(seed=1, loss__momentum=0.9, run__devices=4, data__dir="elsewhere")
    assert differences(Config(), new) == {"seed": (0, 1), "loss.momentum": (0.75, 0.9)}
    assert differences(new, new) == {}


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
