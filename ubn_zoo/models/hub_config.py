"""Reads ``config.json`` of ``hf-hub:`` and ``local-dir:`` names with checks, and from the Hub with retries.

:func:`describe_model` returns the content of such a file, for timm and for transformers.

timm reads the file before it knows the architecture, with a single request and without checking values. Its reader and
parser stay in use; if the request fails, `ubn_zoo.hub.fetch` fetches the file. The configuration of a model of this zoo
is checked before timm parses it, so that every mistake raises one error that names the repository or folder, the entry
and the valid values.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import PretrainedCfg, _factory, _hub
from torch import nn

from ubn_zoo.errors import CheckpointError
from ubn_zoo.hub.fetch import fetch
from ubn_zoo.hub.retry import HTTPError, describe_failure

__all__ = ["describe_model", "install"]

# Errors that timm's users catch, and that a retry would not change. LocalEntryNotFoundError derives from one of them.
_PERMANENT = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)

_CONFIG = "config.json"
_MAX_BYTES = 64 * 2**20  # ImageNet-22k's labels and descriptions take 3 MB.
_MAX_SIZE = 2**16
_MAX_CLASSES = 10**7
_MAX_ARGUMENT = 10**6
_MAX_DEPTH = 5
_INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "random")
_CROP_MODES = ("border", "center", "squash")

# Arguments of the functions that build a model which do not describe it, or would bypass the strict loading.
_RESERVED = frozenset(
    {
        "architecture",
        "cache_dir",
        "device",
        "dtype",
        "feature_cfg",
        "kwargs_filter",
        "model_cfg",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_filter_fn",
        "pretrained_model_args",
        "pretrained_strict",
        "upstream",
    }
)

_logger = logging.getLogger(__name__)


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any, valid: Callable[[Any], bool], lengths: range) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(valid, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return _is_text(value) or _is_list(value, _is_text, range(_MAX_CLASSES))


def _is_size(value: Any) -> bool:
    return _is_list(value, lambda side: _is_integer(side, 1, _MAX_SIZE), range(3, 4))


def _is_pool(value: Any) -> bool:
    return value is None or _is_list(value, lambda side: _is_integer(side, 1, _MAX_SIZE), range(3))


def _is_crop(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 10


@dataclasses.dataclass(frozen=True)
class _Rule:
    valid: Callable[[Any], bool]
    description: str


_TEXT = _Rule(_is_text, "a string")
_TEXTS = _Rule(_is_texts, "a string or a list of strings")
_FLAG = _Rule(lambda value: isinstance(value, bool), "true or false")
_SIZE = _Rule(_is_size, f"[channels, height, width], integers from 1 to {_MAX_SIZE}")
_POOL = _Rule(_is_pool, "null or [height, width], positive integers")
_CROP = _Rule(_is_crop, "a number above 0 and at most 10")
_RATE = _Rule(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_CLASSES = _Rule(lambda value: _is_integer(value, 0, _MAX_CLASSES), f"an integer from 0 to {_MAX_CLASSES}")
_DESCRIPTIONS = _Rule(
    lambda value: _is_texts(value) or (isinstance(value, dict) and all(map(_is_text, value.values()))),
    "an object of strings",
)
_TEXT_FIELDS = (
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "architecture",
    "tag",
    "license",
    "description",
    "origin_url",
    "paper_name",
)
# null is valid as well for the fields whose default it is.
_FIELDS: dict[str, _Rule] = {
    **dict.fromkeys(_TEXT_FIELDS, _TEXT),
    **dict.fromkeys(("url", "first_conv", "classifier", "paper_ids", "notes", "label_names"), _TEXTS),
    **dict.fromkeys(("custom_load", "fixed_input_size"), _FLAG),
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _SIZE),
    **dict.fromkeys(("pool_size", "test_pool_size"), _POOL),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), _CROP),
    "interpolation": _Rule(lambda value: value in _INTERPOLATIONS, ", ".join(_INTERPOLATIONS)),
    "crop_mode": _Rule(lambda value: value in _CROP_MODES, ", ".join(_CROP_MODES)),
    "mean": _Rule(lambda value: _is_list(value, _is_number, range(1, _MAX_SIZE)), "a list of one number per channel"),
    "std": _Rule(
        lambda value: _is_list(value, lambda item: _is_number(item) and item > 0, range(1, _MAX_SIZE)),
        "a list of one positive number per channel",
    ),
    "num_classes": _CLASSES,
    "label_offset": _CLASSES,
    "label_descriptions": _DESCRIPTIONS,
    "state_dict": _Rule(lambda value: False, "null: weights belong in a safetensors file"),
}
_TOP_LEVEL = {"num_classes": _CLASSES, "label_names": _TEXTS, "label_descriptions": _DESCRIPTIONS}
_OPTIONAL = frozenset(field.name for field in dataclasses.fields(PretrainedCfg) if field.default is None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has {name}, which is not a number in JSON")


def _read_object(path: Path, source: str) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise CheckpointError(f"{source} has {size:,} bytes, valid are configurations up to {_MAX_BYTES:,}")
        config = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not valid JSON: {error}; valid is what timm's save_for_hf writes"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} is {_shown(config)}, valid is a JSON object with the key 'architecture'")
    return config


def _architecture(config: dict[str, Any], source: str) -> str:
    if "architecture" not in config:
        keys = _shown(sorted(config))
        raise CheckpointError(f"{source} has no 'architecture', only {keys}; valid is the name of a model of timm")
    name = config["architecture"]
    if not isinstance(name, str) or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1) if isinstance(name, str) else []
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CheckpointError(
            f"{source}: architecture is {_shown(name)}; {hint}valid are the names in timm.list_models()"
        )
    return name


def _check_fields(fields: dict[str, Any], rules: dict[str, _Rule], source: str, where: str) -> None:
    for name, value in fields.items():
        if name in rules and not (value is None and name in _OPTIONAL) and not rules[name].valid(value):
            raise CheckpointError(f"{source}: {where}{name} is {_shown(value)}, valid is {rules[name].description}")


def _is_argument(value: Any, depth: int = 0) -> bool:
    """Whether a model argument is a JSON value whose numbers are too small to exhaust memory."""
    if isinstance(value, (list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return depth < _MAX_DEPTH and len(value) <= 1000 and all(_is_argument(item, depth + 1) for item in items)
    return not isinstance(value, (int, float)) or (math.isfinite(value) and abs(value) <= _MAX_ARGUMENT)


def _check(config: dict[str, Any], source: str) -> None:
    """Checks the configuration of a model of this zoo; see timm's ``save_for_hf`` for its format."""
    cfg, where = config, ""
    if "pretrained_cfg" in config:
        cfg, where = config["pretrained_cfg"], "pretrained_cfg."
        _check_fields(config, _TOP_LEVEL, source, "")
        if not isinstance(cfg, dict):
            raise CheckpointError(f"{source}: pretrained_cfg is {_shown(cfg)}, valid is an object")
    renamed = {"num_features", "labels"} if cfg is config else set()
    unknown = [name for name in cfg if name not in _FIELDS and name not in renamed]
    if unknown:
        valid = ", ".join(sorted(_FIELDS))
        raise CheckpointError(f"{source}: {where or 'it '}has the unknown key {_shown(unknown[0])}, valid are {valid}")
    _check_fields(cfg, _FIELDS | {"labels": _TEXTS}, source, where)
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{source}: model_args is {_shown(arguments)}, valid is an object of keyword arguments")
    for name, value in arguments.items():
        if name in _RESERVED:
            raise CheckpointError(f"{source}: model_args has {name!r}, which only the caller may set; remove it")
        if not _is_argument(value):
            raise CheckpointError(
                f"{source}: model_args.{name} is {_shown(value)}, valid are values with numbers up to {_MAX_ARGUMENT:,}"
            )
    rules = {
        **dict.fromkeys((name for name in arguments if name.endswith("_rate")), _RATE),
        "num_classes": _CLASSES,
        "in_chans": _Rule(lambda value: _is_integer(value, 1, _MAX_SIZE), f"an integer from 1 to {_MAX_SIZE}"),
        "img_size": _Rule(
            lambda value: (
                _is_integer(value, 1, _MAX_SIZE)
                or _is_list(value, lambda side: _is_integer(side, 1, _MAX_SIZE), range(2, 3))
            ),
            f"an integer from 1 to {_MAX_SIZE}, or two",
        ),
    }
    _check_fields({k: v for k, v in arguments.items() if v is not None}, rules, source, "model_args.")
    stated = config.get("num_classes", cfg.get("num_classes"))
    if None not in (stated, arguments.get("num_classes")) and stated != arguments["num_classes"]:
        raise CheckpointError(
            f"{source}: num_classes is {stated}, but model_args.num_classes is {arguments['num_classes']}; valid is "
            "the same number in both"
        )


