"""What happens when parts of the house die, or cannot start."""

import os
import signal
import subprocess
import sys

import aiohttp
import pytest

from service.supervisor import free_port
from tests.e2e.conftest import REPOSITORY, House, never_ending, wait_until


async def test_an_engine_killed_mid_stream_is_an_error_and_comes_back(house: House) -> None:
    body = {
        "model": "nightshift",
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "stream": True,
        "feedback": "off",
        **never_ending(500),
    }
    headers = {"Authorization": f"Bearer {house.key}"}
    core = house.pid_of("VLLM::EngineCore")
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.post(f"{house.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            events = []
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                events.append(line)
                if len(events) == 3:
                    os.kill(core, signal.SIGKILL)
        assert b'"error"' in events[-1]
        assert b"[DONE]" not in events[-1]
        async with http.post(f"{house.url}/v1/chat/completions", json=body | {"stream": False}) as response:
            assert response.status in (502, 503)
        wait_until(lambda: not house.ready(), 30, "the loss of the engine is noticed")
        wait_until(house.ready, 240, "the engine is back")
        async with http.post(
            f"{house.url}/v1/chat/completions", json=body | {"stream": False, "max_tokens": 5}
        ) as response:
            assert response.status == 200, await response.text()
    story = '[{"role": "user", "content": "Tell me a long story."}]'
    last = "SELECT 1 FROM completions WHERE completion_tokens = 5 AND messages = ?"
    wait_until(lambda: house.rows(last, story), 10, "the last is logged")
    statuses = {row[0] for row in house.rows("SELECT status FROM completions WHERE messages = ?", story)}
    whole = house.rows("SELECT completion_tokens FROM completions WHERE messages = ? AND status = 'complete'", story)
    assert "failed" in statuses
    assert whole == [(5,)], "something was logged as complete that was not"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "already runs on"),
        (["--state", "{tmp}/other"], "cannot listen on"),
        (["--state", "{tmp}/other", "--port", "{port}", "--model", "{tmp}"], "is not a model folder"),
        (["--state", "{tmp}/other", "--port", "70000"], "server.port"),
    ],
)
def test_a_start_that_cannot_succeed_says_why(house: House, tmp_path: object, arguments: list[str], says: str) -> None:
    filled = [argument.format(tmp=tmp_path, port=free_port()) for argument in arguments]
    command = [sys.executable, "-m", "service.cli", "up", *filled]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=house.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
