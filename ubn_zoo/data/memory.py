"""Small image folders held in memory: decoded once into bytes, augmented a batch at a time.

An image folder is ``ROOT/SPLIT/CLASS/IMAGE``, with ``train`` and one of ``validation``, ``val`` and ``test`` as splits.
Its classes are numbered in timm's order of names (``timm.utils.natural_key``), in which 2 comes before 10.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection
from pathlib import Path

import numpy
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import natural_key
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ImageSet",
    "Normalizer",
    "find_images",
    "load_image_folder",
    "name_order",
    "random_crop_flip",
    "resize",
]

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Images of one size with their labels.

    Attributes:
        images: (N, 3, H, W), uint8, RGB.
        labels: (N,), int64, indices into ``classes``.
        classes: Names of the classes.

    Raises:
        ValueError: The tensors do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            shown = f"{tuple(self.images.shape)} {self.images.dtype}"
            raise ValueError(f"images: received {shown}; valid: (N, 3, H, W) torch.uint8")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            shown = f"{tuple(self.labels.shape)} {self.labels.dtype}"
            raise ValueError(f"labels: received {shown}; valid: ({len(self.images)},) torch.int64")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            found = f"{int(self.labels.min())} to {int(self.labels.max())}"
            raise ValueError(f"labels: received {found}; valid: 0 to {len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.images)


def name_order(names: Collection[str]) -> list[str]:
    """Names in timm's natural order; those that are equal in it, such as ``1`` and ``01``, in the order of their text.

    Args:
        names: Of classes, or of files.
    """
    return sorted(names, key=lambda name: (natural_key(name), name))


def find_images(folder: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """List a folder ``CLASS/IMAGE``.

    Classes are the folders that hold images. They, and the images of each, come in the order of `name_order`, so labels
    do not depend on the file system. Hidden files and folders (``.ipynb_checkpoints``, ``._photo.jpg``) and files that
    are no images by their ending are left out.

    Args:
        folder: The folder, one split of an image folder.

    Returns:
        Names of the classes, and the images' paths with their labels.

    Raises:
        FileNotFoundError: There is no such folder, or it has no images.
        ValueError: An image lies outside of the folders of classes, or deeper in one; the message names it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; an image folder has ROOT/SPLIT/CLASS/IMAGE")
    found: dict[str, list[str]] = {}
    paths, _ = find_images_and_targets(str(root), types=EXTENSIONS, sort=False)
    for path, _ in paths:
        parts = Path(path).parts[len(root.parts) :]
        if any(part.startswith(".") for part in parts):
            continue
        if len(parts) != 2:
            raise ValueError(
                f"{path} is not directly in a folder of its class; valid: {root}/CLASS/{parts[-1]}; move or remove it"
            )
        found.setdefault(parts[0], []).append(parts[1])
    if not found:
        raise FileNotFoundError(f"{root} has no images ({', '.join(EXTENSIONS)}) in folders of their class")
    classes = tuple(name_order(found))
    images = [
        (str(root / name / image), label) for label, name in enumerate(classes) for image in name_order(found[name])
    ]
    return classes, images


def load_image_folder(folder: str | os.PathLike[str], *, report: Callable[[int, int], None] | None = None) -> ImageSet:
    """Decode a folder ``CLASS/IMAGE`` of images that all have one size.

    Args:
        folder: The folder, one split of an image folder; classes and images are those of `find_images`.
        report: Called after every image with the number decoded and the number in all.

    Raises:
        FileNotFoundError: There is no such folder, or it has no images.
        ValueError: An image is in no folder of a class, cannot be read, or differs in size from the first; the message
            names it.
    """
    classes, files = find_images(folder)
    first = _decode(files[0][0])
    pixels = numpy.empty((len(files), *first.shape), dtype=numpy.uint8)
    for index, (path, _) in enumerate(files):
        image = _decode(path)
        if image.shape != first.shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, first.shape)]
            raise ValueError(f"{path} is {sizes[0]} pixels and {files[0][0]} is {sizes[1]}; all must have one size")
        pixels[index] = image
        if report is not None:
            report(index + 1, len(files))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor([label for _, label in files]), classes)


def _decode(path: str) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint8]]:
    try:
        with Image.open(path) as image:
            return numpy.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise errors of many classes for a damaged file
        raise ValueError(f"{path}: not a readable image ({error}); mend or remove it") from error


def resize(images: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Resize square images as Pillow does, which timm's evaluation transforms use: antialiased, rounded to bytes.

    Args:
        images: (N, 3, H, W), uint8.
        size: Side of the result in pixels.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        (N, 3, size, size), uint8.
    """
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode=interpolation, antialias=True, align_corners=False)


def random_crop_flip(images: Tensor, padding: int, hflip: float, generator: torch.Generator) -> Tensor:
    """Move and flip every image on its own: a random crop of the zero-padded image, then a random horizontal flip.

    Args:
        images: (N, C, H, W), any dtype.
        padding: Zero padding on each side in pixels; the crop has the image's own size.
        hflip: Probability of the flip.
        generator: Source of the random numbers; their count depends on N alone.

    Returns:
        (N, C, H, W), a new tensor.
    """
    count, _, height, width = images.shape
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    flipped = torch.rand((count, 1), generator=generator) < hflip
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(flipped, width - 1 - columns, columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Normalizer:
    """Bytes to what a model takes: (value / 255 - mean) / std, float32, channels last in memory.

    Args:
        mean: Mean per channel, of pixel values scaled to 0..1.
        std: Standard deviation per channel, of pixel values scaled to 0..1.
        device: Where the result goes.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._scale = (1.0 / (255.0 * torch.tensor(std, device=device)))[:, None, None]
        self._shift = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device))[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize (N, 3, H, W) of uint8."""
        values = images.to(self._scale.device, memory_format=torch.channels_last)
        return torch.addcmul(self._shift, values.float(), self._scale)
