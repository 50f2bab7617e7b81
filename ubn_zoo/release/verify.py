"""Download checkpoints, and verify them against the manifest and the Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch

from ubn_zoo.errors import CheckpointError, ManifestError, UnknownModelError
from ubn_zoo.hub import fetch as hub
from ubn_zoo.hub.manifest import load_manifest
from ubn_zoo.models import catalog
from ubn_zoo.models.catalog import Entry

__all__ = ["Finding", "download", "present", "verify"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of checking one checkpoint.

    Attributes:
        name: The checkpoint, ``model.tag``.
        source: ``bundled`` or ``hub``.
        size: Size of the file in bytes; None if there is no file.
        problem: What is wrong; None if nothing is.
    """

    name: str
    source: str
    size: int | None
    problem: str | None


def download(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """Return the local path of an entry's weights, downloaded if they are not cached.

    The file's hash is checked before the path is returned.

    Args:
        entry: An entry of the catalog.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        UnknownModelError: The entry has no weights.
        HubError: The file cannot be downloaded, or its hash is wrong.
        FileNotFoundError: A bundled file is missing.
    """
    for record in load_manifest().find(architecture=entry.architecture, tag=entry.tag):
        return hub.fetch_record(record, cache_dir=cache_dir)
    if entry.address is None or entry.file is None:
        raise UnknownModelError(f"{entry.name} has no weights; `ubn-zoo list --pretrained` lists models that do")
    repo_id, revision = entry.address
    return hub.fetch(repo_id, entry.file, revision=revision, cache_dir=cache_dir)


def present(cache_dir: str | Path | None = None) -> list[Entry]:
    """List the checkpoints on this machine: the bundled ones and those in the cache.

    Args:
        cache_dir: Cache folder; by default huggingface_hub's.
    """
    found = []
    for entry in catalog.entries(tags=True, pretrained=True):
        if entry.address is None:
            found.append(entry)
        elif entry.file is not None:
            repo_id, revision = entry.address
            if hub.cached_path(repo_id, entry.file, revision=revision, cache_dir=cache_dir) is not None:
                found.append(entry)
    return found


def verify(entries: Sequence[Entry], cache_dir: str | Path | None = None) -> Iterator[Finding]:
    """Verify checkpoints one by one: hash, size, exact keys, shapes and dtypes, finite values, a forward pass.

    Args:
        entries: Entries of the catalog; missing files are downloaded.
        cache_dir: Cache folder; by default huggingface_hub's.

    Yields:
        One finding per entry, as soon as the entry has been checked.
    """
    for entry in entries:
        size = None
        try:
            path = download(entry, cache_dir)
            size = path.stat().st_size
            _check_model(entry, size, cache_dir)
        except (RuntimeError, ManifestError, UnknownModelError, OSError) as error:
            # RuntimeError: a checkpoint that does not fit, a failed download, or torch in the forward pass.
            yield Finding(name=entry.name, source=entry.source, size=size, problem=str(error))
        else:
            yield Finding(name=entry.name, source=entry.source, size=size, problem=None)


def _check_model(entry: Entry, size: int, cache_dir: str | Path | None) -> None:
    for record in load_manifest().find(architecture=entry.architecture, tag=entry.tag):
        if record.bytes != size:
            raise CheckpointError(f"{entry.name}: the manifest says {record.bytes} bytes, the file has {size}")
    # Loading is strict: exact keys, shapes and dtypes, finite values.
    model = timm.create_model(entry.name, pretrained=True, cache_dir=cache_dir).eval()
    params = sum(parameter.numel() for parameter in model.parameters())
    if params != entry.params:
        raise CheckpointError(f"{entry.name}: {entry.params} parameters expected, the model has {params}")
    images = torch.rand(1, *entry.input.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(images)
    if tuple(logits.shape) != (1, entry.num_classes) or not torch.isfinite(logits).all():
        raise CheckpointError(
            f"{entry.name}: expected {entry.num_classes} finite outputs for one image, got shape {tuple(logits.shape)} "
            f"with {int((~torch.isfinite(logits)).sum())} values that are not finite"
        )
