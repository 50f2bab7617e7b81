"""Patches other libraries with versions that handle UBN, and undoes the patches."""

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
    """Replaces functions in every imported module that references them, except in this package."""
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
        # Keeps the descriptor of a static or class method.
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
    """The result of :func:`install`. As a context manager, it undoes on exit what that call installed."""

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
    """Patches other libraries to handle UBN layers, both those already imported and those imported later.

    - timm: ``freeze_batch_norm_2d``, ``unfreeze_batch_norm_2d``, ``freeze``, ``unfreeze``, ``convert_sync_batchnorm``,
      ``convert_splitbn_model`` and ``distribute_bn``, wherever they have been imported.
    - torch: ``update_bn`` and ``SyncBatchNorm.convert_sync_batchnorm``.
    - Lightning: ``BaseFinetuning`` and ``StochasticWeightAveraging``; ``sync_batchnorm=True`` works through torch's
      function.
    - fastai: the norm options of ``Learner`` (``train_bn``, ``wd_bn_bias``), and ``BnFreeze``.
    - transformers: backbones of DETR and its variants are frozen through timm's ``freeze_batch_norm_2d``.
    - Opacus: its validator rejects UBN, and its fixer replaces UBN with GroupNorm.
    - thop, ptflops, calflops: :func:`multiply_adds` of each layer.

    Other layers are handled as before. Only references in a module's namespace are patched; those in object attributes
    or closures are not found.

    Repeated calls have no effect. ``ubn-zoo exec`` calls it for a script.

    Returns:
        A context manager that uninstalls on exit. If it is not used, the patches stay.
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
