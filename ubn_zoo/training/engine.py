"""The training loop.

Several processes, started by torchrun, train with DistributedDataParallel. Each epoch trains, evaluates and adds one
row of metrics. Random numbers are drawn from seeds made of the recipe's seed, the epoch and the update, so a run that
was interrupted at any update resumes with the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models import model_parameters
from timm.scheduler.scheduler import Scheduler
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ubn_zoo.data.loaders import EvalBatches, TrainBatches
from ubn_zoo.errors import TrainingError
from ubn_zoo.evaluation.accuracy import Accuracy, measure
from ubn_zoo.evaluation.condensation import measure_similarity
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity
from ubn_zoo.layers import VARIANTS, UnifiedBatchNorm2d, convert_sync_ubn
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.build import build_erasing, build_loss, build_mixup, build_optimizer, build_scheduler
from ubn_zoo.training.checkpoint import Snapshot, restore_optimizer
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.provenance import device_name, source_commit
from ubn_zoo.utils.seeds import mixed_seed, seed_everything

__all__ = ["GateState", "Outcome", "fit", "gate_state"]

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16, None: None}


@dataclasses.dataclass(frozen=True, slots=True)
class GateState:
    """Feature condensation over the layers of a model.

    Attributes:
        low: Smallest running similarity of all layers.
        mean: Their mean.
        high: The largest.
        open: Layers above their threshold, which normalize with batch statistics in training.
        layers: How many layers have a gate.
    """

    low: float
    mean: float
    high: float
    open: int
    layers: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The result of training.

    Attributes:
        model: The trained model.
        ema: The moving average of its weights; None if the recipe has none.
        metrics: One row per epoch.
        similarity: One row per epoch and norm layer.
        finished: Whether all epochs are done; False after a requested stop.
    """

    model: nn.Module
    ema: nn.Module | None
    metrics: tuple[EpochMetrics, ...]
    similarity: tuple[LayerSimilarity, ...]
    finished: bool


