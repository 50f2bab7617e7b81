"""The source of a publication: a run, a folder in timm's format, a converted file, or a record of the manifest."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import timm
from torch import nn

from ubn_zoo.errors import CheckpointError, RecipeError, UnknownModelError
from ubn_zoo.evaluation.metrics import EpochMetrics, read_metrics
from ubn_zoo.hub import fetch as hub
from ubn_zoo.hub.manifest import Manifest, Record, record_to_dict
from ubn_zoo.models.catalog import describe
from ubn_zoo.models.registry import SUFFIX
from ubn_zoo.models.weights import read_checkpoint
from ubn_zoo.recipes.schema import (
    Recipe,
    dump_recipe,
    list_recipes,
    parse_recipe,
    recipe_path,
    recipe_sha256,
)
from ubn_zoo.release.run_record import (
    ENVIRONMENT,
    Base,
    RunFacts,
    check_figures,
    read_environment,
    train_command,
    without_folders,
)
from ubn_zoo.utils.sanitize import hide_secrets

__all__ = ["CSV", "JSON", "RECIPE", "WEIGHTS", "Options", "Source", "gather"]

WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "model_ema.safetensors"
RECIPE = "recipe.yaml"
CSV = "metrics.csv"
JSON = "metrics.json"
MAX_PICTURE_BYTES = 5 * 2**20
UNKNOWN = "unknown"

_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.png")
_PERCENTAGE = re.compile(r"(top[0-9]+|accuracy|acc|error|calibration_error|precision|recall)([_@-].*)?")

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of `publish` specifies about a checkpoint; None means the checkpoint's own value.

    Attributes:
        tag: Tag of the weights, as in ``architecture.tag``.
        license: SPDX identifier of the weights' license.
        dataset: Name of the dataset for training and evaluation.
        split: The split that the metrics were measured on.
        recipe: A recipe file.
        metrics: A metrics file.
        description: One sentence.
        base_model: Hub id of the model that training started from.
    """

    tag: str | None = None
    license: str | None = None
    dataset: str | None = None
    split: str | None = None
    recipe: str | os.PathLike[str] | None = None
    metrics: str | os.PathLike[str] | None = None
    description: str | None = None
    base_model: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Source:
    """Everything known about a checkpoint before it is checked; None for what was not found.

    Attributes:
        label: Its name in messages.
        weights: Content of the weights file.
        state: State dict of the weights.
        model: The model for the weights, freshly built.
        architecture: Name of the model.
        tag: Tag of the weights.
        license: SPDX identifier of the weights' license.
        description: One sentence.
        base: The weights that training started from, or that were converted.
        data: Name of the dataset for training and evaluation.
        split: The split that the metrics were measured on.
        trained: How the weights were made.
        command: The command that repeats the run; None if the source is not a run.
        data_config: Preprocessing, in timm's terms.
        labels: Entries of timm's config.json that name classes.
        recipe: Content of the recipe file.
        recipe_name: Its name in the record.
        recipe_sha256: Its required SHA-256; None for any.
        needs_recipe: Whether a recipe is required.
        metrics: Metrics as in the manifest.
        table: Content of the run's ``metrics.csv``.
        rows: Its rows; empty unless the run is complete.
        facts: What the run's ``environment.json`` says.
        folder: Folder of the run; None if the source is not a run.
        averaged: Whether the weights are the moving average.
        pictures: Plots by name.
        problems: Reasons why it cannot be published.
    """

    label: str
    weights: bytes = b""
    state: dict[str, Any] | None = None
    model: nn.Module | None = None
    architecture: str | None = None
    tag: str | None = None
    license: str | None = None
    description: str | None = None
    base: Base | None = None
    data: str | None = None
    split: str | None = None
    trained: str | None = None
    command: str | None = None
    data_config: dict[str, Any] | None = None
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: bytes | None = None
    recipe_name: str = RECIPE
    recipe_sha256: str | None = None
    needs_recipe: bool = True
    metrics: list[Any] | None = None
    table: bytes | None = None
    rows: Sequence[EpochMetrics] = ()
    facts: RunFacts | None = None
    folder: Path | None = None
    averaged: bool = False
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def parsed_recipe(self) -> Recipe | None:
        """The recipe, if there is a valid one."""
        return None if self.recipe is None else _parsed(self.recipe)


