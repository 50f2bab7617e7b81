"""Loading models from the Hub through timm: the right model is loaded despite network faults."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import ubn_zoo
from tests.hub_server import HubServer, sha256
from ubn_zoo import cli
from ubn_zoo.hub import fetch as client
from ubn_zoo.hub import manifest, retry
from ubn_zoo.hub.manifest import InputSpec, Manifest, Origin, Record
from ubn_zoo.models import catalog as catalog
from ubn_zoo.release import verify

SIBLING = "mobilenetv3_small_050"
NAME = f"{SIBLING}_ubn"
REPO = f"timm/{SIBLING}.lamb_in1k"
OWN = "someone/ubn"
FILE = "model.safetensors"
BODY = "/lfs/"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0.3")


def with_random_statistics(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def sibling() -> nn.Module:
    torch.manual_seed(0)
    return with_random_statistics(timm.create_model(SIBLING))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def upstream(hub: HubServer, sibling: nn.Module) -> bytes:
    """Upstream repository with the sibling's weights, and a pickle that must never be requested."""
    content = safetensors.torch.save(sibling.state_dict())
    hub.create(REPO, {FILE: content, "pytorch_model.bin": b"never", "config.json": b"{}"})
    return content


@pytest.fixture(autouse=True)
def no_pickle(hub: HubServer) -> Iterator[None]:
    yield
    assert hub.count("HEAD", r"\.bin|\.pth?$") == hub.count("GET", r"\.bin|\.pth?$") == 0


def load(cache: Path, name: str = NAME, **settings: object) -> nn.Module:
    return timm.create_model(name, pretrained=True, cache_dir=cache, **settings).eval()


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def assert_same(model: nn.Module, reference: nn.Module, images: Tensor) -> None:
    torch.testing.assert_close(logits(model, images), logits(reference, images), rtol=1e-4, atol=1e-4)


def test_sibling_weights_compute_the_same_function(
    hub: HubServer, upstream: bytes, sibling: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    assert_same(load(tmp_path), sibling, images)
    assert_same(load(tmp_path, f"{NAME}.bn_lamb_in1k"), sibling, images)
    assert hub.count("GET", BODY) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "HEAD", "path": "resolve", "status": 503},
        {"method": "HEAD", "path": "resolve", "drop": True},
        {"path": BODY, "status": 500},
        {"path": BODY, "reset": 100_000},
        {"path": BODY, "short": 1},
        {"path": BODY, "corrupt": 3_000_000},
    ],
    ids=["HEAD 503", "HEAD dropped", "GET 500", "reset", "short", "altered"],
)
def test_transient_faults_are_retried(
    hub: HubServer, upstream: bytes, sibling: nn.Module, images: Tensor, tmp_path: Path, fault: dict[str, object]
) -> None:
    hub.fail(**fault)
    assert_same(load(tmp_path), sibling, images)


def test_altered_weights_are_never_loaded(hub: HubServer, upstream: bytes, tmp_path: Path) -> None:
    hub.fail(path=BODY, corrupt=3_000_000, times=None)
    with pytest.raises(client.ChecksumError, match=sha256(upstream)):
        load(tmp_path)


