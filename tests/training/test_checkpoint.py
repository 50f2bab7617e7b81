"""Snapshots on disk: complete or absent, verified, and read back exactly."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ubn_zoo.training import checkpoint as snapshots
from ubn_zoo.training.checkpoint import (
    Snapshot,
    SnapshotError,
    newest_snapshot,
    read_snapshot,
    remove_unfinished,
    restore_optimizer,
    save_snapshot,
)
from ubn_zoo.utils.files import write_file


def snapshot(updates: int, *, ema: bool = False) -> Snapshot:
    generator = torch.Generator().manual_seed(updates)
    model = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last),
        "norm.num_batches_tracked": torch.tensor(updates),
        "half": torch.randn(2, generator=generator).to(torch.bfloat16),
    }
    optimizer: dict[str, Any] = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, generator=generator), "none": None}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0], "decoupled": True, "name": "a"}],
    }
    progress = {"epoch": updates // 10, "rows": [{"loss": 0.1 + 0.2, "top5": None}], "totals": torch.tensor([1.5])}
    return Snapshot(updates, model, dict(model) if ema else None, optimizer, progress)


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip(ema: bool, tmp_path: Path) -> None:
    written = snapshot(12, ema=ema)
    folder = save_snapshot(tmp_path / "checkpoints", written, keep=3)
    names = {"model.safetensors", "optimizer.safetensors", "state.json"} | ({"ema.safetensors"} if ema else set())
    assert {path.name for path in folder.iterdir()} == names
    found = newest_snapshot(tmp_path / "checkpoints")
    assert found is not None
    assert found.updates == 12
    for name in ("model", "ema", "optimizer", "progress"):
        assert_equal(getattr(found, name), getattr(written, name))


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    assert newest_snapshot(tmp_path / "checkpoints") is None
    for updates in (5, 100, 20, 9_999_999_999):
        save_snapshot(tmp_path, snapshot(updates), keep=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [100, 9_999_999_999]
    found = newest_snapshot(tmp_path)
    assert found is not None
    assert found.updates == 9_999_999_999


def damage(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) * 3 // 4] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "flipped"])
def test_damaged_snapshot_falls_back_to_the_previous_one(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for updates in (1, 2):
        save_snapshot(tmp_path, snapshot(updates, ema=True), keep=3)
    damage(tmp_path / "0000000002", name, kind)
    with pytest.raises(SnapshotError, match=name.replace(".", r"\.")):
        read_snapshot(tmp_path / "0000000002")
    with caplog.at_level(logging.WARNING):
        found = newest_snapshot(tmp_path)
    assert found is not None
    assert found.updates == 1
    assert "0000000002" in caplog.text
    assert "falling back to the checkpoint before it" in caplog.text
    # The damaged snapshot does not prevent saving the same update again.
    save_snapshot(tmp_path, snapshot(2, ema=True), keep=3)
    assert read_snapshot(tmp_path / "0000000002").updates == 2


def test_only_damaged_snapshots_is_an_error_and_removes_nothing(tmp_path: Path) -> None:
    for updates in (1, 2):
        damage(save_snapshot(tmp_path, snapshot(updates), keep=3), "state.json", "flipped")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SnapshotError, match=r"no checkpoint in .* is whole: .*0000000002.*0000000001"):
        newest_snapshot(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = save_snapshot(tmp_path, snapshot(1), keep=2)
    outer = json.loads((folder / "state.json").read_text())
    body = outer["body"].replace('"format": 1', '"format": 2')
    content = {"sha256": snapshots._digest(body.encode()), "body": body}
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(SnapshotError, match="format 2; this version reads 1"):
        read_snapshot(folder)


@pytest.mark.parametrize("failing", range(1, 8))
def test_a_full_disk_leaves_what_was_saved(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_snapshot(tmp_path, snapshot(1), keep=2)
    calls = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_snapshot(tmp_path, snapshot(2), keep=2)
    monkeypatch.undo()
    found = newest_snapshot(tmp_path)
    assert found is not None
    # The new snapshot counts only when all files are written and its folder is renamed.
    assert found.updates == (2 if failing == 7 else 1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    save_snapshot(tmp_path, snapshot(1), keep=2)
    (tmp_path / ".0000000002.part").mkdir()
    (tmp_path / ".0000000002.part" / "model.safetensors").write_bytes(b"half")
    assert newest_snapshot(tmp_path).updates == 1
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000000001"]
    remove_unfinished(tmp_path / "absent")


def test_unsupported_values_are_refused(tmp_path: Path) -> None:
    good = snapshot(1)
    with pytest.raises(TypeError, match="a snapshot cannot hold <object"):
        save_snapshot(tmp_path, Snapshot(1, good.model, None, good.optimizer, {"x": object()}), keep=2)
    assert newest_snapshot(tmp_path) is None


def test_files_are_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsprop"])
def test_an_optimizer_resumes_with_its_memory_format(name: str, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
        if name == "lamb":
            from timm.optim import Lamb

            return model, Lamb(model.parameters(), lr=0.1)
        return model, kinds[name](model.parameters(), lr=0.1, **({"momentum": 0.9} if name != "adamw" else {}))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer, 1)
    state = Snapshot(1, model.state_dict(), None, optimizer.state_dict(), {})
    save_snapshot(tmp_path, state, keep=2)
    step(model, optimizer, 2)

    other, fresh = make()
    found = newest_snapshot(tmp_path)
    assert found is not None
    other.load_state_dict(dict(found.model))
    restore_optimizer(fresh, found.optimizer)
    for parameter, values in fresh.state.items():
        for value in values.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim() == 4:
                assert value.stride() == parameter.stride()
    step(other, fresh, 2)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key
