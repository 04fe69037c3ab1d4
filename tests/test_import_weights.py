"""Weights from files: what is read is what was written, what cannot be read is one line."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_tensors import leaves_by_tensor, random_tensors
from tiny import Listener, tiny_config

from ghm_jax.config import Model
from ghm_jax.data.schema import COCO_CATEGORIES
from ghm_jax.evaluate import evaluate
from ghm_jax.evaluation.detector import restore_state
from ghm_jax.exceptions import UserError
from ghm_jax.export import export
from ghm_jax.import_weights import import_run
from ghm_jax.models.weight_files import load_weights, locate
from ghm_jax.models.weight_names import BACKBONE, MMDETECTION, TORCHVISION
from ghm_jax.predict import predict
from ghm_jax.runs.directory import load_run
from ghm_jax.train import train
from ghm_jax.training import pretrained
from ghm_jax.training.build import make_model
from ghm_jax.training.optimizer import make_optimizer
from ghm_jax.training.pretrained import load_backbone
from ghm_jax.training.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = Model(backbone="resnet10", width=4, norm="frozen", channels=8, dtype="float32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where converted weights go in this test."""
    monkeypatch.setenv("GHM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def like_of(config, num_classes=3):
    """`params` and `batch_stats` of a config's network, as shapes."""
    model, optimizer = make_model(config, num_classes), make_optimizer(config)
    state = jax.eval_shape(lambda: init_state(config, model, optimizer))
    return {"params": state.params, "batch_stats": state.batch_stats}


def write_backbone(path, rng, model=MODEL):
    """An ImageNet classifier with the backbone of `model`: its tensors, also in the file."""
    like = like_of(tiny_config(model=model))
    like = {kind: {"backbone": tree["backbone"]} for kind, tree in like.items()}
    tensors = random_tensors(rng, BACKBONE, like)
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name] = np.abs(tensors[name]) + 0.5
    tensors |= {"fc.weight": np.ones((10, 32), np.float32), "fc.bias": np.ones(10, np.float32)}
    safetensors.numpy.save_file(tensors, path)
    return tensors


def error_of(function, *args, **kwargs):
    with pytest.raises(UserError) as refused:
        function(*args, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_backbone(variables, tensors):
    backbone = {kind: {"backbone": variables[kind]["backbone"]} for kind in variables}
    for name, (_, leaf) in leaves_by_tensor(BACKBONE, backbone).items():
        theirs = tensors[name]
        axes = (2, 3, 1, 0) if theirs.ndim == 4 else range(theirs.ndim)
        np.testing.assert_array_equal(leaf, theirs.transpose(*axes), name)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
def test_floats_of_every_size_become_float32(tmp_path, kind):
    values = np.array([[0.5, -3.0, 2.0**-14]]).astype(jnp.dtype(kind))
    safetensors.numpy.save_file({"a": values, "n": np.array([3])}, tmp_path / "w.safetensors")
    tensors = load_weights(tmp_path / "w.safetensors").tensors
    assert tensors["a"].dtype == np.float32
    np.testing.assert_array_equal(tensors["a"], values.astype(np.float32))
    assert tensors["n"].dtype == np.int64


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.safetensors", lambda whole: whole[:-5], ["truncated or damaged"]),
        ("cut.safetensors", lambda whole: whole[:20], ["truncated or damaged"]),
        ("empty.safetensors", lambda whole: b"", ["truncated or damaged"]),
        ("noise.safetensors", lambda whole: bytes(range(256)) * 9, ["truncated or damaged"]),
        ("other.safetensors", lambda whole: pickle.dumps({"a": 1}), ["truncated or damaged"]),
        ("none.safetensors", lambda whole: safetensors.numpy.save({}), ["holds no tensors"]),
        ("weights.h5", lambda whole: whole, ["not one of .safetensors, .pth"]),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, words):
    whole = safetensors.numpy.save({"a": np.ones((3, 4), np.float32)})
    (tmp_path / name).write_bytes(content(whole))
    line = error_of(load_weights, tmp_path / name)
    for word in (str(tmp_path / name), *words):
        assert word in line


