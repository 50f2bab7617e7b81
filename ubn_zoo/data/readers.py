"""Readers with random access: folders, tar files and Hugging Face datasets.

The random augmentation of an image is seeded from the run's seed, the epoch and the image's position in the epoch. An
image that cannot be read raises an error that names its file.
"""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils import natural_key
from torch.utils.data import Dataset

from ubn_zoo.data.folders import find_images, name_order
from ubn_zoo.data.images import open_image
from ubn_zoo.data.memory import ImageSet
from ubn_zoo.data.settings import DataSource
from ubn_zoo.data.splits import hub_name, require_package, split_location
from ubn_zoo.errors import ClassMismatchError, DataError
from ubn_zoo.utils.seeds import mixed_seed, seed_everything

__all__ = [
    "Labeler",
    "Labels",
    "Samples",
    "check_label",
    "file_name",
    "labels_as_trained",
    "open_reader",
    "reader_classes",
    "reader_fingerprint",
    "relabel",
    "relabel_images",
]

# Class name to label; images of classes with label None are skipped.
Labels = Mapping[str, int | None]
# Maps the class names of the data to labels; returns None to keep the data's own labels.
Labeler = Callable[[Sequence[str]], Labels]

# Fingerprints of folders with more files than this use file names only: reading all sizes would take too long.
_SIZED_FILES = 200_000


class _FolderReader(ReaderImageFolder):
    """timm's image folder reader, with the classes and images that `find_images` lists."""

    def __init__(self, root: Path) -> None:
        classes, self.samples = find_images(root)
        self.root = str(root)
        self.class_to_idx = {name: label for label, name in enumerate(classes)}

    def relabel(self, labels: Labels) -> None:
        """Relabel the classes, and skip images of classes without a label."""
        names = list(self.class_to_idx)
        found = [(path, labels[names[label]]) for path, label in self.samples]
        self.samples = [(path, label) for path, label in found if label is not None]
        self.class_to_idx = _labeled(labels)

    def size(self, index: int) -> int:
        """Size of an image file in bytes; 0 in folders so large that reading all sizes would take too long."""
        return Path(self.samples[index][0]).stat().st_size if len(self.samples) <= _SIZED_FILES else 0


