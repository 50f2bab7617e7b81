"""The training engine: a [`Recipe`][ubn_zoo.recipes.schema.Recipe] as model, optimizer, schedule and loop.

Built from timm's parts and torch's; many processes are torch's DistributedDataParallel, started by torchrun. Per epoch:
train, evaluate, one row of metrics. Random numbers are drawn from seeds made of the recipe's seed, the epoch and the
update, so that a run may be broken off at any update and go on with the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import PretrainedCfg, model_parameters
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ubn_zoo import models  # noqa: F401 - registers the zoo with timm
from ubn_zoo.data.loaders import EvalBatches, TrainBatches
from ubn_zoo.errors import TrainingError
from ubn_zoo.evaluation.accuracy import Accuracy, measure
from ubn_zoo.evaluation.condensation import measure_similarity
from ubn_zoo.evaluation.metrics import EpochMetrics, LayerSimilarity
from ubn_zoo.layers import VARIANTS, UnifiedBatchNorm2d, convert_sync_ubn, variant_settings
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.checkpoint import Snapshot, restore_optimizer
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.provenance import device_name, source_commit
from ubn_zoo.utils.seeds import mixed_seed, seed_everything

__all__ = [
    "GateState",
    "Outcome",
    "TrainingError",
    "build_loss",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "complete",
    "fit",
    "gate_state",
    "model_name",
]

# Updates between looks at the loss and at other ranks on an accelerator, where a look waits for the device.
_PULSE = 20
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
    """What a training gives.

    Attributes:
        model: The trained model.
        ema: The moving average of its weights; None if the recipe has none.
        metrics: One row per epoch.
        similarity: One row per epoch and norm layer.
        finished: Whether all epochs were made; False after a stop that was asked for.
    """

    model: nn.Module
    ema: nn.Module | None
    metrics: tuple[EpochMetrics, ...]
    similarity: tuple[LayerSimilarity, ...]
    finished: bool


# What a recipe becomes


def model_name(recipe: Recipe) -> str:
    """Timm's name of a recipe's model, with its tag: the BatchNorm sibling for ``bn``, the UBN twin for all others."""
    if VARIANTS[recipe.norm].plain:
        # The twins' tags of upstream's weights are upstream's own behind this.
        tag = (recipe.pretrained_tag or "").removeprefix("bn_")
        return recipe.model + (f".{tag}" if tag else "")
    return f"{recipe.model}_ubn" + (f".{recipe.pretrained_tag}" if recipe.pretrained_tag else "")


def complete(recipe: Recipe) -> Recipe:
    """Fill in what a recipe leaves to its model: size, filter, crop and normalization of the images.

    Args:
        recipe: Not changed.

    Raises:
        TrainingError: timm has no such model or tag.
    """
    name = model_name(recipe)
    if not timm.is_model(name):
        known = timm.list_models(f"*{recipe.model[:6]}*_ubn")[:10]
        shown = ", ".join(other.removesuffix("_ubn") for other in known) or "those of `ubn-zoo list`, without _ubn"
        raise TrainingError(f"model: received {recipe.model!r} (norm {recipe.norm}); valid: {shown}")
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:
        raise TrainingError(
            f"pretrained_tag: {name} is none of timm's; `ubn-zoo list {recipe.model} --tags` lists them"
        ) from None
    cfg = found or PretrainedCfg(input_size=(3, 224, 224), crop_pct=0.875, interpolation="bicubic")
    memory = recipe.dataset == "memory"
    own: dict[str, Any] = {
        "img_size": cfg.input_size[-1],
        "interpolation": cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bilinear",
        "crop_pct": 1.0 if memory else cfg.crop_pct,
        "mean": tuple(float(value) for value in cfg.mean),
        "std": tuple(float(value) for value in cfg.std),
    }
    return dataclasses.replace(recipe, **{key: value for key, value in own.items() if getattr(recipe, key) is None})


def layer_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings of the UBN layers that make a model the recipe's norm; not for ``bn``, which has none."""
    return variant_settings(
        recipe.norm, threshold=recipe.threshold, kernel_size=recipe.kernel_size, kernel_init=recipe.kernel_init
    )


