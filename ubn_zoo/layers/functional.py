"""The equations of Unified Batch Normalization in plain torch: the reference for every faster implementation.

Source: Wang et al., "Unified Batch Normalization", arXiv 2311.15993. The paper introduces the gate on feature
condensation; the centering and scaling calibrations are RBN (Gao et al., CVPR 2021), and the depthwise affine is BNET
(Xu et al., arXiv 2011.14150).

Everything here is differentiable, free of host synchronization, scriptable and exportable. Statistics are computed in
float32 for half-precision inputs and in the input's precision otherwise.

A training step with non-finite statistics (an Inf or NaN in the input, or an overflow) leaves the state unchanged: the
running statistics, the running similarity and the batch count. Its gate uses the last finite similarity. The paper does
not cover this case.

Shapes used throughout: ``input`` is (N, C, H, W); a *per-instance* quantity is (N, C), a *per-channel* quantity is
(C,).
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "batch_statistics",
    "calibrated_affine",
    "feature_similarity",
    "instance_moments",
    "statistics_are_finite",
    "unified_batch_norm",
    "update_running_statistics",
    "update_similarity_gate",
]


def promote(input: Tensor) -> Tensor:
    """Casts half-precision inputs to float32, the precision of statistics; returns other inputs unchanged."""
    if input.dtype == torch.float16 or input.dtype == torch.bfloat16:
        return input.float()
    return input


def feature_similarity(input: Tensor, samples: int = 16) -> Tensor:
    """Mean cosine similarity between the first samples of a batch (step 1 of the method).

    With the unit vectors u_i = x_i / |x_i| and e = sum_i u_i, the mean over pairs i != j of cos(x_i, x_j) is
    (|e|^2 - sum_i |u_i|^2) / (n (n - 1)): one pass of O(n C H W) instead of all pairs.

    Args:
        input: (N, C, H, W) with N >= 1. No gradient flows into it.
        samples: Number of leading samples to compare, n = min(N, samples).

    Returns:
        A scalar. 1 for a single sample; a sample of zero norm has cosine 0 with all others.
    """
    n = min(input.shape[0], samples)
    vectors = promote(input.detach()[:n]).flatten(1)
    if n == 1:
        return torch.ones([], dtype=vectors.dtype, device=vectors.device)
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    # A zero vector is divided by 1 and stays zero: its cosine with any other is 0, and |u_i|^2 = 0.
    total = (vectors / torch.where(norms > 0, norms, torch.ones_like(norms))).sum(0)
    return (total.square().sum() - (norms > 0).to(vectors.dtype).sum()) / (n * (n - 1))


def instance_moments(input: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance over H and W of every channel of every instance.

    Args:
        input: (N, C, H, W).

    Returns:
        Two (N, C) tensors, mean and variance, by the two-pass formula (no cancellation for a large mean).
    """
    values = promote(input)
    mean = values.mean((2, 3))
    return mean, (values - mean[:, :, None, None]).square().mean((2, 3))


