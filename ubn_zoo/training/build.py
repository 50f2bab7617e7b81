"""Build the model, optimizer, schedule, loss and batch augmentation of a [`Recipe`][ubn_zoo.recipes.schema.Recipe].

Everything is built from timm's and torch's parts.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import PretrainedCfg
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from ubn_zoo import models  # noqa: F401 - registers the zoo with timm
from ubn_zoo.errors import TrainingError
from ubn_zoo.layers import VARIANTS, UnifiedBatchNorm2d, variant_settings
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.utils.seeds import seed_everything

__all__ = [
    "build_erasing",
    "build_loss",
    "build_mixup",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "complete",
    "layer_settings",
    "model_name",
]


def model_name(recipe: Recipe) -> str:
    """Timm's name of a recipe's model, with its tag: the BatchNorm sibling for ``bn``, the UBN twin for all others."""
    if VARIANTS[recipe.norm].plain:
        # A twin's tag of upstream weights is upstream's tag with this prefix.
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
        names = [other.removesuffix("_ubn") for other in timm.list_models("*_ubn")]
        near = difflib.get_close_matches(recipe.model, names, n=5)
        shown = ", ".join(near) or "those of `ubn-zoo list`, without _ubn"
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
        device: Device of the model; by default the CPU.

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
        # The classes of the weights may differ from the data's even where their number is the same.
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
    """Load initial weights strictly; the classifier keeps its random initialization unless `keep_head` is set."""
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
    elif recipe.norm_decay:
        # timm reads the model's `no_weight_decay` in any case, which names the kernels of UBN.
        options["param_group_fn"] = functools.partial(
            param_groups_layer_decay,
            weight_decay=recipe.weight_decay,
            weight_decay_exclude_1d=False,
            layer_decay=cast(float, recipe.layer_decay),
        )
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
    """Build the recipe's loss; with Mixup or CutMix it takes mixed targets, (n, classes), instead of labels."""
    if recipe.loss == "bce":
        return BinaryCrossEntropy(recipe.label_smoothing, target_threshold=recipe.bce_threshold)
    if recipe.mixup or recipe.cutmix:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.label_smoothing)


def build_mixup(recipe: Recipe) -> Mixup | None:
    """Build the recipe's Mixup and CutMix; None if it has neither."""
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


def build_erasing(recipe: Recipe, device: torch.device) -> RandomErasing | None:
    """Build the recipe's random erasing for batches on `device`; None if it has none."""
    if not recipe.random_erasing:
        return None
    return RandomErasing(recipe.random_erasing, mode=recipe.erasing_mode, device=str(device))
