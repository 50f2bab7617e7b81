"""Render the leaderboard as CSV, Markdown, `model-index` entries and a self-contained web page."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

import ubn_zoo
from ubn_zoo.evaluation.leaderboard.board import INHERITED, Board, Row
from ubn_zoo.evaluation.leaderboard.figures import load_figures
from ubn_zoo.evaluation.results import csv_text
from ubn_zoo.utils.files import write_file
from ubn_zoo.utils.sanitize import code, escape

__all__ = [
    "TABLES",
    "board_csv",
    "board_files",
    "board_html",
    "board_markdown",
    "board_model_index",
    "visible_text",
    "write_board",
    "write_tables",
]

TABLES = "<!-- Written by `ubn-zoo leaderboard build --markdown`; see docs/leaderboard.md. -->"
_PAGE = Path(__file__).with_name("page")
_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
# Columns that differ between rows of one model, and the origin of their figures; the page stores the rest once.
_RESULT = ("top1", "top5", "top1_low", "top1_high", "images", "rank", "sibling", "top1_diff", "top1_std")
_SOURCE = ("measured", "table", "date", "command", "seeds")
_SHOWN = 15

_INTRODUCTION = """\
{count} results of {models} models on {sets} test sets. Models with a tag `bn_...` have the weights of their BatchNorm \
sibling, converted exactly: they compute the same function, so the accuracies that timm measured ({date}) are \
inherited. All other rows were measured on the weights that they name. GMACs include the depthwise convolutions of \
UBN layers. Intervals are 95 % Wilson intervals, or ± the standard deviation over several seeds. "Δ BN" is top-1 minus \
that of the BatchNorm sibling trained in the same way.
"""


def board_files(board: Board) -> dict[str, str]:
    """Render the leaderboard's files; returns content by name.

    ``index.html``, a CSV file for each test set, ``README.md`` (of a static Space on the Hub, which shows the page),
    and ``model-index.json``.

    Args:
        board: The leaderboard.
    """
    space = "---\ntitle: UBN-Zoo leaderboard\nsdk: static\napp_file: index.html\nlicense: apache-2.0\n---\n\n"
    return {
        "index.html": board_html(board),
        "README.md": f"{space}# UBN-Zoo leaderboard\n\n{board_markdown(board, links=True)}",
        "model-index.json": board_model_index(board),
        **{_file(name): board_csv(rows) for name, rows in board.tables.items()},
    }


def write_board(board: Board, folder: Path) -> list[Path]:
    """Write `board_files` into a folder, which is created if it does not exist.

    Args:
        board: The leaderboard.
        folder: The folder.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = board_files(board)
    for name, content in files.items():
        write_file(folder / name, content)
    return [folder / name for name in files]


def write_tables(board: Board, page: Path) -> None:
    """Replace the tables in a Markdown page: everything after the comment `TABLES`, which is added if it is missing.

    Args:
        board: The leaderboard.
        page: The page.
    """
    before = page.read_text(encoding="utf-8").partition(TABLES)[0] if page.exists() else "# Leaderboard\n\n"
    write_file(page, f"{before}{TABLES}\n\n{board_markdown(board)}")


def _file(test_set: str) -> str:
    return re.sub(r"[^\w.-]+", "-", test_set).strip(".-") + ".csv"


def board_csv(rows: Iterable[Row]) -> str:
    """One test set as CSV: timm's columns, then the others of `Row`; no cell is run as a formula."""
    return csv_text(_COLUMNS, (map(_shown, dataclasses.astuple(row)) for row in rows))


