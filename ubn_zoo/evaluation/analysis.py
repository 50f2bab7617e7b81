"""Measure feature condensation of a named model on a folder of images, or read it from the folders of runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.metrics import LayerSimilarity, read_similarity
from ubn_zoo.layers import convert_state_dict
from ubn_zoo.models import read_checkpoint

__all__ = ["held_out_images", "load_model", "read_runs"]


def load_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model with pretrained weights or weights from a file; the file sets the number of classes.

    Args:
        name: timm name of the model, with or without a tag; also ``local-dir:FOLDER`` and ``hf-hub:NAME``.
        checkpoint: Weights to use instead of the pretrained ones; BatchNorm weights are converted for a UBN model.
        settings: Additional arguments of ``timm.create_model``.

    Raises:
        EvaluationError: The model does not exist, or the weights do not match it.
    """
    try:
        model: Any = timm.create_model(name, pretrained=checkpoint is None, **(settings or {}))
        if checkpoint is not None:
            state = convert_state_dict(read_checkpoint(Path(checkpoint)), model)
            head = state.get(f"{model.pretrained_cfg.get('classifier')}.weight")
            if head is not None and len(head) != model.num_classes:
                model.reset_classifier(len(head))
            model.load_state_dict(state)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise EvaluationError(f"{name}: {error}") from error
    return cast(nn.Module, model)


def held_out_images(
    model: nn.Module,
    data_dir: str | os.PathLike[str],
    *,
    images: int = 256,
    batch_size: int = 64,
    img_size: int | None = None,
) -> Iterator[Tensor]:
    """Load batches of held-out images with the preprocessing of a timm model.

    Args:
        model: A timm model.
        data_dir: Image folder with ``validation/``, ``val/`` or ``test/``.
        images: Number of images; the same random sample in every call.
        batch_size: Images in a batch.
        img_size: Side in pixels; None for the model's.

    Yields:
        (N, 3, H, W) float32 on the CPU.

    Raises:
        FileNotFoundError: There is no folder of held-out images.
    """
    size = {} if img_size is None else {"input_size": (3, img_size, img_size)}
    transform = create_transform(**resolve_model_data_config(model, args=size))
    folder = Path(data_dir) / find_eval_split(data_dir)
    data = create_dataset("", root=str(folder), search_split=False, transform=transform)
    # A folder is sorted by class, so its first images, or consecutive ones, are more similar than a random sample.
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images].tolist()
    for batch, _ in DataLoader(Subset(data, chosen), batch_size=batch_size):
        yield batch


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Sequence[LayerSimilarity]]:
    """Read the similarity that runs recorded; keys are the parts of their paths that differ.

    Args:
        folders: Folders of runs, each with ``similarity.csv``.
    """
    paths = [Path(folder).resolve() for folder in folders]
    common = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent
    return {str(path.relative_to(common)): read_similarity(path / "similarity.csv") for path in paths}
