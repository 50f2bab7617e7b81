"""The parts of torch, timm and other libraries that :func:`ubn_zoo.interop.install` replaces, and the replacements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import timm.layers.norm_act
import timm.layers.split_batchnorm
import timm.utils.distributed
import timm.utils.model
import torch
import torch.optim.swa_utils
from torch import nn

from ubn_zoo.layers import UnifiedBatchNorm2d, UnifiedBatchNormAct2d, convert_sync_ubn, freeze_ubn, unfreeze_ubn
from ubn_zoo.layers.split import convert_split_ubn, is_split

from .norms import estimating, freeze, has_ubn, unfreeze, update_statistics
from .operations import calflops_handler, ptflops_handler, thop_handler

__all__ = ["FUNCTIONS", "LIBRARIES", "Replacement", "sync_of_torch"]

# An object or dict, the name of its attribute or key, and the new value.
Replacement = tuple[Any, Any, Any]

_CLASSES = (UnifiedBatchNorm2d, UnifiedBatchNormAct2d)

_freeze_norms = timm.layers.norm_act.freeze_batch_norm_2d
_unfreeze_norms = timm.layers.norm_act.unfreeze_batch_norm_2d
_freeze = timm.utils.model.freeze
_unfreeze = timm.utils.model.unfreeze
_distribute_bn = timm.utils.distributed.distribute_bn
_sync_of_timm = timm.layers.norm_act.convert_sync_batchnorm
_split = timm.layers.split_batchnorm.convert_splitbn_model
_update_bn = torch.optim.swa_utils.update_bn
_sync_of_torch = nn.SyncBatchNorm.__dict__["convert_sync_batchnorm"]


@functools.wraps(_freeze_norms)
def _freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    if has_ubn(module):
        freeze_ubn(module)
    return _freeze_norms(module)


@functools.wraps(_unfreeze_norms)
def _unfreeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    if has_ubn(module):
        unfreeze_ubn(module)
    return _unfreeze_norms(module)


@functools.wraps(_sync_of_timm)
def _timm_convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    if has_ubn(module):
        convert_sync_ubn(module, process_group)
    return _sync_of_timm(module, process_group)


@functools.wraps(_sync_of_torch.__func__)
def _torch_convert_sync(cls: Any, module: nn.Module, process_group: Any = None) -> nn.Module:
    if has_ubn(module):
        convert_sync_ubn(module, process_group)
    return _sync_of_torch.__func__(cls, module, process_group)


@functools.wraps(_split)
def _convert_splitbn_model(module: nn.Module, num_splits: int = 2) -> nn.Module:
    # timm's function calls this one recursively for every child.
    if is_split(module):
        return module
    if has_ubn(module):
        convert_split_ubn(module, num_splits)
    return _split(module, num_splits)


@functools.wraps(_update_bn)
def _update_statistics(loader: Iterable[Any], model: nn.Module, device: Any = None) -> None:
    if any(isinstance(module, UnifiedBatchNorm2d) and not module.frozen for module in model.modules()):
        update_statistics(loader, model, device)
    else:
        _update_bn(loader, model, device)


@functools.wraps(_distribute_bn)
def _distribute(model: nn.Module, world_size: int, reduce: bool = False) -> None:
    # timm's function finds running means and variances by name, including UBN's, but not the gates.
    _distribute_bn(model, world_size, reduce)
    for module in timm.utils.model.unwrap_model(model).modules():
        if isinstance(module, UnifiedBatchNorm2d) and module.feature_similarity is not None:
            if reduce:
                torch.distributed.all_reduce(module.feature_similarity)
                module.feature_similarity /= float(world_size)
            else:
                torch.distributed.broadcast(module.feature_similarity, 0)


# Wrappers instead of `freeze` and `unfreeze`: `uninstall` would also replace those where users imported them from here.
def _freeze_model(root_module: nn.Module, submodules: Any = (), include_bn_running_stats: bool = True) -> None:
    freeze(root_module, submodules, include_bn_running_stats)


def _unfreeze_model(root_module: nn.Module, submodules: Any = (), include_bn_running_stats: bool = True) -> None:
    unfreeze(root_module, submodules, include_bn_running_stats)


# Functions that many modules import by name.
FUNCTIONS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (_freeze_norms, _freeze_batch_norm_2d),
    (_unfreeze_norms, _unfreeze_batch_norm_2d),
    (_freeze, _freeze_model),
    (_unfreeze, _unfreeze_model),
    (_distribute_bn, _distribute),
    (_sync_of_timm, _timm_convert_sync),
    (_split, _convert_splitbn_model),
    (_update_bn, _update_statistics),
]


def sync_of_torch() -> Replacement:
    """The replacement of ``SyncBatchNorm.convert_sync_batchnorm``."""
    return nn.SyncBatchNorm, "convert_sync_batchnorm", classmethod(_torch_convert_sync)


def _lightning_finetuning(library: Any) -> Iterator[Replacement]:
    base = library.BaseFinetuning
    freeze_module, make_trainable = base.freeze_module, base.make_trainable

    def freeze_one(module: nn.Module) -> None:
        if isinstance(module, UnifiedBatchNorm2d):
            freeze_ubn(module)
        else:
            freeze_module(module)

    def unfreeze_all(modules: Any) -> None:
        layers = [module for module in base.flatten_modules(modules) if isinstance(module, UnifiedBatchNorm2d)]
        for layer in layers:
            unfreeze_ubn(layer)
        make_trainable(modules)
        for layer in layers:
            # Lightning sets it on every BatchNorm.
            layer.track_running_stats = layer.running_mean is not None

    # The class that `isinstance` checks for there.
    yield library, "_BatchNorm", (library._BatchNorm, UnifiedBatchNorm2d)
    yield base, "freeze_module", staticmethod(freeze_one)
    yield base, "make_trainable", staticmethod(unfreeze_all)


def _lightning_swa(library: Any) -> Iterator[Replacement]:
    callback = library.StochasticWeightAveraging
    contains, start, end = (
        callback.pl_module_contains_batch_norm,
        callback.reset_batch_norm_and_save_state,
        callback.reset_momenta,
    )

    def layers_of(model: nn.Module) -> list[UnifiedBatchNorm2d]:
        return [
            module
            for module in model.modules()
            if isinstance(module, UnifiedBatchNorm2d) and module.running_mean is not None and not module.frozen
        ]

    def contains_norms(model: nn.Module) -> bool:
        return contains(model) or bool(layers_of(model))

    def start_estimating(self: Any, model: nn.Module) -> None:
        start(self, model)
        self._ubn_estimation = estimating(model, layers_of(model))
        self._ubn_estimation.__enter__()

    def stop_estimating(self: Any) -> None:
        end(self)
        self.__dict__.pop("_ubn_estimation").__exit__(None, None, None)

    yield callback, "pl_module_contains_batch_norm", staticmethod(contains_norms)
    yield callback, "reset_batch_norm_and_save_state", start_estimating
    yield callback, "reset_momenta", stop_estimating


def _fastai_norms(library: Any) -> Iterator[Replacement]:
    yield library, "norm_types", (*library.norm_types, UnifiedBatchNorm2d)


def _fastai_freezing(library: Any) -> Iterator[Replacement]:
    yield library, "bn_types", (*library.bn_types, UnifiedBatchNorm2d)


def _transformers(library: Any) -> Iterator[Replacement]:
    original = vars(library).get("replace_batch_norm")
    if original is None:
        return

    @functools.wraps(original)
    def replace_batch_norm(model: nn.Module) -> None:
        if has_ubn(model):
            freeze_ubn(model)
        original(model)

    yield library, "replace_batch_norm", replace_batch_norm


def _opacus(library: Any) -> Iterator[Replacement]:
    from opacus.validators.errors import ShouldReplaceModuleError

    def refuse(layer: nn.Module) -> list[Exception]:
        return [ShouldReplaceModuleError("UBN mixes the samples of a batch, as BatchNorm does; use GroupNorm")]

    def fix(layer: Any, **_: Any) -> nn.Module:
        norm = nn.GroupNorm(math.gcd(32, layer.num_features), layer.num_features, affine=layer.affine)
        return nn.Sequential(norm, layer.drop, layer.act) if isinstance(layer, UnifiedBatchNormAct2d) else norm

    for cls in _CLASSES:
        yield library.ModuleValidator.VALIDATORS, cls, refuse
        yield library.ModuleValidator.FIXERS, cls, fix


def _thop(library: Any) -> Iterator[Replacement]:
    for cls in _CLASSES:
        yield library.register_hooks, cls, thop_handler


def _ptflops(library: Any) -> Iterator[Replacement]:
    for cls in _CLASSES:
        yield library.MODULES_MAPPING, cls, ptflops_handler


def _calflops(library: Any) -> Iterator[Replacement]:
    for cls in _CLASSES:
        yield library.MODULE_HOOK_MAPPING, cls, calflops_handler


# Wildcard patterns of modules, and the changes to make in each once it is imported.
LIBRARIES: dict[str, Callable[[Any], Iterator[Replacement]]] = {
    "lightning.pytorch.callbacks.finetuning": _lightning_finetuning,
    "pytorch_lightning.callbacks.finetuning": _lightning_finetuning,
    "lightning.pytorch.callbacks.stochastic_weight_avg": _lightning_swa,
    "pytorch_lightning.callbacks.stochastic_weight_avg": _lightning_swa,
    "fastai.torch_core": _fastai_norms,
    "fastai.callback.training": _fastai_freezing,
    "transformers.models.*.modeling_*": _transformers,
    "opacus.validators.module_validator": _opacus,
    "thop.profile": _thop,
    "ptflops.pytorch_ops": _ptflops,
    "calflops.pytorch_ops": _calflops,
}
