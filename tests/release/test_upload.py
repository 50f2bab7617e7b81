"""Publishing with the real client to a local Hub: what is uploaded, what is refused, what faults leave behind."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.models._hub import save_for_hf
from torch import Tensor, nn

import ubn_zoo
from tests.hub_server import HubServer, sha256
from tests.images import RECIPE, striped_images
from tests.release.common import (
    COMMAND,
    COMMIT,
    FACTS,
    ID,
    NAME,
    OPTIONS,
    REPO,
    SIBLING,
    TOKEN,
    commits,
    environment,
    files_of,
    records,
    rows,
)
from ubn_zoo import cli
from ubn_zoo.data.loaders import MemoryEval, MemoryTrain
from ubn_zoo.errors import PublishConflictError, PublishError
from ubn_zoo.evaluation.metrics import read_metrics, write_metrics
from ubn_zoo.hub import fetch as client
from ubn_zoo.hub import manifest
from ubn_zoo.recipes.schema import Recipe, dump_recipe
from ubn_zoo.release.convert import convert
from ubn_zoo.release.upload import publish
from ubn_zoo.training.run import run as run_recipe
from ubn_zoo.training.run import save_weights
from ubn_zoo.utils.distributed import Ranks


def command(run: Path, manifest_path: Path, *more: str) -> list[str]:
    arguments = ["publish", str(run), "--repo", REPO, "--manifest", str(manifest_path), *OPTIONS, *more]
    return [sys.executable, "-m", "ubn_zoo", *arguments]


def python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_published_from_one_process_loads_in_fresh_ones(
    hub: HubServer, run: Path, manifest_path: Path, trained: nn.Module, tmp_path: Path
) -> None:
    done = subprocess.run(
        command(run, manifest_path), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert commits(hub) == 1
    head = hub.repositories[REPO].refs["main"]
    published = files_of(hub)
    assert sorted(published) == sorted(
        [
            ".gitattributes",
            "README.md",
            "config.json",
            "metrics.csv",
            "model.safetensors",
            "recipe.yaml",
            "training.png",
        ]
    )
    for name in ("model.safetensors", "recipe.yaml", "metrics.csv", "training.png"):
        assert published[name] == (run / name).read_bytes()

    (record,) = records(manifest_path)
    assert (record.id, record.source, record.repo_id, record.revision) == (ID, "hub", REPO, head)
    assert (record.file, record.bytes) == ("model.safetensors", len(published["model.safetensors"]))
    assert record.sha256 == sha256(published["model.safetensors"])
    assert record.params == sum(parameter.numel() for parameter in trained.parameters())
    assert record.recipe == manifest.RecipeReference(name="recipe.yaml", sha256=sha256(published["recipe.yaml"]))
    (metric,) = record.metrics
    assert (metric.name, metric.value, metric.dataset, metric.split) == ("top1", 62.25, "CIFAR-10", "test")
    assert (metric.measured.seeds, metric.measured.commit) == ((0,), "1" * 40)

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.save(images, tmp_path / "images.pt")
    compare = (
        f"images = torch.load({str(tmp_path / 'images.pt')!r})\n"
        f"torch.save(model.eval()(images).detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    snippet = published["README.md"].decode().split("```python\n")[1].split("```")[0]
    by_name = (
        "import pathlib, sys, types\n"
        f"package = types.ModuleType('ubn_zoo'); package.__path__ = [{str(Path(ubn_zoo.__file__).parent)!r}]\n"
        "sys.modules['ubn_zoo'] = package\n"
        "from ubn_zoo.hub import manifest\n"
        f"manifest.PACKAGED_MANIFEST = pathlib.Path({str(manifest_path)!r})\n"
        "from ubn_zoo import models\n"
        "import timm\n"
        f"model = timm.create_model('{ID}', pretrained=True)\n"
    )
    assert snippet.startswith("import ubn_zoo\n") and f'"hf-hub:{REPO}", pretrained=True' in snippet
    for code in (snippet + "import torch\n" + compare, by_name + "import torch\n" + compare):
        python(code)
        with torch.no_grad():
            expected = trained(images)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
        (tmp_path / "logits.pt").unlink()

    # The token was sent to the Hub and nowhere else.
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in content for content in published.values())
    assert TOKEN not in manifest_path.read_text()
    assert {request.authorization for request in hub.requests if request.path.startswith("/lfs/")} == {None}


def test_card_has_what_leaderboards_read(hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe) -> None:
    publish(run, REPO, manifest=manifest_path, base_model="timm/some.model", **FACTS)
    card = files_of(hub)["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["library_name"], metadata["license"]) == ("timm", "apache-2.0")
    assert (metadata["base_model"], metadata["datasets"]) == ("timm/some.model", ["cifar10"])
    assert {"timm", "image-classification", "ubn"} <= set(metadata["tags"])
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert (entry["name"], result["task"]["type"]) == (ID, "image-classification")
    assert result["dataset"] == {"name": "CIFAR-10", "type": "cifar10", "split": "test"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 62.25)
    assert metric["args"] == {
        "command": COMMAND,
        "seeds": [0],
        "commit": "1" * 40,
        "images": 10_000,
        "weights": "as trained, after the last epoch",
    }
    assert "![training](training.png)" in card


def test_config_is_timms(hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    config = json.loads(files_of(hub)["config.json"])
    assert (config["architecture"], config["num_classes"], config["global_pool"]) == (NAME, 10, "avg")
    assert {"num_features", "model_args", "pretrained_cfg"} <= set(config)
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["mean"], cfg["tag"]) == ([3, 32, 32], list(recipe.mean), "cifar10")
    assert (cfg["license"], cfg["num_classes"]) == ("apache-2.0", 10)


def test_dry_run_touches_nothing(
    hub: HubServer, run: Path, manifest_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main([*command(run, manifest_path)[3:], "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert hub.requests == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    weights = (run / "model.safetensors").read_bytes()
    for part in (sha256(weights), f"{len(weights):,}", "config.json", "training.png", "model-index", "import ubn_zoo"):
        assert part in out


def test_unchanged_model_makes_no_new_commit(hub: HubServer, run: Path, manifest_path: Path) -> None:
    first = publish(run, REPO, manifest=manifest_path, **FACTS)
    written = manifest_path.read_bytes()
    hub.requests.clear()
    second = publish(run, REPO, manifest=manifest_path, **FACTS)
    assert (first.committed, second.committed, commits(hub)) == (True, False, 1)
    assert (first.recorded, second.recorded) == (True, False)
    assert manifest_path.read_bytes() == written
    assert {request.method for request in hub.requests} == {"GET"}
    # Others may add files: ours are unchanged, and the recorded revision is still valid.
    hub.repositories[REPO].commit({**files_of(hub), "NOTES.md": b"hello"})
    assert not publish(run, REPO, manifest=manifest_path, **FACTS).committed
    assert manifest_path.read_bytes() == written


def test_retrained_model_is_a_new_commit_and_keeps_the_old_revision(
    hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe
) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    save_weights(timm.create_model(NAME, num_classes=10), run / "model.safetensors")
    with pytest.raises(manifest.ManifestError, match="other weights with this id"):
        publish(run, REPO, manifest=manifest_path, **FACTS)
    # A different tag does not let them replace the weights on main either.
    again = {"manifest": manifest_path, **FACTS, "tag": "again"}
    with pytest.raises(PublishConflictError, match=f"main has other weights, {ID}.*recorded revision stays"):
        publish(run, REPO, **again)
    assert commits(hub) == 1
    publish(run, REPO, replace=True, **again)
    assert commits(hub) == 2
    assert {record.id for record in records(manifest_path)} == {ID, f"{NAME}.again"}
    for record in records(manifest_path):
        assert sha256(files_of(hub, record.revision)["model.safetensors"]) == record.sha256


def test_files_of_others_are_not_overwritten(hub: HubServer, run: Path, manifest_path: Path) -> None:
    hub.create(REPO, {"README.md": b"mine", "model.safetensors": b"also mine"})
    before = files_of(hub)
    with pytest.raises(PublishConflictError, match=r"README\.md, model\.safetensors"):
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert (files_of(hub), records(manifest_path), hub.count("PUT", "")) == (before, [], 0)
    assert publish(run, REPO, manifest=manifest_path, replace=True, **FACTS).committed


def test_card_edited_on_the_hub_is_not_overwritten(hub: HubServer, run: Path, manifest_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    hub.repositories[REPO].commit({**files_of(hub), "README.md": b"edited on the page"})
    with pytest.raises(PublishConflictError, match=r"README\.md"):
        publish(run, REPO, manifest=manifest_path, description="Another sentence.", **FACTS)
    assert files_of(hub)["README.md"] == b"edited on the page"


def test_a_commit_by_others_in_the_meantime_is_reported(hub: HubServer, run: Path, manifest_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    written, other = manifest_path.read_bytes(), {**files_of(hub), "NOTES.md": b"hello"}
    hub.fail(method="POST", path=COMMIT, call=lambda: hub.repositories[REPO].commit(other))
    with pytest.raises(PublishConflictError, match="main moved from"):
        publish(run, REPO, manifest=manifest_path, description="Another sentence.", **FACTS)
    assert (files_of(hub), manifest_path.read_bytes()) == (other, written)
    publish(run, REPO, manifest=manifest_path, description="Another sentence.", **FACTS)
    assert b"Another sentence." in files_of(hub)["README.md"] and files_of(hub)["NOTES.md"] == b"hello"
    assert commits(hub) == 3


WRITES = [
    ("POST", "/api/repos/create"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/objects/verify"),
    ("POST", COMMIT),
]
CALLS = [path.strip("/").rpartition("/")[2] for _, path in WRITES]


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"lose": True}], ids=["503", "cut", "reply lost"])
@pytest.mark.parametrize(("method", "path"), WRITES, ids=CALLS)
def test_passing_faults_of_any_write_do_not_show(
    hub: HubServer, run: Path, manifest_path: Path, method: str, path: str, fault: dict[str, Any]
) -> None:
    hub.fail(method=method, path=path, **fault)
    done = publish(run, REPO, manifest=manifest_path, **FACTS)
    assert hub.faults[0].times == 0
    assert (commits(hub), done.record.revision) == (1, hub.repositories[REPO].refs["main"])
    assert records(manifest_path) == [done.record]


# Without "verify": an upload that was not verified is already there at the next attempt.
LASTING = [*WRITES[:5], *WRITES[6:], ("GET", "/api/models/")]


@pytest.mark.parametrize(("method", "path"), LASTING, ids=[*CALLS[:5], *CALLS[6:], "read"])
def test_lasting_faults_change_nothing_and_a_second_run_finishes(
    hub: HubServer, run: Path, manifest_path: Path, method: str, path: str
) -> None:
    written = manifest_path.read_bytes()
    hub.fail(method=method, path=path, status=503, times=None)
    with pytest.raises(client.HubUnavailableError, match="publish again later") as caught:
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert "Signature" not in str(caught.value) and TOKEN not in str(caught.value)
    assert (commits(hub), manifest_path.read_bytes()) == (0, written)
    hub.faults.clear()
    assert publish(run, REPO, manifest=manifest_path, **FACTS).committed
    assert (commits(hub), len(records(manifest_path))) == (1, 1)


STAGES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "in the upload": ("PUT", "/lfs/", {"delay": 1.0}, 0),
    "before the commit": ("POST", COMMIT, {"delay": 1.0, "drop": True}, 0),
    "after the commit": ("POST", COMMIT, {"delay": 1.0}, 1),
}


# The last stage is the delicate one; `-m exhaustive` adds the others.
@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[] if STAGES[name][3] else pytest.mark.exhaustive) for name in STAGES]
)
def test_killed_publication_is_finished_by_a_second_run(
    hub: HubServer, run: Path, manifest_path: Path, stage: str
) -> None:
    method, path, fault, expected = STAGES[stage]
    written = manifest_path.read_bytes()
    handled: list[None] = []
    hub.fail(method=method, path=path, call=lambda: handled.append(None), **fault)
    process = subprocess.Popen(
        command(run, manifest_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: hub.count(method, path) == 1)
        # The request has been sent, and the server is slow to respond.
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    wait_for(lambda: handled != [] and commits(hub) == expected)
    assert (commits(hub), manifest_path.read_bytes()) == (expected, written)
    assert [path.name for path in manifest_path.parent.iterdir() if path.name.startswith(".")] == []
    done = publish(run, REPO, manifest=manifest_path, **FACTS)
    assert (done.committed, commits(hub), records(manifest_path)) == (not expected, 1, [done.record])


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_without_access_the_error_says_so(
    hub: HubServer, run: Path, manifest_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(client.HubAccessError, match="hf auth login") as caught:
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert "hf_wrong" not in str(caught.value)
    assert (hub.repositories, records(manifest_path)) == ({}, [])


def test_private_means_private(hub: HubServer, run: Path, manifest_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, private=True, **FACTS)
    assert hub.repositories[REPO].private
    hub.create("someone/public", {})
    with pytest.raises(PublishConflictError, match="public"):
        publish(run, "someone/public", manifest=manifest_path, private=True, **FACTS)
    assert files_of(hub, repo_id="someone/public") == {}


def spoil_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Recipe], None]:
    def spoil(run: Path, recipe: Recipe) -> None:
        state = safetensors.torch.load_file(run / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, run / "model.safetensors")

    return spoil


def replace_by_pickle(run: Path, recipe: Recipe) -> None:
    torch.save(safetensors.torch.load_file(run / "model.safetensors"), run / "pytorch_model.bin")
    (run / "model.safetensors").unlink()


def truncate(run: Path, recipe: Recipe) -> None:
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1])


KEY = "conv_stem.weight"
UNFIT: dict[str, tuple[Callable[[Path, Recipe], Any], str]] = {
    "NaN": (spoil_weights(lambda s: s[KEY].view(-1)[3:4].fill_(float("nan"))), "NaN or infinite values: conv_stem"),
    "Inf": (spoil_weights(lambda s: s["classifier.bias"][0:1].fill_(float("inf"))), "NaN or infinite values: classif"),
    "missing key": (spoil_weights(lambda s: s.pop(KEY)), "1 missing: conv_stem.weight"),
    "surplus key": (spoil_weights(lambda s: s.update(extra=torch.zeros(1))), "1 unexpected: extra"),
    "shape": (spoil_weights(lambda s: s.update({KEY: torch.zeros(1, 3, 3, 3)})), "of another shape: conv_stem.weight"),
    "dtype": (spoil_weights(lambda s: s.update({KEY: s[KEY].double()})), "of another dtype: conv_stem.weight"),
    "overflow": (spoil_weights(lambda s: s[KEY].fill_(3e38)), "forward pass gives"),
    "variance": (spoil_weights(lambda s: s["bn1.running_var"].fill_(-1.0)), "negative variances: bn1.running_var"),
    "truncated": (truncate, "truncated or damaged"),
    "pickle only": (replace_by_pickle, "never a pickle"),
    "no recipe": (lambda run, recipe: (run / "recipe.yaml").unlink(), "recipe"),
    "bad recipe": (lambda run, recipe: (run / "recipe.yaml").write_text("lr: high"), "recipe is not valid"),
    "no metrics": (lambda run, recipe: (run / "metrics.csv").unlink(), "metrics are missing"),
    "bad metrics": (lambda run, recipe: (run / "metrics.csv").write_text("a,b\n1,2\n"), "metrics.csv is not"),
    "unfinished": (lambda run, recipe: write_metrics(run / "metrics.csv", rows(recipe)[:1]), "not finished"),
    "other run": (lambda run, recipe: write_metrics(run / "metrics.csv", rows(recipe, seed=5)), "from different runs"),
    "NaN loss": (
        lambda run, recipe: write_metrics(run / "metrics.csv", rows(recipe, test_loss=float("nan"))),
        "not finite",
    ),
    "changed code": (
        lambda run, recipe: write_metrics(run / "metrics.csv", rows(recipe, commit="1" * 40 + "+")),
        "the code differed from its commit 1111",
    ),
    "BatchNorm": (
        lambda run, recipe: (run / "recipe.yaml").write_text(dump_recipe(dataclasses.replace(recipe, norm="bn"))),
        "only UBN models",
    ),
    "picture": (lambda run, recipe: (run / "plot.png").write_bytes(b"<script>"), "plot.png"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_for_the_public_is_refused(
    hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe, case: str
) -> None:
    spoil, reason = UNFIT[case]
    spoil(run, recipe)
    with pytest.raises(PublishError) as caught:
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert any(reason in found for found in caught.value.reasons), caught.value.reasons
    assert (hub.requests, records(manifest_path)) == ([], [])


def test_all_reasons_come_at_once(
    hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    UNFIT["NaN"][0](run, recipe)
    (run / "metrics.csv").unlink()
    code = cli.main(["publish", str(run), "--repo", REPO, "--manifest", str(manifest_path)])
    captured = capsys.readouterr()
    assert (code, captured.out, hub.requests) == (1, "", [])
    for part in ("conv_stem.weight", "metrics are missing", "license", "tag", "dataset"):
        assert part in captured.err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"repo_id": "someone"}, "repo_id"),
        ({"repo_id": "../../etc"}, "repo_id"),
        ({"tag": "Not a tag"}, "tag"),
        ({"license": "all mine!"}, "license"),
        ({"source": "nosuch_ubn.tag"}, "id of a manifest record"),
    ],
)
def test_bad_arguments_are_refused(
    hub: HubServer, run: Path, manifest_path: Path, change: dict[str, Any], part: str
) -> None:
    arguments = {"source": run, "repo_id": REPO, "manifest": manifest_path, **FACTS, **change}
    with pytest.raises(PublishError, match=part):
        publish(arguments.pop("source"), arguments.pop("repo_id"), **arguments)
    assert hub.requests == []


METRICS = [
    {
        "name": "top1",
        "value": 70.5,
        "dataset": "Imagenette",
        "split": "validation",
        "measured": {"command": "ubn-zoo validate", "seeds": [], "commit": None},
    }
]


def test_the_moving_average_of_a_run_is_published(
    hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe, trained: nn.Module
) -> None:
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    state[KEY] *= 0.5
    safetensors.torch.save_file(state, run / "model_ema.safetensors")
    averaged = dataclasses.replace(recipe, ema_decay=0.99)
    (run / "recipe.yaml").write_text(dump_recipe(averaged))
    write_metrics(run / "metrics.csv", rows(averaged, ema_top1=70.5))
    record = publish(run, REPO, manifest=manifest_path, **FACTS).record
    assert record.sha256 == sha256((run / "model_ema.safetensors").read_bytes())
    assert [metric.value for metric in record.metrics] == [70.5]


def test_a_run_as_the_engine_leaves_it_is_published(hub: HubServer, manifest_path: Path, tmp_path: Path) -> None:
    source = dataclasses.replace(RECIPE, model=SIBLING, epochs=1, warmup_epochs=0.0, threshold=0.3)
    data = MemoryTrain(source, striped_images(64, 1), Ranks()), MemoryEval(source, striped_images(16, 2), Ranks())
    folder = run_recipe(source, "", tmp_path / "run", data=data).folder
    # The working tree may have uncommitted changes.
    table = [dataclasses.replace(row, commit="1" * 40) for row in read_metrics(folder / "metrics.csv")]
    write_metrics(folder / "metrics.csv", table)
    done = publish(folder, REPO, manifest=manifest_path, **FACTS)
    assert {"loss_accuracy.png", "learning_rate.png", "similarity.png"} <= {file.name for file in done.files}
    assert done.record.num_classes == 2
    assert done.record.input.size == (3, 32, 32)
    model = timm.create_model(f"hf-hub:{REPO}@{done.record.revision}", pretrained=True)
    assert model.bn1.threshold == 0.3
    assert model.pretrained_cfg["label_names"] == ["horizontal", "vertical"]


def test_folder_in_timms_format(
    hub: HubServer, run: Path, manifest_path: Path, trained: nn.Module, tmp_path: Path
) -> None:
    names = [f"class {number}" for number in range(10)]
    folder = tmp_path / "checkpoint"
    save_for_hf(
        trained,
        str(folder),
        model_config={"label_names": names, "pretrained_cfg": {"tag": "mine", "license": "mit"}},
        data_config={"input_size": (3, 48, 48)},
        safe_serialization=True,
    )
    with pytest.raises(PublishError, match=r"recipe is missing.*metrics are missing.*dataset is missing"):
        publish(folder, REPO, manifest=manifest_path)
    (tmp_path / "measured.json").write_text(json.dumps(METRICS))
    given = {"recipe": run / "recipe.yaml", "metrics": tmp_path / "measured.json", "dataset": "Imagenette"}
    record = publish(folder, REPO, manifest=manifest_path, **given).record
    assert (record.id, record.license, record.input.size) == (f"{NAME}.mine", "mit", (3, 48, 48))
    assert (record.metrics[0].value, record.metrics[0].measured.command) == (70.5, "ubn-zoo validate")
    assert json.loads(files_of(hub)["config.json"])["label_names"] == names
    assert json.loads(files_of(hub)["metrics.json"]) == METRICS


def test_converted_file_names_its_base(hub: HubServer, manifest_path: Path, tmp_path: Path) -> None:
    sibling = timm.create_model(SIBLING)
    hub.create(f"timm/{SIBLING}.lamb_in1k", {"model.safetensors": safetensors.torch.save(sibling.state_dict())})
    output = tmp_path / "converted.safetensors"
    convert(NAME, output, cache_dir=tmp_path / "cache")
    (tmp_path / "measured.json").write_text(json.dumps(METRICS))
    facts = {"tag": "from_bn", "license": "apache-2.0", "dataset": "ImageNet-1k", "metrics": tmp_path / "measured.json"}
    record = publish(output, REPO, manifest=manifest_path, **facts).record
    assert record.recipe is None and record.origin.trained == f"converted from {SIBLING}.lamb_in1k"
    metadata = yaml.safe_load(files_of(hub)["README.md"].decode().split("---\n")[1])
    assert metadata["base_model"] == f"timm/{SIBLING}.lamb_in1k"
    assert "recipe.yaml" not in files_of(hub)
    unknown = tmp_path / "unknown.safetensors"
    safetensors.torch.save_file(sibling.state_dict(), unknown)
    with pytest.raises(PublishError, match="does not record its origin"):
        publish(unknown, REPO, manifest=manifest_path, **facts)


def test_record_moves_to_another_repository(hub: HubServer, run: Path, manifest_path: Path, tmp_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    arguments = {"manifest": manifest_path, "cache_dir": tmp_path / "cache"}
    with pytest.raises(PublishError, match="the recipe is missing"):
        publish(ID, "someone/else", **arguments)
    moved = publish(ID, "someone/else", recipe=run / "recipe.yaml", **arguments).record
    assert records(manifest_path) == [moved]
    assert (moved.repo_id, moved.revision) == ("someone/else", hub.repositories["someone/else"].refs["main"])
    mine, theirs = files_of(hub), files_of(hub, repo_id="someone/else")
    assert theirs["model.safetensors"] == mine["model.safetensors"] and theirs["recipe.yaml"] == mine["recipe.yaml"]
