"""Fetching with the real client from a local Hub: pins, hashes, network faults, and many processes at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from tests.hub_server import HubServer
from ubn_zoo.hub import fetch as client
from ubn_zoo.hub import retry

REPO = "someone/model"
FILE = "model.safetensors"
CONTENT = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(256)) * 8
OTHER = b"something else"
RESOLVE = f"/{REPO}/resolve/"
BODY = "/lfs/"
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def revision(hub: HubServer) -> str:
    return hub.create(REPO, {FILE: CONTENT, "config.json": b'{"architecture": "x"}', "pytorch_model.bin": b"pickle"})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(retry, "RETRY_SECONDS", 5.0)


def blobs(cache: Path) -> list[Path]:
    return [path for path in cache.glob("models--*/blobs/*") if path.is_file()]


def prelude(cache: Path) -> str:
    """Code that defines `hub`, `fetch` and `cache` without importing torch, which takes seconds."""
    return (
        "import sys, types\n"
        "package = sys.modules['ubn_zoo'] = types.ModuleType('ubn_zoo')\n"
        f"package.__path__ = [{str(Path(client.__file__).parents[1])!r}]\n"
        "from ubn_zoo.hub import fetch as hub, retry\n"
        "from ubn_zoo.hub.fetch import fetch\n"
        "retry.FIRST_PAUSE, retry.LONGEST_PAUSE = 0.01, 0.02\n"
        "assert 'torch' not in sys.modules\n"
        f"cache = {str(cache)!r}\n"
    )


def fresh_process(
    code: str, cache: Path, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, where `hub`, `fetch` and `cache` are defined."""
    command = [*prefix, sys.executable, "-c", prelude(cache) + code]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_pinned_file_is_given_and_then_needs_no_request(hub: HubServer, revision: str, cache: Path) -> None:
    path = client.fetch(REPO, FILE, revision=revision, sha256=sha256(CONTENT), cache_dir=cache)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    asked = len(hub.requests)
    assert client.fetch(REPO, FILE, revision=revision, sha256=sha256(CONTENT), cache_dir=cache) == path
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=cache) == path
    assert len(hub.requests) == asked
    assert hub.count("GET", BODY) == 1


def test_branch_follows_new_commits(hub: HubServer, revision: str, cache: Path) -> None:
    first = client.fetch(REPO, FILE, cache_dir=cache)
    new = hub.repositories[REPO].commit({FILE: OTHER})
    second = client.fetch(REPO, FILE, cache_dir=cache)
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, OTHER)
    assert second.parent.name == new
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=cache) == first


def test_small_file_is_checked_against_its_git_hash(hub: HubServer, revision: str, cache: Path) -> None:
    hub.fail(path="resolve-cache", corrupt=3)
    path = client.fetch(REPO, "config.json", revision=revision, cache_dir=cache)
    assert path.read_bytes() == b'{"architecture": "x"}'
    assert hub.count("GET", "resolve-cache") == 2


def test_cache_is_shared_with_huggingface_hub(hub: HubServer, revision: str, cache: Path) -> None:
    from huggingface_hub import hf_hub_download

    theirs = hf_hub_download(REPO, FILE, revision=revision, cache_dir=cache)
    assert str(client.fetch(REPO, FILE, revision=revision, cache_dir=cache)) == theirs
    assert hub.count("GET", BODY) == 1


@pytest.mark.parametrize("given", [True, False], ids=["hash given", "hash from the Hub"])
@pytest.mark.parametrize("position", [0, 12_345, -1])
def test_altered_body_is_fetched_again(hub: HubServer, revision: str, cache: Path, given: bool, position: int) -> None:
    hub.fail(path=BODY, corrupt=position)
    expected = sha256(CONTENT) if given else None
    path = client.fetch(REPO, FILE, revision=revision, sha256=expected, cache_dir=cache)
    assert path.read_bytes() == CONTENT
    assert hub.count("GET", BODY) == 2


@pytest.mark.parametrize("given", [True, False], ids=["hash given", "hash from the Hub"])
def test_body_altered_twice_is_refused_and_deleted(hub: HubServer, revision: str, cache: Path, given: bool) -> None:
    hub.fail(path=BODY, corrupt=7, times=None)
    altered = CONTENT[:7] + bytes([CONTENT[7] ^ 1]) + CONTENT[8:]
    with pytest.raises(client.ChecksumError) as caught:
        client.fetch(REPO, FILE, revision=revision, sha256=sha256(CONTENT) if given else None, cache_dir=cache)
    for part in (FILE, REPO, revision, sha256(CONTENT), sha256(altered)):
        assert part in str(caught.value)
    assert hub.count("GET", BODY) == 2
    assert blobs(cache) == []
    assert not list(cache.glob("models--*/snapshots/*/*"))


