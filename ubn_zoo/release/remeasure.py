"""Evaluate the files of a publication before they are uploaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ubn_zoo.evaluation.accuracy import Accuracy, measure
from ubn_zoo.evaluation.subjects import load_subject
from ubn_zoo.evaluation.test_sets import feed_of, open_images
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.utils.distributed import Ranks

__all__ = ["agrees", "measure_files"]

_POINTS = 0.1
_IMAGES = 2


def measure_files(
    contents: Mapping[str, bytes], data_dir: str | os.PathLike[str], recipe: Recipe | None, split: str | None
) -> Accuracy:
    """Evaluate files exactly as users will after downloading them.

    Args:
        contents: ``config.json`` and ``model.safetensors``.
        data_dir: Folder of the data.
        recipe: The recipe of the run, which says how to read the data; None for an image folder.
        split: The split; None for the first held-out one.

    Raises:
        DataError: The data cannot be used.
        EvaluationError: Model and data do not match.
    """
    keys = ("dataset", "test_samples", "input_key", "target_key", "workers")
    data = {} if recipe is None else {key: getattr(recipe, key) for key in keys}
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).write_bytes(contents[name])
        subject = load_subject(run=folder)
        feed = feed_of(subject, test_split=split, **data)
        # Without class names in the checkpoint, outputs and classes can only be matched by order.
        images = open_images(subject, feed, data_dir, ranks, allow_class_mismatch=not subject.classes)
        amp = None if recipe is None or recipe.amp is None else getattr(torch, recipe.amp)
        return measure(subject.model.to(memory_format=torch.channels_last), images, ranks, amp=amp)


def agrees(recorded: float, found: Accuracy) -> bool:
    """Whether a second measurement confirms a recorded top-1 accuracy, in percent.

    Rounding differs between processors and may change a few predictions, so 0.1 points or two images are tolerated.

    Args:
        recorded: The accuracy that the run recorded.
        found: The second measurement.
    """
    return abs(recorded - found.top1) <= max(_POINTS, 100.0 * _IMAGES / found.images) + 1e-9
