"""Read ``config.json`` of ``hf-hub:`` names with the same retries, checks and fallback to the cache as weights.

timm reads it before it knows the architecture, with a single request. Its reader stays in use; only if that request
fails is the file fetched by `ubn_zoo.hub.fetch`, and parsed by timm all the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import _factory, _hub

from ubn_zoo.hub.fetch import fetch
from ubn_zoo.hub.retry import HTTPError, describe_failure

__all__ = ["install"]

# What timm's users catch; repeating the request would not help. LocalEntryNotFoundError also derives from one of these.
_PERMANENT = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)

_logger = logging.getLogger(__name__)


def _with_retries(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def load_model_config_from_hf(model_id: str, cache_dir: str | Path | None = None) -> Any:
        try:
            return read(model_id, cache_dir=cache_dir)
        except (HTTPError, OSError) as error:
            if isinstance(error, _PERMANENT) and not isinstance(error, LocalEntryNotFoundError):
                raise
            _logger.info("%s: config.json: %s; fetching it with retries", model_id, describe_failure(error))
        repo_id, revision = _hub.hf_split(model_id)
        path = fetch(repo_id, "config.json", revision=revision, cache_dir=cache_dir)
        config = _hub.load_cfg_from_json(path)
        return _hub._parse_model_cfg(config, {"hf_hub_id": model_id, "source": "hf-hub"})

    return load_model_config_from_hf


def install() -> None:
    """Let ``timm.create_model("hf-hub:...")`` read configurations with retries; a second call changes nothing."""
    read = _factory.load_model_config_from_hf
    if not hasattr(read, "__wrapped__"):
        _factory.load_model_config_from_hf = _with_retries(read)
