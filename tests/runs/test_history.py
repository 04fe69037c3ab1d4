"""Of a file of records every line is a record as it was logged, or is skipped."""

import copy
import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_jax.plots.figures import recent_histogram
from ghm_jax.runs.history import read_history

HISTOGRAM = {"counts": [3.0, 0.0, 1.0], "weights": [0.5, 0.0, 2.0]}
GOOD = [{"step": s, "loss": 1.5, "seconds": 0.1 * s, "ghm_c": HISTOGRAM} for s in (1, 2, 3, 5)]
BAD_HISTOGRAMS = [
    {"counts": []},
    {"counts": [1], "weights": [1, 2]},
    {"counts": ["a"], "weights": [1]},
    {"counts": 5},
]
VALUES = st.sampled_from(
    [None, True, "", "1", -1, 0, 2, 2.0, 2**31, 10**400, float("nan"), [], [1], {}]
) | st.sampled_from([*BAD_HISTOGRAMS, {"counts": [1.0], "weights": [1.0]}])
ODD_LINES = ["", "{", "[1]", "null", "[" * 99999, '{"step": ' + "9" * 5000 + "}", '{"step": 4'] * 2


@settings(max_examples=int(os.environ.get("GHM_FUZZ_EXAMPLES", "150")), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(GOOD[0])), VALUES), max_size=3),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(ODD_LINES)), max_size=2),
    st.integers(0, 30),
)
def test_any_content_of_a_history_is_records_or_is_skipped(tmp_path_factory, changes, odd, cut):
    path = tmp_path_factory.getbasetemp() / "any_history"
    records = copy.deepcopy(GOOD)
    for place, name, value in changes:
        records[place][name] = value
    lines = [json.dumps(record) for record in records]
    for place, line in odd:
        lines.insert(place, line)
    text = "\n".join(lines) + "\n"
    path.write_text(text[: len(text) - cut] if cut else text)
    history = read_history(path)
    steps = [record["step"] for record in history]
    assert steps == sorted(set(steps))
    assert all(record in records or "nan" in repr(record) for record in history)
    untouched = [i for i in range(4) if i not in {place for place, _, _ in changes}]
    if len(untouched) == 4 and not cut:
        assert history == GOOD
    recent_histogram(history, "ghm_c")


def test_a_line_of_thousands_of_digits_or_brackets_is_skipped(tmp_path):
    lines = [json.dumps(GOOD[0]), *ODD_LINES, '{"step": 2, "loss": "high"}', json.dumps(GOOD[2])]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert read_history(tmp_path / "m.jsonl") == [GOOD[0], GOOD[2]]
