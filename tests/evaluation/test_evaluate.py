"""Evaluation of many models: equal to a plain loop, failures, out-of-memory, resuming; details and their comparison."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from timm.models._hub import save_config_for_hf
from timm.utils.metrics import accuracy
from torch import Tensor, nn

from tests.images import write_image
from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.accuracy import is_out_of_memory, wilson
from ubn_zoo.evaluation.details import Comparison, ImageRow, compare, read_predictions, write_details
from ubn_zoo.evaluation.evaluate import evaluate, evaluate_many
from ubn_zoo.evaluation.results import ResultRow, read_results
from ubn_zoo.evaluation.subjects import Subject, expand_names, load_subject, norm_of

CLASSES = ("a", "b", "c", "d", "e", "f", "=g")
INPUT = {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.25, 0.2)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, two or three per class."""
    root, generator = tmp_path_factory.mktemp("photos"), numpy.random.default_rng(0)
    for place, name in enumerate(CLASSES):
        for number in range(2 + place % 2):
            pixels = generator.integers(0, 256, (40 + 7 * number, 33 + place, 3), dtype=numpy.uint8)
            write_image(root / "val" / name / f"{number}.png", pixels)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one with a snapshot."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = timm.create_model("resnet10t_ubn", num_classes=7, ubn_kwargs={"kernel_size": 3})
        folder = root / name
        folder.mkdir()
        config = {"model_config": {"label_names": list(CLASSES)}, "data_config": {**INPUT, "interpolation": "bicubic"}}
        save_config_for_hf(model, str(folder / "config.json"), model_args={"ubn_kwargs": {"kernel_size": 3}}, **config)
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    snapshot = root / "first" / "checkpoints" / "0000000003"
    snapshot.mkdir(parents=True)
    shutil.copy(root / "first" / "model.safetensors", snapshot)
    return root


