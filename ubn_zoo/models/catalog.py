"""Lists the models and weights of the zoo and describes each of them.

``python -m ubn_zoo.models.catalog`` rewrites ``architectures.json``: the twins with their parameter counts, and why the
other architectures of timm have none. It builds every architecture, which takes minutes.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from timm.models import get_arch_pretrained_cfgs as arch_pretrained_cfgs
from torch import nn

from ubn_zoo.errors import UnknownModelError
from ubn_zoo.hub.manifest import InputSpec, Metric, RecipeReference, Record, load_manifest
from ubn_zoo.models.build import build_ubn_model, uses_batchnorm
from ubn_zoo.models.families import FAMILIES
from ubn_zoo.models.registry import SUFFIX, TABLE, parameter_table

__all__ = [
    "Entry",
    "UnknownModelError",
    "architecture_table",
    "count_parameters",
    "describe",
    "entries",
    "similar_names",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model of the zoo with one of its sets of weights, or with none.

    Attributes:
        architecture: Name of the model.
        tag: Name of the weights; empty if the model has none.
        default: Whether ``pretrained=True`` without a tag loads these.
        params: Number of parameters, with the classifier of `num_classes`.
        source: ``bundled`` (in this package), ``hub``, or ``none``.
        repository: Hub repository, with ``@revision`` if pinned; None if not from the Hub.
        file: The file's name; None without weights.
        sha256: Its recorded hash; None where the Hub's own is relied on.
        converted_from: The BatchNorm model whose weights are converted on load; None for weights trained with UBN.
        input: Size and preprocessing of images.
        num_classes: Number of outputs of the classifier.
        license: The weights' license; None if upstream states none.
        data: What they were trained on; None if upstream states none.
        origin: Who trained them or where they come from; None if upstream states none.
        recipe: The recipe of the training run; None for weights that this project did not train.
        metrics: Measured with these weights.
        description: One sentence; None if there is none.
    """

    architecture: str
    tag: str
    default: bool
    params: int
    source: str
    repository: str | None
    file: str | None
    sha256: str | None
    converted_from: str | None
    input: InputSpec
    num_classes: int
    license: str | None
    data: str | None
    origin: str | None
    recipe: RecipeReference | None
    metrics: tuple[Metric, ...]
    description: str | None

    @property
    def name(self) -> str:
        """The name that ``timm.create_model`` takes."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def address(self) -> tuple[str, str | None] | None:
        """Hub repository and revision, None for the main branch; None if not from the Hub."""
        if self.repository is None:
            return None
        repo_id, _, revision = self.repository.partition("@")
        return repo_id, revision or None

    @property
    def pretrained(self) -> bool:
        """Whether there are weights."""
        return self.source != "none"


def entries(pattern: str = "*", *, tags: bool = False, pretrained: bool = False) -> list[Entry]:
    """List the zoo.

    Args:
        pattern: Shell-style wildcard for names, with or without tag; text without wildcards that is not the full name
            of a model matches anywhere in a name.
        tags: Whether to list all sets of weights, instead of each model's default and those trained with UBN.
        pretrained: Whether to omit models and tags without weights.

    Returns:
        Entries in timm's order of names, the default weights of a model first.
    """
    if not any(sign in pattern for sign in "*?[") and pattern.partition(".")[0] not in _architectures():
        pattern = f"*{pattern}*"
    recorded = {record.id for record in load_manifest()}
    found = []
    for architecture in _architectures():
        named = arch_pretrained_cfgs(architecture)
        default = next(iter(named))
        for name in named:
            shown = tags or name == default or name in recorded
            matches = fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(architecture, pattern)
            if shown and matches and (named[name].has_weights or not pretrained):
                found.append(_entry(name, named))
    return found


def describe(name: str) -> Entry:
    """Find one model of the zoo.

    Args:
        name: A model, for its default weights, or ``model.tag``.

    Raises:
        UnknownModelError: There is no such model or tag; the message lists similar names.
    """
    architecture, _, tag = name.partition(".")
    if architecture not in _architectures():
        raise UnknownModelError(f"there is no model {architecture!r} in the zoo; {similar_names(architecture)}")
    named = arch_pretrained_cfgs(architecture)
    if not tag:
        name = next(iter(named))
    if name not in named:
        close = difflib.get_close_matches(name, named, n=3) or list(named)[:3]
        hint = f"similar: {', '.join(close)}; `ubn-zoo list --tags {architecture}` shows all"
        raise UnknownModelError(f"{architecture} has no weights with the tag {tag!r}; {hint}")
    return _entry(name, named)


def similar_names(name: str) -> str:
    """Say which models have a name like this one; the sibling of the same name first."""
    known = _architectures()
    similar = difflib.get_close_matches(name, known, n=5)
    if name + SUFFIX in known:
        similar.insert(0, name + SUFFIX)
    return f"similar: {', '.join(dict.fromkeys(similar))}" if similar else "`ubn-zoo list` shows all"


def count_parameters(architecture: str, num_classes: int) -> int:
    """Count a model's parameters: from the table or, if the model is not in it, by building the model without memory.

    Args:
        architecture: Name of the model.
        num_classes: Outputs of its classifier.
    """
    known = parameter_table().get(architecture, {}).get(str(num_classes))
    return _built_parameters(architecture.removesuffix(SUFFIX), num_classes) if known is None else known


def architecture_table() -> dict[str, Any]:
    """Build every architecture of timm without memory: count the twins' parameters, and find out why others have none.

    Parameters are counted for the numbers of classes of converted weights; the manifest has the counts of others. The
    architectures without a twin are grouped by reason and by module of timm.
    """
    sources = {family.source for family in FAMILIES}
    counts: dict[str, dict[str, int]] = {}
    reasons: dict[str, dict[str, list[str]]] = {}
    for upstream in timm.list_models(exclude_filters=f"*{SUFFIX}"):
        source = timm.model_entrypoint(upstream).__module__.rpartition(".")[2]
        if source in sources and uses_batchnorm(upstream):
            numbers = sorted({cfg.num_classes for cfg in arch_pretrained_cfgs(upstream).values()})
            counts[upstream + SUFFIX] = {str(number): _built_parameters(upstream, number) for number in numbers}
        else:
            reasons.setdefault(normalization(upstream), {}).setdefault(source, []).append(upstream)
    return {"timm": timm.__version__, "parameters": counts, "without": dict(sorted(reasons.items()))}


def normalization(upstream: str) -> str:
    """Name the classes of norm layers in an architecture of timm, ``BatchNorm2d`` alone if it has any.

    Args:
        upstream: Architecture, without a tag. It is built without memory.
    """
    with torch.device("meta"):
        modules = list(timm.create_model(upstream).modules())
    if any(isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) for module in modules):
        return "BatchNorm2d"
    # Blocks with "Norm" in their names consist of other modules; norms with an activation have a weight besides it.
    own = (m for m in modules if not any(m.children()) or isinstance(getattr(m, "weight", None), nn.Parameter))
    return ", ".join(sorted({type(m).__name__ for m in own if "Norm" in type(m).__name__}))


def _built_parameters(upstream: str, num_classes: int) -> int:
    # A twin that is not registered yet has no configuration of its own.
    cfg = timm.get_pretrained_cfg(upstream)
    with torch.device("meta"):
        model = build_ubn_model(upstream + SUFFIX, upstream, pretrained_cfg=cfg, num_classes=num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


def _architectures() -> list[str]:
    return timm.list_models(f"*{SUFFIX}")


def _entry(name: str, named: dict[str, PretrainedCfg]) -> Entry:
    """The entry of one of a model's configurations, given all of them by name, the default first."""
    architecture, _, tag = name.partition(".")
    records = load_manifest().find(architecture=architecture, tag=tag)
    default = name == next(iter(named))
    return _recorded(records[0], default) if records else _converted(architecture, tag, named[name], default)


