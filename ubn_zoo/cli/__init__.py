"""The command ``ubn-zoo``: what is in the zoo, what is known of one model, recipes, checkpoints, the quickstart.

Exit codes: 0 done, 1 it failed or nothing was found, 2 the command line is wrong, 130 interrupted. Errors go to the
standard error stream, one message, no traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ubn_zoo import __version__
from ubn_zoo.cli._messages import in_options
from ubn_zoo.errors import UbnZooError, UnknownModelError
from ubn_zoo.hub.manifest import Metric, load_manifest
from ubn_zoo.models import catalog as catalog
from ubn_zoo.models.catalog import Entry
from ubn_zoo.recipes.schema import list_recipes, load_recipe, recipe_path
from ubn_zoo.release import convert, verify
from ubn_zoo.release.upload import publish

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "quickstart":
        # Reads its own arguments, so that `python -m ubn_zoo.cli.quickstart` is the same command.
        from ubn_zoo.cli import quickstart

        return _guarded(lambda: quickstart.main(rest), options)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command: Callable[[argparse.Namespace], int] = options.run
    return _guarded(lambda: command(options), options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ubn-zoo", description="Models with Unified Batch Normalization for timm.")
    parser.add_argument("--version", action="version", version=f"ubn-zoo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "list", help="list models", description="List models with their default weights, and weights trained with UBN."
    )
    listing.add_argument(
        "filter",
        nargs="?",
        default="*",
        metavar="FILTER",
        help="part of a name, or a wildcard such as 'resnet*' (quoted)",
    )
    listing.add_argument("--tags", action="store_true", help="list every set of weights")
    listing.add_argument("--pretrained", action="store_true", help="leave out models without weights")
    listing.add_argument("--json", action="store_true", help="print JSON with everything that is known")
    listing.set_defaults(run=_list)

    info = commands.add_parser("info", help="show one model", description="Show all that is known of a model.")
    info.add_argument("name", metavar="NAME", help="a model or model.tag, as `ubn-zoo list` shows them")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    text = "list recipes of training runs, or show one"
    recipes = commands.add_parser("recipes", help=text, description=f"{text.capitalize()}.")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe whose file is shown, or a .yaml file")
    recipes.add_argument("--json", action="store_true", help="print JSON with all values, defaults included")
    recipes.set_defaults(run=_recipes)

    text = "bring checkpoints into the cache"
    fetching = commands.add_parser("download", help=text, description=f"{text.capitalize()} and print their paths.")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="a model or model.tag")
    fetching.set_defaults(run=_download)

    text = "check checkpoints: hash, size, exact keys, shapes and dtypes, finite values, a forward pass"
    checking = commands.add_parser("verify", help="check checkpoints", description=f"{text.capitalize()}.")
    checking.add_argument("names", nargs="*", metavar="NAME", help="models or model.tags; default: all that are here")
    checking.add_argument("--all", action="store_true", help="also fetch and check what the manifest has on the Hub")
    checking.set_defaults(run=_verify)

    text = "write a UBN safetensors file from weights in another format"
    converting = commands.add_parser("convert", help=text, description=f"{text.capitalize()}.")
    converting.add_argument("name", metavar="NAME", help="a model or model.tag, whose weights are converted")
    converting.add_argument("--checkpoint", metavar="FILE", help="convert this file instead: safetensors or torch's")
    converting.add_argument("--num-classes", type=int, metavar="N", help="classes of the file, if not the model's")
    converting.add_argument("--output", metavar="FILE", help="by default NAME.safetensors in this folder")
    converting.add_argument("--force", action="store_true", help="replace the file if it exists")
    converting.set_defaults(run=_convert)

    text = "publish a checkpoint on the Hub and record it in the manifest"
    publishing = commands.add_parser("publish", help=text, description=f"{text.capitalize()}.")
    publishing.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, folder in timm's format, file of `convert`, or name of a manifest record",
    )
    publishing.add_argument("--repo", required=True, metavar="OWNER/NAME", help="Hub repository, made if need be")
    publishing.add_argument("--tag", help="name of these weights in model.tag, if not the checkpoint's")
    publishing.add_argument("--private", action="store_true", help="in a private repository")
    publishing.add_argument("--dry-run", action="store_true", help="check and show only; nothing is sent or written")
    publishing.add_argument("--license", metavar="ID", help="of the weights, for example apache-2.0")
    publishing.add_argument("--dataset", metavar="NAME", help="data of training and measurement, for example CIFAR-10")
    publishing.add_argument("--split", help="part of it that a run was measured on; by default what the run recorded")
    publishing.add_argument("--recipe", metavar="FILE", help="recipe of the run, where the checkpoint has none")
    publishing.add_argument("--metrics", metavar="FILE", help="metrics.csv of the run, or a .json list of metrics")
    publishing.add_argument("--description", metavar="TEXT", help="one sentence for people")
    publishing.add_argument("--base-model", metavar="OWNER/NAME", help="Hub model that training started from")
    publishing.add_argument("--manifest", metavar="FILE", help="by default the package's weights_manifest.json")
    publishing.add_argument("--remeasure", metavar="DATA", help="measure the files on this folder of the data first")
    publishing.add_argument(
        "--replace", action="store_true", help="replace other weights of this name, files of others"
    )
    publishing.set_defaults(run=_publish)
    for command in (fetching, checking, converting, publishing):
        command.add_argument("--cache-dir", metavar="DIR", help="cache folder, by default huggingface_hub's")

    text = "fine-tune a pretrained model on real images"
    commands.add_parser("quickstart", help=text, add_help=False)
    return parser


def _guarded(run: Callable[[], int], options: argparse.Namespace) -> int:
    try:
        code = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python would complain again when it closes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UbnZooError, OSError, ValueError) as error:
        print(f"ubn-zoo: {in_options(str(error), options)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ubn-zoo: interrupted", file=sys.stderr)
        return 130
    return code


def _list(options: argparse.Namespace) -> int:
    found = catalog.entries(options.filter, tags=options.tags, pretrained=options.pretrained)
    if options.json:
        print(json.dumps([_json(entry) for entry in found], indent=2))
        return 0
    if not found:
        hint = catalog.similar_names(options.filter.strip("*"))
        raise UnknownModelError(f"no model matches {options.filter!r}; {hint}")
    rows = [
        (entry.architecture, entry.tag or "-", _millions(entry.params), _source(entry), _metrics(entry) or "-")
        for entry in found
    ]
    _print_table([("NAME", "TAG", "PARAMS", "SOURCE", "METRICS"), *rows], numbers=(2,))
    return 0


def _info(options: argparse.Namespace) -> int:
    entry = catalog.describe(options.name)
    if options.json:
        print(json.dumps(_json(entry), indent=2))
        return 0
    size, data = "x".join(str(side) for side in entry.input.size), entry.input
    lines = {
        "architecture": entry.architecture,
        "weights": _weights(entry),
        "source": _source(entry) + (f", file {entry.file}" if entry.file else ""),
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


def _recipes(options: argparse.Namespace) -> int:
    if options.name is not None:
        recipe = load_recipe(options.name)  # a file that is not valid is not shown as if it were
        if options.json:
            print(json.dumps({"name": options.name, **dataclasses.asdict(recipe)}, indent=2))
        else:
            print(recipe_path(options.name).read_text(encoding="utf-8"), end="")
        return 0
    found = {name: load_recipe(name) for name in list_recipes()}
    if options.json:
        print(json.dumps([{"name": name, **dataclasses.asdict(recipe)} for name, recipe in found.items()], indent=2))
        return 0
    rows = [
        (name, recipe.model, str(recipe.epochs), str(recipe.batch_size), recipe.optimizer, _brief(recipe.expected))
        for name, recipe in found.items()
    ]
    _print_table([("NAME", "MODEL", "EPOCHS", "BATCH", "OPTIMIZER", "EXPECTED"), *rows], numbers=(2, 3))
    return 0


def _download(options: argparse.Namespace) -> int:
    for entry in [catalog.describe(name) for name in options.names]:
        print(verify.download(entry, options.cache_dir), flush=True)
    return 0


def _verify(options: argparse.Namespace) -> int:
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


def _convert(options: argparse.Namespace) -> int:
    output = options.output or f"{catalog.describe(options.name).name}.safetensors"
    convert.convert(
        options.name,
        output,
        checkpoint=options.checkpoint,
        num_classes=options.num_classes,
        force=options.force,
        cache_dir=options.cache_dir,
    )
    print(output)
    return 0


def _publish(options: argparse.Namespace) -> int:
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
        print(f"\n{done.card}\n{record.id}: may be published in {options.repo}; nothing was sent or written")
        return 0
    state = "a new commit" if done.committed else "unchanged, no new commit"
    book = "recorded" if done.recorded else "recorded before"
    print(f"{record.id}: {options.repo}: {state}; {book} at {record.revision or record.file}")
    return 0


def _print_table(rows: Sequence[Sequence[str]], numbers: Collection[int]) -> None:
    """Print rows in aligned columns, those of numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    template = "  ".join(f"{{:{'>' if column in numbers else '<'}{width}}}" for column, width in enumerate(widths))
    for row in rows:
        print(template.format(*row).rstrip())


