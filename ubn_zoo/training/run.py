"""A run and the folder it leaves: recipe, environment, metrics, checkpoints, weights, events and plots.

The folder is all that a run needs to resume after an interruption: the same command finds the newest complete
checkpoint in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import huggingface_hub
import safetensors
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ubn_zoo import __version__
from ubn_zoo.data.loaders import EvalBatches, TrainBatches, class_names, describe, open_eval, open_train
from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.errors import RunError, TrainingError
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity, read_metrics, write_metrics, write_similarity
from ubn_zoo.evaluation.plots import draw_run
from ubn_zoo.recipes.schema import Recipe, apply_settings, decisive_settings, dump_recipe, load_recipe
from ubn_zoo.training.base import base_weights
from ubn_zoo.training.build import build_model, complete
from ubn_zoo.training.checkpoint import Snapshot, newest_snapshot, remove_unfinished, save_snapshot, tensor_bytes
from ubn_zoo.training.engine import fit
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.files import write_file
from ubn_zoo.utils.provenance import device_name, source_commit

__all__ = ["Run", "is_finished", "run", "save_weights", "train"]

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.csv"
CONFIG = "config.json"
SIMILARITY = "similarity.csv"
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "model_ema.safetensors"
CHECKPOINTS = "checkpoints"
EVENTS = "events"

_LOST = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl", "socket closed")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run has reached.

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


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state as safetensors, atomically.

    Args:
        model: Any model without shared parameters.
        path: The file.

    Raises:
        OSError: It cannot be written.
    """
    write_file(path, tensor_bytes(model.state_dict()))


def _write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def _environment(recipe: Recipe, ranks: Ranks, data: Mapping[str, Any], updates: int) -> dict[str, Any]:
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
        "ranks": ranks.count,
        "threads": torch.get_num_threads(),
        "hardware": device,
        "versions": versions,
        "base": base_weights(recipe),
        "data": dict(data),
    }


def _note_start(folder: Path, start: dict[str, Any]) -> None:
    """Add a start to the run's record, and warn if the data has changed since the last one."""
    path = folder / ENVIRONMENT
    starts = []
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
    _write_json(path, {"starts": [*starts, start]})


