"""Sessions, the pages' files, conversations and Markdown, over the wire."""

import re
from typing import Any

import pytest
from sqlite_utils import Database

from data import keys, sessions
from data.database import transaction
from data.types import Role
from service.auth import COOKIE
from service.cli import _say_ready, _sign_in_code
from service.web import PAGES
from tests.conftest import Answer, House, MakeKey

TALK = {
    "title": "Cats",
    "messages": [
        {"role": "user", "content": "Tell me of cats"},
        {
            "role": "assistant",
            "content": "They sleep.",
            "policy": "policy-0000",
            "stopped": False,
            "cut": True,
            "pair": None,
        },
    ],
}


@pytest.fixture
def cookie(house: House, db: Database) -> dict[str, str]:
    """The headers of a page whose user is signed in."""
    with transaction(db):
        secret = sessions.create(db, house.keys[Role.USER].id, lasts_s=60.0)
    return {
        "Cookie": f"{COOKIE}={secret}",
        "Sec-Fetch-Site": "same-origin",
        "X-CSRF-Token": sessions.csrf_token(secret),
    }


async def call(house: House, method: str, path: str, headers: dict[str, str], **more: Any) -> Answer:
    return await house.call(method, path, role=None, headers=headers, **more)


# Sessions


async def test_a_key_becomes_a_cookie_that_no_script_reads_and_no_other_site_sends(house: House) -> None:
    answer = await house.call("POST", "/sign-in", role=None, json={"key": house.tokens[Role.USER]})
    assert answer.status == 204
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    headers = {"Cookie": cookie.split(";")[0]}
    session = (await call(house, "GET", "/v1/session", headers)).json
    assert (session["key"], session["role"]) == (house.keys[Role.USER].id, "user")
    chat = {"model": "nightshift", "messages": [{"role": "user", "content": "Hello"}]}
    headers["X-CSRF-Token"] = session["csrf"]
    assert (await call(house, "POST", "/v1/chat/completions", headers, json=chat)).status == 200


async def test_behind_https_the_cookie_stays_there(house: House) -> None:
    headers = {"X-Forwarded-Proto": "https"}
    answer = await call(house, "POST", "/sign-in", headers, json={"key": house.tokens[Role.USER]})
    assert "Secure" in answer.headers["Set-Cookie"]


async def test_the_record_holds_neither_the_cookie_nor_the_code(house: House, db: Database) -> None:
    with transaction(db):
        code = sessions.create_code(db, house.keys[Role.USER].id)
        other = sessions.create_code(db, house.keys[Role.USER].id)
    answer = await house.call("POST", "/sign-in", role=None, json={"code": code})
    secret = answer.headers["Set-Cookie"].split(";")[0].partition("=")[2]
    kept = str(db.execute("SELECT * FROM sessions").fetchall() + db.execute("SELECT * FROM sign_in_codes").fetchall())
    for word in (secret, code, other):
        assert word not in kept


