"""BatchNorm, RBN, BNET and UBN as settings of one layer, and where each of them starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ubn_zoo
from research import benchmark
from ubn_zoo.layers import VARIANTS, variant_settings
from ubn_zoo.recipes.schema import NORMS

from .common import PARAMETERS, assert_step, make_layer, random_input, step
from .tolerances import OUTPUT

F64 = torch.float64

BATCHNORM = {
    "threshold": None,
    "center_calibration": False,
    "scale_calibration": False,
    "depthwise_affine": False,
}
RBN = {"threshold": None, "depthwise_affine": False}
BNET = {"threshold": None, "center_calibration": False, "scale_calibration": False}
SETTINGS = {"BN": BATCHNORM, "RBN": RBN, "BNET": BNET, "UBN": {}, "UBN without a gate": {"threshold": None}}
PRESENT = {
    "BN": {"weight", "bias"},
    "RBN": set(PARAMETERS),
    "BNET": {"weight", "bias"},
    "UBN": set(PARAMETERS),
    "UBN without a gate": set(PARAMETERS),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_switched_off_parts_have_no_parameters(name: str) -> None:
    layer = ubn_zoo.UnifiedBatchNorm2d(3, **SETTINGS[name])
    assert {key for key, _ in layer.named_parameters()} == PRESENT[name]
    for key in set(PARAMETERS) - PRESENT[name]:
        assert getattr(layer, key) is None


@pytest.mark.parametrize("affine", [True, False])
def test_no_affine_means_no_weight_and_bias(affine: bool) -> None:
    layer = ubn_zoo.UnifiedBatchNorm2d(3, affine=affine)
    assert (layer.weight is not None) == affine
    assert (layer.bias is not None) == affine


@pytest.mark.parametrize("name", ["BN", "RBN"])
def test_plain_affine_has_one_weight_per_channel(name: str) -> None:
    assert ubn_zoo.UnifiedBatchNorm2d(3, kernel_size=5, **SETTINGS[name]).weight.numel() == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_reference(name: str, training: bool) -> None:
    layer = make_layer(3, dtype=F64, **SETTINGS[name]).train(training)
    for seed in range(2):
        assert_step(layer, *random_input((4, 3, 5, 4), seed))


def batchnorm_like(layer: nn.Module) -> nn.BatchNorm2d:
    """A BatchNorm with the plain affine and the statistics of `layer`."""
    twin = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, affine=layer.affine, dtype=F64)
    twin.load_state_dict(
        {
            key: value.reshape(twin.state_dict()[key].shape)
            for key, value in layer.state_dict().items()
            if key in twin.state_dict()
        }
    )
    return twin.train(layer.training)


def assert_same_as_batchnorm(layer: nn.Module, twin: nn.BatchNorm2d, steps: int = 3) -> None:
    """Outputs, gradients of input and affine, and state, over several steps and in evaluation."""
    for seed in range(steps):
        x, grad_y = random_input((4, layer.num_features, 5, 4), seed, shared=0.0)
        y, grad_x = step(layer, x, grad_y)
        y_twin, grad_twin = step(twin, x, grad_y)
        torch.testing.assert_close(y, y_twin, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(grad_x, grad_twin, **OUTPUT[F64].kwargs())
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer, key), getattr(twin, key), **OUTPUT[F64].kwargs(), msg=key)
    x, grad_y = random_input((4, layer.num_features, 5, 4), steps)
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x), **OUTPUT[F64].kwargs())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_bn_setting_is_batchnorm(affine: bool, momentum: float | None) -> None:
    layer = make_layer(3, affine=affine, momentum=momentum, dtype=F64, **BATCHNORM)
    twin = batchnorm_like(layer)
    assert_same_as_batchnorm(layer, twin)
    if affine:
        for key in ("weight", "bias"):
            found = getattr(layer, key).grad
            torch.testing.assert_close(found.reshape(-1), getattr(twin, key).grad, **OUTPUT[F64].kwargs(), msg=key)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_identity_starts_as_batchnorm(name: str, kernel_size: int) -> None:
    """Until its parameters are trained, every setting is a fresh BatchNorm while the gate is open."""
    layer = ubn_zoo.UnifiedBatchNorm2d(3, kernel_size=kernel_size, dtype=F64, **SETTINGS[name])
    assert_same_as_batchnorm(layer, nn.BatchNorm2d(3, dtype=F64))


def test_identity_is_the_default() -> None:
    ours, named = ubn_zoo.UnifiedBatchNorm2d(3), ubn_zoo.UnifiedBatchNorm2d(3, kernel_init="identity")
    assert torch.equal(ours.weight, named.weight)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_identity_kernel_has_one_tap(kernel_size: int) -> None:
    weight = ubn_zoo.UnifiedBatchNorm2d(2, kernel_size=kernel_size, dtype=F64).weight.detach()
    expected = torch.zeros(2, 1, kernel_size, kernel_size, dtype=F64)
    # The calibration factor starts at sigmoid(1).
    expected[:, :, kernel_size // 2, kernel_size // 2] = 1.0 + math.exp(-1.0)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("channels", "kernel_size"), [(512, 3), (2048, 1), (300, 5)])
def test_kaiming_deviation(channels: int, kernel_size: int) -> None:
    """Fan-out of a depthwise kernel as PyTorch counts it is k * k * C, so the deviation is sqrt(2 / (k * k * C))."""
    torch.manual_seed(0)
    layer = ubn_zoo.UnifiedBatchNorm2d(channels, kernel_size=kernel_size, kernel_init="kaiming")
    expected = math.sqrt(2.0 / (kernel_size**2 * channels))
    # The relative error of a deviation estimated from n values is about 1 / sqrt(2 n).
    slack = 5.0 / math.sqrt(2.0 * layer.weight.numel())
    assert layer.weight.std().item() == pytest.approx(expected, rel=slack)
    assert abs(layer.weight.mean().item()) < 5.0 * expected / math.sqrt(layer.weight.numel())
    assert torch.equal(layer.bias, torch.zeros(channels))
    assert torch.equal(layer.scale_bias, torch.ones(channels))


def test_kaiming_follows_the_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return ubn_zoo.UnifiedBatchNorm2d(4, kernel_init="kaiming").weight

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_named_variants() -> None:
    assert {name: dict(variant.settings) for name, variant in VARIANTS.items()} == {
        "ubn": {},
        "bn": BATCHNORM,
        "rbn": RBN,
        "bnet": BNET,
    }
    assert [name for name, variant in VARIANTS.items() if variant.plain] == ["bn"]
    assert [name for name, variant in VARIANTS.items() if not variant.depthwise] == ["bn", "rbn"]
    assert [name for name, variant in VARIANTS.items() if not variant.calibrated] == ["bn", "bnet"]


def test_variants_are_the_choices_everywhere() -> None:
    assert tuple(VARIANTS) == NORMS
    assert set(benchmark.KINDS) == {*VARIANTS, "naive"}


def test_variant_settings_of_a_layer() -> None:
    free = {"threshold": 0.3, "kernel_size": 5, "kernel_init": "kaiming"}
    assert variant_settings("ubn", **free) == free
    assert variant_settings("bnet", **free) == {**free, **BNET}
    assert variant_settings("rbn", **free) == RBN
    with pytest.raises(ValueError, match="variant: received 'gn'; valid: ubn, bn, rbn, bnet"):
        variant_settings("gn")
