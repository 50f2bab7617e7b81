"""Download files from the Hub: pinned to a commit, verified by hash, never a pickle, with retries.

Transfers and the cache are huggingface_hub's own, so mirrors (``HF_ENDPOINT``), tokens, offline mode and the caches of
other tools work as usual. This module adds three things: the hash of every file is verified before its path is
returned, a file that fails is deleted and downloaded once more, and temporary failures are retried.

Every process verifies a file on first use; hashing 100 MB takes 0.1 to 0.3 seconds. The expected hash comes from the
caller or from the Hub. huggingface_hub keeps the Hub's hash only as the name of a symbolic link's target, which copied
caches and Windows lack, so it is also written to ``.ubn-zoo/COMMIT/FILE`` beside the snapshots. A read-only cache is
used as is: nothing is locked or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # imported there, but not in __all__

from ubn_zoo.errors import (
    ChecksumError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    InvalidArgumentError,
    UnsafeFileError,
)
from ubn_zoo.hub.manifest import MAX_FILE_BYTES, Record, bundled_path
from ubn_zoo.hub.retry import RETRY_SECONDS_VARIABLE, Advice, HTTPError, describe_failure, endpoint, retry, traceable
from ubn_zoo.utils.files import write_file

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

MAX_JSON_BYTES = 16 * 2**20

_HASH_NAMES = {64: "SHA-256", 40: "Git SHA-1"}
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_HASH_FOLDER = ".ubn-zoo"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_logger = logging.getLogger(__name__)


class _MismatchError(Exception):
    """A file had the wrong hash and has been deleted; the arguments are the expected hash and the one found."""


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


def fetch(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the local path of a file on the Hub, downloaded if needed, its hash verified.

    The expected hash is `sha256` if given, otherwise the one that the Hub reports: SHA-256 for large files, Git's SHA-1
    for small ones. A file that fails is deleted and downloaded once more. Server errors (5xx, 408, 425, 429), timeouts,
    broken connections and truncated responses are retried with growing pauses for `RETRY_SECONDS` seconds.

    A cached file of a pinned revision needs no network. A branch or tag is first resolved to a commit on the Hub; if
    the Hub is unreachable, its last known commit is used. Processes that need the same file download it only once.

    Args:
        repo_id: Repository, ``owner/name``.
        filename: Path in the repository, ending in ``.safetensors`` or ``.json``.
        revision: Commit, tag or branch; by default the main branch. Only a full 40-digit commit is a pin.
        sha256: Expected hash, 64 hexadecimal digits.
        size: Expected size in bytes, checked before the download.
        cache_dir: Cache folder; by default huggingface_hub's. It may be read-only if it already contains the file.

    Raises:
        UnsafeFileError: The file has another extension, for example that of a pickle.
        HubNotFoundError: The repository, revision or file does not exist.
        HubAccessError: The repository is gated, private or disabled.
        HubUnavailableError: The Hub is unreachable, and the file is not cached.
        ChecksumError: The file failed verification twice, or has an unexpected size.
        HubError: The server does not respond like the Hub.
        OSError: The cache cannot be written, for example because the disk is full.
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
        try:
            return _from_cache(request) or _obtain(request)
        except _MismatchError as first:
            _logger.warning("%s: expected hash %s, found %s; downloading it again", request, *first.args)
            return _obtain(request)
    except _MismatchError as second:
        expected, found = second.args
        raise ChecksumError(
            f"{request}: expected {_HASH_NAMES[len(expected)]} {expected}, found {found}, twice. The file was "
            "deleted. Either the repository or mirror (HF_ENDPOINT) has a different file, or the network alters it: "
            "check the expected hash, and try again later or from another network."
        ) from None


def fetch_record(record: Record, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the local path of a record's checkpoint, its hash verified.

    Args:
        record: A record of the manifest, of either source.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        ChecksumError: A bundled file does not have the recorded hash, or a Hub file failed twice.
        FileNotFoundError: The bundled file is missing from the installation.
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
        raise ChecksumError(f"{path}: expected SHA-256 {record.sha256}, found {found}; reinstall ubn-zoo")
    return path


def cached_path(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Return the unverified path of a cached file without network access; None if it is not cached.

    Args:
        repo_id: Repository, ``owner/name``.
        filename: Path in the repository.
        revision: Commit, tag or branch; by default the main branch. A tag or branch stands for its last known commit.
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
            f"received the file {filename!r}, which can run code when loaded; valid: {' and '.join(SAFE_SUFFIXES)}. "
            "Download it and convert it to safetensors with `ubn-zoo convert NAME --checkpoint FILE`."
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


def _obtain(request: _Request) -> Path:
    """Download and verify the file, with retries."""
    advice = Advice(
        login="ask for access on its page, then log in with `hf auth login` or set HF_TOKEN",
        offline=f"The file is not in the cache {request.cache_dir}: unset HF_HUB_OFFLINE and load it once, or copy the "
        "cache from a machine that has it",
        exhausted=f"Check the connection and {endpoint()} (set HF_ENDPOINT for a mirror), try again later, or wait "
        f"longer with {RETRY_SECONDS_VARIABLE}=SECONDS. Once a file is in the cache it loads without the Hub",
    )
    return retry(lambda: _attempt(request), str(request), advice)


def _raise_missing_file(error: Exception, request: _Request) -> NoReturn:
    """Raise an error that lists what the repository has instead; old repositories often have only a pickle."""
    cause = traceable(error)
    try:
        names = HfApi().list_repo_files(request.repo_id, revision=request.revision)
    except (HTTPError, OSError):
        raise HubNotFoundError(f"{request}: the repository has no such file") from cause
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    safe = [name for name in names if name.lower().endswith(".safetensors")]
    if pickles and not safe:
        raise UnsafeFileError(
            f"{request}: the repository has weights only as {', '.join(pickles[:5])}, which can run code when loaded. "
            "Download that file and convert it to safetensors with `ubn-zoo convert NAME --checkpoint FILE`."
        ) from cause
    offered = f"it has {', '.join(safe[:10])}" if safe else "it has no safetensors files"
    raise HubNotFoundError(f"{request}: the repository has no such file; {offered}") from cause


def _from_cache(request: _Request) -> Path | None:
    """Return the cached file of a pinned revision if it is intact; None if the Hub must be asked."""
    path = request.cached()
    if path is None or not request.pinned:
        return None
    expected = request.sha256 or _known_hash(path, request)
    if expected is None:
        return None
    with contextlib.suppress(FileNotFoundError):  # another process has just deleted it
        if _digest(path, expected) == expected:
            _record_hash(path, request, expected)
            return path
    with _lock(request):
        # Checked again: another process may have replaced it with an intact file.
        if not path.exists():
            return None
        _verify(path, request, None)
    return path


def _attempt(request: _Request) -> Path:
    """Make one attempt: ask the Hub, download if needed, verify; fall back to the cache if the Hub is unreachable."""
    try:
        response = _ask(request)
    except (HTTPError, OSError) as error:
        # A server that is not the Hub, such as a captive portal, counts as unreachable.
        gone = isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) and error.response.status_code == 404
        cached = request.cached()
        if cached is None or gone:
            raise
        with _lock(request):
            if not cached.exists():  # another process deleted it
                raise
            _verify(cached, request, None)
        if not request.pinned:
            reason, commit = describe_failure(error), _commit(cached, request)
            _logger.warning("%s: %s; using the cached commit %s", request, reason, commit)
        return cached
    with _lock(request):
        path = _download(request, response)
        _verify(path, request, response.etag if _commit(path, request) == response.commit_hash else None)
    return path


def _download(request: _Request, response: HfFileMetadata) -> Path:
    try:
        return Path(
            hf_hub_download(
                request.repo_id,
                request.filename,
                revision=request.revision,
                cache_dir=request.cache_dir,
                library_name="ubn-zoo",
            )
        )
    except (OSError, RuntimeError) as error:
        # hf_xet reports file system errors only as text.
        number = errno.ENOSPC if "No space left on device" in str(error) else getattr(error, "errno", None)
        if number is None or isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
            raise
        cached = dataclasses.replace(request, revision=str(response.commit_hash)).cached()
        if cached is not None and number in _NOT_WRITABLE:
            return cached  # only the new commit of the branch could not be written
        advice = "Free some space there" if number == errno.ENOSPC else "Make it writable"
        reason = f"{request}: cannot be written to the cache: {os.strerror(number)}. {advice}, or set HF_HUB_CACHE or "
        raise OSError(number, f"{reason}`cache_dir` to another folder. Cache", str(request.cache_dir)) from error


def _ask(request: _Request) -> HfFileMetadata:
    """Ask the Hub about a file, bypassing huggingface_hub's own retries, which can take minutes."""
    url = hf_hub_url(request.repo_id, request.filename, revision=request.revision)
    try:
        response = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, library_name="ubn-zoo")
    except EntryNotFoundError as error:
        _raise_missing_file(error, request)
    if response.commit_hash is None:
        raise FileMetadataError("the response names no commit")
    if request.pinned and response.commit_hash != request.revision:
        raise HubError(f"{request}: {endpoint()} returned commit {response.commit_hash}; check HF_ENDPOINT")
    if response.size is not None:
        if request.size is not None and response.size != request.size:
            raise ChecksumError(
                f"{request}: expected {request.size} bytes, the Hub has {response.size}; not downloaded"
            )
        largest = MAX_JSON_BYTES if request.filename.endswith(".json") else MAX_FILE_BYTES
        if response.size > largest:
            raise HubError(f"{request}: {response.size} bytes; valid: at most {largest}")
    return response


