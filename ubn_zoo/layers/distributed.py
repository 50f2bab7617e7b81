"""The layer across ranks: statistics of the joined batch, and identical buffers under plain DistributedDataParallel."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import functional as reference
from .autograd import finalize
from .parameters import Parameters

__all__ = [
    "SyncGroup",
    "batch_statistics",
    "calibrated_affine",
    "equalize_ddp_buffers",
    "feature_similarity",
    "finalize",
    "statistics",
]


class SyncGroup:
    """The ranks that a layer shares its statistics with; ``None`` stands for all of them.

    A process group cannot be copied or pickled: copies of the layer keep the same group, and an unpickled layer shares
    with all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncGroup:
        return self

    def __reduce__(self) -> tuple[type[SyncGroup], tuple[()]]:
        return SyncGroup, ()

    def active(self) -> bool:
        """Whether other ranks take part."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        output = input.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(output, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _AllReduce.apply(grad_output, ctx.group)), None


def _all_reduce(input: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return cast(Tensor, _AllReduce.apply(input, group))


def batch_statistics(
    instance_mean: Tensor, instance_var: Tensor, center_weight: Tensor | None, pixels: int, sync: SyncGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`functional.batch_statistics` of the batch joined over ranks, differentiable.

    Args:
        instance_mean: (N, C) of this rank; N may differ between ranks and may be 0.
        instance_var: (N, C) of this rank.
        center_weight: (C,) or None.
        pixels: H * W of this rank.
        sync: The ranks to join.

    Returns:
        Mean (C,) and biased variance (C,) of the joined batch, its elements per channel (scalar), and the samples of
        every rank (world size,).
    """
    samples, channels = instance_mean.shape
    if samples:
        mean, var = reference.batch_statistics(instance_mean, instance_var, center_weight)
    else:
        # An empty shard has weight 0; the sum keeps its parameters in the graph.
        mean = instance_mean.sum(0)
        if center_weight is not None:
            mean = mean * (1 + center_weight.to(mean.dtype))
        var = instance_var.sum(0)
    sizes = [torch.full([1], size, dtype=mean.dtype, device=mean.device) for size in (samples, samples * pixels)]
    share = torch.cat([mean, var, *sizes])
    rank, world = dist.get_rank(sync.group), dist.get_world_size(sync.group)
    # One row per rank: an all-reduce of rows that are zero elsewhere gathers them, and its gradient is a sum too.
    rows = torch.nn.functional.pad(share[None], (0, 0, rank, world - 1 - rank))
    rows = _all_reduce(rows, sync.group)
    means, variances, counts = rows[:, :channels], rows[:, channels : 2 * channels], rows[:, -1].detach()
    count = counts.sum()
    weights = (counts / count)[:, None]
    joined_mean = (weights * means).sum(0)
    joined_var = (weights * (variances + (means - joined_mean).square())).sum(0)
    return joined_mean, joined_var, count, rows[:, -2].detach()


@torch.no_grad()
def feature_similarity(input: Tensor, samples: int, rank_samples: Tensor, sync: SyncGroup) -> Tensor:
    """:func:`functional.feature_similarity` over the first samples of the batch joined in the order of ranks.

    Args:
        input: (N, C, H, W) of this rank; C, H and W are the same on every rank.
        samples: Number of leading samples of the joined batch to compare.
        rank_samples: (world size,) samples of every rank, from :func:`batch_statistics`.
        sync: The ranks to join.

    Returns:
        A scalar, the same on every rank.
    """
    values = reference.promote(input[:samples]).flatten(1)
    before = rank_samples[: dist.get_rank(sync.group)].sum()
    taken = torch.arange(values.shape[0], device=values.device) + before < samples
    norms = torch.linalg.vector_norm(values, dim=1)
    units = (taken & (norms > 0)).to(values.dtype)
    total = torch.mv(values.t(), units / torch.where(norms > 0, norms, 1.0))
    # One all-reduce returns both the sum of the unit vectors and their number.
    joined = torch.cat([total, units.sum()[None]])
    dist.all_reduce(joined, group=sync.group)
    n = rank_samples.sum().clamp(max=samples)
    pairs = (n * (n - 1)).clamp(min=1)
    return torch.where(n > 1, (torch.dot(joined[:-1], joined[:-1]) - joined[-1]) / pairs, 1.0)


def statistics(
    input: Tensor, center_weight: Tensor | None, samples: int | None, sync: SyncGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Instance means of this rank, and differentiable statistics of the batch joined over ranks.

    Args:
        input: (N, C, H, W) of this rank; N may differ between ranks and may be 0.
        center_weight: (C,) or None.
        samples: Number of leading samples of the joined batch to compare; None for no similarity.
        sync: The ranks to join.

    Returns:
        Instance means (N, C), mean and biased variance (C,), the similarity (scalar or None), and the joined batch's
        elements per channel (scalar).
    """
    instance_mean, instance_var = reference.instance_moments(input)
    pixels = input.shape[2] * input.shape[3]
    mean, var, count, rank_samples = batch_statistics(instance_mean, instance_var, center_weight, pixels, sync)
    similarity = None
    if samples is not None:
        similarity = feature_similarity(input.detach(), samples, rank_samples, sync)
    return instance_mean, mean, var, similarity, count


def calibrated_affine(
    input: Tensor,
    instance_mean: Tensor,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | bool,
    parameters: Parameters,
    eps: float,
) -> Tensor:
    """:func:`functional.calibrated_affine`, differentiable through the joint statistics by autograd."""
    return reference.calibrated_affine(input, instance_mean, mean, var, *parameters, eps)


def _broadcast_buffers(ddp: DistributedDataParallel, buffers: dict[str, Tensor]) -> None:
    ddp._default_broadcast_coalesced()


def equalize_ddp_buffers() -> None:
    """Makes the DistributedDataParallel module whose forward is running broadcast its buffers after the forward.

    Each rank gates on its share of the batch, so the ranks' buffers differ after a training step.
    DistributedDataParallel broadcasts them at the start of the next forward, so they still differ after the last step
    of a training run. Broadcasting at the end costs the same and leaves identical buffers after every step. Modules
    with their own buffer hook, with ``broadcast_buffers=False`` or within ``join`` keep their behavior.
    """
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or not ddp.broadcast_buffers or ddp._join_config.enable:
        return
    if not hasattr(ddp, "buffer_hook"):
        ddp._register_buffer_comm_hook(ddp, _broadcast_buffers)
    if ddp.buffer_hook.buffer_comm_hook is _broadcast_buffers and ddp.require_backward_grad_sync:
        # After steps under `no_sync`, DDP would broadcast one forward later. Share buffers whenever gradients are
        # shared.
        ddp.require_forward_param_sync = ddp.require_forward_param_sync or torch.is_grad_enabled()
