"""The processes of a run: rank, device, and collective operations."""

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
    """This process's rank, the number of processes, and the device.

    Attributes:
        rank: This process, from 0.
        count: Number of processes; 1 without torchrun.
        device: Device of this process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the run's files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; every process must call it."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        """Maximum over all processes; every process must call it."""
        if self.count == 1:
            return value
        found = torch.tensor(float(value), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; every process must call it."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes in rank order; every process must call it."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def share(self, total: int) -> range:
        """This process's range of `total` items; the ranges of all processes differ in length by at most one."""
        return range(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    @torch.no_grad()
    def equalize_buffers(self, model: nn.Module) -> None:
        """Broadcast rank 0's buffers: statistics differ between ranks if layers are not synchronized."""
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
        raise RanksError(
            f"device: received {name!r}; valid: auto, or a torch device such as cpu, cuda, cuda:1"
        ) from None
    if device.type == "cpu":
        return device
    available = torch.accelerator.current_accelerator(check_available=True)
    if available is None or available.type != device.type:
        raise RanksError(f"device: received {name!r}, but torch {torch.__version__} finds none; valid here: cpu, auto")
    index = local if device.index is None else device.index
    if index >= torch.accelerator.device_count():
        raise RanksError(f"device: {device.type}:{index} does not exist; {torch.accelerator.device_count()} found")
    return torch.device(device.type, index)


def _store(rank: int, count: int, timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` for a store that survives restarts.

    torchrun keeps its store across restarts, so restarted processes find the addresses of dead ones
    (https://github.com/pytorch/pytorch/issues/135712). On one machine, the restart count distinguishes them; across
    machines, the count may differ.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, _, _ = next(iter(rendezvous("env://", rank=rank, world_size=count, timeout=timeout)))
    return {"store": dist.PrefixStore(f"restart_{restarts}", store), "rank": rank, "world_size": count}


@contextmanager
def joined(device: str = "auto", *, timeout: float = 600.0) -> Iterator[Ranks]:
    """Join torchrun's process group for the duration of a ``with`` block; without torchrun, run as a single process.

    Args:
        device: ``auto`` (the accelerator if there is one), or a torch device name; without an index, each process of a
            machine uses its own device.
        timeout: Seconds to wait for the other processes.

    Yields:
        The rank and device of this process.

    Raises:
        RanksError: The environment is incomplete, the device does not exist, or the processes cannot connect.
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
