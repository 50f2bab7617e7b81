"""Streams: WebDataset shards and streamed Hugging Face datasets, read sequentially.

The random augmentation of an image is seeded from the run's seed, the epoch, the rank, the worker and the image's
position in the worker's part of the stream. An image that cannot be decoded raises an error, except in WebDataset
shards, where timm's reader skips it with a warning.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from timm.data.dataset import IterableImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info

from ubn_zoo.data.images import open_image, to_rgb
from ubn_zoo.data.readers import check_label, reader_classes
from ubn_zoo.data.settings import DataSource
from ubn_zoo.data.splits import hub_name, require_package
from ubn_zoo.errors import DataError
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.seeds import mixed_seed, seed_everything

__all__ = ["Stream", "check_shards", "open_stream", "stream_fingerprint", "stream_images"]

# timm's reader requires a number of images; this value means unknown.
_UNKNOWN = 10**12


class Stream(IterableDataset[tuple[Any, int]]):
    """Images of one of timm's streams, each augmented with its own random numbers.

    Args:
        dataset: The stream.
        transform: Maps an image to the value that is collated.
        ranks: This process among those that share the stream.
        name: Name of the stream in error messages.
        seed: The run's seed.
        workers: Processes per rank that read the stream.
        classes: Number of valid labels; None accepts any label.
        exif_rotation: Whether to apply the EXIF orientation of images.
    """

    def __init__(
        self,
        dataset: IterableImageDataset,
        transform: Any,
        ranks: Ranks,
        name: str,
        *,
        seed: int,
        workers: int,
        classes: int | None,
        exif_rotation: bool,
    ) -> None:
        reader: Any = dataset.reader
        self._dataset = dataset
        self._transform = transform
        self._seed = seed
        self._rank = ranks.rank
        self._classes = classes
        self._exif_rotation = exif_rotation
        self._name = name
        self._epoch = SharedCount()
        reader.dist_rank, reader.dist_num_replicas = ranks.rank, ranks.count
        dataset.set_loader_cfg(num_workers=workers)

    def start(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self._epoch.value = epoch
        self._dataset.set_epoch(epoch)
        reader: Any = self._dataset.reader
        # An existing pipeline would continue from its current position and random state.
        reader.ds = None
        reader.worker_seed = mixed_seed(self._seed, epoch, self._rank) % 2**63

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        worker_id = 0 if worker is None else worker.id
        epoch, samples = self._epoch.value, self._samples()
        for number in itertools.count():
            name = f"{self._name}, image {number} of worker {worker_id}"
            try:
                found = next(samples, None)
            except Exception as error:  # readers of streams raise errors of many classes
                raise DataError(f"{name}: {' '.join(str(error).split())}") from None
            if found is None:
                return
            content, target = found
            image = self._decode(content, name)
            label = check_label(target, self._classes, name)
            seed_everything(mixed_seed(self._seed, epoch, self._rank, worker_id, number))
            yield self._transform(image), label

    def _samples(self) -> Iterator[tuple[Any, Any]]:
        reader: Any = self._dataset.reader
        if hasattr(reader, "builder") and reader.ds is None:
            import datasets

            # Keep images undecoded: `datasets` would apply the EXIF orientation and clip 16-bit grayscale.
            reader._lazy_init()
            stream: Any = reader.ds
            reader.ds = stream.cast_column(reader.input_key, datasets.Image(decode=False))
        yield from reader

    def _decode(self, content: Any, name: str) -> Image.Image:
        if isinstance(content, dict):
            file = io.BytesIO(content["bytes"]) if content.get("bytes") else content["path"]
            return open_image(file, exif_rotation=self._exif_rotation, name=name)
        try:
            return to_rgb(content, exif_rotation=self._exif_rotation)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None


def open_stream(
    source: DataSource, split: str, *, samples: int | None, batch_size: int | None, seed: int
) -> tuple[IterableImageDataset, str]:
    """Open one split as a stream.

    Args:
        source: The dataset.
        split: Name of the split, or names of shards.
        samples: Maximum number of images; the number of images if the data does not state it.
        batch_size: Training batch size; None for held-out images.
        seed: The run's seed.

    Returns:
        timm's stream, and its name in error messages.

    Raises:
        DataError: The split does not exist, its number of images is unknown, or a required package is missing.
    """
    require_package(source.kind)
    # Keep a URL as a string: a path would drop one of its slashes.
    name, cache = ("", source.place) if source.kind == "wds" else hub_name(source.name, source.root)
    training = batch_size is not None
    # timm requires the number of images before it reads a Hugging Face dataset, but ignores it for held-out images.
    unknown = _UNKNOWN if source.kind == "hfids" and not training else None
    shown = f"{name or cache}, {split}"
    try:
        dataset = create_dataset(
            f"{source.kind}/{name}",
            root=cache,
            split=split,
            is_training=training,
            batch_size=batch_size or 1,
            num_samples=samples or unknown,
            seed=seed,
            input_key=source.input_key,
            input_img_mode="",
            target_key=source.target_key,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        hint = "" if samples else "; a stream needs its number of images: _info.json, or train_samples, test_samples"
        raise DataError(f"{shown}: {error}{hint}") from error
    reader: Any = dataset.reader
    described = _described(reader)
    if samples is not None and described is not None:
        reader.num_samples = min(samples, described)
    return dataset, shown


def _described(reader: Any) -> int | None:
    """Number of images that the description of the split states; None if it states none."""
    builder = getattr(reader, "builder", None)
    if builder is None:
        return reader.split_info.num_samples or None
    split = (builder.info.splits or {}).get(reader.split)
    return None if split is None else split.num_examples or None


def stream_images(reader: Any, samples: int | None) -> int | None:
    """Number of held-out images in a stream of at most `samples` images; None if unknown."""
    described = _described(reader)
    return described if described is None or samples is None else min(described, samples)


def _shards(reader: Any) -> Sequence[str]:
    """Names of the shards, if the reader knows them before reading."""
    return getattr(getattr(reader, "split_info", None), "filenames", ())


def check_shards(reader: Any, workers: int, ranks: Ranks, name: str) -> None:
    """Check that every worker gets a WebDataset shard; timm checks Hugging Face datasets itself.

    Raises:
        DataError: There are fewer shards than workers.
    """
    shards = len(_shards(reader))
    needed = ranks.count * max(1, workers)
    if 0 < shards < needed:
        raise DataError(
            f"{name}: received {shards} shards for {needed} workers in total; valid: at least one for each, so at most "
            f"{shards // ranks.count} workers with {ranks.count} ranks, or more and smaller shards"
        )


def stream_fingerprint(dataset: str, reader: Any, images: int | None) -> str:
    """SHA-256 of a stream's description, without reading its images."""
    said = (dataset, images, tuple(_shards(reader)), reader_classes(reader))
    return hashlib.sha256(str(said).encode()).hexdigest()
