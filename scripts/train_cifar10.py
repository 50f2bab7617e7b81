"""Train a recipe and its BatchNorm twin on an image folder, for several seeds, and compare them.

    python scripts/train_cifar10.py --data-dir DIR

DIR has `train/CLASS/*` and `test/CLASS/*`. Every run gets a folder of its own under `--output`; finished ones are not
run again, so the runs can be shared out over processes (`--norms ubn` in one, `--norms bn` in another) and be collected
by a last call with all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import ubn_zoo  # noqa: F401 - registers the models with timm
from ubn_zoo.data import ImageSet, find_test_split, load_image_folder
from ubn_zoo.plots import draw_training
from ubn_zoo.progress import Progress
from ubn_zoo.recipe import NORMS, Recipe, apply_settings, load_recipe
from ubn_zoo.train import EpochMetrics, run, write_metrics


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="image folder with train/ and test/")
    parser.add_argument("--recipe", default="cifar10_small", help="name of a recipe, or a .yaml file")
    parser.add_argument("--norms", nargs="+", default=["ubn", "bn"], choices=NORMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds, for each norm")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; the numbers depend on it")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10_small"), help="folder of all runs")
    return parser.parse_args(arguments)


def load_split(folder: Path) -> ImageSet:
    """Decode one split, with progress."""
    progress = Progress(f"decode {folder}")
    images = load_image_folder(folder, report=progress)
    progress.close()
    return images


def train_one(recipe: Recipe, train: ImageSet, test: ImageSet, output: Path) -> tuple[EpochMetrics, ...]:
    """Run one recipe, with progress and a line per epoch."""
    label = f"{recipe.model} {recipe.norm} seed {recipe.seed}"
    progress = Progress(label)

    def on_epoch(row: EpochMetrics) -> None:
        nonlocal progress
        progress.close()
        gates = f", gates open {row.gates_open}/{row.gates}" if row.gates else ""
        print(
            f"{label}: epoch {row.epoch}/{recipe.epochs}, loss {row.train_loss:.3f}, top-1 {row.top1:.2f} %, "
            f"{row.seconds:.0f} s, {row.step_ms:.0f} ms/step{gates}",
            flush=True,
        )
        progress = Progress(label)

    rows = run(recipe, train, test, output, on_step=lambda done, total: progress(done, total), on_epoch=on_epoch)
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture of the run: matplotlib is missing; pip install 'ubn-zoo[quickstart]'")
    else:
        draw_training(rows, output / "training.png")
    return rows


def summarise(runs: Sequence[tuple[EpochMetrics, ...]]) -> None:
    """Print accuracy and cost of every norm over its seeds."""
    print("\nnorm  seeds  top-1 after the last epoch  ms/step")
    for norm in dict.fromkeys(rows[-1].norm for rows in runs):
        last = [rows[-1] for rows in runs if rows[-1].norm == norm]
        top1 = [row.top1 for row in last]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        step = statistics.median(row.step_ms for rows in runs for row in rows if row.norm == norm)
        print(f"{norm:5s} {len(last):5d}  {statistics.fmean(top1):.2f}{spread} %  {step:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all that was asked for, and compare."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    recipe = apply_settings(load_recipe(options.recipe), options.set)
    train = load_split(options.data_dir / "train")
    test = load_split(options.data_dir / find_test_split(options.data_dir))
    runs = [
        train_one(dataclasses.replace(recipe, norm=norm, seed=seed), train, test, options.output / f"{norm}_seed{seed}")
        for seed in options.seeds
        for norm in options.norms
    ]
    summarise(runs)
    write_metrics(options.output / "metrics.csv", [row for rows in runs for row in rows])
    print(f"\nwritten: {options.output / 'metrics.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
