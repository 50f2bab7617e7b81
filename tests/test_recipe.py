"""Recipes: what is valid is read exactly, everything else is refused with the reason."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import timm

import ubn_zoo
from ubn_zoo.recipe import (
    Recipe,
    RecipeError,
    apply_settings,
    decisive_settings,
    dump_recipe,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_path,
    recipe_sha256,
)

MINIMAL = """
source: here
command: run it
hardware: any
time: a second
expected: nothing
model: resnet10t
num_classes: 3
img_size: 32
mean: [0.5, 0.5, 0.5]
std: [0.25, 0.25, 0.25]
epochs: 2
lr: 0.1
"""


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_of_the_package_are_valid_and_name_models_of_the_zoo(name: str) -> None:
    recipe = load_recipe(name)
    assert timm.is_model(f"{recipe.model}_ubn")
    for key in ("source", "command", "hardware", "time", "expected"):
        assert getattr(recipe, key).strip()
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_open_with_what_they_are(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    keys = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    assert keys[:5] == ["source", "command", "hardware", "time", "expected"]


def test_defaults_and_values() -> None:
    recipe = parse_recipe(MINIMAL)
    assert recipe.norm == "ubn"
    assert recipe.mean == (0.5, 0.5, 0.5)
    assert recipe.ema_decay is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0  # type: ignore[misc]


def test_exponents_without_a_point_are_numbers() -> None:
    assert parse_recipe(MINIMAL.replace("lr: 0.1", "lr: 5e-4")).lr == 5e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lr: 0.1", "learning_rate: 0.1"), "learning_rate: unknown key; .*valid: source, command, .*lr"),
        (("lr: 0.1", "lr: 0.1\nepoch: 3"), "epoch: unknown key; did you mean 'epochs'"),
        (("lr: 0.1\n", ""), "missing: lr; a recipe needs at least"),
        (("lr: 0.1", "lr: 0.1\nlr: 0.2"), "lr: the key occurs twice"),
        (("lr: 0.1", "lr: fast"), "lr: received 'fast'; valid: a finite number"),
        (("lr: 0.1", "lr: .nan"), "lr: received nan; valid: a finite number"),
        (("lr: 0.1", "lr: -1"), "lr: received -1.0; valid: from 1e-12"),
        (("epochs: 2", "epochs: 2.5"), "epochs: received 2.5; valid: a whole number"),
        (("epochs: 2", "epochs: true"), "epochs: received True; valid: a whole number"),
        (("epochs: 2", "epochs: 2\nwarmup_epochs: 2"), "warmup_epochs: received 2.0; valid: less than epochs, 2"),
        (("epochs: 2", "epochs: 2\nnorm: batch"), "norm: received 'batch'; valid: one of ubn, bn, rbn, bnet"),
        (("epochs: 2", "epochs: 2\noptimizer: adam"), "optimizer: received 'adam'; valid: one of sgd, adamw"),
        (("epochs: 2", "epochs: 2\npretrained: 1"), "pretrained: received 1; valid: true or false"),
        (("epochs: 2", "epochs: 2\npretrained_tag: x"), "pretrained_tag: received 'x'; valid: null"),
        (("model: resnet10t", "model: resnet10t_ubn"), "model: .*'resnet10t'"),
        (("model: resnet10t", "model: ''"), "model: received ''; valid: a text that is not empty"),
        (("mean: [0.5, 0.5, 0.5]", "mean: [0.5]"), r"mean: received \[0.5\]; valid: three numbers"),
        (("std: [0.25, 0.25, 0.25]", "std: [0.0, 1, 1]"), "std: received 0.0; valid: from 1e-06"),
        (("std: [0.25, 0.25, 0.25]", "std: 0.25"), "std: received 0.25; valid: a list of finite numbers"),
    ],
)
def test_what_is_not_valid_is_refused_with_the_reason(change: tuple[str, str], message: str) -> None:
    assert change[0] in MINIMAL
    with pytest.raises(RecipeError, match=message):
        parse_recipe(MINIMAL.replace(*change))


@pytest.mark.parametrize("text", ["", "- 1", "just text", "a: [", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_records_made_in_python_are_checked_too() -> None:
    with pytest.raises(RecipeError, match="batch_size: received 1; valid: from 2"):
        dataclasses.replace(parse_recipe(MINIMAL), batch_size=1)
    with pytest.raises(RecipeError, match=r"seed: received 0\.5"):
        dataclasses.replace(parse_recipe(MINIMAL), seed=0.5)  # type: ignore[arg-type]


def test_settings_change_values_as_the_file_would() -> None:
    recipe = apply_settings(parse_recipe(MINIMAL), ["epochs=5", "lr=1e-3", "mean=[0.1, 0.2, 0.3]", "ema_decay=null"])
    assert (recipe.epochs, recipe.lr, recipe.mean, recipe.ema_decay) == (5, 1e-3, (0.1, 0.2, 0.3), None)
    with pytest.raises(RecipeError, match="received 'epochs'; valid: key=value"):
        apply_settings(recipe, ["epochs"])
    with pytest.raises(RecipeError, match="epoch: unknown key"):
        apply_settings(recipe, ["epoch=1"])


def test_what_a_recipe_says_about_itself_decides_nothing() -> None:
    recipe = parse_recipe(MINIMAL)
    assert decisive_settings(recipe) == decisive_settings(dataclasses.replace(recipe, hardware="other", time="other"))
    assert decisive_settings(recipe) != decisive_settings(dataclasses.replace(recipe, seed=1))
    assert {field.name for field in dataclasses.fields(Recipe)} >= set(decisive_settings(recipe))


def test_files_are_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_recipe(path) == parse_recipe(MINIMAL)
    assert recipe_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RecipeError, match=r"no recipe 'cifar'; valid: .*cifar10_small"):
        load_recipe("cifar")
    with pytest.raises(RecipeError, match=r"no file .*cifar10_small"):
        load_recipe(tmp_path / "absent.yaml")
    path.write_text(MINIMAL + "colour: red\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml: colour: unknown key"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(path)


def test_recipes_lie_in_the_package() -> None:
    assert recipe_path("cifar10_small").parent == Path(ubn_zoo.__file__).parent / "recipes"
