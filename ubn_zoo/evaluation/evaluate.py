"""Evaluate one model or a series of models on images, optionally writing a results file."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers.test_time_pool import TestTimePoolHead
from torch import nn

from ubn_zoo import __version__
from ubn_zoo.data.loaders import EvalBatches
from ubn_zoo.data.settings import Feed
from ubn_zoo.errors import EvaluationError, UbnZooError
from ubn_zoo.evaluation.accuracy import Accuracy, ImageResults, agree_on, is_out_of_memory, measure, wilson
from ubn_zoo.evaluation.details import ImageRow, image_rows, write_details
from ubn_zoo.evaluation.results import ResultRow, add_result, read_results
from ubn_zoo.evaluation.subjects import Subject, load_subject, norm_of, weights_hash
from ubn_zoo.evaluation.test_sets import (
    KNOWN_SETS,
    ClassLabels,
    feed_of,
    held_out_split,
    open_images,
    with_real_labels,
)
from ubn_zoo.layers import fuse
from ubn_zoo.recipes.schema import DATASETS, NAMED_DATASETS
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.provenance import device_name, source_commit

__all__ = ["EvalOptions", "Evaluation", "evaluate", "evaluate_many"]

_CROP_MODES = ("center", "squash", "border")
_FILTERS = ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")

Model = str | os.PathLike[str] | nn.Module | Subject


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """The images and settings of an evaluation.

    Attributes:
        test_set: Name of the test set in results. The classes of `KNOWN_SETS`, such as ``imagenet-real``, are checked;
            any other name is allowed. By default the name of the data folder or dataset.
        real_labels: The file ``real.json`` for ``imagenet-real``; by default timm's copy.
        valid_labels: File with the classes to use, one name or index per line; images of other classes are skipped.
        class_map: File with one folder name per line, in the order of the model's outputs.
        allow_class_mismatch: Whether to map the sorted classes to the model's outputs in order if the names differ or
            the model has no names.
        all_outputs: Whether to predict over all outputs of the model even if the images cover only some of its classes.
        img_size: Image side in pixels; this and the next five default to the model's configuration.
        crop_pct: Side of the crop relative to the resized image.
        crop_mode: timm's crop mode: ``center``, ``squash`` or ``border``.
        interpolation: Resize filter.
        mean: Mean of each channel, of values scaled to 0..1.
        std: Standard deviation of each channel, of values scaled to 0..1.
        test_pool: Whether to use timm's test-time pooling for images larger than in training.
        amp: Autocast's dtype; None for the model's own precision.
        fuse: Whether to fold norms into convolutions with `ubn_zoo.fuse`.
        compile: Whether to compile the model.
        batch_size: Images per batch on each rank; halved until it fits into memory.
        dataset: Kind of data, as in a recipe.
        test_split: Split; by default the first of ``validation``, ``val`` and ``test``, or the folder itself if it
            contains the class folders.
        test_samples: Maximum number of images, evenly spaced.
        input_key: Column or file extension of the image.
        target_key: Column of the class.
        workers: Loader processes per rank.
    """

    test_set: str | None = None
    real_labels: str | os.PathLike[str] | None = None
    valid_labels: str | os.PathLike[str] | None = None
    class_map: str | os.PathLike[str] | None = None
    allow_class_mismatch: bool = False
    all_outputs: bool = False
    img_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    test_pool: bool = False
    amp: torch.dtype | None = None
    fuse: bool = False
    compile: bool = False
    batch_size: int = 256
    dataset: str = "folder"
    test_split: str | None = None
    test_samples: int | None = None
    input_key: str | None = None
    target_key: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        kind, _, name = self.dataset.partition("/")
        if kind not in DATASETS or bool(name) != (kind in NAMED_DATASETS):
            valid = ", ".join(f"{kind}/NAME" if kind in NAMED_DATASETS else kind for kind in DATASETS)
            raise EvaluationError(f"dataset: received {self.dataset!r}; valid: {valid}")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and not (len(values) == 3 and all(0 <= value <= 1 for value in values)):
                raise EvaluationError(f"`{key}`: received {_shown(tuple(values))}; valid: three numbers from 0 to 1")
        if self.std is not None and 0 in self.std:
            raise EvaluationError(f"`std`: received {_shown(tuple(self.std))}; valid: numbers above 0")
        for key in ("img_size", "crop_pct", "test_samples", "batch_size"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise EvaluationError(f"`{key}`: received {value}; valid: a number above 0")
        for key, choices in (("crop_mode", _CROP_MODES), ("interpolation", _FILTERS)):
            choice = getattr(self, key)
            if choice is not None and choice not in choices:
                raise EvaluationError(f"`{key}`: received {choice!r}; valid: {', '.join(choices)}")

    @property
    def settings(self) -> str | None:
        """Changes to the model's preprocessing, the image limit and other choices, in the format of results files."""
        names = "img_size crop_pct crop_mode interpolation mean std test_pool test_samples all_outputs"
        names += " allow_class_mismatch"
        given = {name: getattr(self, name) for name in names.split()}
        files = {name: getattr(self, name) for name in ("real_labels", "valid_labels", "class_map")}
        given |= {name: None if path is None else Path(path).name for name, path in files.items()}
        shown = {name: value for name, value in given.items() if value is not None and value is not False}
        return " ".join(f"{name}={_shown(value)}" for name, value in shown.items()) or None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model's evaluation.

    Attributes:
        accuracy: Measured accuracy.
        row: Row for a results file.
        images: Result of each image, on rank 0 only; empty unless requested.
    """

    accuracy: Accuracy
    row: ResultRow
    images: tuple[ImageRow, ...] = ()


def evaluate(
    model: Model,
    data_dir: str | os.PathLike[str],
    *,
    ranks: Ranks | None = None,
    results: str | os.PathLike[str] | None = None,
    details: str | os.PathLike[str] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Accuracy:
    """Measure a model's accuracy on held-out images, with the preprocessing in the model's configuration.

    Args:
        model: A timm model, which is moved to the device of `ranks`; a name with tag, such as
            ``resnet50_ubn.bn_a1_in1k``; the folder of a run; a checkpoint with its ``config.json``; or a `Subject`.
        data_dir: Folder of the data.
        ranks: This process; by default a single process on the CPU.
        results: Results file, ``.csv`` or ``.json``, to add a row to.
        details: Folder for predictions, the table of classes and the confusion matrix.
        on_batch: Called after every batch with the number of images done and, if known, the total.
        **options: Fields of `EvalOptions`, such as ``img_size``, ``test_set`` or ``batch_size``.

    Returns:
        The accuracy, equal on every rank.

    Raises:
        EvaluationError: The model cannot be loaded, or the images do not match it.
        ClassMismatchError: The data has classes that the model does not name, or the model has no names.
        DataError: The images cannot be used.
    """
    if results is not None and Path(results).is_file():
        read_results(results)  # fail before the evaluation, not after it
    evaluation = _evaluate(
        model, data_dir, EvalOptions(**options), ranks or Ranks(), details is not None, on_batch=on_batch
    )
    _keep(evaluation, ranks or Ranks(), results, details, _stem(evaluation.row))
    return evaluation.accuracy


def evaluate_many(
    models: Iterable[Model],
    data_dir: str | os.PathLike[str],
    *,
    ema: bool = False,
    ranks: Ranks | None = None,
    results: str | os.PathLike[str] | None = None,
    resume: bool = False,
    sort: str | None = None,
    details: str | os.PathLike[str] | None = None,
    command: str | None = None,
    on_start: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[ResultRow]:
    """Evaluate models in sequence; if a model fails, its row contains the error, and the next model is evaluated.

    Args:
        models: As for `evaluate`.
        data_dir: Folder of the data.
        ema: Whether to use the moving averages of runs.
        ranks: As for `evaluate`.
        results: Results file, written after every model. A row with the same `ResultRow.key` is replaced.
        resume: Whether to reuse rows of the results file that have no error and whose weights have not changed.
        sort: Column to sort the results file by, as `sort_results` does.
        details: As for `evaluate`.
        command: Command line to record in the rows.
        on_start: Called with the name of every model that is evaluated.
        on_note: Called with messages and, for every model, a description of its images and preprocessing.
        on_batch: As for `evaluate`.
        **options: Fields of `EvalOptions`.

    Yields:
        One row per model.

    Raises:
        EvaluationError: The options or the results file are not valid.
        DataError: There are no held-out images.
    """
    place, chosen = ranks or Ranks(), EvalOptions(**options)
    note = on_note or (lambda text: None)
    old = read_results(results) if results is not None and Path(results).is_file() else ()
    chosen = dataclasses.replace(chosen, test_split=chosen.test_split or held_out_split(data_dir, chosen.dataset))
    done = {row.key: row for row in old if row.error is None} if resume else {}
    stems: set[str] = set()
    for model in models:
        source = model if isinstance(model, (str, os.PathLike)) else load_subject(model).source
        asked = _asked(os.fspath(source), data_dir, chosen, place, ema=ema, command=command)
        row = done.get(asked.key)
        if row is not None and weights_hash(row.source, ema=ema) in (None, row.weights_sha256):
            note(f"{row.source}: already in {os.fspath(cast(str, results))}")
            yield row
            continue
        if on_start is not None:
            on_start(asked.source)
        try:
            found = _evaluate(
                model,
                data_dir,
                chosen,
                place,
                details is not None,
                ema=ema,
                command=command,
                note=note,
                on_batch=on_batch,
            )
            stem = _stem(found.row)
            while stem in stems:
                stem += "+"
            stems.add(stem)
            _keep(found, place, results, details, stem, sort)
            row = found.row
        except Exception as error:  # a model may fail in any way; evaluate the others
            kind = "" if isinstance(error, UbnZooError) else f"{type(error).__name__}: "
            row = dataclasses.replace(asked, error=" ".join(f"{kind}{error}".split())[:2000])
            if results is not None and place.first:
                add_result(results, row, sort=sort)
        yield row


def _asked(
    source: str, data_dir: str | os.PathLike[str], options: EvalOptions, ranks: Ranks, *, ema: bool, command: str | None
) -> ResultRow:
    """Fill in the part of a row that is known before the evaluation."""
    _, _, dataset = options.dataset.partition("/")
    return ResultRow(
        model=source,
        source=source,
        ema=ema and Path(source).is_dir(),
        test_set=options.test_set or dataset.rpartition("/")[2] or Path(data_dir).resolve().name,
        split=options.test_split,
        settings=options.settings,
        amp=None if options.amp is None else str(options.amp).removeprefix("torch."),
        fuse=options.fuse,
        compile=options.compile,
        batch_size=options.batch_size,
        ranks=ranks.count,
        torch=str(torch.__version__),
        timm=timm.__version__,
        ubn_zoo=__version__,
        hardware=device_name(ranks.device),
        threads=torch.get_num_threads(),
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit=source_commit(),
    )


def _evaluate(
    model: Model,
    data_dir: str | os.PathLike[str],
    options: EvalOptions,
    ranks: Ranks,
    keep_images: bool,
    *,
    ema: bool = False,
    command: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate one model, with smaller batches if memory runs out."""
    options = dataclasses.replace(options, test_split=options.test_split or held_out_split(data_dir, options.dataset))
    failure: Exception | None = None
    try:
        subject = _load(model, ema)
        feed = _feed(subject, options)
        network = _prepare(subject, feed, options, ranks)
    except Exception as error:
        failure = error
    agree_on(failure, ranks)
    while True:
        try:
            images, labels, outputs = _open(subject, feed, data_dir, options, ranks)
            note(_used(subject, feed, images, labels, len(outputs), options, data_dir))
            found, parts = _measure(network, images, feed, outputs, options, ranks, keep_images, on_batch)
            break
        except Exception as error:
            if options.batch_size == 1 or not is_out_of_memory(error):
                raise
            options = dataclasses.replace(options, batch_size=options.batch_size // 2)
        # Outside the handler, because the traceback would keep the tensors of the failed batch.
        gc.collect()
        if ranks.device.type != "cpu":
            torch.accelerator.memory.empty_cache()
        note(f"{subject.name}: out of memory; batch size reduced to {options.batch_size}")
    if not math.isfinite(found.loss):
        raise EvaluationError(f"{subject.name} gives NaN or infinity; check its weights, or turn off `amp`")
    asked = _asked(subject.source, data_dir, options, ranks, ema=subject.ema, command=command)
    return Evaluation(
        accuracy=found,
        row=_complete(asked, subject, feed, found, images.fingerprint, len(outputs)),
        images=_gathered(images, parts, labels, ranks) if keep_images else (),
    )


def _load(model: Model, ema: bool) -> Subject:
    if isinstance(model, (str, os.PathLike)) and Path(model).is_dir() and not timm.is_model(os.fspath(model)):
        return load_subject(run=model, ema=ema)
    return load_subject(model)


def _feed(subject: Subject, options: EvalOptions) -> Feed:
    names = "img_size crop_pct crop_mode interpolation mean std dataset test_split test_samples input_key target_key"
    return feed_of(subject, workers=options.workers, **{name: getattr(options, name) for name in names.split()})


def _prepare(subject: Subject, feed: Feed, options: EvalOptions, ranks: Ranks) -> nn.Module:
    network = subject.model
    if options.test_pool:
        network = _with_test_pool(network, feed.img_size)
    network = network.to(ranks.device).to(memory_format=torch.channels_last)
    if options.fuse:
        network = fuse(network.eval())
    return cast(nn.Module, torch.compile(network)) if options.compile else network


@torch.inference_mode()
def _with_test_pool(model: Any, img_size: int) -> nn.Module:
    """Add timm's test-time pooling for images larger than in training: classify each window of the training size."""
    config = model.pretrained_cfg
    channels, height, width = config["input_size"]
    if img_size <= height or img_size <= width:
        return cast(nn.Module, model)
    pool = config.get("pool_size")
    if pool is None:
        pool = tuple(model.eval().forward_features(torch.zeros(1, channels, height, width)).shape[2:])
    return TestTimePoolHead(model, original_pool=pool)


def _open(
    subject: Subject, feed: Feed, data_dir: str | os.PathLike[str], options: EvalOptions, ranks: Ranks
) -> tuple[EvalBatches, ClassLabels, tuple[int, ...]]:
    """Open the images and find their class labels and the outputs to compare."""
    known = KNOWN_SETS.get(options.test_set or "")
    where = f"{os.fspath(data_dir)}, {feed.test_split}"
    files = {"class_map": options.class_map, "valid_labels": options.valid_labels}
    allowed = options.allow_class_mismatch
    labels = ClassLabels(subject, feed.num_classes, where, known=known, allow_class_mismatch=allowed, **files)
    outputs = tuple(range(feed.num_classes))
    failure: Exception | None = None
    try:
        if options.real_labels is not None and (known is None or not known.real):
            raise EvaluationError("`real_labels`: valid with `test_set` imagenet-real only")
        images = open_images(subject, feed, data_dir, ranks, batch_size=options.batch_size, labels=labels)
        if labels.labels and not options.all_outputs:
            outputs = labels.outputs
        if len(outputs) == 1 < feed.num_classes:
            raise EvaluationError(
                f"{where}: received images of one class, so any prediction is correct; valid: two classes or more, "
                "or `all_outputs`"
            )
    except Exception as error:
        failure = error
    agree_on(failure, ranks)
    if known is not None and known.real:
        images = with_real_labels(images, labels, feed.num_classes, ranks, options.real_labels, outputs)
    return images, labels, outputs


def _measure(
    network: nn.Module,
    images: EvalBatches,
    feed: Feed,
    outputs: Sequence[int],
    options: EvalOptions,
    ranks: Ranks,
    keep_images: bool,
    on_batch: Callable[[int, int], None] | None,
) -> tuple[Accuracy, list[ImageResults]]:
    total = images.images
    parts: list[ImageResults] = []

    def show(done: int) -> None:
        if on_batch is not None and total is not None:
            on_batch(min(done * ranks.count, total), total)

    found = measure(
        network,
        images,
        ranks,
        amp=options.amp,
        outputs=None if len(outputs) == feed.num_classes else outputs,
        on_batch=show,
        on_results=parts.append if keep_images else None,
    )
    return found, parts


def _used(
    subject: Subject,
    feed: Feed,
    images: EvalBatches,
    labels: ClassLabels,
    outputs: int,
    options: EvalOptions,
    data_dir: str | os.PathLike[str],
) -> str:
    """Describe the images and settings of an evaluation in one line."""
    count = "" if images.images is None else f"{images.images} images of "
    changed = f", changed by {options.settings}" if options.settings else ""
    return (
        f"{subject.name}: {count}{os.fspath(data_dir)}, {feed.test_split}; classes {labels.rule}, {outputs} of "
        f"{feed.num_classes} outputs; {feed.img_size} pixels, crop_pct {feed.crop_pct:g} {feed.crop_mode}, "
        f"{feed.interpolation}, mean {_shown(feed.mean)}, std {_shown(feed.std)}, from {subject.preprocessing}{changed}"
    )


def _shown(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) if isinstance(value, (tuple, list)) else str(value)


def _complete(
    asked: ResultRow, subject: Subject, feed: Feed, found: Accuracy, data_sha256: str, outputs: int
) -> ResultRow:
    """Complete a row with the measured results."""
    low, high = wilson(found.top1, found.images)
    figures: dict[str, float | None] = {
        "top1": found.top1,
        "top1_err": 100 - found.top1,
        "calibration_error": found.calibration_error,
        "top1_low": low,
        "top1_high": high,
    }
    if found.top5 is not None:
        low, high = wilson(found.top5, found.images)
        figures |= {"top5": found.top5, "top5_err": 100 - found.top5, "top5_low": low, "top5_high": high}
    rounded: dict[str, Any] = {name: None if value is None else round(value, 4) for name, value in figures.items()}
    return dataclasses.replace(
        asked,
        **rounded,
        model=subject.name,
        img_size=feed.img_size,
        param_count=round(sum(parameter.numel() for parameter in subject.model.parameters()) / 1e6, 2),
        crop_pct=feed.crop_pct,
        interpolation=feed.interpolation,
        crop_mode=feed.crop_mode,
        norm=norm_of(subject.model),
        images=found.images,
        classes=outputs,
        loss=round(found.loss, 6),
        weights_sha256=subject.sha256,
        data_sha256=data_sha256,
    )


def _gathered(
    images: EvalBatches, parts: list[ImageResults], labels: ClassLabels, ranks: Ranks
) -> tuple[ImageRow, ...]:
    """Gather the results of all ranks' images in order on rank 0."""
    if not images.files and ranks.count > 1:
        raise EvaluationError(f"`details`: received {ranks.count} processes for a stream; valid: one")
    found = ranks.gather(image_rows(images.files, parts, labels.names))
    return tuple(row for rows in found for row in rows) if ranks.first else ()


def _stem(row: ResultRow) -> str:
    """Prefix of the names of a model's files."""
    source = Path(row.source)
    name = source.parent.name if source.name in ("model.safetensors", "model_ema.safetensors") else source.name
    parts = [name, "ema" if row.ema else "", row.test_set, *(row.settings or "").split()]
    return re.sub(r"[^\w.=-]+", "_", "-".join(part for part in parts if part))


def _keep(
    found: Evaluation,
    ranks: Ranks,
    results: str | os.PathLike[str] | None,
    details: str | os.PathLike[str] | None,
    stem: str,
    sort: str | None = None,
) -> None:
    if not ranks.first:
        return
    if details is not None:
        write_details(details, stem, found.images)
    if results is not None:
        add_result(results, found.row, sort=sort)