class _Events:
    """TensorBoard events of a run; nothing where tensorboard is not installed."""

    def __init__(self, folder: Path, updates: int) -> None:
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            _logger.warning("no TensorBoard events: tensorboard is missing; pip install 'ubn-zoo[train]'")
            return
        from torch.utils.tensorboard import SummaryWriter

        # Updates after the checkpoint are repeated, so their events are removed.
        self._writer = SummaryWriter(str(folder / EVENTS), purge_step=updates + 1 if updates else None)

    def loss(self, updates: int, loss: float, lr: float) -> None:
        if self._writer is not None:
            self._writer.add_scalar("train/loss", loss, updates)
            self._writer.add_scalar("train/lr", lr, updates)

    def epoch(self, row: EpochMetrics, layers: tuple[LayerSimilarity, ...]) -> None:
        if self._writer is None:
            return
        for name in ("test_loss", "top1", "top5", "calibration_error", "ema_test_loss", "ema_top1", "ema_top5"):
            value = getattr(row, name)
            if value is not None:
                self._writer.add_scalar(f"test/{name.removeprefix('test_')}", value, row.step)
        self._writer.add_scalar("train/images_per_second", row.images_per_second, row.step)
        if row.gates_open is not None:
            self._writer.add_scalar("similarity/gates_open", row.gates_open, row.step)
        for layer in layers:
            self._writer.add_scalar(f"similarity/{layer.depth:03d} {layer.layer}", layer.similarity, row.step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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


def _check_folder(folder: Path, recipe: Recipe) -> bool:
    """Refuse a folder of another run; return whether it only has what a failed start of another recipe left."""
    written = folder / RECIPE
    if written.exists():
        before, now = decisive_settings(load_recipe(written)), decisive_settings(recipe)
        different = [key for key in now if before[key] != now[key]]
        if different and not (_checkpoints(folder) or any((folder / name).exists() for name in (WEIGHTS, METRICS))):
            return True
        if different:
            shown = "; ".join(f"{key} {before[key]!r} there, {now[key]!r} here" for key in different[:5])
            raise RunError(f"{folder} holds a run of another recipe ({shown}); choose another folder, or remove it")
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no {RECIPE}; choose an empty folder")
    return False


def _write_config(folder: Path, recipe: Recipe, classes: tuple[str, ...], model: nn.Module) -> None:
    """Write the configuration that timm reads beside the weights."""
    size = recipe.test_img_size or recipe.img_size
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / CONFIG
        save_config_for_hf(
            model,
            str(written),
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
        write_file(folder / CONFIG, written.read_bytes())


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


def _draw(folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        _logger.warning("no plots: matplotlib is missing; pip install 'ubn-zoo[train]'")
    else:
        draw_run(folder)


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
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> Run:
    """Train by a recipe, from the start or from where an earlier run in the folder was interrupted.

    The folder gets `recipe.yaml` (complete, and first), `environment.json`, `metrics.csv`, `similarity.csv`,
    `checkpoints/`, `events/` (TensorBoard) and plots as PNG. After every epoch it gets `config.json` and the newest
    weights as `model.safetensors` (with a moving average also `model_ema.safetensors`), so an unfinished run can be
    validated and loaded. A finished run is not trained again.

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
        on_epoch: Called after every epoch with its row.

    Raises:
        RunError: The folder holds another run, the disk is full, or another rank was lost.
        DataError: The data cannot be used.
        SnapshotError: There are checkpoints, and none is whole.
        TrainingError: Training cannot start or continue.
    """
    folder, place = Path(output), ranks or Ranks()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        return _run(recipe, data_dir, folder, place, data, build, plots, on_start, on_step, on_epoch)
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
        **hooks: ``on_start``, ``on_step`` and ``on_epoch`` of `run`.

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


def _checkpoints(folder: Path) -> list[str]:
    """Names of a run's checkpoints, the oldest first."""
    checkpoints = folder / CHECKPOINTS
    return sorted(path.name for path in checkpoints.iterdir() if path.name.isdigit()) if checkpoints.is_dir() else []


def _kept(folder: Path) -> str:
    names = _checkpoints(folder)
    if not names:
        return "there is no checkpoint yet; the same command starts again"
    return f"the last checkpoint, after update {int(names[-1])}, is kept; the same command resumes from it"


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
    return recipe, train, test, split


def _run(
    recipe: Recipe,
    data_dir: str | os.PathLike[str],
    folder: Path,
    ranks: Ranks,
    data: tuple[TrainBatches, EvalBatches] | None,
    build: Callable[[Recipe, torch.device], nn.Module],
    plots: bool,
    on_start: Callable[[Recipe, int], None] | None,
    on_step: Callable[[int, int], None] | None,
    on_epoch: Callable[[EpochMetrics], None] | None,
) -> Run:
    recipe, train, test, split = _open(recipe, data_dir, ranks, data)
    left_over = _check_folder(folder, recipe)
    if is_finished(folder):
        if plots and ranks.first and not (folder / "loss_accuracy.png").exists():
            _draw(folder)
        return Run(folder=folder, metrics=read_metrics(folder / METRICS), finished=True, updates=0)
    ranks.barrier()
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        if left_over:
            (folder / ENVIRONMENT).unlink(missing_ok=True)
            shutil.rmtree(folder / EVENTS, ignore_errors=True)
        write_file(folder / RECIPE, dump_recipe(recipe).encode())
        remove_unfinished(folder / CHECKPOINTS)
    model = build(recipe, ranks.device)
    start = newest_snapshot(folder / CHECKPOINTS)
    updates = 0 if start is None else start.updates
    events: _Events | None = None
    if ranks.first:
        _note_start(folder, _environment(recipe, ranks, {**describe(train, test), "test_split": split}, updates))
        events = _Events(folder, updates)
    if on_start is not None:
        on_start(recipe, updates)

    def note_epoch(row: EpochMetrics, measured: tuple[LayerSimilarity, ...]) -> None:
        if events is not None:
            events.epoch(row, measured)
        if on_epoch is not None:
            on_epoch(row)

    def note_loss(done: int, loss: float, lr: float) -> None:
        if events is not None:
            events.loss(done, loss, lr)

    classes = class_names(train, recipe.num_classes or 0)

    def write_tables(metrics: Sequence[EpochMetrics], similarity: Sequence[LayerSimilarity]) -> None:
        # The metrics come last: a run with all rows is finished.
        write_similarity(folder / SIMILARITY, similarity)
        write_metrics(folder / METRICS, metrics)

    def write_weights(state: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None) -> None:
        _write_config(folder, recipe, classes, model)
        if averaged is not None:
            write_file(folder / EMA_WEIGHTS, tensor_bytes(averaged))
        write_file(folder / WEIGHTS, tensor_bytes(state))

    def save(snapshot: Snapshot) -> None:
        save_snapshot(folder / CHECKPOINTS, snapshot, keep=recipe.keep_checkpoints)
        if snapshot.progress["step"] == 0:
            write_weights(snapshot.model, snapshot.ema)
        write_tables(
            [EpochMetrics(**row) for row in snapshot.progress["metrics"]],
            [LayerSimilarity(**row) for row in snapshot.progress["similarity"]],
        )

    try:
        with _noted_signals() as received:
            outcome = fit(
                recipe,
                model,
                train,
                test,
                ranks,
                start=start,
                on_step=on_step or (lambda done, total: None),
                on_loss=note_loss,
                on_epoch=note_epoch,
                on_save=save,
                stopping=lambda: bool(received),
            )
    finally:
        if events is not None:
            events.close()
    if ranks.first:
        if outcome.finished:
            # Written already, unless the run was killed between its last checkpoint and these files.
            write_weights(outcome.model.state_dict(), None if outcome.ema is None else outcome.ema.state_dict())
        if outcome.metrics:
            write_tables(outcome.metrics, outcome.similarity)
            if plots:
                _draw(folder)
    ranks.barrier()
    return Run(
        folder=folder,
        metrics=outcome.metrics,
        finished=outcome.finished,
        updates=updates,
        stopped_by=received[0] if received else None,
    )
