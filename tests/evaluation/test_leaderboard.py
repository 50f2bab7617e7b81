"""The leaderboard's rows, files and checks, against hand-made results and timm's own tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from torch import nn

from ubn_zoo.cli import main
from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.accuracy import wilson
from ubn_zoo.evaluation.leaderboard.board import INHERITED, Board, Row, build_board
from ubn_zoo.evaluation.leaderboard.check import check_results, refusals
from ubn_zoo.evaluation.leaderboard.figures import FIGURES, TEST_SETS, count_operations, load_figures, upstream_name
from ubn_zoo.evaluation.leaderboard.render import board_csv, board_markdown, board_model_index, write_tables
from ubn_zoo.evaluation.results import ResultRow, read_results, write_results
from ubn_zoo.evaluation.speed import Speed, write_speed
from ubn_zoo.hub.manifest import load_manifest
from ubn_zoo.layers import UnifiedBatchNorm2d

REPOSITORY = Path(__file__).parents[2]
TIMM = REPOSITORY.parent / "shared" / "timm-results"
HOSTILE = [
    '<img src=x onerror="alert(1)">',
    "](http://x) [a](b",
    "\"'quoted",
    "\u202egnp.exe",
    "=cmd()|' /C calc'!A0",
    "a|b`c",
]


def result(model: str = "resnet18_ubn.bn_a1_in1k", right: int = 40, images: int = 100, **changes: Any) -> ResultRow:
    top1, top5 = 100 * right / images, 100 * ((right + images) // 2) / images
    ends = [*wilson(top1, images), *wilson(top5, images)]
    low, high, low5, high5 = (round(end, 4) for end in ends)
    fields: dict[str, Any] = {
        "model": model, "source": model, "test_set": "mine", "img_size": 288, "top1": top1, "top1_err": 100 - top1,
        "top5": top5, "top5_err": 100 - top5, "param_count": 11.74, "images": images, "classes": 1000, "norm": "ubn",
        "top1_low": low, "top1_high": high, "top5_low": low5, "top5_high": high5, "crop_pct": 1.0,
        "crop_mode": "center", "interpolation": "bicubic", "hardware": "cpu", "date": "2026-11-01", "torch": "2.14",
        "timm": "1.0", "ubn_zoo": "0",
    }  # fmt: skip
    return ResultRow(**(fields | changes))


def board_of(folder: Path, *rows: ResultRow) -> Board:
    write_results(folder / "rows.csv", rows)
    return build_board([folder / "rows.csv"])


@pytest.fixture(scope="module")
def board() -> Board:
    return build_board()


def test_wilson_interval_solves_its_equation() -> None:
    for percent, images in ((0.0, 10), (37.5, 40), (81.24, 50_000), (100.0, 7)):
        low, high = (end / 100 for end in wilson(percent, images))
        for end in (low, high):
            # The observed proportion is 1.96 standard deviations of each bound away from that bound.
            assert abs(percent / 100 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / images), abs=1e-6)
        assert -1e-9 <= low <= percent / 100 <= high <= 1 + 1e-9


def test_figures_cover_the_zoo_and_are_plausible() -> None:
    figures = load_figures()
    assert FIGURES.stat().st_size < 300_000 and set(figures["tables"]) > {each.table for each in TEST_SETS}
    named = {row[0] for row in figures["rows"]}
    families = {name: timm.model_entrypoint(name).__module__.rpartition("_")[2] for name in named}
    first = {name for name, family in families.items() if family in ("resnet", "regnet", "mobilenetv3", "efficientnet")}
    assert len(named) >= 560 and len(first) >= 323
    for name, size, crop, _, *values in figures["rows"]:
        assert all(a is None or 0 <= a <= b <= 100 for a, b in zip(values[::2], values[1::2], strict=True))
        gmacs, macts, *speeds = figures["cost"][name.partition(".")[0]][str(size)]
        assert 0 < crop <= 1 and gmacs > 0 and macts > 0 and all(speed is None or speed > 0 for speed in speeds)


@pytest.mark.skipif(not TIMM.is_dir(), reason=f"timm's tables are not in {TIMM}")
def test_figures_match_timms_tables() -> None:
    for place, test_set in enumerate(TEST_SETS):
        with (TIMM / test_set.table).open(encoding="utf-8", newline="") as file:
            theirs = {(line["model"], int(line["img_size"])): line for line in csv.DictReader(file)}
        for name, size, crop, interpolation, *values in load_figures()["rows"]:
            line = theirs.get((upstream_name(name), size))
            if line is None:
                assert values[2 * place] is None
                continue
            assert [values[2 * place], values[2 * place + 1]] == [float(line["top1"]), float(line["top5"])]
            assert (crop, interpolation) == (float(line["crop_pct"]), line["interpolation"])


def test_operations_of_all_layers_are_counted() -> None:
    counted: list[tuple[int, int]] = []

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            counted.append((output.numel() * module.weight[0].numel(), output.numel()))
        elif isinstance(module, nn.Linear):
            counted.append((output.numel() * module.in_features, output.numel()))
        elif isinstance(module, UnifiedBatchNorm2d):
            counted.append((9 * output.numel(), output.numel()))

    model = timm.create_model("regnetx_002_ubn").eval()
    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.zeros(1, 3, 96, 96))
    gmacs, macts = count_operations("regnetx_002_ubn", 96)
    assert (round(gmacs * 1e9), round(macts * 1e6)) == tuple(map(sum, zip(*counted, strict=True)))
    assert load_figures()["cost"]["resnet50_ubn"]["224"][0] == pytest.approx(4.189, abs=1e-3)


def test_inherited_rows_name_their_source(board: Board) -> None:
    (row,) = [row for row in board.tables["imagenet"] if (row.model, row.img_size) == ("resnet50_ubn.bn_a1_in1k", 288)]
    assert (row.measured, row.table, row.date) == (INHERITED, "results-imagenet.csv", load_figures()["date"])
    assert (row.sibling, row.top1_diff, row.norm, row.origin) == ("resnet50.a1_in1k", 0, "ubn", "converted")
    assert (row.top1, row.images, row.family, row.license) == (81.24, 50_000, "resnet", "apache-2.0")
    tables = {name: rows for name, rows in board.tables.items() if rows[0].measured == INHERITED}
    assert list(tables) == [test_set.name for test_set in TEST_SETS] and min(map(len, tables.values())) >= 323
    for rows in tables.values():
        assert [row.top1 for row in rows] == sorted((row.top1 for row in rows), reverse=True)
        assert all(row.rank == 1 + sum(other.top1 > row.top1 for other in rows) for row in rows[::97])


def test_bundled_models_have_seed_and_twin(board: Board) -> None:
    rows = {row.model: row for row in board.tables["cifar-10-jpeg"]}
    for record in load_manifest().find(source="bundled"):
        values = {metric.name: metric.value for metric in record.metrics}
        row = rows[record.id]
        assert (row.origin, row.seeds, row.weights_sha256) == ("native", "0", record.sha256)
        assert row.top1_diff == pytest.approx(values["top1"] - values["top1_batchnorm_twin"])


def test_runs_are_combined_over_seeds_and_paired_with_their_sibling(tmp_path: Path) -> None:
    reached = {"bn": (40, 44, 45), "ubn": (50, 47, 56)}
    rows = [
        result("resnet18" if norm == "bn" else "resnet18_ubn", right, norm=norm, source=f"runs/a/{norm}_seed{seed}")
        for norm, values in reached.items()
        for seed, right in enumerate(values)
    ]
    lone = result("resnet18_ubn", 60, source="runs/b/ubn_seed0")
    failed = dataclasses.replace(lone, source="runs/c", top1=None, error="out of memory")
    best, ubn, bn = board_of(tmp_path, *rows, lone, failed).tables["mine"]
    assert (ubn.run, ubn.seeds, ubn.rank, ubn.sibling) == ("runs/a/ubn_seed*", "0 1 2", 2, "runs/a/bn_seed*")
    assert ubn.top1 == statistics.fmean(reached["ubn"]) and bn.top1_diff is None
    assert ubn.top1_std == pytest.approx(statistics.stdev(reached["ubn"]), abs=1e-4) and ubn.top1_low is None
    assert ubn.top1_diff == pytest.approx(statistics.fmean((10, 3, 11)), abs=1e-3)
    assert (best.run, best.sibling, best.top1_diff, best.origin, bn.origin) == (
        "runs/b/ubn_seed*",
        None,
        None,
        "native",
        "batchnorm",
    )


def test_measured_rows_replace_inherited_rows(tmp_path: Path) -> None:
    name = "resnet18_ubn.bn_a1_in1k"
    mine = result(name, 36_600, 50_000, test_set="imagenet")
    sibling = result("resnet18.a1_in1k", 36_550, 50_000, test_set="imagenet", norm="bn")
    part = result("resnet34_ubn.bn_a1_in1k", 90, test_set="imagenet")
    fused = dataclasses.replace(mine, fuse=True)
    rows = board_of(tmp_path, mine, sibling, part, fused).tables["imagenet"]
    found = {row.settings: row for row in rows if (row.model, row.img_size) == (name, 288)}
    assert set(found) == {None, "fuse"} and found[None].measured == "cpu" and found[None].top1 == 73.2
    assert (found[None].sibling, found[None].top1_diff) == ("resnet18.a1_in1k", 0.1)
    whole, small = sorted(
        (row for row in rows if row.model == part.model and row.img_size == 288), key=lambda row: row.top1
    )
    assert (small.images, small.rank) == (100, None) and whole.measured == INHERITED and whole.rank is not None


def test_equal_accuracies_share_a_rank(tmp_path: Path) -> None:
    rows = [result("resnet18", right, source=f"runs/{place}/x") for place, right in enumerate((50, 60, 60, 70))]
    assert [row.rank for row in board_of(tmp_path, *rows).tables["mine"]] == [1, 2, 2, 4]


def test_speed_tables_join_rows_of_their_size(tmp_path: Path) -> None:
    common: dict[str, Any] = {"turns": 3, "milliseconds": 1.0, "ratio": 1.0, "ratio_lower": 1.0, "ratio_upper": 1.0}
    setup: dict[str, Any] = {"batch_size": 8, "img_size": 288, "device": "cpu", "threads": 2, "amp": None}
    setup |= {"channels_last": True, "torch": "2.14"}
    rows = [
        Speed(mode=mode, model=model, images_per_second=speed, peak_memory=77.0, **common, **setup)
        for mode, model, speed in [
            ("training", "resnet18", 10.0), ("training", "resnet18_ubn", 8.0),
            ("inference", "resnet18", 40.0), ("inference", "resnet18_ubn", 30.0),
            ("fused inference", "resnet18_ubn", 99.0),
        ]
    ]  # fmt: skip
    write_speed(tmp_path / "speed.csv", rows)
    board = build_board([tmp_path / "speed.csv", REPOSITORY / "results" / "benchmark_cpu.csv"])
    found = {(row.model, row.img_size): row for row in board.tables["imagenet"]}
    row = found["resnet18_ubn.bn_a1_in1k", 288]
    assert (row.train_samples_per_sec, row.train_samples_per_sec_bn) == (8, 10)
    assert (row.infer_samples_per_sec, row.infer_samples_per_sec_bn, row.peak_memory) == (30, 40, 77)
    assert row.speed_setup == "cpu, 2 threads, batch 8, float32, torch 2.14"
    assert found["resnet18_ubn.bn_a1_in1k", 224].infer_samples_per_sec is None
    row = found["resnet50_ubn.bn_a1_in1k", 224]
    assert (row.infer_samples_per_sec, row.infer_samples_per_sec_bn, row.train_samples_per_sec) == (42.61, 51.28, 10.76)


def test_other_files_are_rejected_with_the_valid_ones(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"x\.csv: received the columns a, b; valid: a results file"):
        build_board([tmp_path / "x.csv"])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Board:
    folder = tmp_path_factory.mktemp("hostile")
    rows = [result(text, 50 + place, source=f"{text}/", settings=text) for place, text in enumerate(HOSTILE)]
    full = board_of(folder, *rows, *(dataclasses.replace(row, test_set=HOSTILE[0]) for row in rows))
    return Board({name: full.tables[name] for name in ("mine", HOSTILE[0])}, full.titles)


def test_csv_begins_with_timms_columns_and_has_no_formulas(hostile: Board, board: Board) -> None:
    lines = list(csv.reader(io.StringIO(board_csv(hostile.tables["mine"]))))
    timms = ["model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation"]
    assert lines[0][: len(timms)] == timms and len(lines) == 1 + len(HOSTILE)
    cells = [cell for line in lines for cell in line]
    assert not [cell for cell in cells if cell[:1] in tuple("=+@-\t\r")]
    assert "'=cmd()|' /C calc'!A0" in cells and r"\u202egnp.exe" in cells and HOSTILE[0] in cells
    read = list(csv.DictReader(io.StringIO(board_csv(board.tables["imagenet"]))))
    assert [line["model"] for line in read] == [row.model for row in board.tables["imagenet"]]


def test_markdown_keeps_names_as_text(hostile: Board) -> None:
    markdown = pytest.importorskip("markdown", reason="the documentation's packages are not installed")
    html = markdown.markdown(board_markdown(hostile, links=True), extensions=["tables", "pymdownx.superfences"])
    assert "<img" not in html and 'href="http' not in html and "\u202e" not in html
    assert html.count("<tr>") == 2 * (1 + len(HOSTILE)) and html.count("<td") == 2 * 10 * len(HOSTILE)
    assert "&lt;img src=x onerror" in html


def test_tables_replace_only_tables(hostile: Board, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n\nText.\n", encoding="utf-8")
    write_tables(hostile, page)
    once = page.read_text(encoding="utf-8")
    write_tables(hostile, page)
    assert page.read_text(encoding="utf-8") == once and once.startswith("# Mine\n\nText.\n") and "| 1 |" in once


def test_model_index_reads_back(board: Board) -> None:
    entries = json.loads(board_model_index(board))
    (entry,) = entries["resnet50_ubn.bn_a1_in1k"]
    name, results = model_index_to_eval_results([entry])
    assert name == "resnet50_ubn.bn_a1_in1k" and len(results) == 2 * 2 * len(TEST_SETS)
    (top1,) = [
        each for each in results
        if each.dataset_type == "imagenet-1k" and each.metric_type == "accuracy" and each.metric_args["img_size"] == 288
    ]  # fmt: skip
    assert top1.metric_value == 81.24 and top1.source_name.startswith(INHERITED)
    assert "regnetx_002_ubn.cifar10" in entries


def test_committed_files_are_up_to_date(tmp_path: Path) -> None:
    tables = REPOSITORY / "results"
    page = tmp_path / "leaderboard.md"
    committed = REPOSITORY / "docs" / "leaderboard.md"
    page.write_bytes(committed.read_bytes())
    write_tables(build_board([*sorted(tables.glob("leaderboard/*.csv")), tables / "benchmark_cpu.csv"]), page)
    assert page.read_text("utf-8") == committed.read_text("utf-8"), "run the command of docs/leaderboard.md"


def test_committed_rows_match_the_experiments() -> None:
    evaluations = pytest.importorskip("research.experiments.board").evaluations
    committed = read_results(REPOSITORY / "results" / "leaderboard" / "experiments.csv")
    ignored = {"date": "", "timm": "", "ubn_zoo": ""}
    made = [dataclasses.replace(row, **ignored) for row in evaluations(REPOSITORY / "results")]
    assert made == [dataclasses.replace(row, **ignored) for row in committed], (
        "run python -m research.experiments.board"
    )


def test_a_correct_row_is_accepted() -> None:
    assert not list(refusals(result()))
    record = load_manifest().find(source="bundled")[0]
    named = result(record.id, weights_sha256=record.sha256, param_count=round(record.params / 1e6, 2), classes=10)
    assert not list(refusals(named))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top1": None}, "top1: received nothing"),
        ({"error": "no memory", "top1": None}, "it has no result: no memory"),
        ({"top1": float("nan")}, "top1: received nan; valid: a finite number"),
        ({"top1": 140.0}, "top1: received 140; valid: 0 to 100"),
        ({"top5": 30.0, "top5_err": 70.0}, "top5: received 30; valid: at least top1, 40"),
        ({"top1_err": 59.0}, "top1_err: received 59.0; valid: 100 - top1"),
        ({"images": 99}, "39.60 of 99 images; valid: a whole number of images"),
        ({"top1_low": 39.9, "top1_high": 40.1}, "top1_low, top1_high: received 39.9, 40.1; valid: 30.94"),
        ({"test_set": "imagenet"}, "images: received 100; valid: 50000, all of imagenet"),
        ({"interpolation": "magic"}, "interpolation: received 'magic'; valid: bicubic"),
        ({"img_size": 0}, "img_size: received 0; valid: 1 to 16384"),
        ({"date": "2999-01-01"}, "date: received 2999-01-01; valid: not in the future"),
        ({"date": "soon"}, "date: received 'soon'; valid: YYYY-MM-DD"),
        ({"command": "a\u202eb"}, "command: received control characters"),
        ({"weights_sha256": "12"}, "weights_sha256: received '12'; valid: 64"),
        ({"param_count": 11.0}, "param_count: received 11; valid: 11.74"),
        ({"model": "made_up", "source": "made_up"}, "model: there is no model 'made_up' in the zoo"),
        ({"model": "resnet18_ubn.x", "source": "resnet18_ubn.x"}, "resnet18_ubn has no weights with the tag 'x'"),
        ({"model": "resnet18.x", "source": "resnet18.x"}, "model: Invalid pretrained tag (x) for resnet18"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_rejected_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    found = list(refusals(dataclasses.replace(result(), **changes)))
    assert any(reason in each for each in found), found


def test_known_facts_about_weights_are_compared(tmp_path: Path) -> None:
    record = load_manifest().find(source="bundled")[0]
    named = result(record.id, weights_sha256="0" * 64, param_count=round(record.params / 1e6, 2))
    assert [f"valid: {record.sha256}, of the manifest" in reason for reason in refusals(named)] == [True]
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert "weights_sha256: received nothing" in next(refusals(result("resnet18_ubn", source=str(tmp_path))))
    better = result(right=45_000, images=50_000, test_set="imagenet")
    assert "timm measured 73.164 for the same function" in next(refusals(better))


def test_the_command_checks_and_reproduces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = load_manifest().get("resnet10t_ubn.cifar10")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for place, name in enumerate(names):
        folder = tmp_path / "data" / "test" / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (place * 25, number * 80, 99)).save(folder / f"{number}.png")
    # Uniform images of all classes: at most a few of 30 are classified correctly.
    weights = {"weights_sha256": record.sha256, "param_count": 4.96, "classes": 10, "img_size": 32, "split": "test"}
    good = result(record.id, 3, 30, **weights)
    bad = dataclasses.replace(result(record.id, 30, 30, **weights), settings="img_size=33")
    command = ["leaderboard", "check", str(tmp_path / "rows.csv")]
    write_results(tmp_path / "rows.csv", [good, bad])
    assert main(command) == 0
    assert capsys.readouterr().out == "2 of 2 rows accepted\n"
    assert main([*command, "--reproduce", "30", "--data-dir", str(tmp_path / "data"), "--workers", "0"]) == 1
    shown = capsys.readouterr().out
    assert "rejected: row 2 (resnet10t_ubn.cifar10): top1: received 100; 30 images evaluated again have" in shown
    assert shown.endswith("1 of 2 rows accepted\n")
    write_results(tmp_path / "rows.csv", [good, good])
    assert check_results(tmp_path / "rows.csv")[1][0].startswith(
        "row 2 (resnet10t_ubn.cifar10): the file has an earlier"
    )
    with pytest.raises(SystemExit):
        main([*command, "--reproduce", "30"])


def test_the_command_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "rows.json", [result()])
    assert (
        main(["leaderboard", "build", "--results", str(tmp_path / "rows.json"), "--output", str(tmp_path / "x")]) == 0
    )
    assert "mine: 1 rows, 1 of them measured" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "x").iterdir()}
    assert files == {"index.html", "README.md", "model-index.json", "mine.csv", "cifar-10-jpeg.csv"} | {
        f"{test_set.name}.csv" for test_set in TEST_SETS
    }
    assert Row.__dataclass_fields__.keys() == set(
        (tmp_path / "x" / "mine.csv").read_text("utf-8").split("\n")[0].split(",")
    )


@pytest.mark.exhaustive  # ten minutes: `pytest -m exhaustive -k every_cost tests/evaluation/test_leaderboard.py`
def test_every_cost_matches_its_twin() -> None:
    for architecture, sizes in load_figures()["cost"].items():
        for size, (gmacs, macts, *_) in sizes.items():
            assert count_operations(architecture, int(size)) == pytest.approx((gmacs, macts), abs=6e-3)