def loop(folder: Path, photos: Path) -> tuple[float, float, float, Tensor]:
    """timm's dataset, transform, loader and metrics: top-1, top-5, loss and logits."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    class_map = {name: place for place, name in enumerate(CLASSES)}
    dataset: Any = timm.data.ImageDataset(str(photos / "val"), class_map=class_map)
    loader = timm.data.create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=4,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=0,
    )
    with torch.no_grad():
        found = [(model(images), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    return float(top1), float(top5), nn.functional.cross_entropy(logits, labels).item(), logits


def test_evaluation_matches_a_plain_timm_loop(runs: Path, photos: Path) -> None:
    top1, top5, loss, _ = loop(runs / "first", photos)
    for settings in ({"batch_size": 3}, {"fuse": True}):
        found = evaluate(runs / "first", photos, **settings)
        assert (found.top1, found.top5, found.images) == (pytest.approx(top1), pytest.approx(top5), 17)
        assert found.loss == pytest.approx(loss, rel=1e-4)


def test_larger_images_are_pooled_as_in_timm(runs: Path, photos: Path) -> None:
    """Logits are computed at each position of the feature map, and their mean and maximum are averaged."""
    subject = load_subject(runs / "first")
    model: Any = subject.model.eval()

    class Pooled(nn.Module):
        num_classes, pretrained_cfg = 7, model.pretrained_cfg

        def forward(self, images: Tensor) -> Tensor:
            logits = model.fc(model.forward_features(images).flatten(2).transpose(1, 2))
            return (logits.mean(1) + logits.amax(1)) / 2

    expected = evaluate(dataclasses.replace(subject, model=Pooled()), photos, img_size=64)
    for settings in ({}, {"fuse": True}):
        found = evaluate(runs / "first", photos, img_size=64, test_pool=True, **settings)
        assert (found.top1, found.loss) == (expected.top1, pytest.approx(expected.loss, rel=1e-4))
    assert evaluate(runs / "first", photos, img_size=64).loss != pytest.approx(expected.loss, rel=1e-4)


@pytest.mark.exhaustive
def test_compiled_models_have_the_same_results(runs: Path, photos: Path) -> None:
    _, _, loss, _ = loop(runs / "first", photos)
    assert evaluate(runs / "first", photos, compile=True, batch_size=17).loss == pytest.approx(loss, rel=1e-4)


def test_a_snapshot_uses_the_configuration_of_its_run(runs: Path, photos: Path) -> None:
    """Also the layer settings: the default layer has another kernel size."""
    snapshot = runs / "first" / "checkpoints" / "0000000003" / "model.safetensors"
    expected = load_subject(runs / "first").model.state_dict()
    for subject in (load_subject(snapshot), load_subject("resnet10t_ubn", checkpoint=snapshot)):
        assert all(torch.equal(value, expected[name]) for name, value in subject.model.state_dict().items())
        assert subject.preprocessing == str(runs / "first" / "config.json")
        assert subject.classes == CLASSES
    assert evaluate(snapshot, photos) == evaluate(runs / "first", photos)
    assert norm_of(load_subject(snapshot).model) == "ubn"
    assert norm_of(timm.create_model("resnet10t")) == "bn"


def test_weights_of_the_sibling_keep_their_preprocessing(runs: Path, tmp_path: Path) -> None:
    plain = timm.create_model("resnet10t", num_classes=7)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    alone = load_subject("resnet10t", checkpoint=tmp_path / "weights.safetensors")
    assert (alone.classes, alone.preprocessing) == ((), "the architecture's configuration")
    shutil.copy(runs / "first" / "config.json", tmp_path)
    subject = load_subject("resnet10t", checkpoint=tmp_path / "weights.safetensors")
    config = timm.data.resolve_model_data_config(subject.model)
    assert (config["mean"], config["interpolation"], subject.classes) == ([0.4, 0.5, 0.6], "bicubic", CLASSES)


def test_a_failure_is_recorded_and_the_next_model_is_evaluated(runs: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "results.json"
    models = [runs / "first", "no_such_model", runs / "third", runs / "second"]
    rows = list(evaluate_many(models, photos, results=table, command="ubn-zoo validate", batch_size=8))
    assert [row.error is None for row in rows] == [True, False, False, True]
    assert rows[1].error is not None and rows[1].error.startswith("no_such_model: Unknown model, and no folder or file")
    assert rows[2].error is not None and "third" in rows[2].error
    assert read_results(table) == tuple(rows)
    first = rows[0]
    top1, top5, _, _ = loop(runs / "first", photos)
    assert (first.model, first.source, first.split, first.test_set) == (
        "resnet10t_ubn",
        str(runs / "first"),
        "val",
        photos.name,
    )
    assert (first.top1, first.top5) == (pytest.approx(top1, abs=1e-4), pytest.approx(top5, abs=1e-4))
    assert (first.top1_low, first.top1_high) == pytest.approx(wilson(top1, 17), abs=1e-4)
    assert (first.norm, first.classes, first.batch_size, first.ranks) == ("ubn", 7, 8, 1)
    assert (first.img_size, first.crop_pct, first.interpolation, first.settings) == (32, 0.9, "bicubic", None)
    assert (first.command, first.timm) == ("ubn-zoo validate", timm.__version__)


def test_a_results_file_is_resumed(runs: Path, photos: Path, tmp_path: Path) -> None:
    table, mine = tmp_path / "results.csv", tmp_path / "second"
    shutil.copytree(runs / "second", mine)
    started: list[str] = []

    def go(**settings: Any) -> list[ResultRow]:
        started.clear()
        models = [str(runs / "first"), str(mine), "no_such_model"]
        return list(evaluate_many(models, photos, results=table, on_start=started.append, **settings))

    before = go(sort="top1")
    assert len(started) == 3
    kept = [row.top1 for row in read_results(table)]
    assert kept == [*sorted((row.top1 for row in before[:2]), key=lambda top1: -(top1 or 0)), None]
    assert go(resume=True) == before
    assert started == ["no_such_model"]
    go(resume=True, img_size=24)
    assert len(started) == 3
    safetensors.torch.save_file(timm.create_model("resnet10t_ubn", num_classes=7).state_dict(), mine / "new")
    weights = safetensors.torch.load_file(runs / "first" / "model.safetensors")
    safetensors.torch.save_file(weights, mine / "model.safetensors")
    after = go(resume=True)
    assert started == [str(mine), "no_such_model"]
    assert (after[0], after[1].top1) == (before[0], before[0].top1)
    assert len(read_results(table)) == 6


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


class Hungry(nn.Module):
    """Returns two logits from an image's mean, or runs out of memory for large batches."""

    def __init__(self, error: Exception, most: int) -> None:
        super().__init__()
        self.num_classes = 7
        self.pretrained_cfg = {"architecture": "hungry", **INPUT, "interpolation": "bilinear", "crop_mode": "center"}
        self.error, self.most = error, most
        self.scale = nn.Parameter(torch.linspace(-1, 1, 7))

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise self.error
        return images.mean((1, 2, 3))[:, None] * self.scale


