"""The layer in eager mode: the equations of :mod:`ubn_zoo.layers.functional` with few passes over memory.

Statistics are taken by the operations that are fastest for the layout at hand, nothing of the input's size is saved
but the input itself, and the backward pass is the two-sweep closed form instead of one operation per line of the
forward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import functional as reference

__all__ = ["calibrated_affine", "feature_similarity", "moments"]


def _is_channels_last(input: Tensor) -> bool:
    return input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


@torch.no_grad()
def feature_similarity(input: Tensor, samples: int) -> Tensor:
    """:func:`functional.feature_similarity` by matrix-vector products on memory as it lies: no transposed copy."""
    n = min(input.shape[0], samples)
    if n == 1:
        return torch.ones([], dtype=reference.promote(input[:0]).dtype, device=input.device)
    # The similarity is a sum over C, H and W in any order, so the order in memory will do.
    ordered = input[:n].permute(0, 2, 3, 1) if _is_channels_last(input) else input[:n]
    vectors = reference.promote(ordered).reshape(n, -1)
    norms = torch.linalg.vector_norm(vectors, dim=1)
    present = norms > 0
    total = torch.mv(vectors.t(), torch.where(present, norms, 1.0).reciprocal())
    return (torch.dot(total, total) - present.sum()) / (n * (n - 1))


@torch.no_grad()
def moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Per-instance means (N, C) and the per-channel mean over instances (C,) of their biased variances.

    The second is all that the batch variance needs of :func:`functional.instance_moments`' variances.
    """
    values = reference.promote(input)
    count = values.numel() // values.shape[1]
    mean = values.mean((2, 3))
    if values.device.type != "cpu":
        return mean, torch.var(values, (2, 3), correction=0).mean(0)
    # On a CPU torch.var over (2, 3) takes twenty times as long as what follows.
    deviations = values - mean[:, :, None, None]
    if _is_channels_last(deviations) and deviations.dtype == torch.float32:
        # The variance over N, H and W of what has no mean left is the mean over N of the variances over H and W.
        return mean, torch.ops.aten.batch_norm_update_stats(deviations, None, None, 0.0)[1]
    squares = torch.linalg.vector_norm(deviations, dim=(2, 3)).square_()
    return mean, squares.sum(0) / count


def _instance_sum(input: Tensor) -> Tensor:
    return input.sum((2, 3), dtype=torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else None)


def _broadcast(values: Tensor) -> Tensor:
    return values[..., None, None]


