"""The layer in eager mode: the equations of :mod:`ubn_zoo.layers.functional` with few passes over memory.

Statistics are taken by the operations that are fastest for the layout at hand, nothing of the input's size is saved
but the input itself, and the backward pass is the two-sweep closed form instead of one operation per line of the
forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import functional as reference

__all__ = ["calibrated_affine", "feature_similarity", "moments"]


# Bytes of input that a CPU works on at a time: a share of its cache, as a chunk's intermediate results lie beside it.
_CHUNK = 2 << 20


def _chunks(input: Tensor) -> list[slice]:
    """The samples of a batch, in runs that are small enough to stay in a CPU's cache from one operation to the next.

    Elementwise operations, sums and depthwise convolutions are bound by memory; so is their allocation, where a large
    result gets fresh pages from the system each time.
    """
    samples = input.shape[0]
    size = samples
    if input.device.type == "cpu":
        size = max(1, _CHUNK * samples // (input.numel() * input.element_size()))
    return [slice(start, start + size) for start in range(0, samples, size)]


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
    if input.device.type != "cpu":
        values = reference.promote(input)
        return values.mean((2, 3)), torch.var(values, (2, 3), correction=0).mean(0)
    means, variances = zip(*(_chunk_moments(input[chunk]) for chunk in _chunks(input)), strict=True)
    return torch.cat(means), torch.stack(variances).sum(0) / input.shape[0]


def _chunk_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Per-instance means, and the sum over instances of their biased variances."""
    values = reference.promote(input)
    mean = values.mean((2, 3))
    # On a CPU torch.var over (2, 3) takes twenty times as long as what follows.
    deviations = values - mean[:, :, None, None]
    if _is_channels_last(deviations) and deviations.dtype == torch.float32:
        # The variance over N, H and W of what has no mean left is the mean over N of the variances over H and W.
        return mean, torch.ops.aten.batch_norm_update_stats(deviations, None, None, 0.0)[1] * input.shape[0]
    squares = torch.linalg.vector_norm(deviations, dim=(2, 3)).square_()
    return mean, squares.sum(0) / (input.shape[2] * input.shape[3])


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
        scales = _scales(center_weight, instance_mean, mean, var, eps)
        factor = _factor(scale_weight, scale_bias, scales.normalized_mean)
        kernel = None if weight is None else weight.to(input.dtype)
        shift = None if bias is None else bias.to(input.dtype)
        results = _Joined(input)
        for chunk in results.chunks:
            result = _normalize(input, scales, chunk)
            if kernel is not None and kernel.shape[2] == 1:
                result.mul_(kernel[:, 0])
                if shift is not None:
                    result.add_(_broadcast(shift))
            elif kernel is not None:
                result = torch.conv2d(result, kernel, shift, padding=kernel.shape[2] // 2, groups=kernel.shape[0])
            results.put(chunk, result, None if factor is None else _broadcast(factor[chunk]).to(input.dtype))
        return results.whole

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

        scales = _scales(center_weight, instance_mean, mean, var, ctx.eps)
        scale, normalized_mean = scales.scale, scales.normalized_mean
        factor = _factor(scale_weight, scale_bias, normalized_mean)
        grad_weight = grad_bias = grad_scale_weight = grad_scale_bias = grad_center_weight = None
        kernel = None if weight is None else weight.to(input.dtype)
        # The gradient with respect to the normalised features by way of the affine alone, its sums and those of its
        # products with the features.
        grads_normalized = _Joined(input)
        sums, sums_of_normalized, projections = [], [], []
        for chunk in grads_normalized.chunks:
            normalized = _normalize(input, scales, chunk)
            # With respect to what the calibration factor multiplies.
            grad = grad_output[chunk]
            if factor is not None:
                grad = grad * _broadcast(factor[chunk]).to(grad.dtype)
            sums.append(_instance_sum(grad))
            if kernel is None or kernel.shape[2] == 1:
                projections.append(_instance_sum(normalized.mul_(grad)))
                if kernel is not None:
                    grad = grad * kernel[:, 0]
                # What was given is not overwritten later on.
                grads_normalized.put(chunk, grad.clone() if kernel is None and factor is None else grad)
                continue
            grad, kernel_grad, _ = torch.ops.aten.convolution_backward(
                grad,
                normalized,
                kernel,
                None,
                (1, 1),
                (kernel.shape[2] // 2,) * 2,
                (1, 1),
                False,
                (0, 0),
                kernel.shape[0],
                (True, ctx.needs_input_grad[1], False),
            )
            if kernel_grad is not None:
                kernel_grad = kernel_grad.to(sums[0].dtype)
                grad_weight = kernel_grad if grad_weight is None else grad_weight.add_(kernel_grad)
            grads_normalized.put(chunk, grad)
            sums_of_normalized.append(_instance_sum(grad))
            projections.append(_instance_sum(normalized.mul_(grad)))
        grad_sum, projection = torch.cat(sums), torch.cat(projections)
        if weight is None:
            grad_sum_of_normalized = grad_sum
        elif weight.shape[2] == 1:
            taps = weight[:, 0, 0, 0].to(grad_sum.dtype)
            grad_weight = projection.sum(0)[:, None, None, None]
            projection, grad_sum_of_normalized = projection * taps, grad_sum * taps
        else:
            grad_sum_of_normalized = torch.cat(sums_of_normalized)
        if weight is not None and grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if bias is not None:
            grad_bias = grad_sum.sum(0).to(bias.dtype)

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
            grad_input = grads_normalized.whole
            for chunk in grads_normalized.chunks:
                result = grad_input[chunk]
                moved = _multiply_add(result, scale, _broadcast(offset[chunk]))
                if slope is not None:
                    moved = _add_product(moved, _normalize(input, scales, chunk), scale * slope)
                if moved.dtype != result.dtype:
                    result.copy_(moved)
        gradients = (grad_input, grad_weight, grad_bias, grad_center_weight, grad_scale_weight, grad_scale_bias)
        return (*gradients, None, None, None, None, None)


class _Joined:
    """A result of the input's shape that is made chunk by chunk, or at once and then not copied."""

    def __init__(self, input: Tensor) -> None:
        self.chunks = _chunks(input)
        self.whole = torch.empty_like(input) if len(self.chunks) > 1 else input

    def put(self, chunk: slice, part: Tensor, factor: Tensor | None = None) -> None:
        """Stores ``part``, times ``factor``; may overwrite it if there is one."""
        if len(self.chunks) == 1:
            self.whole = part if factor is None else part.mul_(factor)
        elif factor is None:
            self.whole[chunk] = part
        else:
            torch.mul(part, factor, out=self.whole[chunk])


def _multiply_add(values: Tensor, factors: Tensor, terms: Tensor) -> Tensor:
    """Values * factors + terms with factors (C,), in place unless that would round to another dtype."""
    if values.dtype != factors.dtype:
        return torch.addcmul(terms, values, _broadcast(factors))
    if values.is_contiguous():
        # As in `_scale_shift`, of which this is the same without a mean to lose.
        return values.mul_(_broadcast(factors)).add_(terms)
    return torch.addcmul(terms, values, _broadcast(factors), out=values)


def _add_product(terms: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    """Terms + values * factors with factors (C,), in place; may overwrite values."""
    if values.dtype == factors.dtype and values.is_contiguous():
        return terms.add_(values.mul_(_broadcast(factors)))
    return terms.addcmul_(values, _broadcast(factors))


class _Scales(NamedTuple):
    """What normalises, x_hat = (x + shift) * scale = x * scale + offset, and the means of x_hat per instance."""

    scale: Tensor  # (C,)
    shift: Tensor  # (N, C), and so are the others
    offset: Tensor
    normalized_mean: Tensor


def _scales(center_weight: Tensor | None, instance_mean: Tensor, mean: Tensor, var: Tensor, eps: float) -> _Scales:
    scale = torch.rsqrt(var + eps)
    shift = -mean
    if center_weight is not None:
        shift = torch.addcmul(shift, center_weight.to(mean.dtype), instance_mean)
    shift = shift.expand(instance_mean.shape)
    offset = shift * scale
    return _Scales(scale, shift, offset, torch.addcmul(offset, instance_mean, scale))


def _normalize(input: Tensor, scales: _Scales, chunk: slice) -> Tensor:
    """The normalised features of a chunk, in the input's dtype and layout."""
    return _scale_shift(input[chunk], scales.scale, scales.shift[chunk], scales.offset[chunk], input.dtype)


def _scale_shift(input: Tensor, scale: Tensor, shift: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """(input + shift) * scale = input * scale + offset with numbers per channel or instance, rounded once to dtype."""
    # Allocated first: the result's layout would otherwise follow the broadcast operands where N, C, H or W is 1.
    out = torch.empty_like(input, dtype=dtype)
    if input.dtype == scale.dtype and input.is_contiguous():
        # In this layout torch.addcmul takes three times as long over numbers that stay the same for a whole plane. The
        # shift comes first: what is left of a large mean after a product would be lost to its rounding.
        return torch.add(input, _broadcast(shift), out=out).mul_(_broadcast(scale))
    return torch.addcmul(_broadcast(offset), input, _broadcast(scale), out=out)


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
