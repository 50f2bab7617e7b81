"""Gradients of the calibrated affine, in two sweeps over input and output gradient."""

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
    layout_strides,
    load_rows,
    load_taps,
    normalization,
    program_tile,
    row_width,
    tap_columns,
    tap_shifts,
)
from .launching import is_channels_last, kernel_size_of, parameter_blocks, sum_dtype, tap_blocks, tap_settings

__all__ = ["affine_backward"]


@triton.jit
def _before_relu(gradient, activated):
    """The gradient before a ReLU, from its output; gradients at NaN pass, as in torch."""
    return tl.where(activated <= 0, 0.0, gradient)


@triton.jit(
    do_not_specialize=[
        "N", "C", "H", "W", "channel_blocks", "column_blocks", "strips", "strip_rows", "group"
    ]
)  # fmt: skip
def _sums_kernel(
    grad_output,
    activated,  # the output if a ReLU is included, otherwise None
    input,
    sums,  # (3, strips, N, C): with f dy the scaled gradient, sums of f dy (K * x_hat), of f dy (K * 1) and of f dy
    kernel_sums,  # (groups * strips, KERNEL * KERNEL, C): sums over a group of samples; None if not needed
    instance_mean,
    mean,
    var,
    weight,
    center_weight,
    scale_weight,
    scale_bias,
    N,
    C,
    H,
    W,
    channel_blocks,
    column_blocks,
    strips,
    strip_rows,
    group,
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
    strip, block, index = program_tile(strips, channel_blocks, CHANNELS_LAST)
    channels = C // VECTOR * VECTOR
    channel_stride, row_stride, column_stride = layout_strides(channels, H * W, W, CHANNELS_LAST)
    top = strip * strip_rows
    bottom = tl.minimum(top + strip_rows, H)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    products = ()
    for _ in tl.static_range(KERNEL * KERNEL):
        products = products + (zero,)
    before = zero

    for sample in tl.range(index * group, tl.minimum(index * group + group, N)):
        scale, shift, average = normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS, DTYPE)
        # The gradient is multiplied by the calibration factor first.
        factor = 1.0
        if scale_weight is not None:
            factor = calibration_factor(c, C, (average + shift) * scale, scale_weight, scale_bias, DTYPE)[:, None]
        base = sample * (channels.to(tl.int64) * H * W)
        of_ones, of_all = zero, zero
        for column in tl.range(0, column_blocks):
            w = column * BLOCK_W + tl.arange(0, BLOCK_W)
            columns = tap_columns(c, w, channels, W, KERNEL)
            shifts = tap_shifts(columns, W, shift, KERNEL)
            offsets = c[:, None] * channel_stride + w[None, :] * column_stride
            source, grads = input + base + offsets, grad_output + base + offsets
            if activated is not None:
                outputs = activated + base + offsets
            start = tl.maximum(top - HALF, 0)
            # Gradient rows within reach of an input row, from the top; rows outside the strip are zero.
            window = ()
            for t in tl.static_range(2 * HALF):
                h = start - HALF + t
                mask = columns[HALF] < row_width(W, (h >= top) & (h < bottom))
                gradient = tl.load(grads + h * row_stride, mask=mask, other=0.0)
                if activated is not None:
                    gradient = _before_relu(gradient, tl.load(outputs + h * row_stride, mask=mask, other=0.0))
                window = window + (gradient.to(DTYPE) * factor,)
            # Column sums of the gradient per vertical tap, without rows whose tap is outside the image.
            strip_sums = ()
            for _ in tl.static_range(KERNEL):
                strip_sums = strip_sums + (zero,)
            for first in tl.range(start, bottom + HALF, ROWS):
                rows = load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
                gradients = ()
                for t in tl.static_range(ROWS):
                    h = first + t + HALF
                    mask = columns[HALF] < row_width(W, (h >= top) & (h < bottom))
                    gradient = tl.load(grads + h * row_stride, mask=mask, other=0.0)
                    if activated is not None:
                        gradient = _before_relu(gradient, tl.load(outputs + h * row_stride, mask=mask, other=0.0))
                    gradients = gradients + (gradient,)
                for t in tl.static_range(ROWS):
                    valid = (first + t < H).to(DTYPE)
                    meeting = window + (gradients[t].to(DTYPE) * factor,)
                    centered = ()
                    for j in tl.static_range(KERNEL):
                        centered = centered + (rows[t * KERNEL + j].to(DTYPE) + shifts[j] * valid,)
                    added, longer = (), ()
                    for i in tl.static_range(KERNEL):
                        # Tap i connects an output row with the input row i - HALF below it.
                        longer = longer + (strip_sums[i] + meeting[KERNEL - 1 - i] * valid,)
                        for j in tl.static_range(KERNEL):
                            added = added + (products[i * KERNEL + j] + meeting[KERNEL - 1 - i] * centered[j],)
                    products, strip_sums = added, longer
                    window = ()
                    for i in tl.static_range(1, KERNEL):
                        window = window + (meeting[i],)
            of_all += strip_sums[HALF]
            taps = load_taps(weight, c, C, KERNEL, False, DTYPE)
            for i in tl.static_range(KERNEL):
                for j in tl.static_range(KERNEL):
                    of_ones += tl.where(columns[j] < row_width(W, True), taps[i * KERNEL + j] * strip_sums[i], 0.0)

        # The products accumulate over the samples; this sample's share is the difference.
        taps = load_taps(weight, c, C, KERNEL, False, DTYPE)
        so_far = zero
        for t in tl.static_range(KERNEL * KERNEL):
            so_far += taps[t] * products[t]
        place = (strip * N + sample) * C.to(tl.int64) + c
        size = strips.to(tl.int64) * N * C
        tl.store(sums + place, scale * tl.sum(so_far - before, 1), mask=c < C)
        tl.store(sums + size + place, tl.sum(of_ones, 1), mask=c < C)
        tl.store(sums + 2 * size + place, tl.sum(of_all, 1), mask=c < C)
        before = so_far

    if kernel_sums is not None:
        place = (index * strips + strip).to(tl.int64) * (KERNEL * KERNEL)
        scale = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0).to(DTYPE) + EPS)
        for t in tl.static_range(KERNEL * KERNEL):
            tl.store(kernel_sums + (place + t) * C + c, scale * tl.sum(products[t], 1), mask=c < C)


