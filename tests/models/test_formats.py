"""Checkpoints in common containers of training loops, and invalid files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import reparameterize_model

import ubn_zoo
from ubn_zoo.errors import CheckpointError, InvalidArgumentError

from .common import assert_same_function, images, trained


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("container", ["state_dict", "state_dict_ema", None])
def test_checkpoints_of_timms_training_script(prefix: str, container: str | None, tmp_path: Path) -> None:
    theirs = trained("resnet10t")
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "arch": "resnet10t", container: state} if container else state, tmp_path / "last.pth.tar")
    ours = timm.create_model("resnet10t_ubn", checkpoint_path=str(tmp_path / "last.pth.tar")).eval()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert_same_function(ours(x), theirs(x))


def test_a_head_of_any_size_is_replaced_on_request(tmp_path: Path) -> None:
    """As requested by timm's train.py --pretrained-path --input-key ... with num_classes=-1."""
    save_file(trained("resnet10t", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    overlay = {"file": str(tmp_path / "seven.safetensors"), "num_classes": -1}
    model = timm.create_model("resnet10t_ubn", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert model(images(2, 3, 64, 64)).shape == (2, 3)


def test_integer_counters_stored_as_floats_are_accepted(tmp_path: Path) -> None:
    state = trained("resnet10t").state_dict()
    counters = {key: value.float() for key, value in state.items() if key.endswith("num_batches_tracked")}
    save_file({**state, **counters}, tmp_path / "averaged.safetensors")
    model = timm.create_model("resnet10t_ubn", checkpoint_path=str(tmp_path / "averaged.safetensors"))
    assert model.bn1.num_batches_tracked.dtype == torch.long
    counters["bn1.num_batches_tracked"] += 0.5
    save_file({**state, **counters}, tmp_path / "averaged.safetensors")
    with pytest.raises(CheckpointError, match="bn1.num_batches_tracked"):
        timm.create_model("resnet10t_ubn", checkpoint_path=str(tmp_path / "averaged.safetensors"))


def test_negative_variances_are_rejected(tmp_path: Path) -> None:
    state = trained("resnet10t").state_dict()
    state["layer2.0.bn1.running_var"][3] = -0.5
    save_file(state, tmp_path / "spoiled.safetensors")
    with pytest.raises(CheckpointError, match=r"1 with negative variances: layer2\.0\.bn1\.running_var.*-0\.5"):
        timm.create_model("resnet10t_ubn", checkpoint_path=str(tmp_path / "spoiled.safetensors"))


@pytest.mark.parametrize("entry", ["weight", "bias", "running_mean", "running_var"])
def test_keys_missing_from_a_batchnorm_file_are_named_in_its_format(entry: str, tmp_path: Path) -> None:
    state = trained("resnet10t").state_dict()
    del state[f"layer1.0.bn1.{entry}"]
    save_file(state, tmp_path / "lacking.safetensors")
    with pytest.raises(CheckpointError) as error:
        timm.create_model("resnet10t_ubn", checkpoint_path=str(tmp_path / "lacking.safetensors"))
    assert f"1 missing: layer1.0.bn1.{entry}," in str(error.value)
    assert "lacking.safetensors" in str(error.value)


def test_each_layer_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    convert = importlib.import_module("ubn_zoo.layers.convert")
    weights = importlib.import_module("ubn_zoo.models.weights")
    calls: dict[str, int] = {"conversions": 0, "checks": 0}

    def counted(name: str, function: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(weights, "convert_state_dict", counted("conversions", convert.convert_state_dict))
    monkeypatch.setattr(weights, "check_state_dict", counted("checks", weights.check_state_dict))
    save_file(trained("resnet18").state_dict(), tmp_path / "bn.safetensors")
    overlay = {"file": str(tmp_path / "bn.safetensors")}
    timm.create_model("resnet18_ubn", pretrained=True, pretrained_cfg_overlay=overlay)
    assert calls == {"conversions": 1, "checks": 1}


MERGED = ["repvgg_a0", "mobileone_s0", "fastvit_t8"]


@pytest.mark.parametrize("name", MERGED)
def test_reparameterized_twins_compute_what_their_siblings_do(name: str) -> None:
    theirs = trained(name)
    ours = timm.create_model(f"{name}_ubn").eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, *timm.get_pretrained_cfg(name).input_size[1:]) if name.startswith("fast") else images(2, 3, 64, 64)
    with torch.inference_mode():
        assert_same_function(reparameterize_model(ours)(x), theirs(x))
        assert_same_function(ours(x), theirs(x))


def test_trained_layers_cannot_be_merged() -> None:
    model = timm.create_model("repvgg_a0_ubn").eval()
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, ubn_zoo.UnifiedBatchNorm2d)).center_weight.add_(0.1)
    block = next(m for m in model.modules() if hasattr(m, "reparameterize"))
    with torch.no_grad():
        block.conv_kxk.bn.center_weight.add_(0.1)
    with pytest.raises(InvalidArgumentError, match=r"center_weight is not zero.*ubn_zoo\.fuse"):
        reparameterize_model(model)
