"""A night on the whole house: people chat and vote, `nightshift train` learns from it, and chat goes on."""

import asyncio
import json

import aiohttp
import pytest

from tests.e2e.conftest import REPOSITORY, House
from trainer import dialogues

VOTES = 100


async def chat_and_vote(house: House) -> None:
    """Many people's first words, each answered twice; the shorter answer gets the vote."""
    places = asyncio.Semaphore(8)
    headers = {"Authorization": f"Bearer {house.key}"}
    async with aiohttp.ClientSession(headers=headers) as http:

        async def one(number: int, messages: list[dict[str, str]]) -> None:
            body = {"model": "nightshift", "messages": messages, "feedback": "always", "user": f"somebody {number}"}
            async with places:
                async with http.post(f"{house.url}/v1/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    answer = await response.json()
                if "comparison" not in answer:  # now and then two answers are the same
                    return
                first, second = (len(choice["message"]["content"]) for choice in answer["choices"])
                choice = "tie" if first == second else "a" if first < second else "b"
                url = f"{house.url}/v1/comparisons/{answer['comparison']['id']}/vote"
                async with http.post(url, json={"choice": choice}) as response:
                    assert response.status == 200, await response.text()

        asked = dialogues.prompts(VOTES, seed=1, held_out=True)
        await asyncio.gather(*(one(number, list(prompt.messages)) for number, prompt in enumerate(asked)))


async def say_hello(house: House) -> str:
    """The policy that answered."""
    body = {"model": "nightshift", "messages": [{"role": "user", "content": "Hello!"}], "feedback": "off"}
    headers = {"Authorization": f"Bearer {house.key}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.post(f"{house.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            fingerprint: str = (await response.json())["system_fingerprint"]
            return fingerprint


@pytest.mark.timeout(900)
async def test_votes_become_a_candidate_while_people_chat(house: House) -> None:
    await chat_and_vote(house)
    quick = {
        "NIGHTSHIFT_TRAINING__THREADS": "1",  # on two cores, two threads beside the engine's are slower than one
        "NIGHTSHIFT_TRAINING__MIN_VOTES": "20",
        "NIGHTSHIFT_TRAINING__PPO": '{"steps": 2, "rollouts": 32}',
        "NIGHTSHIFT_TRAINING__MAX_ANSWER_TOKENS": "64",
    }
    process = await asyncio.create_subprocess_exec(
        REPOSITORY / ".venv/bin/nightshift", "train", "--json", "--seed", "1", env=house.environment | quick,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    ended = asyncio.create_task(process.communicate())
    answered = 0
    while not ended.done():
        assert await say_hello(house) == "policy-0000"
        answered += 1
        await asyncio.sleep(0.5)
    output, progress = await ended
    assert process.returncode == 0, progress.decode()
    run = json.loads(output.splitlines()[-1])
    assert (run["status"], run["config"]) == ("succeeded", {"seed": 1})
    assert answered > 0
    rows = house.rows("SELECT status, parent, run_id FROM policies WHERE name = ?", run["policy"])
    assert rows == [(run["policy_status"], "policy-0000", run["id"])]
    assert house.rows("SELECT name FROM policies WHERE status = 'serving'") == [("policy-0000",)]
    assert house.rows("SELECT count(*) > 50 FROM run_votes WHERE run_id = ?", run["id"]) == [(1,)]
    assert house.rows("SELECT count(*) FROM run_metrics WHERE run_id = ? AND name = 'ppo/score'", run["id"]) == [(2,)]
    assert await say_hello(house) == "policy-0000"
