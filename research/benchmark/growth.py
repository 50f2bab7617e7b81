"""How the cost of a layer grows with the batch size, the pixels, the channels, and the ranks that share statistics."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ubn_zoo.layers import convert_sync_ubn

from .layers import compare_layers, make_layer
from .turns import KINDS, check_steps, keep_memory, layer_step, milliseconds

__all__ = ["AXES", "BASE", "RANKS", "SYNCHRONIZED", "Fit", "GrowthPoint", "fit", "grow", "grow_ranks"]

# Default sizes; one varies at a time.
BASE = {"batch": 8, "pixels": 28, "channels": 128}
AXES: dict[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16, 32),
    "pixels": (7, 14, 28, 56, 112),
    "channels": (32, 64, 128, 256, 512),
}
RANKS = (1, 2, 3, 4)
SYNCHRONIZED = "UBN synchronized"
_WARM_UP = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPoint:
    """Time of a layer's training step at one size.

    Attributes:
        axis: What varies: "batch", "pixels" (per side), "channels" or "ranks".
        layer: Name, such as "UBN".
        batch_size: Images, on each rank.
        channels: Channels.
        side: Pixels per side.
        ranks: Processes.
        median: Milliseconds.
        lower: First quartile.
        upper: Third quartile.
        floor: Milliseconds that the least memory traffic takes, see :class:`Timing`; None for ranks.
        collectives: All-reduces per step on each rank.
        collective_bytes: Bytes that a rank contributes to them.
    """

    axis: str
    layer: str
    batch_size: int
    channels: int
    side: int
    ranks: int
    median: float
    lower: float
    upper: float
    floor: float | None = None
    collectives: int = 0
    collective_bytes: int = 0

    @property
    def elements(self) -> int:
        """Elements of the input, on each rank."""
        return self.batch_size * self.channels * self.side**2


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """Least squares over the points of one layer on one axis: time = fixed + slope * size, and time ~ size**exponent.

    The size is the number of elements or of ranks. The fit minimizes the squares of relative errors.

    Attributes:
        axis: What varies.
        layer: Name.
        fixed: Milliseconds at size 0.
        slope: Nanoseconds per element, or milliseconds per rank.
        r_squared: Share of the variance that the line explains; times are weighted by their inverse squares.
        exponent: Exponent of the power law, a line fitted to the logarithms.
    """

    axis: str
    layer: str
    fixed: float
    slope: float
    r_squared: float
    exponent: float

    def time(self, size: float) -> float:
        """Milliseconds predicted by the line."""
        return self.fixed + self.slope * (size if self.axis == "ranks" else size / 1e6)


def size_of(point: GrowthPoint) -> int:
    """The size that a point's time is fitted to: elements, or ranks."""
    return point.ranks if point.axis == "ranks" else point.elements


def fit(points: Sequence[GrowthPoint]) -> list[Fit]:
    """Fit every layer on every axis that has more than one size.

    Args:
        points: Points of any layers and axes.
    """
    groups: dict[tuple[str, str], list[GrowthPoint]] = {}
    for point in points:
        groups.setdefault((point.axis, point.layer), []).append(point)
    fits = []
    for (axis, layer), found in groups.items():
        sizes, times = [float(size_of(point)) for point in found], [point.median for point in found]
        if len(set(sizes)) < 2:
            continue
        fixed, slope, explained = _line(sizes, times)
        power = statistics.linear_regression([math.log(size) for size in sizes], [math.log(time) for time in times])
        fits.append(Fit(axis, layer, fixed, slope if axis == "ranks" else 1e6 * slope, explained, power.slope))
    return fits


