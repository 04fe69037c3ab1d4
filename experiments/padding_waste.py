"""How much of the network's input is padding, for several choices of shape buckets.

    python experiments/padding_waste.py DATA_DIR [--name coco/2017] [--split validation]

Uses only the image sizes of a prepared data set; nothing is decoded. The result goes to
experiments/results/padding_waste.json.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from ghm_jax.config import Config
from ghm_jax.data import open_dataset
from ghm_jax.data.batching import choose_bucket
from ghm_jax.data.order import group_images
from ghm_jax.data.transforms import resized_size
from ghm_jax.runs.records import write_record

RESULT = Path(__file__).parent / "results" / "padding_waste.json"
SQUARE = ((1344, 1344),)
ORIENTED = ((800, 1344), (1344, 800), (1344, 1344))
FINER = ((800, 1088), (1088, 800), *ORIENTED)
BATCH = 16


def main(
    data_dir: tyro.conf.Positional[str], name: str = "coco/2017", split: str = "validation"
) -> None:
    """Measures and writes the table."""
    base = dataclasses.replace(Config().data, name=name, dir=data_dir)
    sizes = open_dataset(base, split).index.sizes
    resized = np.array(
        [resized_size(h, w, base.short_side, base.long_side) for h, w in sizes.tolist()]
    )
    images = np.arange(len(sizes))

    def grouped(buckets: tuple[tuple[int, int], ...]) -> dict[str, float | int]:
        groups = group_images(sizes, images, dataclasses.replace(base, buckets=buckets))
        seen = sum(len(group) * h * w for (h, w), group in groups.items())
        return {"padding": 1 - resized.prod(axis=1).sum() / seen, "programs": len(groups)}

    def mixed(buckets: tuple[tuple[int, int], ...]) -> dict[str, float | int]:
        """Batches of arbitrary images, padded to the first bucket that fits all of them."""
        rng, used, seen, kept = np.random.default_rng(0), set(), 0, 0
        for _ in range(1000):
            batch = resized[rng.choice(images, BATCH)]
            bucket = choose_bucket(tuple(batch.max(axis=0)), buckets)
            used.add(bucket)
            seen += BATCH * bucket[0] * bucket[1]
            kept += batch.prod(axis=1).sum()
        return {"padding": 1 - kept / seen, "programs": len(used)}

    rows = [
        {"choice": "one square", "buckets": SQUARE, **grouped(SQUARE)},
        {"choice": "by batch, images mixed", "buckets": ORIENTED, **mixed(ORIENTED)},
        {"choice": "by orientation (the default)", "buckets": ORIENTED, **grouped(ORIENTED)},
        {"choice": "by orientation and aspect ratio", "buckets": FINER, **grouped(FINER)},
    ]
    for row in rows:
        print(f"{row['choice']:<34}{row['padding']:>7.1%} padding, {row['programs']} programs")
    command = f"python experiments/padding_waste.py DATA_DIR --name {name} --split {split}"
    contents = {"images": len(sizes), "batch_size": BATCH, "rows": rows}
    device = "none: computed from sizes"
    write_record(RESULT, command, contents, packages=("numpy",), device=device)


if __name__ == "__main__":
    tyro.cli(main)
