"""Every command in the README is run."""

import re
import shutil
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from data import registry
from data.database import connect, transaction
from data.types import BASE_POLICY, PolicyStatus, timestamp
from tests.e2e.conftest import REPOSITORY, House

RUN_ELSEWHERE = {
    "make up": "starts the house that these tests live in",
    "make demo": "goes through what test_whole_loop.py does, in minutes more",
    "make test": "is what runs this",
}


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def candidate(house: House) -> None:
    """policy-0001, a copy of the base policy, for an operator to promote."""
    with closing(connect(house.state / "nightshift.db")) as db:
        (base,) = [policy for policy in registry.list_policies(db) if policy.name == BASE_POLICY]
        path, sha256 = registry.publish_folder(
            house.state,
            "policy-0001",
            lambda folder: shutil.copytree(house.state / base.path, folder, dirs_exist_ok=True),
        )
        copy = replace(base, name="policy-0001", parent=BASE_POLICY, path=path, sha256=sha256)
        with transaction(db):
            registry.insert(db, replace(copy, status=PolicyStatus.CANDIDATE, created_at=timestamp()))


def test_every_command_in_the_readme_works(house: House, candidate: None, tmp_path: Path) -> None:
    commands = []
    for block in shell_blocks():
        for line in block.replace("\\\n", " ").splitlines():
            if line in RUN_ELSEWHERE or line.startswith(("export NIGHTSHIFT_URL=", "python -m bench.")):
                continue  # the house's own address and key are in the environment; tests/bench runs the benchmarks
            for path in (".venv/", "data/starter/"):
                line = line.replace(f" {path}", f" '{REPOSITORY}'/{path}")
            commands.append(line)
    script = "set -euo pipefail\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=house.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert '"policies":{"a":"policy-0000","b":"policy-0000"}' in done.stdout
    assert '"prompt"' in (tmp_path / "votes.jsonl").read_text()
    assert house.rows("SELECT name, status FROM policies ORDER BY name") == [
        (BASE_POLICY, "serving"),
        ("policy-0001", "rolled_back"),
    ]
