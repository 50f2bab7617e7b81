"""The layer's steps as torch operators that launch the Triton kernels, for eager mode and compilers.

The operators are in the namespace ``ubn_zoo`` of ``torch.ops``. Each has a fake implementation, so that graphs can be
traced through it. `calibrated_affine` is differentiable, `finalize` updates the buffers, and `folded_affine` is for
inference.

Triton is imported when the first operator runs. The layer does not use the operators without Triton, on a GPU that
Triton does not support or cannot compile for, or with the environment variable ``UBN_ZOO_TRITON=0``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from .. import autograd, internals
from ..parameters import Parameters, State

__all__ = ["calibrated_affine", "dense", "finalize", "folded_affine", "instance_means", "statistics", "usable"]

# Device types that the kernels support. Tests add "cpu", where Triton's interpreter runs them.
DEVICES = {"cuda"}
KERNEL_SIZES = (1, 3, 5)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Offsets within a sample are 32 bits wide, and the kernels overshoot the end by less than the difference to 2**31.
_LIMIT = 2**31 - 2**22


@functools.cache
def _is_supported(kind: str, index: int | None, dtype: torch.dtype) -> bool:
    if os.environ.get("UBN_ZOO_TRITON", "1") == "0" or importlib.util.find_spec("triton") is None:
        return False
    if kind != "cuda":
        return True
    # Triton supports no earlier devices, and bfloat16 came later. Triton also supports AMD GPUs, on which these kernels
    # are untested.
    least = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= least


@functools.cache
def _can_compile(kind: str, index: int | None) -> bool:
    """Whether Triton can build and launch a kernel on a device; warns if it cannot.

    Triton also needs a C compiler at run time, for the code that launches its kernels.
    """
    try:
        with internals.without_modes():
            input = torch.ones(1, 1, 1, 1, device=kind if index is None else f"{kind}:{index}")
            _start("instance_means", input.device, input)
    except Exception as error:
        warnings.warn(
            f"Triton cannot compile for {kind}, so UBN layers use plain torch operations, which are slower: {error}. "
            "Triton needs a C compiler (gcc or clang, or the environment variable CC); UBN_ZOO_TRITON=0 silences this "
            "warning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@torch.compiler.assume_constant_result
def _is_enabled(kind: str, index: int | None, dtype: torch.dtype) -> bool:
    return kind in DEVICES and dtype in _DTYPES and _is_supported(kind, index, dtype) and _can_compile(kind, index)


def usable(input: Tensor, kernel_size: int) -> bool:
    """Whether the kernels can compute an input.

    Exported, traced and scripted programs must run without this package, and the kernels have no rules for the
    transforms of ``torch.func``: check :func:`ubn_zoo.layers.internals.is_capturing` first.

    Args:
        input: (N, C, H, W).
        kernel_size: Taps per side of the depthwise affine.
    """
    return (
        _is_enabled(input.device.type, input.device.index, input.dtype)
        and kernel_size in KERNEL_SIZES
        and input.numel() > 0
        and input.shape[1] * input.shape[2] * input.shape[3] < _LIMIT
    )


def _memory_format(input: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor, or the one nearest to a tensor's strides."""
    if input.is_contiguous():
        return torch.contiguous_format
    if input.is_contiguous(memory_format=torch.channels_last) or input.stride(1) < min(input.stride()[2:]):
        return torch.channels_last
    return torch.contiguous_format


def dense(input: Tensor) -> Tensor:
    """Makes a tensor dense, with channels first or last; returns a dense tensor itself."""
    return input.contiguous(memory_format=_memory_format(input))


def _contiguous(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _absent(input: Tensor) -> Tensor:
    """A placeholder for a missing result, because operators always return tensors."""
    return input.new_empty(0, dtype=_statistics_dtype(input))


# Launchers by the module that has them.
_LAUNCHERS = {
    "instance_means": "statistics",
    "statistics": "statistics",
    "finalize": "statistics",
    "affine": "forward",
    "affine_backward": "backward",
    "folded_affine": "inference",
}


def _is_triton_failure(error: Exception) -> bool:
    # Without a working C compiler Triton raises built-in exceptions.
    return (
        type(error).__module__.startswith("triton")
        or isinstance(error, subprocess.CalledProcessError)
        or "C compiler" in str(error)
    )


def _start(name: str, device: torch.device, *arguments: Any) -> Any:
    """Calls a launcher with the tensors' device as the current device, which Triton uses."""
    launcher = getattr(importlib.import_module(f"{__package__}.{_LAUNCHERS[name]}"), name)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        return launcher(*arguments)


def _launch(name: str, device: torch.device, *arguments: Any) -> Any:
    try:
        return _start(name, device, *arguments)
    except Exception as error:
        if not _is_triton_failure(error):
            raise
        raise RuntimeError(
            f"Triton could not build or start the layer's kernels ({name}) for {device}: {error}. "
            "Set the environment variable UBN_ZOO_TRITON=0 to compute the layer without them."
        ) from error


_library = torch.library.Library("ubn_zoo", "DEF")
_PARAMETERS = ", ".join(f"Tensor? {name}" for name in Parameters._fields)
_AFFINE = f"Tensor input, {_PARAMETERS}, Tensor instance_mean, Tensor mean, Tensor var, Tensor? gate, float eps"


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as an operator's implementation, on GPUs and on CPUs under Triton's interpreter."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CUDA", "CPU"):
            _library.impl(name, function, key)
        return function

    return register


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"ubn_zoo::{name}", lib=_library)


