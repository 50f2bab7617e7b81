"""The one way in which a file is written whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["sync_folder", "write_file"]

_PART = ".part"


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one step, and wait until it is on the disk: readers see all of it or the file before it.

    Args:
        path: The file; its folder must exist.
        content: All of it.

    Raises:
        OSError: It cannot be written; the file before it is still there.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}{_PART}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
