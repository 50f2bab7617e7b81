"""Conversion of one layer's state dict entries from BatchNorm's and the authors' formats."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .parameters import CALIBRATIONS

__all__ = ["affine_gain", "identity_kernel", "upgrade_layer_state"]

_AUTHORS_AFFINE = {"bnconv.weight": "weight", "bnconv.bias": "bias"}
_ENTRIES = ("weight", "bias", "running_mean", "feature_similarity", *CALIBRATIONS, *_AUTHORS_AFFINE)


def affine_gain(scale_calibration: bool) -> float:
    """The affine's factor that offsets an untrained calibration: 1 / sigmoid(1), or 1 without calibration."""
    return 1 + math.exp(-1) if scale_calibration else 1.0


def identity_kernel(weight: Tensor, kernel_size: int, gain: float) -> Tensor:
    """The (C, 1, k, k) depthwise kernel that multiplies every channel by ``gain`` times ``weight``, (C,)."""
    kernel = weight.new_zeros((weight.shape[0], 1, kernel_size, kernel_size))
    kernel[:, 0, kernel_size // 2, kernel_size // 2] = weight * gain
    return kernel


def upgrade_layer_state(state_dict: MutableMapping[str, Any], prefix: str, layer: nn.Module) -> None:
    """Rewrites one layer's entries of a state dict to UBN's format, in place; UBN's own entries stay unchanged.

    Supported are the authors' released format (``bnconv.weight``, calibrations of shape (1, C, 1, 1)) and BatchNorm's
    (``weight`` of shape (C,)), whose affine becomes the depthwise kernel that computes the same function. Neither
    stores the state of the gate, which gets its initial value. Missing entries and entries of the wrong shape are left
    for ``load_state_dict`` to report.

    Args:
        state_dict: State dict of the whole model.
        prefix: Prefix of the layer's keys, including the dot.
        layer: The UnifiedBatchNorm2d that the entries are for.
    """
    entries = {name: state_dict[prefix + name] for name in _ENTRIES if prefix + name in state_dict}
    if _is_authors(entries):
        for theirs, ours in _AUTHORS_AFFINE.items():
            if theirs in entries and ours not in entries:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        for name in CALIBRATIONS:
            value: Any = entries.get(name)
            if isinstance(value, Tensor) and value.dim() == 4 and value.numel() == value.shape[1]:
                state_dict[prefix + name] = value.reshape(-1)
    elif _is_batchnorm(entries, layer):
        _upgrade_batchnorm(state_dict, prefix, layer)
    else:
        return
    if layer.feature_similarity is not None:
        state_dict.setdefault(prefix + "feature_similarity", torch.ones([]))


def _is_authors(entries: dict[str, Any]) -> bool:
    calibrations = [entries[name] for name in CALIBRATIONS if name in entries]
    return any(key in entries for key in _AUTHORS_AFFINE) or any(
        isinstance(value, Tensor) and value.dim() == 4 for value in calibrations
    )


def _is_batchnorm(entries: dict[str, Any], layer: nn.Module) -> bool:
    if "feature_similarity" in entries or any(name in entries for name in CALIBRATIONS):
        return False
    if "weight" in entries:
        return isinstance(entries["weight"], Tensor) and entries["weight"].dim() == 1
    return getattr(layer, "weight", None) is None and "running_mean" in entries


def _upgrade_batchnorm(state_dict: MutableMapping[str, Any], prefix: str, layer: Any) -> None:
    gain = affine_gain(layer.scale_bias is not None)
    weight = state_dict.get(prefix + "weight")
    if weight is not None and layer.weight is not None:
        state_dict[prefix + "weight"] = identity_kernel(weight, layer.kernel_size, gain)
        if prefix + "bias" in state_dict:
            state_dict[prefix + "bias"] = state_dict[prefix + "bias"] * gain
    for name, start in CALIBRATIONS.items():
        if getattr(layer, name) is not None:
            dtype = getattr(layer, name).dtype if weight is None else weight.dtype
            state_dict[prefix + name] = torch.full((layer.num_features,), start, dtype=dtype)
    if layer.num_batches_tracked is not None:
        # Old checkpoints lack it: early versions of BatchNorm did not count batches.
        state_dict.setdefault(prefix + "num_batches_tracked", torch.zeros([], dtype=torch.long))
