"""The page ``docs/speed.md``, made of the tables under ``results/``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from .growth import GrowthPoint, fit
from .pictures import draw_growth, draw_ratios
from .profiles import GROUPS, Share
from .tables import columns, read_growth, read_profile, read_timings
from .targets import TARGETS, Target, find
from .turns import KINDS, Timing

__all__ = ["page", "report"]

_INTRODUCTION = """\
# Speed and memory

<!-- Written by `python scripts/benchmark.py --report` from results/benchmark_*.csv; edit ubn_zoo/benchmark instead. -->

Times are medians of steps that took turns with BatchNorm's in one run, and a ratio is the median, with its quartiles,
of the ratios to BatchNorm within a turn. A training step is forward, loss and backward, without the optimiser. Images
and weights are random: no time depends on them.
"""

_FLOORS = """\
A *floor* is the least time for the bytes that have to move, at the bandwidth of a copy of the same size in the same
run. BatchNorm and UBN in training both have to move 8 times the layer's input: forward reads it twice and writes it
once, backward reads input and gradient twice each and writes once. In inference BatchNorm and BNET move it twice, UBN
and RBN three times, and a fused BatchNorm is gone altogether. So by its bytes UBN in training need not take longer than
BatchNorm. What stands in its way in plain torch is the depthwise convolution, an operation of its own: its time
*alone*, in training with its backward, is beside the floor. The *limit* of plain torch is the ratio if those
convolutions were all that UBN's norms took: BatchNorm's time without its norms, plus the convolutions, over its time.
"""

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
        return f"{self.date}, {self.environment}: [{self.file}](../results/{self.file}), `{self.command}`"


@dataclasses.dataclass(frozen=True, slots=True)
class _Measured:
    """All that the tables hold."""

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


# Sections


def _target_row(target: Target, timings: Sequence[Timing]) -> list[str]:
    outcome = find(target, timings)
    hardware = "GPU" if target.device == "cuda" else "CPU"
    what = f"{hardware}: {target.what}"
    if outcome is None:
        missing = "not measured on a GPU" if target.device == "cuda" else "not measured"
        return [what, f"{target.ratio:.2f}", missing, *[""] * 6]
    base, ubn = outcome.base, outcome.ubn
    # As it is printed: a reader should not see 1.35 miss 1.35.
    met = "yes" if round(outcome.ratio, 2) <= target.ratio else "**no**"
    cells = [what, f"{target.ratio:.2f}", _spread(outcome.ratio, *(outcome.spread or (None, None))), met]
    if target.memory:
        return [*cells, f"{base.memory:.0f} → {ubn.memory:.0f} MB", *[""] * 4]
    extra = ubn.median - base.median
    return [
        *cells,
        f"{_ms(base.median)} → {_ms(ubn.median)}",
        _ms(extra),
        _ms(ubn.floor),
        _ms(ubn.convolution),
        "" if ubn.limit is None else f"{ubn.limit:.2f}",
    ]


def _targets(measured: _Measured) -> list[str]:
    timings = [timing for timing, _ in measured.timings]
    head = ["", "target", "measured", "met", "BatchNorm → UBN (ms)", "more by (ms)", "floor of the norms (ms)"]
    rows = [_target_row(target, timings) for target in TARGETS]
    head += ["their depthwise convolutions alone (ms)", "limit of plain torch"]
    text = ["## Targets\n", _FLOORS, _grid(head, rows) + "\n"]
    if not any(timing.device == "cuda" for timing in timings):
        text.append("No GPU was there to measure on: no figure of one is claimed.\n")
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
            "1" if timing.ratio == 1 else _spread(timing.ratio, timing.ratio_lower, timing.ratio_upper),
            "" if timing.memory is None else f"{timing.memory:.0f}",
            "" if timing.memory_ratio is None else f"{timing.memory_ratio:.2f}",
        ]


def _models(measured: _Measured) -> list[str]:
    found = [(timing, source) for timing, source in measured.timings if timing.mode in _MODES]
    text = ["## Models\n"]
    if not found:
        return [*text, "Not measured.\n"]
    head = ["", "what", "batch", "step (ms, quartiles)", "ratio", "memory (MB)", "ratio"]
    text.append(
        "Fused models are measured against the BatchNorm model fused as well. `_rbn`, `_bnet` and `_naive` are\n"
        "settings of the same layer: RBN's and BNET's parts alone, and the equations of `functional` op by op.\n"
        "Memory is the most that tensors take at a time: parameters, gradients and features, not the optimiser.\n"
    )
    order = list(_MODES)
    timings = sorted((timing for timing, _ in found), key=lambda timing: (order.index(timing.mode), timing.batch_size))
    text.append(_grid(head, _model_rows(timings)) + "\n")
    if _drawable(timings):
        text.append("![Step times of models over BatchNorm's](speed_models.png)\n")
    return [*text, _sources(source for _, source in found) + "\n"]


def _drawable(timings: Sequence[Timing]) -> bool:
    return any(timing.kind in KINDS and timing.ratio != 1 for timing in timings)


def _shape(timing: Timing) -> str:
    name = timing.model.replace(" (compiled)", "")
    return name.rpartition(" ")[2]


def _layers(measured: _Measured) -> list[str]:
    found = [(timing, source) for timing, source in measured.timings if timing.mode.startswith("layer")]
    text = ["## Layers\n"]
    if not found:
        return [*text, "Not measured.\n"]
    text.append(
        "Ratios to BatchNorm2d. Over the floor: how many times the least traffic's time a layer takes. Beside the\n"
        "convolution: how many times the time of the depthwise convolution alone a UBN layer takes.\n"
    )
    groups: dict[tuple[str, bool, str, int], dict[str, dict[str, Timing]]] = {}
    for timing, _ in found:
        key = (timing.mode, timing.channels_last, timing.dtype, timing.batch_size)
        suffix = " compiled" if "compiled" in timing.model else ""
        groups.setdefault(key, {}).setdefault(_shape(timing), {})[timing.kind + suffix] = timing
    for (mode, channels_last, dtype, batch_size), shapes in groups.items():
        what = "Forward and backward" if mode == "layer" else "Inference"
        layout = "channels_last" if channels_last else "contiguous"
        text.append(f"{what}, {layout}, {dtype}, batch {batch_size}:\n")
        kinds = [kind for kind in KINDS if kind != "bn"]
        kinds += [f"{kind} compiled" for kind in ("bn", *kinds)]
        kinds = [kind for kind in kinds if any(kind in row for row in shapes.values())]
        head = [
            "channels x pixels",
            "BatchNorm2d (ms)",
            *(KINDS[k.partition(" ")[0]] + k[k.find(" ") :] * (" " in k) for k in kinds),
        ]
        rows = []
        for shape, row in shapes.items():
            ubn = row.get("ubn")
            cells = [f"{row[kind].ratio:.2f}" if kind in row else "" for kind in kinds]
            over = [_over(row["bn"].floor_ratio), _over(ubn.floor_ratio if ubn else None)]
            alone = ubn.median / ubn.convolution if ubn and ubn.convolution else None
            rows.append([shape, _ms(row["bn"].median), *cells, *over, _over(alone)])
        tail = ["BatchNorm2d over the floor", "UBN over the floor", "UBN over the convolution"]
        text.append(_grid([*head, *tail], rows) + "\n")
    if _drawable([timing for timing, _ in found]):
        text.append("![Times of layers over BatchNorm's](speed_layers.png)\n")
    return [*text, _sources(source for _, source in found) + "\n"]


def _over(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}"


def _growth(measured: _Measured) -> list[str]:
    text = ["## How cost grows\n"]
    if not measured.points:
        return [*text, "Not measured.\n"]
    points = [point for point, _ in measured.points]
    text.append(
        "A training step of one layer as one size varies. Lines are fitted by least squares: time = fixed + slope *\n"
        "size, where the size is the input's number of elements, or the number of ranks. R² is the part of the\n"
        "variance that the line explains, the exponent that of the power law time ~ size^exponent. A fixed part below\n"
        "zero means that small inputs stay in the cache and large ones do not.\n"
    )
    head = ["varied", "layer", "fixed (ms)", "slope", "R²", "exponent"]
    rows = []
    for found in fit(points):
        unit = "ms per rank" if found.axis == "ranks" else "ns per element"
        rows.append(
            [
                found.axis,
                found.layer,
                f"{found.fixed:.3g}",
                f"{found.slope:.3g} {unit}",
                f"{found.r_squared:.3f}",
                f"{found.exponent:.2f}",
            ]
        )
    text += [_grid(head, rows) + "\n", "![Time of a layer by size](speed_growth.png)\n"]
    ranks = [point for point in points if point.axis == "ranks"]
    if ranks:
        text.append(
            "Ranks are processes of one machine with a thread and a batch of their own each, joined by gloo; more\n"
            "than there are cores take turns on them. UBN synchronised computes the equations as UBN naive does:\n"
            "sharing costs the difference between these two. torch's SyncBatchNorm computes on GPUs only.\n"
        )
        head = ["ranks", "layer", "step (ms)", "all-reduces", "bytes given to them by a rank"]
        text.append(
            _grid(
                head,
                ([str(p.ranks), p.layer, _ms(p.median), str(p.collectives), f"{p.collective_bytes:,}"] for p in ranks),
            )
            + "\n"
        )
    return [*text, _sources(source for _, source in measured.points) + "\n"]


def _profile(measured: _Measured) -> list[str]:
    text = ["## Where the time of a training step goes\n"]
    if not measured.shares:
        return [*text, "Not measured.\n"]
    text.append(
        "Milliseconds of a step by torch's profiler, which slows small operations down, and their share of the step.\n"
    )
    found: dict[str, dict[str, Share]] = {}
    for share, _ in measured.shares:
        found.setdefault(share.model, {})[share.group] = share
    rows = [
        [
            label,
            *(
                f"{_ms(own[group].time)} ({100 * own[group].share:.0f} %)" if group in own else ""
                for own in found.values()
            ),
        ]
        for group, label in GROUPS.items()
    ]
    rows.append(["all", *(_ms(sum(share.time for share in own.values())) for own in found.values())])
    return [*text, _grid(["", *found], rows) + "\n", _sources(source for _, source in measured.shares) + "\n"]


def page(results: str | Path) -> str:
    """The page, in Markdown.

    Args:
        results: Folder of the tables ``benchmark_*.csv``; whatever has no table is said to be not measured.
    """
    measured = _load(Path(results))
    sections = (_targets, _models, _layers, _profile, _growth)
    return "\n".join([_INTRODUCTION, *(part for section in sections for part in section(measured))])


def report(results: str | Path, docs: str | Path) -> tuple[Path, ...]:
    """Writes the page and its pictures.

    Args:
        results: Folder of the tables.
        docs: Folder that gets ``speed.md`` and the pictures ``speed_*.png``.

    Returns:
        What was written.

    Raises:
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    measured, folder = _load(Path(results)), Path(docs)
    written = [folder / "speed.md"]
    written[0].write_text(page(results), encoding="utf-8")
    timings = [timing for timing, _ in measured.timings]
    for name, title, layers in (("models", "Models", False), ("layers", "Layers of ResNet-50's shapes", True)):
        mine = [timing for timing in timings if timing.mode.startswith("layer") == layers]
        if _drawable(mine):
            written.append(folder / f"speed_{name}.png")
            draw_ratios(mine, written[-1], f"{title}: median and quartiles of ratios")
    if measured.points:
        written.append(folder / "speed_growth.png")
        draw_growth([point for point, _ in measured.points], written[-1], "Time of a layer: points, and fitted lines")
    return tuple(written)
