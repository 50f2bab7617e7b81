"""Where a run's curves go while it trains: TensorBoard events and Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ubn_zoo.errors import MissingPackageError, RunError
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.folder import EVENTS

__all__ = ["Logger", "epoch_scalars", "open_loggers", "require_loggers"]

WANDB = "wandb"
_RUN_ID = "run_id"
_HELD_OUT = ("test_loss", "top1", "top5", "calibration_error", "ema_test_loss", "ema_top1", "ema_top5")
_logger = logging.getLogger(__name__)


class Logger(Protocol):
    """A place for curves."""

    def log(self, values: Mapping[str, float], updates: int) -> None:
        """Add one point to each of some curves, at a number of updates."""

    def close(self, finished: bool) -> None:
        """End the log; `finished` tells whether the run has ended as intended."""


def require_loggers(recipe: Recipe) -> None:
    """Check that the packages which a recipe logs to are installed.

    Raises:
        MissingPackageError: Weights & Biases is not.
    """
    if recipe.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise MissingPackageError(
            f"wandb_project: received {recipe.wandb_project!r}, and wandb is missing; pip install 'ubn-zoo[wandb]', or "
            "set wandb_project=null"
        )


def open_loggers(recipe: Recipe, folder: Path, updates: int) -> tuple[Logger, ...]:
    """Open TensorBoard events, if tensorboard is installed, and Weights & Biases, if the recipe names a project.

    Args:
        recipe: The run, complete.
        folder: Its folder.
        updates: Updates made before this start.

    Raises:
        RunError: Weights & Biases does not start.
    """
    loggers: list[Logger] = []
    if importlib.util.find_spec("tensorboard") is None:
        _logger.warning("no TensorBoard events: tensorboard is missing; pip install 'ubn-zoo[train]'")
    else:
        loggers.append(_TensorBoard(folder, updates))
    if recipe.wandb_project is not None:
        loggers.append(_WandB(recipe, folder))
    return tuple(loggers)


def epoch_scalars(row: EpochMetrics, layers: Sequence[LayerSimilarity]) -> dict[str, float]:
    """The points that an epoch adds to curves: held-out figures, rate, and similarity by layer."""
    values = {f"test/{name.removeprefix('test_')}": getattr(row, name) for name in _HELD_OUT}
    values["train/images_per_second"] = row.images_per_second
    values["similarity/gates_open"] = row.gates_open
    values |= {f"similarity/{layer.depth:03d} {layer.layer}": layer.similarity for layer in layers}
    return {name: value for name, value in values.items() if value is not None}


class _TensorBoard:
    def __init__(self, folder: Path, updates: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Updates after the checkpoint are repeated, so their events are removed.
        self._writer: Any = SummaryWriter(str(folder / EVENTS), purge_step=updates + 1 if updates else None)

    def log(self, values: Mapping[str, float], updates: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, updates)
        if "test/loss" in values:
            self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, which each start of the run resumes."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._module: Any = importlib.import_module("wandb")
        place = folder / WANDB
        place.mkdir(exist_ok=True)
        name = place / _RUN_ID
        if not name.exists():
            name.write_text(secrets.token_hex(8), encoding="ascii")
        try:
            self._run: Any = self._module.init(
                project=recipe.wandb_project,
                dir=str(folder),
                name=folder.resolve().name,
                id=name.read_text(encoding="ascii"),
                resume="allow",
                config=dataclasses.asdict(recipe),
            )
        except (self._module.Error, OSError) as error:
            raise RunError(
                f"wandb_project: Weights & Biases does not start: {str(error).rstrip('.')}; log in with `wandb login`, "
                "or set the environment's WANDB_MODE=offline to keep the log on this machine"
            ) from error
        # Updates after the checkpoint are repeated, so they are not the log's own steps, which only increase.
        self._run.define_metric("*", step_metric="update")

    def log(self, values: Mapping[str, float], updates: int) -> None:
        self._call("log", {**values, "update": updates})

    def close(self, finished: bool) -> None:
        self._call("finish", exit_code=0 if finished else 1)

    def _call(self, name: str, *arguments: object, **options: object) -> None:
        """Call a method of the run; a log that fails is a warning, since training does not depend on it."""
        if self._run is None:
            return
        try:
            getattr(self._run, name)(*arguments, **options)
        except (self._module.Error, OSError) as error:
            self._run = None
            _logger.warning("Weights & Biases gets no more of this run: %s", error)
