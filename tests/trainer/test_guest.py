"""The trainer stands back for everything else on the machine."""

import json
import subprocess
import sys
from typing import Any

LOOK = """
import json, os
from pathlib import Path
from trainer.__main__ import stand_back

def group():
    '''The nice of this session, which Linux keeps only where it shares processors out among sessions.'''
    found = Path("/proc/self/autogroup")
    return (found.read_text() if found.exists() else "").split()[-1:]

before = group()
stand_back(7)
print(json.dumps({"nice": os.getpriority(os.PRIO_PROCESS, 0), "before": before, "after": group()}))
"""


def look(*, own_session: bool) -> dict[str, Any]:
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=own_session)
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def test_a_run_of_the_clock_stands_back_with_its_session() -> None:
    seen = look(own_session=True)
    assert seen["nice"] == 7
    assert seen["after"] == (["7"] if seen["before"] else [])


def test_a_run_by_hand_leaves_the_session_of_the_terminal_alone() -> None:
    seen = look(own_session=False)
    assert seen["nice"] == 7
    assert seen["after"] == seen["before"]
