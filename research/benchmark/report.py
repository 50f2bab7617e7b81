"""The page ``docs/speed.md``, generated from the tables in ``results/``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from .growth import Fit, GrowthPoint, fit
from .pictures import draw_growth, draw_ratios
from .profiles import GROUPS, Share
from .tables import columns, read_growth, read_profile, read_timings
from .targets import TARGETS, Target, find
from .turns import KINDS, Timing

__all__ = ["page", "report"]

_Item = TypeVar("_Item")

_INTRODUCTION = """\
# Speed and memory

<!-- Written by `python -m research.benchmark --report` from results/benchmark_*.csv; edit that instead. -->

Each time is the median of steps that alternate with BatchNorm's in one run. Each ratio is the median of the ratios to
BatchNorm's time within a turn; quartiles are in parentheses. A training step is forward, loss and backward, without the
optimizer. Images and weights are random, because no time depends on them.

`ubn-zoo benchmark resnet50_ubn` times any pair of models the same way on your own device, in about a minute.
"""

_FLOORS = """\
A *floor* is the least time that the necessary memory traffic takes, at the bandwidth of a copy of the same size in the
same run. In training both BatchNorm and UBN move at least 8 times the bytes of the layer's input: the forward pass
reads it twice and writes once; the backward pass reads input and gradient twice each and writes once. In inference
BatchNorm and BNET move them twice, UBN and RBN three times, and a fused BatchNorm disappears. So memory traffic does
not require UBN to be slower than BatchNorm in training. In plain torch it is slower, because the depthwise convolution
is a separate operation. Its time *alone*, including its backward pass in training, is listed next to the floor. The
*limit* of plain torch is the ratio that UBN would reach if it took BatchNorm's time plus these convolutions, and the
gate and the calibrations cost nothing.

