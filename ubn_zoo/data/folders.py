"""Image folders: which files are images, and which class each one has.

The name of the folder that contains an image is its class (timm's rule), at any depth: ``train/cat/1.jpg`` and
``train/animals/cat/1.jpg`` both have class ``cat``. Images in a tar file follow the same rule. Classes are numbered in
timm's natural order of names (``timm.utils.natural_key``), in which 2 comes before 10.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import natural_key

__all__ = ["EXTENSIONS", "find_images", "name_order"]

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


def name_order(names: Collection[str]) -> list[str]:
    """Sort names in timm's natural order; names that tie, such as ``1`` and ``01``, are sorted as plain strings.

    Args:
        names: Names of classes or files.
    """
    return sorted(names, key=lambda name: (natural_key(name), name))


def find_images(folder: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """List the images of a folder with their classes.

    Classes and their images are sorted by `name_order`, so labels do not depend on the file system. Hidden files and
    folders (``.ipynb_checkpoints``, ``._photo.jpg``) and files without an image extension are skipped.

    Args:
        folder: Folder of one split.

    Returns:
        Class names, and the paths of the images with their labels.

    Raises:
        FileNotFoundError: The folder does not exist or contains no images.
        ValueError: An image is directly in `folder` and therefore has no class; the message names it.
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
        if len(parts) == 1:
            raise ValueError(f"{path} is not in a class folder; valid: {root}/CLASS/{parts[-1]}; move or remove it")
        found.setdefault(parts[-2], []).append("/".join(parts))
    if not found:
        raise FileNotFoundError(f"{root} has no images ({', '.join(EXTENSIONS)}) in class folders")
    classes = tuple(name_order(found))
    return classes, [
        (str(root / path), label) for label, name in enumerate(classes) for path in name_order(found[name])
    ]
