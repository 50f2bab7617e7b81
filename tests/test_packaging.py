"""The wheel and the source archive: complete, and working from another folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.images import RECIPE, write_image_folder
from ubn_zoo import __version__
from ubn_zoo.recipes.schema import dump_recipe

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ubn_zoo"
SOURCES = ["ubn_zoo", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "weights_manifest.json"]

pytestmark = pytest.mark.slow


def build(function: str, source: Path, target: Path) -> Path:
    """Run the build backend as pip does, but in this environment and so without network."""
    target.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{function}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because building leaves files in the source tree."""
    folder = tmp_path_factory.mktemp("source") / "copy"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def archive(source: Path) -> Path:
    return build("build_sdist", source, source.parent / "archive")


@pytest.fixture(scope="module")
def wheel(source: Path, archive: Path) -> Path:
    """The wheel from the unpacked source archive."""
    unpacked = source.parent / "unpacked"
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    return build("build_wheel", inner, source.parent / "wheel-of-archive")


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-cache-dir", "--no-compile"]
    subprocess.run([*command, "--target", str(target), str(wheel)], capture_output=True, check=True)
    return target


def content_of(wheel: Path) -> dict[str, bytes]:
    """All files of a wheel except its RECORD."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("RECORD")}


def files_of_the_package() -> dict[str, bytes]:
    found = {}
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            found[f"ubn_zoo/{path.relative_to(PACKAGE).as_posix()}"] = path.read_bytes()
    return found


def test_working_tree_and_source_archive_make_the_same_wheel(source: Path, wheel: Path) -> None:
    assert content_of(build("build_wheel", source, source.parent / "wheel")) == content_of(wheel)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name: content for name, content in content_of(wheel).items() if ".dist-info/" not in name}
    assert held == files_of_the_package()
    assert held["ubn_zoo/weights_manifest.json"] == (REPOSITORY / "weights_manifest.json").read_bytes()
    assert any(name.startswith("ubn_zoo/weights/") for name in held)
    assert any(name.startswith("ubn_zoo/recipes/") for name in held)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
        licenses = [each for each in file.namelist() if ".dist-info/" in each and each.endswith("LICENSE")]
    assert metadata["Name"] == "ubn-zoo"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert metadata.get_payload() == (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(licenses) == 1


def test_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, timm, torch, ubn_zoo\n"
        "from ubn_zoo.hub.manifest import load_manifest\n"
        "print(pathlib.Path(ubn_zoo.__file__).parent)\n"
        "(record, *_) = load_manifest().find(source='bundled')\n"
        "model = timm.create_model(record.id, pretrained=True).eval()\n"
        "print(tuple(model(torch.zeros(2, *record.input.size)).shape) == (2, record.num_classes))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(installed / "ubn_zoo"), "True"]
    assert not list(tmp_path.iterdir())


def test_installed_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, str(installed / "bin" / "ubn-zoo"), "info", "resnet50_ubn"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resnet50.a1_in1k" in done.stdout


def test_installed_command_trains_validates_and_reads_a_run_back(installed: Path, tmp_path: Path) -> None:
    images, folder = write_image_folder(tmp_path / "images", 16, 8), tmp_path / "run"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(dump_recipe(dataclasses.replace(RECIPE, epochs=1)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    program = str(installed / "bin" / "ubn-zoo")
    read = f"import timm, ubn_zoo; print(timm.create_model('local-dir:{folder}', pretrained=True).num_classes)"
    shown = []
    for command in (
        [program, "train", "--recipe", str(recipe), "--data-dir", str(images), "--output", str(folder)],
        ["-m", "ubn_zoo", "validate", "--run", str(folder), "--data-dir", str(images), "--workers", "0"],
        ["-c", read],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    trained, validated, classes = shown
    top1 = trained.splitlines()[-1].partition("top-1 ")[2].partition(" %")[0]
    assert f"top-1 {top1} %" in validated
    assert classes == "2\n"