def build_model(recipe: Recipe, device: torch.device | None = None) -> nn.Module:
    """Build the recipe's model from its seed; twins that differ in norm start from the same weights.

    Args:
        recipe: The run, with ``num_classes``.
        device: Where it goes; by default the CPU.

    Raises:
        TrainingError: The recipe has no ``num_classes``, or its checkpoint cannot be read.
        CheckpointError: Weights do not fit the model.
        RuntimeError: timm has no such model, or no pretrained weights for it.
    """
    if recipe.num_classes is None:
        raise TrainingError("num_classes: received null; valid: the number of classes, as the data does not name them")
    seed_everything(recipe.seed)
    arguments: dict[str, Any] = {"num_classes": recipe.num_classes, "pretrained": recipe.pretrained}
    if not VARIANTS[recipe.norm].plain:
        arguments["ubn_kwargs"] = layer_settings(recipe)
    for key in ("drop_rate", "drop_path_rate"):
        if getattr(recipe, key):
            arguments[key] = getattr(recipe, key)
    model: Any = timm.create_model(model_name(recipe), **arguments)
    _set_statistics(recipe, model)
    if recipe.checkpoint is not None:
        _load_start(model, recipe.checkpoint, keep_head=recipe.keep_head)
    elif recipe.pretrained and not recipe.keep_head:
        # Weights with as many classes as the data need not have the data's classes.
        seed_everything(recipe.seed)
        model.reset_classifier(recipe.num_classes)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    placed: nn.Module = model.to(device or torch.device("cpu")).to(memory_format=layout)
    return placed


def _set_statistics(recipe: Recipe, model: nn.Module) -> None:
    """Give all norm layers the recipe's epsilon and momentum, where it names them."""
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm2d, UnifiedBatchNorm2d)):
            layer.eps = layer.eps if recipe.norm_eps is None else recipe.norm_eps
            layer.momentum = layer.momentum if recipe.norm_momentum is None else recipe.norm_momentum


def _load_start(model: Any, path: str, *, keep_head: bool) -> None:
    """Load weights to start from, strictly but for the classifier, which stays as it was drawn unless it is kept."""
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise TrainingError(f"checkpoint: {path} cannot be read as safetensors: {error}") from None
    own = model.state_dict()
    head = cast(str, model.pretrained_cfg["classifier"])
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in state and name in own and not keep_head:
            state[name] = own[name]
    model.load_state_dict(state)


def _freeze_but_head(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.get_classifier().parameters():
        parameter.requires_grad_(True)


def _set_training(recipe: Recipe, model: Any) -> None:
    if recipe.tune == "full":
        model.train()
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


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Build the recipe's optimizer.

    Biases, norms and what the model names in `no_weight_decay` decay only with ``norm_decay``; frozen parameters are
    left out.
    """
    options: dict[str, Any] = {}
    if recipe.betas is not None:
        options["betas"] = recipe.betas
    if recipe.optimizer_eps is not None:
        options["eps"] = recipe.optimizer_eps
    trained: Any = model
    if recipe.norm_decay and recipe.layer_decay is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return create_optimizer_v2(
        trained,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        layer_decay=recipe.layer_decay,
        filter_bias_and_bn=not recipe.norm_decay,
        **options,
    )


def build_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """Build the recipe's schedule; its time is in updates.

    Args:
        recipe: The run.
        optimizer: Whose learning rates it sets.
        steps: Updates per epoch.
    """
    warmup = round(recipe.warmup_epochs * steps)
    total = recipe.epochs * steps
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.scheduler,
        num_epochs=total - warmup if recipe.warmup_prefix else total,
        decay_epochs=max(1, round(recipe.decay_epochs * steps)),
        decay_milestones=[round(epoch * steps) for epoch in recipe.decay_milestones],
        decay_rate=recipe.decay_rate,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=warmup,
        warmup_prefix=recipe.warmup_prefix,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return cast(Scheduler, scheduler)


def build_loss(recipe: Recipe) -> nn.Module:
    """Build the recipe's loss; with Mixup or CutMix it takes mixed targets, (n, classes), in place of labels."""
    if recipe.loss == "bce":
        return BinaryCrossEntropy(recipe.label_smoothing, target_threshold=recipe.bce_threshold)
    if recipe.mixup or recipe.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.label_smoothing)