@functools.lru_cache(maxsize=4)
def _parsed(content: bytes) -> Recipe | None:
    try:
        return parse_recipe(content.decode("utf-8"))
    except (RecipeError, UnicodeDecodeError):
        return None


def gather(
    source: str | os.PathLike[str], manifest: Manifest, options: Options, cache_dir: str | os.PathLike[str] | None
) -> Source:
    """Determine what kind of source this is, and read everything known about it.

    Args:
        source: Path of a folder or file, or id of a record.
        manifest: The manifest.
        options: Values from the caller; they take precedence.
        cache_dir: Cache folder for a record's weights.

    Raises:
        HubError: The weights of a record cannot be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        found = _from_folder(path, options)
    elif path.is_file():
        found = Source(label=str(path))
        _read_weights(found, path)
        _from_converted(found, path)
    else:
        record = next((known for known in manifest if known.id == str(source)), None)
        if record is None:
            valid = "valid: the folder of a run or checkpoint, a converted file, or the id of a manifest record"
            return Source(label=str(source), problems=[valid])
        found = _from_record(record, cache_dir)
    _read_given_files(found, options)
    recipe = found.parsed_recipe
    if recipe is not None:
        found.license = found.license or recipe.license
        found.data = found.data or recipe.data_name
        found.split = found.split or recipe.test_split
    for name in ("tag", "license", "description", "split"):
        if getattr(options, name) is not None:
            setattr(found, name, getattr(options, name))
    found.data = options.dataset or found.data
    if options.base_model is not None:
        repository, _, revision = options.base_model.partition("@")
        found.base = Base(name=repository, repository=repository, revision=revision or None)
    found.tag = found.tag or (_slug(found.data) if found.data else None)
    if found.table is not None:
        _metrics_of_run(found, found.table)
    else:
        _check_percentages(found)
    found.metrics = _without_secrets(found.metrics)
    return found


def _slug(text: str) -> str | None:
    """A tag from the name of a dataset: ``CIFAR-10`` gives ``cifar10``, ``Oxford Pets`` gives ``oxford_pets``."""
    joined = re.sub(r"(?<=[a-z])-(?=[0-9])", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "_", joined).strip("_")[:50] or None


def _from_folder(path: Path, options: Options) -> Source:
    """Read the folder of a run, or one in timm's format."""
    found = Source(label=str(path))
    # Of a run with a moving average, the average is published.
    found.averaged = (path / WEIGHTS).is_file() and (path / EMA_WEIGHTS).is_file()
    _read_weights(found, path / (EMA_WEIGHTS if found.averaged else WEIGHTS))
    _read_companions(found, path)
    recipe = found.parsed_recipe
    if recipe is not None and recipe.norm != "ubn":
        found.problems.append(f"it was trained with norm {recipe.norm!r}; only UBN models are published")
    elif (path / "config.json").is_file():
        _from_config(found, path)
    elif recipe is None:
        found.problems.append("it has neither config.json nor a valid recipe.yaml, so the architecture is unknown")
    else:
        _from_recipe(found, recipe)
    if recipe is not None and (found.table is not None or (path / ENVIRONMENT).is_file()):
        _from_run(found, path, recipe)
    return found


def _read_weights(found: Source, path: Path) -> None:
    if not path.is_file():
        found.problems.append(f"there is no {path.name}; only safetensors are published, never a pickle")
    elif path.suffix != ".safetensors":
        found.problems.append(f"{path.name} is not a safetensors file; convert it with `ubn-zoo convert`")
    else:
        try:
            found.state = read_checkpoint(path)
            found.weights = path.read_bytes()
        except CheckpointError as error:
            found.problems.append(str(error))


