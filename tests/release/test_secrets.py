"""Whatever fails, commands never print or log tokens and passwords, and still say what is wrong."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
from huggingface_hub import constants

from tests.hub_server import HubServer
from tests.release.common import COMMIT, FACTS, NAME, OPTIONS, REPO, SIBLING, TOKEN, commits, records
from ubn_zoo import cli
from ubn_zoo.errors import HubAccessError, UbnZooError
from ubn_zoo.hub import retry
from ubn_zoo.release.upload import publish

TAG = f"{NAME}.bn_lamb_in1k"
UPSTREAM = f"timm/{SIBLING}.lamb_in1k"
READ = ("/resolve/", "/lfs/", "/resolve/", "/resolve/")
WRITE = ("/api/models/", "/preupload/", "/objects/batch", "/lfs/", COMMIT, COMMIT, COMMIT)
# Faults; the body of one repeats what was sent.
FAULTS: dict[str, dict[str, Any]] = {
    "dropped": {"drop": True},
    "server error": {"status": 503},
    "quoted": {"status": 400, "body": f"bad: https://me:SECRET@host/x?Signature=SIGNED and {TOKEN}".encode()},
    "redirected": {"status": 302, "header": {"Location": "file:///etc/passwd?X-Amz-Signature=SIGNED"}},
}


@pytest.fixture
def commands(hub: HubServer, run: Path, manifest_path: Path, tmp_path: Path) -> dict[str, list[str]]:
    hub.token = None  # the address has a password instead
    hub.create(UPSTREAM, {"model.safetensors": safetensors.torch.save(timm.create_model(SIBLING).state_dict())})
    cache = ["--cache-dir", str(tmp_path / "cache")]
    return {
        "download": ["download", TAG, *cache],
        "verify": ["verify", TAG, *cache],
        "convert": ["convert", TAG, "--output", str(tmp_path / "x.safetensors"), *cache],
        "publish": ["publish", str(run), "--repo", REPO, "--manifest", str(manifest_path), *OPTIONS],
    }


def use_endpoint(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set HF_ENDPOINT, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = "{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{template}")


# `verify` and `convert` download as `download` does.
@pytest.mark.parametrize(
    "name",
    ["download", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("verify", "convert")), "publish"],
)
def test_no_command_shows_a_secret(
    hub: HubServer,
    commands: dict[str, list[str]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="ubn_zoo")
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0")
    use_endpoint(hub.endpoint.replace("http://", "http://me:SECRET@"), monkeypatch)
    # Every kind of request fails in a different way.
    for path, fault in zip(WRITE if name == "publish" else READ, itertools.cycle(FAULTS.values())):
        for method in ("HEAD", "GET", "POST", "PUT"):
            hub.fail(method=method, path=path, times=None, **fault)
        assert cli.main(commands[name]) == 1, (path, fault)
        hub.faults.clear()
    use_endpoint("http://me:SECRET@127.0.0.1:9", monkeypatch)
    assert cli.main(commands[name]) == 1
    shown = capsys.readouterr()
    text = shown.out + shown.err + caplog.text
    assert "127.0.0.1" in text and "Traceback" not in text
    for secret in ("SECRET", "SIGNED", TOKEN):
        assert secret not in text, next(line for line in text.splitlines() if secret in line)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_no_traceback_of_an_upload_shows_a_secret(
    hub: HubServer, run: Path, manifest_path: Path, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = None
    use_endpoint(hub.endpoint.replace("http://", "http://me:SECRET@"), monkeypatch)
    for method, path in (("PUT", "/lfs/"), ("POST", COMMIT)):
        hub.fail(method=method, path=path, times=None, **fault)
        with pytest.raises(UbnZooError, match=rf"^{REPO} at http://127\.0\.0\.1") as caught:
            publish(run, REPO, manifest=manifest_path, **FACTS)
        text = "".join(traceback.format_exception(caught.value))
        assert not [word for word in ("SECRET", "SIGNED", TOKEN) if word in text], text
        hub.faults.clear()
    assert (commits(hub), records(manifest_path)) == (0, [])


def test_a_token_that_is_not_ascii_is_explained_by_every_command(
    hub: HubServer,
    commands: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s\u00e9cret\u2026")
    for arguments in commands.values():
        assert cli.main(arguments) == 1
        shown = capsys.readouterr()
        assert "token contains non-ASCII characters" in shown.out + shown.err
        assert "codec" not in shown.out + shown.err and "cret\u2026" not in shown.out + shown.err


def test_a_refused_token_is_not_quoted(
    hub: HubServer, run: Path, manifest_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "another"
    with pytest.raises(HubAccessError, match="hf auth login") as caught:
        publish(run, REPO, manifest=manifest_path, **FACTS)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def _full(*arguments: object, **settings: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# The function that fails to write, and the option whose value the message names.
FULL = {
    "download": ("huggingface_hub.file_download.http_get", "--cache-dir"),
    "verify": ("huggingface_hub.file_download.http_get", "--cache-dir"),
    "convert": ("ubn_zoo.utils.files.os.fsync", "--output"),
    "publish": ("ubn_zoo.utils.files.os.fsync", "--manifest"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_names_the_file(
    hub: HubServer,
    commands: dict[str, list[str]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, option = FULL[name]
    if name == "convert":
        assert cli.main(commands["download"]) == 0
    monkeypatch.setattr(target, _full)
    assert cli.main(commands[name]) == 1
    shown = capsys.readouterr()
    text = shown.out + shown.err
    named = commands[name][commands[name].index(option) + 1]
    assert "No space left on device" in text and named in text, text
