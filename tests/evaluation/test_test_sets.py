"""Test sets: mapping of classes to outputs, ReaL labels, and preprocessing, against hand-computed values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import timm.data
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet
from torch import Tensor, nn

from tests.images import write_image
from ubn_zoo.errors import ClassMismatchError, DataError, EvaluationError
from ubn_zoo.evaluation import test_sets
from ubn_zoo.evaluation.evaluate import evaluate, evaluate_many
from ubn_zoo.evaluation.subjects import Subject
from ubn_zoo.evaluation.test_sets import KNOWN_SETS, ClassLabels, KnownSet, held_out_split

SYNSETS = list(ImageNetInfo("imagenet-1k").label_names())
# Classes 1, 3, 6, and 9 of ImageNet-1k.
CHOSEN = [1, 3, 6, 9]


class Brightness(nn.Module):
    """Logits from the mean brightness b of an image, 0 to 255: -|b - 20 c| for class c, and 300 for class 500."""

    def __init__(self, count: int = 1000, **config: Any) -> None:
        super().__init__()
        self.num_classes = count
        self.bias = nn.Parameter(torch.zeros(()))
        self.pretrained_cfg = {
            "architecture": "brightness",
            "input_size": (3, 8, 8),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "crop_mode": "center",
            **config,
        }

    def forward(self, images: Tensor) -> Tensor:
        brightness = 255 * images.mean((1, 2, 3))
        logits = -(brightness[:, None] - 20.0 * torch.arange(self.num_classes)).abs()
        if self.num_classes > 500:
            logits[:, 500] = 300
        return logits + self.bias


def subject(count: int = 1000, classes: tuple[str, ...] = (), **config: Any) -> Subject:
    return Subject(model=Brightness(count, **config), name="brightness", classes=classes, sha256=None, source="bright")


def write(root: Path, images: dict[str, list[int]]) -> Path:
    """Images of uniform brightness, named by number as in ImageNet."""
    number = 0
    for name, levels in images.items():
        for level in levels:
            number += 1
            pixels = numpy.full((8, 8, 3), level, numpy.uint8)
            write_image(root / name / f"ILSVRC2012_val_{number:08d}.png", pixels)
    return root


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Four ImageNet classes; one image of class 3 is as bright as class 4, which only the mask excludes."""
    levels = {1: [20, 20], 3: [60, 79], 6: [120], 9: [180, 20]}
    return write(tmp_path / "few", {SYNSETS[label]: found for label, found in levels.items()})


def labels_of(found: list[str], mine: Subject, **settings: Any) -> dict[str, int | None]:
    return dict(ClassLabels(mine, mine.model.num_classes, "images", **settings)(found))


def test_classes_are_found_by_ids_descriptions_numbers_and_order() -> None:
    ids = [SYNSETS[label] for label in CHOSEN]
    assert labels_of(ids, subject()) == dict(zip(ids, CHOSEN, strict=True))
    assert labels_of(["goldfish", "tiger_shark"], subject()) == {"goldfish": 1, "tiger_shark": 3}
    assert labels_of(["1", "9", "10"], subject()) == {"1": 1, "9": 9, "10": 10}
    assert labels_of(["a", "b", "c"], subject(3), allow_class_mismatch=True) == {"a": 0, "b": 1, "c": 2}
    assert labels_of(["b", "c"], subject(3, ("c", "a", "b"))) == {"b": 2, "c": 0}
    described = subject(2, ("x1", "x2"), label_descriptions={"x1": "Hot dog, frankfurter", "x2": "Cat"})
    assert labels_of(["cat", "hot dog"], described) == {"cat": 1, "hot dog": 0}
    # Crane is both a bird and a machine.
    with pytest.raises(ClassMismatchError, match="unknown classes: crane, goldfish; valid: n01440764"):
        labels_of(["crane", "goldfish"], subject())
    with pytest.raises(DataError, match="unknown classes: d; valid: c, a, b"):
        labels_of(["a", "d"], subject(3, ("c", "a", "b")))
    with pytest.raises(ClassMismatchError, match="has no names for its 3 classes, the data's are a, b, c; if"):
        labels_of(["a", "b", "c"], subject(3))
    for names in (["a", "b"], ["0", "3"]):
        with pytest.raises(EvaluationError, match="received images of 2 classes"):
            labels_of(names, subject(3), allow_class_mismatch=True)


def test_a_model_with_more_classes_has_imagenets_at_other_indices(tmp_path: Path) -> None:
    wide = subject(11821)
    names = list(ImageNetInfo("imagenet-12k").label_names())
    known = KnownSet("two classes", 2, numbered=True)
    if set(SYNSETS) <= set(names):
        expected = {str(label): names.index(SYNSETS[label]) for label in (1, 9)}
        assert labels_of(["1", "9"], wide, known=known) == expected
    else:
        with pytest.raises(EvaluationError, match="whose 11821 classes are not ImageNet's"):
            labels_of(["1", "9"], wide, known=known)


