"""`python -m trainer once`: carry the queued run to its end, with a live display."""

import argparse
import ctypes
import os
import signal
import sys

from data import runs
from data.database import connect, transaction
from data.settings import BadSettings, Settings, load_settings
from data.types import RunStatus


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("verb", choices=["once"])
    parser.add_argument("--request", action="store_true", help="queue a run first")
    parser.add_argument("--seed", type=int, help="seed of the run that is queued (default: training.seed)")
    arguments = parser.parse_args()
    try:
        settings = load_settings()
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.request:
        config = {} if arguments.seed is None else {"seed": arguments.seed}
        db = connect(settings.database)
        try:
            with transaction(db):
                runs.request(db, requested_by="cli", config=config)
        except runs.RunActive as active:
            print(f"{active} is queued or running already: watch it, or cancel it first.", file=sys.stderr)
            return 1
        finally:
            db.close()
    return once(settings)


def once(settings: Settings) -> int:
    """0: the run succeeded, or nothing was queued. 1: it failed. 130: it was cancelled."""
    be_a_guest(settings)
    # Only now: torch takes seconds to import.
    import torch

    from trainer.job import once as carry_out
    from trainer.progress import Display

    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    with Display() as display:
        run = carry_out(settings, watch=display)
    if run is None:
        print("No run is queued.")
        return 0
    print(f"{run.id} {run.status}" + (f": {run.error}" if run.error else ""))
    return {RunStatus.SUCCEEDED: 0, RunStatus.CANCELLED: 130}.get(run.status, 1)


def be_a_guest(settings: Settings) -> None:
    """Stand back for chat; stop in order when asked to; and keep freed memory, which is soon wanted again."""
    os.nice(settings.training.nice)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc gives large blocks back to the system at every free, and page faults cost more than the arithmetic
        # on them: no mmap for them (-4, M_MMAP_MAX), no trimming (-1, M_TRIM_THRESHOLD), grow by 256 MB (-2).
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


if __name__ == "__main__":
    sys.exit(main())
