"""Results files of `ubn-zoo validate`: one row per model and test set, as CSV or JSON.

The first columns are those of timm's results files, so that both can be read as one table.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ubn_zoo.errors import EvaluationError
from ubn_zoo.utils.files import locked, write_file

__all__ = [
    "COLUMNS",
    "TIMM_COLUMNS",
    "ResultRow",
    "add_result",
    "csv_text",
    "read_results",
    "sort_results",
    "write_results",
]

# A spreadsheet runs cells that start with one of these as a formula; an apostrophe before them makes them text.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One evaluation of one model; a row of a results file.

    A row is either complete, or has an `error` and None for unknown values.

    Attributes:
        model: timm's name with its tag; of a run or checkpoint, the architecture.
        img_size: Image side in pixels.
        top1: Accuracy in percent; all percentages are rounded to 4 places.
        top1_err: 100 - `top1`.
        top5: Percentage of images with the correct class among the five most probable; None for fewer than six classes.
        top5_err: 100 - `top5`.
        param_count: Parameters in millions, rounded to 2 places.
        crop_pct: Side of the center crop relative to the resized image.
        interpolation: Resize filter.
        crop_mode: timm's crop mode: ``center``, ``squash`` or ``border``.
        norm: ``ubn``, ``rbn``, ``bnet`` or ``bn``; None for a model with none or several of these norms.
        test_set: Name of the test set, such as ``imagenet-real``; by default the name of the data's folder.
        split: Evaluated split of the data.
        images: Images counted.
        classes: Number of model outputs that predictions could use: all, or those with classes in the test set.
        loss: Mean cross-entropy in nats, rounded to 6 places.
        calibration_error: Expected calibration error in percent, 15 equal bins of confidence.
        top1_low: Lower bound of the 95 % Wilson interval of `top1`, in percent.
        top1_high: Upper bound of that interval.
        top5_low: Lower bound of the 95 % Wilson interval of `top5`, in percent; None as `top5`.
        top5_high: Upper bound of that interval.
        source: Model as the user named it: a name, the folder of a run, or a checkpoint's file.
        ema: Whether the weights are a run's moving average.
        weights_sha256: SHA-256 of the weights file; None if the file is not known.
        data_sha256: Fingerprint of the set of images.
        settings: Differences from the model's own preprocessing, such as ``img_size=288 test_pool=True``; empty for
            nothing.
        amp: Autocast's dtype; None for the model's own precision.
        fuse: Whether norms were folded into convolutions.
        compile: Whether the model was compiled.
        batch_size: Images per batch and process, after any halving for lack of memory.
        ranks: Processes that shared the images.
        torch: torch's version.
        timm: timm's version.
        ubn_zoo: This package's version.
        hardware: ``cpu``, or the accelerator's name.
        threads: torch's CPU threads per process.
        command: Command line; None for a call from Python.
        date: Day, ``YYYY-MM-DD``, in UTC.
        commit: This project's commit, followed by ``+`` if files had changed; None outside version control.
        error: Why there is no result; None for a complete row.
    """

    model: str
    img_size: int | None = None
    top1: float | None = None
    top1_err: float | None = None
    top5: float | None = None
    top5_err: float | None = None
    param_count: float | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    norm: str | None = None
    test_set: str
    split: str | None = None
    images: int | None = None
    classes: int | None = None
    loss: float | None = None
    calibration_error: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    top5_low: float | None = None
    top5_high: float | None = None
    source: str
    ema: bool = False
    weights_sha256: str | None = None
    data_sha256: str | None = None
    settings: str | None = None
    amp: str | None = None
    fuse: bool = False
    compile: bool = False
    batch_size: int | None = None
    ranks: int = 1
    torch: str
    timm: str
    ubn_zoo: str
    hardware: str
    threads: int | None = None
    command: str | None = None
    date: str
    commit: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Model, test set and settings; a results file has one row for each."""
        return (self.source, self.ema, self.test_set, self.split, self.settings, self.amp, self.fuse, self.compile)


_FIELDS = {field.name: str(field.type).partition(" | ") for field in dataclasses.fields(ResultRow)}
COLUMNS: tuple[str, ...] = tuple(_FIELDS)
TIMM_COLUMNS = COLUMNS[: COLUMNS.index("interpolation") + 1]
_TYPES: Mapping[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}


def write_results(path: str | os.PathLike[str], rows: Iterable[ResultRow]) -> None:
    """Write a results file atomically; numbers and text round-trip exactly.

    In CSV files, text that a spreadsheet would run as a formula starts with an apostrophe, and None is an empty cell.

    Args:
        path: The file, ``.csv`` or ``.json``; replaced if it exists.
        rows: Rows of the file.

    Raises:
        EvaluationError: The file has an unsupported extension.
        OSError: The file cannot be written.
    """
    tables = [dataclasses.asdict(row) for row in rows]
    if _is_json(path):
        write_file(path, json.dumps(tables, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return
    write_file(path, csv_text(COLUMNS, map(dict.values, tables)))


def csv_text(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Format a CSV table. None is an empty cell; an apostrophe precedes text that spreadsheets would run as a formula.

    Args:
        columns: Header.
        rows: Values of each line.
    """
    return "".join(_line([_cell(value) for value in line]) for line in (columns, *rows))


