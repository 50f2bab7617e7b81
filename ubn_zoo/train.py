"""A plain training loop over images held in memory, driven by a [`Recipe`][ubn_zoo.recipe.Recipe].

Per epoch: train, evaluate, one row of metrics. At the end the weights as safetensors. Given the same recipe, data,
number of threads and versions, a run on a CPU gives the same numbers again.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from . import models  # noqa: F401 - registers the zoo with timm
from .data import ImageSet, Normalizer, random_crop_flip, resize
from .evaluate import evaluate
from .layers import UnifiedBatchNorm2d, convert_batchnorm
from .recipe import Recipe, decisive_settings, dump_recipe, load_recipe

__all__ = [
    "EpochMetrics",
    "GateState",
    "Outcome",
    "build_model",
    "build_optimizer",
    "fit",
    "gate_state",
    "learning_rate",
    "read_metrics",
    "run",
    "save_weights",
    "source_commit",
    "write_metrics",
]

# Settings of the one layer that make it each of the methods that UBN unites.
_ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "rbn": {"threshold": None, "depthwise_affine": False},
    "bnet": {"threshold": None, "center_calibration": False, "scale_calibration": False},
}


@dataclasses.dataclass(frozen=True, slots=True)
class GateState:
    """Feature condensation over the layers of a model.

    Attributes:
        low: Smallest running similarity of all layers.
        mean: Their mean.
        high: The largest.
        open: Layers above their threshold, which normalise with batch statistics in training.
        layers: How many layers have a gate.
    """

    low: float
    mean: float
    high: float
    open: int
    layers: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch of one run; a row of its CSV file.

    Attributes:
        model: Architecture.
        norm: Normalisation.
        seed: The run's seed.
        epoch: Epochs done, from 1.
        lr: Learning rate of the last step.
        train_loss: Mean training loss in nats, label smoothing included.
        test_loss: Cross-entropy on the held-out images in nats.
        top1: Accuracy on the held-out images in percent.
        seconds: Wall-clock time of the epoch's training, without the evaluation.
        step_ms: Median time of one training step in milliseconds, data included.
        similarity_min: Smallest running feature similarity over the layers; None without a gate.
        similarity_mean: Its mean; None without a gate.
        similarity_max: The largest; None without a gate.
        gates_open: Layers that use batch statistics; None without a gate.
        gates: Layers that have a gate.
        threads: torch's threads.
        torch: torch's version.
        commit: The project's commit; None if it is not under version control.
    """

    model: str
    norm: str
    seed: int
    epoch: int
    lr: float
    train_loss: float
    test_loss: float
    top1: float
    seconds: float
    step_ms: float
    similarity_min: float | None
    similarity_mean: float | None
    similarity_max: float | None
    gates_open: int | None
    gates: int
    threads: int
    torch: str
    commit: str | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a run gives.

    Attributes:
        model: The trained model; the moving average if the recipe has one.
        metrics: One row per epoch.
    """

    model: nn.Module
    metrics: tuple[EpochMetrics, ...]


def build_model(recipe: Recipe) -> nn.Module:
    """Build the recipe's model from its seed, on its device; twins that differ in norm start from the same weights.

    Args:
        recipe: The run.

    Raises:
        RuntimeError: timm has no such model, or no pretrained weights for it.
    """
    torch.manual_seed(recipe.seed)
    tag = f".{recipe.pretrained_tag}" if recipe.pretrained_tag else ""
    name = f"{recipe.model}_ubn" if recipe.norm == "ubn" else recipe.model
    model: nn.Module = timm.create_model(name + tag, pretrained=recipe.pretrained, num_classes=recipe.num_classes)
    if recipe.norm in _ABLATIONS:
        model = convert_batchnorm(model, **_ABLATIONS[recipe.norm])
    return model.to(torch.device(recipe.device)).to(memory_format=torch.channels_last)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; biases, norms and what the model names in `no_weight_decay` do not decay."""
    return create_optimizer_v2(
        model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Learning rate at a moment: a linear warm-up, then a cosine to zero.

    Args:
        recipe: The run.
        epoch: Epochs done, fractions included, from 0 to ``recipe.epochs``.
    """
    if epoch < recipe.warmup_epochs:
        return recipe.lr * epoch / recipe.warmup_epochs
    done = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def gate_state(model: nn.Module) -> GateState | None:
    """Read the gates of a model's UBN layers; None if no layer has one."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, UnifiedBatchNorm2d) and layer.threshold is not None and layer.track_running_stats
    ]
    if not layers:
        return None
    similarities = [float(cast(torch.Tensor, layer.feature_similarity)) for layer in layers]
    open_gates = sum(
        similarity > cast(float, layer.threshold) for similarity, layer in zip(similarities, layers, strict=True)
    )
    return GateState(min(similarities), statistics.fmean(similarities), max(similarities), open_gates, len(layers))