def _commit(path: Path, request: _Request) -> str:
    """The commit of a cached file, whose path ends in ``snapshots/COMMIT/FILENAME``."""
    return path.parents[request.filename.count("/")].name


@contextlib.contextmanager
def _lock(request: _Request) -> Iterator[None]:
    """Allow one process at a time to download, verify or delete the file; a process that dies releases the lock.

    A read-only cache needs no protection and has no lock.
    """
    folder = request.cache_dir / ".locks" / f"models--{request.repo_id.replace('/', '--')}"
    name = hashlib.sha256(request.filename.encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(folder / f"ubn-zoo-{name}.lock"))
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
        yield


# Files that this process has verified, with everything that changes when a file does.
_passed: set[tuple[str, str, int, int, int, int]] = set()


def _verify(path: Path, request: _Request, etag: str | None) -> None:
    """Verify a cached file's hash; if it is wrong, delete the file and raise `_MismatchError`."""
    expected = request.sha256 or _known_hash(path, request) or etag
    if expected is None or not _HASH.fullmatch(expected):
        raise HubError(
            f"{request}: neither the server nor the cache {request.cache_dir} has a hash to verify the file with. Load "
            "it once with access to the Hub, pass its sha256, or use another endpoint (HF_ENDPOINT)"
        )
    found = _digest(path, expected)
    if found == expected:
        _record_hash(path, request, expected)
        return
    try:
        _delete(path, request)
    except OSError as error:
        raise ChecksumError(
            f"{request}: expected {_HASH_NAMES[len(expected)]} {expected}, found {found} in the cache, and the file "
            f"cannot be deleted: {error}. Delete {path}, or set HF_HUB_CACHE or `cache_dir` to another folder"
        ) from error
    raise _MismatchError(expected, found)


