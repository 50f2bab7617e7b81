"""Text output shared by commands: aligned tables and catalog entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from ubn_zoo.hub.manifest import Metric
from ubn_zoo.models.catalog import Entry

__all__ = ["figure", "json_of", "print_table", "source_of"]


def print_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> None:
    """Print rows in aligned columns.

    Args:
        rows: Header and rows, with one string per column.
        right: Indices of right-aligned columns, such as numbers.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    template = "  ".join(f"{{:{'>' if column in right else '<'}{width}}}" for column, width in enumerate(widths))
    for row in rows:
        print(template.format(*row).rstrip())


def json_of(entry: Entry) -> dict[str, Any]:
    """Name and all fields of an entry, for JSON."""
    return {"name": entry.name, **dataclasses.asdict(entry)}


def source_of(entry: Entry) -> str:
    """Location of the weights."""
    if entry.source == "hub":
        return f"hub {entry.repository}"
    return "bundled" if entry.source == "bundled" else "no weights"


def figure(metric: Metric) -> str:
    """A metric with its value, dataset and split."""
    return f"{metric.name} {metric.value:g} ({metric.dataset} {metric.split})"
