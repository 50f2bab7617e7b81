"""Where training and held-out images are, and what they are: folders, tar files, streams, one image after another.

Here timm's readers and streams are opened, splits found, classes numbered, and data sets told apart; `loaders` makes
batches of what this module gives.

Everything random about an image is drawn from a seed made of the run's seed, the epoch and the image's place in it. Of
a stream, that place is one in what a rank's worker reads.

An image that cannot be read is an error that names its file. Only timm's reader of WebDataset shards leaves such an
image out, with a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.shared_count import SharedCount
from timm.utils import natural_key
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ubn_zoo.data.memory import ImageSet, find_images, load_image_folder, name_order
from ubn_zoo.data.splits import hub_name, require_package, split_location
from ubn_zoo.errors import DataError
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.seeds import mixed_seed, seed_everything

__all__ = [
    "DataError",
    "EvalSettings",
    "Feed",
    "Samples",
    "Stream",
    "check_shards",
    "image_set_fingerprint",
    "load_memory",
    "open_reader",
    "open_stream",
    "reader_classes",
    "reader_fingerprint",
    "relabel",
    "relabel_images",
    "stream_fingerprint",
    "stream_images",
]

# Folders with more files than this are told apart by the files' names alone: asking for sizes takes a while.
_SIZED_FILES = 200_000
# timm's readers want a number of images; this one stands for a number that nothing says.
_UNKNOWN = 10**12


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Which held-out images a model is given, and how; `Recipe` explains what is not said here.

    Attributes:
        img_size: Side in pixels.
        interpolation: Filter of the resize, by timm's name.
        crop_pct: Side of the crop over that of the resized image.
        crop_mode: timm's way of cropping: ``center``, ``squash`` or ``border``.
        mean: Mean per channel, of pixel values scaled to 0..1.
        std: Standard deviation per channel.
        num_classes: Outputs of the model.
        dataset: Kind of data.
        test_split: Part of it.
        test_samples: At most that many images.
        input_key: Column or file ending of the image.
        target_key: Column of the class.
        workers: Processes that load data, per rank.
    """

    img_size: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    dataset: str = "folder"
    test_split: str | None = None
    test_samples: int | None = None
    input_key: str | None = None
    target_key: str | None = None
    workers: int = 0

    @property
    def test_img_size(self) -> int:
        """Side in pixels."""
        return self.img_size

    @property
    def seed(self) -> int:
        """Nothing of how held-out images are read is random."""
        return 0


# A complete recipe says of held-out images what a feed says.
EvalSettings = Recipe | Feed


# Readers and streams, one image at a time


class _FolderReader(ReaderImageFolder):
    """timm's reader of image folders, of the classes and images that `find_images` names."""

    def __init__(self, root: Path) -> None:
        classes, self.samples = find_images(root)
        self.root = str(root)
        self.class_to_idx = {name: label for label, name in enumerate(classes)}

    def relabel(self, classes: dict[str, int]) -> None:
        """Number the classes as another split does."""
        names = list(self.class_to_idx)
        self.samples = [(path, classes[names[label]]) for path, label in self.samples]
        self.class_to_idx = classes

    def size(self, index: int) -> int:
        """Bytes of an image's file; 0 where there are so many that asking for them takes a while."""
        return Path(self.samples[index][0]).stat().st_size if len(self.samples) <= _SIZED_FILES else 0


class _TarReader(ReaderImageInTar):
    """timm's reader of tar files, without hidden files, in an order that does not depend on the file system.

    timm names a class by the folder around an image; an image at the top of its tar, also as ``./IMAGE``, is of the
    class that the tar is named for.
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
                raise ValueError(f"{member.path} is in no folder of its class; valid: CLASS/{path.name}")
            found.append((outer, member.path, label, (member, archive, inner)))
        if not found:
            raise ValueError("all are hidden")
        found.sort(key=lambda entry: (natural_key(entry[0]), natural_key(entry[1]), entry[:2]))
        self.class_to_idx = {name: label for label, name in enumerate(name_order({entry[2] for entry in found}))}
        self.samples = [entry[3] for entry in found]
        self.targets = [self.class_to_idx[entry[2]] for entry in found]

    def relabel(self, classes: dict[str, int]) -> None:
        """Number the classes as another split does."""
        names = list(self.class_to_idx)
        self.targets = [classes[names[label]] for label in self.targets]
        self.class_to_idx = classes

    def size(self, index: int) -> int:
        """Bytes of an image's file."""
        return int(self.samples[index][0].size)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        member, archive, inner = self.samples[index]
        parts = [archive, None if inner is None else inner.name, member.path]
        return ":".join(([self.root] if absolute else []) + [part for part in parts if part])


