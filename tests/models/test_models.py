"""What timm's own tests ask of its models, asked of the zoo, and agreement with the BatchNorm siblings.

Structure is checked for every model on the meta device, where nothing is computed. Numbers are checked for one small
model of each way of building; for all of them with

    python -m pytest tests/models -m exhaustive
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models import create_feature_extractor, get_graph_node_names
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

import ubn_zoo.models
from ubn_zoo import UnifiedBatchNorm2d

from .common import BUILD_PATHS, assert_same_function, images, input_size, sibling, trained

SMALL = 64


def build(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def batch(name: str, samples: int = 2, side: int = SMALL) -> Tensor:
    return images(samples, *input_size(name, side))


def names_of(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


# The rest of the zoo, left out of the ordinary run.
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]
LISTED = timm.list_models(["resnet*_ubn", "regnet*_ubn", "mobilenet*_ubn"])
REST = [pytest.param(name, marks=EXHAUSTIVE) for name in LISTED if name not in BUILD_PATHS]


@pytest.mark.parametrize("name", [*BUILD_PATHS, *REST])
def test_structure_is_the_siblings(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = timm.create_model(name).eval(), timm.create_model(sibling(name)).eval()
        features = ours.forward_features(torch.empty(2, *ours.default_cfg["input_size"]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    swapped = [n for n, module in theirs.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [n for n, module in ours.named_modules() if isinstance(module, UnifiedBatchNorm2d)] == swapped
    assert type(theirs) in type(ours).__mro__

    cfg = ours.default_cfg
    assert ours.pretrained_cfg is cfg
    assert cfg["architecture"] == name
    assert cfg["num_classes"] == ours.num_classes == theirs.num_classes
    assert tuple(features.shape[-2:]) == tuple(cfg["pool_size"])
    modules = dict(ours.named_modules())
    for first_conv in names_of(cfg["first_conv"]):
        assert isinstance(modules[first_conv], nn.Conv2d)
    if ours.num_classes:
        for classifier in names_of(cfg["classifier"]):
            assert modules[classifier].weight.shape[0] == ours.num_classes


@pytest.mark.parametrize("name", [*BUILD_PATHS, *REST])
def test_heads_are_the_siblings(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = timm.create_model(name).eval(), timm.create_model(sibling(name)).eval()
        x = torch.empty(2, *ours.default_cfg["input_size"])
        assert ours(x).shape == theirs(x).shape == (2, ours.num_classes or ours.num_features)
        for arguments in [(0,), (0, ""), (7, "token" if name.endswith("_clip_ubn") else "avg")]:
            ours.reset_classifier(*arguments)
            theirs.reset_classifier(*arguments)
            assert ours(x).shape == theirs(x).shape
        assert ours(x).shape == (2, 7)


@pytest.mark.parametrize("name", [*BUILD_PATHS, *REST])
def test_features_are_the_siblings(name: str) -> None:
    with torch.device("meta"):
        ours = timm.create_model(name, features_only=True).eval()
        theirs = timm.create_model(sibling(name), features_only=True).eval()
        x = torch.empty(1, *input_size(name, 96))
        outputs = ours(x)
        assert [output.shape for output in outputs] == [output.shape for output in theirs(x)]
    assert ours.feature_info.get_dicts() == theirs.feature_info.get_dicts()
    assert [output.shape[1] for output in outputs] == ours.feature_info.channels()
    assert len(outputs) >= 4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    assert "classifier" not in ours.default_cfg
    assert ours.default_cfg["architecture"] == name


def check_same_function(name: str) -> None:
    theirs = trained(sibling(name))
    ours = build(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = batch(name)
    with torch.inference_mode():
        assert_same_function(ours(x), theirs(x))


def check_backward(name: str) -> None:
    """One step of training reaches every parameter, and the statistics move."""
    model = build(name, num_classes=42).train()
    outputs = model(batch(name))
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert torch.isfinite(outputs).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    for layer in model.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            assert layer.num_batches_tracked == 1


def check_script(name: str) -> None:
    with set_scriptable(True):
        model = build(name).eval()
    scripted = torch.jit.script(model)
    x = batch(name, samples=1)
    with torch.no_grad():
        assert_same_function(scripted(x), model(x))


@pytest.mark.parametrize("name", BUILD_PATHS)
def test_same_function_as_the_sibling(name: str) -> None:
    check_same_function(name)


@pytest.mark.parametrize("name", BUILD_PATHS)
def test_backward(name: str) -> None:
    check_backward(name)


@pytest.mark.parametrize("name", BUILD_PATHS)
def test_torchscript(name: str) -> None:
    check_script(name)


# The largest ones take gigabytes and minutes each, and are built like their smaller kin.
FEASIBLE = [name for name in LISTED if not name.startswith(("regnety_1280", "regnety_2560", "regnety_640"))]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in FEASIBLE if name not in BUILD_PATHS])
@pytest.mark.parametrize("check", [check_same_function, check_backward, check_script])
def test_every_model(name: str, check: object) -> None:
    check(name)


@pytest.mark.parametrize("name", BUILD_PATHS)
def test_feature_values_are_the_siblings(name: str) -> None:
    theirs = trained(sibling(name))
    ours = build(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = batch(name, samples=1)
    with torch.inference_mode():
        for mine, reference in zip(
            ours.forward_intermediates(x, intermediates_only=True),
            theirs.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert_same_function(mine, reference)
        final, _ = ours.forward_intermediates(x, indices=[0, -1])
        assert_same_function(final, theirs.forward_features(x))


# One for each of timm's ways to extract features, and of its families.
FEATURES = ["resnet18", "resnetv2_18", "resnet32ts", "regnetx_002", "mobilenetv2_035", "mobilenetv3_small_050"]


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("feature_cls", [None, "list", "dict", "hook", "getter", "fx"])
def test_ways_to_extract_features(name: str, feature_cls: str | None, tmp_path: Path) -> None:
    file = tmp_path / "bn.safetensors"
    theirs = trained(name)
    save(theirs, file)
    arguments = {"features_only": True, "out_indices": (1, 3)}
    if feature_cls:
        arguments["feature_cls"] = feature_cls
    overlay = {"file": str(file)}
    if name.startswith("mobilenet") and feature_cls in ("list", "dict"):
        # timm itself cannot rewrite these as lists.
        with pytest.raises(AssertionError, match="not present in model"):
            timm.create_model(f"{name}_ubn", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        return
    reference = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    ours = timm.create_model(f"{name}_ubn", pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    assert type(ours).__name__.removeprefix("Ubn") == type(reference).__name__
    assert ours.feature_info.get_dicts() == reference.feature_info.get_dicts()
    x = batch(f"{name}_ubn", samples=1)
    with torch.inference_mode():
        mine, expected = ours(x), reference(x)
    if feature_cls == "dict":
        assert list(mine) == list(expected)
        mine, expected = list(mine.values()), list(expected.values())
    for actual, wanted in zip(mine, expected, strict=True):
        assert_same_function(actual, wanted)


def save(model: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), file)


@pytest.mark.parametrize("name", ["resnet18_ubn", "regnety_002_ubn", "mobilenetv3_small_050_ubn", "resnetv2_18_ubn"])
def test_fx(name: str) -> None:
    """UBN is a leaf of timm's traces, as BatchNormAct is; graphs compute what the model computes."""
    model = build(name).eval()
    nodes, _ = get_graph_node_names(model)
    assert not any("running" in node for node in nodes)
    extractor = create_feature_extractor(model, {nodes[-1]: "out"})
    x = batch(name, samples=1)
    with torch.no_grad():
        actual, expected = extractor(x)["out"], model(x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "name", ["resnet10t_ubn", "regnetx_002_ubn", "regnetz_b16_ubn", "resnetv2_18_ubn", "mobilenetv2_035_ubn"]
)
def test_gradient_checkpointing(name: str) -> None:
    plain, checkpointed = build(name).train(), build(name).train()
    checkpointed.set_grad_checkpointing(True)
    x = batch(name)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(x).square().mean().backward()
    for (key, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=key)
    for (key, buffer), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, msg=key)


