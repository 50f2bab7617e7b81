"""One architecture of each family (all of them on request) computes the same as its sibling, and trains.

Every architecture, about an hour: ``python -m pytest tests/models/test_families.py -m exhaustive``
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ubn_zoo
from ubn_zoo import UnifiedBatchNorm2d
from ubn_zoo.models import FAMILIES

from .common import ALL, assert_same_function, everyday, images, input_size, sibling, smallest, trained

EVERYDAY = sorted({*(smallest(family.module) for family in FAMILIES), "efficientnet_b1_pruned_ubn", "repvgg_a0_ubn"})
# These take a second or more each and are built like others.
COSTLY = {"halonet_h1_ubn", "inception_resnet_v2_ubn", "inception_v4_ubn", "vgg11_bn_ubn"}


@pytest.mark.parametrize("name", everyday([name for name in EVERYDAY if name not in COSTLY], ALL))
def test_twins_compute_what_their_siblings_do_and_train(name: str) -> None:
    theirs = trained(sibling(name))
    model = timm.create_model(name).eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    swapped = [key for key, module in theirs.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [key for key, module in model.named_modules() if isinstance(module, UnifiedBatchNorm2d)] == swapped
    model.load_state_dict(theirs.state_dict())
    x = images(2, *input_size(name, 64))
    with torch.inference_mode():
        expected = theirs(x)
        assert_same_function(model(x), expected)
        assert_same_function(ubn_zoo.fuse(model)(x), expected)
    with pytest.raises(ubn_zoo.CheckpointError, match="1 missing"):
        model.load_state_dict(dict(list(theirs.state_dict().items())[1:]))

    model.train()
    first = next(module for module in model.modules() if isinstance(module, UnifiedBatchNorm2d))
    before = first.running_mean.clone()
    output = model(x)
    loss = sum(part.square().mean() for part in output) if isinstance(output, tuple) else output.square().mean()
    loss.backward()
    assert not torch.equal(first.running_mean, before)
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in first.parameters())