def test_a_missing_file_and_a_directory_are_one_line(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for path in (tmp_path / "gone.safetensors", tmp_path / "folder.pth"):
        assert str(path) in error_of(load_weights, path)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"anything")
    assert 'pip install "ghm-jax[torch]"' in error_of(load_weights, tmp_path / "w.pth")


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_of_torch_gives_its_state_dict(tmp_path, rng, nested, old_format):
    torch = pytest.importorskip("torch", reason="the extra torch")
    values = rng.normal(size=(2, 3)).astype(np.float32)
    state = {"a": torch.tensor(values), "h": torch.ones(2).half(), "n": torch.tensor(5)}
    saved = {nested: state, "meta": {"epoch": 12, "classes": ("a",)}} if nested else state
    path = tmp_path / "w.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=not old_format)
    tensors = load_weights(path).tensors
    assert tensors.keys() == state.keys()
    np.testing.assert_array_equal(tensors["a"], values)
    assert tensors["h"].dtype == np.float32
    path.write_bytes(path.read_bytes()[:-100])
    line = error_of(load_weights, path)
    assert str(path) in line
    assert "truncated or damaged" in line


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="the extra torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "bomb": Bomb()}, tmp_path / "w.pth")
    line = error_of(load_weights, tmp_path / "w.pth")
    assert "refused" in line
    assert "w.pth" in line
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb()))
    assert "plain.pth" in error_of(load_weights, tmp_path / "plain.pth")
    assert not (tmp_path / "exploded").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    assert "not a state dict" in error_of(load_weights, tmp_path / "list.pth")


def hub(monkeypatch, download):
    module = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(module, "hf_hub_download", download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.parametrize(
    ("source", "repository", "file"),
    [
        ("hf://timm/resnet50.tv_in1k", "timm/resnet50.tv_in1k", "model.safetensors"),
        ("hf://me/mine/best.pth", "me/mine", "best.pth"),
        ("hf://me/mine/a/b.safetensors", "me/mine", "a/b.safetensors"),
    ],
)
def test_a_name_on_the_hub_is_downloaded(monkeypatch, tmp_path, source, repository, file):
    def download(*, repo_id, filename):
        assert (repo_id, filename) == (repository, file)
        return str(tmp_path / "blob")

    hub(monkeypatch, download)
    assert locate(source) == tmp_path / "blob"


def test_a_failed_download_is_one_line(monkeypatch):
    def download(**_):
        raise OSError("no network\nand a page of details")

    hub(monkeypatch, download)
    line = error_of(locate, "hf://timm/resnet50.tv_in1k")
    assert "hf://timm/resnet50.tv_in1k" in line
    assert "no network" in line
    assert "OWNER/NAME" in error_of(locate, "hf://resnet50")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "ghm-jax[hub]"' in error_of(locate, "hf://timm/resnet50.tv_in1k")


def test_a_backbone_is_converted_once(tmp_path, rng, cache, monkeypatch):
    path = tmp_path / "resnet10.safetensors"
    tensors = write_backbone(path, rng)
    model = dataclasses.replace(MODEL, weights=str(path))
    like = like_of(tiny_config(model=model))
    assert_backbone(load_backbone(model, like), tensors)
    (entry,) = cache.iterdir()
    assert entry.name.startswith("resnet10-4-7-")

    # From now on the cache answers, also under another name of the file.
    monkeypatch.setattr(pretrained, "load_weights", lambda path: pytest.fail("read again"))
    shutil.copy(path, tmp_path / "copy.safetensors")
    for name in ("resnet10.safetensors", "copy.safetensors"):
        model = dataclasses.replace(MODEL, weights=str(tmp_path / name))
        assert_backbone(load_backbone(model, like), tensors)


def test_another_content_or_architecture_gets_another_cache_entry(tmp_path, rng, cache):
    for number, model in enumerate((MODEL, MODEL, dataclasses.replace(MODEL, width=8)), 1):
        path = tmp_path / "weights.safetensors"
        tensors = write_backbone(path, rng, model)
        model = dataclasses.replace(model, weights=str(path))
        assert_backbone(load_backbone(model, like_of(tiny_config(model=model))), tensors)
        assert len(list(cache.iterdir())) == number
    model = dataclasses.replace(MODEL, weights=str(path))  # of the other width
    line = error_of(load_backbone, model, like_of(tiny_config(model=model)))
    assert "bn1.bias is (8,), in the model (4,)" in line
    assert str(path) in line


SAFE = safetensors.numpy.save(
    {
        "layer1.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "layer1.bias": np.arange(4, dtype=np.float16),
        "count": np.array([3], np.int64),
        "mask": np.array([True, False]),
    },
    {"classes": '["ant", "bee"]'},
)
NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.just(2**64), st.floats(), st.text(max_size=3),
    st.sampled_from([*NUMPY, "F8_E4M3", "BF16", "I4", "layer1.bias"]),
    st.lists(st.integers(-1, 30), max_size=3),
)  # fmt: skip


