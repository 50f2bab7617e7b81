"""Read and write recipes: YAML files in ``ubn_zoo/recipes`` that become frozen, validated records.

A recipe contains every setting that affects the result of a run. It opens with its source, the command to run it, the
hardware and time of a run, and the expected metric. An unknown key, a duplicate key or an invalid value raises
[`RecipeError`][ubn_zoo.errors.RecipeError], which lists what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ubn_zoo.errors import RecipeError
from ubn_zoo.recipes.recipe import DATASETS, NAMED_DATASETS, NORMS, Field, Recipe, fields, keys_with_role
from ubn_zoo.recipes.rules import base_type, fail

__all__ = [
    "DATASETS",
    "NAMED_DATASETS",
    "NORMS",
    "Field",
    "Recipe",
    "RecipeError",
    "apply_settings",
    "decisive_settings",
    "dump_recipe",
    "fields",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_path",
    "recipe_sha256",
]

_RECIPES = Path(__file__).resolve().parent
_TWIN = "_ubn"


def _convert(value: object, wanted: Any) -> object:
    """Convert a YAML value to a key's type; values that cannot be converted fail the record's checks later."""
    base = base_type(wanted)
    if base is tuple and isinstance(value, list):
        return tuple(_convert(item, float) for item in value)
    if base is float and isinstance(value, str):
        # YAML 1.1 reads 5e-4, without a decimal point, as a string.
        try:
            return float(value)
        except ValueError:
            return value
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise RecipeError(f"received the key {key!r}; valid: a string")
            if key in seen:
                raise RecipeError(f"{key}: the key occurs twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


@functools.cache
def _types() -> Mapping[str, Any]:
    """The type of every key."""
    return typing.get_type_hints(Recipe)


def _unknown_key(key: object) -> NoReturn:
    names = [field.name for field in dataclasses.fields(Recipe)]
    similar = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    raise RecipeError(f"{key}: unknown key; {hint}valid: {', '.join(names)}")


def _build(values: Mapping[Any, Any]) -> Recipe:
    types_by_name = _types()
    for key in values:
        if key not in types_by_name:
            _unknown_key(key)
    required = [field.name for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise RecipeError(f"missing: {', '.join(missing)}; a recipe needs at least {', '.join(required)}")
    converted: dict[str, Any] = {key: _convert(value, types_by_name[key]) for key, value in values.items()}
    return Recipe(**converted)


def _name_norm(given: dict[Any, Any]) -> None:
    """Replace a model name that ends in ``_ubn`` with the architecture and norm ubn."""
    model = given.get("model")
    if isinstance(model, str) and model.endswith(_TWIN):
        if given.setdefault("norm", "ubn") != "ubn":
            fail("model", model, f"{model.removesuffix(_TWIN)!r} with norm {given['norm']}, or norm ubn")
        given["model"] = model.removesuffix(_TWIN)


def _parse(text: str) -> dict[Any, Any]:
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"received {type(values).__name__}; valid: a mapping from keys to values")
    _name_norm(values)
    return values


def _read_settings(settings: Iterable[str]) -> dict[str, Any]:
    """The keys and values of ``key=value`` settings."""
    given: dict[Any, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecipeError(f"received {setting!r}; valid: key=value")
        if key not in _types():
            _unknown_key(key)
        try:
            given[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key}: not valid YAML: {error}") from None
    _name_norm(given)
    if given.get("pretrained") is False:
        # Without pretrained weights, the recipe's tag has no meaning.
        given.setdefault("pretrained_tag", None)
    return given


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from the text of its file.

    Args:
        text: YAML, one mapping from keys to values.

    Raises:
        RecipeError: The text is not YAML, or a key or value is invalid.
    """
    return _build(_parse(text))


def list_recipes() -> tuple[str, ...]:
    """Names of the recipes in the package, sorted."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def recipe_path(name: str | os.PathLike[str]) -> Path:
    """Find a recipe's file.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: The recipe does not exist; the message lists those in the package.
    """
    text = os.fspath(name)
    path = Path(text) if text.endswith((".yaml", ".yml")) else _RECIPES / f"{text}.yaml"
    if path.parent == _RECIPES and path.stem not in list_recipes():
        raise RecipeError(f"no recipe {text!r}; valid: {', '.join(list_recipes())}, or the path of a .yaml file")
    if not path.is_file():
        raise RecipeError(f"no file {text!r}; valid: {', '.join(list_recipes())}, or the path of a .yaml file")
    return path


def load_recipe(name: str | os.PathLike[str], settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply changes, and validate the result once.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.
        settings: Changes, as for `apply_settings`.

    Raises:
        RecipeError: The recipe does not exist, or the recipe or a setting is invalid.
    """
    path = recipe_path(name)
    settings = tuple(settings)
    given = _read_settings(settings)
    try:
        return _build({**_parse(path.read_text(encoding="utf-8")), **given})
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}{' with ' + ' '.join(settings) if settings else ''}: {error}") from None


def recipe_sha256(name: str | os.PathLike[str]) -> str:
    """SHA-256 of a recipe's file, 64 hexadecimal digits.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: The recipe does not exist.
    """
    return hashlib.sha256(recipe_path(name).read_bytes()).hexdigest()


def apply_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change values of a recipe.

    A model's name that ends in ``_ubn`` also sets norm to ubn. ``pretrained=false`` also sets pretrained_tag to null.

    Args:
        recipe: The recipe to start from; it is not changed.
        settings: Strings ``key=value``, with the value in YAML syntax.

    Raises:
        RecipeError: A setting is not ``key=value``, or its key or value is invalid.
    """
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return _build({**values, **_read_settings(settings)})


def decisive_settings(recipe: Recipe) -> dict[str, Any]:
    """Values that affect the result of a run, without the recipe's description of itself and execution settings."""
    return {key: getattr(recipe, key) for key in keys_with_role("result")}


def dump_recipe(recipe: Recipe) -> str:
    """Write all values of a recipe as YAML, the inverse of `parse_recipe`."""
    values = dataclasses.asdict(recipe)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
