"""Compare the speed of a UBN model and its BatchNorm sibling in training and inference.

`torch.utils.benchmark.Timer` times statements one after another, so a machine that slows down in between favors the
first. Here the two models alternate step by step, and each ratio compares two consecutive steps.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils import benchmark

from ubn_zoo.errors import EvaluationError, InvalidArgumentError, UnknownModelError
from ubn_zoo.layers import UnifiedBatchNorm2d, fuse
from ubn_zoo.models.catalog import similar_names
from ubn_zoo.models.registry import SUFFIX
from ubn_zoo.utils.files import write_file
from ubn_zoo.utils.provenance import device_name

__all__ = [
    "MODES",
    "Speed",
    "as_if_trained",
    "compare_speed",
    "eval_step",
    "random_batch",
    "sibling_names",
    "train_step",
    "write_speed",
]

MODES = ("training", "inference", "fused inference")
_WARM_UP_TURNS = 2
_MIN_TURNS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Measured speed of one model in one mode; a row of the CSV file.

    Attributes:
        mode: One of `MODES`.
        model: Architecture.
        turns: Number of timed steps.
        images_per_second: Batch size over the median time of a step.
        milliseconds: Median time of a step.
        ratio: Median over turns of this model's time divided by the BatchNorm model's time in the same turn.
        ratio_lower: First quartile of that ratio.
        ratio_upper: Third quartile of that ratio.
        peak_memory: Peak tensor memory of a step in MiB, including parameters, buffers and input, but not the other
            model or the optimizer. None on devices that do not report it, such as a CPU.
        batch_size: Images per step.
        img_size: Image side in pixels.
        device: ``cpu``, or the accelerator's name.
        threads: Torch's CPU threads.
        amp: Autocast's dtype; None without autocast.
        channels_last: Whether models and images were in the channels-last memory format.
        torch: Version of torch.
    """

    mode: str
    model: str
    turns: int
    images_per_second: float
    milliseconds: float
    ratio: float
    ratio_lower: float
    ratio_upper: float
    peak_memory: float | None
    batch_size: int
    img_size: int
    device: str
    threads: int
    amp: str | None
    channels_last: bool
    torch: str


def sibling_names(model: str) -> tuple[str, str]:
    """Return the names of the BatchNorm and the UBN architecture of a pair.

    Args:
        model: Either name of the pair, such as ``resnet50`` or ``resnet50_ubn``. A tag is ignored.

    Returns:
        The BatchNorm model's name and the UBN model's name.

    Raises:
        UnknownModelError: The zoo has no such pair.
    """
    plain = model.partition(".")[0].removesuffix(SUFFIX)
    if not (timm.is_model(plain) and timm.is_model(plain + SUFFIX)):
        raise UnknownModelError(f"no UBN model for {model!r}; {similar_names(plain)}")
    return plain, plain + SUFFIX


def compare_speed(
    model: str,
    *,
    batch_size: int | None = None,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    seconds: float = 60.0,
) -> list[Speed]:
    """Time a UBN model and its BatchNorm sibling side by side.

    Weights and images are random, because they do not affect the time. UBN parameters differ from their initial values,
    so that no part of the layer is optimized away. A training step is forward, loss and backward, without the
    optimizer. Inference runs under ``torch.inference_mode``; for fused inference, both models are fused with
    `ubn_zoo.fuse`.

    Args:
        model: Name of either model, such as ``resnet50_ubn``.
        batch_size: Images per step; None for 8 on a CPU and 64 elsewhere.
        img_size: Image side in pixels; None for the model's training size.
        device: Device to run on.
        amp: Autocast's dtype, such as ``torch.bfloat16``; None for float32.
        channels_last: Whether to use the channels-last memory format.
        seconds: Total time for all modes. Slow models take longer, because every mode needs two warm-up turns and at
            least three timed turns.

    Returns:
        For each of `MODES`, the row of the BatchNorm model followed by the row of the UBN model.

    Raises:
        UnknownModelError: The zoo has no such pair.
        InvalidArgumentError: `batch_size`, `img_size` or `seconds` is not positive.
        EvaluationError: The models cannot process the batch, for example because it does not fit into memory.
    """
    for name, value in {"batch_size": batch_size, "img_size": img_size, "seconds": seconds}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InvalidArgumentError(f"`{name}`: received {value}; valid: a positive number")
    names = sibling_names(model)
    where = torch.device(device)
    batch = batch_size or (8 if where.type == "cpu" else 64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    models: dict[str, nn.Module] = {name: timm.create_model(name) for name in names}
    for module in models.values():
        as_if_trained(module).to(where).to(memory_format=layout)
    base: Any = models[names[0]]
    size = img_size or int(resolve_model_data_config(base)["input_size"][-1])
    # A model without a classifier has 0 classes; its features are used as logits.
    images, targets = random_batch(batch, size, max(base.num_classes, 1), where, layout)
    settings: dict[str, Any] = {
        "batch_size": batch,
        "img_size": size,
        "device": device_name(where),
        "threads": torch.get_num_threads(),
        "amp": None if amp is None else str(amp).removeprefix("torch."),
        "channels_last": channels_last,
        "torch": torch.__version__,
    }
    rows = []
    try:
        # The clock of torch.utils.benchmark synchronizes with the current accelerator.
        with torch.accelerator.device_index(None if where.type == "cpu" else where.index):
            for mode in MODES:
                if mode == "fused inference":
                    models = {name: fuse(module) for name, module in models.items()}
                if mode == "training":
                    steps = {name: train_step(module, images, targets, amp) for name, module in models.items()}
                else:
                    steps = {name: eval_step(module, images, amp) for name, module in models.items()}
                times = _alternate(steps, seconds / len(MODES))
                for name, module in models.items():
                    _free_gradients(models)
                    memory = _peak_memory(steps[name], [*module.parameters(), *module.buffers(), images, targets])
                    rows.append(_row(times[name], times[names[0]], mode, name, memory, settings))
                _free_gradients(models)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"{model}: a batch of {batch} images of {size} pixels does not fit into the memory of "
            f"{settings['device']}; choose a smaller `batch_size` or `img_size`"
        ) from error
    except (RuntimeError, ValueError) as error:
        shape = tuple(images.shape)
        raise EvaluationError(
            f"{model}: cannot compute images of shape {shape} on {settings['device']}: {error}"
        ) from error
    return rows


