"""Steps that take turns: all of them once per turn, and a ratio is that of two times of the same turn.

Two turns warm up and are not counted; whatever is compiled is compiled in them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ubn_zoo.layers import VARIANTS, UnifiedBatchNorm2d

__all__ = [
    "KINDS",
    "Entry",
    "Timing",
    "as_naive",
    "environment",
    "keep_memory",
    "milliseconds",
    "peak_memory",
    "take_turns",
]

# Settings of `UnifiedBatchNorm2d` that make each kind of norm layer; BatchNorm, the baseline, is torch's own.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: dict(variant.settings) for name, variant in VARIANTS.items() if not variant.plain},
    "naive": {},
}
# Titles by kind, the baseline first.
KINDS = {"bn": VARIANTS["bn"].title, **{kind: VARIANTS[kind].title for kind in SETTINGS if kind in VARIANTS}}
KINDS["naive"] = "UBN naive"
_WARM_UP = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What takes turns.

    Attributes:
        name: Of the model or layer.
        kind: One of :data:`KINDS`, or "copy" or "convolution" for what layers are measured against.
        module: Whose parameters count.
        step: What is timed.
        clear: Frees what an earlier step has left, such as gradients.
        held: Bytes that are there before a step: parameters, buffers, inputs.
        repeats: How often a step does the same; its time is divided by that.
    """

    name: str
    kind: str
    module: nn.Module
    step: Callable[[], object]
    clear: Callable[[], object]
    held: int
    repeats: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Step times of a model or layer, in milliseconds, and their ratio to the first entry of the run.

    Attributes:
        model: Name; " (fused)", " (compiled)" or " (fused, compiled)" is appended where it is so.
        kind: Of its norm: one of :data:`KINDS`; "copy" or "convolution" for what layers are measured against.
        mode: One of :data:`MODES`, or "layer" (forward, backward of one layer) or "layer-eval" (its forward).
        batch_size: Images per step.
        img_size: Pixels per side of the input.
        device: "cpu", "cuda".
        dtype: Of the features; "amp bfloat16", "amp float16" under autocast.
        channels_last: Memory format.
        param_count: Parameters, of a fused model the values that it is made of.
        median: Of all counted steps.
        lower: First quartile.
        upper: Third quartile.
        minimum: Least.
        maximum: Most.
        ratio: Median over turns of this entry's time over the first entry's in the same turn.
        ratio_lower: First quartile of that; None in tables of before it was kept.
        ratio_upper: Third quartile of that, likewise.
        memory: Most memory that tensors took at a time in a step, in MB (2**20 bytes): parameters, buffers and inputs
            included, the optimizer and what libraries allocate by themselves not.
        memory_ratio: `memory` over the first entry's.
        floor: Milliseconds that the least traffic of the norm layers takes at the bandwidth of a copy in the same run:
            of this layer, or of all those of a model together. None where it was not measured.
        convolution: Milliseconds of the norm layers' depthwise convolutions alone, forward and in training backward:
            what an implementation in plain torch cannot do without. None where it was not measured.
        limit: The `ratio` if UBN's norms took BatchNorm's time and that of these convolutions and nothing more: the
            first entry's time plus the convolutions, over its time. None where it was not measured.
    """

    model: str
    kind: str
    mode: str
    batch_size: int
    img_size: int
    device: str
    dtype: str
    channels_last: bool
    param_count: int
    median: float
    lower: float
    upper: float
    minimum: float
    maximum: float
    ratio: float
    ratio_lower: float | None
    ratio_upper: float | None
    memory: float | None
    memory_ratio: float | None
    floor: float | None = None
    convolution: float | None = None
    limit: float | None = None

    @property
    def floor_ratio(self) -> float | None:
        """A layer's time over its floor; None for models, whose floor is of their norms only."""
        return self.median / self.floor if self.floor and self.mode.startswith("layer") else None


