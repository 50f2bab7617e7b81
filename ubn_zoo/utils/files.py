"""Atomic file writes."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    from filelock import FileLock
else:
    import fcntl

__all__ = ["atomic_write", "locked", "sync_folder", "write_file"]

_PART = ".part"
_ABANDONED_SECONDS = 3600.0  # time since the last write after which a temporary file counts as abandoned


def write_file(path: str | os.PathLike[str], content: bytes | str, *, durable: bool = True) -> None:
    """Write a file atomically: readers see the old or the new file, never a partial one.

    Args:
        path: The file; its folder must exist. If it is a symbolic link, the file it points to is replaced.
        content: The new content; a string is encoded as UTF-8, its line endings unchanged.
        durable: Whether to wait until the content is on disk.

    Raises:
        OSError: The file cannot be written, for example because the disk is full. The error names `path`, and an
            existing file is unchanged.
    """
    with atomic_write(path, durable=durable) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the ``with`` block ends without an exception.

    A new file gets default permissions (666 minus the umask); a replaced file keeps its permissions.

    Args:
        path: The file; its folder must exist. If it is a symbolic link, the file it points to is replaced.
        durable: Whether the new content must be on disk (``fsync``) before it replaces the old content.

    Yields:
        The temporary file, open for writing bytes.

    Raises:
        OSError: The file cannot be written. The error names `path`, and an existing file is unchanged.
    """
    target = Path(os.path.realpath(path))
    _remove_leftovers(target)
    # A random name, so that concurrent writers of the same file do not share the temporary file.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PART}")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            sync_folder(target.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise _naming(error, path) from error


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, timeout: float = 60.0) -> Iterator[None]:
    """Hold an exclusive lock on an existing file during a ``with`` block; `atomic_write` may replace the file.

    The file itself is locked, so no lock file is left behind, and the lock is released when its process ends. On
    systems without such locks (Windows), the lock is a file in the folder of temporary files.

    Args:
        path: The file.
        timeout: Seconds to wait for other processes.

    Raises:
        TimeoutError: Another process still holds the lock.
        OSError: The file cannot be opened, or its file system has no locks.
    """
    target = Path(os.path.realpath(path))
    if sys.platform == "win32":
        name = hashlib.sha256(str(target).encode()).hexdigest()[:32]
        with FileLock(Path(tempfile.gettempdir()) / f"ubn-zoo-{name}.lock", timeout=timeout):
            yield
        return
    deadline = time.monotonic() + timeout
    while True:
        with target.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT, f"another process has held its lock for {timeout:g} s", os.fspath(path)
                    ) from None
            else:
                # The previous holder may have replaced the file; then this lock is on a file that no longer exists.
                if os.path.samestat(os.fstat(file.fileno()), target.stat()):
                    yield
                    return
        time.sleep(0.02)


def _naming(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """Return the same error with the name of the requested file instead of the temporary one."""
    if error.errno is None:
        return OSError(f"{error}: {os.fspath(path)!r}")
    return OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path))


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of processes that were killed while writing `target`."""
    with contextlib.suppress(OSError):
        for path in target.parent.glob(f".{glob.escape(target.name)}.*{_PART}"):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to disk, if the file system supports it.

    Args:
        folder: The folder.

    Raises:
        OSError: Syncing failed.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, and a folder may be writable but not readable.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
