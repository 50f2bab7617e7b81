"""The equations of :mod:`ubn_zoo.layers.functional` with few passes over memory, for eager mode and ``torch.compile``.

Statistics use the fastest operations for the input's memory format. Backward is a closed form in two sweeps, and the
input is the only tensor of its size that it needs saved. On a CPU a batch is processed in parts that stay in cache, and
the number of small operations matters: on the small maps of a MobileNet they cost more than the arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import functional as reference
from . import internals
from .parameters import Parameters, State

__all__ = [
    "calibrated_affine",
    "chunks",
    "depthwise",
    "depthwise_kernel_grad",
    "differentiable_backward",
    "empty_output",
    "finalize",
    "instance_means",
    "statistics",
]

# Bytes of input that each thread of a CPU works on at a time: a share of its cache, beside intermediate results.
_CHUNK = 4 << 20
_WHOLE = (slice(None),)


def chunks(input: Tensor) -> tuple[slice, ...]:
    """Splits a batch into groups of samples small enough to stay in a CPU's cache between operations.

    Elementwise operations, sums and depthwise convolutions are bound by memory, and so is the allocation of large
    results, because the system maps new pages for each.

    Args:
        input: (N, C, H, W), not empty.

    Returns:
        Slices of the first dimension; a single one on other devices, and for compilers, which fuse operations.
    """
    if input.device.type != "cpu" or torch.compiler.is_compiling():
        return _WHOLE
    return _runs(input.shape[0], input.numel() * input.element_size(), _CHUNK * torch.get_num_threads())


@functools.lru_cache(maxsize=1024)
def _runs(samples: int, size: int, fitting: int) -> tuple[slice, ...]:
    runs = -(-samples // max(1, fitting * samples // size))
    if runs == 1:
        return _WHOLE
    length = -(-samples // runs)
    return tuple(slice(start, start + length) for start in range(0, samples, length))


def _part(tensor: Tensor, chunk: slice) -> Tensor:
    return tensor if chunk.start is None else tensor[chunk]


def empty_output(input: Tensor, parameters: Parameters) -> Tensor:
    """The output for a batch without elements.

    The parameters stay in the graph, with zero gradients, as DistributedDataParallel needs.
    """
    total = torch.zeros([], dtype=input.dtype, device=input.device)
    for parameter in parameters:
        if parameter is not None:
            total = total + parameter.sum().to(input.dtype)
    return input * total


def instance_means(input: Tensor) -> Tensor:
    """Means (N, C) over H and W, in float32 at least and without gradient."""
    return reference.promote(input.detach()).mean((2, 3))


@torch.no_grad()
def statistics(
    input: Tensor, center_weight: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Instance means, statistics of the batch after the centering calibration, and the similarity of its samples.

    Args:
        input: (N, C, H, W), not empty.
        center_weight: (C,) or None.
        samples: Leading samples whose similarity is measured; None to measure none.

    Returns:
        In float32 at least: the instances' means (N, C), mean and biased variance per channel (C,) of
        x' = x + center_weight * mean_hw(x), and :func:`functional.feature_similarity` (scalar, or None).
    """
    compared = min(input.shape[0], samples or 0)
    channels_last = input.stride(1) < input.stride(3)
    means, deviations, norms, total = [], [], [], None
    for chunk in chunks(input):
        values = reference.promote(_part(input, chunk))
        mean, squares = _moments(values)
        means.append(mean)
        deviations.append(squares)
        start = chunk.start or 0
        if start < compared and compared > 1:
            # |x_i|^2 follows from the moments.
            norm = torch.addcmul(squares, mean, mean, value=values.shape[2] * values.shape[3]).sum(1).sqrt_()
            norms.append(norm[: compared - start])
            total = _add_units(total, values.permute(0, 2, 3, 1) if channels_last else values, norms[-1])
    instance_mean, squares = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (means, deviations))
    centered = instance_mean
    if center_weight is not None:
        centered = torch.addcmul(instance_mean, center_weight.to(instance_mean.dtype), instance_mean)
    mean = centered.mean(0)
    # Variance within instances and between their means.
    within = squares.sum(0).mul_(input.shape[1] / input.numel())
    var = (centered - mean).square_().mean(0).add_(within)
    if total is None:
        return instance_mean, mean, var, None if samples is None else torch.ones_like(mean[0])
    present = (torch.cat(norms) if len(norms) > 1 else norms[0]) > 0
    return instance_mean, mean, var, (torch.dot(total, total) - present.sum()) / (compared * (compared - 1))


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over H and W and sums of squared deviations from them, both (N, C)."""
    mean = values.mean((2, 3), keepdim=True)
    if values.device.type != "cpu":
        squares = torch.var(values, (2, 3), correction=0).mul_(values.shape[2] * values.shape[3])
        return mean.flatten(1), squares
    # On a CPU torch.var over (2, 3) takes twenty times as long as the code below.
    deviations = values - mean
    if deviations.is_contiguous():
        squares = torch.linalg.vector_norm(deviations, dim=(2, 3)).square_()
    else:
        squares = deviations.square_().sum((2, 3))
    return mean.flatten(1), squares


def _add_units(total: Tensor | None, values: Tensor, norms: Tensor) -> Tensor:
    """Adds the first samples' unit vectors, (C * H * W,) in the order in memory: their sum is only squared."""
    vectors = values.reshape(values.shape[0], -1)[: norms.shape[0]].t()
    # A zero vector divided by one stays zero: no cosine with anything.
    weights = torch.where(norms > 0, norms, 1.0).reciprocal_()
    return torch.mv(vectors, weights) if total is None else total.addmv_(vectors, weights)


