"""Predict the classes of any number of image files with bounded memory."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from ubn_zoo.data.folders import EXTENSIONS, name_order
from ubn_zoo.data.images import open_image
from ubn_zoo.errors import DataError, EvaluationError
from ubn_zoo.evaluation.prediction_files import (
    SHEET_IMAGES,
    THUMBNAIL,
    ClassProbability,
    Prediction,
    open_prediction_files,
)
from ubn_zoo.evaluation.subjects import Subject, load_subject
from ubn_zoo.utils.distributed import joined

__all__ = ["ClassNames", "Prediction", "class_names", "find_files", "predict", "predict_stream"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_SUFFIXES = (*EXTENSIONS, ".avif", ".gif", ".jfif", ".tif", ".tiff")
_DECODERS = 4  # threads, because Pillow releases the GIL while decoding


@dataclasses.dataclass(frozen=True, slots=True)
class ClassNames:
    """Names of a model's classes.

    Attributes:
        names: Names in the order of the model's outputs.
        source: Description of where the names come from.
    """

    names: tuple[str, ...]
    source: str


def predict(
    model: str | os.PathLike[str] | nn.Module | Subject,
    images: Paths,
    *,
    top_k: int = 5,
    output: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    on_batch: Callable[[int, int], None] | None = None,
    on_skip: Callable[[str, str], None] | None = None,
) -> list[Prediction]:
    """Predict the classes of images, with the preprocessing in the model's configuration.

    `predict_stream` yields one prediction at a time, for more predictions than fit in memory.

    Args:
        model: A timm model, or a name that `load_subject` accepts: a timm, ``hf-hub:`` or ``local-dir:`` name, the
            folder of a run, or a checkpoint in it. The model is moved to `device`, and its training mode is restored.
        images: Image files and folders. Folders are searched recursively, in natural order of names.
        top_k: Classes per image; all of them if the model has fewer.
        output: Table to write, ``.csv``, ``.json`` or ``.parquet``.
        picture: Contact sheet to write, with the first 100 images, ``.png``.
        features: Embeddings to write, ``.safetensors``: the pooled features before the classifier.
        batch_size: Images per batch.
        device: ``auto`` (the accelerator if there is one), or a torch device name.
        on_batch: Called after every batch with the number of images done and the total.
        on_skip: Called with the path and the reason for every unreadable image; by default, an unreadable image raises
            an error.

    Returns:
        One prediction per readable image, in order.

    Raises:
        DataError: An image cannot be read and `on_skip` is None, or no image can be read.
        EvaluationError: The model cannot be loaded or predicts no classes, or an argument is not valid.
        MissingPackageError: `output` is ``.parquet``, and pyarrow is not installed.
    """
    predictions = []
    with open_prediction_files(output=output, picture=picture, features=features) as write:
        for found in predict_stream(
            model,
            images,
            top_k=top_k,
            features=features is not None,
            thumbnails=0 if picture is None else SHEET_IMAGES,
            batch_size=batch_size,
            device=device,
            on_batch=on_batch,
            on_skip=on_skip,
        ):
            write(found)
            predictions.append(dataclasses.replace(found, features=None, thumbnail=None))
    return predictions


def predict_stream(
    model: str | os.PathLike[str] | nn.Module | Subject,
    images: Paths,
    *,
    top_k: int = 5,
    features: bool = False,
    thumbnails: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    on_batch: Callable[[int, int], None] | None = None,
    on_skip: Callable[[str, str], None] | None = None,
) -> Iterator[Prediction]:
    """Yield predictions for images one at a time, with at most two batches in memory.

    Args:
        model: As for `predict`.
        images: As for `predict`.
        top_k: As for `predict`.
        features: Whether predictions include the pooled features before the classifier.
        thumbnails: Number of predictions, from the first, that include a thumbnail of the image.
        batch_size: As for `predict`.
        device: As for `predict`.
        on_batch: As for `predict`.
        on_skip: As for `predict`.

    Yields:
        One prediction per readable image, in order.

    Raises:
        DataError: As for `predict`.
        EvaluationError: As for `predict`.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise EvaluationError(f"`{name}`: received {value}; valid: at least 1")
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    skip = _raise_data_error if on_skip is None else on_skip
    # Walk the files twice instead of keeping a large list; the first pass only counts them for the progress.
    total = sum(1 for _ in find_files(paths, lambda path, reason: None))
    if not total:
        raise DataError(
            f"{', '.join(os.fspath(path) for path in paths) or 'nothing'}: no images found; valid: image files, or "
            f"folders with files that end in {', '.join(_SUFFIXES)}"
        )
    subject = load_subject(model)
    network, names = subject.model, class_names(subject).names
    if not names:
        raise EvaluationError(f"{subject.name} predicts no classes; valid: a model with a classifier")
    if features and not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
        raise EvaluationError(f"`features`: {subject.name} has no forward_features and forward_head as in timm models")
    config = timm.data.resolve_data_config(model=network, use_test_size=True)
    if config["input_size"][0] not in (1, 3):
        raise EvaluationError(f"{subject.name} takes {config['input_size'][0]} channels; valid: 3 (RGB) or 1 (gray)")
    transform = timm.data.create_transform(**config)
    gray = config["input_size"][0] == 1

    def load(path: str, thumbnail: bool) -> tuple[Tensor, Image.Image | None] | DataError:
        try:
            image = open_image(path)
        except DataError as error:
            return error
        prepared = cast(Tensor, transform(image.convert("L") if gray else image))
        if not thumbnail:
            return prepared, None
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return prepared, image

    done = readable = 0
    with joined(device) as ranks, ThreadPoolExecutor(_DECODERS) as pool, _evaluating(network):
        if ranks.count > 1:
            raise EvaluationError(f"received {ranks.count} processes; valid: one, without torchrun")
        network.to(ranks.device)
        for batch in _ahead(pool, load, find_files(paths, skip), batch_size, thumbnails):
            files, inputs, pictures = [], [], []
            for path, future in batch:
                loaded = future.result()
                if isinstance(loaded, DataError):
                    skip(path, str(loaded))
                    continue
                files.append(path)
                inputs.append(loaded[0])
                pictures.append(loaded[1])
            done += len(batch)
            readable += len(files)
            if files:
                tensor = torch.stack(inputs).to(ranks.device)
                probabilities, pooled = _run(network, tensor, features)
                if not bool(probabilities.isfinite().all()):
                    row = int((~probabilities.isfinite().all(1)).nonzero()[0])
                    raise EvaluationError(f"{subject.name} gives NaN or infinity for {files[row]}; check its weights")
                best = probabilities.topk(min(top_k, probabilities.shape[1]), 1)
                for row, (path, picture) in enumerate(zip(files, pictures, strict=True)):
                    pairs = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
                    yield Prediction(
                        path,
                        tuple(ClassProbability(index, names[index], value) for index, value in pairs),
                        None if pooled is None else pooled[row],
                        picture,
                    )
            if on_batch is not None:
                on_batch(min(done, total), total)
    if not readable:
        raise DataError(f"none of the {done} images can be read")


