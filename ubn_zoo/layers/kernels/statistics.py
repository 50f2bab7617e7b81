"""Statistics of a batch, the similarity of its samples, and the running state."""

# Triton compiles these functions from their source by its own rules: tuples grow in unrolled loops, and parameters have
# the types of the arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment", no-warn-unreachable

from __future__ import annotations

import math
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import layout_strides, program_tile
from .launching import (
    SIMILARITY_BLOCK,
    SIMILARITY_SLOTS,
    is_channels_last,
    parameter_blocks,
    statistics_blocks,
    sum_dtype,
)

__all__ = ["finalize", "instance_means", "statistics"]


@triton.jit
def _merged(mean, m2, count, AXIS: tl.constexpr):
    """Mean, sum of squared deviations and count of all lanes along an axis, by Chan's formula."""
    total = tl.sum(count, AXIS)
    # Relative to one of the means, so that a large common mean does not round away their differences.
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
    squares,  # (splits, N, C) sums of squared deviations; None to write shares of the means to `means`
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
    split, block, sample = program_tile(splits, channel_blocks, CHANNELS_LAST)
    channels, positions = C, pixels
    if CHANNELS_LAST:
        channels = C // VECTOR * VECTOR
    else:
        positions = pixels // VECTOR * VECTOR
    channel_stride, _, position_stride = layout_strides(channels, positions, 1, CHANNELS_LAST)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_P)
    # A span is a multiple of the block; this hint lets the compiler widen loads.
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
        # Every lane has its own mean and deviations, which are merged at the end.
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
    # The programs also clear the slots beyond their number.
    slot = tl.arange(0, SLOTS)
    values = tl.where(slot == index, result / pairs, 0.0)
    tl.store(partials + slot, values, mask=slot % tl.num_programs(0) == index)


@triton.jit(do_not_specialize=["C"])
def _finalize_kernel(
    mean,  # (C,)
    var,  # (C,)
    similarity,  # (SLOTS,) partial sums; None for a gate that is always open
    running_mean,
    running_var,
    running_similarity,
    batches,
    mean_used,  # (C,) results
    var_used,
    gate,
    C,
    momentum: tl.float64,
    correction: tl.float64,
    similarity_momentum: tl.float64,
    threshold: tl.float64,
    MOVING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    opened = tl.full([BLOCK_C], 1.0, tl.float32) > 0
    # Factors are in double precision, as buffers may be.
    unbiased = tl.full([BLOCK_C], correction, tl.float64)
    weight = tl.full([BLOCK_C], momentum, tl.float64)
    infinite = tl.zeros([BLOCK_C], tl.int32)
    if MOVING:
        for start in tl.range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            valid = c < C
            new_mean = tl.load(mean + c, mask=valid, other=0.0).to(running_mean.dtype.element_ty)
            new_var = (tl.load(var + c, mask=valid, other=0.0) * unbiased).to(running_var.dtype.element_ty)
            # Comparisons with NaN are false.
            finite = (tl.abs(new_mean) < float("inf")) & (tl.abs(new_var) < float("inf"))
            infinite = tl.maximum(infinite, tl.where(finite, 0, 1))
    skipped = tl.max(infinite, 0)
    if similarity is not None:
        found = tl.sum(tl.load(similarity + tl.arange(0, SLOTS)).to(tl.float32), 0)
        before = tl.load(running_similarity)
        after = before
        if MOVING:
            skipped = tl.where(tl.abs(found) < float("inf"), skipped, 1)
            after = (before + similarity_momentum * (found - before)).to(tl.float32)
            after = tl.where(skipped == 0, after, before)
            # All threads must read it before any of them writes.
            tl.debug_barrier()
            tl.store(running_similarity, after)
        opened = tl.zeros([BLOCK_C], tl.float32) + after > threshold
    tl.store(gate, tl.max(opened.to(tl.int32), 0) > 0)
    if MOVING:
        number = tl.load(batches) + tl.where(skipped == 0, 1, 0)
        tl.debug_barrier()
        tl.store(batches, number)
        if CUMULATIVE:
            # The count is still 0 if the first batch was not finite.
            weight = tl.full([BLOCK_C], 1.0, tl.float64) / tl.maximum(number, 1).to(tl.float64)
    moves = opened & (tl.zeros([BLOCK_C], tl.int32) + skipped == 0)
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
            # Behind a closed gate the buffers stay bitwise unchanged, whatever the batch contains.
            tl.store(running_mean + c, new_mean.to(old_mean.dtype), mask=valid & moves)
            tl.store(running_var + c, new_var.to(old_var.dtype), mask=valid & moves)


def instance_means(input: Tensor) -> Tensor:
    """Means (N, C) over H and W of a dense (N, C, H, W) tensor."""
    samples, channels, height, width = input.shape
    dtype, torch_dtype = sum_dtype(input)
    last = is_channels_last(input)
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

    The fourth result holds partial sums of the similarity of the first ``samples`` samples; None if that is 0.
    """
    number, channels, height, width = input.shape
    pixels = height * width
    dtype, torch_dtype = sum_dtype(input)
    last = is_channels_last(input)
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
        # A single sample has similarity 1, spread over the slots.
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


def finalize(
    mean: Tensor,
    var: Tensor,
    similarity: Optional[Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    running_similarity: Tensor,
    batches: Tensor,
    momentum: Optional[float],
    count: int,
    similarity_momentum: float,
    threshold: float,
    moving: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Updates the state in place; returns the statistics to normalize with and the gate.

    All tensors are contiguous.

    Args:
        mean: (C,) of the batch.
        var: (C,) biased.
        similarity: Partial sums, from :func:`statistics`; None for a gate that is always open.
        running_mean: (C,) buffer.
        running_var: (C,) buffer.
        running_similarity: Scalar buffer in float32.
        batches: Integer scalar buffer.
        momentum: Weight of the batch in the running statistics; None for a cumulative average.
        count: Elements per channel.
        similarity_momentum: Weight of the batch in ``running_similarity``.
        threshold: The gate is open above it.
        moving: False to leave the buffers unchanged.
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
        0.0 if momentum is None else momentum,
        count / max(count - 1, 1),
        similarity_momentum,
        threshold,
        MOVING=moving,
        CUMULATIVE=momentum is None,
        SLOTS=SIMILARITY_SLOTS,
        BLOCK_C=min(1024, triton.next_power_of_2(channels)),
        DTYPE=tl.float64 if mean.dtype == torch.float64 else tl.float32,
        num_warps=4,
        num_stages=1,
    )
    return mean_used, var_used, gate
