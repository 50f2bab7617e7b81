"""Write results per image and per class to files, and compare two models on the same images."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.accuracy import ImageResults, wilson
from ubn_zoo.utils.files import write_file

__all__ = ["Comparison", "ImageRow", "compare", "image_rows", "read_predictions", "write_details"]

PREDICTIONS, CLASSES, CONFUSION = ".predictions.csv", ".classes.csv", ".confusion.csv"
_COLUMNS = ("file", "label", "prediction", "confidence", "correct", "correct5")
_Z = 1.959963984540054


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRow:
    """A model's result for one image; a row of a predictions file.

    Attributes:
        file: Path of the image relative to its split; its index in data without files.
        label: Correct class; empty for an image with several correct classes.
        prediction: Most probable class.
        confidence: Probability of that class.
        correct: Whether the prediction is correct.
        correct5: Whether a correct class is among the five most probable.
    """

    file: str
    label: str
    prediction: str
    confidence: float
    correct: bool
    correct5: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Paired comparison of two models on the same images.

    Attributes:
        images: Number of images.
        both: Images that both models classify correctly.
        only_first: Images that only the first model classifies correctly.
        only_second: Images that only the second model classifies correctly.
        neither: Images that neither model classifies correctly.
        p_value: Two-sided p-value of the exact McNemar test.
    """

    images: int
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float

    @property
    def top1(self) -> tuple[float, float]:
        """Accuracies in percent."""
        right = self.both + self.only_first, self.both + self.only_second
        return 100 * right[0] / self.images, 100 * right[1] / self.images

    @property
    def difference(self) -> float:
        """Accuracy of the second model minus that of the first, in percentage points."""
        return 100 * (self.only_second - self.only_first) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, in percentage points: normal approximation for paired proportions."""
        discordant, gap = self.only_first + self.only_second, self.only_second - self.only_first
        half = 100 * _Z * math.sqrt(max(0.0, discordant - gap * gap / self.images)) / self.images
        return self.difference - half, self.difference + half


def image_rows(files: Sequence[str], results: Iterable[ImageResults], names: Mapping[int, str]) -> list[ImageRow]:
    """Add the names of images and classes to results.

    Args:
        files: Names of the images in order; if empty, images are numbered from 0.
        results: Results of consecutive batches of images.
        names: Class names by output; classes without a name are numbered.
    """
    rows: list[ImageRow] = []
    for part in results:
        columns = (part.labels, part.predictions, part.confidences, part.right, part.right_in_five)
        for label, guess, confidence, right, five in zip(*(column.tolist() for column in columns), strict=True):
            rows.append(
                ImageRow(
                    files[len(rows)] if files else str(len(rows)),
                    "" if label < 0 else names.get(label, str(label)),
                    names.get(guess, str(guess)),
                    round(confidence, 6),
                    right,
                    five,
                )
            )
    return rows


def write_details(folder: str | os.PathLike[str], stem: str, rows: Sequence[ImageRow]) -> list[Path]:
    """Write predictions, a table of classes and a confusion matrix; the last two only use images with one correct
    class.

    ``STEM.predictions.csv`` has one row per image. ``STEM.classes.csv`` has one row per class: number of images, number
    of correct predictions, and, in percent, accuracy with its 95 % Wilson interval, top-5 accuracy and precision.
    ``STEM.confusion.csv`` has a row per correct class and a column per predicted class.

    Args:
        folder: Folder for the files; created if it does not exist.
        stem: Prefix of the file names.
        rows: Rows of one model.

    Returns:
        The files written.

    Raises:
        OSError: A file cannot be written.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Sequence[Any]]] = {PREDICTIONS: [_COLUMNS]}
    tables[PREDICTIONS] += [
        (_text(row.file), _text(row.label), _text(row.prediction), row.confidence, int(row.correct), int(row.correct5))
        for row in rows
    ]
    if all(row.label for row in rows):
        tables |= {CLASSES: _class_table(rows), CONFUSION: _confusion(rows)}
    for ending, table in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        write_file(root / f"{stem}{ending}", text.getvalue())
    return [root / f"{stem}{ending}" for ending in tables]


def _text(value: str) -> str:
    """Convert text to valid Unicode that no spreadsheet runs as a formula."""
    shown = os.fsencode(value).decode("utf-8", "backslashreplace")
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@", "\t", "\r", "'")) else shown


