"""timm's re-parameterization of multi-branch blocks, for blocks whose BatchNorm has been replaced by UBN.

``timm.utils.reparameterize_model`` calls ``fuse``, ``reparameterize`` or ``switch_to_deploy`` of blocks, which read
their norms as BatchNorms. A UBN layer that still computes a BatchNorm (one converted and not trained since)
is turned back into that BatchNorm first. A trained one cannot be merged into a convolution; :func:`ubn_zoo.fuse` folds
the parts that can be folded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from ubn_zoo.errors import InvalidArgumentError
from ubn_zoo.layers import UnifiedBatchNorm2d, UnifiedBatchNormAct2d
from ubn_zoo.utils.derived import Derived, derive

__all__ = ["adopt_blocks", "restore_batchnorm"]

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def _scale(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The BatchNorm weight and bias, (C,) each, of a UBN layer that computes a BatchNorm."""
    kernel = layer.weight
    if kernel is None:
        ones = torch.ones_like(layer.running_var)
        weight, bias = ones, torch.zeros_like(ones)
    else:
        middle = kernel.shape[-1] // 2
        weight = kernel.detach()[:, 0, middle, middle]
        if torch.count_nonzero(kernel) != torch.count_nonzero(weight):
            raise InvalidArgumentError("its depthwise kernel has taps beside the center")
        bias = layer.bias.detach()
    for name in ("center_weight", "scale_weight"):
        value = getattr(layer, name)
        if value is not None and torch.any(value != 0):
            raise InvalidArgumentError(f"its {name} is not zero")
    factor = torch.ones_like(weight) if layer.scale_bias is None else layer.scale_bias.detach().sigmoid()
    return weight * factor, bias * factor


def _batchnorm(layer: UnifiedBatchNorm2d) -> nn.Module:
    weight, bias = _scale(layer)
    options: dict[str, Any] = {"eps": layer.eps, "momentum": layer.momentum, "device": weight.device}
    norm: Any
    if isinstance(layer, UnifiedBatchNormAct2d):
        norm = BatchNormAct2d(layer.num_features, **options, dtype=weight.dtype)
        norm.drop, norm.act = layer.drop, layer.act
    else:
        norm = nn.BatchNorm2d(layer.num_features, **options, dtype=weight.dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(norm, name).copy_(getattr(layer, name))
    return norm.train(layer.training)


def restore_batchnorm(module: nn.Module) -> None:
    """Turns the UBN layers inside a module back into the BatchNorms that they compute, in place.

    Args:
        module: A block of a model.

    Raises:
        InvalidArgumentError: A layer computes more than a BatchNorm; nothing was changed.
    """
    norms = {}
    for name, layer in module.named_modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            try:
                norms[name] = _batchnorm(layer)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(
                    f"{name or type(module).__name__} cannot be merged into a convolution: {error}. Only UBN layers "
                    "that compute a BatchNorm can be; ubn_zoo.fuse(model) prepares trained ones for inference"
                ) from None
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, norm)


def _method(name: str, base: type[nn.Module]) -> Callable[..., Any]:
    theirs = getattr(base, name)

    def merge(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        restore_batchnorm(self)
        return theirs(self, *args, **kwargs)

    merge.__name__, merge.__doc__ = name, theirs.__doc__
    return merge


class _Block(Derived):
    """Mixin of blocks that timm can merge: they restore their BatchNorms first."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {name: _method(name, base) for name in _METHODS if hasattr(base, name)}


def adopt_blocks(model: nn.Module) -> None:
    """Makes the blocks of a UBN model that timm can merge restore their BatchNorms first.

    Args:
        model: A model of timm with UBN layers; the classes of such blocks are changed in place.
    """
    for module in model.modules():
        can_merge = module is not model and any(callable(getattr(module, name, None)) for name in _METHODS)
        if can_merge and any(isinstance(layer, UnifiedBatchNorm2d) for layer in module.modules()):
            module.__class__ = derive(_Block, type(module))
