"""Which architectures have a UBN twin and which weights each twin has, as entries of timm's registry.

An architecture has a twin if timm's entry point asks for BatchNorm as its norm layer. ``architectures.json`` lists
them for one release of timm; for other releases, architectures that are not in it are decided when the package is
imported, without building a model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import DefaultCfg, PretrainedCfg, register_model
from timm.models import get_arch_pretrained_cfgs as arch_pretrained_cfgs
from torch import nn

from ubn_zoo.hub.manifest import Record, load_manifest
from ubn_zoo.models.build import build_ubn_model, uses_batchnorm
from ubn_zoo.models.families import FAMILIES, Family
from ubn_zoo.models.weights import bundled_file, safetensors_filename

__all__ = [
    "SUFFIX",
    "TABLE",
    "architectures_without_twin",
    "default_cfg",
    "has_twin",
    "parameter_table",
    "register_families",
]

SUFFIX = "_ubn"
TABLE = Path(__file__).with_name("architectures.json")
_PAPER = (
    "Unified Batch Normalization: Identifying and Alleviating the Feature Condensation in Batch Normalization "
    "and a Unified Framework"
)


def _upstream_cfg(cfg: PretrainedCfg) -> PretrainedCfg:
    """The configuration of a sibling's weights: its repository's safetensors file, everything else as upstream."""
    filename = safetensors_filename(cfg.hf_hub_filename) if cfg.hf_hub_id else None
    # URLs point to upstream's pickles, which this zoo does not read.
    return dataclasses.replace(cfg, url=None, file=None, hf_hub_filename=filename)


def _native_cfg(record: Record, upstream: PretrainedCfg) -> PretrainedCfg:
    """The configuration of weights that were trained with UBN, from their record in the manifest."""
    bundled = record.source == "bundled"
    return PretrainedCfg(
        file=bundled_file(record) if bundled else None,
        hf_hub_id=None if bundled else f"{record.repo_id}@{record.revision}",
        hf_hub_filename=None if bundled else record.file,
        input_size=record.input.size,
        interpolation=record.input.interpolation,
        crop_pct=record.input.crop_pct,
        crop_mode=record.input.crop_mode,
        mean=record.input.mean,
        std=record.input.std,
        num_classes=record.num_classes,
        label_names=cast(Any, record.label_names),  # timm's annotation is that of one name
        pool_size=_pool_size(record, upstream),
        first_conv=upstream.first_conv,
        classifier=upstream.classifier,
        license=record.license,
        description=record.description,
        paper_name=_PAPER,
        paper_ids="arXiv:2311.15993",
    )


def _pool_size(record: Record, upstream: PretrainedCfg) -> tuple[int, ...] | None:
    if upstream.pool_size is None:
        return None
    # A power of two in these families; 176 pixels that become 6 were halved five times, each time rounded up.
    stride = 2 ** round(math.log2(upstream.input_size[-1] / upstream.pool_size[-1]))
    return tuple(-(-side // stride) for side in record.input.size[1:])


def default_cfg(upstream: str, records: tuple[Record, ...]) -> DefaultCfg:
    """All weights of one twin, the default first.

    Weights trained with UBN come before converted ones with the same number of classes, and are then the default.
    Weights for other classes (CIFAR-10, say) have a tag but do not change what ``pretrained=True`` loads, unless there
    are no others.

    Args:
        upstream: timm's name of the sibling.
        records: The manifest's records of the twin.
    """
    converted = {}
    for name, cfg in arch_pretrained_cfgs(upstream).items():
        tag = name.partition(".")[2]
        converted[f"bn_{tag}" if tag else "bn"] = _upstream_cfg(cfg)
    reference = next(iter(converted.values()), PretrainedCfg())
    native = {record.tag: _native_cfg(record, reference) for record in records}
    pretrained = any(cfg.has_weights for cfg in converted.values())
    first = [tag for tag, cfg in native.items() if not pretrained or cfg.num_classes == reference.num_classes]
    tags = [*first, *converted, *(tag for tag in native if tag not in first)]
    return DefaultCfg(tags=deque(tags), cfgs={**converted, **native}, is_pretrained=pretrained or bool(native))


def _entry_point(architecture: str, upstream: str, module: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_ubn_model(architecture, upstream, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = architecture
    create.__module__ = module
    create.__doc__ = (
        f"timm's ``{upstream}`` with Unified Batch Normalization.\n\n"
        f"Arguments are those of ``{upstream}``, and ``ubn_kwargs``, a dict of settings of all UBN layers; see\n"
        ":func:`ubn_zoo.models.build_ubn_model`.\n"
    )
    return create


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def parameter_table() -> dict[str, dict[str, int]]:
    """Parameters of every twin by number of classes, as the generated table has them."""
    return dict(_table()["parameters"])


def architectures_without_twin() -> dict[str, dict[str, list[str]]]:
    """The other architectures of timm, by the classes of norm layers in them and by module, from the same table."""
    return dict(_table()["without"])


def has_twin(upstream: str) -> bool:
    """Whether an architecture of timm has a UBN twin.

    Args:
        upstream: timm's name, without a tag, of an architecture in a module of `FAMILIES`.
    """
    if upstream + SUFFIX in _table()["parameters"]:
        return True
    return bool(_table()["timm"] != timm.__version__ and uses_batchnorm(upstream))


def _register_family(family: Family, names: list[str]) -> types.ModuleType:
    path = f"{__package__}.{family.module}"
    home: Any = types.ModuleType(path, f"UBN twins of {family.title}: ``<name>{SUFFIX}`` of each with BatchNorm.")
    home.__all__ = []
    home.default_cfgs = {}
    # timm looks an entry point's module up by its name.
    sys.modules[path] = home
    setattr(sys.modules[__package__], family.module, home)
    for upstream in names:
        architecture = upstream + SUFFIX
        home.default_cfgs[architecture] = default_cfg(upstream, load_manifest().find(architecture=architecture))
        setattr(home, architecture, register_model(_entry_point(architecture, upstream, path)))
    return home


def register_families() -> tuple[types.ModuleType, ...]:
    """Registers a twin ``<name>_ubn`` of each BatchNorm architecture of the installed timm.

    Returns:
        One module for each row of `FAMILIES` that the installed timm has, with the entry points as attributes and
        their weights as ``default_cfgs``.
    """
    names: dict[str, list[str]] = {}
    sources = {family.source for family in FAMILIES}
    for upstream in timm.list_models(exclude_filters=f"*{SUFFIX}"):
        source = timm.model_entrypoint(upstream).__module__.rpartition(".")[2]
        if source in sources and has_twin(upstream):
            names.setdefault(source, []).append(upstream)
    return tuple(_register_family(family, names[family.source]) for family in FAMILIES if family.source in names)
