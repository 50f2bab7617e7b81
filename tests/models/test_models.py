"""The requirements of timm's own model tests, and agreement with the BatchNorm siblings.

Structure is checked for every model on the meta device, where nothing is computed. Numbers are checked for one small
model of each kind; for all of them with

    python -m pytest tests/models -m exhaustive
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from ubn_zoo.models.registry import parameter_table

from .common import (
    ALL,
    BUILD_PATHS,
    KINDS,
    assert_same_function,
    everyday,
    images,
    input_size,
    outcome,
    sibling,
    smallest,
    trained,
)

SMALL = 64


def build(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def batch(name: str, samples: int = 2, side: int = SMALL) -> Tensor:
    return images(samples, *input_size(name, side))


def names_of(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


# Above this, sibling, twin, their copies and gradients take more than 6 GB.
MOST_PARAMETERS = 180_000_000
FEASIBLE = [name for name in ALL if max(parameter_table()[name].values()) < MOST_PARAMETERS]


@dataclasses.dataclass
class Pair:
    """A twin and its sibling, on the meta device."""

    name: str
    ours: nn.Module
    theirs: nn.Module

    def compare(self, function: Callable[[Any], Any]) -> Any:
        """Require the same outcome for both, and return it."""
        with torch.device("meta"), torch.no_grad():
            ours, theirs = (outcome(lambda model=model: function(model)) for model in (self.ours, self.theirs))
        assert ours == theirs
        return ours


SMALLEST = [smallest(family.module) for family in ubn_zoo.models.FAMILIES]


@pytest.fixture(scope="module", params=everyday(sorted({*SMALLEST, *KINDS}), ALL))
def pair(request: pytest.FixtureRequest) -> Pair:
    with torch.device("meta"):
        ours, theirs = timm.create_model(request.param), timm.create_model(sibling(request.param))
    return Pair(request.param, ours.eval(), theirs.eval())


def shapes(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else [shapes(part) for part in value]


def test_structure_matches_the_sibling(pair: Pair) -> None:
    ours, theirs = pair.ours, pair.theirs
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    swapped = [n for n, module in theirs.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [n for n, module in ours.named_modules() if isinstance(module, UnifiedBatchNorm2d)] == swapped
    others = [
        [(n, type(m)) for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
        for model in (ours, theirs)
    ]
    assert others[0] == others[1]
    assert type(theirs) in type(ours).__mro__

    cfg = ours.default_cfg
    assert ours.pretrained_cfg is cfg
    assert cfg["architecture"] == pair.name
    assert cfg["num_classes"] == ours.num_classes == theirs.num_classes
    pair.compare(lambda model: shapes(model.forward_features(torch.empty(2, *cfg["input_size"]))))
    for entry in ("pool_size", "first_conv", "classifier"):
        assert cfg.get(entry) == theirs.default_cfg.get(entry)
    for layer in (*names_of(cfg["first_conv"]), *(names_of(cfg["classifier"]) if ours.num_classes else ())):
        pair.compare(lambda model, layer=layer: shapes(model.get_submodule(layer).weight))


def test_heads_match_the_sibling(pair: Pair) -> None:
    copied = copy.deepcopy(pair)
    x = torch.empty(2, *copied.ours.default_cfg["input_size"], device="meta")
    copied.compare(lambda model: shapes(model(x)))
    pool = "token" if pair.name.endswith("_clip_ubn") else "avg"
    for arguments in [(0,), (0, ""), (7, pool)]:
        copied.compare(lambda model, arguments=arguments: model.reset_classifier(*arguments))
        last = copied.compare(lambda model: shapes(model(x)))
    if pair.name in BUILD_PATHS:
        assert last == (2, 7)
    copied.compare(lambda model: type(model.get_classifier()))


def test_features_match_the_sibling(pair: Pair) -> None:
    size = input_size(pair.name, 96) if pair.name in BUILD_PATHS else pair.ours.default_cfg["input_size"]

    def features(model: nn.Module) -> Any:
        extractor = timm.create_model(pair.name if model is pair.ours else sibling(pair.name), features_only=True)
        outputs = shapes(extractor.eval()(torch.empty(1, *size)))
        if model is pair.ours:
            assert not any(isinstance(module, nn.BatchNorm2d) for module in extractor.modules())
            assert "classifier" not in extractor.default_cfg
            assert extractor.default_cfg["architecture"] == pair.name
        return outputs, extractor.feature_info.get_dicts()

    found = pair.compare(features)
    if pair.name in BUILD_PATHS:
        outputs, info = found
        assert [shape[1] for shape in outputs] == [level["num_chs"] for level in info]
        assert len(outputs) >= 4


def test_weight_decay_excludes_the_norms(pair: Pair) -> None:
    assert pair.ours.no_weight_decay() <= {key for key, _ in pair.ours.named_parameters()}

    def decayed(model: nn.Module) -> set[str]:
        groups = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05).param_groups
        chosen = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
        return {key for key, parameter in model.named_parameters() if id(parameter) in chosen}

    pair.compare(decayed)


def test_layer_decay_groups(pair: Pair) -> None:
    """Every parameter is in one group, and a norm's parameters are in the group of its layer."""
    pair.compare(lambda model: {key: str(value) for key, value in model.group_matcher(coarse=True).items()})
    scales: dict[str, float] = {}

    def group(model: nn.Module) -> None:
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
        by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        for key, parameter in model.named_parameters():
            norm = key.rpartition(".")[0]
            known = scales.get(key, scales.get(f"{norm}.weight"))
            assert known in (None, by_id[id(parameter)])
            scales[key] = by_id[id(parameter)]

    pair.theirs, pair.ours = pair.ours, pair.theirs
    try:
        pair.compare(group)  # The sibling comes first, because its scales are the expected ones.
    finally:
        pair.theirs, pair.ours = pair.ours, pair.theirs


