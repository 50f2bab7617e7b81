"""The facts of a small trained run, and helpers that look into the local Hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import ubn_zoo
from tests.hub_server import HubServer
from tests.metrics import ROW
from ubn_zoo.evaluation.metrics import EpochMetrics
from ubn_zoo.hub import manifest
from ubn_zoo.recipes.schema import Recipe

SIBLING = "mobilenetv3_small_050"
NAME = f"{SIBLING}_ubn"
ID = f"{NAME}.cifar10"
REPO = "someone/small"
TOKEN = "hf_never_to_be_seen"
FACTS = {"tag": "cifar10", "license": "apache-2.0", "dataset": "CIFAR-10"}
OPTIONS = [part for name, value in FACTS.items() for part in (f"--{name}", value)]
COMMIT = "/commit/"
COMMAND = (
    "ubn-zoo train --recipe cifar10_small --data-dir DIR --output RUN "
    f"--set model={SIBLING} img_size=32 epochs=2 warmup_epochs=0.0"
)
PICTURE = b"\x89PNG\r\n\x1a\n and so on"
START = {
    "command": [
        "ubn-zoo",
        "train",
        "--recipe",
        "cifar10_small",
        "--data-dir",
        "/home/someone/cifar",
        "--output",
        "RUN",
    ],
    "ranks": 1,
    "threads": 1,
    "hardware": {"name": "cpu", "machine": "x86_64", "cpu": "AVX2", "cores": 2, "cuda": None},
    "versions": {"ubn_zoo": "0.1.0", "torch": "2.14.1", "timm": "1.0.31"},
    "base": None,
    "data": {"test_images": 10_000, "test_split": "test", "classes": [f"class {number}" for number in range(10)]},
}


def rows(recipe: Recipe, **changes: Any) -> list[EpochMetrics]:
    row = dataclasses.replace(
        ROW,
        model=recipe.model,
        norm=recipe.norm,
        seed=recipe.seed,
        step=390,
        lr=0.001,
        train_loss=1.5,
        test_loss=1.25,
        top1=61.5,
        calibration_error=3.5,
        seconds=10.0,
        step_ms=20.0,
        images_per_second=6400.0,
        similarity_min=0.1,
        similarity_mean=0.2,
        similarity_max=0.3,
        gates_open=1,
        gates=2,
        torch="2.6",
        commit="1" * 40,
    )
    return [row, dataclasses.replace(row, epoch=2, top1=62.25, **changes)]


def files_of(hub: HubServer, revision: str | None = None, repo_id: str = REPO) -> dict[str, bytes]:
    repository = hub.repositories[repo_id]
    return repository.commits[revision or repository.refs["main"]]


def commits(hub: HubServer) -> int:
    """Number of commits on top of the repository's first."""
    return len(hub.repositories[REPO].commits) - 1 if REPO in hub.repositories else 0


def records(manifest_path: Path) -> list[manifest.Record]:
    return list(manifest.load_manifest(manifest_path))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(ubn_zoo.__file__).parents[1])}
