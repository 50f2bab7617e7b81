"""A run and the folder it leaves: recipe, environment, metrics, checkpoints, weights, events and plots.

The folder is all that a run needs to resume after an interruption: the same command finds the newest complete
checkpoint in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ubn_zoo.data.loaders import EvalBatches, TrainBatches, class_names, describe, open_eval, open_train
from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.errors import RunError, TrainingError
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity, read_metrics
from ubn_zoo.recipes.schema import Recipe, apply_settings, dump_recipe, load_recipe
from ubn_zoo.training.build import build_model, complete
from ubn_zoo.training.checkpoint import Snapshot, newest_snapshot, remove_unfinished
from ubn_zoo.training.engine import fit
from ubn_zoo.training.folder import (
    CHECKPOINTS,
    ENVIRONMENT,
    EVENTS,
    METRICS,
    RECIPE,
    check_folder,
    checkpoints,
    is_finished,
    save_weights,
)
from ubn_zoo.training.loggers import WANDB, require_loggers
from ubn_zoo.training.record import Recorder, draw, environment
from ubn_zoo.training.report import REPORT
from ubn_zoo.training.status import STATUS, RunProgress
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.files import write_file

__all__ = ["Run", "is_finished", "run", "save_weights", "train"]

_LOST = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl", "socket closed")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The result of a run, finished or not.

    Attributes:
        folder: Its folder.
        metrics: One row per epoch done.
        finished: Whether all epochs are done.
        updates: Updates made before this start; 0 for a run that began with it.
        stopped_by: Name of the signal that stopped this process, such as ``SIGTERM``; None without one.
    """

    folder: Path
    metrics: tuple[EpochMetrics, ...]
    finished: bool
    updates: int
    stopped_by: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    build: Callable[[Recipe, torch.device], nn.Module]
    plots: bool
    on_start: Callable[[Recipe, int], None] | None
    on_step: Callable[[int, int], None] | None
    on_progress: Callable[[RunProgress], None] | None
    on_epoch: Callable[[EpochMetrics], None] | None


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[str]]:
    """Collect the names of SIGTERM and SIGHUP as they arrive, so that the run can save before it ends.

    Signals keep their effect outside the main thread, where no handler can be set. An ignored SIGHUP (nohup) stays
    ignored.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for terminal in terminals:
            try:
                os.get_terminal_size(terminal)
            except OSError:
                # The terminal was closed, and writing to it would end the run with an error.
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), terminal)

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in wanted}
    handled = [number for number in wanted if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in handled:
            signal.signal(number, before[number])


def run(
    recipe: Recipe,
    data_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    ranks: Ranks | None = None,
    *,
    data: tuple[TrainBatches, EvalBatches] | None = None,
    build: Callable[[Recipe, torch.device], nn.Module] = build_model,
    plots: bool = True,
    on_start: Callable[[Recipe, int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_progress: Callable[[RunProgress], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> Run:
    """Train by a recipe, from the start or from where an earlier run in the folder was interrupted.

    The folder gets `recipe.yaml` (complete, and first), `environment.json`, `metrics.csv`, `similarity.csv`,
    `checkpoints/`, `events/` (TensorBoard), `status.json`, `report.html` and plots as PNG. After every epoch it gets
    `config.json` and the newest weights as `model.safetensors` (with a moving average also `model_ema.safetensors`), so
    an unfinished run can be validated and loaded; with ``keep_best``, `best/` gets those of the best epoch.

    A finished run is not trained again, unless the recipe differs from its own in a larger ``epochs`` alone: then it is
    trained for the missing epochs, with the learning rate that the schedule of all epochs has there.

    A folder that has no checkpoint yet may be started again with another recipe.

    After SIGTERM or SIGHUP the state is saved, and the run returns unfinished.

    Args:
        recipe: The run.
        data_dir: Folder of the data.
        output: The run's folder; created if missing.
        ranks: This process; by default alone on the CPU.
        data: Batches to use instead of those in `data_dir`.
        build: Builds the model from the complete recipe and the device.
        plots: Whether to draw the plots.
        on_start: Called before training with the complete recipe and the updates made before.
        on_step: Called after every update with the images done in this epoch and the images of an epoch.
        on_progress: Called after every update with how far the run is.
        on_epoch: Called after every epoch with its row.

    Raises:
        MissingPackageError: The recipe has a ``wandb_project``, and wandb is not installed.
        RunError: The folder holds another run, the disk is full, or another rank was lost.
        DataError: The data cannot be used.
        SnapshotError: There are checkpoints, and all are damaged.
        TrainingError: Training cannot start or continue.
    """
    folder, place = Path(output), ranks or Ranks()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        return _run(
            recipe, data_dir, folder, place, data, _Options(build, plots, on_start, on_step, on_progress, on_epoch)
        )
    except OSError as error:
        raise RunError(f"{_reason(error, folder)}; {_kept(folder)}") from error
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        if place.count > 1 and any(word in str(error).lower() for word in _LOST):
            raise RunError(f"rank {place.rank} lost another rank: {first_line}; {_kept(folder)}") from error
        raise


def train(
    recipe: Recipe | str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *settings: str,
    ranks: Ranks | None = None,
    **hooks: Any,
) -> Run:
    """Train by a recipe, or resume the run in a folder; the same as ``ubn-zoo train``.

    Args:
        recipe: A recipe, the name of one (``ubn-zoo recipes`` lists them), or a ``.yaml`` file.
        data_dir: Folder of the data.
        output: The run's folder; created if missing.
        *settings: Changes to the recipe, ``key=value`` each.
        ranks: This process; by default alone on the CPU.
        **hooks: ``on_start``, ``on_step``, ``on_progress`` and ``on_epoch`` of `run`.

    Raises:
        RecipeError: The recipe or a setting is not valid.
        RunError, DataError, SnapshotError, TrainingError: As `run` does.
    """
    chosen = apply_settings(recipe, settings) if isinstance(recipe, Recipe) else load_recipe(recipe, settings)
    return run(chosen, data_dir, output, ranks, **hooks)


def _reason(error: OSError, folder: Path) -> str:
    where = error.filename or folder
    reason = f"{where}: {error.strerror or error}"
    with contextlib.suppress(OSError):
        reason += f" ({shutil.disk_usage(folder).free // 2**20} MB free in {folder})"
    return reason


def _kept(folder: Path) -> str:
    names = checkpoints(folder)
    if not names:
        return "there is no checkpoint yet; the same command starts over"
    return f"the last checkpoint, after update {int(names[-1])}, is kept; run the same command to resume from it"


def _open(
    recipe: Recipe,
    data_dir: str | os.PathLike[str],
    ranks: Ranks,
    data: tuple[TrainBatches, EvalBatches] | None,
) -> tuple[Recipe, TrainBatches, EvalBatches, str | None]:
    """Fill in what a recipe leaves to its model and its data; return it with the opened data and the held-out split."""
    recipe, split = complete(recipe), recipe.test_split
    if data is None:
        train = open_train(recipe, data_dir, ranks)
        split = split or find_eval_split(data_dir, recipe.dataset)
        test = open_eval(dataclasses.replace(recipe, test_split=split), data_dir, ranks, train.classes)
    else:
        train, test = data
    found = len(train.classes) or None
    if recipe.num_classes is None:
        recipe = dataclasses.replace(recipe, num_classes=found)
    elif found is not None and found > recipe.num_classes:
        raise TrainingError(f"num_classes: received {recipe.num_classes}; valid: null, or the data's {found} or more")
    if "top5" in (recipe.keep_best or "") and (recipe.num_classes or 6) < 6:
        raise TrainingError(f"keep_best: received {recipe.keep_best}, which needs six classes; valid: top1 or loss")
    return recipe, train, test, split


def _run(
    recipe: Recipe,
    data_dir: str | os.PathLike[str],
    folder: Path,
    ranks: Ranks,
    data: tuple[TrainBatches, EvalBatches] | None,
    options: _Options,
) -> Run:
    require_loggers(recipe)
    recipe, train, test, split = _open(recipe, data_dir, ranks, data)
    extended = check_folder(folder, recipe)
    if not extended and is_finished(folder):
        if options.plots and ranks.first and not (folder / "loss_accuracy.png").exists():
            draw(folder)
        return Run(folder=folder, metrics=read_metrics(folder / METRICS), finished=True, updates=0)
    start = newest_snapshot(folder / CHECKPOINTS)
    progress = RunProgress(recipe, train.steps, 0 if start is None else _place(start, train.steps))
    ranks.barrier()
    recorder = None
    if ranks.first:
        if extended:
            _logger.warning(
                "%s is extended from epoch %d to %d; the learning rate continues as in a schedule of %d epochs",
                *(folder, extended, recipe.epochs, recipe.epochs),
            )
        _prepare(folder, recipe, failed_start=extended == 0)
        recorder = Recorder(folder, recipe, progress, plots=options.plots)
    try:
        return _train(recipe, folder, ranks, train, test, split, start, progress, recorder, options)
    except BaseException as error:
        if recorder is not None:
            recorder.fail(error)
        raise


def _place(start: Snapshot, steps: int) -> int:
    """Updates that a snapshot stands for with so many updates per epoch."""
    epoch, step = start.progress["epoch"], start.progress["step"]
    return int(epoch * steps + (step if step < steps else 0))


def _prepare(folder: Path, recipe: Recipe, *, failed_start: bool) -> None:
    """Make a run's folder ready: its recipe in it, and nothing of a failed start or a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    if failed_start:
        for name in (ENVIRONMENT, STATUS, REPORT):
            (folder / name).unlink(missing_ok=True)
        for name in (EVENTS, WANDB):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_file(folder / RECIPE, dump_recipe(recipe))
    remove_unfinished(folder / CHECKPOINTS)


