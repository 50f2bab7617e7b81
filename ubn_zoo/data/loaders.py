"""Batches of training and held-out images; `open_train` and `open_eval` open a dataset once.

Order and augmentation depend only on the run's seed, the epoch and the image's position in the epoch. A batch is
therefore the same for any number of workers, and training can resume at any update of an epoch. The batches of a stream
also depend on the numbers of ranks and workers.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from timm.data.dataset import IterableImageDataset
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ubn_zoo.data.memory import ImageSet, Normalizer, image_set_fingerprint, open_memory, random_crop_flip, resize
from ubn_zoo.data.readers import (
    Labeler,
    Samples,
    file_name,
    labels_as_trained,
    open_reader,
    reader_classes,
    reader_fingerprint,
    relabel,
    relabel_images,
)
from ubn_zoo.data.settings import DataSource, EvalSettings
from ubn_zoo.data.streams import Stream, check_shards, open_stream, stream_fingerprint, stream_images
from ubn_zoo.data.transforms import eval_input, eval_transform, normalization, train_input, train_transform
from ubn_zoo.errors import DataError
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.seeds import mixed_seed

__all__ = [
    "EvalBatches",
    "MemoryEval",
    "MemoryTrain",
    "TrainBatches",
    "class_names",
    "describe",
    "eval_input",
    "normalization",
    "open_eval",
    "open_train",
    "train_input",
]


class TrainBatches(Protocol):
    """Batches of training images, reshuffled and augmented differently in each epoch."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where the data does not name them."""

    @property
    def steps(self) -> int:
        """Updates per epoch."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the set of training images."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over this rank's batches of one epoch, `accumulation` of them per update.

        Args:
            epoch: Epoch, from 0.
            first_step: Number of updates to skip because they are already done.

        Yields:
            Images (n, 3, H, W), normalized, float32, and labels (n,), int64, both on the rank's device.
        """


class EvalBatches(Protocol):
    """Held-out images in batches."""

    @property
    def images(self) -> int | None:
        """Number of images over all ranks; None for streams of unknown length."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where the data does not name them."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of this rank's images in the order of iteration; empty for streams."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the set of held-out images."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over this rank's share of the images, in batches like those of `TrainBatches.epoch`.

        Across ranks, each image appears exactly once. Some ranks may get fewer batches than others, or none.
        """

    def probe(self, count: int) -> Tensor:
        """Return at most `count` of all ranks' images, evenly spaced; for a stream, the first ones.

        Returns:
            (n, 3, H, W), normalized, on the rank's device.
        """


def _part_size(recipe: Recipe, ranks: Ranks) -> int:
    """Number of images in each of the `accumulation` parts of a rank's share of a batch."""
    parts = ranks.count * recipe.accumulation
    if recipe.batch_size % parts:
        raise DataError(
            f"batch_size: received {recipe.batch_size}; valid: a multiple of {parts}, for {ranks.count} "
            f"ranks in {recipe.accumulation} parts each"
        )
    size = recipe.batch_size // parts
    if (recipe.mixup or recipe.cutmix) and size % 2:
        raise DataError(
            f"batch_size: received {recipe.batch_size}, which is {size} images in each of {parts} parts; valid: an "
            f"even number in each, a multiple of {2 * parts}, as Mixup and CutMix pair images"
        )
    return size


def _steps(recipe: Recipe, images: int) -> int:
    if images < recipe.batch_size:
        raise DataError(
            f"received {images} training images; valid: at least one batch of {recipe.batch_size}; lower batch_size"
        )
    return images // recipe.batch_size