def _class_names(rows: Sequence[ImageRow]) -> list[str]:
    """Class names in the order of their first image; classes that are only predicted come last."""
    return list(dict.fromkeys([row.label for row in rows] + sorted({row.prediction for row in rows})))


def _class_table(rows: Sequence[ImageRow]) -> list[Sequence[Any]]:
    images, guesses = Counter(row.label for row in rows), Counter(row.prediction for row in rows)
    correct = Counter(row.label for row in rows if row.correct)
    correct5 = Counter(row.label for row in rows if row.correct5)
    table: list[Sequence[Any]] = [
        ("class", "images", "correct", "top1", "top1_low", "top1_high", "top5", "predicted", "precision")
    ]
    for name in _class_names(rows):
        top1 = 100 * correct[name] / images[name] if images[name] else None
        shown: list[float | None] = [None] * 4
        if top1 is not None:
            shown = [top1, *wilson(top1, images[name]), 100 * correct5[name] / images[name]]
        precision = 100 * correct[name] / guesses[name] if guesses[name] else None
        figures = ["" if figure is None else round(figure, 4) for figure in (*shown, precision)]
        table.append((_text(name), images[name], correct[name], *figures[:4], guesses[name], figures[4]))
    return table


def _confusion(rows: Sequence[ImageRow]) -> list[Sequence[Any]]:
    names, pairs = _class_names(rows), Counter((row.label, row.prediction) for row in rows)
    return [("class", *map(_text, names)), *((_text(name), *(pairs[name, other] for other in names)) for name in names)]


def read_predictions(path: str | os.PathLike[str]) -> tuple[ImageRow, ...]:
    """Read a predictions file written by `write_details`.

    Args:
        path: The file.

    Raises:
        EvaluationError: The file is not a predictions file, or lists an image twice.
        OSError: The file cannot be read.
    """
    where = os.fspath(path)
    try:
        with Path(path).open(encoding="utf-8", newline="") as stream:
            lines = csv.reader(stream)
            if tuple(header := next(lines, [])) != _COLUMNS:
                raise ValueError(f"received the columns {', '.join(header)}; valid: {', '.join(_COLUMNS)}")
            flags = {"0": False, "1": True}
            rows = []
            for line in lines:
                file, label, guess = (cell.removeprefix("'") for cell in line[:3])
                rows.append(ImageRow(file, label, guess, float(line[3]), flags[line[4]], flags[line[5]]))
    except (UnicodeDecodeError, ValueError, LookupError, csv.Error) as error:
        raise EvaluationError(f"{where}: not a predictions file: {error}") from None
    if not rows or len({row.file for row in rows}) != len(rows):
        raise EvaluationError(f"{where}: received {len(rows)} rows; valid: at least one, and one per image")
    return tuple(rows)


def compare(first: Sequence[ImageRow], second: Sequence[ImageRow]) -> Comparison:
    """Compare two models on the same images by McNemar's test (McNemar, Psychometrika 1947), exact and two-sided.

    Args:
        first: Predictions of the first model.
        second: Predictions of the second model, in any order.

    Raises:
        EvaluationError: The images or their labels differ.
    """
    other = {row.file: row for row in second}
    alone = [row.file for row in first if row.file not in other]
    if alone or len(first) != len(other):
        which = alone or sorted(set(other) - {row.file for row in first})
        raise EvaluationError(
            f"received predictions of {len(first)} and {len(other)} images, of which {which[0]} is in one file only; "
            "valid: predictions of the same images"
        )
    changed = [row for row in first if row.label != other[row.file].label]
    if changed:
        labels = f"{changed[0].label!r} and {other[changed[0].file].label!r}"
        raise EvaluationError(f"{changed[0].file} has the labels {labels}; valid: predictions of the same test set")
    counts = Counter((row.correct, other[row.file].correct) for row in first)
    only_first, only_second = counts[True, False], counts[False, True]
    return Comparison(
        images=len(first),
        both=counts[True, True],
        only_first=only_first,
        only_second=only_second,
        neither=counts[False, False],
        p_value=_two_sided(min(only_first, only_second), only_first + only_second),
    )


def _two_sided(fewer: int, total: int) -> float:
    """Two-sided probability of at most `fewer` heads or tails in `total` fair coin tosses."""
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
