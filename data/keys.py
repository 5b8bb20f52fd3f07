"""API keys: made, shown once, kept as a hash."""

import hashlib
import hmac
import secrets

from sqlite_utils import Database

from data import audit
from data.ids import new_id
from data.types import Feedback, Key, Role, timestamp

_COLUMNS = "id, role, feedback, label, created_at, revoked_at"


class UnknownKey(LookupError):
    """No key of that id."""


def _digest(secret: str) -> bytes:
    # The secret is 256 random bits: a slow hash would protect nothing more.
    return hashlib.sha256(secret.encode()).digest()


def _key(row: tuple[str, ...]) -> Key:
    id_, role, feedback, label, created_at, revoked_at = row
    return Key(id_, Role(role), Feedback(feedback), label, created_at, revoked_at)


def create(db: Database, *, role: Role, feedback: Feedback, label: str, actor: str) -> tuple[Key, str]:
    """A new key and its token, which cannot be had again. Call inside a transaction."""
    secret = secrets.token_urlsafe(32)
    key = Key(new_id("key"), role, feedback, label, timestamp())
    db.execute(
        "INSERT INTO keys (id, hash, role, feedback, label, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (key.id, _digest(secret), role, feedback, label, key.created_at),
    )
    audit.record(db, actor=actor, action="key.create", subject=key.id)
    return key, f"ns-{key.id.removeprefix('key_')}-{secret}"


def authenticate(db: Database, token: str) -> Key | None:
    """The live key that `token` belongs to, or None."""
    prefix, _, rest = token.partition("-")
    id_, _, secret = rest.partition("-")
    row = db.execute(f"SELECT {_COLUMNS}, hash FROM keys WHERE id = ?", ("key_" + id_,)).fetchone()
    stored = row[-1] if row else bytes(32)
    matches = hmac.compare_digest(_digest(secret), stored)
    if not (matches and row and prefix == "ns" and row[5] is None):
        return None
    return _key(row[:-1])


def is_live(db: Database, id_: str) -> bool:
    """Whether there is such a key and nobody revoked it."""
    return db.execute("SELECT 1 FROM keys WHERE id = ? AND revoked_at IS NULL", (id_,)).fetchone() is not None


def list_all(db: Database) -> list[Key]:
    return [_key(row) for row in db.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY id")]


def revoke(db: Database, id_: str, *, actor: str) -> Key:
    """Call inside a transaction. Revoking twice changes nothing. Raises UnknownKey."""
    db.execute("UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (timestamp(), id_))
    if db.execute("SELECT changes()").fetchone()[0]:
        audit.record(db, actor=actor, action="key.revoke", subject=id_)
    row = db.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (id_,)).fetchone()
    if row is None:
        raise UnknownKey(id_)
    return _key(row)
