"""The examples of research/downstream, on drawn pictures: masks are right, and the loss falls with either norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.models import get_model
from torchvision.ops import masks_to_boxes

from research.downstream import data, models, train
from research.downstream.__main__ import main
from tests.interop.common import ubn_layers
from ubn_zoo.errors import InvalidArgumentError

pytestmark = pytest.mark.interop


def photograph(index: int) -> tuple[Image.Image, np.ndarray]:
    """A noisy ellipse on noisy ground of another color, and its true mask."""
    generator = np.random.default_rng(index)
    ground, color = generator.uniform(20, 80, 3), generator.uniform(160, 230, 3)
    shape = Image.new("1", (120, 160))
    ImageDraw.Draw(shape).ellipse((20, 30 + index % 20, 100, 120), fill=1)
    mask = np.asarray(shape)
    pixels = np.where(mask[..., None], color, ground) + generator.normal(0, 5, (160, 120, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downstream")
    for split, start in (("train", 0), ("test", 100)):
        (folder / "photographs" / split).mkdir(parents=True)
        for index in range(start, start + 6):
            photograph(index)[0].save(folder / "photographs" / split / f"{index}.png")
    arguments = ["--data-dir", str(folder / "photographs"), "--output", str(folder / "made")]
    assert main(["data", *arguments, "--train", "8", "--test", "4"]) == 0
    return folder / "made"


@pytest.mark.parametrize("index", range(4))
def test_foreground_is_the_object(index: int) -> None:
    image, mask = photograph(index)
    found = data.foreground(np.asarray(image))
    assert found is not None
    assert (found & mask).sum() / (found | mask).sum() > 0.9


def test_no_foreground_without_an_object() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (160, 120, 3)).astype(np.uint8)
    assert data.foreground(noise) is None


def test_boxes_are_those_of_the_masks(pictures: Path) -> None:
    samples = data.load(pictures / "train")
    assert len(samples) == 8
    for image, target in samples:
        assert image.shape == (3, data.SIDE, data.SIDE) and image.min() >= 0 and image.max() <= 1
        assert 1 <= len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) <= 3
        # torchvision counts the last pixel's index, a detector's box its far edge.
        expected = masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        assert torch.equal(target["boxes"], expected)
        assert target["masks"].sum(0).max() == 1


def test_mirrored_boxes_are_those_of_mirrored_masks(pictures: Path) -> None:
    sample = data.load(pictures / "train")[0]
    generator = torch.Generator().manual_seed(0)
    drawn = [train._mirrored(sample, generator) for _ in range(8)]
    assert len({float(image.flatten()[0]) for image, _ in drawn}) == 2
    for _, target in drawn:
        assert torch.equal(target["boxes"], masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_pictures_are_repeatable(pictures: Path, tmp_path: Path) -> None:
    data.make(pictures.parent / "photographs", tmp_path, train=8, test=4)
    for path in sorted(pictures.rglob("*.*g")):
        assert path.read_bytes() == (tmp_path / path.relative_to(pictures)).read_bytes()


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="has no pictures"):
        data.load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(InvalidArgumentError, match="0 photographs"):
        data.make(tmp_path, tmp_path / "made")
    with pytest.raises(InvalidArgumentError, match="fasterrcnn"):
        models.create("yolo")


def cropped(samples: list[Any]) -> list[Any]:
    """The middle of each picture, for networks that take any size and need no boxes."""
    middle = slice(32, 128)
    return [
        (image[:, middle, middle], {**target, "masks": target["masks"][:, middle, middle]}) for image, target in samples
    ]


@pytest.mark.parametrize("name", ["fasterrcnn", "retinanet", "maskrcnn"])
def test_loss_of_detectors_falls(name: str, pictures: Path) -> None:
    check_that_losses_fall(name, data.load(pictures / "train"))


@pytest.mark.parametrize("name", ["unet", "deeplabv3plus"])
def test_loss_of_segmentation_falls(name: str, pictures: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    check_that_losses_fall(name, cropped(data.load(pictures / "train")))


def check_that_losses_fall(name: str, samples: list[Any]) -> None:
    losses = {}
    for norm in models.NORMS:
        model = models.create(name, norm)
        assert bool(ubn_layers(model)) == (norm == "ubn")
        losses[norm] = train.train(model, samples, steps=10, batch_size=4)
        assert sum(losses[norm][-3:]) < 0.9 * sum(losses[norm][:3])
    # Same weights, same batches, and yet not the same model.
    assert losses["bn"] != losses["ubn"]


@pytest.mark.parametrize("norm", models.NORMS)
def test_reestimated_statistics_repair_a_short_training(norm: str, pictures: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    samples = cropped(data.load(pictures / "train"))
    model = models.create("unet", norm)
    train.train(model, samples, steps=6, batch_size=4)

    @torch.no_grad()
    def loss(training: bool) -> float:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        value = float(train.loss_of(model.train(training), samples))
        for key, buffer in model.named_buffers():
            buffer.copy_(buffers[key])
        return value

    before, target = loss(training=False), loss(training=True)
    train.reestimate(model, samples, batch_size=8)
    assert abs(loss(training=False) - target) < 0.5 * abs(before - target)


def test_run_writes_figures(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    figures: dict[str, Any] = train.run("maskrcnn", "ubn", pictures, tmp_path, steps=1, batch_size=2)
    for state in ("after_training", "reestimated"):
        assert set(figures[state]) == {"AP", "AP50", "mask_AP", "mask_AP50"}
    assert (tmp_path / "maskrcnn_ubn_1.json").is_file()


@pytest.mark.parametrize("norm", ["ubn", "bn"])
def test_detectors_for_coco_train_their_norms(norm: str) -> None:
    from research.downstream import coco

    model = get_model(f"{coco.DETECTORS[0]}_{norm}", weights=None, weights_backbone=None, num_classes=3)
    layers = ubn_layers(model.backbone.body)
    assert len(layers) == 53 and not any(layer.frozen for layer in layers)
    shapes = [parameter.shape[-2:] for layer in layers for parameter in layer.parameters()]
    assert shapes.count((3, 3)) == (53 if norm == "ubn" else 0)
