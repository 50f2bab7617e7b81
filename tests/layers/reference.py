"""An independent implementation of the equations of Unified Batch Normalization (arXiv 2311.15993), for the tests.

Everything is float64 and written out: cosines pair by pair, centered variances, the calibrated features in full, the
depthwise convolution as a padded sum over its taps. It shares no code with `ubn_zoo`, so the two agree only if both are
right. Autograd differentiates everything except the similarity, which has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """The constants of the layer."""

    eps: float = 1e-5
    momentum: float | None = 0.1
    threshold: float | None = 0.15
    similarity_momentum: float = 0.1
    similarity_samples: int = 16


@dataclass(frozen=True)
class Parameters:
    """The learned parameters; None for a part that is switched off."""

    weight: Tensor | None = None  # (C, 1, k, k)
    bias: Tensor | None = None  # (C,)
    center_weight: Tensor | None = None  # (C,)
    scale_weight: Tensor | None = None  # (C,)
    scale_bias: Tensor | None = None  # (C,)

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and values of the parameters that are not None."""
        return [(name, value) for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class State:
    """The buffers. `running_mean` and `running_var` are None where no statistics are tracked."""

    running_mean: Tensor | None  # (C,)
    running_var: Tensor | None  # (C,)
    num_batches_tracked: int = 0
    feature_similarity: float = 1.0


@dataclass(frozen=True)
class Result:
    """One forward and backward pass: output, gradients, the state afterwards and the side of the gate taken."""

    y: Tensor
    grad_x: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)
    state: State | None = None
    gate: bool = True


def per_channel(v: Tensor) -> Tensor:
    return v.reshape(1, -1, 1, 1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two flattened samples; a sample of zero norm has cosine 0 with all."""
    norms = a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt()
    return 0.0 if norms == 0 else float((a * b).sum() / norms)


def similarity(x: Tensor, samples: int = 16) -> float:
    """Mean cosine over all pairs of different samples among the first `samples`; 1 for a single sample."""
    rows = [row.reshape(-1) for row in x.detach().double()[:samples]]
    if len(rows) == 1:
        return 1.0
    pairs = [cosine(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return sum(pairs) / len(pairs)


def depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution with zero padding (k - 1) / 2, tap by tap."""
    k = kernel.shape[-1]
    half = (k - 1) // 2
    height, width = x.shape[2:]
    padded = F.pad(x, (half, half, half, half))
    out = torch.zeros_like(x)
    for i in range(k):
        for j in range(k):
            out = out + per_channel(kernel[:, 0, i, j]) * padded[:, :, i : i + height, j : j + width]
    return out


def forward(
    x: Tensor, parameters: Parameters, state: State, settings: Settings, training: bool
) -> tuple[Tensor, State, bool]:
    """One pass of the layer.

    Returns:
        The output, the state after the pass, and whether batch statistics were used.
    """
    tracked = state.running_mean is not None
    gate = not tracked
    if training:
        s = similarity(x, settings.similarity_samples)
        r = (1 - settings.similarity_momentum) * state.feature_similarity + settings.similarity_momentum * s
        gate = gate or settings.threshold is None or r > settings.threshold
        state = replace(state, feature_similarity=r, num_batches_tracked=state.num_batches_tracked + 1)

    centered = x
    if parameters.center_weight is not None:
        centered = x + per_channel(parameters.center_weight) * x.mean(dim=(2, 3), keepdim=True)

    if gate:
        mean = centered.mean(dim=(0, 2, 3))
        deviations = centered - per_channel(mean)
        var = deviations.pow(2).mean(dim=(0, 2, 3))
    else:
        mean, var = state.running_mean, state.running_var
    normalized = (centered - per_channel(mean)) / (per_channel(var) + settings.eps).sqrt()

    if training and gate and tracked:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        factor = 1.0 / state.num_batches_tracked if settings.momentum is None else settings.momentum
        state = replace(
            state,
            running_mean=(1 - factor) * state.running_mean + factor * mean.detach(),
            running_var=(1 - factor) * state.running_var + factor * var.detach() * count / (count - 1),
        )

    if parameters.weight is not None:
        affine = depthwise(normalized, parameters.weight)
        if parameters.bias is not None:
            affine = affine + per_channel(parameters.bias)
    else:
        affine = normalized
    if parameters.scale_weight is not None:
        pooled = normalized.mean(dim=(2, 3), keepdim=True)
        gain = torch.sigmoid(per_channel(parameters.scale_weight) * pooled + per_channel(parameters.scale_bias))
        affine = gain * affine
    return affine, state, gate


def run(
    x: Tensor,
    grad_y: Tensor,
    parameters: Parameters,
    state: State,
    settings: Settings | None = None,
    training: bool = True,
) -> Result:
    """Forward and backward of the layer on float64 copies of the arguments.

    Args:
        x: Input (N, C, H, W) of any dtype; its values are used as they are.
        grad_y: Gradient of the output.
        parameters: Parameters, which are copied.
        state: State before the pass.
        settings: The layer's constants; its defaults if None.
        training: Whether the layer is in training mode.
    """
    x = x.detach().double().contiguous().requires_grad_()
    leaves = Parameters(**{name: value.detach().double().requires_grad_() for name, value in parameters.items()})
    y, state, gate = forward(x, leaves, state, settings or Settings(), training)
    named = leaves.items()
    wanted = [x, *(value for _, value in named)]
    grads = torch.autograd.grad(y, wanted, grad_y.detach().double().contiguous(), materialize_grads=True)
    return Result(y.detach(), grads[0], dict(zip([name for name, _ in named], grads[1:], strict=True)), state, gate)


def parameters_of(layer: torch.nn.Module) -> Parameters:
    """Float64 copies of a UBN layer's parameters, a per-channel weight seen as a kernel of one tap."""
    found: dict[str, Tensor] = {}
    for name in ("weight", "bias", "center_weight", "scale_weight", "scale_bias"):
        value = getattr(layer, name)
        if value is not None:
            found[name] = value.detach().double().clone()
    if "weight" in found and found["weight"].ndim == 1:
        found["weight"] = found["weight"].reshape(-1, 1, 1, 1)
    return Parameters(**found)


def state_of(layer: torch.nn.Module) -> State:
    """The current state of a UBN layer."""
    if layer.running_mean is None:
        return State(None, None)
    return State(
        layer.running_mean.detach().double().clone(),
        layer.running_var.detach().double().clone(),
        int(layer.num_batches_tracked),
        float(layer.feature_similarity),
    )


def settings_of(layer: torch.nn.Module) -> Settings:
    """The constants of a UBN layer."""
    return Settings(
        eps=layer.eps,
        momentum=layer.momentum,
        threshold=layer.threshold,
        similarity_momentum=layer.similarity_momentum,
        similarity_samples=layer.similarity_samples,
    )


def run_like(layer: torch.nn.Module, x: Tensor, grad_y: Tensor) -> Result:
    """The expected results of `layer` on `x` in its current mode; its state stays unchanged."""
    return run(x, grad_y, parameters_of(layer), state_of(layer), settings_of(layer), layer.training)
