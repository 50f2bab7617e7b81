"""The affine of norms that were prepared for inference by :func:`ubn_zoo.layers.fusion.fuse`."""

from __future__ import annotations

from torch import Tensor

from .forward import launch_affine

__all__ = ["folded_affine"]


def folded_affine(
    input: Tensor,
    instance_mean: Tensor | None,
    slope: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor_slope: Tensor | None,
    factor_shift: Tensor | None,
    relu: bool,
) -> Tensor:
    """The forward of :class:`ubn_zoo.layers.fusion.InferenceNorm2d` for a dense tensor and contiguous constants.

    ``instance_mean`` (N, C) may be None if both ``center`` and ``factor_slope`` are.
    """
    constants = (instance_mean, None, None, slope, shift, weight, bias, center, factor_slope, factor_shift)
    return launch_affine(input, constants, weight, 0.0, relu)
