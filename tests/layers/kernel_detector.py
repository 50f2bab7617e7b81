"""A detector of memory errors in Triton kernels that run in Triton's interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

ORDERS: dict[str, Callable[[int], list[int]]] = {
    "forward": lambda programs: list(range(programs)),
    "reversed": lambda programs: list(range(programs))[::-1],
    "random": lambda programs: random.Random(programs).sample(range(programs), programs),
}
# Bytes before and after each buffer: more than a wrong channel, row or sample of the tests' tensors strays.
_GUARD = 1 << 16
_NOBODY, _MANY = -1, -2


class _Buffer(NamedTuple):
    """One tensor argument of a launch, moved to memory between guard bands."""

    name: str
    tensor: Tensor  # the argument
    moved: Tensor
    fresh: bool  # not initialized yet
    writers: np.ndarray  # per element: the program that wrote it, or _NOBODY
    readers: np.ndarray  # likewise, or _MANY


class KernelError(AssertionError):
    """An invalid access."""


class Detector:
    """Runs every launch in the interpreter on guarded memory, and checks each access.

    Errors are accesses outside the tensors of a launch, elements that several programs write or that one program reads
    and another writes (no kernel here uses atomic operations), reads of uninitialized memory, and tensors that a
    launch leaves partly uninitialized. Every tensor starts on guard bands full of NaN.

    A floating-point tensor counts as uninitialized while all of it is NaN, which new memory is filled with under
    ``torch.use_deterministic_algorithms``.

    Attributes:
        order: The order in which the programs of a launch run, a key of `ORDERS`.
        launches: Name and number of programs of each launch.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.order = "forward"
        self.launches: list[tuple[str, int]] = []
        self._builder = builder = interpreter.interpreter_builder
        self._buffers: list[_Buffer] = []
        self._starts = np.zeros(0, np.int64)
        self._permutation: list[int] | None = None
        self._program = 0
        executor = interpreter.GridExecutor
        self._load, self._store = builder.create_masked_load, builder.create_masked_store
        self._set_index = builder.set_grid_idx
        patch.setattr(executor, "_init_args_hst", lambda launch, *given: self._start(launch, *given))
        patch.setattr(executor, "_restore_args_dev", lambda *_: self._finish())
        patch.setattr(builder, "set_grid_idx", self._next_program)
        patch.setattr(builder, "create_masked_load", self._checked_load)
        patch.setattr(builder, "create_masked_store", self._checked_store)

    def _start(self, launch: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[list[Any], dict]:
        self._buffers, self._permutation = [], None
        moved = [self._guarded(n, a) for n, a in zip(launch.arg_names, arguments, strict=False)]
        found = {name: self._guarded(name, value) for name, value in options.items()}
        self._buffers.sort(key=lambda buffer: buffer.moved.data_ptr())
        # An address in a guard band counts as its buffer's.
        self._starts = np.array([buffer.moved.data_ptr() - _GUARD for buffer in self._buffers], np.int64)
        self.launches.append((launch.fn.__name__, 0))
        return moved, found

    def _guarded(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        assert value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last), name
        size = value.numel() * value.element_size()
        memory = torch.full((size + 2 * _GUARD,), 0xFF, dtype=torch.uint8)
        moved = memory[_GUARD : _GUARD + size].view(value.dtype).as_strided(value.size(), value.stride())
        moved.copy_(value)
        empty = np.full(value.numel(), _NOBODY, np.int64)
        # Buffers and parameters of the tests hold numbers, so a tensor of NaN comes from an allocation.
        fresh = value.numel() > 0 and value.is_floating_point() and bool(value.isnan().all())
        self._buffers.append(_Buffer(name, value, moved, fresh, empty, empty.copy()))
        return moved

    def _next_program(self, x: int, y: int, z: int) -> None:
        programs = self._builder.grid_dim[0]
        assert self._builder.grid_dim == (programs, 1, 1)
        if self._permutation is None:
            self._permutation = ORDERS[self.order](programs)
            self.launches[-1] = (self.launches[-1][0], programs)
        self._program = self._permutation[x]
        self._set_index(self._program, y, z)

    def _touched(self, pointers: Any, mask: Any, action: str) -> list[tuple[_Buffer, np.ndarray]]:
        """The buffers behind the active pointers, each with the indices of its elements."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        owners = np.searchsorted(self._starts, addresses, side="right") - 1
        touched = []
        for owner in np.unique(owners):
            buffer = self._buffers[max(owner, 0)]
            offsets = addresses[owners == owner] - buffer.moved.data_ptr()
            indices = offsets // buffer.moved.element_size()
            bad = offsets % buffer.moved.element_size() != 0
            bad |= (indices < 0) | (indices >= buffer.moved.numel())
            if bad.any():
                self._fail(f"{action} outside {buffer.name}, which has {buffer.moved.numel()} elements", indices[bad])
            touched.append((buffer, indices))
        return touched

    def _checked_load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        for buffer, indices in self._touched(pointers, mask, "reads"):
            written = buffer.writers[indices]
            if ((written != _NOBODY) & (written != self._program)).any():
                self._fail(f"reads what another program writes to {buffer.name}", indices)
            if buffer.fresh and (written == _NOBODY).any():
                self._fail(f"reads uninitialized elements of {buffer.name}", indices[written == _NOBODY])
            read = buffer.readers[indices]
            buffer.readers[indices] = np.where((read == _NOBODY) | (read == self._program), self._program, _MANY)
        return self._load(pointers, mask, *rest)

    def _checked_store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for buffer, indices in self._touched(pointers, mask, "writes"):
            for users, action in ((buffer.writers, "writes"), (buffer.readers, "reads")):
                before = users[indices]
                if ((before != _NOBODY) & (before != self._program)).any():
                    self._fail(f"writes what another program {action} of {buffer.name}", indices)
            buffer.writers[indices] = self._program
        return self._store(pointers, value, mask, *rest)

    def _finish(self) -> None:
        for buffer in self._buffers:
            missing = np.flatnonzero(buffer.writers == _NOBODY)
            if len(missing) == buffer.writers.size:
                continue
            if len(missing) and (buffer.fresh or buffer.moved.dtype == torch.bool):
                self._fail(f"leaves elements of {buffer.name} uninitialized", missing)
            buffer.tensor.copy_(buffer.moved)

    def _fail(self, action: str, indices: np.ndarray) -> None:
        name, programs = self.launches[-1]
        raise KernelError(f"{name}, program {self._program} of {programs}, {action}: {indices[:8].tolist()}")
