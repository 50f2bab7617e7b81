"""Builds UBN models: runs timm's own entry point with the zoo's builder instead of timm's.

Every entry point of timm ends in a call ``build_model_with_cfg(model_class, variant, pretrained, ...)`` that carries
everything specific to the architecture: its class and configuration, the way to extract features, the renaming of
checkpoints of other projects. The zoo runs the entry point with another function under that name: to find out which
norm layer an architecture has, and to build a model. So a twin needs no definition, and supports what its sibling does.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import get_norm_layer
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from timm.models import get_arch_pretrained_cfgs as arch_pretrained_cfgs
from timm.models._prune import adapt_model_from_file
from torch import nn

from ubn_zoo.layers import UnifiedBatchNorm2d, convert_batchnorm
from ubn_zoo.layers.convert import mark_no_weight_decay
from ubn_zoo.models.limits import UNTRUSTED_SOURCES, check_configuration
from ubn_zoo.models.reparameterize import adopt_blocks
from ubn_zoo.models.weights import CheckedState, check_state_dict, load_weights, to_ubn_format
from ubn_zoo.utils.derived import Derived, derive

__all__ = ["UbnModel", "build_ubn_model", "uses_batchnorm"]

_BUILDER = "build_model_with_cfg"
_LAYER_SETTINGS = tuple(
    name
    for name, parameter in inspect.signature(UnifiedBatchNorm2d).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("device", "dtype")
)


def _run_entry_point(entry_point: Callable[..., Any], builder: Callable[..., Any], **kwargs: Any) -> Any:
    """Calls an entry point of timm with ``builder`` for timm's ``build_model_with_cfg``.

    Copies of its module's functions are bound to a copy of the module's namespace: timm stays unchanged, and threads do
    not interfere.
    """
    names = vars(sys.modules[entry_point.__module__])
    if _BUILDER not in names:
        raise RuntimeError(
            f"{entry_point.__module__}.{entry_point.__name__} does not build its model by timm's {_BUILDER}: "
            f"timm {timm.__version__} is not supported, install timm 1.0.31"
        )
    scope = dict(names)

    def bound(function: Any) -> Any:
        copy = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy

    for name, value in names.items():
        if isinstance(value, types.FunctionType) and value.__globals__ is names:
            scope[name] = bound(value)
    scope[_BUILDER] = builder
    return bound(entry_point)(**kwargs)


def uses_batchnorm(name: str) -> bool:
    """Whether an architecture of timm is normalized by BatchNorm, determined without building it.

    Decided by the norm layer that timm's entry point asks for: in its arguments, else in the architecture's
    configuration, else by default of the model class.

    Args:
        name: Architecture, without a tag.
    """
    asked: list[Any] = []

    def note(model_class: Any, variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
        config: Any = kwargs.get("model_cfg")
        if "norm_layer" in kwargs:
            asked.append(kwargs["norm_layer"])
        elif hasattr(config, "norm_layer"):
            asked.append(config.norm_layer)
        else:
            parameter = inspect.signature(model_class).parameters.get("norm_layer")
            asked.append(None if parameter is None else parameter.default)
        return types.SimpleNamespace(default_cfg={}, pretrained_cfg={})

    _run_entry_point(timm.model_entrypoint(name), note)
    norm = get_norm_layer(asked[0]) if asked else None
    norm = norm.func if isinstance(norm, functools.partial) else norm
    return isinstance(norm, type) and issubclass(norm, nn.BatchNorm2d)


def _loaded_file() -> str:
    """Names a state dict in an error: the file that timm's ``load_checkpoint`` is loading, if that is the caller.

    timm passes the content of the file and not its name, so the name is looked up in the stack.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "load_checkpoint" and frame.f_globals.get("__name__") == "timm.models._helpers":
            return str(frame.f_locals["checkpoint_path"])
    return "the state dict"


