"""The tables of a grid: collected from its runs, written as CSV files, and read back."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from research.benchmark import compare_training, environment
from research.experiments.grid import Grid, Planned, plan
from research.experiments.runs import PREDICTIONS, chosen, read_predictions, without_start
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
from ubn_zoo.training.build import build_model, complete
from ubn_zoo.training.run import is_finished
from ubn_zoo.utils.files import write_file

__all__ = ["Choice", "Results", "Tested", "collect", "cost", "load"]

_COST = ("batch_size", "img_size", "median", "lower", "upper", "minimum", "maximum", "ratio")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """One run on the images that a grid reports; a row of ``NAME_test.csv``.

    Attributes:
        variant: Label of the run's rows.
        seed: Its seed.
        choice: Its tuned values, as ``key=value`` with spaces between; empty without `Grid.tune`.
        images: Number of images.
        top1: Accuracy in percent.
        loss: Mean cross-entropy in nats.
        only_baseline: Images that the baseline of the same seed gets right and this run does not.
        only_variant: Images that this run gets right and the baseline does not.
        date: Day on which the run started.
    """

    variant: str
    seed: int
    choice: str
    images: int
    top1: float
    loss: float
    only_baseline: int
    only_variant: int
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One run that tuned values were chosen by; a row of ``NAME_choices.csv``.

    Attributes:
        variant: Label of the run's rows.
        choice: Its tuned values, as ``key=value`` with spaces between.
        seed: Its seed.
        top1: Accuracy on the images held out of training, in percent.
        loss: Mean cross-entropy on them in nats.
        chosen: Whether the grid reports these values.
    """

    variant: str
    choice: str
    seed: int
    top1: float
    loss: float
    chosen: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """The measurements of a grid, by the label of a variant in its cell.

    Attributes:
        runs: The rows of each run.
        layers: The similarity of each layer in the first seed's run.
        steps: Time of a training step over that of the first variant; empty if not measured.
        tested: Each run on the reported images; empty for grids that report the held-out accuracy alone.
        choices: The runs that tuned values were chosen by; empty without `Grid.tune`.
    """

    runs: Mapping[str, tuple[tuple[EpochMetrics, ...], ...]]
    layers: Mapping[str, tuple[LayerSimilarity, ...]]
    steps: Mapping[str, float]
    tested: Mapping[str, tuple[Tested, ...]]
    choices: tuple[Choice, ...] = ()


def _write(path: Path, kind: type[Tested] | type[Choice], rows: Sequence[Tested | Choice]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(kind)])
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_file(path, text.getvalue())
    return path


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def collect(grid: Grid, runs: str | Path, results: str | Path) -> tuple[Path, ...]:
    """Write a grid's tables from its finished runs.

    Args:
        grid: The grid.
        runs: Folder of all grids' runs.
        results: Folder that gets ``NAME.csv`` (epochs), ``NAME_similarity.csv`` (layers of the first seed's runs),
            ``NAME_test.csv`` (predictions) and, with `Grid.tune`, ``NAME_choices.csv``.

    Returns:
        The tables written.

    Raises:
        FileNotFoundError: A run is not finished; the message names it.
    """
    place, target = Path(runs) / grid.name, Path(results)
    command = f"python -m research.experiments run {grid.name}"
    rows: list[tuple[str, EpochMetrics]] = []
    layers: list[tuple[str, LayerSimilarity]] = []
    tested: list[Tested] = []
    reported = chosen(grid, runs)
    for planned in reported:
        folder = place / planned.folder
        if not is_finished(folder) or not (folder / PREDICTIONS).is_file():
            raise FileNotFoundError(f"{folder} is not finished; run it by {command}")
        rows += [(planned.label, row) for row in read_metrics(folder / "metrics.csv")]
        if planned.seed == grid.seeds[0] and (folder / "similarity.csv").is_file():
            layers += [(planned.label, row) for row in read_similarity(folder / "similarity.csv")]
        tested.append(_test(planned, reported, place))
    written = [target / f"{grid.name}.csv", target / f"{grid.name}_similarity.csv"]
    write_metrics(written[0], [row for _, row in rows], [label for label, _ in rows])
    write_similarity(written[1], [row for _, row in layers], [label for label, _ in layers])
    written.append(_write(target / f"{grid.name}_test.csv", Tested, tested))
    if grid.tune:
        choices = []
        for planned in plan(grid, runs):
            if planned.seed in grid.seeds[: grid.tune_seeds]:
                last = read_metrics(place / planned.folder / "metrics.csv")[-1]
                kept = planned.folder in {each.folder for each in reported}
                choices.append(
                    Choice(
                        variant=planned.label,
                        choice=planned.choice_text,
                        seed=planned.seed,
                        top1=last.top1,
                        loss=last.test_loss,
                        chosen=kept,
                    )
                )
        written.append(_write(target / f"{grid.name}_choices.csv", Choice, choices))
    return tuple(written)


