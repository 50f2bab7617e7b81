"""Ranks of the processes that torchrun starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ubn_zoo.utils.distributed import Ranks, RanksError, joined

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_there_is_one_process() -> None:
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.count, ranks.device, ranks.first) == (0, 1, torch.device("cpu"), True)
        values = torch.tensor([1.0, 2.0])
        assert torch.equal(ranks.sum(values), torch.tensor([1.0, 2.0]))
        assert (ranks.any(True), ranks.any(False), ranks.max(3.5)) == (True, False, 3.5)
        ranks.barrier()
    with joined("auto") as ranks:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        assert ranks.device.type == ("cpu" if accelerator is None else accelerator.type)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_cover_everything_once(total: int, count: int) -> None:
    shares = [Ranks(rank, count).share(total) for rank in range(count)]
    assert [index for share in shares for index in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, r"the environment has RANK=0; valid: all of RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 2; valid: 0 to 1"),
    ],
)
def test_an_incomplete_environment_is_rejected(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match=message), joined("cpu"):
        pass


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps:3"])
def test_a_missing_device_is_rejected(device: str) -> None:
    with pytest.raises(RanksError, match=rf"device: .*{device}"), joined(device):
        pass


def test_missing_ranks_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match="rank 1 of 2 could not join the others by gloo"), joined("cpu", timeout=1):
        pass


def test_two_ranks_agree(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(
        """
import torch
from torch import nn
from ubn_zoo.utils.distributed import joined

with joined("cpu") as ranks:
    assert ranks.count == 2
    assert ranks.first == (ranks.rank == 0)
    assert ranks.sum(torch.tensor([ranks.rank + 1.0])).item() == 3
    assert ranks.max(float(ranks.rank)) == 1
    assert ranks.any(ranks.rank == 1) and not ranks.any(False)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(ranks.rank)
    norm.num_batches_tracked.fill_(ranks.rank)
    ranks.equalize_buffers(norm)
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
    ranks.barrier()
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_single_process_keeps_its_buffers() -> None:
    norm = nn.BatchNorm2d(2)
    Ranks().equalize_buffers(norm)
    assert torch.equal(norm.running_var, torch.ones(2))