def _recorded(record: Record, default: bool) -> Entry:
    return Entry(
        architecture=record.architecture,
        tag=record.tag,
        default=default,
        params=record.params,
        source=record.source,
        repository=f"{record.repo_id}@{record.revision}" if record.source == "hub" else None,
        file=record.file,
        sha256=record.sha256,
        converted_from=None,
        input=record.input,
        num_classes=record.num_classes,
        license=record.license,
        data=record.origin.data,
        origin=record.origin.trained,
        recipe=record.recipe,
        metrics=record.metrics,
        description=record.description,
    )


def _converted(architecture: str, tag: str, cfg: PretrainedCfg, default: bool) -> Entry:
    """A sibling's weights, which are converted on load; None where timm's configuration has no value."""
    upstream = architecture.removesuffix(SUFFIX) + tag.removeprefix("bn").replace("_", ".", 1)
    return Entry(
        architecture=architecture,
        tag=tag,
        default=default,
        params=count_parameters(architecture, cfg.num_classes),
        source="hub" if cfg.has_weights else "none",
        repository=cfg.hf_hub_id,
        file=cfg.hf_hub_filename if cfg.has_weights else None,
        sha256=None,
        converted_from=upstream if cfg.has_weights else None,
        input=InputSpec(
            size=cfg.input_size,
            mean=tuple(cfg.mean),
            std=tuple(cfg.std),
            interpolation=cfg.interpolation,
            crop_pct=cfg.crop_pct,
            crop_mode=cfg.crop_mode,
        ),
        num_classes=cfg.num_classes,
        license=cfg.license,
        data=None,
        origin=cfg.origin_url,
        recipe=None,
        metrics=(),
        description=cfg.description,
    )


if __name__ == "__main__":
    TABLE.write_text(json.dumps(architecture_table(), indent=1) + "\n", encoding="utf-8")
