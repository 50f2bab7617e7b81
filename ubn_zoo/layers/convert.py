"""Conversions between BatchNorm and UBN: models, state dicts, ranks, freezing."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from .distributed import SyncGroup
from .parameters import CALIBRATIONS
from .state import upgrade_layer_state
from .ubn import UnifiedBatchNorm2d, UnifiedBatchNormAct2d

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "convert_batchnorm",
    "convert_state_dict",
    "convert_sync_ubn",
    "freeze_ubn",
    "mark_no_weight_decay",
    "no_weight_decay",
    "unfreeze_ubn",
]

_logger = logging.getLogger(__name__)

# The first is torchvision's class, which timm re-exports.
_FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
# BatchNorm classes whose forward is known.
BATCHNORMS = (nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm, SyncBatchNormAct)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def ubn_layers(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, UnifiedBatchNorm2d]]:
    """Iterates over the names and UBN layers of a model."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, UnifiedBatchNorm2d):
            yield name, module


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of parameters to exclude from weight decay: those of UBN layers, and those that other modules list.

    A rule based on the number of dimensions would decay the depthwise kernels, which replace BatchNorm's weight.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        names: Any = ()
        if isinstance(module, UnifiedBatchNorm2d):
            names = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        elif module is model:
            theirs = getattr(type(model), "no_weight_decay", None)
            names = theirs(model) if callable(theirs) else ()
        elif callable(getattr(module, "no_weight_decay", None)):
            names = module.no_weight_decay()
        found |= {f"{name}.{parameter}" if name else parameter for parameter in names}
    return found


def mark_no_weight_decay(model: nn.Module) -> None:
    """Makes ``model.no_weight_decay()``, which timm's optimizers call, return :func:`no_weight_decay`."""
    setattr(model, "no_weight_decay", functools.partial(no_weight_decay, model))  # noqa: B010 - no submodule


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Converts a state dict of BatchNorm's or the authors' format for a UBN model of the same architecture.

    Args:
        state_dict: A state dict of the BatchNorm model, in the authors' released format, or already in UBN's format.
            Not modified.
        model: The UBN model.

    Returns:
        A new dict. Only entries of UBN layers are rewritten; missing and unexpected entries and wrong shapes are left
        for ``load_state_dict`` to report.
    """
    converted = dict(state_dict)
    for name, layer in ubn_layers(model, remove_duplicate=False):
        upgrade_layer_state(converted, f"{name}." if name else "", layer)
    return converted


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm2d, *_FROZEN))


def _check_convertible(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.LazyBatchNorm2d):
        raise TypeError(f"{name or 'the model'} is a LazyBatchNorm2d; run one batch through the model first")
    if not any(type(module).forward is kind.forward for kind in (*BATCHNORMS, *_FROZEN)):
        raise TypeError(
            f"{name or 'the model'} is a {type(module).__name__}, a BatchNorm with its own forward, which UBN cannot "
            "replace; replace it by torch.nn.BatchNorm2d or timm's BatchNormAct2d first"
        )


# The bias of a residual branch that starts at zero: after the calibration factor it is still nonzero in float16 (whose
# smallest number is 2**-24), and it is about as large as float32's rounding errors.
_OFFSET = 2.0**-22


def _offset(batchnorm: Any) -> Tensor:
    """Returns the offset (C,) that lets a zero-initialized residual branch receive gradients.

    timm initializes the last BatchNorm of a residual branch with weight and bias 0. If the shortcut is also constant
    over the batch, UBN normalizes it to exactly 0, while BatchNorm leaves rounding errors. The ReLU of their sum would
    then pass no gradient, and the block would never change. A positive offset lets the gradient through. Only an
    untrained BatchNorm, whose running statistics have their initial values, gets the offset; a trained one converts
    exactly.
    """
    fresh = (batchnorm.running_mean == 0).all() & (batchnorm.running_var == 1).all()
    return fresh * (batchnorm.weight == 0) * (batchnorm.bias == 0) * _OFFSET


def _from_batchnorm(batchnorm: Any, settings: dict[str, Any]) -> UnifiedBatchNorm2d:
    frozen = isinstance(batchnorm, _FROZEN)
    affine = frozen or batchnorm.affine
    reference = batchnorm.weight if affine else batchnorm.running_mean
    arguments = {
        "num_features": batchnorm.weight.numel() if frozen else batchnorm.num_features,
        "eps": batchnorm.eps,
        "momentum": getattr(batchnorm, "momentum", 0.1),
        "affine": affine,
        "track_running_stats": batchnorm.running_mean is not None,
        "device": None if reference is None else reference.device,
        "dtype": None if reference is None else reference.dtype,
        **settings,
    }
    if not affine:
        # Without an affine nothing compensates for the calibration factor, which starts at sigmoid(1).
        arguments["scale_calibration"] = False
    layer: UnifiedBatchNorm2d
    if isinstance(batchnorm, (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)):
        layer = UnifiedBatchNormAct2d(**arguments, apply_act=False)
        for name in ("drop", "act"):
            layer.add_module(name, getattr(batchnorm, name))
    else:
        layer = UnifiedBatchNorm2d(**arguments)
    if isinstance(batchnorm, nn.SyncBatchNorm):
        layer._sync = SyncGroup(batchnorm.process_group)
    if frozen and layer.running_mean is None:
        raise ValueError("a frozen BatchNorm keeps its running statistics: convert it without track_running_stats")

    with torch.no_grad():
        if layer.weight is not None:
            if layer.kernel_init == "identity":
                layer.set_affine(batchnorm.weight, batchnorm.bias)
            else:
                # A zero-initialized channel (timm's zero_init_last) stays zero with any kernel.
                layer.weight.mul_((batchnorm.weight != 0)[:, None, None, None])
        if not frozen and layer.bias is not None and batchnorm.running_mean is not None:
            layer.bias.add_(_offset(batchnorm).to(layer.bias))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(batchnorm, name, None)
            if value is not None:
                getattr(layer, name).copy_(value)
    _copy_attributes(batchnorm, layer)
    if frozen:
        freeze_ubn(layer)
        return layer
    if affine:
        for name in ("weight", "bias"):
            getattr(layer, name).requires_grad_(getattr(batchnorm, name).requires_grad)
    trainable = batchnorm.weight is None or batchnorm.weight.requires_grad
    for name in CALIBRATIONS:
        parameter = getattr(layer, name)
        if parameter is not None:
            parameter.requires_grad_(trainable)
    return layer


def _copy_attributes(batchnorm: nn.Module, layer: UnifiedBatchNorm2d) -> None:
    layer.training = batchnorm.training
    for name in _HOOKS:
        if name in batchnorm.__dict__:
            layer.__dict__[name] = batchnorm.__dict__[name]
    for name, value in batchnorm.__dict__.items():
        layer.__dict__.setdefault(name, value)


def _patterns(names: str | Iterable[str] | None) -> list[str]:
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a pattern matches the name of a module or of one of its parents."""
    parts = name.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(around, pattern) for around in names for pattern in patterns)


