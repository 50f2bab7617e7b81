"""Step times of models and layers side by side: they take turns in one run, so that a drifting machine drifts for all.

Two turns warm up and are not counted. A ratio is the median over turns of a time divided by the first entry's time in
the same turn.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ubn_zoo import UnifiedBatchNorm2d, fuse

__all__ = [
    "LAYER_SHAPES",
    "MODES",
    "Timing",
    "compare",
    "compare_layers",
    "compare_training",
    "draw_ratios",
    "environment",
    "table",
    "write_table",
]

MODES = ("train", "eval", "fused", "folded")

# (channels, pixels per side) of the norms of ResNet-50 at 224 pixels, each once.
LAYER_SHAPES = (
    (64, 112),
    (64, 56),
    (128, 56),
    (256, 56),
    (128, 28),
    (256, 28),
    (512, 28),
    (256, 14),
    (512, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
)
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Step times of a model or layer, in milliseconds, and their ratio to the first entry of the run.

    Attributes:
        model: Name; " (fused)" is appended where norms are folded into the convolutions.
        mode: One of :data:`MODES`, or "layer" (forward, backward of one layer).
        batch_size: Images per step.
        img_size: Pixels per side of the input.
        param_count: Parameters, of a fused model the values that it is made of.
        median: Of all counted steps.
        lower: First quartile.
        upper: Third quartile.
        minimum: Least.
        maximum: Most.
        ratio: Median over turns of this entry's time over the first entry's in the same turn.
        memory: Most memory that torch held on a GPU during a step, in MB; None elsewhere.
    """

    model: str
    mode: str
    batch_size: int
    img_size: int
    param_count: int
    median: float
    lower: float
    upper: float
    minimum: float
    maximum: float
    ratio: float
    memory: float | None


def environment(device: torch.device) -> str:
    """Hardware and versions that times were measured with, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = (
            f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        )
    return f"{hardware}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def _time(step: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Milliseconds, and peak memory in MB where torch keeps count."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start), None
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start), torch.cuda.max_memory_allocated(device) / 2**20


def _take_turns(
    entries: Mapping[str, tuple[nn.Module, Callable[[], object]]], steps: int, device: torch.device, **about: Any
) -> Iterator[Timing]:
    times: dict[str, list[float]] = {name: [] for name in entries}
    peaks: dict[str, float | None] = {}
    for turn in range(_WARM_UP + steps):
        for name, (_, step) in entries.items():
            elapsed, peak = _time(step, device)
            if turn >= _WARM_UP:
                times[name].append(elapsed)
                peaks[name] = peak
    base = next(iter(times.values()))
    for name, values in times.items():
        lower, _, upper = statistics.quantiles(values, method="inclusive") if steps > 1 else 3 * values
        module = entries[name][0]
        tensors = module.state_dict().values() if name.endswith("(fused)") else module.parameters()
        yield Timing(
            model=name,
            param_count=sum(tensor.numel() for tensor in tensors),
            median=statistics.median(values),
            lower=lower,
            upper=upper,
            minimum=min(values),
            maximum=max(values),
            ratio=statistics.median(ours / theirs for ours, theirs in zip(values, base, strict=True)),
            memory=peaks[name],
            **about,
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}, valid are 1 and more")


@torch.no_grad()
def _as_if_trained(model: nn.Module) -> nn.Module:
    """Gives UBN layers calibrations and kernels that depend on everything: none folds because it is at its start."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            for parameter in layer.parameters(recurse=False):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def _train_step(model: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), targets).backward()

    model.train()
    return step


def _eval_step(model: nn.Module, images: Tensor) -> Callable[[], object]:
    model.eval()
    return torch.inference_mode()(lambda: model(images))


