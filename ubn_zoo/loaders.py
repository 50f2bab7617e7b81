"""Training and held-out images as batches: image folders, tar files and streams through timm's readers, or memory.

Everything random about an image is drawn from a seed made of the run's seed, the epoch and the image's place in it. So
a batch is the same whatever the number of workers, and an epoch can be entered at any update.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from .data import TEST_SPLITS, ImageSet, Normalizer, load_image_folder, random_crop_flip, resize
from .ranks import Ranks
from .recipe import Recipe

__all__ = [
    "DataError",
    "MemoryTest",
    "MemoryTrain",
    "TestBatches",
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


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder and says how to mend it."""

    def __init__(self, message: str) -> None:
        # A loader's worker passes an error on as a text with its traceback in front.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


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
        DataError: The images do not fill a batch, or a batch cannot be shared by the ranks.
    """

    def __init__(self, recipe: Recipe, data: ImageSet, ranks: Ranks) -> None:
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
    """

    def __init__(self, recipe: Recipe, data: ImageSet, ranks: Ranks, batch_size: int = 256) -> None:
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


def normalization(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def test_input(recipe: Recipe) -> tuple[int, str]:
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


class _Samples(Dataset[tuple[Any, int]]):
    """Images of one of timm's readers, each augmented with random numbers of its own."""

    def __init__(self, reader: Any, transform: Any, indices: list[int], seed: int) -> None:
        self._reader = reader
        self._transform = transform
        self._indices = indices
        self._seed = seed

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
        except (OSError, ValueError, SyntaxError) as error:
            name = self._reader.filename(index, absolute=True)
            raise DataError(f"{name}: not a readable image ({error}); mend or remove it and start again") from None
        return self._transform(image), int(target)


class _Stream(IterableDataset[tuple[Any, int]]):
    """Images of one of timm's streams, each augmented with random numbers of its own."""

    def __init__(self, dataset: IterableImageDataset, transform: Any, seed: int, rank: int) -> None:
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self._rank = rank
        self._epoch = SharedCount()

    def start(self, epoch: int) -> None:
        """Make the next pass that of an epoch."""
        self._epoch.value = epoch
        self._dataset.set_epoch(epoch)
        reader = self._dataset.reader
        # Its pipeline goes on where it was, with the random numbers it had, unless it is made anew.
        reader.ds = None
        reader.worker_seed = mixed_seed(self._seed, epoch, self._rank) % 2**63

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        place = (self._epoch.value, self._rank, 0 if worker is None else worker.id)
        for number, (image, target) in enumerate(self._dataset.reader):
            seed_everything(mixed_seed(self._seed, *place, number))
            yield self._transform(image), int(target)


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


def _test_transform(recipe: Recipe) -> Any:
    size, interpolation = test_input(recipe)
    return create_transform(input_size=size, use_prefetcher=True, interpolation=interpolation, crop_pct=recipe.crop_pct)


def _prefetched(loader: DataLoader[Any], recipe: Recipe, ranks: Ranks) -> PrefetchLoader:
    mean, std = normalization(recipe)
    return PrefetchLoader(loader, mean=mean, std=std, device=ranks.device)


class _ReaderTrain:
    """Training images behind one of timm's readers with random access."""

    def __init__(self, recipe: Recipe, reader: Any, classes: Mapping[str, int], ranks: Ranks) -> None:
        indices = _spread(len(reader), recipe.train_samples)
        self._sampler = _TrainSampler(recipe, len(indices), ranks)
        loader = DataLoader(
            _Samples(reader, _train_transform(recipe), indices, recipe.seed),
            batch_sampler=self._sampler,
            num_workers=recipe.workers,
            collate_fn=fast_collate,
            pin_memory=ranks.device.type == "cuda",
            persistent_workers=recipe.workers > 0,
        )
        self._loader = _prefetched(loader, recipe, ranks)
        self.steps = self._sampler.steps
        self.classes = tuple(classes)
        self.fingerprint = _reader_fingerprint(reader, indices)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._sampler.start = (epoch, first_step)
        yield from self._loader


class _ReaderTest:
    """Held-out images behind one of timm's readers with random access."""

    def __init__(self, recipe: Recipe, reader: Any, classes: Mapping[str, int], ranks: Ranks, batch_size: int) -> None:
        self._recipe, self._reader, self._ranks = recipe, reader, ranks
        self._indices = indices = _spread(len(reader), recipe.test_samples)
        mine = [indices[place] for place in ranks.share(len(indices))]
        self._loader = self._load(mine, batch_size, recipe.workers)
        self.images = len(indices)
        self.classes = tuple(classes)
        self.fingerprint = _reader_fingerprint(reader, indices)

    def _load(self, indices: list[int], batch_size: int, workers: int) -> PrefetchLoader:
        loader = DataLoader(
            _Samples(self._reader, _test_transform(self._recipe), indices, self._recipe.seed),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=fast_collate,
            pin_memory=self._ranks.device.type == "cuda",
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
    """Training images of a stream. An epoch that is entered late is read from its start, and what was used left out."""

    def __init__(self, recipe: Recipe, dataset: IterableImageDataset, images: int, ranks: Ranks) -> None:
        dataset.set_loader_cfg(num_workers=recipe.workers)
        self._stream = _Stream(dataset, _train_transform(recipe), recipe.seed, ranks.rank)
        self._recipe = recipe
        self._ranks = ranks
        self._generator = torch.Generator()
        self._loader = DataLoader(
            self._stream,
            batch_size=_per_rank(recipe, ranks) // recipe.accumulation,
            num_workers=recipe.workers,
            collate_fn=fast_collate,
            pin_memory=ranks.device.type == "cuda",
            generator=self._generator,
        )
        self.steps = _steps(recipe, images)
        self.classes = _names(dataset.reader)
        self.fingerprint = _stream_fingerprint(recipe, dataset, images)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self._recipe
        self._stream.start(epoch)
        # What the workers' own seeds are made from.
        self._generator.manual_seed(mixed_seed(recipe.seed, epoch, self._ranks.rank) % 2**63)
        parts = itertools.islice(_prefetched(self._loader, recipe, self._ranks), self.steps * recipe.accumulation)
        yield from itertools.islice(parts, first_step * recipe.accumulation, None)


class _StreamTest:
    """Held-out images of a stream: every rank reads it all, so that none is counted twice, and keeps its batches."""

    def __init__(
        self, recipe: Recipe, dataset: IterableImageDataset, images: int | None, ranks: Ranks, batch_size: int
    ) -> None:
        reader: Any = dataset.reader
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        dataset.set_loader_cfg(num_workers=recipe.workers)
        self._stream = _Stream(dataset, _test_transform(recipe), recipe.seed, 0)
        self._recipe = recipe
        self._ranks = ranks
        self._loader = DataLoader(
            self._stream,
            batch_size=batch_size,
            num_workers=recipe.workers,
            collate_fn=fast_collate,
            pin_memory=ranks.device.type == "cuda",
        )
        self.images = images
        self.classes = _names(reader)
        self.fingerprint = _stream_fingerprint(recipe, dataset, images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._stream.start(0)
        mine: Any = _Every(self._loader, self._ranks)
        yield from _prefetched(mine, self._recipe, self._ranks)

    def probe(self, count: int) -> Tensor:
        self._stream.start(0)
        batches, taken = _prefetched(self._loader, self._recipe, self._ranks), []
        for images, _ in batches:
            taken.append(images)
            if sum(map(len, taken)) >= count:
                break
        return torch.cat(taken)[:count]


class _Every:
    """Of a loader's batches, every one whose number is this rank's."""

    def __init__(self, loader: DataLoader[Any], ranks: Ranks) -> None:
        self._loader = loader
        self._ranks = ranks

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._ranks.rank, None, self._ranks.count)


# Where the images are


def open_train(recipe: Recipe, data_dir: str | os.PathLike[str], ranks: Ranks) -> TrainBatches:
    """Open the training images of a recipe.

    Args:
        recipe: The run, complete: with ``img_size``, ``interpolation``, ``mean`` and ``std``.
        data_dir: Folder of the data; where Hugging Face datasets are kept, unless their name is that of a folder in it.
        ranks: This process.

    Raises:
        DataError: There are no images, they do not fill a batch, or a package that reads them is missing.
    """
    root, kind = Path(data_dir), recipe.dataset.partition("/")[0]
    if kind == "memory":
        return MemoryTrain(recipe, _load_memory(root, recipe.train_split), ranks)
    if kind in ("wds", "hfids"):
        dataset = _stream(recipe, root, recipe.train_split, recipe.train_samples, training=True, ranks=ranks)
        return _StreamTrain(recipe, dataset, dataset.reader.num_samples, ranks)
    reader = _reader(recipe, root, recipe.train_split, None)
    return _ReaderTrain(recipe, reader, _classes(reader), ranks)


def open_test(
    recipe: Recipe,
    data_dir: str | os.PathLike[str],
    ranks: Ranks,
    classes: Sequence[str] = (),
    *,
    batch_size: int = 256,
) -> TestBatches:
    """Open the held-out images of a recipe.

    Args:
        recipe: As for `open_train`.
        data_dir: As for `open_train`.
        ranks: This process.
        classes: Names of the classes in the order of their labels, as training has them; by default those of the
            held-out images.
        batch_size: Images at a time, on each rank.

    Raises:
        DataError: There are no images, they have a class of their own, or a package that reads them is missing.
    """
    root, kind = Path(data_dir), recipe.dataset.partition("/")[0]
    split = recipe.test_split or _test_split(recipe, root, kind)
    if kind == "memory":
        data = _load_memory(root, split)
        known = tuple(classes) or data.classes
        _check_classes(data.classes, known, root / split)
        labels = torch.tensor([known.index(data.classes[label]) for label in data.labels.tolist()])
        return MemoryTest(recipe, ImageSet(data.images, labels, known), ranks, batch_size)
    if kind in ("wds", "hfids"):
        dataset = _stream(recipe, root, split, recipe.test_samples, training=False, ranks=ranks)
        return _StreamTest(recipe, dataset, dataset.reader.num_samples or None, ranks, batch_size)
    names = {name: label for label, name in enumerate(classes)}
    own = _reader(recipe, root, split, None)
    if not names:
        return _ReaderTest(recipe, own, _classes(own), ranks, batch_size)
    _check_classes(tuple(_classes(own)), tuple(names), root / split)
    return _ReaderTest(recipe, _reader(recipe, root, split, names), names, ranks, batch_size)


def _check_classes(found: Sequence[str], known: Sequence[str], where: Path) -> None:
    extra = sorted(set(found) - set(known))
    if extra:
        raise DataError(
            f"{where} has classes that the training images lack: {', '.join(extra[:10])}; "
            f"valid: {', '.join(known[:20])}"
        )


def _load_memory(root: Path, split: str) -> ImageSet:
    try:
        return load_image_folder(root / split)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from None


def _location(root: Path, split: str) -> Path | None:
    return next((path for path in (root / split, root / f"{split}.tar") if path.exists()), None)


def _test_split(recipe: Recipe, root: Path, kind: str) -> str:
    if kind == "hfds" or kind == "hfids":
        _require(kind)
        import datasets

        name, cache = _hub_name(recipe, root)
        there = datasets.load_dataset_builder(name, cache_dir=cache).info.splits or {}
        names = [split for split in TEST_SPLITS if split in there]
        where = f"dataset {name}"
    elif kind == "wds":
        names, where = ["validation"], ""
    else:
        names = [split for split in TEST_SPLITS if _location(root, split)]
        where = str(root)
    if not names:
        raise DataError(f"{where} has none of {', '.join(TEST_SPLITS)}; it needs one of them, or set test_split")
    return names[0]


def _require(kind: str) -> None:
    package = _EXTRA[kind]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"dataset {kind} needs the package {package}: pip install 'ubn-zoo[stream]'")


def _hub_name(recipe: Recipe, root: Path) -> tuple[str, str | None]:
    """A Hugging Face dataset's name, or its folder in the data's, and where downloads are kept."""
    name = recipe.dataset.partition("/")[2]
    local = root / name
    return (str(local), None) if local.exists() else (name, str(root))


def _reader(recipe: Recipe, root: Path, split: str, classes: Mapping[str, int] | None) -> Any:
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
        except (OSError, ValueError) as error:
            raise DataError(f"dataset {name}, {split}: {error}") from error
        return dataset.reader
    place = _location(root, split)
    if place is None:
        raise DataError(f"{root} has no {split}/ and no {split}.tar; an image folder is {root}/{split}/CLASS/IMAGE")
    in_tar = place.is_file() or any(place.glob("*.tar"))
    kind: Any = ReaderImageInTar if in_tar else ReaderImageFolder
    try:
        return kind(str(place), class_map=dict(classes) if classes else "")
    except (AssertionError, RuntimeError, ValueError) as error:
        raise DataError(f"{place}: no images: {error}") from None


def _classes(reader: Any) -> dict[str, int]:
    found: dict[str, int] | None = getattr(reader, "class_to_idx", None)
    if found is None:
        found = getattr(reader, "class_name_to_idx", None)
    return dict(found or {})


def _names(reader: Any) -> tuple[str, ...]:
    return tuple(_classes(reader))


def _stream(
    recipe: Recipe, root: Path, split: str, samples: int | None, *, training: bool, ranks: Ranks
) -> IterableImageDataset:
    kind = recipe.dataset.partition("/")[0]
    _require(kind)
    name, cache = ("wds", str(root)) if kind == "wds" else _hub_name(recipe, root)
    wanted = "wds/" if kind == "wds" else f"hfids/{name}"
    try:
        return create_dataset(
            wanted,
            root=cache,
            split=split,
            is_training=training,
            batch_size=_per_rank(recipe, ranks) // recipe.accumulation,
            num_samples=samples,
            seed=recipe.seed,
            input_key=recipe.input_key,
            target_key=recipe.target_key,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"{root}, {split}: {error}; a stream needs its number of images: _info.json, or train_samples, test_samples"
        ) from error


def _reader_fingerprint(reader: Any, indices: list[int]) -> str:
    """SHA-256 of the files' names and, for a folder, sizes; of a Hugging Face dataset's own fingerprint."""
    digest = hashlib.sha256(str((len(reader), len(indices), sorted(_classes(reader).items()))).encode())
    own = getattr(getattr(reader, "dataset", None), "_fingerprint", None)
    if own is not None:
        digest.update(own.encode())
        return digest.hexdigest()
    sized = isinstance(reader, ReaderImageFolder) and len(reader) <= _SIZED_FILES
    for index in range(len(reader)):
        digest.update(reader.filename(index).encode() + b"\0")
        if sized:
            digest.update(b"%d\0" % Path(reader.filename(index, absolute=True)).stat().st_size)
    return digest.hexdigest()


def _stream_fingerprint(recipe: Recipe, dataset: IterableImageDataset, images: int | None) -> str:
    reader: Any = dataset.reader
    shards = getattr(getattr(reader, "split_info", None), "filenames", ())
    return hashlib.sha256(str((recipe.dataset, images, tuple(shards), _names(reader))).encode()).hexdigest()


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
