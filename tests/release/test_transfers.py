"""Large files, sent by the real clients in parts and through Xet, and what happens when a part or the storage fails."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests import xet
from tests.hub_server import HubServer, sha256
from tests.release.common import COMMIT, FACTS, REPO, TOKEN, commits, files_of, records
from ubn_zoo.errors import ChecksumError, HubAccessError, HubError, HubUnavailableError
from ubn_zoo.hub.fetch import fetch, fetch_record
from ubn_zoo.release.repository import File, Repository
from ubn_zoo.release.upload import publish

FILE = "model.safetensors"
SIZE = 200_000
PART, COMPLETE = "/parts/", "/complete/"
WRITE_TOKEN, XORB, SHARD = "/xet-write-token/", "/cas/v1/xorbs/", "/cas/v1/shards"
SEEDS = itertools.count()


@pytest.fixture
def content() -> bytes:
    """Bytes that no other test has sent, because the Xet client remembers what it sent."""
    return random.Random(next(SEEDS)).randbytes(SIZE)


@pytest.fixture
def in_parts(hub: HubServer) -> None:
    """Make the server ask for parts."""
    hub.part_size = SIZE // 4 + 1


@pytest.fixture
def with_xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> xet.Storage:
    """Enable Xet on server and client."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = xet.Storage()
    return hub.xet


def send(content: bytes) -> str:
    """Publish a single file as `publish` does, and return the commit."""
    file = File(FILE, content, sha256(content))
    return Repository(REPO).publish([file], "x", private=False, recorded=(), others={}, replace=False)[0]


def test_a_published_file_in_parts_arrives_whole(
    hub: HubServer, run: Path, manifest_path: Path, tmp_path: Path
) -> None:
    content = (run / FILE).read_bytes()
    hub.part_size = len(content) // 4 + 1
    hub.fail(method="PUT", path=f"{PART}.*/3", status=500)
    record = publish(run, REPO, manifest=manifest_path, **FACTS).record
    assert (record.sha256, record.bytes, records(manifest_path)) == (sha256(content), len(content), [record])
    assert files_of(hub, record.revision)[FILE] == content
    assert (hub.count("PUT", PART), hub.count("POST", COMPLETE), hub.count("PUT", "/lfs/")) == (4 + 1, 1, 0)
    assert all(len(part) <= hub.part_size for part in hub.parts.values())
    # The URLs are signed and do not get the token.
    assert {request.authorization for request in hub.requests if PART in request.path} == {None}
    assert fetch_record(record, cache_dir=tmp_path / "cache").read_bytes() == content


LOST = {"503": {"status": 503}, "cut": {"drop": True}, "reply lost": {"lose": True}}


@pytest.mark.parametrize("path", [("PUT", f"{PART}.*/3"), ("POST", COMPLETE)], ids=["part", "completion"])
@pytest.mark.parametrize("fault", LOST.values(), ids=LOST.keys())
def test_a_lost_part_is_sent_again(
    hub: HubServer, content: bytes, in_parts: None, path: tuple[str, str], fault: dict[str, Any]
) -> None:
    hub.fail(method=path[0], path=path[1], **fault)
    assert files_of(hub, send(content))[FILE] == content
    assert (hub.count(*path) >= 2, commits(hub)) == (True, 1)


@pytest.mark.parametrize("path", [("PUT", f"{PART}.*/3"), ("POST", COMPLETE)], ids=["part", "completion"])
def test_parts_that_never_arrive_leave_main_as_it_was(
    hub: HubServer, content: bytes, in_parts: None, path: tuple[str, str]
) -> None:
    hub.fail(method=path[0], path=path[1], status=503, times=None)
    with pytest.raises(HubUnavailableError, match="HTTP 503; gave up .* publish again later") as caught:
        send(content)
    assert "Signature" not in str(caught.value) and TOKEN not in str(caught.value)
    assert commits(hub) == 0
    hub.faults.clear()
    assert files_of(hub, send(content))[FILE] == content


def test_parts_that_were_mixed_up_are_refused(hub: HubServer, content: bytes, in_parts: None) -> None:
    def mix() -> None:
        one, two = (key for key in hub.parts if key[1] in (1, 2))
        hub.parts[one], hub.parts[two] = hub.parts[two], hub.parts[one]

    hub.fail(method="POST", path=COMPLETE, call=mix)
    with pytest.raises(HubError, match="HTTP 400: .*the parts are not those of the file"):
        send(content)
    assert commits(hub) == 0


HEADERS = {"chunk size": {"chunk_size": "many"}, "addresses": {"chunk_size": "1000", "1": "http://127.0.0.1:9/x"}}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_instructions_that_make_no_sense_are_an_error(hub: HubServer, content: bytes, header: dict[str, str]) -> None:
    action = {"href": f"{hub.endpoint}/complete/{sha256(content)}", "header": header}
    answer = {"objects": [{"oid": sha256(content), "size": SIZE, "actions": {"upload": action}}]}
    hub.fail(method="POST", path="/objects/batch", status=200, body=json.dumps(answer).encode(), times=None)
    with pytest.raises(HubError, match=rf"^{REPO} at .*(Malformed response|Invalid server response).*HF_ENDPOINT"):
        send(content)
    assert commits(hub) == 0


