"""Activation checkpointing runs a layer's forward a second time during backward.

The state must be updated once, and the second run must normalize as the first did: with the same gate and the same
running statistics. BatchNorm would hide both errors, because its gradients do not depend on its state. So every test
here sets the gate such that a second update would flip it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import ubn_zoo

from . import reference
from .common import gradients, make_layer, random_input, randomize, snapshot, step, ubn_layers
from .tolerances import OUTPUT

F32, F64 = torch.float32, torch.float64

# With the threshold far above the similarity of the inputs here, the gate is about to close; far below it, to open.
FALLING, RISING = 0.9, -0.9
poised = pytest.mark.parametrize("threshold", [FALLING, RISING], ids=["falling", "rising"])
both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def poise(layer: nn.Module, x: Tensor) -> None:
    """Sets a layer's r such that one update toward the similarity of `x` keeps the gate, and two flip it."""
    s = reference.similarity(x, layer.similarity_samples)
    step_size = layer.similarity_momentum
    after_one_move = layer.threshold + 0.5 * step_size * (layer.threshold - s)
    layer.feature_similarity.fill_((after_one_move - step_size * s) / (1 - step_size))


def poise_model(model: nn.Module, x: Tensor) -> nn.Module:
    """Prepares every layer of a model for the input that it receives for `x`, in order of the layers."""
    layers = ubn_layers(model)
    for i, layer in enumerate(layers):
        twin = copy.deepcopy(model)
        seen: list[Tensor] = []
        ubn_layers(twin)[i].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            twin(x)
        poise(layer, seen[0])
    return model


def make_model(threshold: float, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    settings = {"threshold": threshold, "similarity_momentum": 0.5}
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            ubn_zoo.UnifiedBatchNorm2d(4, **settings),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, padding=1),
            ubn_zoo.UnifiedBatchNormAct2d(4, act_layer=nn.SiLU, **settings),
            nn.Conv2d(4, 2, 1),
        )
    ).to(dtype)


def make_poised_layer(threshold: float, x: Tensor, **settings: object) -> nn.Module:
    layer = make_layer(x.shape[1], threshold=threshold, similarity_momentum=0.5, dtype=x.dtype, **settings)
    poise(layer, x)
    return layer


def assert_same(found: nn.Module, expected: nn.Module, dtype: torch.dtype = F64) -> None:
    """State and parameter gradients of two models."""
    for name, value in snapshot(expected).items():
        torch.testing.assert_close(
            snapshot(found)[name], value, rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )
    ours, theirs = gradients(found), gradients(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **OUTPUT[dtype].kwargs(), msg=lambda t, n=name: f"{n}: {t}")


Runner = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def plain(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def checkpointed(reentrant: bool) -> Runner:
    return lambda function, x: checkpoint(function, x, use_reentrant=reentrant)


def compare(model: nn.Module, reentrant: bool, train: Callable[[nn.Module, Runner], list[Tensor]]) -> None:
    """Trains two copies of a model, one with checkpointing, and compares the results."""
    twin = copy.deepcopy(model)
    expected = train(twin, plain)
    found = train(model, checkpointed(reentrant))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **OUTPUT[a.dtype].kwargs())
    assert_same(model, twin)


