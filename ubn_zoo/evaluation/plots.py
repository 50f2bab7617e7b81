"""Plot training runs and feature condensation with matplotlib (the extra ``ubn-zoo[quickstart]``).

Plots are PNG files, written atomically. No display is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubn_zoo.errors import EvaluationError, MissingPackageError
from ubn_zoo.evaluation.condensation import DEFAULT_THRESHOLD
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity, read_metrics, read_similarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "STYLES",
    "Style",
    "draw_comparison",
    "draw_run",
    "draw_similarity_comparison",
    "new_figure",
    "save",
]

_DPI = 120
_MARKED_EPOCHS = 40  # above this, markers would hide the line
_TICKED_EPOCHS = 12
_NAMED_LAYERS = 80  # above this, only every second, third ... layer is labeled


@dataclasses.dataclass(frozen=True, slots=True)
class Style:
    """Appearance of a group of points and lines."""

    color: str
    marker: str
    dashes: Any


# Okabe and Ito's palette for color-blind readers, with gray instead of yellow, which is too pale for lines on white.
# Markers and dashes distinguish groups in black and white.
STYLES = (
    Style("#0072B2", "o", "-"),
    Style("#D55E00", "s", (0, (6, 2))),
    Style("#009E73", "^", (0, (1, 1.2))),
    Style("#CC79A7", "D", (0, (5, 1.5, 1, 1.5))),
    Style("#E69F00", "v", (0, (3, 1))),
    Style("#56B4E9", "P", (0, (8, 1.5, 1, 1.5, 1, 1.5))),
    Style("#000000", "X", (0, (10, 2))),
    Style("#7F7F7F", "*", (0, (2, 2))),
)
_TRAIN, _TEST, _AVERAGED = STYLES[4], STYLES[0], STYLES[1]
_OPEN, _CLOSED = "#FFE4B5", "#0B3C5D"


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure with a size in inches; no display is needed.

    Raises:
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingPackageError(
            "matplotlib cannot be imported; install it with: pip install 'ubn-zoo[quickstart]'"
        ) from error
    # With the default padding, the label of one panel seems to belong to the next.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG atomically and return its path."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.part")
    try:
        figure.savefig(temporary, dpi=_DPI, format="png")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _whole_epochs(axes: Axes, epochs: Iterable[int]) -> None:
    """Set ticks at whole epochs: all of them, or round numbers if there are many."""
    from matplotlib.ticker import MaxNLocator

    found = sorted(set(epochs))
    axes.set_xlabel("epoch")
    if len(found) <= _TICKED_EPOCHS:
        axes.set_xticks(found)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=_TICKED_EPOCHS, integer=True))
    if len(found) == 1:
        axes.set_xlim(found[0] - 0.7, found[0] + 0.7)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, label: str) -> None:
    axes.plot(
        x,
        y,
        color=style.color,
        linestyle=style.dashes,
        marker=style.marker if len(x) <= _MARKED_EPOCHS else None,
        markersize=4 if len(x) > 1 else 8,
        linewidth=1.5,
        label=label,
    )


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_run(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Draw a run into its own folder: its loss and accuracy, learning rate, and feature similarity.

    Args:
        folder: Folder with ``metrics.csv``, and with ``similarity.csv`` if similarity was measured.

    Returns:
        The files: ``loss_accuracy.png``, ``learning_rate.png`` and, if similarity was measured, ``similarity.png``,
        with a map of similarity by layer and epoch and, for layers with gates, a map of gate states.

    Raises:
        FileNotFoundError: There is no ``metrics.csv``.
        ValueError: ``metrics.csv`` has no rows, or a file has other columns.
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    rows = sorted(read_metrics(folder / "metrics.csv"), key=lambda row: row.epoch)
    if not rows:
        raise EvaluationError(f"{folder / 'metrics.csv'}: received no rows; valid: at least one epoch, train for one")
    name = f"{rows[-1].model}, {rows[-1].norm}, seed {rows[-1].seed}"
    written = [
        _draw_loss_accuracy(rows, name, folder / "loss_accuracy.png"),
        _draw_learning_rate(rows, name, folder / "learning_rate.png"),
    ]
    table = folder / "similarity.csv"
    similarity = read_similarity(table) if table.exists() else ()
    if similarity:
        written.append(_draw_similarity(similarity, name, folder / "similarity.png"))
    return tuple(written)


def _draw_loss_accuracy(rows: Sequence[EpochMetrics], name: str, path: Path) -> Path:
    figure = new_figure(9, 3.8)
    figure.suptitle(name, fontsize=11)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row.epoch for row in rows]
    ema_loss = {row.epoch: row.ema_test_loss for row in rows if row.ema_test_loss is not None}
    ema_top1 = {row.epoch: row.ema_top1 for row in rows if row.ema_top1 is not None}
    _line(loss, epochs, [row.train_loss for row in rows], _TRAIN, "training")
    _line(loss, epochs, [row.test_loss for row in rows], _TEST, "held-out")
    _line(accuracy, epochs, [row.top1 for row in rows], _TEST, "held-out")
    for axes, values in ((loss, ema_loss), (accuracy, ema_top1)):
        if values:
            _line(axes, list(values), list(values.values()), _AVERAGED, "held-out, EMA")
    _finish(loss, "Loss", "loss (nats)")
    _finish(accuracy, "Accuracy", "held-out top-1 (%)")
    for axes in (loss, accuracy):
        _whole_epochs(axes, epochs)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return save(figure, path)


def _draw_learning_rate(rows: Sequence[EpochMetrics], name: str, path: Path) -> Path:
    figure = new_figure(5.5, 3.2)
    axes = figure.subplots()
    epochs = [row.epoch for row in rows]
    _line(axes, epochs, [row.lr for row in rows], _TEST, "learning rate")
    _finish(axes, name, "learning rate")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    _whole_epochs(axes, epochs)
    return save(figure, path)


def _edges(epochs: Sequence[int]) -> list[float]:
    """Edges of the columns of a map: halfway between epochs, which need not be consecutive."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(epochs)]
    first = middles[0] - epochs[0] if middles else 0.5
    last = epochs[-1] - middles[-1] if middles else 0.5
    return [epochs[0] - first, *middles, epochs[-1] + last]


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    step = math.ceil(len(layers) / _NAMED_LAYERS)
    named = range(0, len(layers), step)
    axes.set_yticks([index + 0.5 for index in named], [layers[index] for index in named])
    axes.tick_params(axis="y", labelsize=8 if len(layers) <= 24 else 6, length=2)
    axes.set_ylim(len(layers), 0)


