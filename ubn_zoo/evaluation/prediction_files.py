"""Write predictions to files: tables, a contact sheet of labeled images, and embeddings.

Files are written as predictions arrive, so memory does not grow with their number. A file appears only when complete.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ubn_zoo.errors import EvaluationError, MissingPackageError
from ubn_zoo.utils.files import atomic_write

__all__ = ["SHEET_IMAGES", "THUMBNAIL", "ClassProbability", "Prediction", "open_prediction_files"]

SHEET_IMAGES = 100  # maximum number of images on a contact sheet
THUMBNAIL = 176  # side in pixels
_MARGIN = 8
_LINE = 16
_CAPTION_LINES = 3  # file name and the two most probable classes
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_PARQUET_ROWS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class ClassProbability:
    """One class of a prediction.

    Attributes:
        index: The model's output, from 0.
        name: Class name, or ``class 0`` and so on if the model has no class names.
        probability: Softmax over all classes, from 0 to 1.
    """

    index: int
    name: str
    probability: float


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """A model's prediction for one image.

    Attributes:
        file: Path of the image.
        top: The most probable classes, the most probable first.
        features: Pooled features before the classifier, (channels,), float32, on the CPU; None unless requested.
        thumbnail: Small copy of the image; None unless requested.
    """

    file: str
    top: tuple[ClassProbability, ...]
    features: Tensor | None = None
    thumbnail: Image.Image | None = None


@contextlib.contextmanager
def open_prediction_files(
    *,
    output: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
) -> Iterator[Callable[[Prediction], None]]:
    """Open files to write predictions to; they appear when the ``with`` block ends without an exception.

    Args:
        output: Table of one row per image, as ``.csv``, ``.json`` or ``.parquet`` (needs pyarrow). In CSV files, text
            that a spreadsheet would run as a formula starts with an apostrophe.
        picture: Contact sheet of the first 100 images, as ``.png``.
        features: Embeddings as ``.safetensors``: tensor ``features``, (images, channels), float32; the metadata's
            ``files`` is the JSON list of the images' paths.

    Yields:
        A function that writes one prediction to all files.

    Raises:
        EvaluationError: A file has an unsupported extension.
        MissingPackageError: The format needs a package that is not installed.
        OSError: A file cannot be written.
    """
    writers = {"output": _TABLES, "picture": {".png": _sheet}, "features": {".safetensors": _embeddings}}
    chosen = []
    for name, path in (("output", output), ("picture", picture), ("features", features)):
        if path is None:
            continue
        writer = writers[name].get(Path(path).suffix.lower())
        if writer is None:
            raise EvaluationError(f"`{name}`: received {os.fspath(path)!r}; valid: *{', *'.join(writers[name])}")
        chosen.append((writer, path))
    with contextlib.ExitStack() as stack:
        write = [stack.enter_context(writer(stack.enter_context(atomic_write(path)))) for writer, path in chosen]

        def write_all(prediction: Prediction) -> None:
            for one in write:
                one(prediction)

        yield write_all


def _shown(name: str) -> str:
    """File name as valid Unicode, with non-UTF-8 bytes escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _row(prediction: Prediction) -> dict[str, str | float]:
    row: dict[str, str | float] = {"file": _shown(prediction.file)}
    for rank, found in enumerate(prediction.top, 1):
        row |= {f"class_{rank}": found.name, f"probability_{rank}": found.probability}
    return row


@contextlib.contextmanager
def _csv(file: IO[bytes]) -> Iterator[Callable[[Prediction], None]]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    started = False

    def cell(value: str | float) -> str:
        if isinstance(value, float):
            return f"{value:.6f}"
        return f"'{value}" if value.startswith(_FORMULA) else value

    def write(prediction: Prediction) -> None:
        nonlocal started
        row = _row(prediction)
        if not started:
            writer.writerow(row)
            started = True
        writer.writerow([cell(value) for value in row.values()])

    yield write
    text.detach()


@contextlib.contextmanager
def _json(file: IO[bytes]) -> Iterator[Callable[[Prediction], None]]:
    separator = "[\n"

    def write(prediction: Prediction) -> None:
        nonlocal separator
        entry = {"file": _shown(prediction.file), "classes": [dataclasses.asdict(found) for found in prediction.top]}
        file.write(f"{separator}{json.dumps(entry, ensure_ascii=False)}".encode())
        separator = ",\n"

    yield write
    file.write(b"[]\n" if separator == "[\n" else b"\n]\n")


