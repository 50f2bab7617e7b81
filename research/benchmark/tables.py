"""CSV tables of measurements: steps in the layout of timm's benchmark tables, growth and profiles.

The columns :data:`ABOUT` of every row give the date, the command and the environment of the measurement.
"""

from __future__ import annotations

import csv
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .growth import GrowthPoint
from .profiles import Share
from .turns import Timing

__all__ = ["ABOUT", "read_growth", "read_profile", "read_timings", "rows_of", "table", "write_table"]

ABOUT = ("date", "command", "environment")

_TRAINING = ("train", "layer")
# timm's names for the fields of a Timing, then additional columns.
_STEP = {"step_time": "median", "batch_size": "batch_size", "img_size": "img_size"}
_ADDED = {
    "step_lower": "lower",
    "step_upper": "upper",
    "step_min": "minimum",
    "step_max": "maximum",
    "ratio": "ratio",
    "ratio_lower": "ratio_lower",
    "ratio_upper": "ratio_upper",
    "memory": "memory",
    "memory_ratio": "memory_ratio",
    "floor": "floor",
    "floor_ratio": "floor_ratio",
    "convolution": "convolution",
    "limit": "limit",
}
_COLUMNS = ("samples_per_sec", *_STEP, *_ADDED)
_Row = TypeVar("_Row", GrowthPoint, Share)


def table(timings: Sequence[Timing], **about: object) -> list[dict[str, object]]:
    """Rows in the layout of timm's benchmark tables: one per model, columns of inference and of training.

    These fields of :class:`Timing` are added to timm's columns, each for ``infer`` and ``train``: ``step_lower`` and
    ``step_upper`` (quartiles), ``step_min``, ``step_max``, ``ratio`` with its quartiles, ``memory`` (MB),
    ``memory_ratio``, ``floor`` and ``convolution`` (milliseconds), ``floor_ratio`` and ``limit``. Fused and compiled
    models and layers have separate rows.

    Args:
        timings: From :func:`compare` or :func:`compare_layers`.
        **about: Further columns, the same in every row.
    """
    rows: dict[tuple[object, ...], dict[str, object]] = {}
    for timing in timings:
        # "fused" and "folded" have entries of the same names.
        fused = timing.mode if timing.mode in ("fused", "folded") else ""
        shared = {
            # timm counts in millions.
            "param_count": round(timing.param_count / 1e6, 2),
            "run": "layer" if timing.mode.startswith("layer") else "model",
            "kind": timing.kind,
            "fused": fused,
            "device": timing.device,
            "dtype": timing.dtype,
            "channels_last": timing.channels_last,
        }
        key = (timing.model, timing.batch_size, timing.img_size, *shared.values())
        row = rows.setdefault(key, {"model": timing.model, **shared})
        prefix = "train" if timing.mode in _TRAINING else "infer"
        row[f"{prefix}_samples_per_sec"] = round(1000 * timing.batch_size / timing.median, 2)
        for column, name in (_STEP | _ADDED).items():
            value = getattr(timing, name)
            row[f"{prefix}_{column}"] = round(value, 3) if isinstance(value, float) else value
    names = [f"{prefix}_{name}" for prefix in ("infer", "train") for name in _COLUMNS]
    order = ["model", *names, "param_count", "run", "kind", "fused", "device", "dtype", "channels_last", *about]
    filled = ({**row, **about} for row in rows.values())
    return [{name: row.get(name) for name in order} for row in filled]


def rows_of(measured: Sequence[GrowthPoint] | Sequence[Share], **about: object) -> list[dict[str, object]]:
    """Rows of growth or of a profile.

    Args:
        measured: From :func:`grow`, :func:`grow_ranks` or :func:`profile_step`.
        **about: Further columns, the same in every row.
    """
    found = [dataclasses.asdict(each) for each in measured]
    return [
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()} | about
        for row in found
    ]


def write_table(rows: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Write the rows of :func:`table` or :func:`rows_of` as CSV.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("rows: received none to write; valid: one at least, time something first")
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def columns(path: str | Path) -> list[str]:
    """Names of a table's columns."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _read(path: str | Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Read the rows, and the columns that describe the measurement."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"date", "command", "environment"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: received no {', '.join(sorted(missing))}; valid: a table of research.benchmark")
    return rows, {name: rows[0][name] for name in ABOUT}


def read_timings(path: str | Path) -> tuple[list[Timing], dict[str, str]]:
    """Read a table of :func:`table`.

    Args:
        path: CSV file.

    Returns:
        The timings, and the columns :data:`ABOUT`.

    Raises:
        ValueError: There are no rows, or columns are missing.
    """
    rows, about = _read(path)
    timings = []
    for row in rows:
        for prefix in ("train", "infer"):
            if not row[f"{prefix}_step_time"]:
                continue
            if row["run"] == "layer":
                mode = "layer" if prefix == "train" else "layer-eval"
            else:
                mode = "train" if prefix == "train" else row["fused"] or "eval"
            values: dict[str, Any] = {
                name: _number(row[f"{prefix}_{column}"])
                for column, name in (_STEP | _ADDED).items()
                if name != "floor_ratio"
            }
            values |= {"batch_size": int(values["batch_size"]), "img_size": int(values["img_size"])}
            timings.append(
                Timing(
                    model=row["model"],
                    kind=row["kind"],
                    mode=mode,
                    device=row["device"],
                    dtype=row["dtype"],
                    channels_last=row["channels_last"] == "True",
                    param_count=round(1e6 * float(row["param_count"])),
                    **values,
                )
            )
    return timings, about


def _number(text: str) -> float | None:
    return float(text) if text else None


def _read_as(kind: type[_Row], path: str | Path) -> tuple[list[_Row], dict[str, str]]:
    rows, about = _read(path)
    wanted = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]

    def value(name: str, text: str) -> Any:
        if isinstance(wanted[name], types.UnionType):
            return _number(text)
        return wanted[name](text)

    return [kind(**{name: value(name, row[name]) for name in fields}) for row in rows], about


def read_growth(path: str | Path) -> tuple[list[GrowthPoint], dict[str, str]]:
    """Read points of growth.

    Args:
        path: CSV file.

    Returns:
        The points, and the columns :data:`ABOUT`.
    """
    return _read_as(GrowthPoint, path)


def read_profile(path: str | Path) -> tuple[list[Share], dict[str, str]]:
    """Read a profile.

    Args:
        path: CSV file.

    Returns:
        The shares, and the columns :data:`ABOUT`.
    """
    return _read_as(Share, path)
