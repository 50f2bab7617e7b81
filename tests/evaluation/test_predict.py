"""Predictions against a plain timm loop, for uncommon image files, and in output files."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.models._hub import save_config_for_hf

import ubn_zoo
from tests.hub_server import HubServer
from tests.images import RECIPE, write_image_folder
from ubn_zoo import cli
from ubn_zoo.errors import DataError, EvaluationError, MissingPackageError
from ubn_zoo.evaluation import predict as module
from ubn_zoo.evaluation.predict import class_names, predict, predict_stream
from ubn_zoo.evaluation.prediction_files import ClassProbability, Prediction, open_prediction_files
from ubn_zoo.evaluation.subjects import subject_of
from ubn_zoo.training.run import run as train

MODEL = "regnetx_002_ubn.cifar10"
ARCHIVE = Path(__file__).resolve().parents[3] / "shared" / "data" / "clothing160.tar.xz"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model(MODEL, pretrained=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, pixels in enumerate(load_sample_images().images):
        (folder / f"sub{number}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"sub{number}" / f"photo {number}.jpg")
    return folder


@torch.inference_mode()
def reference(model: torch.nn.Module, files: list[str]) -> torch.Tensor:
    """The inference loop in timm's documentation."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model, use_test_size=True))
    model.eval()
    inputs = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    return torch.cat([model(part).softmax(1) for part in inputs.split(25)])


def check_against_timm(model: torch.nn.Module, folder: Path, count: int, batch_size: int) -> None:
    files = sorted(str(path) for path in folder.rglob("*.jpg"))
    found = {one.file: one.top for one in predict(model, folder, top_k=10, batch_size=batch_size, device="cpu")}
    assert sorted(found) == files and len(files) == count
    for file, expected in zip(files, reference(model, files), strict=True):
        probabilities = torch.empty(10)
        for one in found[file]:
            probabilities[one.index] = one.probability
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)
        assert [one.probability for one in found[file]] == sorted((o.probability for o in found[file]), reverse=True)


