"""One call from a model and a folder of images to the model's accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ubn_zoo.evaluation.accuracy import (
    Accuracy,
    append_result,
    feed_of,
    measure,
    open_images,
    result_row,
)
from ubn_zoo.evaluation.subjects import Subject, load_subject
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.provenance import device_name, source_commit

__all__ = ["evaluate"]


def evaluate(
    model: str | os.PathLike[str] | nn.Module | Subject,
    data_dir: str | os.PathLike[str],
    *,
    ranks: Ranks | None = None,
    batch_size: int = 256,
    amp: torch.dtype | None = None,
    csv: str | os.PathLike[str] | None = None,
    allow_class_mismatch: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
    **data: Any,
) -> Accuracy:
    """Measure a model's accuracy on held-out images, prepared as the model's own configuration says.

    Args:
        model: A model of timm; its name and tag, such as ``resnet50_ubn.bn_a1_in1k``; the folder of a run; or
            a `Subject`, such as an architecture with a checkpoint. It is moved to the device of `ranks`.
        data_dir: Folder of the data.
        ranks: This process; by default alone on the CPU.
        batch_size: Images per batch, on each rank.
        amp: Autocast's dtype; None for the model's own precision.
        csv: Results file that gets a row.
        allow_class_mismatch: As for `open_images`.
        on_batch: Called after every batch with the images done and their number, where the number is known.
        **data: ``img_size`` and ``crop_pct`` override the model's configuration; ``dataset``, ``test_split``,
            ``test_samples``, ``input_key``, ``target_key`` and ``workers`` are those of a recipe.

    Returns:
        The accuracy, the same on every rank.

    Raises:
        EvaluationError: The model cannot be loaded, or the images do not fit it.
        ClassMismatchError: The data has classes that the model does not name, or the model has no names.
        DataError: The images cannot be used.
    """
    place = ranks or Ranks()
    subject = load_subject(model)
    feed = feed_of(subject, **data)
    images = open_images(
        subject, feed, data_dir, place, batch_size=batch_size, allow_class_mismatch=allow_class_mismatch
    )
    total = images.images

    def show(done: int) -> None:
        if on_batch is not None and total is not None:
            on_batch(min(done * place.count, total), total)

    placed = subject.model.to(place.device).to(memory_format=torch.channels_last)
    found = measure(placed, images, place, amp=amp, on_batch=show)
    if csv is not None and place.first:
        row = result_row(
            subject,
            feed,
            found,
            data=images.fingerprint,
            amp=None if amp is None else str(amp).removeprefix("torch."),
            commit=source_commit(),
            device=device_name(place.device),
            torch=torch.__version__,
        )
        append_result(csv, row)
    return found