def finalize(
    mean: Tensor,
    var: Tensor,
    similarity: Tensor | None,
    state: State,
    count: Tensor | int,
    momentum: float | None,
    similarity_momentum: float,
    threshold: float | None,
    moving: bool,
) -> tuple[Tensor, Tensor, Tensor | bool]:
    """Evaluates the gate, updates the state in place and selects the statistics to normalize with.

    Non-finite statistics leave the state unchanged. Gradients flow to batch statistics that require them, such as
    statistics joined across ranks.

    Args:
        mean: (C,) of the batch, centered.
        var: (C,) biased.
        similarity: Of the batch's samples, from :func:`statistics`; None for a gate that is always open.
        state: The buffers.
        count: Elements per channel, N * H * W.
        momentum: Weight of the batch in the running statistics; None for a cumulative average.
        similarity_momentum: Weight of the batch in the running similarity.
        threshold: The gate is open above it; None for a gate that is always open.
        moving: If False, the current state decides the gate and stays unchanged.

    Returns:
        Mean (C,), variance (C,), and the gate: a boolean scalar on the device, or True.
    """
    gate: Tensor | bool = True
    if not moving:
        if similarity is not None and threshold is not None:
            gate = state.similarity > threshold
        return *_select(gate, mean, var, state), gate
    new_mean = mean.detach().to(state.mean.dtype)
    new_var = (var.detach() * (count / (count - 1))).to(state.var.dtype)
    # 0 * x is 0 for a finite x and NaN otherwise, which takes fewer operations than testing each number.
    probe = torch.mul(new_var, 0).add_(new_mean, alpha=0).sum()
    if similarity is not None and threshold is not None:
        moves = probe.add_(similarity, alpha=0) == 0
        gate = reference.update_similarity_gate(state.similarity, similarity, similarity_momentum, threshold, moves)
        mean, var = _select(gate, mean, var, state)
        state.batches.add_(moves)
        moves = moves & gate
    else:
        moves = probe == 0
        state.batches.add_(moves)
    # Interpolating a buffer toward itself leaves it bitwise unchanged.
    targets = torch.where(moves, new_mean, state.mean), torch.where(moves, new_var, state.var)
    if momentum is not None:
        state.mean.lerp_(targets[0], momentum)
        state.var.lerp_(targets[1], momentum)
    else:
        factor = reference.update_factor(None, state.batches, state.mean)
        state.mean.lerp_(targets[0], factor)
        state.var.lerp_(targets[1], factor)
    return mean, var, gate


