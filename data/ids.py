"""Identifiers: a prefix that says what it names, then 48 bits of time and 80 of chance (a ULID)."""

import secrets
import time
from datetime import datetime

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str) -> str:
    """`prefix_` and 26 characters that sort by the millisecond they were made in."""
    return f"{prefix}_{_encode((time.time_ns() // 1_000_000) << 80 | secrets.randbits(80))}"


def first_id(prefix: str, at: datetime) -> str:
    """The least of all ids made in the millisecond of `at` and later."""
    return f"{prefix}_{_encode(round(at.timestamp() * 1000) << 80)}"


def _encode(value: int) -> str:
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))
