"""The zoo's models and weights as a Markdown page: ``python -m ubn_zoo.models.table docs/models.md``."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs as arch_pretrained_cfgs

from ubn_zoo.models import FAMILIES
from ubn_zoo.models.registry import SUFFIX, architectures_without_twin

__all__ = ["markdown"]

_INTRODUCTION = """\
# Models

<!-- Written by `python -m ubn_zoo.models.table docs/models.md`; edit ubn_zoo/models/table.py instead. -->

{models} architectures of timm {version} with Unified Batch Normalization; {weights} of their tags have weights.

Each heading is the module name of a family: `timm.list_models(module="ubn_resnet")` lists its models.

Tags that start with `bn_` are weights of the BatchNorm sibling (the name without `_ubn`), downloaded from the Hub and
converted exactly, under the license listed here. Their Hub repository is that of the sibling, `timm/resnet50.a1_in1k`
for `resnet50_ubn.bn_a1_in1k`, unless the table names another. Other tags were trained with UBN. `pretrained=True` loads
the first tag of a model. Inputs are channels x height x width in pixels.
"""

_WITHOUT = """
## Architectures without a twin

The table groups timm's {count} other architectures by the norm layers found when each is built. It lists timm's modules
with the number of their architectures, or names where the module has twins too.

- BatchNorm2d: the architecture does not let its BatchNorm layers be replaced by another class.
  `ubn_zoo.convert_batchnorm(model)` converts such a model, but the zoo has no name, tags or converted weights for it.
- All others: the architecture has no BatchNorm2d, and UBN replaces no other normalization.

| Norm layers | Architectures |
|---|---|
"""


def _without_twin() -> str:
    groups = architectures_without_twin()
    text = _WITHOUT.format(count=sum(len(names) for modules in groups.values() for names in modules.values()))
    families = {family.source for family in FAMILIES}

    def listed(module: str, names: list[str]) -> str:
        if module in families:
            return ", ".join(names)
        count = len(timm.list_models(module=module))
        return f"{module} ({count})" if len(names) == count else f"{module} ({len(names)} of {count})"

    for norms, modules in groups.items():
        text += f"| {norms or 'none'} | {', '.join(listed(*item) for item in modules.items())} |\n"
    return text


def markdown() -> str:
    """The page, for the installed timm and the packaged manifest."""
    models = timm.list_models("*_ubn")
    text = [
        _INTRODUCTION.format(models=len(models), version=timm.__version__, weights=len(timm.list_pretrained("*_ubn")))
    ]
    for family in FAMILIES:
        name = family.module
        text += [
            f"\n## {name}\n",
            f"{family.title}\n",
            "| Model | Tag | Weights | Input | Classes | License |",
            "|---|---|---|---|---|---|",
        ]
        for model in timm.list_models(module=name):
            for full, cfg in arch_pretrained_cfgs(model).items():
                tag = full.partition(".")[2]
                usual = f"timm/{model.removesuffix(SUFFIX)}.{tag.removeprefix('bn_')}"
                hub = "Hub" if cfg.hf_hub_id == usual else cfg.hf_hub_id
                source = hub or ("in the package" if cfg.file else "none")
                size = "x".join(str(side) for side in cfg.input_size)
                text.append(f"| {model} | {tag} | {source} | {size} | {cfg.num_classes} | {cfg.license or ''} |")
    text.append(_without_twin())
    return "\n".join(text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
