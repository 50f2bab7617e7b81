"""Load models to evaluate: pretrained models, runs and checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import timm
from torch import nn

from ubn_zoo.errors import EvaluationError
from ubn_zoo.hub.manifest import load_manifest
from ubn_zoo.layers import VARIANTS, UnifiedBatchNorm2d
from ubn_zoo.models import read_checkpoint
from ubn_zoo.models.catalog import similar_names
from ubn_zoo.models.weights import PICKLE_ENDINGS

__all__ = ["Subject", "expand_names", "load_subject", "norm_of", "subject_of", "weights_hash"]

_CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"  # folder of snapshots in a run
_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")
_LISTS = (".txt", ".lst")


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Subject:
    """A model to evaluate.

    Attributes:
        model: The model with its weights, on the CPU.
        name: Name of the model in results.
        classes: Class names in the order of the outputs; empty if unknown.
        sha256: SHA-256 of the weights file; None if the file is not known.
        source: Model as the user named it: a name, the folder of a run, or a checkpoint's file.
        ema: Whether the weights are a run's moving average.
        preprocessing: Description of where the preprocessing comes from.
    """

    model: nn.Module
    name: str
    classes: tuple[str, ...]
    sha256: str | None
    source: str = ""
    ema: bool = False
    preprocessing: str = "the model's configuration"


def load_subject(
    name: str | os.PathLike[str] | nn.Module | Subject | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    ema: bool = False,
    num_classes: int | None = None,
) -> Subject:
    """Load a pretrained model, the weights of a run, or a checkpoint.

    If a checkpoint has a ``config.json``, beside it or in the folder of its run, that file sets the preprocessing,
    settings and class names.

    Args:
        name: A timm name with tag, such as ``resnet50_ubn.bn_a1_in1k``; an ``hf-hub:`` or ``local-dir:`` name; the
            folder of a run; a checkpoint with a ``config.json``; a loaded model. With `checkpoint`, the architecture.
        checkpoint: Weights file, such as a ``.safetensors`` file, to use instead of pretrained weights. The
            architecture may be omitted if there is a ``config.json``.
        run: Folder of a run, finished or not, with ``config.json`` and ``model.safetensors``.
        ema: Whether to use the moving average of a run's weights.
        num_classes: Outputs of the checkpoint's classifier; by default the number in its weights.

    Raises:
        EvaluationError: The arguments conflict, the model does not exist, or the weights do not match it.
    """
    if isinstance(name, Subject):
        return name
    if isinstance(name, nn.Module):
        return subject_of(name)
    if name is None and run is None and checkpoint is not None:
        name, checkpoint = checkpoint, None
    if (name is None) == (run is None):
        raise EvaluationError("received neither a model nor a run, or both; valid: one of them")
    if checkpoint is not None and run is not None:
        raise EvaluationError("received a checkpoint and a run; valid: one of them")
    if name is not None and not timm.is_model(os.fspath(name)):
        if checkpoint is None and Path(name).is_dir():
            name, run = None, name
        elif checkpoint is None and Path(name).is_file():
            name, checkpoint = None, name
        elif not os.fspath(name).startswith(_SCHEMES):
            raise EvaluationError(_unknown(os.fspath(name)))
    if checkpoint is None and num_classes is not None:
        raise EvaluationError(f"num_classes: received {num_classes}; valid: none without a checkpoint")
    if run is None and ema:
        raise EvaluationError("ema: valid with a run; for a checkpoint, name the run's model_ema.safetensors")
    try:
        if run is not None:
            return _load_run(Path(run), ema)
        if checkpoint is not None:
            return _load_checkpoint(None if name is None else os.fspath(name), Path(checkpoint), num_classes)
        return _load_pretrained(os.fspath(cast(str, name)))
    except (OSError, RuntimeError) as error:
        raise EvaluationError(f"{run or name or checkpoint}: {error}") from error


def _unknown(name: str) -> str:
    """Return the error message for a name that is neither a model nor an existing path."""
    path = Path(name)
    if "/" in name or os.sep in name or path.suffix in (".safetensors", *PICKLE_ENDINGS):
        return (
            f"{name}: no such folder or file; valid: the folder of a run, a checkpoint, or a model's name "
            "(hf-hub:OWNER/NAME on the Hub)"
        )
    return f"{name}: Unknown model, and no folder or file has this name; {similar_names(name)}"


def subject_of(model: nn.Module) -> Subject:
    """Create a subject from a timm model, such as one that was just trained.

    Args:
        model: Model with `num_classes` and `pretrained_cfg`, as in timm.

    Raises:
        EvaluationError: The model is not a timm model.
    """
    if not hasattr(model, "pretrained_cfg"):
        raise EvaluationError(f"model: received {type(model).__name__}; valid: a timm model")
    config = cast(Mapping[str, Any], model.pretrained_cfg)
    name = config.get("architecture") or type(model).__name__
    return Subject(model=model, name=name, classes=_label_names(model), sha256=None, source=name)


def expand_names(names: Iterable[str]) -> list[str]:
    """Expand wildcards and files of names, in order and without duplicates.

    Args:
        names: Names that `load_subject` accepts; wildcards such as ``*_ubn``, which match all pretrained weights; and
            ``.txt`` files with one of these per line, where lines that start with ``#`` are comments.

    Raises:
        EvaluationError: A wildcard matches nothing, or a file has no names.
    """
    found: dict[str, None] = {}
    for name in names:
        if name.endswith(_LISTS) and Path(name).is_file():
            lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
            listed = [line for line in lines if line and not line.startswith("#")]
            if not listed:
                raise EvaluationError(f"{name} has no names; valid: one per line")
            found |= dict.fromkeys(expand_names(listed))
        elif any(sign in name for sign in "*?[") and not Path(name).exists():
            matches = timm.list_models(name, pretrained=True)
            if not matches:
                raise EvaluationError(
                    f"no pretrained model matches {name!r}; {similar_names(name.strip('*'))}; `ubn-zoo list` lists them"
                )
            found |= dict.fromkeys(matches)
        else:
            found[name] = None
    return list(found)


def norm_of(model: nn.Module) -> str | None:
    """Name of the `VARIANTS` norm that all norm layers of a model have; None if there is no such norm."""
    names = {("threshold" not in one.settings, one.calibrated, one.depthwise): name for name, one in VARIANTS.items()}
    found = set()
    for layer in model.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            calibrated = layer.center_weight is not None or layer.scale_weight is not None
            found.add(names.get((layer.threshold is not None, calibrated, layer.kernel_size > 1)))
        elif isinstance(layer, nn.BatchNorm2d):
            found.add("bn")
    return found.pop() if len(found) == 1 else None


def weights_hash(source: str, *, ema: bool = False) -> str | None:
    """SHA-256 of the current weights in a run's folder or checkpoint; None for other names."""
    path = Path(source)
    if path.is_dir() and not timm.is_model(source):
        path /= "model_ema.safetensors" if ema else "model.safetensors"
    return _sha256(path) if path.is_file() else None


