"""Triton kernels of the layer and their launchers; :mod:`.fused` makes operators of them.

Every kernel works on tiles of BLOCK_C channels by so many positions, of one sample at a time. One source serves both
layouts: a sample is addressed by c * channel_stride + position * column_stride, one of which is 1. Offsets within a
sample are 32 bits wide, those of samples 64. Sums are taken in DTYPE, float32 or float64, in a fixed order: partial
results go through a workspace, and there are no atomic operations.

The normalized features are x_hat = a (x + shift) with a = 1 / sqrt(var + eps) per channel and
shift = center_weight * instance_mean - mean per instance. The shift is added to the input first: behind a product a
large mean would be lost to its rounding. Norms prepared for inference are given as x_hat = slope x + shift, whose
product is not rounded: the two are one operation.

The kernels over depthwise taps go down the rows of a tile. A row is loaded once per horizontal tap, which comes from
the cache after the first time, and added to as many unfinished rows as there are vertical taps, held in registers: k
loads for k * k products. Rows outside the image are skipped, columns outside are zeros made by a mask. ROWS rows are
loaded before the first of them is used, so that enough bytes are on their way at any time.

Sizes are not specialized: a network has many, and each would be compiled anew. What is known of their divisibility
comes as VECTOR, by which loads are widened.

This module imports triton; whoever may have to do without imports it late.
"""

# Triton compiles the kernels from their source, by rules of its own: tuples grow in loops unrolled, and parameters are
# of what types the arguments are.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment", no-warn-unreachable

from __future__ import annotations

import functools
import math
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["affine", "affine_backward", "finalize", "folded_affine", "instance_means", "statistics"]

# Slots for partial sums of the similarity: enough programs to read at the memory's full speed.
SIMILARITY_SLOTS = 512
# Positions of one program of the similarity: 16 per thread.
SIMILARITY_BLOCK = 2048
# Programs that keep the largest GPUs busy: 132 multiprocessors, 8 programs of 128 threads on each, twice over.
PROGRAMS = 2112


@triton.jit
def _program(tiles, channel_blocks, CHANNELS_LAST: tl.constexpr):
    """Tile, channel block and sample of this program; neighbors in memory are neighbors in time."""
    index = tl.program_id(0)
    if CHANNELS_LAST:
        block = index % channel_blocks
        tile = index // channel_blocks % tiles
    else:
        tile = index % tiles
        block = index // tiles % channel_blocks
    return tile, block, index // (tiles * channel_blocks)


@triton.jit
def _strides(channels, pixels, W, CHANNELS_LAST: tl.constexpr):
    """Strides of channels, rows and columns."""
    channel_stride, row_stride, column_stride = pixels, W, 1
    if CHANNELS_LAST:
        channel_stride, row_stride, column_stride = 1, W * channels, channels
    return channel_stride, row_stride, column_stride


@triton.jit
def _merged(mean, m2, count, AXIS: tl.constexpr):
    """Mean, sum of squared deviations and count of all lanes along an axis, by Chan's formula."""
    total = tl.sum(count, AXIS)
    # Relative to one of the means, so that a large mean in common does not round away their differences.
    origin = tl.max(tl.where(count > 0, mean, float("-inf")), AXIS)
    origin = tl.where(total > 0, origin, 0.0)
    differences = tl.where(count > 0, mean - tl.expand_dims(origin, AXIS), 0.0)
    offset = tl.sum(count * differences, AXIS) / tl.maximum(total, 1.0)
    deviations = tl.where(count > 0, differences - tl.expand_dims(offset, AXIS), 0.0)
    return origin + offset, tl.sum(m2 + count * deviations * deviations, AXIS), total


