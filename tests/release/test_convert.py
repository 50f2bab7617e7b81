"""`ubn-zoo convert`: its output loads strictly and computes what the source does; files are not overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from tests.hub_server import HubServer, sha256
from ubn_zoo import UnifiedBatchNorm2d, UnifiedBatchNormAct2d, cli

SIBLING = "mobilenetv3_small_050"
NAME = f"{SIBLING}_ubn"


@pytest.fixture(scope="module")
def sibling() -> nn.Module:
    """A BatchNorm model whose statistics are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    model = timm.create_model(SIBLING, num_classes=5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    return ["convert", NAME, "--checkpoint", str(source), "--num-classes", "5", "--output", str(output), *more]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)))


def test_file_says_what_it_is_and_where_it_comes_from(sibling: nn.Module, tmp_path: Path) -> None:
    source, output = tmp_path / "bn.safetensors", tmp_path / "ubn.safetensors"
    safetensors.torch.save_file(sibling.state_dict(), source)
    assert cli.main(arguments(source, output)) == 0
    said = metadata(output)
    assert (said["format"], said["architecture"], said["num_classes"]) == ("pt", NAME, "5")
    assert said["converted_from"] == f"bn.safetensors (SHA-256 {sha256(source.read_bytes())})"
    model = timm.create_model(NAME, num_classes=5).eval()
    model.load_state_dict(safetensors.torch.load_file(output), strict=True)
    torch.testing.assert_close(logits(model), logits(sibling), rtol=1e-4, atol=1e-4)


def test_converted_tag_names_its_repository(hub: HubServer, tmp_path: Path) -> None:
    repository, output = f"timm/{SIBLING}.lamb_in1k", tmp_path / "ubn.safetensors"
    hub.create(repository, {"model.safetensors": safetensors.torch.save(timm.create_model(SIBLING).state_dict())})
    tag = f"{NAME}.bn_lamb_in1k"
    assert cli.main(["convert", tag, "--output", str(output), "--cache-dir", str(tmp_path / "cache")]) == 0
    said = metadata(output)
    assert (said["converted_from"], said["base_model"]) == (f"{SIBLING}.lamb_in1k", repository)
    assert said["base_revision"] == hub.repositories[repository].refs["main"]


def test_authors_format(tmp_path: Path) -> None:
    """The authors' affine part is a depthwise convolution `bnconv`; their calibrations are shaped like feature maps."""
    torch.manual_seed(3)
    ours = timm.create_model(NAME, num_classes=5).eval()
    state = {}
    for key, value in ours.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        if not isinstance(ours.get_submodule(layer), (UnifiedBatchNorm2d, UnifiedBatchNormAct2d)):
            state[key] = value
        elif leaf in ("weight", "bias"):
            state[f"{layer}.bnconv.{leaf}"] = value
        elif leaf in ("center_weight", "scale_weight", "scale_bias"):
            state[key] = (value + 0.05 * torch.randn(value.shape)).view(1, -1, 1, 1)
        else:
            state[key] = value
    source, output = tmp_path / "authors.pth", tmp_path / "ubn.safetensors"
    torch.save({"state_dict": state}, source)
    assert cli.main(arguments(source, output)) == 0
    written = safetensors.torch.load_file(output)
    assert set(written) == set(ours.state_dict())
    for key, value in state.items():
        found = written[key.replace("bnconv.", "")]
        assert torch.equal(found, value.reshape(found.shape)), key


def test_existing_file_is_replaced_only_by_force(
    sibling: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "bn.safetensors", tmp_path / "ubn.safetensors"
    safetensors.torch.save_file(sibling.state_dict(), source)
    output.write_bytes(b"precious")
    assert cli.main(arguments(source, output)) == 1
    assert "--force" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    # Forced, but the conversion fails: the old file stays.
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(source.read_bytes()[:-1])
    assert cli.main(arguments(broken, output, "--force")) == 1
    assert output.read_bytes() == b"precious"
    assert cli.main(arguments(source, output, "--force")) == 0
    first = output.read_bytes()
    assert cli.main(arguments(source, output, "--force")) == 0
    assert output.read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {source.name, broken.name, output.name}


def test_other_endings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", NAME, "--output", str(tmp_path / "ubn.pth")]) == 1
    assert "valid: a name that ends in .safetensors" in capsys.readouterr().err


class Bomb:
    """An object that runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output, harm = tmp_path / "bomb.pth", tmp_path / "ubn.safetensors", tmp_path / "harm"
    torch.save({"state_dict": {"conv_stem.weight": Bomb(harm)}}, source)
    assert cli.main(arguments(source, output)) == 1
    assert "bomb.pth" in capsys.readouterr().err
    assert not harm.exists() and not output.exists()
