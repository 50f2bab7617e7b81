"""Bring checkpoints here, check that they are what the manifest and the Hub say, and convert foreign ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from ubn_zoo.hub import fetch as hub
from ubn_zoo.hub.manifest import ManifestError, load_manifest
from ubn_zoo.models import CheckpointError
from ubn_zoo.models import catalog as catalog
from ubn_zoo.models.catalog import Entry, UnknownModelError

__all__ = ["Finding", "convert", "download", "present", "verify"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        name: The checkpoint, ``model.tag``.
        source: ``bundled`` or ``hub``.
        size: Size of the file in bytes; None if there is none.
        problem: What is wrong, or None.
    """

    name: str
    source: str
    size: int | None
    problem: str | None


def download(entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """Give the local path of an entry's file, its hash checked; fetched if need be.

    Args:
        entry: An entry of the catalog.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        UnknownModelError: The entry has no weights.
        HubError: The file cannot be had, or is not the right one.
        FileNotFoundError: A bundled file is missing.
    """
    for record in load_manifest().find(architecture=entry.architecture, tag=entry.tag):
        return hub.fetch_record(record, cache_dir=cache_dir)
    if entry.address is None or entry.file is None:
        raise UnknownModelError(f"{entry.name} has no weights; `ubn-zoo list --pretrained` shows those that have")
    repo_id, revision = entry.address
    return hub.fetch(repo_id, entry.file, revision=revision, cache_dir=cache_dir)


def present(cache_dir: str | Path | None = None) -> list[Entry]:
    """List the checkpoints that are here: bundled, or in the cache.

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
    """Check checkpoints one after another: hash, size, exact keys, shapes and dtypes, finite values, a forward pass.

    Args:
        entries: Entries of the catalog; files that are not here are fetched.
        cache_dir: Cache folder; by default huggingface_hub's.

    Yields:
        One finding per entry, as soon as it is known.
    """
    for entry in entries:
        size = None
        try:
            path = download(entry, cache_dir)
            size = path.stat().st_size
            _check_model(entry, size, cache_dir)
        except (RuntimeError, ManifestError, UnknownModelError, OSError) as error:
            # RuntimeError: a checkpoint that does not fit, a file that cannot be had, or torch in the forward pass.
            yield Finding(name=entry.name, source=entry.source, size=size, problem=str(error))
        else:
            yield Finding(name=entry.name, source=entry.source, size=size, problem=None)


def convert(
    name: str,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    force: bool = False,
    cache_dir: str | Path | None = None,
) -> None:
    """Write the safetensors file of a UBN model from weights in another format.

    The file's metadata say which model it is for, of how many classes, and where its weights come from.

    Args:
        name: A model of the zoo, or ``model.tag``.
        output: The file to write, ending in ``.safetensors``; written whole or not at all.
        checkpoint: A local file of BatchNorm's, UBN's or the authors' format, safetensors or torch's, of which only
            weights are read; by default the weights of the tag.
        num_classes: Number of classes of `checkpoint`, if not the tag's.
        force: Whether an existing file is replaced.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        UnknownModelError: There is no such model or tag.
        CheckpointError: The weights do not fit the model, or are not finite.
        FileExistsError: There is such a file already, and `force` is not set.
        HubError: The weights cannot be fetched.
        ValueError: The output has another ending.
    """
    entry, target = catalog.describe(name), Path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"received the output {target}; valid: a name that ends in .safetensors")
    if target.exists() and not force:
        raise FileExistsError(f"{target}: exists already; choose another name, or replace it with --force")
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    overlay = {} if checkpoint is None else {"file": str(checkpoint), **classes}
    model = timm.create_model(
        entry.name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **classes
    )
    with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        written.write_bytes(_with_metadata(model.state_dict(), _origin(entry, model, checkpoint)))
        written.replace(target)


def _with_metadata(state_dict: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes follow from its content: the library's own writer shuffles the metadata."""
    content = safetensors.torch.save(state_dict)
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": metadata, **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _origin(entry: Entry, model: Any, checkpoint: str | Path | None) -> dict[str, str]:
    """What a converted file says of itself, which `ubn_zoo.release.upload` reads."""
    metadata = {"format": "pt", "architecture": entry.architecture, "num_classes": str(model.num_classes)}
    if checkpoint is not None:
        digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
        return {**metadata, "converted_from": f"{Path(checkpoint).name} (SHA-256 {digest})"}
    metadata["converted_from"] = entry.converted_from or entry.name
    if entry.address is not None:
        metadata["base_model"] = entry.address[0]
    return metadata


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
            f"with {int((~torch.isfinite(logits)).sum())} that are not finite"
        )