def test_a_part_without_a_hash_is_an_error(hub: HubServer, content: bytes, in_parts: None) -> None:
    hub.fail(method="PUT", path=f"{PART}.*/3", header={"ETag": None})
    with pytest.raises(HubError, match=rf"^{REPO} at .*Invalid etag .* for part 3"):
        send(content)
    assert commits(hub) == 0


def test_a_publication_through_xet_there_and_back(
    hub: HubServer, run: Path, manifest_path: Path, with_xet: xet.Storage, tmp_path: Path
) -> None:
    content = (run / FILE).read_bytes()
    record = publish(run, REPO, manifest=manifest_path, **FACTS).record
    assert (record.sha256, record.bytes, records(manifest_path)) == (sha256(content), len(content), [record])
    assert files_of(hub, record.revision)[FILE] == content
    assert (hub.count("POST", XORB) > 0, hub.count("POST", SHARD), hub.count("PUT", "")) == (True, 1, 0)
    # The storage gets its own token; only the Hub gets the user's.
    for request in hub.requests:
        token = xet.TOKEN if "/cas/" in request.path else TOKEN
        assert request.authorization in (None, f"Bearer {token}")
    hub.requests.clear()
    assert fetch_record(record, cache_dir=tmp_path / "cache").read_bytes() == content
    assert hub.count("GET", "/cas/xorb/") > 0 and hub.count("GET", "/lfs/") == 0
    hub.requests.clear()
    assert not publish(run, REPO, manifest=manifest_path, **FACTS).committed
    assert {request.method for request in hub.requests} == {"GET"}


REFUSALS: dict[int, tuple[type[HubError], str]] = {
    404: (HubError, "Set HF_HUB_DISABLE_XET=1"),
    401: (HubAccessError, "hf auth login"),
    403: (HubAccessError, "hf auth login"),
}


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("path", [("GET", WRITE_TOKEN), ("POST", XORB)], ids=["token", "storage"])
def test_a_refused_upload_by_xet_says_what_to_do(
    hub: HubServer, content: bytes, with_xet: xet.Storage, status: int, path: tuple[str, str]
) -> None:
    kind, advice = REFUSALS[status]
    hub.fail(method=path[0], path=path[1], status=status, times=None)
    with pytest.raises(kind, match=rf"^{REPO} at .*HTTP.*{status}.*{advice}") as caught:
        send(content)
    assert xet.TOKEN not in str(caught.value) and TOKEN not in str(caught.value)
    assert commits(hub) == 0


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("path", ["/xet-read-token/", "/cas/v1/reconstructions"], ids=["token", "storage"])
def test_a_refused_download_by_xet_says_what_to_do(
    hub: HubServer, content: bytes, with_xet: xet.Storage, tmp_path: Path, status: int, path: str
) -> None:
    revision = send(content)
    hub.fail(method="GET", path=path, status=status, times=None)
    kind, advice = REFUSALS[status]
    with pytest.raises(kind, match=rf"{status}.*{advice}"):
        fetch(REPO, FILE, revision=revision, cache_dir=tmp_path)


def test_a_server_without_xet_takes_files_without_it(
    hub: HubServer, content: bytes, with_xet: xet.Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.xet = None
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        send(content)
    assert hub.count("GET", WRITE_TOKEN) == 1
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert files_of(hub, send(content))[FILE] == content


FAULTS = {"token": ("GET", WRITE_TOKEN), "xorb": ("POST", XORB), "shard": ("POST", SHARD), "commit": ("POST", COMMIT)}


@pytest.mark.parametrize("fault", [{"status": 503}, {"lose": True}], ids=["503", "reply lost"])
@pytest.mark.parametrize("path", FAULTS.values(), ids=FAULTS.keys())
def test_passing_faults_of_an_upload_by_xet_do_not_show(
    hub: HubServer, content: bytes, with_xet: xet.Storage, path: tuple[str, str], fault: dict[str, Any]
) -> None:
    hub.fail(method=path[0], path=path[1], **fault)
    assert files_of(hub, send(content))[FILE] == content
    assert (hub.faults[0].times, commits(hub)) == (0, 1)


def test_xet_storage_that_fails_leaves_main_as_it_was(hub: HubServer, content: bytes, with_xet: xet.Storage) -> None:
    hub.fail(method="POST", path=SHARD, status=503, times=None)
    with pytest.raises(HubUnavailableError, match=r"503.*gave up .* publish again later"):
        send(content)
    assert commits(hub) == 0
    hub.faults.clear()
    assert files_of(hub, send(content))[FILE] == content


def test_what_xet_delivers_is_checked(hub: HubServer, content: bytes, with_xet: xet.Storage, tmp_path: Path) -> None:
    revision = send(content)
    intact = dict(with_xet.xorbs)
    for name, xorb in intact.items():
        with_xet.xorbs[name] = xorb[:-9] + bytes([xorb[-9] ^ 1]) + xorb[-8:]
    # hf_xet 1.8 does not notice a changed chunk.
    with pytest.raises(ChecksumError, match=f"{FILE} of {REPO}"):
        fetch(REPO, FILE, revision=revision, cache_dir=tmp_path)
    assert not list(tmp_path.rglob(FILE))
    with_xet.xorbs.update(intact)
    assert fetch(REPO, FILE, revision=revision, cache_dir=tmp_path).read_bytes() == content