On a CPU, the targets compare inference after `ubn_zoo.fuse` with the unfused BatchNorm model; on a GPU, with the fused
BatchNorm model. The model tables below give that stricter ratio for CPUs too. If two tables contain the same
measurement, this section and the plots use the first. When more models alternate, caches are colder and ratios larger.
"""

_RANKS = """\
Ranks are processes of one machine, each with one thread and its own batch, connected by gloo. If there are more ranks
than cores, they share the cores. UBN synchronized computes the same equations as UBN naive, so the difference is the
cost of sharing statistics. torch's SyncBatchNorm supports only GPUs.
"""
_RANKS_HEAD = ("ranks", "layer", "step (ms)", "all-reduces", "bytes contributed by each rank")

_HARDWARE = {"cpu": "CPU", "cuda": "GPU"}
_MODES = {
    "train": "training",
    "eval": "inference",
    "fused": "inference, fused, as if trained",
    "folded": "inference, fused, as converted",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """How a table was measured."""

    file: str
    date: str
    command: str
    environment: str

    def line(self) -> str:
        # Tables store the original command; the page shows the current command that reproduces it.
        command = self.command.replace("scripts/benchmark.py", "-m research.benchmark")
        return f"{self.date}, {self.environment}: [{self.file}](../results/{self.file}), `{command}`"


@dataclasses.dataclass(frozen=True, slots=True)
class _Measured:
    """The contents of all tables."""

    timings: list[tuple[Timing, _Source]]
    points: list[tuple[GrowthPoint, _Source]]
    shares: list[tuple[Share, _Source]]


def _load(results: Path) -> _Measured:
    measured = _Measured([], [], [])
    for path in sorted(results.glob("benchmark_*.csv")):
        names = columns(path)
        if "axis" in names:
            points, about = read_growth(path)
            measured.points.extend((point, _Source(path.name, **about)) for point in points)
        elif "group" in names:
            shares, about = read_profile(path)
            measured.shares.extend((share, _Source(path.name, **about)) for share in shares)
        else:
            timings, about = read_timings(path)
            measured.timings.extend((timing, _Source(path.name, **about)) for timing in timings)
    return measured


def _sources(sources: Iterable[_Source]) -> str:
    return "\n".join(f"- {source.line()}" for source in dict.fromkeys(sources))


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(ratio: float, lower: float | None, upper: float | None) -> str:
    return f"{ratio:.2f}" if lower is None or upper is None else f"{ratio:.2f} ({lower:.2f} to {upper:.2f})"


def _target_row(target: Target, tables: Iterable[Sequence[Timing]]) -> list[str]:
    outcome = next((outcome for timings in tables if (outcome := find(target, timings)) is not None), None)
    what = f"{_HARDWARE[target.device]}: {target.what}"
    if outcome is None:
        missing = "not measured on a GPU" if target.device == "cuda" else "not measured"
        return [what, f"{target.ratio:.2f}", missing, *[""] * 6]
    base, ubn = outcome.base, outcome.ubn
    # Compare the printed value, so that a printed 1.35 does not miss a target of 1.35.
    met = "yes" if round(outcome.ratio, 2) <= target.ratio else "**no**"
    cells = [what, f"{target.ratio:.2f}", _spread(outcome.ratio, *(outcome.spread or (None, None))), met]
    if target.memory:
        return [*cells, f"{base.memory:.0f} → {ubn.memory:.0f} MB", *[""] * 4]
    extra = ubn.median - base.median
    limit = ubn.limit
    if limit is not None and target.mode == "fused" and not target.fused_base:
        # Converts a ratio to the fused baseline into one to the unfused baseline.
        limit *= ubn.median / ubn.ratio / base.median
    return [
        *cells,
        f"{_ms(base.median)} → {_ms(ubn.median)}",
        _ms(extra),
        _ms(ubn.floor),
        _ms(ubn.convolution),
        "" if limit is None else f"{limit:.2f}",
    ]


def _targets(measured: _Measured) -> list[str]:
    tables = _by_source(measured.timings).values()
    head = ["", "target", "measured", "met", "BatchNorm → UBN (ms)", "more by (ms)", "floor of the norms (ms)"]
    rows = [_target_row(target, tables) for target in TARGETS]
    head += ["their depthwise convolutions alone (ms)", "limit of plain torch"]
    text = ["## Targets\n", _FLOORS, _grid(head, rows) + "\n"]
    if not any(timing.device == "cuda" for timing, _ in measured.timings):
        text.append("No GPU was available for measurements, so no GPU figure is claimed.\n")
    return text


def _model_rows(timings: Iterable[Timing]) -> Iterable[list[str]]:
    for timing in timings:
        setting = "" if timing.dtype == "float32" else f", {timing.dtype}"
        setting += "" if timing.channels_last else ", contiguous"
        yield [
            timing.model.replace(" (fused)", " fused"),
            f"{_MODES[timing.mode]}{setting}",
            str(timing.batch_size),
            f"{_ms(timing.median)} ({_ms(timing.lower)} to {_ms(timing.upper)})",
            "1"
            if timing.kind == "bn" and timing.ratio == 1
            else _spread(timing.ratio, timing.ratio_lower, timing.ratio_upper),
            "" if timing.memory is None else f"{timing.memory:.0f}",
            "" if timing.memory_ratio is None else f"{timing.memory_ratio:.2f}",
        ]


def _devices(found: Sequence[tuple[Timing, _Source]]) -> Iterable[tuple[str, list[Timing]]]:
    """Timings by device, each with a heading if there are several."""
    devices = list(dict.fromkeys(timing.device for timing, _ in found))
    for device in devices:
        heading = f"### {_HARDWARE[device]}\n" if len(devices) > 1 else ""
        yield heading, [timing for timing, _ in found if timing.device == device]


def _picture(timings: Sequence[Timing]) -> str:
    """File name of the plot of one device's timings."""
    what = "layers" if timings[0].mode.startswith("layer") else "models"
    return f"speed_{what}{'' if timings[0].device == 'cpu' else '_gpu'}.png"


def _drawable(timings: Sequence[Timing]) -> bool:
    return any(timing.kind in KINDS and timing.ratio != 1 for timing in timings)


