"""Model cards: a card states what the run recorded and how to repeat it, and shows every text as plain text."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml

from tests.hub_server import HubServer, sha256
from tests.images import write_image_folder
from tests.release.common import FACTS, REPO, files_of, records
from ubn_zoo import cli
from ubn_zoo.errors import PublishError
from ubn_zoo.evaluation.metrics import read_metrics, write_metrics
from ubn_zoo.recipes.schema import Recipe, apply_settings, decisive_settings, dump_recipe, load_recipe, parse_recipe
from ubn_zoo.release.run_record import train_command
from ubn_zoo.release.upload import publish
from ubn_zoo.training.build import complete
from ubn_zoo.training.run import run as run_recipe
from ubn_zoo.utils.sanitize import code, escape, find_secret, hide_secrets

BASE = "timm/resnet10t.c3_in1k"
SETTINGS = ["model=resnet10t", "pretrained=true", "epochs=1", "data_name=Stripes & <b>bars</b>", "license=mit"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


def as_committed(folder: Path) -> None:
    """Pretend that the code was committed, since the working tree may have uncommitted changes."""
    table = [dataclasses.replace(row, commit="1" * 40) for row in read_metrics(folder / "metrics.csv")]
    write_metrics(folder / "metrics.csv", table)


def carry_out(command: str, images: Path, folder: Path) -> None:
    """Run the training command of a card."""
    words = shlex.split(command)
    assert words[:3] == ["ubn-zoo", "train", "--recipe"]
    assert words[4:8] == ["--data-dir", "DIR", "--output", "RUN"]
    assert words[8:9] in ([], ["--set"])
    run_recipe(apply_settings(load_recipe(words[3]), words[9:]), images, folder)


@pytest.fixture(scope="module")
def store() -> dict[str, Any]:
    """What the first use of `finished` leaves for the next."""
    return {}


@pytest.fixture
def finished(
    hub: HubServer,
    images: Path,
    store: dict[str, Any],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of a run of the smoke recipe with other settings, whose base model is on the Hub."""
    if not store:
        torch.manual_seed(5)
        hub.create(BASE, {"model.safetensors": safetensors.torch.save(timm.create_model("resnet10t").state_dict())})
        command = ["train.py", "--recipe", "smoke", "--data-dir", "/home/me/secret", "--output", "x", "--set"]
        monkeypatch.setattr("sys.argv", [*command, *SETTINGS])
        folder = tmp_path_factory.mktemp("runs") / "run"
        run_recipe(apply_settings(load_recipe("smoke"), SETTINGS), images, folder)
        as_committed(folder)
        store.update(folder=folder, base=hub.repositories[BASE])
    hub.repositories[BASE] = store["base"]
    return Path(shutil.copytree(store["folder"], tmp_path / "run"))


