"""Show one model.

Prints weights, license, input, recipe and metrics.

Examples:
    ubn-zoo info resnet50_ubn
    ubn-zoo info regnetx_002_ubn.cifar10 --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ubn_zoo.cli._text import figure, json_of, source_of
from ubn_zoo.hub.manifest import Metric
from ubn_zoo.models.catalog import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="a model or model.tag, as `ubn-zoo list` shows them")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the fields, one per line."""
    from ubn_zoo.models import catalog

    entry = catalog.describe(options.name)
    if options.json:
        print(json.dumps(json_of(entry), indent=2))
        return 0
    size, data = "x".join(str(side) for side in entry.input.size), entry.input
    lines = {
        "architecture": entry.architecture,
        "weights": _weights(entry),
        "source": source_of(entry) + (f", file {entry.file}" if entry.file else ""),
        "sha256": entry.sha256 or ("the Hub's, checked on load" if entry.source == "hub" else None),
        "parameters": f"{entry.params:,}",
        "classes": str(entry.num_classes),
        "input": f"{size}, {data.interpolation}, crop {data.crop_pct:g} ({data.crop_mode})",
        "mean, std": f"{_numbers(data.mean)}; {_numbers(data.std)}",
        "license": entry.license or "not stated by upstream",
        "data": entry.data,
        "origin": entry.origin or "not stated by upstream",
        "recipe": f"{entry.recipe.name} (sha256 {entry.recipe.sha256})" if entry.recipe else None,
    }
    print(entry.name)
    if entry.description:
        print(f"  {entry.description}")
    for label, value in lines.items():
        if value is not None:
            print(f"  {label:12}  {value}")
    for number, metric in enumerate(entry.metrics):
        print(f"  {'metrics' if not number else '':12}  {_measured(metric)}")
    loading = ", pretrained=True" if entry.pretrained else ""
    print(f'  {"load":12}  import timm, ubn_zoo; timm.create_model("{entry.name}"{loading})')
    return 0


def _weights(entry: Entry) -> str:
    if not entry.pretrained:
        return f"none{f' (tag {entry.tag})' if entry.tag else ''}"
    default = f"{entry.tag}, the default" if entry.default else entry.tag
    if entry.converted_from:
        return f"{default}; converted exactly from timm's {entry.converted_from} on load"
    return f"{default}; trained with UBN"


def _measured(metric: Metric) -> str:
    seeds = f", seeds {', '.join(map(str, metric.measured.seeds))}" if metric.measured.seeds else ""
    commit = f", commit {metric.measured.commit}" if metric.measured.commit else ""
    return f"{figure(metric)}, by `{metric.measured.command}`{seeds}{commit}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