class UbnModel(Derived):
    """Mixin of UBN models: the class of a twin derives from this class and from its sibling's class."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that optimizers should not decay: those of UBN layers, and what timm's class names.

        timm's rule by number of dimensions alone would decay the depthwise kernels, which replace BatchNorm's weights.
        """
        theirs: Iterable[str] = getattr(super(), "no_weight_decay", set)()
        ours = {
            f"{name}.{parameter}" if name else parameter
            for name, layer in self.named_modules()
            if isinstance(layer, UnifiedBatchNorm2d)
            for parameter, _ in layer.named_parameters(recurse=False)
        }
        return ours | set(theirs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict in UBN's, BatchNorm's or the authors' format.

        Args:
            state_dict: Of this architecture.
            strict: Whether everything is checked before anything is copied. Without it, this is torch's own loading.
            assign: As in torch.

        Raises:
            CheckpointError: A key is missing or unexpected, a tensor has another shape or dtype, or a value is NaN or
                infinite.
        """
        # State dicts that `load_weights` has converted and checked arrive through timm, which adapts them to the model.
        state = state_dict if isinstance(state_dict, CheckedState) else to_ubn_format(state_dict, self)
        if strict and state is not state_dict:
            architecture = getattr(self, "pretrained_cfg", {}).get("architecture") or type(self).__name__
            check_state_dict(state, self, _loaded_file, architecture)
        return super().load_state_dict(state, strict=strict, assign=assign)


def _check_layer_settings(settings: Any) -> dict[str, Any]:
    valid = ", ".join(_LAYER_SETTINGS)
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise TypeError(f"ubn_kwargs is {settings!r}, valid is a dict of settings of UnifiedBatchNorm2d: {valid}")
    for name, value in settings.items():
        if name not in _LAYER_SETTINGS:
            near = difflib.get_close_matches(str(name), _LAYER_SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"ubn_kwargs has {name!r}; {hint}valid are {valid}")
        try:
            json.dumps(value)
        except TypeError:
            # config.json stores them with the model's other arguments.
            raise TypeError(f"ubn_kwargs[{name!r}] is {value!r}, valid are values that JSON can hold") from None
    return dict(settings)


def _check_tag(architecture: str, tag: str) -> None:
    tags = [name.partition(".")[2] for name in arch_pretrained_cfgs(architecture)]
    if tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RuntimeError(f"{architecture} has no pretrained tag {tag!r}; {hint}valid are {', '.join(tags)}")


def build_ubn_model(
    architecture: str,
    upstream: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    ubn_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds timm's architecture, replaces its BatchNorm by UBN, and loads weights strictly.

    Args:
        architecture: Name of the UBN model, such as ``resnet50_ubn``.
        upstream: timm's name of its BatchNorm sibling.
        pretrained: Whether weights are loaded.
        pretrained_cfg: Tag, or a whole configuration of weights; by default that of the default tag.
        pretrained_cfg_overlay: Entries that replace those of the configuration.
        cache_dir: Folder of downloads; huggingface_hub's cache by default.
        ubn_kwargs: Settings of every UBN layer: keyword arguments of ``UnifiedBatchNorm2d`` from ``threshold`` on.
        **kwargs: As for the sibling: ``num_classes``, ``in_chans``, ``global_pool``, ``features_only``,
            ``out_indices``, ...

    Returns:
        The model, or its feature extractor with ``features_only=True``.

    Raises:
        CheckpointError: There are no weights, they are damaged, or they do not fit the model.
        HubError: They cannot be fetched.
        RuntimeError: There is no such tag.
        TypeError: An unknown argument or layer setting.
        ValueError: The arguments select a normalization other than BatchNorm, which has no UBN variant.
    """
    if isinstance(pretrained_cfg, str) and pretrained_cfg:
        _check_tag(architecture, pretrained_cfg)
    given = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    # A sibling's configuration may be given unchanged; the architecture is still this one.
    cfg = replace(resolve_pretrained_cfg(architecture, given, pretrained_cfg_overlay), architecture=architecture)
    if cfg.source in UNTRUSTED_SOURCES:
        plain = functools.partial(build_ubn_model, architecture, upstream)
        check_configuration(plain, cfg, kwargs.get("pretrained_model_args"), pretrained, cache_dir)
    settings = _check_layer_settings(ubn_kwargs)

    def build(
        model_class: type[nn.Module],
        variant: str,
        pretrained: bool = False,
        *,
        pretrained_filter_fn: Callable[..., dict[str, Any]] | None = None,
        pretrained_strict: bool = True,
        **arguments: Any,
    ) -> nn.Module:
        pruned = arguments.pop("pruned", False)
        # Some entry points resolve it themselves; it has been resolved above.
        arguments.pop("pretrained_cfg", None)

        def construct(**model_arguments: Any) -> nn.Module:
            model: Any = model_class(**model_arguments)
            if pruned:
                # timm reads the widths from a file named like its own architecture.
                model.pretrained_cfg = described
                model = adapt_model_from_file(model, variant)
            model = convert_batchnorm(model, **settings)
            adopt_blocks(model)
            model.__class__ = derive(UbnModel, model_class)
            del model.no_weight_decay  # the class has it
            if pretrained:
                load_weights(
                    model,
                    cfg,
                    in_chans=model_arguments.get("in_chans", 3),
                    checkpoint_filter=pretrained_filter_fn,
                    allow_extra=not pretrained_strict,
                    cache_dir=cache_dir,
                )
            return model

        # The model's configuration must describe the weights, not hold them.
        described = {name: value for name, value in cfg.to_dict().items() if name != "state_dict"}
        # timm sets default sizes, wraps for features_only and sets the model's attributes, after weights are loaded.
        return build_model_with_cfg(construct, architecture, False, pretrained_cfg=described, **arguments)

    model: nn.Module = _run_entry_point(timm.model_entrypoint(upstream), build, pretrained=pretrained, **kwargs)
    if not isinstance(model, UbnModel):
        mark_no_weight_decay(model)  # a feature extractor
    return model
