"""Fetch checkpoint files from the Hub: pinned, verified, safetensors only, and patient with the network.

Transfers and the cache are huggingface_hub's own, so mirrors (``HF_ENDPOINT``), tokens, offline mode and files that
other tools have cached work as they do there. What is added here: every file's hash is checked before its path is
given out, a file that fails is deleted and fetched once more, and passing faults of the network are retried.

A file is checked on the first use in every process. Nothing about that is written down, so there is no record that
could go stale or be forged; hashing 100 MB takes a tenth to a third of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # imported there, but not in __all__

from ubn_zoo.errors import ChecksumError, InvalidArgumentError, UnsafeFileError
from ubn_zoo.hub.manifest import MAX_FILE_BYTES, Record, bundled_path
from ubn_zoo.hub.retry import (
    RETRY_SECONDS_VARIABLE,
    Advice,
    HTTPError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    describe_failure,
    endpoint,
    retry,
    traceable,
)

__all__ = [
    "ChecksumError",
    "HubAccessError",
    "HubError",
    "HubNotFoundError",
    "HubUnavailableError",
    "UnsafeFileError",
    "cached_path",
    "fetch",
    "fetch_record",
]

SAFE_SUFFIXES = (".safetensors", ".json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar", ".npz")

_HASH_LENGTHS = {64: "SHA-256", 40: "Git SHA-1"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_logger = logging.getLogger(__name__)


class _MismatchError(Exception):
    """A file's hash was wrong, and the file is deleted."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