def _select(gate: Tensor | bool, mean: Tensor, var: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Returns the batch statistics if the gate is open, otherwise the running ones."""
    if not isinstance(gate, Tensor):
        return mean, var
    return torch.where(gate, mean, state.mean.to(mean.dtype)), torch.where(gate, var, state.var.to(var.dtype))


def _instance_sum(input: Tensor) -> Tensor:
    return input.sum((2, 3), dtype=torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else None)


def _broadcast(values: Tensor) -> Tensor:
    return values.view(*values.shape, 1, 1)


class _Scales(NamedTuple):
    """Factors of normalization, x_hat = (x + shift) * scale = x * scale + offset, and calibration; no gradients."""

    scale: Tensor  # (C,)
    shift: Tensor  # (N, C), and so are the others
    offset: Tensor
    normalized_mean: Tensor  # of x_hat over H and W
    factor: Tensor | None  # f


def _scales(
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    center_weight: Tensor | None,
    scale_weight: Tensor | None,
    scale_bias: Tensor | None,
    eps: float,
) -> _Scales:
    dtype = mean.dtype
    scale = (var + eps).rsqrt_()
    if center_weight is None:
        shift = (-mean).expand(instance_mean.shape)
    else:
        shift = torch.addcmul(-mean, center_weight.to(dtype), instance_mean)
    offset = shift * scale
    normalized_mean = torch.addcmul(offset, instance_mean, scale)
    factor = None
    if scale_weight is not None and scale_bias is not None:
        factor = torch.addcmul(scale_bias.to(dtype), scale_weight.to(dtype), normalized_mean).sigmoid_()
    return _Scales(scale, shift, offset, normalized_mean, factor)


def _scaled(values: Tensor, planes: bool, scale: Tensor, shift: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """(values + shift) * scale = values * scale + offset with numbers (C,) or (N, C), rounded once to dtype."""
    # Allocated first, because where N, C, H or W is 1 the result's memory format would follow the broadcast operands.
    out = torch.empty_like(values, dtype=dtype)
    if planes:
        return torch.add(values, _broadcast(shift), out=out).mul_(_broadcast(scale))
    return torch.addcmul(_broadcast(offset), values, _broadcast(scale), out=out)


def _by_planes(input: Tensor, dtype: torch.dtype) -> bool:
    """Whether to shift and scale in two operations.

    In this memory format torch.addcmul takes three times as long with operands that are constant over a plane. The
    shift comes first: after the product, rounding would swamp small deviations from a large mean.
    """
    return input.dtype == dtype and input.is_contiguous()


def depthwise(input: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution of (N, C, H, W) by (C, 1, k, k) with zero padding (k - 1) / 2."""
    return torch.conv2d(input, kernel, bias, padding=kernel.shape[2] // 2, groups=kernel.shape[0])


def depthwise_kernel_grad(grad: Tensor, input: Tensor, kernel: Tensor) -> Tensor:
    """The kernel's gradient for a gradient of :func:`depthwise`'s output."""
    padding, groups = (kernel.shape[2] // 2,) * 2, kernel.shape[0]
    settings = ((1, 1), padding, (1, 1), False, (0, 0), groups, (False, True, False))
    return torch.ops.aten.convolution_backward(grad, input, kernel, None, *settings)[1]


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None, scales: _Scales) -> Tensor:
    """Steps 4 to 6."""
    kernel = None if weight is None else weight.to(input.dtype)
    shift = None if bias is None else bias.to(input.dtype)
    planes = _by_planes(input, scales.scale.dtype)
    parts = chunks(input)
    whole = torch.empty_like(input) if len(parts) > 1 else input
    for chunk in parts:
        values, shifts, offsets = (_part(tensor, chunk) for tensor in (input, scales.shift, scales.offset))
        part = _scaled(values, planes, scales.scale, shifts, offsets, input.dtype)
        if kernel is not None and kernel.shape[2] == 1:
            part.mul_(kernel[:, 0])
            if shift is not None:
                part.add_(_broadcast(shift))
        elif kernel is not None:
            part = depthwise(part, kernel, shift)
        factor = None if scales.factor is None else _broadcast(_part(scales.factor, chunk)).to(input.dtype)
        if len(parts) == 1:
            whole = part if factor is None else part.mul_(factor)
        elif factor is None:
            whole[chunk] = part
        else:
            torch.mul(part, factor, out=whole[chunk])
    return whole


class _Sums(NamedTuple):
    """Sums over H and W, (N, C), that the backward pass needs; all include the calibration factor."""

    grad: Tensor  # sum of the output's gradient
    grad_normalized: Tensor  # sum of the normalized features' gradient
    projection: Tensor  # sum of its products with the normalized features


class _CalibratedAffine(torch.autograd.Function):
    """Steps 3 to 6, differentiated through the batch statistics where the gate is open.

    ``mean`` and ``var`` are the statistics to normalize with, as constants; ``gate`` says whether they come from this
    batch or are the running ones.
    """

    # With a separate `setup_context` torch inspects the signature at every call, which takes longer than a small layer.
    # The transforms of torch.func need it, so they use the plain equations.
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center_weight: Tensor | None,
        scale_weight: Tensor | None,
        scale_bias: Tensor | None,
        instance_mean: Tensor,
        mean: Tensor,
        var: Tensor,
        gate: Tensor | bool,
        eps: float,
    ) -> Tensor:
        scales = _scales(instance_mean, mean, var, center_weight, scale_weight, scale_bias, eps)
        ctx.eps, ctx.gate = eps, None if isinstance(gate, Tensor) else gate
        parameters = (weight, bias, center_weight, scale_weight, scale_bias)
        given = gate if isinstance(gate, Tensor) else None
        ctx.save_for_backward(input, *parameters, instance_mean, mean, var, given, *scales)
        return internals.unaliased(_affine(input, weight, bias, scales))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = cast("tuple[Any, ...]", ctx.saved_tensors)
        gate = saved[9] if ctx.gate is None else ctx.gate
        if torch.is_grad_enabled():
            return differentiable_backward(saved[:9], gate, ctx.eps, ctx.needs_input_grad, grad_output)
        input, weight, bias, center_weight, scale_weight, scale_bias, instance_mean = saved[:7]
        scales = _Scales(*saved[10:])
        pixels = input.shape[2] * input.shape[3]
        grads, sums, grad_weight = _sums(input, grad_output, weight, scales, ctx.needs_input_grad[1])
        grad_bias = grad_center_weight = grad_scale_weight = grad_scale_bias = through_mean = None
        if bias is not None:
            grad_bias = sums.grad.sum(0).to(bias.dtype)

        # Gradient of the normalized features, summed over H and W, and its product with them.
        total, moment = sums.grad_normalized, sums.projection
        if scales.factor is not None:
            logits = sums.projection
            if bias is not None:
                logits = torch.addcmul(logits, bias.to(logits.dtype), sums.grad)
            logits = logits * (1 - scales.factor)
            grad_scale_bias = logits.sum(0).to(scale_bias.dtype)
            grad_scale_weight = (logits * scales.normalized_mean).sum(0).to(scale_weight.dtype)
            through_mean = logits.mul_(scale_weight.to(logits.dtype))
            total = total + through_mean
            moment = torch.addcmul(moment, through_mean, scales.normalized_mean)

        # Through the batch statistics, where the gate is open: BatchNorm's two correction terms.
        offset, instance_grad, slope = through_mean, total, None
        if gate is not False:
            mean_total, slope = total.mean(0), moment.mean(0).neg_()
            if gate is not True:
                mean_total, slope = mean_total * gate, slope * gate
            offset = -mean_total if offset is None else offset - mean_total
            instance_grad = torch.addcmul(total - mean_total, slope, scales.normalized_mean)
        if center_weight is not None:
            instance_grad = instance_grad * scales.scale
            grad_center_weight = _grad_center_weight(instance_mean, instance_grad, gate).to(center_weight.dtype)
            weighted = center_weight.to(instance_grad.dtype) * instance_grad
            offset = weighted if offset is None else torch.addcmul(weighted, offset, scales.scale)
        elif offset is not None:
            offset = offset * scales.scale

        grad_input = None
        if ctx.needs_input_grad[0]:
            offset = None if offset is None else (offset / pixels).expand(instance_mean.shape)
            slope = None if slope is None else slope * scales.scale / pixels
            factors = scales.scale if scales.factor is None else scales.scale * scales.factor
            if weight is not None and weight.shape[2] == 1:
                factors = factors * weight[:, 0, 0, 0].to(factors.dtype)
            grad_input = _grad_input(input, grads, factors.expand(instance_mean.shape), slope, offset, scales)
        gradients = (grad_input, grad_weight, grad_bias, grad_center_weight, grad_scale_weight, grad_scale_bias)
        return (*gradients, None, None, None, None, None)


def _sums(
    input: Tensor, grad_output: Tensor, weight: Tensor | None, scales: _Scales, weight_needs_grad: bool
) -> tuple[list[Tensor], _Sums, Tensor | None]:
    """Sweep 1: the gradient before the depthwise kernel (in chunks), the sums, and the kernel's gradient.

    The calibration factor multiplies the features instead of the gradient. This costs nothing: the factor merges into
    the (N, C) normalization factors, and features only appear in products.
    """
    scale, shift, offset, _, factor = scales
    if factor is None:
        scale = scale.expand(shift.shape)
    else:
        scale, offset = scale * factor, offset * factor
    kernel = None if weight is None or weight.shape[2] == 1 else weight.to(input.dtype)
    # The transpose of a depthwise convolution is one with the flipped kernel, and forward convolutions are faster.
    flipped = None if kernel is None else kernel.flip(2, 3)
    planes = _by_planes(input, scale.dtype)
    grad_weight = None
    grads, grad_sums, normalized_sums, projections = [], [], [], []
    for chunk in chunks(input):
        grad = _part(grad_output, chunk)
        values, factors, shifts, offsets = (_part(tensor, chunk) for tensor in (input, scale, shift, offset))
        normalized = _scaled(values, planes, factors, shifts, offsets, input.dtype)
        grad_sums.append(_instance_sum(grad))
        if kernel is not None and flipped is not None:
            if weight_needs_grad:
                kernel_grad = depthwise_kernel_grad(grad, normalized, kernel).to(scale.dtype)
                grad_weight = kernel_grad if grad_weight is None else grad_weight.add_(kernel_grad)
            grad = depthwise(grad, flipped)
            normalized_sums.append(_instance_sum(grad))
        grads.append(grad)
        projections.append(_instance_sum(normalized.mul_(grad)))
    grad_sum, projection = torch.cat(grad_sums), torch.cat(projections)
    grad_normalized = torch.cat(normalized_sums) if kernel is not None else grad_sum
    if factor is not None:
        grad_normalized = grad_normalized * factor
        grad_sum = grad_sum * factor if kernel is not None else grad_normalized
    if weight is not None and kernel is None:
        grad_weight = projection.sum(0).view(weight.shape)
        taps = weight[:, 0, 0, 0].to(projection.dtype)
        projection, grad_normalized = projection * taps, grad_normalized * taps
    if weight is not None and grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return grads, _Sums(grad_sum, grad_normalized, projection), grad_weight


def _grad_center_weight(instance_mean: Tensor, instance_grad: Tensor, gate: Tensor | bool) -> Tensor:
    # With batch statistics instance_grad sums to 0 over instances. Subtracting the mean first keeps a large one from
    # amplifying the rounding errors of that sum.
    if gate is False:
        return (instance_mean * instance_grad).sum(0)
    center = instance_mean.mean(0)
    gradient = ((instance_mean - center) * instance_grad).sum(0)
    if gate is True:
        return gradient
    return gradient + (1 - gate.to(center.dtype)) * center * instance_grad.sum(0)


def _grad_input(
    input: Tensor,
    grads: list[Tensor],
    factors: Tensor,
    slope: Tensor | None,
    offset: Tensor | None,
    scales: _Scales,
) -> Tensor:
    """Sweep 2: grads * factors + x_hat * slope + offset; ``slope`` is per channel, the others are per instance.

    Empties ``grads``, so that each part is freed as soon as it is used.
    """
    planes = _by_planes(input, factors.dtype)
    result = torch.empty_like(input)
    if slope is not None and offset is not None:
        scale = scales.scale * slope
        if not planes:
            offset = torch.addcmul(offset, slope, scales.offset)
    for chunk in chunks(input):
        out, grad, factor = _part(result, chunk), grads.pop(0), _broadcast(_part(factors, chunk))
        terms = None if offset is None else _broadcast(_part(offset, chunk))
        if terms is None:
            torch.mul(grad, factor, out=out)
        elif planes:
            torch.mul(grad, factor, out=out).add_(terms)
            if slope is not None:
                shifted = torch.add(_part(input, chunk), _broadcast(_part(scales.shift, chunk)))
                out.add_(shifted.mul_(_broadcast(scale)))
        else:
            if slope is not None:
                terms = torch.addcmul(terms, _part(input, chunk), _broadcast(scale))
            torch.addcmul(terms, grad, factor, out=out)
    return result


def differentiable_backward(
    saved: tuple[Any, ...],
    gate: Tensor | bool,
    eps: float,
    needs_grad: tuple[bool, ...],
    grad_output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Computes a differentiable gradient (``create_graph=True``) from the reference equations."""
    input, weight, bias, center_weight, scale_weight, scale_bias, _, mean, var = saved
    instance_mean, instance_var = reference.instance_moments(input)
    if gate is not False:
        batch_mean, batch_var = reference.batch_statistics(instance_mean, instance_var, center_weight)
        # With an open gate these equal `mean` and `var`, but depend on the input.
        if isinstance(gate, Tensor):
            batch_mean, batch_var = torch.where(gate, batch_mean, mean), torch.where(gate, batch_var, var)
        mean, var = batch_mean, batch_var
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
    gate: Tensor | bool,
    parameters: Parameters,
    eps: float,
) -> Tensor:
    """:func:`functional.calibrated_affine` with the backward pass through the statistics where ``gate`` is open.

    Args:
        input: (N, C, H, W), not empty.
        instance_mean: (N, C), without gradient.
        mean: (C,) to normalize with, without gradient.
        var: (C,) likewise.
        gate: Whether ``mean`` and ``var`` are those of this batch, as a boolean or a boolean scalar on the device.
        parameters: As in :func:`functional.calibrated_affine`.
        eps: Added to the variance.

    Returns:
        (N, C, H, W) in the dtype and layout of ``input``.
    """
    if not torch.is_grad_enabled():
        weight, bias, center_weight, scale_weight, scale_bias = parameters
        scales = _scales(instance_mean, mean, var, center_weight, scale_weight, scale_bias, eps)
        return _affine(input, weight, bias, scales)
    return cast(Tensor, _CalibratedAffine.apply(input, *parameters, instance_mean, mean, var, gate, eps))
