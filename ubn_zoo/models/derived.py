"""Classes made from timm's classes at run time, whose instances can be pickled and copied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Derived", "Deriving", "derive", "once_per_class"]

Deriving = Callable[[type[nn.Module]], type[nn.Module]]


class Derived(nn.Module):
    """A module whose class was made from a class of timm; pickles refer to timm's class and to what derives from it."""

    _base: type[nn.Module]
    _derive: Deriving

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be found by its name.
        return _new, (type(self)._derive, type(self)._base), vars(self)


def _new(function: Deriving, base: type[nn.Module]) -> nn.Module:
    cls = function(base)
    return cls.__new__(cls)


def once_per_class(make: Deriving) -> Deriving:
    """Lets a module-level function make one class for each class of timm, and return it again afterwards."""
    made: dict[type[nn.Module], type[nn.Module]] = {}

    @functools.wraps(make)
    def class_for(base: type[nn.Module]) -> type[nn.Module]:
        if base not in made:
            made.setdefault(base, make(base))
        return made[base]

    return class_for


def derive(base: type[nn.Module], first: type[Derived], function: Deriving, **members: Any) -> type[nn.Module]:
    """Makes a class that puts ``first`` and ``members`` before a class of timm.

    Args:
        base: A class of timm.
        first: What the new class derives from besides.
        function: The function, decorated by `once_per_class`, that returns this class for ``base``.
        **members: Further attributes.
    """
    shared = {"__module__": first.__module__, "__doc__": base.__doc__, "_base": base, "_derive": staticmethod(function)}
    return type(f"Ubn{base.__name__}", (first, base), {**members, **shared})
