"""Open image files as upright RGB with 8 bits per channel.

Pillow detects the format from the content, not the file name. Then:

- the EXIF orientation is applied, unless a setting says otherwise;
- 16-bit grayscale is scaled to 8 bits by its depth (65535 becomes 255), where Pillow's own conversion would clip it;
- the first frame of an animation is used;
- CMYK is converted with Pillow's formula, ignoring color profiles;
- the alpha channel is dropped and the stored colors are kept, as in timm.

Images with more than 178,956,970 pixels (Pillow's limit against decompression bombs), floating-point images, and
damaged, truncated or empty files are rejected.
"""

from __future__ import annotations

import os
from typing import IO

import numpy
from PIL import Image

from ubn_zoo.errors import DataError

__all__ = ["open_image", "to_rgb"]

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    file: str | os.PathLike[str] | IO[bytes], *, exif_rotation: bool = True, name: str | None = None
) -> Image.Image:
    """Open and decode an image.

    Args:
        file: Path, or a binary file object.
        exif_rotation: Whether to apply the EXIF orientation.
        name: Name of the file in error messages; by default its path.

    Returns:
        The image in mode RGB.

    Raises:
        DataError: The image cannot be read, or its pixels have no 8-bit equivalent; the message names the file.
    """
    shown = name or (os.fspath(file) if isinstance(file, (str, os.PathLike)) else "image")
    try:
        with Image.open(file) as opened:
            return to_rgb(opened, exif_rotation=exif_rotation)
    except Exception as error:  # Pillow's decoders raise errors of many classes for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{shown}: not a readable image ({reason}); repair or remove it and start again") from None


def to_rgb(image: Image.Image, *, exif_rotation: bool = True) -> Image.Image:
    """Convert an opened image to upright 8-bit RGB.

    Args:
        image: Image in any Pillow mode; for an animation, the current frame is used.
        exif_rotation: Whether to apply the EXIF orientation.

    Returns:
        The image in mode RGB.

    Raises:
        DataError: The pixels are floating-point, or integers beyond 16 bits.
    """
    method = _UPRIGHT.get(_orientation(image)) if exif_rotation else None
    if image.mode == "F":
        raise DataError("floating-point pixels have no defined range; convert the file to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scaled(image)
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    rgb = image.convert("RGB")
    return rgb if method is None else rgb.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data has no orientation, but the pixels may still be intact
        return 1


def _scaled(image: Image.Image) -> Image.Image:
    values = numpy.asarray(image)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
        raise DataError("integer pixels beyond 16 bits have no defined range; convert the file to 8 or 16 bits")
    return Image.fromarray(((values.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8))
