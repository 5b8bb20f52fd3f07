"""The supervisor with small children of its own: what dies comes back, what stops leaves nothing."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlite_utils import Database

from data import database, leases
from data.database import connect, transaction
from data.settings import EngineSettings, Settings, load_settings
from service import supervisor
from service.supervisor import Child, StartError
from tests.conftest import FakeEngine


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_BACKOFF_S", 0.02)


def child_running(script: str, folder: Path, stop_s: float = 5.0) -> Child:
    return Child("child", [sys.executable, "-c", script], {"FOLDER": str(folder)}, folder / "child.log", stop_s)


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline or condition()
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    child = child_running("import sys; print('here'); sys.exit(3)", tmp_path)
    child.watcher = asyncio.create_task(child.watch())
    await until(lambda: child.starts >= 3)
    await child.stop()
    assert child.log.read_text().count("here") >= 2
    starts = child.starts
    await asyncio.sleep(0.1)
    assert child.starts == starts, "a stopped child was started again"


async def test_a_child_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    child = child_running("import sys; print('here'); sys.exit(3)", tmp_path)
    child.log.mkdir()  # nothing can be written there
    child.watcher = asyncio.create_task(child.watch())
    await until(lambda: child.starts >= 2)
    child.log.rmdir()
    await until(lambda: child.log.exists() and "here" in child.log.read_text())
    assert not child.watcher.done()
    await child.stop()


async def test_stopping_ends_the_grandchildren_too(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, subprocess, sys, time\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(os.environ['FOLDER'], 'pid').write_text(str(grandchild.pid))\n"
        "time.sleep(600)\n"
    )
    child = child_running(script, tmp_path)
    child.watcher = asyncio.create_task(child.watch())
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    grandchild = int((tmp_path / "pid").read_text())
    await child.stop()
    await until(lambda: not alive(grandchild))
    assert child.process is not None
    assert not alive(child.process.pid)


async def test_a_child_that_ignores_the_request_to_stop_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(os.environ['FOLDER'], 'deaf').touch()\n"
        "time.sleep(600)\n"
    )
    child = child_running(script, tmp_path, stop_s=0.1)
    child.watcher = asyncio.create_task(child.watch())
    await until((tmp_path / "deaf").exists)
    await child.stop()
    assert child.process is not None
    assert child.process.returncode == -signal.SIGKILL


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys, pathlib\n"
        "from service.supervisor import Child\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "async def main():\n"
        "    child = Child('c', [sys.executable, '-c', 'import time; time.sleep(600)'], {}, folder / 'log', 5.0)\n"
        "    asyncio.create_task(child.watch())\n"
        "    while child.process is None:\n"
        "        await asyncio.sleep(0.01)\n"
        "    (folder / 'part').write_text(str(child.process.pid))\n"
        "    (folder / 'part').rename(folder / 'pid')\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        asyncio.run(until((tmp_path / "pid").exists))
    finally:
        process.kill()
        process.wait()
    asyncio.run(until(lambda: not alive(int((tmp_path / "pid").read_text()))))


async def test_an_engine_that_never_comes_up_ends_the_start_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model")
    settings = Settings(state=tmp_path / "state", model=str(model))
    settings.server.port = supervisor.free_port()
    broken = [sys.executable, "-c", "raise SystemExit('no kernel for this processor')"]
    monkeypatch.setattr(supervisor, "engine_command", lambda *_: broken)
    monkeypatch.setenv("NIGHTSHIFT_STATE", str(settings.state))
    monkeypatch.setenv("NIGHTSHIFT_SERVER__PORT", str(settings.server.port))
    with pytest.raises(StartError, match="no kernel for this processor"):
        await supervisor.up(settings, make_key=True, waiting=lambda _: None, ready=lambda *_: None)
    with supervisor._only_one(settings.state):
        pass  # the lock is free again


async def test_a_scorer_that_does_not_come_up_keeps_nobody_from_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = child_running("raise SystemExit(3)", tmp_path)
    scorer.name = "scorer"
    scorer.starts = supervisor.ENGINE_STARTS + 1
    answers = iter(["the engine starts", None])
    monkeypatch.setattr(supervisor, "_problem", lambda url: next(answers))
    waited: list[str] = []
    await supervisor._until_ready(Settings(state=tmp_path), [scorer], waited.append)
    assert waited == ["the engine starts"]


async def test_an_engine_that_is_deaf_while_it_starts_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_environment: None
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("NIGHTSHIFT_SERVER__PORT", str(supervisor.free_port()))
    monkeypatch.setenv("NIGHTSHIFT_MODEL", str(tiny_model(tmp_path / "model")))
    monkeypatch.setattr(supervisor, "ENGINE_STOP_S", 3600.0)
    deaf = tmp_path / "deaf"
    script = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(deaf)!r}).touch()\n"
        "time.sleep(3600)\n"
    )
    monkeypatch.setattr(supervisor, "engine_command", lambda *_: [sys.executable, "-c", script])
    house = asyncio.create_task(
        supervisor.up(load_settings(), make_key=False, waiting=lambda _: None, ready=lambda *_: None)
    )
    await until(deaf.exists, 60)
    os.kill(os.getpid(), signal.SIGTERM)
    await house


async def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"file/state cannot be used .*--state"):
        await supervisor.up(
            Settings(state=tmp_path / "file" / "state"),
            make_key=True,
            waiting=lambda _: None,
            ready=lambda *_: None,
        )


def test_only_one_house_runs_on_a_state_folder(tmp_path: Path) -> None:
    with supervisor._only_one(tmp_path), pytest.raises(StartError, match=rf"process {os.getpid()}\) already runs"):
        supervisor._only_one(tmp_path)
    with supervisor._only_one(tmp_path):
        pass


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused_by_what_it_lacks(tmp_path: Path, missing: str) -> None:
    tiny_model(tmp_path)
    assert supervisor.find_model(str(tmp_path)) == tmp_path
    (tmp_path / missing).unlink()
    with pytest.raises(StartError, match=missing.replace("model", r"\*")):
        supervisor.find_model(str(tmp_path))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (lambda whole: LFS_POINTER, r"model.safetensors is Git LFS's pointer.*`git lfs pull`"),
        *((cut, r"model.safetensors is not whole.*copy it again") for cut in (
            lambda whole: b"",
            lambda whole: whole[:5],
            lambda whole: whole[:20],
            lambda whole: whole[:-1],
            lambda whole: whole[:8] + b"[" + whole[9:],
        )),
    ],
)  # fmt: skip
def test_weights_that_are_not_whole_are_refused(tmp_path: Path, keep: Callable[[bytes], bytes], says: str) -> None:
    weights = tiny_model(tmp_path) / "model.safetensors"
    weights.write_bytes(keep(weights.read_bytes()))
    with pytest.raises(StartError, match=says):
        supervisor.find_model(str(tmp_path))


def test_a_record_that_another_process_holds_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 100)
    settings = Settings(state=tmp_path / "state")
    with closing(connect(settings.database)) as db, transaction(db):
        with pytest.raises(StartError, match=r"nightshift.db cannot be used \(database is locked\). Another process"):
            supervisor._prepare_record(settings, tiny_model(tmp_path / "model"), make_key=True)


def test_a_record_on_a_full_disk_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(db: Database, **_: object) -> None:
        db.execute("PRAGMA max_page_count = 1")
        db.execute("INSERT INTO audit (at, actor, action, subject) VALUES ('', '', '', hex(zeroblob(100000)))")

    monkeypatch.setattr(supervisor.keys, "create", full)
    settings = Settings(state=tmp_path / "state")
    with pytest.raises(StartError, match=r"\(database or disk is full\). See that the disk of .* has room"):
        supervisor._prepare_record(settings, tiny_model(tmp_path / "model"), make_key=True)


def test_a_model_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match="neither a folder nor a model"):
        supervisor.find_model("not/a/valid/id")


def test_the_engine_listens_on_loopback_only_and_adapters_can_be_loaded() -> None:
    command = supervisor.engine_command(Settings(), Path("/model"), 1234)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--enable-lora" in command
    environment = supervisor.engine_environment(Settings())
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["VLLM_SERVER_DEV_MODE"] == "0"


def test_on_a_cpu_nothing_of_the_engine_waits_in_a_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_cpu in (True, False):
        monkeypatch.setattr(supervisor, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        environment = supervisor.engine_environment(Settings())
        assert (environment.get("OMP_WAIT_POLICY") == "PASSIVE") is on_cpu
        assert (environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0") is on_cpu


def test_on_a_gpu_the_engine_leaves_training_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(engine=EngineSettings(gpu_memory_share=0.4))
    for on_cpu in (True, False):
        monkeypatch.setattr(supervisor, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        command = " ".join(supervisor.engine_command(settings, Path("/model"), 1234))
        assert ("--gpu-memory-utilization 0.4" in command) is not on_cpu


def tiny_model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    name = "model.layers.0.self_attn.q_proj.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return folder


@pytest.mark.parametrize(("urls", "engine"), [([], ["engine"]), (["http://other"], [])])
def test_clock_and_scorer_run_whoever_runs_the_engine(tmp_path: Path, urls: list[str], engine: list[str]) -> None:
    settings = Settings(state=tmp_path, engine=EngineSettings(urls=urls))
    children = supervisor._children(settings, tmp_path)
    assert [child.name for child in children] == [*engine, "API", "clock", "scorer"]
    assert [child.log.name for child in children[-2:]] == ["clock.log", "scorer.log"]


@pytest.mark.parametrize(("best_of_n", "scorers"), [(1, 0), (2, 1)])
def test_no_scorer_runs_where_nothing_wants_scores(tmp_path: Path, best_of_n: int, scorers: int) -> None:
    settings = Settings(state=tmp_path)
    settings.comparisons.active_share = 0.0
    settings.serving.best_of_n = best_of_n
    names = [child.name for child in supervisor._children(settings, tmp_path)]
    assert names.count("scorer") == scorers


async def test_a_house_has_a_clock_that_comes_back_and_stops_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_environment: None, engine: FakeEngine
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("NIGHTSHIFT_SERVER__PORT", str(supervisor.free_port()))
    monkeypatch.setenv("NIGHTSHIFT_ENGINE__URLS", json.dumps([engine.url]))
    monkeypatch.setenv("NIGHTSHIFT_MODEL", str(tiny_model(tmp_path / "model")))
    settings = load_settings()
    ready = asyncio.Event()
    house = asyncio.create_task(
        supervisor.up(settings, make_key=False, waiting=lambda _: None, ready=lambda *_: ready.set())
    )
    await asyncio.wait([house, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert not house.done(), house
    with closing(connect(settings.database)) as db:
        first = None

        def ticks() -> bool:
            nonlocal first
            first = leases.holder_of(db, "clock")
            return first is not None

        await until(ticks, 60)
        assert first is not None
        os.kill(int(first.rpartition(":")[2]), signal.SIGKILL)
        await until(lambda: leases.holder_of(db, "clock") not in (None, first), 60)
        os.kill(os.getpid(), signal.SIGTERM)
        await house
        assert leases.holder_of(db, "clock") is None


def test_no_proxy_stands_between_us_and_our_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert supervisor._problem(f"http://127.0.0.1:{server.server_port}/readyz") is None
        finally:
            server.shutdown()
