"""Recipes: valid files are read exactly, others are rejected with the reason, and every bundled recipe runs."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.data.auto_augment import rand_augment_transform
from torch import nn

import ubn_zoo
from tests.images import write_image_folder
from ubn_zoo.evaluation.metrics import read_metrics
from ubn_zoo.layers import VARIANTS
from ubn_zoo.recipes.page import recipe_page
from ubn_zoo.recipes.schema import (
    Field,
    Recipe,
    RecipeError,
    apply_settings,
    decisive_settings,
    dump_recipe,
    fields,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_path,
    recipe_sha256,
)
from ubn_zoo.training.build import build_loss, build_model, build_optimizer, build_scheduler, complete
from ubn_zoo.training.run import run, save_weights

MINIMAL = """
source: here
command: run it
hardware: any
time: a second
expected: nothing
model: resnet10t
epochs: 4
lr: 0.1
"""
RECIPE = parse_recipe(MINIMAL)
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
TYPES = typing.get_type_hints(Recipe)
OPENING = ("source", "command", "hardware", "time", "expected")
OPERATIONAL = (
    "device",
    "threads",
    "workers",
    "checkpoint_steps",
    "log_interval",
    "keep_checkpoints",
    "keep_best",
    "wandb_project",
)
PUBLISHED = ("data_name", "data_license", "license")

NEEDED = [
    "cifar10_full",
    "cifar10_small",
    "finetune_full",
    "finetune_head",
    "finetune_layer_decay",
    "imagenet_classic",
    "imagenet_large_batch_lamb",
    "imagenet_large_batch_sgd",
    "mobilenetv2",
    "mobilenetv3",
    "regnet_dds",
    "rsb_a1",
    "rsb_a2",
    "rsb_a3",
    "smoke",
    "torchvision_v2",
]

# Valid values of the fields, in addition to defaults, that need no other change to the recipe.
OTHER: dict[str, list[Any]] = {
    **{key: ["other words"] for key in OPENING},
    "model": ["resnet18"],
    "norm": [norm for norm in VARIANTS if norm != "ubn"],
    "threshold": [None, -1.0, 0.5, 1.0],
    "kernel_size": [1, 5],
    "kernel_init": ["kaiming"],
    "norm_eps": [1e-3],
    "norm_momentum": [0.01],
    "norm_eval": [],  # needs weights
    "pretrained": [True],
    "pretrained_tag": [],  # needs pretrained
    "checkpoint": ["model.safetensors"],
    "keep_head": [],  # needs weights
    "tune": [],  # needs weights
    "drop_rate": [0.2],
    "drop_path_rate": [0.05],
    "dataset": ["wds", "hfds/cifar10", "hfids/owner/name"],
    "train_split": ["train-{0000..0099}.tar"],
    "test_split": ["val"],
    "train_samples": [1, 1000],
    "test_samples": [1000],
    "data_name": ["CIFAR-10 (JPEG)"],
    "data_license": ["cc-by-4.0"],
    "license": ["apache-2.0", "MIT"],
    "exif_rotation": [False],
    "input_key": ["jpg"],
    "target_key": ["cls"],
    "num_classes": [1, 1000],
    "img_size": [64],
    "test_img_size": [288],
    "interpolation": ["bilinear", "bicubic"],
    "train_interpolation": ["bilinear", "bicubic", "random"],
    "crop_pct": [0.875, 1.0],
    "mean": [(0.1, 0.2, 0.3)],
    "std": [(0.1, 0.2, 0.3)],
    "crop": ["rkrc", "rkrr"],
    "crop_scale": [(0.35, 1.0), (1.0, 1.0)],
    "crop_padding": [0, 8],
    "hflip": [0.0],
    "vflip": [0.5],
    "color_jitter": [0.4],
    "auto_augment": ["rand-m7-mstd0.5-inc1", "original", "3a", "augmix-m3-w3"],
    "random_erasing": [0.1],
    "erasing_mode": ["const", "rand"],
    "repeats": [3],
    "mixup": [0.2],
    "cutmix": [1.0],
    "mixup_prob": [0.5],
    "mixup_switch_prob": [0.0],
    "mixup_off_epoch": [0, 3],
    "epochs": [1, 600],
    "batch_size": [2, 8192],
    "accumulation": [4],
    "optimizer": ["momentum", "lamb", "adamw", "rmsprop"],
    "lr": [1e-3],
    "momentum": [0.0],
    "betas": [(0.9, 0.95)],
    "optimizer_eps": [0.0316],
    "weight_decay": [0.0],
    "norm_decay": [True],
    "layer_decay": [0.75],
    "scheduler": ["step", "poly", "constant"],
    "warmup_epochs": [0.5, 3.0],
    "warmup_lr": [1e-6],
    "warmup_prefix": [True],
    "min_lr": [1e-6],
    "decay_epochs": [2.4],
    "decay_milestones": [(30.0, 60.0, 90.0)],
    "decay_rate": [0.973],
    "loss": ["bce"],
    "bce_threshold": [],  # needs bce
    "label_smoothing": [0.1],
    "clip_grad": [1.0],
    "clip_mode": ["value", "agc"],
    "ema_decay": [0.9999],
    "ema_warmup": [False],
    "amp": ["bfloat16", "float16"],
    "channels_last": [False],
    "compile": [True],
    "grad_checkpointing": [True],
    "sync_norm": [True],
    "seed": [0, 2**63 - 1],
    "device": ["cpu", "cuda:1"],
    "threads": [1],
    "workers": [0],
    "checkpoint_steps": [100],
    "log_interval": [1],
    "keep_checkpoints": [2],
    "keep_best": ["top1", "loss"],
    "wandb_project": ["digits"],
    "probe_images": [0],
}

# Invalid values of the right type.
WRONG: dict[str, list[Any]] = {
    **{key: ["", " "] for key in (*OPENING, "train_split", "device")},
    "model": ["", " "],
    "norm": ["batch", "BN", ""],
    "threshold": [-1.01, 1.01],
    "kernel_size": [0, -1, 2, 100],
    "kernel_init": ["zeros"],
    "norm_eps": [0.0, 1.1],
    "norm_momentum": [0.0, 1.1],
    "norm_eval": [True],  # there are no weights
    "pretrained_tag": ["a1_in1k"],
    "keep_head": [True],  # there are no weights
    "tune": ["tail", "head"],
    "drop_rate": [-0.1, 1.1],
    "drop_path_rate": [-0.1, 1.1],
    "dataset": ["imagenet", "folder/x", "hfds", "hfds/", "hfids", "wds/x", ""],
    "train_samples": [0, -5],
    "test_samples": [0],
    "data_name": ["", " ", "two\nlines"],
    "data_license": ["all mine!"],
    "license": ["", "mit\n", "<b>"],
    "num_classes": [0, 1_000_001],
    "img_size": [0, 16_385],
    "test_img_size": [0, 16_385],
    "interpolation": ["nearest", "random"],
    "train_interpolation": ["nearest"],
    "crop_pct": [0.0, 2.1],
    "mean": [(0.5,), (0.5, 0.5, 11.0)],
    "std": [(0.25, 0.25), (0.0, 1.0, 1.0)],
    "crop": ["center", "pad"],
    "crop_scale": [(0.5,), (0.0, 1.0), (0.1, 1.1), (0.8, 0.2)],
    "crop_padding": [-1, 1025],
    "hflip": [-0.1, 1.1],
    "vflip": [-0.1, 1.1],
    "color_jitter": [-0.1, 1.1],
    "auto_augment": ["", "randaugment", "auto"],
    "random_erasing": [-0.1, 1.1],
    "erasing_mode": ["black"],
    "repeats": [0, 65],
    "mixup": [-0.1, 101.0],
    "cutmix": [-0.1, 101.0],
    "mixup_prob": [-0.1, 1.1],
    "mixup_switch_prob": [-0.1, 1.1],
    "mixup_off_epoch": [-1],
    "epochs": [0, 100_001],
    "batch_size": [1, -8],
    "accumulation": [0, 3],
    "optimizer": ["sdg", ""],
    "lr": [0.0, -0.1, 1001.0],
    "momentum": [-0.1, 1.1],
    "betas": [(0.9,), (0.9, 1.1)],
    "optimizer_eps": [0.0, 1.1],
    "weight_decay": [-1e-4, 11.0],
    "layer_decay": [0.0, 1.1],
    "scheduler": ["cosin", "multistep"],
    "warmup_epochs": [-1.0, 4.0],
    "warmup_lr": [-0.1],
    "min_lr": [-0.1],
    "decay_epochs": [0.0],
    "decay_milestones": [(0.0,), (60.0, 30.0), (30.0, 30.0)],
    "decay_rate": [-0.1, 11.0],
    "loss": ["mse"],
    "bce_threshold": [-0.1, 1.1, 0.2],
    "label_smoothing": [-0.1, 1.0],
    "clip_grad": [0.0, -1.0],
    "clip_mode": ["l2"],
    "ema_decay": [-0.1, 1.1],
    "amp": ["float32", "bf16"],
    "seed": [-1, 2**63],
    "threads": [0],
    "workers": [-1],
    "checkpoint_steps": [0],
    "log_interval": [0],
    "keep_checkpoints": [0, 1],
    "keep_best": ["accuracy"],
    "wandb_project": ["", "two\nlines"],
    "probe_images": [-1, 65_537],
}
# Fields that accept any string or boolean.
UNBOUNDED = {
    *(
        "pretrained",
        "exif_rotation",
        "checkpoint",
        "test_split",
        "input_key",
        "target_key",
        "norm_decay",
    ),
    *("warmup_prefix", "ema_warmup", "channels_last", "compile", "grad_checkpointing", "sync_norm"),
}
WRONG_TYPES: dict[str, list[Any]] = {
    "str": [1, True, ["a"]],
    "bool": [1, "yes", 0.0],
    "int": [2.5, True, "2"],
    "float": ["fast", True, math.nan, math.inf, [0.1]],
    "tuple": [0.5, "a", ["a", "b", "c"], [True, True, True], [math.nan, 1.0, 1.0]],
}


def kind(name: str) -> str:
    return str(TYPES[name]).removeprefix("<class '").rstrip("'>").partition(" |")[0].partition("[")[0]


def with_value(name: str, value: object) -> str:
    """The minimal recipe with one value set."""
    return yaml.safe_dump({**yaml.safe_load(MINIMAL), name: list(value) if isinstance(value, tuple) else value})


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


def test_defaults() -> None:
    assert (RECIPE.norm, RECIPE.threshold, RECIPE.dataset, RECIPE.crop) == ("ubn", 0.15, "folder", "rrc")
    assert (RECIPE.num_classes, RECIPE.img_size, RECIPE.ema_decay, RECIPE.amp) == (None, None, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPE.lr = 1.0


def test_the_tables_in_this_file_have_every_field() -> None:
    assert set(OTHER) == set(FIELDS)
    assert set(WRONG) | UNBOUNDED == set(FIELDS)
    assert not set(WRONG) & UNBOUNDED
    assert {kind(name) for name in FIELDS} == set(WRONG_TYPES)


@pytest.mark.parametrize(("name", "value"), pairs(OTHER))
def test_valid_values_are_read_and_written(name: str, value: object) -> None:
    recipe = parse_recipe(with_value(name, value))
    assert getattr(recipe, name) == value
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert dataclasses.replace(RECIPE, **{name: value}) == recipe


@pytest.mark.parametrize(("name", "value"), pairs(WRONG))
def test_invalid_values_are_rejected_by_name(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match="received .*; valid: ") as caught:
        parse_recipe(with_value(name, value))
    # If two values contradict each other, the error may name either one.
    others = {"accumulation": "batch_size", "scheduler": "decay_milestones"}
    assert str(caught.value).partition(":")[0] in (name, others.get(name))
    with pytest.raises(RecipeError):
        dataclasses.replace(RECIPE, **{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_are_rejected(name: str) -> None:
    for value in WRONG_TYPES[kind(name)]:
        with pytest.raises(RecipeError, match=f"^{name}: received .*; valid: (a|true or false)"):
            parse_recipe(with_value(name, value))


@pytest.mark.parametrize("name", FIELDS)
def test_null_is_valid_only_for_optional_fields(name: str) -> None:
    if "None" in str(TYPES[name]):
        assert getattr(parse_recipe(with_value(name, None)), name) is None
    else:
        with pytest.raises(RecipeError, match=f"^{name}: received None"):
            parse_recipe(with_value(name, None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pretrained_tag=a1_in1k"], "pretrained_tag: received 'a1_in1k'; valid: null, as pretrained is false"),
        (["pretrained=true", "checkpoint=a"], "checkpoint: received 'a'; valid: null, as pretrained is true"),
        (["tune=head"], "tune: received 'head'; valid: full, .*set pretrained or checkpoint"),
        (["keep_head=true"], "keep_head: received True; valid: false, as there are no weights to start from"),
        (
            ["model=resnet18_ubn", "norm=bn"],
            "model: received 'resnet18_ubn'; valid: 'resnet18' with norm bn",
        ),
        (
            ["batch_size=63", "mixup=0.2"],
            "batch_size: received 63; valid: an even number .* Mixup and",
        ),
        (["batch_size=30", "accumulation=2", "cutmix=1.0"], "batch_size: received 30; valid: an even number"),
        (["auto_augment=randaugment"], "auto_augment: received 'randaugment'; valid: timm's policies: .*rand-m7"),
        (["optimizer=adan", "betas=[0.9, 0.99]"], "betas: received .*; valid: three numbers for Adan"),
        (["optimizer=adahessian"], "optimizer: received 'adahessian'; valid: one of "),
        (["dataset=memory"], "crop: received 'rrc'; valid: pad with dataset memory"),
        (["crop=pad"], "crop: received 'pad'; valid: .*rrc, rkrc or rkrr with others"),
        (["dataset=memory", "crop=pad", "auto_augment=original"], "auto_augment: .*none with dataset memory"),
        (["dataset=memory", "crop=pad", "color_jitter=0.1"], "color_jitter: .*none with dataset memory"),
        (["dataset=memory", "crop=pad", "vflip=0.1"], "vflip: .*none with dataset memory"),
        (["dataset=memory", "crop=pad", "train_interpolation=random"], "train_interpolation: .*bilinear or bicubic"),
        (["dataset=hfds"], "dataset: received 'hfds'; valid: one of folder, memory, wds, hfds/NAME, hfids/NAME"),
        (["batch_size=10", "accumulation=4"], "batch_size: received 10; valid: a multiple of accumulation"),
        (["crop_scale=[1.0, 0.5]"], r"crop_scale: received \[1.0, 0.5\]; valid: the smallest share of the area first"),
        (["warmup_epochs=4"], "warmup_epochs: received 4.0; valid: less than epochs, 4"),
        (["scheduler=multistep"], r"decay_milestones: received \[\]; valid: at least one epoch"),
        (["decay_milestones=[2, 1]"], r"decay_milestones: received \[2.0, 1.0\]; valid: increasing epochs"),
        (["bce_threshold=0.2"], "bce_threshold: received 0.2; valid: null, as loss is not bce"),
        (["optimizer=sdg"], "optimizer: received 'sdg'; valid: one of .*lamb, .*sgd"),
        (["mean=[0.5]"], r"mean: received \[0.5\]; valid: a list of 3 numbers"),
    ],
)
def test_contradictory_values_are_rejected(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_settings(RECIPE, settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["pretrained=true", "pretrained_tag=bn_a1_in1k", "tune=head"],
        ["checkpoint=run/model.safetensors", "tune=head"],
        ["checkpoint=run/model.safetensors", "keep_head=true"],
        ["checkpoint=run/model.safetensors", "norm_eval=true"],
        ["dataset=memory", "crop=pad"],
        ["loss=bce", "bce_threshold=0.2"],
        ["scheduler=multistep", "decay_milestones=[30, 60, 90]"],
        ["batch_size=2048", "repeats=3"],
    ],
)
def test_dependent_values_are_valid_together(settings: list[str]) -> None:
    recipe = apply_settings(RECIPE, settings)
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_exponents_without_a_decimal_point_are_numbers() -> None:
    assert parse_recipe(MINIMAL.replace("lr: 0.1", "lr: 5e-4")).lr == 5e-4
    assert parse_recipe(MINIMAL + "betas: [9e-1, 0.999]").betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lr: 0.1", "learning_rate: 0.1"), "learning_rate: unknown key; .*valid: source, command, .*lr"),
        (("lr: 0.1", "lr: 0.1\nepoch: 3"), "epoch: unknown key; did you mean 'epochs'"),
        (("lr: 0.1", "lr: 0.1\nwarm_up_epochs: 3"), "warm_up_epochs: unknown key; did you mean 'warmup_epochs'"),
        (("lr: 0.1", "lr: 0.1\n3: 3"), "3: unknown key"),
        (
            ("lr: 0.1\n", ""),
            "missing: lr; a recipe needs at least source, command, hardware, time, expected, model, epo",
        ),
        (("source: here\n", ""), "missing: source"),
        (("lr: 0.1", "lr: 0.1\nlr: 0.2"), "lr: the key occurs twice"),
        (("lr: 0.1", "lr: fast"), "lr: received 'fast'; valid: a finite number"),
    ],
)
def test_unknown_and_missing_keys_are_named(change: tuple[str, str], message: str) -> None:
    assert change[0] in MINIMAL
    with pytest.raises(RecipeError, match=message):
        parse_recipe(MINIMAL.replace(*change))


@pytest.mark.parametrize("text", ["", "- 1", "just text", "a: [", "!!python/object/apply:os.getcwd []", "? [1]\n: 2"])
def test_other_yaml_than_a_mapping_is_rejected(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_files_are_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == RECIPE
    assert recipe_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RecipeError, match=r"no recipe 'cifar'; valid: .*cifar10_small"):
        load_recipe("cifar")
    with pytest.raises(RecipeError, match=r"no file .*cifar10_small"):
        load_recipe(tmp_path / "absent.yaml")
    path.write_text(MINIMAL + "color: red\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml: color: unknown key"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(path)


def test_settings_are_parsed_like_the_file() -> None:
    recipe = apply_settings(RECIPE, ["epochs=5", "lr=1e-3", "mean=[0.1, 0.2, 0.3]", "ema_decay=null"])
    assert (recipe.epochs, recipe.lr, recipe.mean, recipe.ema_decay) == (5, 1e-3, (0.1, 0.2, 0.3), None)
    assert RECIPE.epochs == 4
    assert apply_settings(RECIPE, []) == RECIPE
    with pytest.raises(RecipeError, match="received 'epochs'; valid: key=value"):
        apply_settings(RECIPE, ["epochs"])
    with pytest.raises(RecipeError, match="epoch: unknown key; did you mean 'epochs'"):
        apply_settings(RECIPE, ["epoch=1"])
    with pytest.raises(RecipeError, match=r"mean: not valid YAML"):
        apply_settings(RECIPE, ["mean=[0.1"])


def test_names_of_twins_set_norm_to_ubn() -> None:
    twin = parse_recipe(MINIMAL.replace("model: resnet10t", "model: resnet10t_ubn"))
    assert twin == RECIPE
    assert (twin.model, twin.norm) == ("resnet10t", "ubn")
    other = apply_settings(apply_settings(RECIPE, ["norm=bn"]), ["model=resnet18_ubn"])
    assert (other.model, other.norm) == ("resnet18", "ubn")
    assert apply_settings(RECIPE, ["norm=ubn", "model=resnet18_ubn"]).model == "resnet18"
    with pytest.raises(RecipeError, match="model: received 'resnet10t_ubn'; valid: 'resnet10t' with norm bnet"):
        parse_recipe(MINIMAL.replace("model: resnet10t", "model: resnet10t_ubn\nnorm: bnet"))


def test_settings_are_validated_together_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL + "warmup_epochs: 9\n", encoding="utf-8")
    assert load_recipe(path, ["epochs=10"]).warmup_epochs == 9  # alone, the file is invalid
    with pytest.raises(RecipeError, match=r"mine\.yaml with epochs=8: warmup_epochs: received 9.0; valid: less than"):
        load_recipe(path, ["epochs=8"])


def test_disabling_pretrained_removes_the_tag() -> None:
    start = apply_settings(RECIPE, ["pretrained=true", "pretrained_tag=a1_in1k"])
    assert apply_settings(start, ["pretrained=false"]).pretrained_tag is None
    with pytest.raises(RecipeError, match="pretrained_tag: received 'b'; valid: null"):
        apply_settings(start, ["pretrained=false", "pretrained_tag=b"])


def test_every_key_documents_its_meaning_and_valid_values() -> None:
    found = {field.key: field for field in fields()}
    assert list(found) == list(FIELDS)
    for key, field in found.items():
        assert field.meaning.endswith(".") and len(field.meaning) > 10, key
        assert field.valid and field.type and field.default, key
        number = kind(key) in ("int", "float", "tuple")
        assert not number or " from " in field.valid, f"{key} has no range"
    assert found["lr"] == Field("lr", "float", "required", "a number from 1e-12 to 1000", "Peak learning rate.")
    assert found["amp"].valid == "bfloat16, float16, or null"


def test_every_key_is_read_by_the_package() -> None:
    root = Path(ubn_zoo.__file__).parent
    read: set[str] = set()
    for path in root.rglob("*.py"):
        if path.parent.name == "recipes":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    assert not set(FIELDS) - read - {"source", "hardware", "time"}  # documentation only, shown on the page of recipes


def test_names_of_common_settings() -> None:
    settings: dict[str, Any] = {
        "model": "resnet18",
        "pretrained": True,
        "num_classes": 7,
        "img_size": 96,
        "epochs": 3,
        "batch_size": 16,
        "lr": 0.05,
        "weight_decay": 1e-4,
        "seed": 9,
        "workers": 2,
        "device": "cuda:0",
        "amp": "float16",
        "norm": "bn",
    }
    recipe = apply_settings(RECIPE, [f"{key}={str(value).lower()}" for key, value in settings.items()])
    assert {key: getattr(recipe, key) for key in settings} == settings


@pytest.mark.parametrize(("name", "value"), pairs(OTHER))
def test_descriptions_and_execution_settings_are_not_decisive(name: str, value: object) -> None:
    changed = dataclasses.replace(RECIPE, **{name: value})
    same = decisive_settings(changed) == decisive_settings(RECIPE)
    assert same == (name in (*OPENING, *OPERATIONAL, *PUBLISHED) or value == FIELDS[name].default)
    assert set(decisive_settings(RECIPE)) == set(FIELDS) - {*OPENING, *OPERATIONAL, *PUBLISHED}


def test_the_package_has_the_required_recipes() -> None:
    assert set(list_recipes()) >= set(NEEDED)
    assert recipe_path("cifar10_small").parent == Path(ubn_zoo.__file__).parent / "recipes"


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_are_valid_and_name_models_of_the_zoo(name: str) -> None:
    recipe = load_recipe(name)
    assert timm.is_model(f"{recipe.model}_ubn")
    resolved = complete(recipe)
    assert None not in (resolved.img_size, resolved.interpolation, resolved.crop_pct, resolved.mean, resolved.std)
    for version in (recipe, resolved):
        assert parse_recipe(dump_recipe(version)) == version


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_open_with_a_description(name: str) -> None:
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    keys = [line.partition(":")[0] for line in lines if line[:1].isalpha()]
    assert lines[0].startswith("# ")
    assert tuple(keys[:5]) == OPENING
    if name in NEEDED:
        assert f"--recipe {name} " in load_recipe(name).command


def test_the_page_of_recipes_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == recipe_page(), "run: python -m ubn_zoo.recipes.page docs/recipes.md"


def rate(recipe: Recipe, epoch: float, steps: int = 10) -> float:
    """Learning rate of the update at an epoch, with this many updates per epoch."""
    optimizer = build_optimizer(recipe, nn.Linear(2, 2))
    build_scheduler(recipe, optimizer, steps).step_update(round(epoch * steps))
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == 1
    return rates.pop()


def cosine(peak: float, low: float, share: float) -> float:
    return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("imagenet_classic", {0: 0.1, 29.8: 0.1, 30: 0.01, 59.8: 0.01, 60: 1e-3, 89.8: 1e-3, 90: 1e-4, 99.9: 1e-4}),
        ("imagenet_large_batch_sgd", {0: 0.1, 2.5: 1.65, 5: 3.2, 29.8: 3.2, 30: 0.32, 60: 0.032, 80: 0.0032}),
        ("imagenet_large_batch_lamb", {0: 0.0, 2.5: 0.01, 5: 0.02, 47.5: 0.01, 81.5: 0.002}),
        ("rsb_a1", {0: 1e-6, 2.5: 0.0025005, 5: cosine(5e-3, 1e-6, 5 / 600), 300: 0.0025005, 600: 1e-6}),
        ("rsb_a2", {0: 1e-6, 5: cosine(5e-3, 1e-6, 5 / 300), 150: 0.0025005, 225: cosine(5e-3, 1e-6, 0.75)}),
        ("rsb_a3", {0: 1e-6, 5: cosine(8e-3, 1e-6, 0.05), 50: 0.0040005, 75: cosine(8e-3, 1e-6, 0.75)}),
        ("torchvision_v2", {0: 0.005, 2.5: 0.2525, 5: 0.5, 302.5: 0.25, 451: cosine(0.5, 0, 446 / 595)}),
        ("mobilenetv2", {0: 0.045, 0.9: 0.045, 1: 0.045 * 0.98, 10: 0.045 * 0.98**10, 299: 0.045 * 0.98**299}),
        ("mobilenetv3", {0: 0.064, 1.9: 0.064, 2: 0.064 * 0.973, 3.9: 0.064 * 0.973, 100: 0.064 * 0.973**50}),
        ("regnet_dds", {0: 0.08, 2.5: 0.44, 5: cosine(0.8, 0, 0.05), 50: 0.4, 75: cosine(0.8, 0, 0.75)}),
        ("cifar10_full", {0: 0.1, 100: 0.05, 150: cosine(0.1, 0, 0.75)}),
    ],
)
def test_learning_rates_match_the_sources(name: str, rates: dict[float, float]) -> None:
    recipe = load_recipe(name)
    assert {epoch: rate(recipe, epoch) for epoch in rates} == pytest.approx(rates, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "kind_of", "options"),
    [
        ("imagenet_classic", "SGD", {"momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}),
        ("imagenet_large_batch_sgd", "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
        ("imagenet_large_batch_lamb", "Lamb", {"betas": (0.9, 0.999), "eps": 1e-6, "max_grad_norm": 1.0}),
        ("rsb_a1", "Lamb", {"weight_decay": 0.01}),
        ("rsb_a2", "Lamb", {"weight_decay": 0.02}),
        ("rsb_a3", "Lamb", {"weight_decay": 0.02}),
        ("torchvision_v2", "SGD", {"momentum": 0.9, "nesterov": False, "weight_decay": 2e-5}),
        ("mobilenetv2", "SGD", {"momentum": 0.9, "nesterov": False, "weight_decay": 4e-5}),
        ("mobilenetv3", "RMSprop", {"momentum": 0.9, "alpha": 0.9, "eps": 0.0316, "weight_decay": 1e-5}),
        ("regnet_dds", "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-5}),
        ("cifar10_full", "SGD", {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}),
        ("finetune_full", "AdamW", {"weight_decay": 0.05}),
    ],
)
def test_optimizers_match_the_sources(name: str, kind_of: str, options: dict[str, Any]) -> None:
    recipe = load_recipe(name)
    optimizer = build_optimizer(recipe, nn.Linear(2, 2))
    assert type(optimizer).__name__ == kind_of
    decays = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups}
    group = max(optimizer.param_groups, key=lambda group: group["weight_decay"])
    assert {key: group[key] for key in options} == options
    # Biases either decay like weights or not at all.
    assert (decays == {2: recipe.weight_decay}) == recipe.norm_decay


def test_losses_match_the_sources() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0])
    mixed = torch.tensor([[0.7, 0.3, 0.0]])
    log_probabilities = logits.log_softmax(1)[0]
    # Plain cross-entropy: RBN and BNET; with Mixup's soft targets: torchvision.
    assert build_loss(load_recipe("imagenet_classic"))(logits, labels).item() == pytest.approx(
        -log_probabilities[0].item()
    )
    mixed_loss = build_loss(load_recipe("torchvision_v2"))(logits, mixed).item()
    assert mixed_loss == pytest.approx(-(mixed[0] * log_probabilities).sum().item())
    smoothed = build_loss(load_recipe("imagenet_large_batch_lamb"))(logits, labels).item()
    assert smoothed == pytest.approx(-(0.9 * log_probabilities[0] + 0.1 * log_probabilities.mean()).item())
    # Binary cross-entropy: A1 with soft targets, A2 and A3 with a hard target for every mixed class.
    on, off = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    soft = -(mixed * on + (1 - mixed) * off).mean().item()
    hard = -torch.cat([on[0, :2], off[0, 2:]]).mean().item()
    for name, wanted in (("rsb_a1", soft), ("rsb_a2", hard), ("rsb_a3", hard)):
        assert build_loss(load_recipe(name))(logits, mixed).item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "layers", "prob", "magnitude", "std"),
    [
        ("rsb_a1", 2, 0.5, 7, 0.5),
        ("rsb_a2", 2, 0.5, 7, 0.5),
        ("rsb_a3", 2, 0.5, 6, 0.5),
        # As in TrivialAugment: always one operation, of random strength.
        ("torchvision_v2", 1, 1.0, 10, math.inf),
    ],
)
def test_augmentation_matches_the_sources(name: str, layers: int, prob: float, magnitude: int, std: float) -> None:
    policy = load_recipe(name).auto_augment
    assert policy is not None
    augment = rand_augment_transform(policy, {})
    assert augment.num_layers == layers
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in augment.ops} == {(prob, magnitude, std)}
    assert any(op.name.endswith("Increasing") for op in augment.ops)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"), train=24, test=16)


def small(name: str, folder: Path) -> Recipe:
    """A bundled recipe with a small model, small images and one epoch."""
    recipe = load_recipe(name)
    settings = ["model=resnet10t", "img_size=32", "epochs=1", "batch_size=8", "lr=0.01", "warmup_lr=0.001", "amp=null"]
    settings += ["device=cpu", "workers=0", "threads=1", "probe_images=4", "train_samples=24", "test_samples=16"]
    if recipe.test_img_size is not None:
        settings.append("test_img_size=48")
    if recipe.warmup_epochs:
        settings.append("warmup_epochs=0.5")
    if recipe.pretrained:
        settings += ["pretrained=false", "pretrained_tag=null"]
    if recipe.tune == "head":
        start = folder / "start.safetensors"
        save_weights(build_model(apply_settings(RECIPE, ["num_classes=5", "seed=8"])), start)
        settings.append(f"checkpoint={start}")
    return apply_settings(recipe, settings)


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_run(images: Path, tmp_path: Path, name: str) -> None:
    recipe = small(name, tmp_path)
    folder = tmp_path / "run"
    done = run(recipe, images, folder)
    kept = load_recipe(folder / "recipe.yaml")
    classes = recipe.num_classes or 2
    assert done.finished
    assert kept == dataclasses.replace(complete(recipe), num_classes=classes)
    (row,) = read_metrics(folder / "metrics.csv")
    assert (row.epoch, row.step, row.model, row.norm) == (1, 3, "resnet10t", recipe.norm)
    assert math.isfinite(row.train_loss) and math.isfinite(row.test_loss) and 0 <= row.top1 <= 100
    assert row.lr == pytest.approx(rate(recipe, 2 / 3, 3) if recipe.layer_decay is None else row.lr)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert state["fc.weight"].shape[0] == classes
    assert (folder / "model_ema.safetensors").exists() == (recipe.ema_decay is not None)
    started = build_model(kept).state_dict()
    moved = {key for key in state if not torch.equal(state[key], started[key])}
    if recipe.tune == "head":
        assert moved == {"fc.weight", "fc.bias"}
    else:
        assert moved > {"fc.weight", "conv1.0.weight", "layer4.0.conv2.weight"}
