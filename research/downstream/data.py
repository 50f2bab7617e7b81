"""Photographs with boxes and masks, made by pasting the objects of photographs onto textures of others.

Nobody drew these boxes and masks. The object of a photograph is what differs in color from the border of the picture,
by Otsu's threshold; photographs where this gives no compact object inside the frame are skipped. The objects, scaled,
are pasted onto enlarged corners of other photographs, and a mask is what remains visible of the object pasted. So
outlines are as exact as the threshold, and the composites are easier than scenes: the numbers compare norms, and are
not comparable with those of any benchmark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ubn_zoo.errors import InvalidArgumentError

SIDE = 160
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def foreground(pixels: np.ndarray) -> np.ndarray | None:
    """The mask of the object in a photograph (H, W, 3), or None where a threshold does not find one."""
    border = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3), pixels[:, :4].reshape(-1, 3)])
    distance = np.linalg.norm(pixels.astype(float) - np.median(border, 0), axis=2)
    distance = ndimage.gaussian_filter(distance, 1.5)
    counts, edges = np.histogram(distance, 64)
    weight = np.cumsum(counts) / counts.sum()
    mean = np.cumsum(counts * edges[:-1]) / counts.sum()
    between = (mean[-1] * weight - mean) ** 2 / np.maximum(weight * (1 - weight), 1e-9)
    parts, count = ndimage.label(distance > edges[int(between[:-1].argmax()) + 1])
    if count == 0:
        return None
    sizes = np.bincount(parts.ravel())[1:]
    mask = ndimage.binary_fill_holes(parts == sizes.argmax() + 1)
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    rows, columns = np.ptp(np.flatnonzero(mask.any(1))) + 1, np.ptp(np.flatnonzero(mask.any(0))) + 1
    compact = mask.sum() > 0.4 * rows * columns and 0.08 < mask.mean() < 0.7
    return mask if compact and rim.mean() < 0.02 and sizes.max() > 0.9 * sizes.sum() else None


def _photographs(folder: Path, generator: np.random.Generator, wanted: int) -> list[tuple[np.ndarray, np.ndarray]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for index in generator.permutation(len(files)):
        with Image.open(files[index]) as image:
            pixels = np.asarray(image.convert("RGB"))
        mask = foreground(pixels)
        if mask is not None:
            found.append((pixels, mask))
        if len(found) == wanted:
            break
    if len(found) < 2:
        raise InvalidArgumentError(
            f"{folder}: {len(files)} photographs, {len(found)} of them with an object that a threshold finds; "
            "needed are photographs of single objects on plain ground"
        )
    return found


def _background(pixels: np.ndarray, mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The corner of a photograph with the least of its object, enlarged."""
    height, width = (size // 4 for size in mask.shape)
    corners = [(y, x) for y in (0, mask.shape[0] - height) for x in (0, mask.shape[1] - width)]
    y, x = min(corners, key=lambda at: mask[at[0] : at[0] + height, at[1] : at[1] + width].mean())
    corner = Image.fromarray(pixels[y : y + height, x : x + width]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.rot90(np.asarray(corner), int(generator.integers(4)))


def composite(
    photographs: list[tuple[np.ndarray, np.ndarray]], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One picture (H, W, 3) with one to three objects, and the number of the object at each pixel, 0 for none."""
    canvas = _background(*photographs[generator.integers(len(photographs))], generator).copy()
    numbers = np.zeros((SIDE, SIDE), np.uint8)
    for number in range(1, generator.integers(1, 4) + 1):
        pixels, mask = photographs[generator.integers(len(photographs))]
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        scale = SIDE * generator.uniform(0.25, 0.6) / max(box[2] - box[0], box[3] - box[1])
        size = [max(8, round(scale * (box[i + 2] - box[i]))) for i in (0, 1)]
        piece = np.asarray(Image.fromarray(pixels).crop(box).resize(size, Image.Resampling.BILINEAR))
        shape = np.asarray(Image.fromarray(mask).crop(box).resize(size, Image.Resampling.NEAREST))
        if generator.random() < 0.5:
            piece, shape = piece[:, ::-1], shape[:, ::-1]
        y, x = (int(generator.integers(0, SIDE - length + 1)) for length in shape.shape)
        window = np.s_[y : y + shape.shape[0], x : x + shape.shape[1]]
        # An object that would cover a quarter of another one is left out.
        if any((numbers[window][shape] == other).sum() > 0.25 * (numbers == other).sum() for other in range(1, number)):
            continue
        canvas[window][shape] = piece[shape]
        numbers[window][shape] = number
    return canvas, numbers


def make(data_dir: Path, output: Path, train: int = 300, test: int = 60, seed: int = 0) -> None:
    """Writes `train` and `test` composites, `NNNN.jpg` and `NNNN.png` (the numbers), from the folders of those names.

    Objects and backgrounds of the test pictures come from photographs that the training pictures do not use.

    Raises:
        InvalidArgumentError: A folder has fewer than two photographs whose object is found.
    """
    for split, count in (("train", train), ("test", test)):
        generator = np.random.default_rng([seed, split == "test"])
        photographs = _photographs(data_dir / split, generator, count)
        folder = output / split
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            canvas, numbers = composite(photographs, generator)
            Image.fromarray(canvas).save(folder / f"{index:04}.jpg", quality=95)
            Image.fromarray(numbers).save(folder / f"{index:04}.png")


def load(folder: Path) -> list[tuple[Tensor, dict[str, Any]]]:
    """Pictures (3, H, W) from 0 to 1, each with its `boxes` (M, 4), `labels` (M,) and `masks` (M, H, W).

    Raises:
        InvalidArgumentError: The folder has no pictures that :func:`make` wrote.
    """
    samples = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image, Image.open(path.with_suffix(".png")) as numbers:
            picture = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            masks = torch.from_numpy(np.array(numbers))
        masks = (masks == masks.unique()[1:, None, None]).to(torch.uint8)
        boxes = []
        for mask in masks:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.ones(len(boxes), dtype=torch.int64)}
        samples.append((picture, {**target, "masks": masks}))
    if not samples:
        raise InvalidArgumentError(f"{folder} has no pictures; make them: python -m research.downstream data --help")
    return samples