@pytest.mark.parametrize("name", BUILD_PATHS)
def test_weight_decay_spares_the_norms(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        base = timm.create_model(sibling(name))
    excluded = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert excluded <= set(parameters)
    groups = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    base_groups = create_optimizer_v2(base, opt="sgd", lr=0.1, weight_decay=0.05).param_groups
    base_names = {id(parameter): key for key, parameter in base.named_parameters()}
    base_decayed = {base_names[id(p)] for group in base_groups if group["weight_decay"] for p in group["params"]}
    assert {key for key, parameter in parameters.items() if id(parameter) in decayed} == base_decayed


@pytest.mark.parametrize("name", BUILD_PATHS)
def test_layer_decay_groups(name: str) -> None:
    """Every parameter is in one group, a norm's in that of its layer."""
    with torch.device("meta"):
        model, base = timm.create_model(name), timm.create_model(sibling(name))
    assert model.group_matcher(coarse=True) == base.group_matcher(coarse=True)
    scales = {}
    for key, candidate in (("ours", model), ("theirs", base)):
        groups = param_groups_layer_decay(candidate, weight_decay=0.05, layer_decay=0.5)
        by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        scales[key] = {name: by_id[id(p)] for name, p in candidate.named_parameters()}
    for key, scale in scales["ours"].items():
        norm = key.rpartition(".")[0]
        assert scale == scales["theirs"].get(key, scales["theirs"].get(f"{norm}.weight"))


def test_optional_arguments() -> None:
    model = build("resnet18_ubn", num_classes=5, in_chans=1, global_pool="max", drop_rate=0.1, drop_path_rate=0.1)
    assert model(images(2, 1, SMALL, SMALL)).shape == (2, 5)
    assert model.default_cfg["num_classes"] == 1000
    assert build("regnetx_002_ubn", output_stride=16).forward_features(images(1, 3, 64, 64)).shape[-1] == 4
    assert build("mobilenetv2_035_ubn", global_pool="", num_classes=0)(images(1, 3, 64, 64)).dim() == 4
    assert isinstance(build("resnet18_ubn").get_classifier(), nn.Linear)


def test_layer_settings() -> None:
    model = build("resnet18_ubn", ubn_kwargs={"threshold": None, "kernel_size": 5, "center_calibration": False})
    layers = [module for module in model.modules() if isinstance(module, UnifiedBatchNorm2d)]
    for layer in layers:
        assert (layer.threshold, layer.kernel_size, layer.center_weight) == (None, 5, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treshold": 0.1}, "'treshold'; did you mean 'threshold'"),
        ({"device": "cpu"}, "valid are threshold"),
        ([1], "valid is a dict"),
        ({"threshold": torch.ones(1)}, "JSON"),
    ],
)
def test_wrong_layer_settings(settings: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        timm.create_model("resnet18_ubn", ubn_kwargs=settings)


def test_wrong_layer_setting_value() -> None:
    with pytest.raises(ValueError, match="kernel_size is 4"):
        timm.create_model("resnet18_ubn", ubn_kwargs={"kernel_size": 4})


@pytest.mark.parametrize("name", ["resnet18_ubn", "mobilenetv3_small_050_ubn", "regnetx_002_ubn", "repvgg_a0_ubn"])
def test_copies(name: str) -> None:
    model = build(name).eval()
    x = batch(name, samples=1)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    with torch.no_grad():
        expected = model(x)
        # These pickles were made right here.
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):  # noqa: S301
            assert type(twin) is type(model)
            assert twin.no_weight_decay() == model.no_weight_decay()
            assert twin.pretrained_cfg == model.pretrained_cfg
            torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
            before = [p.clone() for p in model.parameters()]
            for parameter in twin.parameters():
                parameter.add_(1)
            torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


def test_pickles_open_in_a_fresh_process(tmp_path: Path) -> None:
    model = build("regnetx_002_ubn").eval()
    torch.save(model, tmp_path / "model.pt")
    x = batch("regnetx_002_ubn", samples=1)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "expected.pt")
    code = (
        "import torch\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "x, expected = torch.load('expected.pt')\n"
        "with torch.no_grad(): torch.testing.assert_close(model(x), expected)\n"
        "assert model.no_weight_decay()\n"
    )
    root = str(Path(ubn_zoo.models.__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"], check=True, cwd=tmp_path
    )