@triton.jit
def _instance_sums(sums, n, c, valid, N, C, strips):
    """The three sums of every instance, added over strips."""
    size = N.to(tl.int64) * C
    place = n[:, None].to(tl.int64) * C + c[None, :]
    of_normalized = tl.load(sums + place, mask=valid, other=0.0)
    of_ones = tl.load(sums + strips * size + place, mask=valid, other=0.0)
    of_all = tl.load(sums + 2 * strips * size + place, mask=valid, other=0.0)
    for _ in tl.range(1, strips):
        place += size
        of_normalized += tl.load(sums + place, mask=valid, other=0.0)
        of_ones += tl.load(sums + strips * size + place, mask=valid, other=0.0)
        of_all += tl.load(sums + 2 * strips * size + place, mask=valid, other=0.0)
    return of_normalized, of_ones, of_all


@triton.jit
def _through_factor(c, C, n_mean, of_normalized, of_all, bias, scale_weight, scale_bias, DTYPE: tl.constexpr):
    """Per instance: the gradient with respect to the calibration factor's logit, and the logit's slope."""
    present = c < C
    slope = tl.load(scale_weight + c, mask=present, other=0.0).to(DTYPE)[None, :]
    logit = slope * n_mean + tl.load(scale_bias + c, mask=present, other=0.0).to(DTYPE)[None, :]
    factor = 1.0 / (1.0 + tl.exp(-logit))
    output = of_normalized
    if bias is not None:
        output += tl.load(bias + c, mask=present, other=0.0).to(DTYPE)[None, :] * of_all
    return output * (1.0 - factor), slope


