"""Paired runs that isolate the effect of one choice: variants share recipe and seeds, and differ in one setting.

Each experiment is a row of `EXPERIMENTS`. Its runs are ordinary runs of `ubn_zoo.training.run`, which can be spread
over processes and machines. Their measurements are collected into two CSV files, from which tables and plots are
made.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from research.benchmark import compare_training, environment
from ubn_zoo.evaluation.metrics import (
    EpochMetrics,
    LayerSimilarity,
    read_labeled_metrics,
    read_labeled_similarity,
    read_metrics,
    read_similarity,
    write_metrics,
    write_similarity,
)
from ubn_zoo.evaluation.plots import draw_comparison, draw_similarity_comparison
from ubn_zoo.recipes.schema import Recipe, apply_settings, load_recipe
from ubn_zoo.training.build import build_model, complete

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Planned",
    "Results",
    "collect",
    "cost",
    "draw",
    "get_experiment",
    "load",
    "markdown",
    "page",
    "plan",
    "report",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Variants of one recipe.

    Attributes:
        name: Name of its files.
        title: Title for readers.
        recipe: Name of the recipe.
        settings: Changes to the recipe in all variants, ``key=value`` each.
        variants: Further changes of each variant, by its label for readers; the first is the baseline.
        seeds: Seeds that each variant is run with.
        note: Remarks for readers, a sentence or two.
    """

    name: str
    title: str
    recipe: str
    settings: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """One run of an experiment.

    Attributes:
        variant: Label of its variant.
        folder: Name of its folder.
        recipe: The recipe to run.
    """

    variant: str
    folder: str
    recipe: Recipe


_INTRODUCTION = """\
# Results

<!-- Written by `python -m research.experiments report` from results/*.csv; edit research/experiments instead. -->

Paired runs: all variants of a seed use the same recipe, initial weights, order of images and augmentation. Accuracies
are those of all held-out images after the last epoch, never of the best epoch: mean ± standard deviation over seeds.
Differences to the first variant are taken seed by seed. No validation split was held out: settings were compared on the
same held-out images. After the first results of MobileNet, the training images of ResNet and RegNet were reduced to
20,000 to save time, and a threshold of 0.3 was added to their variants.

Schedules are short, so that one or two CPU cores can run them. These results describe early training of small models;
a longer run may end differently. "Mean similarity" is the cosine similarity of held-out images' features after the last
epoch of the first seed, averaged over norm layers. "Step" is the time of a training step divided by that of the first
variant, both measured in one run on an idle machine (`python -m research.experiments cost NAME`).
"""

_COST = ("batch_size", "img_size", "median", "lower", "upper", "minimum", "maximum", "ratio")

_UBN = ("norm=ubn", "threshold=0.15")
_TWINS = {"BatchNorm": ("norm=bn",), "UBN": _UBN}
_THRESHOLDS = {**_TWINS, "UBN, threshold 0.3": ("norm=ubn", "threshold=0.3")}

