"""The command line: output, exit codes, and errors without a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs as arch_pretrained_cfgs

from ubn_zoo import __version__, cli
from ubn_zoo.hub import fetch as hub
from ubn_zoo.hub import manifest
from ubn_zoo.hub.manifest import load_manifest
from ubn_zoo.models import catalog
from ubn_zoo.models.registry import TABLE
from ubn_zoo.recipes.schema import Recipe, list_recipes, load_recipe, recipe_path

ARCHITECTURES = timm.list_models("*_ubn")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    code, out, err = run(capsys, "list", *arguments)
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split() == ["NAME", "TAG", "PARAMS", "SOURCE", "METRICS"]
    return [row.split() for row in rows]


def test_list_shows_every_model_and_ubn_weights(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys)
    assert list(dict.fromkeys(row[0] for row in rows)) == ARCHITECTURES
    names = [f"{row[0]}.{row[1]}" for row in rows]
    defaults = {next(iter(arch_pretrained_cfgs(architecture))) for architecture in ARCHITECTURES}
    assert sorted(names) == sorted(defaults | {record.id for record in load_manifest()})


@pytest.mark.parametrize("pattern", ["regnety_032", "regnety_03*", "*y_032_ubn", "regnety_032_ubn.bn_ra_in1k"])
def test_list_filters_by_part_or_wildcard(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    name, tag, params, unit, source, repository, metrics = listed(capsys, pattern)[0]
    assert (name, tag, unit, source, metrics) == ("regnety_032_ubn", "bn_ra_in1k", "M", "hub", "-")
    assert repository == "timm/regnety_032.ra_in1k"
    built = sum(parameter.numel() for parameter in timm.create_model("regnety_032_ubn").parameters())
    assert float(params) == round(built / 1e6, 2)


def test_list_with_tags_shows_every_set_of_weights(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "resnet50_ubn", "--tags")
    assert [f"{row[0]}.{row[1]}" for row in rows] == list(arch_pretrained_cfgs("resnet50_ubn"))
    assert len(rows) > 10


def test_list_pretrained_omits_models_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    everything, pretrained = listed(capsys, "--tags"), listed(capsys, "--tags", "--pretrained")
    assert sorted(f"{row[0]}.{row[1]}" for row in pretrained) == sorted(timm.list_pretrained("*_ubn"))
    assert {row[-3] for row in everything if row not in pretrained} == {"no"}


def test_list_as_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "mobilenetv3_large_100_ubn", "--tags", "--json")
    entries = json.loads(out)
    assert code == 0
    assert [entry["name"] for entry in entries] == list(arch_pretrained_cfgs("mobilenetv3_large_100_ubn"))
    assert [entry["default"] for entry in entries] == [True] + [False] * (len(entries) - 1)
    fields = {field.name for field in dataclasses.fields(catalog.Entry)}
    assert all(set(entry) == {"name", *fields} for entry in entries)


def test_list_without_a_match_fails_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "list", "reznet50_ubn")
    assert (code, out) == (1, "")
    assert "resnet50_ubn" in err
    assert run(capsys, "list", "reznet50_ubn", "--json")[:2] == (0, "[]\n")


def test_info_of_converted_weights(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info", "regnety_032_ubn")
    cfg = next(iter(arch_pretrained_cfgs("regnety_032_ubn").values()))
    built = sum(parameter.numel() for parameter in timm.create_model("regnety_032_ubn").parameters())
    assert (code, err) == (0, "")
    for part in (
        "regnety_032_ubn.bn_ra_in1k",
        "converted exactly from timm's regnety_032.ra_in1k on load",
        "hub timm/regnety_032.ra_in1k, file model.safetensors",
        f"{built:,}",
        "1000",
        f"3x224x224, bicubic, crop {cfg.crop_pct:g}",
        f"license       {cfg.license or 'not stated by upstream'}",
        f"origin        {cfg.origin_url or 'not stated by upstream'}",
        'timm.create_model("regnety_032_ubn.bn_ra_in1k", pretrained=True)',
    ):
        assert part in out


def test_info_of_bundled_weights(capsys: pytest.CaptureFixture[str]) -> None:
    (record, *_) = load_manifest().find(source="bundled")
    code, out, _ = run(capsys, "info", record.id)
    assert code == 0
    assert record.recipe is not None
    metric = record.metrics[0]
    for part in (
        *(record.id, record.description, record.file, record.sha256, f"{record.params:,}", record.license),
        *(record.origin.data, record.origin.trained, record.recipe.name, record.recipe.sha256),
        *(f"{metric.name} {metric.value:g}", metric.dataset, metric.split, metric.measured.command),
    ):
        assert part in out
    assert f"{metric.name} {metric.value:g}" in " ".join(listed(capsys, record.id, "--tags")[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_info_knows_every_model(capsys: pytest.CaptureFixture[str], name: str) -> None:
    for full, cfg in arch_pretrained_cfgs(name).items():
        entry = catalog.describe(full)
        assert (entry.name, entry.input.size, entry.num_classes) == (full, cfg.input_size, cfg.num_classes)
        assert entry.pretrained == bool(cfg.has_weights)
        if entry.converted_from:
            upstream = arch_pretrained_cfgs(name.removesuffix("_ubn"))[entry.converted_from]
            assert (entry.repository, entry.license) == (upstream.hf_hub_id, upstream.license)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet50", "similar: resnet50_ubn,"),
        ("resnet50_unb", "resnet50_ubn"),
        ("resnet50-ubn", "resnet50_ubn"),
        ("regnety_32_ubn", "regnety_032_ubn"),
        ("mobilenetv3large_100_ubn", "mobilenetv3_large_100_ubn"),
        ("resnet50_ubn.a1_in1k", "similar: resnet50_ubn.bn_a1_in1k"),
        ("resnet50_ubn.zzz", "`ubn-zoo list --tags resnet50_ubn`"),
        ("zzzzzzzz", "`ubn-zoo list`"),
        ("", "`ubn-zoo list`"),
    ],
)
def test_info_of_a_typo_suggests_names(capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    code, out, err = run(capsys, "info", name)
    assert (code, out) == (1, "")
    assert hint in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_table_of_architectures_is_up_to_date() -> None:
    assert json.loads(TABLE.read_text()) == catalog.architecture_table(), "run: python -m ubn_zoo.models.catalog"


@pytest.mark.parametrize("name", ["resnet10t_ubn", "efficientnet_b1_pruned_ubn", "inception_v3_ubn", "vgg11_bn_ubn"])
def test_parameters_in_the_table_match_the_model(name: str) -> None:
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in timm.create_model(name, num_classes=1000).parameters())
    assert catalog.count_parameters(name, 1000) == counted


def test_models_missing_from_the_table_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    known = catalog.count_parameters("mobilenetv3_small_050_ubn", 1000)
    monkeypatch.setattr(catalog, "parameter_table", dict)
    assert catalog.count_parameters("mobilenetv3_small_050_ubn", 1000) == known
    assert catalog.count_parameters("mobilenetv3_small_050_ubn", 10) < known


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "recipes")
    header, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert header.split() == ["NAME", "MODEL", "EPOCHS", "BATCH", "OPTIMIZER", "EXPECTED"]
    assert [row.split()[0] for row in rows] == list(list_recipes())
    for row in rows:
        name, model, epochs, batch, optimizer, expected = row.split(maxsplit=5)
        recipe = load_recipe(name)
        assert (model, optimizer) == (recipe.model, recipe.optimizer)
        assert (int(epochs), int(batch)) == (recipe.epochs, recipe.batch_size)
        assert recipe.expected.startswith(expected.removesuffix("...")) and len(expected) <= 60


def test_recipes_show_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = recipe_path("rsb_a2").read_text(encoding="utf-8")
    assert run(capsys, "recipes", "rsb_a2") == (0, text, "")
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert run(capsys, "recipes", str(path)) == (0, text, "")


def test_recipes_as_json_have_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "recipes", "--json")[1])
    assert [entry["name"] for entry in found] == list(list_recipes())
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert all(set(entry) == {"name", *fields} for entry in found)
    one = json.loads(run(capsys, "recipes", "imagenet_classic", "--json")[1])
    assert one in found
    assert (one["lr"], one["decay_milestones"], one["label_smoothing"]) == (0.1, [30.0, 60.0, 90.0], 0.0)


def test_missing_or_invalid_recipes_are_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "recipes", "rsb")
    assert (code, out) == (1, "")
    assert "no recipe 'rsb'; valid: " in err and "rsb_a1" in err and err.count("\n") == 1
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_path("smoke").read_text(encoding="utf-8") + "epoch: 3\n", encoding="utf-8")
    code, out, err = run(capsys, "recipes", str(path))
    assert (code, out) == (1, "")
    assert "epoch: unknown key; did you mean 'epochs'?" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["lst"], ["list", "a", "b"], ["info"], ["recipes", "a", "b"], ["list", "--nosuch"]]
)
def test_wrong_command_lines_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: ubn-zoo" in capsys.readouterr().err


COMMANDS = [module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_")]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name.replace('_', '-')}\b", text, re.MULTILINE) for name in COMMANDS)
    assert {"train", "validate", "analyze", "quickstart", "list", "info", "recipes"} < set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_a_summary_and_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    name = name.replace("_", "-")
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: ubn-zoo {name} ")
    (examples,) = re.findall(r"^Examples:\n((?:    .+\n)+)", text, re.MULTILINE)
    commands = [line.strip() for line in examples.splitlines()]
    for line in commands:
        program, *arguments = shlex.split(line.replace("-m ubn_zoo", "ubn-zoo"))
        arguments = arguments[arguments.index("ubn-zoo") + 1 :] if program == "torchrun" else arguments
        assert (arguments[0], cli._parser().parse_args(arguments).command) == (name, name), line


@pytest.mark.parametrize("name", ["analyze", "benchmark", "train", "validate"])
def test_scripts_run_the_commands_of_the_same_name(name: str) -> None:
    script = Path(cli.__file__).parents[2] / "scripts" / f"{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"usage: ubn-zoo {name} ")


def test_commands_import_implementations_lazily() -> None:
    code = "import sys, ubn_zoo.cli; ubn_zoo.cli._parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    rooms = {name.split(".")[1] for name in done.stdout.split() if name.startswith("ubn_zoo.")}
    assert not rooms & {"data", "evaluation", "recipes", "release", "training"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ubn-zoo {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"), [(hub.HubError("m"), 1), (manifest.ManifestError("m"), 1), (KeyboardInterrupt(), 130)]
)
def test_errors_are_one_line_without_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(catalog, "entries", fail)
    found, out, err = run(capsys, "list")
    assert (found, out) == (code, "")
    assert err.startswith("ubn-zoo: ") and err.count("\n") == 1


def test_module_run_from_another_folder_survives_a_closed_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = f"{sys.executable} -m ubn_zoo list --tags | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("NAME")
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_listing_builds_no_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: torch.nn.Module) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", fail)
    assert len(listed(capsys, "--tags")) >= len(ARCHITECTURES)


def test_recipes_list_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "recipes", "--fields")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == [
        field.name for field in dataclasses.fields(Recipe)
    ]
    assert "\nlabel_smoothing  (float, default 0.0)\n" in out
    rows = json.loads(run(capsys, "recipes", "--fields", "--json")[1])
    assert all(row["meaning"] and row["valid"] for row in rows)
