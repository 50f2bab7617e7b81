"""The layer's public face, and its outputs, gradients and state against the independent reference."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ubn_zoo
from ubn_zoo.layers import functional

from . import reference
from .common import (
    BUFFERS,
    OPEN,
    PARAMETERS,
    PATHS,
    SHUT,
    assert_state,
    assert_step,
    make_layer,
    random_input,
    snapshot,
    step,
)
from .tolerances import OUTPUT, SIMILARITY, assert_gradient

F32, F64 = torch.float32, torch.float64
FORMATS = [torch.contiguous_format, torch.channels_last]
both_paths = pytest.mark.parametrize("path", PATHS, ids=["layer", "functional"])


class TestSignature:
    def test_layer(self) -> None:
        parameters = inspect.signature(ubn_zoo.UnifiedBatchNorm2d).parameters
        positional = [(p.name, p.default) for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [
            ("num_features", inspect.Parameter.empty),
            ("eps", 1e-5),
            ("momentum", 0.1),
            ("affine", True),
            ("track_running_stats", True),
        ]
        keywords = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == {
            "threshold": 0.15,
            "similarity_momentum": 0.1,
            "similarity_samples": 16,
            "kernel_size": 3,
            "kernel_init": "identity",
            "center_calibration": True,
            "scale_calibration": True,
            "depthwise_affine": True,
            "device": None,
            "dtype": None,
        }

    def test_layer_with_activation_takes_what_timms_takes(self) -> None:
        theirs = [
            (p.name, p.default)
            for p in inspect.signature(BatchNormAct2d).parameters.values()
            if p.name not in ("device", "dtype")
        ]
        ours = [
            (p.name, p.default)
            for p in inspect.signature(ubn_zoo.UnifiedBatchNormAct2d).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert ours == theirs

    def test_not_a_batchnorm(self) -> None:
        """Converters of torch and timm rebuild every BatchNorm subclass as a plain one."""
        for cls in (ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d):
            assert not issubclass(cls, nn.modules.batchnorm._BatchNorm)


class TestContents:
    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    @pytest.mark.parametrize("cls", [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d])
    def test_names_shapes_and_start(self, cls: type[nn.Module], kernel_size: int) -> None:
        layer = cls(4, kernel_size=kernel_size)
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
            "weight": (4, 1, kernel_size, kernel_size),
            "bias": (4,),
            "center_weight": (4,),
            "scale_weight": (4,),
            "scale_bias": (4,),
        }
        assert {name: (tuple(b.shape), b.dtype) for name, b in layer.named_buffers()} == {
            "running_mean": ((4,), torch.float32),
            "running_var": ((4,), torch.float32),
            "num_batches_tracked": ((), torch.int64),
            "feature_similarity": ((), torch.float32),
        }
        assert set(layer.state_dict()) == {*PARAMETERS, *BUFFERS}
        for name in ("bias", "center_weight", "scale_weight"):
            assert torch.equal(getattr(layer, name), torch.zeros(4))
        assert torch.equal(layer.scale_bias, torch.ones(4))
        assert torch.equal(layer.running_mean, torch.zeros(4))
        assert torch.equal(layer.running_var, torch.ones(4))
        assert int(layer.num_batches_tracked) == 0
        assert float(layer.feature_similarity) == 1.0
        assert layer.num_features == 4

    def test_constants_are_attributes(self) -> None:
        layer = ubn_zoo.UnifiedBatchNorm2d(
            2, 1e-3, 0.2, threshold=0.3, similarity_momentum=0.4, similarity_samples=5, kernel_size=1
        )
        assert reference.settings_of(layer) == reference.Settings(1e-3, 0.2, 0.3, 0.4, 5)

    def test_repr_names_what_differs(self) -> None:
        text = repr(ubn_zoo.UnifiedBatchNorm2d(7, eps=0.25, momentum=0.75, threshold=0.375))
        for part in ("UnifiedBatchNorm2d", "7", "0.25", "0.75", "0.375"):
            assert part in text

    def test_reset_parameters_restores_the_start(self) -> None:
        layer = make_layer(3, gate=SHUT)
        layer.reset_parameters()
        fresh = ubn_zoo.UnifiedBatchNorm2d(3)
        for (name, value), expected in zip(layer.state_dict().items(), fresh.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


class TestTrainingStep:
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    @pytest.mark.parametrize("shape", [(2, 3, 5, 4), (5, 3, 2, 7), (4, 3, 1, 1), (1, 3, 4, 3), (3, 1, 6, 6)], ids=str)
    @both_paths
    def test_output_gradients_and_state(
        self, path: type[nn.Module], shape: tuple[int, ...], kernel_size: int, gate: float
    ) -> None:
        layer = make_layer(shape[1], gate=gate, cls=path, kernel_size=kernel_size, dtype=F64)
        expected = assert_step(layer, *random_input(shape))
        assert expected.gate == (gate == OPEN)

    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("off", [(), ("center_calibration",), ("scale_calibration",), ("depthwise_affine",)])
    @pytest.mark.parametrize("affine", [True, False])
    @both_paths
    def test_parts_switched_off(self, path: type[nn.Module], affine: bool, off: tuple[str, ...], gate: float) -> None:
        layer = make_layer(3, gate=gate, cls=path, affine=affine, dtype=F64, **dict.fromkeys(off, False))
        assert_step(layer, *random_input((4, 3, 5, 4)))

    @both_paths
    def test_defaults_in_float32(self, path: type[nn.Module]) -> None:
        layer = path(3)
        assert_step(layer, *random_input((4, 3, 5, 4), dtype=torch.float32))

    @both_paths
    def test_other_constants(self, path: type[nn.Module]) -> None:
        settings = {"threshold": 0.4, "similarity_momentum": 0.5, "similarity_samples": 3, "eps": 0.1, "momentum": 0.3}
        layer = make_layer(3, gate=0.5, cls=path, dtype=F64, **settings)
        for seed in range(4):
            assert_step(layer, *random_input((6, 3, 4, 4), seed))

    @pytest.mark.parametrize("momentum", [0.1, 0.6, 0.0, 1.0, None])
    @both_paths
    def test_many_steps_across_the_gate(self, path: type[nn.Module], momentum: float | None) -> None:
        """Samples become unlike and alike again: the gate shuts and reopens, each step compared."""
        layer = make_layer(3, gate=0.6, cls=path, momentum=momentum, similarity_momentum=0.4, dtype=F64)
        layer.num_batches_tracked.zero_()
        gates = []
        for i, shared in enumerate([2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]):
            x, grad_y = random_input((5, 3, 6, 6), seed=i, shared=shared)
            gates.append(assert_step(layer, x - 0.3, grad_y).gate)
        assert sorted(set(gates)) == [False, True]
        assert gates[-1]
        assert int(layer.num_batches_tracked) == len(gates)

    @both_paths
    def test_shut_gate_leaves_running_statistics_bitwise(self, path: type[nn.Module]) -> None:
        layer = make_layer(3, gate=SHUT, cls=path)
        before = snapshot(layer)
        step(layer, *random_input((4, 3, 5, 5), dtype=torch.float32))
        for name in ("running_mean", "running_var"):
            assert torch.equal(getattr(layer, name), before[name])
        assert int(layer.num_batches_tracked) == 1

    @both_paths
    def test_statistics_that_are_not_finite_do_not_leak_through_the_other_side(self, path: type[nn.Module]) -> None:
        """A side of the gate that is not taken must not spoil output or gradient: nan * 0 is nan."""
        layer = make_layer(3, gate=OPEN, cls=path, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 5))
        expected = reference.run_like(layer, x, grad_y)
        layer.running_var.fill_(math.inf)
        y, grad_x = step(layer, x, grad_y)
        torch.testing.assert_close(y, expected.y, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(grad_x, expected.grad_x, **OUTPUT[F64].kwargs())

    @pytest.mark.parametrize("requires", [(), ("x",), ("weight",), ("center_weight", "scale_weight"), ("bias", "x")])
    def test_partial_gradients(self, requires: tuple[str, ...]) -> None:
        layer = make_layer(3, dtype=F64)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in requires)
        x, grad_y = random_input((4, 3, 5, 5))
        expected = reference.run_like(layer, x, grad_y)
        x.requires_grad_("x" in requires)
        y = layer(x)
        torch.testing.assert_close(y.detach(), expected.y, **OUTPUT[F64].kwargs())
        assert y.requires_grad == bool(requires)
        if requires:
            y.backward(grad_y)
        found = {name for name, p in layer.named_parameters() if p.grad is not None}
        assert found == set(requires) - {"x"}
        for name in found:
            torch.testing.assert_close(getattr(layer, name).grad, expected.grads[name], **OUTPUT[F64].kwargs())
        if "x" in requires:
            torch.testing.assert_close(x.grad, expected.grad_x, **OUTPUT[F64].kwargs())
        else:
            assert x.grad is None

    def test_training_without_gradients_moves_the_state(self) -> None:
        layer = make_layer(3, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 5))
        expected = reference.run_like(layer, x, grad_y)
        with torch.no_grad():
            y = layer(x)
        torch.testing.assert_close(y, expected.y, **OUTPUT[F64].kwargs())
        assert_state(layer, expected.state)

    def test_input_is_left_alone(self) -> None:
        layer = make_layer(3)
        x, grad_y = random_input((4, 3, 5, 5), dtype=torch.float32)
        before, grad_before = x.clone(), grad_y.clone()
        step(layer, x, grad_y)
        assert torch.equal(x, before)
        assert torch.equal(grad_y, grad_before)

    def test_gradient_that_is_expanded_or_transposed(self) -> None:
        layer = make_layer(3, dtype=F64)
        x, _ = random_input((4, 3, 5, 5))
        assert_step(layer, x, torch.ones((), dtype=F64).expand(4, 3, 5, 5))
        assert_step(layer, x.transpose(2, 3), x.transpose(0, 2).contiguous().transpose(0, 2))


class TestSimilarity:
    @pytest.mark.parametrize("samples", [2, 3, 16, 100])
    @pytest.mark.parametrize("batch", [1, 2, 16, 17, 20])
    @both_paths
    def test_only_the_first_samples_count(self, path: type[nn.Module], batch: int, samples: int) -> None:
        layer = path(2, similarity_samples=samples, similarity_momentum=1.0, dtype=F64)
        x, _ = random_input((batch, 2, 4, 3))
        layer(x)
        torch.testing.assert_close(
            float(layer.feature_similarity), reference.similarity(x, samples), **SIMILARITY.kwargs()
        )
        changed = x.clone()
        changed[samples:] += 5.0
        twin = path(2, similarity_samples=samples, similarity_momentum=1.0, dtype=F64)
        twin(changed)
        torch.testing.assert_close(twin.feature_similarity, layer.feature_similarity, **SIMILARITY.kwargs())

    @pytest.mark.parametrize(
        ("samples", "expected"),
        [
            (torch.ones(3, 2, 2, 2), 1.0),
            (torch.stack([torch.ones(2, 2, 2), -torch.ones(2, 2, 2)]), -1.0),
            (torch.eye(4).reshape(4, 4, 1, 1).expand(4, 4, 2, 2), 0.0),
            (torch.zeros(3, 2, 2, 2), 0.0),
            # Two alike and one of zero norm: one pair of three has cosine 1.
            (torch.stack([torch.ones(2, 2, 2), torch.ones(2, 2, 2), torch.zeros(2, 2, 2)]), 1 / 3),
        ],
        ids=["equal", "opposite", "orthogonal", "all zero", "one zero"],
    )
    @both_paths
    def test_known_values(self, path: type[nn.Module], samples: torch.Tensor, expected: float) -> None:
        layer = path(samples.shape[1], similarity_momentum=1.0)
        layer(samples)
        assert float(layer.feature_similarity) == pytest.approx(expected, abs=2e-6)

    @pytest.mark.parametrize("scale", [1e-18, 1e-4, 1e4, 1e15])
    @both_paths
    def test_does_not_depend_on_scale(self, path: type[nn.Module], scale: float) -> None:
        x, _ = random_input((4, 3, 5, 5), dtype=torch.float32)
        layer = path(3, similarity_momentum=1.0)
        layer(x * scale)
        assert float(layer.feature_similarity) == pytest.approx(reference.similarity(x), abs=1e-5)

    @both_paths
    def test_costs_one_pass(self, path: type[nn.Module]) -> None:
        """Comparing all pairs of 16 samples is 2 * 16 operations per element; one pass needs a few."""
        layer = path(8, affine=False)
        x = torch.randn(16, 8, 12, 12)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() <= 8 * x.numel()

    @both_paths
    def test_gate_opens_only_above_the_threshold(self, path: type[nn.Module]) -> None:
        """g = [r > tau], and r exactly at tau is shut. One sample has s = 1 by definition, so r is 0.5 unrounded."""
        layer = path(1, threshold=0.5, similarity_momentum=0.5, kernel_size=1)
        layer.feature_similarity.fill_(0.0)
        layer(torch.ones(1, 1, 2, 2))
        assert float(layer.feature_similarity) == 0.5
        assert torch.equal(layer.running_mean, torch.zeros(1))

    @both_paths
    def test_no_threshold_means_batch_statistics(self, path: type[nn.Module]) -> None:
        layer = make_layer(3, gate=SHUT, cls=path, threshold=None, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 5))
        expected = reference.run_like(layer, x, grad_y)
        assert expected.gate
        y, grad_x = step(layer, x, grad_y)
        torch.testing.assert_close(y, expected.y, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(grad_x, expected.grad_x, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(layer.running_mean, expected.state.running_mean, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(layer.running_var, expected.state.running_var, **OUTPUT[F64].kwargs())


class TestEvaluation:
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    @both_paths
    def test_uses_running_statistics_and_moves_nothing(
        self, path: type[nn.Module], kernel_size: int, gate: float
    ) -> None:
        layer = make_layer(3, gate=gate, cls=path, kernel_size=kernel_size, dtype=F64).eval()
        before = snapshot(layer)
        assert_step(layer, *random_input((4, 3, 5, 4)))
        for name, value in snapshot(layer).items():
            assert torch.equal(value, before[name]), name

    def test_samples_do_not_see_each_other(self) -> None:
        layer = make_layer(3, dtype=F64).eval()
        x, _ = random_input((4, 3, 5, 4))
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), **OUTPUT[F64].kwargs())

    def test_one_value_per_channel(self) -> None:
        layer = make_layer(3, dtype=F64).eval()
        assert_step(layer, *random_input((1, 3, 1, 1)))

    def test_without_gradients_equals_with(self) -> None:
        layer = make_layer(3, dtype=F64).eval()
        x, _ = random_input((4, 3, 5, 4))
        with torch.inference_mode():
            y = layer(x)
        torch.testing.assert_close(y.clone(), layer(x).detach(), **OUTPUT[F64].kwargs())


class TestWithoutRunningStatistics:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("kernel_size", [1, 3])
    @both_paths
    def test_batch_statistics_always(self, path: type[nn.Module], kernel_size: int, training: bool) -> None:
        layer = make_layer(3, cls=path, track_running_stats=False, kernel_size=kernel_size, dtype=F64).train(training)
        assert layer.running_mean is None
        assert layer.running_var is None
        for seed in range(2):
            assert_step(layer, *random_input((4, 3, 5, 4), seed, shared=0.0))

    def test_round_trip(self) -> None:
        layer = make_layer(3, track_running_stats=False)
        twin = ubn_zoo.UnifiedBatchNorm2d(3, track_running_stats=False)
        twin.load_state_dict(layer.state_dict())
        x, _ = random_input((4, 3, 5, 4), dtype=torch.float32)
        assert torch.equal(twin(x), layer(x))


class TestActivation:
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("arguments", "function"),
        [
            ({}, torch.relu),
            ({"act_layer": nn.SiLU}, nn.functional.silu),
            ({"act_layer": "hard_swish"}, nn.functional.hardswish),
            (
                {"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3}},
                lambda y: torch.where(y > 0, y, 0.3 * y),
            ),
            ({"apply_act": False}, lambda y: y),
            ({"act_layer": None}, lambda y: y),
            ({"inplace": False}, torch.relu),
            ({"drop_layer": lambda: nn.Hardtanh(-0.5, 0.5)}, lambda y: torch.relu(y.clamp(-0.5, 0.5))),
        ],
        ids=["relu", "silu", "named", "kwargs", "not applied", "none", "not in place", "drop"],
    )
    def test_activation_follows_norm(self, arguments: dict, function, training: bool, gate: float) -> None:
        layer = make_layer(3, gate=gate, cls=ubn_zoo.UnifiedBatchNormAct2d, dtype=F64, **arguments).train(training)
        x, grad_y = random_input((4, 3, 5, 5))
        leaves = x.clone().requires_grad_()
        parameters, state, settings = (
            reference.parameters_of(layer),
            reference.state_of(layer),
            reference.settings_of(layer),
        )
        expected = function(reference.forward(leaves, parameters, state, settings, training)[0])
        (expected_grad,) = torch.autograd.grad(expected, leaves, grad_y)
        y, grad_x = step(layer, x, grad_y)
        torch.testing.assert_close(y, expected.detach(), **OUTPUT[F64].kwargs())
        torch.testing.assert_close(grad_x, expected_grad, **OUTPUT[F64].kwargs())

    def test_positional_arguments_are_timms(self) -> None:
        layer = ubn_zoo.UnifiedBatchNormAct2d(
            3, 1e-3, 0.2, True, True, True, nn.LeakyReLU, {"negative_slope": 0.25}, False, nn.Identity
        )
        assert (layer.eps, layer.momentum) == (1e-3, 0.2)
        assert isinstance(layer.act, nn.LeakyReLU)
        assert layer.act.negative_slope == 0.25
        assert not layer.act.inplace
        assert isinstance(layer.drop, nn.Identity)

    def test_ubn_settings_as_keywords(self) -> None:
        layer = ubn_zoo.UnifiedBatchNormAct2d(3, threshold=None, kernel_size=5, center_calibration=False)
        assert layer.threshold is None
        assert layer.weight.shape == (3, 1, 5, 5)
        assert layer.center_weight is None

    def test_same_state_dict_as_the_layer_without(self) -> None:
        layer = make_layer(3, cls=ubn_zoo.UnifiedBatchNormAct2d)
        ubn_zoo.UnifiedBatchNorm2d(3).load_state_dict(layer.state_dict())

    def test_callers_kwargs_are_not_changed(self) -> None:
        kwargs = {"negative_slope": 0.25}
        ubn_zoo.UnifiedBatchNormAct2d(3, act_layer=nn.LeakyReLU, act_kwargs=kwargs)
        assert kwargs == {"negative_slope": 0.25}


class TestFunctional:
    """The plain-torch equations on bare tensors; most of them is tested as one of the layer's `PATHS`."""

    def test_without_buffers(self) -> None:
        x, _ = random_input((4, 3, 5, 5))
        expected, _, _ = reference.forward(
            x, reference.Parameters(), reference.State(None, None), reference.Settings(), False
        )
        torch.testing.assert_close(functional.unified_batch_norm(x), expected, **OUTPUT[F64].kwargs())

    def test_without_a_similarity_batch_statistics_are_used(self) -> None:
        layer = make_layer(3, gate=SHUT, threshold=None, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 5))
        expected = reference.run_like(layer, x, grad_y)
        parameters = {name: getattr(layer, name) for name in PARAMETERS}
        y = functional.unified_batch_norm(x, layer.running_mean, layer.running_var, **parameters, training=True)
        torch.testing.assert_close(y.detach(), expected.y, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(layer.running_var, expected.state.running_var, **OUTPUT[F64].kwargs())

    def test_similarity(self) -> None:
        x, _ = random_input((20, 3, 5, 5))
        x[2] = 0.0
        for samples in (2, 5, 16, 30):
            found = functional.feature_similarity(x, samples)
            torch.testing.assert_close(float(found), reference.similarity(x, samples), rtol=1e-9, atol=1e-9)


class TestLargeBatch:
    """Batches that do not fit a CPU's cache are worked on in parts; five samples make parts of two, two and one."""

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"kernel_size": 5, "scale_calibration": False},
            {"kernel_size": 1},
            {"kernel_size": 1, "scale_calibration": False, "center_calibration": False},
            {"affine": False},
            {"affine": False, "scale_calibration": False},
        ],
        ids=str,
    )
    def test_step(self, settings: dict, gate: float, memory_format: torch.memory_format) -> None:
        x, grad_y = random_input((5, 3, 300, 300))
        x, grad_y = x.contiguous(memory_format=memory_format), grad_y.contiguous(memory_format=memory_format)
        given = grad_y.clone()
        assert_step(make_layer(3, dtype=F64, gate=gate, **settings), x, grad_y)
        assert torch.equal(grad_y, given)

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_precisions(self, memory_format: torch.memory_format) -> None:
        """Float32 and bfloat16 make parts of other sizes."""
        for dtype, shape in ((F32, (5, 3, 400, 400)), (torch.bfloat16, (5, 3, 600, 600))):
            x, grad_y = random_input(shape, dtype=dtype)
            layer = make_layer(3, dtype=dtype)
            expected = reference.run_like(layer, x, grad_y)
            y, grad_x = step(layer, x.contiguous(memory_format=memory_format), grad_y)
            assert y.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(y.double(), expected.y, **OUTPUT[dtype].kwargs(), check_stride=False)
            assert_gradient(grad_x, expected.grad_x, dtype, "x")
