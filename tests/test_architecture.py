"""Allowed imports between parts of the package, and the cost of importing it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ubn_zoo import errors

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ubn_zoo"

# From the innermost room outward: each may import only the rooms before it.
ROOMS = [
    {"errors"},
    {"utils"},
    {"layers"},
    {"hub"},
    {"recipes"},
    {"models"},
    {"data"},
    {"evaluation"},
    {"training"},
    {"release"},
    {"interop"},
    {"cli"},
    {"__main__"},
]
RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"matplotlib", "onnx", "onnxruntime", "onnxscript", "pandas", "sklearn", "tensorboard", "triton"}


def imported(path: Path, root: Path) -> set[str]:
    """Absolute names of everything that a file imports, relative imports resolved."""
    package = ["ubn_zoo", *path.relative_to(root).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path, root: Path = PACKAGE) -> set[str]:
    """The rooms of the package that a file imports; `ubn_zoo` stands for a name of the package itself."""
    found = set()
    for name in imported(path, root):
        first, _, rest = name.partition(".")
        if first == "ubn_zoo":
            room = rest.partition(".")[0]
            found.add(room if room in RANKS else "ubn_zoo")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_room() -> None:
    assert {room_of(path) for path in SOURCES} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room, found = room_of(path), rooms_imported(path)
    if room == "__init__":
        # Importing any room runs this file first. Lazy imports and imports for type checkers have no cost.
        tree = ast.parse(path.read_text(encoding="utf-8"))
        run = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert run <= {"__future__", "typing", "ubn_zoo", "ubn_zoo.errors", "ubn_zoo.layers"}
        return
    if "ubn_zoo" in found:
        # The package's public names exist after its layers and models are imported.
        assert RANKS[room] > RANKS["models"]
    outward = {other for other in found - {"ubn_zoo", room} if RANKS[other] >= RANKS[room]}
    assert not outward, f"{room} imports {outward}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package_imports_neither_scripts_nor_tests(path: Path) -> None:
    outside = {folder.name for folder in REPOSITORY.iterdir() if folder.is_dir()} - {"ubn_zoo"}
    outside |= {file.stem for folder in ("scripts", "tests") for file in (REPOSITORY / folder).glob("*.py")}
    # A name that an installed package also has (`benchmark`, `train`) is ambiguous, but harmless here.
    mine = {name.partition(".")[0] for name in imported(path, PACKAGE)} & outside
    assert {name for name in mine if importlib.util.find_spec(name) is None} == set()


def test_the_import_check_sees_every_form_of_import(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    source = tmp_path / "layers" / "x.py"
    for text, room in [
        ("import ubn_zoo.training.engine", "training"),
        ("import ubn_zoo.models.ubn_resnet as m", "models"),
        ("from ubn_zoo import hub", "hub"),
        ("from ubn_zoo.cli import main", "cli"),
        ("from .. import hub", "hub"),
        ("from ..hub import fetch", "hub"),
        ("from . import ubn", "layers"),
        ("def f():\n    from ..evaluation import accuracy", "evaluation"),
        ("from .. import __version__", "ubn_zoo"),
        ("import torch", None),
    ]:
        source.write_text(text)
        assert rooms_imported(source, tmp_path) == ({room} if room else set()), text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_errors_are_defined_in_one_place(path: Path) -> None:
    classes = [node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    found = {name for name in classes if name.endswith("Error") and not name.startswith("_")}
    assert found == (set(errors.__all__) if room_of(path) == "errors" else set())


def test_errors_have_one_base_class_and_a_builtin_base() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name != "UbnZooError"]
    assert all(issubclass(kind, errors.UbnZooError) for kind in kinds)
    assert all(issubclass(kind, (ImportError, LookupError, OSError, RuntimeError, ValueError)) for kind in kinds)


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_import_loads_no_heavy_packages() -> None:
    code = (
        "import sys, timm\n"
        "before = set(sys.modules)\n"
        "import ubn_zoo\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "ubn_zoo" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


def test_public_names_are_found_after_one_import() -> None:
    code = (
        "import sys, ubn_zoo\n"
        "heavy = {'ubn_zoo.training', 'ubn_zoo.evaluation', 'ubn_zoo.release'} & set(sys.modules)\n"
        "from ubn_zoo import evaluate, measure_similarity, publish, train\n"
        "assert all(map(callable, (evaluate, measure_similarity, publish, train, ubn_zoo.convert_state_dict)))\n"
        "assert ubn_zoo.training.run.train is train and ubn_zoo.publish is publish\n"
        "assert issubclass(ubn_zoo.CheckpointError, ubn_zoo.UbnZooError)\n"
        "assert all(getattr(ubn_zoo, name) is not None for name in ubn_zoo.__all__)\n"
        "assert set(ubn_zoo.__all__) <= set(dir(ubn_zoo)) and not hasattr(ubn_zoo, 'publsh')\n"
        "print(heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
