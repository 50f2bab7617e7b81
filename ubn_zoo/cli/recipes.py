"""List training recipes, or show one.

Examples:
    ubn-zoo recipes
    ubn-zoo recipes rsb_a2
    ubn-zoo recipes rsb_a2 --json
    ubn-zoo recipes --fields
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap

from ubn_zoo.cli._text import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to show, or a .yaml file")
    parser.add_argument("--fields", action="store_true", help="list all keys with type, default, values and meaning")
    parser.add_argument("--json", action="store_true", help="print all values as JSON, including defaults")


def run(options: argparse.Namespace) -> int:
    """Print the table, or a recipe's file."""
    from ubn_zoo.recipes.schema import fields, list_recipes, load_recipe, recipe_path

    if options.fields:
        if options.name is not None:
            options._error("--fields lists the keys of all recipes; omit NAME")
        keys = fields()
        if options.json:
            print(json.dumps([dataclasses.asdict(field) for field in keys], indent=2))
            return 0
        for field in keys:
            print(f"{field.key}  ({field.type}, default {field.default})" if field.default != "required" else field.key)
            for text in (field.meaning, f"valid: {field.valid}"):
                print(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
        return 0
    if options.name is not None:
        recipe = load_recipe(options.name)  # show only valid files
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
    print_table([("NAME", "MODEL", "EPOCHS", "BATCH", "OPTIMIZER", "EXPECTED"), *rows], right=(2, 3))
    return 0


def _brief(text: str) -> str:
    """First sentence, shortened to the column width."""
    return textwrap.shorten(text.partition(". ")[0], 60, placeholder="...")
