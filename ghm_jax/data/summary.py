"""What training skips in its data set, and how many images it replaced: nothing is silent."""

from collections.abc import Callable

from ghm_jax.batch import LoadedBatch
from ghm_jax.config import Config
from ghm_jax.data.dataset import Dataset


def input_notes(dataset: Dataset, config: Config) -> list[str]:
    """One line for each kind of data that training skips or drops, with its count.

    Settings stand in backticks, as in the messages of `ghm_jax.exceptions`.
    """
    data, index = config.data, dataset.index
    readable = index.sizes[:, 0] > 0
    empty = readable & (index.objects == 0)
    counted = index.objects + (index.crowds if config.anchors.crowd == "ignore" else 0)
    many = counted > data.max_boxes
    notes = []
    if not readable.all():
        notes.append(f"{(~readable).sum()} images cannot be read and are skipped")
    if empty.any() and not data.keep_empty:
        notes.append(
            f"{empty.sum()} of {len(empty)} images have no object to learn from and are skipped "
            "(`data.keep_empty` True keeps them)"
        )
    if index.degenerate.any():
        notes.append(f"{index.degenerate.sum()} boxes without width or height are dropped")
    if many.any():
        dropped = (counted - data.max_boxes)[many].sum()
        notes.append(
            f"warning: {many.sum()} images have more than {data.max_boxes} boxes; the smallest "
            f"{dropped} are dropped (`data.max_boxes` {counted.max()} keeps all)"
        )
    return notes


class ReplacementLog:
    """Reports how many images could not be decoded and were replaced: at the 1st, 2nd, 4th, ..."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.count = 0
        self._say, self._next = say, 1

    def record(self, batch: LoadedBatch) -> None:
        """Counts the replaced images of a batch."""
        self.count += int(batch.replaced.sum())
        if self.count >= self._next:
            self._say(
                f"warning: {self.count} images could not be decoded so far and were replaced by "
                "others (data.on_error is skip)"
            )
            while self._next <= self.count:
                self._next *= 2
