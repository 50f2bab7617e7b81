"""Published numbers agree with each other, and with the bundled weights where the data is at hand."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from ubn_zoo.data import load_image_folder
from ubn_zoo.evaluate import evaluate_pretrained
from ubn_zoo.manifest import Record, bundled_path, load_manifest
from ubn_zoo.metrics import EpochMetrics, read_metrics
from ubn_zoo.recipe import load_recipe, recipe_path, recipe_sha256

REPOSITORY = Path(__file__).parents[1]
CIFAR10 = REPOSITORY.parent / "shared" / "data" / "cifar10.tar.xz"
RECORD = "regnetx_002_ubn.cifar10"


@pytest.fixture(scope="module")
def record() -> Record:
    return load_manifest().get(RECORD)


@pytest.fixture(scope="module")
def rows() -> tuple[EpochMetrics, ...]:
    return read_metrics(REPOSITORY / "results" / "cifar10_small.csv")


def test_the_record_names_the_recipe_that_was_run(record: Record) -> None:
    assert record.recipe is not None
    assert recipe_path(Path(record.recipe.name).stem) == REPOSITORY / record.recipe.name
    assert recipe_sha256(Path(record.recipe.name).stem) == record.recipe.sha256


def test_the_table_holds_whole_runs_of_the_recipe_in_pairs(rows: tuple[EpochMetrics, ...]) -> None:
    recipe = load_recipe("cifar10_small")
    runs: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        assert row.model == recipe.model
        runs.setdefault((row.norm, row.seed), []).append(row.epoch)
    assert all(epochs == list(range(1, recipe.epochs + 1)) for epochs in runs.values())
    seeds = {norm: {seed for other, seed in runs if other == norm} for norm in ("ubn", "bn")}
    assert seeds["ubn"] == seeds["bn"] != set()


def test_the_records_metric_is_the_tables(record: Record, rows: tuple[EpochMetrics, ...]) -> None:
    metric = record.metrics[0]
    assert (metric.name, metric.dataset, metric.split) == ("top1", "CIFAR-10 (JPEG)", "test")
    (seed,) = metric.measured.seeds
    last = [row for row in rows if (row.norm, row.seed) == ("ubn", seed)][-1]
    assert metric.value == pytest.approx(last.top1, abs=0.005)


def test_the_bundled_model_loads_and_is_what_its_record_says(record: Record) -> None:
    content = bundled_path(record).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (record.sha256, record.bytes)
    assert record.bytes < 10_000_000
    model = timm.create_model(RECORD, pretrained=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == record.params
    assert tuple(model.pretrained_cfg["input_size"]) == record.input.size
    assert model(torch.zeros(2, *record.input.size)).shape == (2, record.num_classes)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in model.state_dict().values())


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"the CIFAR-10 images are not at {CIFAR10}")
def test_the_bundled_model_reaches_its_published_accuracy(record: Record, tmp_path: Path) -> None:
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(tmp_path, (file for file in archive if file.name.split("/")[0] == "test"), filter="data")
    data = load_image_folder(tmp_path / "test")
    found = evaluate_pretrained(RECORD, data)
    assert found.images == 10_000
    # Another processor or version may round a few of the 10,000 images to the other side.
    assert found.top1 == pytest.approx(record.metrics[0].value, abs=0.05)