@st.composite
def changed_safetensors(draw) -> bytes:
    """A good file with a changed header, or with changed bytes."""
    size = int.from_bytes(SAFE[:8], "little")
    header, data = json.loads(SAFE[8 : 8 + size]), SAFE[8 + size :]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)))
        what = draw(st.sampled_from(["field", "entry", "rename", "remove", "double"]))
        if what == "field" and isinstance(header[name], dict):
            field = draw(st.sampled_from([*header[name], "more"]))
            header[name] = {**header[name], field: draw(ODD)}
        elif what == "entry":
            header[name] = draw(ODD)
        elif what == "remove" and len(header) > 1:
            del header[name]
        elif what == "rename":
            header[draw(st.text(max_size=3))] = header.pop(name)
        elif what == "double":
            header[f"{name}.2"] = header[name]
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    place = draw(st.integers(0, len(whole)))
    tail = draw(st.sampled_from([whole[place:]] * 3 + [b"", draw(st.binary(max_size=9))]))
    return whole[:place] + tail


def by_hand(encoded: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, read as its format is described."""
    size = int.from_bytes(encoded[:8], "little")
    header, data = json.loads(encoded[8 : 8 + size]), encoded[8 + size :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[first:last], NUMPY[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "150")), deadline=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(encoded=changed_safetensors())
def test_a_changed_safetensors_file_means_what_its_header_says_or_is_one_line(tmp_path, encoded):
    path = tmp_path / "w.safetensors"
    path.write_bytes(encoded)
    found, line = None, str(path)
    try:
        found = load_weights(path).tensors
    except UserError as error:
        line = str(error)
    assert str(path) in line
    assert "\n" not in line
    if found is None:
        return
    expected = by_hand(encoded)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        as_read = tensor.astype(np.float32) if tensor.dtype.kind == "f" else tensor
        np.testing.assert_array_equal(found[name], as_read)


def npz(content: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **content)
    return file.getvalue()


OTHER_FILES = [SAFE, npz({"a": np.ones(2)}), pickle.dumps({"a": 1}), b"\x81\xa1a\x01", b"", b"{}"]


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "150")), deadline=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(
    ending=st.sampled_from(
        [".safetensors", ".pth", ".pt", ".npz", ".msgpack", ".bin", ".ckpt", ".PTH", ".pth.tar"]
    ),
    start=st.sampled_from(OTHER_FILES),
    cut=st.integers(0, 2000),
    end=st.binary(max_size=30),
)
def test_any_bytes_with_any_ending_are_one_line(tmp_path, ending, start, cut, end):
    path = tmp_path / f"w{ending}"
    path.write_bytes(start[:cut] + end)
    if (ending, start[:cut] + end) == (".safetensors", SAFE):
        return
    line = error_of(load_weights, path)
    assert str(path) in line
    assert len(line) < 500 + len(str(path))
    if ending in (".pth", ".pt") and importlib.util.find_spec("torch") is None:
        assert 'pip install "ghm-jax[torch]", or save the weights as .safetensors' in line


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "150")), deadline=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), tail=st.integers(0, 99))
def test_a_changed_bit_in_a_pickle_of_torch_is_noticed(tmp_path, place, bit, tail):
    torch = pytest.importorskip("torch", reason="the extra torch")
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.tensor(values), "n": torch.tensor(5)}}, path)
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(whole[: len(whole) - max(0, tail - 80)])
    with contextlib.suppress(UserError):
        tensors = load_weights(path).tensors
        assert set(tensors) == {"a", "n"}
        np.testing.assert_array_equal(tensors["a"], values)
        assert tensors["n"] == 5


def test_a_pickle_of_torch_may_have_been_saved_without_checksums(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(load_weights(tmp_path / "w.pth").tensors["a"], np.ones(3))


def test_bad_weights_do_not_change_the_cache(tmp_path, rng, cache):
    path = tmp_path / "w.safetensors"
    tensors = write_backbone(path, rng)
    model = dataclasses.replace(MODEL, weights=str(path))
    like = like_of(tiny_config(model=model))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "truncated" in error_of(load_backbone, model, like)
    safetensors.numpy.save_file({**tensors, "layer9.weight": np.ones(3)}, path)
    assert "layer9.weight" in error_of(load_backbone, model, like)
    path.unlink()
    assert str(path) in error_of(load_backbone, model, like)
    assert not cache.exists()


def test_a_damaged_cache_is_one_line_and_an_unwritable_one_is_ignored(
    tmp_path, rng, cache, monkeypatch
):
    path = tmp_path / "w.safetensors"
    tensors = write_backbone(path, rng)
    model = dataclasses.replace(MODEL, weights=str(path))
    like = like_of(tiny_config(model=model))
    load_backbone(model, like)
    (entry,) = cache.iterdir()
    for file in files(entry):
        file.write_bytes(b"")
    assert f"{entry}: cached weights that cannot be read; delete" in error_of(
        load_backbone, model, like
    )
    monkeypatch.setenv("GHM_JAX_CACHE", str(path))  # a file, no directory
    assert_backbone(load_backbone(model, like), tensors)


def test_a_new_run_starts_from_the_weights_and_a_resumed_one_does_not_need_them(
    tmp_path, rng, dataset_dir
):
    path = tmp_path / "w.safetensors"
    tensors = write_backbone(path, rng)
    model = dataclasses.replace(MODEL, head_convs=0, weights=str(path))
    config = tiny_config(dataset_dir, model=model)
    still = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-30, steps=3)
    )
    state = train(still, tmp_path / "run")
    assert_backbone({"params": state.params, "batch_stats": state.batch_stats}, tensors)

    path.unlink()
    listener = Listener()
    train(still, tmp_path / "run", progress=listener)
    assert "complete at step 3" in listener.lines[-1]
    for restart in (True, False):  # a new run does need them
        run = tmp_path / ("run" if restart else "other")
        before = files(tmp_path)
        assert str(path) in error_of(train, still, run, restart=restart)
        assert files(tmp_path) == before


DETECTOR = dataclasses.replace(MODEL, head_convs=4)


def write_detector(path, rng, config, naming=MMDETECTION, num_classes=3):
    """A published detector with the network of `config`."""
    tensors = random_tensors(rng, naming, like_of(config, num_classes))
    for name in tensors:
        tensors[name] *= 0.1
        if name.endswith("running_var"):
            tensors[name] = np.abs(tensors[name]) + 0.5
    extra = {"bbox_head.loss_cls.acc_sum": np.ones(30, np.float32)} if naming is MMDETECTION else {}
    safetensors.numpy.save_file({**tensors, **extra}, path)
    return tensors


@pytest.fixture(scope="module")
def imported(dataset_dir, tmp_path_factory):
    """A run made of a file in mmdetection's names: the run, the file. Do not modify them."""
    folder = tmp_path_factory.mktemp("imported")
    config = tiny_config(dataset_dir, model=DETECTOR)
    path = folder / "w.safetensors"
    write_detector(path, np.random.default_rng(0), config)
    return import_run(str(path), config, folder / "run"), path


def test_an_imported_detector_is_a_run_that_can_be_evaluated(imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported[0].path, run)
    assert load_run(run)[1].data.classes == ("dark", "light", "absent")
    result = evaluate(run)
    assert (result.step, result.images) == (0, 6)
    assert json.loads((run / "metrics.json").read_text()) == result.summary()
    assert (run / "report.html").is_file()


def test_an_exported_detector_holds_what_was_imported(imported, tmp_path):
    run, path = imported
    theirs = safetensors.numpy.load_file(path)
    (out,) = export(run.path, tmp_path / "out.safetensors")
    ours = load_weights(out).tensors
    assert len(ours) == len(theirs) - 1  # without the loss's buffer
    for here, there in (
        ("backbone.body.layer2.0.conv1.weight", "backbone.layer2.0.conv1.weight"),
        ("backbone.fpn.extra_blocks.p7.bias", "neck.fpn_convs.4.conv.bias"),
        ("head.classification_head.conv.3.0.weight", "bbox_head.cls_convs.3.conv.weight"),
        ("head.classification_head.cls_logits.weight", "bbox_head.retina_cls.weight"),
        ("head.regression_head.bbox_reg.bias", "bbox_head.retina_reg.bias"),
    ):
        np.testing.assert_array_equal(ours[here], theirs[there])
    with safetensors.safe_open(out, "np") as file:
        assert json.loads(file.metadata()["classes"]) == ["dark", "light", "absent"]

    config = load_run(run.path)[1]
    again = import_run(str(out), config, tmp_path / "again")
    device = jax.devices()[0]
    first, second = (restore_state(r, config, device).variables for r in (run, again))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out.safetensors"]


def test_training_resumes_from_an_imported_detector(imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported[0].path, run)
    config = load_run(run)[1]
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-30, steps=1, warmup_steps=0)
    config = dataclasses.replace(config, optimizer=optimizer)
    shutil.rmtree(run)
    import_run(str(imported[1]), config, run)
    listener = Listener()
    state = train(config, run, progress=listener)
    assert "resuming at step 0" in listener.lines[0]
    before = restore_state(imported[0], load_run(imported[0].path)[1], jax.devices()[0]).variables
    jax.tree.map(np.testing.assert_array_equal, state.params, before["params"])


