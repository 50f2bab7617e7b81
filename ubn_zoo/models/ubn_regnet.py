"""UBN twins of timm's ``regnet*`` (X, Y, Z, V): ``<name>_ubn`` for each with BatchNorm.

They are made by rule over the installed timm when this module is imported; docs/models.md lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ubn_zoo.models.registry import register_twins

if TYPE_CHECKING:
    from collections.abc import Callable

    from timm.models import DefaultCfg
    from torch import nn

    def __getattr__(name: str) -> Callable[..., nn.Module]: ...


__all__: list[str] = []

default_cfgs: dict[str, DefaultCfg] = {}

register_twins(__name__, "regnet*")
