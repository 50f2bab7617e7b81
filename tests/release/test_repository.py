"""Repositories and manifests in trouble: deleted, squashed, used by others, locked, read-only, with odd responses."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from pathlib import Path

import pytest
import timm
import torch

from tests.hub_server import HubServer, sha256
from tests.release.common import COMMIT, FACTS, ID, OPTIONS, PICTURE, REPO, commits, files_of, records
from ubn_zoo import cli
from ubn_zoo.errors import HubError, ManifestError, NotRecordedError, PublishConflictError
from ubn_zoo.hub import manifest
from ubn_zoo.recipes.schema import Recipe, dump_recipe
from ubn_zoo.release import upload
from ubn_zoo.release.upload import publish
from ubn_zoo.training.run import save_weights
from ubn_zoo.utils.files import locked

OTHER = "resnet10t"


@pytest.fixture
def other_run(run: Path, recipe: Recipe, tmp_path: Path) -> Path:
    """A run of another architecture, without plots."""
    folder = Path(shutil.copytree(run, tmp_path / "other"))
    torch.manual_seed(1)
    save_weights(timm.create_model(f"{OTHER}_ubn", num_classes=10), folder / "model.safetensors")
    (folder / "recipe.yaml").write_text(dump_recipe(dataclasses.replace(recipe, model=OTHER)))
    table = (folder / "metrics.csv").read_text().replace(recipe.model, OTHER)
    (folder / "metrics.csv").write_text(table)
    (folder / "training.png").unlink()
    return folder


@pytest.mark.parametrize("replace", [False, True])
def test_a_recorded_revision_that_is_gone_is_recorded_anew(
    hub: HubServer, run: Path, manifest_path: Path, replace: bool
) -> None:
    first = publish(run, REPO, manifest=manifest_path, **FACTS).record
    del hub.repositories[REPO]
    hub.create(REPO, {"NOTES.md": b"made anew"})
    done = publish(run, REPO, manifest=manifest_path, replace=replace, **FACTS)
    assert done.recorded and done.record.revision == hub.repositories[REPO].refs["main"] != first.revision
    assert records(manifest_path) == [done.record]


def test_squashed_history_is_recorded_anew(hub: HubServer, run: Path, manifest_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    squashed = files_of(hub)
    hub.create(REPO, squashed)
    head = hub.repositories[REPO].commit(squashed)
    hub.repositories[REPO].commits = {head: squashed}
    done = publish(run, REPO, manifest=manifest_path, **FACTS)
    assert (done.committed, done.recorded, done.record.revision) == (False, True, head)
    # Now it exists, so a second publication changes nothing.
    assert not publish(run, REPO, manifest=manifest_path, **FACTS).recorded


def test_another_model_is_refused_and_replaced_as_a_whole(
    hub: HubServer, run: Path, other_run: Path, manifest_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = publish(run, REPO, manifest=manifest_path, **FACTS).record
    before, written = files_of(hub), manifest_path.read_bytes()
    with pytest.raises(PublishConflictError, match=rf"main has other weights, {ID}.*`replace=True`"):
        publish(other_run, REPO, manifest=manifest_path, **FACTS)
    assert cli.main(["publish", str(other_run), "--repo", REPO, "--manifest", str(manifest_path), *OPTIONS]) == 1
    message = capsys.readouterr().err
    assert "pass --replace to" in message and "replace=True" not in message
    assert (files_of(hub), manifest_path.read_bytes()) == (before, written)

    hub.repositories[REPO].commit({**before, "NOTES.md": b"hello", "logo.png": b"of others"})
    publish(other_run, REPO, manifest=manifest_path, replace=True, **FACTS)
    now = files_of(hub)
    assert "training.png" not in now  # the first model's plot
    assert now["recipe.yaml"] == (other_run / "recipe.yaml").read_bytes()
    assert (now["NOTES.md"], now["logo.png"]) == (b"hello", b"of others")
    # The first model is still available at its recorded revision.
    assert sha256(files_of(hub, first.revision)["model.safetensors"]) == first.sha256
    assert {record.id for record in records(manifest_path)} == {ID, f"{OTHER}_ubn.cifar10"}


def test_old_files_of_ours_are_removed(hub: HubServer, run: Path, manifest_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    (run / "training.png").rename(run / "loss.png")
    assert publish(run, REPO, manifest=manifest_path, **FACTS).committed
    assert {name for name in files_of(hub) if name.endswith(".png")} == {"loss.png"}
    # A plot that somebody else changed on the web page is theirs.
    hub.repositories[REPO].commit({**files_of(hub), "loss.png": PICTURE + b"theirs"})
    (run / "loss.png").unlink()
    with pytest.raises(PublishConflictError, match=r"loss\.png"):
        publish(run, REPO, manifest=manifest_path, **FACTS)


def test_a_pickle_on_main_is_refused_and_removed(hub: HubServer, run: Path, manifest_path: Path) -> None:
    hub.create(REPO, {"pytorch_model.bin": b"a pickle"})
    with pytest.raises(PublishConflictError, match=r"pytorch_model\.bin, which can run code when loaded"):
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert (files_of(hub), records(manifest_path)) == ({"pytorch_model.bin": b"a pickle"}, [])
    publish(run, REPO, manifest=manifest_path, replace=True, **FACTS)
    assert "pytorch_model.bin" not in files_of(hub)
    # It is also noticed beside an unchanged publication.
    hub.repositories[REPO].commit({**files_of(hub), "pytorch_model.bin": b"again"})
    with pytest.raises(PublishConflictError, match="which can run code when loaded"):
        publish(run, REPO, manifest=manifest_path, **FACTS)


def test_unwritable_manifest_is_found_before_the_upload(
    hub: HubServer, run: Path, manifest_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(upload.tempfile, "TemporaryFile", refuse)
    assert cli.main(["publish", str(run), "--repo", REPO, "--manifest", str(manifest_path), *OPTIONS]) == 1
    message = capsys.readouterr().err
    assert str(manifest_path) in message and "nothing was sent" in message and "--manifest FILE" in message
    assert hub.requests == []


def test_a_manifest_that_fails_after_the_upload_is_an_error_that_says_what_was_done(
    hub: HubServer, run: Path, manifest_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(manifest_path))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_file", full)
        with pytest.raises(NotRecordedError, match="No space left") as caught:
            publish(run, REPO, manifest=manifest_path, **FACTS)
    head = hub.repositories[REPO].refs["main"]
    for part in (REPO, head, str(manifest_path), "publish again", "no new commit"):
        assert part in str(caught.value)
    done = publish(run, REPO, manifest=manifest_path, **FACTS)
    assert (done.committed, done.recorded, done.record.revision, commits(hub)) == (False, True, head, 1)


def _add(path: str, tag: str) -> None:
    small = manifest.load_manifest(path).records[0]
    manifest.add_record(dataclasses.replace(small, id=f"{small.architecture}.{tag}", tag=tag), path)


def test_records_of_many_processes_are_all_kept(hub: HubServer, run: Path, manifest_path: Path) -> None:
    publish(run, REPO, manifest=manifest_path, **FACTS)
    tags = [f"tag{number}" for number in range(12)]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_add, [(str(manifest_path), tag) for tag in tags], chunksize=1)
    assert {record.tag for record in records(manifest_path)} == {*tags, "cifar10"}
    assert [path.name for path in manifest_path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_record_added_in_the_meantime_is_not_overwritten(hub: HubServer, run: Path, manifest_path: Path) -> None:
    """Of two publishers of one id, the second to finish gets an error, and nothing is lost."""
    record = publish(run, REPO, manifest=manifest_path, dry_run=True, **FACTS).record
    theirs = dataclasses.replace(record, repo_id="another/one", revision="2" * 40, sha256="3" * 64)
    hub.fail(method="POST", path=COMMIT, call=lambda: manifest.add_record(theirs, manifest_path))
    with pytest.raises(NotRecordedError, match=f"record '{ID}': already in"):
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert records(manifest_path) == [theirs]
    with pytest.raises(ManifestError, match="other weights with this id"):
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert publish(run, REPO, manifest=manifest_path, replace=True, **FACTS).record.repo_id == REPO


def test_a_lock_that_is_never_released_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with (
        locked(path),
        pytest.raises(TimeoutError, match=r"another process has held its lock for 0\.1 s"),
        locked(path, timeout=0.1),
    ):
        pass
    assert list(tmp_path.iterdir()) == [path]


ANSWERS = {
    "409 without url": (409, b'{"error": "You already created this model repo"}'),
    "created without url": (200, b"{}"),
    "a list": (200, b"[1, 2]"),
    "null": (200, b"null"),
    "refused": (422, b'{"error": "no such thing here"}'),
    "teapot": (418, b"<html>a login page</html>"),
}


PATHS = {
    "/api/repos/create": ("POST", tuple(ANSWERS)),
    COMMIT: ("POST", tuple(ANSWERS)),
    "/preupload/": ("POST", ("a list", "teapot")),
    "/objects/batch": ("POST", ("a list", "teapot")),
    "/tree/": ("GET", ("a list", "null", "created without url", "teapot")),
    "/api/models/": ("GET", ("a list", "teapot")),
}


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [(method, path, answer) for path, (method, answers) in PATHS.items() for answer in answers],
)
def test_any_response_is_an_error_with_its_status(
    hub: HubServer, run: Path, manifest_path: Path, method: str, path: str, answer: str
) -> None:
    status, body = ANSWERS[answer]
    hub.fail(method=method, path=path, status=status, body=body, times=None)
    with pytest.raises(HubError) as caught:
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert REPO in str(caught.value)
    # An empty object as listing looks like an empty repository, so the commit fails instead.
    if (path, body) != ("/tree/", b"{}"):
        assert f"HTTP {status}" in str(caught.value)
    assert records(manifest_path) == []
