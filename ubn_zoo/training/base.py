"""The weights that a run starts from, identified so that the run can be repeated."""

from __future__ import annotations

import hashlib
from pathlib import Path

import timm

from ubn_zoo.hub.fetch import cached_path
from ubn_zoo.models.weights import safetensors_filename
from ubn_zoo.recipes.schema import Recipe
from ubn_zoo.training.build import model_name

__all__ = ["base_weights"]


def base_weights(recipe: Recipe) -> dict[str, str | None] | None:
    """Identify the weights that a recipe starts from, once the model has been built and they are on this machine.

    Args:
        recipe: The run.

    Returns:
        ``name`` (``model.tag``, or the file's name), ``repository`` and ``revision`` (None if not from the Hub) and
        ``sha256`` (None if the file is not in the cache); None if training starts from scratch.
    """
    if recipe.checkpoint is not None:
        path: Path | None = Path(recipe.checkpoint)
        return {"name": Path(recipe.checkpoint).name, "repository": None, "revision": None, "sha256": _sha256(path)}
    if not recipe.pretrained:
        return None
    name = model_name(recipe)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        return {"name": name, "repository": None, "revision": None, "sha256": None}
    repository, revision = None, None
    if cfg.file:
        path = Path(cfg.file)
    else:
        repository, _, pinned = (cfg.hf_hub_id or "").partition("@")
        file = safetensors_filename(cfg.hf_hub_filename)
        path = cached_path(repository, file, revision=pinned or None) if repository else None
        # The cache keeps a file as snapshots/COMMIT/FILE.
        revision = pinned or (path.parents[file.count("/")].name if path else None)
    tag = f".{cfg.tag}" if cfg.tag else ""
    return {
        "name": f"{name.partition('.')[0]}{tag}",
        "repository": repository or None,
        "revision": revision,
        "sha256": _sha256(path),
    }


def _sha256(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
