"""Experiments: what is planned, what is collected from runs, and the page that is made of it."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from pathlib import Path

import pytest

from research import experiments
from research.experiments import EXPERIMENTS, Experiment, collect, cost, get_experiment, load, markdown, plan, report
from ubn_zoo.evaluation.metrics import (
    EpochMetrics,
    LayerSimilarity,
    read_labeled_metrics,
    write_metrics,
    write_similarity,
)
from ubn_zoo.recipes.schema import decisive_settings

SMALL = Experiment(
    name="small",
    title="A small one",
    recipe="cifar10_small",
    settings=("epochs=2",),
    variants={"BatchNorm": ("norm=bn",), "UBN, threshold 0.3": ("norm=ubn", "threshold=0.3")},
    seeds=(0, 4),
)


def row(norm: str, seed: int, epoch: int, top1: float) -> EpochMetrics:
    return EpochMetrics(
        model="resnet10t",
        norm=norm,
        seed=seed,
        epoch=epoch,
        step=10 * epoch,
        lr=0.1,
        train_loss=2.0 - 0.1 * epoch,
        test_loss=1.5,
        top1=top1,
        calibration_error=3.25,
        seconds=1.0,
        step_ms=10.0,
        images_per_second=100.0,
        gates_open=3 if norm == "ubn" else None,
        gates=4 if norm == "ubn" else 0,
        device="cpu",
        ranks=1,
        threads=1,
        torch="2",
        commit=None,
    )


def layer(epoch: int, depth: int, similarity: float) -> LayerSimilarity:
    return LayerSimilarity(epoch=epoch, layer=f"layer{depth}", depth=depth, similarity=similarity)


REACHED = {("bn", 0): 50.0, ("bn", 4): 52.0, ("ubn", 0): 53.0, ("ubn", 4): 56.0}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for planned in plan(SMALL, "runs"):
        folder = tmp_path / "runs" / "small" / planned.folder
        folder.mkdir(parents=True)
        norm, seed = planned.recipe.norm, planned.recipe.seed
        last = REACHED[norm, seed]
        write_metrics(folder / "metrics.csv", [row(norm, seed, 1, last - 10), row(norm, seed, 2, last)])
        layers = [layer(epoch, depth, 0.1 * epoch + 0.2 * depth) for epoch in (1, 2) for depth in (0, 1)]
        write_similarity(folder / "similarity.csv", layers)
        (folder / "model.safetensors").touch()
    return tmp_path / "runs"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_every_experiment_is_pairs_that_differ_in_what_they_say(experiment: Experiment) -> None:
    planned = plan(experiment, "runs")
    assert len(planned) == len(experiment.variants) * len(experiment.seeds)
    assert len({each.folder for each in planned}) == len(planned)
    allowed = {"norm", "threshold", "kernel_init", "checkpoint"}
    for seed in experiment.seeds:
        settings = [decisive_settings(each.recipe) for each in planned if each.recipe.seed == seed]
        assert len(settings) == len(experiment.variants)
        for other in settings[1:]:
            assert {key for key, value in other.items() if value != settings[0][key]} <= allowed
    assert get_experiment(experiment.name) is experiment


def test_plans_fill_in_what_they_start_from() -> None:
    first = plan(get_experiment("clothing"), "there")[0].recipe
    assert first.checkpoint == "there/cifar10_regnet_long/batchnorm_seed0/model.safetensors"
    with pytest.raises(ValueError, match=r"experiment: received 'x'; valid: cifar10_mobilenet, "):
        get_experiment("x")


def test_what_is_collected_is_what_the_runs_measured(runs: Path, tmp_path: Path) -> None:
    tables = collect(SMALL, runs, tmp_path)
    assert [path.name for path in tables] == ["small.csv", "small_similarity.csv"]
    rows = read_labeled_metrics(tables[0])
    assert [(label, each.seed, each.epoch, each.top1) for label, each in rows] == [
        ("BatchNorm", 0, 1, 40.0),
        ("BatchNorm", 0, 2, 50.0),
        ("UBN, threshold 0.3", 0, 1, 43.0),
        ("UBN, threshold 0.3", 0, 2, 53.0),
        ("BatchNorm", 4, 1, 42.0),
        ("BatchNorm", 4, 2, 52.0),
        ("UBN, threshold 0.3", 4, 1, 46.0),
        ("UBN, threshold 0.3", 4, 2, 56.0),
    ]
    found = load(SMALL, tmp_path)
    assert [len(group) for group in found.runs.values()] == [2, 2]
    assert [len(group) for group in found.layers.values()] == [4, 4]
    (runs / "small" / "batchnorm_seed4" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="batchnorm_seed4 is not finished"):
        collect(SMALL, runs, tmp_path)
    folder = runs / "small" / "batchnorm_seed4"
    (folder / "model.safetensors").touch()
    write_metrics(folder / "metrics.csv", [row("bn", 4, 1, 40.0)])
    with pytest.raises(FileNotFoundError, match="batchnorm_seed4 is not finished"):
        collect(SMALL, runs, tmp_path)


def test_the_table_is_worked_out_from_pairs(runs: Path, tmp_path: Path) -> None:
    collect(SMALL, runs, tmp_path)
    baseline, other = markdown(SMALL, load(SMALL, tmp_path)).splitlines()[2:]
    spread = statistics.stdev([50.0, 52.0])
    accuracies = f"41.00 ± {spread:.2f} | **51.00 ± {spread:.2f}**"
    assert baseline == f"| BatchNorm | 2 | {accuracies} |  | 1.50 ± 0.00 | 3.25 ± 0.00 | 0.30 |  |  |"
    # 53 - 50 and 56 - 52: pairs of the same seed.
    assert f"| {3.5:.2f} ± {statistics.stdev([3.0, 4.0]):.2f} |" in other
    assert other.endswith("| 3/4, 3/4 |  |")


def test_steps_are_timed_in_turns(runs: Path, tmp_path: Path) -> None:
    tiny = dataclasses.replace(SMALL, settings=("model=mobilenetv3_small_050", "img_size=32", "batch_size=8"))
    path = cost(tiny, tmp_path, steps=2)
    with path.open(newline="") as file:
        baseline, other = csv.DictReader(file)
    assert (baseline["variant"], float(baseline["ratio"])) == ("BatchNorm", 1.0)
    assert float(other["ratio"]) > 0.5
    assert float(other["lower"]) <= float(other["median"]) <= float(other["upper"])
    collect(SMALL, runs, tmp_path)
    assert f"| {float(other['ratio']):.2f} |" in markdown(SMALL, load(SMALL, tmp_path)).splitlines()[3]


def test_the_page_has_what_there_are_results_of(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(SMALL, name="absent", title="Another")
    monkeypatch.setattr(experiments, "EXPERIMENTS", (SMALL, absent))
    collect(SMALL, runs, tmp_path)
    docs = tmp_path / "docs"
    docs.mkdir()
    written = report(tmp_path, docs)
    assert [path.name for path in written] == ["results.md", "small.png", "small_similarity.png"]
    assert all(path.stat().st_size > 1000 for path in written[1:])
    page = (docs / "results.md").read_text(encoding="utf-8")
    assert "## A small one" in page
    assert "Another" not in page
    assert "![A small one](small.png)" in page