def _build_mixup(recipe: Recipe) -> Mixup | None:
    if not (recipe.mixup or recipe.cutmix):
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=cast(int, recipe.num_classes),
    )


def _build_erasing(recipe: Recipe, device: torch.device) -> RandomErasing | None:
    if not recipe.random_erasing:
        return None
    return RandomErasing(recipe.random_erasing, mode=recipe.erasing_mode, device=str(device))


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


# The loop


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    """All that moves while a recipe is trained."""

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
    # Sum of the losses of this epoch's updates so far, this rank's.
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
        _build_mixup(recipe),
        _build_erasing(recipe, ranks.device),
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
        job.total = totals.sum()
    if job.step >= job.steps:
        # The data has fewer batches than it had: the epoch starts again.
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


def _check_loss(job: _Job, stopping: bool) -> tuple[float, bool]:
    """Mean loss of the epoch so far over all ranks, and whether any of them is to stop.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    sums = job.ranks.sum(torch.stack([job.total, torch.full_like(job.total, float(stopping))]))
    total, stops = sums.tolist()
    mean = total / (job.ranks.count * max(job.step, 1))
    if not math.isfinite(mean):
        raise TrainingError(
            f"the loss is {mean} at epoch {job.epoch + 1} after update {job.step} of {job.steps}, lr {job.lr:g}, "
            f"amp {job.recipe.amp}; give it a lower lr, a longer warmup_epochs or clip_grad, or amp=bfloat16"
        )
    return mean, stops > 0


def _train_epoch(job: _Job, train: TrainBatches, hooks: _Hooks) -> bool:
    """Train to the end of an epoch; return whether it got there."""
    recipe = job.recipe
    _set_training(recipe, job.model)
    pulse = 1 if job.ranks.device.type == "cpu" else _PULSE
    before = time.perf_counter()
    parts = train.epoch(job.epoch, job.step)
    for batch in _batches(parts, recipe.accumulation):
        _update(job, batch)
        job.step += 1
        end = job.step == job.steps
        if job.step % pulse == 0 or job.updates % recipe.log_interval == 0 or end:
            mean, stopping = _check_loss(job, hooks.stopping())
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
            "train_samples says more than there are, or a shard is missing"
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


def _finish_epoch(job: _Job, test: EvalBatches, probe: Tensor | None, commit: str | None) -> None:
    """Evaluate, and add the epoch's rows."""
    recipe, ranks = job.recipe, job.ranks
    mean, _ = _check_loss(job, False)
    ranks.equalize_buffers(job.model)
    amp = _AMP[recipe.amp]
    accuracy = measure(job.model, test, ranks, amp=amp)
    averaged: Accuracy | None = None
    if job.ema is not None:
        ranks.equalize_buffers(job.ema.module)
        averaged = measure(cast(nn.Module, job.ema.module), test, ranks, amp=amp)
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
    on_epoch: Callable[[EpochMetrics, tuple[LayerSimilarity, ...]], None] = _nothing,
    on_save: Callable[[Snapshot], None] = _nothing,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a model that is already there.

    Args:
        recipe: The run, complete; its model and pretrained weights are not looked at except to label the rows.
        model: Changed in place; on the ranks' device.
        train: Training images.
        test: Held-out images, evaluated after every epoch.
        ranks: This process; by default alone on the CPU.
        start: State to go on from, of a run with the same recipe and model.
        on_step: Called after every update with the images done in this epoch and the images of an epoch.
        on_loss: Called now and then (on the CPU after every update) with the updates made, the epoch's mean loss so
            far and the learning rate.
        on_epoch: Called after every epoch with its row and the similarity of its layers.
        on_save: Called with the state after every epoch and every ``checkpoint_steps`` updates, on the first rank.
        stopping: Asked now and then; once it says yes on any rank, the state is saved and training ends.

    Returns:
        The trained model and all rows, those before `start` included.

    Raises:
        TrainingError: The loss is no longer finite, the data ends early, or the recipe cannot be carried out here.
    """
    place = ranks or Ranks()
    hooks = _Hooks(on_step, on_loss, on_epoch, on_save, stopping)
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
        _finish_epoch(job, test, probe, commit)
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