def test_class_maps_and_masks_are_files(tmp_path: Path) -> None:
    table, mask = tmp_path / "map.txt", tmp_path / "mask.txt"
    table.write_text("dog\ncat\nbird\n", encoding="utf-8")
    assert labels_of(["bird", "dog"], subject(3), class_map=table) == {"bird": 2, "dog": 0}
    with pytest.raises(EvaluationError, match=r"map\.txt has no 'fish', a class of images; valid: one name per line"):
        labels_of(["fish"], subject(3), class_map=table)
    with pytest.raises(EvaluationError, match=r"map\.txt has 3 names; valid: .* each of the 2 outputs"):
        labels_of(["dog"], subject(2), class_map=table)
    mask.write_text(f"1\n{SYNSETS[3]}\n\n9\n", encoding="utf-8")
    ids = [SYNSETS[label] for label in CHOSEN]
    assert labels_of(ids, subject(), valid_labels=mask) == dict(zip(ids, (1, 3, None, 9), strict=True))
    for text, message in (
        ("1000", "received '1000'; valid: 0 to 999"),
        ("cat", "received 'cat'"),
        ("2", "none of its"),
    ):
        mask.write_text(f"{text}\n", encoding="utf-8")
        with pytest.raises(EvaluationError, match=message):
            labels_of(ids, subject(), valid_labels=mask)
    with pytest.raises(EvaluationError, match="absent"):
        labels_of(ids, subject(), valid_labels=tmp_path / "absent")


def expected_of(few: Path, outputs: list[int]) -> tuple[float, float]:
    """Hand-computed top-1 and loss over some outputs."""
    right, loss = [], []
    for path in sorted(few.rglob("*.png")):
        label = SYNSETS.index(path.parent.name)
        if label not in outputs:
            continue
        level = float(numpy.asarray(Image.open(path)).mean())
        logits = {c: 300.0 if c == 500 else -abs(level - 20.0 * c) for c in outputs}
        best = max(logits, key=lambda c: logits[c])
        right.append(best == label)
        loss.append(math.log(sum(math.exp(v - logits[best]) for v in logits.values())) + logits[best] - logits[label])
    return 100 * sum(right) / len(right), sum(loss) / len(loss)


@pytest.mark.parametrize("dataset", ["folder", "memory"])
def test_predictions_are_restricted_to_the_classes_of_the_images(dataset: str, few: Path, tmp_path: Path) -> None:
    found = evaluate(subject(), few, dataset=dataset)
    top1, loss = expected_of(few, CHOSEN)
    # By hand: the mask makes the image between classes 3 and 4 correct; the last one is wrong; 500 is excluded.
    assert (found.top1, found.top5, found.images) == (pytest.approx(100 * 6 / 7), None, 7) and round(top1, 3) == 85.714
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert evaluate(subject(), few, dataset=dataset, all_outputs=True).top1 == 0.0
    mask = tmp_path / "mask.txt"
    mask.write_text("1\n9\n", encoding="utf-8")
    part = evaluate(subject(), few, dataset=dataset, valid_labels=mask)
    assert (part.images, part.top1) == (4, pytest.approx(expected_of(few, [1, 9])[0]))
    assert part.loss == pytest.approx(expected_of(few, [1, 9])[1], rel=1e-5)