def test_a_changed_recipes_run_is_published_by_one_option_and_repeated_from_its_card(
    hub: HubServer, finished: Path, images: Path, manifest_path: Path, tmp_path: Path
) -> None:
    folder = finished
    assert cli.main(["publish", str(folder), "--repo", REPO, "--manifest", str(manifest_path)]) == 0
    published, (record,) = files_of(hub), records(manifest_path)
    card = published["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)

    # The weights: the moving average, and the base model.
    assert published["model.safetensors"] == (folder / "model_ema.safetensors").read_bytes()
    assert (metadata["base_model"], metadata["base_model_relation"]) == (BASE, "finetune")
    head = hub.repositories[BASE].refs["main"]
    base_sha256 = sha256(files_of(hub, repo_id=BASE)["model.safetensors"])
    for part in (f"`{BASE}` at revision `{head}`", base_sha256, "moving average of the trained weights, decay 0.9"):
        assert part in body

    # The figure, and what it was measured on.
    row = read_metrics(folder / "metrics.csv")[-1]
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "Stripes & <b>bars</b>" and result["dataset"]["split"] == "test"
    (metric,) = result["metrics"]
    assert (metric["value"], metric["args"]["images"], metric["args"]["seeds"]) == (row.ema_top1, 32, [0])
    assert metric["args"]["weights"].startswith("moving average")
    assert "Measured on 32 held-out images" in body
    assert (metadata["license"], record.license, record.tag) == ("mit", "mit", "stripes_b_bars_b")
    for part in ("horizontal, vertical", "one process on the CPU", "torch 2", "## Citation", "2311.15993"):
        assert part in body
    for part in ("## Intended use and limits", "Seed: 0 (one run)", "<b>", "/home/me"):
        assert (part in body) == (not part.startswith(("<", "/"))), part

    # The command, the same everywhere.
    command = metric["args"]["command"]
    settings = "--set model=resnet10t pretrained=true epochs=1"
    assert command == f"ubn-zoo train --recipe smoke --data-dir DIR --output RUN {settings}"
    assert f"```\n{command}\n```" in body
    assert record.metrics[0].measured.command == command and command in record.origin.trained
    assert record.origin.trained.endswith(f"starting from {BASE}@{head}")
    carry_out(command, images, tmp_path / "again")
    for name in ("model.safetensors", "model_ema.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    # The published recipe trains the same.
    repeated = load_recipe(tmp_path / "again" / "recipe.yaml")
    assert decisive_settings(parse_recipe(published["recipe.yaml"].decode())) == decisive_settings(repeated)

    # Measured again, with the published files; the record gets the command that everybody else can run.
    done = publish(folder, REPO, manifest=manifest_path, remeasure=images, dry_run=True)
    assert done.record.metrics[0].value == row.ema_top1
    check = f"ubn-zoo validate --model hf-hub:{REPO} --data-dir DIR --split test --samples 128"
    assert done.record.metrics[0].measured.command == check
    assert "Measured again before publication" in done.card and check in body


@pytest.mark.exhaustive
def test_a_published_recipe_repeats_its_run(finished: Path, images: Path, manifest_path: Path, tmp_path: Path) -> None:
    done = publish(finished, REPO, manifest=manifest_path, dry_run=True)
    (tmp_path / "recipe.yaml").write_bytes(next(file.content for file in done.files if file.name == "recipe.yaml"))
    carry_out(f"ubn-zoo train --recipe {tmp_path}/recipe.yaml --data-dir DIR --output RUN", images, tmp_path / "third")
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def forge(folder: Path, **changes: Any) -> None:
    table = read_metrics(folder / "metrics.csv")
    write_metrics(folder / "metrics.csv", [*table[:-1], dataclasses.replace(table[-1], **changes)])


def test_forged_figures_are_refused(
    hub: HubServer, finished: Path, images: Path, manifest_path: Path, tmp_path: Path
) -> None:
    folder = finished
    true = read_metrics(folder / "metrics.csv")[-1].ema_top1
    assert true is not None
    other = 96.875 if true < 90 else 3.125
    for forged, reason in [
        (999.0, "from 0 to 100 percent"),
        (99.9, "not a whole number of correct answers out of 32"),
        (other, "in the run's newest checkpoint"),
    ]:
        forge(folder, ema_top1=forged)
        with pytest.raises(PublishError, match=reason):
            publish(folder, REPO, manifest=manifest_path)
    # Without checkpoints only a second measurement can tell.
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    publish(folder, REPO, manifest=manifest_path, dry_run=True)
    with pytest.raises(
        PublishError, match=f"top1 is {other:g} in its record, but {true:g} measured again on 32 images"
    ):
        publish(folder, REPO, manifest=manifest_path, remeasure=images)
    assert REPO not in hub.repositories


def test_figures_of_a_json_file_are_percentages(run: Path, manifest_path: Path, tmp_path: Path) -> None:
    metric = {"name": "top1", "value": 101.0, "dataset": "x", "split": "test"}
    measured = {"command": "ubn-zoo validate", "seeds": [], "commit": None}
    (tmp_path / "metrics.json").write_text(json.dumps([{**metric, "measured": measured}]))
    with pytest.raises(PublishError, match="top1 is 101; valid: from 0 to 100 percent"):
        publish(run, REPO, manifest=manifest_path, metrics=tmp_path / "metrics.json", dry_run=True, **FACTS)


@pytest.mark.parametrize("content", [None, "{}", '{"starts": []}', "not JSON"])
def test_a_run_without_its_environment_is_refused(run: Path, manifest_path: Path, content: str | None) -> None:
    path = run / "environment.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(PublishError, match=r"environment\.json is (missing|not what training writes)"):
        publish(run, REPO, manifest=manifest_path, dry_run=True, **FACTS)


def test_a_checkpoints_folder_stays_private(run: Path, manifest_path: Path, recipe: Recipe) -> None:
    mine = dataclasses.replace(recipe, checkpoint="/home/me/runs/base/model.safetensors")
    (run / "recipe.yaml").write_text(dump_recipe(mine))
    done = publish(run, REPO, manifest=manifest_path, dry_run=True, **FACTS)
    assert all(b"/home/me" not in file.content for file in done.files)
    assert "checkpoint=model.safetensors" in done.record.metrics[0].measured.command


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["epochs=3", "mean=[0.1, 0.2, 0.3]", "ema_decay=null"],
        ["model=resnet10t", "img_size=96", "crop_pct=0.9", "auto_augment=rand-m7-mstd0.5-inc1", "lr=1e-5"],
        ["norm=rbn", "num_classes=7", "test_split=val", "drop_rate=0.1"],
    ],
)
@pytest.mark.parametrize("ranks", [1, 8])
def test_commands_lead_to_the_runs_settings(settings: list[str], ranks: int) -> None:
    wanted = complete(apply_settings(load_recipe("smoke"), settings))
    ran = dataclasses.replace(wanted, num_classes=wanted.num_classes or 5)
    words = shlex.split(train_command(ran, ranks=ranks, classes=5))
    start = ["ubn-zoo"] if ranks == 1 else ["torchrun", "--nproc-per-node", "8", "-m", "ubn_zoo"]
    assert words[: len(start)] == start
    recipe = load_recipe(words[words.index("--recipe") + 1])
    changed = words[words.index("--set") + 1 :] if "--set" in words else []
    assert len(changed) == len(settings)
    assert complete(apply_settings(recipe, changed)) == wanted