def _load_pretrained(name: str) -> Subject:
    model = timm.create_model(name, pretrained=True)
    records = {record.id: record.sha256 for record in load_manifest().records}
    sha256 = records.get(name) or _hash_of_cached(cast(Mapping[str, Any], model.pretrained_cfg))
    return Subject(model=model, name=name, classes=_label_names(model), sha256=sha256, source=name)


def _load_run(folder: Path, ema: bool) -> Subject:
    weights = folder / ("model_ema.safetensors" if ema else "model.safetensors")
    missing = [path.name for path in (folder / _CONFIG, weights) if not path.is_file()]
    if missing:
        hint = "its recipe has no ema_decay, or it" if ema else "the run"
        raise EvaluationError(f"{folder} has no {' and no '.join(missing)}; {hint} has not finished an epoch")
    return _load_configured(folder, weights, source=str(folder), ema=ema)


def _load_configured(folder: Path, weights: Path, *, source: str, ema: bool = False) -> Subject:
    """Load weights into the model described by a folder's ``config.json``."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    model.load_state_dict(read_checkpoint(weights))
    return Subject(
        model=model,
        name=cast(Mapping[str, Any], model.pretrained_cfg)["architecture"],
        classes=_label_names(model),
        sha256=_sha256(weights),
        source=source,
        ema=ema,
        preprocessing=str(folder / _CONFIG),
    )


def _load_checkpoint(name: str | None, path: Path, num_classes: int | None) -> Subject:
    folder, settings = _configuration(path)
    if name is None and folder is None:
        raise EvaluationError(
            f"{path}: no {_CONFIG} beside it that names the architecture; give the architecture as the model and this "
            "file as `checkpoint`"
        )
    architecture = settings.get("architecture")
    if folder is not None and name in (None, architecture) and num_classes in (None, settings.get("num_classes")):
        return _load_configured(folder, path, source=str(path))
    state = read_checkpoint(path)
    name = cast(str, name or architecture)
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classifier = None if cfg is None else state.get(f"{cfg.classifier}.weight")
    outputs = num_classes or (None if classifier is None else len(classifier))
    arguments: dict[str, Any] = {} if outputs is None else {"num_classes": outputs}
    if folder is not None:
        # Keep the preprocessing of training even if another architecture, such as the sibling, gets the weights.
        described = settings.get("pretrained_cfg") or {}
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
        overlay = {**described, "label_names": settings.get("label_names") or described.get("label_names")}
        arguments["pretrained_cfg_overlay"] = {key: overlay[key] for key in keys if overlay.get(key) is not None}
    model = timm.create_model(name, pretrained=False, **arguments)
    model.load_state_dict(state)
    where = "the architecture's configuration" if folder is None else str(folder / _CONFIG)
    return Subject(
        model=model,
        name=name,
        classes=_label_names(model) if folder is not None else (),
        sha256=_sha256(path),
        source=str(path),
        preprocessing=where,
    )


def _configuration(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Find the ``config.json`` of a checkpoint, beside it or in its run; return its folder and content."""
    places = [path.parent]
    snapshots = path.absolute().parent.parent
    if snapshots.name == _CHECKPOINTS:
        places.append(snapshots.parent)
    for folder in places:
        try:
            settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(settings, dict) and isinstance(settings.get("architecture"), str):
            return folder, settings
    return None, {}


def _label_names(model: nn.Module) -> tuple[str, ...]:
    names = tuple(cast(Mapping[str, Any], model.pretrained_cfg).get("label_names") or ())
    # A model with a new head still has the configuration of the old head.
    return names if len(names) == model.num_classes else ()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash_of_cached(config: Mapping[str, Any]) -> str | None:
    """Hash of the cached file that a Hub model was loaded from."""
    repository, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    names = [config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"]
    for name in names if repository else ():
        path = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None) if name else None
        if isinstance(path, str):
            return _sha256(Path(path))
    return None
