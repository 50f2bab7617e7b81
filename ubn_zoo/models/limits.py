"""Checks the configuration of an untrusted model before building it: its size, and whether it matches its weights.

A ``config.json`` of a few bytes can request more memory than any machine has. The model is therefore first built on
torch's meta device, which allocates nothing, and the build stops once the model exceeds the size of its weights file.
The shapes in the file's header then show which entry of the configuration is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.models import PretrainedCfg
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ubn_zoo.errors import CheckpointError
from ubn_zoo.hub import fetch as hub
from ubn_zoo.layers import MAX_KERNEL_SIZE, UnifiedBatchNorm2d
from ubn_zoo.models.weights import file_in_folder, safetensors_filename

__all__ = ["UNTRUSTED_SOURCES", "check_configuration"]

UNTRUSTED_SOURCES = ("hf-hub", "local-dir")
_MARGIN = 4  # times the reference: a model without weights may be that much larger than the architecture's default
_SPARE_ELEMENTS = 2**21
_SPARE_TENSORS = 100

_Shapes = Mapping[str, tuple[int, ...]]


class _TooLargeError(Exception):
    """The model under construction has exceeded its limit."""


@dataclass(frozen=True)
class _Limit:
    elements: int
    tensors: int
    reference: str


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


@contextlib.contextmanager
def _on_meta(limit: _Limit | None = None) -> Iterator[None]:
    """Builds models of this thread without memory or random numbers, up to a limit."""
    elements = tensors = 0
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal elements, tensors
        if limit is None or parameter is None or threading.get_ident() != thread:
            return
        elements += parameter.numel()
        tensors += 1
        if elements > limit.elements or tensors > limit.tensors:
            raise _TooLargeError(f"it asks for more than {limit.elements:,} parameters in {limit.tensors:,} tensors")

    handle: Any = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()


def _weights_file(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    if cfg.source == "local-dir":
        return file_in_folder(Path(cfg.file or ""))
    repo_id, _, revision = str(cfg.hf_hub_id).partition("@")
    filename = safetensors_filename(cfg.hf_hub_filename)
    return Path(hub.fetch(repo_id, filename, revision=revision or None, cache_dir=cache_dir))


def _header(path: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes in a safetensors file; None for other and for damaged files, which loading refuses by name."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError):
        return None


def _limit_of_header(header: _Shapes, path: Path) -> _Limit:
    # In addition to the file's elements: each BatchNorm is built before its UBN layer, whose kernel is not in its file.
    channels = sum(shape[0] for key, shape in header.items() if key.endswith("running_mean") and len(shape) == 1)
    elements = 2 * sum(map(_count, header.values())) + (MAX_KERNEL_SIZE**2 + 8) * channels + _SPARE_ELEMENTS
    return _Limit(elements, 2 * len(header) + _SPARE_TENSORS, f"{path.name} has {len(header):,} tensors")


def _limit_of_default(build: Callable[..., nn.Module], architecture: str) -> _Limit:
    with _on_meta():
        parameters = [parameter.numel() for parameter in build().parameters()]
    return _Limit(
        _MARGIN * (sum(parameters) + 16 * _SPARE_ELEMENTS),
        _MARGIN * len(parameters) + _SPARE_TENSORS,
        f"{architecture} by default has {sum(parameters):,} parameters",
    )


def _layer_names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _mismatches(cfg: PretrainedCfg, header: _Shapes, model: nn.Module | None) -> Iterator[str]:
    """Entries of the configuration that contradict the file; without a model, as in most architectures."""
    default = timm.get_pretrained_cfg(str(cfg.architecture)) or cfg
    layers = dict(model.named_modules()) if model is not None else {}
    for name in _layer_names(cfg.classifier or default.classifier):
        found = header.get(f"{name}.weight")
        layer = layers.get(name)
        if model is not None and not isinstance(getattr(layer, "weight", None), nn.Parameter):
            continue
        stated = cfg.num_classes + (cfg.label_offset or 0)
        if found and cfg.num_classes and found[0] != stated:
            yield f"num_classes is {stated}, {name}.weight of the file has {found[0]} classes"
    for name in _layer_names(cfg.first_conv or default.first_conv):
        found = header.get(f"{name}.weight")
        in_chans = cfg.input_size[0]
        weight = getattr(layers.get(name), "weight", None)
        wanted = weight.shape[1] if isinstance(weight, nn.Parameter) and weight.dim() == 4 else in_chans
        if found and len(found) == 4 and found[1] != wanted and (model is None or weight is not None):
            yield (
                f"in_chans (the first of input_size) is {in_chans}, {name}.weight of the file has {found[1]} input "
                f"channels where the model has {wanted}"
            )
    for name, layer in layers.items():
        found = header.get(f"{name}.weight")
        if isinstance(layer, UnifiedBatchNorm2d) and found and len(found) == 4 and found[-1] != layer.kernel_size:
            yield f"kernel_size is {layer.kernel_size}, {name}.weight of the file has {found[-1]}"
            break


def _unknown_layers(cfg: PretrainedCfg, model: nn.Module) -> Iterator[str]:
    default = timm.get_pretrained_cfg(str(cfg.architecture))
    known = {name for name, _ in model.named_modules()}
    for field in ("first_conv", "classifier"):
        usual = getattr(default, field, None)
        for name in _layer_names(getattr(cfg, field)):
            if name not in known and name not in _layer_names(usual):
                yield f"{field} is {name!r}, which is not a layer of {cfg.architecture}; valid is {usual!r}"


def _culprit(build: Callable[..., nn.Module], arguments: Mapping[str, Any], limit: _Limit) -> str:
    """The model argument without which the model can be built, for the error."""
    for name, value in list(arguments.items())[:8]:
        others = {key: other for key, other in arguments.items() if key != name}
        with contextlib.suppress(Exception), _on_meta(limit):  # another argument may be the wrong one
            build(**others)
            text = repr(value)
            return f"model_args has {name}={text if len(text) <= 80 else text[:77] + '...'}: "
    return ""


def check_configuration(
    build: Callable[..., nn.Module],
    cfg: PretrainedCfg,
    arguments: Mapping[str, Any] | None,
    pretrained: bool,
    cache_dir: str | Path | None = None,
) -> None:
    """Checks the configuration in a repository or folder, without allocating memory for its model.

    Args:
        build: Builds the architecture from keyword arguments of timm's entry point, without weights.
        cfg: The configuration of its weights, with ``source`` one of `UNTRUSTED_SOURCES`.
        arguments: The model arguments in the same ``config.json``, without the caller's.
        pretrained: Whether the weights are loaded afterwards; if so, the model is compared with them.
        cache_dir: As in `load_weights`.

    Raises:
        CheckpointError: The configuration is not one of this architecture, describes a model much larger than its
            weights, or does not match them; the message names the repository or folder, the entry and what is valid.
        HubError: The weights cannot be fetched.
    """
    source = f"{cfg.source}:{cfg.file if cfg.source == 'local-dir' else cfg.hf_hub_id}: config.json"
    path = _weights_file(cfg, cache_dir) if pretrained else None
    header = _header(path) if path is not None else None
    if path is not None and header is not None:
        limit = _limit_of_header(header, path)
    else:
        limit = _limit_of_default(build, str(cfg.architecture))
    described = {**cfg.to_dict(remove_source=True), "architecture": cfg.architecture}
    described.pop("state_dict", None)
    arguments = dict(arguments or {})
    build_described = functools.partial(build, pretrained_cfg=described)
    try:
        with _on_meta(limit):
            model = build_described(**arguments)
    except _TooLargeError as error:
        wrong = "; ".join(_mismatches(cfg, header or {}, None))
        where = f"{wrong}: " if wrong else _culprit(build_described, arguments, limit)
        if not where:
            where = f"num_classes is {cfg.num_classes} and in_chans {cfg.input_size[0]}: "
        advice = "" if pretrained else "; pretrained=True compares it with its weights instead"
        raise CheckpointError(
            f"{source}: {where}the model is too large: {error}, while {limit.reference}{advice}"
        ) from None
    except Exception as error:  # timm's classes raise many kinds of errors for invalid arguments
        where = _culprit(build_described, arguments, limit)
        what = str(error) or type(error).__name__
        raise CheckpointError(
            f"{source}: {where}{cfg.architecture} cannot be built: {what}; valid are the arguments of timm's model"
        ) from error
    problems = list(_unknown_layers(cfg, model))
    if header is not None:
        problems.extend(_mismatches(cfg, header, model))
    if problems:
        where = f"{path}" if path is not None else str(cfg.architecture)
        raise CheckpointError(f"{source} does not fit {where}: {'; '.join(problems)}")
