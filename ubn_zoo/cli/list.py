"""List models and their weights.

Shows every model with its default weights, plus all weights trained with UBN.

Examples:
    ubn-zoo list
    ubn-zoo list 'resnet*' --tags
    ubn-zoo list mobilenetv3 --pretrained --json
"""

from __future__ import annotations

import argparse
import json

from ubn_zoo.cli._text import figure, json_of, print_table, source_of
from ubn_zoo.errors import UnknownModelError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    text = "part of a name, or a wildcard pattern such as 'resnet*' (quoted)"
    parser.add_argument("filter", nargs="?", default="*", metavar="FILTER", help=text)
    parser.add_argument("--tags", action="store_true", help="list every set of weights")
    parser.add_argument("--pretrained", action="store_true", help="omit models without weights")
    parser.add_argument("--json", action="store_true", help="print all fields as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from ubn_zoo.models import catalog

    found = catalog.entries(options.filter, tags=options.tags, pretrained=options.pretrained)
    if options.json:
        print(json.dumps([json_of(entry) for entry in found], indent=2))
        return 0
    if not found:
        hint = catalog.similar_names(options.filter.strip("*"))
        raise UnknownModelError(f"no model matches {options.filter!r}; {hint}")
    rows = [
        (
            entry.architecture,
            entry.tag or "-",
            f"{entry.params / 1e6:.2f} M",
            source_of(entry),
            ", ".join(figure(metric) for metric in entry.metrics) or "-",
        )
        for entry in found
    ]
    print_table([("NAME", "TAG", "PARAMS", "SOURCE", "METRICS"), *rows], right=(2,))
    return 0
