"""UBN with auxiliary norms for parts of a batch, the counterpart of timm's ``convert_splitbn_model``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import internals
from .ubn import UnifiedBatchNorm2d, UnifiedBatchNormAct2d

__all__ = ["convert_split_ubn", "is_split"]


class _Split(nn.Module):
    """Normalizes each part of a training batch with a separate layer; evaluation uses only the first."""

    aux_bn: nn.ModuleList

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or internals.is_proxy(input):
            return super().forward(input)
        parts = 1 + len(self.aux_bn)
        if input.shape[0] % parts:
            raise ValueError(f"the batch has {input.shape[0]} samples, valid are multiples of the {parts} splits")
        first, *rest = input.chunk(parts)
        outputs = [layer(part) for layer, part in zip(self.aux_bn, rest, strict=True)]
        return torch.cat([super().forward(first), *outputs])


class SplitUnifiedBatchNorm2d(_Split, UnifiedBatchNorm2d):
    """UBN with auxiliary norms."""


class SplitUnifiedBatchNormAct2d(_Split, UnifiedBatchNormAct2d):
    """UBN with activation and auxiliary norms."""


def is_split(module: nn.Module) -> bool:
    """Whether a layer has auxiliary norms."""
    return isinstance(module, _Split)


def convert_split_ubn(model: nn.Module, num_splits: int = 2) -> nn.Module:
    """Adds auxiliary layers to every UBN layer, which normalize separate parts of a batch in training.

    Like timm's ``convert_splitbn_model`` (AdvProp, ``--split-bn``): the batch consists of ``num_splits`` equal parts,
    such as clean and augmented images. Auxiliary layers start as copies, named ``aux_bn.0`` and so on as in timm.

    Args:
        model: Changed in place.
        num_splits: Parts of a batch, at least 2.

    Returns:
        The model.

    Raises:
        ValueError: Fewer than 2 splits.
    """
    if num_splits < 2:
        raise ValueError(f"num_splits is {num_splits}, valid are 2 or more")
    for layer in list(model.modules()):
        if isinstance(layer, UnifiedBatchNorm2d) and not hasattr(layer, "aux_bn"):
            copies = [copy.deepcopy(layer) for _ in range(num_splits - 1)]
            for auxiliary in copies:
                auxiliary.register_module("aux_bn", None)  # not to be split again
            if isinstance(layer, UnifiedBatchNormAct2d):
                layer.__class__ = SplitUnifiedBatchNormAct2d
            else:
                layer.__class__ = SplitUnifiedBatchNorm2d
            layer.aux_bn = nn.ModuleList(copies)
    return model