@pytest.mark.parametrize("name", everyday(KINDS, FEASIBLE))
def test_same_function_as_the_sibling(name: str) -> None:
    theirs = trained(sibling(name))
    ours = build(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = batch(name)
    with torch.inference_mode():
        assert_same_function(ours(x), theirs(x))
        expected = outcome(lambda: theirs.forward_intermediates(x, intermediates_only=True))
        if isinstance(expected, type):
            assert outcome(lambda: ours.forward_intermediates(x, intermediates_only=True)) is expected
            return
        for mine, reference in zip(ours.forward_intermediates(x, intermediates_only=True), expected, strict=True):
            assert_same_function(mine, reference)
        final, _ = ours.forward_intermediates(x, indices=[0, -1])
        assert_same_function(final, theirs.forward_features(x))


@pytest.mark.parametrize("name", everyday(KINDS, FEASIBLE))
def test_backward(name: str) -> None:
    """A training step updates the same parameters as in the sibling, and the running statistics."""
    model, theirs = (build(architecture, num_classes=42).train() for architecture in (name, sibling(name)))
    x = batch(name)
    for each in (model, theirs):
        outputs = each(x)
        for part in outputs if isinstance(outputs, tuple) else (outputs,):
            assert part.shape == (2, 42)
            assert torch.isfinite(part).all()
            part.mean().backward(retain_graph=True)
    reached = {key: parameter.grad is not None for key, parameter in theirs.named_parameters()}
    assert all(reached.values()) or name not in KINDS
    for key, parameter in model.named_parameters():
        norm = key.rpartition(".")[0]
        assert (parameter.grad is not None) == reached.get(key, reached.get(f"{norm}.weight")), key
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    layers = dict(theirs.named_modules())
    for key, layer in model.named_modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            assert layer.num_batches_tracked == layers[key].num_batches_tracked


# TorchScript compiles each class: test one model per kind of activation and of class constants.
SCRIPTED = ["fastvit_t8_ubn", "mobilenetv3_small_050_ubn", "regnetx_002_ubn", "resnet10t_ubn", "resnetv2_18_ubn"]


@pytest.mark.parametrize("name", everyday(SCRIPTED, FEASIBLE))
def test_torchscript(name: str) -> None:
    """A twin can be scripted if its sibling can."""
    with set_scriptable(True):
        model = build(name).eval()
    try:
        scripted = torch.jit.script(model)
    except Exception:
        with set_scriptable(True), pytest.raises(Exception):  # noqa: B017 (as of the twin)
            torch.jit.script(build(sibling(name)).eval())
        return
    x = batch(name, samples=1)
    with torch.no_grad():
        assert_same_function(scripted(x), model(x))


# One for each of timm's feature extraction methods and families.
FEATURES = ["resnet18", "resnetv2_18", "resnet32ts", "regnetx_002", "mobilenetv2_035", "mobilenetv3_small_050"]
# Every method with one model; with the others, the default and the one that timm does not support for some models.
WAYS = [
    pytest.param(
        name,
        way,
        marks=[] if name == FEATURES[0] or way in (None, "dict") else [pytest.mark.slow, pytest.mark.exhaustive],
    )
    for name in FEATURES
    for way in (None, "list", "dict", "hook", "getter", "fx")
]


@pytest.mark.parametrize(("name", "feature_cls"), WAYS)
def test_ways_to_extract_features(name: str, feature_cls: str | None, tmp_path: Path) -> None:
    file = tmp_path / "bn.safetensors"
    theirs = trained(name)
    save(theirs, file)
    arguments = {"features_only": True, "out_indices": (1, 3)}
    if feature_cls:
        arguments["feature_cls"] = feature_cls
    overlay = {"file": str(file)}
    if name.startswith("mobilenet") and feature_cls in ("list", "dict"):
        # timm cannot rewrite these models as lists.
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
    """UBN is a leaf of timm's traces, like BatchNormAct, and the graph computes the same as the model."""
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
        # These pickles are made in this test.
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
