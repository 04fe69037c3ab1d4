"""The questions of the study, and the losses that each compares. Data only.

All losses are tuned alike, with seed 0: twice and half the best weight so far are tried until both
are worse (up to 32 times the base value). For the four losses that matter most, twice and half the
learning rate as well (`GRID`); as that was never better, the others are tuned by weight alone.
The setting with the highest AP is then trained with fresh seeds, for as many steps: what is best
for half of them is not best for all. Only `Question.longer` departs from that. Where an option of a
loss is compared (bins, momentum), its variants take the setting of the loss itself, with one seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ghm_jax.config import REFERENCE, Config
from ghm_jax.runs.experiments import load_experiment

EXPERIMENTS = Path(__file__).parents[1]
GRID = ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0))
"""(learning rate, weight), as factors of the base values: where tuning starts."""
STEPS = 1200
"""Of a run; half of the quickstart's."""
TUNING_SEED = 0
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Entry:
    """A loss to compare: changes of the quickstart's config, by dotted name."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tuned: str = "loss.weight"
    """The weight that is tuned."""
    grid: tuple[tuple[float, float], ...] = GRID
    """Where tuning starts."""
    like: "Entry | None" = None
    """Trained with the setting that was best for this one, in place of its own."""


@dataclass(frozen=True)
class Question:
    """Losses that are compared on the same data."""

    key: str
    title: str
    entries: tuple[Entry, ...]
    data: tuple[str, ...] = ("digit_scenes",)
    """Names of data sets; all but the first are trained with the settings tuned on the first."""
    experiment: str = "quickstart"
    seeds: tuple[int, ...] = SEEDS
    """Of the final runs."""
    steps: int = STEPS
    tuned: bool = True
    """If not, each entry is trained with the first setting of its grid."""
    longer: Mapping[str, int] = field(default_factory=dict)
    """How many times as long the final runs on a data set are."""


def _ghm_c(**settings: Any) -> dict[str, Any]:
    return {f"loss.ghm_c.{key}": value for key, value in settings.items()}


def _ghm_r(**settings: Any) -> dict[str, Any]:
    return {f"loss.ghm_r.{key}": value for key, value in settings.items()}


ONE_HISTOGRAM = {"loss.weight": 3.0}
PUBLISHED = {**_ghm_c(**REFERENCE), **_ghm_r(**REFERENCE)}
PUBLISHED |= {"loss.ghm_scope": "level", "loss.weight": 1.0}


def _from(weight: float) -> tuple[tuple[float, float], ...]:
    """Tuned by weight alone, from this one on: close to the best of a similar loss."""
    return ((1.0, weight), (1.0, 2.0 * weight), (1.0, weight / 2.0))


def _floor(count: float, grid: tuple[tuple[float, float], ...] = GRID) -> Entry:
    name = f"GHM-C, floor {count:.0f}" if count else "GHM-C, no floor"
    return Entry(name, ONE_HISTOGRAM | _ghm_c(min_count=float(count)), grid=grid)


CROSS_ENTROPY = Entry("cross-entropy", {"loss.classification": "cross_entropy"} | {
    "loss.weight": 100.0})  # fmt: skip
OHEM = Entry("OHEM", {"loss.classification": "ohem", "loss.weight": 1.0}, grid=_from(1.0))
FOCAL = Entry("focal", {"loss.classification": "focal", "loss.weight": 1.0})
LEVELS = Entry("GHM-C, published", PUBLISHED)
NO_FLOOR, FLOOR = _floor(0, _from(8.0)), _floor(100)
STRENGTH = Entry(
    "GHM-C, strength 0.75", ONE_HISTOGRAM | _ghm_c(min_count=0.0, strength=0.75), grid=_from(8.0)
)


def _smooth(loss: Entry) -> Entry:
    """With smooth L1 for the boxes, at about the weight that is best for it."""
    boxes = {"loss.box": "smooth_l1", "loss.box_weight": 8.0}
    name = f"{loss.name}; smooth L1"
    return replace(loss, name=name, changes={**loss.changes, **boxes}, grid=_from(1.0))


FLOOR_GHM_R = Entry(f"{FLOOR.name}; GHM-R, floor 100", {**FLOOR.changes, **_ghm_r(min_count=100.0)})
FLOOR_MU = Entry(f"{FLOOR.name}; GHM-R, floor 10, mu 0.1", {**FLOOR.changes, "loss.mu": 0.1})
FOCAL_SMOOTH, CROSS_ENTROPY_SMOOTH = _smooth(FOCAL), _smooth(CROSS_ENTROPY)
NO_FLOOR_SMOOTH, FLOOR_SMOOTH, HIGH_FLOOR_SMOOTH = map(_smooth, (NO_FLOOR, FLOOR, _floor(1000)))


def _like(loss: Entry, words: str, **settings: Any) -> Entry:
    """A GHM-C with other settings, trained with the rate and weight that were best for `loss`."""
    changes = {**loss.changes, **_ghm_c(**settings)}
    return Entry(f"{loss.name}, {words}", changes, loss.tuned, like=loss)


def _with_bins(loss: Entry) -> tuple[Entry, ...]:
    return (loss, *(_like(loss, f"{n} bins", bins=n) for n in (5, 10, 20, 40)))


def _with_momentum(loss: Entry, words: str = "", **settings: Any) -> tuple[Entry, ...]:
    momenta = (0.0, 0.5, 0.75, 0.9, 0.99) if settings else (0.0, 0.5, 0.9, 0.99)  # 0.75: default
    changed = (_like(loss, f"momentum {m}{words}", momentum=m, **settings) for m in momenta)
    return (loss, *changed)


def _variant(name: str, function: str, weight: float, bins: int = 30) -> Entry:
    """A function of `variants.py`."""
    changes: dict[str, Any] = {"loss.classification": f"experiments.study.variants:{function}"}
    changes |= {"loss.weight": weight, "loss.ghm_c.bins": bins}
    return Entry(name, changes)


def _replicas(loss: Entry, replicas: int, function: str) -> Entry:
    variant = _smooth(_variant("", function, 3.0, 30 * replicas))
    name = f"{loss.name}, histograms of {replicas} replicas"
    return replace(variant, name=name, like=loss)


def _boxes(name: str, weight: float, **settings: Any) -> Entry:
    """With GHM-C at the weight that is best for it."""
    changes = {"loss.weight": 24.0, "loss.box_weight": weight}
    changes |= {f"loss.{key}": value for key, value in settings.items()}
    return Entry(name, changes, tuned="loss.box_weight", grid=_from(2.0))


QUESTIONS = (
    Question(
        "H1",
        "Which classification loss? (table 4 of the paper)",
        (
            *(FOCAL, FLOOR, CROSS_ENTROPY, LEVELS, OHEM, NO_FLOOR),
            *(_floor(10, _from(8.0)), _floor(1000, _from(8.0)), STRENGTH),
        ),
    ),
    Question(
        "H12",
        "Trained twice as long, as the quickstart: which floor, which weight?",
        (
            *(replace(entry, grid=_from(1.0)) for entry in (FOCAL, FLOOR, _floor(1000))),
            *(replace(entry, grid=_from(1.0)) for entry in (CROSS_ENTROPY, _floor(10), NO_FLOOR)),
            *(replace(entry, grid=_from(8.0)) for entry in (FOCAL, FLOOR)),
        ),
        steps=2 * STEPS,
        tuned=False,
    ),
    Question(
        "H3",
        "Which box loss? (tables 5 and 6 of the paper)",
        (
            _boxes("smooth L1", 4.0, box="smooth_l1"),
            _boxes("ASL1", 4.0, box="asl1"),
            _boxes("GHM-R, floor 10", 10.0),
            _boxes("GHM-R, floor 100", 10.0, **{"ghm_r.min_count": 100.0}),
            _boxes("GHM-R, no floor", 10.0, **{"ghm_r.min_count": 0.0}),
            _boxes("GHM-R, floor 10, mu 0.1", 10.0, mu=0.1),
        ),
    ),
    Question(
        "H13",
        "Which classification loss, with smooth L1 for the boxes?",
        (
            *(FOCAL_SMOOTH, FLOOR_SMOOTH, HIGH_FLOOR_SMOOTH),
            *(CROSS_ENTROPY_SMOOTH, NO_FLOOR_SMOOTH),
        ),
    ),
    Question(
        "H14",
        "Trained twice as long, as the quickstart: which box loss, and then which class loss?",
        (
            *(replace(entry, grid=_from(1.0)) for entry in (FLOOR, FLOOR_GHM_R, FLOOR_MU)),
            *(FLOOR_SMOOTH, FOCAL_SMOOTH, HIGH_FLOOR_SMOOTH, CROSS_ENTROPY_SMOOTH),
        ),
        steps=2 * STEPS,
        tuned=False,
    ),
    Question(
        "H5",
        "Do outliers in the training labels hurt less?",
        (FOCAL_SMOOTH, FLOOR_SMOOTH, CROSS_ENTROPY_SMOOTH, NO_FLOOR_SMOOTH),
        data=(
            "digit_scenes",
            *(f"wrong_labels_{percent}" for percent in (10, 20, 40)),
            *(f"missing_boxes_{percent}" for percent in (20, 40)),
        ),
    ),
    Question(
        "H11",
        "Can GHM-C be better than focal loss?",
        (
            *(FOCAL_SMOOTH, FLOOR_SMOOTH, HIGH_FLOOR_SMOOTH),
            _smooth(_variant("floor of the positives", "floor_of_positives", 3.0)),
            _smooth(_variant("smoothed histogram, no floor", "smoothed", 3.0)),
            _smooth(_variant("positives and negatives apart", "apart", 1.5, 60)),
            _smooth(_variant("strength falls to 1/2", "falling", 3.0)),
            _smooth(_variant("divided by the positives", "per_object", 0.005)),
            _smooth(_variant("a histogram for each class", "by_class", 3.0, 300)),
        ),
    ),
    Question(
        "H9",
        "Real images: blood cells and defects of circuit boards",
        (
            *(FOCAL_SMOOTH, replace(LEVELS, grid=_from(1.0)), FLOOR_SMOOTH, HIGH_FLOOR_SMOOTH),
            replace(FLOOR_MU, like=FLOOR_SMOOTH),
        ),
        data=("bccd", "deeppcb"),
        experiment="folder_small",
        steps=STEPS // 2,  # of 0.4 s on a core, four times that of the digits
        longer={"deeppcb": 2},  # five times the images; 0.10 AP after 600 steps
    ),
    Question(
        "H15",
        "The circuit boards again, tuned on themselves",
        (
            *(replace(entry, grid=_from(2.0)) for entry in (FOCAL_SMOOTH, HIGH_FLOOR_SMOOTH)),
            replace(LEVELS, grid=_from(8.0)),
        ),
        data=("deeppcb",),
        experiment="folder_small",
        steps=STEPS // 2,
    ),
    Question(
        "H2",
        "How many bins? (table 1 of the paper)",
        (*_with_bins(FLOOR_SMOOTH), *_with_bins(NO_FLOOR_SMOOTH)),
        seeds=SEEDS[:1],
    ),
    Question(
        "H4",
        "How much momentum of the histogram?",
        (
            *(*_with_momentum(FLOOR_SMOOTH), *_with_momentum(NO_FLOOR_SMOOTH)),
            *_with_momentum(NO_FLOOR_SMOOTH, ", no bias correction", bias_correction=False)[1:],
        ),
        seeds=SEEDS[:1],
    ),
    Question(
        "H7",
        "One histogram of the batch, or one for each replica (as published)?",
        (
            *(FLOOR_SMOOTH, _replicas(FLOOR_SMOOTH, 2, "two_replicas_floor")),
            _replicas(FLOOR_SMOOTH, 4, "four_replicas_floor"),
            *(NO_FLOOR_SMOOTH, _replicas(NO_FLOOR_SMOOTH, 2, "two_replicas")),
            _replicas(NO_FLOOR_SMOOTH, 4, "four_replicas"),
        ),
        seeds=SEEDS[:1],
    ),
)


@dataclass(frozen=True)
class Trial:
    """One run."""

    entry: Entry
    experiment: str
    data: str
    seed: int
    learning_rate: float
    """Factor of the experiment's."""
    weight: float
    """Factor of the entry's."""
    steps: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return (
            f"{self.experiment} / {self.data} / {self.entry.name} / seed {self.seed} / "
            f"rate x {self.learning_rate:g} / weight x {self.weight:g} / {self.steps} steps"
        )

    def neighbours(self) -> "list[Trial]":
        """Twice and half its weight, or learning rate if that is changed; up to 32 times."""
        name = "weight" if self.learning_rate == 1.0 else "learning_rate"
        factor = getattr(self, name)
        factors = (2.0 * factor, factor / 2.0)
        return [replace(self, **{name: f}) for f in factors if 1 / 32 <= f <= 32]

    def config(self, data_dir: str) -> Config:
        """What it trains, on one device."""
        base = load_experiment(EXPERIMENTS / f"{self.experiment}.py")
        optimizer = replace(
            base.optimizer,
            steps=self.steps,
            warmup_steps=min(base.optimizer.warmup_steps, self.steps // 4),
            learning_rate=base.optimizer.learning_rate * self.learning_rate,
        )
        default = Config().loss  # unless an entry changes it
        config = replace(
            base,
            seed=self.seed,
            loss=replace(base.loss, ghm_c=default.ghm_c, mu=default.mu),
            data=replace(base.data, name=self.data, dir=data_dir),
            optimizer=optimizer,
            run=replace(base.run, devices=1, workers=0, checkpoint_every=self.steps),
        )
        for key, value in self.entry.changes.items():
            config = _changed(config, key.split("."), value)
        weight = getattr(config.loss, self.entry.tuned.removeprefix("loss."))
        return _changed(config, self.entry.tuned.split("."), weight * self.weight)


def _changed(section: Any, path: list[str], value: Any) -> Any:
    """A copy of a section with another value at a path."""
    name, *rest = path
    new = _changed(getattr(section, name), rest, value) if rest else value
    return replace(section, **{name: new})


def tuning_trials(question: Question, entry: Entry) -> list[Trial]:
    """The runs that tuning starts with, of the loss whose setting an entry takes."""
    entry = entry.like or entry
    return [
        Trial(
            *(entry, question.experiment, question.data[0]),
            *(TUNING_SEED, rate, weight, question.steps),
        )
        for rate, weight in entry.grid
    ]


def final_trials(question: Question, entry: Entry, best: Trial) -> list[Trial]:
    """The best setting with every seed on every data set."""
    steps = {data: best.steps * question.longer.get(data, 1) for data in question.data}
    return [
        replace(best, entry=entry, data=data, seed=seed, steps=steps[data])
        for data in question.data
        for seed in question.seeds
    ]