def batch_statistics(
    instance_mean: Tensor, instance_var: Tensor, center_weight: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of the centered features x' = x + center_weight * mean_hw(x).

    Args:
        instance_mean: (N, C), from :func:`instance_moments`.
        instance_var: (N, C), likewise.
        center_weight: (C,) or None for no centering calibration.

    Returns:
        Two (C,) tensors.
    """
    centered = instance_mean
    if center_weight is not None:
        centered = (1 + center_weight.to(instance_mean.dtype)) * instance_mean
    mean = centered.mean(0)
    return mean, (instance_var + (centered - mean).square()).mean(0)


def statistics_are_finite(mean: Tensor, var: Tensor, similarity: Optional[Tensor] = None) -> Tensor:
    """Whether a batch may update the state, that is, whether all of its statistics are finite.

    Args:
        mean: (C,) of the batch.
        var: (C,) likewise, in the precision in which it would be stored.
        similarity: Scalar similarity of the batch, or None.

    Returns:
        A boolean scalar on the device.
    """
    finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
    return finite if similarity is None else finite & torch.isfinite(similarity)


def update_similarity_gate(
    running_similarity: Tensor,
    similarity: Tensor,
    momentum: float,
    threshold: float,
    finite: Optional[Tensor] = None,
) -> Tensor:
    """Updates the running similarity r in place (step 2) and returns the gate.

    Args:
        running_similarity: Scalar buffer r, moved to (1 - momentum) r + momentum * similarity.
        similarity: Scalar similarity of this batch.
        momentum: Weight of this batch.
        threshold: Features count as condensed above it.
        finite: From :func:`statistics_are_finite`; r stays unchanged where it is False.

    Returns:
        A boolean scalar on the device: True selects batch statistics, False the running ones.
    """
    target = similarity.to(running_similarity.dtype)
    if finite is not None:
        target = torch.where(finite, target, running_similarity)
    running_similarity.lerp_(target, momentum)
    return running_similarity > threshold


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    unbiased_var: Tensor,
    factor: Tensor,
    moves: Optional[Tensor] = None,
) -> None:
    """Updates the running statistics in place, as BatchNorm does: the variance toward the unbiased one.

    Args:
        running_mean: (C,) buffer.
        running_var: (C,) buffer.
        mean: (C,) batch mean.
        unbiased_var: (C,) batch variance, the biased one times M / (M - 1) of M = N * H * W elements per channel.
        factor: Scalar weight of this batch.
        moves: Boolean scalar; if False, the buffers stay bitwise unchanged, whatever the batch contains.
    """
    new_mean = mean.detach().to(running_mean.dtype)
    new_var = unbiased_var.detach().to(running_var.dtype)
    if moves is not None:
        new_mean = torch.where(moves, new_mean, running_mean)
        new_var = torch.where(moves, new_var, running_var)
    running_mean.lerp_(new_mean, factor.to(running_mean.dtype))
    running_var.lerp_(new_var, factor.to(running_var.dtype))


def update_factor(momentum: Optional[float], num_batches_tracked: Optional[Tensor], like: Tensor) -> Tensor:
    """Weight of this batch in the running statistics, as a scalar tensor.

    ``momentum=None`` is the cumulative average, 1 / num_batches_tracked, which includes this batch.
    """
    if momentum is not None:
        return torch.full([], momentum, dtype=like.dtype, device=like.device)
    if num_batches_tracked is None:
        raise ValueError("momentum=None averages over num_batches_tracked, which is None; pass both or give a momentum")
    # The count is still 0 if the first batch was not finite.
    return num_batches_tracked.clamp(min=1).to(like.dtype).reciprocal()


def calibrated_affine(
    input: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    center_weight: Optional[Tensor] = None,
    scale_weight: Optional[Tensor] = None,
    scale_bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """Centering, normalization, scaling calibration and depthwise affine (steps 3 to 6) for given statistics.

    The normalized features are x_hat = a x + b with a = 1 / sqrt(var + eps) per channel and
    b = (center_weight * instance_mean - mean) a per instance; their mean over H and W follows from ``instance_mean``,
    so the calibration factor f = sigmoid(scale_weight * mean_hw(x_hat) + scale_bias) does not need a second pass over
    them.

    Args:
        input: (N, C, H, W).
        instance_mean: (N, C) mean of ``input`` over H and W.
        mean: (C,) mean to normalize with.
        var: (C,) biased variance to normalize with.
        weight: (C, 1, k, k) depthwise kernel, applied with zero padding (k - 1) / 2; None for no affine.
        bias: (C,), added to the depthwise convolution.
        center_weight: (C,) or None.
        scale_weight: (C,) or None for no scaling calibration (f = 1).
        scale_bias: (C,), goes with ``scale_weight``.
        eps: Added to the variance.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``input``.
    """
    scale = torch.rsqrt(var + eps)
    shift = -mean
    if center_weight is not None:
        # w m - mean, computed relative to an origin near the means: rounding errors of large means would swamp w's
        # gradient.
        origin = instance_mean.detach().sum(0) / max(instance_mean.shape[0], 1)
        # One non-finite sample must not affect the others.
        origin = torch.where(torch.isfinite(origin), origin, torch.zeros_like(origin))
        weights = center_weight.to(mean.dtype)
        shift = weights * (instance_mean - origin) + (weights * origin - mean)
    offset = (shift * scale).expand(instance_mean.shape)
    # The product and the sum are rounded to the input's precision once, after the normalization.
    output = (promote(input) * scale[:, None, None] + offset[:, :, None, None]).to(input.dtype)
    if weight is not None:
        channels, _, size, _ = weight.shape
        output = F.conv2d(
            output,
            weight.to(output.dtype),
            None if bias is None else bias.to(output.dtype),
            padding=size // 2,
            groups=channels,
        )
    if scale_weight is not None and scale_bias is not None:
        normalized_mean = instance_mean * scale + offset
        factor = torch.sigmoid(scale_weight.to(mean.dtype) * normalized_mean + scale_bias.to(mean.dtype))
        output = output * factor[:, :, None, None].to(output.dtype)
    # Under autocast the convolution may return a lower precision than that of its input.
    return output.to(input.dtype)


def unified_batch_norm(
    input: Tensor,
    running_mean: Optional[Tensor] = None,
    running_var: Optional[Tensor] = None,
    running_similarity: Optional[Tensor] = None,
    num_batches_tracked: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    center_weight: Optional[Tensor] = None,
    scale_weight: Optional[Tensor] = None,
    scale_bias: Optional[Tensor] = None,
    training: bool = False,
    momentum: Optional[float] = 0.1,
    eps: float = 1e-5,
    threshold: Optional[float] = 0.15,
    similarity_momentum: float = 0.1,
    similarity_samples: int = 16,
) -> Tensor:
    """Unified Batch Normalization of one batch; training updates the buffers in place.

    Args:
        input: (N, C, H, W), not empty.
        running_mean: (C,) buffer, or None to always normalize with batch statistics, in evaluation too.
        running_var: (C,) buffer, goes with ``running_mean``.
        running_similarity: Scalar buffer r of the gate; None switches the gate off.
        num_batches_tracked: Integer scalar buffer, incremented by every training step with finite statistics, whether
            the gate is open or not.
        weight: (C, 1, k, k) depthwise kernel or None.
        bias: (C,) or None.
        center_weight: (C,) centering calibration or None.
        scale_weight: (C,) scaling calibration or None.
        scale_bias: (C,) or None.
        training: Whether this is a training step.
        momentum: Weight of this batch in the running statistics; None for a cumulative average.
        eps: Added to the variance.
        threshold: Gate threshold tau; None switches the gate off.
        similarity_momentum: Weight of this batch in ``running_similarity``.
        similarity_samples: Number of leading samples to compare.

    Returns:
        (N, C, H, W) in the dtype of ``input``.

    Raises:
        ValueError: ``momentum=None`` without ``num_batches_tracked``.
    """
    if not training and running_mean is not None and running_var is not None:
        stats_dtype = promote(input).dtype
        return calibrated_affine(
            input,
            promote(input).mean((2, 3)),
            running_mean.to(stats_dtype),
            running_var.to(stats_dtype),
            weight,
            bias,
            center_weight,
            scale_weight,
            scale_bias,
            eps,
        )

    instance_mean, instance_var = instance_moments(input)
    mean, var = batch_statistics(instance_mean, instance_var, center_weight)
    if training and running_mean is not None and running_var is not None:
        batch_mean = mean.detach()
        count = torch.full([], input.numel() // input.shape[1], dtype=mean.dtype, device=mean.device)
        unbiased_var = (var.detach() * (count / (count - 1))).to(running_var.dtype)
        similarity: Optional[Tensor] = None
        if threshold is not None and running_similarity is not None:
            similarity = feature_similarity(input, similarity_samples)
        moves = statistics_are_finite(batch_mean, unbiased_var, similarity)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(moves.to(num_batches_tracked.dtype))
        factor = update_factor(momentum, num_batches_tracked, running_mean)
        if threshold is not None and running_similarity is not None and similarity is not None:
            gate = update_similarity_gate(running_similarity, similarity, similarity_momentum, threshold, moves)
            mean = torch.where(gate, mean, running_mean.to(mean.dtype))
            var = torch.where(gate, var, running_var.to(var.dtype))
            moves = moves & gate
        update_running_statistics(running_mean, running_var, batch_mean, unbiased_var, factor, moves)
    return calibrated_affine(
        input, instance_mean, mean, var, weight, bias, center_weight, scale_weight, scale_bias, eps
    )