def _known_hash(path: Path, request: _Request) -> str | None:
    """The hash that the Hub reported when a cached file was downloaded; None if unknown."""
    if path.is_symlink():
        # Only the first hop counts: a blob may itself link to a shared store with another naming scheme.
        name = path.readlink().name
        return name if _HASH.fullmatch(name) else None
    try:
        recorded = _hash_file(path, request).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        recorded = ""
    if _HASH.fullmatch(recorded):
        return recorded
    # A copy that followed the links (`cp -rL`) has the file twice: by name and by hash.
    blobs = path.parents[request.filename.count("/") + 2] / "blobs"
    for name in ("0" * 64, "0" * 40) if blobs.is_dir() else ():
        digest = _digest(path, name)
        if (blobs / digest).is_file():
            return digest
    return None


def _hash_file(path: Path, request: _Request) -> Path:
    """Where the hash of a cached file is recorded: ``models--OWNER--NAME/.ubn-zoo/COMMIT/FILENAME``."""
    repository = path.parents[request.filename.count("/") + 2]
    return repository / _HASH_FOLDER / _commit(path, request) / request.filename


def _record_hash(path: Path, request: _Request, verified: str) -> None:
    """Record the hash of a verified file, for copies of the cache without symbolic links."""
    record = _hash_file(path, request)
    if not record.exists():
        with contextlib.suppress(OSError):  # the cache may be read-only or full
            record.parent.mkdir(parents=True, exist_ok=True)
            write_file(record, f"{verified}\n")


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


def _delete(path: Path, request: _Request) -> None:
    """Delete a cached file: the link, the blob, what the blob may point to in a shared store, and the recorded hash."""
    targets = [path, path.resolve(), _hash_file(path, request)]
    if path.is_symlink():
        targets.insert(1, Path(os.path.normpath(path.parent / path.readlink())))
    for target in targets:
        if target.is_relative_to(request.cache_dir):
            target.unlink(missing_ok=True)
