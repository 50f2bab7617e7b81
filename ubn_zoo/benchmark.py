"""Step times of models side by side: they take turns in one run, so that a drifting machine drifts for all."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import nn

__all__ = ["Timing", "compare", "environment"]


@dataclass(frozen=True, slots=True)
class Timing:
    """One model's step times, in milliseconds, and its ratio to the first model of the run.

    Attributes:
        model: Name.
        mode: "train" (forward, backward) or "eval" (forward under ``torch.inference_mode``).
        batch_size: Images per step.
        img_size: Pixels per side.
        median: Of all steps.
        minimum: Likewise.
        maximum: Likewise.
        ratio: Median over steps of this model's time over the first model's in the same turn.
    """

    model: str
    mode: str
    batch_size: int
    img_size: int
    median: float
    minimum: float
    maximum: float
    ratio: float


def environment(device: torch.device) -> str:
    """Hardware and versions that times were measured with, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = (
            f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        )
    return f"{hardware}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def _steps(model: nn.Module, mode: str, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), targets).backward()

    def evaluate() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    return train if mode == "train" else evaluate


def _time(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


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
        modes: Any of "train" and "eval".
        batch_size: Images per step, random ones.
        img_size: Pixels per side.
        steps: Counted turns.
        device: Where.
        channels_last: Memory format of models and images.

    Yields:
        A :class:`Timing` for every mode and model.

    Raises:
        ValueError: An unknown mode, or no model.
    """
    if not names or not set(modes) <= {"train", "eval"}:
        raise ValueError(
            f"got models {list(names)} and modes {list(modes)}; valid are timm's names and 'train', 'eval'"
        )
    where = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where).to(memory_format=layout)
    for mode in modes:
        models = {name: timm.create_model(name).to(where).to(memory_format=layout) for name in names}
        classes = int(timm.models.get_pretrained_cfg_value(names[0], "num_classes") or 1000)
        targets = torch.randint(classes, (batch_size,), device=where)
        runs = {name: _steps(model, mode, images, targets) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(steps + 2):
            for name, run in runs.items():
                elapsed = _time(run, where)
                if turn >= 2:
                    times[name].append(elapsed)
        for name, values in times.items():
            ratio = statistics.median(ours / base for ours, base in zip(values, times[names[0]], strict=True))
            yield Timing(name, mode, batch_size, img_size, statistics.median(values), min(values), max(values), ratio)
