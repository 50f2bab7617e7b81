"""Check checkpoints.

Checks the hash, size, keys, shapes, dtypes and finite values, and runs a forward pass.

Examples:
    ubn-zoo verify
    ubn-zoo verify regnetx_002_ubn.cifar10
    ubn-zoo verify --all
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="model or model.tag (default: bundled and cached checkpoints)"
    )
    parser.add_argument("--all", action="store_true", help="also download and check the manifest's Hub checkpoints")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache folder (default: huggingface_hub's)")


def run(options: argparse.Namespace) -> int:
    """Print one line per checkpoint; fail if any check fails."""
    from ubn_zoo.hub.manifest import load_manifest
    from ubn_zoo.models import catalog
    from ubn_zoo.release import verify

    wanted = [catalog.describe(name) for name in options.names] if options.names else verify.present(options.cache_dir)
    if options.all:
        named = {entry.name for entry in wanted}
        wanted += [catalog.describe(record.id) for record in load_manifest() if record.id not in named]
    width = max((len(entry.name) for entry in wanted), default=0)
    failed = 0
    for finding in verify.verify(wanted, options.cache_dir):
        failed += finding.problem is not None
        size = "-" if finding.size is None else f"{finding.size / 1e6:.1f} MB"
        result = "ok" if finding.problem is None else f"FAILED  {finding.problem}"
        print(f"{finding.name:{width}}  {finding.source:7}  {size:>10}  {result}", flush=True)
    print(f"{len(wanted)} checked, {failed} failed")
    return 1 if failed else 0