@dataclasses.dataclass(frozen=True)
class _Request:
    repo_id: str
    filename: str
    revision: str
    sha256: str | None
    size: int | None
    cache_dir: Path

    def __str__(self) -> str:
        return f"{self.filename} of {self.repo_id} at revision {self.revision}"

    @property
    def pinned(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None

    def cached(self) -> Path | None:
        return cached_path(self.repo_id, self.filename, revision=self.revision, cache_dir=self.cache_dir)


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What the Hub says of a file: the commit it belongs to and its hash."""

    commit: str
    etag: str | None


def fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Give the local path of a Hub file whose hash has been checked, downloading it if the cache lacks it.

    The hash is `sha256` if given, and otherwise the one that the Hub reports for the file: SHA-256 of large files,
    Git's SHA-1 of small ones. A file that fails is deleted and fetched once more. Server errors (5xx, 408, 425, 429),
    timeouts, broken connections and short answers are retried with growing pauses, for `RETRY_SECONDS` seconds.

    A cached file of a pinned revision needs no network. With a branch or tag the Hub is asked what it points to; if
    the Hub cannot be reached, the last commit seen is used. Processes that ask for the same file download it once.

    Args:
        repo_id: Repository, ``owner/name``.
        filename: Path inside it, ending in ``.safetensors`` or ``.json``.
        revision: Commit, tag or branch; by default the main branch. Only a full 40-hex commit is a pin.
        sha256: Expected hash, 64 hexadecimal digits.
        size: Expected size in bytes, compared before anything is downloaded.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        UnsafeFileError: The file is of another kind, for example a pickle.
        HubNotFoundError: The repository, revision or file does not exist.
        HubAccessError: The repository is gated, private or disabled.
        HubUnavailableError: The Hub cannot be reached and the cache lacks the file.
        ChecksumError: The file failed twice, or is not of the expected size.
        HubError: The server does not behave like a Hub.
        ValueError: An argument is not valid.
    """
    request = _Request(
        repo_id=repo_id,
        filename=_checked_filename(filename),
        revision=_checked_revision(constants.DEFAULT_REVISION if revision is None else revision),
        sha256=None if sha256 is None else _checked_sha256(sha256),
        size=size,
        cache_dir=Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser().resolve(),
    )
    try:
        return _from_cache(request) or retry(lambda: _obtain(request), str(request), _advice(request))
    except _MismatchError as first:
        _logger.warning("%s: hash is %s instead of %s; fetching it again", request, first.found, first.expected)
    try:
        return retry(lambda: _obtain(request), str(request), _advice(request))
    except _MismatchError as second:
        kind = _HASH_LENGTHS[len(second.expected)]
        raise ChecksumError(
            f"{request}: expected {kind} {second.expected}, found {second.found}, twice. The file was deleted and is "
            "not used. Either the repository or the mirror (HF_ENDPOINT) serves another file, or something between "
            "alters it: try again later or from another network, and check the expected hash."
        ) from None


def fetch_record(record: Record, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Give the local path of a record's checkpoint, its hash checked.

    Args:
        record: A record of the manifest, bundled or on the Hub.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        ChecksumError: A bundled file is not the recorded one, or a Hub file failed twice.
        FileNotFoundError: The installation lacks the bundled file.
        HubError: As in `fetch`.
    """
    if record.source == "hub":
        return fetch(
            str(record.repo_id),
            record.file,
            revision=record.revision,
            sha256=record.sha256,
            size=record.bytes,
            cache_dir=cache_dir,
        )
    path = bundled_path(record)
    found = _digest(path, record.sha256)
    if found != record.sha256:
        raise ChecksumError(f"{path}: expected SHA-256 {record.sha256}, found {found}; install ubn-zoo again")
    return path


def cached_path(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Give the path of a file in the cache, unchecked and without network; None if it is not there.

    Args:
        repo_id: Repository, ``owner/name``.
        filename: Path inside it.
        revision: Commit, tag or branch as last seen; by default the main branch.
        cache_dir: Cache folder; by default huggingface_hub's.
    """
    path = try_to_load_from_cache(
        repo_id,
        _checked_filename(filename),
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        revision=None if revision is None else _checked_revision(revision),
    )
    return Path(path) if isinstance(path, str) else None


def _checked_filename(filename: str) -> str:
    suffix = Path(filename).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise UnsafeFileError(
            f"{filename!r}: received a file whose loading can run code; valid are {' and '.join(SAFE_SUFFIXES)}. "
            "Download it and turn it into safetensors with `ubn-zoo convert NAME --checkpoint FILE`."
        )
    plain = all(_FILE_PART.fullmatch(part) and not part.endswith(".") for part in filename.split("/"))
    if not plain or suffix not in SAFE_SUFFIXES:
        raise UnsafeFileError(
            f"received the file name {filename!r}; valid: a relative path of letters, digits, '.', '_' and '-' that "
            f"ends in {' or '.join(SAFE_SUFFIXES)}"
        )
    return filename


def _checked_revision(revision: str) -> str:
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidArgumentError(f"received the revision {revision!r}; valid: a 40-digit commit, a tag or a branch")
    return revision


def _checked_sha256(sha256: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InvalidArgumentError(f"received the sha256 {sha256!r}; valid: 64 lower-case hexadecimal digits")
    return sha256


def _advice(request: _Request) -> Advice:
    return Advice(
        login="ask for access on its page, then log in with `hf auth login` or set HF_TOKEN",
        offline=f"The cache {request.cache_dir} does not have the file: unset HF_HUB_OFFLINE and load it once, or copy "
        "the cache of a machine that has it",
        exhausted=f"Check the connection and {endpoint()} (set HF_ENDPOINT for a mirror), try again later, or wait "
        f"longer with {RETRY_SECONDS_VARIABLE}=SECONDS. Once a file is in the cache it loads without the Hub",
    )


def _raise_missing_file(error: Exception, request: _Request) -> NoReturn:
    """Say what the repository has instead: most often an old one holds only a pickle."""
    cause = traceable(error)
    try:
        names = HfApi().list_repo_files(request.repo_id, revision=request.revision)
    except (HTTPError, OSError):
        raise HubNotFoundError(f"{request}: the repository has no such file") from cause
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    safe = [name for name in names if name.lower().endswith(".safetensors")]
    if pickles and not safe:
        raise UnsafeFileError(
            f"{request}: the repository offers its weights only as {', '.join(pickles[:5])}, whose loading can run "
            "code. Download that file and turn it into safetensors with `ubn-zoo convert NAME --checkpoint FILE`."
        ) from cause
    offered = f"it has {', '.join(safe[:10])}" if safe else "it has no safetensors file at all"
    raise HubNotFoundError(f"{request}: the repository has no such file; {offered}") from cause


def _from_cache(request: _Request) -> Path | None:
    """The cached file of a pinned revision if it holds what it should; None if the Hub must be asked."""
    path = request.cached()
    if path is None or not request.pinned:
        return None
    expected = request.sha256 or _reported_hash(path)
    if expected is None:
        return None
    with contextlib.suppress(FileNotFoundError):  # another process has just deleted it
        if _digest(path, expected) == expected:
            return path
    with _lock(request):
        # Looked at again, as another process may have put a good file in its place.
        if not path.exists():
            return None
        _verify(path, request, None)
    return path


def _obtain(request: _Request) -> Path:
    """One attempt: ask the Hub, download if needed, verify; the cache serves if the Hub cannot be asked."""
    try:
        answer = _ask(request)
    except (HTTPError, OSError) as error:
        cached = request.cached()
        if cached is None or (isinstance(error, HfHubHTTPError) and error.response.status_code == 404):
            raise
        with _lock(request):
            if not cached.exists():  # another process found it altered
                raise
            _verify(cached, request, None)
        if not request.pinned:
            _logger.warning(
                "%s: %s; using the cached commit %s", request, describe_failure(error), _commit(cached, request)
            )
        return cached
    with _lock(request):
        path = Path(
            hf_hub_download(
                request.repo_id,
                request.filename,
                revision=request.revision,
                cache_dir=request.cache_dir,
                library_name="ubn-zoo",
            )
        )
        _verify(path, request, answer.etag if _commit(path, request) == answer.commit else None)
    return path


def _ask(request: _Request) -> _Answer:
    """Ask what the file is, at once and without huggingface_hub's own retries, which can take minutes."""
    url = hf_hub_url(request.repo_id, request.filename, revision=request.revision)
    try:
        answer = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, library_name="ubn-zoo")
    except EntryNotFoundError as error:
        _raise_missing_file(error, request)
    if answer.commit_hash is None or (request.pinned and answer.commit_hash != request.revision):
        raise HubError(f"{request}: {endpoint()} answers for the commit {answer.commit_hash}; check HF_ENDPOINT")
    if answer.size is not None:
        if request.size is not None and answer.size != request.size:
            raise ChecksumError(f"{request}: expected {request.size} bytes, the Hub has {answer.size}; not downloaded")
        if answer.size > MAX_FILE_BYTES:
            raise HubError(f"{request}: {answer.size} bytes; valid: at most {MAX_FILE_BYTES}")
    return _Answer(commit=answer.commit_hash, etag=answer.etag)


def _commit(path: Path, request: _Request) -> str:
    """The commit that a cached file belongs to: ``snapshots/COMMIT/FILENAME``."""
    return path.parents[request.filename.count("/")].name


@contextlib.contextmanager
def _lock(request: _Request) -> Iterator[None]:
    """Let one process at a time download, verify or delete the file; released by the system if the process dies."""
    folder = request.cache_dir / ".locks" / f"models--{request.repo_id.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(request.filename.encode()).hexdigest()[:16]
    with WeakFileLock(folder / f"ubn-zoo-{name}.lock"):
        yield


# Files that passed, by everything that changes when a file does; for this process only.
_passed: set[tuple[str, str, int, int, int, int]] = set()


def _verify(path: Path, request: _Request, etag: str | None) -> None:
    """Check a cached file's hash; delete the file and raise `_MismatchError` if it fails."""
    expected = request.sha256 or _reported_hash(path) or etag
    if expected is None or len(expected) not in _HASH_LENGTHS or not re.fullmatch("[0-9a-f]+", expected):
        raise HubError(
            f"{request}: the server reports no hash for the file, so it cannot be checked; pass its sha256, "
            "or use another endpoint (HF_ENDPOINT)"
        )
    found = _digest(path, expected)
    if found != expected:
        _delete(path, request.cache_dir)
        raise _MismatchError(expected, found)


def _reported_hash(path: Path) -> str | None:
    """The hash that the Hub reported at download: the cache names its blobs by it.

    Only the first hop counts: a blob may itself be a link into a store with names of another kind.
    """
    if not path.is_symlink():
        return None
    name = path.readlink().name
    return name if len(name) in _HASH_LENGTHS and re.fullmatch("[0-9a-f]+", name) else None


def _digest(path: Path, expected: str) -> str:
    """Hash a file as `expected` was: SHA-256 of the content, or Git's SHA-1 of length and content."""
    status = path.stat()
    key = (str(path), expected, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key in _passed:
        return expected
    if len(expected) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % status.st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() == expected:
        _passed.add(key)
    return digest.hexdigest()


def _delete(path: Path, cache_dir: Path) -> None:
    """Delete a cached file: the link in the snapshot, the blob, and what the blob may point to in a shared store."""
    targets = [path, path.resolve()]
    if path.is_symlink():
        targets.insert(1, Path(os.path.normpath(path.parent / path.readlink())))
    for target in targets:
        if target.is_relative_to(cache_dir):
            target.unlink(missing_ok=True)
