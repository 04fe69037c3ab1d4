"""The README's commands on a file like the published one: the same names, shapes and buffers."""

import json
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from published_tensors import MMDET_BUFFERS, published_shapes

from ghm_jax.cli import main
from ghm_jax.data import prepare_folder
from ghm_jax.data.schema import COCO_CATEGORIES
from ghm_jax.models.weight_names import MMDETECTION
from ghm_jax.runs.experiments import load_experiment
from ghm_jax.training.build import make_model

EXPERIMENT = Path(__file__).parents[2] / "experiments/coco_r50_ghm.py"
NAME = "retinanet_ghm_r50_fpn_1x_coco_20200130-a437fda3"


def write_published(path, rng):
    """A GHM RetinaNet-R50 of mmdetection with random weights; returns its tensors."""
    model = make_model(load_experiment(EXPERIMENT), num_classes=80)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    tensors = {}
    for name, shape in (published_shapes(MMDETECTION, like) | MMDET_BUFFERS).items():
        tensors[name] = 0.01 * rng.standard_normal(shape, np.float32)
        if name.endswith("running_var"):
            tensors[name] = np.ones(shape, np.float32)
    if path.suffix == ".pth":
        torch = pytest.importorskip("torch", reason="the extra torch")
        state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        for name in [name for name in state if name.endswith("running_var")]:
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(1)
        meta = {"epoch": 12, "iter": 87960, "CLASSES": tuple(COCO_CATEGORIES)}
        torch.save({"meta": meta, "state_dict": state}, path)
    else:
        safetensors.numpy.save_file(tensors, path)
    return tensors


def write_coco(folder, rng):
    """Two images with COCO's 80 categories, prepared as coco/2017."""
    images, annotations = [], []
    for i in range(2):
        pixels = rng.integers(0, 256, (64, 96, 3)).astype(np.uint8)
        (folder / f"{i}.png").write_bytes(cv2.imencode(".png", pixels)[1])
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": 96, "height": 64})
        annotations.append(
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 90,
                "bbox": [8.0, 8.0, 40.0, 40.0],
                "area": 1600.0,
                "iscrowd": 0,
            }
        )
    categories = [{"id": number, "name": name} for name, number in COCO_CATEGORIES.items()]
    path = folder / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    prepare_folder("coco/2017", folder / "data", {"validation": (folder, path)})
    return folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_with_the_published_names_is_imported_evaluated_and_exported(
    tmp_path, rng, monkeypatch, capsys, suffix
):
    monkeypatch.chdir(tmp_path)
    tensors = write_published(tmp_path / (NAME + suffix), rng)
    data = write_coco(tmp_path, rng)
    small = "--data.short-side 64 --data.long-side 96 --data.buckets 64 96 --run.workers 0"
    settings = f"--data.dir {data} {small} --predict.batch-size 2 --run.devices 1"
    settings += " --model.dtype float32"
    main(["import", NAME + suffix, str(EXPERIMENT), *settings.split()])
    assert f"evaluate it with: ghm-jax evaluate runs/{NAME}\n" in capsys.readouterr().out
    main(["evaluate", f"runs/{NAME}"])
    metrics = json.loads((tmp_path / "runs" / NAME / "metrics.json").read_text())
    assert (metrics["step"], metrics["images"]) == (0, 2)
    assert metrics["per_class"].keys() == COCO_CATEGORIES.keys()

    main(["export", f"runs/{NAME}", "--out", "out.safetensors"])
    out = safetensors.numpy.load_file("out.safetensors")
    assert len(out) == len(tensors) - len(MMDET_BUFFERS)
    for ours, theirs in (
        ("backbone.body.conv1.weight", "backbone.conv1.weight"),
        ("head.classification_head.cls_logits.bias", "bbox_head.retina_cls.bias"),
    ):
        np.testing.assert_array_equal(out[ours], tensors[theirs])
