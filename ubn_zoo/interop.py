"""UBN for tools that look for BatchNorm by class: freezing, re-estimated statistics, weight decay, synchronization.

Each function here handles BatchNorm and UBN alike. :func:`install` makes the functions of torch and timm that have the
same purpose do so too, for scripts that cannot be changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import timm.layers.norm_act
import timm.utils.distributed
import timm.utils.model
import torch
import torch.optim.swa_utils
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_zoo.errors import InvalidArgumentError
from ubn_zoo.layers import UnifiedBatchNorm2d, convert_sync_ubn, freeze_ubn, unfreeze_ubn

__all__ = ["Installation", "freeze", "install", "unfreeze", "uninstall", "update_statistics", "weight_decay_groups"]

_freeze_norms = timm.layers.norm_act.freeze_batch_norm_2d
_unfreeze_norms = timm.layers.norm_act.unfreeze_batch_norm_2d
_freeze = timm.utils.model.freeze
_unfreeze = timm.utils.model.unfreeze
_distribute_bn = timm.utils.distributed.distribute_bn
_sync_of_timm = timm.layers.norm_act.convert_sync_batchnorm
_update_bn = torch.optim.swa_utils.update_bn
_sync_of_torch = nn.SyncBatchNorm.__dict__["convert_sync_batchnorm"]

# Cosines are larger, so that the gate is open whatever they are.
_ALWAYS_OPEN = -2.0


def _has_ubn(model: nn.Module) -> bool:
    return any(isinstance(module, UnifiedBatchNorm2d) for module in model.modules())


def _parts(model: nn.Module, submodules: str | Iterable[str]) -> list[nn.Module]:
    names = [submodules] if isinstance(submodules, str) else list(submodules)
    return [model.get_submodule(name) for name in names] or [model]


def freeze(model: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True) -> None:
    """Freezes a model or parts of it, the statistics and gates of BatchNorm and UBN layers included.

    Like ``timm.utils.freeze``, which replaces ``BatchNorm2d`` by ``FrozenBatchNorm2d``. UBN layers stay the same
    objects, as after :func:`ubn_zoo.freeze_ubn`: fixed running statistics and no update of the gate, in training too.

    Args:
        model: Changed in place.
        submodules: Names of the parts to freeze; the whole model by default.
        include_bn_running_stats: Whether to freeze statistics and gates, not only parameters.

    Raises:
        AttributeError: The model has no submodule of that name.
        ValueError: A UBN layer to freeze has no running statistics.
    """
    names = [submodules] if isinstance(submodules, str) else list(submodules)
    if include_bn_running_stats:
        for part in _parts(model, names):
            # Before timm freezes the parameters: the layers remember which of theirs were trainable.
            if _has_ubn(part):
                freeze_ubn(part)
    _freeze(model, names, include_bn_running_stats)


def unfreeze(model: nn.Module, submodules: str | Iterable[str] = (), include_bn_running_stats: bool = True) -> None:
    """Unfreezes a model or parts of it: every parameter becomes trainable, and statistics and gates move again.

    Like ``timm.utils.unfreeze``, which replaces ``FrozenBatchNorm2d`` by ``BatchNorm2d``.

    Args:
        model: Changed in place.
        submodules: Names of the parts to unfreeze; the whole model by default.
        include_bn_running_stats: Whether to unfreeze statistics and gates, not only parameters.

    Raises:
        AttributeError: The model has no submodule of that name.
    """
    names = [submodules] if isinstance(submodules, str) else list(submodules)
    if include_bn_running_stats:
        for part in _parts(model, names):
            if _has_ubn(part):
                unfreeze_ubn(part)
    _unfreeze(model, names, include_bn_running_stats)


def _cumulative_similarity(layer: nn.Module, _: Any) -> None:
    # Set anew before each call, since batches that are not finite do not count.
    if isinstance(layer, UnifiedBatchNorm2d) and layer.num_batches_tracked is not None:
        layer.similarity_momentum = 1 / (int(layer.num_batches_tracked) + 1)


@contextmanager
def _estimating(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Lets norms average cumulatively, with the model in training mode; restores buffers if the body fails."""
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
    """Re-estimates the running statistics of BatchNorm and UBN layers from data, as for averaged (SWA, EMA) weights.

    Like ``torch.optim.swa_utils.update_bn``: one pass over the data in training mode, dropout included, without
    gradients. Afterwards mean and variance are the averages over the batches.

    A UBN layer normalizes with batch statistics during the whole pass, whatever its gate says: running statistics that
    are to be replaced must not determine what later layers receive. Its gate is re-estimated too: afterwards
    ``feature_similarity`` is the mean over the batches of the similarity that the layer measures, so the gate in
    further training starts from the re-estimated value. Layers without a gate (``threshold=None``) start it at 1 again.
    Batches whose statistics are not finite do not count. Frozen layers are left alone. Compiled models run eagerly.

    The average is only as good as the batches: use the batch size of training, or larger, and shuffled data.

    Args:
        loader: Batches: tensors, or tuples and lists whose first element is the model's input.
        model: Changed in place; its training mode is kept.
        device: Where batches are moved before they enter the model; by default they stay where they are.

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
    with torch.compiler.set_stance("force_eager"), _estimating(model, layers):
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

    timm's and most hand-written rules go by the number of dimensions and would decay the depthwise kernels of UBN,
    which stand where BatchNorm has its weight. This works for any model that contains UBN layers: converted ones,
    ``features_only=True``, ``nn.Sequential(twin, head)``.

    Args:
        model: Its trainable parameters are grouped, each once.
        weight_decay: Of all other parameters.
        no_weight_decay: Names or wildcard patterns of further parameters without decay. What a module of the model
            names in its own ``no_weight_decay()``, as in timm, needs no mention.

    Returns:
        Two groups for the optimizer's first argument: without decay, and with it.

    Raises:
        InvalidArgumentError: A negative weight decay.
    """
    if weight_decay < 0:
        raise InvalidArgumentError(f"weight_decay is {weight_decay}, valid are 0 and positive numbers")
    patterns = [no_weight_decay] if isinstance(no_weight_decay, str) else list(no_weight_decay)
    exempt: set[int] = set()
    named: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, UnifiedBatchNorm2d):
            exempt |= {id(parameter) for parameter in module.parameters(recurse=False)}
        theirs = getattr(module, "no_weight_decay", None)
        if callable(theirs):
            named |= {f"{name}.{parameter}" if name else parameter for parameter in theirs()}
    without: list[nn.Parameter] = []
    with_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim <= 1 or name.endswith(".bias")
        listed = name in named or any(fnmatchcase(name, pattern) for pattern in patterns)
        (without if vector or listed or id(parameter) in exempt else with_decay).append(parameter)
    return [{"params": without, "weight_decay": 0.0}, {"params": with_decay, "weight_decay": weight_decay}]