@both_kinds
@poised
class TestOneStep:
    def test_layer_equals_the_reference(self, threshold: float, reentrant: bool) -> None:
        x, grad_y = random_input((5, 3, 5, 4))
        layer = make_poised_layer(threshold, x)
        expected = reference.run_like(layer, x, grad_y)
        assert expected.gate == (threshold == FALLING)
        x.requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(grad_y)
        torch.testing.assert_close(y.detach(), expected.y, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(x.grad, expected.grad_x, **OUTPUT[F64].kwargs())
        for name, grad in expected.grads.items():
            torch.testing.assert_close(getattr(layer, name).grad, grad, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(layer.running_mean, expected.state.running_mean, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(layer.running_var, expected.state.running_var, **OUTPUT[F64].kwargs())
        assert int(layer.num_batches_tracked) == 1
        assert float(layer.feature_similarity) == pytest.approx(expected.state.feature_similarity, abs=2e-6)

    def test_model_in_one_segment(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        model = poise_model(make_model(threshold), x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            run(model, leaf).square().sum().backward()
            return [leaf.grad]

        compare(model, reentrant, train)

    def test_every_module_a_segment(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        model = poise_model(make_model(threshold), x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            y = leaf
            for module in model:
                y = run(module, y)
            y.square().sum().backward()
            return [leaf.grad, y.detach()]

        compare(model, reentrant, train)

    def test_checkpoint_sequential(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        model = poise_model(make_model(threshold), x)
        twin = copy.deepcopy(model)
        twin(x.clone().requires_grad_()).square().sum().backward()
        y = checkpoint_sequential(model, 3, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        assert_same(model, twin)

    def test_cumulative_average(self, threshold: float, reentrant: bool) -> None:
        x, grad_y = random_input((4, 3, 6, 5))
        layer = make_poised_layer(threshold, x, momentum=None)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            run(model, leaf).backward(grad_y)
            return [leaf.grad]

        compare(layer, reentrant, train)

    def test_channels_last_in_bfloat16_autocast(self, threshold: float, reentrant: bool) -> None:
        """The second run receives the same values, up to rounding, and must find its record."""
        x = random_input((4, 3, 6, 5), dtype=F32)[0].contiguous(memory_format=torch.channels_last)
        model = poise_model(make_model(threshold, F32), x)
        twin = copy.deepcopy(model)
        results = []
        for m, run in ((model, checkpointed(reentrant)), (twin, plain)):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = run(m, leaf)
            y.float().square().sum().backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert_same(model, twin, F32)


@both_kinds
@poised
class TestSeveralForwards:
    @pytest.mark.parametrize("order", ["first in first out", "last in first out", "together"])
    @pytest.mark.parametrize("same_input", [True, False])
    def test_gradient_accumulation(self, same_input: bool, order: str, threshold: float, reentrant: bool) -> None:
        """Two forwards, then their backwards: the gate flips between the two, and the running statistics change."""
        first = random_input((4, 3, 6, 5))[0]
        second = first if same_input else random_input((4, 3, 6, 5), seed=1)[0]
        layer = make_poised_layer(threshold, first)
        gates = [reference.run_like(layer, first, first).gate]
        probe = copy.deepcopy(layer)
        probe(first)
        gates.append(reference.run_like(probe, second, second).gate)
        assert sorted(gates) == [False, True]

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in (first, second)]
            losses = [(run(model, leaf).sin() * (i + 1)).sum() for i, leaf in enumerate(leaves)]
            if order == "together":
                sum(losses).backward()
            else:
                for loss in losses if order == "first in first out" else reversed(losses):
                    loss.backward()
            return [leaf.grad for leaf in leaves]

        compare(layer, reentrant, train)

    def test_shared_layer_twice_in_one_segment(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            run(lambda t: model(model(t).tanh()), leaf).sin().sum().backward()
            return [leaf.grad]

        compare(layer, reentrant, train)

    @pytest.mark.parametrize("same_input", [True, False])
    def test_shared_layer_twice_in_two_segments(self, same_input: bool, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            first = run(model, leaf)
            second = run(model, leaf if same_input else first.tanh())
            (first.sin() + 2 * second.sin()).sum().backward()
            return [leaf.grad]

        compare(layer, reentrant, train)

    def test_shared_layer_inside_and_outside_a_segment(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            first = model(leaf)
            second = run(model, leaf)
            third = model(leaf)
            (first.sin() + 2 * second.sin() + 3 * third.sin()).sum().backward()
            return [leaf.grad]

        compare(layer, reentrant, train)

    def test_many_steps(self, threshold: float, reentrant: bool) -> None:
        xs = [random_input((4, 3, 6, 5), seed, shared=3.0 * (seed % 3))[0] for seed in range(7)]
        model = poise_model(make_model(threshold), xs[0])

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            found = []
            for x in xs:
                leaf = x.clone().requires_grad_()
                optimizer.zero_grad()
                run(model, leaf).square().mean().backward()
                optimizer.step()
                found.append(leaf.grad)
            return found

        compare(model, reentrant, train)

    def test_same_batch_every_step(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for _ in range(4)]
            for leaf in leaves:
                run(model, leaf).sin().sum().backward()
            return [leaf.grad for leaf in leaves]

        compare(layer, reentrant, train)

    @pytest.mark.parametrize("late", [0, 1])
    def test_pipelined_forwards_and_backwards(self, late: int, threshold: float, reentrant: bool) -> None:
        """Pipelined batches: a forward runs between a backward and older backwards."""
        xs = [random_input((4, 3, 6, 5), seed)[0] for seed in range(6)]
        layer = make_poised_layer(threshold, xs[0])

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in xs]
            waiting = []
            for leaf in leaves:
                waiting.append(run(model, leaf))
                if len(waiting) == 3:
                    waiting.pop(1 - late).sin().sum().backward()
            for y in waiting:
                y.sin().sum().backward()
            return [leaf.grad for leaf in leaves]

        compare(layer, reentrant, train)

    def test_many_forwards_before_one_backward(self, threshold: float, reentrant: bool) -> None:
        """A head shared by many feature levels, or a recurrent network."""
        xs = [random_input((4, 3, 3, 3), seed)[0] for seed in range(40)]
        layer = make_poised_layer(threshold, xs[0])

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in xs]
            sum(run(model, leaf).sin().sum() for leaf in leaves).backward()
            return [leaf.grad for leaf in leaves]

        compare(layer, reentrant, train)

    def test_forwards_that_no_backward_follows(self, threshold: float, reentrant: bool) -> None:
        """Evaluation, statistics computed without gradients, and a discarded loss, between forward and backward."""
        x, other = random_input((4, 3, 6, 5))[0], random_input((4, 3, 6, 5), seed=1)[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            run(model, other.clone().requires_grad_())
            poise(model, x)
            leaf = x.clone().requires_grad_()
            y = run(model, leaf)
            with torch.no_grad():
                model(other)
                model(x)
            model.eval()
            model(x)
            model.train()
            run(model, x.clone().requires_grad_())
            y.sin().sum().backward()
            found = [leaf.grad]
            leaf = other.clone().requires_grad_()
            run(model, leaf).sin().sum().backward()
            return [*found, leaf.grad]

        compare(layer, reentrant, train)

    def test_evaluation_is_checkpointed_too(self, threshold: float, reentrant: bool) -> None:
        """Frozen statistics, trained parameters."""
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x).eval()
        before = snapshot(layer)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            run(model, leaf).sin().sum().backward()
            return [leaf.grad]

        compare(layer, reentrant, train)
        assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())

    def test_copy_between_forward_and_backward(self, threshold: float, reentrant: bool) -> None:
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)
        expected, found = copy.deepcopy(layer), []

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            y = run(model, leaf)
            found.append(copy.deepcopy(model))
            y.sin().sum().backward()
            return [leaf.grad]

        compare(layer, reentrant, train)
        step(expected, x, x)
        for twin in found:
            assert_same_buffers(twin, expected)


def assert_same_buffers(found: nn.Module, expected: nn.Module) -> None:
    for name, value in snapshot(expected).items():
        torch.testing.assert_close(snapshot(found)[name], value, rtol=1e-6, atol=1e-6)


@poised
class TestOnlyNonReentrant:
    def test_nested(self, threshold: float) -> None:
        x = random_input((4, 3, 6, 5))[0]
        model = poise_model(make_model(threshold), x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            y = run(lambda t: run(model[3:], run(model[:3], t)), leaf)
            y.square().sum().backward()
            return [leaf.grad]

        compare(model, False, train)

    @pytest.mark.parametrize("early", [True, False])
    def test_early_stop(self, early: bool, threshold: float) -> None:
        """By default the second run stops once it has all saved tensors, so a layer may not run again at all."""
        xs = [random_input((4, 3, 6, 5), seed)[0] for seed in range(3)]
        model = poise_model(make_model(threshold), xs[0])

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            found = []
            with set_checkpoint_early_stop(early):
                for x in xs:
                    leaf = x.clone().requires_grad_()
                    run(model[:5], leaf).square().sum().backward()
                    found.append(leaf.grad)
            return found

        compare(model[:5], False, train)

    def test_backward_twice(self, threshold: float) -> None:
        """With a retained graph the forward runs a third time."""
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            y = run(model, leaf)
            y.sin().sum().backward(retain_graph=True)
            model(random_input((4, 3, 6, 5), seed=3)[0])
            y.cos().sum().backward()
            return [leaf.grad]

        compare(layer, False, train)

    def test_double_backward(self, threshold: float) -> None:
        x = random_input((4, 3, 6, 5))[0]
        layer = make_poised_layer(threshold, x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(run(model, leaf).sin().sum(), leaf, create_graph=True)
            grad.square().sum().backward()
            return [leaf.grad]

        compare(layer, False, train)

    def test_frozen_input(self, threshold: float) -> None:
        """Only parameters need a gradient, as in the first segment of a model."""
        x = random_input((4, 3, 6, 5))[0]
        model = poise_model(make_model(threshold), x)

        def train(model: nn.Module, run: Runner) -> list[Tensor]:
            run(model, x).square().sum().backward()
            return []

        compare(model, False, train)


@both_kinds
@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": None},
        {"threshold": None, "momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"kernel_size": 1},
        {"center_calibration": False, "scale_calibration": False},
    ],
    ids=str,
)
def test_other_settings(settings: dict, reentrant: bool) -> None:
    x = random_input((4, 3, 6, 5))[0]
    layer = make_layer(3, dtype=F64, **settings)

    def train(model: nn.Module, run: Runner) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for leaf in leaves:
            run(model, leaf).sin().sum().backward()
        return [leaf.grad for leaf in leaves]

    compare(layer, reentrant, train)


def test_timms_checkpointing() -> None:
    torch.manual_seed(0)
    model = ubn_zoo.convert_batchnorm(timm.create_model("resnet10t", num_classes=5), threshold=0.9).double()
    x = torch.randn(3, 3, 32, 32, dtype=F64)
    poise_model(model, x)
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing()
    for m in (model, twin):
        m(x.clone().requires_grad_()).square().sum().backward()
    for name, value in snapshot(twin).items():
        torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-6, atol=1e-6, msg=name)
    found = gradients(model)
    for name, value in gradients(twin).items():
        scale = float(value.abs().max()) + 1e-12
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=1e-6, atol=1e-7, msg=name)


def test_records_are_bounded() -> None:
    """Forwards without a backward must not accumulate in the layer."""
    layer = make_layer(3, dtype=F64)
    x = random_input((4, 3, 6, 5))[0].requires_grad_()

    def reachable() -> int:
        seen: set[int] = set()
        stack: list[object] = [vars(layer)]
        tensors = 0
        while stack:
            item = stack.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            tensors += isinstance(item, Tensor)
            if isinstance(item, dict):
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set)) or type(item).__name__ == "deque":
                stack.extend(item)
            elif hasattr(item, "__dict__") and not isinstance(item, Tensor):
                stack.append(vars(item))
            elif hasattr(item, "__slots__"):
                stack.extend(getattr(item, name) for name in item.__slots__ if hasattr(item, name))
        return tensors

    for _ in range(300):
        checkpoint(layer, x, use_reentrant=False)
    first = reachable()
    for _ in range(300):
        checkpoint(layer, x, use_reentrant=False)
    assert reachable() <= first
