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
        prefix: Starts the names of derived classes.
    """

    prefix = "Ubn"

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Further attributes of the class derived from ``base``."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        base: Any
        mixin, base = type(self).__bases__
        # The original class may have no name either: it can be derived itself, or belong to a traced graph.
        return _new, (mixin, *base.__new__(base).__reduce_ex__(protocol)[:2]), vars(self)


def _new(mixin: type[Derived], make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    cls = derive(mixin, type(make(*arguments)))
    return cls.__new__(cls)


# A class lives as long as its instances; every traced graph has a class of its own.
_classes: weakref.WeakValueDictionary[tuple[type[Derived], type[nn.Module]], type[nn.Module]]
_classes = weakref.WeakValueDictionary()


def derive(mixin: type[Derived], base: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that puts a mixin before ``base``, the same one for the same two."""
    key = mixin, base
    cls = _classes.get(key)
    if cls is None:
        # TorchScript takes the annotations of the first class that has any, and finds `base`'s constants there.
        annotations = next(filter(None, map(inspect.get_annotations, base.__mro__)), {})
        members = {"__module__": mixin.__module__, "__doc__": base.__doc__, "__annotations__": annotations}
        new = type(f"{mixin.prefix}{base.__name__}", (mixin, base), {**members, **mixin.members(base)})
        cls = _classes.setdefault(key, new)
    return cls
