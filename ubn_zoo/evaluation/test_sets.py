"""Evaluation images: preprocessing, and the mapping from their classes to model outputs.

For ImageNet test sets, timm provides the class names, the masks of ImageNet-A and -R and the ReaL labels; the user
provides the images.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import timm.data
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from ubn_zoo.data.folders import EXTENSIONS
from ubn_zoo.data.loaders import EvalBatches, open_eval
from ubn_zoo.data.readers import Labels, labels_as_trained
from ubn_zoo.data.settings import Feed
from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.errors import ClassMismatchError, DataError, EvaluationError
from ubn_zoo.evaluation.subjects import Subject
from ubn_zoo.utils.distributed import Ranks

__all__ = ["KNOWN_SETS", "ClassLabels", "KnownSet", "feed_of", "held_out_split", "open_images", "with_real_labels"]

_HINT = "if the model's outputs are these classes in this order, pass `allow_class_mismatch=True`"
_RESIZES = ("bilinear", "bicubic")
_FILE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")
_WORDNET = re.compile(r"n\d{8}")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class KnownSet:
    """A published test set for ImageNet-1k models.

    Attributes:
        about: Description and source.
        classes: Number of classes.
        numbered: Whether folder names are ImageNet-1k class indices instead of WordNet ids.
        real: Whether to use the ReaL labels.
        mask: timm's file that lists the classes, if the folder has more; None for all classes of the folder.
    """

    about: str
    classes: int
    numbered: bool = False
    real: bool = False
    mask: str | None = None


KNOWN_SETS: Mapping[str, KnownSet] = MappingProxyType(
    {
        "imagenet": KnownSet("ImageNet-1k validation, 50,000 images (Russakovsky et al., arXiv 1409.0575)", 1000),
        "imagenet-real": KnownSet(
            "ImageNet-1k validation with reassessed labels (Beyer et al., arXiv 2006.07159)", 1000, real=True
        ),
        "imagenetv2-matched-frequency": KnownSet(
            "ImageNet-V2, 10,000 images (Recht et al., arXiv 1902.10811)", 1000, numbered=True
        ),
        "imagenet-a": KnownSet("ImageNet-A, 7,500 images of 200 classes (Hendrycks et al., arXiv 1907.07174)", 200),
        "imagenet-a-clean": KnownSet(
            "ImageNet-1k validation images of ImageNet-A's classes", 200, mask="imagenet_a_indices.txt"
        ),
        "imagenet-r": KnownSet("ImageNet-R, 30,000 images of 200 classes (Hendrycks et al., arXiv 2006.16241)", 200),
        "imagenet-r-clean": KnownSet(
            "ImageNet-1k validation images of ImageNet-R's classes", 200, mask="imagenet_r_indices.txt"
        ),
        "sketch": KnownSet("ImageNet-Sketch, 50,889 images (Wang et al., arXiv 1905.13549)", 1000),
    }
)


@functools.lru_cache(maxsize=2)
def _imagenet(subset: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """WordNet ids of an ImageNet subset in label order, and their descriptions."""
    info: Any = ImageNetInfo(subset)
    return tuple(info.label_names()), info.label_descriptions(as_dict=True)


class ClassLabels:
    """Callable that maps the class names of images to model outputs.

    Names are looked up in the class map or among the model's class names and descriptions. For ImageNet models without
    names, WordNet ids and descriptions (``tench``) are used. For other models without names, numbers are output
    indices.

    Args:
        subject: The model.
        num_classes: Number of outputs of the model.
        where: Name of the images in error messages.
        known: Test set, if it is a known one.
        class_map: File with one class name per line, in the order of the outputs.
        valid_labels: File with the classes to use, one name or index per line; images of other classes are skipped.
        allow_class_mismatch: Whether to map the sorted classes to the model's outputs in order if the names differ or
            the model has no names.

    Attributes:
        labels: Output by class name, set by the call; None for skipped classes. Empty if the images have no class
            names.
        rule: Description of how the classes were matched.
        doubt: Reason why the model may have different classes; None if all classes were found.
    """

    def __init__(
        self,
        subject: Subject,
        num_classes: int,
        where: str,
        *,
        known: KnownSet | None = None,
        class_map: str | os.PathLike[str] | None = None,
        valid_labels: str | os.PathLike[str] | None = None,
        allow_class_mismatch: bool = False,
    ) -> None:
        self._subject, self._count, self._where = subject, num_classes, where
        self._known, self._class_map, self._valid_labels = known, class_map, valid_labels
        self._allowed = allow_class_mismatch
        self.labels: Labels = {}
        self.doubt: str | None = None
        self.rule = "by number, because the data has no class names"

    def __call__(self, found: Sequence[str]) -> Labels:
        """Label the classes of the images.

        Raises:
            ClassMismatchError: The model does not name a class, or has no names.
            EvaluationError: The classes do not match the test set or the model, or a file cannot be used.
        """
        known = self._known
        if not found:
            if self._valid_labels is not None or known is not None:
                raise EvaluationError(f"{self._where}: received images without class names; valid: dataset folder")
            return {}
        labels: dict[str, int | None] = dict(self._match(found))
        valid = self._valid()
        if valid is not None:
            labels = {name: label if label in valid else None for name, label in labels.items()}
        used = {label for label in labels.values() if label is not None}
        if not used:
            raise EvaluationError(f"{self._where}: none of its classes is in {self._valid_labels}")
        if known is not None and len(used) != known.classes:
            raise EvaluationError(
                f"{self._where}: received {len(used)} classes; valid: {known.classes}, {known.about}; for other "
                "images, give `test_set` another name"
            )
        self.labels = labels
        return labels

    @property
    def outputs(self) -> tuple[int, ...]:
        """Outputs that have images, in ascending order; available after the call."""
        return tuple(sorted({label for label in self.labels.values() if label is not None}))

    @property
    def names(self) -> Mapping[int, str]:
        """Names of outputs: the model's own, ImageNet's, or those of the images' classes."""
        return {
            **{label: name for name, label in self.labels.items() if label is not None},
            **dict(enumerate(self._names())),
        }

    def places_of_imagenet(self) -> tuple[int, ...]:
        """Output for each ImageNet-1k class.

        Raises:
            EvaluationError: The model lacks some of them.
        """
        names, _ = _imagenet("imagenet-1k")
        mine = {name: place for place, name in enumerate(self._names())}
        if not set(names) <= set(mine):
            raise EvaluationError(
                f"{self._subject.name}: received a model whose {self._count} classes are not ImageNet's; valid for "
                "this test set: a model of ImageNet's classes, by WordNet ids"
            )
        return tuple(mine[name] for name in names)

    def _names(self) -> tuple[str, ...]:
        subset = infer_imagenet_subset({"num_classes": self._count})
        return self._subject.classes or (() if subset is None else _imagenet(subset)[0])

    def _match(self, found: Sequence[str]) -> Mapping[str, int]:
        if self._class_map is not None:
            self.rule = f"by {os.fspath(self._class_map)}"
            return self._listed(found)
        if self._known is not None and self._known.numbered and all(map(str.isdigit, found)):
            self.rule = "by their places in ImageNet-1k"
            places = self.places_of_imagenet()
            if max(map(int, found)) < len(places):
                return {name: places[int(name)] for name in found}
        names = self._names()
        exact = {name: place for place, name in enumerate(names)}
        if set(found) <= set(exact):
            self.rule = "by name"
            return {name: exact[name] for name in found}
        described = self._described(names)
        if all(_plain(name) in described for name in found):
            self.rule = "by description"
            return {name: described[_plain(name)] for name in found}
        if not self._subject.classes and all(name.isdigit() and int(name) < self._count for name in found):
            self.rule = "by number"
            return {name: int(name) for name in found}
        return self._in_order(found, names)

    def _in_order(self, found: Sequence[str], names: Sequence[str]) -> Mapping[str, int]:
        shown = f"{', '.join(found[:10])}{', ...' if len(found) > 10 else ''}"
        doubt = f"{self._subject.name} has no names for its {self._count} classes"
        if names:
            try:
                labels_as_trained(names, self._where)(found)
            except ClassMismatchError as error:
                if not self._allowed:
                    raise ClassMismatchError(f"{error}; {_HINT}, or give a `class_map`") from None
                doubt = str(error)
        if len(found) != self._count:
            raise EvaluationError(
                f"{self._where}: received images of {len(found)} classes ({shown}); valid: {self._count}, the outputs "
                f"of {self._subject.name}, in its order, or a `class_map` with their names"
            )
        if not self._allowed:
            raise ClassMismatchError(f"{doubt}, the data's are {shown}; {_HINT}")
        self.doubt = f"{doubt}; its outputs are taken to be {shown}"
        self.rule = "in the order of their names"
        return {name: place for place, name in enumerate(found)}

    def _described(self, names: Sequence[str]) -> Mapping[str, int]:
        """Outputs by class description; only unique descriptions."""
        config = cast(Mapping[str, Any], self._subject.model.pretrained_cfg)
        given = config.get("label_descriptions")
        texts: Mapping[str, str] = given if isinstance(given, dict) else {}
        if names and not texts and all(map(_WORDNET.fullmatch, names)):
            _, texts = _imagenet(infer_imagenet_subset({"num_classes": len(names)}) or "imagenet-22k")
        places: dict[str, set[int]] = {}
        for place, name in enumerate(names):
            for text in (texts.get(name, ""), *texts.get(name, "").split(",")):
                places.setdefault(_plain(text), set()).add(place)
        return {text: next(iter(found)) for text, found in places.items() if text and len(found) == 1}

    def _listed(self, found: Sequence[str]) -> Mapping[str, int]:
        lines = _lines(cast("str", self._class_map))
        listed = {name: place for place, name in enumerate(lines)}
        missing = sorted(set(found) - set(listed))
        if missing or len(lines) > self._count:
            wrong = f"no {missing[0]!r}, a class of {self._where}" if missing else f"{len(lines)} names"
            raise EvaluationError(
                f"{self._class_map} has {wrong}; valid: one name per line for each of the {self._count} outputs of "
                f"{self._subject.name}, in their order"
            )
        return {name: listed[name] for name in found}

    def _valid(self) -> set[int] | None:
        mask = None if self._known is None else self._known.mask
        if self._valid_labels is None and mask is None:
            return None
        if self._valid_labels is None:
            places = self.places_of_imagenet()
            return {places[int(line)] for line in _timm_file(cast(str, mask)).decode().split()}
        by_name = {name: place for place, name in enumerate(self._names())}
        valid = set()
        for line in _lines(self._valid_labels):
            place = int(line) if line.isdigit() else by_name.get(line, -1)
            if not 0 <= place < self._count:
                raise EvaluationError(
                    f"{os.fspath(self._valid_labels)}: received {line!r}; valid: 0 to {self._count - 1}, or the name "
                    f"of a class of {self._subject.name}"
                )
            valid.add(place)
        return valid


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").lower().split())


