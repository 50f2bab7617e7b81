"""The processes of one run: who this one is among those that torchrun started, and what they agree on."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ubn_zoo.errors import RanksError

__all__ = ["Ranks", "RanksError", "joined"]


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: This process, from 0.
        count: How many there are; 1 without torchrun.
        device: Where this process computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes what the run leaves."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes; every one of them must call it. The argument is changed in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        """The largest of all processes' values; every one of them must call it."""
        if self.count == 1:
            return value
        found = torch.tensor(float(value), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process; every one of them must call it."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """All processes' values in the order of ranks; every one of them must call it."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def share(self, total: int) -> range:
        """This process's part of `total` things: all parts together are all of them, and differ by at most one."""
        return range(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    @torch.no_grad()
    def equalize_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: statistics differ where layers are not synchronized."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)


def _environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environment[name] for name in names if name in environment}
    if not given:
        return 0, 1, 0
    if len(given) < len(names) or not all(value.isdigit() for value in given.values()):
        raise RanksError(
            f"the environment has {', '.join(f'{k}={v}' for k, v in given.items())}; valid: all of {', '.join(names)}, "
            "as torchrun sets them, or none. Start several processes by: torchrun --nproc-per-node N -m ubn_zoo train"
        )
    rank, count, local = (int(given[name]) for name in names)
    if not rank < count:
        raise RanksError(f"RANK is {rank}; valid: 0 to {count - 1}, below WORLD_SIZE")
    return rank, count, local


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RanksError(f"device: received {name!r}; valid: auto, or torch's name such as cpu, cuda, cuda:1") from None
    if device.type == "cpu":
        return device
    available = torch.accelerator.current_accelerator(check_available=True)
    if available is None or available.type != device.type:
        raise RanksError(f"device: received {name!r}, and torch {torch.__version__} sees none; valid here: cpu, auto")
    index = local if device.index is None else device.index
    if index >= torch.accelerator.device_count():
        raise RanksError(f"device: {device.type}:{index} is not there; there are {torch.accelerator.device_count()}")
    return torch.device(device.type, index)


def _store(rank: int, count: int, timeout: datetime.timedelta) -> dict[str, Any]:
    """Where processes find each other, if torch's own choice would mislead them.

    torchrun's store outlives a restart, and processes that it starts again find the addresses of those that died
    (https://github.com/pytorch/pytorch/issues/135712). On one machine the number of the restart tells them apart; on
    several it need not be the same everywhere.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, _, _ = next(iter(rendezvous("env://", rank=rank, world_size=count, timeout=timeout)))
    return {"store": dist.PrefixStore(f"restart_{restarts}", store), "rank": rank, "world_size": count}


@contextmanager
def joined(device: str = "auto", *, timeout: float = 600.0) -> Iterator[Ranks]:
    """Join the processes that torchrun started, for the length of a ``with`` block; alone without torchrun.

    Args:
        device: ``auto`` (the accelerator if there is one), or torch's name of it; without an index, each process of a
            machine takes its own.
        timeout: Seconds that a process waits for the others before it gives up.

    Yields:
        This process's place.

    Raises:
        RanksError: The environment is incomplete, the device is not there, or the processes do not find each other.
    """
    rank, count, local = _environment(os.environ)
    place = Ranks(rank, count, _device(device, local))
    if place.device.type != "cpu":
        torch.accelerator.set_device_index(place.device.index)
    if count == 1:
        yield place
        return
    backend = dist.get_default_backend_for_device(place.device)
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, timeout=limit, **_store(rank, count, limit))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RanksError(
            f"rank {rank} of {count} could not join the others by {backend}: {reason}; where torchrun starts ranks of "
            "several machines again, it needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        ) from error
    try:
        yield place
    finally:
        dist.destroy_process_group()
