"""Tolerances of the layer's tests per dtype, with the reason for each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Tolerances in the form that `torch.testing.assert_close` takes."""

    rtol: float
    atol: float

    def kwargs(self) -> dict[str, float]:
        return {"rtol": self.rtol, "atol": self.atol}


# Outputs, inputs of the order of 1.
OUTPUT = {
    # Agreement of two float64 computations in different order; sums of some hundred terms.
    torch.float64: Tolerance(1e-9, 1e-10),
    # Epsilon 1.2e-7, some ten roundings per value, differences of near numbers when centering.
    torch.float32: Tolerance(1e-4, 2e-5),
    # Epsilon 9.8e-4: input and parameters are given in float16, the result is rounded to it once more, and the
    # depthwise sum over up to 25 taps may cancel.
    torch.float16: Tolerance(4e-3, 6e-3),
    # Epsilon 7.8e-3, otherwise as float16.
    torch.bfloat16: Tolerance(2e-2, 5e-2),
}

# Gradients: sums over the whole batch of products of values, so errors are taken relative to the largest of them
# (`assert_gradient` below), which the smaller ones are differences of.
GRADIENT = {
    torch.float64: Tolerance(1e-9, 1e-10),
    torch.float32: Tolerance(1e-4, 1e-4),
    # The output is rounded once before the gradient reaches it, and each reduction ends in the low precision.
    torch.float16: Tolerance(1e-2, 1e-2),
    torch.bfloat16: Tolerance(4e-2, 4e-2),
}

# Running statistics and similarity: float32 whatever the input's dtype, so only its rounding of the input is lost,
# and that is shared with the reference. Float64 layers keep the similarity in float32, hence its own entry.
STATISTICS = {
    torch.float64: Tolerance(1e-9, 1e-10),
    torch.float32: Tolerance(2e-5, 2e-6),
    torch.float16: Tolerance(2e-5, 2e-6),
    torch.bfloat16: Tolerance(2e-5, 2e-6),
}
SIMILARITY = Tolerance(0.0, 2e-6)

# For the golden values: the accuracy that the project guarantees.
GOLDEN = Tolerance(1e-6, 1e-6)

# Exported graphs and other runtimes in float32, logits of the order of 1: the accuracy that the project guarantees.
EXPORTED = Tolerance(1e-4, 1e-4)


def assert_gradient(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Compares a gradient with the float64 reference's, relative to its largest entry.

    Args:
        actual: The computed gradient.
        expected: The reference's, in float64.
        dtype: The dtype of the layer's computation, which selects the tolerance.
        name: Name of the differentiated tensor, for the message.
    """
    tolerance = GRADIENT[dtype]
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=tolerance.rtol,
        atol=tolerance.atol * scale,
        check_stride=False,
        msg=lambda text: f"gradient of {name}: {text}",
    )
