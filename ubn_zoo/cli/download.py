"""Download checkpoints into the cache.

Prints the paths. Every file is pinned to a revision and checked against its hash.

Examples:
    ubn-zoo download resnet50_ubn
    ubn-zoo download resnet18_ubn mobilenetv3_large_100_ubn --cache-dir weights
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="a model or model.tag")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache folder (default: huggingface_hub's)")


def run(options: argparse.Namespace) -> int:
    """Download the checkpoints and print one path per name."""
    from ubn_zoo.models import catalog
    from ubn_zoo.release import verify

    for entry in [catalog.describe(name) for name in options.names]:
        print(verify.download(entry, options.cache_dir), flush=True)
    return 0