def test_warm_cache_serves_while_the_hub_is_down(
    hub: HubServer, upstream: bytes, sibling: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    load(tmp_path)
    hub.fail(method="HEAD", status=503, times=None)
    hub.fail(method="GET", status=503, times=None)
    assert_same(load(tmp_path), sibling, images)


@pytest.mark.parametrize("status", [403, 500])
def test_rejected_safetensors_do_not_fall_back_to_the_pickle(
    hub: HubServer, upstream: bytes, tmp_path: Path, status: int
) -> None:
    hub.fail(method="HEAD", path=r"\.safetensors", status=status, times=None)
    with pytest.raises(client.HubError):
        load(tmp_path)


def test_repository_with_only_a_pickle_is_rejected_with_a_fix(hub: HubServer, tmp_path: Path) -> None:
    hub.create(REPO, {"pytorch_model.bin": b"never", "config.json": b"{}"})
    with pytest.raises(client.UnsafeFileError, match="ubn-zoo convert"):
        load(tmp_path)


@pytest.fixture(scope="module")
def twin(sibling: nn.Module) -> nn.Module:
    """A UBN model whose calibrations differ from those of converted BatchNorm weights."""
    model = ubn_zoo.convert_batchnorm(timm.create_model(SIBLING, num_classes=7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("center_weight", "scale_weight")):
                parameter.fill_(0.05)
    return with_random_statistics(model)


@pytest.fixture
def own(hub: HubServer, twin: nn.Module) -> str:
    """A repository with a UBN model in timm's format."""
    config = {
        "architecture": NAME,
        "num_classes": 7,
        "pretrained_cfg": {"num_classes": 7, "input_size": [3, 64, 64], "classifier": "classifier"},
    }
    content = safetensors.torch.save(twin.state_dict())
    return hub.create(OWN, {FILE: content, "config.json": json.dumps(config).encode()})


@pytest.mark.parametrize("pinned", [True, False])
def test_hub_names_load(
    hub: HubServer, own: str, twin: nn.Module, images: Tensor, tmp_path: Path, pinned: bool
) -> None:
    assert_same(load(tmp_path, f"hf-hub:{OWN}@{own}" if pinned else f"hf-hub:{OWN}"), twin, images)


CONFIG_FAULTS: dict[str, dict[str, object]] = {
    "dropped once": {"drop": True},
    "503 once": {"status": 503},
    "dropped": {"drop": True, "times": None},
    "503": {"status": 503, "times": None},
    "login page": {"status": 200, "times": None},
    "login page not found": {"status": 404, "times": None},
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS.values(), ids=CONFIG_FAULTS.keys())
def test_reading_the_configuration_is_retried_like_weights(
    hub: HubServer, own: str, twin: nn.Module, images: Tensor, tmp_path: Path, fault: dict[str, object]
) -> None:
    if fault.get("times", 1) is None:
        load(tmp_path, f"hf-hub:{OWN}")
    hub.fail(method="HEAD", path="config" if "times" not in fault else "", **fault)
    assert_same(load(tmp_path, f"hf-hub:{OWN}"), twin, images)


def test_altered_hub_model_is_rejected(hub: HubServer, own: str, tmp_path: Path) -> None:
    hub.fail(path=BODY, corrupt=3_000_000, times=None)
    with pytest.raises(client.ChecksumError):
        load(tmp_path, f"hf-hub:{OWN}")


def record_of(hub: HubServer, revision: str) -> Record:
    content = hub.repositories[OWN].commits[revision][FILE]
    return Record(
        id=f"{NAME}.seven",
        architecture=NAME,
        tag="seven",
        source="hub",
        repo_id=OWN,
        revision=revision,
        file=FILE,
        sha256=sha256(content),
        bytes=len(content),
        params=len(content) // 8,
        input=InputSpec(
            size=(3, 64, 64),
            mean=(0.5,) * 3,
            std=(0.2,) * 3,
            interpolation="bicubic",
            crop_pct=1.0,
            crop_mode="center",
        ),
        num_classes=7,
        label_names=None,
        license="apache-2.0",
        origin=Origin(data="none", trained="random"),
        recipe=None,
        metrics=(),
        description="A model for tests.",
    )


def test_records_are_fetched_as_recorded(hub: HubServer, own: str, tmp_path: Path) -> None:
    record = record_of(hub, own)
    hub.repositories[OWN].commit({FILE: b"something newer"})
    assert sha256(client.fetch_record(record, cache_dir=tmp_path).read_bytes()) == record.sha256
    with pytest.raises(client.ChecksumError, match="bytes"):
        client.fetch_record(dataclasses.replace(record, bytes=record.bytes + 1), cache_dir=tmp_path / "other")
    with pytest.raises(client.ChecksumError, match="0" * 64):
        client.fetch_record(dataclasses.replace(record, sha256="0" * 64), cache_dir=tmp_path)


def test_recorded_model_loads_by_name_in_a_fresh_process(
    hub: HubServer, own: str, twin: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """If the manifest has the record, the timm name loads the pinned and checked file."""
    book = tmp_path / "weights_manifest.json"
    manifest.dump_manifest(Manifest((record_of(hub, own),)), book)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import pathlib, sys, types\n"
        f"package = types.ModuleType('ubn_zoo'); package.__path__ = [{str(Path(ubn_zoo.__file__).parent)!r}]\n"
        "sys.modules['ubn_zoo'] = package\n"
        "from ubn_zoo.hub import manifest\n"
        f"manifest.PACKAGED_MANIFEST = pathlib.Path({str(book)!r})\n"
        "from ubn_zoo import models\n"
        "import timm, torch\n"
        f"model = timm.create_model('{NAME}.seven', pretrained=True, cache_dir={str(tmp_path / 'cache')!r}).eval()\n"
        f"images = torch.load({str(tmp_path / 'images.pt')!r})\n"
        f"torch.save(model(images).detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    for offline in ("0", "1"):
        environment = {**os.environ, "HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(twin, images), rtol=1e-4, atol=1e-4)
        (tmp_path / "logits.pt").unlink()
    assert hub.count("GET", BODY) == 1


def test_corrupt_files_are_never_loaded(hub: HubServer, own: str, twin: nn.Module, tmp_path: Path) -> None:
    """Flip a bit in the header or the weights: most such files would load with wrong weights."""
    content = bytearray(hub.repositories[OWN].commits[own][FILE])
    header = int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(3)
    positions = [0, 7, 8, 20, header, header + 8, len(content) - 1]
    positions += torch.randint(len(content), (40,), generator=generator).tolist()
    for position in positions:
        spoiled = bytes(content[:position]) + bytes([content[position] ^ 0x10]) + bytes(content[position + 1 :])
        revision = hub.repositories[OWN].commit({FILE: spoiled})
        record = dataclasses.replace(record_of(hub, revision), sha256=sha256(bytes(content)))
        with pytest.raises(client.ChecksumError):
            client.fetch_record(record, cache_dir=tmp_path)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_download_prints_checked_paths(
    hub: HubServer, upstream: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "download", NAME, f"{NAME}.bn_lamb_in1k", "--cache-dir", str(tmp_path))
    first, second = out.splitlines()
    assert (code, err, first) == (0, "", second)
    assert Path(first).read_bytes() == upstream and Path(first).is_relative_to(tmp_path)
    assert hub.count("GET", BODY) == 1


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ((NAME, "mobilenetv3_smal_050_ubn"), NAME),
        (("mobilenet_edgetpu_100_ubn",), "has no weights"),
    ],
)
def test_download_of_missing_weights_fails(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], hint: str
) -> None:
    code, out, err = command(capsys, "download", *names, "--cache-dir", str(tmp_path))
    assert (code, out) == (1, "")
    assert hint in err and err.count("\n") == 1
    assert hub.requests == []


def test_verify_checks_local_checkpoints(
    hub: HubServer, upstream: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = [record.id for record in manifest.load_manifest().find(source="bundled")]
    command(capsys, "download", NAME, "--cache-dir", str(tmp_path))
    code, out, _ = command(capsys, "verify", "--cache-dir", str(tmp_path))
    *rows, total = out.splitlines()
    assert (code, total) == (0, f"{1 + len(bundled)} checked, 0 failed")
    assert sorted(row.split()[0] for row in rows) == sorted([f"{NAME}.bn_lamb_in1k", *bundled])
    assert {row.split()[-1] for row in rows} == {"ok"}


@pytest.mark.parametrize("spoiled", ["altered", "NaN", "another model", "too many keys", "Hub down"])
def test_verify_fails_with_a_reason(
    hub: HubServer,
    sibling: nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoiled: str,
) -> None:
    weights = dict(sibling.state_dict())
    match spoiled:
        case "NaN":
            weights["conv_stem.weight"] = torch.full_like(weights["conv_stem.weight"], float("nan"))
        case "another model":
            weights = timm.create_model("resnet18").state_dict()
        case "too many keys":
            weights["surplus"] = torch.zeros(3)
        case "altered":
            hub.fail(path=BODY, corrupt=3_000_000, times=None)
        case "Hub down":
            hub.fail(method="HEAD", status=503, times=None)
    hub.create(REPO, {FILE: safetensors.torch.save(weights)})
    code, out, _ = command(capsys, "verify", NAME, "--cache-dir", str(tmp_path))
    row, total = out.splitlines()
    assert (code, total) == (1, "1 checked, 1 failed")
    reasons = {
        "NaN": "conv_stem.weight",
        "another model": "conv_stem.weight",
        "too many keys": "surplus",
        "altered": "expected SHA-256",
        "Hub down": "HTTP 503",
    }
    assert "FAILED" in row and reasons[spoiled] in row


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"params": 1_000_000}, "1000000 parameters expected, the model has"),
        ({"bytes": 5_000_000}, "expected 5000000 bytes"),
        ({"sha256": "0" * 64}, "expected SHA-256"),
        ({"num_classes": 10}, "expected 10 finite outputs"),
        ({"input": {"size": (1, 64, 64), "mean": (0.5,), "std": (0.2,)}}, "to have 3 channels"),
    ],
    ids=["right", "params", "bytes", "sha256", "num_classes", "input"],
)
def test_verify_compares_with_the_record(
    hub: HubServer,
    upstream: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    reason: str | None,
) -> None:
    entry = catalog.describe(NAME)
    record = Record(
        id=entry.name,
        architecture=NAME,
        tag=entry.tag,
        source="hub",
        repo_id=REPO,
        revision=hub.repositories[REPO].refs["main"],
        file=FILE,
        sha256=sha256(upstream),
        bytes=len(upstream),
        params=entry.params,
        input=entry.input,
        num_classes=1000,
        label_names=None,
        license="apache-2.0",
        origin=Origin(data="none", trained="random"),
        recipe=None,
        metrics=(),
        description="A model for tests.",
    )
    if "input" in change:
        change = {"input": dataclasses.replace(record.input, **change["input"])}
    book = Manifest((dataclasses.replace(record, **change),))
    for module in (catalog, verify):
        monkeypatch.setattr(module, "load_manifest", lambda: book)
    (found,) = verify.verify([catalog.describe(NAME)], tmp_path)
    assert (found.problem is None) == (reason is None)
    assert reason is None or reason in str(found.problem)