def of_classes(path, classes, target):
    """A copy of a file of weights with the names of its classes, as `export` writes them."""
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, target, {"classes": json.dumps(classes)})
    return tensors


def test_weights_of_the_same_classes_in_another_order_go_by_name(imported, tmp_path):
    config, path = load_run(imported[0].path)[1], tmp_path / "w.safetensors"
    tensors = of_classes(imported[1], ["absent", "dark", "light"], path)
    listener = Listener()
    run = import_run(str(path), config, tmp_path / "run", progress=listener)
    assert "by name (from 0): dark from 1, light from 2, absent from 0" in listener.lines[-1]
    variables = restore_state(run, load_run(run.path)[1], jax.devices()[0]).variables
    output = variables["params"]["class_head"]["output"]
    bias, weight = (tensors[f"bbox_head.retina_cls.{name}"] for name in ("bias", "weight"))
    np.testing.assert_array_equal(output["bias"], bias[[1, 2, 0]])  # one anchor
    np.testing.assert_array_equal(output["kernel"], weight[[1, 2, 0]].transpose(2, 3, 1, 0))


def test_weights_of_other_classes_leave_no_run(imported, tmp_path):
    config, path = load_run(imported[0].path)[1], tmp_path / "w.safetensors"
    of_classes(imported[1], ["sofa", "lamp", "absent"], path)
    line = error_of(import_run, str(path), config, tmp_path / "run")
    assert "has the classes sofa, lamp, absent, and lacks" in line
    assert line.partition("lacks")[2].count("dark, light") == 1
    assert str(path) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, bool])