def test_a_recipe_of_the_users_own_is_repeated_from_its_file() -> None:
    mine = dataclasses.replace(complete(load_recipe("smoke")), source="me", num_classes=5)
    assert train_command(mine, classes=5) == "ubn-zoo train --recipe recipe.yaml --data-dir DIR --output RUN"


HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "a | b | c",
    "# heading",
    "- item",
    "1. item",
    "`code` **bold** _it_ ~~s~~ $x$",
    "https://evil.example/x",
    "back\\slash &amp; &lt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_stay_texts(text: str, run: Path, manifest_path: Path) -> None:
    """An independent Markdown parser finds exactly this text, and no elements but the page's own."""
    markdown = pytest.importorskip("markdown")
    element_tree = pytest.importorskip("xml.etree.ElementTree")
    html = markdown.markdown(f"{escape(text)}\n\n| a |\n|---|\n| {escape(text)} |", extensions=["tables"])
    root = element_tree.fromstring(f"<r>{html}</r>")
    assert {node.tag for node in root.iter()} <= {"r", "p", "table", "thead", "tbody", "tr", "th", "td"}, html
    plain = [" ".join("".join(node.itertext()).split()) for node in root.iter() if node.tag in ("p", "td")]
    # GitHub's and the Hub's Markdown know these escapes too; this parser shows their backslash.
    shown = [re.sub(r"\\([~$|])", r"\1", part) for part in plain]
    assert shown == [text, text], html
    card = publish(
        run, REPO, manifest=manifest_path, dry_run=True, **{**FACTS, "dataset": text, "description": text}
    ).card
    body = card.split("---\n", 2)[2]
    assert escape(text) in body and "<script" not in body


@pytest.mark.parametrize("text", ["a | b", "`", "``x``", "a ` b | c", "<b>", "plain"])
def test_code_is_shown_as_it_is(text: str) -> None:
    markdown = pytest.importorskip("markdown")
    html = markdown.markdown(f"| a |\n|---|\n| {code(text, cell=True)} |", extensions=["tables"])
    cell = html.split("<td><code>")[1].split("</code></td>")[0]
    assert cell.replace("&lt;", "<").replace("&gt;", ">").replace(r"\|", "|").strip() == text


