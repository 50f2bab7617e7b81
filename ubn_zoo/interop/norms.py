"""Counterparts of torch's and timm's functions for BatchNorm that handle both BatchNorm and UBN."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import timm.utils.model
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_zoo.errors import InvalidArgumentError
from ubn_zoo.layers import UnifiedBatchNorm2d, freeze_ubn, unfreeze_ubn
from ubn_zoo.layers.convert import no_weight_decay as names_without_decay

__all__ = ["freeze", "unfreeze", "update_statistics", "weight_decay_groups"]

_freeze = timm.utils.model.freeze
_unfreeze = timm.utils.model.unfreeze

# Below every cosine, so that the gate is always open.
_ALWAYS_OPEN = -2.0


def has_ubn(model: nn.Module) -> bool:
    return any(isinstance(module, UnifiedBatchNorm2d) for module in model.modules())


def _parts(model: nn.Module, submodules: str | Iterable[str]) -> list[nn.Module]:
    names = [submodules] if isinstance(submodules, str) else list(submodules)
    return [model.get_submodule(name) for name in names] or [model]


def freeze(model: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True) -> None:
    """Freezes a model or parts of it, including the statistics and gates of BatchNorm and UBN layers.

    Like ``timm.utils.freeze``, which replaces ``BatchNorm2d`` with ``FrozenBatchNorm2d``. UBN layers stay the same
    objects, as after :func:`ubn_zoo.freeze_ubn`: fixed running statistics and no update of the gate, in training too.

    Args:
        model: Changed in place.
        submodules: Names of the parts to freeze; the whole model by default.
        include_bn_running_stats: Whether to freeze statistics and gates, not only parameters.

    Raises:
        AttributeError: The model has no submodule with one of these names.
        ValueError: A UBN layer to freeze has no running statistics.
    """
    names = [submodules] if isinstance(submodules, str) else list(submodules)
    if include_bn_running_stats:
        for part in _parts(model, names):
            # This precedes timm's freezing of parameters, because the layers record which of theirs were trainable.
            if has_ubn(part):
                freeze_ubn(part)
    _freeze(model, names, include_bn_running_stats)


def unfreeze(model: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True) -> None:
    """Unfreezes a model or parts of it: every parameter becomes trainable, and statistics and gates are updated again.

    Like ``timm.utils.unfreeze``, which replaces ``FrozenBatchNorm2d`` with ``BatchNorm2d``.

    Args:
        model: Changed in place.
        submodules: Names of the parts to unfreeze; the whole model by default.
        include_bn_running_stats: Whether to unfreeze statistics and gates, not only parameters.

    Raises:
        AttributeError: The model has no submodule with one of these names.
    """
    names = [submodules] if isinstance(submodules, str) else list(submodules)
    if include_bn_running_stats:
        for part in _parts(model, names):
            if has_ubn(part):
                unfreeze_ubn(part)
    _unfreeze(model, names, include_bn_running_stats)


def _cumulative_similarity(layer: nn.Module, _: Any) -> None:
    # Set before each call, because non-finite batches do not count.
    if isinstance(layer, UnifiedBatchNorm2d) and layer.num_batches_tracked is not None:
        layer.similarity_momentum = 1 / (int(layer.num_batches_tracked) + 1)


@contextmanager
def estimating(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Makes norms use cumulative averages, with the model in training mode; restores buffers if the body fails."""
    modes = {module: module.training for module in model.modules()}
    settings = [
        {
            name: getattr(layer, name)
            for name in ("momentum", "threshold", "similarity_momentum")
            if hasattr(layer, name)
        }
        for layer in layers
    ]
    buffers = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    handles = []
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            if isinstance(layer, UnifiedBatchNorm2d):
                handles.append(layer.register_forward_pre_hook(_cumulative_similarity))
                if layer.threshold is not None:
                    layer.threshold = _ALWAYS_OPEN
        yield
    except BaseException:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for layer, before in zip(layers, settings, strict=True):
            for name, value in before.items():
                setattr(layer, name, value)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def update_statistics(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Re-estimates the running statistics of BatchNorm and UBN layers from data, for averaged (SWA, EMA) weights for
    example.

    Like ``torch.optim.swa_utils.update_bn``: one pass over the data in training mode, dropout included, without
    gradients. Afterwards mean and variance are the averages over the batches.

    During the pass a UBN layer always normalizes with batch statistics, even if its gate is closed: outdated running
    statistics must not affect the inputs of later layers. Its gate is re-estimated too: afterwards
    ``feature_similarity`` is the mean over the batches of the similarity that the layer measures, so the gate in
    further training starts from the re-estimated value. Layers without a gate (``threshold=None``) reset it to 1.
    Batches with non-finite statistics do not count. Frozen layers stay unchanged. Compiled models run eagerly.

    The average is only as good as the batches: use the batch size of training, or larger, and shuffled data.

    Args:
        loader: Batches: tensors, or tuples and lists whose first element is the model's input.
        model: Changed in place; its training mode is kept.
        device: Device to move batches to; by default they are not moved.

    Raises:
        InvalidArgumentError: No layer has running statistics to estimate, or the loader yields no batch. The statistics
            are unchanged then, and after any other error.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (_BatchNorm, UnifiedBatchNorm2d))
        and module.running_mean is not None
        and not getattr(module, "frozen", False)
    ]
    if not layers:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no BatchNorm or UBN layer with running statistics that are not frozen; "
            "unfreeze them first, or re-estimate before `ubn_zoo.fuse`"
        )
    with torch.compiler.set_stance("force_eager"), estimating(model, layers):
        batches = 0
        for batch in loader:
            images = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(images if device is None else images.to(device))
            batches += 1
        if batches == 0:
            raise InvalidArgumentError("the loader yields no batch; statistics need at least one")


def weight_decay_groups(
    model: nn.Module, weight_decay: float, no_weight_decay: str | Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: no weight decay for UBN's parameters, biases and vectors.

    timm's rule and most hand-written ones depend on the number of dimensions and would decay UBN's depthwise kernels,
    which replace BatchNorm's weight. This works for any model that contains UBN layers: converted ones,
    ``features_only=True``, ``nn.Sequential(twin, head)``.

    Args:
        model: Its trainable parameters are grouped, each once.
        weight_decay: Weight decay of all other parameters.
        no_weight_decay: Names or wildcard patterns of further parameters without decay. Parameters that a module lists
            in ``no_weight_decay()``, as in timm, are included automatically.

    Returns:
        Two groups for the optimizer's first argument: without decay, and with it.

    Raises:
        InvalidArgumentError: A negative weight decay.
    """
    if weight_decay < 0:
        raise InvalidArgumentError(f"weight_decay is {weight_decay}, valid are 0 and positive numbers")
    patterns = [no_weight_decay] if isinstance(no_weight_decay, str) else list(no_weight_decay)
    named = names_without_decay(model)
    without: list[nn.Parameter] = []
    with_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim <= 1 or name.endswith(".bias")
        listed = name in named or any(fnmatchcase(name, pattern) for pattern in patterns)
        (without if vector or listed else with_decay).append(parameter)
    return [{"params": without, "weight_decay": 0.0}, {"params": with_decay, "weight_decay": weight_decay}]