def _train(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    train: TrainBatches,
    test: EvalBatches,
    split: str | None,
    start: Snapshot | None,
    progress: RunProgress,
    recorder: Recorder | None,
    options: _Options,
) -> Run:
    model = options.build(recipe, ranks.device)
    updates = 0 if start is None else start.updates
    if recorder is not None:
        begun = environment(recipe, ranks, {**describe(train, test), "test_split": split}, updates)
        recorder.start(model, class_names(train, recipe.num_classes or 0), begun, start)
    if options.on_start is not None:
        options.on_start(recipe, updates)

    def note_step(done: int, total: int) -> None:
        progress.step()
        if recorder is not None:
            recorder.beat()
        if options.on_step is not None:
            options.on_step(done, total)
        if options.on_progress is not None:
            options.on_progress(progress)

    def note_loss(done: int, loss: float, lr: float) -> None:
        progress.train_loss, progress.lr = loss, lr
        if recorder is not None:
            recorder.loss(done, loss, lr)

    def note_epoch(row: EpochMetrics, measured: tuple[LayerSimilarity, ...]) -> None:
        progress.epoch = row.epoch
        if recorder is not None:
            recorder.epoch(row, measured)
        if options.on_epoch is not None:
            options.on_epoch(row)

    with _noted_signals() as received:
        outcome = fit(
            recipe,
            model,
            train,
            test,
            ranks,
            start=start,
            on_step=note_step,
            on_loss=note_loss,
            on_eval=lambda done: None if recorder is None else recorder.beat(),
            on_epoch=note_epoch,
            on_save=lambda snapshot: None if recorder is None else recorder.save(snapshot),
            stopping=lambda: bool(received),
        )
        stopped_by = received[0] if received else None
    if recorder is not None and outcome.finished:
        recorder.end("finished")
    elif recorder is not None:
        signal_name = stopped_by or "a signal to another rank"
        recorder.end("interrupted", f"stopped by {signal_name}; the state is saved; run the same command to resume")
    ranks.barrier()
    return Run(
        folder=folder, metrics=outcome.metrics, finished=outcome.finished, updates=updates, stopped_by=stopped_by
    )