def _models(measured: _Measured) -> list[str]:
    found = [(timing, source) for timing, source in measured.timings if timing.mode in _MODES]
    text = ["## Models\n"]
    if not found:
        return [*text, "Not measured.\n"]
    head = ["", "what", "batch", "step (ms, quartiles)", "ratio", "memory (MB)", "ratio"]
    text.append(
        "Ratios of fused models are to the BatchNorm model fused as well. `_rbn` and `_bnet` are settings of the\n"
        "same layer, with the parts of RBN or BNET alone; `_naive` computes the equations of `functional` one\n"
        "operation at a time. Memory is the peak memory of tensors: parameters, gradients and features, without the\n"
        "optimizer.\n"
    )
    order = list(_MODES)
    for heading, timings in _devices(found):
        timings.sort(key=lambda timing: (order.index(timing.mode), timing.batch_size))
        text += [heading, _grid(head, _model_rows(timings)) + "\n"]
        if _drawable(timings):
            text.append(f"![Step times of models over BatchNorm's]({_picture(timings)})\n")
    return [*text, _sources(source for _, source in found) + "\n"]


def _layers(measured: _Measured) -> list[str]:
    found = [(timing, source) for timing, source in measured.timings if timing.mode.startswith("layer")]
    text = ["## Layers\n"]
    if not found:
        return [*text, "Not measured.\n"]
    text.append(
        'Ratios are to BatchNorm2d. "Over the floor" is the layer\'s time divided by its floor, "over the\n'
        'convolution" the time of a UBN layer divided by that of its depthwise convolution alone. "Freed memory\n'
        'kept" below a table means that the C library kept freed memory between steps; new pages would cost more\n'
        "than the arithmetic.\n"
    )
    for heading, timings in _devices(found):
        text.append(heading)
        groups: dict[tuple[str, bool, str, int], list[Timing]] = {}
        for timing in timings:
            key = (timing.mode, timing.channels_last, timing.dtype, timing.batch_size)
            groups.setdefault(key, []).append(timing)
        for (mode, channels_last, dtype, batch_size), group in groups.items():
            what = "Forward and backward" if mode == "layer" else "Inference"
            layout = "channels_last" if channels_last else "contiguous"
            text += [f"{what}, {layout}, {dtype}, batch {batch_size}:\n", _layer_table(group)]
        if _drawable(timings):
            text.append(f"![Times of layers over BatchNorm's]({_picture(timings)})\n")
    return [*text, _sources(source for _, source in found) + "\n"]


def _layer_table(timings: Sequence[Timing]) -> str:
    """A row for each shape, a column for each kind of layer."""
    shapes: dict[str, dict[str, Timing]] = {}
    for timing in timings:
        if timing.kind in KINDS:
            suffix = " (compiled)"
            compiled = timing.model.endswith(suffix)
            shape = timing.model.removesuffix(suffix).rpartition(" ")[2]
            column = KINDS[timing.kind] + suffix * compiled
            shapes.setdefault(shape, {})[column] = timing
    base, ubn = KINDS["bn"], KINDS["ubn"]
    others = list(dict.fromkeys(column for row in shapes.values() for column in row if column != base))
    head = ["channels x pixels", f"{base} (ms)", *others, f"{base} over the floor", f"{ubn} over the floor"]
    rows = []
    for shape, row in shapes.items():
        cells = [shape, _ms(row[base].median)]
        cells += [f"{row[column].ratio:.2f}" if column in row else "" for column in others]
        twin = row.get(ubn)
        alone = twin.median / twin.convolution if twin and twin.convolution else None
        rows.append([*cells, _over(row[base].floor_ratio), _over(twin.floor_ratio if twin else None), _over(alone)])
    return _grid([*head, f"{ubn} over the convolution"], rows) + "\n"


def _over(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}"


def _by_source(found: Iterable[tuple[_Item, _Source]]) -> dict[_Source, list[_Item]]:
    groups: dict[_Source, list[_Item]] = {}
    for item, source in found:
        groups.setdefault(source, []).append(item)
    return groups


def _growth_picture(source: _Source) -> str:
    return source.file.replace("benchmark_", "speed_").replace(".csv", ".png")


