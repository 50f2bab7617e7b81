"""Training and held-out images as batches: image folders, tar files and streams through timm's readers, or memory.

Everything random about an image is drawn from a seed made of the run's seed, the epoch and the image's place in it. So
a batch is the same whatever the number of workers, and an epoch can be entered at any update. Of a stream, that place
is one in what a rank's worker reads: its batches are the same as long as the numbers of ranks and workers are.

An image that cannot be read is an error that names its file. Only timm's reader of WebDataset shards leaves such an
image out, with a warning; where that happens among held-out images, too few of them is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy
import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.data.readers.shared_count import SharedCount
from timm.data.transforms_factory import create_transform
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from .data import (
    TEST_SPLITS,
    ImageSet,
    Normalizer,
    find_images,
    load_image_folder,
    name_order,
    random_crop_flip,
    resize,
)
from .ranks import Ranks
from .recipe import Recipe

__all__ = [
    "DataError",
    "MemoryTest",
    "MemoryTrain",
    "TestBatches",
    "TestSettings",
    "TrainBatches",
    "class_names",
    "describe",
    "mixed_seed",
    "normalization",
    "open_test",
    "open_train",
    "seed_everything",
    "test_input",
    "training_input",
]

_EXTRA = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}
# Folders with more files than this are told apart by the files' names alone: asking for sizes takes a while.
_SIZED_FILES = 200_000
# timm's readers want a number of images; this one stands for a number that nothing says.
_UNKNOWN = 10**12


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder and says how to mend it."""

    def __init__(self, message: str) -> None:
        # A loader's worker passes an error on as a text with its traceback in front.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class TestSettings(Protocol):
    """What is to be known of held-out images; a complete `Recipe` says it, and `Recipe` explains it."""

    @property
    def dataset(self) -> str:
        """Kind of data."""

    @property
    def test_split(self) -> str | None:
        """Which part of it; None for the first of test, val, validation that is there."""

    @property
    def test_samples(self) -> int | None:
        """At most that many images; of a stream, how many there are."""

    @property
    def input_key(self) -> str | None:
        """Column or file ending of the image."""

    @property
    def target_key(self) -> str | None:
        """Column of the class."""

    @property
    def num_classes(self) -> int | None:
        """How many classes labels may name; None for those of the data."""

    @property
    def img_size(self) -> int | None:
        """Side in pixels."""

    @property
    def test_img_size(self) -> int | None:
        """Side in pixels of held-out images; None for `img_size`."""

    @property
    def interpolation(self) -> str | None:
        """Filter of the resize."""

    @property
    def crop_pct(self) -> float | None:
        """Side of the centre crop over that of the resized image."""

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Mean per channel."""

    @property
    def std(self) -> tuple[float, ...] | None:
        """Standard deviation per channel."""

    @property
    def seed(self) -> int:
        """Seed of what is random about reading."""

    @property
    def workers(self) -> int:
        """Processes that load data, per rank."""


class TrainBatches(Protocol):
    """Training images in batches, a new order and augmentation each epoch."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where the data does not name them."""

    @property
    def steps(self) -> int:
        """Updates per epoch."""

    @property
    def fingerprint(self) -> str:
        """Tells one set of training images from another."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's parts of the batches of one epoch, `accumulation` of them per update.

        Args:
            epoch: From 0.
            first_step: Updates of the epoch that are left out, as they were made before.

        Yields:
            Images (n, 3, H, W), normalised, float32, and labels (n,), int64, both on the rank's device.
        """


class TestBatches(Protocol):
    """Held-out images in batches."""

    @property
    def images(self) -> int | None:
        """How many there are, over all ranks; None where only reading tells."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where the data does not name them."""

    @property
    def fingerprint(self) -> str:
        """Tells one set of held-out images from another."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the images, as `TrainBatches.epoch` gives them; all shares together are each image once.

        Some ranks may get fewer batches than others, or none.
        """

    def probe(self, count: int) -> Tensor:
        """At most `count` of the images of all ranks, evenly spread; the first ones of a stream.

        Returns:
            (n, 3, H, W), normalised, on the rank's device.
        """