def compare(
    names: Sequence[str],
    *,
    modes: Sequence[str] = ("train", "eval"),
    batch_size: int = 8,
    img_size: int = 224,
    steps: int = 10,
    device: str = "cpu",
    channels_last: bool = True,
) -> Iterator[Timing]:
    """Times models in turns, all of them once per turn, after two turns to warm up.

    Args:
        names: Models of timm, the baseline first.
        modes: Any of "train" (forward, backward), "eval" (forward under ``torch.inference_mode``), "fused" (the same
            after ``ubn_zoo.fuse``, the UBN layers as if trained, so that what depends on the instance stays) and
            "folded" (the same with UBN layers as converted from BatchNorm, of which nothing stays). The last two are
            compared with the baseline in evaluation as it is, and have it fused as well.
        batch_size: Images per step, random ones.
        img_size: Pixels per side.
        steps: Counted turns.
        device: Where.
        channels_last: Memory format of models and images.

    Yields:
        A :class:`Timing` for every mode and model.

    Raises:
        ValueError: An unknown mode, no model, or no steps.
    """
    if not names or not set(modes) <= set(MODES):
        raise ValueError(
            f"got models {list(names)} and modes {list(modes)}; valid are timm's names and {', '.join(MODES)}"
        )
    _check_steps(steps)
    where = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where).to(memory_format=layout)
    for mode in modes:
        models = {name: timm.create_model(name) for name in names}
        if mode != "folded":
            models = {name: _as_if_trained(model) for name, model in models.items()}
        models = {name: model.to(where).to(memory_format=layout) for name, model in models.items()}
        if mode in ("fused", "folded"):
            fused = {f"{name} (fused)": fuse(model.eval()) for name, model in models.items()}
            models = {names[0]: models[names[0]], **fused}
        classes = int(timm.models.get_pretrained_cfg_value(names[0], "num_classes") or 1000)
        targets = torch.randint(classes, (batch_size,), device=where)
        entries = {
            name: (model, _train_step(model, images, targets) if mode == "train" else _eval_step(model, images))
            for name, model in models.items()
        }
        yield from _take_turns(entries, steps, where, mode=mode, batch_size=batch_size, img_size=img_size)


def compare_training(
    models: Mapping[str, nn.Module], *, batch_size: int, img_size: int, num_classes: int, steps: int = 10
) -> Iterator[Timing]:
    """Times training steps (forward, backward) of models that are at hand, in turns, where they are.

    Args:
        models: By name, the baseline first; all on one device.
        batch_size: Images per step, random ones in the channels-last format.
        img_size: Pixels per side.
        num_classes: Outputs of the models.
        steps: Counted turns.

    Yields:
        A :class:`Timing` for every model.

    Raises:
        ValueError: No model, or no steps.
    """
    if not models:
        raise ValueError("got no models; valid is one at least")
    _check_steps(steps)
    where = next(next(iter(models.values())).parameters()).device
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where).to(memory_format=torch.channels_last)
    targets = torch.randint(num_classes, (batch_size,), device=where)
    entries = {name: (model, _train_step(model, images, targets)) for name, model in models.items()}
    yield from _take_turns(entries, steps, where, mode="train", batch_size=batch_size, img_size=img_size)


class _Naive(UnifiedBatchNorm2d):
    """The layer as :mod:`ubn_zoo.layers.functional` spells it out, differentiated operation by operation."""

    def forward(self, input: Tensor) -> Tensor:
        return self._reference(input)


# UBN's layer with its parts switched off one by one.
_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "UBN": UnifiedBatchNorm2d,
    "RBN": lambda channels: UnifiedBatchNorm2d(channels, threshold=None, depthwise_affine=False),
    "BNET": lambda channels: UnifiedBatchNorm2d(
        channels, threshold=None, center_calibration=False, scale_calibration=False
    ),
    "UBN naive": _Naive,
}


def compare_layers(
    shapes: Sequence[tuple[int, int]] = LAYER_SHAPES,
    *,
    batch_size: int = 8,
    steps: int = 10,
    device: str = "cpu",
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Timing]:
    """Times one training step (forward, backward) of BatchNorm2d, UBN, RBN, BNET and the naive UBN, shape by shape.

    Args:
        shapes: Channels and pixels per side, those of ResNet-50 by default.
        batch_size: Images per step.
        steps: Counted turns.
        device: Where.
        channels_last: Memory format.
        dtype: Of features and parameters.

    Yields:
        A :class:`Timing` for every shape and layer, named like "UBN 256x56x56", with "layer" as its mode.

    Raises:
        ValueError: No steps.
    """
    _check_steps(steps)
    where = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for channels, side in shapes:
        torch.manual_seed(0)
        shape = (batch_size, channels, side, side)
        features, grad = (torch.randn(shape, device=where, dtype=dtype).to(memory_format=layout) for _ in range(2))
        features.requires_grad_()

        def step_of(layer: nn.Module, features: Tensor = features, grad: Tensor = grad) -> Callable[[], object]:
            def step() -> None:
                features.grad = None
                layer.zero_grad(set_to_none=True)
                layer(features).backward(grad)

            return step

        layers = {name: make(channels).to(where, dtype) for name, make in _LAYERS.items()}
        entries = {f"{name} {channels}x{side}x{side}": (layer, step_of(layer)) for name, layer in layers.items()}
        yield from _take_turns(entries, steps, where, mode="layer", batch_size=batch_size, img_size=side)