def gate_state(model: nn.Module) -> GateState | None:
    """Read the gates of a model's UBN layers; None if no layer has one."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, UnifiedBatchNorm2d) and layer.threshold is not None and layer.track_running_stats
    ]
    if not layers:
        return None
    similarities = [float(cast(Tensor, layer.feature_similarity)) for layer in layers]
    open_gates = sum(
        similarity > cast(float, layer.threshold) for similarity, layer in zip(similarities, layers, strict=True)
    )
    return GateState(min(similarities), statistics.fmean(similarities), max(similarities), open_gates, len(layers))


def _freeze_but_head(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.get_classifier().parameters():
        parameter.requires_grad_(True)


def _set_training(recipe: Recipe, model: Any) -> None:
    if recipe.tune == "full":
        model.train()
        if recipe.norm_eval:
            for layer in model.modules():
                if isinstance(layer, (nn.BatchNorm2d, UnifiedBatchNorm2d)):
                    layer.eval()
    else:
        # The frozen part computes as in evaluation, running statistics and all.
        model.eval()
        model.get_classifier().train()


def _synchronize(recipe: Recipe, model: nn.Module, ranks: Ranks) -> nn.Module:
    if not VARIANTS[recipe.norm].plain:
        return convert_sync_ubn(model)
    if ranks.device.type == "cpu":
        raise TrainingError("sync_norm: torch synchronizes BatchNorm on GPUs only; valid here: false, or norm=ubn")
    return timm.layers.convert_sync_batchnorm(model)


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    """The state of training."""

    recipe: Recipe
    ranks: Ranks
    model: nn.Module
    wrapped: Any
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    loss: nn.Module
    mixup: Mixup | None
    erasing: RandomErasing | None
    ema: ModelEmaV3 | None
    steps: int
    epoch: int = 0
    step: int = 0
    # This rank's sum of the losses of the epoch's updates so far.
    total: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    rows: list[EpochMetrics] = dataclasses.field(default_factory=list)
    similarity: list[LayerSimilarity] = dataclasses.field(default_factory=list)
    durations: list[float] = dataclasses.field(default_factory=list)

    @property
    def updates(self) -> int:
        return self.epoch * self.steps + self.step

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)


def _prepare(recipe: Recipe, model: nn.Module, steps: int, ranks: Ranks) -> _Job:
    if recipe.tune == "head":
        _freeze_but_head(model)
    if recipe.sync_norm and ranks.count > 1:
        model = _synchronize(recipe, model, ranks)
    if recipe.grad_checkpointing:
        cast(Any, model).set_grad_checkpointing(True)
    optimizer = build_optimizer(recipe, model)
    ema = None
    if recipe.ema_decay is not None:
        ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
    wrapped: Any = model
    if ranks.count > 1:
        wrapped = DistributedDataParallel(model, device_ids=None if ranks.device.type == "cpu" else [ranks.device])
    if recipe.compile:
        wrapped = torch.compile(wrapped)
    return _Job(
        recipe,
        ranks,
        model,
        wrapped,
        optimizer,
        build_scheduler(recipe, optimizer, steps),
        torch.amp.GradScaler(ranks.device.type, enabled=recipe.amp == "float16"),
        build_loss(recipe).to(ranks.device),
        build_mixup(recipe),
        build_erasing(recipe, ranks.device),
        ema,
        steps,
        total=torch.zeros((), device=ranks.device),
    )


def _snapshot(job: _Job, totals: Tensor) -> Snapshot:
    progress = {
        "epoch": job.epoch,
        "step": job.step,
        "totals": totals,
        "scaler": job.scaler.state_dict(),
        "metrics": [dataclasses.asdict(row) for row in job.rows],
        "similarity": [dataclasses.asdict(row) for row in job.similarity],
    }
    return Snapshot(
        updates=job.updates,
        model=job.model.state_dict(),
        ema=None if job.ema is None else job.ema.module.state_dict(),
        optimizer=job.optimizer.state_dict(),
        progress=progress,
    )


def _restore(job: _Job, snapshot: Snapshot) -> None:
    job.model.load_state_dict(dict(snapshot.model))
    if job.ema is not None and snapshot.ema is not None:
        job.ema.module.load_state_dict(dict(snapshot.ema))
    restore_optimizer(job.optimizer, snapshot.optimizer)
    progress = snapshot.progress
    if progress["scaler"]:
        job.scaler.load_state_dict(progress["scaler"])
    job.epoch, job.step = progress["epoch"], progress["step"]
    totals: Tensor = progress["totals"].to(job.ranks.device)
    if len(totals) == job.ranks.count:
        job.total = totals[job.ranks.rank].clone()
    elif job.ranks.first:
        # The mean loss divides by the current number of ranks, and each rank that saved added one mean per update.
        job.total = totals.sum() * (job.ranks.count / len(totals))
    if job.step >= job.steps:
        # The data has fewer batches than before: the epoch starts again.
        job.step = 0
        job.total = torch.zeros_like(job.total)
    job.rows = [EpochMetrics(**row) for row in progress["metrics"]]
    job.similarity = [LayerSimilarity(**row) for row in progress["similarity"]]


def _clip(job: _Job) -> None:
    recipe = job.recipe
    if recipe.clip_grad is not None:
        job.scaler.unscale_(job.optimizer)
        parameters = model_parameters(job.model, exclude_head=recipe.clip_mode == "agc")
        dispatch_clip_grad(parameters, recipe.clip_grad, mode=recipe.clip_mode)


def _mix(job: _Job, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Random erasing, Mixup, CutMix; images in the recipe's memory format."""
    recipe = job.recipe
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if job.erasing is not None:
        images = job.erasing(images)
    if job.mixup is not None:
        job.mixup.mixup_enabled = recipe.mixup_off_epoch is None or job.epoch < recipe.mixup_off_epoch
        images, labels = job.mixup(images, labels)
    return images, labels


def _update(job: _Job, parts: list[tuple[Tensor, Tensor]]) -> None:
    """One update from the parts of this rank's share of a batch."""
    recipe, ranks = job.recipe, job.ranks
    seed_everything(mixed_seed(recipe.seed, job.epoch, job.step, 2 + ranks.rank))
    job.scheduler.step_update(job.updates)
    job.optimizer.zero_grad(set_to_none=True)
    for number, part in enumerate(parts):
        images, labels = _mix(job, *part)
        last = number == len(parts) - 1
        alone = contextlib.nullcontext() if last or ranks.count == 1 else job.wrapped.no_sync()
        dtype = _AMP[recipe.amp]
        with alone:
            with torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype is not None):
                loss = job.loss(job.wrapped(images), labels) / len(parts)
            job.scaler.scale(loss).backward()
        job.total += loss.detach()
    _clip(job)
    job.scaler.step(job.optimizer)
    job.scaler.update()
    if job.ema is not None:
        job.ema.update(job.model, step=job.updates + 1)


