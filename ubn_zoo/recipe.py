"""A training run as data: YAML files in ``ubn_zoo/recipes`` as frozen, validated records.

A recipe says everything that decides the result of a run, and opens with where it comes from, the command that runs it,
the hardware and time that took, and the metric to expect. Nothing is guessed: an unknown key, a key given twice or a
value out of range raises [`RecipeError`][ubn_zoo.recipe.RecipeError], which lists what is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import os
import types
import typing
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "NORMS",
    "Recipe",
    "RecipeError",
    "apply_settings",
    "decisive_settings",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_path",
    "recipe_sha256",
]

NORMS = ("ubn", "bn", "rbn", "bnet")
DESCRIPTIVE = ("source", "command", "hardware", "time", "expected")
OPTIMIZERS = ("sgd", "adamw")
INTERPOLATIONS = ("bilinear", "bicubic")

_RECIPES = Path(__file__).resolve().parent / "recipes"


class RecipeError(ValueError):
    """A recipe is not valid; the message names the key, what was received and what is valid."""


def _fail(key: str, received: object, valid: str) -> typing.NoReturn:
    raise RecipeError(f"{key}: received {received!r}; valid: {valid}")


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        _fail(key, value, f"from {low:g} to {high:g}")


def _check_choice(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        _fail(key, value, "one of " + ", ".join(choices))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        source: Where the settings come from.
        command: The command that runs it.
        hardware: What it was run on, or "not yet run".
        time: How long that took, or "not yet run".
        expected: The metric to expect, or "not yet run".
        model: timm's name of the architecture, without ``_ubn``.
        norm: Its normalisation: ``ubn``, ``bn``, or the ablations ``rbn`` (both calibrations, neither gate nor
            depthwise kernel) and ``bnet`` (the depthwise kernel alone).
        pretrained: Whether to start from pretrained weights.
        pretrained_tag: Their tag; None for the model's default.
        num_classes: Outputs of the classifier.
        img_size: Side in pixels that images are resized to.
        interpolation: Filter of that resize, ``bilinear`` or ``bicubic``.
        mean: Mean per channel, of pixel values scaled to 0..1.
        std: Standard deviation per channel, of pixel values scaled to 0..1.
        crop_padding: Zero padding in pixels around the image, before the resize, that the random crop moves in; 0 for
            no random crop.
        hflip: Probability of a horizontal flip.
        epochs: Passes over the training images.
        batch_size: Images per step; an incomplete last batch is left out.
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        lr: Peak learning rate.
        momentum: Momentum of ``sgd``; not used by ``adamw``.
        weight_decay: Decay of convolution and linear weights; biases and normalisation parameters have none.
        warmup_epochs: Length of the linear warm-up, in epochs; a cosine to zero follows.
        label_smoothing: Share of the target that is spread over all classes.
        ema_decay: Decay of the moving average of the weights, per step, that is evaluated and saved; None for none.
        seed: Seed of initialisation, order and augmentation.
        device: torch's name of the device.

    Raises:
        RecipeError: A value is not valid.
    """

    source: str
    command: str
    hardware: str
    time: str
    expected: str
    model: str
    norm: str = "ubn"
    pretrained: bool = False
    pretrained_tag: str | None = None
    num_classes: int
    img_size: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 4
    hflip: float = 0.5
    epochs: int
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        types_by_name = _field_types(Recipe)
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), types_by_name[field.name])
        for key in (*DESCRIPTIVE, "model", "device"):
            if not getattr(self, key).strip():
                _fail(key, getattr(self, key), "a text that is not empty")
        if self.model.endswith("_ubn"):
            _fail("model", self.model, f"the architecture's own name, {self.model[:-4]!r}; norm says the rest")
        if self.pretrained_tag is not None and not self.pretrained:
            _fail("pretrained_tag", self.pretrained_tag, "null, as pretrained is false")
        _check_choice("norm", self.norm, NORMS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        for key, low, high in _RANGES:
            _check_range(key, getattr(self, key), low, high)
        for key, low in (("mean", -10.0), ("std", 1e-6)):
            values = getattr(self, key)
            if len(values) != 3:
                _fail(key, list(values), "three numbers, one for each channel")
            for value in values:
                _check_range(key, value, low, 10.0)
        if self.warmup_epochs >= self.epochs:
            _fail("warmup_epochs", self.warmup_epochs, f"less than epochs, {self.epochs}")
        if self.ema_decay is not None:
            _check_range("ema_decay", self.ema_decay, 0.0, 1.0)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("num_classes", 1, 1_000_000),
    ("img_size", 1, 16_384),
    ("crop_padding", 0, 1_024),
    ("hflip", 0.0, 1.0),
    ("epochs", 1, 100_000),
    ("batch_size", 2, 1_000_000),
    ("lr", 1e-12, 1e3),
    ("momentum", 0.0, 1.0),
    ("weight_decay", 0.0, 10.0),
    ("warmup_epochs", 0.0, 100_000.0),
    ("label_smoothing", 0.0, 1.0),
    ("seed", 0, 2**63 - 1),
)