def table(timings: Sequence[Timing], **about: object) -> list[dict[str, object]]:
    """Rows in the layout of timm's benchmark tables: one per model, columns of inference and of training.

    Added to timm's columns are, each for ``infer`` and ``train``, ``step_lower`` and ``step_upper`` (quartiles),
    ``step_min``, ``step_max``, ``ratio`` and ``memory`` (MB, empty where torch keeps no count). A fused model is a row
    of its own, and so is a layer, with its forward and backward under ``train``.

    Args:
        timings: From :func:`compare` or :func:`compare_layers`.
        **about: Further columns, the same in every row.
    """
    rows: dict[tuple[str, str, int, int], dict[str, object]] = {}
    for timing in timings:
        # "fused" and "folded" each time the same entries, of other contents.
        kind = timing.mode if timing.mode in ("fused", "folded") else ""
        key = (kind, timing.model, timing.batch_size, timing.img_size)
        row = rows.setdefault(key, {"model": timing.model, "fused": kind})
        prefix = "train" if timing.mode in ("train", "layer") else "infer"
        columns = {
            "samples_per_sec": round(1000 * timing.batch_size / timing.median, 2),
            "step_time": round(timing.median, 3),
            "batch_size": timing.batch_size,
            "img_size": timing.img_size,
            "step_lower": round(timing.lower, 3),
            "step_upper": round(timing.upper, 3),
            "step_min": round(timing.minimum, 3),
            "step_max": round(timing.maximum, 3),
            "ratio": round(timing.ratio, 3),
            "memory": None if timing.memory is None else round(timing.memory, 1),
        }
        row.update({f"{prefix}_{name}": value for name, value in columns.items()})
        # timm counts in millions.
        row["param_count"] = round(timing.param_count / 1e6, 2)
        row.update(about)
    names = [f"{prefix}_{name}" for prefix in ("infer", "train") for name in columns] if timings else []
    order = ["model", *names, "param_count", "fused", *about]
    return [{name: row.get(name) for name in order} for row in rows.values()]


def write_table(rows: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Writes the rows of :func:`table` as CSV.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to write; time something first")
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_ratios(timings: Sequence[Timing], path: str | Path, title: str = "") -> None:
    """Draws how many times the first entry's step time each entry takes, a bar each, a panel for every mode.

    Args:
        timings: From :func:`compare` or :func:`compare_layers`, in their order.
        path: PNG file to write.
        title: Written above, such as hardware and versions.

    Raises:
        ValueError: There are no timings.
        ImportError: matplotlib, of the extra ``ubn-zoo[quickstart]``, is missing.
    """
    from matplotlib.figure import Figure

    if not timings:
        raise ValueError("there are no timings to draw; time something first")
    modes = list(dict.fromkeys(timing.mode for timing in timings))
    longest = max(sum(timing.mode == mode for timing in timings) for mode in modes)
    figure = Figure(figsize=(5.5 * len(modes), 1.2 + 0.25 * longest), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        mine = [timing for timing in timings if timing.mode == mode]
        bars = range(len(mine))
        axes.barh(bars, [timing.ratio for timing in mine], color="tab:blue")
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set_yticks(bars, [timing.model for timing in mine])
        axes.invert_yaxis()
        axes.set(title=f"{mode}, batch {mine[0].batch_size}", xlabel="step time, relative to the first")
        axes.grid(axis="x", alpha=0.3)
    if title:
        figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)
