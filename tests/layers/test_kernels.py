"""The Triton kernels: in Triton's interpreter on the CPU, or natively where there is a GPU.

Everything is compared with the float64 reference. Whether the kernels compile, and the registers and memory they need,
is tested by compiling them for GPUs that need not be present.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ubn_zoo
from research.benchmark.turns import as_naive
from ubn_zoo.layers import functional
from ubn_zoo.layers.kernels import operators
from ubn_zoo.layers.parameters import State

from . import reference
from .common import (
    OPEN,
    PARAMETERS,
    SHUT,
    assert_results,
    assert_state,
    assert_step,
    gradients,
    make_layer,
    random_input,
    snapshot,
    step,
)
from .test_checkpointing import poise
from .test_fuse import constant, constant_one_tap, no_centering, no_scaling, nothing, only_the_middle, pair
from .tolerances import OUTPUT, STATISTICS, assert_gradient

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
if not NATIVE:
    # Whether a function is interpreted is decided where it is defined; Triton's own are, see `conftest.py`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from triton.runtime.interpreter import InterpretedFunction

        from ubn_zoo.layers.kernels import backward, forward, inference, launching, statistics
    if not isinstance(launching.tl.sum, InterpretedFunction):
        pytest.skip("triton was imported without its interpreter before", allow_module_level=True)
else:
    from ubn_zoo.layers.kernels import backward, forward, inference, launching, statistics

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
FORMATS = [torch.contiguous_format, torch.channels_last]
REPOSITORY = Path(__file__).parents[2]

both_formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["first", "last"])
both_gates = pytest.mark.parametrize("gate", [OPEN, SHUT], ids=["open", "shut"])


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lets the kernels compute the tensors of these tests; lists the launchers that were called."""
    called: list[str] = []
    launch = operators._launch

    def recorded(name: str, *arguments: Any) -> Any:
        called.append(name)
        return launch(name, *arguments)

    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(operators, "DEVICES", {"cpu"})
    monkeypatch.setattr(operators, "_launch", recorded)
    yield called


def on_device(
    layer: nn.Module, x: Tensor, grad_y: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[nn.Module, Tensor, Tensor]:
    tensors = (t.to(DEVICE).contiguous(memory_format=memory_format) for t in (x, grad_y))
    return layer.to(DEVICE), *tensors


TRAINING = ["finalize", "affine", "affine_backward"]


class TestAgainstReference:
    @pytest.mark.parametrize("mode", ["open", "shut", "evaluation"])
    @pytest.mark.parametrize(
        ("dtype", "kernel_size"), [(F64, 1), (F64, 3), (F64, 5), (F32, 3), (F16, 3), (BF16, 3)], ids=str
    )
    @both_formats
    def test_whole_layer(
        self, memory_format: torch.memory_format, dtype: torch.dtype, kernel_size: int, mode: str, launches: list[str]
    ) -> None:
        gate = SHUT if mode == "shut" else OPEN
        layer = make_layer(3, gate=gate, kernel_size=kernel_size, dtype=dtype).train(mode != "evaluation")
        layer, x, grad_y = on_device(layer, *random_input((3, 3, 6, 5), dtype=dtype), memory_format)
        expected = reference.run_like(layer, x, grad_y)
        y, grad_x = step(layer, x, grad_y)
        assert_results(layer, y, grad_x, expected, dtype)
        assert launches == (["instance_means", *TRAINING[1:]] if mode == "evaluation" else ["statistics", *TRAINING])
        for tensor in (y, grad_x):
            assert tensor.dtype == dtype
            assert tensor.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize(
        "shape",
        [
            (2, 3, 1, 1),
            (1, 3, 1, 7),
            (2, 1, 7, 1),
            (2, 2, 1, 2),
            (3, 2, 5, 3),
            (1, 130, 3, 3),
            (2, 33, 3, 5),
            (17, 3, 4, 3),
            (1, 1, 75, 3),
            (1, 2, 3, 150),
        ],
        ids=str,
    )
    @both_formats
    def test_sizes(self, memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
        layer, x, grad_y = on_device(make_layer(shape[1]), *random_input(shape, dtype=F32), memory_format)
        assert_step(layer, x, grad_y)

    @pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 2, 2, 3), (1, 2, 4, 9)], ids=str)
    @both_formats
    def test_sizes_below_those_of_the_kernel(self, memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
        layer = make_layer(shape[1], kernel_size=5)
        assert_step(*on_device(layer, *random_input(shape, dtype=F32), memory_format))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "settings",
        [
            {"affine": False},
            {"depthwise_affine": False},
            {"center_calibration": False},
            {"scale_calibration": False},
            {"threshold": None},
            {"momentum": None},
            {"momentum": 0.0, "similarity_momentum": 1.0, "similarity_samples": 2},
            {"track_running_stats": False},
            {"affine": False, "center_calibration": False, "scale_calibration": False, "threshold": None},
        ],
        ids=str,
    )
    def test_settings(self, settings: dict, training: bool) -> None:
        layer = make_layer(3, dtype=F64, **settings).train(training)
        for seed in range(2 if "momentum" in settings and training else 1):
            assert_step(*on_device(layer, *random_input((4, 3, 3, 4), seed)))

    def test_no_bias(self) -> None:
        layer = make_layer(3, dtype=F64)
        layer.bias = None
        assert_step(*on_device(layer, *random_input((4, 3, 3, 4))))

    @both_gates
    def test_frozen(self, gate: float) -> None:
        layer, x, grad_y = on_device(make_layer(3, gate=gate), *random_input((3, 3, 4, 5), dtype=F32))
        ubn_zoo.freeze_ubn(layer)
        before = snapshot(layer)
        layer.requires_grad_(True)
        expected = reference.run(x, grad_y, reference.parameters_of(layer), reference.state_of(layer), training=False)
        y, grad_x = step(layer, x, grad_y)
        torch.testing.assert_close(y.double(), expected.y, **OUTPUT[F32].kwargs())
        assert_gradient(grad_x, expected.grad_x, F32, "x")
        assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())

    @pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
    def test_low_precision_input_to_float32_parameters(self, dtype: torch.dtype) -> None:
        layer, x, grad_y = on_device(make_layer(3), *random_input((3, 3, 4, 5), dtype=dtype))
        assert_step(layer, x, grad_y)
        assert layer(x).dtype == dtype

    def test_gate_flips_between_steps(self) -> None:
        layer = make_layer(3, gate=0.4, similarity_momentum=0.6, dtype=F64)
        sides = set()
        for seed in range(4):
            x, grad_y = random_input((4, 3, 3, 3), seed, shared=2.0 * (seed % 2))
            sides.add(assert_step(*on_device(layer, x - 0.3, grad_y)).gate)
        assert sides == {True, False}

    def test_parts_of_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A map so large that statistics, sums and rows are split, and small maps that are summed up in groups."""
        x, grad_y = random_input((2, 2, 40, 70), dtype=F32)
        for last in (False, True):
            assert launching.statistics_blocks(tuple(x.shape), last).pieces > 1
            blocks = launching.tap_blocks(tuple(x.shape), last, 3, "output")
            assert blocks.pieces > 1
            assert blocks.column_blocks(70) > 1
            assert_step(*on_device(make_layer(2), x, grad_y, FORMATS[last]))
        monkeypatch.setattr(launching, "PROGRAMS", 1)
        launching.tap_blocks.cache_clear()
        assert launching.tap_blocks((9, 3, 3, 4), False, 3, "sums").group > 1
        assert_step(*on_device(make_layer(3), *random_input((9, 3, 3, 4), dtype=F32)))
        launching.tap_blocks.cache_clear()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy
class TestBadBatches:
    """Statistics that are not finite move nothing, see `test_bad_batches.py`."""

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"threshold": None}], ids=str)
    @both_gates
    def test_nothing_moves(self, gate: float, settings: dict, value: float, launches: list[str]) -> None:
        layer = make_layer(3, gate=gate, **settings)
        layer, x, grad_y = on_device(layer, *random_input((4, 3, 3, 4), dtype=F32))
        before = snapshot(layer)
        bad = x.clone()
        bad[1, 1, 2, 0] = value
        step(layer, bad, grad_y)
        assert launches == ["statistics", *TRAINING]
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(layer).items())
        assert_step(layer, x, grad_y)

    def test_overflow_of_the_unbiased_variance(self) -> None:
        largest = torch.finfo(F32).max
        mean, var = torch.zeros(1500, device=DEVICE), torch.ones(1500, device=DEVICE)
        var[1400] = largest
        running = [torch.full((1500,), 5.0, device=DEVICE) for _ in range(2)] + [torch.tensor(0.1, device=DEVICE)]
        state = State(*running, torch.tensor(3, device=DEVICE))
        before = [tensor.clone() for tensor in state]
        operators.finalize(mean, var, None, state, 2, 0.1, 0.1, None, moving=True)
        assert all(torch.equal(*pair) for pair in zip(state, before, strict=True))


class TestStrides:
    def test_buffers_that_are_not_contiguous(self) -> None:
        """Loaded with ``assign=True``, they may lie in larger tensors, whose other elements are not the layer's."""
        layer, x, grad_y = on_device(make_layer(3), *random_input((4, 3, 3, 4), dtype=F32))
        table = torch.full((3, 5), 7.0, device=DEVICE)
        numbers = torch.full((4,), 7, device=DEVICE)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        for i, name in enumerate(("running_mean", "running_var")):
            table[:, 2 * i] = state[name]
            state[name] = table[:, 2 * i]
        numbers[1] = 0
        state["num_batches_tracked"] = numbers[1]
        layer.load_state_dict(state, assign=True)
        assert not layer.running_mean.is_contiguous()
        assert_step(layer, x, grad_y)
        assert (table[:, [1, 3, 4]] == 7).all()
        assert numbers.tolist() == [7, 1, 7, 7]
        assert torch.equal(table[:, 0], layer.running_mean)


