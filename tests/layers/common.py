"""Helpers for the layer's tests: layers with random parameters and statistics, and comparisons with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ubn_zoo
from ubn_zoo.layers import functional

from . import reference
from .tolerances import OUTPUT, SIMILARITY, STATISTICS, assert_gradient

PARAMETERS = ("weight", "bias", "center_weight", "scale_weight", "scale_bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "feature_similarity")

# Values of `feature_similarity` so far from the threshold of 0.15 that no single batch can cross it.
OPEN = 1.0  # batch statistics are used
SHUT = -1.0  # running statistics are used


class ThroughFunctional(ubn_zoo.UnifiedBatchNorm2d):
    """The layer computed by the plain-torch equations, which compiled, scripted and exported graphs contain."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.unified_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.feature_similarity,
            self.num_batches_tracked,
            *(getattr(self, name) for name in PARAMETERS),
            self.training,
            self.momentum,
            self.eps,
            self.threshold,
            self.similarity_momentum,
            self.similarity_samples,
        )


# Both ways to compute the layer.
PATHS = [ubn_zoo.UnifiedBatchNorm2d, ThroughFunctional]


def make_layer(
    num_features: int = 3,
    *,
    seed: int = 0,
    gate: float = OPEN,
    cls: Callable[..., nn.Module] | None = None,
    **settings: Any,
) -> nn.Module:
    """A UBN layer with random parameters and statistics, and an open or a closed gate."""
    layer = (cls or ubn_zoo.UnifiedBatchNorm2d)(num_features, **settings)
    return randomize(layer, seed, gate)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, gate: float = OPEN) -> nn.Module:
    """Gives every UBN layer in `model` random parameters and statistics, in place."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, mean: float, deviation: float) -> None:
        if tensor is not None:
            tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    for layer in ubn_layers(model):
        fill(layer.weight, 0.0, 0.6)
        if layer.weight is not None and layer.weight.ndim == 4:
            middle = layer.weight.shape[-1] // 2
            layer.weight[:, 0, middle, middle] += 1.0
        fill(layer.bias, 0.0, 0.4)
        fill(layer.center_weight, 0.0, 0.4)
        fill(layer.scale_weight, 0.0, 0.5)
        fill(layer.scale_bias, 1.0, 0.4)
        fill(layer.running_mean, 0.0, 0.4)
        if layer.running_var is not None:
            uniform = torch.rand(layer.running_var.shape, generator=generator, dtype=torch.float64)
            layer.running_var.copy_(0.5 + uniform)
        if layer.feature_similarity is not None:
            layer.feature_similarity.fill_(gate)
    return model


def ubn_layers(model: nn.Module) -> list[nn.Module]:
    """All UBN layers of a model, each once."""
    kinds = (ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d)
    return [module for module in model.modules() if isinstance(module, kinds)]


def random_input(
    shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64, shared: float = 0.7
) -> tuple[Tensor, Tensor]:
    """An input whose samples are as similar as `shared` specifies, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1000 + seed)
    own = torch.randn(shape, generator=generator, dtype=torch.float64)
    common = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    grad_y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (0.3 + own + shared * common).to(dtype), grad_y.to(dtype)


def step(layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """Runs forward and backward; returns the output and the input's gradient, and renews parameter gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad_y.to(y.dtype))
    return y.detach(), x.grad


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameter gradients that exist."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_state(layer: nn.Module, expected: reference.State, dtype: torch.dtype = torch.float64) -> None:
    """Compares a layer's buffers with the reference's state."""
    tolerance = STATISTICS[dtype].kwargs()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(layer, name).double(),
            getattr(expected, name),
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert int(layer.num_batches_tracked) == expected.num_batches_tracked
    if layer.threshold is None:
        return  # the similarity has no effect here, and the method does not specify whether it is tracked
    torch.testing.assert_close(
        layer.feature_similarity.double(),
        torch.tensor(expected.feature_similarity, dtype=torch.float64),
        rtol=SIMILARITY.rtol,
        atol=SIMILARITY.atol,
        check_device=False,
        msg=lambda text: f"feature_similarity: {text}",
    )


def assert_step(layer: nn.Module, x: Tensor, grad_y: Tensor, dtype: torch.dtype | None = None) -> reference.Result:
    """Compares every result of one step of `layer` on `x` with the reference; returns the reference's result."""
    expected = reference.run_like(layer, x, grad_y)
    assert_results(layer, *step(layer, x, grad_y), expected, dtype or x.dtype)
    return expected


def assert_results(layer: nn.Module, y: Tensor, grad_x: Tensor, expected: reference.Result, dtype: torch.dtype) -> None:
    """Compares a step's output, input gradient, parameter gradients and new state with the reference."""
    torch.testing.assert_close(y.double(), expected.y, **OUTPUT[dtype].kwargs(), check_stride=False)
    assert_gradient(grad_x, expected.grad_x, dtype, "x")
    for name, value in expected.grads.items():
        grad = getattr(layer, name).grad
        assert grad is not None, f"{name} received no gradient"
        assert_gradient(grad.reshape(value.shape), value, dtype, name)
    if expected.state is not None and expected.state.running_mean is not None:
        assert_state(layer, expected.state, dtype)
