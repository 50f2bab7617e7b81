"""Accuracy of a model on images; each image counts once, for any number of processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import timm.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubn_zoo.data.memory import Normalizer, resize
from ubn_zoo.errors import EvaluationError
from ubn_zoo.utils.distributed import Ranks

__all__ = [
    "Accuracy",
    "EvaluationError",
    "ImageResults",
    "agree_on",
    "is_out_of_memory",
    "logits_as_configured",
    "logits_of",
    "measure",
    "wilson",
]

_BINS = 15
_RESIZES = ("bilinear", "bicubic")
_Z = 1.959963984540054  # 95 % of a normal distribution lies within this many standard deviations
# Messages of torch's allocators; only out-of-memory on a GPU has its own exception class.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "alloc_failed")


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """Measured accuracy.

    An image may have several correct classes (ReaL labels). A prediction of any of them is then correct, and the loss
    is the negative log of the sum of their probabilities.

    Attributes:
        top1: Percentage of images whose most probable class is correct.
        top5: Percentage of images with a correct class among the five most probable; None for fewer than six classes.
        loss: Mean cross-entropy in nats.
        calibration_error: Expected calibration error in percent: mean over images of the gap between confidence and
            accuracy in their bin, 15 equal bins of confidence (Guo et al., arXiv 1706.04599).
        images: Number of images counted.
    """

    top1: float
    top5: float | None
    loss: float
    calibration_error: float
    images: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ImageResults:
    """Results for each of n images; tensors (n,) on the CPU.

    Attributes:
        labels: Correct class, int64; -1 for an image with several.
        predictions: Most probable class, int64.
        confidences: Probability of that class, float64 (float32 from MPS).
        right: Whether the prediction is correct.
        right_in_five: Whether a correct class is among the five most probable.
    """

    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    right: Tensor
    right_in_five: Tensor


def wilson(percent: float, images: int, deviations: float = _Z) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, JASA 1927), for independently drawn images.

    Args:
        percent: The proportion, in percent.
        images: Number of images, at least 1.
        deviations: Half-width in standard deviations; by default a 95 % interval.

    Returns:
        Lower and upper bound, in percent.
    """
    share, square = percent / 100, deviations * deviations / images
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


