"""Fusing for inference: the same function, what is folded and what must not be, and uses of the result."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d, set_scriptable
from timm.models import create_feature_extractor
from torch import Tensor, nn

import ubn_zoo

from . import reference
from .common import make_layer, randomize, ubn_layers
from .test_convert import randomize_batchnorm
from .test_export import TestOnnx as OnnxTests
from .tolerances import EXPORTED, OUTPUT

F32, F64 = torch.float32, torch.float64
deprecated = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
InferenceNorm2d = ubn_zoo.layers.fusion.InferenceNorm2d


def images(*shape: int, dtype: torch.dtype = F64, mean: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (mean + torch.randn(shape, generator=generator, dtype=F64)).to(dtype)


def kinds(model: nn.Module) -> list[str]:
    """Classes of the modules that compute something."""
    inner = [module for module in model.modules() if not list(module.children())]
    return [type(module).__name__ for module in inner if not isinstance(module, nn.Identity)]


def fused(model: nn.Module, example: object = None) -> nn.Module:
    """The fused model, after a check that the original is unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    result = ubn_zoo.fuse(model, example)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in result.parameters())
    assert not any(module.training for module in result.modules())

    def storages(of: nn.Module) -> set[int]:
        tensors = [*of.parameters(), *of.buffers()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    assert not storages(model) & storages(result)
    return result


@torch.no_grad()
def assert_same(model: nn.Module, result: nn.Module, x: Tensor, rtol: float = 1e-10) -> None:
    """Both relative to the largest output; single outputs near zero have no relative accuracy."""
    expected, found = model(x), result(x)
    assert found.dtype == expected.dtype
    scale = float(expected.abs().max())
    assert 0 < scale < float("inf")
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * scale, check_stride=True)


def expected_by_equations(conv: nn.Conv2d, layer: nn.Module, x: Tensor) -> Tensor:
    """The convolution in float64, then the reference layer."""
    convolved = copy.deepcopy(conv).double()(x.double())
    parameters = {name: value.detach().double() for name, value in layer.named_parameters(recurse=False)}
    state = reference.State(layer.running_mean.double(), layer.running_var.double())
    settings = reference.Settings(eps=layer.eps)
    return reference.forward(convolved, reference.Parameters(**parameters), state, settings, training=False)[0]


def nothing(_layer: nn.Module) -> None:
    pass


def constant(layer: nn.Module) -> None:
    layer.center_weight.zero_()
    layer.scale_weight.zero_()


def constant_one_tap(layer: nn.Module) -> None:
    constant(layer)
    only_the_middle(layer)


def only_the_middle(layer: nn.Module) -> None:
    middle = layer.weight.shape[-1] // 2
    taps = layer.weight[:, 0, middle, middle].clone()
    layer.weight.zero_()
    layer.weight[:, 0, middle, middle] = taps
    layer.weight[1] = 0  # a dead channel, which nothing can be divided by


def no_centering(layer: nn.Module) -> None:
    layer.center_weight.zero_()


def no_scaling(layer: nn.Module) -> None:
    layer.scale_weight.zero_()


def some_channels(layer: nn.Module) -> None:
    layer.center_weight[1:] = 0
    layer.scale_weight[:1] = 0
    layer.center_weight[2] = -1  # removes the mean completely


