"""Classes that put a mixin before a model's class at run time; their instances can be copied, pickled and scripted."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import nn

__all__ = ["Derived", "derive"]


class Derived(nn.Module):
    """Base of the mixins; a pickle refers to the mixin and the original class, because the derived one has no name.

    Attributes:
        prefix: Prefix of the names of derived classes.
    """

    prefix = "Ubn"

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Additional attributes of the class derived from ``base``."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        base: Any
        mixin, base = type(self).__bases__
        # The original class may not be importable either: it can be derived itself, or belong to a traced graph.
        return _new, (mixin, *base.__new__(base).__reduce_ex__(protocol)[:2]), vars(self)


def _new(mixin: type[Derived], make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    cls = derive(mixin, type(make(*arguments)))
    return cls.__new__(cls)


# Cached classes live only as long as their instances, because every traced graph creates a new class.
_classes: weakref.WeakValueDictionary[tuple[type[Derived], type[nn.Module]], type[nn.Module]]
_classes = weakref.WeakValueDictionary()


def derive(mixin: type[Derived], base: type[nn.Module]) -> type[nn.Module]:
    """Return the class that puts a mixin before ``base``; repeated calls return the same class."""
    key = mixin, base
    cls = _classes.get(key)
    if cls is None:
        # TorchScript takes the annotations of the first class that has any, and finds `base`'s constants there.
        annotations = next(filter(None, map(inspect.get_annotations, base.__mro__)), {})
        members = {"__module__": mixin.__module__, "__doc__": base.__doc__, "__annotations__": annotations}
        new = type(f"{mixin.prefix}{base.__name__}", (mixin, base), {**members, **mixin.members(base)})
        cls = _classes.setdefault(key, new)
    return cls
