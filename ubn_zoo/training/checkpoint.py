"""Snapshots of training on disk: written atomically, verified when read.

A snapshot is a folder named after the number of updates, with ``model.safetensors``, ``optimizer.safetensors``,
``ema.safetensors`` if there is a moving average, and ``state.json``, which holds everything that is not a tensor, and
the SHA-256 of the other files. No file is a pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ubn_zoo.errors import SnapshotError
from ubn_zoo.utils.files import sync_folder, write_file

__all__ = ["Snapshot", "SnapshotError", "newest_snapshot", "save_snapshot"]

_FORMAT = 1
_STATE = "state.json"
_PART = ".part"
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Everything needed to resume training as if it had not stopped.

    It holds no random state: random numbers are drawn from seeds made of the recipe's seed and the place in the run.

    Attributes:
        updates: Updates made since the start of the run.
        model: State dict of the model.
        ema: State dict of the moving average of the weights; None without one.
        optimizer: State dict of the optimizer.
        progress: Everything else: values that JSON can hold, and tensors.
    """

    updates: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any]
    progress: Mapping[str, Any]


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A state dict in the safetensors format."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={"format": "pt"})


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn a value into what JSON can hold; tensors go into `tensors`, under numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy: one tensor may occur under several names, which the format does not allow.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        return {"$mapping": [[_pack(key, tensors), _pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [_pack(entry, tensors) for entry in value]}
    if isinstance(value, list):
        return [_pack(entry, tensors) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a snapshot cannot hold {value!r}; valid: tensors, numbers, strings, None, collections of them")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$tuple":
        return tuple(_unpack(entry, tensors) for entry in content)
    return {_unpack(key, tensors): _unpack(entry, tensors) for key, entry in content}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _folders(root: Path) -> list[Path]:
    """Folders of snapshots, the oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def save_snapshot(root: str | os.PathLike[str], snapshot: Snapshot, *, keep: int) -> Path:
    """Write a snapshot, then remove the oldest ones.

    Args:
        root: Folder of the run's snapshots; created if missing.
        snapshot: The state.
        keep: Number of snapshots to keep, including this one.

    Returns:
        The snapshot's folder.

    Raises:
        OSError: It cannot be written, for example because the disk is full; earlier snapshots are unchanged.
    """
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{snapshot.updates:010d}"
    temporary = folder / f".{target.name}{_PART}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tensors: dict[str, Tensor] = {}
        state = {"optimizer": _pack(snapshot.optimizer, tensors), "progress": _pack(snapshot.progress, tensors)}
        contents = {"model.safetensors": tensor_bytes(snapshot.model), "optimizer.safetensors": tensor_bytes(tensors)}
        if snapshot.ema is not None:
            contents["ema.safetensors"] = tensor_bytes(snapshot.ema)
        files = {name: _digest(content) for name, content in contents.items()}
        body = json.dumps({"format": _FORMAT, "updates": snapshot.updates, "files": files, **state})
        contents[_STATE] = json.dumps({"sha256": _digest(body.encode()), "body": body}).encode()
        for name, content in contents.items():
            write_file(temporary / name, content)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_snapshot(folder: str | os.PathLike[str]) -> Snapshot:
    """Read a snapshot.

    Args:
        folder: The snapshot's own folder.

    Raises:
        SnapshotError: A file is missing or is not as it was written.
    """
    place = Path(folder)
    try:
        outer = json.loads((place / _STATE).read_bytes())
        body = outer["body"]
        if outer["sha256"] != _digest(body.encode()):
            raise SnapshotError(f"{place / _STATE} is damaged: its SHA-256 is not the recorded one")
        state = json.loads(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"{place / _STATE} is damaged or missing: {error}") from None
    if state["format"] != _FORMAT:
        raise SnapshotError(f"{place / _STATE} has format {state['format']}; this version reads {_FORMAT}")
    loaded = {}
    for name, digest in state["files"].items():
        try:
            content = (place / name).read_bytes()
        except OSError as error:
            raise SnapshotError(f"{place / name} cannot be read: {error.strerror}") from None
        if _digest(content) != digest:
            raise SnapshotError(f"{place / name} is damaged: its SHA-256 is not the recorded one")
        loaded[name] = safetensors.torch.load(content)
    rest = loaded["optimizer.safetensors"]
    return Snapshot(
        updates=state["updates"],
        model=loaded["model.safetensors"],
        ema=loaded.get("ema.safetensors"),
        optimizer=_unpack(state["optimizer"], rest),
        progress=_unpack(state["progress"], rest),
    )


def newest_snapshot(root: str | os.PathLike[str]) -> Snapshot | None:
    """Read the newest intact snapshot; newer, damaged ones are named in a warning and left in place.

    Args:
        root: Folder of the run's snapshots.

    Returns:
        The snapshot; None if there is none.

    Raises:
        SnapshotError: There are snapshots, and all are damaged.
    """
    folders = _folders(Path(root))
    problems = []
    for folder in reversed(folders):
        try:
            return read_snapshot(folder)
        except SnapshotError as error:
            problems.append(str(error))
            _logger.warning("%s; falling back to the checkpoint before it", error)
    if problems:
        raise SnapshotError(f"no checkpoint in {root} is whole: {'; '.join(problems)}; remove {root} to start again")
    return None


def remove_unfinished(root: str | os.PathLike[str]) -> None:
    """Remove the incomplete snapshots of a killed process."""
    folder = Path(root)
    if folder.is_dir():
        for path in _unfinished(folder):
            shutil.rmtree(path, ignore_errors=True)


def _unfinished(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(_PART))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state; its tensors get the memory format of their parameters."""
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() == 4:
                like = torch.empty_like(parameter, dtype=value.dtype)
                values[name] = like.copy_(value)