def _line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Fixed part and slope by least squares of relative errors, and their R squared.

    With absolute errors the largest times, many times the smallest, would dominate the fit.
    """
    rows = torch.tensor([[1 / time, size / time] for size, time in zip(sizes, times, strict=True)], dtype=torch.float64)
    fixed, slope = torch.linalg.lstsq(rows, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0].tolist()
    weights = [1 / time**2 for time in times]
    mean = sum(map(operator.mul, weights, times)) / sum(weights)
    lines = [fixed + slope * size for size in sizes]
    missed = sum(weight * (line - time) ** 2 for weight, line, time in zip(weights, lines, times, strict=True))
    total = sum(weight * (mean - time) ** 2 for weight, time in zip(weights, times, strict=True))
    return fixed, slope, 1 - missed / total if total else 1.0


def grow(
    axes: Mapping[str, Sequence[int]] = AXES,
    *,
    base: Mapping[str, int] = BASE,
    steps: int = 10,
    device: str = "cpu",
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[GrowthPoint]:
    """Times a training step of every kind of layer, in turns, at sizes that differ in one way at a time.

    Args:
        axes: Sizes to take on each axis: "batch", "pixels" (per side), "channels".
        base: Sizes on the axes that do not vary.
        steps: Counted turns.
        device: Where.
        channels_last: Memory format.
        dtype: Of features.

    Yields:
        A :class:`GrowthPoint` for every size and layer.

    Raises:
        ValueError: An unknown axis, or no steps.
    """
    if not set(axes) <= set(BASE):
        raise ValueError(f"axes: received {list(axes)}; valid: {', '.join(BASE)}")
    for axis, sizes in axes.items():
        for size in sizes:
            at = {**base, axis: size}
            timings = compare_layers(
                [(at["channels"], at["pixels"])],
                batch_size=at["batch"],
                steps=steps,
                device=device,
                channels_last=channels_last,
                dtype=dtype,
            )
            for timing in timings:
                if timing.kind in KINDS:
                    yield GrowthPoint(
                        axis=axis,
                        layer=KINDS[timing.kind],
                        batch_size=at["batch"],
                        channels=at["channels"],
                        side=at["pixels"],
                        ranks=1,
                        median=timing.median,
                        lower=timing.lower,
                        upper=timing.upper,
                        floor=timing.floor,
                    )


def grow_ranks(
    counts: Sequence[int] = RANKS, *, base: Mapping[str, int] = BASE, steps: int = 10, channels_last: bool = True
) -> Iterator[GrowthPoint]:
    """Times a training step of UBN layers on several ranks: processes of this machine, one thread each, joined by gloo.

    Every rank has a separate batch. UBN synchronized shares its statistics, from two ranks on; UBN does not. The
    synchronized layer computes the same equations as UBN naive, so the difference is the cost of sharing. torch's
    SyncBatchNorm supports only GPUs. A turn's time is the slowest rank's.

    Args:
        counts: Numbers of ranks. If there are more ranks than cores, they share the cores.
        base: Images on each rank, pixels per side, and channels.
        steps: Counted turns.
        channels_last: Memory format.

    Yields:
        A :class:`GrowthPoint` for every number of ranks and layer.

    Raises:
        ValueError: No steps, or fewer ranks than one.
    """
    check_steps(steps)
    if min(counts, default=0) < 1:
        raise ValueError(f"counts: received {list(counts)}; valid: one rank at least")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                _time_rank, args=(count, dict(base), steps, channels_last, folder), nprocs=count, join=True
            )
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(count)]
        for layer, first in ranks[0].items():
            slowest = [max(times) for times in zip(*(rank[layer]["times"] for rank in ranks), strict=True)]
            lower, median, upper = (
                statistics.quantiles(slowest, method="inclusive") if len(slowest) > 1 else 3 * slowest
            )
            yield GrowthPoint(
                axis="ranks",
                layer=layer,
                batch_size=base["batch"],
                channels=base["channels"],
                side=base["pixels"],
                ranks=count,
                median=median,
                lower=lower,
                upper=upper,
                collectives=first["collectives"],
                collective_bytes=first["bytes"],
            )


def _time_rank(rank: int, count: int, base: Mapping[str, int], steps: int, channels_last: bool, folder: str) -> None:
    """Measure on one rank: write its times, and the collectives of one more step of each layer."""
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.manual_seed(rank)
    shape = (base["batch"], base["channels"], base["pixels"], base["pixels"])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features, grad = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    features.requires_grad_()
    layers: dict[str, nn.Module] = {KINDS[kind]: make_layer(kind, base["channels"]) for kind in ("ubn", "naive")}
    if count > 1:
        layers[SYNCHRONIZED] = convert_sync_ubn(make_layer("ubn", base["channels"]))
    device = torch.device("cpu")
    measured: dict[str, dict[str, Any]] = {name: {"times": []} for name in layers}
    steps_of = {name: layer_step(layer, features, grad) for name, layer in layers.items()}
    for turn in range(_WARM_UP + steps):
        for name, step in steps_of.items():
            dist.barrier()
            elapsed = milliseconds(step, device)
            if turn >= _WARM_UP:
                measured[name]["times"].append(elapsed)
    for name, step in steps_of.items():
        measured[name]["collectives"], measured[name]["bytes"] = _collectives(step)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured), "utf-8")
    dist.destroy_process_group()


def _collectives(step: Callable[[], object]) -> tuple[int, int]:
    """Number of all-reduces in a step, and the bytes that this rank contributes to them."""
    given = []
    original = dist.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = noting
    try:
        step()
    finally:
        dist.all_reduce = original
    return len(given), sum(given)
