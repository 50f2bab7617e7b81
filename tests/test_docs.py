"""The README and the pages of docs/ name commands, options, recipes, files and modules that exist."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from ubn_zoo.cli import main
from ubn_zoo.recipes.schema import Recipe, list_recipes

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "results" / "README.md"],
)
IDS = [path.relative_to(REPOSITORY).as_posix() for path in PAGES]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?<![\w/.-])(?:ubn-zoo|(?:python|torchrun .*?) ?-m ubn_zoo) ([a-z]+)(?![\w\[:])(.*)")


def code_lines(page: Path) -> list[str]:
    """Lines of shell blocks without comments, and spans of code in the text."""
    text = page.read_text(encoding="utf-8")
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "bash")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines] + spans


@functools.cache
def help_of(command: str) -> str:
    """Help text of a command; raises an error if the command does not exist."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as exited:
        main([command, "--help"])
    assert exited.value.code == 0, f"ubn-zoo {command} is no command"
    return printed.getvalue()


def problems(line: str) -> list[str]:
    """Describe the error in the command on a line of code, if there is one."""
    match = COMMAND.search(line)
    if match is None:
        return []
    command, rest = match.groups()
    found = []
    words = shlex.split(rest.replace("...", ""))
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    known = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(command)))
    found += [f"ubn-zoo {command} has no {option}" for option in sorted(options - known)]
    for word, value in itertools.pairwise(words):
        if word == "--recipe" and value.islower() and value not in list_recipes():
            found.append(f"there is no recipe {value}")
    fields = {field.name for field in dataclasses.fields(Recipe)}
    if "--set" in words:
        settings = words[words.index("--set") + 1 :]
        keys = [word.partition("=")[0] for word in settings if re.match(r"[a-z_]+=", word)]
        found += [f"a recipe has no {key}" for key in keys if key not in fields]
    return found


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist(page: Path) -> None:
    lines = code_lines(page)
    assert not [f"{problem}: {line}" for line in lines for problem in problems(line)]
    modules = [name for line in lines for name in re.findall(r"python -m ([\w.]+)", line)]
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    scripts = [name for line in lines for name in re.findall(r"(?<![\w/])scripts/\w+\.\w+", line)]
    assert not [name for name in scripts if not (REPOSITORY / name).is_file()]


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert problems("ubn-zoo verify --all NAME") == []
    assert problems("ubn-zoo verify --everything") == ["ubn-zoo verify has no --everything"]
    assert problems("ubn-zoo quickstart --set epoch=3") == ["a recipe has no epoch"]
    with pytest.raises(AssertionError, match="ubn-zoo devour is no command"):
        problems("python -m ubn_zoo devour resnet50_ubn")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_point_to_files(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs" / "api").glob("*.md")), ids=lambda page: page.stem)
def test_the_reference_names_existing_objects(page: Path) -> None:
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        pkgutil.resolve_name(name)


def test_the_architecture_names_files_and_all_rooms() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|\.sh|/))`", text))
    folders = [REPOSITORY / name for name in ("docs", "research", "results", "scripts", "tests", "ubn_zoo")]
    paths = [*folders, *(path for folder in folders for path in folder.rglob("*") if path.name != "__pycache__")]
    known = [f"/{path.relative_to(REPOSITORY).as_posix()}{'/' * path.is_dir()}" for path in paths]
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in known)]
    rooms = {path.name for path in (REPOSITORY / "ubn_zoo").iterdir() if (path / "__init__.py").is_file()}
    assert {f"{room}/" for room in rooms} <= named


def test_the_readme_repeats_the_figures_of_the_results() -> None:
    row = r"^\|.*?\| ([\d.]+ ± [\d.]+) \| ([\d.]+ ± [\d.]+) \| (\+[\d.]+ \[[^]]+\]) \|$"
    table = re.findall(row, README.read_text(encoding="utf-8"), re.MULTILINE)
    results = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(table) == 4
    assert not [figure for figures in table for figure in figures if figure not in results]
