"""Seeds of runs, epochs, ranks and images."""

from __future__ import annotations

import random

import numpy
import torch

__all__ = ["mixed_seed", "seed_everything"]


def mixed_seed(*parts: int) -> int:
    """Combine numbers (of a run, epoch, rank, image) into one 64-bit seed, different for every combination."""
    return int(numpy.random.SeedSequence(parts).generate_state(1, numpy.uint64)[0])


def seed_everything(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and torch on all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
