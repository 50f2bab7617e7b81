"""Locate, read, convert and check weights before copying them into UBN models."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm.models
import torch
from timm.models import PretrainedCfg, load_pretrained
from torch import Tensor, nn

from ubn_zoo.errors import CheckpointError
from ubn_zoo.hub import fetch as hub
from ubn_zoo.hub import manifest
from ubn_zoo.layers import UnifiedBatchNorm2d, convert_state_dict
from ubn_zoo.layers.parameters import CALIBRATIONS
from ubn_zoo.models.foreign import rename_keys

__all__ = [
    "PICKLE_ENDINGS",
    "CheckedState",
    "CheckpointError",
    "bundled_file",
    "check_state_dict",
    "file_in_folder",
    "load_weights",
    "read_checkpoint",
    "safetensors_filename",
    "to_ubn_format",
]

_logger = logging.getLogger(__name__)

_SAFE_NAME = "model.safetensors"
PICKLE_ENDINGS = (".pth", ".pt", ".bin", ".tar")
_SOURCE_FIELDS = ("source", "url", "file", "hf_hub_id", "hf_hub_filename", "state_dict")
_SHOWN = 5  # maximum number of keys that an error lists per kind of problem


class CheckedState(dict[str, Any]):
    """A state dict that has been converted to a model's format and checked against it."""


def safetensors_filename(filename: str | None) -> str:
    """Name of the safetensors file that belongs to a weights file of a Hub repository.

    Args:
        filename: File name in timm's configuration; None for timm's default.
    """
    if filename is None:
        return _SAFE_NAME
    if filename.endswith(".safetensors"):
        return filename
    known = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}
    stem = Path(filename).stem
    return str(Path(filename).with_name(known.get(stem, stem) + ".safetensors"))


def bundled_file(record: manifest.Record) -> str:
    """Path of a bundled record's file. Loading checks that it exists, because a missing file must not break imports."""
    return str(manifest.BUNDLED_WEIGHTS / record.file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a local checkpoint without executing code in it.

    Args:
        path: A ``.safetensors`` file, or a torch file (``.pth``, ``.pt``, ``.bin``, ``.tar``), which is loaded with
            ``weights_only=True``. State dicts are extracted from the containers that training loops save.

    Returns:
        The state dict.

    Raises:
        CheckpointError: The file does not exist, has another type, is damaged, or is not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in PICKLE_ENDINGS:
        valid = ", ".join((".safetensors", *PICKLE_ENDINGS))
        raise CheckpointError(f"{path}: a checkpoint ending in {path.suffix!r}; valid endings are {valid}")
    try:
        state_dict = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch and pickle raise errors of a dozen classes for a damaged file
        raise CheckpointError(f"{path}: cannot be read as weights: {error}") from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path}: holds a {type(state_dict).__name__}, valid is a state dict")
    return state_dict


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        state_dict = safetensors.torch.load_file(path)
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        keys = Counter(key for key, _ in json.loads(header, object_pairs_hook=list))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged: {error}; delete it, then fetch or save it again"
        ) from error
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise CheckpointError(f"{path}: {twice[0]} occurs twice")
    return state_dict


def file_in_folder(folder: Path) -> Path:
    """Find the weights in a folder: ``model.safetensors``, or the only file of weights."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if (folder / _SAFE_NAME).is_file():
        return folder / _SAFE_NAME
    for endings in ((".safetensors",), PICKLE_ENDINGS):
        found = sorted(path for path in folder.iterdir() if path.suffix in endings)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{folder}: holds {names}; name the one to load {_SAFE_NAME}")
    raise CheckpointError(f"{folder}: holds no weights; valid is a folder with {_SAFE_NAME}")


def _record_of(cfg: PretrainedCfg) -> manifest.Record | None:
    """Manifest record of these weights, if the configuration still refers to them."""
    for record in manifest.load_manifest().find(architecture=cfg.architecture, tag=cfg.tag):
        if record.source == "bundled" and cfg.file == bundled_file(record):
            return record
        at = (f"{record.repo_id}@{record.revision}", record.file)
        if record.source == "hub" and not cfg.file and (cfg.hf_hub_id, cfg.hf_hub_filename) == at:
            return record
    return None


def _read_source(cfg: PretrainedCfg, cache_dir: str | Path | None) -> tuple[dict[str, Any], str]:
    """Read the state dict that a configuration refers to; return it with its name for errors. Precedence is timm's."""
    if cfg.source == "local-dir":
        path = file_in_folder(Path(cfg.file or ""))
        return read_checkpoint(path), str(path)
    if cfg.source != "hf-hub":
        if cfg.state_dict:
            return dict(cfg.state_dict), "the state_dict of pretrained_cfg"
        record = _record_of(cfg)
        if record is not None:
            path = hub.fetch_record(record, cache_dir=cache_dir)
            return read_checkpoint(path), f"{record.id} ({path})"
        if cfg.file:
            if cfg.custom_load:
                raise CheckpointError(f"{cfg.file}: custom_load, a foreign format, has no reader for UBN models")
            return read_checkpoint(cfg.file), cfg.file
    if cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition("@")
        filename = safetensors_filename(cfg.hf_hub_filename)
        path = hub.fetch(repo_id, filename, revision=revision or None, cache_dir=cache_dir)
        return read_checkpoint(path), f"{cfg.hf_hub_id}/{filename} ({path})"
    what = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    if cfg.url:
        raise CheckpointError(
            f"{what}: received the URL {cfg.url}, whose content cannot be verified; download the file and "
            "pass pretrained_cfg_overlay=dict(file=...), or name a Hub repository by hf_hub_id"
        )
    with_weights = timm.list_pretrained(f"{cfg.architecture}.*")
    instead = f"with weights: {', '.join(with_weights)}" if with_weights else "no tag of this architecture has any"
    raise CheckpointError(f"there are no weights for {what}; {instead}. pretrained=False builds the model without")


