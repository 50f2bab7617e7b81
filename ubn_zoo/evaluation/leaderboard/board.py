"""Rows of the leaderboard, from inherited figures, the manifest, results files and speed tables."""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from ubn_zoo.errors import EvaluationError
from ubn_zoo.evaluation.accuracy import wilson
from ubn_zoo.evaluation.leaderboard.figures import TEST_SETS, count_operations, load_figures, upstream_name
from ubn_zoo.evaluation.results import COLUMNS, ResultRow, read_results
from ubn_zoo.hub.manifest import Metric, Record, load_manifest
from ubn_zoo.models import catalog
from ubn_zoo.models.registry import SUFFIX

__all__ = ["INHERITED", "Board", "Row", "build_board", "inherited_accuracy"]

INHERITED = "inherited, measured by timm"
_IMAGES = {test_set.name: test_set.images for test_set in TEST_SETS}
_SEED = re.compile(r"(seed[-_]?)(\d+)$")
_RESEARCH_SPEED = {"infer_samples_per_sec", "train_samples_per_sec", "kind", "environment"}
_SPEED = {"mode", "model", "images_per_second", "peak_memory", "threads"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model on one test set; a line of the CSV files, which begin with timm's columns.

    Attributes:
        model: timm's name with its tag; of a run or checkpoint, the architecture.
        img_size: Image side in pixels.
        top1: Accuracy in percent; the mean over `seeds`, where there are several.
        top1_err: 100 - `top1`.
        top5: Percentage of images with the right class among the five most probable; None if not measured.
        top5_err: 100 - `top5`.
        param_count: Parameters in millions.
        crop_pct: Side of the center crop relative to the resized image.
        interpolation: Resize filter.
        norm: Norm layer: ``ubn``, ``rbn``, ``bnet`` or ``bn``.
        origin: ``converted`` (the BatchNorm sibling's weights), ``native`` (trained with UBN, RBN or BNET), or
            ``batchnorm``.
        family: timm's module.
        license: License of the weights; None if not stated.
        weights_sha256: Hash of the weights' file; None if the file is not known.
        images: Images counted; None if not recorded.
        top1_low: Lower end of the 95 % Wilson interval of `top1`; None for the mean of several seeds.
        top1_high: Upper end.
        gmacs: Billions of multiply-adds per image, those of UBN's depthwise convolutions included.
        macts: Output elements of convolutions and matrix products, in millions.
        train_samples_per_sec: Training speed.
        train_samples_per_sec_bn: Training speed of the BatchNorm sibling in the same run.
        infer_samples_per_sec: Inference speed.
        infer_samples_per_sec_bn: Inference speed of the BatchNorm sibling in the same run.
        peak_memory: Peak memory of a training step in MiB.
        speed_setup: What the speed was measured on.
        rtx4090_bn: Inference speed of the BatchNorm sibling, by timm's benchmark of that card.
        pro6000_bn: The same for the RTX PRO 6000.
        rank: Rank by `top1` within the test set; None if only a part of the test set was used.
        sibling: The BatchNorm sibling that `top1_diff` refers to.
        top1_diff: `top1` minus the sibling's; 0 for converted weights, which compute the same function.
        seeds: Random seeds of the training runs, separated by blanks.
        top1_std: Standard deviation of `top1` over seeds; None for fewer than two.
        measured: ``inherited, measured by timm``, or the hardware of the evaluation.
        table: File with the figures.
        date: Day of the measurement, or month of timm's table.
        run: Folder or file of the evaluated run or checkpoint, ``*`` for its seed; None for a named model.
        settings: Differences from the model's own preprocessing and precision.
        command: Command that measured it; None if not recorded.
    """

    model: str
    img_size: int | None
    top1: float
    top1_err: float
    top5: float | None
    top5_err: float | None
    param_count: float | None
    crop_pct: float | None
    interpolation: str | None
    norm: str | None
    origin: str
    family: str | None
    license: str | None
    weights_sha256: str | None = None
    images: int | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    gmacs: float | None = None
    macts: float | None = None
    train_samples_per_sec: float | None = None
    train_samples_per_sec_bn: float | None = None
    infer_samples_per_sec: float | None = None
    infer_samples_per_sec_bn: float | None = None
    peak_memory: float | None = None
    speed_setup: str | None = None
    rtx4090_bn: float | None = None
    pro6000_bn: float | None = None
    rank: int | None = None
    sibling: str | None = None
    top1_diff: float | None = None
    seeds: str | None = None
    top1_std: float | None = None
    measured: str
    table: str
    date: str | None = None
    run: str | None = None
    settings: str | None = None
    command: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Board:
    """The leaderboard.

    Attributes:
        tables: Rows by test set, best first.
        titles: Title of each test set.
    """

    tables: Mapping[str, Sequence[Row]]
    titles: Mapping[str, str]


def build_board(results: Iterable[str | os.PathLike[str]] = ()) -> Board:
    """Join inherited figures, the manifest, and measurements.

    A row of a results file replaces the inherited or recorded row for the same model, test set and image size. Runs
    whose folders differ only in a final ``seedN`` are combined into one row with mean and standard deviation. The
    sibling of such a row is the BatchNorm row of the same architecture, test set and image size in the same parent
    folder, if there is exactly one; differences are computed per seed.

    Args:
        results: Results files of `ubn-zoo validate`, CSV or JSON, and CSV files of `ubn-zoo benchmark --output`.

    Raises:
        EvaluationError: A file is neither a results file nor a speed table.
        OSError: A file cannot be read.
    """
    titles = {test_set.name: test_set.title for test_set in TEST_SETS}
    found: dict[tuple[Any, ...], Row] = {}
    names: dict[tuple[Any, ...], str] = {}
    evaluated, speeds = [], {}
    for path in results:
        kind, content = _read(Path(path))
        if kind == "results":
            evaluated += [(row, Path(path).name) for row in content if row.error is None]
        else:
            speeds.update(content)
    rows = [*_inherited(), *_recorded(titles), *_measured(evaluated)]
    for test_set, row in rows:
        key: tuple[Any, ...] = (test_set, row.model, row.img_size, row.run, row.settings)
        if row.images not in (None, _IMAGES.get(test_set, row.images)):
            key = (*key, row.images)  # a part of the test set does not replace other rows
        old = found.get(key)
        if old is not None and row.sibling is None:
            row = dataclasses.replace(row, sibling=old.sibling, top1_diff=old.top1_diff, seeds=old.seeds)
        found[key], names[key] = row, test_set
    tables: dict[str, list[Row]] = {}
    for key, row in found.items():
        tables.setdefault(names[key], []).append(_with_cost(row, speeds))
    order = [test_set.name for test_set in TEST_SETS]
    order += sorted(set(tables) - set(order))
    return Board(
        {name: _ranked(name, _with_siblings(tables[name])) for name in order if name in tables},
        {name: titles.get(name, name) for name in order if name in tables},
    )


def _read(path: Path) -> tuple[str, Any]:
    """Read a file and return its kind and content."""
    if path.suffix.lower() == ".json":
        return "results", read_results(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = set(reader.fieldnames or ())
            if header >= {*COLUMNS[:9], "test_set"}:
                return "results", read_results(path)
            if header >= _RESEARCH_SPEED:
                return "speed", _research_speeds(list(reader))
            if header >= _SPEED:
                return "speed", _speeds(list(reader))
    except (UnicodeDecodeError, csv.Error, KeyError, ValueError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{path}: not a results file: {error}") from None
    raise EvaluationError(
        f"{path}: received the columns {', '.join(sorted(header)) or '(none)'}; valid: a results file of `ubn-zoo "
        "validate --results`, or a speed table of `ubn-zoo benchmark --output`"
    )


def _speeds(lines: list[dict[str, str]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Fields of `Row` by twin and image size, from pairs of lines."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        prefix = {"training": "train", "inference": "infer"}.get(line["mode"])
        if prefix is None:
            continue
        twin = line["model"].removesuffix(SUFFIX) + SUFFIX
        entry = found.setdefault((twin, int(line["img_size"])), {})
        sibling = "" if line["model"] == twin else "_bn"
        entry[f"{prefix}_samples_per_sec{sibling}"] = round(float(line["images_per_second"]), 2)
        if prefix == "train" and not sibling and line["peak_memory"]:
            entry["peak_memory"] = round(float(line["peak_memory"]), 1)
        threads = f", {line['threads']} threads" if line["device"] == "cpu" else ""
        precision = f"AMP {line['amp']}" if line.get("amp") else "float32"
        entry["speed_setup"] = (
            f"{line['device']}{threads}, batch {line['batch_size']}, {precision}, torch {line['torch']}"
        )
    return found


def _research_speeds(lines: list[dict[str, str]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Fields of `Row` by twin and image size, from tables in timm's layout."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        if line.get("run") != "model" or line.get("fused") or line["kind"] not in ("bn", "ubn"):
            continue
        twin = line["model"].removesuffix(SUFFIX) + SUFFIX
        size = line["infer_img_size"] or line["train_img_size"]
        entry = found.setdefault((twin, int(size)), {})
        sibling = "" if line["kind"] == "ubn" else "_bn"
        for prefix in ("train", "infer"):
            if line[f"{prefix}_samples_per_sec"]:
                entry[f"{prefix}_samples_per_sec{sibling}"] = float(line[f"{prefix}_samples_per_sec"])
        if not sibling and line["train_memory"]:
            entry["peak_memory"] = float(line["train_memory"])
        batch = line["infer_batch_size"] or line["train_batch_size"]
        entry["speed_setup"] = f"{line['environment']}, batch {batch}, {line['dtype']}"
    return found


@functools.cache
def _entries() -> dict[str, catalog.Entry]:
    return {entry.name: entry for entry in catalog.entries(tags=True)}


@functools.cache
def _family(model: str) -> str | None:
    name = model.partition(".")[0]
    if not timm.is_model(name):
        return None
    return timm.model_entrypoint(name).__module__.rpartition(".")[2].removeprefix("ubn_")


def _accuracy(top1: float, top5: float | None, images: int | None) -> dict[str, Any]:
    low, high = wilson(top1, images) if images else (None, None)
    return {
        "top1": top1,
        "top1_err": round(100 - top1, 4),
        "top5": top5,
        "top5_err": None if top5 is None else round(100 - top5, 4),
        "images": images,
        "top1_low": None if low is None else round(low, 4),
        "top1_high": None if high is None else round(high, 4),
    }


def _inherited() -> Iterable[tuple[str, Row]]:
    """Timm's figures for all converted weights in the installed timm version."""
    figures, entries = load_figures(), _entries()
    for model, img_size, crop_pct, interpolation, *values in figures["rows"]:
        entry = entries.get(model)
        if entry is None:
            continue
        for test_set, top1, top5 in zip(TEST_SETS, values[::2], values[1::2], strict=True):
            if top1 is not None:
                yield (
                    test_set.name,
                    Row(
                        model=model,
                        img_size=img_size,
                        param_count=round(entry.params / 1e6, 2),
                        crop_pct=crop_pct,
                        interpolation=interpolation,
                        norm="ubn",
                        origin="converted",
                        family=_family(model),
                        license=entry.license,
                        sibling=upstream_name(model),
                        top1_diff=0.0,
                        measured=INHERITED,
                        table=test_set.table,
                        date=figures["date"],
                        **_accuracy(top1, top5, test_set.images),
                    ),
                )


def inherited_accuracy(model: str, test_set: str, img_size: int | None) -> float | None:
    """Timm's top-1 accuracy in percent for converted weights; None if timm has not measured them.

    Args:
        model: Architecture and tag, of the twin or of its sibling.
        test_set: Name of one of timm's test sets.
        img_size: Image side in pixels.
    """
    if test_set not in _IMAGES:
        return None
    place = 4 + 2 * list(_IMAGES).index(test_set)
    rows = (row for row in load_figures()["rows"] if row[1] == img_size and model in (row[0], upstream_name(row[0])))
    return next((row[place] for row in rows), None)


def _recorded(titles: dict[str, str]) -> Iterable[tuple[str, Row]]:
    """Top-1 accuracies of the manifest."""
    for record in load_manifest():
        for metric in record.metrics:
            if metric.name == "top1":
                test_set = re.sub(r"[^a-z0-9]+", "-", metric.dataset.lower()).strip("-")
                titles.setdefault(test_set, f"{metric.dataset}, {metric.split}")
                yield test_set, _of_record(record, metric)


def _of_record(record: Record, metric: Metric) -> Row:
    def other(name: str) -> float | None:
        same = (entry for entry in record.metrics if (entry.dataset, entry.split) == (metric.dataset, metric.split))
        return next((entry.value for entry in same if entry.name == name), None)

    sibling = other("top1_batchnorm_twin")
    return Row(
        model=record.id,
        img_size=record.input.size[1],
        param_count=round(record.params / 1e6, 2),
        crop_pct=record.input.crop_pct,
        interpolation=record.input.interpolation,
        norm="ubn",
        origin="native",
        family=_family(record.architecture),
        license=record.license,
        weights_sha256=record.sha256,
        sibling=None if sibling is None else record.architecture.removesuffix(SUFFIX),
        top1_diff=None if sibling is None else round(metric.value - sibling, 4),
        seeds=" ".join(map(str, metric.measured.seeds)) or None,
        measured="this project",
        table="weights_manifest.json",
        command=metric.measured.command,
        **_accuracy(metric.value, other("top5"), None),
    )


def _measured(rows: Iterable[tuple[ResultRow, str]]) -> Iterable[tuple[str, Row]]:
    """Rows of results files, with runs combined that differ only in their seed."""
    groups: dict[tuple[Any, ...], dict[str, tuple[ResultRow, str]]] = {}
    for row, table in rows:
        run = None if row.source == row.model else row.source.rstrip("/\\")
        group = None if run is None else _SEED.sub(r"\1*", run)
        given = {row.settings or "": True, f"amp={row.amp}": row.amp, "fuse": row.fuse, "ema": row.ema}
        settings = " ".join(name for name, used in given.items() if name and used)
        key = (row.model, row.test_set, row.split, row.img_size, group, settings or None)
        groups.setdefault(key, {})[run or row.model] = (row, table)
    for (model, test_set, _, img_size, group, settings), members in groups.items():
        yield test_set, _joined(model, img_size, group, settings, members)


def _joined(
    model: str, img_size: int | None, run: str | None, settings: str | None, members: dict[str, tuple[ResultRow, str]]
) -> Row:
    rows = [row for row, _ in members.values()]
    first, table = next(iter(members.values()))
    seeds = [found[2] for found in map(_SEED.search, members) if found]
    entry = _entries().get(model)
    converted = entry is not None and entry.converted_from is not None
    top1 = [row.top1 for row in rows if row.top1 is not None]
    top5 = [row.top5 for row in rows if row.top5 is not None]
    accuracy = _accuracy(
        round(statistics.fmean(top1), 4), round(statistics.fmean(top5), 4) if top5 else None, first.images
    )
    if len(rows) > 1:
        accuracy |= {"top1_low": None, "top1_high": None}
    return Row(
        model=model,
        img_size=img_size,
        param_count=first.param_count,
        crop_pct=first.crop_pct,
        interpolation=first.interpolation,
        norm=first.norm,
        origin="converted" if converted else "batchnorm" if first.norm == "bn" else "native",
        family=_family(model),
        license=_license(model),
        weights_sha256=first.weights_sha256 if len(rows) == 1 else None,
        seeds=" ".join(sorted(seeds, key=int)) or None,
        top1_std=round(statistics.stdev(top1), 4) if len(top1) > 1 else None,
        measured=first.hardware,
        table=table,
        date=first.date,
        run=run,
        settings=settings,
        command=first.command,
        **accuracy,
    )


def _license(model: str) -> str | None:
    if model in _entries():
        return _entries()[model].license
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model.partition(".")[0]) and "." in model else None
    return None if cfg is None else cfg.license


@functools.cache
def _operations(architecture: str, img_size: int) -> tuple[float | None, float | None]:
    known = load_figures()["cost"].get(architecture, {}).get(str(img_size))
    if known is not None:
        return known[0], known[1]
    if not timm.is_model(architecture):
        return None, None
    try:
        gmacs, macts = count_operations(architecture, img_size)
    except (RuntimeError, AssertionError, ValueError):  # the architecture does not support this image size
        return None, None
    return float(f"{gmacs:.4g}"), float(f"{macts:.4g}")


def _with_cost(row: Row, speeds: Mapping[tuple[str, int], Mapping[str, Any]]) -> Row:
    if row.img_size is None:
        return row
    architecture = row.model.partition(".")[0]
    # RBN has UBN's statistics but not its convolution.
    counted = architecture.removesuffix(SUFFIX) if row.norm == "rbn" else architecture
    gmacs, macts = _operations(counted, row.img_size)
    known = load_figures()["cost"].get(architecture, {}).get(str(row.img_size), [None] * 4)
    speed = speeds.get((architecture, row.img_size), {})
    return dataclasses.replace(row, gmacs=gmacs, macts=macts, rtx4090_bn=known[2], pro6000_bn=known[3], **speed)


def _with_siblings(rows: Sequence[Row]) -> list[Row]:
    """Fill in the siblings that were also measured."""
    named = {(row.model, row.img_size, row.settings): row for row in rows if row.run is None}
    trained: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.run is not None and row.norm == "bn":
            trained.setdefault(_place(row), []).append(row)
    found = []
    for row in rows:
        sibling: Row | None = None
        if row.norm != "bn" and row.run is None and row.measured != INHERITED and row.origin == "converted":
            sibling = named.get((upstream_name(row.model), row.img_size, row.settings))
        elif row.norm != "bn" and row.run is not None and len(trained.get(_place(row), ())) == 1:
            sibling = trained[_place(row)][0]
            if sibling.seeds != row.seeds:
                sibling = None
        if sibling is not None:
            name = sibling.model if sibling.run is None else sibling.run
            row = dataclasses.replace(row, sibling=name, top1_diff=round(row.top1 - sibling.top1, 4))
        found.append(row)
    return found


def _place(row: Row) -> tuple[Any, ...]:
    return row.model.partition(".")[0].removesuffix(SUFFIX), row.img_size, row.settings, os.path.split(row.run or "")[0]


def _ranked(test_set: str, rows: Sequence[Row]) -> list[Row]:
    """Best first; rows of equal accuracy share a rank, and rows over a part of the images have none."""
    whole = _IMAGES.get(test_set, max((row.images for row in rows if row.images is not None), default=None))
    ranked, place, last = [], 0, None
    for row in sorted(rows, key=lambda row: (-row.top1, -(row.top5 or 0), row.model, row.img_size or 0, row.run or "")):
        if row.images in (None, whole):
            place += 1
            last = last if last is not None and last[1] == row.top1 else (place, row.top1)
            row = dataclasses.replace(row, rank=last[0])
        ranked.append(row)
    return ranked