@pytest.mark.parametrize("error", OUT_OF_MEMORY[:2], ids=lambda error: type(error).__name__)
def test_a_batch_is_halved_until_it_fits(error: Exception, photos: Path) -> None:
    def go(most: int, **settings: Any) -> ResultRow:
        subject = Subject(model=Hungry(error, most), name="hungry", classes=CLASSES, sha256=None, source="hungry")
        (row,) = evaluate_many([subject], photos, **settings)
        return row

    notes: list[str] = []
    row, expected = go(4, batch_size=9, on_note=notes.append), go(17)
    assert (row.batch_size, row.images, row.error, expected.batch_size) == (4, 17, None, 256)
    assert (row.top1, row.loss) == (expected.top1, pytest.approx(expected.loss, rel=1e-5))
    assert [note for note in notes if "memory" in note] == ["hungry: out of memory; batch size reduced to 4"]
    failed = go(0, batch_size=1)
    assert failed.error is not None and failed.error.startswith(type(error).__name__)


def test_other_errors_are_not_taken_for_out_of_memory() -> None:
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_model_that_gives_nan_has_no_result(runs: Path, photos: Path) -> None:
    subject = load_subject(runs / "first")
    with torch.no_grad():
        next(subject.model.parameters()).fill_(torch.nan)
    with pytest.raises(EvaluationError, match="resnet10t_ubn gives NaN or infinity"):
        evaluate(subject, photos)


def test_details_match_the_result_of_each_image(runs: Path, photos: Path, tmp_path: Path) -> None:
    found = evaluate(runs / "first", photos, details=tmp_path, batch_size=4)
    _, _, _, logits = loop(runs / "first", photos)
    stem = f"first-{photos.name}"
    rows = read_predictions(tmp_path / f"{stem}.predictions.csv")
    names = [path.relative_to(photos / "val").as_posix() for path in sorted((photos / "val").rglob("*.png"))]
    assert [row.file for row in rows] == names
    assert [row.label for row in rows] == [row.file.split("/")[0] for row in rows]
    chances = {tuple(row.tolist()) for row in logits.softmax(1).max(1).values[:, None]}
    assert sorted(row.confidence for row in rows) == pytest.approx(sorted(value for (value,) in chances), abs=1e-4)
    assert 100 * sum(row.correct for row in rows) / 17 == pytest.approx(found.top1)
    assert 100 * sum(row.correct5 for row in rows) / 17 == pytest.approx(found.top5)

    with (tmp_path / f"{stem}.confusion.csv").open(encoding="utf-8", newline="") as file:
        header, *matrix = csv.reader(file)
    expected = Counter((row.label, row.prediction) for row in rows)
    plain = [name.removeprefix("'") for name in header[1:]]
    assert set(plain) == set(CLASSES)
    for name, *counts in matrix:
        assert [int(count) for count in counts] == [expected[name.removeprefix("'"), other] for other in plain]
    with (tmp_path / f"{stem}.classes.csv").open(encoding="utf-8", newline="") as file:
        classes = {row["class"].removeprefix("'"): row for row in csv.DictReader(file)}
    assert set(classes) == set(CLASSES)
    for name, line in classes.items():
        mine = [row for row in rows if row.label == name]
        correct, guessed = sum(row.correct for row in mine), sum(row.prediction == name for row in rows)
        assert (int(line["images"]), int(line["correct"]), int(line["predicted"])) == (len(mine), correct, guessed)
        assert float(line["top1"]) == pytest.approx(100 * correct / len(mine), abs=1e-4)
        assert line["precision"] == ("" if not guessed else str(round(100 * correct / guessed, 4)))