def _read_companions(found: Source, folder: Path) -> None:
    """Read recipe, metrics and plots beside the weights."""
    if (folder / RECIPE).is_file():
        found.recipe = (folder / RECIPE).read_bytes()
    metrics = next((folder / name for name in (CSV, JSON) if (folder / name).is_file()), None)
    if metrics is not None:
        _read_metrics_file(found, metrics)
    for path in sorted(folder.glob("*.png")):
        content = path.read_bytes()
        if not _PICTURE_NAME.fullmatch(path.name) or not content.startswith(_PNG) or len(content) > MAX_PICTURE_BYTES:
            found.problems.append(f"{path.name!r} is not a PNG with a plain name and at most {MAX_PICTURE_BYTES} bytes")
        else:
            found.pictures[path.name] = content


def _from_run(found: Source, folder: Path, recipe: Recipe) -> None:
    """Complete a source from what a run recorded about itself."""
    try:
        found.facts = read_environment(folder, recipe)
    except ValueError as error:
        found.problems.append(str(error))
    else:
        found.base, found.split = found.facts.base, found.facts.split
    found.folder = folder
    public = without_folders(recipe)
    if public != recipe:
        found.recipe = dump_recipe(public).encode()


def _from_recipe(found: Source, recipe: Recipe) -> None:
    """Complete a source from the recipe of its run."""
    found.architecture = recipe.model + SUFFIX
    side = recipe.test_img_size or recipe.img_size
    incomplete = [key for key in ("num_classes", "mean", "std", "interpolation") if getattr(recipe, key) is None]
    if recipe.num_classes is None or side is None or incomplete:
        found.problems.append(f"{RECIPE} is not from a run: {', '.join(incomplete) or 'img_size'} is missing")
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


def _build_model(found: Source, name: str, num_classes: int) -> None:
    try:
        describe(name)
        found.model = timm.create_model(name, num_classes=num_classes)
    except (UnknownModelError, RuntimeError, TypeError, ValueError) as error:
        found.problems.append(f"the model {name} cannot be built: {error}")


def _from_config(found: Source, folder: Path) -> None:
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


def _from_converted(found: Source, path: Path) -> None:
    """Complete a source from the metadata that `ubn-zoo convert` writes."""
    if found.state is None:
        return
    with safetensors.safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    architecture, origin, classes = (metadata.get(key) for key in ("architecture", "converted_from", "num_classes"))
    if architecture is None or origin is None or classes is None or not re.fullmatch("[0-9]{1,7}", classes):
        found.problems.append(f"{path.name} does not record its origin; valid: a file written by `ubn-zoo convert`")
        return
    found.architecture, found.tag = architecture, metadata.get("tag")
    if "base_model" in metadata:
        repository, revision = metadata["base_model"], metadata.get("base_revision")
        found.base = Base(name=origin, repository=repository, revision=revision)
    found.trained = f"converted from {origin}"
    # Without a training run there is no recipe.
    found.needs_recipe = False
    _build_model(found, architecture, int(classes))


