"""The order of training is a function of (seed, step); the images of a step share a bucket."""

import collections
import functools
import itertools

import cv2
import grain
import jax
import numpy as np
import pytest

from ghm_jax.config import Config, Data, Optimizer, Run
from ghm_jax.data import Dataset, train_batches, validation_batches
from ghm_jax.data.index import read_index
from ghm_jax.data.order import group_images, training_order
from ghm_jax.exceptions import ConfigError

BUCKETS = ((64, 96), (96, 64), (96, 96))


def shapes(count=13, landscape=(40, 60, 3), portrait=(60, 40, 3)):
    """Images in memory; every third one is portrait."""
    source = []
    for i in range(count):
        size = landscape if i % 3 else portrait
        encoded = cv2.imencode(".png", np.full(size, i, np.uint8))[1].tobytes()
        objects = {
            **{"bbox": [np.float32([0.1, 0.1, 0.6, 0.6])], "label": [0], "is_crowd": [False]},
            **{"area": [1], "id": [i + 1]},
        }
        source.append({"image": encoded, "image/id": i, "objects": objects})
    return Dataset(source=source, name="shapes", class_names=("a",), category_ids=(1,))


def config(buckets=BUCKETS, batch_size=2, seed=0, workers=0):
    return Config(
        seed=seed,
        data=Data(short_side=64, long_side=96, buckets=buckets, max_boxes=3),
        optimizer=Optimizer(batch_size=batch_size),
        run=Run(workers=workers),
    )


def take(count, batches):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def test_with_one_bucket_ids_and_seeds_are_those_of_one_plain_shuffle():
    """So that results from before images were grouped by bucket can be reproduced."""

    def build(positions, rng):
        return positions, rng.integers(2**63, size=len(positions)).tolist()

    for seed in (0, 7):
        plain = grain.MapDataset.range(11).seed(seed).shuffle().repeat()
        plain = plain.batch(4, batch_fn=tuple).random_map(build)
        groups = group_images(np.full((11, 2), 64), np.arange(11), config(((96, 96),)).data)
        grouped = training_order(groups, seed, 4).random_map(lambda d, rng: build(d.images, rng))
        for step in (*range(30), 100_000):
            assert grouped[step] == plain[step]


def test_the_images_of_a_step_share_one_bucket_and_orientation():
    seen = collections.Counter()
    for loaded in take(200, train_batches(shapes(), config(), 0)):
        shape = loaded.batch.images.shape[1:3]
        assert {tuple(size) for size in loaded.batch.image_size.tolist()} == {shape}
        seen[shape] += 1
    assert seen.keys() == {(64, 96), (96, 64)}  # no batch has to fall back to the square one
    assert abs(seen[96, 64] - 200 * 5 / 13) <= 1


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_all_images_are_seen_equally_often_whatever_their_group(batch_size):
    batches = take(130, train_batches(shapes(), config(batch_size=batch_size), 0))
    ids = np.concatenate([loaded.batch.image_id for loaded in batches])
    times = np.bincount(ids, minlength=13)
    assert len(times) == 13
    assert np.abs(times - 130 * batch_size / 13).max() <= 2


@pytest.mark.parametrize("buckets", [BUCKETS[:2], BUCKETS[2:]])
def test_a_step_may_have_one_image(buckets):
    batches = train_batches(shapes(), config(buckets, batch_size=1), 0)
    seen = [int(loaded.batch.image_id[0]) for loaded in take(26, batches)]
    assert len({*seen[:13]}) > 10  # of 13, in the order of two groups
    assert {*seen} == {*range(13)}


def test_each_group_is_reshuffled_every_epoch():
    batches = take(60, train_batches(shapes(), config(), 0))
    landscape = [b.batch.image_id for b in batches if b.batch.images.shape[1] == 64]
    ids = np.concatenate(landscape)
    epochs = ids[: len(ids) // 8 * 8].reshape(-1, 8)  # of thirteen images, eight are landscape
    assert all(len(set(epoch)) == 8 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs) >= 5


def test_validation_holds_every_image_once_bucket_by_bucket():
    settings = Config(data=config().data, run=Run(workers=0))
    batches = list(validation_batches(shapes(20), settings))
    assert [b.batch.images.shape for b in batches] == [(16, 64, 96, 3), (16, 96, 64, 3)]
    ids = np.concatenate([loaded.batch.image_id[loaded.valid] for loaded in batches])
    assert ids.tolist() == [i for i in range(20) if i % 3] + list(range(0, 20, 3))


def test_the_stream_is_the_same_after_resuming_with_other_workers_and_hosts(rng):
    dataset = shapes()
    whole = take(24, train_batches(dataset, config(batch_size=4, seed=5), 0))
    for workers, hosts in ((0, 1), (0, 2), (2, 1), (2, 2)):
        start = int(rng.integers(1, 20))
        settings = config(batch_size=4, seed=5, workers=workers)
        shares = [take(4, train_batches(dataset, settings, start, h, hosts)) for h in range(hosts)]
        for loaded, *of_hosts in zip(whole[start : start + 4], *shares, strict=True):
            together = jax.tree.map(lambda *arrays: np.concatenate(arrays), *of_hosts)
            assert jax.tree.structure(together) == jax.tree.structure(loaded)
            # Ids, and pixels and boxes after augmentation.
            for (path, value), other in zip(
                jax.tree.leaves_with_path(loaded), jax.tree.leaves(together), strict=True
            ):
                where = f"{jax.tree_util.keystr(path)} {workers} {hosts}"
                np.testing.assert_array_equal(other, value, err_msg=where)


def test_an_image_that_fits_in_no_bucket_is_reported_before_the_first_step():
    for buckets in (((64, 96), (32, 96)), ((64, 96),)):
        for batches in (functools.partial(train_batches, start_step=0), validation_batches):
            with pytest.raises(ConfigError, match=r"data.buckets: an image needs 96x64 pixels"):
                batches(shapes(), config(buckets))


def test_the_index_is_read_once_and_cached(tmp_path):
    source = shapes(5).source
    source[2]["objects"]["bbox"][0][3] = 0.1  # no width
    source[4]["objects"]["is_crowd"][0] = True
    source[3]["image"] = b"broken"
    cache = tmp_path / "index-train.npz"
    first = read_index(source, cache)
    assert first.sizes.tolist() == [[60, 40], [40, 60], [40, 60], [0, 0], [40, 60]]
    assert first.objects.tolist() == [1, 1, 0, 1, 0]
    assert first.crowds.tolist() == [0, 0, 0, 0, 1]
    assert first.degenerate.tolist() == [0, 0, 1, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]
    for a, b in zip(read_index([None] * 5, cache), first, strict=True):  # needs no record
        np.testing.assert_array_equal(a, b)
    cache.write_bytes(cache.read_bytes()[:40])
    assert read_index(source, cache).sizes.tolist() == first.sizes.tolist()
    assert read_index(source, tmp_path / "missing" / "index.npz").sizes.shape == (5, 2)