def image_rows(outcomes: str) -> list[ImageRow]:
    return [ImageRow(f"{place}.png", "a", "b", 0.5, sign == "1", True) for place, sign in enumerate(outcomes)]


def test_mcnemars_test_is_exact() -> None:
    found = compare(image_rows("1111110000"), image_rows("0000111100")[::-1])
    assert (found.both, found.only_first, found.only_second, found.neither) == (2, 4, 2, 2)
    assert found.p_value == pytest.approx(2 * sum(math.comb(6, k) for k in range(3)) / 2**6)
    assert (found.top1, found.difference) == ((60.0, 40.0), -20.0)
    # Wald's interval: -0.2 and 1.96 standard errors of sqrt(6 - 4 / 10) / 10.
    assert found.interval == pytest.approx((-20 - 46.381, -20 + 46.381), abs=0.01)
    same = compare(image_rows("10"), image_rows("10"))
    assert (same.p_value, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))
    # For many images, compare with the normal approximation with continuity correction.
    many = compare(image_rows("1" * 5100 + "0" * 4900), image_rows("0" * 5100 + "1" * 4900))
    assert many.p_value == pytest.approx(math.erfc((200 - 1) / math.sqrt(10_000) / math.sqrt(2)), rel=1e-3)
    assert isinstance(many, Comparison)


def test_only_the_same_images_are_compared(tmp_path: Path) -> None:
    first = image_rows("101")
    with pytest.raises(EvaluationError, match=r"of 3 and 2 images, of which 2\.png is in one file only"):
        compare(first, first[:2])
    with pytest.raises(EvaluationError, match=r"of which 2\.png"):
        compare(first[:2], first)
    with pytest.raises(EvaluationError, match=r"0\.png has the labels 'a' and 'c'"):
        compare(first, [dataclasses.replace(row, label="c") for row in first])
    strange = [ImageRow(name, "'=x", "@y", 0.25, True, False) for name in ("=1.png", "'a.png", "a,b\n.png")]
    (path, *_) = write_details(tmp_path, "strange", strange)
    assert read_predictions(path) == tuple(strange)
    for text in ("a,b\n", path.read_text(encoding="utf-8").replace("0.25", "high"), "file,label\n"):
        (tmp_path / "other.csv").write_text(text, encoding="utf-8")
        with pytest.raises(EvaluationError, match=r"other\.csv: not a predictions file"):
            read_predictions(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("percent", "images", "low", "high"), [(50.0, 10, 23.6593, 76.3407), (100.0, 20, 83.8875, 100)]
)
def test_wilsons_interval(percent: float, images: int, low: float, high: float) -> None:
    """The published values for 5 of 10 and 20 of 20."""
    assert wilson(percent, images) == pytest.approx((low, high), abs=1e-3)


def test_names_are_expanded(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("# bundled\nregnetx_002_ubn.cifar10\n\nresnet18_ubn.*\n", encoding="utf-8")
    expanded = expand_names([str(names), "resnet18_ubn.*", "hf-hub:a/b", "runs/a"])
    assert (expanded[0], expanded[-2:]) == ("regnetx_002_ubn.cifar10", ["hf-hub:a/b", "runs/a"])
    assert "resnet18_ubn.bn_a1_in1k" in expanded[1:-2]
    assert all(name.startswith("resnet18_ubn.") for name in expanded[1:-2])
    assert len(set(expanded)) == len(expanded)
    with pytest.raises(EvaluationError, match="no pretrained model matches 'resnat\\*'; "):
        expand_names(["resnat*"])
    names.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"names\.txt has no names"):
        expand_names([str(names)])