@contextlib.contextmanager
def _parquet(file: IO[bytes]) -> Iterator[Callable[[Prediction], None]]:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingPackageError(
            f"`output` as .parquet needs pyarrow ({error}); run `pip install pyarrow`, or use .csv or .json"
        ) from None
    rows: list[dict[str, str | float]] = []
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        table = arrow.Table.from_pylist(rows)
        if writer is None:
            writer = parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
        rows.clear()

    def write(prediction: Prediction) -> None:
        rows.append(_row(prediction))
        if len(rows) == _PARQUET_ROWS:
            flush()

    yield write
    if rows or writer is None:
        flush()
    writer.close()


_TABLES = {".csv": _csv, ".json": _json, ".parquet": _parquet}


@contextlib.contextmanager
def _embeddings(file: IO[bytes]) -> Iterator[Callable[[Prediction], None]]:
    names: list[str] = []
    channels = 0
    # The header of a safetensors file contains the number of rows, which is not known until the end.
    with tempfile.TemporaryFile() as rows:

        def write(prediction: Prediction) -> None:
            nonlocal channels
            if prediction.features is None:
                raise ValueError(
                    "received a prediction without features; valid: those of predict_stream(features=True)"
                )
            names.append(_shown(prediction.file))
            channels = len(prediction.features)
            rows.write(prediction.features.numpy().astype("<f4").tobytes())

        yield write
        shape = [len(names), channels]
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        header = json.dumps({"__metadata__": {"files": json.dumps(names)}, "features": tensor}).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        rows.seek(0)
        shutil.copyfileobj(rows, file)


@contextlib.contextmanager
def _sheet(file: IO[bytes]) -> Iterator[Callable[[Prediction], None]]:
    shown: list[tuple[Prediction, Image.Image]] = []
    count = 0

    def write(prediction: Prediction) -> None:
        nonlocal count
        count += 1
        if prediction.thumbnail is not None:
            shown.append((prediction, prediction.thumbnail))

    yield write
    _draw_sheet(shown, count).save(file, "PNG")


def _draw_sheet(shown: list[tuple[Prediction, Image.Image]], count: int) -> Image.Image:
    columns = max(1, min(len(shown), math.ceil(math.sqrt(1.5 * len(shown))), 10))
    width, height = THUMBNAIL + 2 * _MARGIN, THUMBNAIL + _CAPTION_LINES * _LINE + 3 * _MARGIN
    footer = _LINE + _MARGIN if count > len(shown) else 0
    sheet = Image.new("RGB", (columns * width, math.ceil(len(shown) / columns) * height + footer), "white")
    draw = ImageDraw.Draw(sheet)
    try:
        font: Any = ImageFont.load_default(12)
    except (ImportError, TypeError):  # Pillow without FreeType, or before 10.1, has one size
        font = ImageFont.load_default()
    for number, (prediction, picture) in enumerate(shown):
        left, top = number % columns * width + _MARGIN, number // columns * height + _MARGIN
        sheet.paste(picture, (left + (THUMBNAIL - picture.width) // 2, top + (THUMBNAIL - picture.height) // 2))
        top += THUMBNAIL + _MARGIN // 2
        draw.text((left, top), _fitted(draw, Path(_shown(prediction.file)).name, "", font), "gray", font)
        for rank, found in enumerate(prediction.top[: _CAPTION_LINES - 1], 1):
            caption = _fitted(draw, found.name, f"   {100 * found.probability:.1f} %", font)
            draw.text((left, top + rank * _LINE), caption, "black" if rank == 1 else "dimgray", font)
    if footer:
        draw.text((_MARGIN, sheet.height - footer), f"first {len(shown)} of {count} images", "gray", font)
    return sheet


def _fitted(draw: ImageDraw.ImageDraw, text: str, ending: str, font: Any) -> str:
    """Shorten text so that it fits, with its ending, into the width of a thumbnail."""
    text = " ".join(text.split())
    if draw.textlength(f"{text}{ending}", font) <= THUMBNAIL:
        return f"{text}{ending}"
    while text and draw.textlength(f"{text}...{ending}", font) > THUMBNAIL:
        text = text[:-1]
    return f"{text}...{ending}"