def test_integers_in_the_place_of_weights_are_refused(imported, tmp_path, kind):
    config, path = load_run(imported[0].path)[1], tmp_path / "w.safetensors"
    tensors = safetensors.numpy.load_file(imported[1])
    name = "backbone.layer1.0.conv1.weight"
    tensors[name] = (tensors[name] * 50).astype(kind)
    safetensors.numpy.save_file(tensors, path)
    line = error_of(import_run, str(path), config, tmp_path / "run")
    assert f"{name} is {np.dtype(kind)}, not floating-point: quantized weights" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_floats_of_eight_bits_are_refused_as_quantized(tmp_path, kind):
    header = json.dumps({"a": {"dtype": kind, "shape": [3], "data_offsets": [0, 3]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x10\x20\x30")
    line = error_of(load_weights, path)
    assert f"a is {kind}: quantized weights are not supported" in line
    assert "unquantized" in line


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path, prefix):
    tensors = {"module.a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({prefix + name: x for name, x in tensors.items()}, path)
    found = load_weights(path).tensors
    assert found.keys() == tensors.keys()  # `module.a` is a name of the model: not all have it
    jax.tree.map(np.testing.assert_array_equal, found, tensors)


def test_a_detector_behind_a_prefix_is_imported_as_without_it(imported, tmp_path):
    config, path = load_run(imported[0].path)[1], tmp_path / "w.safetensors"
    tensors = safetensors.numpy.load_file(imported[1])
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file({**wrapped, "n_averaged": np.array(3)}, path)
    run = import_run(str(path), config, tmp_path / "run")
    device = jax.devices()[0]
    first, second = (restore_state(r, config, device).variables for r in (imported[0], run))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_torchvisions_background_class_is_dropped(dataset_dir, tmp_path, rng):
    config = tiny_config(dataset_dir, model=DETECTOR)
    path = tmp_path / "w.safetensors"
    tensors = write_detector(path, rng, config, TORCHVISION, num_classes=4)
    run = import_run(str(path), config, tmp_path / "run")
    variables = restore_state(run, load_run(run.path)[1], jax.devices()[0]).variables
    bias = tensors["head.classification_head.cls_logits.bias"]  # one anchor
    np.testing.assert_array_equal(variables["params"]["class_head"]["output"]["bias"], bias[1:])


def test_a_coco_detector_is_imported_without_coco_and_predicts(tmp_path, rng):
    config = tiny_config(tmp_path / "nothing", model=DETECTOR)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="coco/2017"))
    write_detector(tmp_path / "w.safetensors", rng, config, num_classes=80)
    run = import_run(str(tmp_path / "w.safetensors"), config, tmp_path / "run")
    assert load_run(run.path)[1].data.classes == tuple(COCO_CATEGORIES)
    image = cv2.imencode(".png", rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))[1]
    (tmp_path / "photo.png").write_bytes(image)
    found = predict(run.path, [str(tmp_path / "photo.png")], tmp_path / "out", threshold=0.0)
    assert found.images == 1
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    ids = {row["category_id"] for row in rows}
    assert ids
    assert ids <= set(COCO_CATEGORIES.values())
    assert "no prepared data set" in error_of(evaluate, run.path)