def visible_text(text: str) -> str:
    """Escape control characters, such as those that change the text direction."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _shown(value: Any) -> Any:
    return visible_text(value) if isinstance(value, str) else value


def board_markdown(board: Board, *, links: bool = False, shown: int = _SHOWN) -> str:
    """Render tables for the docs and the Hub: the best rows of every test set, and all rows that are not inherited.

    Args:
        board: The leaderboard.
        links: Whether to link to the CSV files, which must be in the same folder.
        shown: Number of best rows.
    """
    rows = [row for table in board.tables.values() for row in table]
    text = _INTRODUCTION.format(
        count=f"{len(rows):,}",
        models=len({(row.model, row.run) for row in rows}),
        sets=len(board.tables),
        date=load_figures()["date"],
    )
    parts = [text]
    for name, table in board.tables.items():
        listed = [row for place, row in enumerate(table) if place < shown or row.measured != INHERITED]
        parts += [
            f"## {escape(board.titles[name])}\n",
            f"{len(listed)} of {len(table)} rows" + (f"; all: [{_file(name)}]({_file(name)})\n" if links else ".\n"),
            "| # | Model | Top-1 (%) | Interval | Top-5 (%) | Δ BN | Params (M) | GMACs | Pixels | Measured |",
            "|--:|---|--:|---|--:|--:|--:|--:|--:|---|",
            *map(_line, listed),
            "",
        ]
    return "\n".join(parts)


def _line(row: Row) -> str:
    run = f" ({escape(visible_text(row.run))})" if row.run else ""
    settings = f", {escape(visible_text(row.settings))}" if row.settings else ""
    if row.top1_std is not None:
        interval = f"± {row.top1_std:.2f}, seeds {escape(row.seeds or '')}"
    else:
        interval = "" if row.top1_low is None else f"{row.top1_low:.2f} to {row.top1_high:.2f}"
    same = row.origin == "converted" and row.top1_diff == 0
    cells = [
        "" if row.rank is None else str(row.rank),
        f"{code(visible_text(row.model), cell=True)}{run}{settings}",
        f"{row.top1:.2f}",
        interval,
        "" if row.top5 is None else f"{row.top5:.2f}",
        "=" if same else "" if row.top1_diff is None else f"{row.top1_diff:+.2f}",
        *("" if value is None else f"{value:.3g}" for value in (row.param_count, row.gmacs)),
        str(row.img_size or ""),
        escape(visible_text(", ".join(filter(None, (row.measured, row.date, row.table))))),
    ]
    return f"| {' | '.join(cells)} |"


def board_model_index(board: Board) -> str:
    """Render the `model-index` metadata for the model card of every named model, as JSON."""
    found: dict[str, list[EvalResult]] = {}
    for name, rows in board.tables.items():
        for row in rows:
            for metric, title, value in (("accuracy", "Top-1", row.top1), ("top5", "Top-5", row.top5)):
                if row.run is None and value is not None:
                    found.setdefault(row.model, []).append(_eval_result(board, name, row, metric, title, value))
    entries = {model: eval_results_to_model_index(model, results) for model, results in sorted(found.items())}
    lines = ",\n".join(f"{json.dumps(model)}: {json.dumps(entry)}" for model, entry in entries.items())
    return f"{{\n{lines}\n}}\n"


def _eval_result(board: Board, name: str, row: Row, metric: str, title: str, value: float) -> EvalResult:
    inherited = row.measured == INHERITED
    arguments = {"img_size": row.img_size, "images": row.images, "seeds": row.seeds, "settings": row.settings}
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type="imagenet-1k" if name == "imagenet" else name,
        dataset_name=board.titles[name],
        metric_type=metric,
        metric_name=f"{title} accuracy (%), {row.img_size} pixels",
        metric_value=value,
        metric_args={key: value for key, value in arguments.items() if value is not None},
        source_name=f"{row.measured}, {row.table}, {row.date}" if inherited else None,
        source_url=load_figures()["source"] if inherited else None,
    )


def board_html(board: Board) -> str:
    """Render the web page: one file that loads no other files and works offline."""
    scripts = {
        "d3": _asset("vendor/d3.min.js"),
        "plot": _asset("vendor/plot.umd.min.js"),
        "js": _asset("page.js"),
    }
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values())
    data = json.dumps(_data(board), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    parts = {
        "hashes": " ".join(f"'sha256-{digest}'" for digest in digests),
        "css": _asset("page.css"),
        "data": data,
        "licenses": "\n\n".join(_asset(f"vendor/{name}.LICENSE") for name in ("plot", "d3")),
        **scripts,
    }
    first, *rest = _asset("page.html").split("{{")
    return first + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))


def _asset(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8").strip()


def _data(board: Board) -> dict[str, Any]:
    models: dict[str, int] = {}
    sources: dict[str, int] = {}

    def place(known: dict[str, int], entry: dict[str, Any]) -> int:
        return known.setdefault(json.dumps(entry), len(known))

    def lines(rows: Iterable[Row]) -> Iterator[list[Any]]:
        for row in rows:
            values = {name: _shown(value) for name, value in dataclasses.asdict(row).items()}
            source = {name: values.pop(name) for name in _SOURCE}
            result = [values.pop(name) for name in _RESULT]
            for name in ("top1_err", "top5_err"):
                values.pop(name)
            values = {"name": values.pop("model"), "params": values.pop("param_count"), **values}
            known = {name: value for name, value in values.items() if value is not None}
            yield [place(models, known), *result, place(sources, source)]

    sets = [
        {
            "name": _shown(name),
            "title": _shown(board.titles[name]),
            "images": max((row.images for row in rows if row.images), default=None),
            "columns": ["", *_RESULT, "source"],
            "rows": list(lines(rows)),
        }
        for name, rows in board.tables.items()
    ]
    figures = load_figures()
    return {
        "sets": sets,
        "models": [json.loads(model) for model in models],
        "sources": [json.loads(source) for source in sources],
        "speed": {card: about["title"] for card, about in figures["speed"].items()},
        "source": figures["source"],
        "date": figures["date"],
        "version": ubn_zoo.__version__,
    }