class TestLargeMean:
    @both_formats
    def test_output_is_as_good_as_batchnorms(self, memory_format: torch.memory_format) -> None:
        x = torch.randn(4, 2, 12, 12, generator=torch.Generator().manual_seed(0)) + 1e4
        x = x.to(DEVICE).contiguous(memory_format=memory_format)
        exact = nn.BatchNorm2d(2, dtype=F64, device=DEVICE)(x.double())
        norms = ubn_zoo.UnifiedBatchNorm2d(2, device=DEVICE), nn.BatchNorm2d(2, device=DEVICE)
        ours, theirs = ((norm(x).double() - exact).abs().max().item() for norm in norms)
        assert ours <= 4 * theirs + 1e-5

    @both_gates
    @both_formats
    def test_random_parameters(self, memory_format: torch.memory_format, gate: float) -> None:
        """The plain operations' tolerances, see `test_precision.py`."""
        layer = make_layer(2, gate=gate)
        with torch.no_grad():
            layer.center_weight.mul_(1e-3)
            layer.running_mean.add_(1e4)
        x = torch.randn(8, 2, 9, 9, generator=torch.Generator().manual_seed(0)) + 1e4
        grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        layer, x, grad_y = on_device(layer, x, grad_y, memory_format)
        expected = reference.run_like(layer, x, grad_y)
        y, grad_x = step(layer, x, grad_y)
        torch.testing.assert_close(y.double(), expected.y, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(grad_x.double(), expected.grad_x, rtol=1e-3, atol=1e-2)
        for name, value in expected.grads.items():
            slack = 2e-3 * float(value.abs().max()) + 5e-2
            if name == "center_weight":
                slack = 1.0 if expected.gate else 5e-3 * float(value.abs().max())
            torch.testing.assert_close(
                getattr(layer, name).grad.double(), value, rtol=0, atol=slack, msg=lambda t, n=name: f"{n}: {t}"
            )
        torch.testing.assert_close(layer.running_mean.double(), expected.state.running_mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.running_var.double(), expected.state.running_var, rtol=1e-4, atol=0)


class TestStatistics:
    @both_formats
    def test_equal_the_equations(self, memory_format: torch.memory_format) -> None:
        x = random_input((18, 3, 5, 4))[0].to(DEVICE).contiguous(memory_format=memory_format)
        x[3] = 0
        center = torch.tensor([0.5, -1.0, 0.1], dtype=F64, device=DEVICE)
        instance_mean, mean, var, similarity = operators.statistics(x, center, 16)
        expected_mean, instance_var = functional.instance_moments(x)
        expected = functional.batch_statistics(expected_mean, instance_var, center)
        for found, value in ((instance_mean, expected_mean), (mean, expected[0]), (var, expected[1])):
            torch.testing.assert_close(found, value, **STATISTICS[F64].kwargs())
        torch.testing.assert_close(similarity.sum(), functional.feature_similarity(x, 16), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(operators.instance_means(x), expected_mean, **STATISTICS[F64].kwargs())
        again = operators.statistics(x, center, 16)
        assert all(torch.equal(*pair) for pair in zip(again, (instance_mean, mean, var, similarity), strict=True))

    @pytest.mark.parametrize("shape", [(1, 2, 30, 50), (257, 1, 1, 2)], ids=str)
    @both_formats
    def test_in_double_precision_over_many_tiles(
        self, memory_format: torch.memory_format, shape: tuple[int, ...]
    ) -> None:
        x = random_input(shape)[0].to(DEVICE).contiguous(memory_format=memory_format)
        found = operators.statistics(x, None, None)[:3]
        instance_mean, instance_var = functional.instance_moments(x)
        expected = (instance_mean, *functional.batch_statistics(instance_mean, instance_var))
        for actual, value in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-13)

    def test_without_similarity(self) -> None:
        x = random_input((3, 2, 3, 3))[0].to(DEVICE)
        assert operators.statistics(x, None, None)[3] is None
        assert operators.statistics(x[:1], None, 16)[3].sum().item() == pytest.approx(1)
        assert operators.statistics(torch.zeros_like(x), None, 16)[3].sum().item() == 0

    def test_deciding_without_moving(self) -> None:
        """A forward that is recomputed takes the gate as the state has it."""
        mean, var = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
        running = [torch.full((2,), 5.0, device=DEVICE) for _ in range(2)] + [torch.tensor(0.1, device=DEVICE)]
        before = [tensor.clone() for tensor in running]
        similarity = torch.full((512,), 1 / 512, device=DEVICE)
        batches = torch.tensor(3, device=DEVICE)
        arguments = (mean, var, similarity, State(*running, batches), 8, 0.1, 0.9, 0.15)
        used, _, gate = operators.finalize(*arguments, moving=False)
        assert not gate
        assert torch.equal(used, running[0])
        assert all(torch.equal(*pair) for pair in zip(running, before, strict=True))
        used, _, gate = operators.finalize(*arguments, moving=True)
        assert gate
        assert torch.equal(used, mean)
        assert running[2].item() == pytest.approx(0.91)


class TestLayouts:
    @pytest.mark.parametrize(
        "view",
        [
            pytest.param(lambda t: t[:, :, ::2, 1:], id="strided"),
            pytest.param(lambda t: t.contiguous(memory_format=torch.channels_last)[:, 1:4], id="channels of more"),
            pytest.param(lambda t: t.permute(1, 0, 3, 2)[:, :3], id="permuted"),
            pytest.param(lambda t: t[:, :3, :1, :1].expand(-1, -1, 5, 4), id="expanded"),
        ],
    )
    def test_inputs_that_are_views(self, view: Any) -> None:
        x = view(random_input((4, 4, 7, 5))[0].to(DEVICE))
        grad_y = random_input(tuple(x.shape), seed=1)[1].to(DEVICE)
        assert_step(make_layer(x.shape[1], dtype=F64).to(DEVICE), x, grad_y)

    @both_formats
    def test_gradient_of_the_other_layout(self, memory_format: torch.memory_format) -> None:
        layer, x, grad_y = on_device(make_layer(3, dtype=F64), *random_input((3, 3, 4, 5)), memory_format)
        grad_y = grad_y.contiguous(memory_format=FORMATS[1 - FORMATS.index(memory_format)])
        assert_step(layer, x, grad_y)
        assert step(layer, x, grad_y)[1].is_contiguous(memory_format=memory_format)

    def test_expanded_gradient(self) -> None:
        layer, x, _ = on_device(make_layer(3, dtype=F64), *random_input((3, 3, 4, 5)))
        expected = reference.run_like(layer, x, torch.ones_like(x))
        x.requires_grad_()
        layer(x).sum().backward()
        assert_gradient(x.grad, expected.grad_x, F64, "x")
        assert_gradient(layer.weight.grad, expected.grads["weight"], F64, "weight")


class TestAutograd:
    def test_state_that_moves_before_backward_is_noticed(self) -> None:
        layer, x, grad_y = on_device(make_layer(2), *random_input((2, 2, 3, 3), dtype=F32))
        y = layer.eval()(x.requires_grad_())
        layer.train()(x.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad_y)

    def test_only_what_is_asked_for(self) -> None:
        layer, x, grad_y = on_device(make_layer(3, dtype=F64), *random_input((3, 3, 4, 5)))
        expected = reference.run_like(layer, x, grad_y)
        for name in PARAMETERS:
            twin = copy.deepcopy(layer).requires_grad_(False)
            getattr(twin, name).requires_grad_(True)
            twin(x).backward(grad_y)
            assert gradients(twin).keys() == {name}
            assert_gradient(getattr(twin, name).grad, expected.grads[name], F64, name)
        twin = copy.deepcopy(layer).requires_grad_(False)
        _, grad_x = step(twin, x, grad_y)
        assert_gradient(grad_x, expected.grad_x, F64, "x")
        assert not layer(x.requires_grad_(False)).isnan().any()

    @both_gates
    def test_gradient_of_a_gradient(self, gate: float, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x, grad_y = on_device(make_layer(2, gate=gate, dtype=F64), *random_input((2, 2, 3, 3)))
        found = []
        for devices in ({DEVICE}, set()):
            monkeypatch.setattr(operators, "DEVICES", devices)
            twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
            (grad_x,) = torch.autograd.grad(twin(leaf), leaf, grad_y, create_graph=True)
            grad_x.square().sum().backward()
            found.append({"x": leaf.grad, **gradients(twin)})
        assert found[0].keys() == found[1].keys()
        for name, value in found[1].items():
            torch.testing.assert_close(found[0][name], value, **OUTPUT[F64].kwargs(), msg=name)

    @pytest.mark.parametrize("threshold", [0.9, -0.9], ids=["falling", "rising"])
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_checkpointing(self, reentrant: bool, threshold: float) -> None:
        x, grad_y = random_input((4, 3, 4, 3))
        layer = make_layer(3, threshold=threshold, similarity_momentum=0.5, dtype=F64)
        poise(layer, x)
        layer, x, grad_y = on_device(layer, x, grad_y)
        expected = reference.run_like(layer, x, grad_y)
        x.requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).backward(grad_y)
        assert_gradient(x.grad, expected.grad_x, F64, "x")
        assert_state(layer, expected.state, F64)

    @pytest.mark.parametrize("input_dtype", [F32, BF16], ids=str)
    def test_autocast(self, input_dtype: torch.dtype) -> None:
        layer, x, grad_y = on_device(make_layer(3), *random_input((3, 3, 4, 5), dtype=input_dtype))
        expected = reference.run_like(layer, x, grad_y)
        x.requires_grad_()
        with torch.autocast(DEVICE, dtype=BF16):
            y = layer(x)
        y.backward(grad_y)
        assert y.dtype == x.grad.dtype == input_dtype
        torch.testing.assert_close(y.detach().double(), expected.y, **OUTPUT[input_dtype].kwargs())
        assert_gradient(x.grad, expected.grad_x, input_dtype, "x")
        assert layer.weight.grad.dtype == F32


def inference_norm(fed: bool, change: Callable = nothing, dtype: torch.dtype = F64, **settings: Any) -> nn.Module:
    """What `fuse` leaves of a layer behind a convolution, or alone."""
    model = pair(change, dtype, **settings).to(DEVICE)
    return ubn_zoo.fuse(model)[1] if fed else ubn_zoo.fuse(model[1])


def exactly(norm: nn.Module, x: Tensor) -> Tensor:
    """The plain operations in float64, on the same constants."""
    return copy.deepcopy(norm).double()._compute(x.to(F64, copy=True))


class TestInference:
    @staticmethod
    def check(norm: nn.Module, x: Tensor, launches: list[str]) -> Tensor:
        expected = exactly(norm, x)
        launches.clear()
        with torch.no_grad():
            y = norm(x)
        means = norm.center is not None or norm.factor_slope is not None
        assert launches == ["instance_means", "folded_affine"][not means :]
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), expected, **OUTPUT[x.dtype].kwargs(), check_stride=False)
        return y

    @pytest.mark.parametrize("fed", [True, False])
    @pytest.mark.parametrize(
        ("change", "settings"),
        [
            (nothing, {}),
            (nothing, {"kernel_size": 1}),
            (nothing, {"kernel_size": 5}),
            (nothing, {"affine": False}),
            (no_centering, {}),
            (no_scaling, {}),
            (only_the_middle, {}),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    @both_formats
    def test_whole_norm(
        self, memory_format: torch.memory_format, change: Callable, settings: dict, fed: bool, launches: list[str]
    ) -> None:
        norm = inference_norm(fed, change, **settings)
        x = random_input((3, 6, 6, 5))[0].to(DEVICE).contiguous(memory_format=memory_format)
        before = x.clone()
        y = self.check(norm, x, launches)
        assert y.is_contiguous(memory_format=memory_format)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
    @pytest.mark.parametrize("fed", [True, False])
    @both_formats
    def test_dtypes(
        self, memory_format: torch.memory_format, fed: bool, dtype: torch.dtype, launches: list[str]
    ) -> None:
        x = random_input((2, 6, 4, 5), dtype=dtype)[0].to(DEVICE).contiguous(memory_format=memory_format)
        self.check(inference_norm(fed, dtype=dtype), x, launches)
        self.check(inference_norm(fed, dtype=F32), x, launches)

    @pytest.mark.parametrize("change", [constant, constant_one_tap])
    def test_without_means(self, change: Callable, launches: list[str]) -> None:
        norm = inference_norm(False, change)
        assert norm.center is None
        assert norm.factor_slope is None
        self.check(norm, random_input((2, 6, 3, 4))[0].to(DEVICE), launches)

    @pytest.mark.parametrize(
        "shape", [(2, 6, 1, 1), (1, 6, 1, 7), (2, 6, 7, 1), (1, 6, 75, 3), (1, 6, 3, 150)], ids=str
    )
    @both_formats
    def test_sizes(self, memory_format: torch.memory_format, shape: tuple[int, ...], launches: list[str]) -> None:
        x = random_input(shape)[0].to(DEVICE).contiguous(memory_format=memory_format)
        self.check(inference_norm(False), x, launches)

    def test_view(self, launches: list[str]) -> None:
        self.check(inference_norm(True), random_input((2, 9, 4, 7))[0].to(DEVICE)[:, 2:8, :, ::2], launches)

    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_large_mean(self, dtype: torch.dtype, kernel_size: int) -> None:
        """As accurate as the plain operations at least."""
        mean = 1e4 if dtype == F32 else 100.0
        norm = inference_norm(False, no_centering, F32, kernel_size=kernel_size)
        with torch.no_grad():
            norm.shift.sub_(mean * norm.slope)
            norm.factor_shift.sub_(mean * norm.factor_slope)
        x = (random_input((4, 6, 5, 5))[0] + mean).to(DEVICE, dtype)
        expected = exactly(norm, x)
        with torch.no_grad():
            found, plain = ((y.double() - expected).abs().max() for y in (norm(x), norm._compute(x)))
        assert expected.abs().max() < 100
        # The interpreter cuts off bfloat16 where a GPU rounds.
        assert found <= (2.1 if dtype == BF16 else 1.5) * plain + 1e-6

    @pytest.mark.parametrize("kernel_size", [1, 3])
    def test_activation(self, kernel_size: int, launches: list[str]) -> None:
        layer = make_layer(6, cls=ubn_zoo.UnifiedBatchNormAct2d, kernel_size=kernel_size, dtype=F64).eval()
        norm = ubn_zoo.fuse(nn.Sequential(nn.Conv2d(4, 6, 1, dtype=F64), layer).eval())[1].norm.to(DEVICE)
        assert norm.activation == "relu"
        x = random_input((2, 6, 4, 5))[0].to(DEVICE)
        y = self.check(norm, x, launches)
        assert 0 < (y == 0).sum() < y.numel()
        x[0, 0, 0, 0] = float("nan")
        with torch.no_grad():
            assert norm(x)[0, 0].isnan().any()

    def test_gradients_need_the_plain_operations(self, launches: list[str]) -> None:
        norm = inference_norm(False)
        x = random_input((2, 6, 3, 4))[0].to(DEVICE)
        norm(x.clone().requires_grad_()).sum().backward()
        torch.func.vmap(norm)(x[None])
        assert not launches
        norm.center.requires_grad_()
        norm(x).sum().backward()
        assert not launches
        assert norm.center.grad is not None
        with torch.no_grad():
            norm(x)
        assert launches

    @pytest.mark.parametrize("given", [{}, {"affine": False}], ids=str)
    @both_formats
    def test_operator(self, memory_format: torch.memory_format, given: dict) -> None:
        norm = inference_norm(not given, dtype=F32, **given)
        x = random_input((2, 6, 3, 4), dtype=F32)[0].to(DEVICE).contiguous(memory_format=memory_format)
        constants = (norm.slope, norm.shift, norm.center, norm.weight, norm.bias, norm.factor_slope, norm.factor_shift)
        for relu in (False, True):
            arguments = (x, operators.instance_means(x), *constants, relu)
            torch.library.opcheck(torch.ops.ubn_zoo.folded_affine, arguments)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled(self, dynamic: bool, launches: list[str]) -> None:
        torch._dynamo.reset()
        model = ubn_zoo.fuse(pair(dtype=F32)).to(DEVICE)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (2, 3):
            x = random_input((batch, 4, 4, 5), dtype=F32)[0].to(DEVICE)
            launches.clear()
            found = compiled(x)
            assert launches == ["instance_means", "folded_affine"]
            torch.testing.assert_close(found, model(x), **OUTPUT[F32].kwargs())
        torch._dynamo.reset()

    @pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
    def test_captured_programs_hold_plain_operations(self, launches: list[str]) -> None:
        model = ubn_zoo.fuse(pair(dtype=F32)).to(DEVICE)
        x = random_input((2, 4, 4, 5), dtype=F32)[0].to(DEVICE)
        assert "ubn_zoo" not in str(torch.export.export(model, (x,)).graph)
        for captured in (torch.jit.trace(model, x, check_trace=False), torch.jit.script(model)):
            assert "ubn_zoo::" not in str(captured.inlined_graph)
            captured(x)
        assert not launches


class TestActivation:
    """A layer with a ReLU behind it, which the kernels compute."""

    @pytest.fixture
    def never(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The activation's module is not called."""

        def forward(self: nn.ReLU, input: Tensor) -> Tensor:
            raise AssertionError("called")

        monkeypatch.setattr(nn.ReLU, "forward", forward)

    @staticmethod
    def make(channels: int = 3, **settings: Any) -> nn.Module:
        return make_layer(channels, cls=ubn_zoo.UnifiedBatchNormAct2d, **settings)

    @staticmethod
    def assert_step(layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        """One step, compared with the reference's, whose gradient passes where this output says so."""
        dtype, before = x.dtype, copy.deepcopy(layer)
        y, grad_x = step(layer, x, grad_y)
        assert 0 < (y > 0).sum() < y.numel() or y.numel() < 10
        expected = reference.run_like(before, x, grad_y * (y > 0))
        assert_results(layer, y, grad_x, dataclasses.replace(expected, y=expected.y.relu()), dtype)
        return y, grad_x

    @pytest.mark.parametrize(
        ("dtype", "kernel_size", "mode"),
        [
            (F64, 1, "open"),
            (F64, 3, "open"),
            (F64, 3, "shut"),
            (F64, 3, "evaluation"),
            (F64, 5, "shut"),
            (F32, 3, "open"),
            (F16, 3, "open"),
            (BF16, 3, "evaluation"),
        ],
        ids=str,
    )
    @both_formats
    @pytest.mark.usefixtures("never")
    def test_whole_layer(
        self, memory_format: torch.memory_format, dtype: torch.dtype, kernel_size: int, mode: str, launches: list[str]
    ) -> None:
        layer = self.make(gate=SHUT if mode == "shut" else OPEN, kernel_size=kernel_size, dtype=dtype)
        layer, x, grad_y = on_device(layer, *random_input((3, 3, 6, 5), dtype=dtype), memory_format)
        for tensor in self.assert_step(layer.train(mode != "evaluation"), x, grad_y):
            assert tensor.dtype == dtype
            assert tensor.is_contiguous(memory_format=memory_format)
        assert launches[-2:] == ["affine", "affine_backward"]

    @pytest.mark.parametrize(
        "shape", [(2, 3, 1, 1), (1, 3, 1, 7), (2, 1, 7, 1), (2, 33, 3, 5), (1, 1, 75, 3), (1, 2, 3, 150)], ids=str
    )
    @both_formats
    @pytest.mark.usefixtures("never")
    def test_sizes(self, memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
        self.assert_step(*on_device(self.make(shape[1]), *random_input(shape, dtype=F32), memory_format))

    @pytest.mark.parametrize(
        "settings",
        [
            {"affine": False},
            {"depthwise_affine": False},
            {"center_calibration": False},
            {"scale_calibration": False},
            {"track_running_stats": False},
            {"affine": False, "center_calibration": False, "scale_calibration": False, "threshold": None},
        ],
        ids=str,
    )
    @pytest.mark.usefixtures("never")
    def test_settings(self, settings: dict) -> None:
        self.assert_step(*on_device(self.make(dtype=F64, **settings), *random_input((4, 3, 3, 4))))

    @pytest.mark.usefixtures("never")
    def test_groups_of_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launching, "PROGRAMS", 1)
        launching.tap_blocks.cache_clear()
        self.assert_step(*on_device(self.make(), *random_input((9, 3, 3, 4), dtype=F32)))
        launching.tap_blocks.cache_clear()

    @pytest.mark.usefixtures("never")
    def test_gradient_of_the_other_layout(self) -> None:
        layer, x, grad_y = on_device(self.make(dtype=F64), *random_input((3, 3, 4, 5)))
        self.assert_step(layer, x, grad_y.contiguous(memory_format=torch.channels_last))
        self.assert_step(layer, x[:, :, :, ::2], grad_y[:, :, :, ::2])

    def test_nothing_is_kept_but_input_and_output(self) -> None:
        layer, x, grad_y = on_device(self.make(), *random_input((3, 3, 4, 5), dtype=F32))
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x.requires_grad_())
        assert {t.data_ptr() for t in kept if t.shape == x.shape} == {x.data_ptr(), y.data_ptr()}
        y = layer(x)
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad_y)

    def test_nan_stays(self) -> None:
        layer, x, grad_y = on_device(self.make().eval(), *random_input((2, 3, 4, 5), dtype=F32))
        x[0, 0] = float("nan")
        twin = nn.Sequential(ubn_zoo.UnifiedBatchNorm2d(3).to(DEVICE).eval(), nn.ReLU())
        twin[0].load_state_dict(layer.state_dict())
        for found, expected in zip(step(layer, x, grad_y), step(twin, x, grad_y), strict=True):
            torch.testing.assert_close(found, expected, **OUTPUT[F32].kwargs(), equal_nan=True)

    @both_gates
    def test_gradient_of_a_gradient(self, gate: float, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x, grad_y = on_device(self.make(2, gate=gate, dtype=F64), *random_input((2, 2, 3, 3)))
        found = []
        for devices in ({DEVICE}, set()):
            monkeypatch.setattr(operators, "DEVICES", devices)
            twin = copy.deepcopy(layer)
            leaf, grad_leaf = x.clone().requires_grad_(), grad_y.clone().requires_grad_()
            (grad_x,) = torch.autograd.grad(twin(leaf), leaf, grad_leaf, create_graph=True)
            grad_x.square().sum().backward()
            found.append({"x": leaf.grad, "y": grad_leaf.grad, **gradients(twin)})
        assert found[0].keys() == found[1].keys()
        for name, value in found[1].items():
            torch.testing.assert_close(found[0][name], value, **OUTPUT[F64].kwargs(), msg=name)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_checkpointing(self, reentrant: bool) -> None:
        x, grad_y = random_input((4, 3, 4, 3))
        layer = self.make(threshold=0.9, similarity_momentum=0.5, dtype=F64)
        poise(layer, x)
        layer, x, grad_y = on_device(layer, x, grad_y)
        twin = copy.deepcopy(layer)
        _, grad_x = step(twin, x, grad_y)
        x.requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).backward(grad_y)
        assert_gradient(x.grad, grad_x, F64, "x")
        for name, value in snapshot(twin).items():
            assert torch.equal(snapshot(layer)[name], value), name

    @pytest.mark.usefixtures("never")
    def test_autocast(self) -> None:
        layer, x, _ = on_device(self.make(), *random_input((3, 3, 4, 5), dtype=F32))
        expected = reference.run_like(layer, x, x).y.relu()
        with torch.autocast(DEVICE, dtype=BF16):
            y = layer(x)
        torch.testing.assert_close(y.double(), expected, **OUTPUT[F32].kwargs())

    def test_what_is_looked_at_is_called(self) -> None:
        """Other activations, drops, and modules with hooks."""
        x = random_input((3, 3, 4, 5), dtype=F32)[0].to(DEVICE)
        plain = self.make(inplace=False).to(DEVICE)
        expected = copy.deepcopy(plain)(x)
        calls: list[nn.Module] = []
        for name in ("act", "drop"):
            for method in (
                "register_forward_hook",
                "register_forward_pre_hook",
                "register_full_backward_hook",
                "register_full_backward_pre_hook",
            ):
                layer = copy.deepcopy(plain)
                getattr(getattr(layer, name), method)(lambda module, *_: calls.append(module))
                calls.clear()
                y = layer(x.clone().requires_grad_())
                torch.testing.assert_close(y, expected)
                y.sum().backward()
                assert calls == [getattr(layer, name)]
        for settings in ({"act_layer": nn.ReLU6}, {"drop_layer": nn.Tanh}, {"apply_act": False}):
            layer = self.make(**settings)
            assert not layer.only_relu()

    def test_naive_twin_of_benchmarks(self, launches: list[str]) -> None:
        """It takes the equations and keeps its activation."""
        layer, x, _ = on_device(self.make(dtype=F64), *random_input((3, 3, 4, 5)))
        found = as_naive(copy.deepcopy(layer))(x)
        assert not launches
        torch.testing.assert_close(found, layer(x), **OUTPUT[F64].kwargs())

    def test_input_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match="4 dimensions"):
            self.make().to(DEVICE)(torch.ones(3, 4, 5, device=DEVICE))


class TestOperators:
    @staticmethod
    def arguments(memory_format: torch.memory_format, **settings: Any) -> tuple[Any, ...]:
        layer, x, _ = on_device(make_layer(3, **settings), *random_input((2, 3, 3, 4), dtype=F32), memory_format)
        instance_mean, mean, var, _ = operators.statistics(x, layer.center_weight, None)
        parameters = [getattr(layer, name) for name in PARAMETERS]
        gate = torch.tensor(True, device=DEVICE)
        return (x.requires_grad_(), *parameters, instance_mean, mean, var, gate, 1e-5)

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("settings", [{}, {"affine": False, "scale_calibration": False}], ids=str)
    @both_formats
    def test_affine(self, memory_format: torch.memory_format, settings: dict, relu: bool) -> None:
        torch.library.opcheck(torch.ops.ubn_zoo.calibrated_affine, (*self.arguments(memory_format, **settings), relu))

    @both_formats
    def test_backward(self, memory_format: torch.memory_format) -> None:
        *tensors, eps = (t.detach() if isinstance(t, Tensor) else t for t in self.arguments(memory_format))
        for activated, *needs in ((None, True, True), (tensors[0], True, True), (None, False, False)):
            arguments = (torch.ones_like(tensors[0]), activated, *tensors, eps, *needs)
            torch.library.opcheck(torch.ops.ubn_zoo.calibrated_affine_backward, arguments)

    @both_formats
    def test_statistics(self, memory_format: torch.memory_format) -> None:
        x = random_input((3, 2, 3, 4), dtype=BF16)[0].to(DEVICE).contiguous(memory_format=memory_format)
        torch.library.opcheck(torch.ops.ubn_zoo.instance_means, (x,))
        for center, samples in ((None, 0), (torch.ones(2, device=DEVICE), 16)):
            torch.library.opcheck(torch.ops.ubn_zoo.statistics, (x, center, samples))

    def test_finalize(self) -> None:
        def vector(*size: int) -> Tensor:
            return torch.rand(size, device=DEVICE)

        for similarity, momentum in ((None, 0.1), (vector(512), None)):
            state = (vector(3), vector(3), vector(), torch.tensor(3, device=DEVICE))
            arguments = (vector(3), vector(3), similarity, *state, momentum, 8, 0.1, 0.15, True)
            torch.library.opcheck(torch.ops.ubn_zoo.finalize, arguments)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def compare(model: nn.Module, launches: list[str], steps: int = 2, **options: Any) -> None:
        """Outputs, gradients and state of compiled and eager steps."""
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, **options)
        for seed in range(steps):
            x = random_input((3, 3, 4, 5), seed, F32)[0].to(DEVICE)
            leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
            launches.clear()
            outputs = [compiled(leaves[0])]
            assert "affine" in launches
            outputs.append(twin(leaves[1]))
            torch.testing.assert_close(*outputs, **OUTPUT[F32].kwargs())
            for m, y in zip((model, twin), outputs, strict=True):
                m.zero_grad()
                launches.clear()
                y.sin().sum().backward()
                assert launches == ["affine_backward"]
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
            expected = gradients(twin)
            for name, value in gradients(model).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)
            state = snapshot(twin)
            for name, value in snapshot(model).items():
                torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"threshold": None}], ids=str)
    def test_in_one_graph(self, settings: dict, training: bool, launches: list[str]) -> None:
        model = nn.Sequential(make_layer(3, **settings)).train(training).to(DEVICE)
        self.compare(model, launches, backend="aot_eager")

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cls", [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d])
    def test_graph_holds_only_the_operators(self, cls: type[nn.Module], training: bool) -> None:
        """Where Dynamo answers a question about the program wrongly, it silently traces the plain equations."""
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        layer = make_layer(3, cls=cls).train(training).to(DEVICE)
        torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 3, 4, 5, device=DEVICE))
        (graph,) = graphs
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        steps = ["statistics", "finalize"] if training else ["instance_means"]
        ours = [name for name in called if name.startswith("ubn_zoo.")]
        assert [name.split(".")[1] for name in ours] == [*steps, "calibrated_affine"]
        assert not any(word in name for name in set(called) - set(ours) for word in ("conv2d", "addcmul", "mean"))

    @pytest.mark.parametrize("training", [True, False])
    def test_with_activation(self, training: bool, launches: list[str]) -> None:
        model = nn.Sequential(make_layer(3, cls=ubn_zoo.UnifiedBatchNormAct2d)).train(training).to(DEVICE)
        self.compare(model, launches, backend="aot_eager")

    def test_batches_of_changing_size(self) -> None:
        layer = make_layer(3).to(DEVICE)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        torch._dynamo.utils.counters.clear()
        for batch, width in ((3, 4), (18, 4), (2, 5), (7, 3)):
            x = random_input((batch, 3, 3, width), batch, F32)[0].to(DEVICE)
            torch.testing.assert_close(compiled(x), twin(x), **OUTPUT[F32].kwargs())
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(snapshot(layer)[name], value, rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.parametrize("cls", [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d])
    def test_checkpointing(self, cls: type[nn.Module], launches: list[str]) -> None:
        """Compiled checkpointing, where the compiler recomputes the layer in backward."""

        class Checkpointed(nn.Sequential):
            def forward(self, input: Tensor) -> Tensor:
                return checkpoint(self[0], input.sin(), use_reentrant=False)

        model = Checkpointed(make_layer(3, cls=cls, gate=0.5)).to(DEVICE)
        twin = nn.Sequential(copy.deepcopy(model[0]))
        x = random_input((3, 3, 4, 5), dtype=F32)[0].to(DEVICE)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(leaves[0])
        y.sum().backward()
        assert launches[-1] == "affine_backward"
        twin(leaves[1].sin()).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(snapshot(model)[name], value, rtol=1e-5, atol=1e-6, msg=name)

    @pytest.mark.slow
    @pytest.mark.skipif(
        not NATIVE and shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
    )
    def test_inductor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        model = nn.Sequential(make_layer(3, gate=0.5, similarity_momentum=0.6)).to(DEVICE)
        self.compare(model, launches, backend="inductor")

    @pytest.mark.skipif(not NATIVE, reason="needs a GPU")
    def test_cuda_graph(self) -> None:
        layer = make_layer(3).to(DEVICE)
        x, grad_y = (t.to(DEVICE) for t in random_input((4, 3, 5, 6), dtype=F32))
        x.requires_grad_()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x).backward(grad_y)
        torch.cuda.synchronize()
        twin = copy.deepcopy(layer)
        graph = torch.cuda.CUDAGraph()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.cuda.graph(graph):
            y = layer(x)
            y.backward(grad_y)
        graph.replay()
        expected = twin(x)
        torch.testing.assert_close(y, expected, **OUTPUT[F32].kwargs())
        for name, value in snapshot(twin).items():
            torch.testing.assert_close(snapshot(layer)[name], value, rtol=1e-5, atol=1e-6, msg=name)