EXPERIMENTS = (
    Experiment(
        name="cifar10_mobilenet",
        title="MobileNetV3-small 0.5 on CIFAR-10, 64 pixels",
        recipe="cifar10_small",
        settings=("model=mobilenetv3_small_050",),
        variants={
            "BatchNorm": ("norm=bn",),
            "RBN": ("norm=rbn",),
            "BNET": ("norm=bnet",),
            "UBN without gate": ("norm=ubn", "threshold=null"),
            "UBN": _UBN,
            "UBN, threshold 0.3": ("norm=ubn", "threshold=0.3"),
            "UBN, kaiming kernels": (*_UBN, "kernel_init=kaiming"),
        },
        note=(
            "RBN's calibrations alone gain nothing here; BNET's depthwise kernel gains most. With both, the gate adds "
            "a point, and a threshold of 0.3 nearly three more. At 0.15, the paper's threshold, UBN and BNET are even. "
            "Kernels that start at random end between 48.9 and 57.8, which is why identity is the layer's default."
        ),
    ),
    Experiment(
        name="cifar10_regnet_long",
        title="RegNetX-200MF on CIFAR-10, 64 pixels, 6 epochs",
        recipe="cifar10_small",
        settings=("epochs=6",),
        variants=_TWINS,
        seeds=(0,),
        note="One seed, so no spread. All gates but one stay open: the calibrations and the kernel bring the gain.",
    ),
    Experiment(
        name="clothing",
        title="RegNetX-200MF fine-tuned on photographs of clothes, from its own CIFAR-10 weights",
        recipe="clothing_small",
        variants={
            "BatchNorm": ("norm=bn", "checkpoint={runs}/cifar10_regnet_long/batchnorm_seed0/model.safetensors"),
            "UBN": (*_UBN, "checkpoint={runs}/cifar10_regnet_long/ubn_seed0/model.safetensors"),
            "UBN from scratch": _UBN,
        },
        note=(
            "Each variant fine-tunes weights of its own norm, from one training run each, so part of the difference "
            "comes from the initial weights. There are 372 held-out photographs; one of them is 0.27 %."
        ),
    ),
    Experiment(
        name="cifar10_resnet",
        title="ResNet-10-T on 20,000 images of CIFAR-10, 32 pixels",
        recipe="cifar10_small",
        settings=("model=resnet10t", "img_size=32", "train_samples=20000"),
        variants=_THRESHOLDS,
        note="The threshold makes no difference here: with either value, 13 of 14 gates stay open.",
    ),
    Experiment(
        name="cifar10_regnet",
        title="RegNetX-200MF on 20,000 images of CIFAR-10, 64 pixels",
        recipe="cifar10_small",
        settings=("train_samples=20000",),
        variants=_THRESHOLDS,
        note="The higher threshold gains nothing here either, so the layer keeps the paper's 0.15 as its default.",
    ),
    Experiment(
        name="cifar10_equal_time",
        title="MobileNetV3-small 0.5 on CIFAR-10, BatchNorm given about UBN's time",
        recipe="cifar10_small",
        settings=("model=mobilenetv3_small_050", "epochs=7"),
        variants={"BatchNorm, 7 epochs": ("norm=bn",)},
        note=(
            "When time counts and not epochs, BatchNorm wins here: after 7 epochs it is above what any variant of UBN "
            "reached in 4. The 7 epochs were chosen before steps were timed on an idle machine. At UBN's ratio of 1.61 "
            "the same time would be 6.5 epochs, so BatchNorm had 8 % more time than UBN, and 6 % more than UBN with a "
            "threshold of 0.3."
        ),
    ),
    Experiment(
        name="cifar10_large_batch",
        title="MobileNetV3-small 0.5 on CIFAR-10, batches of 1024",
        recipe="cifar10_small",
        settings=("model=mobilenetv3_small_050", "batch_size=1024", "lr=0.008"),
        variants=_TWINS,
    ),
)


def get_experiment(name: str) -> Experiment:
    """Find an experiment by name.

    Raises:
        ValueError: There is no such experiment; the message lists the valid names.
    """
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    raise ValueError(f"experiment: received {name!r}; valid: {', '.join(each.name for each in EXPERIMENTS)}")


def _slug(label: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter == "." else " " for letter in label.lower())
    return "_".join(kept.split())


def plan(experiment: Experiment, runs: str) -> tuple[Planned, ...]:
    """List all runs of an experiment, those of the first seed first.

    Args:
        experiment: The experiment.
        runs: Folder of all experiments' runs, for variants that start from another's weights.
    """
    base = apply_settings(load_recipe(experiment.recipe), experiment.settings)
    planned = []
    for seed in experiment.seeds:
        for label, settings in experiment.variants.items():
            filled = [setting.replace("{runs}", runs).replace("{seed}", str(seed)) for setting in settings]
            recipe = apply_settings(base, [*filled, f"seed={seed}"])
            planned.append(Planned(label, f"{_slug(label)}_seed{seed}", recipe))
    return tuple(planned)


