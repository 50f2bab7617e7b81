"""One harness for all models: trains for some steps, then evaluates with the statistics that training left, and with
statistics re-estimated from the training pictures.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.downstream.data import load
from research.downstream.models import create
from ubn_zoo.interop import update_statistics, weight_decay_groups

Sample = tuple[Tensor, dict[str, Tensor]]


def _batches(samples: list[Sample], size: int, generator: torch.Generator) -> Iterator[list[Sample]]:
    """Shuffled batches without end, half of the pictures mirrored; the last, smaller batch of an epoch is left out."""
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [_mirrored(samples[i], generator) for i in order[start : start + size]]


def _mirrored(sample: Sample, generator: torch.Generator) -> Sample:
    image, target = sample
    if torch.rand((), generator=generator) < 0.5:
        return sample
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def _images(samples: list[Sample]) -> Tensor:
    """A normalized batch, by the mean and standard deviation that torchvision's detectors use by default."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack([image for image, _ in samples]) - mean[:, None, None]) / std[:, None, None]


def _objects(samples: list[Sample]) -> Tensor:
    return torch.stack([target["masks"].any(0, keepdim=True) for _, target in samples]).float()


def loss_of(model: nn.Module, samples: list[Sample]) -> Tensor:
    """The training loss: the sum of a detector's losses, or cross-entropy and Dice of a mask."""
    if hasattr(model, "backbone"):
        images, targets = (list(part) for part in zip(*samples, strict=True))
        return sum(model(images, targets).values(), torch.zeros(()))
    logits, objects = model(_images(samples)), _objects(samples)
    overlap = (logits.sigmoid() * objects).sum()
    dice = 1 - 2 * overlap / (logits.sigmoid().sum() + objects.sum()).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, objects) + dice


def train(
    model: nn.Module, samples: list[Sample], steps: int, batch_size: int = 4, lr: float = 1e-3, seed: int = 0
) -> list[float]:
    """Trains with AdamW, warmup and a cosine schedule; returns the loss of each step."""
    warmup = max(1, min(30, steps // 5))
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.05), lr=lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        [warmup],
    )
    losses = []
    model.train()
    # Detectors sample anchors and boxes by the global generator.
    torch.manual_seed(seed)
    for batch in itertools.islice(_batches(samples, batch_size, torch.Generator().manual_seed(seed)), steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def reestimate(model: nn.Module, samples: list[Sample], batch_size: int = 16, batches: int = 4, seed: int = 0) -> None:
    """Re-estimates the statistics from pictures that are not mirrored, in larger batches than those of training."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()[: batches * batch_size]
    loader = [_images([samples[i] for i in order[at : at + batch_size]]) for at in range(0, len(order), batch_size)]
    # A detector in training mode wants targets; its norms are all in the backbone.
    update_statistics(loader, getattr(model, "backbone", model))


@torch.no_grad()
def evaluate(model: nn.Module, samples: list[Sample], batch_size: int = 8) -> dict[str, float]:
    """Figures on test pictures, in percent except for the logit.

    Detectors: COCO's `AP` and `AP50` of boxes, and `mask_AP`. Segmentation: `IoU` of all objects together, and
    `max_logit`, the largest absolute value.
    """
    model.eval()
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    if hasattr(model, "backbone"):
        return _average_precision(model, batches)
    intersection, union, largest = 0.0, 0.0, 0.0
    for batch in batches:
        logits, objects = model(_images(batch)), _objects(batch) > 0
        intersection += float(((logits > 0) & objects).sum())
        union += float(((logits > 0) | objects).sum())
        largest = max(largest, float(logits.abs().max()))
    return {"IoU": 100 * intersection / max(union, 1), "max_logit": largest}


def _average_precision(model: nn.Module, batches: list[list[Sample]]) -> dict[str, float]:
    from torchmetrics.detection import MeanAveragePrecision

    masks = getattr(getattr(model, "roi_heads", None), "mask_head", None) is not None
    metric = MeanAveragePrecision(iou_type=("bbox", "segm") if masks else "bbox")
    for batch in batches:
        images, targets = (list(part) for part in zip(*batch, strict=True))
        found = model(images)
        if masks:
            found = [{**one, "masks": one["masks"][:, 0] > 0.5} for one in found]
            targets = [{**one, "masks": one["masks"].bool()} for one in targets]
        metric.update(found, targets)
    computed = metric.compute()
    if not masks:
        return {"AP": 100 * float(computed["map"]), "AP50": 100 * float(computed["map_50"])}
    names = {"AP": "bbox_map", "AP50": "bbox_map_50", "mask_AP": "segm_map", "mask_AP50": "segm_map_50"}
    return {name: 100 * float(computed[key]) for name, key in names.items()}


def run(name: str, norm: str, folder: Path, output: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Creates, trains and evaluates a model; returns the figures, and writes them as JSON into the folder `output`.

    `settings` are `steps`, `batch_size`, `lr`, `seed`, `encoder` and `threshold`.
    """
    creation: dict[str, Any] = {key: settings[key] for key in ("encoder", "seed") if key in settings}
    if norm == "ubn" and "threshold" in settings:
        creation["threshold"] = settings["threshold"]
    samples = load(folder / "train")
    tests = load(folder / "test")
    model = create(name, norm, **creation)
    training = {key: settings[key] for key in ("steps", "batch_size", "lr", "seed") if key in settings}
    losses = train(model, samples, **training)
    tenth = max(1, len(losses) // 10)
    figures: dict[str, Any] = {
        "model": name,
        "norm": norm,
        **settings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "after_training": evaluate(model, tests),
    }
    reestimate(model, samples)
    figures["reestimated"] = evaluate(model, tests)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}_{norm}_{len(losses)}.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures
