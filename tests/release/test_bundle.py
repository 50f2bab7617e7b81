"""Bundling a run: the record has the accuracy of the stored file, and unfit runs are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from tests.images import RECIPE, write_image_folder
from ubn_zoo.evaluation.metrics import read_metrics, write_metrics
from ubn_zoo.hub.manifest import dump_manifest, load_manifest
from ubn_zoo.recipes.schema import dump_recipe, load_recipe
from ubn_zoo.release.bundle import BundleError, bundle, refresh
from ubn_zoo.training.run import run

SMALL = dataclasses.replace(RECIPE, model="mobilenetv3_small_050", epochs=1, warmup_epochs=0.0, probe_images=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


def commit(folder: Path, name: str) -> None:
    """Write a commit into the run's table, since the working tree may have uncommitted changes."""
    rows = [dataclasses.replace(row, commit=name) for row in read_metrics(folder / "metrics.csv")]
    write_metrics(folder / "metrics.csv", rows)


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run with UBN and with BatchNorm."""
    folder = tmp_path_factory.mktemp("runs")
    for norm in ("ubn", "bn"):
        run(dataclasses.replace(SMALL, seed=5, norm=norm), images, folder / norm)
        commit(folder / norm, "1" * 40)
    return folder / "ubn", folder / "bn"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    dump_manifest([], tmp_path / "manifest.json")
    (tmp_path / "weights").mkdir()
    (tmp_path / "mine.yaml").write_text(dump_recipe(SMALL), encoding="utf-8")
    return tmp_path


def put(folder: Path, images: Path, place: Path, **options: Any) -> Any:
    facts = {"tag": "stripes", "dataset": "stripes", "origin": "made up", "description": "Tells stripes apart"}
    where = {"recipe_name": str(place / "mine.yaml"), "manifest": place / "manifest.json", "weights": place / "weights"}
    return bundle(folder, data_dir=images, **facts, **where, **options)


@pytest.mark.parametrize("half", [False, True])
def test_the_record_has_the_accuracy_of_the_file(
    half: bool, runs: tuple[Path, Path], images: Path, place: Path
) -> None:
    folder, twin = runs
    record = put(folder, images, place, twin=twin, half=half)
    assert load_manifest(place / "manifest.json").get("mobilenetv3_small_050_ubn.stripes") == record
    path = place / "weights" / "mobilenetv3_small_050_ubn.stripes.safetensors"
    assert (record.sha256, record.bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    state = safetensors.torch.load_file(path)
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        kept = whole[name].half() if half and not name.endswith(("running_mean", "running_var")) else whole[name]
        if whole[name].is_floating_point() and "feature_similarity" not in name:
            assert torch.equal(tensor, kept), name
    model = timm.create_model("mobilenetv3_small_050_ubn", checkpoint_path=str(path), num_classes=2)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    top1, theirs = record.metrics
    assert (theirs.name, theirs.value) == ("top1_batchnorm_twin", round(read_metrics(twin / "metrics.csv")[-1].top1, 2))
    if not half:
        assert top1.value == round(read_metrics(folder / "metrics.csv")[-1].top1, 2)
    assert theirs.measured.command.endswith("--set norm=bn seed=5")
    assert record.origin.trained.endswith("--set seed=5")
    assert top1.measured.commit == "1" * 40
    assert record.input.size == (3, 32, 32)


def test_hashes_of_recipes_are_refreshed(place: Path) -> None:
    """After a change in the recipe's text, the record gets the new hash and nothing else changes."""
    bundled = load_manifest().find(source="bundled")
    old = [dataclasses.replace(r, recipe=dataclasses.replace(r.recipe, sha256="0" * 64)) for r in bundled if r.recipe]
    dump_manifest(old, place / "manifest.json")
    assert refresh(place / "manifest.json") == [record.id for record in bundled]
    assert load_manifest(place / "manifest.json").records == bundled
    assert refresh(place / "manifest.json") == []


def test_unfit_runs_are_refused(runs: tuple[Path, Path], images: Path, place: Path) -> None:
    ubn, bn = (Path(shutil.copytree(folder, place / folder.name)) for folder in runs)

    def refused(reason: str, folder: Path, **options: Any) -> None:
        with pytest.raises(BundleError, match=reason):
            put(folder, images, place, **options)

    refused("valid: a finished run with norm ubn", bn)
    recipe = load_recipe(bn / "recipe.yaml")
    (bn / "recipe.yaml").write_text(dump_recipe(dataclasses.replace(recipe, lr=0.01)), encoding="utf-8")
    refused("differs from .* in more than its norm", ubn, twin=bn)
    commit(ubn, "1" * 40 + "+")
    refused(r"its commit is 1+\+; valid: one that contains all", ubn)
    (ubn / "model.safetensors").unlink()
    refused("is not the folder of a finished run", ubn)
    assert not list(load_manifest(place / "manifest.json"))
    assert not list((place / "weights").iterdir())