def _draw_similarity(rows: Sequence[LayerSimilarity], name: str, path: Path) -> Path:
    from matplotlib.colors import ListedColormap, TwoSlopeNorm
    from matplotlib.patches import Patch

    epochs = sorted({row.epoch for row in rows})
    depths = {row.layer: row.depth for row in rows}
    layers = sorted(depths, key=lambda layer: depths[layer])
    cells = {(row.layer, row.epoch): row for row in rows}

    def grid(value: Callable[[LayerSimilarity], float]) -> list[list[float]]:
        found = [[cells.get((layer, epoch)) for epoch in epochs] for layer in layers]
        return [[math.nan if row is None else value(row) for row in line] for line in found]

    gated = any(row.gate is not None for row in rows)
    height = min(10.0, max(3.4, 1.6 + (0.22 if len(layers) <= 24 else 0.135) * len(layers)))
    figure = new_figure(8.8 if gated else 5.6, height)
    figure.suptitle(name, fontsize=11)
    left, *others = figure.subplots(1, 2 if gated else 1, sharey=True, squeeze=False)[0]
    values = grid(lambda row: row.similarity)
    thresholds = sorted({row.threshold for row in rows if row.threshold is not None and 0 < row.threshold < 1})
    # Condensed layers get a different color from the rest for any threshold.
    norm = TwoSlopeNorm(vmin=0, vcenter=thresholds[0] if thresholds else DEFAULT_THRESHOLD, vmax=1)
    colors = left.pcolormesh(_edges(epochs), range(len(layers) + 1), values, cmap="PuOr_r", norm=norm)
    # Omit ticks whose labels would overlap the label of the threshold.
    ticks = [norm.vcenter, *(tick for tick in (0.0, 0.25, 0.5, 0.75, 1.0) if abs(tick - norm.vcenter) > 0.08)]
    bar = figure.colorbar(colors, ax=left, ticks=ticks, format="%g", pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=8)
    left.set_title(f"Feature similarity of held-out images (white: threshold {norm.vcenter:g})", fontsize=9)
    left.set_facecolor("0.85")  # where nothing was measured
    _name_layers(left, layers)
    left.set_ylabel("norm layers in order", fontsize=9)
    for right in others:
        states = grid(lambda row: math.nan if row.gate is None else float(row.gate == "closed"))
        right.set_facecolor("0.9")
        right.pcolormesh(
            _edges(epochs), range(len(layers) + 1), states, cmap=ListedColormap([_OPEN, _CLOSED]), vmin=0, vmax=1
        )
        right.tick_params(axis="y", left=False)
        right.set_title("Gates after the epoch", fontsize=9)
        patches = [
            Patch(facecolor=_OPEN, edgecolor="0.5", label="open: batch statistics"),
            Patch(facecolor=_CLOSED, edgecolor="0.5", label="closed: running statistics"),
        ]
        if any(row.gate is None for row in rows):
            patches.append(Patch(facecolor="0.9", edgecolor="0.5", label="no gate"))
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for axes in (left, *others):
        _whole_epochs(axes, epochs)
        axes.set_xlim(_edges(epochs)[0], _edges(epochs)[-1])
    return save(figure, path)


