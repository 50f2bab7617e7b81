"""CSV files of a training run's measurements: one row per epoch, or per epoch and norm layer."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ubn_zoo.errors import EvaluationError
from ubn_zoo.utils.files import write_file

__all__ = [
    "EpochMetrics",
    "LayerSimilarity",
    "read_labeled_metrics",
    "read_labeled_similarity",
    "read_metrics",
    "read_similarity",
    "write_metrics",
    "write_similarity",
]

_VARIANT = "variant"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch of one run; a row of ``metrics.csv``.

    Held-out metrics are for the current weights, and with the prefix ``ema_`` for their moving average.

    Attributes:
        model: Architecture.
        norm: Normalization.
        seed: The run's seed.
        epoch: Completed epochs, from 1.
        step: Completed updates.
        lr: Learning rate of the last update; with layer-wise decay, the highest of all groups.
        train_loss: Mean training loss in nats over all ranks, including the effects of augmentation and smoothing.
        test_loss: Cross-entropy on the held-out images in nats.
        top1: Accuracy on the held-out images in percent.
        top5: Percentage of held-out images with the correct class among the five most probable; None for fewer than six
            classes.
        calibration_error: Expected calibration error on the held-out images in percent, 15 equal bins of confidence.
        ema_test_loss: As ``test_loss``; this and the next three are None without a moving average.
        ema_top1: As ``top1``.
        ema_top5: As ``top5``.
        ema_calibration_error: As ``calibration_error``.
        seconds: Wall-clock time of training in the epoch, without evaluation; since the last start only.
        step_ms: Median time of one update in milliseconds, including data loading; since the last start only.
        images_per_second: Training images of all ranks per second, from ``step_ms``.
        similarity_min: Smallest running feature similarity over the layers; None without a gate.
        similarity_mean: Mean over the layers; None without a gate.
        similarity_max: Largest over the layers; None without a gate.
        gates_open: Layers that use batch statistics; None without a gate.
        gates: Layers that have a gate.
        device: ``cpu``, or the accelerator's name.
        ranks: Processes that trained together.
        threads: torch's CPU threads per process.
        torch: torch's version.
        commit: The project's commit, followed by ``+`` if files had changed; None outside version control.
    """

    model: str
    norm: str
    seed: int
    epoch: int
    step: int
    lr: float
    train_loss: float
    test_loss: float
    top1: float
    top5: float | None = None
    calibration_error: float
    ema_test_loss: float | None = None
    ema_top1: float | None = None
    ema_top5: float | None = None
    ema_calibration_error: float | None = None
    seconds: float
    step_ms: float
    images_per_second: float
    similarity_min: float | None = None
    similarity_mean: float | None = None
    similarity_max: float | None = None
    gates_open: int | None = None
    gates: int
    device: str
    ranks: int
    threads: int
    torch: str
    commit: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSimilarity:
    """Feature condensation of one norm layer after one epoch; a row of ``similarity.csv``.

    Attributes:
        epoch: Completed epochs; 0 before training.
        layer: The norm layer's name in the model.
        depth: Position among the norm layers in execution order, from 0.
        similarity: Mean cosine similarity between pairs of held-out images, for the layer's input features.
        running: The layer's running similarity over training batches; None for a layer without a gate.
        threshold: Gate threshold; None for a layer without a gate.
        gate: ``open`` (batch statistics in training) or ``closed``; None for a layer without a gate.
    """

    epoch: int
    layer: str
    depth: int
    similarity: float
    running: float | None = None
    threshold: float | None = None
    gate: str | None = None


_Row = TypeVar("_Row", EpochMetrics, LayerSimilarity)


def _write(path: str | os.PathLike[str], kind: Any, rows: Sequence[Any], variants: Sequence[str] | None) -> None:
    header = [*([] if variants is None else [_VARIANT]), *(field.name for field in dataclasses.fields(kind))]
    lines = [["" if value is None else value for value in dataclasses.astuple(row)] for row in rows]
    if variants is not None:
        lines = [[label, *line] for label, line in zip(variants, lines, strict=True)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    write_file(path, text.getvalue())


def _read(path: str | os.PathLike[str], kind: type[_Row], *, labeled: bool) -> tuple[tuple[str, _Row], ...]:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)
    names = [*([_VARIANT] if labeled else []), *(field.name for field in fields)]
    kinds: Mapping[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    rows = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != names:
            raise EvaluationError(f"{path}: received the columns {', '.join(header)}; valid: {', '.join(names)}")
        for values in reader:
            if len(values) != len(names):
                raise EvaluationError(
                    f"{path}, line {reader.line_num}: received {len(values)} values; valid: {len(names)}"
                )
            label = values.pop(0) if labeled else ""
            parsed: dict[str, Any] = {}
            for field, value in zip(fields, values, strict=True):
                base, _, optional = str(field.type).partition(" | ")
                try:
                    parsed[field.name] = None if optional and not value else kinds[base](value)
                except ValueError:
                    where = f"{path}, line {reader.line_num}, {field.name}"
                    raise EvaluationError(f"{where}: received {value!r}; valid: {field.type}") from None
            rows.append((label, kind(**parsed)))
    return tuple(rows)


def write_metrics(
    path: str | os.PathLike[str], rows: Sequence[EpochMetrics], variants: Sequence[str] | None = None
) -> None:
    """Write rows as CSV with a header, atomically; numbers round-trip exactly, and None is an empty cell.

    Args:
        path: The CSV file.
        rows: Rows of one or several runs.
        variants: Variant of each row, written as a first column ``variant``; None for no such column.
    """
    _write(path, EpochMetrics, rows, variants)


def read_metrics(path: str | os.PathLike[str]) -> tuple[EpochMetrics, ...]:
    """Read a file that `write_metrics` wrote without variants.

    Args:
        path: The CSV file.

    Raises:
        ValueError: The file has other columns, or a value has the wrong type.
    """
    return tuple(row for _, row in _read(path, EpochMetrics, labeled=False))


def read_labeled_metrics(path: str | os.PathLike[str]) -> tuple[tuple[str, EpochMetrics], ...]:
    """Read a file that `write_metrics` wrote with variants, as pairs of variant and row."""
    return _read(path, EpochMetrics, labeled=True)


def write_similarity(
    path: str | os.PathLike[str], rows: Sequence[LayerSimilarity], variants: Sequence[str] | None = None
) -> None:
    """Write rows as `write_metrics` does."""
    _write(path, LayerSimilarity, rows, variants)


def read_similarity(path: str | os.PathLike[str]) -> tuple[LayerSimilarity, ...]:
    """Read a file that `write_similarity` wrote without variants.

    Args:
        path: The CSV file.

    Raises:
        ValueError: The file has other columns, or a value has the wrong type.
    """
    return tuple(row for _, row in _read(path, LayerSimilarity, labeled=False))


def read_labeled_similarity(path: str | os.PathLike[str]) -> tuple[tuple[str, LayerSimilarity], ...]:
    """Read a file that `write_similarity` wrote with variants, as pairs of variant and row."""
    return _read(path, LayerSimilarity, labeled=True)
