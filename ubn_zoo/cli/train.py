"""Train a model with a recipe.

Repeat the command to resume an interrupted run.

Examples:
    ubn-zoo train --recipe cifar10_small --data-dir data/cifar10 --output runs/cifar10
    ubn-zoo train --recipe finetune_full --data-dir photos --output runs/photos --set model=resnet50 epochs=20
    torchrun --nproc-per-node 8 -m ubn_zoo train --recipe rsb_a2 --data-dir imagenet --output runs/rsb_a2

`ubn-zoo recipes` lists the recipes, and `ubn-zoo recipes --fields` lists the keys for --set. The data is an image
folder with train/CLASS/IMAGE and one of validation/, val/ or test/, unless the recipe sets another kind. On SIGTERM or
SIGHUP, the command saves the state and exits with code 0.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ubn_zoo.utils.progress import Progress

if TYPE_CHECKING:
    from ubn_zoo.evaluation.metrics import EpochMetrics
    from ubn_zoo.recipes.schema import Recipe
    from ubn_zoo.training.status import RunProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder of the data, or location of shards")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend", help="change the recipe")


def run(options: argparse.Namespace) -> int:
    """Train and show progress on rank 0."""
    from ubn_zoo.recipes.schema import load_recipe
    from ubn_zoo.training.run import run as train
    from ubn_zoo.utils.distributed import joined

    logging.basicConfig(format="%(levelname)s: %(message)s")
    recipe = load_recipe(options.recipe, options.set)
    try:
        with joined(recipe.device) as ranks:
            shown = _Reporter() if ranks.first else None
            done = train(
                recipe,
                options.data_dir,
                options.output,
                ranks,
                on_start=shown.start if shown else None,
                on_progress=shown.step if shown else None,
                on_epoch=shown.epoch if shown else None,
            )
            if ranks.first:
                reached = (
                    f"finished, top-1 {done.metrics[-1].top1:.2f} %"
                    if done.finished
                    else _STOPPED.format(done.stopped_by or "a signal to another rank")
                )
                print(f"{reached}: {done.folder}")
    except KeyboardInterrupt:
        print("ubn-zoo: interrupted; run the same command to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


_STOPPED = "stopped by {}; the state is saved; run the same command to resume"


class _Reporter:
    """Prints one line per epoch, and shows progress as a bar on a terminal or as one line per minute in a log."""

    def start(self, recipe: Recipe, updates: int) -> None:
        self.label = f"{recipe.model} {recipe.norm} seed {recipe.seed}"
        self.epochs = recipe.epochs
        self.progress = Progress(self.label, interval=60.0)
        if updates:
            print(f"{self.label}: resumes after update {updates}", flush=True)

    def step(self, run: RunProgress) -> None:
        self.progress(run.update, run.updates, run.__str__)

    def epoch(self, row: EpochMetrics) -> None:
        self.progress.close()
        gates = f", gates open {row.gates_open}/{row.gates}" if row.gates else ""
        ema = "" if row.ema_top1 is None else f" (EMA {row.ema_top1:.2f} %)"
        print(
            f"{self.label}: epoch {row.epoch}/{self.epochs}, loss {row.train_loss:.3f}, top-1 {row.top1:.2f} %{ema}, "
            f"{row.seconds:.0f} s, {row.step_ms:.0f} ms/step, {row.images_per_second:.0f} images/s{gates}",
            flush=True,
        )
