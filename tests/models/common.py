"""Shared helpers of the model tests: representative models, and siblings with nontrivial weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ubn_zoo.models.registry import parameter_table

ALL = timm.list_models("*_ubn")


# The smallest model for each construction in timm's largest families: block, stem, attention, head.
BUILD_PATHS = [
    "mobilenet_edgetpu_v2_xs_ubn",
    "mobilenetv1_100_ubn",
    "mobilenetv2_035_ubn",
    "mobilenetv3_rw_ubn",
    "mobilenetv3_small_050_ubn",
    "mobilenetv4_conv_aa_medium_ubn",
    "mobilenetv4_conv_small_035_ubn",
    "mobilenetv4_hybrid_medium_075_ubn",
    "regnetv_040_ubn",
    "regnetx_002_ubn",
    "regnety_002_ubn",
    "regnetz_005_ubn",
    "regnetz_b16_ubn",
    "resnet10t_ubn",
    "resnet18_ubn",
    "resnet26d_ubn",
    "resnet32ts_ubn",
    "resnet33ts_ubn",
    "resnet50_clip_gap_ubn",
    "resnet50_clip_ubn",
    "resnet50_mlp_ubn",
    "resnet51q_ubn",
    "resnetaa34d_ubn",
    "resnetblur18_ubn",
    "resnetrs50_ubn",
    "resnetv2_18_ubn",
    "resnetv2_34d_ubn",
]
# Of these, one for each kind of norm layer (with an activation, a drop layer, none), of what feeds it (a convolution of
# timm's or torch's, a sum, a pooling) and of attention beside it: where numbers are compared in the ordinary run.
KINDS = [
    "mobilenetv2_035_ubn",
    "mobilenetv3_small_050_ubn",
    "mobilenetv4_conv_small_035_ubn",
    "mobilenetv4_hybrid_medium_075_ubn",
    "regnetx_002_ubn",
    "regnetz_005_ubn",
    "resnet10t_ubn",
    "resnet33ts_ubn",
    "resnetblur18_ubn",
    "resnetv2_18_ubn",
]
# Families whose blocks or stems do not support small images.
_LARGE = ("ubn_byoanet", "ubn_inception_resnet_v2", "ubn_inception_v3", "ubn_inception_v4")


EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]


def everyday(names: list[str], everything: list[str]) -> list[Any]:
    """Test parameters: some models in ordinary runs, the others with ``-m exhaustive``."""
    return [*names, *(pytest.param(name, marks=EXHAUSTIVE) for name in everything if name not in names)]


def outcome(function: Callable[[], Any]) -> Any:
    """The return value of a function or the class of its error: a twin may fail where its sibling fails in the same
    way."""
    try:
        return function()
    except Exception as error:
        return type(error)


def smallest(module: str) -> str:
    """The twin of a family with the fewest parameters."""
    counts = parameter_table()
    return min(timm.list_models(module=module), key=lambda name: max(counts[name].values()))


def sibling(name: str) -> str:
    return name.removesuffix("_ubn")


def input_size(name: str, side: int) -> tuple[int, int, int]:
    """A small input, or one of the model's size if that is fixed."""
    cfg = timm.get_pretrained_cfg(name)
    # A twin's module is named like its family.
    large = timm.model_entrypoint(f"{sibling(name)}_ubn").__module__.endswith(_LARGE)
    return tuple(cfg.input_size) if cfg.fixed_input_size or large else (3, side, side)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def trained(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A timm model in evaluation mode, with random norm weights and with running statistics from data.

    Random statistics do not work: deep models, especially with squeeze-excitation, would amplify rounding so much that
    even the same model gives different logits in float32 and float64.
    """
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(-0.2, 0.2)
        norm.momentum = 0.5
    with torch.no_grad():
        _, *size = input_size(name, 64)
        model.train()(torch.randn(2, kwargs.get("in_chans", 3), *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def content(model: nn.Module) -> bytes:
    return safetensors.torch.save(model.state_dict())


def assert_same_function(actual: Tensor, expected: Tensor) -> None:
    """Compare relative to the largest value, because activations near zero have no relative accuracy."""
    assert torch.isfinite(expected).all()
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * scale)