def edge(layer: nn.Module) -> None:
    """A kernel of which one tap of the outermost ring is used cannot be made smaller."""
    constant(layer)
    only_the_middle(layer)
    layer.weight[2, 0, 0, layer.weight.shape[-1] // 2] = 0.7


# Changes to a randomly initialized layer, its settings, and the modules that must remain.
LAYERS = [
    (nothing, {}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"kernel_size": 5}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"kernel_size": 1}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"affine": False}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"center_calibration": False}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"scale_calibration": False}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"scale_calibration": False, "affine": False}, ["Conv2d", "InferenceNorm2d"]),
    (nothing, {"scale_calibration": False, "center_calibration": False}, ["Conv2d", "Conv2d"]),
    (nothing, {"scale_calibration": False, "center_calibration": False, "affine": False}, ["Conv2d"]),
    (nothing, {"depthwise_affine": False, "center_calibration": False, "scale_calibration": False}, ["Conv2d"]),
    (only_the_middle, {}, ["Conv2d", "InferenceNorm2d"]),
    (no_centering, {}, ["Conv2d", "InferenceNorm2d"]),
    (no_scaling, {}, ["Conv2d", "InferenceNorm2d"]),
    (some_channels, {}, ["Conv2d", "InferenceNorm2d"]),
    (constant, {}, ["Conv2d", "Conv2d"]),
    (constant, {"kernel_size": 5, "eps": 0.1}, ["Conv2d", "Conv2d"]),
    (constant, {"kernel_size": 1}, ["Conv2d"]),
    (constant, {"affine": False}, ["Conv2d"]),
    (edge, {}, ["Conv2d", "Conv2d"]),
    (constant_one_tap, {}, ["Conv2d"]),
    (constant_one_tap, {"kernel_size": 5}, ["Conv2d"]),
]
IDS = [f"{change.__name__}-{settings}" for change, settings, _ in LAYERS]


def pair(change: Callable[[nn.Module], None] = nothing, dtype: torch.dtype = F64, **settings: object) -> nn.Sequential:
    """A convolution and a layer with random contents; the running means are far from zero."""
    torch.manual_seed(0)
    layer = make_layer(6, dtype=dtype, **settings)
    with torch.no_grad():
        layer.running_mean.add_(1.5)
        change(layer)
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, dtype=dtype), layer).eval()


