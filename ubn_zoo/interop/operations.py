"""Operation counts of UBN layers, for FLOP counters that look up layers by class."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ubn_zoo.layers import UnifiedBatchNorm2d

__all__ = ["multiply_adds"]


def multiply_adds(layer: UnifiedBatchNorm2d, input: Tensor) -> int:
    """Counts the multiply-accumulate operations of a UBN layer in evaluation, each of which is two FLOPs.

    Per element: one for the instance means where a calibration needs them, one to normalize, one for each tap of the
    affine, and one for the scaling calibration. Computations per channel are not counted.

    Args:
        layer: The layer.
        input: Its input, (N, C, H, W); only the shape matters.
    """
    calibrated = layer.center_weight is not None or layer.scale_weight is not None
    taps = 0 if layer.weight is None else layer.kernel_size**2
    return input.numel() * (calibrated + 1 + taps + (layer.scale_weight is not None))


def thop_handler(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Counts a layer for thop."""
    layer.total_ops += multiply_adds(layer, inputs[0])


def ptflops_handler(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Counts a layer for ptflops, whose unit is the multiply-accumulate operation."""
    layer.__flops__ += multiply_adds(layer, inputs[0])


def calflops_handler(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Counts a layer for calflops."""
    layer.__flops__ += 2 * multiply_adds(layer, inputs[0])
    layer.__macs__ += multiply_adds(layer, inputs[0])
