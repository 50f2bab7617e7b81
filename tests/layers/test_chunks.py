"""On a CPU the layer processes a batch in chunks of samples; the result must not depend on their size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ubn_zoo.layers import autograd

from .common import OPEN, SHUT, assert_step, make_layer, random_input

F32 = torch.float32
SETTINGS = [
    {},
    {"kernel_size": 1},
    {"kernel_size": 5},
    {"affine": False},
    {"center_calibration": False},
    {"scale_calibration": False},
    {"threshold": None},
]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def every_other(x: Tensor) -> Tensor:
    """The same numbers with gaps between the samples."""
    return x.repeat_interleave(2, 0)[::2]


def every_other_channels_last(x: Tensor) -> Tensor:
    return channels_last(x.repeat_interleave(2, 0))[::2]


LAYOUTS = [contiguous, channels_last, every_other, every_other_channels_last]
by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def chunks_of(samples: int, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    share = samples * x[0].numel() * x.element_size() / torch.get_num_threads()
    monkeypatch.setattr(autograd, "_CHUNK", math.ceil(share))
    sizes = [len(range(*chunk.indices(x.shape[0]))) for chunk in autograd.chunks(x)]
    assert max(sizes) <= samples
    assert sum(sizes) == x.shape[0]
    assert len(sizes) == -(-x.shape[0] // samples)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("gate", [OPEN, SHUT])
@by_layout
def test_step(layout, gate: float, samples: int, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(5, gate=gate, dtype=torch.float64, **settings)
    x, grad_y = random_input((7, 5, 6, 4))
    chunks_of(samples, x, monkeypatch)
    assert_step(layer, layout(x), layout(grad_y))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@by_layout
def test_precisions(layout, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(5, dtype=dtype)
    x, grad_y = random_input((7, 5, 6, 4), dtype=dtype)
    chunks_of(2, x, monkeypatch)
    assert_step(layer, layout(x), layout(grad_y))


def test_the_similarity_is_of_the_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 do not divide the 16 compared samples."""
    layer = make_layer(2, dtype=torch.float64)
    x, grad_y = random_input((20, 2, 3, 3))
    x[4] = 0  # no direction
    chunks_of(3, x, monkeypatch)
    assert_step(layer, x, grad_y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_arguments_are_not_overwritten(samples: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in SETTINGS:
        layer = make_layer(3, **settings).train(training)
        x, grad_y = random_input((3, 3, 5, 4), dtype=F32)
        before = x.clone(), grad_y.clone()
        monkeypatch.setattr(autograd, "_CHUNK", samples * x[0].numel() * x.element_size() // torch.get_num_threads())
        x.requires_grad_()
        layer(x).backward(grad_y)
        with torch.no_grad():
            layer(x)
        assert torch.equal(x, before[0])
        assert torch.equal(grad_y, before[1])
