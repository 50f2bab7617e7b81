"""Batches that overflow: a training step with non-finite statistics changes no state, in every implementation.

Float16 training with loss scaling skips such a step. Its output may be anything, but the layer's state must be the same
as without the step.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ubn_zoo.layers.recompute import Records

from .common import OPEN, PATHS, SHUT, gradients, make_layer, random_input, snapshot, step

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
VALUES = [float("inf"), float("-inf"), float("nan")]
SETTINGS = [{}, {"momentum": None}, {"threshold": None}, {"similarity_momentum": 1.0, "momentum": 0.9}]

both_gates = pytest.mark.parametrize("gate", [OPEN, SHUT], ids=["open", "shut"])


def spoil(x: Tensor, value: float, sample: int = 1) -> Tensor:
    spoiled = x.clone()
    spoiled[sample, 1, 2, 0] = value
    return spoiled


def assert_unmoved(layer: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in snapshot(layer).items():
        assert torch.equal(value, before[name]), name


def assert_same_steps(layer: nn.Module, twin: nn.Module, dtype: torch.dtype) -> None:
    """Compares finite steps of two layers bitwise."""
    for seed in range(2):
        x, grad_y = random_input((4, 3, 5, 4), 10 + seed, dtype)
        for found, expected in zip(step(layer, x, grad_y), step(twin, x, grad_y), strict=True):
            assert torch.isfinite(found).all()
            assert torch.equal(found, expected)
        assert_unmoved(layer, snapshot(twin))
        expected_grads = gradients(twin)
        assert all(torch.equal(grad, expected_grads[name]) for name, grad in gradients(layer).items())


@pytest.mark.parametrize("cls", PATHS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("value", VALUES)
@both_gates
def test_nothing_moves(gate: float, value: float, dtype: torch.dtype, cls: type[nn.Module]) -> None:
    for settings in SETTINGS:
        layer = make_layer(3, gate=gate, cls=cls, dtype=dtype, **settings)
        twin = copy.deepcopy(layer)
        before = snapshot(layer)
        x, grad_y = random_input((4, 3, 5, 4), dtype=dtype)
        step(layer, spoil(x, value), grad_y)
        assert_unmoved(layer, before)
        layer.zero_grad()
        assert_same_steps(layer, twin, dtype)


@pytest.mark.parametrize("cls", PATHS)
def test_the_first_step_of_a_cumulative_average(cls: type[nn.Module]) -> None:
    layer = cls(3, momentum=None)
    x, grad_y = random_input((4, 3, 5, 4), dtype=F32)
    step(layer, spoil(x, float("nan")), grad_y)
    assert int(layer.num_batches_tracked) == 0
    step(layer, x, grad_y)
    assert int(layer.num_batches_tracked) == 1
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("cls", PATHS)
def test_a_sample_beyond_those_compared(cls: type[nn.Module]) -> None:
    """The similarity is finite here but stays unchanged too: the whole step is skipped."""
    layer = make_layer(3, gate=0.5, cls=cls, similarity_samples=2)
    before = snapshot(layer)
    x, grad_y = random_input((4, 3, 5, 4), dtype=F32)
    step(layer, spoil(x, float("inf"), sample=3), grad_y)
    assert_unmoved(layer, before)


@pytest.mark.parametrize("cls", PATHS)
def test_variances_that_overflow(cls: type[nn.Module]) -> None:
    """Finite inputs with a non-finite variance."""
    layer = make_layer(3, cls=cls)
    before = snapshot(layer)
    x, grad_y = random_input((4, 3, 5, 4), dtype=F32)
    step(layer, x * 1e30, grad_y)
    assert_unmoved(layer, before)


@pytest.mark.parametrize("cls", PATHS)
def test_gate_follows_the_last_similarity(cls: type[nn.Module]) -> None:
    x, grad_y = random_input((4, 3, 5, 4), dtype=F32)
    shut = make_layer(3, gate=SHUT, cls=cls)
    y, _ = step(shut, spoil(x, float("inf")), grad_y)
    # Running statistics normalize the other samples as in evaluation.
    expected = shut.eval()(x)
    torch.testing.assert_close(y[[0, 2, 3]], expected[[0, 2, 3]])
    opened = make_layer(3, gate=OPEN, cls=cls)
    y, _ = step(opened, spoil(x, float("inf")), grad_y)
    assert not torch.isfinite(y[:, 1]).any()


@both_gates
def test_compiled(gate: float) -> None:
    torch._dynamo.reset()
    layer = make_layer(3, gate=gate)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = snapshot(layer)
    x, grad_y = random_input((4, 3, 5, 4), dtype=F32)
    for value in (float("inf"), float("nan")):
        compiled(spoil(x, value).requires_grad_()).backward(grad_y)
        assert_unmoved(layer, before)
    layer.zero_grad()
    twin(x)
    compiled(x)
    for name, expected in snapshot(twin).items():
        torch.testing.assert_close(snapshot(layer)[name], expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@both_gates
def test_checkpointed(gate: float, reentrant: bool) -> None:
    """A bad and a good forward are pending recomputation at the same time, in either order."""
    layer = make_layer(3, gate=gate)
    twin = copy.deepcopy(layer)
    before = snapshot(layer)
    x, grad_y = random_input((4, 3, 5, 4), dtype=F32)
    bad = spoil(x, float("inf"))
    checkpoint(layer, bad.clone().requires_grad_(), use_reentrant=reentrant).backward(grad_y)
    assert_unmoved(layer, before)
    layer.zero_grad()

    for first, second in ((bad, x), (x, bad)):
        leaves = [t.clone().requires_grad_() for t in (first, second)]
        outputs = [checkpoint(layer, leaf, use_reentrant=reentrant) for leaf in leaves]
        for y in outputs:
            y.backward(grad_y)
        good = leaves[1] if second is x else leaves[0]
        _, expected = step(twin, x, grad_y)
        torch.testing.assert_close(good.grad, expected)
        assert_unmoved(layer, snapshot(twin))


def test_records_tell_bad_batches_from_good_ones() -> None:
    records = Records()
    means = [torch.tensor(values) for values in ([1.0, 2.0], [float("nan"), 2.0], [float("inf"), float("nan")])]
    for i, mean in enumerate(means):
        records.add(mean, torch.tensor(i == 1), mean, torch.full((2,), float(i)))
    for i, mean in enumerate(means):
        recalled = records.recall(mean, torch.full((2,), -1.0))
        assert bool(recalled[2]) == (i == 1)
        assert recalled[1].tolist() == ([-1.0, -1.0] if i == 1 else [float(i)] * 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_scripted() -> None:
    layer = torch.jit.script(make_layer(3))
    before = snapshot(layer)
    layer(spoil(random_input((4, 3, 5, 4), dtype=F32)[0], float("nan")))
    assert_unmoved(layer, before)


def train(model: nn.Module, bad: set[int], steps: int = 5) -> tuple[list[float], dict[str, Any]]:
    """Trains under float16 autocast with loss scaling; batches in `bad` overflow."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for i in range(steps):
        x, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        if i in bad:
            x = x * 1e5  # beyond float16
        with torch.autocast("cpu", dtype=F16):
            loss = F.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, snapshot(model)


def test_training_recovers_at_the_next_step() -> None:
    """A BatchNorm sibling continues with NaN running statistics; UBN recovers."""
    model = timm.create_model("resnet10t_ubn", num_classes=10).train()
    losses, state = train(model, {1, 3})
    finite = [bool(torch.isfinite(torch.tensor(loss))) for loss in losses]
    assert finite == [True, False, True, False, True]
    for name, value in state.items():
        assert torch.isfinite(value).all(), name
        if name.endswith("num_batches_tracked"):
            assert int(value) == 3
    assert torch.isfinite(model.eval()(torch.randn(2, 3, 32, 32))).all()
