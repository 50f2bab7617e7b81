"""Activation checkpointing: recomputed forwards reuse the decisions of the first run.

A checkpointed forward runs again in backward, after the layer's state has changed. The second run must not update the
state, and must normalize as the first run did.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from . import internals

__all__ = ["Records", "may_be_recomputed"]

# Number of checkpointed forwards of one layer that can be pending at once and still be recomputed exactly.
_CAPACITY = 64


class _Record(NamedTuple):
    """The decisions of one training forward."""

    batch_mean: Tensor
    gate: Tensor
    mean: Tensor
    var: Tensor
    sequence: int  # autograd's count at the first run
    with_grad: bool  # whether the first run recorded gradients; reentrant checkpointing does not


def may_be_recomputed() -> bool:
    """Whether the current forward may be under activation checkpointing.

    Reentrant checkpointing runs the first forward without gradients, the other kind under hooks on saved tensors.
    """
    if torch.compiler.is_compiling() or internals.is_in_backward():
        return False
    return not torch.is_grad_enabled() or internals.has_saved_tensor_hooks()


class Records:
    """The decisions of a layer's recent training forwards that may be recomputed.

    A recomputation finds its own record by the mean of its batch, so a layer that is called several times in one step
    repeats each call's decision. Autograd's count of operations distinguishes identical batches.
    """

    def __init__(self) -> None:
        self._records: deque[_Record] = deque(maxlen=_CAPACITY)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, batch_mean: Tensor, gate: Tensor, mean: Tensor, var: Tensor) -> None:
        """Records the decision of a forward.

        Args:
            batch_mean: (C,) mean of its batch.
            gate: Boolean scalar.
            mean: (C,) mean that it normalizes with.
            var: (C,) variance that it normalizes with.
        """
        self._records.appendleft(
            _Record(
                batch_mean.detach(),
                gate,
                mean.detach(),
                var.detach(),
                internals.sequence_number(),
                torch.is_grad_enabled(),
            )
        )

    def recall(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the decision of the first run of the forward that is being recomputed.

        Args:
            mean: (C,) mean of the batch, as recomputed.
            var: (C,) variance of the batch, as recomputed.

        Returns:
            The mean and variance to normalize with, which depend on the batch where the gate was open, and the gate.
        """
        # Autograd counts its nodes in the order of the forward. The node whose backward requests this recomputation is
        # either the reentrant checkpoint itself, created just before the first run, or one of the last operations of a
        # non-reentrant segment, created after it. Records on the right side of it come first, the nearest in front;
        # among equal means the first record is taken.
        name, count = internals.backward_node() or ("", -1)
        if name == "CheckpointFunctionBackward":
            likely = [record for record in reversed(self._records) if not record.with_grad and record.sequence > count]
        else:
            likely = [record for record in self._records if record.with_grad and record.sequence <= count]
        chosen = {id(record) for record in likely}
        records = likely + [record for record in self._records if id(record) not in chosen]
        nearest = _nearest(torch.stack([record.batch_mean for record in records]), mean.detach())
        gate, first_mean, first_var = (
            torch.stack(values).index_select(0, nearest)[0]
            for values in zip(*((record.gate, record.mean, record.var) for record in records), strict=True)
        )
        return torch.where(gate, mean, first_mean), torch.where(gate, var, first_var), gate


def _nearest(means: Tensor, mean: Tensor) -> Tensor:
    """Index (1,) of the row of ``means`` nearest to ``mean``; values that are not finite only match each other."""
    distances = (means - mean).abs()
    same_kind = means.isfinite() == mean.isfinite()
    distances = torch.where(same_kind, distances.nan_to_num(0.0), torch.inf)
    return distances.sum(1).argmin()[None]