def source_commit() -> str | None:
    """Commit of the project's working tree that this package runs from; None if it is not run from one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def _batches(recipe: Recipe, data: ImageSet, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of augmented batches in a new random order, resized but not normalised."""
    order = torch.randperm(len(data), generator=generator)
    for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size]
        images = random_crop_flip(data.images[chosen], recipe.crop_padding, recipe.hflip, generator)
        yield resize(images, recipe.img_size, recipe.interpolation), data.labels[chosen]


def _train_epoch(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    data: ImageSet,
    normalize: Normalizer,
    generator: torch.Generator,
    epoch: int,
    on_step: Callable[[int, int], None] | None,
) -> tuple[float, float, list[float]]:
    """Train for one epoch; return the mean loss, the last learning rate and the seconds of every step."""
    model.train()
    device = torch.device(recipe.device)
    steps = len(data) // recipe.batch_size
    total = torch.zeros((), device=device)
    lr = 0.0
    durations = []
    before = time.perf_counter()
    for step, (images, labels) in enumerate(_batches(recipe, data, generator)):
        # In the middle of its step, so that neither the first nor the last one is lost to a rate of zero.
        lr = learning_rate(recipe, epoch + (step + 0.5) / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(normalize(images))
        loss = F.cross_entropy(logits, labels.to(device), label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(model, step=epoch * steps + step)
        total += loss.detach()
        now = time.perf_counter()
        durations.append(now - before)
        before = now
        if on_step is not None:
            on_step((step + 1) * recipe.batch_size, steps * recipe.batch_size)
    mean = float(total) / steps
    if not math.isfinite(mean):
        raise RuntimeError(
            f"the loss of epoch {epoch + 1} is {mean}; lower lr (now {recipe.lr:g}) or lengthen warmup_epochs"
        )
    return mean, lr, durations


def fit(
    recipe: Recipe,
    model: nn.Module,
    train: ImageSet,
    test: ImageSet,
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> Outcome:
    """Train a model that is already there.

    Args:
        recipe: The run; its model, norm and pretrained weights are not looked at except to label the rows.
        model: Changed in place.
        train: Training images.
        test: Held-out images, evaluated after every epoch.
        on_step: Called after every step with the images done in this epoch and the images of an epoch.
        on_epoch: Called after every epoch with its row.

    Raises:
        ValueError: Data and recipe do not fit together.
        RuntimeError: The loss is no longer finite.
    """
    if len(train) < recipe.batch_size:
        raise ValueError(f"received {len(train)} training images; valid: at least one batch of {recipe.batch_size}")
    for data in (train, test):
        if len(data.classes) != recipe.num_classes:
            raise ValueError(f"received images of {len(data.classes)} classes; the recipe has {recipe.num_classes}")
    normalize = Normalizer(recipe.mean, recipe.std, torch.device(recipe.device))
    optimizer = build_optimizer(recipe, model)
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay is not None else None
    result = model if ema is None else cast(nn.Module, ema.module)
    generator = torch.Generator().manual_seed(recipe.seed)
    commit = source_commit()
    rows = []
    for epoch in range(recipe.epochs):
        loss, lr, durations = _train_epoch(recipe, model, optimizer, ema, train, normalize, generator, epoch, on_step)
        accuracy = evaluate(result, test, normalize, img_size=recipe.img_size, interpolation=recipe.interpolation)
        gates = gate_state(model)
        rows.append(
            EpochMetrics(
                model=recipe.model,
                norm=recipe.norm,
                seed=recipe.seed,
                epoch=epoch + 1,
                lr=lr,
                train_loss=loss,
                test_loss=accuracy.loss,
                top1=accuracy.top1,
                seconds=sum(durations),
                step_ms=1000.0 * statistics.median(durations),
                similarity_min=None if gates is None else gates.low,
                similarity_mean=None if gates is None else gates.mean,
                similarity_max=None if gates is None else gates.high,
                gates_open=None if gates is None else gates.open,
                gates=0 if gates is None else gates.layers,
                threads=torch.get_num_threads(),
                torch=str(torch.__version__),
                commit=commit,
            )
        )
        if on_epoch is not None:
            on_epoch(rows[-1])
    return Outcome(result, tuple(rows))


def _format(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_metrics(path: str | os.PathLike[str], rows: Sequence[EpochMetrics]) -> None:
    """Write rows as CSV with a header, in one step; numbers have six digits, and what does not apply is empty."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(EpochMetrics))
        for row in rows:
            writer.writerow(_format(value) for value in dataclasses.astuple(row))
    temporary.replace(target)


def read_metrics(path: str | os.PathLike[str]) -> tuple[EpochMetrics, ...]:
    """Read what `write_metrics` wrote.

    Args:
        path: The CSV file.

    Raises:
        ValueError: The file has other columns, or a value that is not of its column's kind.
    """
    fields = dataclasses.fields(EpochMetrics)
    names = [field.name for field in fields]
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != names:
            raise ValueError(f"{path}: received the columns {', '.join(header)}; valid: {', '.join(names)}")
        kinds: Mapping[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
        rows = []
        for values in reader:
            parsed: dict[str, Any] = {}
            for field, value in zip(fields, values, strict=True):
                kind, _, optional = str(field.type).partition(" | ")
                parsed[field.name] = None if optional and not value else kinds[kind](value)
            rows.append(EpochMetrics(**parsed))
    return tuple(rows)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state as safetensors, in one step: readers see all of it or nothing.

    Args:
        model: Any model without shared parameters.
        path: The file.
    """
    target = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = target.with_name(f".{target.name}.part")
    safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(target)


def run(
    recipe: Recipe,
    train: ImageSet,
    test: ImageSet,
    output: str | os.PathLike[str],
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> tuple[EpochMetrics, ...]:
    """Train as a recipe says and leave a folder: `recipe.yaml`, `metrics.csv`, `model.safetensors`.

    A folder whose run was finished with the same recipe is not trained again; its metrics are returned. The weights are
    written last, so a folder that has them is complete.

    Args:
        recipe: The run.
        train: Training images.
        test: Held-out images.
        output: The run's folder; made if it is not there.
        on_step: As for `fit`.
        on_epoch: As for `fit`.

    Returns:
        One row per epoch.

    Raises:
        FileExistsError: The folder holds a run of another recipe.
        ValueError: Data and recipe do not fit together.
        RuntimeError: The loss is no longer finite.
    """
    folder = Path(output)
    written, weights, metrics = (folder / name for name in ("recipe.yaml", "model.safetensors", "metrics.csv"))
    if written.exists() and decisive_settings(load_recipe(written)) != decisive_settings(recipe):
        raise FileExistsError(f"{folder} holds a run of another recipe; choose another folder or remove it")
    if weights.exists() and written.exists():
        return read_metrics(metrics)
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    rows: list[EpochMetrics] = []

    def record(row: EpochMetrics) -> None:
        rows.append(row)
        write_metrics(metrics, rows)
        if on_epoch is not None:
            on_epoch(row)

    outcome = fit(recipe, build_model(recipe), train, test, on_step=on_step, on_epoch=record)
    save_weights(outcome.model, weights)
    return outcome.metrics
