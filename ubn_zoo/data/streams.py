"""Streams: WebDataset shards and streamed Hugging Face datasets, read from front to back.

All randomness of an image comes from a seed made of the run's seed, the epoch, the rank, the worker and the image's
place in what that worker reads. An image that cannot be decoded ends the run with an error, except in WebDataset
shards: timm's reader skips it with a warning.
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

# timm's reader requires a number of images; this one stands for an unknown number.
_UNKNOWN = 10**12


class Stream(IterableDataset[tuple[Any, int]]):
    """Images of one of timm's streams, each augmented with its own random numbers.

    Args:
        dataset: The stream.
        transform: From an image to what is collated.
        ranks: This process among those that share the stream.
        name: What errors call the stream.
        seed: The run's seed.
        workers: Processes per rank that read the stream.
        classes: Number of valid labels; None for any.
        exif_rotation: Whether images are turned upright as their EXIF orientation says.
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
        """Make the next pass that of an epoch."""
        self._epoch.value = epoch
        self._dataset.set_epoch(epoch)
        reader: Any = self._dataset.reader
        # An existing pipeline would continue where it was, with the random numbers it had.
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
            except Exception as error:  # what reads the stream raises errors of many classes
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

            # Undecoded: `datasets` would apply the EXIF orientation itself, and clip 16-bit grayscale.
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
        source: The data set.
        split: The split, or names of shards.
        samples: Largest number of images; the number of images where the data does not describe it.
        batch_size: Images per batch of training; None for held-out images.
        seed: The run's seed.

    Returns:
        timm's stream, and what errors call it.

    Raises:
        DataError: There is no such split, its number of images is unknown, or the package that reads it is missing.
    """
    require_package(source.kind)
    # An address stays a text: a path would drop one of its slashes.
    name, cache = ("", source.place) if source.kind == "wds" else hub_name(source.name, source.root)
    training = batch_size is not None
    # Before it reads a Hugging Face dataset, timm requires the number of images; of held-out ones it does not use it.
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
    """How many images the split has, as its description says; None where nothing says it."""
    builder = getattr(reader, "builder", None)
    if builder is None:
        return reader.split_info.num_samples or None
    split = (builder.info.splits or {}).get(reader.split)
    return None if split is None else split.num_examples or None


def stream_images(reader: Any, samples: int | None) -> int | None:
    """Number of held-out images in a stream that is read up to a number of them; None if unknown."""
    described = _described(reader)
    return described if described is None or samples is None else min(described, samples)


def _shards(reader: Any) -> Sequence[str]:
    """Names of the shards that a reader knows before it reads."""
    return getattr(getattr(reader, "split_info", None), "filenames", ())


def check_shards(reader: Any, workers: int, ranks: Ranks, name: str) -> None:
    """Refuse WebDataset shards that leave a worker without any; timm refuses those of Hugging Face datasets.

    Raises:
        DataError: There are fewer shards than workers.
    """
    shards = len(_shards(reader))
    needed = ranks.count * max(1, workers)
    if 0 < shards < needed:
        raise DataError(
            f"{name}: received {shards} shards for {needed} workers in all; valid: at least one for each, so at most "
            f"{shards // ranks.count} workers with {ranks.count} ranks, or more and smaller shards"
        )


def stream_fingerprint(dataset: str, reader: Any, images: int | None) -> str:
    """SHA-256 of what a stream's description says before it is read."""
    said = (dataset, images, tuple(_shards(reader)), reader_classes(reader))
    return hashlib.sha256(str(said).encode()).hexdigest()