@triton.jit(do_not_specialize=["N", "C", "pixels", "span", "splits", "channel_blocks"])
def _moments_kernel(
    input,
    means,  # (splits, N, C)
    squares,  # (splits, N, C) sums of squared deviations; None: the shares of the means are written to `means`
    N,
    C,
    pixels,
    span,
    splits,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
):
    split, block, sample = _program(splits, channel_blocks, CHANNELS_LAST)
    channels, positions = C, pixels
    if CHANNELS_LAST:
        channels = C // VECTOR * VECTOR
    else:
        positions = pixels // VECTOR * VECTOR
    channel_stride, _, position_stride = _strides(channels, positions, 1, CHANNELS_LAST)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    # A span is a multiple of the block: saying so again lets the compiler widen loads.
    start = split * span // BLOCK_P * BLOCK_P
    end = tl.minimum(start + span, pixels)
    source = input + sample.to(tl.int64) * channels * positions + c[:, None] * channel_stride
    mean = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], DTYPE)
    number = tl.cast(0.0, DTYPE)
    for first in tl.range(start, end, BLOCK_P, loop_unroll_factor=4):
        p = first + lane
        valid = (c[:, None] < channels) & (p[None, :] < positions)
        values = tl.load(source + p[None, :] * position_stride, mask=valid, other=0.0).to(DTYPE)
        number += 1.0
        # Every lane has its own mean and deviations, which are merged in the end.
        values = tl.where(valid, values, mean)
        deviation = values - mean
        mean += deviation * (1.0 / number)
        if squares is not None:
            m2 += deviation * (values - mean)
    count = tl.maximum((end - start - lane + BLOCK_P - 1) // BLOCK_P, 0).to(DTYPE)
    count = tl.broadcast_to(count[None, :], (BLOCK_C, BLOCK_P))
    mean_of_all, m2_of_all, total = _merged(mean, m2, count, 1)
    target = (split * N + sample).to(tl.int64) * C + c
    if squares is None:
        mean_of_all = mean_of_all * (total / pixels)
    else:
        tl.store(squares + target, m2_of_all, mask=c < C)
    tl.store(means + target, mean_of_all, mask=c < C)


@triton.jit(do_not_specialize=["N", "C", "pixels", "span", "splits", "samples"])
def _combine_kernel(
    means,  # (splits, N, C)
    squares,  # (splits, N, C)
    center_weight,
    instance_mean,  # (N, C)
    batch_mean,  # (C,)
    batch_var,  # (C,)
    norms,  # (samples, channel blocks): squared norms of the first samples; None for no similarity
    N,
    C,
    pixels,
    span,
    splits,
    samples,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_N)
    gain = tl.full([1, BLOCK_C], 1.0, DTYPE)
    if center_weight is not None:
        gain += tl.load(center_weight + c[None, :], mask=c[None, :] < C, other=0.0).to(DTYPE)
    mean = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    m2 = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    within = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    number = tl.cast(0.0, DTYPE)
    for first in tl.range(0, N, BLOCK_N):
        n = first + lane
        valid = (n[:, None] < N) & (c[None, :] < C)
        source = n[:, None].to(tl.int64) * C + c[None, :]
        sample_mean = tl.load(means + source, mask=valid, other=0.0)
        sample_m2 = tl.load(squares + source, mask=valid, other=0.0)
        seen = tl.minimum(span, pixels)
        for split in tl.range(1, splits, loop_unroll_factor=2):
            source += N.to(tl.int64) * C
            size = tl.minimum(span, pixels - split * span)
            share = size.to(DTYPE) / (seen + size).to(DTYPE)
            difference = tl.load(means + source, mask=valid, other=0.0) - sample_mean
            sample_m2 += tl.load(squares + source, mask=valid, other=0.0)
            sample_m2 += difference * difference * (share * seen.to(DTYPE))
            sample_mean += difference * share
            seen += size
        tl.store(instance_mean + n[:, None].to(tl.int64) * C + c[None, :], sample_mean, mask=valid)
        if norms is not None:
            norm = tl.sum(tl.where(valid, sample_m2 + pixels * sample_mean * sample_mean, 0.0), 1)
            tl.store(norms + n * tl.num_programs(0) + tl.program_id(0), norm, mask=n < samples)
        number += 1.0
        within += sample_m2
        centered = gain * sample_mean
        deviation = tl.where(valid, centered - mean, 0.0)
        mean += deviation * (1.0 / number)
        m2 += deviation * tl.where(valid, centered - mean, 0.0)
    count = tl.maximum((N - lane + BLOCK_N - 1) // BLOCK_N, 0).to(DTYPE)
    count = tl.broadcast_to(count[:, None], (BLOCK_N, BLOCK_C))
    mean_of_all, m2_of_all, total = _merged(mean, m2, count, 0)
    var = (tl.sum(within, 0) / pixels + m2_of_all) / total
    tl.store(batch_mean + c, mean_of_all, mask=c < C)
    tl.store(batch_var + c, var, mask=c < C)


@triton.jit(do_not_specialize=["samples", "numel", "blocks"])
def _similarity_kernel(
    input,
    norms,  # (samples, blocks)
    partials,  # (SLOTS,) whose sum is the similarity
    samples,
    numel,
    blocks,
    VECTOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    i = tl.arange(0, BLOCK_S)
    squared = tl.zeros([BLOCK_S], DTYPE)
    for first in tl.range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        mask = (i[:, None] < samples) & (block[None, :] < blocks)
        squared += tl.sum(tl.load(norms + i[:, None] * blocks + block[None, :], mask=mask, other=0.0), 1)
    # A sample of zero norm has cosine 0 with all others.
    inverse = tl.where(squared > 0, 1.0 / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
    size = numel // VECTOR * VECTOR
    total = tl.zeros([BLOCK], DTYPE)
    index = tl.program_id(0)
    for start in tl.range(index * BLOCK, size, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        vector = tl.zeros([BLOCK], DTYPE)
        for sample in tl.range(0, samples, loop_unroll_factor=4):
            source = input + sample * size.to(tl.int64)
            values = tl.load(source + offsets, mask=(offsets >= 0) & (offsets < size), other=0.0).to(DTYPE)
            vector += values * tl.sum(tl.where(i == sample, inverse, 0.0), 0)
        total += vector * vector
    pairs = samples * (samples - 1.0)
    result = tl.sum(total, 0)
    if index == 0:
        result -= tl.sum((squared > 0).to(DTYPE), 0)
    # Slots without a program of their own are cleared by one that has.
    slot = tl.arange(0, SLOTS)
    values = tl.where(slot == index, result / pairs, 0.0)
    tl.store(partials + slot, values, mask=slot % tl.num_programs(0) == index)


@triton.jit(do_not_specialize=["C"])
def _finalize_kernel(
    mean,  # (C,)
    var,  # (C,)
    similarity,  # (SLOTS,) partial sums; None for a gate that is open always
    running_mean,
    running_var,
    running_similarity,
    batches,  # None for a fixed momentum
    mean_used,  # (C,) results
    var_used,
    gate,
    C,
    momentum: tl.float64,
    correction: tl.float64,
    similarity_momentum: tl.float64,
    threshold: tl.float64,
    MOVING: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    opened = tl.full([BLOCK_C], 1.0, tl.float32) > 0
    if similarity is not None:
        found = tl.sum(tl.load(similarity + tl.arange(0, SLOTS)).to(tl.float32), 0)
        before = tl.load(running_similarity)
        after = before
        if MOVING:
            after = (before + similarity_momentum * (found - before)).to(tl.float32)
            # All threads have read it before any of them writes.
            tl.debug_barrier()
            tl.store(running_similarity, after)
        opened = tl.zeros([BLOCK_C], tl.float32) + after > threshold
    tl.store(gate, tl.max(opened.to(tl.int32), 0) > 0)
    # In double precision for buffers of that.
    weight = tl.full([BLOCK_C], momentum, tl.float64)
    if batches is not None:
        weight = tl.full([BLOCK_C], 1.0, tl.float64) / tl.load(batches).to(tl.float64)
    unbiased = tl.full([BLOCK_C], correction, tl.float64)
    for start in tl.range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = c < C
        batch_mean, batch_var = tl.load(mean + c, mask=valid), tl.load(var + c, mask=valid)
        old_mean, old_var = tl.load(running_mean + c, mask=valid), tl.load(running_var + c, mask=valid)
        tl.store(mean_used + c, tl.where(opened, batch_mean, old_mean.to(DTYPE)), mask=valid)
        tl.store(var_used + c, tl.where(opened, batch_var, old_var.to(DTYPE)), mask=valid)
        if MOVING:
            new_mean = old_mean + weight * (batch_mean - old_mean)
            new_var = old_var + weight * (batch_var * unbiased - old_var)
            # Behind a shut gate they stay as they are to the last bit, whatever the batch holds.
            tl.store(running_mean + c, new_mean.to(old_mean.dtype), mask=valid & opened)
            tl.store(running_var + c, new_var.to(old_var.dtype), mask=valid & opened)


@triton.jit
def _normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Scale and shift of x_hat = scale (x + shift), and the instance mean, of channels `c`."""
    present = c < C
    average = tl.load(instance_mean + sample * C.to(tl.int64) + c, mask=present, other=0.0)
    scale = tl.rsqrt(tl.load(var + c, mask=present, other=1.0).to(DTYPE) + EPS)
    shift = -tl.load(mean + c, mask=present, other=0.0).to(DTYPE)
    if center_weight is not None:
        shift += tl.load(center_weight + c, mask=present, other=0.0).to(DTYPE) * average
    return scale, shift, average


@triton.jit
def _folded(sample, c, C, instance_mean, slope, shift, center, DTYPE: tl.constexpr):
    """Slope and shift of x_hat = slope x + shift, and the instance mean, of channels `c`; None has no effect."""
    present = c < C
    slopes = tl.full(c.shape, 1.0, DTYPE)
    if slope is not None:
        slopes = tl.load(slope + c, mask=present, other=0.0).to(DTYPE)
    shifts, average = tl.zeros(c.shape, DTYPE), tl.zeros(c.shape, DTYPE)
    if shift is not None:
        shifts = tl.load(shift + c, mask=present, other=0.0).to(DTYPE)
    if instance_mean is not None:
        average = tl.load(instance_mean + sample * C.to(tl.int64) + c, mask=present, other=0.0)
    if center is not None:
        shifts = tl.fma(tl.load(center + c, mask=present, other=0.0).to(DTYPE), average, shifts)
    return slopes, shifts, average


@triton.jit
def _factor(c, C, normalized_mean, scale_weight, scale_bias, DTYPE: tl.constexpr):
    """The calibration factor."""
    slope = tl.load(scale_weight + c, mask=c < C, other=0.0).to(DTYPE)
    logit = slope * normalized_mean + tl.load(scale_bias + c, mask=c < C, other=0.0).to(DTYPE)
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def _taps(weight, c, C, KERNEL: tl.constexpr, FLIPPED: tl.constexpr, DTYPE: tl.constexpr):
    """The KERNEL * KERNEL taps of channels `c`, each (BLOCK_C, 1)."""
    taps = ()
    for t in tl.static_range(KERNEL * KERNEL):
        if weight is not None:
            index = KERNEL * KERNEL - 1 - t if FLIPPED else t
            tap = tl.load(weight + c * (KERNEL * KERNEL) + index, mask=c < C, other=0.0).to(DTYPE)
        else:
            tap = tl.full(c.shape, 1.0, DTYPE)
        taps = taps + (tap[:, None],)
    return taps


@triton.jit
def _columns(c, w, channels, W, KERNEL: tl.constexpr):
    """Columns of the horizontal neighbors of columns `w`, one tile per tap.

    They are unsigned, so that those outside to the left are huge, and so are those of channels and columns that are
    only there to fill a block: one comparison with W, or with 0 for a row outside, makes the mask.
    """
    columns = ()
    valid = (c[:, None] < channels) & (w[None, :] < W)
    for j in tl.static_range(KERNEL):
        columns = columns + (tl.where(valid, w[None, :] + (j - KERNEL // 2), -1).to(tl.uint32),)
    return columns


@triton.jit
def _width(W, valid):
    """W where a row counts, 0 where it does not."""
    return tl.where(valid, W, 0).to(tl.uint32)


@triton.jit
def _load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS: tl.constexpr, KERNEL: tl.constexpr):
    """ROWS rows, each once per horizontal tap; rows from H on are zeros."""
    rows = ()
    for t in tl.static_range(ROWS):
        row = source + (first + t) * row_stride
        width = _width(W, first + t < H)
        for j in tl.static_range(KERNEL):
            mask = columns[j] < width
            rows = rows + (tl.load(row + (j - KERNEL // 2) * column_stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def _shifts(columns, W, shift, KERNEL: tl.constexpr):
    """The shift of every horizontal neighbor: the padding is of x_hat, not of the input, so 0 outside."""
    shifts = ()
    for j in tl.static_range(KERNEL):
        shifts = shifts + (tl.where(columns[j] < _width(W, True), shift[:, None], 0.0),)
    return shifts


@triton.jit(do_not_specialize=["C", "H", "W", "channel_blocks", "column_blocks", "strips", "strip_rows"])
def _affine_kernel(
    input,
    output,
    instance_mean,  # None where nothing depends on it
    mean,  # None for a norm that was prepared for inference
    var,
    slope,  # (C,) of such a norm, or None
    shift,
    weight,
    bias,
    center_weight,
    scale_weight,  # of x_hat's mean; of the input's where the norm was prepared
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
    tile, block, sample = _program(column_blocks * strips, channel_blocks, CHANNELS_LAST)
    channels = C // VECTOR * VECTOR
    channel_stride, row_stride, column_stride = _strides(channels, H * W, W, CHANNELS_LAST)
    top = tile // column_blocks * strip_rows
    bottom = tl.minimum(top + strip_rows, H)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tile % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)

    # The normalization's scale is part of the gain, a prepared norm's slope stays with the input.
    if mean is not None:
        gain, addend, average = _normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS, DTYPE)
        factor_mean = (average + addend) * gain
    else:
        slopes, addend, factor_mean = _folded(sample, c, C, instance_mean, slope, shift, center_weight, DTYPE)
        gain = tl.full([BLOCK_C], 1.0, DTYPE)
    offset = tl.zeros([BLOCK_C], DTYPE)
    if bias is not None:
        offset = tl.load(bias + c, mask=c < C, other=0.0).to(DTYPE)
    if scale_weight is not None:
        factor = _factor(c, C, factor_mean, scale_weight, scale_bias, DTYPE)
        gain, offset = factor * gain, factor * offset
    taps = _taps(weight, c, C, KERNEL, False, DTYPE)
    columns = _columns(c, w, channels, W, KERNEL)
    shifts = _shifts(columns, W, addend, KERNEL)

    base = sample * (channels.to(tl.int64) * H * W)
    offsets = c[:, None] * channel_stride + w[None, :] * column_stride
    source, target = input + base + offsets, output + base + offsets
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    # Rows that wait for the taps below them, the uppermost first.
    unfinished = ()
    for _ in tl.static_range(KERNEL - 1):
        unfinished = unfinished + (zero,)
    for first in tl.range(tl.maximum(top - HALF, 0), bottom + HALF, ROWS):
        rows = _load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
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
            store = columns[HALF] < _width(W, (h >= top) & (h < bottom))
            tl.store(target + h * row_stride, result.to(output.dtype.element_ty), mask=store)
            unfinished = ()
            for i in tl.static_range(1, KERNEL):
                unfinished = unfinished + (sums[i],)


@triton.jit
def _before_relu(gradient, activated):
    """The gradient of a ReLU's input by its output; that of NaN passes, as torch has it."""
    return tl.where(activated <= 0, 0.0, gradient)


@triton.jit(
    do_not_specialize=[
        "N", "C", "H", "W", "channel_blocks", "column_blocks", "strips", "strip_rows", "group"
    ]
)  # fmt: skip
def _sums_kernel(
    grad_output,
    activated,  # the output where that was a ReLU's, otherwise None
    input,
    sums,  # (3, strips, N, C): with f dy the scaled gradient, sums of f dy (K * x_hat), of f dy (K * 1) and of f dy
    kernel_sums,  # (groups * strips, KERNEL * KERNEL, C): sums over a group of samples; None if not asked for
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
    strip, block, index = _program(strips, channel_blocks, CHANNELS_LAST)
    channels = C // VECTOR * VECTOR
    channel_stride, row_stride, column_stride = _strides(channels, H * W, W, CHANNELS_LAST)
    top = strip * strip_rows
    bottom = tl.minimum(top + strip_rows, H)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    products = ()
    for _ in tl.static_range(KERNEL * KERNEL):
        products = products + (zero,)
    before = zero

    for sample in tl.range(index * group, tl.minimum(index * group + group, N)):
        scale, shift, average = _normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS, DTYPE)
        # The gradient is multiplied by the calibration factor first of all.
        factor = 1.0
        if scale_weight is not None:
            factor = _factor(c, C, (average + shift) * scale, scale_weight, scale_bias, DTYPE)[:, None]
        base = sample * (channels.to(tl.int64) * H * W)
        of_ones, of_all = zero, zero
        for column in tl.range(0, column_blocks):
            w = column * BLOCK_W + tl.arange(0, BLOCK_W)
            columns = _columns(c, w, channels, W, KERNEL)
            shifts = _shifts(columns, W, shift, KERNEL)
            offsets = c[:, None] * channel_stride + w[None, :] * column_stride
            source, grads = input + base + offsets, grad_output + base + offsets
            if activated is not None:
                outputs = activated + base + offsets
            start = tl.maximum(top - HALF, 0)
            # The rows of the gradient that meet an input row, the uppermost first; those outside the strip are zero.
            window = ()
            for t in tl.static_range(2 * HALF):
                h = start - HALF + t
                mask = columns[HALF] < _width(W, (h >= top) & (h < bottom))
                gradient = tl.load(grads + h * row_stride, mask=mask, other=0.0)
                if activated is not None:
                    gradient = _before_relu(gradient, tl.load(outputs + h * row_stride, mask=mask, other=0.0))
                window = window + (gradient.to(DTYPE) * factor,)
            # Sums down the columns of the gradient, per vertical tap, without what meets no input row.
            strip_sums = ()
            for _ in tl.static_range(KERNEL):
                strip_sums = strip_sums + (zero,)
            for first in tl.range(start, bottom + HALF, ROWS):
                rows = _load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
                gradients = ()
                for t in tl.static_range(ROWS):
                    h = first + t + HALF
                    mask = columns[HALF] < _width(W, (h >= top) & (h < bottom))
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
                        # Tap i joins an output row to the input row i - HALF below it.
                        longer = longer + (strip_sums[i] + meeting[KERNEL - 1 - i] * valid,)
                        for j in tl.static_range(KERNEL):
                            added = added + (products[i * KERNEL + j] + meeting[KERNEL - 1 - i] * centered[j],)
                    products, strip_sums = added, longer
                    window = ()
                    for i in tl.static_range(1, KERNEL):
                        window = window + (meeting[i],)
            of_all += strip_sums[HALF]
            taps = _taps(weight, c, C, KERNEL, False, DTYPE)
            for i in tl.static_range(KERNEL):
                for j in tl.static_range(KERNEL):
                    of_ones += tl.where(columns[j] < _width(W, True), taps[i * KERNEL + j] * strip_sums[i], 0.0)

        # The products go on over the samples; this one's is what it has added.
        taps = _taps(weight, c, C, KERNEL, False, DTYPE)
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
    """The three sums per instance, over strips."""
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
    """The gradient with respect to the logit of the calibration factor, per instance, and the logit's slope."""
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

    bias_total, logit_total, moment_total, sum_total, product_total, center = zero, zero, zero, zero, zero, zero
    for first in tl.range(0, N, BLOCK_N):
        n = first + lane
        valid = (n[:, None] < N) & present[None, :]
        of_normalized, of_ones, of_all = _instance_sums(sums, n, c, valid, N, C, strips)
        average = tl.load(instance_mean + n[:, None].to(tl.int64) * C + c[None, :], mask=valid, other=0.0)
        center += average
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
    # Means over the batch of what normalization takes off, where its statistics are the batch's own.
    mean_total = opened * tl.sum(sum_total, 0)[None, :] / count
    product_mean = opened * tl.sum(product_total, 0)[None, :] / count
    tl.store(slopes + c[None, :], -scale * scale * product_mean, mask=present[None, :])
    if grad_bias is not None:
        tl.store(grad_bias + c, tl.sum(bias_total, 0).to(grad_bias.dtype.element_ty), mask=present)
    if grad_scale_weight is not None:
        tl.store(grad_scale_bias + c, tl.sum(logit_total, 0).to(grad_scale_bias.dtype.element_ty), mask=present)
        tl.store(grad_scale_weight + c, tl.sum(moment_total, 0).to(grad_scale_weight.dtype.element_ty), mask=present)

    center = tl.sum(center, 0)[None, :] / N
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
        # Through batch statistics these gradients sum up to 0: with the mean taken off first, a large one does not blow
        # up their rounding errors.
        center_total += tl.where(valid, (average - center) * instance_grad, 0.0)
        instance_total += tl.where(valid, instance_grad, 0.0)
    if grad_center_weight is not None:
        total = tl.sum(center_total, 0)[None, :] + (1.0 - opened) * center * tl.sum(instance_total, 0)[None, :]
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
    slopes,  # (C,); None where the input's values do not matter
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
    tile, block, sample = _program(column_blocks * strips, channel_blocks, CHANNELS_LAST)
    channels = C // VECTOR * VECTOR
    channel_stride, row_stride, column_stride = _strides(channels, H * W, W, CHANNELS_LAST)
    top = tile // column_blocks * strip_rows
    bottom = tl.minimum(top + strip_rows, H)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tile % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)

    gain, shift, average = _normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS, DTYPE)
    if scale_weight is not None:
        gain *= _factor(c, C, (average + shift) * gain, scale_weight, scale_bias, DTYPE)
    offset = tl.load(offsets + sample * C.to(tl.int64) + c, mask=c < C, other=0.0)
    slope = tl.zeros([BLOCK_C], DTYPE)
    if slopes is not None:
        slope = tl.load(slopes + c, mask=c < C, other=0.0)
    taps = _taps(weight, c, C, KERNEL, True, DTYPE)
    columns = _columns(c, w, channels, W, KERNEL)

    base = sample * (channels.to(tl.int64) * H * W)
    positions = c[:, None] * channel_stride + w[None, :] * column_stride
    source, target = grad_output + base + positions, grad_input + base + positions
    values = input + base + positions
    zero = tl.zeros([BLOCK_C, BLOCK_W], DTYPE)
    unfinished = ()
    for _ in tl.static_range(KERNEL - 1):
        unfinished = unfinished + (zero,)
    for first in tl.range(tl.maximum(top - HALF, 0), bottom + HALF, ROWS):
        rows = _load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
        if activated is not None:
            outputs = activated + base + positions
            kept = _load_rows(outputs, first, H, W, row_stride, column_stride, columns, ROWS, KERNEL)
            passed = ()
            for t in tl.static_range(ROWS * KERNEL):
                passed = passed + (_before_relu(rows[t], kept[t]),)
            rows = passed
        features = ()
        for t in tl.static_range(ROWS):
            if slopes is not None:
                h = first + t - HALF
                mask = columns[HALF] < _width(W, (h >= top) & (h < bottom))
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
            store = columns[HALF] < _width(W, (h >= top) & (h < bottom))
            tl.store(target + h * row_stride, result.to(grad_input.dtype.element_ty), mask=store)
            unfinished = ()
            for i in tl.static_range(1, KERNEL):
                unfinished = unfinished + (sums[i],)


class Blocks(NamedTuple):
    """How a tensor is cut into programs."""

    channels: int  # channels of a tile
    positions: int  # positions of a tile, columns of one row for the kernels over taps
    vector: int  # what the contiguous sizes are divisible by, at most 8
    warps: int
    pieces: int  # parts along the positions, or strips of rows
    span: int  # positions, or rows, of a part
    rows: int = 1  # rows that are loaded together
    group: int = 1  # samples of one program that sums over them
    registers: Optional[int] = None  # at most, per thread

    def channel_blocks(self, channels: int) -> int:
        """Tiles to cover so many channels."""
        return triton.cdiv(channels, self.channels)

    def column_blocks(self, columns: int) -> int:
        """Tiles to cover a row."""
        return triton.cdiv(columns, self.positions)


# A launch is due in some microseconds, and a network comes back to the same shapes.
@functools.lru_cache(maxsize=4096)
def statistics_blocks(shape: Tuple[int, int, int, int], channels_last: bool) -> Blocks:
    """Tiles of 1024 values, 8 for each of 128 threads: one load of 16 bytes in half precision.

    In rows of 256 positions, what one warp loads at once, or of 64 channels, one line of the cache in half precision.
    Where samples and channels make few programs the positions are split, into parts of at least four tiles: smaller
    ones would spend their time on the merging.
    """
    samples, channels, height, width = shape
    pixels = height * width
    if channels_last:
        block_channels = min(64, triton.next_power_of_2(channels))
        block = min(1024 // block_channels, triton.next_power_of_2(pixels))
    else:
        block = min(256, triton.next_power_of_2(pixels))
        block_channels = min(1024 // block, triton.next_power_of_2(channels))
    warps = max(1, min(4, block_channels * block // 256))
    programs = samples * triton.cdiv(channels, block_channels)
    tiles = triton.cdiv(pixels, block)
    wanted = min(max(1, PROGRAMS // programs), triton.cdiv(tiles, 4))
    span = triton.cdiv(tiles, wanted) * block
    vector = math.gcd(channels if channels_last else pixels, 8)
    return Blocks(block_channels, block, vector, warps, triton.cdiv(pixels, span), span)


@functools.lru_cache(maxsize=4096)
def tap_blocks(
    shape: Tuple[int, int, int, int], channels_last: bool, kernel: int, purpose: str, activated: bool = False
) -> Blocks:
    """Tiles of one row by channels for the kernels over taps, 128 threads each.

    With channels last a tile has at least 64 channels, one line of the cache in half precision, if there are as many,
    and otherwise at most 64 columns. Its columns are the power of two that covers a row at the least cost, where a tile
    of b columns costs b + 8: what is loaded beside it and at the ends of its lines. Loads along columns are not
    widened: the taps to the left and right are not aligned.

    Values per thread, and rows that are loaded together, are as many as registers allow: with channels last loads are
    as wide as a thread has values; otherwise each value has an address, and two of them leave room for more threads.

    Args:
        shape: (N, C, H, W).
        channels_last: The layout.
        kernel: Taps per side.
        purpose: "output", "sums" or "gradient": for which kernel. Programs that sum up go over all columns of their
            rows and over a group of samples.
        activated: Whether the output is read beside its gradient, which takes registers of its own.
    """
    samples, channels, height, width = shape
    summing = purpose == "sums"
    values = 4 if channels_last else 2
    rows_together = 2 if summing or (purpose == "gradient" and not channels_last) else 4
    if activated:
        rows_together = 1 if summing else 2
    if kernel > 3:
        values, rows_together = (1 if summing else values // 2), max(1, rows_together // 2)
    widest = 64
    if channels_last:
        widest = 128 * values // min(64, triton.next_power_of_2(channels))
    widths = [b for b in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if b <= widest and b < 2 * width]
    block = min(widths, key=lambda b: triton.cdiv(width, b) * (b + 8))
    block_channels = min(128 * values // block, triton.next_power_of_2(channels))
    warps = max(1, min(4, block_channels * block // (32 * values)))
    programs = samples * triton.cdiv(channels, block_channels)
    if not summing:
        programs *= triton.cdiv(width, block)
    # Strips of at least 8 rows: each reads the rows next to it as well.
    strips = min(max(1, PROGRAMS // programs), triton.cdiv(height, 8))
    rows = triton.cdiv(height, strips)
    group = 1
    if summing:
        # The sums of taps over small maps would be of the maps' own size if they did not go over some samples.
        group = max(1, min(2 * programs // PROGRAMS, 512 // (height * width), samples))
    return Blocks(
        channels=block_channels,
        positions=block,
        vector=math.gcd(channels, 8) if channels_last else 1,
        warps=warps,
        pieces=triton.cdiv(height, rows),
        span=rows,
        rows=rows_together,
        group=group,
        # Three or four programs of 128 threads on a multiprocessor; left alone, the compiler takes registers for two.
        registers=(168 if channels_last else 128) if summing and kernel <= 3 else None,
    )


def _dtype(input: Tensor) -> Tuple[Any, torch.dtype]:
    """What sums are taken in, for Triton and for torch."""
    if input.dtype == torch.float64:
        return tl.float64, torch.float64
    return tl.float32, torch.float32


def _is_channels_last(input: Tensor) -> bool:
    return not input.is_contiguous()


def instance_means(input: Tensor) -> Tensor:
    """Means (N, C) over H and W of a dense (N, C, H, W) tensor."""
    samples, channels, height, width = input.shape
    dtype, torch_dtype = _dtype(input)
    last = _is_channels_last(input)
    blocks = statistics_blocks((samples, channels, height, width), last)
    count = blocks.channel_blocks(channels)
    means = input.new_empty((blocks.pieces, samples, channels), dtype=torch_dtype)
    _moments_kernel[(samples * count * blocks.pieces,)](
        input,
        means,
        None,
        samples,
        channels,
        height * width,
        blocks.span,
        blocks.pieces,
        count,
        CHANNELS_LAST=last,
        VECTOR=blocks.vector,
        BLOCK_C=blocks.channels,
        BLOCK_P=blocks.positions,
        DTYPE=dtype,
        num_warps=blocks.warps,
        num_stages=1,
    )
    return means[0] if blocks.pieces == 1 else means.sum(0)


def statistics(
    input: Tensor, center_weight: Optional[Tensor], samples: int
) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Instance means (N, C), mean and biased variance (C,) of the centered features of a dense tensor.

    The fourth result holds partial sums of the similarity between the first ``samples`` samples, None for 0.
    """
    number, channels, height, width = input.shape
    pixels = height * width
    dtype, torch_dtype = _dtype(input)
    last = _is_channels_last(input)
    blocks = statistics_blocks((number, channels, height, width), last)
    count = blocks.channel_blocks(channels)
    means, squares = input.new_empty((2, blocks.pieces, number, channels), dtype=torch_dtype)
    _moments_kernel[(number * count * blocks.pieces,)](
        input,
        means,
        squares,
        number,
        channels,
        pixels,
        blocks.span,
        blocks.pieces,
        count,
        CHANNELS_LAST=last,
        VECTOR=blocks.vector,
        BLOCK_C=blocks.channels,
        BLOCK_P=blocks.positions,
        DTYPE=dtype,
        num_warps=blocks.warps,
        num_stages=1,
    )
    instance_mean = input.new_empty((number, channels), dtype=torch_dtype)
    mean, var = (input.new_empty(channels, dtype=torch_dtype) for _ in range(2))
    compared = min(number, samples)
    block_channels, block_samples = parameter_blocks(number, channels)
    channel_blocks = triton.cdiv(channels, block_channels)
    norms = input.new_empty((compared, channel_blocks), dtype=torch_dtype) if compared > 1 else None
    _combine_kernel[(channel_blocks,)](
        means,
        squares,
        center_weight,
        instance_mean,
        mean,
        var,
        norms,
        number,
        channels,
        pixels,
        blocks.span,
        blocks.pieces,
        compared,
        BLOCK_C=block_channels,
        BLOCK_N=block_samples,
        DTYPE=dtype,
        num_warps=8,
        num_stages=1,
    )
    if samples == 0:
        return instance_mean, mean, var, None
    if norms is None:
        # One sample is like itself; the rest of the slots add nothing.
        partials = torch.full((SIMILARITY_SLOTS,), 1 / SIMILARITY_SLOTS, dtype=torch_dtype, device=input.device)
        return instance_mean, mean, var, partials
    partials = input.new_empty(SIMILARITY_SLOTS, dtype=torch_dtype)
    numel = channels * pixels
    _similarity_kernel[(min(SIMILARITY_SLOTS, triton.cdiv(numel, SIMILARITY_BLOCK)),)](
        input,
        norms,
        partials,
        compared,
        numel,
        channel_blocks,
        VECTOR=math.gcd(numel, 8),
        BLOCK_S=triton.next_power_of_2(compared),
        BLOCK_N=min(64, triton.next_power_of_2(channel_blocks)),
        BLOCK=SIMILARITY_BLOCK,
        SLOTS=SIMILARITY_SLOTS,
        DTYPE=dtype,
        num_warps=4,
        num_stages=1,
    )
    return instance_mean, mean, var, partials


def parameter_blocks(samples: int, channels: int) -> Tuple[int, int]:
    """Channels and samples of a tile of the kernels over (N, C).

    8 channels in float32 are the least that memory hands out, and make programs enough of few channels; samples are as
    many as a common batch has: these kernels wait for one load after another, the fewer the better. 4 values for each
    of 256 threads.
    """
    return min(8, triton.next_power_of_2(channels)), min(128, triton.next_power_of_2(samples))


def finalize(
    mean: Tensor,
    var: Tensor,
    similarity: Optional[Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    running_similarity: Tensor,
    batches: Optional[Tensor],
    momentum: float,
    count: int,
    similarity_momentum: float,
    threshold: float,
    moving: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Moves the running state in place; returns the statistics to normalize with and the gate.

    Args:
        mean: (C,) of the batch.
        var: (C,) biased.
        similarity: Partial sums, from :func:`statistics`; None for a gate that is open always.
        running_mean: (C,) buffer.
        running_var: (C,) buffer.
        running_similarity: Scalar buffer in float32.
        batches: Scalar buffer whose reciprocal is the batch's weight; None for ``momentum``.
        momentum: Weight of the batch in the running statistics.
        count: Elements per channel.
        similarity_momentum: Weight of the batch in ``running_similarity``.
        threshold: The gate is open above it.
        moving: False to leave the buffers as they are.
    """
    channels = mean.shape[0]
    mean_used, var_used = torch.empty_like(mean), torch.empty_like(var)
    gate = torch.empty([], dtype=torch.bool, device=mean.device)
    _finalize_kernel[(1,)](
        mean,
        var,
        similarity,
        running_mean,
        running_var,
        running_similarity,
        batches,
        mean_used,
        var_used,
        gate,
        channels,
        momentum,
        count / max(count - 1, 1),
        similarity_momentum,
        threshold,
        MOVING=moving,
        SLOTS=SIMILARITY_SLOTS,
        BLOCK_C=min(1024, triton.next_power_of_2(channels)),
        DTYPE=tl.float64 if mean.dtype == torch.float64 else tl.float32,
        num_warps=4,
        num_stages=1,
    )
    return mean_used, var_used, gate


def _settings(blocks: Blocks, kernel: int, channels_last: bool, dtype: Any, eps: float) -> Dict[str, Any]:
    """What the kernels over taps are compiled for."""
    return {
        "EPS": eps,
        "KERNEL": kernel,
        "CHANNELS_LAST": channels_last,
        "VECTOR": blocks.vector,
        "BLOCK_C": blocks.channels,
        "BLOCK_W": blocks.positions,
        "ROWS": blocks.rows,
        "DTYPE": dtype,
        "num_warps": blocks.warps,
        "num_stages": 1,
        # Values in double precision take two registers.
        "maxnreg": None if dtype == tl.float64 else blocks.registers,
    }


def _kernel_size(weight: Optional[Tensor]) -> int:
    return 1 if weight is None else weight.shape[2]


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
    """:func:`functional.calibrated_affine` of a dense tensor, and a ReLU of it; parameters are contiguous."""
    parameters = (weight, bias, center_weight, scale_weight, scale_bias)
    return _affine(input, (instance_mean, mean, var, None, None, *parameters), weight, eps, relu)


def folded_affine(
    input: Tensor,
    instance_mean: Optional[Tensor],
    slope: Optional[Tensor],
    shift: Optional[Tensor],
    center: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    factor_slope: Optional[Tensor],
    factor_shift: Optional[Tensor],
    relu: bool,
) -> Tensor:
    """What :class:`inference.InferenceNorm2d` computes of a dense tensor; its constants are contiguous.

    ``instance_mean`` (N, C) is None where neither ``center`` nor ``factor_slope`` is there.
    """
    constants = (instance_mean, None, None, slope, shift, weight, bias, center, factor_slope, factor_shift)
    return _affine(input, constants, weight, 0.0, relu)


def _affine(
    input: Tensor, constants: Tuple[Optional[Tensor], ...], weight: Optional[Tensor], eps: float, relu: bool
) -> Tensor:
    """Launches the kernel; ``constants`` are its tensors between output and sizes."""
    samples, channels, height, width = input.shape
    last = _is_channels_last(input)
    kernel = _kernel_size(weight)
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
        **_settings(blocks, kernel, last, _dtype(input)[0], eps),
    )
    return output


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
        grad_output: In the layout of ``input``.
        activated: The output in that layout where it was a ReLU's, otherwise None.
        input: As in :func:`affine`, and so are those not named here.
        instance_mean: (N, C).
        mean: (C,).
        var: (C,).
        gate: Boolean scalar, or None for shut.
        weight: (C, 1, k, k) or None.
        bias: (C,) or None.
        center_weight: (C,) or None.
        scale_weight: (C,) or None.
        scale_bias: (C,) or None.
        eps: Added to the variance.
        needs_input: Whether the input's gradient is computed.
        needs_weight: Whether that of ``weight`` is.

    Returns:
        The gradients of input, weight, bias, center_weight, scale_weight and scale_bias; None where there is none.
    """
    samples, channels, height, width = input.shape
    dtype, torch_dtype = _dtype(input)
    last = _is_channels_last(input)
    kernel = _kernel_size(weight)
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
        **_settings(blocks, kernel, last, dtype, eps),
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
        **_settings(blocks, kernel, last, dtype, eps),
    )
    return grad_input, *grads
