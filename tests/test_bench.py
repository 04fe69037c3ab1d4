"""The benchmarks run and measure what they say; how fast it was is no test."""

import json

from ghm_jax.bench.losses import make_inputs, measure_losses
from ghm_jax.cli import main


def test_every_loss_is_measured_at_every_size():
    rows = measure_losses(((64, 64), (64, 96)), repeats=2)
    for size in ((64, 64), (64, 96)):
        of_size = {row.loss: row for row in rows if row.image_size == size}
        assert {"cross-entropy", "focal loss (optax)", "GHM-C", "GHM-C exact", "GHM-R"} <= set(
            of_size
        )
        assert of_size["focal loss (optax)"].to_focal == 1
        assert all(0 < row.fastest <= row.milliseconds for row in of_size.values())


def test_inputs_have_all_kinds_of_anchors():
    inputs = make_inputs(20_000)
    assert inputs.logits.shape == (20_000, 80)
    assert {-2, -1} < set(inputs.classes.tolist())


def test_the_command_prints_a_table_and_writes_it(tmp_path, capsys):
    out = tmp_path / "bench.json"
    main(["bench", "losses", "--sizes", "64", "64", "--repeats", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [row["loss"] in printed for row in record["rows"]] == [True] * len(record["rows"])
    assert record["versions"]["jax"]