_TYPE_NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    tuple: "a list of finite numbers",
}


def _field_types(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _base_type(wanted: Any) -> type:
    if isinstance(wanted, types.UnionType):
        wanted = next(option for option in typing.get_args(wanted) if option is not types.NoneType)
    return typing.get_origin(wanted) or wanted


def _check_type(key: str, value: object, wanted: Any) -> None:
    if value is None and isinstance(wanted, types.UnionType):
        return
    base = _base_type(wanted)
    if base is tuple and not isinstance(value, tuple):
        _fail(key, value, _TYPE_NAMES[base])
    items = value if isinstance(value, tuple) else (value,)
    scalar = float if base is tuple else base
    for item in items:
        fits = isinstance(item, (int, float) if scalar is float else scalar)
        if not fits or (isinstance(item, bool) and scalar is not bool) or (scalar is float and not math.isfinite(item)):
            _fail(key, value, _TYPE_NAMES[base])


def _convert(value: object, wanted: Any) -> object:
    """Bring a YAML value into the shape of a field's type; what does not fit is left for the record's own checks."""
    base = _base_type(wanted)
    if base is tuple and isinstance(value, list):
        return tuple(_convert(item, float) for item in value)
    if base is float and isinstance(value, str):
        # YAML 1.1 reads 5e-4, without a point, as a text.
        try:
            return float(value)
        except ValueError:
            return value
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset, without keys that occur twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"{key}: the key occurs twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _unknown_key(key: object) -> typing.NoReturn:
    names = [field.name for field in dataclasses.fields(Recipe)]
    similar = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    raise RecipeError(f"{key}: unknown key; {hint}valid: {', '.join(names)}")


def _build(values: dict[Any, Any]) -> Recipe:
    types_by_name = _field_types(Recipe)
    for key in values:
        if key not in types_by_name:
            _unknown_key(key)
    required = [field.name for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise RecipeError(f"missing: {', '.join(missing)}; a recipe needs at least {', '.join(required)}")
    converted: dict[str, Any] = {key: _convert(value, types_by_name[key]) for key, value in values.items()}
    return Recipe(**converted)


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from the text of its file.

    Args:
        text: YAML, one mapping from keys to values.

    Raises:
        RecipeError: It is not YAML, or a key or value is not valid.
    """
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"received {type(values).__name__}; valid: a mapping from keys to values")
    return _build(values)


def list_recipes() -> tuple[str, ...]:
    """Names of the recipes in the package, sorted."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def recipe_path(name: str | os.PathLike[str]) -> Path:
    """Find a recipe's file.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such recipe; the message lists those in the package.
    """
    text = os.fspath(name)
    path = Path(text) if text.endswith((".yaml", ".yml")) else _RECIPES / f"{text}.yaml"
    if path.parent == _RECIPES and path.stem not in list_recipes():
        raise RecipeError(f"no recipe {text!r}; valid: {', '.join(list_recipes())}, or the path of a .yaml file")
    if not path.is_file():
        raise RecipeError(f"no file {text!r}; valid: {', '.join(list_recipes())}, or the path of a .yaml file")
    return path


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such recipe, or it is not valid; the message names the file.
    """
    path = recipe_path(name)
    try:
        return parse_recipe(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_sha256(name: str | os.PathLike[str]) -> str:
    """SHA-256 of a recipe's file, 64 hexadecimal digits.

    Args:
        name: Name of a recipe in the package, or the path of a ``.yaml`` file.

    Raises:
        RecipeError: There is no such recipe.
    """
    return hashlib.sha256(recipe_path(name).read_bytes()).hexdigest()


def apply_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change values of a recipe.

    Args:
        recipe: The recipe to start from; it is not changed.
        settings: ``key=value`` each, the value as it would be written in the file.

    Raises:
        RecipeError: A setting is not ``key=value``, or its key or value is not valid.
    """
    values: dict[Any, Any] = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecipeError(f"received {setting!r}; valid: key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key}: not valid YAML: {error}") from None
    return _build(values)


def decisive_settings(recipe: Recipe) -> dict[str, Any]:
    """The values that decide a run's result: all but what its recipe says about itself."""
    return {key: value for key, value in dataclasses.asdict(recipe).items() if key not in DESCRIPTIVE}


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with all its values as YAML, the inverse of `parse_recipe`."""
    values = dataclasses.asdict(recipe)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
