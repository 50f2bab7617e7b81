"""Results files round-trip, and other files raise clear errors."""

from __future__ import annotations

import csv
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.results import (
    COLUMNS,
    TIMM_COLUMNS,
    ResultRow,
    add_result,
    read_results,
    sort_results,
    write_results,
)


def row(**changes: Any) -> ResultRow:
    fixed = {"torch": "2.14.1", "timm": "1.0.31", "ubn_zoo": "0.1.0", "hardware": "cpu", "date": "2026-11-25"}
    return ResultRow(**{"model": "resnet50", "source": "resnet50", "test_set": "photos", **fixed, **changes})


COMPLETE = row(
    model="resnet50_ubn.bn_a1_in1k",
    img_size=288,
    top1=80.1234,
    top1_err=19.8766,
    param_count=25.85,
    loss=0.1 + 0.2,
    fuse=True,
    settings="img_size=288",
    command='ubn-zoo validate --model "a, b"\nnext',
)
STRANGE = (
    "=1+2",
    "+x",
    "-x",
    "@sum",
    "\tx",
    "'=x",
    "''=x",
    "'quoted'",
    "<img onerror=x>",
    "a,b\n\"c'",
    "\u202eabc",
    "\r",
)


def test_first_columns_are_those_of_timms_results() -> None:
    timms = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"
    assert ",".join(TIMM_COLUMNS) == ",".join(COLUMNS[: len(TIMM_COLUMNS)]) == timms


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_rows_read_back_as_they_were_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"results{ending}"
    written = [COMPLETE, *(row(source=text, error=text) for text in STRANGE)]
    write_results(path, written)
    assert read_results(path) == tuple(written)


def test_no_cell_of_a_csv_file_is_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write_results(path, [row(source=text) for text in STRANGE])
    with path.open(encoding="utf-8", newline="") as file:
        cells = [table["source"] for table in csv.DictReader(file)]
    assert [cell for cell in cells if cell[0] in "=+-@\t\r"] == []
    assert cells[8] == STRANGE[8]


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_a_row_with_the_same_key_is_replaced(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"results{ending}"
    rows = [row(top1=10.0), row(top1=20.0, source="runs/a"), row(top1=15.0), row(error="no", ema=True)]
    for one in rows:
        add_result(path, one)
    assert read_results(path) == (rows[2], rows[1], rows[3])
    add_result(path, row(test_set="other"), sort="top1")
    assert [found.top1 for found in read_results(path)] == [20.0, 15.0, None, None]


def test_several_processes_may_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add_result(path, row(source=str(number))), range(12)))
    assert sorted(int(found.source) for found in read_results(path)) == list(range(12))


def test_accuracies_are_sorted_descending_and_other_columns_ascending() -> None:
    rows = [row(top1=1.0, top1_err=99.0, model="b"), row(model="c"), row(top1=3.0, top1_err=97.0, model="a")]
    for column, models in (("top1", "abc"), ("top1_err", "abc"), ("model", "abc"), ("top5", "bca")):
        assert "".join(found.model for found in sort_results(rows, column)) == models
    with pytest.raises(EvaluationError, match="`sort`: received 'speed'; valid: model, img_size"):
        sort_results(rows, "speed")


def test_other_files_are_rejected(tmp_path: Path) -> None:
    path, table = tmp_path / "results.csv", tmp_path / "results.json"
    write_results(path, [COMPLETE])
    text = path.read_text(encoding="utf-8")
    wrong = {
        "a,b\n1,2\n": "received the columns a, b; valid: model, img_size, .*; use another file",
        text.replace("80.1234", "high"): "row 1, column top1: received 'high'; valid: float or empty",
        text.replace("True", "yes"): "row 1, column fuse: received 'yes'; valid: bool",
        text.rstrip("\n") + ",1\n": "received 4. values; valid: ",
    }
    for content, message in wrong.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(EvaluationError, match=message):
            read_results(path)
        with pytest.raises(EvaluationError, match=message):
            add_result(path, COMPLETE)
        assert path.read_text(encoding="utf-8") == content
    good = dataclasses.asdict(COMPLETE)
    for value, message in (
        ([{**good, "top1": "80"}], "column top1: received '80'"),
        ([{"model": "x"}], "received the columns model;"),
        ({}, "valid: a list of rows"),
        ([{**good, "ranks": True}], "column ranks: received True; valid: int"),
    ):
        table.write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(EvaluationError, match=message):
            read_results(table)
    with pytest.raises(EvaluationError, match=r"`results`: received '.*\.txt'; valid: \*\.csv, \*\.json"):
        add_result(tmp_path / "results.txt", COMPLETE)
    with pytest.raises(FileNotFoundError):
        add_result(tmp_path / "nowhere" / "results.csv", COMPLETE)
