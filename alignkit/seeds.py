"""All randomness of the project: every seed is derived from keys by one function."""

from __future__ import annotations

import hashlib


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from any keys, the same on every machine and in every process.

    Used for everything random: (run seed, prompt id, candidate index), (noise seed, prompt id, epoch), ...
    """
    text = "\x1f".join(str(key) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
