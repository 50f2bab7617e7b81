"""Every reader decodes uncommon image files as docs/data.md says."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.images import RECIPE
from ubn_zoo.data.folders import find_images
from ubn_zoo.data.images import open_image
from ubn_zoo.data.loaders import open_eval
from ubn_zoo.errors import DataError
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.utils.distributed import Ranks

SIDE = 8
READERS = ("folder", "memory", "tar", "hfds", "hfids", "wds")
# A different color in each corner shows how an image is rotated.
CORNERS = numpy.zeros((SIDE, SIDE, 3), dtype=numpy.uint8)
CORNERS[:4, :4], CORNERS[:4, 4:] = (250, 10, 10), (10, 250, 10)
CORNERS[4:, :4], CORNERS[4:, 4:] = (10, 10, 250), (90, 90, 90)
RAMP = numpy.arange(SIDE * SIDE, dtype=numpy.uint16).reshape(SIDE, SIDE) * 1040


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    """A portrait as cameras store it: rotated left, with orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(numpy.rot90(CORNERS).copy()), exif=exif)


def animated() -> bytes:
    frames = [Image.fromarray(CORNERS), Image.new("RGB", (SIDE, SIDE), "white")]
    return saved(frames[0], save_all=True, append_images=frames[1:])


def palette() -> bytes:
    image = Image.fromarray(CORNERS).quantize(8)
    return saved(image, transparency=bytes([0] * 4 + [255] * 4))


def transparent() -> bytes:
    alpha = numpy.full((SIDE, SIDE, 1), 7, dtype=numpy.uint8)
    return saved(Image.fromarray(numpy.concatenate([CORNERS, alpha], 2)))


def cmyk() -> bytes:
    return saved(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "jpeg", quality=100, subsampling=0)


GRAY = ((RAMP.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8)
RED = numpy.broadcast_to(numpy.array([254, 0, 0], dtype=numpy.uint8), CORNERS.shape)
WHOLE = saved(Image.fromarray(CORNERS))
# File content and the expected pixels; None if the file is rejected.
FILES: dict[str, tuple[bytes, numpy.ndarray | None]] = {
    "plain": (WHOLE, CORNERS),
    "gray of 16 bits": (saved(Image.fromarray(RAMP)), numpy.repeat(GRAY[..., None], 3, 2)),
    "EXIF rotation": (rotated(), CORNERS),
    "animation": (animated(), CORNERS),
    "palette with transparency": (palette(), CORNERS),
    "transparency": (transparent(), CORNERS),
    "CMYK": (cmyk(), RED),
    "mislabeled": (saved(Image.fromarray(CORNERS), "bmp"), CORNERS),
    "truncated": (WHOLE[: len(WHOLE) // 2], None),
    "empty": (b"", None),
    "no image": (b"no picture", None),
}


def write(kind: str, root: Path, content: bytes) -> Recipe:
    """Write one held-out image of one class as a kind of data, and return a recipe that reads it."""
    recipe = dataclasses.replace(
        RECIPE, dataset="folder", crop="rrc", img_size=SIDE, crop_pct=1.0, num_classes=1, test_split="test"
    )
    root.mkdir(parents=True, exist_ok=True)
    if kind in ("folder", "memory", "tar"):
        (root / "test/a").mkdir(parents=True)
        (root / "test/a/1.png").write_bytes(content)
        if kind == "tar":
            with tarfile.open(root / "test.tar", "w") as archive:
                archive.add(root / "test", ".")
            (root / "test/a/1.png").unlink()
            (root / "test/a").rmdir()
            (root / "test").rmdir()
        return dataclasses.replace(recipe, dataset="memory", crop="pad") if kind == "memory" else recipe
    if kind == "wds":
        wds = pytest.importorskip("webdataset")
        with wds.TarWriter(str(root / "test.tar")) as writer:
            writer.write({"__key__": "1", "png": content, "cls": "0"})
        split = {"name": "test", "filenames": ["test.tar"], "shard_lengths": [1], "num_samples": 1}
        (root / "_info.json").write_text(json.dumps({"splits": {"test": split}}), encoding="utf-8")
        return dataclasses.replace(recipe, dataset="wds")
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"image": [{"bytes": content, "path": "1.png"}], "label": [0]}
    path = root / "set" / "data" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return dataclasses.replace(recipe, dataset=f"{kind}/set")


def read(recipe: Recipe, root: Path) -> numpy.ndarray:
    ((images, _),) = list(open_eval(recipe, root, Ranks()))
    pixels = (images[0] * 0.25 + 0.5) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", READERS)
def test_readers_agree_on_uncommon_files(kind: str, name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    recipe = write(kind, tmp_path, content)
    if expected is None:
        # timm's shard reader skips a damaged image, which the number of images reveals.
        match = "0 readable images" if kind == "wds" else "not a readable image|1.png"
        with pytest.raises(DataError, match=match):
            read(recipe, tmp_path)
        return
    found = read(recipe, tmp_path).astype(int)
    assert numpy.abs(found - expected).max() <= (2 if name in ("CMYK", "palette with transparency") else 0)


@pytest.mark.parametrize("kind", READERS)
def test_exif_rotation_can_be_disabled(kind: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(write(kind, tmp_path, rotated()), exif_rotation=False)
    assert numpy.array_equal(read(recipe, tmp_path), numpy.rot90(CORNERS))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_match_pillow(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(CORNERS), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert numpy.array_equal(numpy.asarray(open_image(io.BytesIO(content))), numpy.asarray(expected))


def test_pixels_without_an_8_bit_equivalent_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Callable[[], Image.Image], str]] = [
        (lambda: Image.fromarray(numpy.ones((4, 4), numpy.float32)), "floating-point pixels have no defined range"),
        (lambda: Image.fromarray(numpy.full((4, 4), 70_000, numpy.int32)), "integer pixels beyond 16 bits"),
    ]
    for number, (draw, message) in enumerate(cases):
        path = tmp_path / f"{number}.tiff"
        draw().save(path)
        with pytest.raises(DataError, match=rf"{number}\.tiff: not a readable image \({message}.*\); repair or remove"):
            open_image(path)
    (tmp_path / "giant.png").write_bytes(WHOLE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(DataError, match=r"giant\.png: not a readable image \(.*decompression bomb"):
        open_image(tmp_path / "giant.png")


def test_classes_are_the_folders_around_images_at_any_depth(tmp_path: Path) -> None:
    names = ("animals/cat/1.png", "cat/2.png", "animals/dog/1.png", "dog/.thumbs/cat/3.png")
    for name in names:
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name).write_bytes(WHOLE)
    assert find_images(tmp_path / "test") == (
        ("cat", "dog"),
        [(str(tmp_path / "test" / name), label) for name, label in zip(names[:3], (0, 0, 1), strict=True)],
    )
    recipe = dataclasses.replace(RECIPE, dataset="folder", crop="rrc", img_size=SIDE)
    folder = open_eval(recipe, tmp_path, Ranks())
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(tmp_path / "test", ".")
    tar = open_eval(recipe, tmp_path, Ranks())
    assert folder.classes == tar.classes == ("cat", "dog")
    for test in (folder, tar):
        assert [label for _, labels in test for label in labels.tolist()] == [0, 0, 1]
