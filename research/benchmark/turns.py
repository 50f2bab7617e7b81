"""Alternating steps: each step runs once per turn, and a ratio compares two times of the same turn.

The first two turns warm up, which includes compilation, and are not timed.
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
    "Contender",
    "Timing",
    "as_naive",
    "environment",
    "keep_memory",
    "milliseconds",
    "peak_memory",
    "take_turns",
]

# Settings of `UnifiedBatchNorm2d` for each kind of norm layer; the baseline is torch's BatchNorm.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: dict(variant.settings) for name, variant in VARIANTS.items() if not variant.plain},
    "naive": {},
}
# Titles by kind, the baseline first.
KINDS = {"bn": VARIANTS["bn"].title, **{kind: VARIANTS[kind].title for kind in SETTINGS if kind in VARIANTS}}
KINDS["naive"] = "UBN naive"
_WARM_UP = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """One of the steps that alternate.

    Attributes:
        name: Name of the model or layer.
        kind: One of :data:`KINDS`, or "copy" or "convolution" for the references that layers are compared with.
        module: The module whose parameters are counted.
        step: The function that is timed.
        clear: Frees memory left by an earlier step, such as gradients.
        held: Bytes in use before a step: parameters, buffers, inputs.
        repeats: How often a step repeats its work; its time is divided by that.
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
        model: Name, with " (fused)", " (compiled)" or " (fused, compiled)" appended where that applies.
        kind: Kind of its norm, one of :data:`KINDS`; "copy" or "convolution" for the references of layers.
        mode: One of :data:`MODES`, or "layer" (forward, backward of one layer) or "layer-eval" (its forward).
        batch_size: Images per step.
        img_size: Pixels per side of the input.
        device: "cpu", "cuda".
        dtype: Dtype of the features; "amp bfloat16", "amp float16" under autocast.
        channels_last: Memory format.
        param_count: Number of parameters; of a fused model, of the values that it stores.
        median: Median of the timed steps.
        lower: First quartile.
        upper: Third quartile.
        minimum: Shortest step.
        maximum: Longest step.
        ratio: Median over turns of this entry's time over the first entry's in the same turn.
        ratio_lower: First quartile of that; None in older tables.
        ratio_upper: Third quartile of that; None in older tables.
        memory: Peak memory of tensors during a step, in MB (2**20 bytes), including parameters, buffers and inputs, but
            not the optimizer or what libraries allocate by themselves.
        memory_ratio: `memory` over the first entry's.
        floor: Milliseconds that the least traffic of the norm layers takes at the bandwidth of a copy in the same run:
            of this layer, or of all norm layers of a model. None if not measured.
        convolution: Milliseconds of the norm layers' depthwise convolutions alone, forward and in training backward:
            the minimum for an implementation in plain torch. None if not measured.
        limit: The `ratio` if UBN's norms took BatchNorm's time and that of these convolutions and nothing more: the
            first entry's time plus the convolutions, over its time. None if not measured.
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
        """A layer's time over its floor; None for models, whose floor covers only their norms."""
        return self.median / self.floor if self.floor and self.mode.startswith("layer") else None


def keep_memory() -> bool:
    """Make the C library keep freed memory for the rest of the process; return whether it does (glibc only).

    Otherwise, the time of a single large layer is dominated by fresh pages from the system, which cost more than its
    arithmetic and count toward whichever layer allocates them. A model's steps reuse the memory of the previous step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def environment(device: torch.device) -> str:
    """Describe the hardware and the versions in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = (
            f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        )
    return f"{hardware}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a step, with GPU synchronization."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that a step's tensors add to those that exist before it.

    On a GPU, torch's own count; on a CPU, from the allocations that torch's profiler records. Profiling slows the step
    down, so do not time it. Memory that libraries allocate outside torch, such as oneDNN's scratch memory, is missing.

    Args:
        step: Runs once. It should free nothing that exists before it.
        device: Device of its tensors.
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
    """Total bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, method="inclusive")
    return lower, median, upper


def take_turns(entries: Sequence[Contender], steps: int, device: torch.device, **about: Any) -> list[Timing]:
    """Time each entry once per turn, then measure the memory of one more step of each.

    Args:
        entries: The baseline first.
        steps: Timed turns.
        device: Device that they run on.
        **about: The other fields of each :class:`Timing`.

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
    """A step of a layer: forward and backward, or without `grad` the forward pass in evaluation.

    Args:
        layer: Put into training or evaluation mode.
        features: The input; requires gradients in training.
        grad: Gradient of the output; None for evaluation.
    """
    layer.train(grad is not None)
    if grad is None:
        return torch.inference_mode()(lambda: layer(features))

    def step() -> None:
        clear_layer(layer, features)
        layer(features).backward(grad)

    return step


def clear_layer(layer: nn.Module, features: Tensor) -> None:
    """Free the gradients that a step of a layer left."""
    features.grad = None
    layer.zero_grad(set_to_none=True)


def check_steps(steps: int) -> None:
    """Check that at least one step is timed."""
    if steps < 1:
        raise ValueError(f"steps: received {steps}; valid: 1 and more")


def check_kinds(kinds: Sequence[str]) -> None:
    """Check the kinds of norm layers beside BatchNorm, which is always included."""
    if not set(kinds) <= set(SETTINGS):
        raise ValueError(f"settings: received {list(kinds)}; valid: {', '.join(SETTINGS)}, each beside BatchNorm")


def as_naive(module: nn.Module) -> nn.Module:
    """Make UBN layers run the plain equations of :mod:`ubn_zoo.layers.functional`, differentiated by autograd."""
    for layer in module.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            layer._equations_only = True
    return module