def test_real_labels_match_timm(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image 1 has two labels, 2 has none, 4 has its neighbor's; the others have ImageNet's."""
    real = tmp_path / "real.json"
    names = sorted(few.rglob("*.png"), key=lambda path: path.name)
    labels = [[SYNSETS.index(path.parent.name)] for path in names]
    labels[0], labels[1], labels[3] = [1, 7], [], [500]
    real.write_text(json.dumps(labels), encoding="utf-8")
    monkeypatch.setattr(test_sets, "KNOWN_SETS", {"imagenet-real": KnownSet("made up", 4, real=True)})
    monkeypatch.setattr("ubn_zoo.evaluation.evaluate.KNOWN_SETS", test_sets.KNOWN_SETS)
    found = evaluate(subject(), few, test_set="imagenet-real", real_labels=real, all_outputs=True, batch_size=2)

    judge = RealLabelsImagenet([path.name.replace(".png", ".JPEG") for path in names], str(real))
    images = torch.stack([torch.from_numpy(numpy.asarray(Image.open(path)) / 255.0).permute(2, 0, 1) for path in names])
    logits = Brightness()(images.float()).detach()
    judge.add_result(logits)
    assert found.top1 == pytest.approx(judge.get_accuracy(1))
    assert found.top5 == pytest.approx(judge.get_accuracy(5))
    assert (found.images, found.top1) == (6, pytest.approx(100 / 6))
    chances = logits.double().softmax(1)
    labeled = [(row, entry) for row, entry in zip(chances, labels, strict=True) if entry]
    loss = [-math.log(sum(float(row[place]) for place in entry)) for row, entry in labeled]
    assert found.loss == pytest.approx(sum(loss) / 6, rel=1e-5)
    # Without the favored output 500, among the four classes of the folder.
    masked = evaluate(subject(), few, test_set="imagenet-real", real_labels=real, batch_size=2)
    assert masked.images == 5

    for content, message in (
        ("[1, 2]", "not a file of ReaL labels"),
        ("[[0]]", r"valid for ReaL labels: ILSVRC2012_val_00000001\.JPEG to 00000001"),
        (json.dumps([[1000]] * 7), r"image .: received \[1000\]"),
    ):
        real.write_text(content, encoding="utf-8")
        with pytest.raises(EvaluationError, match=message):
            evaluate(subject(), few, test_set="imagenet-real", real_labels=real)
    with pytest.raises(EvaluationError, match="`real_labels`: valid with `test_set` imagenet-real only"):
        evaluate(subject(), few, real_labels=real)


def test_known_sets_match_timms_masks_and_labels() -> None:
    for name in ("imagenet-a", "imagenet-r"):
        labels = ClassLabels(subject(), 1000, "images", known=KNOWN_SETS[f"{name}-clean"])
        labels(SYNSETS)
        assert len(labels.outputs) == KNOWN_SETS[name].classes == 200
    assert (labels.outputs[0], SYNSETS[labels.outputs[0]]) == (1, "n01443537")
    numbered = ClassLabels(subject(), 1000, "images", known=KNOWN_SETS["imagenetv2-matched-frequency"])
    assert numbered([str(label) for label in range(1000)])["10"] == 10
    # Folders of WordNet ids sort in label order; numeric folders sorted as strings would not.
    with pytest.raises(EvaluationError, match="received 3 classes; valid: 1000, ImageNet-V2"):
        numbered(["0", "1", "2"])
    with pytest.raises(EvaluationError, match="whose 10 classes are not ImageNet's"):
        labels_of([str(n) for n in range(10)], subject(10), known=KNOWN_SETS["imagenet-r-clean"])


def test_a_folder_of_classes_needs_no_split(few: Path, tmp_path: Path) -> None:
    assert held_out_split(few) == "."
    splits = tmp_path / "splits"
    for name in ("train", "test", "val"):
        write(splits / name, {"a": [1]})
        if name == "train":
            with pytest.raises(DataError, match="has none of validation, val, test"):
                held_out_split(splits)
        else:
            assert held_out_split(splits) == name


def test_a_single_class_is_rejected(tmp_path: Path) -> None:
    root = write(tmp_path / "one", {SYNSETS[1]: [20, 30]})
    with pytest.raises(EvaluationError, match="received images of one class"):
        evaluate(subject(), root)
    assert evaluate(subject(), root, all_outputs=True).images == 2


def test_preprocessing_follows_the_options(tmp_path: Path) -> None:
    """Matches timm's transform with the same settings."""
    generator = numpy.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(3):
            write_image(tmp_path / name / f"{number}.png", generator.integers(0, 256, (24, 18, 3), dtype=numpy.uint8))

    class Sum(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            weights = torch.arange(images[0].numel(), dtype=torch.float32).view(images[0].shape) % 7 - 3
            value = (images * weights).sum((1, 2, 3)) / 50
            return torch.stack([value, -value], 1)

    chosen: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
    chosen |= {"crop_pct": 0.8, "crop_mode": "squash"}
    mine = Subject(model=Sum(2), name="sum", classes=("a", "b"), sha256=None, source="sum")
    found = evaluate(mine, tmp_path, img_size=12, **chosen)
    transform = timm.data.create_transform((3, 12, 12), **chosen)
    paths = sorted(tmp_path.rglob("*.png"))
    logits = mine.model(torch.stack([transform(Image.open(path)) for path in paths]))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    (row,) = evaluate_many([mine], tmp_path, img_size=12, **chosen)
    assert row.settings == (
        "img_size=12 crop_pct=0.8 crop_mode=squash interpolation=bicubic mean=0.5,0.4,0.3 std=0.2,0.25,0.3"
    )
    for wrong, message in (
        ({"mean": (0.5, 0.5)}, "`mean`: received 0.5,0.5; valid: three numbers"),
        ({"std": (0, 1, 1)}, "`std`: received 0,1,1; valid: numbers above 0"),
        ({"crop_mode": "top"}, "`crop_mode`: received 'top'; valid: center, squash, border"),
        ({"interpolation": "cubic"}, "`interpolation`: received 'cubic'; valid: bilinear, bicubic"),
        ({"img_size": 0}, "`img_size`: received 0"),
        ({"batch_size": 0}, "`batch_size`: received 0"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate(mine, tmp_path, **wrong)
