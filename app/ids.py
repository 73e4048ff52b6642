"""Identifiers: a prefix that names the resource, then 26 characters that sort by creation time."""

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


def new_id(prefix: str) -> str:
    """Return `<prefix>_<26 characters>`: 48 bits of milliseconds since 1970, then 80 random bits, as a ULID has."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return f"{prefix}_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
