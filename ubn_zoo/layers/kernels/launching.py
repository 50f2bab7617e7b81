"""Launch configurations: how tensors are split into programs, and the compile-time arguments of kernels."""

from __future__ import annotations

import functools
import math
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots for partial sums of the similarity: enough programs to read at the full memory bandwidth.
SIMILARITY_SLOTS = 512
# Positions of one program of the similarity: 16 per thread.
SIMILARITY_BLOCK = 2048
# Programs that keep the largest GPUs busy: 132 multiprocessors with 8 programs of 128 threads each, two rounds.
PROGRAMS = 2112


class Blocks(NamedTuple):
    """How a tensor is split into programs."""

    channels: int  # channels per tile
    positions: int  # positions per tile; columns of one row in the kernels with taps
    vector: int  # power of two, at most 8, that divides the contiguous size
    warps: int
    pieces: int  # parts of the positions, or strips of rows
    span: int  # positions, or rows, per part
    rows: int = 1  # rows loaded together
    group: int = 1  # samples that one program sums over
    registers: Optional[int] = None  # limit per thread

    def channel_blocks(self, channels: int) -> int:
        """Number of tiles that cover the channels."""
        return triton.cdiv(channels, self.channels)

    def column_blocks(self, columns: int) -> int:
        """Number of tiles that cover a row."""
        return triton.cdiv(columns, self.positions)


# Cached because a network launches the same shapes repeatedly, and a launch itself takes only microseconds.
@functools.lru_cache(maxsize=4096)
def statistics_blocks(shape: Tuple[int, int, int, int], channels_last: bool) -> Blocks:
    """Tiles of 1024 values, 8 for each of 128 threads: one load of 16 bytes in half precision.

    Rows of a tile are 256 positions, the load of one warp, or 64 channels, a cache line in half precision. If samples
    and channels give few programs, positions are split into parts of at least four tiles; smaller parts would spend
    their time on merging.
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
    """Tiles of one row by channels for the kernels with taps, 128 threads each.

    With channels last a tile has at least 64 channels (a cache line in half precision) if the tensor has as many;
    otherwise at most 64 columns. The number of columns is the power of two that covers a row at the least cost, where a
    tile of b columns costs b + 8, because it loads neighbors and partly used cache lines. Loads along columns are not
    widened: the taps to the left and right are not aligned.

    Registers limit the values per thread and the rows loaded together. With channels last one load has all
    values of a thread; otherwise each value needs an address, and two values leave room for more threads.

    Args:
        shape: (N, C, H, W).
        channels_last: The memory format.
        kernel: Taps per side.
        purpose: The kernel: "output", "sums" or "gradient". Programs of "sums" cover all columns of their rows and a
            group of samples.
        activated: Whether the kernel also reads the output, which takes registers.
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
    # Strips have at least 8 rows, because each also reads the adjacent rows.
    strips = min(max(1, PROGRAMS // programs), triton.cdiv(height, 8))
    rows = triton.cdiv(height, strips)
    group = 1
    if summing:
        # Without groups of samples the tap sums of small maps would be as large as the maps.
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
        # Allows three or four programs of 128 threads per multiprocessor; without a limit the compiler allows two.
        registers=(168 if channels_last else 128) if summing and kernel <= 3 else None,
    )


def sum_dtype(input: Tensor) -> Tuple[Any, torch.dtype]:
    """The precision of sums over a tensor, as Triton's and as torch's dtype."""
    if input.dtype == torch.float64:
        return tl.float64, torch.float64
    return tl.float32, torch.float32


def is_channels_last(input: Tensor) -> bool:
    """Whether a dense tensor has its channels last."""
    return not input.is_contiguous()


def parameter_blocks(samples: int, channels: int) -> Tuple[int, int]:
    """Channels and samples of a tile of the kernels over (N, C).

    8 channels in float32 are the smallest memory transaction, and give enough programs even for few channels. A tile
    covers a typical batch, because these kernels wait for each load in turn. 4 values for each of 256 threads.
    """
    return min(8, triton.next_power_of_2(channels)), min(128, triton.next_power_of_2(samples))


def tap_settings(blocks: Blocks, kernel: int, channels_last: bool, dtype: Any, eps: float) -> Dict[str, Any]:
    """Compile-time arguments of the kernels with depthwise taps."""
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


def kernel_size_of(weight: Optional[Tensor]) -> int:
    """Taps per side of a depthwise kernel; 1 where there is none."""
    return 1 if weight is None else weight.shape[2]