def _brief(text: str) -> str:
    """The first sentence of a text, cut to a table's column."""
    return textwrap.shorten(text.partition(". ")[0], 60, placeholder="...")


def _json(entry: Entry) -> dict[str, Any]:
    return {"name": entry.name, **dataclasses.asdict(entry)}


def _millions(params: int) -> str:
    return f"{params / 1e6:.2f} M"


def _source(entry: Entry) -> str:
    if entry.source == "hub":
        return f"hub {entry.repository}"
    return "bundled" if entry.source == "bundled" else "no weights"


def _weights(entry: Entry) -> str:
    if not entry.pretrained:
        return f"none{f' (tag {entry.tag})' if entry.tag else ''}"
    default = f"{entry.tag}, the default" if entry.default else entry.tag
    if entry.converted_from:
        return f"{default}; those of timm's {entry.converted_from}, converted on load to the same function"
    return f"{default}; trained with UBN"


def _metrics(entry: Entry) -> str:
    return ", ".join(_figure(metric) for metric in entry.metrics)


def _figure(metric: Metric) -> str:
    return f"{metric.name} {metric.value:g} ({metric.dataset} {metric.split})"


def _measured(metric: Metric) -> str:
    seeds = f", seeds {', '.join(map(str, metric.measured.seeds))}" if metric.measured.seeds else ""
    commit = f", commit {metric.measured.commit}" if metric.measured.commit else ""
    return f"{_figure(metric)}, by `{metric.measured.command}`{seeds}{commit}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