def mixed_seed(*parts: int) -> int:
    """One seed, 64 bits, of several numbers: runs, epochs, ranks and images have random numbers of their own by it."""
    return int(numpy.random.SeedSequence(parts).generate_state(1, numpy.uint64)[0])


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch, on every device."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _per_rank(recipe: Recipe, ranks: Ranks) -> int:
    """Images of a rank's share of a batch."""
    parts = ranks.count * recipe.accumulation
    if recipe.batch_size % parts:
        raise DataError(
            f"batch_size: received {recipe.batch_size}; valid: a multiple of {parts}, as it is shared by {ranks.count} "
            f"ranks in {recipe.accumulation} parts each"
        )
    return recipe.batch_size // ranks.count


def _steps(recipe: Recipe, images: int) -> int:
    if images < recipe.batch_size:
        raise DataError(
            f"received {images} training images; valid: at least one batch of {recipe.batch_size}; lower batch_size"
        )
    return images // recipe.batch_size


def _spread(total: int, wanted: int | None) -> list[int]:
    """Indices of at most `wanted` of `total` things, evenly spread: of sorted images, the same share of every class."""
    count = total if wanted is None else min(total, wanted)
    return [index * total // count for index in range(count)]


# Small images in memory


class MemoryTrain:
    """Training images held in memory: zero-padded random crop and flip, a batch at a time.

    Args:
        recipe: The run, complete: with ``img_size``, ``interpolation``, ``mean`` and ``std``.
        data: The images.
        ranks: This process.

    Raises:
        DataError: The images are not square or do not fill a batch, or a batch cannot be shared by the ranks.
    """

    def __init__(self, recipe: Recipe, data: ImageSet, ranks: Ranks) -> None:
        _check_square(data)
        self._recipe = recipe
        self._data = _chosen(data, recipe.train_samples)
        self._ranks = ranks
        _per_rank(recipe, ranks)  # fails where a batch cannot be shared
        self._normalize = Normalizer(*normalization(recipe), ranks.device)
        self.steps = _steps(recipe, len(self._data))
        self.classes = data.classes
        self.fingerprint = _image_set_fingerprint(self._data)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, rank = self._recipe, self._ranks.rank
        size, interpolation = training_input(recipe)
        order = _EpochOrder(recipe, len(self._data), self._ranks)
        for step in range(first_step, self.steps):
            chosen = torch.tensor(order.batch(epoch, step))
            # Of the whole batch, so that the random numbers do not depend on how many ranks share it.
            generator = torch.Generator().manual_seed(mixed_seed(recipe.seed, epoch, step, 1) % 2**63)
            images = random_crop_flip(self._data.images[chosen], recipe.crop_padding, recipe.hflip, generator)
            mine = order.share(rank)
            labels = self._data.labels[chosen][mine].to(self._ranks.device)
            prepared = self._normalize(resize(images[mine], size, interpolation))
            parts = recipe.accumulation
            yield from zip(prepared.chunk(parts), labels.chunk(parts), strict=True)


class MemoryTest:
    """Held-out images held in memory.

    Args:
        recipe: As for `MemoryTrain`.
        data: The images.
        ranks: This process.
        batch_size: Images at a time.

    Raises:
        DataError: The images are not square.
    """

    def __init__(self, recipe: TestSettings, data: ImageSet, ranks: Ranks, batch_size: int = 256) -> None:
        _check_square(data)
        self._data = _chosen(data, recipe.test_samples)
        self._recipe = recipe
        self._share = ranks.share(len(self._data))
        self._normalize = Normalizer(*normalization(recipe), ranks.device)
        self._batch_size = batch_size
        self.images = len(self._data)
        self.classes = data.classes
        self.fingerprint = _image_set_fingerprint(self._data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, interpolation = test_input(self._recipe)
        for start in range(self._share.start, self._share.stop, self._batch_size):
            part = slice(start, min(start + self._batch_size, self._share.stop))
            images = self._normalize(resize(self._data.images[part], size, interpolation))
            yield images, self._data.labels[part].to(images.device)

    def probe(self, count: int) -> Tensor:
        chosen = self._data.images[torch.tensor(_spread(self.images, count))]
        return self._normalize(resize(chosen, *test_input(self._recipe)))


def _check_square(data: ImageSet) -> None:
    height, width = data.images.shape[2:]
    if height != width:
        raise DataError(f"received images of {width}x{height} pixels; valid: square ones, or dataset folder")


def _chosen(data: ImageSet, wanted: int | None) -> ImageSet:
    if wanted is None or wanted >= len(data):
        return data
    chosen = torch.tensor(_spread(len(data), wanted))
    return ImageSet(data.images[chosen], data.labels[chosen], data.classes)


def _image_set_fingerprint(data: ImageSet) -> str:
    digest = hashlib.sha256(str((tuple(data.images.shape), data.classes)).encode())
    for tensor in (data.images, data.labels):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def normalization(recipe: TestSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a complete recipe."""
    if recipe.mean is None or recipe.std is None:
        raise ValueError("received a recipe without mean or std; valid: a complete one, as `train.complete` makes it")
    return recipe.mean, recipe.std


def training_input(recipe: Recipe) -> tuple[int, str]:
    """Side in pixels of training images, and the filter of their resize, of a complete recipe."""
    size, interpolation = recipe.img_size, recipe.train_interpolation or recipe.interpolation
    if size is None or interpolation is None:
        raise ValueError("received a recipe without img_size or interpolation; valid: a complete one")
    return size, interpolation


def test_input(recipe: TestSettings) -> tuple[int, str]:
    """Side in pixels of held-out images, and the filter of their resize, of a complete recipe."""
    size, interpolation = recipe.test_img_size or recipe.img_size, recipe.interpolation
    if size is None or interpolation is None:
        raise ValueError("received a recipe without img_size or interpolation; valid: a complete one")
    return size, interpolation


# Images that are read and augmented one at a time


class _EpochOrder:
    """Which images make up each batch, and which part of it is each rank's.

    Ranks take consecutive parts, so that their shares in the order of ranks are the batch of a single process. Repeated
    copies of an image go to different ranks instead.
    """

    def __init__(self, recipe: Recipe, images: int, ranks: Ranks) -> None:
        self._recipe = recipe
        self._images = images
        self._ranks = ranks
        self._epoch: int | None = None
        self._order: list[int] = []

    def batch(self, epoch: int, step: int) -> list[int]:
        """Indices of the images of one batch."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self._recipe.seed, epoch) % 2**63)
            order = torch.randperm(self._images, generator=generator)
            if self._recipe.repeats > 1:
                order = order.repeat_interleave(self._recipe.repeats)[: self._images]
            self._epoch, self._order = epoch, order.tolist()
        size = self._recipe.batch_size
        return self._order[step * size : (step + 1) * size]

    def share(self, rank: int) -> slice:
        """A rank's places in a batch."""
        if self._recipe.repeats > 1:
            return slice(rank, None, self._ranks.count)
        share = self._recipe.batch_size // self._ranks.count
        return slice(rank * share, (rank + 1) * share)


class _TrainSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of this rank as (index, epoch, place in the epoch), from any update on."""

    def __init__(self, recipe: Recipe, images: int, ranks: Ranks) -> None:
        self._order = _EpochOrder(recipe, images, ranks)
        self._recipe = recipe
        self._ranks = ranks
        self._part = _per_rank(recipe, ranks) // recipe.accumulation
        self.steps = _steps(recipe, images)
        self.start = (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, first_step = self.start
        size = self._recipe.batch_size
        for step in range(first_step, self.steps):
            batch = [(index, epoch, step * size + place) for place, index in enumerate(self._order.batch(epoch, step))]
            mine = batch[self._order.share(self._ranks.rank)]
            for start in range(0, len(mine), self._part):
                yield mine[start : start + self._part]


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


class _Samples(Dataset[tuple[Any, int]]):
    """Images of one of timm's readers, each augmented with random numbers of its own.

    Args:
        reader: The reader.
        transform: From an image to what is collated.
        indices: The reader's images that are used, in their order.
        seed: The run's seed.
        classes: How many classes labels may name; None for any.
    """

    def __init__(self, reader: Any, transform: Any, indices: list[int], seed: int, classes: int | None) -> None:
        self._reader = reader
        self._transform = transform
        self._indices = indices
        self._seed = seed
        self._classes = classes

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


class _Stream(IterableDataset[tuple[Any, int]]):
    """Images of one of timm's streams, each augmented with random numbers of its own.

    Args:
        dataset: The stream.
        transform: From an image to what is collated.
        seed: The run's seed.
        ranks: This process among those that share the stream.
        classes: How many classes labels may name; None for any.
        name: What errors call it.
    """

    def __init__(
        self, dataset: IterableImageDataset, transform: Any, seed: int, ranks: Ranks, classes: int | None, name: str
    ) -> None:
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self._rank = ranks.rank
        self._classes = classes
        self._name = name
        self._epoch = SharedCount()
        reader: Any = dataset.reader
        reader.dist_rank, reader.dist_num_replicas = ranks.rank, ranks.count

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


def _train_transform(recipe: Recipe) -> Any:
    size, interpolation = training_input(recipe)
    return create_transform(
        input_size=size,
        is_training=True,
        use_prefetcher=True,
        train_crop_mode=recipe.crop,
        scale=(recipe.crop_scale[0], recipe.crop_scale[1]),
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=interpolation,
        mean=normalization(recipe)[0],
    )


def _test_transform(recipe: TestSettings, crop_mode: str | None) -> Any:
    size, interpolation = test_input(recipe)
    return create_transform(
        input_size=size,
        use_prefetcher=True,
        interpolation=interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=crop_mode,
    )


def _loader(dataset: Any, recipe: TestSettings, ranks: Ranks, *, workers: int, **batches: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=ranks.device.type == "cuda",
        # Its own, so that loading takes no random numbers from those that the process draws otherwise.
        generator=torch.Generator(),
        **batches,
    )


def _prefetched(loader: Any, recipe: TestSettings, ranks: Ranks) -> PrefetchLoader:
    mean, std = normalization(recipe)
    return PrefetchLoader(loader, mean=mean, std=std, device=ranks.device)


class _ReaderTrain:
    """Training images behind one of timm's readers with random access."""

    def __init__(self, recipe: Recipe, reader: Any, ranks: Ranks) -> None:
        indices = _spread(len(reader), recipe.train_samples)
        self.classes = _class_names(reader)
        self._sampler = _TrainSampler(recipe, len(indices), ranks)
        limit = recipe.num_classes or len(self.classes) or None
        loader = _loader(
            _Samples(reader, _train_transform(recipe), indices, recipe.seed, limit),
            recipe,
            ranks,
            workers=recipe.workers,
            batch_sampler=self._sampler,
            persistent_workers=recipe.workers > 0,
        )
        self._loader = _prefetched(loader, recipe, ranks)
        self.steps = self._sampler.steps
        self.fingerprint = _reader_fingerprint(reader, indices)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._sampler.start = (epoch, first_step)
        yield from self._loader


class _ReaderTest:
    """Held-out images behind one of timm's readers with random access."""

    def __init__(self, recipe: TestSettings, reader: Any, ranks: Ranks, batch_size: int, crop_mode: str | None) -> None:
        self._recipe, self._reader, self._ranks = recipe, reader, ranks
        self._transform = _test_transform(recipe, crop_mode)
        self._indices = indices = _spread(len(reader), recipe.test_samples)
        self.images = len(indices)
        self.classes = _class_names(reader)
        self.fingerprint = _reader_fingerprint(reader, indices)
        mine = [indices[place] for place in ranks.share(len(indices))]
        self._loader = self._load(mine, batch_size, recipe.workers)

    def _load(self, indices: list[int], batch_size: int, workers: int) -> PrefetchLoader:
        limit = self._recipe.num_classes or len(self.classes) or None
        loader = _loader(
            _Samples(self._reader, self._transform, indices, self._recipe.seed, limit),
            self._recipe,
            self._ranks,
            workers=workers,
            batch_size=batch_size,
            persistent_workers=workers > 0,
        )
        return _prefetched(loader, self._recipe, self._ranks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._loader

    def probe(self, count: int) -> Tensor:
        chosen = [self._indices[place] for place in _spread(len(self._indices), count)]
        # By a worker where there are workers: an open tar file must not be shared with those that start later.
        return torch.cat([images for images, _ in self._load(chosen, count, min(1, self._recipe.workers))])


class _StreamTrain:
    """Training images of a stream.

    An epoch that is entered late is read from its start, and what was used left out. A stream that has fewer images
    than it is said to have starts again from its first, as timm's readers do.
    """

    def __init__(self, recipe: Recipe, dataset: IterableImageDataset, name: str, ranks: Ranks) -> None:
        reader: Any = dataset.reader
        self.classes = _class_names(reader)
        limit = recipe.num_classes or len(self.classes) or None
        self._stream = _Stream(dataset, _train_transform(recipe), recipe.seed, ranks, limit, name)
        dataset.set_loader_cfg(num_workers=recipe.workers)
        self._recipe = recipe
        self._ranks = ranks
        self._loader = _loader(
            self._stream,
            recipe,
            ranks,
            workers=recipe.workers,
            batch_size=_per_rank(recipe, ranks) // recipe.accumulation,
        )
        self.steps = _steps(recipe, reader.num_samples)
        self.fingerprint = _stream_fingerprint(recipe, reader, reader.num_samples)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self._recipe
        self._stream.start(epoch)
        # What the workers' own seeds are made from.
        self._loader.generator.manual_seed(mixed_seed(recipe.seed, epoch, self._ranks.rank) % 2**63)
        parts = itertools.islice(_prefetched(self._loader, recipe, self._ranks), self.steps * recipe.accumulation)
        yield from itertools.islice(parts, first_step * recipe.accumulation, None)


class _StreamTest:
    """Held-out images of a stream: every rank reads it all, so that none is counted twice, and keeps its batches."""

    def __init__(
        self,
        recipe: TestSettings,
        dataset: IterableImageDataset,
        name: str,
        ranks: Ranks,
        batch_size: int,
        crop_mode: str | None,
    ) -> None:
        reader: Any = dataset.reader
        self.classes = _class_names(reader)
        self.images = _stream_images(reader, recipe.test_samples)
        limit = recipe.num_classes or len(self.classes) or None
        self._stream = _Stream(dataset, _test_transform(recipe, crop_mode), recipe.seed, Ranks(), limit, name)
        dataset.set_loader_cfg(num_workers=recipe.workers)
        self._recipe = recipe
        self._name = name
        self._ranks = ranks
        self._loader = _loader(self._stream, recipe, ranks, workers=recipe.workers, batch_size=batch_size)
        self.fingerprint = _stream_fingerprint(recipe, reader, self.images)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of all ranks."""
        self._stream.start(0)
        seen = 0
        for images, labels in self._loader:
            wanted = self._recipe.test_samples
            kept = slice(None if wanted is None else wanted - seen)
            seen += len(images[kept])
            yield images[kept], labels[kept]
            if seen == wanted:
                break
        if self.images not in (None, seen):
            raise DataError(
                f"{self._name} has {seen} readable images, and is said to have {self.images}; mend it or what "
                "describes it, or set test_samples"
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = itertools.islice(self._batches(), self._ranks.rank, None, self._ranks.count)
        yield from _prefetched(mine, self._recipe, self._ranks)

    def probe(self, count: int) -> Tensor:
        taken: list[Tensor] = []
        for images, _ in _prefetched(self._batches(), self._recipe, self._ranks):
            taken.append(images)
            if sum(map(len, taken)) >= count:
                break
        return torch.cat(taken)[:count]


# Where the images are


def open_train(recipe: Recipe, data_dir: str | os.PathLike[str], ranks: Ranks) -> TrainBatches:
    """Open the training images of a recipe.

    Args:
        recipe: The run, complete: with ``img_size``, ``interpolation``, ``mean`` and ``std``.
        data_dir: Folder of the data; with ``wds`` also the address of one, such as ``https://host/shards``; with
            Hugging Face datasets, where they are kept, unless their name is that of a folder in it.
        ranks: This process.

    Raises:
        DataError: There are no images, they do not fill a batch, or a package that reads them is missing.
    """
    kind = recipe.dataset.partition("/")[0]
    if kind == "memory":
        return MemoryTrain(recipe, _load_memory(Path(data_dir), recipe.train_split), ranks)
    if kind in ("wds", "hfids"):
        part = _per_rank(recipe, ranks) // recipe.accumulation
        dataset, name = _stream(recipe, data_dir, recipe.train_split, recipe.train_samples, part)
        _check_shards(dataset.reader, recipe.workers, ranks, name)
        return _StreamTrain(recipe, dataset, name, ranks)
    return _ReaderTrain(recipe, _reader(recipe, Path(data_dir), recipe.train_split), ranks)


def open_test(
    recipe: TestSettings,
    data_dir: str | os.PathLike[str],
    ranks: Ranks,
    classes: Sequence[str] = (),
    *,
    batch_size: int = 256,
    crop_mode: str | None = None,
) -> TestBatches:
    """Open the held-out images of a recipe.

    Args:
        recipe: As for `open_train`, or what else has the settings of held-out images.
        data_dir: As for `open_train`.
        ranks: This process.
        classes: Names of the classes in the order of their labels, as training has them; by default those of the
            held-out images. Labels that the data gives as numbers without names are taken as they are.
        batch_size: Images at a time, on each rank.
        crop_mode: timm's way of cropping: ``center``, ``squash`` or ``border``; None for ``center``.

    Raises:
        DataError: There are no images, they have a class of their own, or a package that reads them is missing.
    """
    kind = recipe.dataset.partition("/")[0]
    split = recipe.test_split or _test_split(recipe, data_dir, kind)
    where = f"{os.fspath(data_dir)}, {split}"
    if kind == "memory":
        data = _load_memory(Path(data_dir), split)
        known = _known_classes(data.classes, classes, where)
        if known:
            labels = torch.tensor([known[name] for name in data.classes])[data.labels]
            data = ImageSet(data.images, labels, tuple(known))
        return MemoryTest(recipe, data, ranks, batch_size)
    if kind in ("wds", "hfids"):
        dataset, name = _stream(recipe, data_dir, split, recipe.test_samples, None)
        _relabel(dataset.reader, classes, where)
        return _StreamTest(recipe, dataset, name, ranks, batch_size, crop_mode)
    reader = _reader(recipe, Path(data_dir), split)
    _relabel(reader, classes, where)
    return _ReaderTest(recipe, reader, ranks, batch_size, crop_mode)


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


def _relabel(reader: Any, classes: Sequence[str], where: str) -> None:
    """Number a reader's classes as training does."""
    known = _known_classes(_class_names(reader), classes, where)
    if not known or known == reader.class_to_idx:
        return
    if hasattr(reader, "relabel"):
        reader.relabel(known)
    else:
        # timm's readers of Hugging Face datasets do it by name themselves; given these names at the start, they would
        # not tell their own.
        reader.class_to_idx, reader.remap_class = known, True


def _load_memory(root: Path, split: str) -> ImageSet:
    try:
        return load_image_folder(root / split)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from None


def _location(root: Path, split: str) -> Path | None:
    return next((path for path in (root / split, root / f"{split}.tar") if path.exists()), None)


def _test_split(recipe: TestSettings, data_dir: str | os.PathLike[str], kind: str) -> str:
    where, root = os.fspath(data_dir), Path(data_dir)
    if kind in ("hfds", "hfids"):
        there = _hub_splits(recipe, root)
    elif kind == "wds":
        there = _shard_splits(where)
    else:
        there = [split for split in TEST_SPLITS if _location(root, split)]
    for split in TEST_SPLITS:
        if split in there:
            return split
    raise DataError(f"{where} has none of {', '.join(TEST_SPLITS)}; it needs one of them, or set test_split")


def _hub_splits(recipe: TestSettings, root: Path) -> list[str]:
    _require(recipe.dataset.partition("/")[0])
    import datasets

    name, cache = _hub_name(recipe, root)
    try:
        return [str(split) for split in datasets.get_dataset_split_names(name, cache_dir=cache)]
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"dataset {name}: {error}") from error


def _shard_splits(where: str) -> list[str]:
    _require("wds")
    webdataset = importlib.import_module("webdataset")
    for name in ("_info.json", "info.json"):
        try:
            with webdataset.gopen(f"{where}/{name}") as file:
                return list(json.load(file)["splits"])
        except (OSError, ValueError, KeyError):
            continue
    return []


def _require(kind: str) -> None:
    package = _EXTRA[kind]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"dataset {kind} needs the package {package}: pip install 'ubn-zoo[stream]'")


def _hub_name(recipe: TestSettings, root: Path) -> tuple[str, str | None]:
    """A Hugging Face dataset's name, or its folder in the data's, and where downloads are kept."""
    name = recipe.dataset.partition("/")[2]
    local = root / name
    return (str(local), None) if local.exists() else (name, str(root))


def _reader(recipe: TestSettings, root: Path, split: str) -> Any:
    """One of timm's readers with random access."""
    if recipe.dataset.startswith("hfds/"):
        _require("hfds")
        name, cache = _hub_name(recipe, root)
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
    place = _location(root, split)
    if place is None:
        raise DataError(f"{root} has no {split}/ and no {split}.tar; an image folder is {root}/{split}/CLASS/IMAGE")
    folders = place.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in place.iterdir())
    in_tar = place.is_file() or (not folders and any(place.glob("*.tar")))
    try:
        return _TarReader(place) if in_tar else _FolderReader(place)
    except (AssertionError, OSError, ValueError, pickle.UnpicklingError, tarfile.TarError) as error:
        raise DataError(f"{place}: no images that can be used: {error}") from None


def _class_names(reader: Any) -> tuple[str, ...]:
    return tuple(reader.class_to_idx)


def _stream(
    recipe: TestSettings,
    data_dir: str | os.PathLike[str],
    split: str,
    samples: int | None,
    batch_size: int | None,
) -> tuple[IterableImageDataset, str]:
    """One of timm's streams, and what to call it; of training images where it has a size of batches."""
    kind = recipe.dataset.partition("/")[0]
    _require(kind)
    # As it is: a path would take a slash out of an address.
    name, cache = ("", os.fspath(data_dir)) if kind == "wds" else _hub_name(recipe, Path(data_dir))
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


def _stream_images(reader: Any, samples: int | None) -> int | None:
    """How many held-out images a stream is said to have; None where nothing says it."""
    if samples is not None:
        return samples
    builder = getattr(reader, "builder", None)
    if builder is None:
        return reader.num_samples or None
    said = (builder.info.splits or {}).get(reader.split)
    return None if said is None else said.num_examples or None


def _check_shards(reader: Any, workers: int, ranks: Ranks, name: str) -> None:
    """Refuse WebDataset shards that leave a worker without any; timm refuses those of Hugging Face datasets."""
    shards = len(getattr(getattr(reader, "split_info", None), "filenames", ()))
    needed = ranks.count * max(1, workers)
    if 0 < shards < needed:
        raise DataError(
            f"{name}: received {shards} shards for {needed} workers in all; valid: at least one for each, so at most "
            f"{shards // ranks.count} workers with {ranks.count} ranks, or more and smaller shards"
        )


def _reader_fingerprint(reader: Any, indices: list[int]) -> str:
    """SHA-256 of the files' names and sizes; of a Hugging Face dataset's own fingerprint."""
    digest = hashlib.sha256(str((len(reader), len(indices), sorted(reader.class_to_idx.items()))).encode())
    own = getattr(getattr(reader, "dataset", None), "_fingerprint", None)
    if own is not None:
        digest.update(own.encode())
        return digest.hexdigest()
    for index in range(len(reader)):
        digest.update(b"%s\0%d\0" % (reader.filename(index).encode(), reader.size(index)))
    return digest.hexdigest()


def _stream_fingerprint(recipe: TestSettings, reader: Any, images: int | None) -> str:
    shards = getattr(getattr(reader, "split_info", None), "filenames", ())
    return hashlib.sha256(str((recipe.dataset, images, tuple(shards), _class_names(reader))).encode()).hexdigest()


def describe(train: TrainBatches, test: TestBatches) -> dict[str, Any]:
    """What a run's record says of its data."""
    return {
        "train": train.fingerprint,
        "test": test.fingerprint,
        "test_images": test.images,
        "classes": list(train.classes),
    }


def class_names(train: TrainBatches, count: int) -> tuple[str, ...]:
    """Names of a run's classes; numbers where the data has no names."""
    return train.classes or tuple(map(str, range(count)))
