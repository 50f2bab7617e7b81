#!/usr/bin/env python3
"""Draws a training table: python scripts/plot_results.py results/cifar10_small.csv docs/cifar10_small.png."""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from ubn_zoo.train import EpochMetrics, read_metrics

COLOURS = {"ubn": "tab:blue", "bn": "tab:orange"}
LABELS = {"ubn": "UBN", "bn": "BatchNorm"}


def by_epoch(rows: list[EpochMetrics], field: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs, and mean, minimum and maximum over seeds of one field."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row.epoch].append(getattr(row, field))
    epochs = sorted(values)
    pick = [values[epoch] for epoch in epochs]
    return epochs, [statistics.fmean(v) for v in pick], [min(v) for v in pick], [max(v) for v in pick]


def draw(rows: tuple[EpochMetrics, ...], path: Path) -> None:
    """Accuracy of each norm, and the similarity that UBN's gates look at."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    accuracy, similarity = figure.subplots(1, 2)
    for norm in dict.fromkeys(row.norm for row in rows):
        mine = [row for row in rows if row.norm == norm]
        seeds = len({row.seed for row in mine})
        epochs, mean, low, high = by_epoch(mine, "top1")
        label = f"{LABELS.get(norm, norm)} ({seeds} seed{'s' if seeds > 1 else ''})"
        accuracy.plot(epochs, mean, marker="o", color=COLOURS.get(norm), label=label)
        accuracy.fill_between(epochs, low, high, color=COLOURS.get(norm), alpha=0.2, linewidth=0)
    accuracy.set(title=f"{rows[0].model} on CIFAR-10", xlabel="epoch", ylabel="held-out top-1 (%)", xticks=epochs)
    accuracy.legend(loc="lower right")
    accuracy.grid(alpha=0.3)

    gated = [row for row in rows if row.gates]
    epochs, mean, _, _ = by_epoch(gated, "similarity_mean")
    similarity.plot(epochs, mean, marker="o", color=COLOURS["ubn"], label="mean over layers")
    low, high = by_epoch(gated, "similarity_min")[2], by_epoch(gated, "similarity_max")[3]
    similarity.fill_between(epochs, low, high, color=COLOURS["ubn"], alpha=0.2, linewidth=0, label="least to most")
    similarity.axhline(0.15, color="black", linestyle="--", linewidth=1, label="gate threshold 0.15")
    similarity.set(title="Feature similarity of the UBN layers", xlabel="epoch", xticks=epochs, ylim=(0, 1))
    similarity.set_ylabel("running cosine similarity")
    similarity.legend(loc="best")
    similarity.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parses, draws, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, help="metrics.csv of scripts/train_cifar10.py")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args()
    draw(read_metrics(args.table), args.picture)
    print(f"written: {args.picture}")


if __name__ == "__main__":
    main()