def test_wrong_expected_hash_is_refused(hub: HubServer, revision: str, cache: Path) -> None:
    with pytest.raises(client.ChecksumError, match=sha256(OTHER)):
        client.fetch(REPO, FILE, revision=revision, sha256=sha256(OTHER), cache_dir=cache)
    assert blobs(cache) == []


def test_wrong_size_is_refused_before_download(hub: HubServer, revision: str, cache: Path) -> None:
    with pytest.raises(client.ChecksumError, match=f"expected 5 bytes, the Hub has {len(CONTENT)}"):
        client.fetch(REPO, FILE, revision=revision, size=5, cache_dir=cache)
    assert hub.count("GET", BODY) == 0


@pytest.mark.parametrize("given", [True, False], ids=["hash given", "hash from the Hub"])
def test_file_that_changed_in_the_cache_is_replaced(hub: HubServer, revision: str, cache: Path, given: bool) -> None:
    expected = sha256(CONTENT) if given else None
    path = client.fetch(REPO, FILE, revision=revision, sha256=expected, cache_dir=cache)
    status = path.stat()
    path.write_bytes(CONTENT[:-1] + b"?")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path = client.fetch(REPO, FILE, revision=revision, sha256=expected, cache_dir=cache)
    assert path.read_bytes() == CONTENT
    assert hub.count("GET", BODY) == 2


def into_shared_store(path: Path, cache: Path, content: bytes) -> Path:
    """Make a cached blob a link into a store with other names, as the client may for Xet files."""
    blob = path.parent / path.readlink()
    store = cache / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    store.write_bytes(content)
    blob.unlink()
    blob.symlink_to(store)
    return store


def test_file_in_a_shared_store_is_checked_by_its_own_hash(hub: HubServer, revision: str, cache: Path) -> None:
    path = client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    store = into_shared_store(path, cache, CONTENT)
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=cache) == path
    assert store.exists()
    assert hub.count("GET", BODY) == 1


def test_altered_file_in_a_shared_store_is_deleted_there_too(hub: HubServer, revision: str, cache: Path) -> None:
    path = client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    store = into_shared_store(path, cache, OTHER)
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=cache).read_bytes() == CONTENT
    assert not store.exists()


def test_cache_without_links_is_checked_against_what_the_hub_says(hub: HubServer, revision: str, cache: Path) -> None:
    path = client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    path.unlink()
    path.write_bytes(CONTENT)
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=cache).read_bytes() == CONTENT
    path.write_bytes(OTHER)
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=cache).read_bytes() == CONTENT


