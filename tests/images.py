"""Small synthetic images that are easy to classify, and a recipe that learns them in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image

from ubn_zoo.data.memory import ImageSet
from ubn_zoo.recipes.schema import Recipe

RECIPE = Recipe(
    source="tests",
    command="pytest",
    hardware="any",
    time="seconds",
    expected="none",
    model="resnet10t",
    dataset="memory",
    num_classes=2,
    img_size=32,
    interpolation="bilinear",
    crop_pct=1.0,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    crop="pad",
    crop_padding=1,
    epochs=2,
    batch_size=8,
    optimizer="adamw",
    lr=0.003,
    weight_decay=0.01,
    warmup_epochs=0.5,
    label_smoothing=0.1,
    seed=3,
    device="cpu",
    workers=0,
    probe_images=8,
)


def striped_images(count: int, seed: int, side: int = 16) -> ImageSet:
    """Noisy images of two classes: horizontal and vertical stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    stripes = 80.0 * (torch.arange(side) % 4 < 2)
    horizontal = stripes[:, None].expand(side, side)
    clean = torch.where(labels[:, None, None] == 0, horizontal, horizontal.t())
    noisy = clean[:, None] + 120 * torch.rand((count, 3, side, side), generator=generator)
    return ImageSet(noisy.to(torch.uint8), labels, ("horizontal", "vertical"))


def write_image(path: Path, pixels: numpy.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_image_folder(root: Path, train: int = 64, test: int = 32) -> Path:
    """The stripes as an image folder of PNG files, ``train/`` and ``test/``."""
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        data = striped_images(count, seed)
        for index, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            path = root / split / data.classes[label] / f"{index:03d}.png"
            write_image(path, image.permute(1, 2, 0).contiguous().numpy())
    return root
