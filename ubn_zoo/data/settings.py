"""Data settings: which data to read, where it is, and how to preprocess held-out images."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.recipes.schema import Recipe

__all__ = ["DataSource", "EvalSettings", "Feed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Selection and preprocessing of held-out images; recipe keys of the same names have longer descriptions.

    Attributes:
        img_size: Image side in pixels.
        interpolation: Resize filter, by timm's name.
        crop_pct: Side of the crop relative to the resized image.
        crop_mode: timm's crop mode: ``center``, ``squash`` or ``border``.
        mean: Mean per channel, of pixel values scaled to 0..1.
        std: Standard deviation per channel.
        num_classes: Outputs of the model.
        dataset: Kind of data.
        test_split: Held-out split.
        test_samples: Largest number of images.
        exif_rotation: Whether to apply the EXIF orientation of images.
        input_key: Column or file extension of the image.
        target_key: Column of the class.
        workers: Loader processes per rank.
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
    exif_rotation: bool = True
    input_key: str | None = None
    target_key: str | None = None
    workers: int = 0

    @property
    def test_img_size(self) -> int:
        """Side in pixels."""
        return self.img_size

    @property
    def seed(self) -> int:
        """Fixed seed, because held-out images are read without randomness."""
        return 0


# A complete recipe has all attributes of a feed.
EvalSettings = Recipe | Feed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Location of a dataset, and how its images are found and decoded. Readers and streams open its splits.

    Attributes:
        kind: Kind of data: ``folder``, ``memory``, ``wds``, ``hfds`` or ``hfids``.
        name: Name of a Hugging Face dataset; empty for other kinds.
        place: Folder or URL of the data.
        input_key: Column or file extension of the image; None for the reader's default.
        target_key: Column of the class; None for the reader's default.
        exif_rotation: Whether to apply the EXIF orientation of images.
    """

    kind: str
    name: str
    place: str
    input_key: str | None
    target_key: str | None
    exif_rotation: bool

    @classmethod
    def of(cls, settings: EvalSettings, data_dir: str | os.PathLike[str]) -> DataSource:
        """The dataset of a recipe or a feed, in a folder or at a URL."""
        kind, _, name = settings.dataset.partition("/")
        return cls(
            kind=kind,
            name=name,
            place=os.fspath(data_dir),
            input_key=settings.input_key,
            target_key=settings.target_key,
            exif_rotation=settings.exif_rotation,
        )

    @property
    def root(self) -> Path:
        """Folder of the data; not valid for URLs."""
        return Path(self.place)

    def eval_split(self) -> str:
        """Name of the held-out split.

        Raises:
            DataError: The data has no held-out split.
        """
        return find_eval_split(self.place, f"{self.kind}/{self.name}" if self.name else self.kind)
