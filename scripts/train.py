#!/usr/bin/env python3
"""Train a recipe, on one core or, started by torchrun, on many machines; the same command again goes on.

    python scripts/train.py --recipe NAME --data-dir DIR --output DIR [--set KEY=VALUE ...]
    torchrun --nproc-per-node 8 scripts/train.py --recipe NAME --data-dir DIR --output DIR

NAME is a recipe of `ubn-zoo recipes`, or a .yaml file. DIR of the data is an image folder with train/ and one of test/,
val/, validation/, unless the recipe names another kind of data. Exit codes: 0 done, or stopped by SIGTERM with its
state saved; 1 failed, with one message; 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ubn_zoo.data.readers import DataError
from ubn_zoo.evaluation.metrics import EpochMetrics
from ubn_zoo.hub.fetch import HubError
from ubn_zoo.models import CheckpointError
from ubn_zoo.recipes.schema import Recipe, RecipeError, apply_settings, load_recipe
from ubn_zoo.training.checkpoint import SnapshotError
from ubn_zoo.training.engine import TrainingError
from ubn_zoo.training.run import Run, RunError, run
from ubn_zoo.utils.distributed import RanksError, joined
from ubn_zoo.utils.progress import Progress

ERRORS = (CheckpointError, DataError, HubError, RanksError, RecipeError, RunError, SnapshotError, TrainingError)


class Reporter:
    """Shows a run on the terminal: a bar, and a line per epoch."""

    def start(self, recipe: Recipe, updates: int) -> None:
        """Say what is trained, and from where on."""
        self._label = f"{recipe.model} {recipe.norm} seed {recipe.seed}"
        self._epochs = recipe.epochs
        self._progress = Progress(self._label)
        if updates:
            print(f"{self._label}: goes on after update {updates}", flush=True)

    def step(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress(done, total)

    def epoch(self, row: EpochMetrics) -> None:
        """Print an epoch's line."""
        self._progress.close()
        gates = f", gates open {row.gates_open}/{row.gates}" if row.gates else ""
        ema = "" if row.ema_top1 is None else f" (EMA {row.ema_top1:.2f} %)"
        print(
            f"{self._label}: epoch {row.epoch}/{self._epochs}, loss {row.train_loss:.3f}, top-1 {row.top1:.2f} %{ema}, "
            f"{row.seconds:.0f} s, {row.step_ms:.0f} ms/step, {row.images_per_second:.0f} images/s{gates}",
            flush=True,
        )
        self._progress = Progress(self._label)


def report(done: Run) -> None:
    """Say what the run has reached."""
    if not done.finished:
        print(f"stopped by SIGTERM; its state is saved, the same command goes on: {done.folder}")
    else:
        print(f"finished, top-1 {done.metrics[-1].top1:.2f} %: {done.folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--data-dir", required=True, help="folder of the data, or the address of shards")
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help="change the recipe")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        recipe = apply_settings(load_recipe(options.recipe), options.set)
        with joined(recipe.device) as ranks:
            shown = Reporter() if ranks.first else None
            done = run(
                recipe,
                options.data_dir,
                options.output,
                ranks,
                on_start=shown and shown.start,
                on_step=shown and shown.step,
                on_epoch=shown and shown.epoch,
            )
    except ERRORS as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if shown:
        report(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
