"""Small images of one size in memory: decoded once to uint8 and augmented per batch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from ubn_zoo.data.folders import find_images
from ubn_zoo.data.images import open_image
from ubn_zoo.errors import DataError

__all__ = [
    "ImageSet",
    "Normalizer",
    "image_set_fingerprint",
    "load_image_folder",
    "open_memory",
    "random_crop_flip",
    "resize",
]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Images of one size with their labels.

    Attributes:
        images: (N, 3, H, W), uint8, RGB.
        labels: (N,), int64, indices into ``classes``.
        classes: Names of the classes.
        files: File names of the images; empty if the images do not come from files.

    Raises:
        ValueError: Shapes, dtypes or labels do not match.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...] = ()

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

    def select(self, chosen: Tensor, labels: Tensor | None = None, classes: tuple[str, ...] | None = None) -> ImageSet:
        """Select images, optionally with new labels.

        Args:
            chosen: Indices of the images, (n,), int64.
            labels: New labels, (n,); by default the current ones.
            classes: Names of the classes of `labels`.
        """
        return ImageSet(
            self.images[chosen],
            self.labels[chosen] if labels is None else labels,
            self.classes if classes is None else classes,
            tuple(self.files[index] for index in chosen.tolist()) if self.files else (),
        )


def load_image_folder(
    folder: str | os.PathLike[str],
    *,
    exif_rotation: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Decode a folder ``CLASS/IMAGE`` of images that all have the same size.

    Args:
        folder: Folder of one split, listed by `find_images`.
        exif_rotation: Whether to apply the EXIF orientation of images.
        report: Called after every image with the number decoded and the total.

    Raises:
        FileNotFoundError: The folder does not exist or contains no images.
        ValueError: An image is not in a class folder, cannot be read, or differs in size from the first; the message
            names it.
    """
    classes, files = find_images(folder)
    first = _decode(files[0][0], exif_rotation)
    pixels = numpy.empty((len(files), *first.shape), dtype=numpy.uint8)
    for index, (path, _) in enumerate(files):
        image = _decode(path, exif_rotation)
        if image.shape != first.shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, first.shape)]
            raise ValueError(f"{path} is {sizes[0]} pixels and {files[0][0]} is {sizes[1]}; all must have equal sizes")
        pixels[index] = image
        if report is not None:
            report(index + 1, len(files))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    names = tuple(Path(path).relative_to(folder).as_posix() for path, _ in files)
    return ImageSet(images, torch.tensor([label for _, label in files]), classes, names)


def _decode(path: str, exif_rotation: bool) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint8]]:
    return numpy.asarray(open_image(path, exif_rotation=exif_rotation))


def open_memory(folder: Path, exif_rotation: bool) -> ImageSet:
    """Decode one split of an image folder.

    Raises:
        DataError: The folder does not exist, or its images cannot be used.
    """
    try:
        return load_image_folder(folder, exif_rotation=exif_rotation)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from None


def image_set_fingerprint(data: ImageSet) -> str:
    """SHA-256 of images in memory, their labels and classes."""
    digest = hashlib.sha256(str((tuple(data.images.shape), data.classes)).encode())
    for tensor in (data.images, data.labels):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def resize(images: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Resize square images as timm's evaluation transforms do with Pillow: antialiased, rounded to uint8.

    Args:
        images: (N, 3, H, W), uint8.
        size: Height and width of the result in pixels.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        (N, 3, size, size), uint8.
    """
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode=interpolation, antialias=True, align_corners=False)


def random_crop_flip(images: Tensor, padding: int, hflip: float, generator: torch.Generator) -> Tensor:
    """Shift and flip each image independently: a random crop of the zero-padded image, then a random horizontal flip.

    Args:
        images: (N, C, H, W), any dtype.
        padding: Zero padding on each side in pixels; the crop has the original image size.
        hflip: Probability of the flip.
        generator: Random number generator; the number of draws depends only on N.

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
    """Normalizes uint8 images to model input: (value / 255 - mean) / std, float32, channels-last.

    Args:
        mean: Mean per channel, of pixel values scaled to 0..1.
        std: Standard deviation per channel, of pixel values scaled to 0..1.
        device: Device of the result.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._scale = (1.0 / (255.0 * torch.tensor(std, device=device)))[:, None, None]
        self._shift = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device))[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 images (N, 3, H, W)."""
        values = images.to(self._scale.device, memory_format=torch.channels_last)
        return torch.addcmul(self._shift, values.float(), self._scale)