def test_equals_a_plain_timm_loop(model: torch.nn.Module, photos: Path) -> None:
    check_against_timm(model, photos, 2, batch_size=3)


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.is_file(), reason="the archive of 200 photographs is not here")
def test_equals_a_plain_timm_loop_on_200_photographs(model: torch.nn.Module, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        members = (member for member in archive if member.isfile())
        for number, member in enumerate(itertools.islice(members, 200)):
            stream = archive.extractfile(member)
            assert stream is not None
            (tmp_path / f"{number}.jpg").write_bytes(stream.read())
    check_against_timm(model, tmp_path, 200, batch_size=32)


def test_uncommon_image_files_are_predicted(model: torch.nn.Module, tmp_path: Path) -> None:
    pixels = load_sample_images().images[1][:256, :256]
    photo = Image.fromarray(pixels)
    photo.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    gray = photo.convert("L")
    gray.save(tmp_path / "gray.png")
    Image.fromarray(numpy.asarray(gray).astype(numpy.uint16) * 257).save(tmp_path / "deep.png")
    photo.convert("CMYK").save(tmp_path / "cmyk.tif")
    photo.quantize(256).save(tmp_path / "palette.png")
    photo.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", photo.size)])
    found = {Path(one.file).stem: one.top for one in predict(model, tmp_path, top_k=10, device="cpu")}
    first = {name: {one.index: one.probability for one in top} for name, top in found.items()}
    assert len(first) == 7
    for name, same, tolerance in (
        ("turned", "plain", 1e-6),
        ("deep", "gray", 1e-6),
        ("cmyk", "plain", 1e-3),
        ("palette", "plain", 0.1),
        ("moving", "plain", 0.1),
    ):
        assert first[name] == pytest.approx(first[same], abs=tolerance), name
    assert first["gray"] != pytest.approx(first["plain"], abs=1e-3)


def test_command_skips_what_it_cannot_read_and_writes_every_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image either")
    (photos / ".hidden.jpg").write_bytes(b"")
    outputs = [tmp_path / name for name in ("out.json", "sheet.png", "out.safetensors")]
    arguments = ["--output", str(outputs[0]), "--picture", str(outputs[1]), "--features", str(outputs[2])]
    code = cli.main(["predict", MODEL, str(photos), str(tmp_path / "gone.jpg"), *arguments, "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 3
    assert "2 images, 2 skipped" in out
    assert "bad.jpg: not a readable image" in err and "gone.jpg: no such file" in err and "notes" not in err
    rows = json.loads(outputs[0].read_text())
    names = [str(photos / f"sub{number}" / f"photo {number}.jpg") for number in (0, 1)]
    assert [row["file"] for row in rows] == names
    assert [len(row["classes"]) for row in rows] == [5, 5]
    with safetensors.safe_open(outputs[2], "pt") as file:
        features = file.get_tensor("features")
        assert json.loads(file.metadata()["files"]) == names
    model = timm.create_model(MODEL, pretrained=True).eval()
    with torch.inference_mode():
        logits = model.get_classifier()(features)  # the classifier of a RegNet is one linear layer
    assert logits.softmax(1).max(1).values.tolist() == pytest.approx(
        [row["classes"][0]["probability"] for row in rows], abs=1e-5
    )
    with Image.open(outputs[1]) as sheet:
        assert sheet.format == "PNG" and len(set(sheet.convert("L").get_flattened_data())) > 100


def test_command_without_a_readable_image_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    code = cli.main(["predict", MODEL, str(tmp_path), "--output", str(tmp_path / "out.csv"), "--device", "cpu"])
    assert code == 1
    assert "none of the 1 images can be read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jpg"]
    with pytest.raises(DataError, match="not a readable image"):
        predict(MODEL, tmp_path, device="cpu")


def test_tables_have_the_same_rows_and_csv_no_formulas(tmp_path: Path) -> None:
    made = [
        Prediction("=1+1.jpg", (ClassProbability(1, "@home", 0.75), ClassProbability(0, "a, b", 0.25))),
        Prediction("b.jpg", (ClassProbability(0, "a, b", 0.5), ClassProbability(1, "@home", 0.5))),
    ]
    for ending in ("csv", "json"):
        with open_prediction_files(output=tmp_path / f"t.{ending}") as write:
            for one in made:
                write(one)
    rows = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert rows == [
        ["file", "class_1", "probability_1", "class_2", "probability_2"],
        ["'=1+1.jpg", "'@home", "0.750000", "a, b", "0.250000"],
        ["b.jpg", "a, b", "0.500000", "'@home", "0.500000"],
    ]
    assert json.loads((tmp_path / "t.json").read_text())[0] == {
        "file": "=1+1.jpg",
        "classes": [
            {"index": 1, "name": "@home", "probability": 0.75},
            {"index": 0, "name": "a, b", "probability": 0.25},
        ],
    }


def test_parquet_has_the_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with open_prediction_files(output=tmp_path / "t.parquet") as write:
        for number in range(5000):  # more than one group of rows
            write(Prediction(f"{number}.jpg", (ClassProbability(0, "a", 1.0),)))
    rows = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(rows) == 5000 and rows[-1] == {"file": "4999.jpg", "class_1": "a", "probability_1": 1.0}


def test_parquet_without_pyarrow_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):  # noqa: SIM117
        with open_prediction_files(output=tmp_path / "t.parquet"):
            pass
    assert not list(tmp_path.iterdir())


def test_class_names_come_from_the_run(photos: Path, tmp_path: Path, hub: HubServer) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t_ubn", num_classes=2)
    run = tmp_path / "run"
    run.mkdir()
    safetensors.torch.save_file(model.state_dict(), run / "model.safetensors")
    config: dict[str, Any] = {**model.pretrained_cfg, "input_size": (3, 32, 32), "label_names": ["wolf", "bear"]}
    save_config_for_hf(model, run / "config.json", {"pretrained_cfg": config, "label_names": ["wolf", "bear"]})
    found = predict(run, photos, device="cpu")
    assert {one.name for one in found[0].top} == {"wolf", "bear"}
    hub.create("someone/animals", {path.name: path.read_bytes() for path in run.iterdir()})
    for other in (f"local-dir:{run}", run / "model.safetensors", "hf-hub:someone/animals"):
        same = predict(other, photos, device="cpu")
        assert [one.top for one in same] == [one.top for one in found]


def test_a_checkpoint_of_timms_training_loads_with_its_architecture(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sibling = timm.create_model("resnet10t", num_classes=3)
    torch.save({"arch": "resnet10t", "state_dict": sibling.state_dict()}, tmp_path / "last.pth.tar")
    arguments = ["--checkpoint", str(tmp_path / "last.pth.tar"), "--output", str(tmp_path / "out.json")]
    assert cli.main(["predict", "resnet10t_ubn", str(photos), *arguments, "--device", "cpu"]) == 0
    assert "class names: unknown" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out.json").read_text())
    for row, expected in zip(rows, reference(sibling, [row["file"] for row in rows]), strict=True):
        found = {one["index"]: one["probability"] for one in row["classes"]}
        assert found == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-5)
        assert {one["name"] for one in row["classes"]} == {"class 0", "class 1", "class 2"}


def test_an_unfinished_run_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = write_image_folder(tmp_path / "data", 16, 2), tmp_path / "run"
    stopped = train(RECIPE, data, folder, on_epoch=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    assert not stopped.finished
    first, second = ubn_zoo.predict(folder, data / "test", device="cpu")
    assert {one.name for one in first.top} == {one.name for one in second.top} == {"horizontal", "vertical"}
    (folder / "model.safetensors").unlink()
    assert cli.main(["predict", str(folder), str(data)]) == 1
    assert "run has no model.safetensors; the run has not finished an epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10", "resnet10: Unknown model, and no folder or file has this name; similar: resnet10t_ubn"),
        ("runs/photos", "runs/photos: no such folder or file; valid: the folder of a run, a checkpoint, or a model's"),
        ("model.pth", "model.pth: no such folder or file"),
        ("https://host/model", "https://host/model: no such folder or file"),
    ],
)
def test_a_model_that_does_not_exist_is_named(
    name: str, message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--checkpoint", "weights.pth"]):
        assert cli.main(["predict", name, str(photos), *more]) == 1
        assert f"ubn-zoo: {message}" in capsys.readouterr().err


def test_class_names_without_a_run_come_from_imagenet_or_are_numbers(model: torch.nn.Module) -> None:
    network = timm.create_model("resnet10t")
    names = class_names(subject_of(network))
    assert (names.names[0], names.names[985]) == ("tench, Tinca tinca", "daisy")
    assert class_names(subject_of(timm.create_model("resnet10t", num_classes=3))).names == (
        "class 0",
        "class 1",
        "class 2",
    )


def test_wrong_arguments_are_named(model: torch.nn.Module, photos: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no images found"):
        predict(model, empty)
    with pytest.raises(EvaluationError, match="`top_k`: received 0"):
        predict(model, photos, top_k=0)
    with pytest.raises(EvaluationError, match=r"`output`: received .*out.xls.*\.csv"):
        predict(model, photos, output=tmp_path / "out.xls")
    broken = timm.create_model("resnet10t", num_classes=2)
    torch.nn.init.constant_(broken.fc.weight, float("nan"))
    with pytest.raises(EvaluationError, match="gives NaN"):
        predict(broken, photos, device="cpu")
    assert broken.training


def test_images_are_streamed(model: torch.nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counting(file: str) -> Image.Image:
        opened.append(file)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(module, "open_image", counting)
    for number in range(20):
        (photos / f"{number}.png").touch()
    stream = predict_stream(model, photos, batch_size=2, device="cpu")
    assert Path(next(stream).file).name == "0.png"
    assert len(opened) <= 4
    assert len(list(stream)) == 21


def test_public_name() -> None:
    assert ubn_zoo.predict is predict
