"""The calibrated affine: normalization, calibrations, depthwise affine and an optional ReLU in one kernel."""

# Triton compiles these functions from their source by its own rules: tuples grow in unrolled loops, and parameters have
# the types of the arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment", no-warn-unreachable

from __future__ import annotations

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    calibration_factor,
    folded_normalization,
    layout_strides,
    load_rows,
    load_taps,
    normalization,
    program_tile,
    row_width,
    tap_columns,
    tap_shifts,
)
from .launching import is_channels_last, kernel_size_of, sum_dtype, tap_blocks, tap_settings

__all__ = ["affine", "launch_affine"]


@triton.jit(do_not_specialize=["C", "H", "W", "channel_blocks", "column_blocks", "strips", "strip_rows"])
def _affine_kernel(
    input,
    output,
    instance_mean,  # None if nothing depends on it
    mean,  # None for a norm that was prepared for inference
    var,
    slope,  # (C,) of such a norm, or None
    shift,
    weight,
    bias,
    center_weight,
    scale_weight,  # multiplies the mean of x_hat; for a prepared norm that of the input
    scale_bias,
    C,
    H,
    W,
    channel_blocks,
    column_blocks,
    strips,
    strip_rows,
    RELU: tl.constexpr,
    EPS: tl.constexpr,
    KERNEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    HALF: tl.constexpr = KERNEL // 2
    tile, block, sample = program_tile(column_blocks * strips, channel_blocks, CHANNELS_LAST)
    channels = C // VECTOR * VECTOR
    channel_stride, row_stride, column_stride = layout_strides(channels, H * W, W, CHANNELS_LAST)
    top = tile // column_blocks * strip_rows
    bottom = tl.minimum(top + strip_rows, H)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tile % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)

    # The gain includes the normalization's scale; the slope of a prepared norm multiplies the input instead.
    if mean is not None:
        gain, addend, average = normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS, DTYPE)
        factor_mean = (average + addend) * gain
    else:
        slopes, addend, factor_mean = folded_normalization(
            sample, c, C, instance_mean, slope, shift, center_weight, DTYPE
        )
        gain = tl.full([BLOCK_C], 1.0, DTYPE)
    offset = tl.zeros([BLOCK_C], DTYPE)
    if bias is not None:
        offset = tl.load(bias + c, mask=c < C, other=0.0).to(DTYPE)
    if scale_weight is not None:
        factor = calibration_factor(c, C, factor_mean, scale_weight, scale_bias, DTYPE)
        gain, offset = factor * gain, factor * offset
    taps = load_taps(weight, c, C, KERNEL, False, DTYPE)
    columns = tap_columns(c, w, channels, W, KERNEL)
    shifts = tap_shifts(columns, W, addend, KERNEL)

    base = sample * (channels.to(tl.int64) * H * W)
    offsets = c[:, None] * channel_stride + w[None, :] * column_stride
    source, target = input + base + offsets, output + base + offsets
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    # Output rows that still lack the taps below them, from the top.
    unfinished = ()
    for _ in tl.static_range(KERNEL - 1):
        unfinished = unfinished + (zero,)
    for first in tl.range(tl.maximum(top - HALF, 0), bottom + HALF, ROWS):
        rows = load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
        for t in tl.static_range(ROWS):
            valid = (first + t < H).to(DTYPE)
            sums = unfinished + (zero,)
            for j in tl.static_range(KERNEL):
                value = rows[t * KERNEL + j].to(DTYPE)
                if slope is not None:
                    centered = tl.fma(value, tl.broadcast_to(slopes[:, None], value.shape), shifts[j] * valid)
                else:
                    centered = value + shifts[j] * valid
                added = ()
                for i in tl.static_range(KERNEL):
                    added = added + (sums[i] + taps[(KERNEL - 1 - i) * KERNEL + j] * centered,)
                sums = added
            h = first + t - HALF
            result = sums[0] * gain[:, None] + offset[:, None]
            if RELU:
                result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
            store = columns[HALF] < row_width(W, (h >= top) & (h < bottom))
            tl.store(target + h * row_stride, result.to(output.dtype.element_ty), mask=store)
            unfinished = ()
            for i in tl.static_range(1, KERNEL):
                unfinished = unfinished + (sums[i],)


def affine(
    input: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    center_weight: Optional[Tensor],
    scale_weight: Optional[Tensor],
    scale_bias: Optional[Tensor],
    eps: float,
    relu: bool,
) -> Tensor:
    """:func:`functional.calibrated_affine` of a dense tensor, followed by a ReLU if ``relu``.

    Parameters are contiguous.
    """
    parameters = (weight, bias, center_weight, scale_weight, scale_bias)
    return launch_affine(input, (instance_mean, mean, var, None, None, *parameters), weight, eps, relu)


def launch_affine(
    input: Tensor, constants: Tuple[Optional[Tensor], ...], weight: Optional[Tensor], eps: float, relu: bool
) -> Tensor:
    """Launches the kernel; ``constants`` are its tensor arguments between output and sizes."""
    samples, channels, height, width = input.shape
    last = is_channels_last(input)
    kernel = kernel_size_of(weight)
    blocks = tap_blocks((samples, channels, height, width), last, kernel, "output")
    channel_blocks, column_blocks = blocks.channel_blocks(channels), blocks.column_blocks(width)
    output = torch.empty_like(input)
    _affine_kernel[(samples * channel_blocks * column_blocks * blocks.pieces,)](
        input,
        output,
        *constants,
        channels,
        height,
        width,
        channel_blocks,
        column_blocks,
        blocks.pieces,
        blocks.span,
        RELU=relu,
        **tap_settings(blocks, kernel, last, sum_dtype(input)[0], eps),
    )
    return output