def _lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{os.fspath(path)}: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _timm_file(name: str) -> bytes:
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    if content is None:
        raise EvaluationError(f"timm has no {name}; give the file by `valid_labels` or `real_labels`")
    return content


def feed_of(
    subject: Subject,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dataset: str = "folder",
    **data: Any,
) -> Feed:
    """Get the preprocessing in a model's configuration, at its test size if it has one, as timm's validation does.

    Args:
        subject: The model.
        img_size: Image side in pixels, instead of the configuration's.
        crop_pct: Side of the crop relative to the resized image, instead of the configuration's.
        crop_mode: timm's crop mode: ``center``, ``squash`` or ``border``, instead of the configuration's.
        interpolation: Resize filter, such as ``bicubic``, instead of the configuration's.
        mean: Mean of each channel, of values scaled to 0..1, instead of the configuration's.
        std: Standard deviation of each channel, instead of the configuration's.
        dataset: Kind of data, as in a recipe.
        **data: Other fields of `Feed` that select images.

    Raises:
        EvaluationError: The model's images are not square, or images in memory do not support the preprocessing.
    """
    given: dict[str, Any] = {
        "img_size": img_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    given |= {"mean": None if mean is None else tuple(mean), "std": None if std is None else tuple(std)}
    config = timm.data.resolve_data_config(given, model=subject.model, use_test_size=True)
    _, height, width = config["input_size"]
    if height != width:
        raise EvaluationError(f"{subject.name} takes {width}x{height} pixels; valid: square images; set img_size")
    if dataset == "memory" and (config["crop_pct"] != 1.0 or config["interpolation"] not in _RESIZES):
        raise EvaluationError(
            f"dataset memory: received crop_pct {config['crop_pct']}, {config['interpolation']}; valid: crop_pct 1.0, "
            f"{' or '.join(_RESIZES)}; dataset folder supports all"
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


def held_out_split(data_dir: str | os.PathLike[str], dataset: str = "folder") -> str:
    """Name of the held-out split: ``validation``, ``val`` or ``test``, or ``.`` for a folder of classes without splits.

    Args:
        data_dir: Folder or URL of the data.
        dataset: Kind of data, as in a recipe.

    Raises:
        DataError: The data has none of these.
    """
    try:
        return find_eval_split(data_dir, dataset)
    except DataError:
        root = Path(data_dir)
        if dataset not in ("folder", "memory") or not root.is_dir():
            raise
        # The published test sets are folders of classes. A folder of other splits has images two levels deeper.
        classes = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        if not classes or not any(file.suffix.lower() in EXTENSIONS for file in classes[0].iterdir()):
            raise
        return "."


def open_images(
    subject: Subject,
    feed: Feed,
    data_dir: str | os.PathLike[str],
    ranks: Ranks,
    *,
    batch_size: int = 256,
    labels: ClassLabels | None = None,
    allow_class_mismatch: bool = False,
) -> EvalBatches:
    """Open the images to evaluate a model on.

    Args:
        subject: The model.
        feed: Selection and preprocessing of the images.
        data_dir: As for `open_eval`.
        ranks: This process.
        batch_size: Images at a time, on each rank.
        labels: Maps classes to outputs; by default `ClassLabels` of the model.
        allow_class_mismatch: As for `ClassLabels`, if `labels` is None; a warning is logged.

    Raises:
        ClassMismatchError: The data has classes that the model does not name, or the model has no names.
        DataError: The images cannot be used.
        EvaluationError: Classes are matched by order, and data and model have different numbers of them.
    """
    if labels is None:
        labels = ClassLabels(subject, feed.num_classes, os.fspath(data_dir), allow_class_mismatch=allow_class_mismatch)
    batches = open_eval(feed, data_dir, ranks, labels, batch_size=batch_size, crop_mode=feed.crop_mode)
    if labels.doubt is not None and ranks.first:
        _logger.warning("%s", labels.doubt)
    return batches


def with_real_labels(
    batches: EvalBatches,
    labels: ClassLabels,
    num_classes: int,
    ranks: Ranks,
    file: str | os.PathLike[str] | None,
    outputs: Collection[int] | None = None,
) -> EvalBatches:
    """Replace the labels of ImageNet validation images with ReaL labels (Beyer et al., arXiv 2006.07159).

    Images without a ReaL label do not count.

    Args:
        batches: Images, whose files are named ``ILSVRC2012_val_00000001.JPEG`` and so on.
        labels: Maps classes to outputs.
        num_classes: Outputs of the model.
        ranks: This process; every rank must call it.
        file: The published ``real.json``; None for timm's copy.
        outputs: Outputs to compare; labels of other outputs are ignored. None for all.

    Raises:
        EvaluationError: The file has another format, or an image has another name.
    """
    content = _timm_file("imagenet_real_labels.json") if file is None else Path(file).read_bytes()
    try:
        listed = [[int(label) for label in entry] for entry in json.loads(content)]
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{file}: not a file of ReaL labels: {error}; valid: a list of lists of labels") from None
    places, outputs = labels.places_of_imagenet(), None if outputs is None else set(outputs)
    accepted = []
    for name in batches.files:
        match = _FILE_NUMBER.search(name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(listed):
            raise EvaluationError(f"{name}: valid for ReaL labels: ILSVRC2012_val_00000001.JPEG to {len(listed):08d}")
        if not all(0 <= label < len(places) for label in listed[number - 1]):
            raise EvaluationError(f"{file}, image {number}: received {listed[number - 1]}; valid: labels from 0 to 999")
        right = (places[label] for label in listed[number - 1])
        accepted.append([place for place in right if outputs is None or place in outputs])
    if batches.images is None:
        raise EvaluationError("received a stream; valid for ReaL labels: dataset folder")
    return _RealLabels(batches, accepted, num_classes, ranks, hashlib.sha256(content).hexdigest())


class _RealLabels:
    """Images with sets of labels."""

    def __init__(
        self, batches: EvalBatches, accepted: list[list[int]], num_classes: int, ranks: Ranks, digest: str
    ) -> None:
        self._batches, self._accepted, self._count = batches, accepted, num_classes
        self.images = int(ranks.sum(torch.tensor(sum(map(bool, accepted)), device=ranks.device)))
        self.classes = batches.classes
        self.files = tuple(name for name, labels in zip(batches.files, accepted, strict=True) if labels)
        self.fingerprint = hashlib.sha256(f"{batches.fingerprint} {digest}".encode()).hexdigest()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for images, _ in self._batches:
            part = self._accepted[start : start + len(images)]
            start += len(images)
            kept = [place for place, labels in enumerate(part) if labels]
            right = torch.zeros(len(kept), self._count, dtype=torch.bool)
            for row, place in enumerate(kept):
                right[row, part[place]] = True
            if kept:
                yield images[torch.tensor(kept, device=images.device)], right.to(images.device)

    def probe(self, count: int) -> Tensor:
        return self._batches.probe(count)