class TestFunction:
    @pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 1)], ids=str)
    @pytest.mark.parametrize(("change", "settings", "left"), LAYERS, ids=IDS)
    def test_is_that_of_the_equations(self, change: Callable, settings: dict, left: list[str], size: tuple) -> None:
        """Including the last column, and maps that consist only of borders."""
        model = pair(change, **settings)
        result = fused(model)
        assert kinds(result) == left
        x = images(3, 4, *size)
        torch.testing.assert_close(result(x), expected_by_equations(*model, x), **OUTPUT[F64].kwargs())

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("change", "settings", "left"), LAYERS, ids=IDS)
    def test_in_other_precisions_and_layouts(
        self, change: Callable, settings: dict, left: list[str], dtype: torch.dtype, layout: torch.memory_format
    ) -> None:
        """Folded in this precision; the expectation takes the parameters as they are after rounding to it."""
        model = pair(change, dtype, **settings).to(memory_format=layout)
        x = images(2, 4, 6, 5, dtype=dtype).contiguous(memory_format=layout)
        y = fused(model)(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)
        expected = expected_by_equations(*model, x)
        # In half precision each folded weight is rounded once more and so is the convolution's output, of which
        # 36 products and the taps of a kernel add up: the table's tolerance relative to the largest output.
        scale = 1.0 if dtype == F32 else max(1.0, float(expected.detach().abs().max()))
        tolerance = OUTPUT[dtype]
        torch.testing.assert_close(
            y.double(), expected, rtol=tolerance.rtol, atol=tolerance.atol * scale, check_stride=False
        )

    @pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
    def test_cast_after_fusing(self, dtype: torch.dtype) -> None:
        """Vectors that are combined with statistics stay in float32 under bfloat16, as in the layer."""
        model = pair(dtype=F32)
        result = fused(model).to(dtype)
        x = images(2, 4, 6, 5, dtype=dtype)
        assert {v.dtype for n, v in result[1].named_buffers() if n not in ("weight", "bias")} == {
            F64 if dtype == F64 else F32
        }
        assert result(x).dtype == result[1].weight.dtype == dtype
        expected = expected_by_equations(*model, x)
        # In float64 the constants were still rounded to float32 when they were folded.
        tolerance = OUTPUT[F32 if dtype == F64 else dtype]
        torch.testing.assert_close(result(x).double(), expected, rtol=tolerance.rtol, atol=2 * tolerance.atol)

    @pytest.mark.parametrize(
        "convolution",
        [
            nn.Conv2d(4, 6, 1, bias=False),
            nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.Conv2d(4, 6, (3, 1), dilation=2, padding="same"),
            nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
            Conv2dSame(4, 6, 3, stride=2),
        ],
        ids=["pointwise", "grouped", "dilated", "reflect", "same"],
    )
    @pytest.mark.parametrize("change", [nothing, constant, constant_one_tap])
    def test_kinds_of_convolutions(self, convolution: nn.Conv2d, change: Callable) -> None:
        model = pair(change)
        model[0] = copy.deepcopy(convolution).double().eval()
        result = fused(model)
        assert type(result[0]) is type(convolution)
        assert not torch.equal(result[0].weight, model[0].weight)
        x = images(2, 4, 9, 8)
        torch.testing.assert_close(result(x), expected_by_equations(*model, x), **OUTPUT[F64].kwargs())

    def test_large_means_and_small_variances(self) -> None:
        """A convolution with a large bias, in float32: the shift must not cancel in the folded bias."""
        model = pair(dtype=F32)
        with torch.no_grad():
            model[0].bias.fill_(300.0)
            model[1].running_mean.fill_(300.0)
        x = images(2, 4, 6, 5, dtype=F32, mean=0.0)
        found = fused(model)(x).double()
        expected = expected_by_equations(*model, x)
        # 300 is known to 2e-5 in float32, which the unfused layer loses; folding takes the mean off before that.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("change", [nothing, constant, constant_one_tap])
    def test_autocast(self, change: Callable) -> None:
        model = pair(change, F32)
        result = fused(model)
        x = images(2, 4, 6, 5, dtype=F32)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            found, expected = result(x), model(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.detach().abs().max()))

    def test_autocast_leaves_float32_features_unchanged(self) -> None:
        layer = make_layer(6).eval()
        x = images(2, 6, 4, 5, dtype=F32)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            found, expected = fused(layer)(x), layer(x)
        assert found.dtype == expected.dtype == F32
        torch.testing.assert_close(found, expected, **OUTPUT[F32].kwargs())

    def test_empty_batch(self) -> None:
        assert fused(pair())(images(0, 4, 6, 5)).shape == (0, 6, 6, 5)

    @pytest.mark.parametrize("change", [nothing, no_centering, only_the_middle, constant])
    def test_gradient_of_the_input(self, change: Callable) -> None:
        """As for saliency maps; in-place operations must not corrupt it."""
        model = pair(change)
        leaves = images(2, 4, 6, 5).requires_grad_(), images(2, 4, 6, 5).requires_grad_()
        for leaf, m in zip(leaves, (model, fused(model)), strict=True):
            m(leaf).sin().sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **OUTPUT[F64].kwargs())

    @pytest.mark.parametrize(("change", "settings", "left"), LAYERS, ids=IDS)
    def test_norm_without_a_convolution(self, change: Callable, settings: dict, left: list[str]) -> None:
        """The norm alone, which must not overwrite its input."""
        layer = pair(change, **settings)[1]
        result = fused(layer)
        assert isinstance(result, InferenceNorm2d)
        x = images(2, 6, 4, 5)
        before = x.clone()
        found = result(x)
        assert torch.equal(x, before)
        identity = nn.Conv2d(6, 6, 1, groups=6, bias=False, dtype=F64)
        nn.init.ones_(identity.weight)
        torch.testing.assert_close(found, expected_by_equations(identity, layer, x), **OUTPUT[F64].kwargs())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_norm_without_a_convolution_in_half_precision(self, dtype: torch.dtype) -> None:
        """A mean of many deviations: product and sum must not be rounded one by one."""
        layer = make_layer(6, dtype=dtype).eval()
        layer.running_mean.fill_(30.0)
        x = images(2, 6, 4, 5, dtype=dtype, mean=30.0)
        result = fused(layer)(x)
        assert result.dtype == dtype
        torch.testing.assert_close(result, layer(x), **OUTPUT[dtype].kwargs())


