"""Sessions of the pages: an API key, given once, becomes a cookie. A session ends with its key.

Of cookies and codes the record keeps hashes alone."""

import hashlib
import secrets

from sqlite_utils import Database

from data.types import Feedback, Key, Role, timestamp

CODE_S = 3_600.0
"""Seconds in which a sign-in code can be used."""


def create(db: Database, key_id: str, *, lasts_s: float) -> str:
    """A new session of a key, and the secret for its cookie. Call inside a transaction."""
    now, secret = timestamp(), secrets.token_urlsafe(32)
    db.execute("DELETE FROM sessions WHERE expires_at <= ?", (now,))
    db.execute(
        "INSERT INTO sessions (hash, key_id, created_at, expires_at) VALUES (?, ?, ?, ?)",
        (_digest(secret), key_id, now, timestamp(plus_s=lasts_s)),
    )
    return secret


def authenticate(db: Database, secret: str) -> Key | None:
    """The live key whose session this is, or None."""
    row = db.execute(
        "SELECT id, role, feedback, label, keys.created_at FROM sessions JOIN keys ON keys.id = key_id"
        " WHERE sessions.hash = ? AND expires_at > ? AND revoked_at IS NULL",
        (_digest(secret), timestamp()),
    ).fetchone()
    return None if row is None else Key(row[0], Role(row[1]), Feedback(row[2]), row[3], row[4])


def end(db: Database, secret: str) -> None:
    """Call inside a transaction."""
    db.execute("DELETE FROM sessions WHERE hash = ?", (_digest(secret),))


def create_code(db: Database, key_id: str) -> str:
    """A code that signs in as this key, once, within CODE_S seconds. Call inside a transaction."""
    code = secrets.token_urlsafe(32)
    db.execute(
        "INSERT INTO sign_in_codes (hash, key_id, expires_at) VALUES (?, ?, ?)",
        (_digest(code), key_id, timestamp(plus_s=CODE_S)),
    )
    return code


def use_code(db: Database, code: str, *, lasts_s: float) -> str | None:
    """Spend a code: the secret of a new session, or None where it is unknown, spent, too old or its key revoked. Call
    inside a transaction."""
    now = timestamp()
    db.execute("DELETE FROM sign_in_codes WHERE expires_at <= ?", (now,))
    row = db.execute("DELETE FROM sign_in_codes WHERE hash = ? RETURNING key_id", (_digest(code),)).fetchone()
    if row is None:
        return None
    live = db.execute("SELECT 1 FROM keys WHERE id = ? AND revoked_at IS NULL", row).fetchone()
    return create(db, row[0], lasts_s=lasts_s) if live else None


def csrf_token(secret: str) -> str:
    """What a page must send along to change anything: derived from the cookie, which no script can read."""
    return hashlib.sha256(b"csrf " + secret.encode()).hexdigest()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
