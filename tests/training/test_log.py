"""What training writes down, on a log that is fed by hand."""

import itertools

import numpy as np

METRICS = {
    **dict.fromkeys(("loss", "loss_class", "loss_box", "cross_entropy", "box_error"), 0.5),
    **{"num_positive": 9.0, "num_nonfinite": 0.0, "grad_norm": 1.0},
    **{"skipped": 0, "skipped_in_a_row": 0, "nonfinite_images": np.array([-1])},
    "ghm_c": {"counts": np.arange(10.0), "weights": np.ones(10)},
}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("ghm_jax.training.log.time.perf_counter", lambda: self.now)

    def batches(self, seconds, sizes=((64, 96),)):
        """Batches of 4 images of these sizes in turn, `seconds` later each time."""
        for pause, size in zip(seconds, itertools.cycle(sizes), strict=False):
            self.now += pause
            yield batch_of(*size)