def to_ubn_format(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Convert a state dict in UBN, BatchNorm or the authors' format to UBN format; returns a new dict.

    Keys of other projects are renamed, see :mod:`ubn_zoo.models.foreign`. Checkpoints entirely in half precision are
    converted to float32 first, so that the conversion does not round. Batch counters stored as floats with integer
    values, as timm's ``avg_checkpoints.py`` writes them, become integers.

    Args:
        state_dict: State dict of the model's architecture.
        model: UBN model to load it into.
    """
    state_dict = {
        key: value.long() if key.endswith("num_batches_tracked") and _is_whole(value) else value
        for key, value in rename_keys(state_dict, model).items()
    }
    tensors = (value for value in state_dict.values() if isinstance(value, Tensor))
    if {tensor.dtype for tensor in tensors if tensor.is_floating_point()} in ({torch.float16}, {torch.bfloat16}):
        state_dict = {
            key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in state_dict.items()
        }
    return convert_state_dict(state_dict, model)


def _is_whole(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and not value.is_meta
        and bool((value.isfinite() & (value == value.round())).all())
    )


def _missing_keys(state_dict: Mapping[str, Any], model: nn.Module, expected: Mapping[str, Any]) -> list[str]:
    """Keys that a file lacks, named in the format of the file: UBN's own keys are not missing from a BatchNorm file."""
    missing = [key for key in expected if key not in state_dict]
    for name, layer in model.named_modules() if missing else ():
        if isinstance(layer, UnifiedBatchNorm2d):
            prefix = f"{name}." if name else ""
            absent = {key for key in missing if key.startswith(prefix) and "." not in key[len(prefix) :]}
            own = {f"{prefix}{entry}" for entry in (*CALIBRATIONS, "feature_similarity")} & expected.keys()
            found = {f"{prefix}{entry}" for entry in ("weight", "bias", "running_mean", "running_var")} - absent
            if absent and own and own <= absent and found & state_dict.keys():
                missing = [key for key in missing if key not in own]
    return missing


def _listed(problems: list[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _same_dtype(found: torch.dtype, wanted: torch.dtype, weights: torch.dtype | None) -> bool:
    if found == wanted:
        return True
    if not (found.is_floating_point and wanted.is_floating_point):
        return False
    # Casting up from a lower precision is lossless, and half-precision models are created only on request.
    widens = found == weights and torch.promote_types(found, wanted) == wanted
    return widens or (found == torch.float32 and wanted in (torch.float16, torch.bfloat16))


def check_state_dict(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    source: str | Callable[[], str],
    architecture: str,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    optional: frozenset[str] = frozenset(),
) -> None:
    """Check that a state dict in UBN format matches a model's keys, shapes and dtypes exactly and has finite values.

    A checkpoint may have a lower floating-point precision than the model, but only uniformly.

    Args:
        state_dict: State dict to check.
        model: Model to compare with; not changed.
        source: Name of the file in errors, or a function that returns it.
        architecture: Name of the model in errors.
        shapes: Expected shapes by key that differ from the model's because a later step adapts them.
        optional: Keys whose presence and shape are not compared.

    Raises:
        CheckpointError: The state dict does not match; the message names the source, the keys and both shapes.
    """
    expected = model.state_dict()
    wanted = {key: tuple(value.shape) for key, value in expected.items()} | dict(shapes or {})
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    precisions = {
        value.dtype
        for key, value in state_dict.items()
        if key in parameters and isinstance(value, Tensor) and value.is_floating_point()
    }
    weights = precisions.pop() if len(precisions) == 1 else None

    unexpected = [
        f"{key}, the file has {_shape(value)}"
        for key, value in state_dict.items()
        if key not in expected and key not in optional
    ]
    missing = [
        f"{key}, the model has {wanted[key]}"
        for key in _missing_keys(state_dict, model, expected)
        if key not in optional
    ]
    misshapen, mistyped, spoiled, negative = [], [], [], []
    for key, target in expected.items():
        if key not in state_dict:
            continue
        value = state_dict[key]
        if not isinstance(value, Tensor) or (key not in optional and tuple(value.shape) != wanted[key]):
            misshapen.append(f"{key}: the file has {_shape(value)}, the model has {wanted[key]}")
        elif not _same_dtype(value.dtype, target.dtype, weights):
            mistyped.append(f"{key}: the file has {value.dtype}, the model has {target.dtype}")
        elif value.is_floating_point() and not torch.isfinite(value).all():
            spoiled.append(f"{key}, {_shape(value)}")
        elif key.endswith("running_var") and (value < 0).any():
            negative.append(f"{key}, the smallest is {value.min().item():.3g}")
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "of another dtype": mistyped,
        "with NaN or infinite values": spoiled,
        "with negative variances": negative,
    }
    problems = [f"{len(found)} {kind}: {_listed(found)}" for kind, found in kinds.items() if found]
    if problems:
        where = source if isinstance(source, str) else source()
        raise CheckpointError(f"{where} does not fit {architecture}: {'. '.join(problems)}. Nothing was loaded")


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _adapted_shapes(model: nn.Module, cfg: PretrainedCfg, in_chans: int) -> dict[str, tuple[int, ...]]:
    """File shapes of the first convolutions that timm adapts to another number of input channels."""
    source_chans = cfg.input_size[0]
    shapes = {}
    if in_chans != source_chans:
        for name in _names(cfg.first_conv):
            out_chans, per_group, *kernel = model.get_parameter(f"{name}.weight").shape
            shapes[f"{name}.weight"] = (out_chans, per_group * source_chans // in_chans, *kernel)
    return shapes


def _check_replaced_head(state_dict: Mapping[str, Any], cfg: PretrainedCfg, source: str) -> None:
    """Check that the file's classifier matches its configuration before the classifier is replaced.

    timm's ``train.py --pretrained-path`` sets ``num_classes=-1``, which accepts any classifier.
    """
    if cfg.num_classes < 0:
        return
    stated = cfg.num_classes + (cfg.label_offset or 0)
    for name in _names(cfg.classifier):
        weight = state_dict.get(f"{name}.weight")
        found = 0 if weight is None else weight.shape[0]
        if found != stated:
            raise CheckpointError(
                f"{source}: {name}.weight has {found} classes, its pretrained_cfg says {stated}; "
                f"pass pretrained_cfg_overlay=dict(num_classes={found}) with it"
            )


def load_weights(
    model: nn.Module,
    cfg: PretrainedCfg,
    *,
    in_chans: int,
    checkpoint_filter: Callable[..., dict[str, Any]] | None = None,
    allow_extra: bool = False,
    cache_dir: str | Path | None = None,
) -> None:
    """Load the weights that a configuration refers to; if any check fails, the model is not changed.

    File and model may differ only in two requested ways: the classifier for another number of classes, and the first
    convolution for another number of input channels. timm adapts both.

    Args:
        model: UBN model, before it is wrapped as a feature extractor.
        cfg: Source of the weights, and their numbers of classes and channels.
        in_chans: Input channels of the model.
        checkpoint_filter: The architecture's function that renames keys of other projects.
        allow_extra: Whether to drop keys that the model does not have, such as the head for a feature extractor.
        cache_dir: Cache folder for downloads; by default huggingface_hub's.

    Raises:
        CheckpointError: There are no weights, or they cannot be read or do not match; the model is unchanged.
        HubError: The weights cannot be fetched.
    """
    state_dict, source = _read_source(cfg, cache_dir)
    architecture = str(cfg.architecture)
    if checkpoint_filter is not None:
        arguments = (state_dict, model)[: len(inspect.signature(checkpoint_filter).parameters)]
        try:
            state_dict = checkpoint_filter(*arguments)
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{source}: not a checkpoint that {architecture} knows: {error!r}") from error
    state_dict = to_ubn_format(state_dict, model)
    if allow_extra:
        known = model.state_dict()
        state_dict = {key: value for key, value in state_dict.items() if key in known}

    num_classes = getattr(model, "num_classes", cfg.num_classes)
    classifier = frozenset(f"{name}.{part}" for name in _names(cfg.classifier) for part in ("weight", "bias"))
    shapes = _adapted_shapes(model, cfg, in_chans)
    if num_classes != cfg.num_classes:
        check_state_dict(state_dict, model, source, architecture, shapes=shapes, optional=classifier)
        _check_replaced_head(state_dict, cfg, source)
    else:
        if cfg.label_offset:
            for key in classifier & model.state_dict().keys():
                rows, *rest = model.get_parameter(key).shape
                shapes[key] = (rows + cfg.label_offset, *rest)
        check_state_dict(state_dict, model, source, architecture, shapes=shapes)

    described = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in _SOURCE_FIELDS}
    load_pretrained(
        model,
        pretrained_cfg={**described, "label_offset": cfg.label_offset or 0, "state_dict": CheckedState(state_dict)},
        num_classes=num_classes,
        in_chans=in_chans,
    )
    _logger.info("Loaded %s into %s", source, architecture)
