"""Accuracy of a model on held-out images, all of them counted once whatever the number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import models  # noqa: F401 - registers the zoo with timm
from .data import ImageSet, Normalizer, resize
from .ranks import Ranks

__all__ = ["Accuracy", "evaluate", "evaluate_pretrained", "measure", "predict", "predict_as_configured"]

_BINS = 15


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """What a model reaches.

    Attributes:
        top1: Images whose most probable class is their own, in percent.
        top5: Images whose own class is among the five most probable, in percent; None for fewer than six classes.
        loss: Mean cross-entropy in nats.
        calibration_error: Expected calibration error in percent: mean over images of the gap between confidence and
            accuracy in their bin, 15 equal bins of confidence (Guo et al., arXiv 1706.04599).
        images: How many images were counted.
    """

    top1: float
    top5: float | None
    loss: float
    calibration_error: float
    images: int


class _Counts:
    """Sums over images, which add up over batches and ranks."""

    def __init__(self, device: torch.device) -> None:
        # images, right at first, right in five, loss; float64 where the device has it
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(4 + 3 * _BINS, dtype=kind, device=device)
        self.classes = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        kind = self.sums.dtype
        logits = logits.to(kind)
        self.classes = logits.shape[1]
        probability, guess = logits.softmax(1).max(1)
        right = guess == labels
        five = logits.topk(min(5, self.classes), 1).indices == labels[:, None]
        self.sums[0] += len(labels)
        self.sums[1] += right.sum()
        self.sums[2] += five.any(1).sum()
        self.sums[3] += F.cross_entropy(logits, labels, reduction="sum")
        # Confidence of exactly 1 belongs to the last bin.
        bins = (probability * _BINS).long().clamp(max=_BINS - 1)
        for start, weights in enumerate((torch.ones_like(probability), probability, right.to(kind))):
            self.sums[4 + start * _BINS : 4 + (start + 1) * _BINS].index_add_(0, bins, weights)

    def accuracy(self) -> Accuracy:
        values = self.sums.cpu().double()
        images = int(values[0])
        if not images:
            raise ValueError("received 0 images; valid: at least 1")
        _, confidence, right = values[4:].view(3, _BINS)
        return Accuracy(
            top1=100.0 * float(values[1]) / images,
            top5=100.0 * float(values[2]) / images if self.classes > 5 else None,
            loss=float(values[3]) / images,
            calibration_error=100.0 * float((confidence - right).abs().sum()) / images,
            images=images,
        )


@torch.inference_mode()
def measure(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks, *, amp: torch.dtype | None = None
) -> Accuracy:
    """Accuracy over the images of all ranks; the model's mode is left as it was found.

    Every rank must call it, each with its own share; a share may be empty.

    Args:
        model: Takes the images on the ranks' device, gives (n, classes).
        batches: Images (n, 3, H, W), normalised, and labels (n,), on the ranks' device.
        ranks: This process.
        amp: Autocast's dtype; None for the model's own precision.

    Returns:
        The same on every rank.

    Raises:
        ValueError: There are no images on any rank.
    """
    counts = _Counts(ranks.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in batches:
            with torch.autocast(ranks.device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            counts.add(logits, labels)
    finally:
        for module, mode in modes.items():
            module.training = mode
    ranks.sum(counts.sums)
    # A rank without images does not know how many classes there are.
    counts.classes = int(ranks.max(counts.classes))
    return counts.accuracy()


def _accuracy(logits: Tensor, data: ImageSet) -> Accuracy:
    counts = _Counts(torch.device("cpu"))
    counts.add(logits, data.labels)
    return counts.accuracy()


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Tensor,
    normalize: Normalizer,
    *,
    img_size: int,
    interpolation: str = "bilinear",
    batch_size: int = 256,
) -> Tensor:
    """Logits of a model in evaluation mode; the model's mode is left as it was found.

    Args:
        model: Takes (N, 3, img_size, img_size), gives (N, classes).
        images: (N, 3, H, W), uint8.
        normalize: Turns bytes into what the model takes.
        img_size: Side in pixels that images are resized to, as timm's evaluation transforms do.
        interpolation: Filter of that resize.
        batch_size: Images at a time.

    Returns:
        (N, classes), float32, on the CPU.

    Raises:
        ValueError: There are no images.
    """
    if not len(images):
        raise ValueError("received 0 images; valid: at least 1")
    training = model.training
    model.eval()
    try:
        logits = [model(normalize(resize(part, img_size, interpolation))) for part in images.split(batch_size)]
    finally:
        model.train(training)
    return torch.cat([part.float().cpu() for part in logits])


def evaluate(
    model: nn.Module,
    data: ImageSet,
    normalize: Normalizer,
    *,
    img_size: int,
    interpolation: str = "bilinear",
    batch_size: int = 256,
) -> Accuracy:
    """Accuracy over all images, each counted once.

    Args:
        model: As for `predict`.
        data: Images and labels, at least one.
        normalize: As for `predict`.
        img_size: As for `predict`.
        interpolation: As for `predict`.
        batch_size: As for `predict`.

    Raises:
        ValueError: There are no images.
    """
    logits = predict(
        model, data.images, normalize, img_size=img_size, interpolation=interpolation, batch_size=batch_size
    )
    return _accuracy(logits, data)


def predict_as_configured(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Logits of a timm model with the preprocessing that its own configuration asks for.

    Args:
        model: A model of timm whose configuration has square images, a `crop_pct` of 1, a bilinear or bicubic resize.
            Its weights are put into the channels-last format.
        images: (N, 3, H, W), uint8, square.
        batch_size: Images at a time.

    Returns:
        (N, classes), float32, on the CPU.

    Raises:
        ValueError: The images or the configuration are of another kind.
    """
    config = timm.data.resolve_model_data_config(model)
    _, height, width = config["input_size"]
    if height != width or config["crop_pct"] != 1.0 or config["interpolation"] not in ("bilinear", "bicubic"):
        received = f"{height}x{width}, crop_pct {config['crop_pct']}, {config['interpolation']}"
        raise ValueError(f"the model's input: received {received}; valid: square, crop_pct 1.0, bilinear or bicubic")
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images: received {tuple(images.shape)}; valid: square ones")
    device = next(model.parameters()).device
    return predict(
        model.to(memory_format=torch.channels_last),
        images,
        Normalizer(tuple(config["mean"]), tuple(config["std"]), device),
        img_size=height,
        interpolation=config["interpolation"],
        batch_size=batch_size,
    )


def evaluate_pretrained(name: str, data: ImageSet, *, batch_size: int = 256) -> Accuracy:
    """Accuracy of pretrained weights, loaded and fed as `timm.create_model(name, pretrained=True)` says.

    Args:
        name: timm's name, such as ``regnetx_002_ubn.cifar10``.
        data: Square images with labels in the order of the model's classes.
        batch_size: Images at a time.

    Raises:
        ValueError: Data and model do not fit together.
    """
    model = timm.create_model(name, pretrained=True)
    if model.num_classes != len(data.classes):
        raise ValueError(f"received images of {len(data.classes)} classes; {name} has {model.num_classes}")
    return _accuracy(predict_as_configured(model, data.images, batch_size=batch_size), data)