class TestBatchNorm:
    """Plain BatchNorm folds too, alone and beside UBN."""

    @pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv3_small_050"])
    def test_models(self, name: str) -> None:
        torch.manual_seed(0)
        model = randomize_batchnorm(timm.create_model(name)).double().eval()
        result = fused(model)
        assert not any("Norm" in kind for kind in kinds(result))
        assert_same(model, result, images(2, 3, 64, 64))

    @pytest.mark.parametrize(
        "norm", [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.SyncBatchNorm(6), BatchNormAct2d(6)]
    )
    def test_kinds(self, norm: nn.Module) -> None:
        model = randomize_batchnorm(nn.Sequential(nn.Conv2d(4, 6, 3), norm)).double().eval()
        result = fused(model)
        assert kinds(result) == (["Conv2d", "ReLU"] if isinstance(norm, BatchNormAct2d) else ["Conv2d"])
        assert_same(model, result, images(2, 4, 6, 5))

    def test_mixed(self) -> None:
        norms = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        model = randomize(randomize_batchnorm(nn.Sequential(*norms, make_layer(6)))).double().eval()
        result = fused(model)
        assert kinds(result) == ["BatchNorm2d", "Conv2d", "ReLU", "Conv2d", "InferenceNorm2d"]
        assert_same(model, result, images(2, 4, 6, 5))

    def test_unsupported_is_kept(self) -> None:
        """Without running statistics a norm depends on the batch."""
        model = nn.Sequential(
            nn.Conv2d(4, 6, 3), make_layer(6, track_running_stats=False), nn.Conv2d(6, 6, 3), make_layer(6)
        )
        model = model.double().eval()
        result = fused(model)
        assert kinds(result) == ["Conv2d", "UnifiedBatchNorm2d", "Conv2d", "InferenceNorm2d"]
        assert_same(model, result, images(2, 4, 9, 8))


class TestAct:
    @pytest.mark.parametrize("change", [nothing, constant, constant_one_tap])
    @pytest.mark.parametrize("inplace", [True, False])
    def test_activation_and_drop_stay(self, change: Callable, inplace: bool) -> None:
        drop = nn.Hardtanh(-0.5, 0.5)
        layer = make_layer(
            6,
            cls=ubn_zoo.UnifiedBatchNormAct2d,
            act_layer=nn.SiLU,
            inplace=inplace,
            drop_layer=lambda: drop,
            dtype=F64,
        )
        with torch.no_grad():
            change(layer)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, dtype=F64), layer).eval()
        result = fused(model)
        assert kinds(result)[-2:] == ["Hardtanh", "SiLU"]
        assert result[1].act.inplace == inplace
        assert result[1].act is not layer.act
        x = images(2, 4, 6, 5)
        affine = expected_by_equations(model[0], layer, x)
        torch.testing.assert_close(result(x), nn.functional.silu(affine.clamp(-0.5, 0.5)), **OUTPUT[F64].kwargs())

    def test_without_activation(self) -> None:
        layer = make_layer(6, cls=ubn_zoo.UnifiedBatchNormAct2d, apply_act=False, dtype=F64)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, dtype=F64), layer).eval()
        assert_same(model, fused(model), images(2, 4, 6, 5))

    @staticmethod
    def with_relu(change: Callable = nothing, **settings: object) -> nn.Sequential:
        layer = make_layer(6, cls=ubn_zoo.UnifiedBatchNormAct2d, dtype=F64, **settings)
        with torch.no_grad():
            change(layer)
        return nn.Sequential(nn.Conv2d(4, 6, 3, dtype=F64), layer).eval()

    @pytest.mark.parametrize("fed", [True, False])
    @pytest.mark.parametrize("inplace", [True, False])
    @pytest.mark.parametrize("change", [nothing, only_the_middle, no_centering])
    def test_relu_becomes_a_part_of_the_norm(self, change: Callable, inplace: bool, fed: bool) -> None:
        model = self.with_relu(change, inplace=inplace)
        x = images(2, 4, 6, 5)
        if not fed:
            model, x = model[1], images(2, 6, 6, 5)
        result = fused(model)
        norm = result[1].norm if fed else result.norm
        assert norm.activation == "relu"
        assert "activation='relu'" in repr(norm)
        assert "ReLU" not in kinds(result)
        assert_same(model, result, x)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        for leaf, m in zip(leaves, (model, result), strict=True):
            m(leaf).sin().sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **OUTPUT[F64].kwargs())

    def test_relu_that_stays(self) -> None:
        """After a drop layer, of another class, with a hook, or where the norm folds completely."""
        seen: list[Tensor] = []
        hooked = self.with_relu()
        hooked[1].act.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        others = [
            self.with_relu(drop_layer=lambda: nn.Hardtanh(-0.5, 0.5)),
            self.with_relu(act_layer=nn.ReLU6),
            self.with_relu(constant),
        ]
        x = images(2, 4, 6, 5)
        for model in (hooked, *others):
            result = fused(model)
            assert kinds(result)[-1].startswith("ReLU")
            assert getattr(result[1].norm, "activation", None) is None
            assert_same(model, result, x)
        # The last runs are those of the comparison.
        torch.testing.assert_close(seen[-1], seen[-2], **OUTPUT[F64].kwargs())

    def test_output_of_the_activation_by_name(self) -> None:
        result, seen = fused(self.with_relu()), []
        result.get_submodule("1.act").register_forward_hook(lambda _module, _args, output: seen.append(output))
        x = images(2, 4, 6, 5)
        assert torch.equal(result(x), seen[0])

    @deprecated
    @torch.no_grad()
    def test_relu_in_captured_programs(self, tmp_path: Path) -> None:
        result = fused(self.with_relu()).float()
        x = images(2, 4, 6, 5, dtype=F32)
        expected = result(x)
        assert (expected == 0).any()
        for captured in (
            torch.export.export(result, (x,)).module(),
            torch.jit.trace(result, x),
            torch.jit.script(result),
            torch.compile(result, fullgraph=True, backend="aot_eager"),
        ):
            torch.testing.assert_close(captured(x), expected, **OUTPUT[F32].kwargs())
        OnnxTests.run(result, tmp_path / "model.onnx", x, [x])

    def test_a_shared_input_is_not_overwritten(self) -> None:
        x = images(2, 4, 6, 5)
        before = x.clone()
        norm = InferenceNorm2d(None, None, None, None, None, None, None, overwrite=False, activation="relu")
        torch.testing.assert_close(norm(x), before.relu())
        assert torch.equal(x, before)

    def test_other_activations_are_refused(self) -> None:
        with pytest.raises(ValueError, match="activation is 'gelu', valid are 'relu' and None"):
            InferenceNorm2d(None, None, None, None, None, None, None, overwrite=False, activation="gelu")