def _counted(modules: Iterable[nn.Module]) -> str:
    counts = Counter(type(module).__name__ for module in modules)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _report(model: nn.Module, converted: Iterable[nn.Module], filtered: list[nn.Module]) -> None:
    lines = [f"converted to UBN in {type(model).__name__}: {_counted(converted)}"]
    if filtered:
        lines.append(f"left by include and exclude: {_counted(filtered)}")
    other = [
        module
        for module in model.modules()
        if "Norm" in type(module).__name__
        and not isinstance(module, UnifiedBatchNorm2d)
        and not _is_batchnorm(module)
        and not any(module.children())
    ]
    if other:
        lines.append(f"left, no UBN variant: {_counted(other)}")
    _logger.info("; ".join(lines))


def convert_batchnorm(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    **settings: Any,
) -> nn.Module:
    """Replaces every BatchNorm2d of a model by UBN; the result computes the same function in evaluation.

    Converts ``torch.nn.BatchNorm2d`` and ``SyncBatchNorm`` and timm's ``BatchNormAct2d`` and ``SyncBatchNormAct``;
    synchronized layers stay synchronized. Statistics, momentum, eps, training mode, hooks, ``requires_grad`` flags,
    device, dtype and module sharing are kept. Parameters are new tensors: create the optimizer afterwards.

    torchvision's ``FrozenBatchNorm2d`` and timm's ``FrozenBatchNormAct2d`` become frozen UBN layers, as after
    :func:`freeze_ubn`; :func:`unfreeze_ubn` makes them trainable.

    The model gets a ``no_weight_decay()`` that names UBN's parameters, for timm's optimizers. If it becomes part of
    another model, use :func:`ubn_zoo.interop.weight_decay_groups`.

    Logs one line at level INFO with the numbers of layers converted and left unchanged, and the reasons.

    A BatchNorm without an affine gets no scaling calibration, which would change its function. Where a fresh BatchNorm
    (initial running statistics) has weight and bias 0, like the last one in timm's residual branches, the bias
    starts at 2.4e-7 instead of 0, so that the branch receives gradients even if the shortcut is constant.

    Args:
        model: Changed in place. If the model itself is a BatchNorm, it stays unchanged and a new UBN layer is returned.
        include: Names or wildcard patterns (``"backbone.*"``) of modules; only BatchNorm layers that one of them
            matches, or whose parent it matches, are converted. All by default.
        exclude: Names or patterns of modules whose BatchNorm layers stay unchanged.
        **settings: Settings of :class:`UnifiedBatchNorm2d` for all layers: ``threshold``, ``similarity_momentum``,
            ``similarity_samples``, ``kernel_size``, ``kernel_init``, ``center_calibration``, ``scale_calibration``,
            ``depthwise_affine``. With ``kernel_init="kaiming"`` the kernels are drawn at random, as in the authors'
            code, so the function changes; channels whose BatchNorm weight is 0 still start at 0.

    Returns:
        The model.

    Raises:
        ValueError: The model has no BatchNorm, or include and exclude select none.
        TypeError: A BatchNorm has its own forward, or is lazy and not yet initialized; an unknown setting.
    """
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_batchnorm(module)}
    if not found:
        already = "it already has UBN layers" if any(ubn_layers(model)) else "other normalizations have no UBN variant"
        raise ValueError(f"found no BatchNorm2d in {type(model).__name__}; {already}")
    included, excluded = _patterns(include), _patterns(exclude)
    filtered = [
        name for name in found if (include is not None and not _matches(name, included)) or _matches(name, excluded)
    ]
    left = [found.pop(name) for name in filtered]
    if not found:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} select none of the {len(left)} BatchNorm layers of "
            f"{type(model).__name__}; one of them is named {filtered[0]!r}"
        )
    for name, module in found.items():
        _check_convertible(name, module)
    # All layers are built before the first replacement, so that an error leaves the model unchanged.
    replacements = {id(module): _from_batchnorm(module, settings) for module in found.values()}
    _report(model, found.values(), left)
    if id(model) in replacements:
        return replacements[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    mark_no_weight_decay(model)
    return model


def _layers_of(model: nn.Module, what: str) -> list[UnifiedBatchNorm2d]:
    layers = [layer for _, layer in ubn_layers(model)]
    if not layers:
        raise ValueError(f"found no UBN layer to {what} in {type(model).__name__}; convert_batchnorm creates them")
    return layers


def convert_sync_ubn(model: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Synchronizes the UBN layers of a model: statistics and gate are shared across ranks in training.

    Outputs, gradients (summed over ranks) and state then equal those of one process on the batch joined in rank order;
    the similarity compares its first samples. Batch sizes may differ between ranks and may be 0; every rank must run
    the same forward passes. Convert BatchNorm layers with ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        model: Changed in place; parameters, buffers and hooks stay the same objects.
        process_group: The ranks to share with; all of them by default.

    Returns:
        The model.

    Raises:
        ValueError: There is no UBN layer in the model.
    """
    group = SyncGroup(process_group)
    for layer in _layers_of(model, "synchronize"):
        layer._sync = group
    return model


def freeze_ubn(model: nn.Module) -> nn.Module:
    """Freezes the UBN layers of a model: fixed running statistics in training too, and parameters without gradients.

    ``model.train()`` does not undo it; :func:`unfreeze_ubn` does. The keys of the state dict stay the same.

    Args:
        model: Changed in place.

    Returns:
        The model.

    Raises:
        ValueError: There is no UBN layer in the model, or one without running statistics.
    """
    layers = _layers_of(model, "freeze")
    for layer in layers:
        if layer.running_mean is None:
            raise ValueError("a UBN layer with track_running_stats=False has no running statistics to freeze")
    for layer in layers:
        if not layer.frozen:
            layer._trainable = tuple(parameter.requires_grad for parameter in layer.parameters(recurse=False))
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        layer.frozen = True
    return model


def unfreeze_ubn(model: nn.Module) -> nn.Module:
    """Undoes :func:`freeze_ubn` and restores ``requires_grad`` of the parameters.

    Args:
        model: Changed in place.

    Returns:
        The model.

    Raises:
        ValueError: There is no UBN layer in the model.
    """
    for layer in _layers_of(model, "unfreeze"):
        if layer.frozen:
            for parameter, trainable in zip(layer.parameters(recurse=False), layer._trainable, strict=True):
                parameter.requires_grad_(trainable)
        layer.frozen = False
    return model
