"""Every command in the README is run."""

import re
import subprocess
from pathlib import Path

from tests.e2e.conftest import REPOSITORY, House

RUN_ELSEWHERE = {
    "make up": "starts the house that these tests live in",
    "make test": "is what runs this",
}


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_every_command_in_the_readme_works(house: House, tmp_path: Path) -> None:
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
