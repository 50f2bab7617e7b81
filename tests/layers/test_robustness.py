"""Gradient checks, copies, edge cases of the input, wrong arguments, and what must never happen in a step."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import ubn_zoo

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
    randomize,
    snapshot,
    step,
    ubn_layers,
)
from .tolerances import OUTPUT

F32, F64 = torch.float32, torch.float64
both_paths = pytest.mark.parametrize("path", PATHS, ids=["layer", "functional"])
CLASSES = [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d]


def function_of(layer: nn.Module):
    """The layer as a function of input and parameters that does not move the layer's state."""
    names = [name for name, _ in layer.named_parameters()]
    start = snapshot(layer)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in start.items()}
        return functional_call(layer, {**dict(zip(names, parameters, strict=True)), **buffers}, (x,))

    return function, [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]


class TestGradients:
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    @pytest.mark.parametrize("training", [True, False])
    @both_paths
    def test_gradcheck(self, path: type[nn.Module], training: bool, kernel_size: int, gate: float) -> None:
        layer = make_layer(2, gate=gate, cls=path, kernel_size=kernel_size, dtype=F64).train(training)
        function, parameters = function_of(layer)
        x = random_input((3, 2, 4, 3))[0].requires_grad_()
        assert gradcheck(function, (x, *parameters))

    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("settings", [{"affine": False}, {"center_calibration": False, "scale_calibration": False}])
    def test_gradcheck_with_parts_off(self, settings: dict, gate: float) -> None:
        function, parameters = function_of(make_layer(2, gate=gate, dtype=F64, **settings))
        x = random_input((3, 2, 3, 3))[0].requires_grad_()
        assert gradcheck(function, (x, *parameters))

    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    def test_gradgradcheck(self, gate: float) -> None:
        function, parameters = function_of(make_layer(2, gate=gate, dtype=F64))
        x = random_input((2, 2, 3, 2))[0].requires_grad_()
        assert gradgradcheck(function, (x, *parameters))

    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("training", [True, False])
    @both_paths
    def test_double_backward_equals_the_references(
        self, path: type[nn.Module], training: bool, kernel_size: int, gate: float
    ) -> None:
        """A gradient penalty: the gradient of the squared norm of the input's gradient, for input and parameters."""
        layer = make_layer(3, gate=gate, cls=path, kernel_size=kernel_size, dtype=F64).train(training)
        x, grad_y = random_input((4, 3, 5, 4))
        constants = reference.parameters_of(layer), reference.state_of(layer), reference.settings_of(layer)

        def penalty(y: Tensor, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
            (grad_x,) = torch.autograd.grad(y.sin(), x, grad_y, create_graph=True)
            return torch.autograd.grad(grad_x.square().sum() + y.square().sum(), [x, *parameters])

        ours_x = x.clone().requires_grad_()
        ours = penalty(layer(ours_x), ours_x, [getattr(layer, name) for name in PARAMETERS])
        theirs_x = x.clone().requires_grad_()
        leaves = {name: value.requires_grad_() for name, value in constants[0].items()}
        y, _, _ = reference.forward(theirs_x, reference.Parameters(**leaves), *constants[1:], training)
        theirs = penalty(y, theirs_x, [leaves[name] for name in PARAMETERS])
        for name, a, b in zip(("x", *PARAMETERS), ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda t, n=name: f"{n}: {t}")

    def test_backward_twice_through_a_retained_graph(self) -> None:
        layer = make_layer(3, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 4))
        x.requires_grad_()
        y = layer(x)
        y.backward(grad_y, retain_graph=True)
        first = x.grad.clone()
        y.backward(grad_y)
        torch.testing.assert_close(x.grad, 2 * first, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    def test_gradient_accumulation(self, gate: float) -> None:
        """Two forwards before two backwards: state and gradients are those of two steps without an update between."""
        layer = make_layer(3, gate=gate, dtype=F64)
        batches = [random_input((4, 3, 5, 4), seed) for seed in range(2)]
        parameters, state, settings = (
            reference.parameters_of(layer),
            reference.state_of(layer),
            reference.settings_of(layer),
        )
        total: dict[str, Tensor] = {}
        outputs = []
        for x, grad_y in batches:
            result = reference.run(x, grad_y, parameters, state, settings)
            state = result.state
            for name, grad in result.grads.items():
                total[name] = total.get(name, 0) + grad
            outputs.append((layer(x), grad_y))
        for y, grad_y in outputs:
            y.backward(grad_y)
        for name, grad in total.items():
            torch.testing.assert_close(getattr(layer, name).grad, grad, **OUTPUT[F64].kwargs())
        assert_state(layer, state)

    def test_layer_used_twice_in_one_step(self) -> None:
        layer = make_layer(3, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 4))
        leaves = {n: v.requires_grad_() for n, v in reference.parameters_of(layer).items()}
        state, settings = reference.state_of(layer), reference.settings_of(layer)
        y, state, _ = reference.forward(x, reference.Parameters(**leaves), state, settings, training=True)
        y, state, _ = reference.forward(y.tanh(), reference.Parameters(**leaves), state, settings, training=True)
        expected = torch.autograd.grad(y, list(leaves.values()), grad_y)
        layer(layer(x).tanh()).backward(grad_y)
        for name, grad in zip(leaves, expected, strict=True):
            torch.testing.assert_close(getattr(layer, name).grad, grad, **OUTPUT[F64].kwargs())
        assert_state(layer, state)


