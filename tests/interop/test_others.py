"""Optimizers, differential privacy, segmentation models and detectors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm.optim
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from tests.interop.common import TWIN, images, moved, statistics, twin, ubn_layers
from ubn_zoo import UnifiedBatchNorm2d, UnifiedBatchNormAct2d, convert_batchnorm, interop

pytestmark = pytest.mark.interop


@pytest.fixture
def installed() -> Iterator[None]:
    with interop.install():
        yield


def test_muon_of_timm_leaves_depthwise_kernels_to_adamw() -> None:
    model = twin()
    optimizer = timm.optim.create_optimizer_v2(model, "muon", lr=0.01, weight_decay=0.05)
    model(images()).square().sum().backward()
    optimizer.step()
    kernels = [layer.weight for layer in ubn_layers(model)]
    assert kernels and not any(optimizer.state[kernel]["use_muon"] for kernel in kernels)
    assert optimizer.state[model.layer1[0].conv1.weight]["use_muon"]


def test_muon_by_hand_uses_the_groups() -> None:
    model = twin()
    without, decayed = interop.weight_decay_groups(model, 0.05)
    groups = [{**without, "use_muon": False}, {**decayed, "use_muon": True}]
    optimizer = timm.optim.Muon(groups, lr=0.01)
    model(images()).square().sum().backward()
    optimizer.step()
    assert not any(optimizer.state[p]["use_muon"] for layer in ubn_layers(model) for p in layer.parameters())


def test_opacus_refuses_and_replaces(installed: None) -> None:
    validators = pytest.importorskip("opacus.validators")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), UnifiedBatchNorm2d(8), UnifiedBatchNormAct2d(8))
    errors = validators.ModuleValidator.validate(model, strict=False)
    assert len(errors) == 2 and all("UBN mixes the samples" in str(error) for error in errors)
    fixed = validators.ModuleValidator.fix(model)
    assert isinstance(fixed[1], nn.GroupNorm) and [type(m) for m in fixed[2]] == [nn.GroupNorm, nn.Identity, nn.ReLU]
    assert not validators.ModuleValidator.validate(fixed, strict=False)


@pytest.mark.parametrize("name", ["Unet", "DeepLabV3Plus"])
def test_segmentation_models(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    # A twin as the encoder, and UBN in the decoder.
    model = getattr(smp, name)(f"tu-{TWIN}", encoder_weights=None, classes=2)
    encoder = len(ubn_layers(model))
    assert encoder
    convert_batchnorm(model)
    assert len(ubn_layers(model)) > encoder
    before = statistics(model)
    optimizer = torch.optim.SGD(interop.weight_decay_groups(model, 0.01), lr=0.01)
    model.train()(images()).square().mean().backward()
    optimizer.step()
    assert moved(before, model) > 0
    assert model.eval()(images(1)).shape == (1, 2, 64, 64)
    interop.update_statistics([images()], model)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_detectors(name: str) -> None:
    build = getattr(torchvision.models.detection, name)
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    assert frozen is FrozenBatchNorm2d
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    # Without weights torchvision builds plain BatchNorm.
    model.backbone.body = torchvision.models._utils.IntermediateLayerGetter(
        torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d),
        {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"},
    )
    if name.startswith("retinanet"):
        model.backbone.body.return_layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    convert_batchnorm(model, include="backbone.body")
    layers = ubn_layers(model)
    assert len(layers) == 53 and all(layer.frozen for layer in layers)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    if name.startswith("mask"):
        target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    before = statistics(model.backbone)
    losses = model.train()(list(images(2)), [target, target])
    sum(losses.values()).backward()
    assert moved(before, model.backbone) == 0
    interop.unfreeze(model.backbone.body)
    model(list(images(2)), [target, target])
    assert moved(before, model.backbone) > 0