def _spread(total: int, wanted: int | None) -> list[int]:
    """Indices of at most `wanted` of `total` items, evenly spaced, so that sorted classes keep their shares."""
    count = total if wanted is None else min(total, wanted)
    return [index * total // count for index in range(count)]


class _EpochOrder:
    """Assigns images to batches, and parts of each batch to ranks.

    Ranks take consecutive parts, so concatenating them in rank order gives the batch of a single process. With repeated
    augmentation, the copies of an image go to different ranks instead.
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

    def share(self) -> slice:
        """This rank's slice of a batch."""
        if self._recipe.repeats > 1:
            return slice(self._ranks.rank, None, self._ranks.count)
        mine = self._ranks.share(self._recipe.batch_size)
        return slice(mine.start, mine.stop)


class MemoryTrain:
    """Training images in memory, with zero-padded random crops and flips applied per batch.

    Args:
        recipe: The run's complete recipe, with ``img_size``, ``interpolation``, ``mean`` and ``std`` set.
        data: The images.
        ranks: This process.

    Raises:
        DataError: The images are not square or do not fill a batch, or a batch cannot be split over the ranks.
    """

    def __init__(self, recipe: Recipe, data: ImageSet, ranks: Ranks) -> None:
        _check_square(data)
        self._recipe = recipe
        self._data = _chosen(data, recipe.train_samples)
        self._ranks = ranks
        _part_size(recipe, ranks)  # raises if a batch cannot be split over the ranks
        self._normalize = Normalizer(*normalization(recipe), ranks.device)
        self.steps = _steps(recipe, len(self._data))
        self.classes = data.classes
        self.fingerprint = image_set_fingerprint(self._data)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self._recipe
        size, interpolation = train_input(recipe)
        order = _EpochOrder(recipe, len(self._data), self._ranks)
        for step in range(first_step, self.steps):
            chosen = torch.tensor(order.batch(epoch, step))
            # Augment the whole batch, so that the random numbers do not depend on the number of ranks.
            generator = torch.Generator().manual_seed(mixed_seed(recipe.seed, epoch, step, 1) % 2**63)
            images = random_crop_flip(self._data.images[chosen], recipe.crop_padding, recipe.hflip, generator)
            mine = order.share()
            labels = self._data.labels[chosen][mine].to(self._ranks.device)
            prepared = self._normalize(resize(images[mine], size, interpolation))
            parts = recipe.accumulation
            yield from zip(prepared.chunk(parts), labels.chunk(parts), strict=True)


class MemoryEval:
    """Held-out images in memory.

    Args:
        recipe: As for `MemoryTrain`.
        data: The images.
        ranks: This process.
        batch_size: Images per batch.

    Raises:
        DataError: The images are not square.
    """

    def __init__(self, recipe: EvalSettings, data: ImageSet, ranks: Ranks, batch_size: int = 256) -> None:
        _check_square(data)
        self._data = _chosen(data, recipe.test_samples)
        self._recipe = recipe
        self._share = ranks.share(len(self._data))
        self._normalize = Normalizer(*normalization(recipe), ranks.device)
        self._batch_size = batch_size
        self.images = len(self._data)
        self.classes = data.classes
        self.files = self._data.files[self._share.start : self._share.stop]
        self.fingerprint = image_set_fingerprint(self._data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, interpolation = eval_input(self._recipe)
        for start in range(self._share.start, self._share.stop, self._batch_size):
            part = slice(start, min(start + self._batch_size, self._share.stop))
            images = self._normalize(resize(self._data.images[part], size, interpolation))
            yield images, self._data.labels[part].to(images.device)

    def probe(self, count: int) -> Tensor:
        chosen = self._data.images[torch.tensor(_spread(self.images, count))]
        return self._normalize(resize(chosen, *eval_input(self._recipe)))


def _check_square(data: ImageSet) -> None:
    height, width = data.images.shape[2:]
    if height != width:
        raise DataError(f"received images of {width}x{height} pixels; valid: square ones, or dataset folder")


def _chosen(data: ImageSet, wanted: int | None) -> ImageSet:
    if wanted is None or wanted >= len(data):
        return data
    return data.select(torch.tensor(_spread(len(data), wanted)))


class _TrainSampler(Sampler[list[tuple[int, int, int]]]):
    """Samples this rank's batches as (index, epoch, position in the epoch), starting at any update."""

    def __init__(self, recipe: Recipe, images: int, ranks: Ranks) -> None:
        self._order = _EpochOrder(recipe, images, ranks)
        self._recipe = recipe
        self._part = _part_size(recipe, ranks)
        self.steps = _steps(recipe, images)
        self.start = (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, first_step = self.start
        size = self._recipe.batch_size
        for step in range(first_step, self.steps):
            batch = [(index, epoch, step * size + place) for place, index in enumerate(self._order.batch(epoch, step))]
            mine = batch[self._order.share()]
            for start in range(0, len(mine), self._part):
                yield mine[start : start + self._part]


def _ignore_signals(worker: int) -> None:
    """Ignore signals that reach the whole process group: the run handles them, and its workers end with it."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _useful_workers(wanted: int) -> int:
    """At most one worker per core; with random access, batches do not depend on the number of workers."""
    return min(wanted, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _label_limit(settings: EvalSettings, reader: Any) -> int | None:
    """Number of valid labels; None accepts any label."""
    return settings.num_classes or len(reader.class_to_idx) or None


def _samples(settings: EvalSettings, reader: Any, transform: Any, indices: list[int]) -> Samples:
    return Samples(
        reader,
        transform,
        indices,
        seed=settings.seed,
        classes=_label_limit(settings, reader),
        exif_rotation=settings.exif_rotation,
    )


def _stream(settings: EvalSettings, dataset: IterableImageDataset, transform: Any, ranks: Ranks, name: str) -> Stream:
    return Stream(
        dataset,
        transform,
        ranks,
        name,
        seed=settings.seed,
        workers=settings.workers,
        classes=_label_limit(settings, dataset.reader),
        exif_rotation=settings.exif_rotation,
    )


def _loader(dataset: Any, ranks: Ranks, *, workers: int, **batches: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=ranks.device.type == "cuda",
        # Its own generator, so that loading does not advance the random state of the process.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
        **batches,
    )


def _prefetched(loader: Any, recipe: EvalSettings, ranks: Ranks) -> PrefetchLoader:
    mean, std = normalization(recipe)
    return PrefetchLoader(loader, mean=mean, std=std, device=ranks.device)


class _ReaderTrain:
    """Training images behind one of timm's readers with random access."""

    def __init__(self, recipe: Recipe, reader: Any, ranks: Ranks) -> None:
        indices = _spread(len(reader), recipe.train_samples)
        self.classes = reader_classes(reader)
        self._sampler = _TrainSampler(recipe, len(indices), ranks)
        workers = _useful_workers(recipe.workers)
        loader = _loader(
            _samples(recipe, reader, train_transform(recipe), indices),
            ranks,
            workers=workers,
            batch_sampler=self._sampler,
            persistent_workers=workers > 0,
        )
        self._loader = _prefetched(loader, recipe, ranks)
        self.steps = self._sampler.steps
        self.fingerprint = reader_fingerprint(reader, indices)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._sampler.start = (epoch, first_step)
        yield from self._loader


class _ReaderEval:
    """Held-out images behind one of timm's readers with random access."""

    def __init__(self, recipe: EvalSettings, reader: Any, ranks: Ranks, batch_size: int, crop_mode: str | None) -> None:
        self._recipe, self._reader, self._ranks = recipe, reader, ranks
        self._transform = eval_transform(recipe, crop_mode)
        self._indices = indices = _spread(len(reader), recipe.test_samples)
        self.images = len(indices)
        self.classes = reader_classes(reader)
        self.fingerprint = reader_fingerprint(reader, indices)
        self._mine = [indices[place] for place in ranks.share(len(indices))]
        self._loader = self._load(self._mine, batch_size, _useful_workers(recipe.workers))

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(file_name(self._reader, index) for index in self._mine)

    def _load(self, indices: list[int], batch_size: int, workers: int) -> PrefetchLoader:
        loader = _loader(
            _samples(self._recipe, self._reader, self._transform, indices),
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
        # Use a worker if there are any: workers that start later must not inherit an open tar file.
        return torch.cat([images for images, _ in self._load(chosen, count, min(1, self._recipe.workers))])


class _StreamTrain:
    """Training images of a stream.

    To resume within an epoch, the stream is read from the start and the images already used are skipped. A stream with
    fewer images than the epoch needs wraps around, as with timm's readers.
    """

    def __init__(self, recipe: Recipe, dataset: IterableImageDataset, name: str, ranks: Ranks) -> None:
        reader: Any = dataset.reader
        self.classes = reader_classes(reader)
        self._stream = _stream(recipe, dataset, train_transform(recipe), ranks, name)
        self._recipe = recipe
        self._ranks = ranks
        self._loader = _loader(
            self._stream,
            ranks,
            workers=recipe.workers,
            batch_size=_part_size(recipe, ranks),
        )
        self.steps = _steps(recipe, reader.num_samples)
        self.fingerprint = stream_fingerprint(recipe.dataset, reader, reader.num_samples)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self._recipe
        self._stream.start(epoch)
        # Workers derive their seeds from this epoch.
        self._loader.generator.manual_seed(mixed_seed(recipe.seed, epoch, self._ranks.rank) % 2**63)
        parts = itertools.islice(_prefetched(self._loader, recipe, self._ranks), self.steps * recipe.accumulation)
        yield from itertools.islice(parts, first_step * recipe.accumulation, None)


class _StreamEval:
    """Held-out images of a stream. Every rank reads the whole stream and keeps only its own batches."""

    files: tuple[str, ...] = ()

    def __init__(
        self,
        recipe: EvalSettings,
        dataset: IterableImageDataset,
        name: str,
        ranks: Ranks,
        batch_size: int,
        crop_mode: str | None,
    ) -> None:
        reader: Any = dataset.reader
        self.classes = reader_classes(reader)
        self.images = stream_images(reader, recipe.test_samples)
        self._stream = _stream(recipe, dataset, eval_transform(recipe, crop_mode), Ranks(), name)
        self._recipe = recipe
        self._name = name
        self._ranks = ranks
        self._loader = _loader(self._stream, ranks, workers=recipe.workers, batch_size=batch_size)
        self.fingerprint = stream_fingerprint(recipe.dataset, reader, self.images)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of all ranks."""
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
                f"{self._name} has {seen} readable images, but its description says {self.images}; repair the data or "
                "its description"
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


def open_train(recipe: Recipe, data_dir: str | os.PathLike[str], ranks: Ranks) -> TrainBatches:
    """Open the training images of a recipe.

    Args:
        recipe: The run's complete recipe, with ``img_size``, ``interpolation``, ``mean`` and ``std`` set.
        data_dir: Folder of the data. For ``wds``, also a URL such as ``https://host/shards``. For Hugging Face
            datasets, the cache folder, or a folder that contains the dataset under its name.
        ranks: This process.

    Raises:
        DataError: There are no images, they do not fill a batch, or a required package is missing.
    """
    source, split = DataSource.of(recipe, data_dir), recipe.train_split
    if source.kind == "memory":
        return MemoryTrain(recipe, open_memory(source.root / split, source.exif_rotation), ranks)
    if source.kind in ("wds", "hfids"):
        part = _part_size(recipe, ranks)
        dataset, name = open_stream(source, split, samples=recipe.train_samples, batch_size=part, seed=recipe.seed)
        check_shards(dataset.reader, recipe.workers, ranks, name)
        return _StreamTrain(recipe, dataset, name, ranks)
    return _ReaderTrain(recipe, open_reader(source, split), ranks)


def open_eval(
    recipe: EvalSettings,
    data_dir: str | os.PathLike[str],
    ranks: Ranks,
    classes: Sequence[str] | Labeler = (),
    *,
    batch_size: int = 256,
    crop_mode: str | None = None,
) -> EvalBatches:
    """Open the held-out images of a recipe.

    Args:
        recipe: As for `open_train`, or a `Feed`.
        data_dir: As for `open_train`.
        ranks: This process.
        classes: Class names in the order of the training labels, or a function that maps class names to labels; by
            default the class names of the held-out images. Numeric labels without names are not changed.
        batch_size: Images per batch on each rank.
        crop_mode: timm's crop mode: ``center``, ``squash`` or ``border``; None for ``center``.

    Raises:
        DataError: There are no images, one has an unknown class, or a required package is missing.
    """
    source = DataSource.of(recipe, data_dir)
    split = recipe.test_split or source.eval_split()
    labeler = classes if callable(classes) else labels_as_trained(classes, f"{source.place}, {split}")
    if source.kind == "memory":
        data = relabel_images(open_memory(source.root / split, source.exif_rotation), labeler)
        return MemoryEval(recipe, data, ranks, batch_size)
    if source.kind in ("wds", "hfids"):
        dataset, name = open_stream(source, split, samples=recipe.test_samples, batch_size=None, seed=recipe.seed)
        relabel(dataset.reader, labeler)
        return _StreamEval(recipe, dataset, name, ranks, batch_size, crop_mode)
    reader = open_reader(source, split)
    relabel(reader, labeler)
    return _ReaderEval(recipe, reader, ranks, batch_size, crop_mode)


def describe(train: TrainBatches, test: EvalBatches) -> dict[str, Any]:
    """Describe the data in a run's record."""
    return {
        "train": train.fingerprint,
        "test": test.fingerprint,
        "test_images": test.images,
        "classes": list(train.classes),
    }


def class_names(train: TrainBatches, count: int) -> tuple[str, ...]:
    """Class names of a model, one per output.

    Args:
        train: The training images.
        count: Outputs of the model.

    Returns:
        The names in the data, then ``unused 10`` and so on for outputs without a class in the data; numbers if the data
        has no names.
    """
    if not train.classes:
        return tuple(map(str, range(count)))
    return train.classes + tuple(f"unused {label}" for label in range(len(train.classes), count))
