"""Training from scratch on channels that are constant over the batch, as in blank corners of images.

A residual branch starts at zero. If its shortcut is constant over the batch, it normalizes to exactly 0, and a ReLU at
exactly 0 passes no gradient: the whole model could never learn.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ubn_zoo
from ubn_zoo.layers import convert_state_dict

from .common import ubn_layers

MODELS = ["resnet18", "resnet26", "resnet10t", "regnetx_002", "regnety_002", "mobilenetv2_050", "mobilenetv3_small_050"]


def blank_corners(size: int, samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((samples, 3, size, size), -1.0)
    middle = slice(3 * size // 8, 5 * size // 8 + 1)
    images[:, :, middle, middle] = torch.randn(images[:, :, middle, middle].shape, generator=generator)
    return images


def train(model: nn.Module, images: Tensor, steps: int, dtype: torch.dtype | None = None) -> set[str]:
    """Names of the parameters that never received a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    asleep = {name for name, _ in model.named_parameters()}
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = model(images)
        optimizer.zero_grad()
        (F.cross_entropy(logits.float(), torch.arange(len(images))) * (1 if dtype is None else 1024)).backward()
        asleep -= {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    return asleep


@pytest.mark.parametrize(("name", "size"), [*((name, 32) for name in MODELS), ("resnet18", 64), ("regnetx_002", 48)])
def test_every_parameter_receives_a_gradient(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(f"{name}_ubn", num_classes=10).train()
    assert not train(model, blank_corners(size), 5)


@pytest.mark.parametrize("kernel_init", ["identity", "kaiming"])
def test_kernels_of_both_starts(kernel_init: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("regnetx_002_ubn", num_classes=10, ubn_kwargs={"kernel_init": kernel_init}).train()
    assert not train(model, blank_corners(32), 5)


def test_half_precision() -> None:
    """The offset survives float16, whose smallest number is 6e-8."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18_ubn", num_classes=10).train()
    train(model, blank_corners(32), 1, torch.float16)
    assert model.conv1.weight.grad.any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_digits_are_learned(seed: int) -> None:
    """Blank corners of real images at batch 4, where the loss would stay at log(10)."""
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    digits = sklearn_datasets.load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, size=(32, 32))
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = timm.create_model("regnetx_002_ubn", num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(120):
        chosen = torch.randint(len(images), (4,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-30:]) / 30 < 1.9


def zero_initialized() -> nn.BatchNorm2d:
    batchnorm = nn.BatchNorm2d(4)
    with torch.no_grad():
        batchnorm.weight[:2] = 0
        batchnorm.bias[1] = 0.5
    return batchnorm


def test_offset_of_fresh_channels_alone() -> None:
    layer = ubn_zoo.convert_batchnorm(zero_initialized())
    gain = layer.bias[1].item() / 0.5
    assert 0 < layer.bias[0].item() < 1e-6
    assert layer.bias[1:].tolist() == pytest.approx([0.5 * gain, 0, 0])
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer.eval()(x), zero_initialized().eval()(x), rtol=1e-6, atol=3e-7)


def test_trained_batchnorms_convert_exactly() -> None:
    """A channel that training has left at zero stays there."""
    batchnorm = zero_initialized()
    batchnorm(torch.randn(2, 4, 3, 3))
    layer = ubn_zoo.convert_batchnorm(copy.deepcopy(batchnorm))
    assert layer.bias[0].item() == 0
    # So does one that is read from BatchNorm's state dict.
    fresh = ubn_zoo.convert_batchnorm(zero_initialized())
    fresh.load_state_dict(convert_state_dict(batchnorm.state_dict(), fresh))
    assert fresh.bias[0].item() == 0


def test_conversion_without_values() -> None:
    with torch.device("meta"):
        model = ubn_zoo.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)))
    assert all(layer.running_mean.is_meta for layer in ubn_layers(model))
