"""Seeds of what a federated run draws, each from the run's own and what it is for, so that none depends on order."""

import hashlib
import random

import torch


def seed_of(seed: int, *parts) -> int:
    """Return a seed in [0, 2^31) for the purpose that `parts` name: whole numbers and texts."""
    # repr keeps ("a", "bc") and ("ab", "c") apart, and 1 and "1"
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4]) >> 1


def rng(seed: int, *parts) -> random.Random:
    """Return Python's generator for a purpose, whose numbers no version changes."""
    return random.Random(seed_of(seed, *parts))


def generator(seed: int, *parts) -> torch.Generator:
    """Return torch's generator on the CPU for a purpose."""
    return torch.Generator().manual_seed(seed_of(seed, *parts))