def _parse(path: Path, source: str, fields: dict[str, Any]) -> Any:
    source = f"{source}: {_CONFIG}"
    config = _read_object(path, source)
    if timm.model_entrypoint(_architecture(config, source)).__module__.startswith("ubn_zoo."):
        _check(config, source)
    return _hub._parse_model_cfg(config, fields)


def _from_hub(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def load_model_config_from_hf(model_id: str, cache_dir: str | Path | None = None) -> Any:
        try:
            path = _hub.download_from_hf(model_id, _CONFIG, cache_dir=cache_dir)
        except (HTTPError, OSError) as error:
            if isinstance(error, _PERMANENT) and not isinstance(error, LocalEntryNotFoundError):
                raise
            _logger.info("%s: %s: %s; fetching it with retries", model_id, _CONFIG, describe_failure(error))
            repo_id, revision = _hub.hf_split(model_id)
            path = fetch(repo_id, _CONFIG, revision=revision, cache_dir=cache_dir)
        return _parse(Path(path), f"hf-hub:{model_id}", {"hf_hub_id": model_id, "source": "hf-hub"})

    return load_model_config_from_hf


def _from_folder(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def load_model_config_from_path(model_path: str | Path) -> Any:
        path = Path(model_path) / _CONFIG
        if not path.is_file():
            return read(model_path)
        return _parse(path, f"local-dir:{model_path}", {"file": str(Path(model_path)), "source": "local-dir"})

    return load_model_config_from_path


def describe_model(
    model: nn.Module, *, model_config: Mapping[str, Any], data_config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of ``config.json`` for a model, which timm and transformers can read.

    timm repeats ``num_classes`` in ``model_args``; transformers passes both on and fails. It is left out there: timm
    reads it at the top level as well.

    Args:
        model: A model that timm built.
        model_config: As for timm's ``save_config_for_hf``: ``label_names``, entries of ``pretrained_cfg``.
        data_config: The preprocessing; by default that of the model's ``pretrained_cfg``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _CONFIG
        _hub.save_config_for_hf(model, str(path), model_config=dict(model_config), data_config=data_config)
        config: dict[str, Any] = json.loads(path.read_bytes())
    arguments = config.get("model_args", {})
    if arguments.get("num_classes") == config["num_classes"]:
        del arguments["num_classes"]
        if not arguments:
            del config["model_args"]
    return config


def install() -> None:
    """Let ``timm.create_model`` read configurations with these checks and retries; a second call changes nothing."""
    if not hasattr(_factory.load_model_config_from_hf, "__wrapped__"):
        _factory.load_model_config_from_hf = _from_hub(_factory.load_model_config_from_hf)
        _factory.load_model_config_from_path = _from_folder(_factory.load_model_config_from_path)
