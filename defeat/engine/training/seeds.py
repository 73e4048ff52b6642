"""Seeds by purpose: every random choice of a run follows from the job's seed and its purpose.

Reseeding before each optimiser step makes a step a function of (seed, weights, optimiser, batch): a run that is resumed
after any step repeats the next one exactly, without a saved generator state.
"""

import hashlib

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for a purpose such as `("student", "step", 3)`."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reseed(seed: int, *purpose: str | int) -> None:
    """Seed torch's global generators on all devices for a purpose, see `seed_for`."""
    torch.manual_seed(seed_for(seed, *purpose))