def _styles(groups: Mapping[str, Sequence[Any]], what: str) -> dict[str, Style]:
    if not 0 < len(groups) <= len(STYLES):
        raise EvaluationError(
            f"received {len(groups)} groups to compare; valid: 1 to {len(STYLES)}; draw several plots"
        )
    for label, members in groups.items():
        if not members:
            raise EvaluationError(f"{label!r}: received no {what}; valid: at least one")
    return dict(zip(groups, STYLES, strict=False))


def _draw_range(
    axes: Axes, values: Mapping[float, Sequence[float]], style: Style, label: str, shift: float = 0.0
) -> None:
    """Draw mean and range of several values per x: a line with a band, or a point with a bar for a single x."""
    xs = sorted(values)
    mean = [statistics.fmean(values[x]) for x in xs]
    low, high = [min(values[x]) for x in xs], [max(values[x]) for x in xs]
    moved = [x + shift for x in xs]
    _line(axes, moved, mean, style, label)
    if len(xs) == 1:
        axes.vlines(moved, low, high, color=style.color, linewidth=2)
    else:
        axes.fill_between(moved, low, high, color=style.color, alpha=0.15, linewidth=0)


def _shifts(count: int, single: bool) -> list[float]:
    """Horizontal offsets that keep groups from overlapping if there is only one epoch."""
    return [0.1 * (index - (count - 1) / 2) if single else 0.0 for index in range(count)]


