"""The folder of a run: names of its files, what may be trained in it, its configuration and weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ubn_zoo.errors import RunError
from ubn_zoo.evaluation.metrics import EpochMetrics, read_metrics
from ubn_zoo.models.hub_config import describe_model
from ubn_zoo.recipes.schema import Recipe, decisive_settings, load_recipe
from ubn_zoo.training.checkpoint import Snapshot, tensor_bytes
from ubn_zoo.utils.files import write_file

__all__ = ["check_folder", "checkpoints", "is_finished", "keep_best", "save_weights", "write_config", "write_weights"]

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
CONFIG = "config.json"
SIMILARITY = "similarity.csv"
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "model_ema.safetensors"
CHECKPOINTS = "checkpoints"
EVENTS = "events"
BEST = "best"
BEST_EPOCH = "best.json"


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state as safetensors, atomically.

    Args:
        model: Any model without shared parameters.
        path: The file.

    Raises:
        OSError: It cannot be written.
    """
    write_file(path, tensor_bytes(model.state_dict()))


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def checkpoints(folder: Path) -> list[str]:
    """Names of a run's checkpoints, the oldest first."""
    place = folder / CHECKPOINTS
    return sorted(path.name for path in place.iterdir() if path.name.isdigit()) if place.is_dir() else []


def is_finished(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a run with its weights and all epochs of its recipe.

    Weights alone do not tell, since a run writes them after every epoch.

    Args:
        folder: The run's folder.

    Raises:
        OSError: A file cannot be read.
        ValueError: The recipe or the metrics are not valid.
    """
    place = Path(folder)
    if not all((place / name).is_file() for name in (RECIPE, METRICS, WEIGHTS)):
        return False
    return len(read_metrics(place / METRICS)) >= load_recipe(place / RECIPE).epochs


def check_folder(folder: Path, recipe: Recipe) -> int | None:
    """Check that a run may be trained in a folder: an empty one, one of the same recipe, or of a failed start.

    A finished run may be trained for more epochs.

    Returns:
        Epochs of the finished run that this recipe extends; 0 for a failed start of another recipe, whose files are
        to be removed; None otherwise.

    Raises:
        RunError: The folder holds another run or other files.
    """
    written = folder / RECIPE
    if not written.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no {RECIPE}; choose an empty folder")
        return None
    before, now = decisive_settings(load_recipe(written)), decisive_settings(recipe)
    different = [key for key in now if before[key] != now[key]]
    if not different:
        return None
    if not (checkpoints(folder) or any((folder / name).exists() for name in (WEIGHTS, METRICS))):
        return 0
    fix = "choose another folder, or remove it"
    if different == ["epochs"] and now["epochs"] > before["epochs"]:
        epochs: int = before["epochs"]
        if not is_finished(folder):
            fix = f"finish it with epochs={epochs}; a finished run can be trained for more"
        elif checkpoints(folder):
            return epochs
        else:
            fix = f"without {CHECKPOINTS}/ it cannot be trained for more; start another run from its weights"
    shown = "; ".join(f"{key} {before[key]!r} there, {now[key]!r} here" for key in different[:5])
    raise RunError(f"{folder} holds a run of another recipe ({shown}); {fix}")


def write_config(folder: Path, recipe: Recipe, classes: tuple[str, ...], model: nn.Module) -> None:
    """Write the configuration that timm reads beside the weights."""
    size = recipe.test_img_size or recipe.img_size
    config = describe_model(
        model,
        model_config={
            "label_names": list(classes),
            # The facts of the weights that training started from do not hold for these.
            "pretrained_cfg": dict.fromkeys(("tag", "license", "origin_url", "description")),
        },
        data_config={
            "input_size": (3, size, size),
            "interpolation": recipe.interpolation,
            "crop_pct": recipe.crop_pct,
            "mean": recipe.mean,
            "std": recipe.std,
        },
    )
    write_file(folder / CONFIG, json.dumps(config, indent=2))


def write_weights(folder: Path, state: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None) -> None:
    """Write a run's newest weights, and their moving average if there is one."""
    if averaged is not None:
        write_file(folder / EMA_WEIGHTS, tensor_bytes(averaged))
    write_file(folder / WEIGHTS, tensor_bytes(state))


def keep_best(folder: Path, recipe: Recipe, row: EpochMetrics, snapshot: Snapshot) -> bool:
    """Keep the weights of an epoch if they are the best so far by the recipe's ``keep_best``.

    `best.json` beside them has the epoch, the metric and its value. It is written last: after a kill before that, the
    weights are written again when the run resumes.

    Args:
        folder: Folder of the best weights, ``best/`` in that of the run.
        recipe: The run, with ``keep_best``.
        row: The epoch.
        snapshot: The state after it.

    Returns:
        Whether the weights were written. Those of the same epoch are written again.

    Raises:
        OSError: They cannot be written.
    """
    metric = str(recipe.keep_best)
    value = metric_of(row, metric)
    kept = read_best(folder)
    if kept is not None and kept[1] == metric and kept[0] != row.epoch:
        better = value < kept[2] if metric.endswith(("loss", "calibration_error")) else value > kept[2]
        if not better:
            return False
    state = snapshot.ema if metric.startswith("ema_") and snapshot.ema is not None else snapshot.model
    write_file(folder / WEIGHTS, tensor_bytes(state))
    write_json(folder / BEST_EPOCH, {"epoch": row.epoch, "metric": metric, "value": value})
    return True


def metric_of(row: EpochMetrics, metric: str) -> float:
    """The value of a metric that ``keep_best`` names."""
    value: float = getattr(row, metric.replace("loss", "test_loss"))
    return value


def read_best(folder: Path) -> tuple[int, str, float] | None:
    """Epoch, metric and its value of the weights in a folder of best weights; None if there are none."""
    try:
        found = json.loads((folder / BEST_EPOCH).read_bytes())
        return int(found["epoch"]), str(found["metric"]), float(found["value"])
    except (OSError, KeyError, TypeError, ValueError):
        return None
