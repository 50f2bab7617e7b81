"""Publish a checkpoint on the Hub.

Uploads weights, configuration, model card, recipe and metrics in one commit, and records the checkpoint in the
manifest. Repeating the command is safe.

Examples:
    ubn-zoo publish runs/flowers --repo me/resnet50_ubn.flowers --license apache-2.0 --dataset Flowers --dry-run
    ubn-zoo publish runs/flowers --repo me/resnet50_ubn.flowers --license apache-2.0 --dataset Flowers
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    text = "folder of a run, folder in timm's format, file from `ubn-zoo convert`, or name of a manifest record"
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=text)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="Hub repository; created if missing")
    parser.add_argument("--tag", help="tag of these weights in model.tag (default: the checkpoint's)")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--dry-run", action="store_true", help="only check and show; sends and writes nothing")
    parser.add_argument("--license", metavar="ID", help="license of the weights, for example apache-2.0")
    parser.add_argument("--dataset", metavar="NAME", help="training and test data, for example CIFAR-10")
    parser.add_argument("--split", help="split used to evaluate the run (default: the recorded split)")
    parser.add_argument("--recipe", metavar="FILE", help="recipe of the run, if the checkpoint has none")
    parser.add_argument("--metrics", metavar="FILE", help="metrics.csv of the run, or a .json list of metrics")
    parser.add_argument("--description", metavar="TEXT", help="one sentence for the model card")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="Hub model that training started from")
    parser.add_argument("--manifest", metavar="FILE", help="manifest (default: the package's weights_manifest.json)")
    parser.add_argument("--remeasure", metavar="DATA", help="first evaluate the files on this data folder")
    parser.add_argument("--replace", action="store_true", help="replace other weights with this name, and other files")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache folder (default: huggingface_hub's)")


def run(options: argparse.Namespace) -> int:
    """Publish, and print the files that were uploaded or, with --dry-run, would be."""
    from ubn_zoo.release.upload import publish

    done = publish(
        options.source,
        options.repo,
        tag=options.tag,
        private=options.private,
        dry_run=options.dry_run,
        license=options.license,
        dataset=options.dataset,
        split=options.split,
        recipe=options.recipe,
        metrics=options.metrics,
        description=options.description,
        base_model=options.base_model,
        manifest=options.manifest,
        replace=options.replace,
        remeasure=options.remeasure,
        cache_dir=options.cache_dir,
    )
    record = done.record
    for file in done.files:
        print(f"{file.name:20}  {len(file.content):>11,}  {file.sha256}")
    if options.dry_run:
        print(f"\n{done.card}\n{record.id}: ready to publish in {options.repo}; nothing was sent or written")
        return 0
    state = "a new commit" if done.committed else "unchanged, no new commit"
    noted = "recorded" if done.recorded else "recorded before"
    print(f"{record.id}: {options.repo}: {state}; {noted} at {record.revision or record.file}")
    return 0
