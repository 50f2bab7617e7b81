"""Publish a checkpoint on the Hub in one commit, and record it in the manifest.

Everything is checked and made ready before anything is sent, and the manifest is written last, once the Hub has been
seen to hold the files. A publication that was cut off can therefore simply be repeated.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import timm
import torch
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from timm.models._hub import save_config_for_hf
from torch import nn

from ubn_zoo import __version__
from ubn_zoo.errors import PublishConflictError, PublishError
from ubn_zoo.evaluation.metrics import EpochMetrics, read_metrics
from ubn_zoo.hub import fetch as hub
from ubn_zoo.hub.manifest import Manifest, ManifestError, Record, add_record, load_manifest, record_from_dict
from ubn_zoo.hub.manifest import record_to_dict as as_dict
from ubn_zoo.hub.retry import RETRY_SECONDS_VARIABLE, Advice, Backoff, HubError, endpoint, retry
from ubn_zoo.models import CheckpointError
from ubn_zoo.models.catalog import UnknownModelError, describe
from ubn_zoo.models.registry import SUFFIX
from ubn_zoo.models.weights import check_state_dict, read_checkpoint
from ubn_zoo.recipes.schema import Recipe, RecipeError, list_recipes, parse_recipe, recipe_path, recipe_sha256

__all__ = ["File", "Publication", "PublishConflictError", "PublishError", "publish"]

WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "model_ema.safetensors"
RECIPE = "recipe.yaml"
CSV = "metrics.csv"
JSON = "metrics.json"
CARD = "README.md"
MAX_PICTURE_BYTES = 5 * 2**20

_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.png")
_NO_COMMIT = "0" * 40
_TOP1 = "Top-1 accuracy (%)"
_HUB_DATASETS = {"cifar-10": "cifar10", "cifar-100": "cifar100", "imagenet-1k": "imagenet-1k"}

_ADVICE = Advice(
    login="log in with `hf auth login` or set HF_TOKEN to a token that may write there",
    offline="Unset HF_HUB_OFFLINE to publish",
    exhausted="Nothing was recorded; publish again later to finish it, or wait longer with "
    f"{RETRY_SECONDS_VARIABLE}=SECONDS",
    writing=True,
)


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file as it is uploaded.

    Attributes:
        name: Its path in the repository.
        content: Its bytes.
        sha256: Their SHA-256, 64 hexadecimal digits.
    """

    name: str
    content: bytes = dataclasses.field(repr=False)
    sha256: str

    @property
    def git_oid(self) -> str:
        """The name that Git gives the content, by which the Hub knows small files."""
        header = b"blob %d\0" % len(self.content)
        return hashlib.sha1(header + self.content, usedforsecurity=False).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What was published, or would be.

    Attributes:
        record: The manifest's record; its revision is forty zeros if this was a dry run.
        files: The files, the weights first.
        committed: Whether a new commit was made; False if the repository had everything already.
        recorded: Whether the manifest was changed.
    """

    record: Record
    files: tuple[File, ...]
    committed: bool
    recorded: bool

    @property
    def card(self) -> str:
        """Text of the model card."""
        return next(file for file in self.files if file.name == CARD).content.decode()


@dataclasses.dataclass(slots=True, kw_only=True)
class _Source:
    """What is known of a checkpoint before it is checked; None where nothing was found."""

    label: str
    weights: bytes = b""
    averaged: bool = False
    state: dict[str, Any] | None = None
    model: nn.Module | None = None
    architecture: str | None = None
    tag: str | None = None
    license: str | None = None
    description: str | None = None
    base_model: str | None = None
    data: str | None = None
    trained: str | None = None
    data_config: dict[str, Any] | None = None
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: bytes | None = None
    recipe_name: str = RECIPE
    recipe_sha256: str | None = None
    needs_recipe: bool = True
    metrics: list[Any] | None = None
    table: bytes | None = None
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def publish(
    source: str | os.PathLike[str],
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    dataset: str | None = None,
    split: str = "test",
    recipe: str | os.PathLike[str] | None = None,
    metrics: str | os.PathLike[str] | None = None,
    description: str | None = None,
    base_model: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    replace: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Publication:
    """Publish a checkpoint on the Hub in one commit, and record it in a manifest.

    A repository that has the same files already gets no new commit, so a publication can be repeated, above all after
    it was cut off. Uploads are huggingface_hub's own: its token, its endpoint (``HF_ENDPOINT``), with or without Xet.

    Args:
        source: Folder of a training run (`recipe.yaml`, `metrics.csv`, `model.safetensors`), folder in timm's format
            (`config.json`, `model.safetensors`), file of ``ubn-zoo convert``, or id of a record of the manifest.
        repo_id: Hub repository, ``owner/name``; made if there is none.
        tag: Name of these weights in ``architecture.tag``; by default the checkpoint's own.
        private: Whether the repository is, or is made, private.
        dry_run: Whether only to check: nothing is sent, asked or written.
        license: SPDX identifier of the weights' license; by default the checkpoint's own.
        dataset: Name of the data of training and measurement; by default the checkpoint's own.
        split: The part of it that a run's metrics were measured on.
        recipe: A recipe's file, where the checkpoint brings none.
        metrics: A ``.csv`` file as training writes it, or a ``.json`` file with a list of metrics as in the manifest.
        description: One sentence for people.
        base_model: Hub id of the model that training started from.
        manifest: The manifest's file; by default the one that this package carries.
        replace: Whether other weights of the same id in the manifest, and files of the repository that do not stem
            from a recorded publication, may be replaced.
        cache_dir: Cache folder for a record's weights; by default huggingface_hub's.

    Raises:
        PublishError: The checkpoint is not fit to be public; all reasons are listed.
        PublishConflictError: The repository changed meanwhile, or has other content.
        HubError: The Hub refuses, or cannot be reached.
        ManifestError: The manifest is not valid, or has other weights of this id.
        OSError: The manifest cannot be written.
    """
    book = load_manifest(manifest)
    found = _gather(source, book, dataset=dataset, split=split, cache_dir=cache_dir)
    _add_given(found, recipe=recipe, metrics=metrics, dataset=dataset, split=split)
    given = {"tag": tag, "license": license, "description": description, "base_model": base_model}
    for name, value in given.items():
        if value is not None:
            setattr(found, name, value)
    record, files = _prepare(found, repo_id)
    earlier = next((known for known in book if known.id == record.id), None)
    if earlier is not None and earlier.sha256 != record.sha256 and not replace:
        raise ManifestError(
            f"record '{record.id}': the manifest has other weights of this id; choose another tag, or replace them"
        )
    if dry_run:
        return Publication(record=record, files=files, committed=False, recorded=False)
    bases = sorted({str(known.revision) for known in book if known.repo_id == repo_id})
    revision, committed = _upload(repo_id, files, record.id, private=private, bases=bases, replace=replace)
    record = dataclasses.replace(record, revision=revision)
    if earlier is not None and _serves_as_well(earlier, record):
        return Publication(record=earlier, files=files, committed=committed, recorded=False)
    add_record(record, manifest, replace=earlier is not None)
    return Publication(record=record, files=files, committed=committed, recorded=True)


def _serves_as_well(earlier: Record, record: Record) -> bool:
    """A bundled file serves without the Hub, and an earlier revision with the same content is as good a pin."""
    if earlier.source == "bundled":
        return earlier.sha256 == record.sha256
    return dataclasses.replace(earlier, revision=record.revision) == record


# What is published


def _gather(
    source: str | os.PathLike[str],
    book: Manifest,
    *,
    dataset: str | None,
    split: str,
    cache_dir: str | os.PathLike[str] | None,
) -> _Source:
    """Find out what a source is and read what it has."""
    path = Path(source)
    if path.is_dir():
        found = _Source(label=str(path), data=dataset)
        # Of a run with a moving average, that is what is published; it is there only once the run is finished.
        found.averaged = (path / WEIGHTS).is_file() and (path / EMA_WEIGHTS).is_file()
        _read_weights(found, path / (EMA_WEIGHTS if found.averaged else WEIGHTS))
        _read_companions(found, path)
        recipe = _parsed_recipe(found)
        if recipe is not None and recipe.norm != "ubn":
            found.problems.append(f"it was trained with norm {recipe.norm!r}; only UBN models are published")
        elif (path / "config.json").is_file():
            _from_config(found, path)
        else:
            _from_run(found)
        if found.table is not None:
            _metrics_of_run(found, found.table, dataset, split)
        return found
    if path.is_file():
        found = _Source(label=str(path), data=dataset)
        _read_weights(found, path)
        _from_converted(found, path)
        return found
    record = next((known for known in book if known.id == str(source)), None)
    if record is None:
        raise PublishError(
            str(source), ["valid are a folder of a run or checkpoint, a converted file, or the id of a manifest record"]
        )
    return _from_record(record, cache_dir)


def _read_weights(found: _Source, path: Path) -> None:
    if not path.is_file():
        found.problems.append(f"there is no {path.name}; only safetensors are published, never a pickle")
    elif path.suffix != ".safetensors":
        found.problems.append(f"{path.name} is not a safetensors file; turn it into one with `ubn-zoo convert`")
    else:
        try:
            found.state = read_checkpoint(path)
            found.weights = path.read_bytes()
        except CheckpointError as error:
            found.problems.append(str(error))


def _read_companions(found: _Source, folder: Path) -> None:
    """Recipe, metrics and pictures that lie beside the weights."""
    if (folder / RECIPE).is_file():
        found.recipe = (folder / RECIPE).read_bytes()
    if (folder / CSV).is_file():
        found.table = (folder / CSV).read_bytes()
    elif (folder / JSON).is_file():
        found.metrics = _read_json_metrics(found, folder / JSON)
    for path in sorted(folder.glob("*.png")):
        content = path.read_bytes()
        if not _PICTURE_NAME.fullmatch(path.name) or not content.startswith(_PNG) or len(content) > MAX_PICTURE_BYTES:
            found.problems.append(f"{path.name!r} is not a plainly named PNG of at most {MAX_PICTURE_BYTES} bytes")
        else:
            found.pictures[path.name] = content


def _from_run(found: _Source) -> None:
    """Complete a source from the recipe of its run."""
    recipe = _parsed_recipe(found)
    if recipe is None:
        found.problems.append("without config.json or a valid recipe.yaml the architecture is not known")
        return
    found.architecture = recipe.model + SUFFIX
    side = recipe.test_img_size or recipe.img_size
    incomplete = [key for key in ("num_classes", "mean", "std", "interpolation") if getattr(recipe, key) is None]
    if recipe.num_classes is None or side is None or incomplete:
        found.problems.append(f"{RECIPE} is not that of a run: {', '.join(incomplete) or 'img_size'} is missing")
        return
    _build_model(found, found.architecture, recipe.num_classes)
    found.data_config = {
        "input_size": (3, side, side),
        "mean": recipe.mean,
        "std": recipe.std,
        "interpolation": recipe.interpolation,
        "crop_pct": recipe.crop_pct or 1.0,
        "crop_mode": "center",
    }
    if recipe.pretrained:
        name = f"{found.architecture}.{recipe.pretrained_tag}" if recipe.pretrained_tag else found.architecture
        with contextlib.suppress(UnknownModelError):
            repository = describe(name).repository
            found.base_model = repository.partition("@")[0] if repository else None


def _parsed_recipe(found: _Source) -> Recipe | None:
    """The recipe, if there is a valid one; `_prepare` says what is wrong with another."""
    try:
        return None if found.recipe is None else parse_recipe(found.recipe.decode("utf-8"))
    except (RecipeError, UnicodeDecodeError):
        return None


def _build_model(found: _Source, name: str, num_classes: int) -> None:
    try:
        describe(name)
        found.model = timm.create_model(name, num_classes=num_classes)
    except (UnknownModelError, RuntimeError, TypeError, ValueError) as error:
        found.problems.append(f"the model {name} cannot be built: {error}")


def _from_config(found: _Source, folder: Path) -> None:
    """Complete a source from timm's config.json."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        architecture, cfg = config["architecture"], config["pretrained_cfg"]
        describe(architecture)
        found.model = timm.create_model(f"local-dir:{folder}")
    except (LookupError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        found.problems.append(f"config.json does not describe a model of the zoo: {error}")
        return
    found.architecture = architecture
    found.tag, found.license, found.description = cfg.get("tag"), cfg.get("license"), cfg.get("description")
    found.labels = {name: config[name] for name in ("label_names", "label_descriptions") if name in config}


def _from_converted(found: _Source, path: Path) -> None:
    """Complete a source from the metadata that `ubn-zoo convert` writes."""
    if found.state is None:
        return
    with safetensors.safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    architecture, origin, classes = (metadata.get(key) for key in ("architecture", "converted_from", "num_classes"))
    if architecture is None or origin is None or classes is None or not re.fullmatch("[0-9]{1,7}", classes):
        found.problems.append(f"{path.name} has no note of its origin; valid is a file that `ubn-zoo convert` wrote")
        return
    found.architecture, found.tag, found.base_model = architecture, metadata.get("tag"), metadata.get("base_model")
    found.trained = f"converted from {origin}"
    # Nobody here trained these weights, so there is no recipe to ask for.
    found.needs_recipe = False
    _build_model(found, architecture, int(classes))


def _from_record(record: Record, cache_dir: str | os.PathLike[str] | None) -> _Source:
    """A source with everything that the manifest says of a checkpoint."""
    found = _Source(
        label=record.id,
        architecture=record.architecture,
        tag=record.tag,
        license=record.license,
        description=record.description,
        data=record.origin.data,
        trained=record.origin.trained,
        metrics=as_dict(record)["metrics"],
        needs_recipe=record.recipe is not None,
        data_config={
            "input_size": record.input.size,
            "mean": record.input.mean,
            "std": record.input.std,
            "interpolation": record.input.interpolation,
            "crop_pct": record.input.crop_pct,
            "crop_mode": record.input.crop_mode,
        },
    )
    _read_weights(found, hub.fetch_record(record, cache_dir=cache_dir))
    _build_model(found, record.architecture, record.num_classes)
    if record.recipe is not None:
        stem = Path(record.recipe.name).stem
        found.recipe_name, found.recipe_sha256 = record.recipe.name, record.recipe.sha256
        if stem in list_recipes() and recipe_sha256(stem) == record.recipe.sha256:
            found.recipe = recipe_path(stem).read_bytes()
    return found


def _add_given(
    found: _Source,
    *,
    recipe: str | os.PathLike[str] | None,
    metrics: str | os.PathLike[str] | None,
    dataset: str | None,
    split: str,
) -> None:
    """Take the recipe and metrics that the caller names."""
    if recipe is not None:
        try:
            found.recipe = recipe_path(recipe).read_bytes()
        except (RecipeError, OSError) as error:
            found.problems.append(str(error))
    if metrics is not None:
        path = Path(metrics)
        found.metrics, found.table = None, None
        if path.suffix == ".json":
            found.metrics = _read_json_metrics(found, path)
        else:
            try:
                found.table = path.read_bytes()
            except OSError as error:
                found.problems.append(f"metrics: {error}")
            else:
                _metrics_of_run(found, found.table, dataset, split)


def _read_json_metrics(found: _Source, path: Path) -> list[Any] | None:
    try:
        metrics = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        found.problems.append(f"metrics: {path.name} cannot be read: {error}")
        return None
    if not isinstance(metrics, list) or not metrics:
        found.problems.append(f"metrics: {path.name} is not a list of metrics as in the manifest")
        return None
    return metrics


def _metrics_of_run(found: _Source, table: bytes, dataset: str | None, split: str) -> None:
    """Turn the last epoch of a run into the manifest's metric: of the weights, or of their moving average."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CSV
            path.write_bytes(table)
            rows = read_metrics(path)
    except (ValueError, UnicodeDecodeError, csv.Error, KeyError) as error:
        found.problems.append(f"metrics: {CSV} is not as training writes it: {error}")
        return
    recipe = _parsed_recipe(found)
    if recipe is None:
        return
    problem = _unfinished(rows, recipe)
    if problem is not None:
        found.problems.append(f"metrics: {problem}")
        return
    found.trained = found.trained or f"{recipe.command} (seed {recipe.seed})"
    found.metrics = [
        {
            "name": "top1",
            "value": rows[-1].ema_top1 if found.averaged else rows[-1].top1,
            "dataset": dataset or "unknown",
            "split": split,
            "measured": {"command": recipe.command, "seeds": [recipe.seed], "commit": rows[-1].commit},
        }
    ]


def _unfinished(rows: Sequence[EpochMetrics], recipe: Recipe) -> str | None:
    """Why rows are not those of the whole run of a recipe; None if they are."""
    if [row.epoch for row in rows] != list(range(1, recipe.epochs + 1)):
        return f"{CSV} has {len(rows)} epochs, the recipe has {recipe.epochs}: the run is not finished"
    if {(row.model, row.norm, row.seed) for row in rows} != {(recipe.model, recipe.norm, recipe.seed)}:
        return f"{CSV} is of another run than the recipe"
    if rows[-1].commit is not None and rows[-1].commit.endswith("+"):
        return (
            f"the code differed from its commit {rows[-1].commit[:-1]}, so the run cannot be repeated; train it again"
        )
    if not all(math.isfinite(value) for row in rows for value in (row.train_loss, row.test_loss, row.top1)):
        return f"{CSV} has values that are not finite"
    return None


def _prepare(found: _Source, repo_id: str) -> tuple[Record, tuple[File, ...]]:
    """Check everything, then give the record, without its revision, and all files; or raise with all reasons."""
    reasons = found.problems
    _check_recipe(found)
    if not found.metrics and not any(reason.startswith("metrics") for reason in reasons):
        reasons.append(f"metrics are missing: neither {CSV} nor {JSON} is there; pass a file of metrics")
    if not found.license:
        reasons.append("the license is missing; pass its identifier, for example apache-2.0")
    if not found.tag:
        reasons.append("the tag is missing; pass a name for these weights")
    if not found.data:
        reasons.append("the dataset is missing; pass the name of the data it was trained and measured on")
    if found.model is not None and found.state is not None:
        _check_weights(found, found.model, found.state)
    if found.model is None or found.state is None:
        raise PublishError(found.label, reasons)
    config = _config(found, found.model)
    draft = _draft(found, found.model, config["pretrained_cfg"], repo_id)
    try:
        record = record_from_dict(draft)
    except ManifestError as error:
        reasons.append(str(error))
        raise PublishError(found.label, reasons) from None
    if reasons:
        raise PublishError(found.label, reasons)
    contents = {WEIGHTS: found.weights, "config.json": _json(config)}
    if found.recipe is not None:
        contents[RECIPE] = found.recipe
    if found.table is not None:
        contents[CSV] = found.table
    else:
        contents[JSON] = _json(as_dict(record)["metrics"])
    contents |= found.pictures
    contents[CARD] = _card(record, found).encode()
    return record, tuple(File(name, body, hashlib.sha256(body).hexdigest()) for name, body in contents.items())


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def _check_recipe(found: _Source) -> None:
    if found.recipe is None:
        if found.needs_recipe and not any("recipe" in reason for reason in found.problems):
            found.problems.append(f"the recipe is missing: there is no {RECIPE}; pass its file")
        return
    if found.recipe_sha256 not in (None, hashlib.sha256(found.recipe).hexdigest()):
        found.problems.append(f"the recipe is not the recorded one, of SHA-256 {found.recipe_sha256}")
    try:
        parse_recipe(found.recipe.decode("utf-8"))
    except (RecipeError, UnicodeDecodeError) as error:
        found.problems.append(f"the recipe is not valid: {error}")


def _check_weights(found: _Source, model: nn.Module, state: dict[str, Any]) -> None:
    """Keys, shapes, dtypes, finite values, and a forward pass that stays finite."""
    try:
        check_state_dict(state, model, WEIGHTS, str(found.architecture))
    except CheckpointError as error:
        found.problems.append(str(error).replace(". Nothing was loaded", ""))
        return
    model.load_state_dict(state)
    size = (found.data_config or cast(dict[str, Any], model.pretrained_cfg))["input_size"]
    images = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            finite = bool(torch.isfinite(model.eval()(images)).all())
    except RuntimeError as error:
        found.problems.append(f"the forward pass of an image of size {tuple(size)} fails: {error}")
        return
    if not finite:
        found.problems.append("the forward pass gives NaN or infinite outputs")


def _config(found: _Source, model: nn.Module) -> dict[str, Any]:
    """What timm needs to build the model from the repository."""
    described = {"tag": found.tag, "license": found.license, "description": _description(found), "origin_url": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(
            model, str(path), model_config={**found.labels, "pretrained_cfg": described}, data_config=found.data_config
        )
        return dict(json.loads(path.read_bytes()))


def _description(found: _Source) -> str:
    return found.description or f"{found.architecture}, {'trained on ' + found.data if found.data else 'a UBN model'}"


def _draft(found: _Source, model: nn.Module, cfg: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """The record as the manifest's own checks take it; what is missing is stood in for, as it has been reported."""
    recipe = None
    if found.recipe is not None:
        recipe = {"name": found.recipe_name, "sha256": hashlib.sha256(found.recipe).hexdigest()}
    tag = found.tag or "unknown"
    return {
        "id": f"{found.architecture}.{tag}",
        "architecture": found.architecture,
        "tag": tag,
        "source": "hub",
        "repo_id": repo_id,
        "revision": _NO_COMMIT,
        "file": WEIGHTS,
        "sha256": hashlib.sha256(found.weights).hexdigest(),
        "bytes": len(found.weights),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "input": {
            "size": cfg["input_size"],
            "mean": cfg["mean"],
            "std": cfg["std"],
            "interpolation": cfg["interpolation"],
            "crop_pct": cfg["crop_pct"],
            "crop_mode": cfg["crop_mode"],
        },
        "num_classes": model.num_classes,
        "license": found.license or "unknown",
        "origin": {"data": found.data or "unknown", "trained": found.trained or "as its recipe says"},
        "recipe": recipe,
        "metrics": found.metrics or [],
        "description": _description(found),
    }


def _card(record: Record, found: _Source) -> str:
    """The model card: metadata that the Hub and leaderboards read, then what people want to know."""
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=_dataset_id(metric.dataset),
            dataset_name=metric.dataset,
            dataset_split=metric.split,
            metric_type="accuracy" if metric.name == "top1" else metric.name,
            metric_name=_TOP1 if metric.name == "top1" else metric.name,
            metric_value=metric.value,
            metric_args={
                "command": metric.measured.command,
                "seeds": list(metric.measured.seeds),
                "commit": metric.measured.commit,
            },
        )
        for metric in record.metrics
    ]
    metadata = ModelCardData(
        library_name="timm",
        license=record.license.lower(),
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "ubn", "pytorch"],
        datasets=sorted({_dataset_id(metric.dataset) for metric in record.metrics}),
        metrics=["accuracy"],
        base_model=found.base_model,
        model_name=record.id,
        eval_results=results,
    )
    rows = [
        f"| {metric.name} | {metric.value:g} | {metric.dataset}, {metric.split} | `{metric.measured.command}`, seeds "
        f"{', '.join(map(str, metric.measured.seeds)) or 'none'}, commit {metric.measured.commit or 'not known'} |"
        for metric in record.metrics
    ]
    facts = {
        "architecture": f"`{record.architecture}`, Unified Batch Normalization (arXiv 2311.15993)",
        "parameters": f"{record.params:,}",
        "classes": str(record.num_classes),
        "input": f"{'x'.join(map(str, record.input.size))}, {record.input.interpolation}",
        "training data": record.origin.data,
        "origin": record.origin.trained,
        "license": record.license,
        "SHA-256 of the weights": f"`{record.sha256}`",
    }
    pictures = [f"![{Path(name).stem}]({name})" for name in found.pictures]
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {record.id}",
        record.description,
        "\n".join(f"- {label}: {value}" for label, value in facts.items()),
        "## Use",
        "With `pip install ubn-zoo`:",
        "```python\nimport ubn_zoo\nimport timm\n\n"
        f'model = timm.create_model("hf-hub:{record.repo_id}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
        "## Results",
        "\n".join(["| metric | value | data | measured by |", "|---|---|---|---|", *rows]),
        *(["The recipe of the run is in `recipe.yaml`."] if found.recipe is not None else []),
        *(["## Training", "\n\n".join(pictures)] if pictures else []),
    ]
    return "\n\n".join(sections) + "\n"


