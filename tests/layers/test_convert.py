"""Conversion from BatchNorm to UBN: models, state dicts, and other libraries' converters on UBN models."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn

import ubn_zoo
from ubn_zoo.layers import convert

from .common import BUFFERS, PARAMETERS, assert_step, make_layer, random_input, randomize, snapshot, ubn_layers
from .tolerances import EXPORTED, OUTPUT

F32, F64 = torch.float32, torch.float64
CLASSES = [ubn_zoo.UnifiedBatchNorm2d, ubn_zoo.UnifiedBatchNormAct2d]
SIGMOID_1 = 1.0 / (1.0 + math.exp(-1.0))


@torch.no_grad()
def randomize_batchnorm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affine for every BatchNorm of a model; some affine weights negative, some zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = (module.num_features,)
            if module.running_mean is not None:
                module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
                module.num_batches_tracked.fill_(17)
            if module.affine:
                module.weight.copy_(1.0 + 0.4 * torch.randn(shape, generator=generator))
                module.weight[0] = 0.0
                module.bias.copy_(0.3 * torch.randn(shape, generator=generator))
    return model


def assert_same_function(model: nn.Module, original: nn.Module, x: Tensor, rtol: float = EXPORTED.rtol) -> None:
    """Both in evaluation, relative to the largest output."""
    with torch.no_grad():
        found, expected = model.eval()(x), original.eval()(x)
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * scale)


def batchnorms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def small_model() -> nn.Module:
    return randomize_batchnorm(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), BatchNormAct2d(5)
        )
    )


class TestModels:
    @pytest.mark.parametrize("name", ["resnet50", "regnety_002", "mobilenetv3_small_050"])
    def test_timms_models_compute_the_same_function(self, name: str) -> None:
        torch.manual_seed(0)
        original = randomize_batchnorm(timm.create_model(name)).eval()
        count = len(batchnorms(original))
        model = convert.convert_batchnorm(copy.deepcopy(original))
        assert not batchnorms(model)
        assert len(ubn_layers(model)) == count
        assert_same_function(model, original, torch.randn(2, 3, 96, 96))

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"kernel_size": 1},
            {"kernel_size": 5},
            {"depthwise_affine": False},
            {"center_calibration": False},
            {"scale_calibration": False},
            {"threshold": None},
            {"threshold": 0.3, "similarity_momentum": 0.2, "similarity_samples": 8},
        ],
        ids=str,
    )
    def test_settings_reach_every_layer(self, settings: dict) -> None:
        original = small_model()
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original), **settings)
        assert_same_function(model, original, torch.randn(2, 3, 9, 9), 1e-5)
        for layer in ubn_layers(model):
            for name in ("threshold", "similarity_momentum", "similarity_samples"):
                if name in settings:
                    assert getattr(layer, name) == settings[name]
            if "kernel_size" in settings:
                assert layer.weight.shape[-1] == settings["kernel_size"]
            assert (layer.center_weight is None) == (settings.get("center_calibration") is False)
            assert (layer.scale_weight is None) == (settings.get("scale_calibration") is False)

    def test_kaiming_kernels(self) -> None:
        torch.manual_seed(0)
        model = ubn_zoo.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(512)), kernel_init="kaiming")
        assert model[0].weight.std().item() == pytest.approx(math.sqrt(2.0 / (9 * 512)), rel=0.1)

    def test_unknown_setting(self) -> None:
        with pytest.raises(TypeError, match="treshold"):
            ubn_zoo.convert_batchnorm(small_model(), treshold=0.1)

    def test_bad_setting_leaves_the_model_whole(self) -> None:
        model = small_model()
        with pytest.raises(ValueError, match="kernel_size"):
            ubn_zoo.convert_batchnorm(model, kernel_size=2)
        assert len(batchnorms(model)) == 2

    def test_parameters_by_hand(self) -> None:
        """w = 0, u = 0, v = 1, K = one tap of gamma / sigmoid(1), bias = beta / sigmoid(1)."""
        original = randomize_batchnorm(nn.BatchNorm2d(4, dtype=F64))
        layer = ubn_zoo.convert_batchnorm(original)
        assert isinstance(layer, ubn_zoo.UnifiedBatchNorm2d)
        kernel = torch.zeros(4, 1, 3, 3, dtype=F64)
        kernel[:, 0, 1, 1] = original.weight.detach() / SIGMOID_1
        torch.testing.assert_close(layer.weight.detach(), kernel, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.bias.detach(), original.bias.detach() / SIGMOID_1, rtol=1e-12, atol=0)
        assert torch.equal(layer.center_weight, torch.zeros(4, dtype=F64))
        assert torch.equal(layer.scale_weight, torch.zeros(4, dtype=F64))
        assert torch.equal(layer.scale_bias, torch.ones(4, dtype=F64))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(layer, name), getattr(original, name))
        assert float(layer.feature_similarity) == 1.0

    def test_is_exact_in_float64(self) -> None:
        original = small_model().double()
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        assert all(p.dtype == F64 for p in model.parameters())
        assert_same_function(model, original, torch.randn(2, 3, 9, 9, dtype=F64), 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_model(self, dtype: torch.dtype) -> None:
        original = small_model().to(dtype)
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        for layer in ubn_layers(model):
            assert layer.weight.dtype == dtype
            assert layer.running_mean.dtype == layer.feature_similarity.dtype == F32
        assert_same_function(model, original, torch.randn(2, 3, 9, 9, dtype=dtype), 5 * torch.finfo(dtype).eps)

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        model = ubn_zoo.convert_batchnorm(model)
        assert all(value.is_meta for value in model.state_dict().values())

    @pytest.mark.parametrize("momentum", [0.1, 0.03, None])
    def test_constants_are_kept(self, momentum: float | None) -> None:
        model = ubn_zoo.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3, eps=1e-3, momentum=momentum)))
        assert (model[0].eps, model[0].momentum, model[0].num_features) == (1e-3, momentum, 3)

    @pytest.mark.parametrize("cls", [nn.BatchNorm2d, BatchNormAct2d])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("track", [True, False])
    def test_without_affine_or_statistics(self, track: bool, affine: bool, cls: type[nn.Module]) -> None:
        original = randomize_batchnorm(nn.Sequential(cls(4, affine=affine, track_running_stats=track).double()))
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        x = random_input((4, 4, 5, 5))[0]
        assert_same_function(model, original, x, 1e-12)
        torch.testing.assert_close(model.train()(x), original.train()(x), **OUTPUT[F64].kwargs())

    def test_first_training_step_equals_batchnorms(self) -> None:
        """The gate starts open, so the first step of the converted model uses batch statistics too."""
        original = small_model().double()
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        x = random_input((4, 3, 9, 9))[0]
        torch.testing.assert_close(model(x), original(x), **OUTPUT[F64].kwargs())
        for ours, theirs in zip(ubn_layers(model), batchnorms(original), strict=True):
            torch.testing.assert_close(ours.running_mean, theirs.running_mean, **OUTPUT[F64].kwargs())
            torch.testing.assert_close(ours.running_var, theirs.running_var, **OUTPUT[F64].kwargs())
            assert int(ours.num_batches_tracked) == 18

    def test_children_are_replaced_in_place(self) -> None:
        model = small_model()
        conv = model[0]
        assert ubn_zoo.convert_batchnorm(model) is model
        assert model[0] is conv
        assert isinstance(model[1], ubn_zoo.UnifiedBatchNorm2d)
        assert isinstance(model[4], ubn_zoo.UnifiedBatchNormAct2d)

    @pytest.mark.parametrize("cls", [nn.BatchNorm2d, BatchNormAct2d])
    def test_model_that_is_itself_a_batchnorm(self, cls: type[nn.Module]) -> None:
        original = randomize_batchnorm(cls(4))
        layer = ubn_zoo.convert_batchnorm(original)
        assert len(ubn_layers(layer)) == 1
        assert_same_function(layer, original, torch.randn(2, 4, 5, 5), 1e-5)

    @pytest.mark.parametrize(
        "model",
        [nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)), nn.Identity(), nn.Sequential(nn.BatchNorm1d(3))],
        ids=["group norm", "nothing", "one-dimensional"],
    )
    def test_no_batchnorm_raises(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="BatchNorm"):
            ubn_zoo.convert_batchnorm(model)

    def test_converting_twice_raises(self) -> None:
        with pytest.raises(ValueError, match="BatchNorm"):
            ubn_zoo.convert_batchnorm(ubn_zoo.convert_batchnorm(small_model()))

    def test_synchronized_batchnorm_becomes_synchronized_ubn(self) -> None:
        original = small_model()
        model = ubn_zoo.convert_batchnorm(convert_sync_batchnorm(copy.deepcopy(original)))
        assert not batchnorms(model)
        assert [type(layer) for layer in ubn_layers(model)] == CLASSES
        assert_same_function(model, original, torch.randn(2, 3, 9, 9), 1e-5)

    def test_batchnorm_with_its_own_forward_is_refused(self) -> None:
        """Its function is unknown, so it cannot be converted; the model stays unchanged."""

        class Doubled(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return 2.0 * super().forward(x)

        model = nn.Sequential(nn.BatchNorm2d(3), Doubled(3))
        with pytest.raises(TypeError, match=r"1.*Doubled"):
            ubn_zoo.convert_batchnorm(model)
        assert len(batchnorms(model)) == 2

    def test_subclass_with_the_same_forward_is_converted(self) -> None:
        class Named(nn.BatchNorm2d):
            pass

        original = randomize_batchnorm(nn.Sequential(Named(3)))
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        assert_same_function(model, original, torch.randn(2, 3, 9, 9), 1e-5)

    def test_lazy_batchnorm_is_refused(self) -> None:
        """It becomes a BatchNorm2d in its first forward, too late to be converted with the others."""
        model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
        with pytest.raises(TypeError, match="LazyBatchNorm2d"):
            ubn_zoo.convert_batchnorm(model)
        assert len(batchnorms(model)) == 2

    def test_other_dimensions_stay(self) -> None:
        model = ubn_zoo.convert_batchnorm(nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)]))
        assert isinstance(model[0], nn.BatchNorm1d)
        assert isinstance(model[1], ubn_zoo.UnifiedBatchNorm2d)
        assert isinstance(model[2], nn.BatchNorm3d)

    def test_state_dict_keys_are_the_same_layers(self) -> None:
        original = small_model()
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        assert set(original.state_dict()) <= set(model.state_dict())
        added = set(model.state_dict()) - set(original.state_dict())
        assert added == {
            f"{i}.{name}"
            for i in (1, 4)
            for name in ("center_weight", "scale_weight", "scale_bias", "feature_similarity")
        }


class TestWhatSurvives:
    def test_shared_modules_stay_shared(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Conv2d(4, 4, 1)
                self.norm = nn.BatchNorm2d(4)
                self.again = nn.Sequential(nn.Conv2d(4, 4, 1), self.norm)
                self.other = nn.BatchNorm2d(4)
                self.inner = self.again

            def forward(self, x: Tensor) -> Tensor:
                return self.other(self.inner(self.again(self.norm(self.first(x)))))

        original = randomize_batchnorm(Shared())
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        assert model.norm is model.again[1]
        assert model.inner is model.again
        assert model.other is not model.norm
        assert len(ubn_layers(model)) == 2
        assert_same_function(model, original, torch.randn(2, 4, 5, 5), 1e-5)

    @pytest.mark.parametrize("cls", [nn.BatchNorm2d, BatchNormAct2d])
    def test_hooks(self, cls: type[nn.Module]) -> None:
        calls: list[str] = []
        model = nn.Sequential(nn.Conv2d(2, 3, 1), cls(3))
        norm = model[1]
        norm.register_forward_pre_hook(lambda module, args: calls.append("pre"))
        norm.register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre with kwargs"), with_kwargs=True)
        norm.register_forward_hook(lambda module, args, output: calls.append("forward"))
        norm.register_forward_hook(
            lambda module, args, kwargs, output: calls.append("forward with kwargs"), with_kwargs=True
        )
        norm.register_forward_hook(lambda module, args, output: calls.append("always"), always_call=True)
        norm.register_full_backward_pre_hook(lambda module, grad: calls.append("backward pre"))
        norm.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
        norm.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append("state_dict pre"))
        norm.register_state_dict_post_hook(lambda module, state, prefix, meta: calls.append("state_dict post"))
        norm.register_load_state_dict_pre_hook(lambda *args: calls.append("load pre"))
        norm.register_load_state_dict_post_hook(lambda module, keys: calls.append("load post"))
        model = ubn_zoo.convert_batchnorm(model)
        calls.clear()
        model(torch.randn(2, 2, 4, 4)).sum().backward()
        assert calls == [
            "pre",
            "pre with kwargs",
            "forward",
            "forward with kwargs",
            "always",
            "backward pre",
            "backward",
        ]
        calls.clear()
        state = model.state_dict()
        assert calls == ["state_dict pre", "state_dict post"]
        calls.clear()
        model.load_state_dict(state)
        assert calls == ["load pre", "load post"]

    def test_hooks_see_the_new_module_and_may_change_the_output(self) -> None:
        seen = []

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            seen.append(module)
            return output + 1.0

        model = nn.Sequential(nn.BatchNorm2d(3))
        model[0].register_forward_hook(hook)
        model = ubn_zoo.convert_batchnorm(model).eval()
        x = torch.randn(2, 3, 4, 4)
        with_hook = model(x)
        assert seen == [model[0]]
        torch.testing.assert_close(with_hook, model[0].forward(x) + 1.0)

    def test_hook_handles_still_remove(self) -> None:
        calls: list[int] = []
        model = nn.Sequential(nn.BatchNorm2d(3))
        handle = model[0].register_forward_hook(lambda *args: calls.append(1))
        model = ubn_zoo.convert_batchnorm(model)
        handle.remove()
        model(torch.randn(2, 3, 4, 4))
        assert not calls

    def test_training_mode_per_module(self) -> None:
        model = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3), BatchNormAct2d(3), BatchNormAct2d(3)])
        model[1].eval()
        model[3].eval()
        model = ubn_zoo.convert_batchnorm(model)
        assert [module.training for module in model] == [True, False, True, False]
        assert [module.act.training for module in model[2:]] == [True, False]
        assert model.training

    @pytest.mark.parametrize("weight", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_requires_grad(self, bias: bool, weight: bool) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3))
        model[0].weight.requires_grad_(weight)
        model[0].bias.requires_grad_(bias)
        model = ubn_zoo.convert_batchnorm(model)
        assert model[0].weight.requires_grad == weight
        assert model[0].bias.requires_grad == bias

    def test_activation_and_drop_are_the_same_modules(self) -> None:
        calls = []
        norm = BatchNormAct2d(
            4, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3}, drop_layer=lambda: nn.Hardtanh(-0.4, 0.4)
        )
        norm.act.register_forward_hook(lambda *args: calls.append("act"))
        original = randomize_batchnorm(nn.Sequential(norm))
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        layer = model[0]
        assert isinstance(layer, ubn_zoo.UnifiedBatchNormAct2d)
        assert isinstance(layer.act, nn.LeakyReLU)
        assert isinstance(layer.drop, nn.Hardtanh)
        assert_same_function(model, original, torch.randn(2, 4, 5, 5), 1e-5)
        converted = ubn_zoo.convert_batchnorm(nn.Sequential(norm))
        calls.clear()
        converted(torch.randn(2, 4, 5, 5))
        assert calls == ["act"]

    def test_no_activation(self) -> None:
        original = randomize_batchnorm(nn.Sequential(BatchNormAct2d(4, apply_act=False)))
        model = ubn_zoo.convert_batchnorm(copy.deepcopy(original))
        assert isinstance(model[0].act, nn.Identity)
        assert_same_function(model, original, torch.randn(2, 4, 5, 5), 1e-5)

    def test_the_original_is_not_tied_to_the_copy(self) -> None:
        original = randomize_batchnorm(nn.BatchNorm2d(3))
        before = {name: value.clone() for name, value in original.state_dict().items()}
        layer = ubn_zoo.convert_batchnorm(original)
        layer(torch.randn(4, 3, 5, 5)).sum().backward()
        torch.optim.SGD(layer.parameters(), 1.0).step()
        for name, value in original.state_dict().items():
            assert torch.equal(value, before[name]), name


def authors_format(state: dict[str, Tensor], prefixes: list[str]) -> dict[str, Tensor]:
    """A UBN state dict in the format of the paper's authors."""
    out = {}
    for key, value in state.items():
        prefix, _, name = key.rpartition(".")
        if prefix not in prefixes:
            out[key] = value
        elif name in ("weight", "bias"):
            out[f"{prefix}.bnconv.{name}"] = value
        elif name in ("center_weight", "scale_weight", "scale_bias"):
            out[f"{prefix}.{name}"] = value.reshape(1, -1, 1, 1)
        elif name != "feature_similarity":  # not saved by them
            out[key] = value
    return out


