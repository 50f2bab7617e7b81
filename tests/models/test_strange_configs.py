"""Untrusted configurations: invalid entries are rejected by name, before a model allocates memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import ubn_zoo
from tests.hub_server import HubServer
from ubn_zoo.errors import UbnZooError

NAME = "resnet10t_ubn"
HUGE = 10**9
DELETE = object()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = timm.create_model(NAME, num_classes=7, ubn_kwargs={"kernel_size": 5})
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.fixture
def allocated() -> Iterator[list[int]]:
    """Sizes of parameters that are allocated in memory, not on the meta device."""
    sizes: list[int] = []

    def note(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            sizes.append(parameter.numel())

    handle = register_module_parameter_registration_hook(note)
    yield sizes
    handle.remove()


def folder_with(saved: Path, folder: Path, config: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").symlink_to(saved / "model.safetensors")
    (folder / "config.json").write_bytes(config)
    return folder


def changed(saved: Path, path: str, value: Any) -> bytes:
    config = json.loads((saved / "config.json").read_bytes())
    if not path.startswith("model_args"):
        # timm saves classes and channels twice; keep one of each, so that it can contradict the weights.
        config["model_args"] = {"ubn_kwargs": config["model_args"]["ubn_kwargs"]}
    *parents, key = path.split(".")
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is DELETE:
        del place[key]
    else:
        place[key] = value
    return json.dumps(config).encode()


TEXTS = {
    "empty": b"",
    "text": b"not JSON",
    "binary": bytes(range(256)),
    "cut off": b'{"architecture": "resnet10t_ubn", ',
    "NaN": b'{"architecture": "resnet10t_ubn", "num_classes": NaN}',
    "infinite": b'{"architecture": "resnet10t_ubn", "num_classes": Infinity}',
    "long number": b'{"architecture": "resnet10t_ubn", "num_classes": ' + b"9" * 5000 + b"}",
    "nested": b"[" * 100_000,
    "null": b"null",
    "number": b"3",
    "string": b'"resnet10t_ubn"',
    "list": b'["resnet10t_ubn"]',
    "empty object": b"{}",
    "old format, unknown key": b'{"architecture": "resnet10t_ubn", "color": "red"}',
    "old format, wrong type": b'{"architecture": "resnet10t_ubn", "num_classes": "7"}',
    "old format, other classes": b'{"architecture": "resnet10t_ubn", "num_classes": 8}',
}

# Entry, value, and expected text in the message.
ENTRIES: list[tuple[str, Any, str]] = [
    ("architecture", DELETE, "no 'architecture'"),
    ("architecture", None, "architecture"),
    ("architecture", 3, "architecture"),
    ("architecture", ["resnet10t_ubn"], "architecture"),
    ("architecture", "", "architecture"),
    ("architecture", "resnet10_ubn", "resnet10t_ubn"),
    ("architecture", "../../etc/passwd", "architecture"),
    ("architecture", "mobilenetv3_small_050_ubn", "does not fit|num_classes"),
    ("num_classes", HUGE, "num_classes"),
    ("num_classes", 10**7, "num_classes is 10000000, fc.weight of the file has 7"),
    ("num_classes", 8, "num_classes is 8, fc.weight of the file has 7"),
    ("num_classes", -1, "num_classes"),
    ("num_classes", "7", "num_classes"),
    ("num_classes", 7.5, "num_classes"),
    ("num_classes", True, "num_classes"),
    ("num_classes", None, "num_classes"),
    ("num_classes", [7], "num_classes"),
    ("label_names", 3, "label_names"),
    ("label_names", [1, 2], "label_names"),
    ("label_descriptions", 3, "label_descriptions"),
    ("label_descriptions", {"a": 1}, "label_descriptions"),
    ("pretrained_cfg", None, "pretrained_cfg"),
    ("pretrained_cfg", "a1_in1k", "pretrained_cfg"),
    ("pretrained_cfg", [], "pretrained_cfg"),
    ("pretrained_cfg.color", "red", "color"),
    ("pretrained_cfg.num_classes", "7", "num_classes"),
    ("pretrained_cfg.input_size", 224, "input_size"),
    ("pretrained_cfg.input_size", [3, 224], "input_size"),
    ("pretrained_cfg.input_size", [3, 0, 224], "input_size"),
    ("pretrained_cfg.input_size", ["3", "224", "224"], "input_size"),
    ("pretrained_cfg.input_size", [HUGE, 224, 224], "input_size"),
    ("pretrained_cfg.input_size", [60000, 224, 224], "in_chans .* is 60000"),
    ("pretrained_cfg.input_size", [4, 224, 224], "in_chans .* is 4, conv1.0.weight of the file has 3"),
    ("pretrained_cfg.input_size", None, "input_size"),
    ("pretrained_cfg.test_input_size", "288", "test_input_size"),
    ("pretrained_cfg.min_input_size", [3, 1.5, 2], "min_input_size"),
    ("pretrained_cfg.mean", "imagenet", "mean"),
    ("pretrained_cfg.mean", [], "mean"),
    ("pretrained_cfg.mean", [None, 0.5, 0.5], "mean"),
    ("pretrained_cfg.std", 0.2, "std"),
    ("pretrained_cfg.std", [0, 0, 0], "std"),
    ("pretrained_cfg.std", ["a", "b", "c"], "std"),
    ("pretrained_cfg.crop_pct", "0.9", "crop_pct"),
    ("pretrained_cfg.crop_pct", 0, "crop_pct"),
    ("pretrained_cfg.crop_mode", "corner", "crop_mode"),
    ("pretrained_cfg.interpolation", "magic", "interpolation"),
    ("pretrained_cfg.interpolation", ["bicubic"], "interpolation"),
    ("pretrained_cfg.pool_size", "7x7", "pool_size"),
    ("pretrained_cfg.first_conv", 3, "first_conv"),
    ("pretrained_cfg.first_conv", "stem.conv", "first_conv is 'stem.conv'"),
    ("pretrained_cfg.classifier", {"name": "fc"}, "classifier"),
    ("pretrained_cfg.classifier", "head", "classifier is 'head'"),
    ("pretrained_cfg.label_offset", "1", "label_offset"),
    ("pretrained_cfg.fixed_input_size", "no", "fixed_input_size"),
    ("pretrained_cfg.fixed_input_size", True, "cannot be built"),
    ("pretrained_cfg.custom_load", 1, "custom_load"),
    ("pretrained_cfg.state_dict", {"fc.weight": 1}, "state_dict"),
    ("pretrained_cfg.hf_hub_filename", 3, "hf_hub_filename"),
    ("pretrained_cfg.license", ["mit"], "license"),
    ("model_args", None, "model_args"),
    ("model_args", "num_classes=7", "model_args"),
    ("model_args", [["num_classes", 7]], "model_args"),
    ("model_args.color", "red", "color='red'"),
    ("model_args.pretrained", True, "'pretrained'"),
    ("model_args.pretrained_strict", False, "'pretrained_strict'"),
    ("model_args.architecture", "resnet18_ubn", "'architecture'"),
    ("model_args.cache_dir", "..", "'cache_dir'"),
    ("model_args.device", "cuda:9", "'device'"),
    ("model_args.num_classes", 10**6, "num_classes is 7, but model_args.num_classes is 1000000"),
    ("model_args.num_classes", "7", "model_args.num_classes"),
    ("model_args.in_chans", 0, "model_args.in_chans"),
    ("model_args.in_chans", "3", "model_args.in_chans"),
    ("model_args.in_chans", 60000, "in_chans .* is 60000"),
    ("model_args.img_size", "224", "model_args.img_size"),
    ("model_args.layers", [100_000, 1, 1, 1], r"layers=\[100000, 1, 1, 1\]|layers"),
    ("model_args.layers", [HUGE, 1, 1, 1], "model_args.layers"),
    ("model_args.layers", "many", "layers"),
    ("model_args.layers", [[[[[[[1]]]]]]], "model_args.layers"),
    ("model_args.stem_width", 10**6, "stem_width=1000000|stem_width"),
    ("model_args.stem_width", -3, "stem_width"),
    ("model_args.channels", [10**6] * 4, "channels"),
    ("model_args.drop_rate", 5, "drop_rate is 5"),
    ("model_args.drop_rate", "high", "drop_rate is 'high'"),
    ("model_args.drop_path_rate", [0.1], "drop_path_rate"),
    ("model_args.act_layer", "magic", "act_layer='magic'"),
    ("model_args.norm_layer", "layernorm2d", "norm_layer"),
    ("model_args.block", "BasicBlock", "block"),
    ("model_args.global_pool", "magic", "global_pool='magic'"),
    ("model_args.ubn_kwargs", 3, "ubn_kwargs"),
    ("model_args.ubn_kwargs", {"color": "red"}, "color"),
    ("model_args.ubn_kwargs", {"kernel_size": 10001}, "kernel_size is 10001, valid are odd sizes from 1 to 31"),
    ("model_args.ubn_kwargs", {"kernel_size": 33}, "kernel_size is 33"),
    ("model_args.ubn_kwargs", {"kernel_size": 4}, "kernel_size is 4"),
    ("model_args.ubn_kwargs", {"kernel_size": "3"}, "kernel_size is '3'"),
    ("model_args.ubn_kwargs", {"kernel_size": 7}, "kernel_size is 7, .* of the file has 5"),
    ("model_args.ubn_kwargs", {"kernel_size": 31}, "kernel_size is 31, .* of the file has 5"),
    ("model_args.ubn_kwargs", {"threshold": "low"}, "threshold"),
    ("model_args.ubn_kwargs", {"similarity_momentum": 2}, "similarity_momentum"),
]


def refusal(source: str, **settings: Any) -> str:
    start = time.thread_time()
    with pytest.raises(UbnZooError) as caught:
        timm.create_model(source, **settings)
    assert time.thread_time() - start < 1
    assert source in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_strange_text(saved: Path, tmp_path: Path, allocated: list[int], text: bytes) -> None:
    source = f"local-dir:{folder_with(saved, tmp_path, text)}"
    refusal(source, pretrained=True)
    assert not allocated


def described(path: str, value: Any) -> str:
    return f"{path} missing" if value is DELETE else f"{path}={value!s:.25}"


@pytest.mark.parametrize(
    ("path", "value", "named"), ENTRIES, ids=[described(path, value) for path, value, _ in ENTRIES]
)
def test_strange_entry(saved: Path, tmp_path: Path, allocated: list[int], path: str, value: Any, named: str) -> None:
    source = f"local-dir:{folder_with(saved, tmp_path, changed(saved, path, value))}"
    message = refusal(source, pretrained=True)
    assert re.search(named, message), message
    assert not allocated


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_classes", 10**7),
        ("model_args.layers", [100_000, 1, 1, 1]),
        ("model_args.stem_width", 10**6),
        ("model_args.ubn_kwargs", {"kernel_size": 10001}),
    ],
)
def test_sizes_are_also_limited_without_weights(
    saved: Path, tmp_path: Path, allocated: list[int], path: str, value: Any
) -> None:
    source = f"local-dir:{folder_with(saved, tmp_path, changed(saved, path, value))}"
    refusal(source)
    assert not allocated


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("architecture", "resnet10_ubn", "resnet10t_ubn"),
        ("num_classes", 10**7, "fc.weight of the file has 7"),
        ("model_args.ubn_kwargs", {"kernel_size": 10001}, "kernel_size is 10001"),
    ],
)
def test_strange_repository(
    hub: HubServer, saved: Path, tmp_path: Path, allocated: list[int], path: str, value: Any, named: str
) -> None:
    weights = (saved / "model.safetensors").read_bytes()
    hub.create("a/stranger", {"config.json": changed(saved, path, value), "model.safetensors": weights})
    assert named in refusal("hf-hub:a/stranger", pretrained=True, cache_dir=tmp_path)
    assert not allocated


@pytest.mark.parametrize("pretrained", [True, False])
def test_ordinary_folder_loads(saved: Path, pretrained: bool) -> None:
    before = torch.get_rng_state()
    model = timm.create_model(f"local-dir:{saved}", pretrained=pretrained)
    if pretrained:
        expected = safetensors.torch.load_file(saved / "model.safetensors")
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    other = timm.create_model(f"local-dir:{saved}", num_classes=100_000, in_chans=5)
    assert other.num_classes == 100_000
    # The checks draw no random numbers, so a seed gives the same model with and without them.
    torch.set_rng_state(before)
    model = timm.create_model(f"local-dir:{saved}")
    torch.set_rng_state(before)
    plain = timm.create_model(NAME, num_classes=7, ubn_kwargs={"kernel_size": 5})
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


def test_other_timm_models_are_unaffected(tmp_path: Path) -> None:
    config = {"architecture": "resnet10t", "num_classes": 7, "pretrained_cfg": {"crop_mode": "of timm's future"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert timm.create_model(f"local-dir:{tmp_path}").num_classes == 7


def test_layer_names_its_largest_kernel() -> None:
    assert ubn_zoo.UnifiedBatchNorm2d(2, kernel_size=31).weight.shape[-1] == 31
    for size in (33, 10001, 4, 0, -1, 3.0, "3"):
        with pytest.raises(ValueError, match="kernel_size is .*odd sizes from 1 to 31"):
            ubn_zoo.UnifiedBatchNorm2d(2, kernel_size=size)
