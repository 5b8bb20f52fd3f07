"""What the container's own health check finds, and what a GPU machine's compose file adds."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import FakeEngine, House, OpenHouse

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def health_check() -> list[str]:
    """The command of the Dockerfile's HEALTHCHECK, with this Python."""
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    python, *arguments = json.loads(found[1])
    assert python == "python"
    return [sys.executable, *arguments]


async def is_healthy(health_check: list[str], house: House, host: str) -> bool:
    port = house.url.rpartition(":")[2]
    environment = os.environ | {"NIGHTSHIFT_SERVER__HOST": host, "NIGHTSHIFT_SERVER__PORT": port}
    done = await asyncio.to_thread(
        subprocess.run, health_check, cwd=REPOSITORY, env=environment, capture_output=True, check=False
    )
    return done.returncode == 0


async def test_a_container_is_healthy_once_the_service_is_ready_whatever_its_port(
    open_house: OpenHouse, engine: FakeEngine, health_check: list[str]
) -> None:
    ready = await open_house(engine)
    starting = await open_house(ready=False)
    assert await is_healthy(health_check, ready, "0.0.0.0")
    assert not await is_healthy(health_check, starting, "0.0.0.0")


def service(file: str) -> dict[str, Any]:
    services = yaml.safe_load((REPOSITORY / file).read_text())["services"]
    assert list(services) == ["nightshift"]
    found: dict[str, Any] = services["nightshift"]
    return found


def test_only_the_gpu_s_compose_file_asks_for_a_gpu_and_it_installs_for_one_too() -> None:
    plain, gpu = service("compose.yaml"), service("compose.gpu.yaml")
    assert "deploy" not in plain
    assert plain["build"]["args"]["EXTRA"] == "cpu"
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["build"]["args"]["EXTRA"] == "gpu"
    assert "-f compose.gpu.yaml" in (REPOSITORY / "compose.yaml").read_text()
