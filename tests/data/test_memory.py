"""Image folders in memory: reading, augmentation, preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import timm.data
import torch
from PIL import Image
from timm.utils import natural_key
from torch import nn

from tests.images import striped_images, write_image
from ubn_zoo.data.folders import find_images, name_order
from ubn_zoo.data.memory import (
    ImageSet,
    Normalizer,
    load_image_folder,
    random_crop_flip,
    resize,
)


def test_image_folders_are_read_in_timms_order(tmp_path: Path) -> None:
    random = numpy.random.default_rng(0)
    written = {}
    for name in ("b10/2.png", "b10/10.png", "b2/1.png"):
        written[name] = random.integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
        write_image(tmp_path / name, written[name])
    write_image(tmp_path / "b2/2.png", written["b2/1.png"][..., 0])  # gray
    for name in ("b2/notes.txt", "b2/._1.png", ".hidden/1.png", ".DS_Store", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image", encoding="utf-8")
    reported: list[tuple[int, int]] = []
    data = load_image_folder(tmp_path, report=lambda done, total: reported.append((done, total)))
    assert data.classes == ("b2", "b10")
    assert find_images(tmp_path) == (
        data.classes,
        [(str(tmp_path / name), int(name[1] == "1")) for name in ("b2/1.png", "b2/2.png", "b10/2.png", "b10/10.png")],
    )
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for index, name in ((0, "b2/1.png"), (2, "b10/2.png"), (3, "b10/10.png")):
        assert numpy.array_equal(data.images[index].permute(1, 2, 0).numpy(), written[name])
    assert torch.equal(data.images[1], data.images[1, :1].expand(3, -1, -1))


def test_unusable_image_folders_raise_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_image_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has no images"):
        load_image_folder(tmp_path)
    write_image(tmp_path / "a/1.png", numpy.zeros((4, 4, 3), numpy.uint8))
    write_image(tmp_path / "a/2.png", numpy.zeros((4, 5, 3), numpy.uint8))
    with pytest.raises(ValueError, match=r"2\.png is 5x4 pixels and .*1\.png is 4x4"):
        load_image_folder(tmp_path)
    whole = (tmp_path / "a/1.png").read_bytes()
    for content in (b"", b"not a picture", whole[: len(whole) // 2], whole[:40] + bytes(20) + whole[60:]):
        (tmp_path / "a/2.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"2\.png: not a readable image .*; repair or remove it"):
            load_image_folder(tmp_path)
    (tmp_path / "a/2.png").unlink()
    write_image(tmp_path / "2.png", numpy.zeros((4, 4, 3), numpy.uint8))
    with pytest.raises(ValueError, match=r"2\.png is not in a class folder; valid: .*/CLASS/2"):
        load_image_folder(tmp_path)


def test_name_order_matches_timm() -> None:
    names = ["b", "a10", "A2", "a2", "1", "01", "10", "n2", "n01"]
    order = name_order(names)
    assert order == name_order(names[::-1]) == ["01", "1", "10", "A2", "a2", "a10", "b", "n01", "n2"]
    assert list(map(natural_key, order)) == sorted(map(natural_key, names))


def test_image_sets_are_validated() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    assert len(ImageSet(images, labels, ("a", "b"))) == 2
    with pytest.raises(ValueError, match="images: received"):
        ImageSet(images.float(), labels, ("a", "b"))
    with pytest.raises(ValueError, match="labels: received"):
        ImageSet(images, labels[:1], ("a", "b"))
    with pytest.raises(ValueError, match="labels: received 0 to 1; valid: 0 to 0"):
        ImageSet(images, labels, ("a",))


def test_random_crop_and_flip_move_whole_images() -> None:
    images = torch.arange(1, 101).reshape(1, 1, 10, 10).expand(200, 3, 10, 10).to(torch.uint8)
    moved = random_crop_flip(images, 2, 0.5, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images[0, 0], (2, 2, 2, 2))
    possible = {}
    for top in range(5):
        for left in range(5):
            crop = padded[top : top + 10, left : left + 10]
            possible[crop.numpy().tobytes()] = (top, left, False)
            possible[crop.flip(1).numpy().tobytes()] = (top, left, True)
    seen = {possible[image.numpy().tobytes()] for image in moved[:, 0].contiguous()}
    assert torch.equal(moved[:, 0], moved[:, 2])
    assert len(seen) > 40
    again = random_crop_flip(images, 2, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
    assert torch.equal(random_crop_flip(images, 0, 0.0, torch.Generator()), images)
    assert torch.equal(random_crop_flip(images, 0, 1.0, torch.Generator()), images.flip(3))


@pytest.mark.parametrize("size", [20, 48, 64])
def test_preprocessing_matches_timms_transforms(size: int) -> None:
    images = striped_images(4, seed=5).images
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    transform = timm.data.create_transform(
        input_size=(3, size, size), interpolation="bilinear", mean=mean, std=std, crop_pct=1.0
    )
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    found = Normalizer(mean, std, torch.device("cpu"))(resize(images, size))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