def _dataset_id(name: str) -> str:
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")
    return _HUB_DATASETS.get(plain, plain or "unknown")


# The Hub


def _upload(
    repo_id: str, files: Sequence[File], title: str, *, private: bool, bases: Sequence[str], replace: bool
) -> tuple[str, bool]:
    """Bring a repository's main branch to hold the files; give the commit, and whether it is a new one."""
    api = HfApi(endpoint=constants.ENDPOINT, library_name="ubn-zoo", library_version=__version__)
    request = f"{repo_id} at {endpoint()}"
    head, is_private = retry(lambda: _open_repository(api, repo_id, private), request, _ADVICE)
    if private and not is_private:
        raise PublishConflictError(
            f"{request}: the repository is public, but a private one was asked for; nothing was sent"
        )
    remote = _remote(api, repo_id, head, request)
    differing = _differing(remote, files)
    if not differing:
        return head, False
    foreign = {} if replace else {name: remote[name] for name in differing if name in remote}
    for base in bases:
        if foreign:
            recorded = _remote(api, repo_id, base, request)
            foreign = {name: oid for name, oid in foreign.items() if recorded.get(name) != oid}
    if foreign:
        raise PublishConflictError(
            f"{request}: main has {', '.join(sorted(foreign))} with content that does not stem from a recorded "
            "publication; look at it, then choose another repository or replace it"
        )
    return _commit(api, repo_id, files, head, f"Publish {title}", request), True


