"""Votes, over the wire and down to the disk."""

import json
import os
import signal
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import House, wait_until

QUESTION = [{"role": "user", "content": "Can you give me a tip for better sleep?"}]


async def post(house: House, path: str, body: dict[str, Any], key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key or house.key}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.post(house.url + path, json=body) as response:
        return response.status, await response.json()


async def ask(house: House, key: str | None = None) -> str:
    """A comparison's id."""
    for seed in range(20):  # now and then two answers are the same
        body = {"model": "nightshift", "messages": QUESTION, "feedback": "always", "seed": seed}
        status, answer = await post(house, "/v1/chat/completions", body, key)
        assert status == 200, answer
        if "comparison" in answer:
            comparison: str = answer["comparison"]["id"]
            return comparison
    raise AssertionError("twenty pairs of equal answers")


async def vote(house: House, comparison: str, choice: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
    return await post(house, f"/v1/comparisons/{comparison}/vote", {"choice": choice}, key)


async def test_a_vote_can_be_repeated_and_changed_and_its_history_stays(house: House) -> None:
    comparison = await ask(house)
    status, first = await vote(house, comparison, "a")
    assert status == 200
    assert first["policies"] == {"a": "policy-0000", "b": "policy-0000"}
    assert await vote(house, comparison, "a") == (200, first)
    status, changed = await vote(house, comparison, "both_bad")
    assert (status, changed["id"], changed["choice"]) == (200, first["id"], "both_bad")
    assert house.rows("SELECT choice FROM votes WHERE id = ?", first["id"]) == [("both_bad",)]
    assert house.rows("SELECT choice FROM vote_history WHERE vote_id = ?", first["id"]) == [("a",)]


async def test_someone_elses_comparison_is_unknown(house: House) -> None:
    comparison = await ask(house)
    status, answer = await vote(house, comparison, "a", key=house.new_key("user"))
    assert (status, answer["error"]["code"]) == (404, "unknown_comparison")


async def test_an_expired_comparison_is_gone(house: House) -> None:
    comparison = await ask(house)
    house.rows("UPDATE comparisons SET expires_at = '2020-01-01T00:00:00.000Z' WHERE id = ? RETURNING id", comparison)
    status, answer = await vote(house, comparison, "a")
    assert (status, answer["error"]["code"]) == (410, "comparison_expired")


async def test_a_rater_gets_what_nobody_voted_on(house: House) -> None:
    comparison = await ask(house, key=house.new_key("user"))
    rater = house.new_key("rater")
    headers = {"Authorization": f"Bearer {rater}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        for _ in range(50):
            async with http.get(f"{house.url}/v1/comparisons/next") as response:
                assert response.status == 200
                pair = await response.json()
            assert set(pair) == {"id", "messages", "answers", "expires_at"}
            status, _ = await vote(house, pair["id"], "tie", key=rater)
            assert status == 200
            if pair["id"] == comparison:
                return
    raise AssertionError("the queue never gave the pair")


async def test_an_acknowledged_vote_survives_sigkill_of_the_api(house: House) -> None:
    comparison = await ask(house)
    status, cast = await vote(house, comparison, "b")
    os.kill(house.pid_of("service.app"), signal.SIGKILL)
    assert status == 200
    assert house.rows("SELECT choice FROM votes WHERE id = ?", cast["id"]) == [("b",)]
    wait_until(house.ready, 60, "the API is back")
    assert (await vote(house, comparison, "b"))[1]["id"] == cast["id"]


@pytest.mark.parametrize("choice", ["a", "b"])
async def test_the_export_ranks_as_people_voted(house: House, choice: str) -> None:
    comparison = await ask(house)
    await vote(house, comparison, choice)
    headers = {"Authorization": f"Bearer {house.key}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.get(f"{house.url}/v1/export/preferences") as response:
            records = [json.loads(line) for line in (await response.text()).splitlines()]
    record = next(r for r in records if r["comparison"] == comparison)
    texts = house.rows(
        "SELECT first.answer, second.answer FROM comparisons JOIN completions AS first ON first.id = a"
        " JOIN completions AS second ON second.id = b WHERE comparisons.id = ?",
        comparison,
    )[0]
    assert record["prompt"] == QUESTION
    assert record["chosen"] == [{"role": "assistant", "content": texts["ab".index(choice)]}]
    assert record["rejected"] == [{"role": "assistant", "content": texts["ba".index(choice)]}]
    assert json.loads(house.cli("votes", "export").stdout.splitlines()[-1]) == records[-1]
