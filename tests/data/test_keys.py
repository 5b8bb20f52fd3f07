import hashlib

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_utils import Database

from data import keys
from data.database import transaction
from data.settings import Settings
from data.types import Feedback, Key, Role
from tests.conftest import MakeKey


def test_a_new_key_can_be_used_and_knows_its_role_and_default(db: Database, make_key: MakeKey) -> None:
    key, token = make_key(Role.RATER, Feedback.AUTO)
    assert token.startswith("ns-")
    assert keys.authenticate(db, token) == key
    assert (key.role, key.feedback, key.revoked_at) == (Role.RATER, Feedback.AUTO, None)


def test_only_a_hash_of_a_key_is_on_disk(settings: Settings, make_key: MakeKey) -> None:
    _, token = make_key()
    secret = token.split("-", 2)[2]
    assert len(secret) >= 43  # 256 bits
    on_disk = b"".join(path.read_bytes() for path in settings.state.glob("nightshift.db*"))
    assert hashlib.sha256(secret.encode()).digest() in on_disk
    assert secret.encode() not in on_disk


def test_two_keys_never_share_a_token(make_key: MakeKey) -> None:
    made = [make_key() for _ in range(20)]
    assert len({token for _, token in made}) == len({key.id for key, _ in made}) == 20


def test_a_key_does_not_open_with_another_s_secret(db: Database, make_key: MakeKey) -> None:
    (one, first), (_, second) = make_key(), make_key()
    mixed = f"ns-{one.id.removeprefix('key_')}-{second.split('-', 2)[2]}"
    assert keys.authenticate(db, first) == one
    assert keys.authenticate(db, mixed) is None


def test_a_revoked_key_is_none_and_revoking_twice_changes_nothing(db: Database, make_key: MakeKey) -> None:
    key, token = make_key()
    with transaction(db):
        first = keys.revoke(db, key.id, actor="cli")
    with transaction(db):
        again = keys.revoke(db, key.id, actor="cli")
    assert first.revoked_at is not None
    assert again == first
    assert keys.authenticate(db, token) is None
    audited = db.execute("SELECT count(*) FROM audit WHERE action = 'key.revoke'").fetchone()
    assert audited == (1,)


def test_revoking_an_unknown_key_says_so(db: Database) -> None:
    with pytest.raises(keys.UnknownKey):
        keys.revoke(db, "key_nobody", actor="cli")


def test_every_key_that_is_made_is_audited(db: Database, make_key: MakeKey) -> None:
    key, _ = make_key()
    (last,) = db.query("SELECT actor, action, subject FROM audit ORDER BY id DESC LIMIT 1")
    assert last == {"actor": "test", "action": "key.create", "subject": key.id}


@given(token=st.binary(max_size=80).map(lambda b: b.decode("latin-1")) | st.text("ns-_0123456789ABCDEF", max_size=80))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_an_odd_token_is_none(db: Database, token: str) -> None:
    assert keys.authenticate(db, token) is None


@pytest.mark.parametrize("change", ["{}x", "x{}", "NS{}", " {}", "{} ", "{}-", "-{}"])
def test_a_token_with_a_character_too_many_is_none(db: Database, make_key: MakeKey, change: str) -> None:
    _, token = make_key()
    assert keys.authenticate(db, change.format(token)) is None


@pytest.mark.parametrize("part", [1, 2])
def test_a_token_cut_short_is_none(db: Database, make_key: MakeKey, part: int) -> None:
    _, token = make_key()
    assert keys.authenticate(db, "-".join(token.split("-", 2)[:part])) is None
    assert keys.authenticate(db, token[:-1]) is None


def test_an_unknown_key_is_compared_as_long_as_a_known_one(
    db: Database, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    key, token = make_key()
    assert keys.authenticate(db, token) == key
    keys.authenticate(db, "ns-nobody-secret")
    keys.authenticate(db, "nonsense")
    assert compared == [(32, 32)] * 3


def test_a_secret_of_zeros_opens_nothing(db: Database) -> None:
    assert keys.authenticate(db, "ns-nobody-" + "\0" * 32) is None


def test_all_keys_are_listed_the_oldest_first(db: Database, make_key: MakeKey) -> None:
    key: Key
    key, _ = make_key(Role.RATER)
    listed = keys.list_all(db)
    assert key in listed
    assert [one.id for one in listed] == sorted(one.id for one in listed)
