"""What a step sees is a function of the seed and the step: not of workers, hosts or restarts."""

import dataclasses
import itertools
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest

from ghm_jax.batch import NO_CLASS
from ghm_jax.config import Anchors, Config, Data, Optimizer, Predict, Run
from ghm_jax.data import Dataset, DigitScenes, open_dataset, train_batches, validation_batches

BATCH = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twenty-two scenes to train on, eleven to validate: neither divides by the batch size."""
    return Config(
        seed=3,
        data=Data(
            name="digit_scenes",
            dir=str(tmp_path_factory.mktemp("data")),
            short_side=160,
            long_side=160,
            buckets=((160, 160),),
            max_boxes=20,
        ),
        optimizer=Optimizer(batch_size=BATCH),
        predict=Predict(batch_size=4),
        run=Run(workers=0),
    )


@pytest.fixture(scope="module")
def datasets(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitScenes, "SCENES", {"train": 22, "validation": 11})
        return {split: open_dataset(config.data, split) for split in ("train", "validation")}


def take(count, batches):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def with_workers(config, workers):
    return dataclasses.replace(config, run=Run(workers=workers))


def test_every_epoch_holds_every_image_once_in_a_new_order(config, datasets):
    batches = take(11, train_batches(datasets["train"], config, 0))  # 66 images: three epochs
    ids = np.concatenate([loaded.batch.image_id for loaded in batches]).reshape(3, 22)
    for epoch in ids:
        assert len(set(epoch.tolist())) == 22
    assert (ids[0] != ids[1]).any()
    assert (ids[1] != ids[2]).any()


def test_worker_processes_change_nothing(config, datasets):
    here = take(5, train_batches(datasets["train"], config, 2))
    there = take(5, train_batches(datasets["train"], with_workers(config, 2), 2))
    for a, b in zip(here, there, strict=True):
        assert_equal(a, b)
    assert all(type(value) is np.ndarray for value in jax.tree.leaves(there[0]))


def test_starting_at_a_later_step_gives_the_same_batches(config, datasets):
    whole = take(9, train_batches(datasets["train"], config, 0))
    for start in (1, 4, 7):
        resumed = take(9 - start, train_batches(datasets["train"], config, start))
        for a, b in zip(whole[start:], resumed, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_get_contiguous_shares_of_the_one_batch(config, datasets, hosts):
    for read in (
        lambda *host: train_batches(datasets["train"], config, 5, *host),
        lambda *host: validation_batches(
            datasets["validation"],
            dataclasses.replace(config, predict=Predict(batch_size=6)),
            *host,
        ),
    ):
        whole = take(2, read())
        shares = [take(2, read(host, hosts)) for host in range(hosts)]
        for loaded, *of_hosts in zip(whole, *shares, strict=True):
            together = jax.tree.map(lambda *arrays: np.concatenate(arrays), *of_hosts)
            assert_equal(loaded, together)


def test_the_seed_determines_the_order(config, datasets):
    other = dataclasses.replace(config, seed=4)
    a, b = (take(3, train_batches(datasets["train"], c, 0)) for c in (config, other))
    assert any((x.batch.image_id != y.batch.image_id).any() for x, y in zip(a, b, strict=True))


def test_flips_are_drawn_per_image_and_mirror_pixels_and_boxes(config, datasets):
    plain, flipped, mixed = (
        dataclasses.replace(config, data=dataclasses.replace(config.data, flip=p))
        for p in (0.0, 1.0, 0.5)
    )
    steps = 8
    batches = [take(steps, train_batches(datasets["train"], c, 0)) for c in (plain, flipped, mixed)]
    turned = []
    for loaded in zip(*batches, strict=True):
        a, b, c = (each.batch for each in loaded)
        np.testing.assert_array_equal(b.images, a.images[:, :, ::-1])
        real = a.truth.labels >= 0
        before, after = a.truth.boxes[real], b.truth.boxes[real]
        np.testing.assert_allclose(after[:, [2, 0]], 160 - before[:, [0, 2]])
        np.testing.assert_array_equal(after[:, [1, 3]], before[:, [1, 3]])
        for i in range(BATCH):
            turned.append((c.images[i] != a.images[i]).any())
            np.testing.assert_array_equal(c.images[i], (b if turned[-1] else a).images[i])
    assert 0.2 < np.mean(turned) < 0.8
    per_step = np.reshape(turned, (steps, BATCH))
    assert (per_step.any(axis=1) & ~per_step.all(axis=1)).any()  # not one draw for the batch


def test_validation_holds_every_image_once_in_order(config, datasets):
    batches = list(validation_batches(datasets["validation"], config))
    assert len(batches) == 3
    assert all(loaded.batch.images.shape == (4, 160, 160, 3) for loaded in batches)
    valid = np.concatenate([loaded.valid for loaded in batches])
    ids = np.concatenate([loaded.batch.image_id for loaded in batches])
    assert valid.tolist() == [True] * 11 + [False]
    stored = [int(record["image/id"]) for record in datasets["validation"].source]
    assert ids[valid].tolist() == stored
    assert len(set(stored)) == 11
    assert (batches[-1].batch.truth.labels[-1] == NO_CLASS).all()


def test_validation_is_not_flipped(config, datasets):
    always = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=1.0))
    a, b = (take(1, validation_batches(datasets["validation"], c))[0] for c in (config, always))
    assert_equal(a, b)


@pytest.mark.parametrize(("crowd", "kept"), [("drop", 0), ("ignore", 1)])
def test_a_batch_holds_crowds_only_if_training_ignores_them(crowd, kept):
    encoded = cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    objects = {
        "bbox": [np.float32([0, 0, 0.5, 0.5]), np.float32([0.5, 0.5, 1, 1])],
        **{"label": [0, 0], "is_crowd": [False, True], "area": [1, 1], "id": [1, 2]},
    }
    source = [{"image": encoded, "image/id": i, "objects": objects} for i in (1, 2)]
    dataset = Dataset(source=source, name="crowd", class_names=("a",), category_ids=(1,))
    config = Config(
        data=Data(short_side=64, long_side=64, buckets=((64, 64),)),
        anchors=Anchors(crowd=crowd),
        optimizer=Optimizer(batch_size=2),
        run=Run(workers=0),
    )
    (loaded,) = take(1, train_batches(dataset, config, 0))
    boxes, labels, is_crowd = loaded.batch.truth
    assert is_crowd.sum(axis=1).tolist() == [kept, kept]
    assert (boxes[is_crowd][:, [1, 3]] == [32, 64]).all()
    assert (labels == 0).sum(axis=1).tolist() == [1, 1]
    assert (labels[labels != 0] == NO_CLASS).all()
    assert (labels[is_crowd] == NO_CLASS).all()


def test_a_batch_that_cannot_be_split_over_the_hosts_is_refused(config, datasets):
    with pytest.raises(ValueError, match="6 images cannot be split over 4 processes"):
        train_batches(datasets["train"], config, 0, 0, 4)


def test_reading_needs_neither_absl_app_nor_tensorflow(config, datasets, tmp_path):
    """In a plain script with workers, like a notebook or the command line."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from ghm_jax.config import Config, Data, Predict, Run\n"
        "from ghm_jax.data import open_dataset, validation_batches\n"
        "if __name__ == '__main__':\n"
        f"    data = Data(name='digit_scenes', dir={config.data.dir!r}, short_side=160,\n"
        "                long_side=160, buckets=((160, 160),))\n"
        "    config = Config(data=data, predict=Predict(batch_size=4), run=Run(workers=1))\n"
        "    batches = list(validation_batches(open_dataset(data, 'validation'), config))\n"
        "    print(sum(loaded.valid.sum() for loaded in batches), 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout == "11 False\n", done.stderr
