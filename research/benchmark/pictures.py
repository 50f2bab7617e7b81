"""Plots of ratios to BatchNorm and of growth, drawn with matplotlib (the extra ``ubn-zoo[quickstart]``)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ubn_zoo.evaluation.plots import STYLES, Style, new_figure, save

from .growth import SYNCHRONIZED, Fit, GrowthPoint, fit, size_of
from .targets import limit_of
from .turns import KINDS, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_growth", "draw_ratios"]

# One color and marker per kind of layer in every plot.
_KIND_STYLES = {
    "bn": STYLES[7],
    "ubn": STYLES[0],
    "rbn": STYLES[2],
    "bnet": STYLES[4],
    "naive": STYLES[1],
}
_KIND_STYLES |= {kind: STYLES[5] for kind in KINDS if kind not in _KIND_STYLES}
_LAYER_STYLES = {KINDS[kind]: style for kind, style in _KIND_STYLES.items()} | {SYNCHRONIZED: STYLES[3]}
_TARGET = "#B00020"
_LINE_POINTS = 40
_FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.4)
_COARSE_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_MODES = {
    "train": "training step",
    "eval": "inference",
    "fused": "inference, fused, as if trained",
    "folded": "inference, fused, as converted from BatchNorm",
    "layer": "training step of a layer",
    "layer-eval": "inference of a layer",
}
_SIZES = {"batch": "images", "pixels": "pixels per side", "channels": "channels", "ranks": "ranks (processes)"}


def _panels(timings: Sequence[Timing]) -> dict[tuple[str, bool], list[list[Timing]]]:
    """By mode and memory format, the rows of a panel: each entry of a model, or all kinds of layers of a shape."""
    panels: dict[tuple[str, bool], dict[tuple[object, ...], list[Timing]]] = {}
    for timing in timings:
        if timing.kind not in KINDS or (timing.kind == "bn" and timing.ratio == 1):
            continue
        row: tuple[object, ...] = (timing.model, timing.batch_size, timing.dtype)
        if timing.mode.startswith("layer"):
            row = (_label(timing), timing.batch_size, timing.dtype)
        panels.setdefault((timing.mode, timing.channels_last), {}).setdefault(row, []).append(timing)
    return {panel: list(rows.values()) for panel, rows in panels.items()}


def _label(timing: Timing) -> str:
    if timing.mode.startswith("layer"):
        label = timing.model.removeprefix(KINDS[timing.kind]).strip()
    else:
        label = timing.model.replace(" (fused)", "").replace("(fused, compiled)", "(compiled)")
        if timing.mode in ("fused", "folded") and "(fused" not in timing.model:
            label += " not fused"
        label = f"{label}, batch {timing.batch_size}"
    return label if timing.dtype == "float32" else f"{label}, {timing.dtype}"


def _range(timing: Timing) -> tuple[float, float]:
    """Quartiles, or the median twice if a table has none."""
    return timing.ratio_lower or timing.ratio, timing.ratio_upper or timing.ratio


def _dot(axes: Axes, timing: Timing, height: float) -> None:
    style = _KIND_STYLES[timing.kind]
    axes.hlines(height, *_range(timing), color=style.color, linewidth=2)
    axes.plot(timing.ratio, height, style.marker, color=style.color, markersize=6)


def _number(axes: Axes, row: Sequence[Timing], height: float, width: float) -> None:
    """Write each dot's number above it, or below if the previous number is too close."""
    last, above = -math.inf, True
    for timing in sorted(row, key=lambda timing: timing.ratio):
        at = math.log(timing.ratio)
        above = at - last > 0.09 * width or not above
        last = at
        axes.annotate(
            f"{timing.ratio:.2f}" if timing.ratio < 10 else f"{timing.ratio:.0f}",
            (timing.ratio, height),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=7,
            color=_KIND_STYLES[timing.kind].color,
            # Keeps numbers legible on lines.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )


def _ratio_panel(axes: Axes, rows: Sequence[Sequence[Timing]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.axvline(1, color=_KIND_STYLES["bn"].color, linewidth=1.5, zorder=1)
    for height, row in enumerate(rows):
        for timing in row:
            _dot(axes, timing, height)
            limit = limit_of(timing)
            if limit is not None:
                axes.vlines(limit, height - 0.38, height + 0.38, color=_TARGET, linewidth=2)
    limits = [limit for row in rows for timing in row if (limit := limit_of(timing)) is not None]
    lowest = min([1.0, *(_range(timing)[0] for row in rows for timing in row)])
    highest = max([1.25, *limits, *(_range(timing)[1] for row in rows for timing in row)])
    for height, row in enumerate(rows):
        _number(axes, row, height, math.log(highest / lowest))
    axes.set_xscale("log")
    # Room for the numbers at the outermost dots.
    room = max(1.04, (highest / lowest) ** 0.06)
    axes.set_xlim(lowest / room, highest * room)
    axes.xaxis.set_major_locator(FixedLocator(_FINE_TICKS if highest < 2.5 * lowest else _COARSE_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(rows)), [_label(row[0]) for row in rows])
    axes.tick_params(labelsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel("time over BatchNorm's", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _style_legend(figure: Figure, styles: dict[str, Style], target: bool, *, lines: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.color, marker=style.marker, linestyle=style.dashes if lines else "none", label=label)
        for label, style in styles.items()
    ]
    if target:
        handles.append(
            Line2D(
                [], [], color=_TARGET, marker="|", markersize=12, markeredgewidth=2, linestyle="none", label="target"
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def draw_ratios(timings: Sequence[Timing], path: str | Path, title: str = "") -> None:
    """Draw the ratio of each entry's step time to BatchNorm's: medians, quartiles, numbers and targets.

    There is one panel per mode and memory format, and one row per model or, for layers, per shape.

    Args:
        timings: From :func:`compare` or :func:`compare_layers`, in their order.
        path: PNG file to write.
        title: Title of the figure.

    Raises:
        ValueError: There is nothing to draw beside the baseline.
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    panels = _panels(timings)
    if not panels:
        raise ValueError("timings: received none beside the baseline; valid: one at least, time something first")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    counts = [len(rows) for rows in panels.values()]
    heights = [0.9 + 0.36 * max(counts[start : start + columns]) for start in range(0, len(counts), columns)]
    figure = new_figure(5.8 * columns, 0.8 + sum(heights))
    grid = figure.subplots(lines, columns, squeeze=False, height_ratios=heights).flat
    layouts = len({channels_last for _, channels_last in panels}) > 1
    for axes, ((mode, channels_last), rows) in zip(grid, panels.items(), strict=False):
        _ratio_panel(axes, rows)
        layout = f", {'channels_last' if channels_last else 'contiguous'}" if layouts else ""
        axes.set_title(f"{_MODES[mode]}{layout}", fontsize=10)
    for axes in list(grid):
        axes.set_visible(False)
    shown = [timing for rows in panels.values() for row in rows for timing in row]
    kinds = {timing.kind for timing in shown}
    styles = {"BatchNorm": _KIND_STYLES["bn"]} | {
        KINDS[kind]: _KIND_STYLES[kind] for kind in KINDS if kind in kinds - {"bn"}
    }
    _style_legend(figure, styles, any(limit_of(timing) is not None for timing in shown))
    if title:
        # At this size a letter takes about 0.09 inches.
        figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() / 0.09)), fontsize=11)
    save(figure, path)


def draw_growth(points: Sequence[GrowthPoint], path: str | Path, title: str = "") -> None:
    """Draw how a layer's time grows, one panel per axis: points with quartiles, and the lines fitted to them.

    Args:
        points: From :func:`grow` and :func:`grow_ranks`.
        path: PNG file to write.
        title: Title of the figure.

    Raises:
        ValueError: There are no points.
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    if not points:
        raise ValueError("points: received none to draw; valid: one at least")
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    names = list(dict.fromkeys(point.axis for point in points))
    fits = {(found.axis, found.layer): found for found in fit(points)}
    figure = new_figure(3.6 * len(names) + 0.6, 4.2)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = [point for point in points if point.axis == name]
        for layer in dict.fromkeys(point.layer for point in mine):
            found, style = [point for point in mine if point.layer == layer], _LAYER_STYLES[layer]
            at = [_shown(point) for point in found]
            axes.plot(at, [point.median for point in found], style.marker, color=style.color, markersize=5)
            axes.vlines(at, [point.lower for point in found], [point.upper for point in found], color=style.color)
            if (name, layer) not in fits:
                continue
            line = _line(fits[name, layer], found)
            axes.plot(list(line), list(line.values()), linestyle=style.dashes, color=style.color, linewidth=1)
        # The points set the limits of the axes, not the fitted lines.
        axes.set_ylim(0.7 * min(point.lower for point in mine), 1.4 * max(point.upper for point in mine))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({_shown(point) for point in mine})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(_SIZES[name], fontsize=9)
        axes.set_title(_held(mine), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("training step of a layer (ms)", fontsize=9)
    layers = {point.layer for point in points}
    _style_legend(figure, {name: style for name, style in _LAYER_STYLES.items() if name in layers}, False, lines=True)
    if title:
        # At this size a letter takes about 0.09 inches.
        figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() / 0.09)), fontsize=11)
    save(figure, path)


def _shown(point: GrowthPoint) -> int:
    return {"batch": point.batch_size, "pixels": point.side, "channels": point.channels, "ranks": point.ranks}[
        point.axis
    ]


def _held(points: Sequence[GrowthPoint]) -> str:
    """Describes the sizes that stay the same on an axis."""
    first = points[0]
    sizes = {"batch": f"{first.batch_size} images", "channels": f"{first.channels} channels"}
    sizes["pixels"] = f"{first.side}x{first.side} pixels"
    kept = [size for name, size in sizes.items() if name != first.axis]
    return ("each: " if first.axis == "ranks" else "") + ", ".join(kept)


def _line(fit: Fit, points: Sequence[GrowthPoint]) -> dict[float, float]:
    """A fitted line between the smallest and the largest size, where it is above zero and has a logarithm."""
    first = min(points, key=_shown)
    start, span = _shown(first), max(map(_shown, points)) / _shown(first)
    line = {}
    for step in range(_LINE_POINTS + 1):
        factor = span ** (step / _LINE_POINTS)
        time = fit.time(size_of(first) * factor ** (2 if first.axis == "pixels" else 1))
        if time > 0:
            line[start * factor] = time
    return line