def read_results(path: str | os.PathLike[str]) -> tuple[ResultRow, ...]:
    """Read a results file, ``.csv`` or ``.json``.

    Args:
        path: The file.

    Raises:
        EvaluationError: The file has other columns, or a value has the wrong type; the message names the row, the
            column and the value.
        OSError: The file cannot be read.
    """
    from_csv = not _is_json(path)
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
        tables = _csv_tables(content) if from_csv else json.loads(content)
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise EvaluationError(f"{os.fspath(path)}: not a results file: {error}") from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise EvaluationError(f"{os.fspath(path)}: not a results file; valid: a list of rows")
    rows = []
    for number, table in enumerate(tables, 1):
        where = f"{os.fspath(path)}, row {number}"
        if set(table) != set(COLUMNS):
            raise EvaluationError(f"{where}: {_wrong_columns(table)}")
        rows.append(
            ResultRow(**{name: _value(name, table[name], f"{where}, column {name}", from_csv) for name in COLUMNS})
        )
    return tuple(rows)


def add_result(path: str | os.PathLike[str], row: ResultRow, *, sort: str | None = None) -> None:
    """Add a row to a results file, or create the file; a row with the same `ResultRow.key` is replaced.

    Several processes may add rows to the same file at the same time.

    Args:
        path: The file, ``.csv`` or ``.json``.
        row: The row.
        sort: Column to sort the file by, as `sort_results` does; None for the order in which rows were added.

    Raises:
        EvaluationError: The file has other columns.
        OSError: The file cannot be read or written.
    """
    file = Path(path)
    _is_json(file)
    file.touch()
    with locked(file):
        rows = list(read_results(file)) if file.stat().st_size else []
        places = [place for place, old in enumerate(rows) if old.key == row.key]
        if places:
            rows[places[0]] = row
        else:
            rows.append(row)
        write_results(file, rows if sort is None else sort_results(rows, sort))


def sort_results(rows: Iterable[ResultRow], column: str = "top1") -> list[ResultRow]:
    """Sort rows: accuracies in descending order, other columns in ascending order, and rows without a value last.

    Args:
        rows: The rows.
        column: Name of a column.

    Raises:
        EvaluationError: The column does not exist.
    """
    if column not in COLUMNS:
        raise EvaluationError(f"`sort`: received {column!r}; valid: {', '.join(COLUMNS)}")
    sign = -1 if column.startswith("top") and not column.endswith("_err") else 1

    def place(row: ResultRow) -> tuple[bool, Any]:
        value = getattr(row, column)
        return value is None, 0 if value is None else sign * value if isinstance(value, (int, float)) else value

    return sorted(rows, key=place)


def _is_json(path: str | os.PathLike[str]) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".json"):
        raise EvaluationError(f"`results`: received {os.fspath(path)!r}; valid: *.csv, *.json")
    return suffix == ".json"


def _csv_tables(content: str) -> list[dict[str, str]]:
    lines = csv.reader(io.StringIO(content, newline=""), strict=True)
    header = next(lines, [])
    if tuple(header) != COLUMNS:
        raise ValueError(_wrong_columns(header))
    tables = []
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"line {lines.line_num}: received {len(line)} values; valid: {len(header)}")
        tables.append(dict(zip(header, line, strict=True)))
    return tables


def _wrong_columns(received: Iterable[str]) -> str:
    return f"received the columns {', '.join(received)}; valid: {', '.join(COLUMNS)}; use another file"


def _line(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    # With this line terminator, every version of Python quotes carriage returns within cells.
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def _value(name: str, value: Any, where: str, from_csv: bool) -> Any:
    base, optional, _ = _FIELDS[name]
    kind = _TYPES[base]
    if optional and value == ("" if from_csv else None):
        return None
    if from_csv:
        text = value[1:] if value.startswith("'") and _FORMULA.match(value) else value
        with contextlib.suppress(KeyError, ValueError):
            return {"True": True, "False": False}[text] if kind is bool else kind(text)
    elif type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise EvaluationError(f"{where}: received {value!r}; valid: {base}{' or empty' if optional else ''}")
