"""What is measured on an accelerator, at small size on the CPU."""

import json
import os
import sys

import pytest

from experiments import accelerator_check, numerics
from experiments.accelerator_check import Part, parts, run
from experiments.peers.__main__ import start


def test_a_part_gives_what_it_wrote():
    code = "import sys; open(sys.argv[2], 'w').write('{\"rows\": [3]}')"
    assert run(Part("good", ("-c", code), 1.0), 60) == {"rows": [3]}


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("import time; time.sleep(60)", 1.5, "not done after 2 s"),
        ("print('fine'); raise SystemExit('no\\nmemory')", 60, "memory"),
        ("pass", 60, "no message"),  # it wrote nothing
        ("pass", 0.5, "no time left"),
    ],
)
def test_a_part_that_gives_nothing_says_why(code, seconds, reason):
    assert run(Part("bad", ("-c", code), 1.0), seconds) == {"failed": reason}


def test_what_is_done_is_kept_when_a_later_part_fails(tmp_path, monkeypatch, capsys):
    def planned(small):
        code = "import sys; open(sys.argv[2], 'w').write('{}')"
        return [Part("first", ("-c", code), 0.5), Part("second", ("-c", "1 / 0"), 0.5)]

    monkeypatch.setattr(accelerator_check, "parts", planned)
    accelerator_check.main(minutes=1, out=tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert kept == {"first": {}, "second": {"failed": "ZeroDivisionError: division by zero"}}
    assert "first: done" in capsys.readouterr().out


def test_parts_are_in_order_of_value_and_share_the_time():
    for small in (False, True):
        planned = parts(small)
        assert [part.name for part in planned][:3] == ["numerics", "losses", "train_8"]
        assert sum(part.share for part in planned) <= 1.0 + 1e-9


@pytest.mark.slow
def test_numerics_on_the_cpu_are_those_of_float64_and_of_the_cpu(tmp_path, quick_compilation):
    numerics.main(small=True, out=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    of_losses = [value for name, value in rows.items() if "float64" in name]
    assert len(of_losses) == 4
    assert max(of_losses) < 1e-5
    assert rows["share of anchors with another target"] == 0
    assert rows["logits in float32 against the CPU in float32"] < 1e-5
    assert 1e-4 < rows["logits in bfloat16 against the CPU in float32"] < 0.05


FAKE = """#!{python}
import sys
print("a library says hello")
print('{{"first_step": 2.5, "versions": {{"jax": "1"}}, "peak_mib": 10}}', flush=True)
for i, _ in enumerate(sys.stdin):
    print('{{"seconds": %d, "peak_mib": %d}}' % ({seconds} + i, 20 + i), flush=True)
"""


def test_peers_take_turns_and_are_compared_round_by_round(tmp_path):
    peers = []
    for name, seconds in (("ours", 2), ("theirs", 4)):
        path = tmp_path / name
        path.write_text(FAKE.format(python=sys.executable, seconds=seconds))
        os.chmod(path, 0o755)
        peers.append(start(name, str(path), []))
    for _ in range(3):
        for peer in peers:
            peer.step()
    for peer in peers:
        peer.stop()
    assert peers[1].row(peers[0]) == {
        "peer": "theirs", "seconds": 5, "fastest": 4, "slowest": 6,
        "ratio": 5 / 3,  # the median of 4/2, 5/3 and 6/4
        "first_step": 2.5, "peak_mib": 22, "versions": {"jax": "1"},
    }  # fmt: skip
