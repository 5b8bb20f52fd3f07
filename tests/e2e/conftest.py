"""The whole house on real vLLM, started once for all end-to-end tests by the README's own command."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.database import connect
from service.supervisor import free_port

REPOSITORY = Path(__file__).parents[2]
START_LIMIT_S = 300


@dataclass(slots=True)
class House:
    """A running `make up`."""

    process: subprocess.Popen[str]
    url: str
    key: str
    state: Path
    environment: dict[str, str]
    """Of a shell in which `nightshift` finds this house."""

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [REPOSITORY / ".venv/bin/nightshift", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def new_key(self, role: str, feedback: str = "off") -> str:
        done = self.cli("keys", "create", "--role", role, "--feedback", feedback, "--json")
        assert done.returncode == 0, done.stderr
        token: str = json.loads(done.stdout)["key"]
        return token

    def rows(self, sql: str, *parameters: object) -> list[tuple[object, ...]]:
        db = connect(self.state / "nightshift.db")
        try:
            return list(db.execute(sql, parameters).fetchall())
        finally:
            db.close()

    def pid_of(self, what: str) -> int:
        """The process of this house whose command line holds `what`."""
        pids = [pid for pid, command in descendants(self.process.pid).items() if what in command]
        assert pids, f"no {what} among {descendants(self.process.pid)}"
        return min(pids)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                return True
        except OSError:
            return False


def descendants(root: int) -> dict[int, str]:
    """The processes below `root`, with their command lines."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid: commands[pid] for pid in found - {root}}


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline or condition(), f"after {limit_s} s still not: {what}"
        time.sleep(0.2)


def never_ending(tokens: int) -> dict[str, Any]:
    """What a request says whose answer must not end before it has so many tokens."""
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(REPOSITORY / "data/starter").eos_token_id
    return {"max_tokens": tokens, "logit_bias": {str(end): -100}}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    scored = {  # once there is a reward model, which only test_scoring.py brings
        "NIGHTSHIFT_SERVING__BEST_OF_N": "4",
        "NIGHTSHIFT_SERVING__SCORE_TIMEOUT_S": "60",  # a slow machine changes no result
    }
    with running_house(tmp_path_factory.mktemp("a house"), scored) as started:  # a space in the path, on purpose
        yield started


@contextmanager
def running_house(folder: Path, settings: dict[str, str] | None = None) -> Iterator[House]:
    """`make up` on a port of its own, with its state in `folder`; `settings` by their names in the environment."""
    state, output, port = folder / "state", folder / "up.log", free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"NIGHTSHIFT_STATE": str(state), "NIGHTSHIFT_SERVER__PORT": str(port)}
    environment |= settings or {}
    for name in ("MAKEFLAGS", "MAKELEVEL", "ARGS", "OMP_NUM_THREADS"):  # this make is nobody's child
        environment.pop(name, None)
    with output.open("w") as log:
        process = subprocess.Popen(
            ["make", "up"], cwd=REPOSITORY, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
    try:
        wait_until(
            lambda: "Ctrl-C stops everything" in output.read_text() or process.poll() is not None,
            START_LIMIT_S,
            f"ready:\n{output.read_text()}",
        )
        said = output.read_text()
        assert process.poll() is None, said
        found = re.search(r"API key \(shown this once\): (\S+)", said)
        assert found, said
        environment |= {"NIGHTSHIFT_API_KEY": found[1], "NIGHTSHIFT_URL": url}
        yield House(process, url, found[1], state, environment)
    finally:
        children = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise

        def left() -> list[str]:
            return [command for pid, command in children.items() if Path(f"/proc/{pid}").exists()]

        wait_until(lambda: not left(), 60, f"nothing is left behind by Ctrl-C, but there is {left()}")
