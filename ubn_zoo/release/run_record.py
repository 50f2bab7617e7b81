"""Facts from a training run's own files: the command that repeats it, its base weights, hardware and test images."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ubn_zoo.errors import RecipeError, SnapshotError, TrainingError, UnknownModelError
from ubn_zoo.evaluation.metrics import EpochMetrics
from ubn_zoo.models.catalog import describe
from ubn_zoo.recipes.schema import (
    Recipe,
    apply_settings,
    decisive_settings,
    list_recipes,
    load_recipe,
)
from ubn_zoo.training.build import complete, model_name
from ubn_zoo.training.checkpoint import newest_snapshot

__all__ = ["ENVIRONMENT", "Base", "RunFacts", "check_figures", "read_environment", "train_command", "without_folders"]

ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"

_PERCENT = ("top1", "top5", "calibration_error", "ema_top1", "ema_top5", "ema_calibration_error")
_LOSSES = ("train_loss", "test_loss", "ema_test_loss")
_TOLERANCE = 1e-3  # images: how far a stored percentage may be from a whole number of them
_MISSING = object()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The weights that a run started from.

    Attributes:
        name: ``model.tag``, or the name of a file.
        repository: Hub repository; None if the weights are not from the Hub.
        revision: Its commit; None if it was not recorded.
        sha256: SHA-256 of the file; None if it was not recorded.
    """

    name: str
    repository: str | None = None
    revision: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.repository or self.name}{f'@{self.revision}' if self.revision else ''}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What ``environment.json`` records about a run.

    Attributes:
        base: The weights that training started from; None if it started from scratch.
        images: Number of held-out images in the evaluation; None if unknown.
        split: Split that these images are from; None if it was not recorded.
        classes: Names of the classes in the order of the outputs; empty if the data has no names.
        hardware: Description of the machine.
        software: Versions of the packages.
        ranks: Number of processes.
        recipe_name: The packaged recipe named in the run's command; None if it names none.
        starts: How many times the run was started.
        extended: Epochs of the recipe before each extension of the finished run; empty if it was never extended.
    """

    base: Base | None
    images: int | None
    split: str | None
    classes: tuple[str, ...]
    hardware: str
    software: str
    ranks: int
    recipe_name: str | None
    starts: int
    extended: tuple[int, ...] = ()


def read_environment(folder: Path, recipe: Recipe) -> RunFacts:
    """Read a run's ``environment.json``.

    Args:
        folder: Folder of the run.
        recipe: Its recipe.

    Raises:
        ValueError: The file is missing, or is not what training writes.
    """
    path = folder / ENVIRONMENT
    try:
        starts = json.loads(path.read_bytes())["starts"]
        first, last = starts[0], starts[-1]
        machine, versions, data = last["hardware"], last["versions"], last["data"]
        images, split, classes = data["test_images"], data.get("test_split"), data["classes"]
        if not (images is None or (type(images) is int and images > 0)):
            raise ValueError(f"test_images is {images!r}")
        processes = f"{last['ranks']} processes, each on" if last["ranks"] > 1 else "one process on"
        cpu = machine["name"] == "cpu"
        device = f"the CPU ({machine['machine']}, {machine['cpu']}; torch threads: {last['threads']})"
        return RunFacts(
            base=_base(first.get("base", _MISSING), recipe),
            images=images,
            split=split if split is None else str(split),
            classes=tuple(map(str, classes)),
            hardware=f"{processes} {device if cpu else machine['name']}",
            software=f"ubn-zoo {versions['ubn_zoo']}, torch {versions['torch']}, timm {versions['timm']}",
            ranks=int(last["ranks"]),
            recipe_name=_recipe_name(first["command"]),
            starts=len(starts),
            extended=tuple(dict.fromkeys(int(start["epochs"]) for start in starts if "epochs" in start))[:-1],
        )
    except FileNotFoundError:
        raise ValueError(
            f"{ENVIRONMENT} is missing: hardware, images and origin of a run are read from it; pass the run's folder "
            "as training left it"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{ENVIRONMENT} is not what training writes: {type(error).__name__}: {error}") from None


def _base(found: Any, recipe: Recipe) -> Base | None:
    """The base weights that a run recorded; if it recorded none, what its recipe says about them."""
    if isinstance(found, Mapping):
        texts: dict[str, Any] = {key: None if value is None else str(value) for key, value in found.items()}
        return Base(**texts)
    if recipe.checkpoint is not None:
        return Base(name=Path(recipe.checkpoint).name)
    if not recipe.pretrained:
        return None
    try:
        entry = describe(model_name(recipe))
    except UnknownModelError:
        return Base(name=model_name(recipe))
    repository, revision = entry.address or (None, None)
    return Base(name=entry.name, repository=repository, revision=revision, sha256=entry.sha256)


def _recipe_name(command: Sequence[str]) -> str | None:
    """The packaged recipe named in a recorded command line."""
    words = [str(word) for word in command]
    given = [after for word, after in itertools.pairwise(words) if word == "--recipe"]
    given += [word.partition("=")[2] for word in words if word.startswith("--recipe=")]
    return next((name for name in given if name in list_recipes()), None)


def train_command(recipe: Recipe, *, name: str | None = None, ranks: int = 1, classes: int | None = None) -> str:
    """Write the command that repeats a run.

    Args:
        recipe: The run's recipe, complete.
        name: The recipe it is based on, packaged or a file; by default a packaged recipe with the same source.
        ranks: Number of processes.
        classes: Number of classes in the data; `num_classes` becomes a setting only if it differs.

    Returns:
        A command with a packaged recipe and the settings that yield the run's recipe; if none does, a command with the
        run's own ``recipe.yaml``.
    """
    recipe = without_folders(recipe)
    launcher = "ubn-zoo" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m ubn_zoo"
    names = [name] if name else [known for known in list_recipes() if load_recipe(known).source == recipe.source]
    for candidate in names:
        settings = _settings(recipe, load_recipe(candidate), classes)
        if settings is not None:
            changed = f" --set {shlex.join(settings)}" if settings else ""
            return f"{launcher} train --recipe {candidate} --data-dir DIR --output RUN{changed}"
    return f"{launcher} train --recipe recipe.yaml --data-dir DIR --output RUN"


def without_folders(recipe: Recipe) -> Recipe:
    """Remove the folder from the path of a recipe's checkpoint: it is private, and meaningless on another machine."""
    if recipe.checkpoint is None:
        return recipe
    return dataclasses.replace(recipe, checkpoint=Path(recipe.checkpoint).name)