class Network(nn.Module):
    """Two convolutions and two norms, for forwards with another use of the first convolution's output."""

    def __init__(self, convolution: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = convolution(4, 6, 3, padding=1)
        self.norm = make_layer(6)
        self.conv2 = nn.Conv2d(6, 6, 1)
        self.norm2 = make_layer(6, seed=1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm(self.conv(x))))


class Residual(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm2(self.conv2(self.norm(x))) + x


class ResidualOfAView(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        view = x[:, :3]
        return self.norm2(self.conv2(self.norm(x))) + view.mean()


class ReadBefore(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = x.mean((1, 2, 3), keepdim=True).sigmoid()
        return self.norm2(self.conv2(self.norm(x) * gate))


class Between(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm(torch.relu(self.conv(x)))))


class BetweenInPlace(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm(self.conv(x).abs_())))


class TwoNorms(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + self.norm2(x)


class ConvolutionTwice(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


class NormTwice(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm(self.conv(x))))


class WeightElsewhere(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.conv.weight.square().mean()


class BiasElsewhere(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.conv.bias[0]


class Reversed(Network):
    """Modules defined in one order and run in another, with norms and convolutions of the same width."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm2(self.conv(x))))


class Scripted(Network):
    """A reader that is not Python."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = torch.jit.trace(nn.Sigmoid(), torch.zeros(1, 6, 2, 2, dtype=F64)).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) * self.reader(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2


class ThroughAFunction(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + Double.apply(x)


# Forwards in which the first convolution's output, or its parameters, have other uses.
OTHER_USES = [
    Residual,
    ResidualOfAView,
    ReadBefore,
    Between,
    BetweenInPlace,
    TwoNorms,
    ConvolutionTwice,
    WeightElsewhere,
    BiasElsewhere,
    pytest.param(Scripted, marks=deprecated),
    ThroughAFunction,
]


class TestPairs:
    @staticmethod
    def check(model: nn.Module, kept: list[str], changed: list[str] = ()) -> nn.Module:
        """The function is the same, and the named convolutions are unchanged, or changed."""
        result = fused(model)
        x = images(2, 4, 6, 5)
        assert_same(model, result, x)
        for name in kept:
            assert torch.equal(result.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")), name
        for name in changed:
            assert not torch.equal(result.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")), name
        assert not ubn_layers(result)
        return result

    def test_plain(self) -> None:
        self.check(Network(), [], ["conv", "conv2"])

    @pytest.mark.parametrize("network", OTHER_USES)
    def test_other_uses(self, network: type[Network]) -> None:
        self.check(network(), ["conv"])

    def test_order_of_definition_is_not_that_of_use(self) -> None:
        self.check(Reversed(), [], ["conv", "conv2"])

    def test_norm_called_twice(self) -> None:
        self.check(NormTwice(), ["conv", "conv2"])

    def test_another_class_of_convolution(self) -> None:
        """Its weights are standardized when it runs: a factor on them would be lost."""
        self.check(Network(StdConv2d), ["conv"], ["conv2"])

    def test_parametrized_convolution(self) -> None:
        model = Network()
        nn.utils.parametrizations.weight_norm(model.conv).eval()
        result = fused(model)
        assert_same(model, result, images(2, 4, 6, 5))
        assert torch.equal(result.conv.weight, model.conv.weight)

    def test_shared_weight(self) -> None:
        """Two convolutions that share one weight."""

        class Shared(Network):
            def __init__(self) -> None:
                super().__init__()
                self.conv2 = nn.Conv2d(4, 6, 3, padding=1, dtype=F64).eval()
                self.conv2.weight = self.conv.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(self.conv(x)) + self.norm2(self.conv2(x))

        assert_same(Shared(), fused(Shared()), images(2, 4, 6, 5))

    def test_one_module_under_two_names(self) -> None:
        model = Network()
        model.alias = model.conv
        model.list = [model.norm]  # not registered
        result = self.check(model, [], ["conv", "conv2"])
        assert result.alias is result.conv
        assert result.list[0] is result.norm

    def test_output_of_the_model(self) -> None:
        class Outputs(Network):
            def forward(self, x: Tensor) -> dict[str, object]:
                x = self.conv(x)
                return {"logits": self.norm2(self.conv2(self.norm(x))), "features": [x]}

        model = Outputs()
        result = fused(model)
        x = images(2, 4, 6, 5)
        torch.testing.assert_close(result(x)["features"][0], model(x)["features"][0])
        torch.testing.assert_close(result(x)["logits"], model(x)["logits"])

    def test_attribute_of_the_model(self) -> None:
        class Keeps(Network):
            def forward(self, x: Tensor) -> Tensor:
                self.last = self.conv(x)
                return self.norm(self.last)

        model = Keeps()
        x = images(2, 4, 6, 5)
        result = fused(model)
        assert_same(model, result, x)
        torch.testing.assert_close(result.last, model.last)

    @pytest.mark.parametrize("where", ["conv", "norm", "inner"])
    @pytest.mark.parametrize("before", [True, False])
    def test_hooks(self, where: str, before: bool) -> None:
        """A hook observes the same values: it is kept, and its module is not folded."""
        model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), make_layer(6), nn.Conv2d(6, 6, 1))
        model = nn.Sequential(*model, make_layer(6, seed=1)).double().eval()
        seen: list[Tensor] = []
        module = {"conv": model[0][0], "norm": model[1], "inner": model[0]}[where]
        if before:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        else:
            module.register_forward_hook(lambda _module, args, output: seen.extend([args[0].clone(), output.clone()]))
        result = ubn_zoo.fuse(model)
        x = images(2, 4, 6, 5)
        seen.clear()
        expected = model(x)
        wanted = seen.copy()
        seen.clear()
        torch.testing.assert_close(result(x), expected, **OUTPUT[F64].kwargs())
        torch.testing.assert_close(seen, wanted)
        assert isinstance(result[3], InferenceNorm2d)
        assert not torch.equal(result[2].weight, model[2].weight)

    def test_hook_that_changes_the_output(self) -> None:
        model = Network()
        model.conv.register_forward_hook(lambda _module, _args, output: output * 2)
        self.check(model, ["conv"], ["conv2"])

    def test_example_inputs(self) -> None:
        """For several arguments, and for models that cannot run without values."""

        class Two(Network):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                if bool((y > 0).all()):
                    x = x + y
                return super().forward(x)

        model, x, y = Two(), images(2, 4, 6, 5), images(2, 4, 6, 5).abs()
        with pytest.raises(ValueError, match=r"Two does not run on .*\[1, 4, 224, 224\].*example_inputs"):
            ubn_zoo.fuse(model)
        result = fused(model, (x, y))
        assert not torch.equal(result.conv.weight, model.conv.weight)
        torch.testing.assert_close(result(x, y), model(x, y), **OUTPUT[F64].kwargs())

    def test_one_example_and_its_errors(self) -> None:
        result = fused(Network(), images(1, 4, 6, 5))
        assert isinstance(result.norm, InferenceNorm2d)
        with pytest.raises(RuntimeError, match="channels"):
            ubn_zoo.fuse(Network(), images(1, 3, 6, 5))

    def test_unused_layers(self) -> None:
        model = Network()
        model.spare = make_layer(3, dtype=F64).eval()
        result = self.check(model, [], ["conv", "conv2"])
        x = images(2, 3, 4, 4)
        torch.testing.assert_close(result.spare(x), model.spare(x))

    def test_runs_change_no_state(self) -> None:
        model = Network()
        result = fused(model, images(2, 4, 6, 5))
        before = {name: value.clone() for name, value in result.state_dict().items()}
        result(images(2, 4, 6, 5))
        assert all(torch.equal(value, before[name]) for name, value in result.state_dict().items())


class TestRefusals:
    def test_training_the_result(self) -> None:
        for change in (nothing, constant, constant_one_tap):
            result = fused(pair(change))
            with pytest.raises(RuntimeError, match=r"created by ubn_zoo.fuse for inference only.*original model"):
                result.train()
            assert not any(module.training for module in result.modules())
            assert result.eval() is result
            assert result.train(False) is result
        with pytest.raises(RuntimeError, match="for inference only"):
            fused(pair()[1]).train()

    def test_model_in_training(self) -> None:
        with pytest.raises(ValueError, match=r"Sequential is in training mode.*eval\(\)"):
            ubn_zoo.fuse(pair().train())
        model = pair()
        model[1].train()
        with pytest.raises(ValueError, match=r"training mode \(1 is\)"):
            ubn_zoo.fuse(model)
        with pytest.raises(ValueError, match="training mode"):
            ubn_zoo.fuse(ubn_zoo.freeze_ubn(pair().train()))

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
            nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(3, 4, 1), ubn_zoo.UnifiedBatchNorm2d(4, track_running_stats=False)),
        ],
        ids=["none", "other", "unfed", "no-statistics"],
    )
    def test_nothing_to_fuse(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="found no norm to fuse in Sequential"):
            ubn_zoo.fuse(model.eval())

    def test_no_values(self) -> None:
        with pytest.raises(ValueError, match="meta.*load weights first"):
            ubn_zoo.fuse(pair().to("meta"))

    @deprecated
    def test_wrapped_models(self) -> None:
        model = pair()
        wrapped = [torch.jit.trace(model, images(1, 4, 6, 5)), torch.compile(model, backend="eager")]
        for wrapper in [*wrapped, nn.DataParallel(model)]:
            with pytest.raises(TypeError, match="fuse the original model"):
                ubn_zoo.fuse(wrapper.eval())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """All three kinds of remainders: instance-dependent, constant with a kernel, none."""
    model = ubn_zoo.convert_batchnorm(timm.create_model("test_resnet", num_classes=7).eval())
    layers = ubn_layers(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.running_mean.add_(0.2 * torch.randn(layer.running_mean.shape, generator=generator))
            if number % 3 > 0:
                layer.weight.add_(0.1 * torch.randn(layer.weight.shape, generator=generator))
            if number % 3 > 1:
                for tensor in (layer.center_weight, layer.scale_weight):
                    tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def result(model: nn.Module) -> nn.Module:
    result = fused(model)
    assert {"Conv2d", "InferenceNorm2d"} <= set(kinds(result))
    return result


class TestUse:
    """Fused models can be exported, compiled, scripted and copied like other models."""

    def test_class(self, model: nn.Module, result: nn.Module) -> None:
        assert isinstance(result, type(model))
        x = torch.randn(2, 3, 64, 64)
        assert_same(model, result, x, EXPORTED.rtol)
        torch.testing.assert_close(result.forward_features(x), model.forward_features(x), **EXPORTED.kwargs())

    @torch.no_grad()
    def test_export(self, result: nn.Module) -> None:
        program = torch.export.export(
            result, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        x = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(program.module()(x), result(x), **EXPORTED.kwargs())

    def test_onnx(self, result: nn.Module, tmp_path: Path) -> None:
        OnnxTests.run(
            result,
            tmp_path / "model.onnx",
            torch.randn(2, 3, 64, 64),
            [torch.randn(5, 3, 64, 64), torch.randn(1, 3, 64, 64)],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )

    @torch.no_grad()
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_compile(self, result: nn.Module, layout: torch.memory_format) -> None:
        torch._dynamo.reset()
        x = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
        compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), result(x), **EXPORTED.kwargs())
        torch._dynamo.reset()

    @deprecated
    @torch.no_grad()
    def test_trace(self, result: nn.Module) -> None:
        traced = torch.jit.trace(result, torch.randn(2, 3, 64, 64))
        x = torch.randn(3, 3, 96, 64)
        torch.testing.assert_close(traced(x), result(x), **EXPORTED.kwargs())

    @deprecated
    @torch.no_grad()
    def test_script(self) -> None:
        with set_scriptable(True):
            model = ubn_zoo.convert_batchnorm(timm.create_model("test_resnet", num_classes=7))
            result = fused(randomize(model).eval())
            scripted = torch.jit.script(result)
        x = torch.randn(3, 3, 64, 64)
        expected = result(x)
        torch.testing.assert_close(scripted(x), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))

    @torch.no_grad()
    def test_copies(self, result: nn.Module) -> None:
        x = torch.randn(2, 3, 64, 64)
        expected = result(x)
        stream = io.BytesIO()
        torch.save(result, stream)
        stream.seek(0)
        # These pickles are made in this test.
        for twin in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), torch.load(stream, weights_only=False)):  # noqa: S301 (own bytes)
            assert type(twin) is type(result)
            assert torch.equal(twin(x), expected)
            with pytest.raises(RuntimeError, match="for inference only"):
                twin.train()

    def test_state_dict(self, result: nn.Module) -> None:
        twin = copy.deepcopy(result)
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.zero_()
        twin.load_state_dict(result.state_dict())
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(twin(x), result(x))

    def test_made_in_inference_mode(self, model: nn.Module) -> None:
        with torch.inference_mode():
            result = ubn_zoo.fuse(model)
        x = torch.randn(1, 3, 64, 64, requires_grad=True)
        result(x).sum().backward()
        assert x.grad is not None

    def test_fusing_again(self, result: nn.Module) -> None:
        with pytest.raises(ValueError, match="found no norm to fuse"):
            ubn_zoo.fuse(result)

    def test_traced_graph(self) -> None:
        model, x = pair(), images(2, 4, 6, 5)
        result = fused(create_feature_extractor(model, {"1": "out"}).eval())
        assert kinds(result) == ["Conv2d", "InferenceNorm2d"]
        torch.testing.assert_close(result(x)["out"], model(x), **OUTPUT[F64].kwargs())

    def test_representation(self, result: nn.Module) -> None:
        assert "overwrite=True" in repr(result)
