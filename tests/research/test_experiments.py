"""Grids: planning, training, tuning and collection of runs, statistics, and the generated page."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from research.experiments import inference, runs
from research.experiments.__main__ import main
from research.experiments.grid import Grid, list_grids, load_grid, plan
from research.experiments.report import markdown, report
from research.experiments.runs import chosen, prepare_data, read_predictions, replace_by_group_norm, train
from research.experiments.tables import collect, cost, load
from tests.metrics import ROW
from ubn_zoo.errors import DataError, RecipeError
from ubn_zoo.evaluation.metrics import (
    EpochMetrics,
    LayerSimilarity,
    read_labeled_metrics,
    write_metrics,
    write_similarity,
)
from ubn_zoo.recipes.schema import decisive_settings, dump_recipe

SMALL: dict[str, Any] = {
    "title": "A small one",
    "recipe": "cifar10_small",
    "settings": {"epochs": 2},
    "variants": {"BatchNorm": {"norm": "bn"}, "UBN, threshold 0.3": {"norm": "ubn", "threshold": 0.3}},
    "seeds": [0, 4],
}


def write_grid(folder: Path, name: str = "small", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False), encoding="utf-8")
    return path


def row(norm: str, seed: int, epoch: int, top1: float) -> EpochMetrics:
    return dataclasses.replace(
        ROW,
        norm=norm,
        seed=seed,
        epoch=epoch,
        step=10 * epoch,
        train_loss=2.0 - 0.1 * epoch,
        test_loss=1.5,
        top1=top1,
        calibration_error=3.25,
        step_ms=10.0,
        images_per_second=100.0,
        gates_open=3 if norm == "ubn" else None,
        gates=4 if norm == "ubn" else 0,
    )


REACHED = {("bn", 0): 50.0, ("bn", 4): 52.0, ("ubn", 0): 53.0, ("ubn", 4): 56.0}
# Correct answers per image; UBN is right on two images that BatchNorm gets wrong, and wrong on one that BatchNorm gets
# right.
RIGHT = {"bn": [1, 1, 0, 0, 1], "ubn": [1, 0, 1, 1, 1]}


def write_runs(grid: Grid, folder: Path, reached: dict[tuple[Any, ...], float]) -> Path:
    """Folders of finished runs whose accuracy is looked up by norm, seed and tuned values."""
    for planned in plan(grid, "runs"):
        place = folder / grid.name / planned.folder
        place.mkdir(parents=True)
        norm, seed = planned.recipe.norm, planned.seed
        last = reached[(norm, seed, *planned.choice.values())]
        (place / "recipe.yaml").write_text(dump_recipe(planned.recipe), encoding="utf-8")
        write_metrics(place / "metrics.csv", [row(norm, seed, 1, last - 10), row(norm, seed, 2, last)])
        layers = [
            LayerSimilarity(epoch=epoch, layer=f"layer{depth}", depth=depth, similarity=0.1 * epoch + 0.2 * depth)
            for epoch in (1, 2)
            for depth in (0, 1)
        ]
        write_similarity(place / "similarity.csv", layers)
        (place / "model.safetensors").touch()
        started = {"starts": [{"started": "2026-11-25T10:00:00+00:00"}]}
        (place / "environment.json").write_text(json.dumps(started), encoding="utf-8")
        lines = [f"1,{right},0.5" for right in RIGHT[norm]]
        (place / "predictions.csv").write_text("\n".join(["label,predicted,loss", *lines]) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", list_grids())
def test_runs_of_committed_grids_differ_only_in_the_compared_settings(name: str) -> None:
    grid = load_grid(name)
    planned = plan(grid, "runs")
    cells, choices = grid.cells(), grid.choices()
    assert len(planned) == len(grid.variants) * len(grid.seeds) * len(cells) * len(choices)
    assert len({each.folder for each in planned}) == len(planned)
    for seed in grid.seeds:
        for cell in cells:
            group = [each for each in planned if (each.seed, each.cell) == (seed, cell)]
            settings = [decisive_settings(each.recipe) for each in group]
            allowed = {key for each in grid.variants.values() for key in each} | set(grid.tune) | {"probe_images"}
            for other in settings[1:]:
                assert {key for key, value in other.items() if value != settings[0][key]} <= allowed


def test_plans_fill_in_what_they_start_from() -> None:
    first = plan(load_grid("clothing"), "there")[0].recipe
    assert first.checkpoint == "there/cifar10_regnet_long/batchnorm_seed0/model.safetensors"


def test_models_and_varied_settings_are_cells_with_tuned_values_inside(tmp_path: Path) -> None:
    path = write_grid(
        tmp_path,
        models=["resnet10t", "mobilenetv3_small_050"],
        vary={"batch_size": [4, 8]},
        tune={"lr": [0.001, 0.01]},
        tune_seeds=1,
        test=["test"],
    )
    grid = load_grid(path)
    planned = plan(grid, "runs")
    assert [str(cell) for cell in grid.cells()] == [
        f"{model}, batch_size {size}" for model in ("resnet10t", "mobilenetv3_small_050") for size in (4, 8)
    ]
    found = {(each.recipe.model, each.recipe.batch_size, each.recipe.norm, each.recipe.lr) for each in planned}
    assert len(found) == 16
    assert len(planned) == 32
    assert planned[0].label == "resnet10t, batch_size 4: BatchNorm"
    assert planned[1].folder == "resnet10t_batch_size_4_batchnorm_lr0.01_seed0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "variant: unknown key; valid: title"),
        ({"recipe": None}, "missing: recipe"),
        ({"recipe": "no_such"}, "no recipe 'no_such'"),
        ({"seeds": [1, 1]}, "seeds: received"),
        ({"seeds": []}, "seeds: received"),
        ({"variants": {"A": "norm=bn"}}, "variants: received"),
        ({"variants": {"A b": {"norm": "bn"}, "a-B": {"norm": "ubn"}, "a B": {"norm": "bnet"}}}, "two labels differ"),
        ({"variants": {"A": {"norn": "bn"}}}, "norn: unknown key"),
        ({"tune": {"lr": 0.1}, "test": ["test"]}, "tune: received"),
        ({"tune": {"lr": [0.1]}}, "test: received nothing"),
        ({"tune": {"lr": [0.1]}, "test": ["test"], "tune_seeds": 3}, "tune_seeds: received 3"),
        ({"hold_out": 1.5, "test": ["test"]}, "hold_out: received 1.5"),
        ({"compare": [["BatchNorm", "BNET"]]}, "compare: received 'BNET'; valid: BatchNorm, UBN"),
        ({"compare": ["BatchNorm"]}, "compare: received"),
        ({"hold_out": 0.5}, "test: received nothing"),
    ],
)
def test_a_grid_that_is_not_valid_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_grid(write_grid(tmp_path, **changes))
    assert "small.yaml" in str(caught.value)


def test_a_grid_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no grid 'mine'; valid: cifar10_equal_time, "):
        load_grid("mine")
    assert main(["run", str(tmp_path / "mine.yaml")]) == 1


def test_choices_are_made_on_a_part_of_the_training_images(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("validation", 2), ("test", 3)):
        for name in ("cat", "dog"):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.png").touch()
    grid = load_grid(write_grid(tmp_path, hold_out=0.2, test=["validation", "test"]))
    data = prepare_data(grid, tmp_path / "photos", tmp_path / "runs")
    parts = {split: {path.resolve() for path in data.glob(f"{split}/*/*")} for split in ("train", "validation", "test")}
    assert {split: len(paths) for split, paths in parts.items()} == {"train": 16, "validation": 4, "test": 10}
    assert not parts["train"] & parts["validation"]
    assert {path.parts[-3] for path in parts["train"] | parts["validation"]} == {"train"}
    assert {path.parts[-3] for path in parts["test"]} == {"validation", "test"}
    assert prepare_data(grid, tmp_path / "photos", tmp_path / "runs") == data
    # A grid that holds nothing out reads the data as it is.
    assert prepare_data(load_grid(write_grid(tmp_path)), tmp_path / "photos", tmp_path / "runs") == tmp_path / "photos"
    with pytest.raises(DataError, match="names no data; give --data-dir"):
        prepare_data(grid, None, tmp_path / "runs")


def test_tuning_selects_the_best_values_on_held_out_images(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, tune={"lr": [0.001, 0.01]}, tune_seeds=1, test=["test"]))
    # BatchNorm is better with 0.001 for the seed that counts, UBN with 0.01.
    reached = {(norm, seed, lr): 50.0 for norm in ("bn", "ubn") for seed in (0, 4) for lr in (0.001, 0.01)}
    reached |= {("bn", 0, 0.001): 51.0, ("ubn", 0, 0.01): 51.0, ("bn", 4, 0.01): 90.0}
    folder = write_runs(grid, tmp_path / "runs", reached)
    assert {(each.recipe.norm, each.recipe.lr) for each in chosen(grid, folder)} == {("bn", 0.001), ("ubn", 0.01)}
    collect(grid, folder, tmp_path)
    with (tmp_path / "small_choices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(each["variant"], each["choice"], each["chosen"]) for each in rows] == [
        ("BatchNorm", "lr=0.001", "True"),
        ("BatchNorm", "lr=0.01", "False"),
        ("UBN, threshold 0.3", "lr=0.001", "False"),
        ("UBN, threshold 0.3", "lr=0.01", "True"),
    ]
    table = markdown(grid, grid.cells()[0], load(grid, tmp_path)).splitlines()
    assert table[0].startswith("|  | seeds | lr | top-1 (%) |")
    assert table[3].startswith("| UBN, threshold 0.3 | 2 | 0.01 |")
    (folder / "small" / "batchnorm_lr0.01_seed0" / "metrics.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"batchnorm_lr0.01_seed0 is not finished; run it by"):
        chosen(grid, folder)


def test_collected_results_match_the_runs(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    folder = write_runs(grid, tmp_path / "runs", REACHED)
    tables = collect(grid, folder, tmp_path)
    assert [path.name for path in tables] == ["small.csv", "small_similarity.csv", "small_test.csv"]
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
    found = load(grid, tmp_path)
    assert [len(group) for group in found.runs.values()] == [2, 2]
    assert [len(group) for group in found.layers.values()] == [4, 4]
    before, after = found.tested["BatchNorm"][0], found.tested["UBN, threshold 0.3"][1]
    assert (before.images, before.top1, before.only_baseline, before.only_variant) == (5, 60.0, 0, 0)
    assert (after.seed, after.top1, after.only_baseline, after.only_variant) == (4, 80.0, 1, 2)
    assert (after.loss, after.date) == (0.5, "2026-11-25")
    (folder / "small" / "batchnorm_seed4" / "predictions.csv").unlink()
    with pytest.raises(FileNotFoundError, match="batchnorm_seed4 is not finished"):
        collect(grid, folder, tmp_path)
    write_metrics(folder / "small" / "batchnorm_seed0" / "metrics.csv", [row("bn", 0, 1, 40.0)])
    with pytest.raises(FileNotFoundError, match="batchnorm_seed0 is not finished"):
        collect(grid, folder, tmp_path)


def test_table_uses_paired_differences(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path, claim=2.0, compare=[["BatchNorm", "UBN, threshold 0.3"]]))
    collect(grid, write_runs(grid, tmp_path / "runs", REACHED), tmp_path)
    (tmp_path / "small_test.csv").unlink()
    baseline, other, _, compared = markdown(grid, grid.cells()[0], load(grid, tmp_path)).splitlines()[2:]
    spread = statistics.stdev([50.0, 52.0])
    top1 = f"**51.00 ± {spread:.2f}**"
    assert baseline == f"| BatchNorm | 2 | {top1} |  |  |  |  | 1.50 ± 0.00 | 3.25 ± 0.00 | 0.30 |  |  |"
    # 53 - 50 and 56 - 52, pairs of the same seed: 3.5 on average, and with one degree of freedom t is 12.7062.
    half = 12.7062 * statistics.stdev([3.0, 4.0]) / 2**0.5
    assert f"| +3.50 [{3.5 - half:+.2f}, {3.5 + half:+.2f}] | 0.090 |" in other
    assert other.endswith("| 3/4, 3/4 |  |")
    half = f"[{-3.5 - half:+.2f}, {-3.5 + half:+.2f}]"
    assert compared == f"- BatchNorm against UBN, threshold 0.3: -3.50 {half}, p = 0.090 (not adjusted)"


def test_intervals_and_tests_are_those_of_textbooks() -> None:
    # Student's sleep data (Biometrika 6, 1908): mean 1.58, t = 4.0621, p = 0.002833, 95 % interval 0.7001 to 2.4599.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert inference.paired_p(sleep) == pytest.approx(0.002833, abs=1e-6)
    half = inference.interval(sleep)
    assert half == pytest.approx(1.58 - 0.7001, abs=1e-4)
    assert inference.interval([1.0]) is None
    assert inference.paired_p([1.0]) is None
    assert inference.paired_p([0.0, 0.0]) == 1.0
    assert inference.paired_p([1.0, 1.0]) == 0.0
    # Twice the binomial probability of at most 1 of 8: 2 * (1 + 8) / 256.
    assert inference.mcnemar(1, 7) == inference.mcnemar(7, 1) == pytest.approx(18 / 256)
    assert inference.mcnemar(0, 0) == 1.0
    assert inference.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_the_number_of_runs_has_the_power_that_it_promises() -> None:
    # A standardized difference of 0.5 needs 34 pairs (Cohen, Statistical Power Analysis, 1988).
    assert inference.runs_needed(2.0, 1.0) == 34
    assert inference.runs_needed(0.0, 1.0) == 2
    assert inference.runs_needed(100.0, 1.0) == 1000
    needed = inference.runs_needed(1.0, -1.5)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, needed, generator=generator, dtype=torch.float64) + 1.5
    found = sum((inference.paired_p(draw) or 1) < 0.05 for draw in draws.tolist()) / len(draws)
    assert found == pytest.approx(0.8, abs=0.12)
    with pytest.raises(ValueError, match="difference: received 0"):
        inference.runs_needed(1.0, 0.0)


def test_steps_are_timed_in_turns(tmp_path: Path) -> None:
    settings = {"epochs": 2, "model": "mobilenetv3_small_050", "img_size": 32, "batch_size": 8}
    grid = load_grid(write_grid(tmp_path, settings=settings))
    path = cost(grid, tmp_path, steps=2)
    with path.open(newline="") as file:
        baseline, other = csv.DictReader(file)
    assert (baseline["variant"], float(baseline["ratio"])) == ("BatchNorm", 1.0)
    assert float(other["ratio"]) > 0.5
    assert float(other["lower"]) <= float(other["median"]) <= float(other["upper"])
    collect(grid, write_runs(grid, tmp_path / "runs", REACHED), tmp_path)
    table = markdown(grid, grid.cells()[0], load(grid, tmp_path))
    assert f"| {float(other['ratio']):.2f} |" in table.splitlines()[3]


def test_page_covers_available_results(tmp_path: Path) -> None:
    grid = load_grid(write_grid(tmp_path))
    collect(grid, write_runs(grid, tmp_path / "runs", REACHED), tmp_path)
    written = report(tmp_path, tmp_path, [grid])
    assert [path.name for path in written] == ["results.md", "small.png"]
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## A small one" in text
    assert "![A small one](small.png)" in text
    assert "| 0 of 2 |" in text  # of McNemar's tests: 1 against 2 images show nothing
    (tmp_path / "small_test.csv").unlink()
    written = report(tmp_path, tmp_path, [grid])
    assert [path.name for path in written] == ["results.md", "small.png", "small_similarity.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_group_norm_keeps_affine_and_activation() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    before = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        before[0].weight.fill_(2.0)
    replace_by_group_norm(model, 8)
    after = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert [layer.num_channels for layer in after] == [layer.num_features for layer in before]
    assert [layer.num_groups for layer in after] == [layer.num_features // 8 for layer in before]
    image = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(model.bn1(image), nn.functional.hardswish(nn.functional.group_norm(image, 2) * 2))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="group_size: received 0"):
        replace_by_group_norm(model, 0)


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_an_own_grid_runs_resumes_and_is_reported(
    processes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The complete workflow of a new user, on scikit-learn's digits."""
    pytest.importorskip("sklearn")
    path = write_grid(
        tmp_path,
        "mine",
        recipe="digits_finetune",
        settings={"model": "mobilenetv3_small_050", "pretrained": False, "img_size": 32, "train_samples": 16}
        | {"epochs": 1, "batch_size": 8, "threads": 1, "warmup_epochs": 0, "probe_images": 8},
        variants={"GroupNorm": {"norm": "bn", "group_norm": 8}, "UBN": {"norm": "ubn"}},
        seeds=[0, 1],
        tune={"lr": [0.001, 0.01]},
        tune_seeds=1,
        hold_out=0.2,
        test=["test"],
        data="digits",
    )
    folders = ["--runs", str(tmp_path / "runs")]
    assert main(["collect", str(path), *folders, "--results", str(tmp_path)]) == 1
    assert "is not finished; run it by" in capsys.readouterr().err
    assert main(["run", str(path), *folders, "--processes", processes]) == 0
    place = tmp_path / "runs" / "mine"
    # Two variants, two rates for the first seed, and the better one for the second.
    assert len([each for each in place.glob("*_seed?") if (each / "model.safetensors").is_file()]) == 6
    # A finished grid is not trained again, and a missing prediction is recomputed.
    predicted = sorted(place.glob("*/predictions.csv"))
    assert len(predicted) == 4
    again = predicted[0].read_bytes()
    predicted[0].unlink()
    started = time.time()
    assert main(["run", str(path), *folders]) == 0
    assert predicted[0].read_bytes() == again
    assert all((each / "metrics.csv").stat().st_mtime < started for each in place.glob("*_seed?"))
    assert len(read_predictions(predicted[0])) == 450
    results = ["--results", str(tmp_path)]
    assert main(["collect", str(path), *folders, *results]) == 0
    assert main(["report", str(path), *results, "--docs", str(tmp_path / "docs")]) == 0
    text = (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")
    assert "`lr` was chosen on 20 % of the training images, held out of training with 1 seed." in text


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = load_grid(write_grid(tmp_path, data="photos"))
    (tmp_path / "photos").mkdir()
    trained = []

    def note(planned: Any, data: Path, folder: Path) -> bool:
        trained.append(planned.folder)
        return True

    monkeypatch.setattr(runs, "_train_one", note)
    locks = tmp_path / "runs" / "small" / ".locks"
    locks.mkdir(parents=True)
    (locks / "batchnorm_seed0").touch()
    with runs.locked(locks / "batchnorm_seed0"):
        assert train(tmp_path / "small.yaml", None, tmp_path / "runs", nice=0) is False
    assert trained == [each.folder for each in plan(grid, "runs") if each.folder != "batchnorm_seed0"]