def class_names(subject: Subject) -> ClassNames:
    """Class names: the model's own, those of an ImageNet variant of the same size, or ``class 0``, ``class 1``, ...

    Args:
        subject: The model.
    """
    count = int(cast(int, subject.model.num_classes))
    if len(subject.classes) == count:
        config = cast(Any, subject.model.pretrained_cfg)
        described = config.get("label_descriptions") or {}
        return ClassNames(
            tuple(described.get(name, name) if isinstance(described, dict) else name for name in subject.classes),
            "the model's own",
        )
    if count == 1000:
        info = timm.data.ImageNetInfo("imagenet-1k")
        return ClassNames(
            tuple(info.index_to_description(index) for index in range(count)), "ImageNet-1k, because the model has 1000"
        )
    return ClassNames(
        tuple(f"class {index}" for index in range(count)),
        "unknown: the model has no class names, so classes are numbered",
    )


def find_files(paths: Iterable[str | os.PathLike[str]], on_skip: Callable[[str, str], None]) -> Iterator[str]:
    """Walk files and folders: files in the given order, folders recursively in natural order of names.

    In folders, hidden files and folders and files without an image extension are skipped. Links to folders are
    followed, and each folder is visited once.

    Args:
        paths: Files and folders.
        on_skip: Called with the path and the reason for paths that do not exist and folders that cannot be read.

    Yields:
        Paths of files.
    """
    for given in paths:
        path = os.fspath(given)
        if Path(path).is_dir():
            yield from _walk(path, on_skip, set())
        elif Path(path).exists():
            yield path
        else:
            on_skip(path, f"{path}: no such file or folder")


def _walk(folder: str, on_skip: Callable[[str, str], None], seen: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        names = name_order([entry.name for entry in Path(folder).iterdir() if not entry.name.startswith(".")])
    except OSError as error:
        on_skip(folder, f"{folder}: {error.strerror}")
        return
    for name in names:
        path = Path(folder, name)
        if path.is_dir():
            yield from _walk(str(path), on_skip, seen)
        elif name.lower().endswith(_SUFFIXES):
            yield str(path)


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[str, bool], Any], files: Iterator[str], size: int, thumbnails: int
) -> Iterator[list[tuple[str, Future[Any]]]]:
    """Load batches of files, each one while the model runs on the previous one."""
    numbered = enumerate(files)
    waiting: collections.deque[list[tuple[str, Future[Any]]]] = collections.deque()
    while part := list(itertools.islice(numbered, size)):
        waiting.append([(path, pool.submit(load, path, number < thumbnails)) for number, path in part])
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting


@torch.inference_mode()
def _run(network: nn.Module, images: Tensor, features: bool) -> tuple[Tensor, Tensor | None]:
    """Compute probabilities and pooled features, float32, on the CPU."""
    if not features:
        return network(images).float().softmax(1).cpu(), None
    model = cast(Any, network)
    maps = model.forward_features(images)
    pooled = model.forward_head(maps, pre_logits=True)
    if pooled.ndim == 4:
        pooled = pooled.mean((2, 3))
    return model.forward_head(maps).float().softmax(1).cpu(), pooled.float().cpu()


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the duration of a ``with`` block."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _raise_data_error(path: str, reason: str) -> None:
    raise DataError(reason)