class Samples(Dataset[tuple[Any, int]]):
    """Images of one of timm's readers, each augmented with random numbers of its own.

    Args:
        settings: They give the seed, and by `num_classes` the labels that are valid; else the reader's classes do.
        reader: The reader.
        transform: From an image to what is collated.
        indices: The reader's images that are used, in their order.
    """

    def __init__(self, settings: EvalSettings, reader: Any, transform: Any, indices: list[int]) -> None:
        self._reader = reader
        self._transform = transform
        self._indices = indices
        self._seed = settings.seed
        self._classes = _label_limit(settings, reader)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, item: tuple[int, int, int] | int) -> tuple[Any, int]:
        if isinstance(item, tuple):
            place, epoch, position = item
            seed_everything(mixed_seed(self._seed, epoch, position))
        else:
            place = item
        index = self._indices[place]
        try:
            file, target = self._reader[index]
            with file, Image.open(file) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # Pillow's decoders raise errors of many classes for a damaged file
            name = _file_name(self._reader, index)
            raise DataError(f"{name}: not a readable image ({error}); mend or remove it and start again") from None
        return self._transform(image), _label(target, self._classes, _file_name, self._reader, index)


def _file_name(reader: Any, index: int) -> str:
    name = reader.filename(index, absolute=True)
    return str(name) if name else f"image {index} of {getattr(reader, 'split', 'the data')}"


def _label(target: Any, classes: int | None, name: Callable[..., str], *place: Any) -> int:
    """A label as a number that the model has an output for; on a GPU, another one would only be told without a name."""
    try:
        label = int(target)
    except (TypeError, ValueError):
        label = -1
    if label < 0 or (classes is not None and label >= classes):
        valid = "a number from 0" if classes is None else f"0 to {classes - 1}"
        raise DataError(f"{name(*place)}: received label {target!r}; valid: {valid}; see num_classes and target_key")
    return label


def _label_limit(settings: EvalSettings, reader: Any) -> int | None:
    """How many classes labels may name; None for any."""
    return settings.num_classes or len(reader.class_to_idx) or None


class Stream(IterableDataset[tuple[Any, int]]):
    """Images of one of timm's streams, each augmented with random numbers of its own.

    Args:
        settings: They give the seed, the workers, and the labels that are valid, as for `Samples`.
        dataset: The stream.
        transform: From an image to what is collated.
        ranks: This process among those that share the stream.
        name: What errors call it.
    """

    def __init__(
        self, settings: EvalSettings, dataset: IterableImageDataset, transform: Any, ranks: Ranks, name: str
    ) -> None:
        reader: Any = dataset.reader
        self._dataset = dataset
        self._transform = transform
        self._seed = settings.seed
        self._rank = ranks.rank
        self._classes = _label_limit(settings, reader)
        self._name = name
        self._epoch = SharedCount()
        reader.dist_rank, reader.dist_num_replicas = ranks.rank, ranks.count
        dataset.set_loader_cfg(num_workers=settings.workers)

    def start(self, epoch: int) -> None:
        """Make the next pass that of an epoch."""
        self._epoch.value = epoch
        self._dataset.set_epoch(epoch)
        reader: Any = self._dataset.reader
        # Its pipeline goes on where it was, with the random numbers it had, unless it is made anew.
        reader.ds = None
        reader.worker_seed = mixed_seed(self._seed, epoch, self._rank) % 2**63

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        worker_id = 0 if worker is None else worker.id
        epoch, samples = self._epoch.value, iter(self._dataset.reader)
        for number in itertools.count():
            try:
                found = next(samples, None)
            except Exception as error:  # what reads the stream raises errors of many classes
                raise DataError(f"{self._where(number, worker_id)}: {' '.join(str(error).split())}") from None
            if found is None:
                return
            image, target = found
            label = _label(target, self._classes, self._where, number, worker_id)
            seed_everything(mixed_seed(self._seed, epoch, self._rank, worker_id, number))
            yield self._transform(image), label

    def _where(self, number: int, worker: int) -> str:
        return f"{self._name}, image {number} of worker {worker}"


# Where the images are


def load_memory(root: Path, split: str) -> ImageSet:
    """One split of an image folder in memory."""
    try:
        return load_image_folder(root / split)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from None