def _settings(recipe: Recipe, base: Recipe, classes: int | None) -> list[str] | None:
    """The ``--set`` arguments that turn a base recipe into a run's recipe; None if there are none.

    Values that a run fills in from its model or its data are left out.
    """
    wanted, given = decisive_settings(recipe), decisive_settings(base)
    changed = {key: value for key, value in wanted.items() if value != given[key] and given[key] is not None}
    for _ in range(2):
        try:
            reached = decisive_settings(complete(apply_settings(base, _written(changed))))
        except (RecipeError, TrainingError):
            reached = {}
        if reached.get("num_classes") is None and wanted["num_classes"] == classes:
            reached["num_classes"] = classes
        if reached == wanted:
            return _written(changed)
        changed |= {key: value for key, value in wanted.items() if reached.get(key, _MISSING) != value}
        changed = {key: value for key, value in wanted.items() if key in changed and value != given[key]}
    return None


def _written(values: Mapping[str, Any]) -> list[str]:
    """Settings as ``--set`` takes them."""
    return [f"{key}={_yaml(list(value) if isinstance(value, tuple) else value)}" for key, value in values.items()]


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return re.sub(r"\n(\.\.\.\n)?$", "", text)


def check_figures(rows: Sequence[EpochMetrics], facts: RunFacts | None, folder: Path | None) -> list[str]:
    """Check that a run's figures are possible and match its other files.

    Args:
        rows: The rows of its ``metrics.csv``.
        facts: Facts from its ``environment.json``; None if there are none.
        folder: The run's folder, whose newest checkpoint has the figures too; None if there is none.

    Returns:
        The problems found.
    """
    for row in rows:
        where = f"epoch {row.epoch}"
        for name in (*_PERCENT, *_LOSSES):
            value = getattr(row, name)
            high = 100.0 if name in _PERCENT else math.inf
            if value is not None and not (math.isfinite(value) and 0.0 <= value <= high):
                valid = "from 0 to 100 percent" if name in _PERCENT else "finite and at least 0"
                return [f"{where}: {name} is {value:g}, not finite or out of range; valid: {valid}"]
        for least, most in ((row.top1, row.top5), (row.ema_top1, row.ema_top5)):
            if least is not None and most is not None and least > most:
                return [f"{where}: the top-1 accuracy {least:g} exceeds the top-5 accuracy {most:g}"]
        if facts is not None and facts.images is not None:
            for name in ("top1", "top5", "ema_top1", "ema_top5"):
                value = getattr(row, name)
                right = None if value is None else value * facts.images / 100.0
                if right is not None and abs(right - round(right)) > _TOLERANCE:
                    answers = f"a whole number of correct answers out of {facts.images}"
                    return [f"{where}: {name} is {value:g}, which is not {answers}"]
    return [] if folder is None else _check_against_checkpoint(rows, folder)


def _check_against_checkpoint(rows: Sequence[EpochMetrics], folder: Path) -> list[str]:
    try:
        snapshot = newest_snapshot(folder / CHECKPOINTS)
    except SnapshotError as error:
        return [str(error)]
    if snapshot is None:
        return []
    recorded = [EpochMetrics(**row) for row in snapshot.progress["metrics"]]
    for row, own in zip(rows, recorded, strict=False):
        for name in (*_PERCENT, *_LOSSES):
            if getattr(row, name) != getattr(own, name):
                return [
                    f"epoch {row.epoch}: {name} is {getattr(row, name)}, but {getattr(own, name)} in the run's newest "
                    "checkpoint; one of them was changed"
                ]
    return []
