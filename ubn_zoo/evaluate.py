"""Accuracy of a model on images held in memory, with the preprocessing of timm's evaluation transforms."""

from __future__ import annotations

import dataclasses

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import models  # noqa: F401 - registers the zoo with timm
from .data import ImageSet, Normalizer, resize

__all__ = ["Accuracy", "evaluate", "evaluate_pretrained", "predict", "predict_as_configured"]


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """What a model reaches.

    Attributes:
        top1: Images whose most probable class is their own, in percent.
        loss: Mean cross-entropy in nats.
        images: How many images were counted.
    """

    top1: float
    loss: float
    images: int


def _accuracy(logits: Tensor, data: ImageSet) -> Accuracy:
    correct = int((logits.argmax(1) == data.labels).sum())
    loss = float(F.cross_entropy(logits.double(), data.labels))
    return Accuracy(top1=100.0 * correct / len(data), loss=loss, images=len(data))


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