def write_speed(path: str | os.PathLike[str], rows: Sequence[Speed]) -> None:
    """Write rows to a CSV file with a header.

    Args:
        path: The file; replaced if it exists.
        rows: Rows returned by `compare_speed`.

    Raises:
        OSError: The file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Speed))
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_file(path, text.getvalue())


def random_batch(
    batch_size: int, img_size: int, num_classes: int, device: torch.device, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Create random images (N, 3, H, W) in a memory format and classes (N,); every call returns the same values."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, generator=generator)
    targets = torch.randint(num_classes, (batch_size,), generator=generator)
    return images.to(device).to(memory_format=layout), targets.to(device)


@torch.no_grad()
def as_if_trained(module: nn.Module) -> nn.Module:
    """Change the parameters of UBN layers from their initial values, so that every part of the layer has an effect."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            for parameter in layer.parameters(recurse=False):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def train_step(
    model: nn.Module, images: Tensor, targets: Tensor, amp: torch.dtype | None = None
) -> Callable[[], object]:
    """Return a training step without the optimizer: forward, loss, backward; the loss is scaled for float16.

    Args:
        model: Model, which is put into training mode.
        images: (N, 3, H, W).
        targets: (N,) classes.
        amp: Autocast's dtype; None for no autocast.
    """
    scaler = torch.amp.GradScaler(images.device.type, enabled=amp is torch.float16)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with _autocast(images.device, amp):
            loss = nn.functional.cross_entropy(model(images), targets)
        scaler.scale(loss).backward()

    model.train()
    return step


def eval_step(model: nn.Module, images: Tensor, amp: torch.dtype | None = None) -> Callable[[], object]:
    """Return a forward pass in evaluation mode under ``torch.inference_mode``.

    Args:
        model: Model, which is put into evaluation mode.
        images: (N, 3, H, W).
        amp: Autocast's dtype; None for no autocast.
    """

    def step() -> None:
        with torch.inference_mode(), _autocast(images.device, amp):
            model(images)

    model.eval()
    return step


def _autocast(device: torch.device, amp: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if amp is None else torch.autocast(device.type, amp)


def _free_gradients(models: Mapping[str, nn.Module]) -> None:
    for module in models.values():
        module.zero_grad(set_to_none=True)


def _alternate(steps: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Run each step once per turn until the time is up, and return the durations by name in seconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.monotonic() + seconds
    turn = 0
    while turn < _WARM_UP_TURNS + _MIN_TURNS or time.monotonic() < end:
        # Alternate which model runs first, so that neither always follows the other.
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = benchmark.timer()
            steps[name]()
            elapsed = benchmark.timer() - start
            if turn >= _WARM_UP_TURNS:
                times[name].append(elapsed)
        turn += 1
    return times


def _peak_memory(step: Callable[[], object], held: Sequence[Tensor]) -> float | None:
    """Peak memory of a step in MiB, including the tensors in `held`; None if torch does not report it."""
    device = held[0].device
    if device.type not in ("cuda", "xpu"):
        return None
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    step()
    torch.accelerator.synchronize(device)
    peak = torch.accelerator.max_memory_allocated(device) - before
    return float(peak + sum(tensor.numel() * tensor.element_size() for tensor in held)) / 2**20


def _row(
    times: Sequence[float],
    baseline: Sequence[float],
    mode: str,
    name: str,
    memory: float | None,
    settings: Mapping[str, Any],
) -> Speed:
    median = statistics.median(times)
    ratios = [ours / theirs for ours, theirs in zip(times, baseline, strict=True)]
    lower, ratio, upper = statistics.quantiles(ratios, method="inclusive")
    return Speed(
        mode=mode,
        model=name,
        turns=len(times),
        images_per_second=settings["batch_size"] / median,
        milliseconds=1000 * median,
        ratio=ratio,
        ratio_lower=lower,
        ratio_upper=upper,
        peak_memory=memory,
        **settings,
    )
