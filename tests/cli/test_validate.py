"""`ubn-zoo validate`, from its command line to its results file."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from timm.models._hub import save_config_for_hf

from tests.images import write_image, write_image_folder
from ubn_zoo import cli

MODEL = "resnet10t_ubn"
IMAGES = 13


def validate(arguments: list[str]) -> int:
    return cli.main(["validate", *arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("data"), 2, IMAGES)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's weights and configuration, with class names in unsorted order."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    model = timm.create_model(MODEL, num_classes=2, ubn_kwargs={"threshold": None, "depthwise_affine": False})
    save_config_for_hf(
        model,
        str(folder / "config.json"),
        model_config={"label_names": ["vertical", "horizontal"]},
        data_config={
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
        },
    )
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    averaged = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    safetensors.torch.save_file(averaged, folder / "model_ema.safetensors")
    return folder


def options(data: Path, **more: Any) -> list[str]:
    chosen: dict[str, Any] = {"data-dir": data, "workers": 0, "device": "cpu", "batch-size": 5, **more}
    return [text for key, value in chosen.items() for text in (f"--{key}", *([] if value is True else [str(value)]))]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def logits_of(run_folder: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits from timm alone, one image at a time."""
    model = timm.create_model(f"local-dir:{run_folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, labels = [], []
    for label, name in enumerate(("vertical", "horizontal")):
        for path in sorted((data / "test" / name).iterdir()):
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
            labels.append(label)
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(labels)


@pytest.mark.parametrize("dataset", ["folder", "memory"])
def test_a_run_is_evaluated_with_its_configuration(
    dataset: str, data: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "results.csv"
    assert validate(options(data, run=run_folder, results=table, dataset=dataset)) == 0
    logits, labels = logits_of(run_folder, data)
    (row,) = rows(table)
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert float(row["top1"]) == pytest.approx(top1, abs=1e-4)
    assert float(row["top1_err"]) == pytest.approx(100 - top1, abs=1e-4)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
    assert (row["model"], row["img_size"], row["images"], row["top5"]) == (MODEL, "32", str(IMAGES), "")
    assert (row["hardware"], row["torch"], row["amp"]) == ("cpu", torch.__version__, "")
    assert len(row["weights_sha256"]) == len(row["data_sha256"]) == 64
    printed = capsys.readouterr().out
    assert printed.startswith(f"{MODEL}: top-1 {top1:.2f} %, loss {loss:.4f}, calibration error ")
    assert printed.endswith(f"{IMAGES} images\n")


def test_results_of_several_models_are_added(data: Path, run_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(2)
    safetensors.torch.save_file(timm.create_model("resnet10t", num_classes=2).state_dict(), weights)
    changes: list[dict[str, Any]] = [
        {"run": run_folder, "ema": True},
        {
            "model": "resnet10t",
            "checkpoint": weights,
            "allow-class-mismatch": True,
            "img-size": 40,
            "crop-pct": 0.8,
            "amp": "bfloat16",
        },
        {"run": run_folder, "samples": 4, "split": "train"},
    ]
    for change in changes:
        assert validate(options(data, results=table, **change)) == 0
    averaged, other, few = rows(table)
    # All weights are zero, so all classes are equally probable.
    assert float(averaged["loss"]) == pytest.approx(float(numpy.log(2)), abs=1e-6)
    assert (other["model"], other["img_size"], other["crop_pct"], other["amp"]) == (
        "resnet10t",
        "40",
        "0.8",
        "bfloat16",
    )
    assert few["images"] == "2"
    assert len({row["weights_sha256"] for row in rows(table)}) == 3


def test_the_command_reports_errors(
    data: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.csv").write_text("a,b\n", encoding="utf-8")
    write_image(tmp_path / "test" / "cat" / "1.png", numpy.zeros((8, 8, 3), numpy.uint8))
    wrong: list[tuple[list[str], str]] = [
        (options(data), "valid: one or more of --model"),
        (options(data, model="resnet1"), "resnet1: Unknown model"),
        (options(data, run=tmp_path), "the run has not finished an epoch"),
        (options(tmp_path / "absent", run=run_folder), "has none of validation, val, test"),
        (options(data, run=run_folder, split="val"), "has no val/ and no val.tar"),
        (options(tmp_path, run=run_folder), "unknown classes: cat; valid: vertical, horizontal"),
        (
            options(data, model="regnetx_002_ubn.cifar10"),
            "unknown classes: horizontal, vertical; valid: airplane, automobile, bird, cat, deer, dog, frog, horse, "
            "ship, truck; if the model's outputs are these classes in this order, pass --allow-class-mismatch",
        ),
        (
            options(data, model="regnetx_002_ubn.cifar10", **{"allow-class-mismatch": True}),
            "received images of 2 classes (horizontal, vertical); valid: 10",
        ),
        (options(data, run=run_folder, results=tmp_path / "other.csv"), "received the columns a, b"),
        (options(data, run=run_folder, device="tpu9"), "device: received 'tpu9'"),
        (options(data, run=run_folder, dataset="memory", **{"crop-pct": 0.5}), "dataset memory: received crop_pct 0.5"),
        (options(data, run=run_folder, dataset="files"), "dataset: received 'files'; valid: "),
    ]
    for arguments, message in wrong:
        assert validate(arguments) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("ubn-zoo: ")
        assert message in printed.err
        assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_the_script_runs(data: Path, run_folder: Path) -> None:
    command = [sys.executable, "scripts/validate.py", *options(data, run=run_folder, threads=1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0
    assert done.stderr == (
        f"{MODEL}: {IMAGES} images of {data}, test; classes by name, 2 of 2 outputs; 32 pixels, crop_pct 1 center, "
        f"bilinear, mean 0.5,0.5,0.5, std 0.25,0.25,0.25, from {run_folder / 'config.json'}\n"
    )
    assert done.stdout.startswith(f"{MODEL}: top-1 ")
