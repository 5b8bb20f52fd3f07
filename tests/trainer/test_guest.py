"""The trainer stands back for everything else on the machine."""

import subprocess
import sys
from pathlib import Path

LOOK = """
import os
from pathlib import Path
from trainer.__main__ import stand_back
stand_back(7)
group = Path("/proc/self/autogroup")
print(os.getpriority(os.PRIO_PROCESS, 0), group.read_text().split()[-1] if group.exists() else None)
"""


def look(*, own_session: bool) -> list[str]:
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=own_session)
    return done.stdout.split()


def test_a_run_of_the_clock_stands_back_with_its_session() -> None:
    shared = "7" if Path("/proc/self/autogroup").exists() else "None"
    assert look(own_session=True) == ["7", shared]


def test_a_run_by_hand_leaves_the_session_of_the_terminal_alone() -> None:
    before = Path("/proc/self/autogroup").read_text() if Path("/proc/self/autogroup").exists() else "None"
    assert look(own_session=False) == ["7", before.split()[-1]]