def _growth(measured: _Measured) -> list[str]:
    text = ["## How cost grows\n"]
    if not measured.points:
        return [*text, "Not measured.\n"]
    text.append(
        "The time of one layer's training step while one size varies. Lines are fitted by least squares of relative\n"
        "errors: time = fixed + slope * size, where size is the number of elements of the input, or the number of\n"
        "ranks. R² is the share of the variance that the line explains; the exponent is that of the power law time ~\n"
        "size^exponent. A negative fixed part means that small inputs stay in the cache and large ones do not.\n"
    )
    for source, points in _by_source(measured.points).items():
        head = ["varied", "layer", "fixed (ms)", "slope", "R²", "exponent"]
        text += [_grid(head, map(_fit_row, fit(points))) + "\n", f"![Time of a layer]({_growth_picture(source)})\n"]
        ranks = [point for point in points if point.axis == "ranks"]
        if ranks:
            text += [_RANKS, _grid(_RANKS_HEAD, map(_rank_row, ranks)) + "\n"]
        text.append(_sources([source]) + "\n")
    return text


def _fit_row(found: Fit) -> list[str]:
    unit = "ms per rank" if found.axis == "ranks" else "ns per element"
    numbers = f"{found.fixed:.3g}", f"{found.slope:.3g} {unit}", f"{found.r_squared:.3f}", f"{found.exponent:.2f}"
    return [found.axis, found.layer, *numbers]


def _rank_row(point: GrowthPoint) -> list[str]:
    numbers = _ms(point.median), str(point.collectives), f"{point.collective_bytes:,}"
    return [str(point.ranks), point.layer, *numbers]


def _profile(measured: _Measured) -> list[str]:
    text = ["## Where the time of a training step goes\n"]
    if not measured.shares:
        return [*text, "Not measured.\n"]
    text.append(
        "Milliseconds of a step, and the share of the step. Measured by torch's profiler, which slows small\n"
        "operations down.\n"
    )
    for source, shares in _by_source(measured.shares).items():
        models: dict[str, dict[str, Share]] = {}
        for share in shares:
            models.setdefault(share.model, {})[share.group] = share
        rows = [[label, *(_share(own.get(group)) for own in models.values())] for group, label in GROUPS.items()]
        rows.append(["all", *(_ms(sum(share.time for share in own.values())) for own in models.values())])
        text += [_grid(["", *models], rows) + "\n", _sources([source]) + "\n"]
    return text


def _share(share: Share | None) -> str:
    return "" if share is None else f"{_ms(share.time)} ({100 * share.share:.0f} %)"


def page(results: str | Path) -> str:
    """The page, in Markdown.

    Args:
        results: Folder of the tables ``benchmark_*.csv``; the page says "not measured" if a table is missing.
    """
    measured = _load(Path(results))
    sections = (_targets, _models, _layers, _profile, _growth)
    return "\n".join([_INTRODUCTION, *(part for section in sections for part in section(measured) if part)])


def _first_of_each(timings: Iterable[Timing]) -> list[Timing]:
    """Keep the first timing of each kind, which targets use; points of several tables would overlap."""
    first: dict[tuple[object, ...], Timing] = {}
    for timing in timings:
        first.setdefault((timing.model, timing.mode, timing.batch_size, timing.dtype, timing.channels_last), timing)
    return list(first.values())


def report(results: str | Path, docs: str | Path) -> tuple[Path, ...]:
    """Write the page and its plots.

    Args:
        results: Folder of the tables.
        docs: Folder that gets ``speed.md`` and the plots ``speed_*.png``.

    Returns:
        The paths of the written files.

    Raises:
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    measured, folder = _load(Path(results)), Path(docs)
    written = [folder / "speed.md"]
    written[0].write_text(page(results), encoding="utf-8")
    for title, layers in (("Models", False), ("Layers of ResNet-50's shapes", True)):
        mine = [(timing, source) for timing, source in measured.timings if timing.mode.startswith("layer") == layers]
        for _, timings in _devices(mine):
            if _drawable(timings):
                written.append(folder / _picture(timings))
                draw_ratios(
                    _first_of_each(timings),
                    written[-1],
                    f"{title} on a {_HARDWARE[timings[0].device]}: median and quartiles",
                )
    for source, points in _by_source(measured.points).items():
        written.append(folder / _growth_picture(source))
        draw_growth(points, written[-1], "Time of a layer: points, and fitted lines")
    return tuple(written)