def collect(experiment: Experiment, runs: str | Path, results: str | Path) -> tuple[Path, ...]:
    """Write an experiment's tables of epochs and of layers from its finished runs.

    Args:
        experiment: The experiment.
        runs: Folder of all experiments' runs.
        results: Folder that gets ``NAME.csv``, and ``NAME_similarity.csv`` with the layers of the first seed's runs.

    Raises:
        FileNotFoundError: A run is not finished; the message names it.
    """
    rows: list[tuple[str, EpochMetrics]] = []
    layers: list[tuple[str, LayerSimilarity]] = []
    for planned in plan(experiment, str(runs)):
        folder = Path(runs) / experiment.name / planned.folder
        table = folder / "metrics.csv"
        measured = read_metrics(table) if table.is_file() else ()
        if not (folder / "model.safetensors").is_file() or len(measured) < planned.recipe.epochs:
            command = f"python -m research.experiments run {experiment.name}"
            raise FileNotFoundError(f"{folder} is not finished; run it by {command}")
        rows += [(planned.variant, row) for row in measured]
        if planned.recipe.seed == experiment.seeds[0]:
            layers += [(planned.variant, row) for row in read_similarity(folder / "similarity.csv")]
    tables = Path(results) / f"{experiment.name}.csv", Path(results) / f"{experiment.name}_similarity.csv"
    write_metrics(tables[0], [row for _, row in rows], [label for label, _ in rows])
    write_similarity(tables[1], [row for _, row in layers], [label for label, _ in layers])
    return tables


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """The measurements of an experiment.

    Attributes:
        runs: The rows of each run, by variant.
        layers: The similarity of each layer in the first seed's run, by variant.
        steps: Time of a training step over that of the first variant, by variant; empty if not measured.
    """

    runs: Mapping[str, tuple[tuple[EpochMetrics, ...], ...]]
    layers: Mapping[str, tuple[LayerSimilarity, ...]]
    steps: Mapping[str, float]


def cost(experiment: Experiment, results: str | Path, *, classes: int = 10, steps: int = 9) -> Path:
    """Time a training step of every variant, in turns on random images, and write ``NAME_cost.csv``.

    Run it on an otherwise idle machine; times recorded during training may come from a busy one.

    Args:
        experiment: The experiment.
        results: Folder that gets the table.
        classes: Outputs of the models.
        steps: Timed turns.

    Returns:
        The table.
    """
    models, base = {}, apply_settings(load_recipe(experiment.recipe), experiment.settings)
    torch.set_num_threads(base.threads or torch.get_num_threads())
    for label, settings in experiment.variants.items():
        # Initial weights do not affect times.
        kept = [setting for setting in settings if not setting.startswith("checkpoint=")]
        recipe = complete(apply_settings(base, [*kept, f"num_classes={classes}"]))
        models[label] = build_model(recipe)
    timings = compare_training(
        models, batch_size=base.batch_size, img_size=base.img_size or 224, num_classes=classes, steps=steps
    )
    path = Path(results) / f"{experiment.name}_cost.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", *_COST, "environment"])
        where = environment(torch.device("cpu"))
        writer.writerows([timing.model, *(getattr(timing, name) for name in _COST), where] for timing in timings)
    return path


def _read_cost(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["variant"]: float(row["ratio"]) for row in csv.DictReader(file)}


def load(experiment: Experiment, results: str | Path) -> Results:
    """Read the tables that `collect` wrote.

    Raises:
        FileNotFoundError: A table is missing.
        ValueError: A table has other columns.
    """
    runs: dict[str, dict[int, list[EpochMetrics]]] = {}
    for label, row in read_labeled_metrics(Path(results) / f"{experiment.name}.csv"):
        runs.setdefault(label, {}).setdefault(row.seed, []).append(row)
    layers: dict[str, list[LayerSimilarity]] = {}
    for label, measured in read_labeled_similarity(Path(results) / f"{experiment.name}_similarity.csv"):
        layers.setdefault(label, []).append(measured)
    return Results(
        {label: tuple(map(tuple, seeds.values())) for label, seeds in runs.items()},
        {label: tuple(rows) for label, rows in layers.items()},
        _read_cost(Path(results) / f"{experiment.name}_cost.csv"),
    )


