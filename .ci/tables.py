"""Writes the tables of measured results in README.md and docs/ from the files that hold them.

`make tables` runs it. A table stands between two comments, and everything between them is replaced:

    <!-- table: quickstart -->
    <!-- end -->

The name is that of a function in `TABLES`. A test checks that the committed tables are current.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.study import summary  # noqa: E402
from experiments.study.plan import QUESTIONS, Question  # noqa: E402
from ghm_jax.runs.experiments import load_experiment  # noqa: E402

RESULTS = ROOT / "experiments/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str) -> str:
    """A page with its tables as the results are now.

    Raises:
        KeyError: a table that is not in `TABLES`.
    """
    return _MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}", text)


def quickstart() -> str:
    """Scores and duration of `make quickstart`."""
    record = _read("quickstart")
    metrics, seconds = record["metrics"], record["seconds"]
    head = ("AP", "AP50", "AP75", "AR100", "images", "total time", "of which compiling")
    row = [f"{metrics[key]:.3f}" for key in ("AP", "AP50", "AP75", "AR100")]
    row += [f"{metrics['images']}", f"{seconds['make']} s", f"{seconds['compiling_the_step']} s"]
    return _table(head, [row], record)


def loss_cost() -> str:
    """Time and memory of the losses."""
    record = _read("bench_losses")
    sizes = list(dict.fromkeys(tuple(row["image_size"]) for row in record["rows"]))
    head = ["loss"]
    for size in sizes:
        head += [f"{_by(size)}", "relative to focal loss"]
    of_loss: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        of_loss.setdefault(row["loss"], []).append(row)
    rows = []
    for loss, measured in of_loss.items():
        cells = [loss]
        for row in measured:
            cells += [f"{row['milliseconds']:.0f} ms", f"{row['to_focal']:.2f}"]
        memory = measured[-1]["extra_memory"]
        rows.append([*cells, "-" if memory is None else f"{memory:.0f} x logits"])
    return _table([*head, "extra memory"], rows, record)


def data_cost() -> str:
    """CPU time of the input pipeline by stage."""
    record = _read("bench_data")
    head = ("stage", "CPU-ms per image", "images per CPU-second", "share of OpenCV's speed")
    rows = [
        (
            row["stage"],
            f"{row['milliseconds']:.1f}",
            f"{row['images_per_second']:.0f}",
            f"{100 * row['of_limit']:.0f} %",
        )
        for row in record["rows"]
    ]
    return _table(head, rows, record)


def padding() -> str:
    """Share of padding by choice of buckets."""
    record = _read("padding_waste")
    rows = [
        (
            row["choice"],
            ", ".join(map(_by, row["buckets"])),
            f"{100 * row['padding']:.1f} %",
            row["programs"],
        )
        for row in record["rows"]
    ]
    return _table(("batches", "buckets", "padding", "programs"), rows, record)


def train_step() -> str:
    """Time and memory of a training step by network."""
    record = _read("bench_train")
    stages = ("forward", "loss", "backward", "optimizer")
    head = ("network", "step", *stages, "images/s", "memory")
    rows = [
        (
            row["case"]["backbone"],
            f"{row['milliseconds']:.0f} ms",
            *(f"{row['split'][stage]:.0f} ms" for stage in stages),
            f"{row['images_per_second']:.1f}",
            f"{row['memory'] / 2**20:.0f} MiB",
        )
        for row in record["rows"]
        if row["part"] == "networks"
    ]
    return _table(head, rows, record)


def peers() -> str:
    """Training steps of other libraries beside ours."""
    record = _read("peers")
    names = {"ghm_jax": "ghm_jax", "torchvision": "torchvision", "keras_hub": "keras-hub"}
    rows = [
        (
            names[row["peer"]],
            f"{row['seconds']:.2f} s",
            f"{row['ratio']:.2f}",
            f"{row['fastest']:.2f} to {row['slowest']:.2f} s",
            f"{row['first_step']:.0f} s",
            f"{row['peak_mib']:,.0f} MiB",
            ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
        )
        for row in record["rows"]
    ]
    head = ("library", "step", "relative to ours", "range", "first step", "peak memory", "versions")
    return _table(head, rows, record)


def train_devices() -> str:
    """Time of a training step by number of virtual devices."""
    record = _read("bench_train")
    rows = [
        (
            row["case"]["devices"],
            "yes" if row["case"]["collectives"] else "no",
            f"{row['ratio']:.2f}",
        )
        for row in record["rows"]
        if row["part"] == "devices"
    ]
    return _table(("devices", "sums over devices", "time relative to one device"), rows, record)


def train_losses() -> str:
    """Time of a training step with GHM-C relative to focal loss."""
    record = _read("bench_train_growth")
    rows = [
        (
            row["case"]["classification"],
            f"{row['milliseconds']:.0f} ms",
            f"{row['processor_ratio']:.3f}",
            f"{row['ratio']:.3f}",
            "{:.2f} to {:.2f}".format(*row["ratio_quartiles"]),
        )
        for row in record["rows"]
        if row["part"] == "losses"
    ]
    head = ("classification loss", "step", "relative CPU time", "relative time", "quartiles")
    return _table(head, rows, record)


def train_growth() -> str:
    """Exponents of the time of a training step."""
    record = _read("bench_train_growth")
    value_of: dict[str, Callable[[dict[str, Any]], Any]] = {
        "image": lambda case: _by(case["image_size"]),
        "batch": lambda case: case["batch_size"],
        "classes": lambda case: case["num_classes"],
    }
    names = {"image": "pixels per image", "batch": "images per batch", "classes": "classes"}
    rows = []
    for part, exponent in record["growth"].items():
        values = [value_of[part](row["case"]) for row in record["rows"] if row["part"] == part]
        rows.append((names[part], values[0], values[-1], f"{exponent:.2f}"))
    return _table(("quantity", "from", "to", "exponent of the time"), rows, record)


def inference() -> str:
    """Time of inference, and the share of what follows the network."""
    record = _read("bench_inference")
    ours = {row["scores"]: row for row in record["rows"] if row["detector"] == "ghm-jax"}
    rows = [
        (
            row["detector"],
            f"{row['candidates']:,}",
            f"{row['milliseconds'] / 1000:.1f} s",
            f"{row['milliseconds'] / ours[row['scores']]['milliseconds']:.1f}",
            "-" if row["share"] is None else f"{100 * row['share']:.1f} %",
        )
        for row in record["rows"]
    ]
    head = ("detector", "scores above the threshold per image", "per call", "relative time")
    return _table((*head, "share of decoding and NMS"), rows, record)


def faults(name: str) -> str:
    """Faults that runs survived."""
    record = _read(name)
    rows = [
        [row[key] for key in ("fault", "tried", "survived", "data_lost")] for row in record["rows"]
    ]
    return _table(("fault", "tried", "survived", "data lost"), rows, record)


def gradients() -> str:
    """Shares of examples and of the gradient by gradient norm."""
    record = _read("quickstart_stats")
    groups = ("easy", "middle", "hard", "outlier")
    names = {
        "examples": "examples",
        "gradient of cross_entropy": "gradient: cross-entropy",
        "gradient of focal": "gradient: focal loss",
        "gradient of ghm_c": "gradient: GHM-C (this run)",
    }
    rows = [
        (names[row["what"]], *(f"{100 * row[group]:.2f} %" for group in groups))
        for row in record["rows"]
        if row["part"] == "classification"
    ]
    head = ("class scores", "easy (below 0.1)", "middle (to 0.5)", "hard (to 0.9)", "outlier")
    return _table(head, rows, record)


def softmax() -> str:
    """Recall of softmax losses: the last table among the stored outputs of notebook 03."""
    path = ROOT / "notebooks/03_your_own_data_and_loop.ipynb"
    outputs = [
        output["data"]
        for cell in json.loads(path.read_text())["cells"]
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    table = "".join([data for data in outputs if "text/markdown" in data][-1]["text/markdown"])
    recall: dict[str, dict[str, str]] = {}  # of a loss, by problem
    for line in table.splitlines()[2:]:
        problem, loss, mean, spread = (cell.strip() for cell in line.strip("|").split("|"))
        recall.setdefault(loss, {})[problem] = f"{mean} ({spread})"
    problems = list(next(iter(recall.values())))
    return _table(("loss", *problems), [(loss, *by.values()) for loss, by in recall.items()])


def gradient_scale() -> str:
    """Gradients of the published losses in units of those of one histogram."""
    record = _read("gradient_scale")
    rows = []
    for key, row in record["rows"].items():
        name, _, step = key.rpartition(", step ")
        cells = []
        for term in ("classification", "box"):
            low, high = row[term]["range"]
            cells += [f"{row[term]['ratio']:.1f} ({low:.1f} to {high:.1f})"]
            cells += [f"{row[term]['cosine']:.2f}"]
        rows.append((name, step, *cells))
    head = ("network", "step", "class scores (range of four batches)", "cosine")
    return _table((*head, "boxes", "cosine"), rows, record)


def tpu_parts() -> str:
    """Bytes and FLOPs of the parts of a training step, before and after it was made for TPUs."""
    key = "coco_r50_ghm train v5e:2x2"
    before, after = (_read(name)["rows"][key] for name in ("tpu_compiled_before", "tpu_compiled"))
    rows = []
    for part, cost in after["parts"].items():
        old = before["parts"][part]
        rows.append(
            (
                f"`{part}`",
                f"{old['bytes'] / 1e9:.2f} GB",
                f"{cost['bytes'] / 1e9:.2f} GB",
                f"{cost['copied'] / 1e9:.2f} GB ({cost['copies']})",
                f"{cost['flops'] / 1e9:,.0f} G",
                f"{1e3 * old['seconds']:.2f} ms",
                f"{1e3 * cost['seconds']:.2f} ms",
            )
        )
    totals = [sum(part["bytes"] for part in row["parts"].values()) for row in (before, after)]
    copied = sum(part["copied"] for part in after["parts"].values())
    copies = f"{copied / 1e9:.2f} GB ({after['copies']})"
    rows.append(("all", *(f"{total / 1e9:.2f} GB" for total in totals), copies, "", "", ""))
    temporaries = [row["memory"]["temporaries"] for row in (before, after)]
    rows.append(("temporaries", *(f"{size / 1e9:.2f} GB" for size in temporaries), *[""] * 4))
    head = ("part", "before", "after", "of which copies", "FLOPs", "bound before", "bound after")
    return _table(head, rows, _read("tpu_compiled"))


def tpu_predict() -> str:
    """Bytes and FLOPs of the parts of a prediction step."""
    record = _read("tpu_compiled")
    parts = record["rows"]["coco_r50_ghm predict v5e:2x2"]["parts"]
    rows = [
        (
            f"`{part}`",
            f"{cost['bytes'] / 1e9:.2f} GB",
            f"{cost['flops'] / 1e9:,.0f} G",
            f"{1e3 * cost['seconds']:.2f} ms",
        )
        for part, cost in parts.items()
    ]
    return _table(("part", "traffic", "FLOPs", "bound"), rows, record)


def tpu_recipes() -> str:
    """Memory and lower bounds of the recipes on TPU slices."""
    record = _read("tpu_compiled")
    rows = [
        (
            f"`{key.split()[0]}`",
            row["topology"],
            row["chips"],
            row["batch_per_chip"],
            f"{_peak(row) / 2**30:.1f} of {row['memory']['chip'] / 2**30:.0f} GiB",
            row["memory"]["largest_batch"],
            *(f"{1e3 * row['seconds'][kind]:.1f} ms" for kind in ("compute", "memory", "links")),
            f"{row['chips'] * row['batch_per_chip'] / row['bound']:,.0f}",
        )
        for key, row in sorted(record["rows"].items())
        if row["program"] == "train"
    ]
    head = ("recipe", "slice", "chips", "images per chip", "memory", "largest batch (estimated)")
    head = (*head, "compute", "memory", "links", "images/s at most")
    return _table(head, rows, record)


ASSUMED = 0.5
"""Part of the bound that a training run is assumed to reach, where its cost is estimated."""


def tpu_cost() -> str:
    """How long the recipes occupy a slice: their images at the bound, and at half of that rate."""
    record = _read("tpu_compiled")
    rows = []
    for key, row in sorted(record["rows"].items()):
        recipe, program, *_ = key.split()
        optimizer = load_experiment(ROOT / "experiments" / f"{recipe}.py").optimizer
        if program != "train" or row["chips"] * row["batch_per_chip"] != optimizer.batch_size:
            continue
        rate = row["chips"] * row["batch_per_chip"] / row["bound"]
        hours = optimizer.steps * optimizer.batch_size / rate / 3600
        times = (hours, hours / ASSUMED, row["chips"] * hours / ASSUMED)
        slice_of = (f"`{recipe}`", row["topology"], row["chips"], f"{optimizer.steps:,}")
        rows.append((*slice_of, *(f"{hours:.1f}" for hours in times)))
    head = ("recipe", "slice", "chips", "steps", "hours at the bound")
    head = (*head, f"hours at {ASSUMED:.0%} of it", f"chip-hours at {ASSUMED:.0%}")
    return _table(head, rows, record)


def tpu_scale() -> str:
    """Lower bounds of a step on larger slices, and the images that their hosts must deliver."""
    record, data = _read("tpu_compiled"), _read("bench_data")
    (per_core,) = (
        row["images_per_second"] for row in data["rows"] if row["stage"] == "record to batch"
    )
    rows = []
    for topology in ("v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4"):
        row = record["rows"][f"coco_r50_ghm train {topology}"]
        step = max(row["seconds"]["compute"], row["seconds"]["memory"])
        links = row["seconds"]["links"] * row["chips"] / (row["chips"] - 1)  # of endless chips
        for chips in (8, 64, 256, 1024):
            summing = links * (chips - 1) / chips
            apart, together = step / (step + summing), min(1.0, step / summing)
            rate = row["batch_per_chip"] / max(step, summing)
            rows.append(
                (
                    *(topology.partition(":")[0], chips, chips * row["batch_per_chip"]),
                    *(f"{1e3 * step:.1f} ms", f"{1e3 * summing:.2f} ms"),
                    *(f"{apart:.1%}", f"{together:.0%}", f"{chips * rate:,.0f}"),
                    *(f"{4 * rate:,.0f}", f"{rate / per_core:.1f}"),
                )
            )
    head = ("chip", "chips", "images per step", "step without links", "links")
    head = (*head, "efficiency, one after the other", "overlapped", "images/s at most")
    head = (*head, "per host of 4 chips", "host cores per chip")
    return _table(head, rows, record, data)


def study_table(
    table: Callable[[Sequence[summary.Row]], str], key: str, origin: bool = False
) -> str:
    """A table of the finished rows of a question, and, once per set of runs, how they were made."""
    rows = summary.rows(*_study(key))
    end = _study_origin([run for row in rows for run in row.runs]) if origin else "\n"
    return table(rows) + end


def study_tuning(key: str) -> str:
    """AP of the runs that the settings were chosen by."""
    return summary.tuning_table(*_study(key)) + "\n"


def study_sensitivity() -> str:
    """How much the losses depend on learning rate and weight."""
    return summary.sensitivity_table(*_study("H1")) + "\n"


def study_noise() -> str:
    """Noise of the gradient with and without a floor."""
    record = _read("study/variance")
    return f"{summary.noise_table(record['rows'])}\n\n{_provenance(record)}\n"


def study_rest() -> str:
    """Where scores come to rest."""
    return summary.rest_table(_read("study/variance")["rows"]) + "\n"


def _study(key: str) -> tuple[Question, dict[str, dict[str, Any]]]:
    """A question, and all results."""
    (question,) = (question for question in QUESTIONS if question.key == key)
    return question, summary.read_results(RESULTS / "study/runs.jsonl")


def _study_origin(runs: Sequence[Mapping[str, Any]]) -> str:
    """How the runs of a table were made."""
    if not runs:
        return "\n\nNot finished.\n"
    dates = sorted({run["date"] for run in runs})
    record = {
        **runs[0],
        "path": "experiments/results/study/runs.jsonl",
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "seconds": sum(run["seconds"] for run in runs),
        "note": f"{len(runs)} runs, one core each",
    }
    del record["load_average"]
    return f"\n\n{_provenance(record)}\n"


def _peak(row: dict[str, Any]) -> int:
    return sum(row["memory"][name] for name in ("arguments", "outputs", "temporaries", "code"))


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        quickstart,
        *(loss_cost, data_cost, padding),
        *(train_step, peers, train_devices, train_losses, train_growth),
        *(
            inference,
            gradients,
            gradient_scale,
            softmax,
            tpu_parts,
            tpu_predict,
            tpu_recipes,
            tpu_scale,
            tpu_cost,
        ),
    )
}
"""Name in a page's comment -> its table."""
TABLES |= {
    "faults": functools.partial(faults, "fault_injection"),
    "faults_gs": functools.partial(faults, "fault_injection_gs"),
    "study_sensitivity": study_sensitivity,
    "study_noise": study_noise,
    "study_rest": study_rest,
    "study_outliers": functools.partial(study_table, summary.outliers_table, "H5", origin=True),
    "study_h12_calibration": functools.partial(study_table, summary.calibration_table, "H12"),
    "study_h12_bins": functools.partial(
        study_table, lambda rows: summary.bins_table(summary.at_base_weight(rows)), "H12"
    ),
}
for _key in ("H1", "H12", "H3", "H13", "H14", "H11", "H9", "H15", "H2", "H4", "H7"):
    _name = f"study_{_key.lower()}"
    TABLES[_name] = functools.partial(study_table, summary.scores_table, _key, origin=True)
    if _key in ("H12", "H3", "H13", "H14", "H9"):
        TABLES[f"{_name}_iou"] = functools.partial(study_table, summary.iou_table, _key)
    if _key in ("H1", "H3", "H13", "H11", "H9", "H15"):
        TABLES[f"{_name}_tuning"] = functools.partial(study_tuning, _key)


def _read(name: str) -> dict[str, Any]:
    """A file of results, which then knows where it lies."""
    path = RESULTS / f"{name}.json"
    return {**json.loads(path.read_text()), "path": path.relative_to(ROOT).as_posix()}


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], *records: dict[str, Any]) -> str:
    """A Markdown table, and below it how each of the records was measured."""
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return table + "".join(f"\n{_provenance(record)}\n" for record in records)


def _provenance(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    facts = [record["date"], record["device"]]
    if "load_average" in record:
        facts.append(f"load average {record['load_average']:.0f}")
    if "data" in record:
        facts.insert(0, record["data"])
    if "images" in record:
        facts.insert(0, f"{record['images']:,} images")
    if "note" in record:
        facts.append(record["note"])
    if isinstance(record.get("seconds"), int):
        facts.append(f"{record['seconds'] / 60:.0f} minutes in total")
    return f"`{record['path']}`: `{record['command']}`; {'; '.join(facts)}; {versions}."


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