FAULTS = {
    "HEAD 500": [{"method": "HEAD", "path": RESOLVE, "status": 500, "times": 2}],
    "HEAD 503": [{"method": "HEAD", "path": RESOLVE, "status": 503}],
    "HEAD 429": [{"method": "HEAD", "path": RESOLVE, "status": 429}],
    "HEAD dropped": [{"method": "HEAD", "path": RESOLVE, "drop": True, "times": 3}],
    "GET 500": [{"path": BODY, "status": 500, "times": 2}],
    "GET 502": [{"path": BODY, "status": 502}],
    "GET 503": [{"path": BODY, "status": 503, "times": 3}],
    "GET 504": [{"path": BODY, "status": 504}],
    "reset at the first byte": [{"path": BODY, "reset": 0}],
    "reset in the middle": [{"path": BODY, "reset": len(CONTENT) // 2, "times": 2}],
    "reset at the last byte": [{"path": BODY, "reset": len(CONTENT) - 1}],
    "short by one": [{"path": BODY, "short": 1}],
    "short by all but one": [{"path": BODY, "short": len(CONTENT) - 1}],
    "one after another": [
        {"method": "HEAD", "path": RESOLVE, "status": 503},
        {"path": BODY, "status": 503},
        {"path": BODY, "reset": 1000},
        {"path": BODY, "short": 10},
        {"path": BODY, "corrupt": 10},
    ],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_passing_faults_are_retried(
    hub: HubServer, revision: str, cache: Path, faults: list[dict[str, object]]
) -> None:
    for fault in faults:
        hub.fail(**fault)
    path = client.fetch(REPO, FILE, revision=revision, sha256=sha256(CONTENT), cache_dir=cache)
    assert path.read_bytes() == CONTENT
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 1, 4096, len(CONTENT) - 1])
def test_connection_cut_at_a_byte_is_retried(hub: HubServer, revision: str, cache: Path, position: int) -> None:
    hub.fail(path=BODY, cut=position)
    path = client.fetch(REPO, FILE, revision=revision, sha256=sha256(CONTENT), cache_dir=cache)
    assert path.read_bytes() == CONTENT


SLOW = {
    "slow HEAD": {"method": "HEAD", "path": RESOLVE, "delay": 2.5},
    "slow GET": {"path": BODY, "delay": 2.5},
    "stalled GET": {"path": BODY, "cut": 1000, "stall": 2.5},
}


@pytest.mark.parametrize("fault", SLOW.values(), ids=SLOW.keys())
def test_slow_servers_time_out_and_are_asked_again(
    hub: HubServer, revision: str, cache: Path, fault: dict[str, object]
) -> None:
    hub.fail(**fault)
    code = f"print(fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache))"
    start = time.monotonic()
    done = fresh_process(code, cache, HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    assert time.monotonic() - start < 20


def test_server_that_never_answers_is_given_up_in_time(hub: HubServer, revision: str, cache: Path) -> None:
    hub.fail(method="HEAD", path=RESOLVE, delay=4, times=None)
    code = f"fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache)"
    start = time.monotonic()
    done = fresh_process(code, cache, HF_HUB_ETAG_TIMEOUT="1", UBN_ZOO_RETRY_SECONDS="2")
    assert "HubUnavailableError" in done.stderr and "Timeout" in done.stderr
    assert time.monotonic() - start < 15


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_long_download_resumes_where_the_server_allows(hub: HubServer, cache: Path, ranges: bool) -> None:
    megabyte = 2**20
    content = CONTENT * (24 * megabyte // len(CONTENT))
    revision = hub.create(REPO, {FILE: content})
    hub.ranges = ranges
    hub.fail(path=BODY, cut=22 * megabyte)
    path = client.fetch(REPO, FILE, revision=revision, sha256=sha256(content), cache_dir=cache)
    assert path.read_bytes() == content
    asked = [request.range for request in hub.requests if request.method == "GET"]
    assert asked == [None, f"bytes={20 * megabyte}-"]


LASTING = {
    "HEAD 503": {"method": "HEAD", "path": RESOLVE, "status": 503},
    "HEAD dropped": {"method": "HEAD", "path": RESOLVE, "drop": True},
    "GET 503": {"path": BODY, "status": 503},
    "GET reset": {"path": BODY, "reset": 100},
    "short": {"path": BODY, "short": 3},
}


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING.keys())
def test_lasting_faults_end_with_advice_in_time(
    hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0.5")
    hub.fail(**fault, times=None)
    start = time.monotonic()
    with pytest.raises(client.HubUnavailableError) as caught:
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    assert time.monotonic() - start < 5
    for part in (FILE, REPO, hub.endpoint, "HF_ENDPOINT", retry.RETRY_SECONDS_VARIABLE):
        assert part in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert len(hub.requests) > 4


def test_pauses_grow(hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 16.0)
    clock = [0.0]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "60")
    hub.fail(method="HEAD", path=RESOLVE, drop=True, times=None)
    with pytest.raises(client.HubUnavailableError):
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    assert pauses == [1, 2, 4, 8, 16, 16]


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", ""])
def test_retry_seconds_must_be_a_number(
    hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, value)
    with pytest.raises(ValueError, match=retry.RETRY_SECONDS_VARIABLE):
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"status": 500}], ids=["503", "dropped", "500"])
def test_warm_cache_serves_while_the_hub_is_down(
    hub: HubServer, revision: str, cache: Path, pinned: bool, fault: dict[str, object]
) -> None:
    wanted = revision if pinned else None
    client.fetch(REPO, FILE, revision=wanted, cache_dir=cache)
    hub.fail(method="HEAD", times=None, **fault)
    hub.fail(method="GET", times=None, **fault)
    assert client.fetch(REPO, FILE, revision=wanted, cache_dir=cache).read_bytes() == CONTENT


