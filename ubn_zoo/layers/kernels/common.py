"""Device functions that the kernels share: addresses, normalization, and the taps of the depthwise affine."""

# Triton compiles these functions from their source by its own rules: tuples grow in unrolled loops, and parameters have
# the types of the arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment", no-warn-unreachable

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(tiles, channel_blocks, CHANNELS_LAST: tl.constexpr):
    """Tile, channel block and sample of this program; programs that are neighbors in memory run together."""
    index = tl.program_id(0)
    if CHANNELS_LAST:
        block = index % channel_blocks
        tile = index // channel_blocks % tiles
    else:
        tile = index % tiles
        block = index // tiles % channel_blocks
    return tile, block, index // (tiles * channel_blocks)


@triton.jit
def layout_strides(channels, pixels, W, CHANNELS_LAST: tl.constexpr):
    """Strides of channels, rows and columns."""
    channel_stride, row_stride, column_stride = pixels, W, 1
    if CHANNELS_LAST:
        channel_stride, row_stride, column_stride = 1, W * channels, channels
    return channel_stride, row_stride, column_stride


@triton.jit
def normalization(sample, c, C, instance_mean, mean, var, center_weight, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Scale and shift of x_hat = scale (x + shift), and the instance mean, of channels `c`."""
    present = c < C
    average = tl.load(instance_mean + sample * C.to(tl.int64) + c, mask=present, other=0.0)
    scale = tl.rsqrt(tl.load(var + c, mask=present, other=1.0).to(DTYPE) + EPS)
    shift = -tl.load(mean + c, mask=present, other=0.0).to(DTYPE)
    if center_weight is not None:
        shift += tl.load(center_weight + c, mask=present, other=0.0).to(DTYPE) * average
    return scale, shift, average


@triton.jit
def folded_normalization(sample, c, C, instance_mean, slope, shift, center, DTYPE: tl.constexpr):
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
def calibration_factor(c, C, normalized_mean, scale_weight, scale_bias, DTYPE: tl.constexpr):
    """The calibration factor."""
    slope = tl.load(scale_weight + c, mask=c < C, other=0.0).to(DTYPE)
    logit = slope * normalized_mean + tl.load(scale_bias + c, mask=c < C, other=0.0).to(DTYPE)
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def load_taps(weight, c, C, KERNEL: tl.constexpr, FLIPPED: tl.constexpr, DTYPE: tl.constexpr):
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
def tap_columns(c, w, channels, W, KERNEL: tl.constexpr):
    """Columns of the horizontal neighbors of columns `w`, one tile per tap.

    They are unsigned, so columns left of the image become huge, and the padding of a block is set to a huge value: a
    single comparison with W, or with 0 for a row outside, gives the mask.
    """
    columns = ()
    valid = (c[:, None] < channels) & (w[None, :] < W)
    for j in tl.static_range(KERNEL):
        columns = columns + (tl.where(valid, w[None, :] + (j - KERNEL // 2), -1).to(tl.uint32),)
    return columns


@triton.jit
def row_width(W, valid):
    """W for a valid row, otherwise 0."""
    return tl.where(valid, W, 0).to(tl.uint32)


@triton.jit
def load_rows(source, first, H, W, row_stride, column_stride, columns, ROWS: tl.constexpr, KERNEL: tl.constexpr):
    """Loads ROWS rows, each once per horizontal tap; rows below the image are zeros."""
    rows = ()
    for t in tl.static_range(ROWS):
        row = source + (first + t) * row_stride
        width = row_width(W, first + t < H)
        for j in tl.static_range(KERNEL):
            mask = columns[j] < width
            rows = rows + (tl.load(row + (j - KERNEL // 2) * column_stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def tap_shifts(columns, W, shift, KERNEL: tl.constexpr):
    """The shift at every horizontal neighbor, 0 outside: x_hat is padded with zeros, not the input."""
    shifts = ()
    for j in tl.static_range(KERNEL):
        shifts = shifts + (tl.where(columns[j] < row_width(W, True), shift[:, None], 0.0),)
    return shifts