def keep_memory() -> bool:
    """Tells the C library to keep what is freed, for the rest of the process; returns whether it does (glibc alone).

    A single large layer is otherwise timed by the fresh pages that the system gives and takes: they fall to whichever
    layer comes after one that left a gap, and cost more than its arithmetic. A model's steps find their memory from
    the step before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def environment(device: torch.device) -> str:
    """Hardware and versions that times were measured with, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = (
            f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        )
    return f"{hardware}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a step, on a GPU until it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that a step's tensors take at most, beyond those that were there before it.

    On a GPU by torch's own count, on a CPU by the allocations that torch's profiler sees, which slows the step down:
    do not time it. What libraries allocate past torch, such as oneDNN's scratch memory, is not seen.

    Args:
        step: What is measured, once. It should free nothing that was there before it.
        device: Where its tensors are.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, method="inclusive")
    return lower, median, upper


def take_turns(entries: Sequence[Entry], steps: int, device: torch.device, **about: Any) -> list[Timing]:
    """Times entries in turns, then measures the memory of one more step of each.

    Args:
        entries: The baseline first.
        steps: Counted turns.
        device: Where they compute.
        **about: The rest of each :class:`Timing`.

    Raises:
        ValueError: No steps.
    """
    check_steps(steps)
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for turn in range(_WARM_UP + steps):
        for entry in entries:
            elapsed = milliseconds(entry.step, device) / entry.repeats
            if turn >= _WARM_UP:
                times[entry.name].append(elapsed)
    peaks = {}
    for entry in entries:
        entry.clear()
        peaks[entry.name] = entry.held + peak_memory(entry.step, device)
        entry.clear()
    base = times[entries[0].name]
    timings = []
    for entry in entries:
        lower, median, upper = _quartiles(times[entry.name])
        ratios = [ours / theirs for ours, theirs in zip(times[entry.name], base, strict=True)]
        ratio_lower, ratio, ratio_upper = _quartiles(ratios)
        tensors = entry.module.state_dict().values() if "(fused" in entry.name else entry.module.parameters()
        timings.append(
            Timing(
                model=entry.name,
                kind=entry.kind,
                device=device.type,
                param_count=sum(tensor.numel() for tensor in tensors),
                median=median,
                lower=lower,
                upper=upper,
                minimum=min(times[entry.name]),
                maximum=max(times[entry.name]),
                ratio=ratio,
                ratio_lower=ratio_lower,
                ratio_upper=ratio_upper,
                memory=peaks[entry.name] / 2**20,
                memory_ratio=peaks[entry.name] / peaks[entries[0].name],
                **about,
            )
        )
    return timings


def layer_step(layer: nn.Module, features: Tensor, grad: Tensor | None) -> Callable[[], object]:
    """A step of a layer: forward and backward, or without a gradient to start from forward alone in evaluation.

    Args:
        layer: Put into training or evaluation mode.
        features: Takes gradients in training.
        grad: Of the output.
    """
    layer.train(grad is not None)
    if grad is None:
        return torch.inference_mode()(lambda: layer(features))

    def step() -> None:
        clear_layer(layer, features)
        layer(features).backward(grad)

    return step


def clear_layer(layer: nn.Module, features: Tensor) -> None:
    """Frees the gradients that a step of a layer left."""
    features.grad = None
    layer.zero_grad(set_to_none=True)


def check_steps(steps: int) -> None:
    """Refuses to count no steps."""
    if steps < 1:
        raise ValueError(f"steps: received {steps}; valid: 1 and more")


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuses kinds of norm layers that there are not, and BatchNorm, which is always there."""
    if not set(kinds) <= set(SETTINGS):
        raise ValueError(f"settings: received {list(kinds)}; valid: {', '.join(SETTINGS)}, each beside BatchNorm")


def as_naive(module: nn.Module) -> nn.Module:
    """Lets UBN layers compute as :mod:`ubn_zoo.layers.functional` spells it out, differentiated op by op."""
    for layer in module.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            layer._equations_only = True
    return module