def _spread(values: Sequence[float]) -> str:
    """Mean, with the standard deviation over seeds where there are several."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(experiment: Experiment, results: Results) -> str:
    """Format a table for readers: accuracy after the first and the last epoch, loss, calibration, gates.

    Differences to the first variant are those of runs with the same seed.
    """
    lines = [
        "| | seeds | top-1 (%) after epoch 1 | at the end | difference | held-out loss | calibration error (%) | "
        "mean similarity | gates open | step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    baseline: dict[int, float] | None = None
    for label, runs in results.runs.items():
        last = [run[-1] for run in runs]
        reached = {row.seed: row.top1 for row in last}
        if baseline is None:
            baseline, difference = reached, ""
        else:
            pairs = [top1 - baseline[seed] for seed, top1 in reached.items() if seed in baseline]
            difference = _spread(pairs) if pairs else ""
        probed = [row.similarity for row in results.layers.get(label, ()) if row.epoch == last[0].epoch]
        gates = [f"{row.gates_open}/{row.gates}" for row in last if row.gates]
        lines.append(
            f"| {label} | {len(runs)} | {_spread([run[0].top1 for run in runs])} | "
            f"**{_spread(list(reached.values()))}** | {difference} | {_spread([row.test_loss for row in last])} | "
            f"{_spread([row.calibration_error for row in last])} | "
            f"{f'{statistics.fmean(probed):.2f}' if probed else ''} | {', '.join(gates)} | "
            f"{f'{results.steps[label]:.2f}' if label in results.steps else ''} |"
        )
    return "\n".join(lines) + "\n"


def draw(experiment: Experiment, results: Results, folder: str | Path) -> tuple[Path, ...]:
    """Draw an experiment's accuracy per epoch, and the similarity of its layers.

    Args:
        experiment: The experiment.
        results: Its measurements.
        folder: Folder that gets ``NAME.png`` and ``NAME_similarity.png``.
    """
    pictures = Path(folder) / f"{experiment.name}.png", Path(folder) / f"{experiment.name}_similarity.png"
    draw_comparison(results.runs, pictures[0], title=experiment.title)
    draw_similarity_comparison(results.layers, pictures[1], title=experiment.title)
    return pictures


def _measured(results: str | Path) -> list[Experiment]:
    return [experiment for experiment in EXPERIMENTS if (Path(results) / f"{experiment.name}.csv").is_file()]


def page(results: str | Path) -> str:
    """The page of all experiments that have results, in Markdown.

    Args:
        results: Folder of the tables that `collect` wrote.
    """
    text = [_INTRODUCTION]
    for experiment in _measured(results):
        found = load(experiment, results)
        first = next(iter(found.runs.values()))[0][-1]
        text += [
            f"## {experiment.title}\n",
            f"{experiment.note}\n" if experiment.note else "",
            markdown(experiment, found),
        ]
        text.append(f"![{experiment.title}]({experiment.name}.png)\n")
        if found.layers:
            text.append(f"![Feature similarity]({experiment.name}_similarity.png)\n")
        text.append(
            f"Recipe `{experiment.recipe}`{_changes(experiment)}, {first.epoch} epochs, {first.threads} thread of "
            f"{first.device}, torch {first.torch}, commits {_commits(found)}. Table "
            f"[results/{experiment.name}.csv](../results/{experiment.name}.csv); repeat: "
            f"`python -m research.experiments run {experiment.name} --data-dir DIR`, "
            f"then `collect {experiment.name}`.\n"
        )
    return "\n".join(part for part in text if part)


def _changes(experiment: Experiment) -> str:
    return f" with {', '.join(f'`{setting}`' for setting in experiment.settings)}" if experiment.settings else ""


def _commits(results: Results) -> str:
    found = {row.commit[:9] for runs in results.runs.values() for run in runs for row in run if row.commit}
    return ", ".join(sorted(found)) or "not known"


def report(results: str | Path, docs: str | Path) -> tuple[Path, ...]:
    """Write the page of all experiments that have results, and their plots.

    Args:
        results: Folder of the tables that `collect` wrote.
        docs: Folder that gets ``results.md`` and the plots.

    Returns:
        The files written.
    """
    path = Path(docs) / "results.md"
    path.write_text(page(results), encoding="utf-8")
    pictures = [draw(experiment, load(experiment, results), docs) for experiment in _measured(results)]
    return (path, *(picture for drawn in pictures for picture in drawn))
