"""Accuracy against hand-computed values, and loading of models and images."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from tests.images import striped_images, write_image_folder
from ubn_zoo.data.loaders import MemoryEval
from ubn_zoo.data.memory import ImageSet, Normalizer
from ubn_zoo.errors import ClassMismatchError, DataError
from ubn_zoo.evaluation.accuracy import (
    Accuracy,
    EvaluationError,
    logits_as_configured,
    logits_of,
    measure,
)
from ubn_zoo.evaluation.details import read_predictions
from ubn_zoo.evaluation.evaluate import evaluate
from ubn_zoo.evaluation.subjects import Subject, load_subject, subject_of
from ubn_zoo.evaluation.test_sets import feed_of, open_images
from ubn_zoo.utils.distributed import Ranks

NORMALIZE = Normalizer((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu"))


class Table(nn.Module):
    """Returns the row of logits whose index is the first pixel of the image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.training)
        return self.logits[images[:, 0, 0, 0].long()]


def batches_of(labels: Tensor, size: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = torch.arange(first, first + len(labels), dtype=torch.float32)
    images = numbers[:, None, None, None].expand(-1, 3, 2, 2)
    yield from zip(images.split(size), labels.split(size), strict=True)


def expected_accuracy(logits: numpy.ndarray, labels: numpy.ndarray) -> tuple[float, float, float, float]:
    """Top-1, top-5, loss and calibration error, computed one image at a time."""
    first, five, loss = [], [], []
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(logits.astype(numpy.float64), labels, strict=True):
        log_probabilities = row - row.max() - numpy.log(numpy.exp(row - row.max()).sum())
        order = sorted(range(len(row)), key=lambda place: -row[place])
        first.append(order[0] == label)
        five.append(label in order[:5])
        loss.append(-log_probabilities[label])
        confidence = float(numpy.exp(log_probabilities[order[0]]))
        place = next(index for index in range(15) if confidence < (index + 1) / 15 or index == 14)
        bins[place].append((confidence, order[0] == label))
    gaps = [
        len(found) / len(labels) * abs(numpy.mean([right for _, right in found]) - numpy.mean([c for c, _ in found]))
        for found in bins
        if found
    ]
    return 100 * numpy.mean(first), 100 * numpy.mean(five), float(numpy.mean(loss)), 100 * sum(gaps)


def check(found: Accuracy, logits: Tensor, labels: Tensor) -> None:
    top1, top5, loss, calibration = expected_accuracy(logits.numpy(), labels.numpy())
    assert found.images == len(labels)
    assert found.top1 == pytest.approx(top1)
    assert found.top5 == (pytest.approx(top5) if logits.shape[1] > 5 else None)
    assert found.loss == pytest.approx(loss, rel=1e-9)
    assert found.calibration_error == pytest.approx(calibration, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 5, 6, 40])
@pytest.mark.parametrize("scale", [0.1, 3.0, 200.0])
def test_accuracy_matches_the_formulas(classes: int, scale: float) -> None:
    """At the largest scale, confidence is exactly 1 and most bins are empty; at the smallest, one bin has all
    images."""
    generator = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn((37, classes), generator=generator)
    labels = torch.randint(0, classes, (37,), generator=generator)
    seen: list[int] = []
    found = measure(Table(logits), batches_of(labels, 5), Ranks(), on_batch=seen.append)
    check(found, logits, labels)
    assert seen == [5, 10, 15, 20, 25, 30, 35, 37]


def test_confidence_of_one_is_in_the_last_bin() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [0.0, 1000.0]])
    found = measure(Table(logits), batches_of(torch.tensor([0, 0, 1, 0]), 4), Ranks())
    assert (found.top1, found.calibration_error) == (75.0, 25.0)
    assert found.loss == 250.0


def test_a_model_that_gives_nan_has_a_loss_of_nan() -> None:
    found = measure(Table(torch.full((3, 2), torch.nan)), batches_of(torch.tensor([0, 1, 1]), 2), Ranks())
    assert numpy.isnan(found.loss)
    assert found.images == 3


