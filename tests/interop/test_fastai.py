"""fastai: frozen groups, norms that train in them, weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.interop.common import images, moved, statistics, twin, ubn_layers
from ubn_zoo import interop

fastai = pytest.importorskip("fastai.vision.all")
pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with interop.install():
        yield


def learner(**settings: Any) -> Any:
    data = [(image, torch.tensor(index % 3)) for index, image in enumerate(images(8))]
    loaders = fastai.DataLoaders.from_dsets(data, data, bs=4, device="cpu", num_workers=0)
    model = nn.Sequential(twin(num_classes=0), nn.Linear(512, 3))
    split = lambda m: [fastai.params(m[0]), fastai.params(m[1])]  # noqa: E731 - as in fastai's documentation
    learn = fastai.Learner(loaders, model, nn.CrossEntropyLoss(), splitter=split, opt_func=fastai.SGD, **settings)
    learn.remove_cbs(fastai.ProgressCallback)
    learn.freeze()
    return learn


def test_norms_train_in_frozen_groups() -> None:
    learn = learner()
    layers = ubn_layers(learn.model)
    assert all(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    assert not learn.model[0].conv1[0].weight.requires_grad
    kernels = [layer.weight.detach().clone() for layer in layers]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert not any(torch.equal(a, layer.weight) for a, layer in zip(kernels, layers, strict=True))


def test_norms_are_not_decayed() -> None:
    learn = learner(wd_bn_bias=False)
    state = learn.opt.state
    assert all(state[p].get("do_wd") is False for layer in ubn_layers(learn.model) for p in layer.parameters())
    assert state[learn.model[1].weight].get("do_wd", True)


def test_frozen_norms_stop_with_bn_freeze() -> None:
    learn = learner(train_bn=False, cbs=fastai.BnFreeze)
    assert not any(p.requires_grad for layer in ubn_layers(learn.model) for p in layer.parameters())
    before = statistics(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert moved(before, learn.model) == 0
