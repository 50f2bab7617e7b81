"""Small models and shared checks for the tests with other libraries."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from ubn_zoo import UnifiedBatchNorm2d

TWIN, SIBLING = "resnet10t_ubn", "resnet10t"


def twin(**arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(TWIN, **{"num_classes": 3, **arguments})


def images(count: int = 4, side: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def ubn_layers(model: nn.Module) -> list[UnifiedBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, UnifiedBatchNorm2d)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def moved(before: dict[str, Tensor], model: nn.Module) -> int:
    return sum(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
