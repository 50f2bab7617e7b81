"""Validation rules of recipe keys: the rule, the check of a value, and their descriptions."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any, NoReturn

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from ubn_zoo.errors import RecipeError

__all__ = ["Rule", "base_type", "check", "describe_valid", "fail", "is_optional"]

_TYPE_NAMES: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    tuple: "a list of finite numbers",
}
_FORMATS: dict[str, tuple[str, str]] = {
    "text": (r"(?s).*\S.*", "non-empty text"),
    "line": (r"(?=.*\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029]+", "one non-empty line of text"),
    "spdx": (r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", "an SPDX identifier such as apache-2.0"),
}
_AUGMENT = "timm's policies: original, originalr, v0, v0r, 3a, or for example rand-m7-mstd0.5-inc1 or augmix-m3-w3"


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Meaning and valid values of a key; the field declares its type and default.

    Attributes:
        meaning: Description of the setting.
        low: Smallest valid number, or smallest valid item of a list.
        high: Largest valid number, or largest valid item of a list.
        choices: Valid strings; empty for any.
        lengths: Valid lengths of a list; empty for any.
        form: ``text``, ``line``, ``spdx``, ``dataset`` or ``augment``, for strings that are not one of `choices`; None
            for any string.
        odd: Whether the number must be odd.
        role: ``result`` for keys that affect the result of a run, ``opening`` for the recipe's description of itself,
            ``operation`` for how a run is executed, ``publishing`` for information about the published weights.
    """

    meaning: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    form: str | None = None
    odd: bool = False
    role: str = "result"


def fail(key: str, received: object, valid: str) -> NoReturn:
    """Reject a value.

    Raises:
        RecipeError: Always; the message says what was received and what is valid.
    """
    raise RecipeError(f"{key}: received {received!r}; valid: {valid}")


def is_optional(annotation: Any) -> bool:
    """Whether a type accepts None."""
    return isinstance(annotation, types.UnionType)


def base_type(annotation: Any) -> type:
    """Return the base type of an annotation: ``tuple`` for ``tuple[float, ...] | None``."""
    if is_optional(annotation):
        annotation = next(option for option in typing.get_args(annotation) if option is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def check(key: str, value: object, annotation: Any, rule: Rule) -> None:
    """Check one value.

    Raises:
        RecipeError: The value has the wrong type, or the rule does not allow it.
    """
    if value is None and is_optional(annotation):
        return
    _check_type(key, value, base_type(annotation))
    if isinstance(value, tuple) and rule.lengths and len(value) not in rule.lengths:
        fail(key, list(value), f"a list of {' or '.join(map(str, rule.lengths))} numbers")
    for item in value if isinstance(value, tuple) else (value,):
        if rule.low is not None and rule.high is not None and not rule.low <= typing.cast(float, item) <= rule.high:
            fail(key, item, f"from {_number(rule.low)} to {_number(rule.high)}")
        if rule.odd and typing.cast(int, item) % 2 == 0:
            fail(key, item, "an odd number")
    if rule.choices and value not in rule.choices:
        fail(key, value, "one of " + ", ".join(rule.choices))
    if rule.form in _FORMATS and not re.fullmatch(_FORMATS[rule.form][0], typing.cast(str, value)):
        fail(key, value, _FORMATS[rule.form][1])
    if rule.form == "augment":
        _check_augment(key, typing.cast(str, value))


def _check_type(key: str, value: object, base: type) -> None:
    if base is tuple and not isinstance(value, tuple):
        fail(key, value, _TYPE_NAMES[base])
    items = value if isinstance(value, tuple) else (value,)
    scalar = float if base is tuple else base
    for item in items:
        fits = isinstance(item, (int, float) if scalar is float else scalar)
        if not fits or (isinstance(item, bool) and scalar is not bool) or (scalar is float and not math.isfinite(item)):
            fail(key, value, _TYPE_NAMES[base])


def _check_augment(key: str, policy: str) -> None:
    build: Any = auto_augment_transform
    if policy.startswith("rand"):
        build = rand_augment_transform
    elif policy.startswith("augmix"):
        build = augment_and_mix_transform
    try:
        build(policy, {})
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        fail(key, policy, _AUGMENT)


def describe_valid(annotation: Any, rule: Rule) -> str:
    """Describe the valid values for the table of keys."""
    base = base_type(annotation)
    text = _TYPE_NAMES[base]
    if rule.choices:
        text = ", ".join(rule.choices)
    elif rule.form == "augment":
        text = _AUGMENT
    elif rule.form in _FORMATS:
        text = _FORMATS[rule.form][1]
    elif rule.low is not None and rule.high is not None:
        kind = {int: "an odd number" if rule.odd else "a whole number", float: "a number"}.get(base, "numbers")
        if rule.lengths:
            kind = f"{' or '.join(map(str, rule.lengths))} numbers"
        text = f"{kind} from {_number(rule.low)} to {_number(rule.high)}"
    return f"{text}, or null" if is_optional(annotation) else text


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
