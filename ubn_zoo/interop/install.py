"""Replace parts of other libraries by versions that handle UBN, and undo it."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

from .libraries import FUNCTIONS, LIBRARIES, Replacement, sync_of_torch

__all__ = ["Installation", "install", "uninstall"]

_MISSING = object()
_installed = False
_undo: list[Replacement] = []


def _replace_functions(pairs: Iterable[tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Replaces functions in every imported module that holds them, this package excepted."""
    new = {id(before): after for before, after in pairs}
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__package__}.") or not isinstance(space := getattr(module, "__dict__", None), dict):
            continue
        for key, value in list(space.items()):
            if id(value) in new:
                space[key] = new[id(value)]


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        if value is _MISSING:
            del owner[name]
        else:
            owner[name] = value
    else:
        setattr(owner, name, value)


def _apply(replacements: Iterable[Replacement]) -> None:
    for owner, name, value in replacements:
        # The descriptor itself, where it is a static or class method.
        space = owner if isinstance(owner, dict) else vars(owner)
        _undo.append((owner, name, space.get(name, _MISSING)))
        _put(owner, name, value)


def _adapt(module: Any) -> None:
    for pattern, replacements in LIBRARIES.items():
        if fnmatchcase(module.__name__, pattern):
            _apply(replacements(module))


class _Imports(importlib.abc.MetaPathFinder):
    """Adapts libraries that are imported after :func:`install`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fnmatchcase(fullname, pattern) for pattern in LIBRARIES):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if _installed:
                    _adapt(module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - mypy
        return spec


_imports = _Imports()


class Installation:
    """What :func:`install` returns. As a context manager it uninstalls on exit what that call installed."""

    def __init__(self, first: bool) -> None:
        self._first = first

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._first:
            uninstall()


def install() -> Installation:
    """Makes other libraries handle UBN layers too, whether they are imported already or later.

    - timm: ``freeze_batch_norm_2d``, ``unfreeze_batch_norm_2d``, ``freeze``, ``unfreeze``, ``convert_sync_batchnorm``,
      ``convert_splitbn_model`` and ``distribute_bn``, wherever they have been imported.
    - torch: ``update_bn`` and ``SyncBatchNorm.convert_sync_batchnorm``.
    - Lightning: ``BaseFinetuning`` and ``StochasticWeightAveraging``; ``sync_batchnorm=True`` by torch's function.
    - fastai: what ``Learner`` knows of norms (``train_bn``, ``wd_bn_bias``), and ``BnFreeze``.
    - transformers: the backbones of DETR and its relatives are frozen; ``freeze_batch_norm_2d`` by timm's function.
    - Opacus: its validator refuses UBN, and its fixer replaces it by GroupNorm.
    - thop, ptflops, calflops: :func:`multiply_adds` of each layer.

    For all other layers they do what they did before. References to functions of timm and torch that are held elsewhere
    than in a module's namespace (an attribute of an object, a closure) are not found.

    Calling it again changes nothing. ``ubn-zoo exec`` calls it for a script.

    Returns:
        A context manager that uninstalls on exit; without one the changes stay.
    """
    global _installed
    first, _installed = not _installed, True
    if first:
        _replace_functions(FUNCTIONS)
        _apply([sync_of_torch()])
        for name, module in list(sys.modules.items()):
            if module is not None and any(fnmatchcase(name, pattern) for pattern in LIBRARIES):
                _adapt(module)
        sys.meta_path.insert(0, _imports)
    return Installation(first)


def uninstall() -> None:
    """Undoes :func:`install`; does nothing if it was not called."""
    global _installed
    if _installed:
        sys.meta_path.remove(_imports)
        _replace_functions((after, before) for before, after in FUNCTIONS)
        while _undo:
            _put(*_undo.pop())
    _installed = False
