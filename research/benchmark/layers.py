"""Times of single layers next to a copy of their input and a depthwise convolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ubn_zoo.evaluation.speed import as_if_trained
from ubn_zoo.layers import UnifiedBatchNorm2d

from .floors import WITH_CONVOLUTION, convolution_step, copy_step, traffic
from .turns import (
    KINDS,
    SETTINGS,
    Contender,
    Timing,
    as_naive,
    bytes_of,
    check_steps,
    clear_layer,
    layer_step,
    take_turns,
)

__all__ = ["LAYER_MODES", "LAYER_SHAPES", "compare_layers", "make_layer"]

LAYER_MODES = ("layer", "layer-eval")

# (channels, pixels per side) of the norms of ResNet-50 at 224 pixels, each once.
LAYER_SHAPES = (
    (64, 112),
    (64, 56),
    (128, 56),
    (256, 56),
    (128, 28),
    (256, 28),
    (512, 28),
    (256, 14),
    (512, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
)


def make_layer(kind: str, channels: int) -> nn.Module:
    """Build a norm layer of one of :data:`KINDS`."""
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    layer = as_if_trained(UnifiedBatchNorm2d(channels, **SETTINGS[kind]))
    return as_naive(layer) if kind == "naive" else layer


def compare_layers(
    shapes: Sequence[tuple[int, int]] = LAYER_SHAPES,
    *,
    modes: Sequence[str] = ("layer",),
    kinds: Sequence[str] = tuple(KINDS),
    batch_size: int = 8,
    steps: int = 10,
    device: str = "cpu",
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Iterator[Timing]:
    """Time norm layers, shape by shape, next to a copy and a depthwise convolution of the same features.

    Args:
        shapes: Channels and pixels per side; by default those of ResNet-50.
        modes: Any of "layer" (a training step: forward, backward) and "layer-eval" (forward in evaluation).
        kinds: Any of :data:`KINDS`, the baseline first.
        batch_size: Images per step.
        steps: Timed turns.
        device: Device to run on.
        channels_last: Memory format.
        dtype: Dtype of the features; parameters stay in float32, as under autocast.
        compiled: Whether to time layers compiled by torch.compile as well.

    Yields:
        A :class:`Timing` for every mode, shape and layer, named like "UBN 256x56x56", then of the kinds "convolution"
        and "copy".

    Raises:
        ValueError: An unknown mode or kind, or no steps.
    """
    if not set(modes) <= set(LAYER_MODES):
        raise ValueError(f"modes: received {list(modes)}; valid: {', '.join(LAYER_MODES)}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: received {list(kinds)}; valid: {', '.join(KINDS)}, one at least")
    check_steps(steps)
    where = torch.device(device)
    for mode in modes:
        for channels, side in shapes:
            if compiled:
                torch.compiler.reset()
            torch.manual_seed(0)
            shape = (batch_size, channels, side, side)
            entries = _entries(shape, kinds, mode, where, channels_last, dtype, compiled)
            about: dict[str, Any] = {"mode": mode, "batch_size": batch_size, "img_size": side}
            about |= {"dtype": str(dtype).removeprefix("torch."), "channels_last": channels_last}
            timings = take_turns(entries, steps, where, **about)
            yield from _with_floors(timings)


def _entries(
    shape: tuple[int, int, int, int],
    kinds: Sequence[str],
    mode: str,
    device: torch.device,
    channels_last: bool,
    dtype: torch.dtype,
    compiled: bool,
) -> list[Contender]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features, grad = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout) for _ in range(2))
    given = grad if mode == "layer" else None
    features.requires_grad_(given is not None)
    about = "x".join(str(size) for size in shape[1:])
    entries = []
    for kind in kinds:
        layer = make_layer(kind, shape[1]).to(device)
        variants: dict[str, Any] = {f"{KINDS[kind]} {about}": layer}
        if compiled and kind != "naive":
            variants[f"{KINDS[kind]} {about} (compiled)"] = torch.compile(layer, fullgraph=True, dynamic=False)
        held = bytes_of(*layer.parameters(), *layer.buffers(), features, *([] if given is None else [given]))
        for name, module in variants.items():

            def clear(layer: nn.Module = layer) -> None:
                clear_layer(layer, features)

            entries.append(Contender(name, kind, module, layer_step(module, features, given), clear, held))
    nothing, held = nn.Module(), bytes_of(features, grad)
    convolution, (copy, copies) = convolution_step(features, given), copy_step(features)
    entries.append(
        Contender(f"depthwise convolution {about}", "convolution", nothing, convolution, nothing.zero_grad, held)
    )
    entries.append(Contender(f"copy {about}", "copy", nothing, copy, nothing.zero_grad, held, copies))
    return entries


def _with_floors(timings: Sequence[Timing]) -> Iterator[Timing]:
    base, convolution, copy = timings[0], timings[-2], timings[-1]
    for timing in timings[:-2]:
        floor = copy.median * traffic(timing.kind, timing.mode) / 2
        if timing.kind in WITH_CONVOLUTION:
            limit = (base.median + convolution.median) / base.median
            yield dataclasses.replace(timing, floor=floor, convolution=convolution.median, limit=limit)
        else:
            yield dataclasses.replace(timing, floor=floor)
    yield convolution
    yield copy
