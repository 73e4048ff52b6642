"""Seeds by purpose: every random choice of a run follows from the job's seed and what it is for.

Reseeding at the start of each epoch makes an epoch a function of (seed, weights, optimiser): a run that is resumed
at an epoch's start repeats it exactly, with no generator's state to be saved.
"""

import hashlib

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for a purpose such as `("student", "epoch", 3)`."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reseed(seed: int, *purpose: str | int) -> None:
    """Seed torch's global generators, on every device, for a purpose."""
    torch.manual_seed(seed_for(seed, *purpose))