@triton.jit(do_not_specialize=["N", "C", "pixels", "strips", "parts"])
def _parameters_kernel(
    sums,
    kernel_sums,  # (parts, KERNEL * KERNEL, C)
    instance_mean,
    mean,
    var,
    gate,
    weight,
    bias,
    center_weight,
    scale_weight,
    scale_bias,
    slopes,  # (C,) results: the input's gradient is gain (K^T * dy) + slope (x + shift) + offset
    offsets,  # (N, C)
    grad_weight,
    grad_bias,
    grad_center_weight,
    grad_scale_weight,
    grad_scale_bias,
    N,
    C,
    pixels,
    strips,
    parts,
    EPS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = c < C
    lane = tl.arange(0, BLOCK_N)
    zero = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    count = N.to(DTYPE) * pixels
    opened = 0.0
    if gate is not None:
        opened = tl.load(gate).to(DTYPE)
    scale = tl.rsqrt(tl.load(var + c, mask=present, other=1.0).to(DTYPE) + EPS)[None, :]
    center_of_norm = tl.load(mean + c, mask=present, other=0.0).to(DTYPE)[None, :]
    center = tl.zeros([1, BLOCK_C], DTYPE)
    if center_weight is not None:
        center += tl.load(center_weight + c, mask=present, other=0.0).to(DTYPE)[None, :]

    bias_total, logit_total, moment_total, sum_total, product_total, origin = zero, zero, zero, zero, zero, zero
    for first in tl.range(0, N, BLOCK_N):
        n = first + lane
        valid = (n[:, None] < N) & present[None, :]
        of_normalized, of_ones, of_all = _instance_sums(sums, n, c, valid, N, C, strips)
        average = tl.load(instance_mean + n[:, None].to(tl.int64) * C + c[None, :], mask=valid, other=0.0)
        origin += average
        n_mean = (average + (center * average - center_of_norm)) * scale
        if scale_weight is not None:
            logit, slope = _through_factor(c, C, n_mean, of_normalized, of_all, bias, scale_weight, scale_bias, DTYPE)
            logit_total += logit
            moment_total += logit * n_mean
            of_ones += slope * logit
            of_normalized += slope * logit * n_mean
        bias_total += of_all
        sum_total += of_ones
        product_total += of_normalized
    # The correction terms of normalization by batch statistics; 0 behind a closed gate.
    mean_total = opened * tl.sum(sum_total, 0)[None, :] / count
    product_mean = opened * tl.sum(product_total, 0)[None, :] / count
    tl.store(slopes + c[None, :], -scale * scale * product_mean, mask=present[None, :])
    if grad_bias is not None:
        tl.store(grad_bias + c, tl.sum(bias_total, 0).to(grad_bias.dtype.element_ty), mask=present)
    if grad_scale_weight is not None:
        tl.store(grad_scale_bias + c, tl.sum(logit_total, 0).to(grad_scale_bias.dtype.element_ty), mask=present)
        tl.store(grad_scale_weight + c, tl.sum(moment_total, 0).to(grad_scale_weight.dtype.element_ty), mask=present)

    origin = tl.sum(origin, 0)[None, :] / N
    center_total, instance_total = zero, zero
    for first in tl.range(0, N, BLOCK_N):
        n = first + lane
        valid = (n[:, None] < N) & present[None, :]
        of_normalized, of_ones, of_all = _instance_sums(sums, n, c, valid, N, C, strips)
        place = n[:, None].to(tl.int64) * C + c[None, :]
        average = tl.load(instance_mean + place, mask=valid, other=0.0)
        n_mean = (average + (center * average - center_of_norm)) * scale
        instance_grad, offset = of_ones, zero
        if scale_weight is not None:
            logit, slope = _through_factor(c, C, n_mean, of_normalized, of_all, bias, scale_weight, scale_bias, DTYPE)
            instance_grad += slope * logit
            offset = slope * logit / pixels
        instance_grad = scale * (instance_grad - pixels * (mean_total + product_mean * n_mean))
        offset = scale * (offset - mean_total) + center * instance_grad / pixels
        tl.store(offsets + place, offset, mask=valid)
        # With batch statistics these gradients sum to 0. Subtracting the mean first keeps a large one from amplifying
        # the rounding errors of that sum.
        center_total += tl.where(valid, (average - origin) * instance_grad, 0.0)
        instance_total += tl.where(valid, instance_grad, 0.0)
    if grad_center_weight is not None:
        total = tl.sum(center_total, 0)[None, :] + (1.0 - opened) * origin * tl.sum(instance_total, 0)[None, :]
        tl.store(grad_center_weight + c[None, :], total.to(grad_center_weight.dtype.element_ty), mask=present[None, :])

    if grad_weight is not None:
        taps = ()
        for _ in tl.static_range(KERNEL * KERNEL):
            taps = taps + (zero,)
        for first in tl.range(0, parts, BLOCK_N):
            part = first + lane
            place = part[:, None].to(tl.int64) * (KERNEL * KERNEL) * C + c[None, :]
            mask = (part[:, None] < parts) & present[None, :]
            added = ()
            for t in tl.static_range(KERNEL * KERNEL):
                added = added + (taps[t] + tl.load(kernel_sums + place + t * C, mask=mask, other=0.0),)
            taps = added
        for t in tl.static_range(KERNEL * KERNEL):
            target = grad_weight + c * (KERNEL * KERNEL) + t
            tl.store(target, tl.sum(taps[t], 0).to(grad_weight.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["C", "H", "W", "channel_blocks", "column_blocks", "strips", "strip_rows"])
def _input_gradient_kernel(
    grad_output,
    activated,  # as in `_sums_kernel`
    input,
    grad_input,
    slopes,  # (C,); None if the gradient does not depend on the input
    offsets,  # (N, C)
    instance_mean,
    mean,
    var,
    weight,
    center_weight,
    scale_weight,
    scale_bias,
    C,
    H,
    W,
    channel_blocks,
    column_blocks,
    strips,
    strip_rows,
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

    gain, shift, average = normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS, DTYPE)
    if scale_weight is not None:
        gain *= calibration_factor(c, C, (average + shift) * gain, scale_weight, scale_bias, DTYPE)
    offset = tl.load(offsets + sample * C.to(tl.int64) + c, mask=c < C, other=0.0)
    slope = tl.zeros([BLOCK_C], DTYPE)
    if slopes is not None:
        slope = tl.load(slopes + c, mask=c < C, other=0.0)
    taps = load_taps(weight, c, C, KERNEL, True, DTYPE)
    columns = tap_columns(c, w, channels, W, KERNEL)

    base = sample * (channels.to(tl.int64) * H * W)
    positions = c[:, None] * channel_stride + w[None, :] * column_stride
    source, target = grad_output + base + positions, grad_input + base + positions
    values = input + base + positions
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    unfinished = ()
    for _ in tl.static_range(KERNEL - 1):
        unfinished = unfinished + (zero,)
    for first in tl.range(tl.maximum(top - HALF, 0), bottom + HALF, ROWS):
        rows = load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
        if activated is not None:
            outputs = activated + base + positions
            kept = load_rows(outputs, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
            passed = ()
            for t in tl.static_range(ROWS * KERNEL):
                passed = passed + (_before_relu(rows[t], kept[t]),)
            rows = passed
        features = ()
        for t in tl.static_range(ROWS):
            if slopes is not None:
                h = first + t - HALF
                mask = columns[HALF] < row_width(W, (h >= top) & (h < bottom))
                features = features + (tl.load(values + h * row_stride, mask=mask, other=0.0),)
        for t in tl.static_range(ROWS):
            sums = unfinished + (zero,)
            for j in tl.static_range(KERNEL):
                gradient = rows[t * KERNEL + j].to(DTYPE)
                added = ()
                for i in tl.static_range(KERNEL):
                    added = added + (sums[i] + taps[(KERNEL - 1 - i) * KERNEL + j] * gradient,)
                sums = added
            h = first + t - HALF
            result = sums[0] * gain[:, None] + offset[:, None]
            if slopes is not None:
                result += slope[:, None] * (features[t].to(DTYPE) + shift[:, None])
            store = columns[HALF] < row_width(W, (h >= top) & (h < bottom))
            tl.store(target + h * row_stride, result.to(grad_input.dtype.element_ty), mask=store)
            unfinished = ()
            for i in tl.static_range(1, KERNEL):
                unfinished = unfinished + (sums[i],)


def affine_backward(
    grad_output: Tensor,
    activated: Optional[Tensor],
    input: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    gate: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    center_weight: Optional[Tensor],
    scale_weight: Optional[Tensor],
    scale_bias: Optional[Tensor],
    eps: float,
    needs_input: bool,
    needs_weight: bool,
) -> Tuple[Optional[Tensor], ...]:
    """Gradients of :func:`affine`, through the statistics where the gate is open.

    Args:
        grad_output: (N, C, H, W) in the memory format of ``input``.
        activated: The output in the same memory format if it includes a ReLU, otherwise None.
        input: (N, C, H, W), dense.
        instance_mean: (N, C).
        mean: (C,).
        var: (C,).
        gate: Boolean scalar, or None for a closed gate.
        weight: (C, 1, k, k) or None.
        bias: (C,) or None.
        center_weight: (C,) or None.
        scale_weight: (C,) or None.
        scale_bias: (C,) or None.
        eps: Added to the variance.
        needs_input: Whether to compute the input's gradient.
        needs_weight: Whether to compute the gradient of ``weight``.

    Returns:
        The gradients of input, weight, bias, center_weight, scale_weight and scale_bias, or None.
    """
    samples, channels, height, width = input.shape
    dtype, torch_dtype = sum_dtype(input)
    last = is_channels_last(input)
    kernel = kernel_size_of(weight)
    blocks = tap_blocks((samples, channels, height, width), last, kernel, "sums", activated is not None)
    channel_blocks, column_blocks = blocks.channel_blocks(channels), blocks.column_blocks(width)
    groups = triton.cdiv(samples, blocks.group)
    parts = groups * blocks.pieces
    sums = input.new_empty((3, blocks.pieces, samples, channels), dtype=torch_dtype)
    kernel_sums = None
    if weight is not None and needs_weight:
        kernel_sums = input.new_empty((parts, kernel * kernel, channels), dtype=torch_dtype)
    _sums_kernel[(groups * channel_blocks * blocks.pieces,)](
        grad_output,
        activated,
        input,
        sums,
        kernel_sums,
        instance_mean,
        mean,
        var,
        weight,
        center_weight,
        scale_weight,
        scale_bias,
        samples,
        channels,
        height,
        width,
        channel_blocks,
        column_blocks,
        blocks.pieces,
        blocks.span,
        blocks.group,
        **tap_settings(blocks, kernel, last, dtype, eps),
    )

    grads = [None if parameter is None else torch.empty_like(parameter) for parameter in (weight, bias, center_weight)]
    grads += [None if parameter is None else torch.empty_like(parameter) for parameter in (scale_weight, scale_bias)]
    if kernel_sums is None:
        grads[0] = None
    slopes = input.new_empty(channels, dtype=torch_dtype)
    offsets = input.new_empty((samples, channels), dtype=torch_dtype)
    block_channels, block_samples = parameter_blocks(samples, channels)
    _parameters_kernel[(triton.cdiv(channels, block_channels),)](
        sums,
        kernel_sums,
        instance_mean,
        mean,
        var,
        gate,
        weight,
        bias,
        center_weight,
        scale_weight,
        scale_bias,
        slopes,
        offsets,
        *grads,
        samples,
        channels,
        height * width,
        blocks.pieces,
        parts,
        EPS=eps,
        KERNEL=kernel,
        BLOCK_C=block_channels,
        BLOCK_N=block_samples,
        DTYPE=dtype,
        num_warps=8,
        num_stages=1,
    )
    if not needs_input:
        return None, *grads

    grad_input = torch.empty_like(input)
    blocks = tap_blocks((samples, channels, height, width), last, kernel, "gradient", activated is not None)
    channel_blocks, column_blocks = blocks.channel_blocks(channels), blocks.column_blocks(width)
    _input_gradient_kernel[(samples * channel_blocks * column_blocks * blocks.pieces,)](
        grad_output,
        activated,
        input,
        grad_input,
        None if gate is None else slopes,
        offsets,
        instance_mean,
        mean,
        var,
        weight,
        center_weight,
        scale_weight,
        scale_bias,
        channels,
        height,
        width,
        channel_blocks,
        column_blocks,
        blocks.pieces,
        blocks.span,
        **tap_settings(blocks, kernel, last, dtype, eps),
    )
    return grad_input, *grads