def test_the_models_mode_is_restored() -> None:
    model = nn.Sequential(Table(torch.eye(4)), nn.Dropout(), nn.BatchNorm1d(4))
    model.train()
    model[2].eval()
    measure(model, batches_of(torch.arange(4), 3), Ranks())
    assert [model.training, *(part.training for part in model)] == [True, True, True, False]
    assert model[0].seen == [False, False]
    with pytest.raises(IndexError):
        measure(model, batches_of(torch.arange(9), 9), Ranks())
    assert model[0].training
    with pytest.raises(ValueError, match="received 0 images"):
        measure(model, [], Ranks())


def test_autocast_applies_only_to_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6)
    found = measure(model, [(images, labels)], Ranks(), amp=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    check(found, logits.float(), labels)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t_ubn", num_classes=2)
    path = tmp_path_factory.mktemp("checkpoint") / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


RANK_SCRIPT = """
import dataclasses, json, sys
tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from tests.evaluation.test_accuracy import Table, batches_of
from ubn_zoo.evaluation.accuracy import measure
from ubn_zoo.utils.distributed import joined
torch.set_num_threads(1)
logits, labels = torch.load(f"{folder}/data", weights_only=True)
with joined("cpu", timeout=60) as ranks:
    def failing():
        yield from batches_of(labels[:2], 2)
        if ranks.rank == 1:
            raise OSError("this disk is gone")
    try:
        measure(Table(logits), failing(), ranks)
    except Exception as error:
        with open(f"{folder}/error.{ranks.rank}", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
    for total in (37, 1):
        share = ranks.share(total)
        batches = batches_of(labels[share.start:share.stop], 5, share.start)
        found = measure(Table(logits), batches, ranks)
        with open(f"{folder}/{total}.{ranks.rank}", "w") as file:
            json.dump(dataclasses.asdict(found), file)
"""


@pytest.mark.slow
def test_two_ranks_count_every_image_once(checkpoint: Path, tmp_path: Path) -> None:
    """Also if one rank has no images and therefore does not know the number of classes.

    If one rank fails, the other does not wait for it.
    """
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn((37, 8), generator=generator), torch.randint(0, 8, (37,), generator=generator)
    torch.save((logits, labels), tmp_path / "data")
    (tmp_path / "script.py").write_text(RANK_SCRIPT, encoding="utf-8")
    images = write_image_folder(tmp_path / "images", 2, 11)
    arguments = ["--model", "resnet10t_ubn", "--checkpoint", str(checkpoint), "--data-dir", str(images)]
    arguments += ["--img-size", "32", "--batch-size", "4", "--workers", "0", "--results", str(tmp_path / "results.csv")]
    arguments += ["--allow-class-mismatch", "--details", str(tmp_path / "details")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = [str(tmp_path / "script.py"), str(Path(__file__).parents[2]), str(tmp_path)]
    # A process can join only once, so one launch calls the function and another runs the command.
    for program in (script, ["-m", "ubn_zoo", "validate", *arguments]):
        done = subprocess.run(
            [*launch, *program], capture_output=True, text=True, timeout=180, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
    errors = [(tmp_path / f"error.{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert errors == ["EvaluationError: another rank failed; its message says why", "OSError: this disk is gone"]
    for total in (37, 1):
        found = [json.loads((tmp_path / f"{total}.{rank}").read_text(encoding="utf-8")) for rank in range(2)]
        assert found[0] == found[1]
        check(Accuracy(**found[0]), logits[:total], labels[:total])
    assert done.stdout.count("resnet10t_ubn: top-1") == 1
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    subject = load_subject("resnet10t_ubn", checkpoint=checkpoint)
    batches = open_images(subject, feed_of(subject, img_size=32), images, Ranks(), allow_class_mismatch=True)
    alone = measure(subject.model, batches, Ranks())
    assert (row["images"], float(row["top1"])) == ("11", pytest.approx(alone.top1, abs=1e-4))
    assert float(row["loss"]) == pytest.approx(alone.loss, rel=1e-5)
    (together,) = (tmp_path / "details").glob("*.predictions.csv")
    evaluate(subject, images, img_size=32, allow_class_mismatch=True, details=tmp_path / "alone")
    (single,) = (tmp_path / "alone").glob("*.predictions.csv")
    pairs = zip(read_predictions(together), read_predictions(single), strict=True)
    assert all((a.file, a.label, a.prediction) == (b.file, b.label, b.prediction) for a, b in pairs)


def test_logits_match_a_direct_call() -> None:
    images = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    model = Table(torch.eye(7)).train()

    def scaled(part: Tensor) -> Tensor:
        return part.float()

    found = logits_of(model, images, scaled, img_size=4, batch_size=3)
    assert torch.equal(found, torch.eye(7))
    assert (model.seen, model.training) == ([False] * 3, True)
    with pytest.raises(ValueError, match="received 0 images"):
        logits_of(model, images[:0], NORMALIZE, img_size=4)


def test_preprocessing_follows_the_configuration() -> None:
    cfg: dict[str, Any] = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0}
    images = striped_images(4, seed=6).images
    model = timm.create_model(
        "resnet10t_ubn", num_classes=2, pretrained_cfg_overlay={**cfg, "interpolation": "bilinear"}
    )
    normalize = Normalizer(cfg["mean"], cfg["std"], torch.device("cpu"))
    expected = logits_of(model, images, normalize, img_size=64)
    torch.testing.assert_close(logits_as_configured(model, images), expected)
    with pytest.raises(ValueError, match="images: received"):
        logits_as_configured(model, images[:, :, :8])
    other = timm.create_model("resnet10t_ubn", num_classes=2)
    with pytest.raises(ValueError, match=r"the model's input: received .*crop_pct 0\.875"):
        logits_as_configured(other, images)


def test_the_number_of_classes_comes_from_the_checkpoint(checkpoint: Path) -> None:
    subject = load_subject("resnet10t_ubn", checkpoint=checkpoint)
    expected = safetensors.torch.load_file(checkpoint)
    assert all(torch.equal(value, expected[name]) for name, value in subject.model.state_dict().items())
    assert (subject.name, subject.classes) == ("resnet10t_ubn", ())
    assert subject.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert feed_of(subject).num_classes == 2


def test_a_bundled_model_has_the_hash_of_its_record() -> None:
    subject = load_subject("regnetx_002_ubn.cifar10")
    file = Path(str(subject.model.pretrained_cfg["file"]))
    assert subject.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    feed = feed_of(subject, dataset="memory", workers=3)
    assert (feed.img_size, feed.crop_pct, feed.interpolation, feed.workers) == (64, 1.0, "bilinear", 3)


def test_accuracy_of_images_in_memory_matches_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(9)
    subject = load_subject("regnetx_002_ubn.cifar10")
    batches = MemoryEval(feed_of(subject, dataset="memory"), ImageSet(images, labels, tuple("abcdefghij")), Ranks(), 4)
    found = measure(subject.model, batches, Ranks())
    logits = logits_as_configured(timm.create_model("regnetx_002_ubn.cifar10", pretrained=True), images, batch_size=4)
    assert (found.top1, found.images) == (pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item()), 9)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_models_are_evaluated_at_their_test_size() -> None:
    overlay = {"test_input_size": (3, 96, 96), "test_crop_pct": 0.95, "crop_mode": "squash"}
    model = timm.create_model("resnet10t", num_classes=2, pretrained_cfg_overlay=overlay)
    subject = load_subject("regnetx_002_ubn.cifar10")
    subject = type(subject)(model=model, name="resnet10t", classes=(), sha256=None)
    feed = feed_of(subject)
    assert (feed.img_size, feed.crop_pct, feed.crop_mode) == (96, 0.95, "squash")
    feed = feed_of(subject, img_size=32, crop_pct=0.5)
    assert (feed.img_size, feed.crop_pct) == (32, 0.5)
    with pytest.raises(EvaluationError, match=r"dataset memory: received crop_pct 0\.95, .*valid: crop_pct 1\.0"):
        feed_of(subject, dataset="memory")
    model.pretrained_cfg["test_input_size"] = (3, 64, 96)
    with pytest.raises(EvaluationError, match="resnet10t takes 96x64 pixels; valid: square images"):
        feed_of(subject)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither a model nor a run"),
        ({"name": "resnet10t", "run": "x"}, "or both"),
        ({"name": "resnet10t", "num_classes": 3}, "valid: none without a checkpoint"),
        ({"name": "resnet10t", "ema": True}, r"name the run's model_ema\.safetensors"),
        ({"run": "x", "checkpoint": "y"}, "received a checkpoint and a run"),
        ({"name": "resnet10"}, "resnet10: Unknown model"),
        ({"name": "resnet10t_ubn.nothing"}, "has no pretrained tag 'nothing'"),
        ({"name": "regnetz_005"}, "regnetz_005: No pretrained weights"),
        ({"name": "resnet10t_ubn", "checkpoint": "/nowhere.safetensors"}, "there is no such file"),
        (
            {"run": "/nowhere"},
            r"no config\.json and no model\.safetensors; the run has not finished an epoch",
        ),
        ({"run": "/nowhere", "ema": True}, r"no model_ema\.safetensors; its recipe has no ema_decay, or"),
    ],
)
def test_models_that_cannot_be_loaded_raise_clear_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_subject(**arguments)


def test_mismatched_weights_raise_clear_errors(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("resnet10t", "resnet10t_ubn"):
        with pytest.raises(EvaluationError, match=r"fc\.weight"):
            load_subject(name, checkpoint=checkpoint, num_classes=7)
    with pytest.raises(EvaluationError, match="resnet18_ubn"):
        load_subject("resnet18_ubn", checkpoint=checkpoint)
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(EvaluationError, match=r"weights\.safetensors"):
        load_subject("resnet10t_ubn", checkpoint=tmp_path / "weights.safetensors")


def test_images_are_matched_to_the_models_classes(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_image_folder(tmp_path / "data", 2, 6)
    subject = load_subject("resnet10t_ubn", checkpoint=checkpoint)
    feed = feed_of(subject, img_size=32)
    with pytest.raises(ClassMismatchError, match="no names for its 2 classes, the data's are horizontal, vertical; if"):
        open_images(subject, feed, root, Ranks())

    def by_order(subject: Subject) -> tuple[str, ...]:
        found = open_images(subject, feed, root, Ranks(), allow_class_mismatch=True)
        (_, labels), *_ = found
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        return found.classes

    assert by_order(subject) == ("horizontal", "vertical")
    assert "no names for its 2 classes; its outputs are taken to be horizontal, vertical" in caplog.text

    def named(*names: str) -> Any:
        return type(subject)(model=subject.model, name=subject.name, classes=names, sha256=None)

    (_, labels), *_ = open_images(named("vertical", "horizontal"), feed, root, Ranks())
    assert labels.tolist() == [1, 1, 1, 0, 0, 0]
    with pytest.raises(DataError, match="unknown classes: vertical; valid: horizontal"):
        open_images(named("horizontal", "diagonal"), feed, root, Ranks())
    assert by_order(named("horizontal", "diagonal")) == ("horizontal", "vertical")
    assert "unknown classes: vertical; valid: horizontal, diagonal; its outputs are taken to be" in caplog.text
    (root / "test" / "third").mkdir()
    (root / "test" / "third" / "1.png").write_bytes((root / "test" / "vertical" / "001.png").read_bytes())
    with pytest.raises(
        EvaluationError, match=r"received images of 3 classes \(horizontal, third, vertical\); valid: 2"
    ):
        open_images(subject, feed, root, Ranks(), allow_class_mismatch=True)


def test_imagenet_models_without_names_find_their_outputs_by_wordnet_ids(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", 2, 6)
    for folder in root.iterdir():
        (folder / "horizontal").rename(folder / "n11939491")
        (folder / "vertical").rename(folder / "n01440764")
    subject = subject_of(timm.create_model("resnet10t_ubn"))
    (_, labels), *_ = open_images(subject, feed_of(subject, img_size=32), root, Ranks())
    assert sorted(labels.tolist()) == [0, 0, 0, 985, 985, 985]


def test_bundled_models_reject_a_folder_of_other_classes(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", 2, 6)
    with pytest.raises(ClassMismatchError, match="unknown classes: horizontal, vertical; valid: airplane, automobile"):
        evaluate("regnetx_002_ubn.cifar10", root)
    other_head = timm.create_model("regnetx_002_ubn.cifar10", num_classes=2)
    assert subject_of(other_head).classes == ()
