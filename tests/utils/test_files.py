"""Atomic writes: never partial after any failure, with the permissions of an ordinary write."""

from __future__ import annotations

import errno
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from ubn_zoo.utils.files import atomic_write, write_file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_file_has_default_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        write_file(tmp_path / "atomic", b"content")
    finally:
        os.umask(before)
    assert mode(tmp_path / "atomic") == mode(tmp_path / "plain") == 0o666 & ~umask


def test_replaced_file_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to("file")
    write_file(link, "new é\r\n")
    assert link.is_symlink() and path.read_bytes() == "new é\r\n".encode() and mode(path) == 0o640
    assert names(tmp_path) == ["file", "link"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_names_the_file_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def full(*args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif call == "replace":
        monkeypatch.setattr(Path, "replace", full)
    expected = pytest.raises(OSError, match="No space left on device: .*weights.safetensors'$")
    with expected as caught, atomic_write(path) as file:
        file.write(b"new")
        if call == "write":
            full()
    monkeypatch.undo()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["weights.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_really_full_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened(Path("/dev/full"), "wb"))
    with pytest.raises(OSError, match="No space left on device: .*weights'$"):
        write_file(tmp_path / "weights", b"x" * 100_000)


def test_missing_folder_and_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/file'$"):
        write_file(tmp_path / "absent" / "file", b"x")
    with pytest.raises(FileNotFoundError, match=r"other'$"), atomic_write(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
def test_two_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [b"a" * 100_000, b"b" * 100_000]
    write_file(path, contents[0])
    with ThreadPoolExecutor(2) as pool:
        writers = [
            pool.submit(lambda content=content: [write_file(path, content) for _ in range(50)]) for content in contents
        ]
        while not all(writer.done() for writer in writers):
            assert path.read_bytes() in contents
        for writer in writers:
            writer.result()
    assert names(tmp_path) == ["file"]


def test_old_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    old, recent, other = (tmp_path / name for name in (".file.aaaa.part", ".file.bbbb.part", ".else.aaaa.part"))
    for path in (old, recent, other):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write_file(tmp_path / "file", b"whole")
    assert names(tmp_path) == [".else.aaaa.part", ".file.bbbb.part", "file"]
