"""A small trained run, and a local Hub that asks for a token."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import types
from pathlib import Path

import huggingface_hub.utils._http as client_http
import pytest
import timm
import torch
from torch import nn

from tests.hub_server import HubServer
from tests.release.common import (
    NAME,
    PICTURE,
    SIBLING,
    START,
    TOKEN,
    rows,
)
from ubn_zoo.evaluation.metrics import write_metrics
from ubn_zoo.hub import manifest, retry
from ubn_zoo.recipes.schema import Recipe, dump_recipe, load_recipe
from ubn_zoo.training.build import complete
from ubn_zoo.training.run import save_weights


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0.3")
    # huggingface_hub's own retries pause for seconds.
    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(client_http, "time", impatient)


@pytest.fixture(autouse=True)
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    small = {"model": SIBLING, "epochs": 2, "warmup_epochs": 0.0, "img_size": 32, "num_classes": 10}
    return complete(dataclasses.replace(load_recipe("cifar10_small"), **small))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A UBN model whose calibrations are not the initial ones."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("center_weight", "scale_weight", "running_mean")):
                tensor.copy_(0.1 * torch.randn(tensor.shape))
    return model.eval()


@pytest.fixture(scope="module")
def pristine(trained: nn.Module, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "training.png").write_bytes(PICTURE)
    write_metrics(folder / "metrics.csv", rows(recipe))
    (folder / "environment.json").write_text(json.dumps({"starts": [START]}))
    save_weights(trained, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.fixture
def manifest_path(tmp_path: Path) -> Path:
    path = tmp_path / "weights_manifest.json"
    manifest.dump_manifest([], path)
    return path
