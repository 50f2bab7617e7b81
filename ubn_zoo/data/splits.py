"""Splits of a dataset: where each one is, and which one is held out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path

from ubn_zoo.errors import DataError

__all__ = ["HELD_OUT_SPLITS", "find_eval_split", "hub_name", "require_package", "split_location"]

# In order of preference: test images should not guide training if the data has other held-out images.
HELD_OUT_SPLITS = ("validation", "val", "test")
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}


def find_eval_split(data_dir: str | os.PathLike[str], dataset: str = "folder") -> str:
    """Find the held-out split: the first of ``validation``, ``val`` and ``test`` that the data has.

    Args:
        data_dir: Folder or URL of the data.
        dataset: Kind of data, as in a recipe.

    Raises:
        DataError: The data has none of these splits, or a required package is missing.
    """
    where, root = os.fspath(data_dir), Path(data_dir)
    kind, _, name = dataset.partition("/")
    if kind in ("hfds", "hfids"):
        there = _hub_splits(kind, name, root)
    elif kind == "wds":
        there = _shard_splits(where)
    else:
        there = [split for split in HELD_OUT_SPLITS if split_location(root, split)]
    for split in HELD_OUT_SPLITS:
        if split in there:
            return split
    raise DataError(f"{where} has none of {', '.join(HELD_OUT_SPLITS)}; it needs one of them, or set test_split")


def split_location(root: Path, split: str) -> Path | None:
    """Folder or tar file of a split; None if neither exists."""
    return next((path for path in (root / split, root / f"{split}.tar") if path.exists()), None)


def require_package(kind: str) -> None:
    """Check that the package that reads a kind of data is installed.

    Raises:
        DataError: The package is not installed.
    """
    package = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"dataset {kind} needs the package {package}: pip install 'ubn-zoo[stream]'")


def hub_name(name: str, root: Path) -> tuple[str, str | None]:
    """Name or local folder to load with `datasets`, and the cache folder for a name."""
    local = root / name
    return (str(local), None) if local.exists() else (name, str(root))


def _hub_splits(kind: str, name: str, root: Path) -> list[str]:
    require_package(kind)
    import datasets

    place, cache = hub_name(name, root)
    try:
        return [str(split) for split in datasets.get_dataset_split_names(place, cache_dir=cache)]
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"dataset {place}: {error}") from error


def _shard_splits(where: str) -> list[str]:
    require_package("wds")
    webdataset = importlib.import_module("webdataset")
    for name in ("_info.json", "info.json"):
        try:
            with webdataset.gopen(f"{where}/{name}") as file:
                return list(json.load(file)["splits"])
        except (OSError, ValueError, KeyError):
            continue
    return []