class TestDispatch:
    def test_exported_programs_hold_plain_operations(self, launches: list[str]) -> None:
        layer = make_layer(3).to(DEVICE)
        x = torch.randn(2, 3, 4, 5, device=DEVICE)
        for model in (layer, copy.deepcopy(layer).eval()):
            assert "ubn_zoo" not in str(torch.export.export(model, (x,)).graph)
        assert not launches

    @pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
    def test_traced_programs_hold_plain_operations(self, launches: list[str]) -> None:
        layer = make_layer(3).eval().to(DEVICE)
        traced = torch.jit.trace(layer, torch.randn(2, 3, 4, 5, device=DEVICE), check_trace=False)
        assert "ubn_zoo::" not in str(traced.inlined_graph)
        assert not launches

    @pytest.mark.parametrize("setting", ["UBN_ZOO_TRITON", "triton"])
    def test_plain_operations_without_triton(
        self, setting: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]
    ) -> None:
        operators._is_supported.cache_clear()
        with monkeypatch.context() as patch:
            if setting == "triton":
                patch.setattr(importlib.util, "find_spec", lambda name: None)
            else:
                patch.setenv(setting, "0")
            assert_step(*on_device(make_layer(3), *random_input((3, 3, 4, 5), dtype=F32)))
        operators._is_supported.cache_clear()
        assert not launches

    def test_what_the_kernels_can_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(operators, "DEVICES", {"meta"})
        monkeypatch.setattr(operators, "_is_supported", lambda kind, index, dtype: True)
        monkeypatch.setattr(operators, "_can_compile", lambda kind, index: True)

        def usable(*shape: int, dtype: torch.dtype = F32, kernel_size: int = 3) -> bool:
            return operators.usable(torch.empty(shape, dtype=dtype, device="meta"), kernel_size)

        assert usable(2, 3, 4, 5)
        assert all(usable(2, 3, 4, 5, dtype=dtype) for dtype in (F16, BF16, F64))
        assert not usable(2, 3, 4, 5, dtype=torch.complex64)
        assert all(usable(2, 3, 4, 5, kernel_size=size) for size in (1, 3, 5))
        assert not usable(2, 3, 4, 5, kernel_size=7)
        assert not usable(0, 3, 4, 5)
        # 32-bit offsets within a sample, whatever the batch.
        assert usable(64, 2**11, 2**10, 2**10 - 4)
        assert not usable(1, 2**11, 2**10, 2**10)

    @pytest.mark.parametrize(
        ("capability", "dtypes"), [((7, 0), []), ((7, 5), [F16, F32]), ((8, 0), [F16, BF16, F32])], ids=str
    )
    def test_device_capability(
        self, capability: tuple[int, int], dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        operators._is_supported.cache_clear()
        assert [dtype for dtype in (F16, BF16, F32) if operators._is_supported("cuda", 0, dtype)] == dtypes
        operators._is_supported.cache_clear()

    def test_failure_says_how_to_do_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import OutOfResources

        def fail(*arguments: Any) -> None:
            raise OutOfResources(300, 200, "shared memory")

        monkeypatch.setattr(forward, "affine", fail)
        layer, x, _ = on_device(make_layer(3), *random_input((2, 3, 4, 4), dtype=F32))
        with pytest.raises(RuntimeError, match=r"shared memory.*UBN_ZOO_TRITON=0"):
            layer(x)

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        ],
        ids=["no compiler", "broken compiler"],
    )
    def test_plain_operations_without_a_compiler(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch, launches: list[str]
    ) -> None:
        def fail(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr(statistics, "instance_means", fail)
        operators._can_compile.cache_clear()
        try:
            with pytest.warns(RuntimeWarning, match="cannot compile for .* C compiler") as warned:
                for _ in range(2):
                    assert_step(*on_device(make_layer(3), *random_input((3, 3, 4, 5), dtype=F32)))
            assert len(warned) == 1
            assert not launches
            # A kernel that fails later is an error, which says what to do.
            monkeypatch.setattr(operators, "_can_compile", lambda kind, index: True)
            layer, x, _ = on_device(make_layer(3).eval(), *random_input((3, 3, 4, 5), dtype=F32))
            with pytest.raises(RuntimeError, match="UBN_ZOO_TRITON=0"):
                layer(x)
        finally:
            monkeypatch.undo()
            operators._can_compile.cache_clear()

    def test_nothing_waits_for_the_device(self) -> None:
        for module in (operators, launching, statistics, forward, backward, inference):
            source = Path(module.__file__).read_text(encoding="utf-8")
            assert not any(word in source for word in (".item()", ".cpu()", "bool(", "synchronize"))

    def test_slots_of_the_fake_operator(self) -> None:
        assert operators._SIMILARITY_SLOTS == launching.SIMILARITY_SLOTS


# Of ResNet-50 at batch 128, and sizes that nothing is divisible by.
RESNET = [[128, 64, 112, 112], [128, 256, 56, 56], [128, 512, 28, 28], [128, 1024, 14, 14], [128, 2048, 7, 7]]
ODD = [[3, 33, 13, 57], [1, 3, 1, 1]]


def compile_for(capability: int, cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Compiles all kernels in a process without the interpreter; returns what each takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(REPOSITORY)}
    script = str(Path(__file__).with_name("compile_kernels.py"))
    command = [sys.executable, script, str(capability), *map(json.dumps, cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(found: list[dict[str, Any]], cases: int) -> None:
    # A similarity is for more than one sample, and there are two kinds of prepared norms of several parts.
    assert 13 * cases <= len(found) <= 15 * cases
    for result in found:
        # 64 KiB is what any GPU has to give that Triton supports.
        assert result["shared"] <= 65536, result
        if result["case"]["dtype"] != "float64":
            # The sums of 3x3 taps are held to the registers that let three programs run on a multiprocessor.
            capped = result["kernel"] == "_sums_kernel" and result["case"]["kernel"] == 3 and result["case"]["last"]
            assert result["spilled"] <= (96 if capped else 0), result


class TestNativeCompilation:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "layouts",
        [
            [(RESNET[1], True), (RESNET[4], False)],
            pytest.param([(RESNET[1], False), (RESNET[4], True)], marks=pytest.mark.exhaustive),
        ],
    )
    def test_hopper(self, layouts: list[tuple[list[int], bool]], tmp_path: Path) -> None:
        cases = [{"shape": shape, "dtype": "bfloat16", "kernel": 3, "last": last} for shape, last in layouts]
        found = compile_for(90, cases, tmp_path)
        assert_fits(found, len(cases))
        for result in found:
            if result["case"]["shape"] == RESNET[4] and not result["case"]["last"]:
                continue  # 49 positions in a row: nothing to widen
            if result["kernel"] in ("_moments_kernel", "_similarity_kernel"):
                assert "v4.b32" in result["loads"], result
            if result["kernel"] in ("_affine_kernel", "_sums_kernel", "_input_gradient_kernel"):
                assert not result["case"]["last"] or "v2.b32" in result["loads"], result

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "cases",
        [
            [
                {"shape": ODD[0], "dtype": "float16", "kernel": 5, "last": True},
                {"shape": ODD[1], "dtype": "float32", "kernel": 1, "last": False, "parameters": False, "closed": True},
            ],
            pytest.param(
                [
                    {"shape": RESNET[0], "dtype": "float32", "kernel": 3, "last": False},
                    {"shape": RESNET[2], "dtype": "float64", "kernel": 3, "last": True},
                ],
                marks=pytest.mark.exhaustive,
            ),
        ],
    )
    def test_ampere(self, cases: list[dict[str, Any]], tmp_path: Path) -> None:
        assert_fits(compile_for(80, cases, tmp_path), len(cases))

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("kernel", [1, 3, 5])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("capability", [80, 90])
    def test_everything(self, capability: int, dtype: str, kernel: int, last: bool, tmp_path: Path) -> None:
        cases = [
            {"shape": shape, "dtype": dtype, "kernel": kernel, "last": last, "parameters": full, "closed": not full}
            for shape in RESNET + ODD
            for full in (True, False)
        ]
        assert_fits(compile_for(capability, cases, tmp_path), len(cases))
