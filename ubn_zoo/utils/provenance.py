"""Provenance of a result: commit and hardware."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

__all__ = ["device_name", "source_commit"]


def source_commit() -> str | None:
    """Commit of the project's working tree that contains this package, followed by ``+`` if files have changed.

    None if the package does not run from a working tree.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(  # the user controls which git is on PATH
                ["git", "-C", str(root), *arguments],  # noqa: S607
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    commit = git("rev-parse", "--verify", "--quiet", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "ubn_zoo", "scripts")
    return f"{commit}+" if commit and changed else commit or None


def device_name(device: torch.device) -> str:
    """``cpu``, or the accelerator's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
