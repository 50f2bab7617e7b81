"""Pictures of training runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .train import EpochMetrics

__all__ = ["draw_training"]

_COLOURS = {"ubn": "tab:blue", "bn": "tab:orange"}
_LABELS = {"ubn": "UBN", "bn": "BatchNorm"}


def _by_epoch(rows: list[EpochMetrics], field: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs, and mean, minimum and maximum over seeds of one field."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row.epoch].append(getattr(row, field))
    epochs = sorted(values)
    pick = [values[epoch] for epoch in epochs]
    return epochs, [statistics.fmean(v) for v in pick], [min(v) for v in pick], [max(v) for v in pick]


def draw_training(rows: Sequence[EpochMetrics], path: str | Path) -> None:
    """Draws accuracy per epoch of each norm, and beside it the feature similarity that UBN's gates look at.

    Args:
        rows: Of one or more runs of one model; several seeds of a norm become a mean with its range.
        path: PNG file to write.

    Raises:
        ValueError: There are no rows.
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("there are no rows to draw; train for at least one epoch")
    gated = [row for row in rows if row.gates]
    figure = Figure(figsize=(9 if gated else 4.5, 3.4), layout="constrained")
    accuracy, *others = figure.subplots(1, 2 if gated else 1, squeeze=False)[0]
    for norm in dict.fromkeys(row.norm for row in rows):
        mine = [row for row in rows if row.norm == norm]
        seeds = len({row.seed for row in mine})
        epochs, mean, low, high = _by_epoch(mine, "top1")
        label = f"{_LABELS.get(norm, norm)} ({seeds} seed{'s' if seeds > 1 else ''})"
        accuracy.plot(epochs, mean, marker="o", color=_COLOURS.get(norm), label=label)
        accuracy.fill_between(epochs, low, high, color=_COLOURS.get(norm), alpha=0.2, linewidth=0)
    accuracy.set(title=f"{rows[0].model} on CIFAR-10", xlabel="epoch", ylabel="held-out top-1 (%)", xticks=epochs)
    accuracy.legend(loc="lower right")
    accuracy.grid(alpha=0.3)

    for similarity in others:
        _draw_similarity(similarity, gated)
    figure.savefig(path, dpi=120)


def _draw_similarity(similarity: Any, gated: list[EpochMetrics]) -> None:
    epochs, mean, _, _ = _by_epoch(gated, "similarity_mean")
    similarity.plot(epochs, mean, marker="o", color=_COLOURS["ubn"], label="mean over layers")
    low, high = _by_epoch(gated, "similarity_min")[2], _by_epoch(gated, "similarity_max")[3]
    similarity.fill_between(epochs, low, high, color=_COLOURS["ubn"], alpha=0.2, linewidth=0, label="least to most")
    similarity.axhline(0.15, color="black", linestyle="--", linewidth=1, label="gate threshold 0.15")
    similarity.set(title="Feature similarity of the UBN layers", xlabel="epoch", xticks=epochs, ylim=(0, 1))
    similarity.set_ylabel("running cosine similarity")
    similarity.legend(loc="best")
    similarity.grid(alpha=0.3)