def batchnorm(sibling: nn.Module, path: Path) -> Path:
    safetensors.torch.save_file(sibling.state_dict(), path)
    return path


def pickled(sibling: nn.Module, path: Path) -> Path:
    path = path.with_suffix(".pth")
    torch.save({"state_dict": sibling.state_dict()}, path)
    return path


@pytest.mark.parametrize("form", [batchnorm, pickled])
def test_convert_a_file(
    sibling: nn.Module,
    images: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: Callable[[nn.Module, Path], Path],
) -> None:
    source, output = form(sibling, tmp_path / "bn.safetensors"), tmp_path / "ubn.safetensors"
    arguments = ("convert", NAME, "--checkpoint", str(source), "--output", str(output))
    assert command(capsys, *arguments) == (0, f"{output}\n", "")
    model = timm.create_model(NAME)
    model.load_state_dict(safetensors.torch.load_file(output), strict=True)
    assert_same(model.eval(), sibling, images)
    assert {name for name, _ in model.named_parameters()} <= set(safetensors.torch.load_file(output))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, output.name])
    code, _, err = command(capsys, *arguments)
    assert code == 1 and "already exists" in err


def test_convert_a_tag_writes_into_the_current_folder(
    hub: HubServer,
    upstream: bytes,
    sibling: nn.Module,
    images: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, "convert", NAME, "--cache-dir", str(tmp_path / "cache"))
    assert (code, out) == (0, f"{NAME}.bn_lamb_in1k.safetensors\n")
    model = timm.create_model(NAME)
    model.load_state_dict(safetensors.torch.load_file(out.strip()), strict=True)
    assert_same(model.eval(), sibling, images)


def test_convert_of_other_classes_needs_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = batchnorm(timm.create_model(SIBLING, num_classes=5), tmp_path / "five.safetensors")
    output = tmp_path / "ubn.safetensors"
    arguments = ("convert", NAME, "--checkpoint", str(source), "--output", str(output))
    code, _, err = command(capsys, *arguments)
    assert code == 1 and "classifier.weight" in err and not output.exists()
    assert command(capsys, *arguments, "--num-classes", "5")[0] == 0
    assert safetensors.torch.load_file(output)["classifier.weight"].shape[0] == 5


@pytest.mark.parametrize("output", ["model.bin", "nowhere/model.safetensors"])
def test_convert_to_an_invalid_path_fails(
    sibling: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    source = batchnorm(sibling, tmp_path / "bn.safetensors")
    arguments = ("convert", NAME, "--checkpoint", str(source), "--output", str(tmp_path / output))
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (1, "") and err.startswith("ubn-zoo: ") and err.count("\n") == 1