class _Counts:
    """Sums over images, accumulated over batches and ranks."""

    def __init__(self, device: torch.device, outputs: Sequence[int] | None) -> None:
        # images, correct in top 1, correct in top 5, loss; float64 if the device supports it
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(4 + 3 * _BINS, dtype=kind, device=device)
        self.outputs = None if outputs is None else torch.tensor(outputs, device=device)
        self.classes = 0

    def add(self, logits: Tensor, labels: Tensor) -> ImageResults:
        kind = self.sums.dtype
        logits, given = logits.to(kind), labels
        if self.outputs is not None:
            logits = logits.index_select(1, self.outputs)
            if labels.ndim == 1:
                match = labels[:, None] == self.outputs
                if not match.any(1).all():
                    raise EvaluationError("received an image of a class that is not among `outputs`")
                labels = match.int().argmax(1)
            else:
                labels = labels.index_select(1, self.outputs)
        self.classes = logits.shape[1]
        probability, guess = logits.softmax(1).max(1)
        top = logits.topk(min(5, self.classes), 1).indices
        if labels.ndim == 1:
            right, five = guess == labels, (top == labels[:, None]).any(1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        else:
            right, five = labels.gather(1, guess[:, None])[:, 0], labels.gather(1, top).any(1)
            loss = -logits.log_softmax(1).masked_fill(~labels, -math.inf).logsumexp(1).sum()
        self.sums[0] += len(labels)
        self.sums[1] += right.sum()
        self.sums[2] += five.sum()
        self.sums[3] += loss
        # A confidence of exactly 1 belongs to the last bin. Images with NaN count in the first bin, and the loss is NaN
        # too.
        bins = (probability * _BINS).long().clamp(0, _BINS - 1)
        for start, weights in enumerate((torch.ones_like(probability), probability, right.to(kind))):
            self.sums[4 + start * _BINS : 4 + (start + 1) * _BINS].index_add_(0, bins, weights)
        return ImageResults(
            labels=given if given.ndim == 1 else given.int().argmax(1).masked_fill(given.sum(1) > 1, -1),
            predictions=guess if self.outputs is None else self.outputs[guess],
            confidences=probability,
            right=right,
            right_in_five=five,
        )

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the accelerator or the CPU is out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks,
    *,
    amp: torch.dtype | None = None,
    outputs: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_results: Callable[[ImageResults], None] | None = None,
) -> Accuracy:
    """Measure accuracy over the images of all ranks; the model's training mode is restored.

    Every rank must call this function with its own share of the images, which may be empty. If one rank fails, all
    ranks raise an error.

    Args:
        model: Maps images on the rank's device to logits (n, classes).
        batches: Normalized images (n, 3, H, W) and labels, on the rank's device. Labels are (n,), int64, or (n,
            classes), bool, for images with several correct classes.
        ranks: This process.
        amp: Autocast's dtype; None for the model's own precision.
        outputs: Classes to compare, in ascending order; the model's other outputs are ignored. None for all.
        on_batch: Called after every batch with the number of images that this rank has processed.
        on_results: Called after every batch with the results of each image.

    Returns: The accuracy, equal on every rank.

    Raises:
        EvaluationError: There are no images on any rank, a label is not among `outputs`, or another rank failed.
        torch.OutOfMemoryError: Another rank ran out of memory.
    """
    counts, done = _Counts(ranks.device, outputs), 0
    failure: Exception | None = None
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in batches:
            with torch.autocast(ranks.device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            results = counts.add(logits, labels)
            if on_results is not None:
                fields = dataclasses.fields(results)
                on_results(ImageResults(**{field.name: getattr(results, field.name).cpu() for field in fields}))
            done += len(labels)
            if on_batch is not None:
                on_batch(done)
    except Exception as error:
        failure = error
    finally:
        for module, mode in modes.items():
            module.training = mode
    try:
        agree_on(failure, ranks)
    finally:
        del failure
    ranks.sum(counts.sums)
    # A rank without images does not know the number of classes.
    counts.classes = int(ranks.max(counts.classes))
    return counts.accuracy()


def agree_on(failure: Exception | None, ranks: Ranks) -> None:
    """Raise an error on every rank if one failed, so that no rank waits for it; every rank must call this function.

    Args:
        failure: This rank's error; None for success.
        ranks: This process.

    Raises:
        Exception: `failure`.
        EvaluationError: Another rank failed.
        torch.OutOfMemoryError: Another rank ran out of memory.
    """
    worst = ranks.max(0 if failure is None else 1 if is_out_of_memory(failure) else 2)
    try:
        if failure is not None and (worst == 2) != is_out_of_memory(failure):
            raise failure
        if worst == 1:
            raise torch.OutOfMemoryError("out of memory on another rank")
        if worst:
            raise EvaluationError("another rank failed; its message says why") from failure
    finally:
        # The error refers to this frame. Break the reference cycle, which would keep the failed batch in memory.
        del failure


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
    """Compute logits in evaluation mode; the model's training mode is restored.

    Args:
        model: Maps (N, 3, img_size, img_size) to (N, classes).
        images: (N, 3, H, W), uint8.
        normalize: Maps uint8 images to model input.
        img_size: Image side in pixels; images are resized as timm's evaluation transforms do.
        interpolation: Filter of that resize.
        batch_size: Images per batch.

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
    """Compute logits of a timm model with the preprocessing in its configuration.

    Args:
        model: A timm model whose configuration has square images, a `crop_pct` of 1, and a bilinear or bicubic resize.
            Its weights are converted to the channels-last format.
        images: (N, 3, H, W), uint8, square.
        batch_size: Images per batch.

    Returns:
        (N, classes), float32, on the CPU.

    Raises:
        ValueError: The images or the configuration do not meet these requirements.
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