class TestCopies:
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize(
        "duplicate",
        [
            pytest.param(copy.deepcopy, id="deepcopy"),
            pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle"),  # noqa: S301  # made in this test
        ],
    )
    def test_copies_are_equal_and_independent(self, duplicate, cls: type[nn.Module]) -> None:
        layer = make_layer(3, cls=cls, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 4))
        # A step first: whatever the layer remembers of it must not stand in the way.
        step(layer, x, grad_y)
        twin = duplicate(layer)
        before = snapshot(layer)
        y, grad_x = step(twin, x, grad_y)
        assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())
        y_layer, grad_x_layer = step(layer, x, grad_y)
        assert torch.equal(y, y_layer)
        assert torch.equal(grad_x, grad_x_layer)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name

    @pytest.mark.parametrize("cls", CLASSES)
    def test_saving_the_whole_module(self, cls: type[nn.Module]) -> None:
        layer = make_layer(3, cls=cls, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 4))
        step(layer, x, grad_y)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(x), layer(x))

    @pytest.mark.parametrize("cls", CLASSES)
    def test_state_dict_round_trip(self, cls: type[nn.Module]) -> None:
        layer = make_layer(3, cls=cls, dtype=F64)
        layer.feature_similarity.fill_(0.16)
        for seed in range(2):
            layer(random_input((4, 3, 5, 4), seed, shared=0.0)[0])
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        twin = cls(3, dtype=F64)
        twin.load_state_dict(torch.load(file, weights_only=True))
        x, grad_y = random_input((4, 3, 5, 4), seed=5, shared=0.0)
        y, grad_x = step(layer, x, grad_y)
        y_twin, grad_twin = step(twin, x, grad_y)
        assert torch.equal(y, y_twin)
        assert torch.equal(grad_x, grad_twin)
        for name in BUFFERS:
            assert torch.equal(getattr(layer, name), getattr(twin, name)), name

    @pytest.mark.parametrize("missing", ["running_mean", "bias", "center_weight"])
    def test_missing_entries_are_reported(self, missing: str) -> None:
        state = make_layer(3).state_dict()
        del state[missing]
        with pytest.raises(RuntimeError, match=missing):
            ubn_zoo.UnifiedBatchNorm2d(3).load_state_dict(state)

    def test_unexpected_and_misshaped_entries_are_reported(self) -> None:
        with pytest.raises(RuntimeError, match="surplus"):
            ubn_zoo.UnifiedBatchNorm2d(3).load_state_dict({**make_layer(3).state_dict(), "surplus": torch.zeros(1)})
        with pytest.raises(RuntimeError, match="weight"):
            ubn_zoo.UnifiedBatchNorm2d(3).load_state_dict(make_layer(3, kernel_size=5).state_dict())
        with pytest.raises(RuntimeError, match="running_mean"):
            ubn_zoo.UnifiedBatchNorm2d(3).load_state_dict(make_layer(4).state_dict())

    def test_loading_leaves_the_given_dict_alone(self) -> None:
        state = nn.BatchNorm2d(3).state_dict()
        before = {name: value.clone() for name, value in state.items()}
        ubn_zoo.UnifiedBatchNorm2d(3).load_state_dict(state)
        assert list(state) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in state.items())

    def test_assigning_load(self) -> None:
        state = make_layer(3).state_dict()
        with torch.device("meta"):
            layer = ubn_zoo.UnifiedBatchNorm2d(3)
        layer.load_state_dict(state, assign=True)
        x, _ = random_input((4, 3, 5, 4), dtype=F32)
        assert torch.equal(layer(x), make_layer(3)(x))

    @pytest.mark.parametrize("foreach", [True, False])
    def test_timms_moving_average(self, foreach: bool) -> None:
        model = randomize(nn.Sequential(nn.Conv2d(3, 3, 3), ubn_zoo.UnifiedBatchNorm2d(3), nn.ReLU()))
        ema = ModelEmaV3(model, decay=0.75, foreach=foreach)
        start = {name: value.clone() for name, value in ema.module.state_dict().items()}
        x, _ = random_input((4, 3, 7, 6), dtype=F32)
        model(x).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        ema.update(model)
        for name, value in ema.module.state_dict().items():
            expected = model.state_dict()[name]
            if value.is_floating_point():
                expected = 0.75 * start[name] + 0.25 * expected
            torch.testing.assert_close(value, expected, msg=lambda t, n=name: f"{n}: {t}")
        assert not ema.module[1].training
        ema.module(x)

    def test_torchs_moving_average(self) -> None:
        model = randomize(nn.Sequential(ubn_zoo.UnifiedBatchNorm2d(3)))
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        x, _ = random_input((4, 3, 7, 6), dtype=F32)
        model(x)
        average.update_parameters(model)
        assert average.module[0].feature_similarity == model[0].feature_similarity