def test_changed_file_is_not_served_while_the_hub_is_down(
    hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = client.fetch(REPO, FILE, cache_dir=cache)
    path.write_bytes(OTHER)
    hub.fail(method="HEAD", times=None, status=503)
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0.05")
    for wanted in (None, revision):
        with pytest.raises(client.HubUnavailableError):
            client.fetch(REPO, FILE, revision=wanted, cache_dir=cache)
    assert blobs(cache) == []


def test_offline_mode_serves_the_cache_in_a_fresh_process(hub: HubServer, revision: str, cache: Path) -> None:
    client.fetch(REPO, FILE, cache_dir=cache)
    asked = len(hub.requests)
    code = (
        f"print(fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache))\n"
        f"print(fetch({REPO!r}, {FILE!r}, cache_dir=cache))\n"
        f"try:\n    fetch({REPO!r}, 'config.json', revision={revision!r}, cache_dir=cache)\n"
        "except hub.HubUnavailableError as error:\n    print(error)\n"
    )
    done = fresh_process(code, cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    first, second, message = done.stdout.splitlines()
    assert first == second
    assert Path(first).read_bytes() == CONTENT
    assert "HF_HUB_OFFLINE" in message and "config.json" in message
    assert len(hub.requests) == asked


def test_nothing_listening_is_reported_without_waiting_long(cache: Path, revision: str) -> None:
    code = (
        f"try:\n    fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache)\n"
        "except hub.HubUnavailableError as error:\n    print(error)\n"
    )
    done = fresh_process(code, cache, HF_ENDPOINT="http://127.0.0.1:9", UBN_ZOO_RETRY_SECONDS="0")
    assert done.returncode == 0, done.stderr
    assert "http://127.0.0.1:9" in done.stdout


def eight_processes(revision: str, cache: Path) -> list[str]:
    """The hashes of the file as eight processes fetch it; they are forks of one interpreter, to import only once."""
    code = (
        "import hashlib, os, traceback\n"
        "for _ in range(8):\n"
        "    if os.fork() == 0:\n"
        "        try:\n"
        f"            path = fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache)\n"
        "            os.write(1, f'{hashlib.sha256(path.read_bytes()).hexdigest()}\\n'.encode())\n"
        "        except BaseException:\n            traceback.print_exc()\n"
        "        finally:\n            os._exit(0)\n"
        "while True:\n"
        "    try:\n        os.wait()\n"
        "    except ChildProcessError:\n        break\n"
    )
    done = fresh_process(code, cache)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout.split()


@FORKS
def test_eight_processes_fetch_once(hub: HubServer, revision: str, cache: Path) -> None:
    hub.fail(path=BODY, delay=1.0, times=None)
    assert eight_processes(revision, cache) == [sha256(CONTENT)] * 8
    assert hub.count("GET", BODY) == 1


@FORKS
def test_eight_processes_replace_an_altered_file_once(hub: HubServer, revision: str, cache: Path) -> None:
    client.fetch(REPO, FILE, revision=revision, cache_dir=cache).write_bytes(OTHER)
    assert eight_processes(revision, cache) == [sha256(CONTENT)] * 8
    assert hub.count("GET", BODY) == 2


def test_slow_checker_does_not_delete_what_another_has_just_replaced(
    hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.fetch(REPO, FILE, revision=revision, cache_dir=cache).write_bytes(OTHER)

    class SlowInOneThread:
        def __init__(self) -> None:
            self.digest = hashlib.sha256()

        def update(self, block: bytes) -> None:
            self.digest.update(block)
            if threading.current_thread().name.startswith("slow") and block == OTHER:
                time.sleep(0.7)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    def new(content: bytes | None = None) -> object:
        return SlowInOneThread() if content is None else hashlib.sha256(content)

    monkeypatch.setattr(client, "hashlib", SimpleNamespace(sha256=new, sha1=hashlib.sha1))
    with ThreadPoolExecutor(1, "slow") as slow, ThreadPoolExecutor(1, "quick") as quick:
        first = slow.submit(client.fetch, REPO, FILE, revision=revision, cache_dir=cache)
        time.sleep(0.9)  # by now the slow one is hashing the bad file for the second time
        second = quick.submit(client.fetch, REPO, FILE, revision=revision, cache_dir=cache)
    assert first.result() == second.result()
    assert first.result().read_bytes() == CONTENT
    assert hub.count("GET", BODY) == 2


def missing_repository(hub: HubServer, revision: str) -> tuple[str, str, str]:
    return "someone/else", FILE, revision


def missing_revision(hub: HubServer, revision: str) -> tuple[str, str, str]:
    return REPO, FILE, "0" * 40


def missing_file(hub: HubServer, revision: str) -> tuple[str, str, str]:
    return REPO, "other.safetensors", revision


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (missing_repository, "no such repository"),
        (missing_revision, "no such revision"),
        (missing_file, f"no such file; it has {FILE}"),
    ],
)
def test_what_does_not_exist_is_named_at_once(
    hub: HubServer, revision: str, cache: Path, case: Callable[[HubServer, str], tuple[str, str, str]], text: str
) -> None:
    repo_id, filename, wanted = case(hub, revision)
    with pytest.raises(client.HubNotFoundError, match=text) as caught:
        client.fetch(repo_id, filename, revision=wanted, cache_dir=cache)
    assert repo_id in str(caught.value) and filename in str(caught.value) and wanted in str(caught.value)
    assert hub.count("HEAD", RESOLVE) <= 1


def test_gated_repository_says_how_to_get_in(hub: HubServer, revision: str, cache: Path) -> None:
    hub.repositories[REPO].gated = True
    with pytest.raises(client.HubAccessError, match=r"hf auth login.*HF_TOKEN"):
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)


