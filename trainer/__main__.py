"""`python -m trainer once`: carry a run to its end, with a live display on standard error.
`python -m trainer clock`: start the runs that are due, until told to stop.
`python -m trainer scorer`: score answers for the service with the newest reward model, until told to stop."""

import argparse
import ctypes
import json
import os
import signal
import sys
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from pysqlite3 import dbapi2 as sqlite3

from data import registry, runs
from data.database import connect
from data.settings import BadSettings, Settings, load_settings
from data.types import Policy, PolicyStatus, RunStatus
from trainer.progress import Display


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("verb", choices=["once", "clock", "scorer"])
    parser.add_argument(
        "--request", action="store_true", help="once: ask for a run, rather than take the one in the queue"
    )
    parser.add_argument("--run", metavar="ID", help="once: take this run alone from the queue")
    parser.add_argument("--seed", type=int, help="seed of the run that is asked for (default: training.seed)")
    parser.add_argument("--json", action="store_true", help="print the run as one JSON object on the last line")
    arguments = parser.parse_args()
    try:
        settings = load_settings()
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.verb == "clock":
        from trainer.clock import keep_time

        return keep_time(settings)
    if arguments.verb == "scorer":
        from trainer.scorer import NICE, serve

        stand_back(NICE)
        signal.signal(signal.SIGTERM, stop)
        return serve(settings)
    config = {} if arguments.seed is None else {"seed": arguments.seed}
    request = config if arguments.request else None
    return once(settings, request=request, run_id=arguments.run, as_json=arguments.json)


def once(settings: Settings, *, request: dict[str, Any] | None, run_id: str | None, as_json: bool) -> int:
    """0: the run succeeded, or nothing was queued. 1: it failed. 130: it was cancelled."""
    be_a_guest(settings)
    try:
        with Display() as display:
            display("starting", 0, 0, {})
            # Only now: torch takes seconds to import.
            import torch
            from transformers.utils.logging import disable_progress_bar

            from trainer.job import once as carry_out
            from trainer.job import what_to_do

            disable_progress_bar()  # there is one display, and it is ours
            # Gradients through a probability of e^-90 are denormal numbers, which slow a product of matrices threefold.
            torch.set_flush_denormal(True)
            if settings.training.threads:
                torch.set_num_threads(settings.training.threads)
            run = carry_out(settings, request=request, run_id=run_id, watch=display)
    except runs.RunActive as active:
        print(f"{active} is queued or running already: watch it, or cancel it first.", file=sys.stderr)
        return 1
    except sqlite3.OperationalError as error:
        print(what_to_do(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if run is None:
        print("null" if as_json else "No run is queued.")
        return 0
    with closing(connect(settings.database)) as db:
        policy = next((policy for policy in registry.list_policies(db) if policy.run_id == run.id), None)
    if as_json:
        made = {"policy": policy and policy.name, "policy_status": policy and policy.status}
        print(json.dumps(asdict(run) | made | {"gate": policy and policy.metrics["gate"]}))
    else:
        came_of_it = what_came_of(policy) if policy else run.error
        print(f"{run.id} {run.status}" + (f": {came_of_it}" if came_of_it else ""))
    return {RunStatus.SUCCEEDED: 0, RunStatus.CANCELLED: 130}.get(run.status, 1)


def what_came_of(policy: Policy) -> str:
    """What the gate made of a run's policy, and why."""
    if policy.status is PolicyStatus.REJECTED:
        failed = [check["sentence"] for check in policy.metrics["gate"]["checks"] if not check["passed"]]
        return f"the gate rejected {policy.name}. {failed[0]}" if failed else f"{policy.name}: {policy.problem}"
    if policy.status is PolicyStatus.PROMOTED:
        return f"{policy.name} passed the gate and goes into service"
    return f"{policy.name} passed the gate and is a candidate"


def stand_back(nice: int) -> None:
    """Let everything else on the machine go first."""
    os.nice(nice)
    if os.getsid(0) == os.getpid():
        # Where Linux shares processors out among sessions, nice counts within one alone: the session is lowered too.
        with suppress(OSError):  # not every kernel has it
            Path("/proc/self/autogroup").write_text(str(nice))


def be_a_guest(settings: Settings) -> None:
    """Stand back for chat; stop in order when asked to; and keep freed memory, which is soon wanted again."""
    stand_back(settings.training.nice)
    for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(wish) is not signal.SIG_IGN:  # nohup, say
            signal.signal(wish, stop)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc gives large blocks back to the system at every free, and page faults cost more than the arithmetic
        # on them: no mmap for them (-4, M_MMAP_MAX), no trimming (-1, M_TRIM_THRESHOLD), grow by 256 MB (-2).
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


def stop(signal_number: int, frame: FrameType | None) -> None:
    """Interrupt, once: a second wish must not disturb the ending that the first began."""
    for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(wish, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