@_operator("instance_means(Tensor input) -> Tensor")
def _instance_means(input: Tensor) -> Tensor:
    return cast(Tensor, _launch("instance_means", input.device, dense(input)))


@_fake("instance_means")
def _(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[:2], dtype=_statistics_dtype(input))


@_operator(
    "statistics(Tensor input, Tensor? center_weight, int samples) "
    "-> (Tensor instance_mean, Tensor mean, Tensor var, Tensor similarity)"
)
def _statistics(input: Tensor, center_weight: Tensor | None, samples: int) -> tuple[Tensor, ...]:
    center = None if center_weight is None else center_weight.contiguous()
    *found, similarity = _launch("statistics", input.device, dense(input), center, samples)
    return *found, _absent(input) if similarity is None else similarity


# The number of partial sums of the similarity, repeated here because `launching` imports Triton.
_SIMILARITY_SLOTS = 512


@_fake("statistics")
def _(input: Tensor, center_weight: Tensor | None, samples: int) -> tuple[Tensor, ...]:
    shapes = (input.shape[:2], input.shape[1:2], input.shape[1:2], (_SIMILARITY_SLOTS if samples else 0,))
    return tuple(input.new_empty(shape, dtype=_statistics_dtype(input)) for shape in shapes)


@_operator(
    "finalize(Tensor mean, Tensor var, Tensor? similarity, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!) running_similarity, Tensor(d!) batches, float? momentum, SymInt count, float similarity_momentum, "
    "float threshold, bool moving) -> (Tensor mean, Tensor var, Tensor gate)"
)
def _finalize(mean: Tensor, var: Tensor, similarity: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    buffers: tuple[Tensor, ...] = arguments[:4]
    *settings, moving = arguments[4:]
    # After loading with `assign=True` buffers may have any strides; the kernel expects contiguous ones.
    moved = [buffer.contiguous() for buffer in buffers]
    batch = _contiguous((mean, var, similarity))
    found = _launch("finalize", mean.device, *batch, *moved, *settings, moving)
    if moving:
        for buffer, values in zip(buffers, moved, strict=True):
            if values is not buffer:
                buffer.copy_(values)
            elif not buffer.is_inference():
                # Marks the buffer as modified, so that autograd detects a backward pass that needs its earlier values.
                torch.autograd.graph.increment_version(buffer)
    return cast("tuple[Tensor, ...]", found)


@_fake("finalize")
def _(mean: Tensor, var: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(mean), torch.empty_like(var), mean.new_empty([], dtype=torch.bool)


@_operator(f"calibrated_affine({_AFFINE}, bool relu) -> Tensor")
def _calibrated_affine(input: Tensor, *arguments: Any) -> Tensor:
    *parameters, instance_mean, mean, var, _, eps, relu = arguments
    vectors = _contiguous((instance_mean, mean, var, *parameters))
    return cast(Tensor, _launch("affine", input.device, dense(input), *vectors, eps, relu))


@_fake("calibrated_affine")
def _(input: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(dense(input))


@_operator(
    f"calibrated_affine_backward(Tensor grad_output, Tensor? activated, {_AFFINE}, bool needs_input, "
    "bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _calibrated_affine_backward(
    grad_output: Tensor, activated: Tensor | None, input: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *parameters, instance_mean, mean, var, gate, eps, needs_input, needs_weight = arguments
    input = dense(input)
    layout = _memory_format(input)
    grad_output = grad_output.contiguous(memory_format=layout)
    if activated is not None:
        activated = activated.contiguous(memory_format=layout)
    instance_mean, mean, var, *parameters = _contiguous((instance_mean, mean, var, *parameters))
    gradients = _launch(
        "affine_backward",
        input.device,
        grad_output,
        activated,
        input,
        instance_mean,
        mean,
        var,
        gate,
        *parameters,
        eps,
        needs_input,
        needs_weight,
    )
    return tuple(_absent(input) if gradient is None else gradient for gradient in gradients)


@_fake("calibrated_affine_backward")
def _(grad_output: Tensor, activated: Tensor | None, input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, _, _, _, needs_input, needs_weight = arguments
    wanted = [dense(input) if needs_input else None, *_contiguous(tuple(parameters))]
    if not needs_weight:
        wanted[1] = None
    return tuple(_absent(input) if tensor is None else torch.empty_like(tensor) for tensor in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps, relu = inputs
    # The ReLU's output shows where gradients pass, and the next layer saves that output anyway.
    ctx.save_for_backward(*tensors, output if relu else None)
    ctx.eps = eps


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *saved, activated = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if torch.is_grad_enabled():
        # With `create_graph=True` the gradient has to be differentiable.
        *tensors, gate = saved
        gate = False if gate is None else gate
        if activated is not None:
            grad_output = grad_output.masked_fill(activated.detach() <= 0, 0)
        gradients = autograd.differentiable_backward(tuple(tensors), gate, ctx.eps, needed[:6], grad_output)
    else:
        found = torch.ops.ubn_zoo.calibrated_affine_backward(
            grad_output, activated, *saved, ctx.eps, needed[0], needed[1]
        )
        gradients = tuple(gradient if wanted else None for gradient, wanted in zip(found, needed[:6], strict=True))
    return (*gradients, None, None, None, None, None, None)


torch.library.register_autograd("ubn_zoo::calibrated_affine", _backward, setup_context=_setup_context, lib=_library)


@_operator(
    "folded_affine(Tensor input, Tensor? instance_mean, Tensor? slope, Tensor? shift, Tensor? center, Tensor? weight, "
    "Tensor? bias, Tensor? factor_slope, Tensor? factor_shift, bool relu) -> Tensor"
)
def _folded_affine(input: Tensor, *arguments: Any) -> Tensor:
    *constants, relu = arguments
    return cast(Tensor, _launch("folded_affine", input.device, dense(input), *_contiguous(tuple(constants)), relu))


@_fake("folded_affine")
def _(input: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(dense(input))


def instance_means(input: Tensor) -> Tensor:
    """Means (N, C) of an input over H and W, without gradient."""
    return cast(Tensor, torch.ops.ubn_zoo.instance_means(input.detach()))


def statistics(
    input: Tensor, center_weight: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Statistics of a batch in one pass over it, without gradient.

    Args:
        input: (N, C, H, W), not empty.
        center_weight: (C,) or None.
        samples: Number of leading samples to compare; None for no similarity.

    Returns:
        Instance means (N, C), mean and biased variance (C,) of the centered features as in
        :func:`functional.batch_statistics`, and partial sums of :func:`functional.feature_similarity`, for
        :func:`finalize`.
    """
    center = None if center_weight is None else center_weight.detach()
    instance_mean, mean, var, similarity = torch.ops.ubn_zoo.statistics(input.detach(), center, samples or 0)
    return instance_mean, mean, var, None if samples is None else similarity


def finalize(
    mean: Tensor,
    var: Tensor,
    similarity: Tensor | None,
    state: State,
    count: int,
    momentum: float | None,
    similarity_momentum: float,
    threshold: float | None,
    moving: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`autograd.finalize` with the same arguments; ``similarity`` is what :func:`statistics` returned."""
    if threshold is None:
        similarity = None
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        torch.ops.ubn_zoo.finalize(
            mean,
            var,
            similarity,
            *state,
            momentum,
            count,
            similarity_momentum,
            0.0 if threshold is None else threshold,
            moving,
        ),
    )


def calibrated_affine(
    input: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | bool,
    parameters: Parameters,
    eps: float,
    relu: bool = False,
) -> Tensor:
    """:func:`autograd.calibrated_affine` with the same arguments, followed by a ReLU if ``relu``."""
    opened = gate if isinstance(gate, Tensor) else None
    if gate is True:
        opened = torch.ones([], dtype=torch.bool, device=input.device)
    return cast(
        Tensor,
        torch.ops.ubn_zoo.calibrated_affine(input, *parameters, instance_mean, mean, var, opened, eps, relu),
    )


def folded_affine(
    input: Tensor,
    slope: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor_slope: Tensor | None,
    factor_shift: Tensor | None,
    relu: bool,
) -> Tensor:
    """The affine of a norm prepared for inference, see :class:`ubn_zoo.layers.fusion.InferenceNorm2d`.

    Args:
        input: (N, C, H, W), not empty. There is no gradient.
        slope: (C,) or None, which has no effect; likewise below.
        shift: (C,) or None.
        center: (C,) or None.
        weight: (C, 1, k, k) or None.
        bias: (C,) or None.
        factor_slope: (C,) or None.
        factor_shift: (C,), goes with ``factor_slope``.
        relu: Whether a ReLU follows.
    """
    instance_mean = None if center is None and factor_slope is None else instance_means(input)
    return cast(
        Tensor,
        torch.ops.ubn_zoo.folded_affine(
            input, instance_mean, slope, shift, center, weight, bias, factor_slope, factor_shift, relu
        ),
    )
