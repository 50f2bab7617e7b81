"""Times of a BatchNorm model and its twins in training, in evaluation, and fused for inference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ubn_zoo import fuse
from ubn_zoo.evaluation.speed import as_if_trained, eval_step, random_batch, train_step

from .floors import NormCosts, norm_costs
from .turns import SETTINGS, Contender, Timing, as_naive, bytes_of, check_kinds, check_steps, take_turns

__all__ = ["AMP_DTYPES", "MODES", "build", "compare", "compare_training"]

MODES = ("train", "eval", "fused", "folded")
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build(model: str, kind: str) -> nn.Module:
    """Build a BatchNorm model of timm, or its twin with another kind of norm layer, with random weights.

    Args:
        model: The BatchNorm model's name.
        kind: One of :data:`KINDS`.
    """
    if kind == "bn":
        return timm.create_model(model)
    twin = timm.create_model(f"{model}_ubn", ubn_kwargs=SETTINGS[kind])
    return as_naive(twin) if kind == "naive" else twin


def _entries(
    models: Mapping[str, tuple[str, nn.Module]],
    images: Tensor,
    targets: Tensor,
    *,
    train: bool,
    amp: torch.dtype | None,
    compiled: bool,
) -> list[Contender]:
    entries = []
    for name, (kind, model) in models.items():
        variants: dict[str, Any] = {name: model}
        # Compiled, the naive twin and UBN run the same equations.
        if compiled and kind != "naive":
            suffixed = f"{name[:-1]}, compiled)" if name.endswith("(fused)") else f"{name} (compiled)"
            variants[suffixed] = torch.compile(model, fullgraph=True, dynamic=False)
        held = bytes_of(*model.parameters(), *model.buffers(), images, targets)
        for variant, module in variants.items():
            step = train_step(module, images, targets, amp) if train else eval_step(module, images, amp)
            entries.append(Contender(variant, kind, module, step, model.zero_grad, held))
    return entries


def compare(
    model: str,
    settings: Sequence[str] = ("ubn",),
    *,
    modes: Sequence[str] = ("train", "eval"),
    batch_size: int = 8,
    img_size: int = 224,
    steps: int = 10,
    device: str = "cpu",
    channels_last: bool = True,
    amp: str | None = None,
    compiled: bool = False,
    floors: bool = True,
) -> Iterator[Timing]:
    """Time a BatchNorm model and its twins, each once per turn, after two warm-up turns.

    Args:
        model: timm's BatchNorm model, the baseline.
        settings: Kinds of twins to compare: any of "ubn", "rbn", "bnet", "naive" (UBN's equations, op by op).
        modes: Any of "train" (forward, backward), "eval" (forward under ``torch.inference_mode``), "fused" (the same
            after ``ubn_zoo.fuse``, with trained parameters, so that the parts that depend on the instance remain) and
            "folded" (the same with layers converted from BatchNorm, which fold completely). In the last two the
            baseline is fused as well, and the unfused baseline is also timed.
        batch_size: Random images per step.
        img_size: Pixels per side.
        steps: Timed turns.
        device: Device to run on.
        channels_last: Memory format of models and images.
        amp: "bfloat16" or "float16" for autocast, float16 with a scaled loss; None for float32.
        compiled: Whether to time models compiled by torch.compile as well.
        floors: Whether to measure floors, before the turns.

    Yields:
        A :class:`Timing` for every mode and model.

    Raises:
        ValueError: An unknown mode, setting or dtype, or no steps.
    """
    if not set(modes) <= set(MODES):
        raise ValueError(f"modes: received {list(modes)}; valid: {', '.join(MODES)}")
    if amp is not None and amp not in AMP_DTYPES:
        raise ValueError(f"amp: received {amp!r}; valid: {', '.join(AMP_DTYPES)}, or None")
    check_kinds(settings)
    check_steps(steps)
    where = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    classes = int(timm.models.get_pretrained_cfg_value(model, "num_classes") or 1000)
    images, targets = random_batch(batch_size, img_size, classes, where, layout)
    dtype = None if amp is None else AMP_DTYPES[amp]
    for mode in modes:
        if compiled:
            # Code compiled for one mode cannot be reused for another, and torch limits how often it recompiles a
            # function.
            torch.compiler.reset()
        built = {f"{model}_{kind}" if kind != "bn" else model: (kind, build(model, kind)) for kind in ("bn", *settings)}
        for _, module in built.values():
            (module if mode == "folded" else as_if_trained(module)).to(where).to(memory_format=layout)
        costs = _norm_costs(built[model][1], images, dtype, training=mode == "train") if floors else None
        if mode in ("fused", "folded"):
            fused = {f"{name} (fused)": (kind, fuse(module.eval())) for name, (kind, module) in built.items()}
            (base, *twins) = fused.items()
            built = dict([base, (model, built[model]), *twins])
        entries = _entries(built, images, targets, train=mode == "train", amp=dtype, compiled=compiled)
        about: dict[str, Any] = {"mode": mode, "batch_size": batch_size, "img_size": img_size}
        about |= {"dtype": f"amp {amp}" if amp else "float32", "channels_last": channels_last}
        timings = take_turns(entries, steps, where, **about)
        for timing in timings:
            # The unfused baseline, timed for comparison only.
            whole = mode in ("fused", "folded") and "(fused" not in timing.model
            yield timing if costs is None else costs.of(timing, timings[0], "eval" if whole else mode)


def _norm_costs(model: nn.Module, images: Tensor, amp: torch.dtype | None, *, training: bool) -> NormCosts:
    def forward() -> None:
        with contextlib.nullcontext() if amp is None else torch.autocast(images.device.type, amp):
            model.eval()(images)

    return norm_costs(model, forward, images.device, training=training)


def compare_training(
    models: Mapping[str, nn.Module], *, batch_size: int, img_size: int, num_classes: int, steps: int = 10
) -> Iterator[Timing]:
    """Time training steps (forward, backward) of existing models on their own device, each once per turn.

    Args:
        models: Models by name, the baseline first, all on one device.
        batch_size: Random images per step, in the channels-last format.
        img_size: Pixels per side.
        num_classes: Outputs of the models.
        steps: Timed turns.

    Yields:
        A :class:`Timing` for every model, its kind "bn" for the first and "ubn" for the others.

    Raises:
        ValueError: No model, or no steps.
    """
    if not models:
        raise ValueError("models: received none; valid: one at least")
    check_steps(steps)
    where = next(next(iter(models.values())).parameters()).device
    images, targets = random_batch(batch_size, img_size, num_classes, where, torch.channels_last)
    first = next(iter(models))
    kinds = {name: ("bn" if name == first else "ubn", model) for name, model in models.items()}
    entries = _entries(kinds, images, targets, train=True, amp=None, compiled=False)
    about: dict[str, Any] = {"mode": "train", "batch_size": batch_size, "img_size": img_size}
    yield from take_turns(entries, steps, where, dtype="float32", channels_last=True, **about)
