"""What a person should know about the input of a run: never silent about what is left out."""

from collections.abc import Callable

from ghm_jax.batch import LoadedBatch
from ghm_jax.config import Config
from ghm_jax.data.dataset import Dataset


def input_notes(dataset: Dataset, config: Config) -> list[str]:
    """One line for each kind of thing in a data set that training leaves out, with its count."""
    data, index = config.data, dataset.index
    readable = index.sizes[:, 0] > 0
    empty = readable & (index.objects == 0)
    counted = index.objects + (index.crowds if config.anchors.crowd == "ignore" else 0)
    many = counted > data.max_boxes
    notes = []
    if not readable.all():
        notes.append(f"{(~readable).sum()} images cannot be read and are left out")
    if empty.any() and not data.keep_empty:
        notes.append(
            f"{empty.sum()} of {len(empty)} images have no object to learn from and are left out "
            "(--data.keep-empty keeps them)"
        )
    if index.degenerate.any():
        notes.append(f"{index.degenerate.sum()} boxes without width or height are left out")
    if many.any():
        left_out = (counted - data.max_boxes)[many].sum()
        notes.append(
            f"warning: {many.sum()} images have more than {data.max_boxes} boxes; the smallest "
            f"{left_out} are left out (--data.max-boxes {counted.max()} keeps all)"
        )
    return notes


class ReplacementLog:
    """Says how many images could not be decoded and were replaced: at 1, 2, 4, 8, ... of them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.count = 0
        self._say, self._next = say, 1

    def record(self, batch: LoadedBatch) -> None:
        """Takes a batch, before it goes to the devices."""
        self.count += int(batch.replaced.sum())
        if self.count >= self._next:
            self._say(
                f"warning: {self.count} images so far could not be decoded; others of the data set "
                "took their place (data.on_error is skip)"
            )
            while self._next <= self.count:
                self._next *= 2
