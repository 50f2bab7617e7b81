"""A run on one page: ``report.html`` with status, curves, metrics and recipe. It needs no other file and no network."""

from __future__ import annotations

import dataclasses
import html
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity
from ubn_zoo.evaluation.plots import STYLES
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.status import Status
from ubn_zoo.utils.files import write_file
from ubn_zoo.utils.progress import duration

__all__ = ["report_page", "write_report"]

REPORT = "report.html"
_TRAIN, _TEST, _AVERAGED, _OTHER = (STYLES[index].color for index in (4, 0, 1, 2))
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 260, 54, 14, 12, 42
_POINTS = 400  # of a curve; more cannot be seen
_MARKED = 40  # with more points, marks would hide the line

_Curve = tuple[str, str, Sequence[tuple[float, float]]]

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #d8dde3; --soft: #f5f7f9; --dim: #5b6570; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #3a4048; --soft: #22262b; --dim: #a2abb5; }} }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }}
h1 {{ font-size: 1.4rem; margin: 0; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .6rem; }}
.state {{ display: inline-block; padding: .1rem .6rem; border-radius: 1rem; color: #fff; font-size: .85rem; }}
.running {{ background: #0072b2; }} .finished {{ background: #00805f; }} .failed {{ background: #b3261e; }}
.interrupted, .unknown {{ background: #8a5a00; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }}
.facts div {{ background: var(--soft); border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }}
.facts span, .dim {{ color: var(--dim); font-size: .82rem; }} .facts b {{ display: block; font-size: 1.1rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }}
figcaption {{ font-weight: 600; font-size: .92rem; }}
svg {{ width: 100%; height: auto; display: block; }} svg text {{ fill: currentColor; font-size: 14px; }}
.legend {{ font-size: .82rem; color: var(--dim); }} .legend i {{ display: inline-block; width: .9rem; height: .2rem;
  vertical-align: middle; margin: 0 .3rem 0 .7rem; }}
.scroll {{ overflow: auto; max-height: 26rem; border: 1px solid var(--line); border-radius: .4rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th {{ position: sticky; top: 0; background: var(--soft); font-weight: 600; }}
.keys th, .keys td {{ text-align: left; white-space: normal; position: static; }} .keys th {{ width: 14rem; }}
summary {{ cursor: pointer; margin: .6rem 0; color: var(--dim); }}
code {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{heading} <span class="state {state}">{state}</span></h1>
{message}
<div class="facts">{facts}</div>
<div class="charts">{charts}</div>
<h2>Epochs</h2>
{metrics}
<h2>Recipe</h2>
{recipe}
<h2>Started</h2>
{starts}
<p class="dim">Written by ubn-zoo train at {now}; renewed after every epoch.</p>
</body>
</html>
"""


def write_report(
    folder: Path,
    recipe: Recipe,
    rows: Sequence[EpochMetrics],
    similarity: Sequence[LayerSimilarity],
    status: Status,
    starts: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``report.html`` into a run's folder; the arguments are those of `report_page`.

    Raises:
        OSError: It cannot be written.
    """
    write_file(folder / REPORT, report_page(recipe, rows, similarity, status, starts), durable=False)


def report_page(
    recipe: Recipe,
    rows: Sequence[EpochMetrics],
    similarity: Sequence[LayerSimilarity],
    status: Status,
    starts: Sequence[Mapping[str, Any]],
) -> str:
    """Write a run as an HTML page.

    Args:
        recipe: The run, complete.
        rows: Its epochs.
        similarity: Similarity of its layers after each epoch; empty if it was not measured.
        status: How far it is.
        starts: What ``environment.json`` has of each start.
    """
    heading = f"{recipe.model} {recipe.norm}, seed {recipe.seed}"
    return _PAGE.format(
        title=html.escape(f"{heading}, {status.state}"),
        heading=html.escape(heading),
        state=html.escape(status.state),
        message=f"<p>{html.escape(status.message)}</p>" if status.message else "",
        facts=_facts(rows, status),
        charts="\n".join(_charts(rows, similarity)),
        metrics=_metrics(rows),
        recipe=_recipe(recipe),
        starts=_starts(starts),
        now=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )


def _facts(rows: Sequence[EpochMetrics], status: Status) -> str:
    found = {"epochs": f"{status.epoch} of {status.epochs}"}
    if rows:
        last, best = rows[-1], max(rows, key=lambda row: row.top1)
        found["top-1"] = f"{last.top1:.2f} %"
        found[f"best top-1, epoch {best.epoch}"] = f"{best.top1:.2f} %"
        if last.ema_top1 is not None:
            found["top-1 of EMA"] = f"{last.ema_top1:.2f} %"
        found["images/s"] = f"{last.images_per_second:,.0f}"
    if status.elapsed is not None:
        found["elapsed"] = duration(status.elapsed)
    if status.left is not None and status.state == "running":
        found["left"] = duration(status.left)
    return "".join(
        f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>" for name, value in found.items()
    )


def _charts(rows: Sequence[EpochMetrics], similarity: Sequence[LayerSimilarity]) -> list[str]:
    def curve(label: str, color: str, name: str) -> _Curve:
        values = [(float(row.epoch), getattr(row, name)) for row in rows]
        return label, color, [(x, float(y)) for x, y in values if y is not None]

    charts = [
        _chart(
            "Loss (nats)",
            [
                curve("training", _TRAIN, "train_loss"),
                curve("held-out", _TEST, "test_loss"),
                curve("held-out, EMA", _AVERAGED, "ema_test_loss"),
            ],
        ),
        _chart(
            "Held-out accuracy (%)",
            [
                curve("top-1", _TEST, "top1"),
                curve("top-5", _OTHER, "top5"),
                curve("top-1, EMA", _AVERAGED, "ema_top1"),
            ],
            highest=100.0,
        ),
        _chart("Learning rate", [curve("learning rate", _TEST, "lr")]),
        _chart(
            "Running feature similarity",
            [
                curve("smallest", _OTHER, "similarity_min"),
                curve("mean", _TEST, "similarity_mean"),
                curve("largest", _AVERAGED, "similarity_max"),
            ],
        ),
    ]
    if similarity:
        first, last = similarity[0].epoch, similarity[-1].epoch
        shown = dict.fromkeys((first, last))
        layers = [
            (f"epoch {epoch}", color, [(float(row.depth), row.similarity) for row in similarity if row.epoch == epoch])
            for epoch, color in zip(shown, (_OTHER, _TEST), strict=False)
        ]
        charts.append(_chart("Held-out similarity by norm layer", layers, x_label="norm layer, in order"))
    return [chart for chart in charts if chart]


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers that cover a range."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _chart(title: str, curves: Sequence[_Curve], *, x_label: str = "epoch", highest: float = math.inf) -> str:
    """Curves as an SVG drawing with its legend; empty if there are no points."""
    kept = [(label, color, _thinned(points)) for label, color, points in curves if points]
    xs = [x for _, _, points in kept for x, _ in points]
    ys = [y for _, _, points in kept for _, y in points if math.isfinite(y)]
    if not ys:
        return ""
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    y0, y1 = min(ys), max(ys)
    margin = 0.06 * (y1 - y0) or 0.1 * abs(y1) or 1.0
    y0, y1 = (0.0 if 0.0 <= y0 < margin else y0 - margin), min(y1 + margin, highest)

    def across(x: float) -> float:
        return round(_LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = []
    for y in _ticks(y0, y1, 5):
        parts.append(f'<path d="M{_LEFT} {down(y)}H{_WIDTH - _RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y) + 4}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(x0, x1, 8, whole=True):
        parts.append(f'<text x="{across(x)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{html.escape(x_label)}</text>')
    for label, color, points in kept:
        places = [(across(x), down(y), x, y) for x, y in points if math.isfinite(y)]
        line = " ".join(f"{x},{y}" for x, y, _, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(places) <= _MARKED:
            for x, y, place, value in places:
                note = html.escape(f"{x_label.partition(',')[0]} {place:g}, {label}: {value:.5g}")
                parts.append(f'<circle cx="{x}" cy="{y}" r="2.6" fill="{color}"><title>{note}</title></circle>')
    legend = "".join(f'<i style="background:{color}"></i>{html.escape(label)}' for label, color, _ in kept)
    drawing = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure>{caption}{drawing}<div class="legend">{legend}</div></figure>'


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Evenly spread points, the last included."""
    stride = math.ceil(len(points) / _POINTS)
    return points[(len(points) - 1) % stride :: stride]


_COLUMNS = {
    "epoch": ("epoch", "d"),
    "lr": ("lr", ".3g"),
    "train_loss": ("train loss", ".4f"),
    "test_loss": ("held-out loss", ".4f"),
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
    "ema_top1": ("EMA top-1 %", ".2f"),
    "calibration_error": ("calibration %", ".2f"),
    "gates_open": ("gates open", "d"),
    "images_per_second": ("images/s", ",.0f"),
    "seconds": ("seconds", ".0f"),
}


def _metrics(rows: Sequence[EpochMetrics]) -> str:
    if not rows:
        return '<p class="dim">No epoch is done yet.</p>'
    used = {name: shown for name, shown in _COLUMNS.items() if any(getattr(row, name) is not None for row in rows)}
    head = "".join(f"<th>{label}</th>" for label, _ in used.values())
    body = []
    for row in reversed(rows):
        values = [(getattr(row, name), form) for name, (_, form) in used.items()]
        cells = "".join(f"<td>{'' if value is None else format(value, form)}</td>" for value, form in values)
        body.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _recipe(recipe: Recipe) -> str:
    values = {field.name: (getattr(recipe, field.name), field.default) for field in dataclasses.fields(recipe)}
    changed = {key: value for key, (value, default) in values.items() if value != default}
    rest = {key: value for key, (value, default) in values.items() if value == default}
    return (
        f"{_table(changed.items())}<details><summary>values at their defaults</summary>{_table(rest.items())}</details>"
    )


def _starts(starts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for start in starts:
        hardware, versions = start.get("hardware", {}), start.get("versions", {})
        described = f"{hardware.get('name')}, ranks {start.get('ranks')}, torch {versions.get('torch')}, "
        described += f"timm {versions.get('timm')}, ubn-zoo {versions.get('ubn_zoo')}, commit {start.get('commit')}"
        command = " ".join(map(str, start.get("command", ())))
        rows.append((f"{start.get('started')}, after update {start.get('updates')}", f"{described}: {command}"))
    return _table(rows)


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        f"<tr><th>{html.escape(key)}</th><td><code>{html.escape(_shown(value))}</code></td></tr>" for key, value in rows
    )
    return f'<table class="keys">{body}</table>'


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
