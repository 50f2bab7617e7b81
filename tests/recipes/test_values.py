"""Every value that a recipe lists as valid trains: `pytest -m exhaustive tests/recipes/test_values.py`, a minute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.images import write_image_folder
from ubn_zoo.layers import VARIANTS
from ubn_zoo.recipes.recipe import OPTIMIZERS
from ubn_zoo.recipes.schema import Recipe, apply_settings, load_recipe
from ubn_zoo.training.build import build_optimizer
from ubn_zoo.training.run import run

SMALL = ("img_size=32", "epochs=1", "batch_size=4", "train_samples=4", "test_samples=2", "threads=1", "device=cpu")
VALUES: list[list[str]] = [
    *([f"norm={norm}"] for norm in VARIANTS),
    *([f"interpolation={name}"] for name in ("bilinear", "bicubic")),
    *([f"train_interpolation={name}"] for name in ("bilinear", "bicubic", "random")),
    *([f"crop={name}"] for name in ("rrc", "rkrc", "rkrr")),
    *(["random_erasing=0.9", f"erasing_mode={name}"] for name in ("const", "rand", "pixel")),
    *([f"auto_augment={name}"] for name in ("original", "originalr", "v0", "v0r", "3a", "rand-m7-mstd0.5-inc1")),
    *([f"scheduler={name}", "decay_milestones=[0.5]"] for name in ("cosine", "step", "multistep", "poly", "constant")),
    ["loss=bce", "bce_threshold=0.2", "mixup=0.2", "cutmix=1.0"],
    *(["clip_grad=1.0", f"clip_mode={name}"] for name in ("norm", "value", "agc")),
    *([f"amp={name}"] for name in ("bfloat16", "null")),
    ["norm_eps=1e-3", "norm_momentum=0.01", "kernel_init=kaiming", "norm_decay=true", "sync_norm=true"],
    ["grad_checkpointing=true", "channels_last=false", "ema_decay=0.9", "ema_warmup=false", "warmup_prefix=true"],
    *([f"keep_best={name}", "ema_decay=0.9"] for name in ("top1", "loss", "ema_top1", "ema_calibration_error")),
    ["exif_rotation=false", "repeats=2", "accumulation=2", "mixup=0.2", "layer_decay=0.75", "log_interval=1"],
]


def small(settings: list[str]) -> Recipe:
    return apply_settings(load_recipe("smoke"), [*SMALL, *settings])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"), train=8, test=4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", VALUES, ids=" ".join)
def test_choices_train(settings: list[str], images: Path, tmp_path: Path) -> None:
    done = run(small(settings), images, tmp_path / "run")
    assert done.finished
    assert math.isfinite(done.metrics[-1].train_loss)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_optimizers_step(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    betas = "[0.98, 0.92, 0.99]" if "adan" in name else "[0.9, 0.99]"
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer: Any = build_optimizer(small([f"optimizer={name}", f"betas={betas}"]), model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