def _open_repository(api: HfApi, repo_id: str, private: bool) -> tuple[str, bool]:
    """Head of main and whether the repository is private; it is made if there is none."""
    try:
        info = api.repo_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.repo_info(repo_id)
    if info.sha is None:
        raise HubError(f"{repo_id}: the repository has no commit on main; make one on its page")
    return info.sha, bool(info.private)


def _remote(api: HfApi, repo_id: str, revision: str, request: str) -> dict[str, str]:
    """Hashes of a commit's files by name: SHA-256 of large ones, Git's of small ones."""

    def attempt() -> dict[str, str]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        files = (entry for entry in entries if isinstance(entry, RepoFile))
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    return retry(attempt, request, _ADVICE)


def _differing(remote: Mapping[str, str], files: Sequence[File]) -> list[str]:
    return [file.name for file in files if remote.get(file.name) not in (file.sha256, file.git_oid)]


def _commit(api: HfApi, repo_id: str, files: Sequence[File], head: str, title: str, request: str) -> str:
    """Make one commit on top of `head` and give its revision, however often the Hub has to be asked.

    The answer to a commit may be lost after it was made. So main is looked at after every failure, and every attempt
    names the parent, by which the Hub refuses to make the same commit twice.
    """
    backoff = Backoff(request, _ADVICE)
    while True:
        failure: Exception | None = None
        try:
            # New operations every time: a committed one cannot be used again.
            operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in files]
            revision = api.create_commit(repo_id, operations, commit_message=title, parent_commit=head).oid
        except Exception as error:
            failure = error
            revision = retry(lambda: str(api.repo_info(repo_id).sha), request, _ADVICE)
        if not _differing(_remote(api, repo_id, revision, request), files):
            return revision
        if failure is None:
            raise HubError(f"{request}: the commit {revision} does not hold the files that were sent; not recorded")
        if revision != head:
            raise PublishConflictError(
                f"{request}: main moved from {head} to {revision} meanwhile, so nothing was committed; look at it, "
                "then publish again"
            ) from failure
        backoff.wait(failure)