def open_reader(recipe: EvalSettings, root: Path, split: str) -> Any:
    """One of timm's readers with random access."""
    if recipe.dataset.startswith("hfds/"):
        require_package("hfds")
        name, cache = hub_name(recipe.dataset.partition("/")[2], root)
        try:
            dataset: Any = create_dataset(
                f"hfds/{name}",
                root=cache,
                split=split,
                input_key=recipe.input_key,
                target_key=recipe.target_key,
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
        raise DataError(f"{place}: no images that can be used: {error}") from None


def open_stream(
    recipe: EvalSettings,
    data_dir: str | os.PathLike[str],
    split: str,
    samples: int | None,
    batch_size: int | None,
) -> tuple[IterableImageDataset, str]:
    """One of timm's streams, and what to call it; of training images where it has a size of batches."""
    kind = recipe.dataset.partition("/")[0]
    require_package(kind)
    # As it is: a path would take a slash out of an address.
    name, cache = (
        ("", os.fspath(data_dir)) if kind == "wds" else hub_name(recipe.dataset.partition("/")[2], Path(data_dir))
    )
    training = batch_size is not None
    # Before it reads a Hugging Face dataset, timm wants the number of images; of held-out ones it makes no use of it.
    unknown = _UNKNOWN if kind == "hfids" and not training else None
    shown = f"{name or cache}, {split}"
    try:
        dataset = create_dataset(
            f"{kind}/{name}",
            root=cache,
            split=split,
            is_training=training,
            batch_size=batch_size or 1,
            num_samples=samples or unknown,
            seed=recipe.seed,
            input_key=recipe.input_key,
            target_key=recipe.target_key,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        hint = "" if samples else "; a stream needs its number of images: _info.json, or train_samples, test_samples"
        raise DataError(f"{shown}: {error}{hint}") from error
    return dataset, shown


def stream_images(reader: Any, samples: int | None) -> int | None:
    """How many held-out images a stream is said to have; None where nothing says it."""
    if samples is not None:
        return samples
    builder = getattr(reader, "builder", None)
    if builder is None:
        return reader.num_samples or None
    said = (builder.info.splits or {}).get(reader.split)
    return None if said is None else said.num_examples or None


def _shards(reader: Any) -> Sequence[str]:
    """Names of the shards that a reader knows of before it reads."""
    return getattr(getattr(reader, "split_info", None), "filenames", ())


def check_shards(reader: Any, workers: int, ranks: Ranks, name: str) -> None:
    """Refuse WebDataset shards that leave a worker without any; timm refuses those of Hugging Face datasets."""
    shards = len(_shards(reader))
    needed = ranks.count * max(1, workers)
    if 0 < shards < needed:
        raise DataError(
            f"{name}: received {shards} shards for {needed} workers in all; valid: at least one for each, so at most "
            f"{shards // ranks.count} workers with {ranks.count} ranks, or more and smaller shards"
        )


# Classes


def reader_classes(reader: Any) -> tuple[str, ...]:
    """Names of a reader's classes; empty where its data does not name them."""
    return tuple(reader.class_to_idx)


def _known_classes(found: Sequence[str], classes: Sequence[str], where: str) -> dict[str, int]:
    """Labels of the classes by name; empty where names say nothing, on either side."""
    known = {name: label for label, name in enumerate(classes)}
    if not found or not known:
        return {}
    extra = name_order(set(found) - set(known))
    if extra:
        raise DataError(
            f"{where}: received images of classes that are not known: {', '.join(extra[:10])}; "
            f"valid: {', '.join(list(classes)[:20])}{' ...' if len(known) > 20 else ''}"
        )
    return known


def relabel(reader: Any, classes: Sequence[str], where: str) -> None:
    """Number a reader's classes as training does."""
    known = _known_classes(reader_classes(reader), classes, where)
    if not known or known == reader.class_to_idx:
        return
    if hasattr(reader, "relabel"):
        reader.relabel(known)
    else:
        # timm's readers of Hugging Face datasets do it by name themselves; given these names at the start, they would
        # not tell their own.
        reader.class_to_idx, reader.remap_class = known, True


def relabel_images(data: ImageSet, classes: Sequence[str], where: str) -> ImageSet:
    """Number the classes of images in memory as training does."""
    known = _known_classes(data.classes, classes, where)
    if not known:
        return data
    labels = torch.tensor([known[name] for name in data.classes])[data.labels]
    return ImageSet(data.images, labels, tuple(known))


# Fingerprints


def image_set_fingerprint(data: ImageSet) -> str:
    """SHA-256 of images in memory, their labels and classes."""
    digest = hashlib.sha256(str((tuple(data.images.shape), data.classes)).encode())
    for tensor in (data.images, data.labels):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def reader_fingerprint(reader: Any, indices: list[int]) -> str:
    """SHA-256 of the files' names and sizes; of a Hugging Face dataset's own fingerprint."""
    digest = hashlib.sha256(str((len(reader), len(indices), sorted(reader.class_to_idx.items()))).encode())
    own = getattr(getattr(reader, "dataset", None), "_fingerprint", None)
    if own is not None:
        digest.update(own.encode())
        return digest.hexdigest()
    for index in range(len(reader)):
        digest.update(b"%s\0%d\0" % (reader.filename(index).encode(), reader.size(index)))
    return digest.hexdigest()


def stream_fingerprint(recipe: EvalSettings, reader: Any, images: int | None) -> str:
    """SHA-256 of what a stream says of itself before it is read."""
    said = (recipe.dataset, images, tuple(_shards(reader)), reader_classes(reader))
    return hashlib.sha256(str(said).encode()).hexdigest()