class TestEdgesOfTheInput:
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize(
        "shape", [(1, 3, 4, 5), (1, 3, 1, 2), (2, 3, 1, 1), (20, 3, 1, 1), (2, 3, 1, 5), (2, 3, 5, 1)], ids=str
    )
    @pytest.mark.parametrize("kernel_size", [3, 5])
    @both_paths
    def test_small_batches_and_pictures(
        self, path: type[nn.Module], kernel_size: int, shape: tuple[int, ...], gate: float
    ) -> None:
        """A batch of one is one sample, with s = 1; one pixel leaves the kernel's middle tap only."""
        layer = make_layer(3, gate=gate, cls=path, kernel_size=kernel_size, dtype=F64)
        assert_step(layer, *random_input(shape))

    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_one_value_per_channel_in_training_raises_as_batchnorm_does(
        self, cls: type[nn.Module], gate: float
    ) -> None:
        layer = make_layer(3, cls=cls, gate=gate)
        before = snapshot(layer)
        x = torch.randn(1, 3, 1, 1)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm2d(3)(x)
        with pytest.raises(ValueError, match=r"1, 3, 1, 1"):
            layer(x)
        for name, value in snapshot(layer).items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("zeros", [[0], [1, 3], [0, 1, 2, 3, 4], [17]])
    @pytest.mark.parametrize("gate", [OPEN, SHUT, 0.16])
    @both_paths
    def test_samples_of_zero_norm(self, path: type[nn.Module], gate: float, zeros: list[int]) -> None:
        batch = 20 if max(zeros) > 5 else 5
        x, grad_y = random_input((batch, 3, 4, 4))
        x[zeros] = 0.0
        expected = assert_step(make_layer(3, gate=gate, cls=path, dtype=F64), x, grad_y)
        assert expected.y.isfinite().all()
        assert expected.grad_x.isfinite().all()

    @pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
    def test_all_zeros(self, dtype: torch.dtype) -> None:
        x, grad_y = random_input((4, 3, 4, 4), dtype=dtype)
        assert_step(make_layer(3, dtype=dtype), torch.zeros_like(x), grad_y)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3, 1, 1)], ids=str)
    @pytest.mark.parametrize("cls", CLASSES)
    def test_empty_batch(self, cls: type[nn.Module], shape: tuple[int, ...], gate: float, training: bool) -> None:
        """As with BatchNorm: an empty output, gradients of zero, statistics that do not move."""
        layer = make_layer(3, cls=cls, gate=gate).train(training)
        before = snapshot(layer)
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        for name in PARAMETERS:
            grad = getattr(layer, name).grad
            assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name
        for name in ("running_mean", "running_var", "feature_similarity"):
            assert torch.equal(getattr(layer, name), before[name]), name

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 4, 4)], ids=str)
    def test_wrong_rank(self, shape: tuple[int, ...], cls: type[nn.Module], training: bool) -> None:
        layer = make_layer(3, cls=cls).train(training)
        before = snapshot(layer)
        with pytest.raises(ValueError, match=rf"4.*{', '.join(map(str, shape))}"):
            layer(torch.zeros(shape))
        assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("channels", [1, 2, 4, 6])
    def test_wrong_number_of_channels(self, channels: int, cls: type[nn.Module], training: bool) -> None:
        """Also one channel, which broadcasting would let pass, and a multiple, which grouping would."""
        layer = make_layer(3, cls=cls).train(training)
        before = snapshot(layer)
        with pytest.raises(ValueError, match=rf"3.*{channels}|{channels}.*3"):
            layer(torch.zeros(2, channels, 4, 4))
        assert all(torch.equal(value, before[name]) for name, value in snapshot(layer).items())

    def test_single_channel_layer_refuses_more(self) -> None:
        with pytest.raises(ValueError, match="3"):
            make_layer(1)(torch.zeros(2, 3, 4, 4))