def test_a_detector_that_does_not_fit_leaves_no_run(dataset_dir, tmp_path, rng, imported):
    config = tiny_config(dataset_dir, model=DETECTOR)
    path = tmp_path / "w.safetensors"
    write_detector(path, rng, config, num_classes=7)
    assert "7 classes, the data set has 3" in error_of(
        import_run, str(path), config, tmp_path / "run"
    )
    tensors = write_detector(path, rng, config)
    wide = dataclasses.replace(config, model=dataclasses.replace(DETECTOR, channels=16))
    line = error_of(import_run, str(path), wide, tmp_path / "run")
    assert "w.safetensors: bbox_head.cls_convs.0.conv.bias is (8,), in the model (16,)" in line
    del tensors["bbox_head.retina_cls.bias"]
    safetensors.numpy.save_file(tensors, path)
    assert "lacks bbox_head.retina_cls.bias" in error_of(
        import_run, str(path), config, tmp_path / "run"
    )
    write_backbone(path, rng)
    assert "holds an ImageNet classifier" in error_of(
        import_run, str(path), config, tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()
    assert "already holds a checkpoint" in error_of(
        import_run, str(imported[1]), config, imported[0].path
    )


def test_an_export_needs_a_known_suffix_and_an_existing_directory(imported, tmp_path):
    assert ".safetensors" in error_of(export, imported[0].path, tmp_path / "out.onnx")
    assert "create it first" in error_of(export, imported[0].path, tmp_path / "a/b.safetensors")


def test_a_network_that_torchvision_lacks_is_not_exported(finished_run, tmp_path):
    line = error_of(export, finished_run[0].path, tmp_path / "out.safetensors")
    assert "GroupNorm" in line
    assert not list(tmp_path.iterdir())
