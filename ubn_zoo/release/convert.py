"""Convert weights in another format to the safetensors file of a UBN model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm

from ubn_zoo.errors import InvalidArgumentError
from ubn_zoo.hub.fetch import cached_path
from ubn_zoo.models import catalog
from ubn_zoo.models.catalog import Entry
from ubn_zoo.utils.files import write_file

__all__ = ["convert"]


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

    The file's metadata records the model, its number of classes, and the origin of the weights.

    Args:
        name: A model of the zoo, or ``model.tag``.
        output: The file to write, ending in ``.safetensors``. It is written atomically.
        checkpoint: A local file in BatchNorm's, UBN's or the authors' format, saved by safetensors or torch. Only
            weights are read from it. By default, the weights of the tag are converted.
        num_classes: Number of classes of `checkpoint`, if it differs from the tag's.
        force: Whether to replace an existing file.
        cache_dir: Cache folder; by default huggingface_hub's.

    Raises:
        UnknownModelError: There is no such model or tag.
        CheckpointError: The weights do not fit the model, or are not finite.
        FileExistsError: `output` exists, and `force` is not set.
        HubError: The weights cannot be downloaded.
        InvalidArgumentError: `output` does not end in ``.safetensors``.
    """
    entry, target = catalog.describe(name), Path(output)
    if target.suffix != ".safetensors":
        raise InvalidArgumentError(f"received the output {target}; valid: a name that ends in .safetensors")
    if target.exists() and not force:
        raise FileExistsError(f"{target}: already exists; choose another name, or pass `force=True` to replace it")
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    overlay = {} if checkpoint is None else {"file": str(checkpoint), **classes}
    model = timm.create_model(
        entry.name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **classes
    )
    write_file(target, _with_metadata(model.state_dict(), _origin(entry, model, checkpoint, cache_dir)))


def _with_metadata(state_dict: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """Serialize to safetensors reproducibly: the library's own writer shuffles the metadata."""
    content = safetensors.torch.save(state_dict)
    end = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": metadata, **json.loads(content[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def _origin(entry: Entry, model: Any, checkpoint: str | Path | None, cache_dir: str | Path | None) -> dict[str, str]:
    """Metadata of a converted file, which publishing reads."""
    metadata = {"format": "pt", "architecture": entry.architecture, "num_classes": str(model.num_classes)}
    if checkpoint is not None:
        digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
        return {**metadata, "converted_from": f"{Path(checkpoint).name} (SHA-256 {digest})"}
    metadata["converted_from"] = entry.converted_from or entry.name
    if entry.address is not None and entry.file is not None:
        repository, revision = entry.address
        metadata["base_model"] = repository
        path = cached_path(repository, entry.file, revision=revision, cache_dir=cache_dir)
        # The cache keeps a file as snapshots/COMMIT/FILE.
        commit = revision or (path.parents[entry.file.count("/")].name if path else None)
        if commit is not None:
            metadata["base_revision"] = commit
    return metadata