class TestBadArguments:
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"kernel_size": 2}, "kernel_size"),
            ({"kernel_size": 0}, "kernel_size"),
            ({"kernel_size": -1}, "kernel_size"),
            ({"kernel_init": "he"}, "kernel_init"),
            ({"kernel_init": "Identity"}, "kernel_init"),
            ({"similarity_samples": 0}, "similarity_samples"),
            ({"similarity_samples": -3}, "similarity_samples"),
            ({"similarity_momentum": -0.1}, "similarity_momentum"),
            ({"similarity_momentum": 1.5}, "similarity_momentum"),
            ({"num_features": 0}, "num_features"),
            ({"num_features": -2}, "num_features"),
            ({"threshold": float("nan")}, "threshold"),
        ],
        ids=str,
    )
    def test_out_of_range(self, arguments: dict, named: str, cls: type[nn.Module]) -> None:
        """The message names the argument and what it was given."""
        value = str(arguments[named]).lower()
        with pytest.raises(ValueError, match=named) as caught:
            cls(**{"num_features": 3, **arguments})
        assert value in str(caught.value).lower()

    def test_unknown_keyword(self) -> None:
        for cls in CLASSES:
            with pytest.raises(TypeError, match="treshold"):
                cls(3, treshold=0.1)

    def test_settings_are_keywords_only(self) -> None:
        with pytest.raises(TypeError):
            ubn_zoo.UnifiedBatchNorm2d(3, 1e-5, 0.1, True, True, 0.15)


class NoHostSynchronization(TorchDispatchMode):
    """Raises where a tensor's value is asked for, which on an accelerator waits for the device."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.item.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func in self.FORBIDDEN:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class TestFunctionTransforms:
    """What torch.func makes of the layer: it has no rules for the eager mode's own backward."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_grad(self, cls: type[nn.Module], training: bool) -> None:
        layer = make_layer(3, cls=cls).train(training)
        x = random_input((4, 3, 5, 5), dtype=F32)[0]
        parameters = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            # Under a transform only what is given may be written to.
            buffers = {name: torch.zeros_like(value) + value for name, value in layer.named_buffers()}
            return functional_call(layer, {**parameters, **buffers}, (x,)).sin().sum()

        found = torch.func.grad(loss)(parameters)
        layer(x).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, **OUTPUT[F32].kwargs())

    def test_ensemble(self) -> None:
        layers = [make_layer(3, seed=seed).eval() for seed in range(2)]
        parameters, buffers = torch.func.stack_module_state(layers)
        x = random_input((4, 3, 5, 5), dtype=F32)[0]
        together = torch.vmap(lambda *state: functional_call(layers[0], state, (x,)))(parameters, buffers)
        for layer, output in zip(layers, together, strict=True):
            torch.testing.assert_close(output, layer(x), **OUTPUT[F32].kwargs())


