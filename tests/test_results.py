"""Published numbers agree with each other, and with the bundled weights if the data is available."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from research.experiments.grid import Grid, list_grids, load_grid, plan
from research.experiments.report import page
from research.experiments.tables import load
from ubn_zoo.data.loaders import MemoryEval
from ubn_zoo.data.memory import ImageSet, load_image_folder
from ubn_zoo.data.readers import labels_as_trained, relabel_images
from ubn_zoo.evaluation.accuracy import measure
from ubn_zoo.evaluation.subjects import load_subject
from ubn_zoo.evaluation.test_sets import feed_of
from ubn_zoo.hub.manifest import Record, bundled_path, load_manifest
from ubn_zoo.recipes.schema import recipe_path, recipe_sha256
from ubn_zoo.release.bundle import MAX_BYTES, MAX_BYTES_IN_ALL
from ubn_zoo.utils.distributed import Ranks

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "results"
CIFAR10 = REPOSITORY.parent / "shared" / "data" / "cifar10.tar.xz"
BUNDLED = [record for record in load_manifest() if record.source == "bundled"]
MEASURED = [load_grid(name) for name in list_grids() if (RESULTS / f"{name}.csv").is_file()]


def test_there_are_tables_and_records() -> None:
    families = {"resnet", "regnet", "mobilenet"}
    assert families == {family for family in families for record in BUNDLED if record.architecture.startswith(family)}
    assert {experiment.name for experiment in MEASURED} >= {"cifar10_mobilenet", "cifar10_regnet", "cifar10_resnet"}


@pytest.mark.parametrize("experiment", MEASURED, ids=lambda experiment: experiment.name)
def test_tables_contain_complete_runs_of_the_plan(experiment: Grid) -> None:
    found = load(experiment, RESULTS)
    planned = plan(experiment, "runs")
    labels = dict.fromkeys(each.label for each in planned)
    assert list(found.runs) == list(labels)
    for label in labels:
        tuned = {row.choice for row in found.tested.get(label, ())} or {""}
        assert len(tuned) == 1
        reported = [each for each in planned if (each.label, each.choice_text) == (label, *tuned)]
        assert [each.seed for each in reported] == list(experiment.seeds)
        assert len(found.runs[label]) == len(reported)
        assert not experiment.test or [row.seed for row in found.tested[label]] == list(experiment.seeds)
        for each in reported:
            (rows,) = [run for run in found.runs[label] if run[0].seed == each.seed]
            recipe = each.recipe
            assert [row.epoch for row in rows] == list(range(1, recipe.epochs + 1))
            assert {(row.model, row.norm) for row in rows} == {(recipe.model, recipe.norm)}
            assert all(re.fullmatch("[0-9a-f]{40}", row.commit or "") for row in rows)
            assert all(1 <= row.top1 <= 100 and 0 <= row.calibration_error <= 100 for row in rows)
    assert set(found.layers) == {each.label for each in planned if each.recipe.probe_images}


def test_the_page_matches_the_tables() -> None:
    written = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == page(RESULTS), "out of date; run: python -m research.experiments report"
    for picture in re.findall(r"\]\((\w+\.png)\)", written):
        assert (REPOSITORY / "docs" / picture).is_file()


def test_bundled_files_match_the_manifest_and_are_small() -> None:
    folder = bundled_path(BUNDLED[0]).parent
    assert {path.name for path in folder.iterdir()} == {record.file for record in BUNDLED}
    assert max(record.bytes for record in BUNDLED) <= MAX_BYTES
    assert sum(record.bytes for record in BUNDLED) <= MAX_BYTES_IN_ALL


@pytest.mark.parametrize("record", BUNDLED, ids=lambda record: record.id)
def test_bundled_models_match_their_records(record: Record) -> None:
    content = bundled_path(record).read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (record.sha256, record.bytes)
    model = timm.create_model(record.id, pretrained=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == record.params
    assert tuple(model.pretrained_cfg["input_size"]) == record.input.size
    assert model(torch.zeros(2, *record.input.size)).shape == (2, record.num_classes)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in model.state_dict().values())
    assert record.recipe is not None
    assert recipe_path(Path(record.recipe.name).stem) == REPOSITORY / record.recipe.name
    assert recipe_sha256(Path(record.recipe.name).stem) == record.recipe.sha256


@pytest.mark.parametrize("record", BUNDLED, ids=lambda record: record.id)
def test_records_agree_with_the_tables(record: Record) -> None:
    top1, twin = record.metrics
    assert (top1.name, twin.name) == ("top1", "top1_batchnorm_twin")
    assert (top1.dataset, top1.split) == ("CIFAR-10 (JPEG)", "test")
    model = record.architecture.removesuffix("_ubn")
    last = [run[-1] for experiment in MEASURED for runs in load(experiment, RESULTS).runs.values() for run in runs]
    for metric, norm in ((top1, "ubn"), (twin, "bn")):
        mine = [row for row in last if (row.model, row.norm, row.commit) == (model, norm, metric.measured.commit)]
        # Storing parameters in float16 may change the predictions of a few of the 10,000 images.
        assert any(abs(row.top1 - metric.value) <= 0.05 for row in mine)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """CIFAR-10's test images, decoded once for all models."""
    root = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(root, (file for file in archive if file.name.split("/")[0] == "test"), filter="data")
    images = load_image_folder(root / "test")
    shutil.rmtree(root)
    return images


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_file(), reason=f"the CIFAR-10 images are not at {CIFAR10}")
@pytest.mark.parametrize("record", BUNDLED, ids=lambda record: record.id)
def test_bundled_models_reach_their_published_accuracy(record: Record, decoded: ImageSet) -> None:
    subject = load_subject(record.id)
    images = relabel_images(decoded, labels_as_trained(subject.classes, "CIFAR-10"))
    batches = MemoryEval(feed_of(subject, dataset="memory"), images, Ranks())
    found = measure(subject.model.to(memory_format=torch.channels_last), batches, Ranks())
    assert (found.images, subject.classes) == (10_000, decoded.classes)
    # With another processor or version, rounding may change the predictions of a few of the 10,000 images.
    assert found.top1 == pytest.approx(record.metrics[0].value, abs=0.05)