def _test(planned: Planned, reported: Sequence[Planned], place: Path) -> Tested:
    folder = place / planned.folder
    baseline = next(each for each in reported if each.cell == planned.cell and each.seed == planned.seed)
    mine, other = (read_predictions(place / each.folder / PREDICTIONS) for each in (planned, baseline))
    right, before = ([label == guess for label, guess, _ in rows] for rows in (mine, other))
    start = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["starts"][0]["started"]
    return Tested(
        variant=planned.label,
        seed=planned.seed,
        choice=planned.choice_text,
        images=len(mine),
        top1=100 * sum(right) / len(right),
        loss=sum(loss for *_, loss in mine) / len(mine),
        only_baseline=sum(was and not now for was, now in zip(before, right, strict=True)),
        only_variant=sum(now and not was for was, now in zip(before, right, strict=True)),
        date=start[:10],
    )


def load(grid: Grid, results: str | Path) -> Results:
    """Read the tables that `collect` and `cost` wrote.

    Raises:
        FileNotFoundError: A table is missing.
        ValueError: A table has other columns.
    """
    place = Path(results)
    runs: dict[str, dict[int, list[EpochMetrics]]] = {}
    for label, row in read_labeled_metrics(place / f"{grid.name}.csv"):
        runs.setdefault(label, {}).setdefault(row.seed, []).append(row)
    layers: dict[str, list[LayerSimilarity]] = {}
    for label, measured in read_labeled_similarity(place / f"{grid.name}_similarity.csv"):
        layers.setdefault(label, []).append(measured)
    tested: dict[str, list[Tested]] = {}
    for values in _read_rows(place / f"{grid.name}_test.csv"):
        tested.setdefault(values["variant"], []).append(
            Tested(
                variant=values["variant"],
                seed=int(values["seed"]),
                choice=values["choice"],
                images=int(values["images"]),
                top1=float(values["top1"]),
                loss=float(values["loss"]),
                only_baseline=int(values["only_baseline"]),
                only_variant=int(values["only_variant"]),
                date=values["date"],
            )
        )
    choices = tuple(
        Choice(
            variant=values["variant"],
            choice=values["choice"],
            seed=int(values["seed"]),
            top1=float(values["top1"]),
            loss=float(values["loss"]),
            chosen=values["chosen"] == "True",
        )
        for values in _read_rows(place / f"{grid.name}_choices.csv")
    )
    return Results(
        {label: tuple(map(tuple, seeds.values())) for label, seeds in runs.items()},
        {label: tuple(rows) for label, rows in layers.items()},
        {row["variant"]: float(row["ratio"]) for row in _read_rows(place / f"{grid.name}_cost.csv")},
        {label: tuple(rows) for label, rows in tested.items()},
        choices,
    )


def cost(grid: Grid, results: str | Path, *, classes: int = 10, steps: int = 9) -> Path:
    """Time a training step of every variant, in turns on random images, and write ``NAME_cost.csv``.

    Run it on an otherwise idle machine; times recorded during training may come from a busy one.

    Args:
        grid: The grid; its first cell is timed.
        results: Folder that gets the table.
        classes: Outputs of the models.
        steps: Timed turns.

    Returns:
        The table.
    """
    models = {}
    first = plan(grid, "runs")[0]
    base = first.recipe
    torch.set_num_threads(base.threads or torch.get_num_threads())
    for planned in plan(grid, "runs"):
        if planned.cell == first.cell and planned.label not in models and planned.group_norm is None:
            # Initial weights do not affect times.
            plain = dataclasses.replace(without_start(planned.recipe), num_classes=classes)
            models[planned.label] = build_model(complete(plain))
    timings = compare_training(
        models, batch_size=base.batch_size, img_size=base.img_size or 224, num_classes=classes, steps=steps
    )
    path = Path(results) / f"{grid.name}_cost.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", *_COST, "environment"])
        where = environment(torch.device("cpu"))
        writer.writerows([timing.model, *(getattr(timing, name) for name in _COST), where] for timing in timings)
    return path