@functools.wraps(_freeze_norms)
def _freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    if _has_ubn(module):
        freeze_ubn(module)
    return _freeze_norms(module)


@functools.wraps(_unfreeze_norms)
def _unfreeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    if _has_ubn(module):
        unfreeze_ubn(module)
    return _unfreeze_norms(module)


@functools.wraps(_sync_of_timm)
def _timm_convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    if _has_ubn(module):
        convert_sync_ubn(module, process_group)
    return _sync_of_timm(module, process_group)


@functools.wraps(_sync_of_torch.__func__)
def _torch_convert_sync(cls: Any, module: nn.Module, process_group: Any = None) -> nn.Module:
    if _has_ubn(module):
        convert_sync_ubn(module, process_group)
    return _sync_of_torch.__func__(cls, module, process_group)


@functools.wraps(_update_bn)
def _update_statistics(loader: Iterable[Any], model: nn.Module, device: Any = None) -> None:
    if any(isinstance(module, UnifiedBatchNorm2d) and not module.frozen for module in model.modules()):
        update_statistics(loader, model, device)
    else:
        _update_bn(loader, model, device)


@functools.wraps(_distribute_bn)
def _distribute(model: nn.Module, world_size: int, reduce: bool = False) -> None:
    # timm's function finds running means and variances by their names, UBN's too, but not the gates.
    _distribute_bn(model, world_size, reduce)
    for module in timm.utils.model.unwrap_model(model).modules():
        if isinstance(module, UnifiedBatchNorm2d) and module.feature_similarity is not None:
            if reduce:
                torch.distributed.all_reduce(module.feature_similarity)
                module.feature_similarity /= float(world_size)
            else:
                torch.distributed.broadcast(module.feature_similarity, 0)


_REPLACEMENTS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (_freeze_norms, _freeze_batch_norm_2d),
    (_unfreeze_norms, _unfreeze_batch_norm_2d),
    (_freeze, freeze),
    (_unfreeze, unfreeze),
    (_distribute_bn, _distribute),
    (_sync_of_timm, _timm_convert_sync),
    (_update_bn, _update_statistics),
]
_installed = False


def _replace(pairs: Iterable[tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Replaces functions in every imported module that holds them."""
    new = {id(before): after for before, after in pairs}
    for name, module in list(sys.modules.items()):
        if name == __name__ or not isinstance(namespace := getattr(module, "__dict__", None), dict):
            continue
        for key, value in list(namespace.items()):
            if id(value) in new:
                namespace[key] = new[id(value)]


class Installation:
    """What :func:`install` returns. As a context manager it uninstalls on exit what that call installed."""

    def __init__(self, first: bool) -> None:
        self._first = first

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._first:
            uninstall()


def install() -> Installation:
    """Makes functions of torch and timm handle UBN layers too, in every module that has imported them.

    These are timm's ``freeze_batch_norm_2d``, ``unfreeze_batch_norm_2d``, ``freeze``, ``unfreeze``,
    ``convert_sync_batchnorm`` and ``distribute_bn``, and torch's ``update_bn`` and
    ``SyncBatchNorm.convert_sync_batchnorm``. For all other layers they do what they did before. References held
    elsewhere than in a module's namespace (an attribute of an object, a closure) are not found.

    Calling it again changes nothing. ``ubn-zoo exec`` calls it for a script.

    Returns:
        A context manager that uninstalls on exit; the functions stay replaced when it is not used as one.
    """
    global _installed
    first, _installed = not _installed, True
    if first:
        _replace(_REPLACEMENTS)
        setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", classmethod(_torch_convert_sync))  # noqa: B010 - mypy
    return Installation(first)


def uninstall() -> None:
    """Undoes :func:`install`; does nothing if it was not called."""
    global _installed
    if _installed:
        _replace((after, before) for before, after in _REPLACEMENTS)
        setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", _sync_of_torch)  # noqa: B010 - mypy
    _installed = False