class _TarReader(ReaderImageInTar):
    """timm's tar reader, without hidden files, in an order that does not depend on the file system.

    The class of an image is the name of its folder; an image at the top level of a tar, also as ``./IMAGE``, has the
    name of the tar as its class.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        found = []
        for member, archive, inner in self.samples:
            path = PurePosixPath(member.path)
            if any(part.startswith(".") for part in path.parts):
                continue
            outer = inner.name if inner is not None else archive or ""
            label = path.parent.name or PurePosixPath(outer).stem
            if not label:
                raise ValueError(f"{member.path} is not in a class folder; valid: CLASS/{path.name}")
            found.append((outer, member.path, label, (member, archive, inner)))
        if not found:
            raise ValueError("all images are hidden files")
        # Sort by class within a tar, as in folders, so that an evenly spaced subset covers all classes.
        found.sort(key=lambda entry: (*(natural_key(entry[part]) for part in (0, 2, 1)), entry[:2]))
        self.class_to_idx = {name: label for label, name in enumerate(name_order({entry[2] for entry in found}))}
        self.samples = [entry[3] for entry in found]
        self.targets = [self.class_to_idx[entry[2]] for entry in found]

    def relabel(self, labels: Labels) -> None:
        """Relabel the classes, and skip images of classes without a label."""
        names = list(self.class_to_idx)
        found = [(sample, labels[names[old]]) for sample, old in zip(self.samples, self.targets, strict=True)]
        self.samples = [sample for sample, label in found if label is not None]
        self.targets = [label for _, label in found if label is not None]
        self.class_to_idx = _labeled(labels)

    def size(self, index: int) -> int:
        """Size of an image file in bytes."""
        return int(self.samples[index][0].size)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        member, archive, inner = self.samples[index]
        parts = [archive, None if inner is None else inner.name, member.path]
        return ":".join(([self.root] if absolute else []) + [part for part in parts if part])


class Samples(Dataset[tuple[Any, int]]):
    """Images of a reader, each augmented with its own random numbers.

    Args:
        reader: The reader.
        transform: Maps an image to the value that is collated.
        indices: Indices of the reader's images to use, in order.
        seed: The run's seed.
        classes: Number of valid labels; None accepts any label.
        exif_rotation: Whether to apply the EXIF orientation of images.
    """

    def __init__(
        self,
        reader: Any,
        transform: Any,
        indices: list[int],
        *,
        seed: int,
        classes: int | None,
        exif_rotation: bool,
    ) -> None:
        self._reader = reader
        self._transform = transform
        self._indices = indices
        self._seed = seed
        self._classes = classes
        self._exif_rotation = exif_rotation

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, item: tuple[int, int, int] | int) -> tuple[Any, int]:
        if isinstance(item, tuple):
            place, epoch, position = item
            seed_everything(mixed_seed(self._seed, epoch, position))
        else:
            place = item
        index = self._indices[place]
        name = file_name(self._reader, index, absolute=True)
        try:
            file, target = self._reader[index]
        except Exception as error:  # readers of archives and tables raise errors of many classes
            raise DataError(f"{name}: not a readable image ({error}); repair or remove it and start again") from None
        with file:
            image = open_image(file, exif_rotation=self._exif_rotation, name=name)
        return self._transform(image), check_label(target, self._classes, name)


def file_name(reader: Any, index: int, *, absolute: bool = False) -> str:
    """Name of an image: its path, or its number if it has no path."""
    name = reader.filename(index, absolute=absolute)
    return str(name) if name else f"image {index} of {getattr(reader, 'split', 'the data')}"


def check_label(target: Any, classes: int | None, name: str) -> int:
    """Check that a label is valid for the model and return it as an integer; a GPU error would not name the image.

    Raises:
        DataError: The label is not a number or is out of range.
    """
    try:
        label = int(target)
    except (TypeError, ValueError):
        label = -1
    if label < 0 or (classes is not None and label >= classes):
        valid = "a number from 0" if classes is None else f"0 to {classes - 1}"
        raise DataError(f"{name}: received label {target!r}; valid: {valid}; see num_classes and target_key")
    return label


def open_reader(source: DataSource, split: str) -> Any:
    """Open one split with random access.

    Raises:
        DataError: The split does not exist or has no images, or a required package is missing.
    """
    root = source.root
    if source.kind == "hfds":
        require_package("hfds")
        name, cache = hub_name(source.name, root)
        try:
            dataset: Any = create_dataset(
                f"hfds/{name}",
                root=cache,
                split=split,
                input_key=source.input_key,
                target_key=source.target_key,
            )
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"dataset {name}, {split}: {error}") from error
        return dataset.reader
    place = split_location(root, split)
    if place is None:
        raise DataError(f"{root} has no {split}/ and no {split}.tar; an image folder is {root}/{split}/CLASS/IMAGE")
    folders = place.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in place.iterdir())
    in_tar = place.is_file() or (not folders and any(place.glob("*.tar")))
    try:
        return _TarReader(place) if in_tar else _FolderReader(place)
    except (AssertionError, OSError, ValueError, pickle.UnpicklingError, tarfile.TarError) as error:
        raise DataError(f"{place}: no usable images: {error}") from None


def reader_classes(reader: Any) -> tuple[str, ...]:
    """Class names of a reader; empty if its data does not name them."""
    return tuple(reader.class_to_idx)


def labels_as_trained(classes: Sequence[str], where: str) -> Labeler:
    """Return a function that labels classes by their position among the training classes.

    Args:
        classes: Class names in the order of the training labels; empty if they have no names.
        where: Name of the data in error messages.
    """

    def label(found: Sequence[str]) -> Labels:
        known = {name: place for place, name in enumerate(classes)}
        if not found or not known:
            return {}
        extra = name_order(set(found) - set(known))
        if extra:
            raise ClassMismatchError(
                f"{where}: received images of unknown classes: {', '.join(extra[:10])}; "
                f"valid: {', '.join(list(classes)[:20])}{' ...' if len(known) > 20 else ''}"
            )
        return known

    return label


def _labeled(labels: Labels) -> dict[str, int]:
    return {name: label for name, label in labels.items() if label is not None}


def relabel(reader: Any, labeler: Labeler) -> None:
    """Relabel a reader's classes.

    Raises:
        DataError: Images should be skipped, but the data is a stream or a Hugging Face dataset.
    """
    labels = labeler(reader_classes(reader))
    if not labels or labels == reader.class_to_idx:
        return
    if hasattr(reader, "relabel"):
        reader.relabel(labels)
        return
    if None in labels.values():
        raise DataError("received a stream or a Hugging Face dataset with images to skip; valid: dataset folder")
    # timm's readers of Hugging Face datasets map names themselves. If they got these names when opened, they would not
    # report the names in the data.
    reader.class_to_idx, reader.remap_class = _labeled(labels), True


def relabel_images(data: ImageSet, labeler: Labeler) -> ImageSet:
    """Relabel the classes of images in memory."""
    labels = labeler(data.classes)
    if not labels:
        return data
    places = torch.tensor([-1 if (label := labels[name]) is None else label for name in data.classes])[data.labels]
    kept = (places >= 0).nonzero()[:, 0]
    names = [""] * (1 + max(_labeled(labels).values(), default=-1))
    for name, label in _labeled(labels).items():
        names[label] = name
    return data.select(kept, places[kept], tuple(names))


def reader_fingerprint(reader: Any, indices: list[int]) -> str:
    """SHA-256 of file names and sizes, or of a Hugging Face dataset's own fingerprint."""
    digest = hashlib.sha256(str((len(reader), len(indices), sorted(reader.class_to_idx.items()))).encode())
    own = getattr(getattr(reader, "dataset", None), "_fingerprint", None)
    if own is not None:
        digest.update(own.encode())
        return digest.hexdigest()
    for index in range(len(reader)):
        digest.update(b"%s\0%d\0" % (reader.filename(index).encode(), reader.size(index)))
    return digest.hexdigest()