class _CalibratedAffine(torch.autograd.Function):
    """Steps 3 to 6, differentiated through the batch statistics where the gate is open.

    ``mean`` and ``var`` are the statistics to normalise with, as constants; ``gate`` says how much of them was
    computed from this very batch (1: batch statistics, 0: running ones; None: running ones, known beforehand).
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center_weight: Tensor | None,
        scale_weight: Tensor | None,
        scale_bias: Tensor | None,
        instance_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        gate: Tensor | None,
        eps: float,
    ) -> Tensor:
        normalized, normalized_mean, _ = _normalize(input, center_weight, instance_mean, mean, var, eps)
        factor = _factor(scale_weight, scale_bias, normalized_mean)
        if weight is None:
            output = normalized
        elif weight.shape[2] == 1:
            output = normalized.mul_(weight[:, 0].to(input.dtype))
            if bias is not None:
                output = output.add_(_broadcast(bias).to(input.dtype))
        else:
            output = torch.conv2d(
                normalized,
                weight.to(input.dtype),
                None if bias is None else bias.to(input.dtype),
                padding=weight.shape[2] // 2,
                groups=weight.shape[0],
            )
        return output if factor is None else output.mul_(_broadcast(factor).to(input.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = cast("tuple[Any, ...]", ctx.saved_tensors)
        if torch.is_grad_enabled():
            return _differentiable_backward(saved, ctx.eps, ctx.needs_input_grad, grad_output)
        input, weight, bias, center_weight, scale_weight, scale_bias, instance_mean, mean, var, gate = saved
        pixels = input.shape[2] * input.shape[3]
        count = input.shape[0] * pixels

        normalized, normalized_mean, scale = _normalize(input, center_weight, instance_mean, mean, var, ctx.eps)
        factor = _factor(scale_weight, scale_bias, normalized_mean)
        # From here on "grad" is the gradient of the loss with respect to what the calibration factor multiplies ...
        grad = grad_output if factor is None else grad_output * _broadcast(factor).to(grad_output.dtype)
        grad_sum = _instance_sum(grad)
        grad_weight = grad_bias = grad_scale_weight = grad_scale_bias = grad_center_weight = None
        if bias is not None:
            grad_bias = grad_sum.sum(0).to(bias.dtype)
        # ... and then with respect to the normalised features, by way of the affine alone.
        if weight is None:
            projection = _instance_sum(grad * normalized)
        elif weight.shape[2] == 1:
            taps = weight[:, 0, 0, 0].to(grad_sum.dtype)
            products = _instance_sum(grad * normalized)
            grad_weight = products.sum(0).to(weight.dtype)[:, None, None, None]
            projection = products * taps
            grad_sum_of_normalized = grad_sum * taps
            grad = grad * weight[:, 0].to(grad.dtype)
        else:
            grad, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad,
                normalized,
                weight.to(input.dtype),
                None,
                (1, 1),
                (weight.shape[2] // 2,) * 2,
                (1, 1),
                False,
                (0, 0),
                weight.shape[0],
                (True, ctx.needs_input_grad[1], False),
            )
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            projection = _instance_sum(grad * normalized)
            grad_sum_of_normalized = _instance_sum(grad)
        if weight is None:
            grad_sum_of_normalized = grad_sum

        # What the instance means of the normalised features receive through the calibration factor.
        total, moment = grad_sum_of_normalized, projection
        through_mean = None
        if factor is not None:
            logits = projection if bias is None else projection + bias.to(projection.dtype) * grad_sum
            logits = (1 - factor) * logits
            grad_scale_bias = logits.sum(0).to(scale_bias.dtype)
            grad_scale_weight = (logits * normalized_mean).sum(0).to(scale_weight.dtype)
            through_mean = scale_weight.to(logits.dtype) * logits
            total = total + through_mean
            moment = moment + through_mean * normalized_mean

        # Through the batch statistics, where the gate is open: BatchNorm's two correction terms.
        offset = torch.zeros_like(normalized_mean) if through_mean is None else through_mean / pixels
        instance_grad = total
        slope = None
        if gate is not None:
            opened = gate.to(total.dtype)
            mean_total = opened * total.sum(0) / count
            slope = -opened * moment.sum(0) / count
            offset = offset - mean_total
            instance_grad = total - pixels * (mean_total - slope * normalized_mean)
        instance_grad = scale * instance_grad
        offset = scale * offset
        if center_weight is not None:
            # Through batch statistics instance_grad sums to exactly 0: taking the mean off first keeps a large one from
            # blowing up rounding errors.
            centre = instance_mean.mean(0)
            grad_center_weight = ((instance_mean - centre) * instance_grad).sum(0)
            closed = 1.0 if gate is None else 1 - gate.to(centre.dtype)
            grad_center_weight = (grad_center_weight + closed * centre * instance_grad.sum(0)).to(center_weight.dtype)
            offset = offset + center_weight.to(offset.dtype) * instance_grad / pixels

        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = torch.addcmul(_broadcast(offset), grad, _broadcast(scale))
            if slope is not None:
                grad_input = grad_input.addcmul_(normalized, _broadcast(scale * slope))
            grad_input = grad_input.to(input.dtype)
        gradients = (grad_input, grad_weight, grad_bias, grad_center_weight, grad_scale_weight, grad_scale_bias)
        return (*gradients, None, None, None, None, None)


def _normalize(
    input: Tensor, center_weight: Tensor | None, instance_mean: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised features (input's dtype and layout), their mean per instance, and the scale per channel."""
    scale = torch.rsqrt(var + eps)
    shift = -mean
    if center_weight is not None:
        shift = torch.addcmul(shift, center_weight.to(mean.dtype), instance_mean)
    offset = (shift * scale).expand(instance_mean.shape)
    # Allocated first: the layout of the result would otherwise follow the broadcast operands where N, C, H or W is 1.
    normalized = torch.empty_like(input)
    torch.addcmul(_broadcast(offset), input, _broadcast(scale), out=normalized)
    return normalized, torch.addcmul(offset, instance_mean, scale), scale


def _factor(scale_weight: Tensor | None, scale_bias: Tensor | None, normalized_mean: Tensor) -> Tensor | None:
    if scale_weight is None or scale_bias is None:
        return None
    dtype = normalized_mean.dtype
    return torch.addcmul(scale_bias.to(dtype), scale_weight.to(dtype), normalized_mean).sigmoid_()


def _differentiable_backward(
    saved: tuple[Any, ...], eps: float, needs_grad: tuple[bool, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function (``create_graph=True``), through the reference."""
    input, weight, bias, center_weight, scale_weight, scale_bias, _, mean, var, gate = saved
    instance_mean, instance_var = reference.instance_moments(input)
    if gate is not None:
        batch_mean, batch_var = reference.batch_statistics(instance_mean, instance_var, center_weight)
        # Where the gate is open these equal `mean` and `var`, with their dependence on the input.
        mean = torch.where(gate > 0, batch_mean, mean)
        var = torch.where(gate > 0, batch_var, var)
    output = reference.calibrated_affine(
        input, instance_mean, mean, var, weight, bias, center_weight, scale_weight, scale_bias, eps
    )
    sources = [tensor for tensor, needed in zip(saved, needs_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(output, sources, grad_output, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in needs_grad)


def calibrated_affine(
    input: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """:func:`functional.calibrated_affine` for constant statistics, differentiable through them where ``gate`` is open.

    Args:
        input: (N, C, H, W), not empty.
        instance_mean: (N, C), without gradient.
        mean: (C,) statistics to normalise with, without gradient.
        var: (C,) likewise.
        gate: Boolean scalar: whether ``mean`` and ``var`` are those of this batch. None: they are not.
        weight: (C, 1, k, k) or None; the other parameters as in :func:`functional.calibrated_affine`.
        bias: (C,) or None.
        center_weight: (C,) or None.
        scale_weight: (C,) or None.
        scale_bias: (C,) or None.
        eps: Added to the variance.

    Returns:
        (N, C, H, W) in the dtype and layout of ``input``.
    """
    return cast(
        Tensor,
        _CalibratedAffine.apply(
            input, weight, bias, center_weight, scale_weight, scale_bias, instance_mean, mean, var, gate, eps
        ),
    )
