"""Check somebody else's results before they enter the leaderboard."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import timm

from ubn_zoo.errors import EvaluationError, InvalidArgumentError, UbnZooError
from ubn_zoo.evaluation.accuracy import wilson
from ubn_zoo.evaluation.leaderboard.board import inherited_accuracy
from ubn_zoo.evaluation.leaderboard.figures import TEST_SETS
from ubn_zoo.evaluation.results import ResultRow, read_results
from ubn_zoo.hub.manifest import INTERPOLATIONS, load_manifest
from ubn_zoo.models import catalog
from ubn_zoo.models.registry import SUFFIX

__all__ = ["check_results", "refusals"]

_REQUIRED = ("img_size", "top1", "top1_err", "param_count", "images", "classes", "top1_low", "top1_high")
_ROUNDING = 1.01e-4  # percentages have four places
_NEAR_TIMM = 0.5  # percentage points; tolerance for other versions of libraries, decoders and hardware
_CHANCE = 3.29  # standard deviations; rejects one correct row in a thousand


def check_results(
    path: str | os.PathLike[str],
    *,
    reproduce: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    workers: int = 4,
) -> tuple[int, list[str]]:
    """Check every row of a results file.

    Args:
        path: Results file of `ubn-zoo validate`.
        reproduce: Number of images to re-evaluate every accepted model on; None for no evaluation.
        data_dir: Folder of the test set, with `reproduce`.
        workers: Loader processes.

    Returns:
        Number of accepted rows, and the reasons for each rejected row: ``row 3 (NAME): REASON``.

    Raises:
        EvaluationError: The file is not a results file; the message names the row and the column.
        InvalidArgumentError: `reproduce` is not positive, or `data_dir` is missing.
    """
    if reproduce is not None and (reproduce < 1 or data_dir is None):
        raise InvalidArgumentError(f"`reproduce`: received {reproduce}; valid: at least 1, with `data_dir`")
    rows, rejected, accepted, seen = read_results(path), [], 0, set()
    if not rows:
        raise EvaluationError(f"{os.fspath(path)}: received no rows; valid: at least one")
    for number, row in enumerate(rows, 1):
        reasons = list(refusals(row))
        if row.key in seen:
            reasons.append("the file has an earlier row for the same model, test set and settings")
        seen.add(row.key)
        if not reasons and reproduce is not None and data_dir is not None:
            reasons += _not_reproduced(row, reproduce, data_dir, workers)
        accepted += not reasons
        rejected += [f"row {number} ({_plain(row.model)}): {reason}" for reason in reasons]
    return accepted, rejected


def _plain(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)[:100]


def refusals(row: ResultRow) -> Iterator[str]:
    """Find reasons to reject a row, without evaluating the model.

    Args:
        row: The row.
    """
    if row.error is not None:
        yield f"it has no result: {_plain(row.error)}"
        return
    values = dataclasses.asdict(row)
    for name, value in values.items():
        if name in _REQUIRED and value is None:
            yield f"{name}: received nothing"
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}: received {value}; valid: a finite number"
        if isinstance(value, str) and not value.isprintable():
            yield f"{name}: received control characters; valid: printable text"
    if any(values[name] is None or not math.isfinite(values[name]) for name in _REQUIRED):
        return
    yield from _implausible(row)
    yield from _wrong_weights(row)


def _implausible(row: ResultRow) -> Iterator[str]:
    def between(name: str, low: float, high: float) -> Iterator[str]:
        value = getattr(row, name)
        if value is not None and not low <= value <= high:
            yield f"{name}: received {value:g}; valid: {low:g} to {high:g}"

    found = [reason for name in ("top1", "top5", "calibration_error") for reason in between(name, 0, 100)]
    found += [*between("img_size", 1, 16_384), *between("crop_pct", 0.01, 2), *between("classes", 1, 1_000_000)]
    found += [*between("images", 1, 10**9), *between("loss", 0, 1e6), *between("param_count", 0, 20_000)]
    yield from found
    if found:
        return
    images, top1 = row.images or 1, row.top1 or 0.0
    whole = {test_set.name: test_set.images for test_set in TEST_SETS}.get(row.test_set, images)
    if images != whole:
        yield f"images: received {images}; valid: {whole}, all of {row.test_set}"
    if row.interpolation is not None and row.interpolation not in INTERPOLATIONS:
        yield f"interpolation: received {row.interpolation!r}; valid: {', '.join(INTERPOLATIONS)}"
    if row.top5 is not None and row.top5 < top1:
        yield f"top5: received {row.top5:g}; valid: at least top1, {top1:g}"
    for name in ("top1", "top5"):
        value, error = getattr(row, name), getattr(row, f"{name}_err")
        if (value is None) != (error is None) or (value is not None and abs(100 - value - error) > _ROUNDING):
            yield f"{name}_err: received {error}; valid: 100 - {name}"
        if value is None:
            continue
        right = value * images / 100
        if abs(right - round(right)) > images * _ROUNDING / 100 + 1e-9:
            yield f"{name}: received {value:g}, {right:.2f} of {images} images; valid: a whole number of images"
        ends = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        wanted = wilson(value, images)
        if None not in ends and any(abs(end - want) > 0.01 for end, want in zip(ends, wanted, strict=True)):
            yield f"{name}_low, {name}_high: received {ends[0]:g}, {ends[1]:g}; valid: {wanted[0]:.4f}, {wanted[1]:.4f}"
    try:
        if datetime.date.fromisoformat(row.date) > datetime.datetime.now(datetime.timezone.utc).date():
            yield f"date: received {row.date}; valid: not in the future"
    except ValueError:
        yield f"date: received {row.date!r}; valid: YYYY-MM-DD"
    theirs = None if row.settings else inherited_accuracy(row.model, row.test_set, row.img_size)
    if theirs is not None and abs(top1 - theirs) > _NEAR_TIMM:
        yield f"top1: received {top1:g}; timm measured {theirs:g} for the same function; valid: within {_NEAR_TIMM:g}"


def _wrong_weights(row: ResultRow) -> Iterator[str]:
    sha256 = row.weights_sha256
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        yield f"weights_sha256: received {sha256!r}; valid: 64 lower-case hexadecimal digits"
    known = {record.id: record.sha256 for record in load_manifest()}.get(row.model) if row.source == row.model else None
    where = "the manifest"
    file = Path(row.source)
    if row.source != row.model and file.is_dir():
        file = file / ("model_ema.safetensors" if row.ema else "model.safetensors")
    if known is None and row.source != row.model and file.is_file():
        known, where = hashlib.sha256(file.read_bytes()).hexdigest(), str(file)
    if known is not None and sha256 != known:
        yield f"weights_sha256: received {sha256 or 'nothing'}; valid: {known}, of {where}"
    if row.source != row.model or ":" in row.model:
        return
    try:
        params = _parameters(row.model)
    except (UbnZooError, RuntimeError) as error:
        yield f"model: {_plain(str(error))}"
        return
    if params is not None and not row.fuse and abs(params / 1e6 - (row.param_count or 0)) > 0.0051:
        yield f"param_count: received {row.param_count:g}; valid: {params / 1e6:.2f}"


def _parameters(model: str) -> int | None:
    """Number of parameters of a named model; None if it is not in the zoo. Raises an error if it does not exist."""
    architecture = model.partition(".")[0]
    if architecture.endswith(SUFFIX) or not timm.is_model(architecture):
        return catalog.describe(model).params
    timm.get_pretrained_cfg(model, allow_unregistered=False)
    return None


def _not_reproduced(row: ResultRow, images: int, data_dir: str | os.PathLike[str], workers: int) -> Iterator[str]:
    from ubn_zoo.evaluation.evaluate import evaluate
    from ubn_zoo.evaluation.subjects import load_subject

    try:
        if row.ema:
            subject = load_subject(run=row.source, ema=True)
        elif row.source != row.model and Path(row.source).is_file():
            subject = load_subject(row.model, checkpoint=row.source)
        else:
            subject = load_subject(row.source)
        found = evaluate(
            subject,
            data_dir,
            test_set=row.test_set,
            test_split=row.split,
            test_samples=images,
            img_size=row.img_size,
            crop_pct=row.crop_pct,
            crop_mode=row.crop_mode,
            interpolation=row.interpolation,
            test_pool="test_pool=True" in (row.settings or ""),
            workers=workers,
        )
    except (UbnZooError, OSError) as error:
        yield f"it cannot be evaluated again: {_plain(str(error))}"
        return
    low, high = wilson(found.top1, found.images, deviations=_CHANCE)
    if not low <= (row.top1 or 0.0) <= high:
        yield (
            f"top1: received {row.top1:g}; {found.images} images evaluated again have {found.top1:.2f}, "
            f"which allows for {low:.2f} to {high:.2f}"
        )
