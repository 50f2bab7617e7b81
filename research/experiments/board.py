"""What the leaderboard shows of the experiments: ``python -m research.experiments.board``.

Writes ``results/leaderboard/experiments.csv``, a results file with the last epoch of every run of CIFAR-10 and of the
photographs of clothes, from ``results/*.csv``.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from pathlib import Path

import timm

from research.experiments.grid import list_grids, load_grid, plan
from research.experiments.tables import load
from ubn_zoo import __version__
from ubn_zoo.evaluation.accuracy import wilson
from ubn_zoo.evaluation.metrics import EpochMetrics
from ubn_zoo.evaluation.results import ResultRow, write_results
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.build import build_model, complete, model_name

# Test set and its images, by the first word of a grid's name.
_TEST_SETS = {"cifar10": ("cifar-10-jpeg", 10_000), "clothing": ("clothing", 372)}


def evaluations(results: str | Path) -> list[ResultRow]:
    """The last epoch of every run that has tables, as rows of a results file.

    Args:
        results: Folder of the tables.
    """
    rows = []
    for name in list_grids():
        test_set = _TEST_SETS.get(name.partition("_")[0])
        if test_set is None or not (Path(results) / f"{name}.csv").is_file():
            continue
        grid = load_grid(name)
        measured = load(grid, results).runs
        runs = plan(grid, "runs")
        fine_tuned = any(planned.recipe.checkpoint for planned in runs)
        for planned in runs:
            for run in measured[planned.label]:
                if run[-1].seed == planned.seed:
                    row = _row(name, f"runs/{name}/{planned.folder}", planned.recipe, run[-1], *test_set)
                    if fine_tuned and planned.recipe.checkpoint is None:
                        # The fine-tuned BatchNorm model is no sibling of one trained from scratch.
                        row = dataclasses.replace(row, settings="checkpoint=null")
                    rows.append(row)
    return rows


def _row(grid: str, source: str, recipe: Recipe, last: EpochMetrics, test_set: str, images: int) -> ResultRow:
    built = complete(dataclasses.replace(recipe, checkpoint=None, num_classes=10))
    low, high = (round(end, 4) for end in wilson(last.top1, images))
    low5, high5 = (None, None) if last.top5 is None else (round(end, 4) for end in wilson(last.top5, images))
    return ResultRow(
        model=model_name(recipe),
        img_size=built.img_size,
        top1=round(last.top1, 4),
        top1_err=round(100 - last.top1, 4),
        top5=None if last.top5 is None else round(last.top5, 4),
        top5_err=None if last.top5 is None else round(100 - last.top5, 4),
        param_count=_parameters(dataclasses.replace(built, seed=0)),
        crop_pct=built.crop_pct,
        interpolation=built.interpolation,
        crop_mode="center",
        norm=last.norm,
        test_set=test_set,
        split="test",
        images=images,
        classes=10,
        loss=round(last.test_loss, 6),
        calibration_error=round(last.calibration_error, 4),
        top1_low=low,
        top1_high=high,
        top5_low=low5,
        top5_high=high5,
        source=source,
        batch_size=recipe.batch_size,
        ranks=last.ranks,
        torch=last.torch,
        timm=timm.__version__,
        ubn_zoo=__version__,
        hardware=last.device,
        threads=last.threads,
        command=f"python -m research.experiments run {grid} --data-dir DIR",
        date=_date(last.commit),
        commit=last.commit,
    )


@functools.cache
def _parameters(recipe: Recipe) -> float:
    return round(sum(parameter.numel() for parameter in build_model(recipe).parameters()) / 1e6, 2)


@functools.cache
def _date(commit: str | None) -> str:
    """Day of a commit; no run is older than its code."""
    found = subprocess.run(  # the user controls which git is on PATH
        ["git", "show", "-s", "--format=%cs", commit or "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip()


if __name__ == "__main__":
    write_results(Path("results/leaderboard/experiments.csv"), evaluations("results"))
