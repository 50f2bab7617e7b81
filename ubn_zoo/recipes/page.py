"""Generate the documentation page of recipes: ``python -m ubn_zoo.recipes.page docs/recipes.md``."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from ubn_zoo.recipes.schema import fields, list_recipes, load_recipe, recipe_path

__all__ = ["recipe_page"]

_PAGE = """\
# Recipes

<!-- Written by `python -m ubn_zoo.recipes.page docs/recipes.md`; edit ubn_zoo/recipes instead. -->

A recipe is a file with the settings of a training run. `ubn-zoo recipes` lists the recipes, `ubn-zoo recipes NAME`
prints one, and `ubn-zoo train --recipe NAME --set KEY=VALUE` changes a value, for example `--set norm=bn` for the
BatchNorm twin. The [keys](#keys) are explained below. Figures attributed to papers and other projects are for
BatchNorm; "not yet run" means that this project has no figures yet.
"""


def _introduction(text: str) -> str:
    """The comment at the start of a recipe's file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def recipe_page() -> str:
    """The recipes and their keys as a Markdown page."""
    names = list_recipes()
    text = [
        _PAGE,
        "| Recipe | Model | Data | Epochs | Batch | Optimizer | Peak rate |",
        "|---|---|---|---|---|---|---|",
    ]
    recipes = {name: load_recipe(name) for name in names}
    for name, recipe in recipes.items():
        cells = (f"[{name}](#{name})", recipe.model, recipe.dataset, recipe.epochs, recipe.batch_size)
        text.append(f"| {' | '.join(map(str, cells))} | {recipe.optimizer} | {recipe.lr:g} |")
    for name, recipe in recipes.items():
        text += [f"\n## {name}\n", _introduction(recipe_path(name).read_text(encoding="utf-8")) + "\n"]
        text += [f"- Command: `{recipe.command}`", f"- Hardware: {recipe.hardware}", f"- Time: {recipe.time}"]
        text += [f"- Expected: {recipe.expected}", f"- Source: {recipe.source}"]
    text += ["\n## Keys\n", "| Key | Type | Default | Valid | Meaning |", "|---|---|---|---|---|"]
    for field in fields():
        row = [f"`{field.key}`", f"`{field.type}`", f"`{field.default}`", field.valid, field.meaning]
        text.append(f"| {' | '.join(row).replace(' | None', ' or null')} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipe_page(), encoding="utf-8")
