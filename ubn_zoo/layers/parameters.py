"""The learned parameters and the buffers of a layer, as named tuples that implementations take as one argument.

A new learned parameter is a new field of :class:`Parameters`, used in :mod:`.functional`, :mod:`.autograd` and the
kernels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["CALIBRATIONS", "Parameters", "State"]

# Initial values of the calibrations.
CALIBRATIONS = {"center_weight": 0.0, "scale_weight": 0.0, "scale_bias": 1.0}


class Parameters(NamedTuple):
    """The learned parameters of a layer; None for a part that is switched off."""

    weight: Tensor | None  # (C, 1, k, k)
    bias: Tensor | None  # (C,)
    center_weight: Tensor | None  # (C,)
    scale_weight: Tensor | None  # (C,)
    scale_bias: Tensor | None  # (C,)


class State(NamedTuple):
    """The buffers of a layer that tracks statistics."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    similarity: Tensor  # scalar
    batches: Tensor  # integer scalar
