"""Twins and weights that importing the zoo adds to timm's registry, and the cost of the import."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch import nn

import ubn_zoo.models
from ubn_zoo.hub.manifest import InputSpec, Origin, Record, load_manifest
from ubn_zoo.models import FAMILIES, Family, table
from ubn_zoo.models.build import uses_batchnorm
from ubn_zoo.models.catalog import normalization
from ubn_zoo.models.registry import architectures_without_twin, default_cfg

from .common import ALL, KINDS, sibling

REPOSITORY = Path(__file__).parents[2]


def test_twins_are_exactly_the_batchnorm_architectures() -> None:
    """Compare the table in the package with the rule for all timm architectures."""
    truth = {name for name in timm.list_models(exclude_filters="*_ubn") if uses_batchnorm(name)}
    assert {sibling(name) for name in ALL} == truth
    if timm.__version__ == "1.0.31":
        assert len(ALL) == 491


def test_every_architecture_has_a_twin_or_a_reason() -> None:
    if timm.__version__ != "1.0.31":
        pytest.skip("the table is written for timm 1.0.31")
    reasons = [
        name for modules in architectures_without_twin().values() for names in modules.values() for name in names
    ]
    assert sorted([*reasons, *map(sibling, ALL)]) == sorted(timm.list_models(exclude_filters="*_ubn"))


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("dla34", "BatchNorm2d"),
        ("xcit_nano_12_p8_224", "BatchNorm2d"),
        ("swin_tiny_patch4_window7_224", "LayerNorm"),
        ("resnet50_gn", "GroupNorm"),
        ("resnetv2_50x1_bit", "GroupNormAct"),
        ("dm_nfnet_f0", ""),
    ],
)
def test_reasons_match_the_modules_of_models(name: str, norms: str) -> None:
    assert normalization(name) == norms
    assert name in architectures_without_twin()[norms][timm.model_entrypoint(name).__module__.rpartition(".")[2]]


def test_readme_counts_the_zoo() -> None:
    if timm.__version__ != "1.0.31":
        pytest.skip("the README counts the models of timm 1.0.31")
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"each of timm's {len(ALL)} architectures" in readme


def test_the_rule_matches_the_modules_of_models() -> None:
    """For one architecture of each kind, and for three without BatchNorm."""
    for name in [*map(sibling, KINDS), "resnet50_gn", "convnext_atto", "regnety_040_sgn"]:
        with torch.device("meta"):
            model = timm.create_model(name)
        has = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert has == uses_batchnorm(name), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.source)
def test_families_and_entry_points(family: Family) -> None:
    names = timm.list_models(module=family.module)
    assert names
    module = getattr(ubn_zoo.models, family.module)
    assert sorted(module.__all__) == sorted(names)
    for name in names:
        entry_point = timm.model_entrypoint(name)
        assert timm.is_model(name)
        assert getattr(module, name) is entry_point
        assert (entry_point.__name__, entry_point.__module__) == (name, module.__name__)
        assert timm.model_entrypoint(sibling(name)).__module__ == f"timm.models.{family.source}"
        assert sibling(name) in entry_point.__doc__


def test_other_normalizations_have_no_twin() -> None:
    for name in ("resnet50_gn", "resnetv2_50d_evos", "resnetv2_50x1_bit", "regnety_040_sgn", "mobilenetv5_300m"):
        assert timm.is_model(name)
        assert not timm.is_model(f"{name}_ubn")


def test_a_norm_layer_that_is_not_batchnorm_is_rejected() -> None:
    with pytest.raises(ValueError, match="found no BatchNorm2d"):
        timm.create_model("resnet18_ubn", norm_layer="groupnorm")


@pytest.mark.parametrize("name", ALL)
def test_converted_weights_keep_upstreams_configuration(name: str) -> None:
    upstream = get_arch_pretrained_cfgs(sibling(name))
    ours = get_arch_pretrained_cfgs(name)
    native = {record.tag for record in load_manifest().find(architecture=name)}
    tags = [full.partition(".")[2] for full in ours]
    assert [tag for tag in tags if tag not in native] == [f"bn_{full.partition('.')[2]}" for full in upstream]
    for full, theirs in upstream.items():
        tag = full.partition(".")[2]
        cfg = ours[f"{name}.bn_{tag}"]
        assert cfg.url is None
        assert cfg.file is None
        assert cfg.hf_hub_id == theirs.hf_hub_id
        if cfg.hf_hub_id:
            assert cfg.hf_hub_id == f"timm/{full}" or full.startswith(("cspnext_", "fastvit_mci"))
            assert cfg.hf_hub_filename.endswith(".safetensors")
        assert timm.is_model_pretrained(f"{name}.bn_{tag}") == bool(theirs.hf_hub_id)
        changed = {"architecture", "tag", "url", "hf_hub_filename"}
        for field in dataclasses.fields(PretrainedCfg):
            if field.name not in changed:
                assert getattr(cfg, field.name) == getattr(theirs, field.name), field.name


def test_default_tag_is_upstreams_default() -> None:
    for name in ALL:
        upstream = timm.get_pretrained_cfg(sibling(name))
        if upstream.has_weights:
            assert timm.get_pretrained_cfg(name).tag == f"bn_{upstream.tag}"
            assert timm.is_model_pretrained(name)


def test_listings() -> None:
    assert timm.list_models("*_ubn") == ALL
    listed = timm.list_pretrained("resnet50_ubn")
    assert listed == timm.list_pretrained("resnet50_ubn.*")
    assert {f"resnet50_ubn.bn_{name.partition('.')[2]}" for name in timm.list_pretrained("resnet50")} <= set(listed)
    assert "resnet50_ubn.bn_a1_in1k" in timm.list_models("*_ubn.bn_a1*", include_tags=True)
    assert timm.get_pretrained_cfg_value("resnet50_ubn", "license") == "apache-2.0"
    assert not timm.list_pretrained("resnet50t_ubn.bn_*")


def test_unknown_tag_names_the_valid_ones() -> None:
    with pytest.raises(RuntimeError, match=r"no pretrained tag 'bn_a1_in2k'; did you mean 'bn_a1_in1k'.*bn_tv_in1k"):
        timm.create_model("resnet50_ubn.bn_a1_in2k")


def record(tag: str, num_classes: int, size: tuple[int, int, int]) -> Record:
    return Record(
        id=f"resnet18_ubn.{tag}",
        architecture="resnet18_ubn",
        tag=tag,
        source="hub",
        repo_id="someone/weights",
        revision="0" * 40,
        file="model.safetensors",
        sha256="1" * 64,
        bytes=100,
        params=10,
        input=InputSpec(
            size=size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0, crop_mode="center"
        ),
        num_classes=num_classes,
        label_names=None,
        license="apache-2.0",
        origin=Origin(data="images", trained="a test"),
        recipe=None,
        metrics=(),
        description="For tests.",
    )


def test_native_weights_for_the_same_classes_are_the_default() -> None:
    upstream = [f"bn_{name.partition('.')[2]}" for name in get_arch_pretrained_cfgs("resnet18")]
    cfgs = default_cfg("resnet18", (record("cifar10", 10, (3, 32, 32)), record("in1k", 1000, (3, 224, 224))))
    assert list(cfgs.tags) == ["in1k", *upstream, "cifar10"]
    cifar10 = cfgs.cfgs["cifar10"]
    assert (cifar10.hf_hub_id, cifar10.hf_hub_filename) == (f"someone/weights@{'0' * 40}", "model.safetensors")
    assert (cifar10.num_classes, cifar10.input_size, cifar10.crop_pct) == (10, (3, 32, 32), 1.0)
    assert (cifar10.mean, cifar10.std, cifar10.interpolation) == ((0.5,) * 3, (0.25,) * 3, "bilinear")
    assert (cifar10.first_conv, cifar10.classifier, cifar10.license) == ("conv1", "fc", "apache-2.0")
    assert cifar10.pool_size == (1, 1)


def test_native_weights_are_the_default_where_upstream_has_none() -> None:
    cfgs = default_cfg("resnet50t", (record("cifar10", 10, (3, 32, 32)),))
    assert list(cfgs.tags) == ["cifar10", "bn_untrained"]
    assert cfgs.is_pretrained


def test_records_of_the_manifest_are_registered() -> None:
    for entry in load_manifest():
        cfg = timm.get_pretrained_cfg(entry.id)
        assert (cfg.num_classes, tuple(cfg.input_size), cfg.license) == (
            entry.num_classes,
            entry.input.size,
            entry.license,
        )
        assert timm.is_model_pretrained(entry.id)


def test_importing_builds_no_model() -> None:
    code = (
        "import timm, torch\n"
        "def refuse(self, *args, **kwargs): raise AssertionError('a model was built')\n"
        "torch.nn.Conv2d.__init__ = refuse\n"
        "import ubn_zoo.models\n"
        "assert timm.is_model('resnet50_ubn')\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, cwd=REPOSITORY)


def test_table_of_models_is_up_to_date() -> None:
    if timm.__version__ != "1.0.31":
        pytest.skip("the table is written for timm 1.0.31")
    written = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == table.markdown(), "run: python -m ubn_zoo.models.table docs/models.md"


def test_public_names() -> None:
    assert set(ubn_zoo.models.__all__) <= set(dir(ubn_zoo.models))
