"""Profiles of training steps by kind of operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from ubn_zoo.evaluation.speed import random_batch, train_step
from ubn_zoo.layers import UnifiedBatchNorm2d

from .models import AMP_DTYPES, build

__all__ = ["GROUPS", "Share", "profile_step"]

GROUPS = {
    "convolution": "convolutions of the model",
    "batchnorm": "BatchNorm",
    "depthwise": "norm: depthwise convolution",
    "elementwise": "norm: elementwise and copies",
    "sums": "norm: sums and statistics",
    "small": "norm: small operations and overhead",
    "other": "everything else",
}
_NORM, _ACTIVATION = "norm", "activation"
_SUMS = {"sum", "mean", "linalg_vector_norm", "batch_norm_update_stats", "var"}
_SIMILARITY = {"mv", "addmv", "dot", "linalg_vector_norm"}  # over features laid out as vectors
_ELEMENTWISE = {
    "add",
    "sub",
    "mul",
    "div",
    "addcmul",
    "copy",
    "fill",
    "sigmoid",
    "clone",
    "where",
    "zero",
    "neg",
    "square",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Time of a kind of operation in a training step.

    Attributes:
        model: Name.
        group: One of :data:`GROUPS`.
        time: Milliseconds per step.
        share: Share of the step, 0 to 1.
    """

    model: str
    group: str
    time: float
    share: float


def profile_step(
    model: str,
    *,
    batch_size: int = 8,
    img_size: int = 224,
    steps: int = 3,
    device: str = "cpu",
    channels_last: bool = True,
    amp: str | None = None,
) -> Iterator[Share]:
    """Profile training steps (forward, backward) of a BatchNorm model and of its UBN twin, in eager mode.

    The profiler slows small operations down, so the true shares of convolutions are a little larger.

    Args:
        model: timm's BatchNorm model.
        batch_size: Random images per step.
        img_size: Pixels per side.
        steps: Profiled steps, after one warm-up step.
        device: Device to run on; on a GPU, times are those of its kernels.
        channels_last: Memory format.
        amp: "bfloat16" or "float16" for autocast, None for float32.

    Yields:
        A :class:`Share` for both models and every group with a nonzero time.
    """
    where = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    classes = int(timm.models.get_pretrained_cfg_value(model, "num_classes") or 1000)
    images, targets = random_batch(batch_size, img_size, classes, where, layout)
    for name, kind in ((model, "bn"), (f"{model}_ubn", "ubn")):
        module = build(model, kind).to(where).to(memory_format=layout)
        _mark(module)
        step = train_step(module, images, targets, None if amp is None else AMP_DTYPES[amp])
        step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            for _ in range(steps):
                step()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
        times = dict.fromkeys(GROUPS, 0.0)
        for event in profile.events():
            if event.device_type != torch.autograd.DeviceType.CPU:
                # The time of a GPU's kernels is already counted by the operations that launched them.
                continue
            own = event.self_device_time_total if where.type == "cuda" else event.self_cpu_time_total
            times[_group(event)] += own / 1000 / steps
        total = sum(times.values())
        yield from (Share(name, group, time, time / total) for group, time in times.items() if time)


def _mark(model: nn.Module) -> None:
    """Mark the operations of norms, and of the activations inside them, for the profiler."""

    def scope(module: nn.Module, name: str) -> None:
        opened: list[Any] = []

        def enter(*_: Any) -> None:
            opened.append(record_function(name))
            opened[-1].__enter__()

        def leave(*_: Any) -> None:
            opened.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    for module in list(model.modules()):
        if isinstance(module, (nn.BatchNorm2d, UnifiedBatchNorm2d)):
            scope(module, _NORM)
            for child in module.children():
                scope(child, _ACTIVATION)


def _in_norm(event: Any) -> bool:
    """Whether an operation belongs to a norm's forward or to its backward."""
    while event is not None:
        if event.name == _ACTIVATION:
            return False
        if event.name == _NORM or "CalibratedAffine" in event.name or "BatchNorm" in event.name:
            return True
        event = event.cpu_parent
    return False


def _group(event: Any) -> str:
    operation = event.name.rpartition("::")[2].rstrip("_").removeprefix("_")
    convolution = "conv" in operation.lower()
    if not _in_norm(event):
        return "convolution" if convolution else "other"
    if convolution:
        return "depthwise"
    if "batch_norm" in operation and operation not in _SUMS:
        return "batchnorm"
    if operation in _SIMILARITY:
        return "sums"
    # All operations on tensors without pixels count as small.
    if any(isinstance(shape, list) and len(shape) == 4 and shape[-1] > 1 for shape in event.input_shapes or ()):
        if operation in _SUMS:
            return "sums"
        if operation in _ELEMENTWISE:
            return "elementwise"
    return "small"