async def test_the_link_that_up_prints_signs_in(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    token = house.tokens[Role.OPERATOR]
    link = f"{house.url}/sign-in#{_sign_in_code(house.settings, token)}"
    _say_ready(house.url, token, link, "nightshift", json=False)
    found = re.search(r"browser .*: (\S+)/sign-in#(\S+)", capsys.readouterr().out)
    assert found
    assert token not in link
    assert (await house.call("POST", "/sign-in", role=None, json={"code": found[2]})).status == 204


@pytest.mark.parametrize(("was", "stays"), [(Role.OPERATOR, True), (Role.USER, False)])
async def test_who_comes_by_a_link_and_is_signed_in_with_as_much_of_a_role_stays_so(
    house: House, db: Database, make_key: MakeKey, was: Role, stays: bool
) -> None:
    new, _ = make_key(Role.OPERATOR)
    with transaction(db):
        before = sessions.create(db, house.keys[was].id, lasts_s=60.0)
        code = sessions.create_code(db, new.id)
    answer = await call(house, "POST", "/sign-in", {"Cookie": f"{COOKIE}={before}"}, json={"code": code})
    assert answer.status == 204
    session = await call(house, "GET", "/v1/session", {"Cookie": answer.headers["Set-Cookie"].split(";")[0]})
    assert session.json["key"] == (house.keys[was].id if stays else new.id)
    assert db["sessions"].count == 1
    again = await house.call("POST", "/sign-in", role=None, json={"code": code})
    assert again.status == 401


@pytest.mark.parametrize("body", [{"key": "ns-x-y"}, {"key": ""}, {"code": "x"}])
async def test_what_is_no_key_and_no_code_is_401(house: House, body: dict[str, str]) -> None:
    answer = await house.call("POST", "/sign-in", role=None, json=body)
    assert answer.status == 401
    assert "Set-Cookie" not in answer.headers


async def test_a_code_works_once_in_its_hour_and_not_for_a_revoked_key(
    house: House, db: Database, make_key: MakeKey
) -> None:
    key, _ = make_key()
    with transaction(db):
        codes = [sessions.create_code(db, key.id) for _ in range(3)]
    assert (await house.call("POST", "/sign-in", role=None, json={"code": codes[0]})).status == 204
    assert (await house.call("POST", "/sign-in", role=None, json={"code": codes[0]})).status == 401
    with transaction(db):
        db.execute("UPDATE sign_in_codes SET expires_at = '2020' WHERE hash = ?", (sessions._digest(codes[1]),))
    assert (await house.call("POST", "/sign-in", role=None, json={"code": codes[1]})).status == 401
    with transaction(db):
        keys.revoke(db, key.id, actor="test")
    assert (await house.call("POST", "/sign-in", role=None, json={"code": codes[2]})).status == 401


async def test_a_session_ends_with_its_key_its_time_or_by_signing_out(
    house: House, db: Database, cookie: dict[str, str], make_key: MakeKey
) -> None:
    key, _ = make_key()
    with transaction(db):
        of_revoked = sessions.create(db, key.id, lasts_s=60.0)
        too_old = sessions.create(db, house.keys[Role.USER].id, lasts_s=0.0)
        keys.revoke(db, key.id, actor="test")
    for secret in (of_revoked, too_old, "nonsense"):
        answer = await call(house, "GET", "/v1/session", {"Cookie": f"{COOKIE}={secret}"})
        assert (answer.status, answer.json["error"]["code"]) == (401, "session_over")
    assert (await call(house, "GET", "/v1/session", cookie)).status == 200
    assert (await call(house, "DELETE", "/v1/session", cookie)).status == 204
    assert (await call(house, "GET", "/v1/session", cookie)).status == 401


async def test_what_another_site_makes_a_browser_send_is_refused(house: House, cookie: dict[str, str]) -> None:
    own = house.url.removeprefix("http://")
    refused = [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": None, "Origin": "http://evil.example"},
        {"Sec-Fetch-Site": None, "Origin": "null"},
        {"Sec-Fetch-Site": None, "Origin": "http://["},
        {"X-CSRF-Token": "0" * 64},
        {"X-CSRF-Token": None},
        {"X-CSRF-Token": "é"},
    ]
    for change in refused:
        headers = {name: value for name, value in (cookie | change).items() if value is not None}
        answer = await call(house, "POST", "/v1/conversations", headers, json=TALK)
        assert answer.status == 403, change
    assert (await call(house, "GET", "/v1/session", cookie | {"Sec-Fetch-Site": "cross-site"})).status == 403
    assert await house.rows("conversations") == []
    plain = {name: value for name, value in cookie.items() if name != "Sec-Fetch-Site"}
    for more in ({}, {"Origin": f"http://{own}"}):
        assert (await call(house, "POST", "/v1/conversations", plain | more, json=TALK)).status == 201


async def test_another_site_cannot_sign_anybody_in(house: House) -> None:
    body = {"key": house.tokens[Role.USER]}
    answer = await call(house, "POST", "/sign-in", {"Sec-Fetch-Site": "cross-site"}, json=body)
    assert answer.status == 403


async def test_a_key_in_the_header_counts_before_a_cookie(house: House, cookie: dict[str, str]) -> None:
    headers = {"Cookie": cookie["Cookie"]} | house.headers(Role.OPERATOR)
    assert (await call(house, "GET", "/v1/session", headers)).json["role"] == "operator"
    assert (await call(house, "POST", "/v1/conversations", headers, json=TALK)).status == 201
    headers = cookie | {"Authorization": "Bearer wrong"}
    assert (await call(house, "GET", "/v1/session", headers)).status == 401


async def test_what_a_proxy_in_front_asks_for_displaces_no_cookie(house: House, cookie: dict[str, str]) -> None:
    basic = {"Authorization": "Basic c29tZWJvZHk6c2VjcmV0"}
    answer = await call(house, "GET", "/v1/session", cookie | basic)
    assert (answer.status, answer.json["role"]) == (200, "user")
    assert (await call(house, "POST", "/v1/conversations", cookie | basic, json=TALK)).status == 201
    for headers in (cookie | basic, cookie):
        answer = await call(house, "POST", "/v1/conversations", headers | {"X-CSRF-Token": ""}, json=TALK)
        assert (answer.status, answer.json["error"]["code"]) == (403, "bad_csrf_token")
    answer = await call(house, "GET", "/v1/session", basic)
    assert (answer.status, answer.json["error"]["code"]) == (401, "missing_api_key")


# Pages and files


async def test_pages_are_the_door_to_those_who_are_not_signed_in(house: House, cookie: dict[str, str]) -> None:
    for path in ("/", "/rate"):
        assert b"<title>Sign in" in (await house.call("GET", path, role=None)).body
        assert b"<title>Sign in" not in (await call(house, "GET", path, cookie)).body


async def test_every_page_and_file_forbids_other_hosts_and_inline_scripts(house: House) -> None:
    paths = ["/", "/rate", "/sign-in", *(f"/static/{path.name}" for path in (PAGES / "static").iterdir())]
    for path in paths:
        headers = (await house.call("GET", path, role=None)).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';"), path
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


async def test_a_page_that_is_known_is_not_sent_again(house: House) -> None:
    first = await house.call("GET", "/static/style.css", role=None)
    again = await call(house, "GET", "/static/style.css", {"If-None-Match": first.headers["Etag"]})
    assert (again.status, again.body) == (304, b"")


def test_no_page_names_another_host() -> None:
    for path in PAGES.rglob("*"):
        if path.is_file():
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in text, path
            assert "https:" not in text, path


# Conversations


async def test_a_conversation_is_kept_changed_and_deleted(house: House) -> None:
    created = await house.call("POST", "/v1/conversations", json=TALK)
    assert created.status == 201
    path = f"/v1/conversations/{created.json['id']}"
    kept = (await house.call("GET", path)).json
    assert kept["title"] == "Cats"
    assert kept["messages"][0] == TALK["messages"][0] | {"policy": None, "stopped": False, "cut": False, "pair": None}  # type: ignore[operator]
    assert kept["messages"][1] == TALK["messages"][1]
    assert (await house.call("PUT", path, json=TALK | {"title": "Dogs"})).status == 200
    listed = (await house.call("GET", "/v1/conversations")).json["data"]
    assert [(row["id"], row["title"]) for row in listed] == [(created.json["id"], "Dogs")]
    assert (await house.call("DELETE", path)).status == 204
    for method in ("GET", "PUT", "DELETE"):
        answer = await house.call(method, path, json=TALK)
        assert (answer.status, answer.json["error"]["code"]) == (404, "unknown_conversation")


async def test_another_key_s_conversation_does_not_exist(house: House) -> None:
    created = await house.call("POST", "/v1/conversations", json=TALK)
    path = f"/v1/conversations/{created.json['id']}"
    for method in ("GET", "PUT", "DELETE"):
        assert (await house.call(method, path, role=Role.OPERATOR, json=TALK)).status == 404
    assert (await house.call("GET", "/v1/conversations", role=Role.OPERATOR)).json["data"] == []
    assert (await house.call("GET", path)).json["title"] == "Cats"


async def test_what_is_forgotten_of_a_user_includes_the_conversations(house: House) -> None:
    await house.call("POST", "/v1/conversations", json=TALK)
    await house.call("POST", "/v1/conversations", role=Role.RATER, json=TALK)
    user = house.keys[Role.USER].id
    answer = await house.call("DELETE", f"/v1/users/{user}", role=Role.OPERATOR)
    assert (answer.status, answer.json["emptied"]) == (200, 1)
    assert [row["key_id"] for row in await house.rows("conversations")] == [house.keys[Role.RATER].id]
    body = (house.settings.database).read_bytes()
    assert body.count(b"They sleep.") == 1


@pytest.mark.parametrize(
    "change", [{"messages": [{"role": "system", "content": "x"}]}, {"title": "x" * 201}, {"more": 1}, {"messages": 1}]
)
async def test_what_the_page_would_not_send_is_400(house: House, change: dict[str, Any]) -> None:
    assert (await house.call("POST", "/v1/conversations", json=TALK | change)).status == 400


HALF = "\ud83d"  # of an emoji, as a script cuts it
PAIR = {
    **{"id": "cmp_1", "expires_at": "2026-07-01T00:00:00Z", "answers": ["one", "two"]},
    **{"choice": "a", "policies": {"a": "policy-0000", "b": "policy-0001"}, "voted_at": None},
}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": HALF},
        {"role": "assistant", "content": "x", "policy": HALF},
        {"role": "assistant", "content": "x", "pair": PAIR | {"answers": ["one", HALF]}},
        {"role": "assistant", "content": "x", "pair": PAIR | {"policies": {"a": "policy-0000", "b": HALF}}},
        *(
            {"role": "assistant", "content": "x", "pair": PAIR | {name: HALF}}
            for name in ("id", "expires_at", "voted_at")
        ),
    ],
)
async def test_half_a_surrogate_in_a_conversation_is_400(house: House, turn: dict[str, Any]) -> None:
    path = f"/v1/conversations/{(await house.call('POST', '/v1/conversations', json=TALK)).json['id']}"
    before = (await house.call("GET", path)).json["messages"]
    answer = await house.call("PUT", path, json=TALK | {"messages": [turn]})
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_value")
    assert answer.json["error"]["param"].startswith("messages.0")
    assert (await house.call("GET", path)).json["messages"] == before


