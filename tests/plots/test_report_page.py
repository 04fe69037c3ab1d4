"""The report in a real browser: nothing is wider than a phone, and the console is empty."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from coco_scene import detections_of, moved, scene

from ghm_jax.analysis.gradient_stats import DIFFICULTY
from ghm_jax.evaluation.error_analysis import error_analysis
from ghm_jax.plots import Sample, render_report
from ghm_jax.runs.metrics import METRICS

WIDTHS = (390, 1280)
FRAMES = "".join(
    f'<iframe src="report.html" style="border:0;width:{width}px;height:900px"></iframe>'
    for width in WIDTHS
)
MEASURE = """<pre id="found"></pre><script>
onload = () => { document.getElementById("found").textContent = [...document.querySelectorAll(
  "iframe")].map(f => f.contentDocument.documentElement.scrollWidth).join(" "); };
</script>"""


def random_part(rng, loss, losses, bins=30):
    gradient = {name: rng.dirichlet(np.ones(bins)).tolist() for name in losses}
    shares = {name: rng.dirichlet(np.ones(4)) for name in ("examples", *losses)}
    return {
        "loss": loss,
        "counts": rng.integers(0, 10**6, bins).tolist(),
        "positive_counts": rng.integers(0, 100, bins).tolist(),
        "ema": rng.uniform(0, 10**6, bins).tolist(),
        "weights": [None, *rng.uniform(0.01, 100, bins - 1).tolist()],
        "gradient": gradient,
        "difficulty": {
            name: {
                "range": list(limits),
                "examples": shares["examples"][i],
                "gradient": {key: shares[key][i] for key in losses},
            }
            for i, (name, limits) in enumerate(DIFFICULTY.items())
        },
    }


@pytest.fixture
def page(rng):
    truth = scene(rng)
    found = detections_of(truth)
    errors = error_analysis(truth, [moved(found[0], 0.6), *found[1:]])
    image = rng.integers(0, 255, (120, 160, 3)).astype(np.uint8)
    return render_report(
        title="a_run_with_a_name_that_is_rather_long_and_has_no_space_to_break_it_anywhere",
        config={"loss.ghm_c.bins": 30, "data.buckets": ((800, 1344), (1344, 800))},
        history=[{"step": i, "loss": 1.0 / i, "loss_class": 1.0 / i} for i in range(1, 9)],
        figures_of_merit=dict.fromkeys(METRICS, 0.5),
        per_class={"cat": 0.5, "a class with a name that is rather long, too": 0.25},
        samples=[
            Sample(
                image_id=1,
                image=image,
                boxes=np.zeros((0, 4), np.float32),
                labels=np.zeros(0, np.int32),
                detected_boxes=np.zeros((0, 4), np.float32),
                detected_labels=np.zeros(0, np.int32),
                detected_scores=np.zeros(0, np.float32),
            )
        ],
        class_names=("cat", "dog"),
        facts={"device": "one"},
        errors=errors,
        stats={
            "step": 7,
            "split": "validation",
            "images": 64,
            "batch_size": 16,
            "classification": random_part(rng, "ghm_c", ("cross_entropy", "focal", "ghm_c")),
            "box": random_part(rng, "smooth_l1", ("asl1", "smooth_l1")),
        },
    )


def test_the_page_is_small_and_loads_nothing(page):
    assert len(page.encode()) < 500_000
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    for heading in ("Class scores now", "Boxes now", "What is wrong", "Calibration"):
        assert f"<h2>{heading}</h2>" in page


@pytest.mark.slow
def test_a_browser_shows_the_page_at_phone_width_without_errors(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium")
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><body>{FRAMES}{MEASURE}")
    flags = (
        "--headless --no-sandbox --disable-gpu --allow-file-access-from-files "
        "--hide-scrollbars --enable-logging=stderr --virtual-time-budget=5000 --dump-dom "
        f"--user-data-dir={tmp_path / 'profile'}"
    )
    address = (tmp_path / "frames.html").as_uri()
    done = subprocess.run(
        [browser, *flags.split(), address], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="found">([\d ]+)</pre>', done.stdout)
    assert found, done.stdout[-2000:]
    assert tuple(map(int, found[1].split())) == WIDTHS