class TestStateDicts:
    @staticmethod
    def pair() -> tuple[nn.Module, nn.Module]:
        original = small_model()
        return original, ubn_zoo.convert_batchnorm(copy.deepcopy(original)).apply(
            lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None
        )

    def test_batchnorm_format(self) -> None:
        original, model = self.pair()
        state = original.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        converted = convert.convert_state_dict(state, model)
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
        model.load_state_dict(converted, strict=True)
        assert_same_function(model, original, torch.randn(2, 3, 9, 9), 1e-5)
        assert list(state) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in state.items())

    def test_authors_format(self) -> None:
        _, model = self.pair()
        source = randomize(copy.deepcopy(model), seed=4)
        state = authors_format(source.state_dict(), ["1", "4"])
        converted = convert.convert_state_dict(state, model)
        model.load_state_dict(converted, strict=True)
        for name, value in source.state_dict().items():
            if not name.endswith("feature_similarity"):
                assert torch.equal(model.state_dict()[name], value), name
        x = torch.randn(2, 3, 9, 9)
        assert torch.equal(model.eval()(x), source.eval()(x))

    def test_ubn_format_stays_unchanged(self) -> None:
        _, model = self.pair()
        source = randomize(copy.deepcopy(model), seed=4, gate=0.25)
        converted = convert.convert_state_dict(source.state_dict(), model)
        assert list(converted) == list(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(converted[name], value), name

    @pytest.mark.parametrize(
        "settings", [{"kernel_size": 5}, {"scale_calibration": False}, {"depthwise_affine": False}]
    )
    def test_batchnorm_format_into_other_settings(self, settings: dict) -> None:
        original = small_model()
        model = ubn_zoo.convert_batchnorm(small_model(), **settings)
        randomize(model, seed=3)
        model.load_state_dict(convert.convert_state_dict(original.state_dict(), model), strict=True)
        assert_same_function(model, original, torch.randn(2, 3, 9, 9), 1e-5)

    def test_modules_load_the_formats_by_themselves(self) -> None:
        original, model = self.pair()
        randomize(model, seed=3, gate=-1.0)
        model.load_state_dict(original.state_dict())
        assert_same_function(model, original, torch.randn(2, 3, 9, 9), 1e-5)
        source = randomize(copy.deepcopy(model), seed=4)
        model.load_state_dict(authors_format(source.state_dict(), ["1", "4"]))
        x = torch.randn(2, 3, 9, 9)
        assert torch.equal(model(x), source.eval()(x))

    def test_one_channel(self) -> None:
        """(1,) and (1, 1, 3, 3): the format must not be guessed from a broadcast."""
        original = randomize_batchnorm(nn.BatchNorm2d(1))
        with torch.no_grad():
            original.weight.fill_(0.7)
        layer = ubn_zoo.UnifiedBatchNorm2d(1)
        layer.load_state_dict(original.state_dict())
        assert_same_function(layer, original, torch.randn(2, 1, 5, 5), 1e-5)

    def test_unknown_and_missing_entries_are_left_to_the_strict_check(self) -> None:
        original, model = self.pair()
        state = original.state_dict()
        state["surplus.weight"] = torch.zeros(3)
        del state["1.running_mean"]
        del state["4.bias"]
        converted = convert.convert_state_dict(state, model)
        assert torch.equal(converted["surplus.weight"], state["surplus.weight"])
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(converted, strict=True)
        for key in ("surplus.weight", "1.running_mean", "4.bias"):
            assert key in str(caught.value)

    def test_missing_entries_of_the_authors_format(self) -> None:
        _, model = self.pair()
        state = authors_format(model.state_dict(), ["1", "4"])
        del state["1.center_weight"]
        del state["4.bnconv.bias"]
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(convert.convert_state_dict(state, model), strict=True)
        assert "1.center_weight" in str(caught.value)
        assert "4." in str(caught.value)

    @pytest.mark.parametrize("key", ["1.weight", "1.bias", "1.running_var"])
    def test_misshaped_entries_are_reported(self, key: str) -> None:
        original, model = self.pair()
        state = original.state_dict()
        state[key] = torch.ones(7)
        with pytest.raises(RuntimeError, match=key):
            model.load_state_dict(convert.convert_state_dict(state, model), strict=True)

    def test_ordinary_layers_are_not_touched(self) -> None:
        """A depthwise convolution of the same shapes, and a module called bnconv outside UBN layers, stay."""
        model = nn.ModuleDict(
            {"conv": nn.Conv2d(4, 4, 3, groups=4), "norm": ubn_zoo.UnifiedBatchNorm2d(4), "bnconv": nn.Conv2d(4, 4, 1)}
        )
        state = model.state_dict()
        converted = convert.convert_state_dict(state, model)
        for key, value in state.items():
            assert converted[key] is value or torch.equal(converted[key], value)
        assert set(converted) == set(state)

    def test_values_pass_in_float64(self) -> None:
        original = small_model().double()
        model = ubn_zoo.convert_batchnorm(small_model()).double()
        model.load_state_dict(convert.convert_state_dict(original.state_dict(), model))
        assert_same_function(model, original, torch.randn(2, 3, 9, 9, dtype=F64), 1e-12)


class TestOtherConverters:
    """They must leave a UBN model unchanged: same modules, same function, same state."""

    @staticmethod
    def check(convert_other) -> None:
        model = randomize(ubn_zoo.convert_batchnorm(small_model())).eval()
        layers = ubn_layers(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        x = torch.randn(2, 3, 9, 9)
        with torch.no_grad():
            expected = model(x)
        result = convert_other(model)
        assert [id(layer) for layer in ubn_layers(result)] == [id(layer) for layer in layers]
        assert list(result.state_dict()) == list(state)
        for name, value in result.state_dict().items():
            assert torch.equal(value, state[name]), name
        with torch.no_grad():
            assert torch.equal(result.eval()(x), expected)

    def test_timms_convert_sync_batchnorm(self) -> None:
        self.check(convert_sync_batchnorm)

    def test_torchs_convert_sync_batchnorm(self) -> None:
        self.check(nn.SyncBatchNorm.convert_sync_batchnorm)

    def test_timms_freeze_batch_norm_2d(self) -> None:
        self.check(freeze_batch_norm_2d)

    def test_on_a_single_layer(self) -> None:
        layer = make_layer(3)
        assert convert_sync_batchnorm(layer) is layer
        assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer
        assert freeze_batch_norm_2d(layer) is layer


class TestConvertSync:
    def test_keeps_everything(self) -> None:
        model = randomize(ubn_zoo.convert_batchnorm(small_model()))
        parameters = {name: id(p) for name, p in model.named_parameters()}
        state = snapshot(model)
        x = torch.randn(2, 3, 9, 9)
        expected = copy.deepcopy(model).eval()(x)
        result = ubn_zoo.convert_sync_ubn(model)
        assert result is model
        assert {name: id(p) for name, p in result.named_parameters()} == parameters
        assert all(torch.equal(value, state[name]) for name, value in snapshot(result).items())
        assert torch.equal(result.eval()(x), expected)
        assert len(ubn_layers(result)) == 2

    def test_without_a_process_group_it_is_the_plain_layer(self) -> None:
        layer = make_layer(3, dtype=F64)
        x, grad_y = random_input((4, 3, 5, 5))
        assert_step(ubn_zoo.convert_sync_ubn(layer), x, grad_y)

    def test_single_layer(self) -> None:
        layer = ubn_zoo.convert_sync_ubn(make_layer(3))
        assert len(ubn_layers(layer)) == 1

    def test_nothing_to_convert_raises(self) -> None:
        with pytest.raises(ValueError, match="UBN"):
            ubn_zoo.convert_sync_ubn(nn.Sequential(nn.BatchNorm2d(3)))

    def test_copies_and_state_dict(self) -> None:
        layer = ubn_zoo.convert_sync_ubn(make_layer(3)).eval()
        x = torch.randn(2, 3, 5, 5)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert set(layer.state_dict()) == {*PARAMETERS, *BUFFERS}