class TestNeverWaits:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"momentum": None},
            {"threshold": None},
            {"track_running_stats": False},
            {"affine": False},
            {"kernel_size": 1},
            {"center_calibration": False, "scale_calibration": False},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("gate", [OPEN, SHUT])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_step(self, cls: type[nn.Module], gate: float, training: bool, settings: dict) -> None:
        layer = make_layer(3, cls=cls, gate=gate, **settings).train(training)
        x, grad_y = random_input((4, 3, 5, 5), dtype=F32)
        with NoHostSynchronization():
            step(layer, x, grad_y)
            with torch.no_grad():
                layer(x)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32], ids=str)
    def test_step_in_other_precision(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        layer = make_layer(3, dtype=dtype)
        x, grad_y = random_input((4, 3, 5, 5), dtype=dtype)
        with NoHostSynchronization(), torch.autocast("cpu", dtype=torch.bfloat16):
            step(layer, x.contiguous(memory_format=memory_format), grad_y)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed_step(self, reentrant: bool) -> None:
        layer = make_layer(3)
        x, grad_y = random_input((4, 3, 5, 5), dtype=F32)
        x.requires_grad_()
        with NoHostSynchronization():
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).backward(grad_y)

    def test_detector_of_synchronization_sees_a_wait(self) -> None:
        with pytest.raises(AssertionError, match="waits"), NoHostSynchronization():
            torch.ones(()).item()
        with pytest.raises(AssertionError, match="waits"), NoHostSynchronization():
            bool(torch.ones(()) > 0)

    @pytest.mark.parametrize("training", [True, False])
    def test_buffers_are_updated_in_place(self, training: bool) -> None:
        """Captured graphs and views taken beforehand look at the same memory."""
        layer = make_layer(3).train(training)
        before = {name: (id(b), b.data_ptr()) for name, b in layer.named_buffers()}
        step(layer, *random_input((4, 3, 5, 5), dtype=F32))
        assert {name: (id(b), b.data_ptr()) for name, b in layer.named_buffers()} == before


class TestMeta:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_construction_forward_and_backward(self, cls: type[nn.Module], training: bool) -> None:
        layer = cls(3, device="meta").train(training)
        assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
        x = torch.empty(4, 3, 5, 5, device="meta", requires_grad=True)
        y = layer(x)
        assert y.is_meta
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape

    def test_materialized_by_reset_parameters(self) -> None:
        layer = ubn_zoo.UnifiedBatchNorm2d(3, device="meta").to_empty(device="cpu")
        layer.reset_parameters()
        fresh = ubn_zoo.UnifiedBatchNorm2d(3)
        for name, value in fresh.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name

    def test_default_device_and_dtype(self) -> None:
        with torch.device("meta"):
            assert all(t.is_meta for t in ubn_zoo.UnifiedBatchNorm2d(3).state_dict().values())


class TestOrdinaryUse:
    def test_sequential_training_lowers_the_loss(self) -> None:
        """A small network learns to tell two kinds of pictures apart."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            ubn_zoo.UnifiedBatchNormAct2d(8),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            ubn_zoo.UnifiedBatchNormAct2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses = []
        for _ in range(30):
            target = torch.randint(0, 2, (16,))
            x = torch.randn(16, 1, 8, 8)
            x[target == 1] += torch.linspace(-1, 1, 8)
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
        assert len(ubn_layers(model)) == 2

    def test_same_seed_same_steps(self) -> None:
        def run() -> dict[str, Tensor]:
            layer = make_layer(3)
            for seed in range(3):
                step(layer, *random_input((4, 3, 5, 5), seed, F32))
            return layer.state_dict()

        first, second = run(), run()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