def _batches(parts: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Groups of `count` parts."""
    while True:
        group = [part for _, part in zip(range(count), parts, strict=False)]
        if len(group) < count:
            return
        yield group


def _check_interval(device: torch.device) -> int:
    """Updates between checks of the loss and of other ranks; on an accelerator, a check waits for the device."""
    return 1 if device.type == "cpu" else 20


def _check_loss(job: _Job, stopping: bool) -> tuple[float, bool]:
    """Mean loss of the epoch so far over all ranks, and whether any of them should stop.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    sums = job.ranks.sum(torch.stack([job.total, torch.full_like(job.total, float(stopping))]))
    total, stops = sums.tolist()
    mean = total / (job.ranks.count * max(job.step, 1))
    if not math.isfinite(mean):
        raise TrainingError(
            f"the loss is {mean} at epoch {job.epoch + 1} after update {job.step} of {job.steps}, lr {job.lr:g}, "
            f"amp {job.recipe.amp}; use a lower lr, more warmup_epochs or clip_grad, or amp=bfloat16"
        )
    return mean, stops > 0


def _train_epoch(job: _Job, train: TrainBatches, hooks: _Hooks) -> bool:
    """Train to the end of an epoch; return whether it got there."""
    recipe = job.recipe
    _set_training(recipe, job.model)
    interval = _check_interval(job.ranks.device)
    before = time.perf_counter()
    parts = train.epoch(job.epoch, job.step)
    for batch in _batches(parts, recipe.accumulation):
        _update(job, batch)
        job.step += 1
        end = job.step == job.steps
        log = job.updates % recipe.log_interval == 0 or end
        if log or job.step % interval == 0:
            mean, stopping = _check_loss(job, hooks.stopping())
            if log:
                hooks.on_loss(job.updates, mean, job.lr)
            if stopping and not end:
                _save(job, hooks)
                return False
        now = time.perf_counter()
        job.durations.append(now - before)
        before = now
        hooks.on_step(job.step * recipe.batch_size, job.steps * recipe.batch_size)
        if recipe.checkpoint_steps and job.step % recipe.checkpoint_steps == 0 and not end:
            _check_loss(job, False)
            _save(job, hooks)
    if job.step < job.steps:
        raise TrainingError(
            f"the training images ended after {job.step} updates of epoch {job.epoch + 1}, not {job.steps}; "
            "train_samples exceeds the number of images, or a shard is missing"
        )
    return True


def _save(job: _Job, hooks: _Hooks) -> None:
    job.ranks.equalize_buffers(job.model)
    totals = torch.zeros(job.ranks.count, device=job.ranks.device)
    totals[job.ranks.rank] = job.total
    job.ranks.sum(totals)
    if job.ranks.first:
        hooks.on_save(_snapshot(job, totals))
    job.ranks.barrier()


def _finish_epoch(job: _Job, test: EvalBatches, probe: Tensor | None, commit: str | None, hooks: _Hooks) -> None:
    """Evaluate, and add the epoch's rows."""
    recipe, ranks = job.recipe, job.ranks
    mean, _ = _check_loss(job, False)
    ranks.equalize_buffers(job.model)
    amp = _AMP[recipe.amp]
    accuracy = measure(job.model, test, ranks, amp=amp, on_batch=hooks.on_eval)
    averaged: Accuracy | None = None
    if job.ema is not None:
        ranks.equalize_buffers(job.ema.module)
        averaged = measure(cast(nn.Module, job.ema.module), test, ranks, amp=amp, on_batch=hooks.on_eval)
    gates = gate_state(job.model)
    step_time = statistics.median(job.durations)
    job.rows.append(
        EpochMetrics(
            model=recipe.model,
            norm=recipe.norm,
            seed=recipe.seed,
            epoch=job.epoch + 1,
            step=(job.epoch + 1) * job.steps,
            lr=job.lr,
            train_loss=mean,
            test_loss=accuracy.loss,
            top1=accuracy.top1,
            top5=accuracy.top5,
            calibration_error=accuracy.calibration_error,
            ema_test_loss=None if averaged is None else averaged.loss,
            ema_top1=None if averaged is None else averaged.top1,
            ema_top5=None if averaged is None else averaged.top5,
            ema_calibration_error=None if averaged is None else averaged.calibration_error,
            seconds=sum(job.durations),
            step_ms=1000.0 * step_time,
            images_per_second=recipe.batch_size / step_time,
            similarity_min=None if gates is None else gates.low,
            similarity_mean=None if gates is None else gates.mean,
            similarity_max=None if gates is None else gates.high,
            gates_open=None if gates is None else gates.open,
            gates=0 if gates is None else gates.layers,
            device=device_name(ranks.device),
            ranks=ranks.count,
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
            commit=commit,
        )
    )
    if probe is not None and len(probe) > 1:
        job.similarity += measure_similarity(job.model, probe, epoch=job.epoch + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Hooks:
    on_step: Callable[[int, int], None]
    on_loss: Callable[[int, float, float], None]
    on_eval: Callable[[int], None]
    on_epoch: Callable[[EpochMetrics, tuple[LayerSimilarity, ...]], None]
    on_save: Callable[[Snapshot], None]
    stopping: Callable[[], bool]


def _nothing(*arguments: object) -> None:
    pass


def fit(
    recipe: Recipe,
    model: nn.Module,
    train: TrainBatches,
    test: EvalBatches,
    ranks: Ranks | None = None,
    *,
    start: Snapshot | None = None,
    on_step: Callable[[int, int], None] = _nothing,
    on_loss: Callable[[int, float, float], None] = _nothing,
    on_eval: Callable[[int], None] = _nothing,
    on_epoch: Callable[[EpochMetrics, tuple[LayerSimilarity, ...]], None] = _nothing,
    on_save: Callable[[Snapshot], None] = _nothing,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a model.

    Args:
        recipe: The run, complete; its model and pretrained weights only label the rows.
        model: Changed in place; on the ranks' device.
        train: Training images.
        test: Held-out images, evaluated after every epoch.
        ranks: This process; by default alone on the CPU.
        start: State to resume from, of a run with the same recipe and model.
        on_step: Called after every update with the images done in this epoch and the images of an epoch.
        on_loss: Called every ``log_interval`` updates and at the end of each epoch with the updates made, the epoch's
            mean loss so far and the learning rate.
        on_eval: Called after every batch of an evaluation with the images that this rank has done.
        on_epoch: Called after every epoch with its row and the similarity of its layers.
        on_save: Called with the state after every epoch and every ``checkpoint_steps`` updates, on the first rank.
        stopping: Called at intervals; once it returns True on any rank, the state is saved and training ends.

    Returns:
        The trained model and all rows, those before `start` included.

    Raises:
        TrainingError: The loss is no longer finite, the data ends early, or the recipe cannot be carried out here.
    """
    place = ranks or Ranks()
    hooks = _Hooks(on_step, on_loss, on_eval, on_epoch, on_save, stopping)
    job = _prepare(recipe, model, train.steps, place)
    if start is not None:
        _restore(job, start)
    commit = source_commit()
    watched = recipe.probe_images > 1 and place.first and job.epoch < recipe.epochs
    probe = test.probe(recipe.probe_images) if watched else None
    finished = True
    while job.epoch < recipe.epochs:
        job.durations = []
        if not _train_epoch(job, train, hooks):
            finished = False
            break
        _finish_epoch(job, test, probe, commit, hooks)
        layers = tuple(row for row in job.similarity if row.epoch == job.epoch + 1)
        job.epoch, job.step = job.epoch + 1, 0
        job.total.zero_()
        _save(job, hooks)
        hooks.on_epoch(job.rows[-1], layers)
        if place.any(stopping()) and job.epoch < recipe.epochs:
            finished = False
            break
    averaged = None if job.ema is None else cast(nn.Module, job.ema.module)
    return Outcome(job.model, averaged, tuple(job.rows), tuple(job.similarity), finished)