def test_token_is_sent_by_the_client_and_never_shown(hub: HubServer, revision: str, cache: Path) -> None:
    hub.repositories[REPO].gated = True
    hub.fail(path=BODY, status=503, times=2)
    hub.fail(path=BODY, corrupt=4, times=None)
    code = f"fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache)"
    done = fresh_process(code, cache, HF_TOKEN="hf_secret", UBN_ZOO_RETRY_SECONDS="10")
    assert "ChecksumError" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert "Signature" not in done.stdout + done.stderr
    assert {request.authorization for request in hub.requests if RESOLVE in request.path} == {"Bearer hf_secret"}
    assert {request.authorization for request in hub.requests if BODY in request.path} == {None}
    assert not [path for path in cache.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl", "X.PKL", "x.pth.tar"])
def test_pickles_are_refused_without_a_request(hub: HubServer, revision: str, cache: Path, name: str) -> None:
    with pytest.raises(client.UnsafeFileError, match="ubn-zoo convert"):
        client.fetch(REPO, name, revision=revision, cache_dir=cache)
    assert hub.requests == []


def test_repository_with_only_a_pickle_is_refused_with_the_way_out(hub: HubServer, cache: Path) -> None:
    revision = hub.create(REPO, {"pytorch_model.bin": b"pickle", "config.json": b"{}", "README.md": b"x"})
    with pytest.raises(client.UnsafeFileError, match=r"pytorch_model\.bin.*ubn-zoo convert"):
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    assert hub.count("GET", r"\.bin|/lfs/") == 0


BAD_NAMES = [
    "../model.safetensors",
    "/model.safetensors",
    "a/../model.safetensors",
    "./model.safetensors",
    "a//model.safetensors",
    "C:model.safetensors",
    "a\\b.safetensors",
    "https://x/model.safetensors",
    "model.safetensors\n",
    "model",
    "model.txt",
    "",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_not_plain_are_refused(hub: HubServer, cache: Path, name: str) -> None:
    with pytest.raises(client.UnsafeFileError, match="valid"):
        client.fetch(REPO, name, cache_dir=cache)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "a/..", "", "a/b--c", "a b/c"])
def test_bad_repository_names_are_refused(hub: HubServer, cache: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match="(?i)repo.id"):
        client.fetch(repo_id, FILE, cache_dir=cache)
    assert hub.requests == [] and not cache.exists()


def test_endpoint_without_scheme_is_named(cache: Path) -> None:
    done = fresh_process(f"fetch({REPO!r}, {FILE!r}, cache_dir=cache)", cache, HF_ENDPOINT="hub.example")
    assert "HF_ENDPOINT is 'hub.example'; valid: http:// or https://" in done.stderr


@pytest.mark.parametrize("wanted", ["../../x", "", "-x", "a b", "main\n", "..", "/x"])
def test_revisions_that_are_not_plain_are_refused(hub: HubServer, cache: Path, wanted: str) -> None:
    with pytest.raises(ValueError, match="revision"):
        client.fetch(REPO, FILE, revision=wanted, cache_dir=cache)
    assert hub.requests == []


@pytest.mark.parametrize("wanted", ["", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_bad_hashes_are_refused(hub: HubServer, cache: Path, wanted: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        client.fetch(REPO, FILE, sha256=wanted, cache_dir=cache)
    assert hub.requests == []


HEADERS = {
    "no commit": ({"X-Repo-Commit": None}, "respond like a Hub|returned commit"),
    "another commit": ({"X-Repo-Commit": "1" * 40}, "returned commit"),
    "no hash": ({"X-Linked-Etag": '"abc"'}, "has a hash to verify the file with"),
    "too large": ({"X-Linked-Size": str(2**40)}, "valid: at most"),
}


@pytest.mark.parametrize(("header", "text"), HEADERS.values(), ids=HEADERS.keys())
def test_servers_that_are_not_a_hub_are_named(
    hub: HubServer, revision: str, cache: Path, header: dict[str, str | None], text: str
) -> None:
    hub.fail(method="HEAD", path=RESOLVE, header=header, times=None)
    with pytest.raises(client.HubError, match=text):
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)


ROOT = os.name == "posix" and os.geteuid() == 0
READ_ONLY = [
    "read-only",
    pytest.param("of another user", marks=pytest.mark.skipif(not ROOT, reason="only root can give files away")),
]


@contextlib.contextmanager
def unwritable(cache: Path, how: str) -> Iterator[None]:
    """Make a cache that `as_ordinary_user` can read, but not write."""
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir() and not path.is_symlink())]
    for folder in folders:
        if how == "read-only":
            folder.chmod(0o555)
        else:
            os.chown(folder, 65534, 65534)
            folder.chmod(0o755)
    try:
        yield
    finally:
        for folder in folders:
            if ROOT:
                os.chown(folder, 0, 0)
            folder.chmod(0o755)


