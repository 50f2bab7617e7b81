"""Accuracy of a model on held-out images, all of them counted once whatever the number of ranks."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubn_zoo.data.loaders import EvalBatches, open_eval
from ubn_zoo.data.memory import Normalizer, resize
from ubn_zoo.data.settings import Feed
from ubn_zoo.errors import ClassMismatchError, EvaluationError
from ubn_zoo.evaluation.subjects import Subject
from ubn_zoo.recipes.schema import DATASETS, NAMED_DATASETS
from ubn_zoo.utils.distributed import Ranks

__all__ = [
    "Accuracy",
    "EvaluationError",
    "append_result",
    "feed_of",
    "logits_as_configured",
    "logits_of",
    "measure",
    "open_images",
    "result_row",
]

_logger = logging.getLogger(__name__)

_BINS = 15
_HINT = "if the model's outputs are these classes in this order, pass `allow_class_mismatch=True`"
_RESIZES = ("bilinear", "bicubic")


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
        # The first takes those of a model that gives NaN, which its loss tells.
        bins = (probability * _BINS).long().clamp(0, _BINS - 1)
        for start, weights in enumerate((torch.ones_like(probability), probability, right.to(kind))):
            self.sums[4 + start * _BINS : 4 + (start + 1) * _BINS].index_add_(0, bins, weights)

    def accuracy(self) -> Accuracy:
        values = self.sums.cpu().double()
        images = int(values[0])
        if not images:
            raise EvaluationError("received 0 images; valid: at least 1")
        _, confidence, right = values[4:].view(3, _BINS)
        return Accuracy(
            top1=100.0 * float(values[1]) / images,
            top5=100.0 * float(values[2]) / images if self.classes > 5 else None,
            loss=float(values[3]) / images,
            calibration_error=100.0 * float((confidence - right).abs().sum()) / images,
            images=images,
        )


def _nothing(done: int) -> None:
    pass


@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks,
    *,
    amp: torch.dtype | None = None,
    on_batch: Callable[[int], None] = _nothing,
) -> Accuracy:
    """Accuracy over the images of all ranks; the model's mode is left as it was found.

    Every rank must call it, each with its own share; a share may be empty.

    Args:
        model: Takes the images on the ranks' device, gives (n, classes).
        batches: Images (n, 3, H, W), normalized, and labels (n,), on the ranks' device.
        ranks: This process.
        amp: Autocast's dtype; None for the model's own precision.
        on_batch: Called after every batch with the images that this rank has done.

    Returns:
        The same on every rank.

    Raises:
        ValueError: There are no images on any rank.
    """
    counts, done = _Counts(ranks.device), 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in batches:
            with torch.autocast(ranks.device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            counts.add(logits, labels)
            done += len(labels)
            on_batch(done)
    finally:
        for module, mode in modes.items():
            module.training = mode
    ranks.sum(counts.sums)
    # A rank without images does not know how many classes there are.
    counts.classes = int(ranks.max(counts.classes))
    return counts.accuracy()


@torch.inference_mode()
def logits_of(
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
        raise EvaluationError("received 0 images; valid: at least 1")
    training = model.training
    model.eval()
    try:
        logits = [model(normalize(resize(part, img_size, interpolation))) for part in images.split(batch_size)]
    finally:
        model.train(training)
    return torch.cat([part.float().cpu() for part in logits])


def logits_as_configured(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
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
    if height != width or config["crop_pct"] != 1.0 or config["interpolation"] not in _RESIZES:
        received = f"{height}x{width}, crop_pct {config['crop_pct']}, {config['interpolation']}"
        raise EvaluationError(
            f"the model's input: received {received}; valid: square, crop_pct 1.0, bilinear or bicubic"
        )
    if images.shape[2] != images.shape[3]:
        raise EvaluationError(f"images: received {tuple(images.shape)}; valid: square ones")
    device = next(model.parameters()).device
    return logits_of(
        model.to(memory_format=torch.channels_last),
        images,
        Normalizer(tuple(config["mean"]), tuple(config["std"]), device),
        img_size=height,
        interpolation=config["interpolation"],
        batch_size=batch_size,
    )


def feed_of(
    subject: Subject,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    dataset: str = "folder",
    **data: Any,
) -> Feed:
    """Feed a model as its own configuration says; as timm's validation does, at its test size where it has one.

    Args:
        subject: The model.
        img_size: Side in pixels in place of the configuration's.
        crop_pct: Share of the crop in place of the configuration's.
        dataset: Kind of data, as a recipe names it.
        **data: Other fields of `Feed` that tell which images.

    Raises:
        EvaluationError: There is no such kind of data, or the model's images are not square or not made in memory.
    """
    kind, _, name = dataset.partition("/")
    if kind not in DATASETS or bool(name) != (kind in NAMED_DATASETS):
        valid = ", ".join(f"{kind}/NAME" if kind in NAMED_DATASETS else kind for kind in DATASETS)
        raise EvaluationError(f"dataset: received {dataset!r}; valid: {valid}")
    given = {"img_size": img_size, "crop_pct": crop_pct}
    config = timm.data.resolve_data_config(given, model=subject.model, use_test_size=True)
    _, height, width = config["input_size"]
    if height != width:
        raise EvaluationError(f"{subject.name} takes {width}x{height} pixels; valid: square images; set img_size")
    if dataset == "memory" and (config["crop_pct"] != 1.0 or config["interpolation"] not in _RESIZES):
        raise EvaluationError(
            f"dataset memory: received crop_pct {config['crop_pct']}, {config['interpolation']}; valid: crop_pct 1.0, "
            f"{' or '.join(_RESIZES)}; dataset folder has all of them"
        )
    return Feed(
        img_size=height,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        num_classes=cast(int, subject.model.num_classes),
        dataset=dataset,
        **data,
    )


def open_images(
    subject: Subject,
    feed: Feed,
    data_dir: str | os.PathLike[str],
    ranks: Ranks,
    *,
    batch_size: int = 256,
    allow_class_mismatch: bool = False,
) -> EvalBatches:
    """Open the images that a model is evaluated on.

    Class names say which of the data's classes is which output of the model. A model of 1,000 classes without names has
    ImageNet-1k's WordNet IDs. Data with labels but no names is taken as it is.

    Args:
        subject: The model.
        feed: How it is fed.
        data_dir: As for `open_eval`.
        ranks: This process.
        batch_size: Images at a time, on each rank.
        allow_class_mismatch: Where the names differ or the model has none, take the data's classes, in the order of
            their names, as the model's outputs, and log a warning.

    Raises:
        ClassMismatchError: The data has classes that the model does not name, or the model has no names.
        DataError: The images cannot be used.
        EvaluationError: Classes are matched by order, and data and model have different numbers of them.
    """

    def open_named(names: Sequence[str]) -> EvalBatches:
        return open_eval(feed, data_dir, ranks, names, batch_size=batch_size, crop_mode=feed.crop_mode)

    names: Sequence[str] = subject.classes
    if not names and feed.num_classes == 1000:
        names = timm.data.ImageNetInfo("imagenet-1k").label_names()
    problem = f"{subject.name} has no names for its {feed.num_classes} classes"
    if names:
        try:
            return open_named(names)
        except ClassMismatchError as error:
            if not allow_class_mismatch:
                raise ClassMismatchError(f"{error}; {_HINT}") from None
            problem = str(error)
    test = open_named(())
    if not test.classes:
        return test
    shown = ", ".join(test.classes[:10]) + (", ..." if len(test.classes) > 10 else "")
    if len(test.classes) != feed.num_classes:
        raise EvaluationError(
            f"received images of {len(test.classes)} classes ({shown}); valid: {feed.num_classes}, the outputs of "
            f"{subject.name}, in its order"
        )
    if not allow_class_mismatch:
        raise ClassMismatchError(f"{problem}, the data's are {shown}; {_HINT}")
    if ranks.first:
        _logger.warning("%s; its outputs are taken to be %s", problem, shown)
    return test


def result_row(subject: Subject, feed: Feed, accuracy: Accuracy, **more: Any) -> dict[str, Any]:
    """What a results file says of an evaluation.

    Args:
        subject: The model.
        feed: How it was fed.
        accuracy: What it reached.
        **more: Columns behind those, such as the device.

    Returns:
        Columns of timm's results files, in their order (percent, millions of parameters), then this project's own.
    """
    five = accuracy.top5
    return {
        "model": subject.name,
        "top1": round(accuracy.top1, 4),
        "top1_err": round(100 - accuracy.top1, 4),
        "top5": None if five is None else round(five, 4),
        "top5_err": None if five is None else round(100 - five, 4),
        "param_count": round(sum(parameter.numel() for parameter in subject.model.parameters()) / 1e6, 2),
        "img_size": feed.img_size,
        "crop_pct": feed.crop_pct,
        "interpolation": feed.interpolation,
        "loss": round(accuracy.loss, 6),
        "calibration_error": round(accuracy.calibration_error, 4),
        "images": accuracy.images,
        "sha256": subject.sha256,
        **more,
    }


def append_result(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file, which begins with the names of the columns.

    Args:
        path: The file; made if it is not there.
        row: Its columns by name, in order.

    Raises:
        EvaluationError: The file has other columns, or it cannot be written.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        header = next(csv.reader(text.splitlines()), [])
        if header not in ([], list(row)):
            raise EvaluationError(f"{file} has columns {', '.join(header)}; valid: {', '.join(row)}; use another file")
        with file.open("a", encoding="utf-8", newline="") as stream:
            if text and not text.endswith("\n"):
                stream.write("\n")
            writer = csv.DictWriter(stream, list(row), lineterminator="\n")
            if not header:
                writer.writeheader()
            writer.writerow(row)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: {error}") from None
