"""Warnings about tools that look for BatchNorm by class and silently skip UBN layers."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["check_training", "check_walk"]

_INSTALL = "or call ubn_zoo.interop.install() first, or run the script with `ubn-zoo exec`"
_LIBRARIES = ("timm", "torch", "transformers")
_DEPTH = 4

# Functions that search a model for BatchNorm: whether a layer already has the intended state, and what to do if not.
_WALKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "convert_sync_batchnorm": (
        lambda layer: layer._sync is not None,
        "does not synchronize UBN layers; call ubn_zoo.convert_sync_ubn(model)",
    ),
    "freeze_batch_norm_2d": (lambda layer: layer.frozen, "does not freeze UBN layers; call ubn_zoo.freeze_ubn(model)"),
    "replace_batch_norm": (
        lambda layer: layer.frozen,
        "does not freeze UBN layers; call ubn_zoo.freeze_ubn(model) on the backbone",
    ),
    "unfreeze_batch_norm_2d": (
        lambda layer: not layer.frozen,
        "leaves UBN layers frozen; call ubn_zoo.unfreeze_ubn(model)",
    ),
    "convert_splitbn_model": (
        lambda layer: hasattr(layer, "aux_bn"),
        "gives UBN layers no auxiliary norms; call ubn_zoo.layers.split.convert_split_ubn(model)",
    ),
}
_warned: set[str] = set()
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=4)


def check_walk(layer: nn.Module) -> None:
    """Warns once if the caller of a layer's ``named_children`` looks for BatchNorm and skips this layer."""
    if torch.compiler.is_compiling():
        return
    frame: Any = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return
        name = frame.f_code.co_name
        if name in _WALKS and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
            done, text = _WALKS[name]
            if not done(layer):
                _warn_once(name, f"{name} {text}, {_INSTALL}")
            return
        frame = frame.f_back


def check_training(layer: Any) -> None:
    """Warns once if parameters are frozen but statistics are not, or if BatchNorm is synchronized but UBN is not."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        _warn_once(
            "frozen",
            "the parameters of a UBN layer are frozen, but its running statistics and gate still change in training; "
            f"call ubn_zoo.freeze_ubn(model) to stop them, {_INSTALL}",
        )
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and layer._sync is None and ddp not in _checked:
        _checked.add(ddp)
        if any(isinstance(module, nn.SyncBatchNorm) for module in ddp.modules()):
            _warn_once(
                "synchronized",
                "the model's BatchNorm layers are synchronized over ranks, but its UBN layers are not; call "
                f"ubn_zoo.convert_sync_ubn(model), {_INSTALL}",
            )
