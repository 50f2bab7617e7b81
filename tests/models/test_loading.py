"""Every source of weights, and every kind of weights that is rejected."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import ubn_zoo.models
from tests.hub_server import HubServer
from ubn_zoo import UnifiedBatchNorm2d
from ubn_zoo.hub import fetch as client
from ubn_zoo.hub import retry
from ubn_zoo.hub.manifest import Record, bundled_path, load_manifest
from ubn_zoo.models import CheckpointError

from .common import assert_same_function, content, images, trained

NAME = "regnetx_002_ubn"
SIBLING = "regnetx_002"
X = images(1, 3, 64, 64)
REPOSITORY = Path(ubn_zoo.models.__file__).parents[2]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.1)


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return trained(SIBLING)


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    """A UBN model with no calibration at its initial value."""
    torch.manual_seed(1)
    model = timm.create_model(NAME).eval()
    for layer in model.modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            for tensor in (layer.weight, layer.center_weight, layer.scale_weight, layer.running_mean):
                tensor.data.add_(0.05 * torch.randn(tensor.shape))
            layer.feature_similarity.fill_(0.3)
    return model


@pytest.fixture
def bn_file(theirs: nn.Module, tmp_path: Path) -> Path:
    return write(theirs.state_dict(), tmp_path / "bn.safetensors")


@pytest.fixture
def ubn_file(ours: nn.Module, tmp_path: Path) -> Path:
    return write(ours.state_dict(), tmp_path / "ubn.safetensors")


def write(state: dict[str, Tensor], file: Path) -> Path:
    safetensors.torch.save_file(state, file)
    return file


def load(file: Path | str, name: str = NAME, **kwargs: Any) -> nn.Module:
    overlay = {"file": str(file), **kwargs.pop("overlay", {})}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def logits(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.inference_mode():
        return model(x)


def assert_equal_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_upstream_repository(hub: HubServer, theirs: nn.Module, tmp_path: Path) -> None:
    cfg = timm.get_pretrained_cfg(NAME)
    hub.create("timm/regnetx_002.pycls_in1k", {"model.safetensors": content(theirs), "pytorch_model.bin": b"pickle"})
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "cache").eval()
    assert_same_function(logits(model), logits(theirs))
    assert model.pretrained_cfg == cfg.to_dict()
    assert list((tmp_path / "cache").glob("models--timm--regnetx_002.pycls_in1k"))
    assert not hub.count("GET", "pytorch_model.bin")
    tagged = timm.create_model(f"{NAME}.bn_pycls_in1k", pretrained=True, cache_dir=tmp_path / "cache").eval()
    assert_equal_state(tagged, model.state_dict())


def test_repository_in_overlay_at_a_revision(
    hub: HubServer, theirs: nn.Module, ours: nn.Module, tmp_path: Path
) -> None:
    first = hub.create("someone/weights", {"model.safetensors": content(theirs)})
    hub.repositories["someone/weights"].commit({"model.safetensors": content(ours)})
    for revision, expected in ((f"@{first}", theirs), ("", ours)):
        overlay = {"hf_hub_id": f"someone/weights{revision}"}
        model = timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache"
        ).eval()
        assert_same_function(logits(model), logits(expected))


def test_configuration_of_the_sibling(hub: HubServer, theirs: nn.Module, tmp_path: Path) -> None:
    hub.create("timm/regnetx_002.pycls_in1k", {"model.safetensors": content(theirs)})
    cfg = timm.get_pretrained_cfg(f"{SIBLING}.pycls_in1k")
    for given in (cfg, cfg.to_dict()):
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg=given, cache_dir=tmp_path / "cache").eval()
        assert_same_function(logits(model), logits(theirs))
        assert model.pretrained_cfg["architecture"] == NAME


def test_repository_with_only_a_pickle_is_rejected(hub: HubServer, tmp_path: Path) -> None:
    hub.create("someone/old", {"pytorch_model.bin": b"pickle"})
    for filename in (None, "pytorch_model.bin"):
        overlay = {"hf_hub_id": "someone/old", "hf_hub_filename": filename}
        with pytest.raises(client.UnsafeFileError, match="ubn-zoo convert"):
            timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache")
    assert not hub.count("GET", "resolve.*pytorch_model.bin")


@pytest.mark.parametrize(
    ("named", "fetched"),
    [
        (None, "model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("folder/weights.bin", "folder/weights.safetensors"),
        ("other.safetensors", "other.safetensors"),
    ],
)
def test_the_safetensors_file_beside_the_one_named(
    hub: HubServer, theirs: nn.Module, tmp_path: Path, named: str | None, fetched: str
) -> None:
    hub.create("someone/weights", {fetched: content(theirs)})
    overlay = {"hf_hub_id": "someone/weights", "hf_hub_filename": named}
    model = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache"
    ).eval()
    assert_same_function(logits(model), logits(theirs))


@pytest.mark.parametrize("format", ["bn_file", "ubn_file"])
def test_file_in_overlay_and_checkpoint_path(request: pytest.FixtureRequest, format: str) -> None:
    file = request.getfixturevalue(format)
    expected = request.getfixturevalue("theirs" if format == "bn_file" else "ours")
    model = load(file)
    assert_same_function(logits(model), logits(expected))
    assert model.default_cfg["file"] == str(file)
    by_path = timm.create_model(NAME, checkpoint_path=str(file)).eval()
    assert_equal_state(by_path, model.state_dict())


@pytest.mark.parametrize("record", load_manifest().find(source="bundled"), ids=lambda record: record.id)
def test_bundled_weights(hub: HubServer, record: Record, tmp_path: Path) -> None:
    model = timm.create_model(record.id, pretrained=True).eval()
    assert not hub.requests
    stored = safetensors.torch.load_file(bundled_path(record))
    # Parameters stored in float16 are cast to float32 without loss.
    assert_equal_state(model, {key: value.to(model.state_dict()[key].dtype) for key, value in stored.items()})
    assert sum(parameter.numel() for parameter in model.parameters()) == record.params
    x = images(2, *record.input.size)
    assert logits(model, x).shape == (2, record.num_classes)
    with torch.inference_mode():
        assert tuple(model.forward_features(x).shape[-2:]) == tuple(model.default_cfg["pool_size"])
    assert logits(timm.create_model(record.id, pretrained=True, num_classes=3).eval(), x).shape == (2, 3)

    # Another file under the record's tag is not checked against the manifest's hash.
    other = write(trained(record.architecture.removesuffix("_ubn")).state_dict(), tmp_path / "other.safetensors")
    assert load(other, record.id, overlay={"num_classes": 1000}).num_classes == 1000


def test_altered_bundled_file_is_rejected(monkeypatch: pytest.MonkeyPatch, bn_file: Path) -> None:
    record = next(iter(load_manifest().find(source="bundled")))
    monkeypatch.setattr(client, "bundled_path", lambda _: bn_file)
    with pytest.raises(client.ChecksumError, match=record.sha256):
        timm.create_model(record.id, pretrained=True)


def test_state_dict_in_overlay(theirs: nn.Module) -> None:
    state = theirs.state_dict()
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": state}).eval()
    assert_same_function(logits(model), logits(theirs))
    assert not any(isinstance(value, Tensor) for value in model.pretrained_cfg.values())
    assert "state_dict" not in model.pretrained_cfg


@pytest.mark.parametrize("container", [None, "state_dict", "model", "state_dict_ema"])
def test_torch_files(theirs: nn.Module, tmp_path: Path, container: str | None) -> None:
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "checkpoint.pth.tar")
    assert_same_function(logits(load(tmp_path / "checkpoint.pth.tar")), logits(theirs))


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("ran"),)


def test_code_in_a_torch_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"stem.conv.weight": Malicious()}}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load(tmp_path / "bad.pth")
    assert not Path("ran").exists()


def to_authors_format(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, UnifiedBatchNorm2d):
            for key in ("weight", "bias"):
                state[f"{name}.bnconv.{key}"] = state.pop(f"{name}.{key}")
            for key in ("center_weight", "scale_weight", "scale_bias"):
                state[f"{name}.{key}"] = state[f"{name}.{key}"].reshape(1, -1, 1, 1)
            del state[f"{name}.feature_similarity"]
    return state


def test_authors_format(ours: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": to_authors_format(ours)}, tmp_path / "authors.pth")
    model = load(tmp_path / "authors.pth")
    torch.testing.assert_close(logits(model), logits(ours), rtol=0, atol=0)
    by_path = timm.create_model(NAME, checkpoint_path=str(tmp_path / "authors.pth")).eval()
    torch.testing.assert_close(logits(by_path), logits(ours), rtol=0, atol=0)


def test_torchvision_names_of_regnet(theirs: nn.Module, tmp_path: Path) -> None:
    """timm's renaming of foreign BatchNorm checkpoints runs before the conversion."""
    renames = {
        "stem.conv.": "stem.0.",
        "stem.bn.": "stem.1.",
        ".conv1.conv.": ".f.a.0.",
        ".conv1.bn.": ".f.a.1.",
        ".conv2.conv.": ".f.b.0.",
        ".conv2.bn.": ".f.b.1.",
        ".conv3.conv.": ".f.c.0.",
        ".conv3.bn.": ".f.c.1.",
        ".downsample.conv.": ".proj.0.",
        ".downsample.bn.": ".proj.1.",
        "head.fc.": "fc.",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        for ours, foreign in renames.items():
            key = key.replace(ours, foreign)
        if key.startswith("s"):
            stage, _, rest = key.partition(".")
            if stage != "stem":
                block, _, rest = rest.partition(".")
                key = f"trunk_output.block{stage[1:]}.block{stage[1:]}-{int(block[1:]) - 1}.{rest}"
        state[key] = value
    model = load(write(state, tmp_path / "torchvision.safetensors"))
    assert_same_function(logits(model), logits(theirs))


@pytest.mark.parametrize("scheme", ["local-dir", "hf-hub"])
def test_saved_model_reloads_in_a_new_process(hub: HubServer, ours: nn.Module, tmp_path: Path, scheme: str) -> None:
    settings = {"threshold": None, "kernel_size": 3}
    model = timm.create_model(NAME, num_classes=7, in_chans=1, ubn_kwargs=settings).eval()
    x = images(1, 1, 64, 64)
    folder = tmp_path / "saved"
    save_for_hf(model, str(folder), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == NAME
    assert config["model_args"]["ubn_kwargs"] == settings
    assert (config["num_classes"], config["pretrained_cfg"]["input_size"][0]) == (7, 1)
    source = f"local-dir:{folder}"
    if scheme == "hf-hub":
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        source = f"hf-hub:someone/model@{hub.create('someone/model', files)}"
    torch.save((x, logits(model, x)), tmp_path / "expected.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import timm, torch, ubn_zoo.models\n"
        f"model = timm.create_model({source!r}, pretrained=True, cache_dir='cache').eval()\n"
        "x, expected = torch.load('expected.pt')\n"
        "with torch.inference_mode(): torch.testing.assert_close(model(x), expected, rtol=0, atol=0)\n"
        "layers = [m for m in model.modules() if isinstance(m, ubn_zoo.UnifiedBatchNorm2d)]\n"
        "assert layers and all(layer.threshold is None for layer in layers)\n"
        f"adapted = timm.create_model({source!r}, pretrained=True, cache_dir='cache', num_classes=3, in_chans=3)\n"
        "assert adapted(torch.zeros(2, 3, 64, 64)).shape == (2, 3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_folder_of_a_sibling(theirs: nn.Module, tmp_path: Path) -> None:
    """A BatchNorm model's folder under the twin's name."""
    save_for_hf(theirs, str(tmp_path / "bn"), safe_serialization=True)
    config = json.loads((tmp_path / "bn" / "config.json").read_text())
    config["architecture"] = NAME
    (tmp_path / "bn" / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{tmp_path / 'bn'}", pretrained=True).eval()
    assert_same_function(logits(model), logits(theirs))


def make_folder(folder: Path, *names: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": NAME, "num_classes": 1000, "pretrained_cfg": {}}))
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_folder_prefers_safetensors(theirs: nn.Module, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "pytorch_model.bin", "other.safetensors")
    (folder / "model.safetensors").write_bytes(content(theirs))
    config = {"architecture": NAME, "pretrained_cfg": {"num_classes": 1000, "classifier": "head.fc"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same_function(logits(model), logits(theirs))


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "holds no weights"), (("a.safetensors", "b.safetensors"), r"a\.safetensors, b\.safetensors")],
)
def test_folder_without_the_file(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    folder = make_folder(tmp_path / "folder", *names)
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_other_number_of_classes(bn_file: Path, theirs: nn.Module) -> None:
    model = load(bn_file, num_classes=7)
    assert logits(model).shape == (1, 7)
    with torch.inference_mode():
        assert_same_function(model.forward_features(X), theirs.forward_features(X))
    headless = load(bn_file, num_classes=0)
    with torch.inference_mode():
        assert_same_function(headless(X), theirs.forward_head(theirs.forward_features(X), pre_logits=True))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_number_of_channels(bn_file: Path, in_chans: int) -> None:
    overlay = {"file": str(bn_file)}
    reference = timm.create_model(SIBLING, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans).eval()
    x = images(1, in_chans, 64, 64)
    assert_same_function(logits(load(bn_file, in_chans=in_chans), x), logits(reference, x))


def test_label_offset(theirs: nn.Module, tmp_path: Path) -> None:
    state = theirs.state_dict()
    for key in ("head.fc.weight", "head.fc.bias"):
        state[key] = torch.cat([torch.zeros_like(state[key][:1]), state[key]])
    file = write(state, tmp_path / "offset.safetensors")
    assert_same_function(logits(load(file, overlay={"label_offset": 1})), logits(theirs))
    with pytest.raises(
        CheckpointError, match=r"head\.fc\.weight: the file has \(1001, 368\), the model has \(1000, 368\)"
    ):
        load(file)


def test_weights_for_other_classes_must_be_declared(tmp_path: Path) -> None:
    """A fine-tuned head is not silently discarded, as it would be with the default configuration's 1000 classes."""
    tuned = trained(SIBLING, num_classes=10)
    file = write(tuned.state_dict(), tmp_path / "tuned.safetensors")
    with pytest.raises(CheckpointError, match=r"10 classes.*pretrained_cfg_overlay=dict\(num_classes=10\)"):
        load(file, num_classes=10)
    assert_same_function(logits(load(file, overlay={"num_classes": 10})), logits(tuned))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "resnet50_clip_gap"])
def test_features_with_weights(name: str, tmp_path: Path) -> None:
    theirs = trained(name)
    file = write(theirs.state_dict(), tmp_path / "bn.safetensors")
    model = load(file, f"{name}_ubn", features_only=True)
    x = images(1, *timm.get_pretrained_cfg(name).input_size) if "clip" in name else X
    reference = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, features_only=True)
    with torch.inference_mode():
        for actual, expected in zip(model(x), reference.eval()(x), strict=True):
            assert_same_function(actual, expected)


def test_half_precision_checkpoint(theirs: nn.Module, tmp_path: Path) -> None:
    """A checkpoint entirely in half precision is accepted, because casting up is lossless; mixed dtypes are
    rejected."""
    half = {key: value.half() if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    model = load(write(half, tmp_path / "half.safetensors"))
    reference = timm.create_model(SIBLING).eval()
    reference.load_state_dict(half)
    assert model.stem.conv.weight.dtype == torch.float32
    assert_same_function(logits(model), logits(reference))


def test_model_in_half_precision(bn_file: Path) -> None:
    model = load(bn_file, dtype=torch.bfloat16)
    assert model.stem.conv.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(model, X.bfloat16())).all()


def without(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.pop(key)


def with_value(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.update({key: change(state[key])})


def spoil(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


F16, F32, F64, I64 = (rf"torch\.{name}" for name in ("float16", "float32", "float64", "int64"))
SPOILED = r"1 with NaN or infinite values: "
DAMAGES = {
    "missing": (
        without("s1.b1.conv1.conv.weight"),
        r"1 missing: s1\.b1\.conv1\.conv\.weight, the model has \(24, 32, 1, 1\)",
    ),
    "missing statistics": (without("stem.bn.running_var"), r"stem\.bn\.running_var, the model has \(32,\)"),
    "unexpected": (
        lambda state: state.update({"s9.weight": torch.zeros(2, 3)}),
        r"1 unexpected: s9\.weight, the file has \(2, 3\)",
    ),
    "shape": (
        with_value("stem.conv.weight", lambda tensor: tensor[:, :2].clone()),
        r"stem\.conv\.weight: the file has \(32, 2, 3, 3\), the model has \(32, 3, 3, 3\)",
    ),
    "norm's shape": (
        with_value("stem.bn.running_mean", lambda tensor: tensor[:5].clone()),
        r"stem\.bn\.running_mean: the file has \(5,\), the model has \(32,\)",
    ),
    "half": (
        with_value("stem.conv.weight", Tensor.half),
        rf"stem\.conv\.weight: the file has {F16}, the model has {F32}",
    ),
    "double": (
        with_value("stem.conv.weight", Tensor.double),
        rf"stem\.conv\.weight: the file has {F64}, the model has {F32}",
    ),
    "integer": (with_value("head.fc.bias", Tensor.long), rf"head\.fc\.bias: the file has {I64}, the model has {F32}"),
    "fractional count": (
        with_value("stem.bn.num_batches_tracked", lambda count: count.float() + 0.5),
        rf"num_batches_tracked: the file has {F32}, the model has {I64}",
    ),
    "nan": (with_value("stem.bn.bias", spoil(math.nan)), rf"{SPOILED}stem\.bn\.bias"),
    "infinity": (with_value("head.fc.weight", spoil(math.inf)), rf"{SPOILED}head\.fc\.weight"),
}


@pytest.mark.parametrize("format", ["theirs", "ours"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(request: pytest.FixtureRequest, tmp_path: Path, format: str, damage: str) -> None:
    change, message = DAMAGES[damage]
    state = dict(request.getfixturevalue(format).state_dict())
    change(state)
    file = write(state, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)
    with pytest.raises(CheckpointError, match=message) as caught:
        timm.create_model(NAME, checkpoint_path=str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "half", "nan"])
def test_failed_loading_leaves_the_model_unchanged(theirs: nn.Module, damage: str) -> None:
    change, message = DAMAGES[damage]
    state = dict(theirs.state_dict())
    change(state)
    model = timm.create_model(NAME)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(state)
    assert_equal_state(model, before)


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("regnetx_004", "s1.b1.conv1.conv.weight"),
        ("regnety_002", "se.fc1"),
        ("resnet18", "layer1"),
        ("mobilenetv2_035", "blocks"),
    ],
)
def test_weights_of_another_architecture(architecture: str, key: str, tmp_path: Path) -> None:
    file = write(trained(architecture).state_dict(), tmp_path / f"{architecture}.safetensors")
    for arguments in ({}, {"num_classes": 10}, {"features_only": True}, {"in_chans": 1}):
        with pytest.raises(CheckpointError, match=rf"{architecture}\.safetensors does not fit {NAME}") as caught:
            load(file, **arguments)
        assert key in str(caught.value)


def test_features_of_another_architecture(tmp_path: Path) -> None:
    """A MobileNet feature extractor has no head and ignores the file's head, but needs all other keys."""
    file = write(trained("mobilenetv3_small_075").state_dict(), tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=r"wrong\.safetensors does not fit"):
        load(file, "mobilenetv3_small_050_ubn", features_only=True)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_file(theirs: nn.Module, tmp_path: Path, length: int, suffix: str) -> None:
    file = tmp_path / f"truncated{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), file)
    else:
        write(theirs.state_dict(), file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"truncated\{suffix}"):
        load(file)


def test_keys_that_occur_twice(tmp_path: Path) -> None:
    entry = '"stem.conv.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    file = tmp_path / "twice.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"twice\.safetensors.*stem\.conv\.weight"):
        load(file)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"file": "/nowhere/at/all.safetensors"}, "there is no such file"),
        ({"file": __file__}, r"ending in '\.py'; valid endings are \.safetensors"),
        ({"hf_hub_id": None, "url": "https://example.org/x.pth"}, "download the file"),
        ({"hf_hub_id": None}, f"no weights for {NAME}.*with weights: {NAME}.bn_pycls_in1k"),
    ],
)
def test_no_weights(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def test_architecture_without_weights() -> None:
    with pytest.raises(
        CheckpointError, match="no weights for resnet50t_ubn.bn_untrained; no tag of this architecture has any"
    ):
        timm.create_model("resnet50t_ubn", pretrained=True)


def test_not_a_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth"):
        load(tmp_path / "list.pth")
    torch.save({"state_dict": {"stem.conv.weight": 1.0}}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match=r"numbers\.pth"):
        load(tmp_path / "numbers.pth")