async def test_half_a_surrogate_in_markdown_is_400(house: House) -> None:
    answer = await house.call("POST", "/v1/markdown", json={"texts": ["whole", HALF]})
    assert (answer.status, answer.json["error"]["param"]) == (400, "texts.1")
    assert (await house.call("POST", "/v1/markdown", json={"texts": ["\U0001f600"]})).json == {
        "html": ["<p>\U0001f600</p>\n"]
    }


async def test_so_much_markdown_is_rendered_at_a_time(house: House) -> None:
    answer = await house.call("POST", "/v1/markdown", json={"texts": ["a" * 150_000, "b" * 50_001]})
    assert answer.status == 400
    assert "200,000 are rendered at a time" in answer.json["error"]["message"]
    assert (await house.call("POST", "/v1/markdown", json={"texts": ["a" * 150_000, "b" * 50_000]})).status == 200


# What the desk counts


async def test_votes_of_today_are_counted(house: House) -> None:
    path = "/v1/votes/count?since=2020-01-01T00:00:00Z"
    assert (await house.call("GET", path, role=Role.RATER)).json == {"count": 0}
    assert (await house.call("GET", path)).status == 403
    assert (await house.call("GET", "/v1/votes/count?since=yesterday", role=Role.RATER)).status == 400
    for end in ("0001-01-01T00:00:00%2B23:59", "9999-12-31T23:59:59-23:59"):
        answer = await house.call("GET", f"/v1/votes/count?since={end}", role=Role.RATER)
        assert (answer.status, answer.json) == (200, {"count": 0})
