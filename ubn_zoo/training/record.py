"""What a run writes while it trains: tables, checkpoints, weights, logs, status, report and plots."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import timm
import torch
from torch import nn

from ubn_zoo import __version__
from ubn_zoo.errors import UbnZooError
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity, write_metrics, write_similarity
from ubn_zoo.evaluation.plots import draw_run
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.base import base_weights
from ubn_zoo.training.checkpoint import Snapshot, save_snapshot
from ubn_zoo.training.folder import (
    BEST,
    CHECKPOINTS,
    ENVIRONMENT,
    METRICS,
    SIMILARITY,
    keep_best,
    write_config,
    write_json,
    write_weights,
)
from ubn_zoo.training.loggers import Logger, epoch_scalars, open_loggers
from ubn_zoo.training.report import write_report
from ubn_zoo.training.status import RunProgress, StatusFile
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.provenance import device_name, source_commit

__all__ = ["Recorder", "draw"]

_DRAWING = 0.02  # largest share of a run's time that drawing plots between epochs may take
_logger = logging.getLogger(__name__)


def environment(recipe: Recipe, ranks: Ranks, data: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """Versions, hardware, code, base weights and data of one start of a run."""
    device = {
        "name": device_name(ranks.device),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda if ranks.device.type == "cuda" else None,
    }
    versions = {
        "ubn_zoo": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "updates": updates,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": source_commit(),
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "ranks": ranks.count,
        "threads": torch.get_num_threads(),
        "hardware": device,
        "versions": versions,
        "base": base_weights(recipe),
        "data": dict(data),
    }


def _note_start(folder: Path, start: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a start to the run's record, and warn if the data has changed since the last one; return all starts."""
    path = folder / ENVIRONMENT
    starts: list[dict[str, Any]] = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError):
            _logger.warning("%s is damaged; the record of earlier starts is lost", path)
    if starts:
        before, now = starts[-1]["data"], start["data"]
        changed = [part for part in ("train", "test") if before[part] != now[part]]
        if changed:
            _logger.warning(
                "the %s images are not those that this run began with; it continues, and %s records that",
                " and ".join(changed),
                path,
            )
    starts = [*starts, start]
    write_json(path, {"starts": starts})
    return starts


def draw(folder: Path) -> None:
    """Draw a run's plots, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        _logger.warning("no plots: matplotlib is missing; pip install 'ubn-zoo[train]'")
    else:
        draw_run(folder)


class Recorder:
    """Writes a run's files, on the first rank alone. It also starts the run's status.

    Args:
        folder: The run's folder, which has its recipe.
        recipe: The run, complete.
        progress: How far it is; counted elsewhere.
        plots: Whether to draw plots.
    """

    def __init__(self, folder: Path, recipe: Recipe, progress: RunProgress, *, plots: bool = True) -> None:
        self._plots = plots
        self._folder, self._recipe, self._progress = folder, recipe, progress
        self._status = StatusFile(folder)
        progress.add_elapsed(self._status.elapsed())
        self._rows: Sequence[EpochMetrics] = ()
        self._similarity: Sequence[LayerSimilarity] = ()
        self._starts: Sequence[Mapping[str, Any]] = ()
        self._loggers: tuple[Logger, ...] = ()
        # Drawing once takes about two seconds.
        self._began, self._drawing = time.monotonic(), 2.0
        self.beat()

    def start(
        self, model: nn.Module, classes: tuple[str, ...], begun: dict[str, Any], snapshot: Snapshot | None
    ) -> None:
        """Note a start, and write what a kill after the newest checkpoint left unwritten.

        Args:
            model: The model, before its state is restored.
            classes: Names of its classes.
            begun: What `environment` says.
            snapshot: State to resume from; None for a new run.
        """
        self._model, self._classes = model, classes
        self._starts = _note_start(self._folder, begun)
        self._loggers = open_loggers(self._recipe, self._folder, begun["updates"])
        if snapshot is not None:
            self._take(snapshot)

    def beat(self) -> None:
        """Show that the run is alive."""
        self._status.beat(self._progress)

    def loss(self, updates: int, loss: float, lr: float) -> None:
        """Log the training loss."""
        self._log({"train/loss": loss, "train/lr": lr}, updates)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, and at the end of an epoch the weights."""
        save_snapshot(self._folder / CHECKPOINTS, snapshot, keep=self._recipe.keep_checkpoints)
        self._take(snapshot)

    def epoch(self, row: EpochMetrics, layers: tuple[LayerSimilarity, ...]) -> None:
        """Log an epoch, whose checkpoint is written, and renew status, report and plots."""
        self._log(epoch_scalars(row, layers), row.step)
        status = self._progress.status("running")
        self._status.write(status)
        self._report("running", None)
        started = time.monotonic()
        if self._plots and row.epoch < self._recipe.epochs and self._drawing <= _DRAWING * (started - self._began):
            draw(self._folder)
            self._drawing += time.monotonic() - started

    def end(self, state: str, message: str | None = None) -> None:
        """Write the last status and report, and draw the plots of a run that has not failed."""
        self._status.write(self._progress.status(state, message))
        self._report(state, message)
        for logger in self._loggers:
            logger.close(state == "finished")
        if self._plots and state != "failed" and self._rows:
            draw(self._folder)

    def fail(self, error: BaseException) -> None:
        """Write that an error has ended the run."""
        if isinstance(error, KeyboardInterrupt):
            state, message = "interrupted", "interrupted; run the same command to resume from the last checkpoint"
        else:
            state = "failed"
            message = str(error) if isinstance(error, (UbnZooError, OSError)) else f"{type(error).__name__}: {error}"
        # The error that has ended the run is the one to report.
        with contextlib.suppress(Exception):
            self.end(state, message)

    def _log(self, values: Mapping[str, float], updates: int) -> None:
        for logger in self._loggers:
            logger.log(values, updates)

    def _take(self, snapshot: Snapshot) -> None:
        """Write weights and tables of a snapshot that is on the disk."""
        folder, recipe = self._folder, self._recipe
        self._rows = [EpochMetrics(**row) for row in snapshot.progress["metrics"]]
        self._similarity = [LayerSimilarity(**row) for row in snapshot.progress["similarity"]]
        if snapshot.progress["step"] == 0:
            write_config(folder, recipe, self._classes, self._model)
            write_weights(folder, snapshot.model, snapshot.ema)
            if recipe.keep_best is not None:
                (folder / BEST).mkdir(exist_ok=True)
                write_config(folder / BEST, recipe, self._classes, self._model)
                keep_best(folder / BEST, recipe, self._rows[-1], snapshot)
        # The metrics come last: a run with all rows is finished.
        write_similarity(folder / SIMILARITY, self._similarity)
        write_metrics(folder / METRICS, self._rows)

    def _report(self, state: str, message: str | None) -> None:
        try:
            status = self._progress.status(state, message)
            write_report(self._folder, self._recipe, self._rows, self._similarity, status, self._starts)
        except OSError as error:
            _logger.warning("the report cannot be written: %s", error)