SECRETS = [
    ("HF_TOKEN=hf_AbCdEfGhIjKlMnOp ubn-zoo train", "HF_TOKEN=*** ubn-zoo train"),
    ("HF_TOKEN=abc python x", "HF_TOKEN=*** python x"),
    ("train --set x=hf_abcdefghij0123456789", "train --set x=***"),
    ("WANDB_API_KEY=123 torchrun", "WANDB_API_KEY=*** torchrun"),
    ("x --token abcdef", "x --token ***"),
    ("git clone https://me:pass@host/x", "git clone https://***@host/x"),
    ("ubn-zoo train --set dataset=hfds/a", "ubn-zoo train --set dataset=hfds/a"),
    ("from huggingface_hub import hf_hub_download", "from huggingface_hub import hf_hub_download"),
    ("x never_to_be_seen", "x never_to_be_seen"),
]


@pytest.mark.parametrize(("text", "hidden"), SECRETS)
def test_secrets_are_hidden(text: str, hidden: str) -> None:
    assert hide_secrets(text) == hidden
    assert (find_secret(text) is None) == (text == hidden)


def with_recipe_command(run: Path, recipe: Recipe) -> dict[str, Any]:
    secret = dataclasses.replace(recipe, command="HF_TOKEN=hf_AbCdEfGhIjKlMnOp ubn-zoo train")
    (run / "recipe.yaml").write_text(dump_recipe(secret))
    return {}


def with_description(run: Path, recipe: Recipe) -> dict[str, Any]:
    return {"description": "Made with hf_AbCdEfGhIjKlMnOp"}


@pytest.mark.parametrize("spoil", [with_recipe_command, with_description])
def test_files_with_secrets_are_refused(
    hub: HubServer, run: Path, manifest_path: Path, recipe: Recipe, spoil: Callable[[Path, Recipe], dict[str, Any]]
) -> None:
    with pytest.raises(PublishError, match="what looks like a secret") as caught:
        publish(run, REPO, manifest=manifest_path, **{**FACTS, **spoil(run, recipe)})
    assert "hf_AbCd" not in str(caught.value)
    assert hub.requests == []


def test_secrets_in_commands_of_metrics_are_hidden_with_a_warning(
    run: Path, manifest_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured = {"command": "HF_TOKEN=hf_AbCdEfGhIjKlMnOp ubn-zoo validate", "seeds": [], "commit": None}
    metric = {"name": "top1", "value": 50.0, "dataset": "x", "split": "test", "measured": measured}
    (tmp_path / "metrics.json").write_text(json.dumps([metric]))
    done = publish(run, REPO, manifest=manifest_path, metrics=tmp_path / "metrics.json", dry_run=True, **FACTS)
    assert done.record.metrics[0].measured.command == "HF_TOKEN=*** ubn-zoo validate"
    assert all(b"hf_AbCd" not in file.content for file in done.files)
    assert "looks like a secret" in caplog.text and "hf_AbCd" not in caplog.text


@pytest.mark.parametrize("base", ["a/b\nlicense: mit", "a/b/c", "a b", "../x", ""])
def test_base_models_are_names_of_repositories(run: Path, manifest_path: Path, base: str) -> None:
    with pytest.raises(PublishError, match="base_model"):
        publish(run, REPO, manifest=manifest_path, base_model=base, dry_run=True, **FACTS)


def test_classes_and_base_models_of_the_record_are_shown_as_texts(run: Path, manifest_path: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    environment["starts"][0]["data"]["classes"][0] = "<img src=x onerror=alert(1)>"
    (run / "environment.json").write_text(json.dumps(environment))
    done = publish(run, REPO, manifest=manifest_path, base_model=f"timm/x@{'2' * 40}", dry_run=True, **FACTS)
    assert "<img" not in done.card and "&lt;img" in done.card
    assert f"`timm/x` at revision `{'2' * 40}`" in done.card
    assert yaml.safe_load(done.card.split("---\n")[1])["base_model"] == "timm/x"


def test_the_card_of_an_extended_run_says_so(run: Path, manifest_path: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    (start,) = environment["starts"]
    environment["starts"] = [{**start, "epochs": epochs} for epochs in (1, 1, 2)]
    (run / "environment.json").write_text(json.dumps(environment))
    done = publish(run, REPO, manifest=manifest_path, dry_run=True, **FACTS)
    assert "- Epochs: 2; the run was finished after 1 and then extended, with the learning rates" in done.card