def _from_record(record: Record, cache_dir: str | os.PathLike[str] | None) -> Source:
    """Create a source from everything that the manifest says about a checkpoint."""
    found = Source(
        label=record.id,
        architecture=record.architecture,
        tag=record.tag,
        license=record.license,
        description=record.description,
        data=record.origin.data,
        trained=record.origin.trained,
        metrics=record_to_dict(record)["metrics"],
        needs_recipe=record.recipe is not None,
        data_config={
            "input_size" if name == "size" else name: value for name, value in dataclasses.asdict(record.input).items()
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


def _read_given_files(found: Source, options: Options) -> None:
    """Read the recipe and metrics that the caller names."""
    if options.recipe is not None:
        try:
            found.recipe = recipe_path(options.recipe).read_bytes()
        except (RecipeError, OSError) as error:
            found.problems.append(str(error))
    if options.metrics is not None:
        _read_metrics_file(found, Path(options.metrics))


def _read_metrics_file(found: Source, path: Path) -> None:
    """Read a run's table, or a list of metrics as in the manifest."""
    found.metrics, found.table = None, None
    try:
        content = path.read_bytes()
        if path.suffix != ".json":
            found.table = content
            return
        metrics = json.loads(content)
    except (OSError, ValueError) as error:
        found.problems.append(f"metrics: {path.name} cannot be read: {error}")
        return
    if isinstance(metrics, list) and metrics:
        found.metrics = metrics
    else:
        found.problems.append(f"metrics: {path.name} is not a list of metrics as in the manifest")


def _check_percentages(found: Source) -> None:
    for metric in found.metrics or []:
        name, value = (metric.get("name"), metric.get("value")) if isinstance(metric, dict) else (None, None)
        percentage = isinstance(name, str) and _PERCENTAGE.fullmatch(name) is not None
        if percentage and isinstance(value, (int, float)) and not 0 <= value <= 100:
            found.problems.append(f"metrics: {name} is {value:g}; valid: from 0 to 100 percent")


def _metrics_of_run(found: Source, table: bytes) -> None:
    """Turn the last epoch of a run into the manifest's metric, of the weights or of their moving average."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CSV
            path.write_bytes(table)
            rows = read_metrics(path)
    except (ValueError, csv.Error, KeyError) as error:
        found.problems.append(f"metrics: {CSV} is not what training writes: {error}")
        return
    recipe = found.parsed_recipe
    if recipe is None:
        return
    problem = _unfinished(rows, recipe)
    if problem is not None:
        found.problems.append(f"metrics: {problem}")
        return
    found.rows, facts = rows, found.facts
    found.problems += [f"metrics: {wrong}" for wrong in check_figures(rows, facts, found.folder)]
    command = train_command(
        recipe,
        name=facts.recipe_name if facts else None,
        ranks=facts.ranks if facts else 1,
        classes=len(facts.classes) if facts else None,
    )
    found.command = command
    start = f", starting from {found.base}" if found.base else ""
    found.trained = found.trained or f"{command} (seed {recipe.seed}){start}"
    found.metrics = [
        {
            "name": "top1",
            "value": rows[-1].ema_top1 if found.averaged else rows[-1].top1,
            "dataset": found.data or UNKNOWN,
            "split": found.split or "test",
            "measured": {"command": command, "seeds": [recipe.seed], "commit": rows[-1].commit},
        }
    ]


def _unfinished(rows: Sequence[EpochMetrics], recipe: Recipe) -> str | None:
    """Why the rows are not a complete run of the recipe; None if they are."""
    if [row.epoch for row in rows] != list(range(1, recipe.epochs + 1)):
        return f"{CSV} has {len(rows)} epochs, the recipe has {recipe.epochs}: the run is not finished"
    if {(row.model, row.norm, row.seed) for row in rows} != {(recipe.model, recipe.norm, recipe.seed)}:
        return f"{CSV} and the recipe are from different runs"
    if rows[-1].commit is not None and rows[-1].commit.endswith("+"):
        return f"the code differed from its commit {rows[-1].commit[:-1]}, so the run cannot be repeated; train again"
    return None


def _without_secrets(metrics: list[Any] | None) -> list[Any] | None:
    """Hide what looks like a secret in the commands of metrics, with a warning."""
    cleaned: list[Any] = []
    for metric in metrics or []:
        measured = metric.get("measured") if isinstance(metric, dict) else None
        command = measured.get("command") if isinstance(measured, dict) else None
        if isinstance(measured, dict) and isinstance(command, str) and hide_secrets(command) != command:
            hidden = hide_secrets(command)
            _logger.warning("the command of a metric contains what looks like a secret; it is published as: %s", hidden)
            metric = {**metric, "measured": {**measured, "command": hidden}}
        cleaned.append(metric)
    return cleaned or metrics
