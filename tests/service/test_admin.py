"""What operators do over the wire."""

import json

import pytest
from sqlite_utils import Database

from data.types import Feedback, Role
from tests.conftest import AddPair, FakeEngine, House, MakeKey, say


async def test_an_operator_makes_a_key_that_works_and_is_shown_once(house: House) -> None:
    body = {"role": "rater", "feedback": "auto", "label": "Ada's"}
    made = await house.call("POST", "/v1/keys", role=Role.OPERATOR, json=body)
    assert made.status == 201
    key = made.json
    token = key.pop("key")
    assert key.keys() == {"id", "role", "feedback", "label", "created_at", "revoked_at"}
    assert {name: key[name] for name in body} == body
    assert (await house.call("GET", "/v1/models", token=token)).status == 200
    assert (await house.call("GET", "/v1/comparisons/next", token=token)).status == 204
    listed = await house.call("GET", "/v1/keys", role=Role.OPERATOR)
    assert key in listed.json["data"]
    assert token.encode() not in listed.body
    assert token.split("-", 2)[2].encode() not in listed.body


async def test_a_new_key_never_asks_unless_told_to(house: House) -> None:
    made = await house.call("POST", "/v1/keys", role=Role.OPERATOR, json={"role": "user"})
    assert (made.json["feedback"], made.json["label"], made.json["revoked_at"]) == ("off", "", None)


async def test_a_revoked_key_stays_in_the_list_with_its_end(house: House, make_key: MakeKey) -> None:
    key, token = make_key()
    revoked = await house.call("DELETE", f"/v1/keys/{key.id}", role=Role.OPERATOR)
    assert revoked.status == 200
    assert revoked.json["revoked_at"] is not None
    assert revoked.json in (await house.call("GET", "/v1/keys", role=Role.OPERATOR)).json["data"]
    assert (await house.call("GET", "/v1/models", token=token)).status == 401


async def test_acts_of_operators_are_audited_under_their_key(house: House) -> None:
    made = await house.call("POST", "/v1/keys", role=Role.OPERATOR, json={"role": "user"})
    await house.call("DELETE", f"/v1/keys/{made.json['id']}", role=Role.OPERATOR)
    rows = await house.rows("audit")
    operator, key = house.keys[Role.OPERATOR].id, made.json["id"]
    acts = [(row["actor"], row["action"], row["subject"]) for row in rows]
    assert acts[-2:] == [(operator, "key.create", key), (operator, "key.revoke", key)]


async def test_stats_count_what_happened(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(str(body.get("seed")))
    comparison = (await house.chat(feedback="always")).json["comparison"]["id"]
    await house.vote(comparison, "b")
    await house.chat()
    await house.rows("completions")
    assert (await house.call("GET", "/v1/stats", role=Role.OPERATOR)).json == {
        "serving": "policy-0000",
        "completions": {"complete": 3},
        "comparisons": {"same_policy": 1},
        "votes": {"b": 1},
        "first_share": 0.0,
    }


async def test_the_export_is_a_line_of_json_a_vote(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("Grüße ", str(body.get("seed")))
    votes = []
    for choice in ("a", "b", "tie"):
        comparison = (await house.chat(feedback="always")).json["comparison"]["id"]
        votes.append((await house.vote(comparison, choice)).json["id"])
    answer = await house.call("GET", "/v1/export/preferences", role=Role.OPERATOR)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("application/jsonl")
    records = [json.loads(line) for line in answer.body.decode().splitlines()]
    assert sorted(record["vote"] for record in records) == sorted(votes)
    for record in records:
        assert record["prompt"] == [{"role": "user", "content": "Hello"}]
        assert record["chosen"][0]["content"].startswith("Grüße ")
        assert record["chosen"] != record["rejected"]


async def test_an_empty_export_is_an_empty_body(house: House) -> None:
    answer = await house.call("GET", "/v1/export/preferences", role=Role.OPERATOR)
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("end_user", ["", "/ada", "/ada/at/home"])
async def test_a_user_is_forgotten_over_the_wire(
    house: House, db: Database, add_pair: AddPair, make_key: MakeKey, end_user: str
) -> None:
    key_id = make_key()[0].id
    add_pair(key_id, user=f"{key_id}{end_user}")
    answer = await house.call("DELETE", f"/v1/users/{key_id}{end_user}", role=Role.OPERATOR)
    assert answer.status == 200
    assert answer.json == {"id": f"{key_id}{end_user}", "emptied": 2}
    assert db.execute("SELECT DISTINCT answer, messages FROM completions").fetchall() == [("", "[]")]
    again = await house.call("DELETE", f"/v1/users/{key_id}{end_user}", role=Role.OPERATOR)
    assert again.status == 404


async def test_what_was_forgotten_over_the_wire_is_in_no_file_of_the_record(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("SECRET answer")
    await house.chat(messages=[{"role": "user", "content": "SECRET question"}])
    await house.rows("completions")
    files = [path for path in house.settings.state.glob("nightshift.db*") if path.suffix != ".db-shm"]
    assert any(b"SECRET" in path.read_bytes() for path in files)
    key_id = house.keys[Role.USER].id
    assert (await house.call("DELETE", f"/v1/users/{key_id}", role=Role.OPERATOR)).status == 200
    assert not any(b"SECRET" in path.read_bytes() for path in files)


async def test_a_key_made_over_the_wire_keeps_its_default(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(str(body.get("seed")))
    body = {"role": "user", "feedback": Feedback.ALWAYS}
    token = (await house.call("POST", "/v1/keys", role=Role.OPERATOR, json=body)).json["key"]
    assert "comparison" in (await house.chat(token=token)).json