def as_ordinary_user(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that is subject to file permissions.

    Root is not, so its capabilities are dropped. The user stays root, because the interpreter may be in a folder that
    no other user can read.
    """
    prefix: list[str] = []
    if ROOT:
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv, to which permissions do not apply")
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner,-chown", "--inh-caps=-all"]
    check = (
        "import os, pathlib\n"
        "try:\n    (pathlib.Path(cache) / 'probe').write_bytes(b'')\n"
        "except OSError:\n    pass\n"
        "else:\n    raise AssertionError('the cache is writable')\n"
    )
    return fresh_process(check + code, cache, prefix, **environment)


@pytest.mark.parametrize("how", READ_ONLY)
@pytest.mark.parametrize("state", ["online", "offline", "down"])
def test_cache_that_cannot_be_written_serves(hub: HubServer, revision: str, cache: Path, how: str, state: str) -> None:
    client.fetch(REPO, FILE, cache_dir=cache)
    client.fetch(REPO, "config.json", cache_dir=cache)
    shutil.rmtree(cache / ".locks")
    before = sorted(cache.rglob("*"))
    if state == "down":
        hub.fail(method="HEAD", drop=True, times=None)
    if state == "online":
        hub.repositories[REPO].refs["same"] = revision  # a ref that cannot be added to this cache
    wanted = ["None", repr(revision), *(["'same'"] if state == "online" else [])]
    code = "".join(
        f"print(fetch({REPO!r}, {file!r}, revision={name}, cache_dir=cache))\n"
        for file in (FILE, "config.json")
        for name in wanted
    )
    with unwritable(cache, how):
        done = as_ordinary_user(
            code, cache, HF_HUB_OFFLINE="1" if state == "offline" else "0", UBN_ZOO_RETRY_SECONDS="0"
        )
    assert done.returncode == 0, done.stderr
    assert {Path(line).name for line in done.stdout.splitlines()} == {FILE, "config.json"}
    assert len(done.stdout.splitlines()) == 2 * len(wanted)
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("how", READ_ONLY)
def test_cache_that_must_be_written_but_cannot_is_named(hub: HubServer, revision: str, cache: Path, how: str) -> None:
    path = client.fetch(REPO, "config.json", cache_dir=cache)
    Path(os.path.realpath(path)).write_bytes(b"altered")
    code = (
        f"for file in {FILE!r}, 'config.json':\n"
        f"    try:\n        fetch({REPO!r}, file, revision={revision!r}, cache_dir=cache)\n"
        "    except (OSError, hub.ChecksumError) as error:\n        print(type(error).__name__, error)\n"
    )
    with unwritable(cache, how):
        done = as_ordinary_user(code, cache)
    assert done.returncode == 0, done.stderr
    missing, altered = done.stdout.splitlines()
    for part in ("PermissionError", FILE, "cannot be written to the cache", str(cache), "HF_HUB_CACHE", "cache_dir"):
        assert part in missing
    for part in ("ChecksumError", "cannot be deleted", f"Delete {path}", "HF_HUB_CACHE"):
        assert part in altered


def without_links(cache: Path, copy: Path, *, record: bool, blobs: bool) -> Path:
    """Copy a cache as `cp -rL` does, or as systems without symbolic links store it."""
    shutil.copytree(cache, copy, symlinks=False)
    for folder in copy.glob("models--*"):
        if not record:
            shutil.rmtree(folder / ".ubn-zoo")
        if not blobs:
            shutil.rmtree(folder / "blobs")
    assert not [path for path in copy.rglob("*") if path.is_symlink()]
    return copy


@pytest.mark.parametrize("file", [FILE, "config.json"])
@pytest.mark.parametrize(("record", "blobs"), [(True, True), (True, False), (False, True)])
def test_copied_cache_without_links_serves_while_the_hub_is_down(
    hub: HubServer,
    revision: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    record: bool,
    blobs: bool,
) -> None:
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0.05")
    original = client.fetch(REPO, file, cache_dir=cache).read_bytes()
    copy = without_links(cache, tmp_path / "copy", record=record, blobs=blobs)
    hub.fail(method="HEAD", drop=True, times=None)
    for wanted in (None, revision):
        path = client.fetch(REPO, file, revision=wanted, cache_dir=copy)
        assert path.is_relative_to(copy) and path.read_bytes() == original
    path.write_bytes(original[:-1] + b"?")
    with pytest.raises(client.HubError):
        client.fetch(REPO, file, revision=revision, cache_dir=copy)
    hub.faults.clear()
    assert client.fetch(REPO, file, revision=revision, cache_dir=copy).read_bytes() == original


def test_cache_without_links_or_hashes_is_not_trusted_until_the_hub_was_asked(
    hub: HubServer, revision: str, cache: Path, tmp_path: Path
) -> None:
    client.fetch(REPO, FILE, cache_dir=cache)
    copy = without_links(cache, tmp_path / "copy", record=False, blobs=False)
    hub.fail(method="HEAD", drop=True, times=None)
    with pytest.raises(client.HubError, match="neither the server nor the cache .* has a hash") as caught:
        client.fetch(REPO, FILE, revision=revision, cache_dir=copy)
    assert str(copy) in str(caught.value) and "sha256" in str(caught.value)
    assert client.fetch(REPO, FILE, revision=revision, sha256=sha256(CONTENT), cache_dir=copy).read_bytes() == CONTENT
    shutil.rmtree(next(copy.glob("models--*/.ubn-zoo")))
    hub.faults.clear()
    client.fetch(REPO, FILE, revision=revision, cache_dir=copy)
    hub.fail(method="HEAD", drop=True, times=None)
    assert client.fetch(REPO, FILE, revision=revision, cache_dir=copy).read_bytes() == CONTENT
    assert hub.count("GET", BODY) == 1


@pytest.mark.parametrize("recorded", ["0" * 64, "nonsense", ""])
def test_recorded_hash_that_is_wrong_does_no_lasting_harm(
    hub: HubServer, revision: str, cache: Path, tmp_path: Path, recorded: str
) -> None:
    client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    copy = without_links(cache, tmp_path / "copy", record=True, blobs=False)
    (record,) = (path for path in copy.glob("models--*/.ubn-zoo/*/*") if path.is_file())
    assert record.read_text() == f"{sha256(CONTENT)}\n"
    record.write_text(recorded)
    for _ in range(2):
        assert client.fetch(REPO, FILE, revision=revision, cache_dir=copy).read_bytes() == CONTENT


def test_hash_records_do_not_disturb_huggingface_hubs_tools(hub: HubServer, revision: str, cache: Path) -> None:
    from huggingface_hub import scan_cache_dir

    client.fetch(REPO, FILE, cache_dir=cache)
    found = scan_cache_dir(cache)
    assert found.warnings == [] or all(".ubn-zoo" not in str(warning) for warning in found.warnings)
    (repository,) = found.repos
    assert [file.file_name for commit in repository.revisions for file in commit.files] == [FILE]


PORTALS: dict[str, dict[str, object]] = {
    "page": {"status": 200},
    "not found": {"status": 404},
    "login": {"status": 511},
    "redirect": {"status": 302, "header": {"Location": "http://localhost:9/login"}},
    "refused": {"status": 403},
    "gone": {"status": 410},
}


@pytest.mark.parametrize("fault", PORTALS.values(), ids=PORTALS.keys())
@pytest.mark.parametrize("pinned", [True, False])
def test_warm_cache_serves_behind_a_login_page(
    hub: HubServer, revision: str, cache: Path, fault: dict[str, object], pinned: bool
) -> None:
    """A captive portal, which responds to every request itself, counts as no network."""
    wanted = revision if pinned else None
    for file in (FILE, "config.json"):
        client.fetch(REPO, file, revision=wanted, cache_dir=cache)
    for method in ("HEAD", "GET"):
        hub.fail(method=method, times=None, **fault)
    for file in (FILE, "config.json"):
        assert client.fetch(REPO, file, revision=wanted, cache_dir=cache).is_file()


@pytest.mark.parametrize("fault", PORTALS.values(), ids=PORTALS.keys())
def test_login_page_without_a_cache_is_a_hub_error(
    hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    monkeypatch.setenv(retry.RETRY_SECONDS_VARIABLE, "0")
    for method in ("HEAD", "GET"):
        hub.fail(method=method, times=None, **fault)
    with pytest.raises(client.HubError, match=r"respond like a Hub|returned HTTP|denied access"):
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)


def test_large_configuration_is_refused_before_the_download(hub: HubServer, revision: str, cache: Path) -> None:
    hub.fail(method="HEAD", path="resolve-cache", header={"Content-Length": str(2**30)}, times=None)
    with pytest.raises(client.HubError, match=f"{2**30} bytes; valid: at most"):
        client.fetch(REPO, "config.json", revision=revision, cache_dir=cache)
    assert hub.count("GET", "resolve-cache") == 0


def test_full_disk_names_the_file_and_the_cache(
    hub: HubServer, revision: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    for part in (FILE, REPO, str(cache), "HF_HUB_CACHE"):
        assert part in str(caught.value)
    assert caught.value.errno == errno.ENOSPC


def test_password_in_the_endpoint_is_never_shown(hub: HubServer, revision: str, cache: Path) -> None:
    """Not in errors, tracebacks or logs, whatever goes wrong."""
    address = hub.endpoint.replace("http://", "http://me:SECRET@")
    code = (
        "import logging, traceback\nlogging.basicConfig(level=logging.DEBUG, format='%(name)s %(message)s')\n"
        "for name in ('httpx', 'httpx2', 'httpcore', 'httpcore2'):\n    logging.getLogger(name).setLevel('WARNING')\n"
        "def attempt(**settings):\n"
        "    try:\n"
        f"        print(fetch({REPO!r}, {FILE!r}, cache_dir=cache, **settings))\n"
        "    except Exception:\n        traceback.print_exc()\n"
        f"attempt(revision={revision!r})\nattempt(revision='nowhere')\nattempt(revision='main', size=3)\n"
    )
    lost = {"method": "HEAD", "path": "/main", "times": None}
    for fault in (
        {"path": BODY, "status": 503},
        {"path": BODY, "drop": True},
        {**lost, "header": {"X-Repo-Commit": None}},
    ):
        hub.fail(**fault)
    shown = fresh_process(code, cache, HF_ENDPOINT=address, UBN_ZOO_RETRY_SECONDS="2")
    down = fresh_process(code, cache / "other", HF_ENDPOINT="http://me:SECRET@127.0.0.1:9", UBN_ZOO_RETRY_SECONDS="0")
    bare = fresh_process(code, cache / "other", HF_ENDPOINT="me:SECRET@127.0.0.1:9", UBN_ZOO_RETRY_SECONDS="0")
    for done in (shown, down, bare):
        assert "Error" in done.stderr and "127.0.0.1" in done.stderr
        assert "SECRET" not in done.stdout + done.stderr, done.stderr
        assert "Signature" not in done.stdout + done.stderr
    assert str(cache) in shown.stdout


def test_token_that_is_not_ascii_is_explained(hub: HubServer, revision: str, cache: Path) -> None:
    code = f"fetch({REPO!r}, {FILE!r}, revision={revision!r}, cache_dir=cache)"
    done = fresh_process(code, cache, HF_TOKEN="hf_s\u00e9cret\u2026")
    assert "HubAccessError" in done.stderr and "token contains non-ASCII characters" in done.stderr
    assert "codec" not in done.stderr and "cret" not in done.stderr


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://localhost/x"])
def test_redirect_to_another_scheme_is_not_followed(hub: HubServer, revision: str, cache: Path, target: str) -> None:
    hub.fail(method="HEAD", path=RESOLVE, header={"Location": target}, times=None)
    with pytest.raises(client.HubError, match="redirects to an address that is not http:// or https://") as caught:
        client.fetch(REPO, FILE, revision=revision, cache_dir=cache)
    assert hub.endpoint in str(caught.value) and blobs(cache) == []


ANSWERS = {
    "missing field": (200, b'{"other": 1}'),
    "no object": (200, b"[1, 2]"),
    "conflict": (409, b'{"error": "It exists, see https://host/x?Signature=SECRET"}'),
    "teapot": (418, b"I am a teapot"),
}


@pytest.mark.parametrize(("status", "body"), ANSWERS.values(), ids=ANSWERS.keys())
def test_any_response_is_an_error_with_its_status_and_body(hub: HubServer, status: int, body: bytes) -> None:
    hub.fail(method="POST", status=status, body=body, times=None)
    advice = retry.Advice(login="log in", offline="go online", exhausted="try later")
    with pytest.raises(client.HubError, match=f"^the thing: .*HTTP {status}") as caught:
        retry.retry(lambda: HfApi().create_repo(REPO, exist_ok=True), "the thing", advice)
    words = body.decode().split()[-1].strip('}]"')
    assert words.partition("?")[0] in str(caught.value) and "SECRET" not in str(caught.value)


def test_our_own_bugs_are_not_blamed_on_the_server() -> None:
    advice = retry.Advice(login="log in", offline="go online", exhausted="try later")

    def attempt() -> None:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        retry.retry(attempt, "the thing", advice)