def _outside_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # At this size, a letter is about 0.07 inches wide, and the line before a label is as wide as 8 letters.
    columns = max(1, min(len(labels), 4, int(figure.get_figwidth() / 0.07) // (max(map(len, labels)) + 8)))
    # Use the smallest number of columns that needs no more rows.
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _elapsed(run: Sequence[EpochMetrics]) -> dict[int, float]:
    total, elapsed = 0.0, {}
    for row in sorted(run, key=lambda row: row.epoch):
        total += row.seconds
        elapsed[row.epoch] = total
    return elapsed


def draw_comparison(
    groups: Mapping[str, Sequence[Sequence[EpochMetrics]]],
    path: str | os.PathLike[str],
    *,
    title: str,
    x: str = "epoch",
) -> None:
    """Draw held-out top-1 and training loss for groups of runs: the mean and range over the runs of each group.

    Args:
        groups: Lists of runs by label, where a run is the rows of one seed; at most 8 groups. The number of runs is
            added to the label.
        path: PNG file to write.
        title: Title of the plot.
        x: ``epoch``, or ``seconds`` for the training time up to the epoch, averaged over a group's runs.

    Raises:
        ValueError: There are no groups or too many, a group has no runs or rows, or `x` is not valid.
        ImportError: matplotlib is missing.
    """
    if x not in ("epoch", "seconds"):
        raise EvaluationError(f"x: received {x!r}; valid: 'epoch', 'seconds'")
    styles = _styles(groups, "runs")
    for label, runs in groups.items():
        if not all(runs):
            raise EvaluationError(f"{label!r}: received a run without rows; valid: at least one epoch, train for one")
    figure = new_figure(10, 4.4)
    figure.suptitle(title, fontsize=11)
    accuracy, loss = figure.subplots(1, 2)
    epochs = sorted({row.epoch for runs in groups.values() for run in runs for row in run})
    shifts = _shifts(len(groups), single=len(epochs) == 1 and x == "epoch")
    for (label, runs), shift in zip(groups.items(), shifts, strict=True):
        times: defaultdict[int, list[float]] = defaultdict(list)
        for run in runs:
            for epoch, seconds in _elapsed(run).items():
                times[epoch].append(seconds)
        place = {epoch: statistics.fmean(found) if x == "seconds" else epoch for epoch, found in times.items()}
        counted = f"{label} ({_counted(len(runs), 'seed')})"
        for axes, field in ((accuracy, "top1"), (loss, "train_loss")):
            values: defaultdict[float, list[float]] = defaultdict(list)
            for run in runs:
                for row in run:
                    values[place[row.epoch]].append(getattr(row, field))
            _draw_range(axes, values, styles[label], counted, shift)
    _finish(accuracy, "Held-out accuracy", "top-1 (%)")
    _finish(loss, "Training loss", "loss (nats)")
    for axes in (accuracy, loss):
        if x == "epoch":
            _whole_epochs(axes, epochs)
        else:
            axes.set_xlabel("training time (s)")
            axes.set_xlim(left=0)
    _outside_legend(figure, accuracy)
    save(figure, path)


def draw_similarity_comparison(
    groups: Mapping[str, Sequence[LayerSimilarity]], path: str | os.PathLike[str], *, title: str
) -> None:
    """Draw feature similarity of several models or runs: by depth at the last epoch, and the mean over training.

    Args:
        groups: Rows by label, at most 8 groups; rows of several seeds under one label are drawn as mean and range.
        path: PNG file to write.
        title: Title of the plot.

    Raises:
        ValueError: There are no groups or too many, or a group has no rows.
        ImportError: matplotlib is missing.
    """
    styles = _styles(groups, "rows of feature similarity")
    over_time = any(len({row.epoch for row in rows}) > 1 for rows in groups.values())
    figure = new_figure(10.5 if over_time else 6.5, 4.4)
    from matplotlib.ticker import MaxNLocator

    figure.suptitle(title, fontsize=11)
    by_depth, *others = figure.subplots(1, 2 if over_time else 1, squeeze=False)[0]
    for label, rows in groups.items():
        last = max(row.epoch for row in rows)
        depths: defaultdict[float, list[float]] = defaultdict(list)
        for row in rows:
            if row.epoch == last:
                depths[row.depth].append(row.similarity)
        _draw_range(by_depth, depths, styles[label], label)
        for by_epoch in others:
            # Averaging over all rows also averages over seeds, because every seed has the same layers.
            epochs: defaultdict[float, list[float]] = defaultdict(list)
            for row in rows:
                epochs[row.epoch].append(row.similarity)
            found = sorted(epochs)
            _line(by_epoch, found, [statistics.fmean(epochs[epoch]) for epoch in found], styles[label], label)
    thresholds = {row.threshold for rows in groups.values() for row in rows if row.threshold is not None}
    for axes in (by_depth, *others):
        for threshold in sorted(thresholds or {DEFAULT_THRESHOLD}):
            axes.axhline(threshold, color="0.3", linestyle="-", linewidth=0.8, label=f"threshold {threshold:g}")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _finish(
        by_depth, f"By depth{', after the last epoch' if over_time else ''}", "feature similarity of held-out images"
    )
    by_depth.set_xlabel("norm layer, from input to output")
    by_depth.xaxis.set_major_locator(MaxNLocator(integer=True))
    for by_epoch in others:
        _finish(by_epoch, "Mean over layers", "feature similarity of held-out images")
        _whole_epochs(by_epoch, (row.epoch for rows in groups.values() for row in rows))
    _outside_legend(figure, by_depth)
    save(figure, path)
