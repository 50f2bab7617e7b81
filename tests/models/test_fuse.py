"""Every architecture of the zoo fuses, and computes the same function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ubn_zoo
from tests.layers.common import randomize, ubn_layers
from ubn_zoo.layers.fusion import InferenceNorm2d

from .common import KINDS, everyday, images, input_size
from .test_models import FEASIBLE, WAYS, build

NAMES = everyday(KINDS, [name for name in FEASIBLE if name.startswith(("resnet", "regnet", "mobilenet"))])
# Architectures with norms that do not follow a convolution but precede one, or follow a sum or pooling.
UNFED = ("mobilenetv4_hybrid", "regnetv", "resnet50_mlp", "resnetv2")


@torch.no_grad()
def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Set a model's running statistics from a batch, and put it into evaluation mode."""
    for layer in ubn_layers(model):
        layer.momentum = None
        layer.reset_running_stats()
    model.train()(x)
    for layer in ubn_layers(model):
        # The last feature maps have so few pixels that some variances are almost 0. Dividing by their square roots in
        # layer after layer would amplify a rounding error of 1e-16 to 1e-6.
        layer.running_var.clamp_(min=0.1 * layer.running_var.mean().item())
    return model.eval()


def trained(name: str, **kwargs: object) -> nn.Module:
    """A model in evaluation mode, with random parameters and running statistics from data."""
    model = randomize(build(name, **kwargs))
    for layer in ubn_layers(model):
        # Stay close to the initial values: a chain of hundreds of random kernels amplifies any rounding error.
        middle = layer.weight[:, 0, layer.kernel_size // 2, layer.kernel_size // 2]
        with torch.no_grad():
            middle.sub_(1)
            layer.weight.mul_(0.2)
            middle.add_(1)
    return with_statistics(model, images(2, kwargs.get("in_chans", 3), *input_size(name, 64)[1:]))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Compare in float64, relative to the largest value.

    Float32 would test the models instead of the folding: with random parameters, some models amplify a rounding error
    of 6e-8 to 2e-2, whether folded or not.
    """
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def left(model: nn.Module) -> int:
    return sum(isinstance(module, InferenceNorm2d) for module in model.modules())


def unfolded(model: nn.Module) -> int:
    return sum(isinstance(module, InferenceNorm2d) and not module.overwrite for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_trained(name: str) -> None:
    """With nonconstant calibrations, part of each norm remains; its scale is folded if it follows a convolution."""
    model = trained(name).double()
    count = len(ubn_layers(model))
    result = ubn_zoo.fuse(model)
    assert not ubn_layers(result)
    assert left(result) == count
    assert (unfolded(result) > 0) == name.startswith(UNFED)
    x = images(2, *input_size(name, 64)).double()
    with torch.inference_mode():
        assert_equal(result(x), model(x))
        ways = [m.forward_intermediates(x[:1], intermediates_only=True) for m in (result, model)]
    for actual, expected in zip(*ways, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_converted(name: str) -> None:
    """With constant calibrations, as loaded from BatchNorm, norms that follow a convolution are folded completely."""
    model = build(name).eval()
    for seed, layer in enumerate(ubn_layers(model)):
        torch.manual_seed(seed)
        layer.set_affine(0.5 + torch.rand(layer.num_features), 0.2 * torch.randn(layer.num_features))
    x = images(2, *input_size(name, 64))
    model = with_statistics(model, x).double()
    result = ubn_zoo.fuse(model)
    assert not ubn_layers(result)
    assert left(result) == unfolded(result)
    assert (left(result) > 0) == name.startswith(UNFED)
    with torch.inference_mode():
        assert_equal(result(x.double()), model(x.double()))


@pytest.mark.parametrize(("name", "feature_cls"), WAYS)
def test_features(name: str, feature_cls: str | None) -> None:
    if name.startswith("mobilenet") and feature_cls in ("list", "dict"):
        pytest.skip("timm itself cannot rewrite these as lists")
    arguments = {"features_only": True, "out_indices": (1, 3), **({"feature_cls": feature_cls} if feature_cls else {})}
    model = trained(f"{name}_ubn", **arguments).double()
    result = ubn_zoo.fuse(model)
    assert not ubn_layers(result)
    x = images(1, 3, 64, 64).double()
    with torch.inference_mode():
        found, expected = result(x), model(x)
    assert type(found) is type(expected)
    assert result.feature_info.get_dicts() == model.feature_info.get_dicts()
    if isinstance(found, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal(actual, wanted)


@pytest.mark.parametrize(
    "arguments",
    [{"in_chans": 1}, {"num_classes": 0}, {"output_stride": 16}, {"ubn_kwargs": {"kernel_size": 5}}],
    ids=str,
)
def test_arguments(arguments: dict) -> None:
    model = trained("resnet18_ubn", **arguments).double()
    x = images(1, arguments.get("in_chans", 3), 64, 64).double()
    with torch.inference_mode():
        assert_equal(ubn_zoo.fuse(model)(x), model(x))


def test_size() -> None:
    """A fused model has the parameters of the BatchNorm sibling without norms, plus one bias per convolution."""
    model = build("resnet50_ubn").eval()
    norms = [parameter for layer in ubn_layers(model) for parameter in layer.parameters()]
    biases = sum(layer.num_features for layer in ubn_layers(model))
    count = sum(parameter.numel() for parameter in model.parameters()) - sum(parameter.numel() for parameter in norms)
    result = ubn_zoo.fuse(model)
    assert sum(tensor.numel() for tensor in result.state_dict().values()) == count + biases
