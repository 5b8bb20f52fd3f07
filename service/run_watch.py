"""What is new of a run, look by look: for the API's event stream, and for whoever watches in a terminal."""

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.status import Status
from sqlite_utils import Database

from data import runs
from data.types import Run, RunStatus

LOOK_S = 0.5
END = "end"
OVER = (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED)

SHOWN = {
    "score": "reward",
    "kl": "KL",
    "length": "tokens",
    "accuracy": "accuracy",
    "loss": "loss",
    "judge_win_rate": "win rate",
    "facts": "facts right",
    "waited_s": "waiting for chat, s",
}
"""Figures worth a place in the line, and what they are called there."""
PLAIN_STEPS = 10
"""Where there is no terminal, every so many steps are a line."""


def run_json(run: Run) -> dict[str, Any]:
    fields = asdict(run)
    del fields["pid"]
    return fields


@dataclass(frozen=True, slots=True)
class Event:
    """`status`: the run as it is now. `figures`: those of one step, {"stage", "step", "figures"}."""

    name: str
    id: str
    """Where to go on after it: the steps seen, e.g. `ppo:12,reward:60`, and `end` after the last event."""
    data: dict[str, Any]


class RunWatch:
    """Each `look` returns what has happened since the one before; after the last event `ended` is true.

    The first look returns the run as it is, and all figures beyond those that `after`, the id of an event, has seen."""

    def __init__(self, run_id: str, *, after: str = "") -> None:
        self._run_id = run_id
        self._seen: dict[str, int] = {}
        for part in after.split(","):
            stage, _, step = part.rpartition(":")
            if stage and step.isdecimal() and len(step) < 19:
                self._seen[stage] = int(step)
        self._state: tuple[object, ...] = ()
        self.ended = False

    def look(self, db: Database) -> list[Event]:
        """Raises runs.UnknownRun."""
        run = runs.get(db, self._run_id)  # before its figures: of a run that has ended, there will be no more
        self.ended = run.status in OVER
        events = []
        for stage, step, figures in runs.figures_after(db, self._run_id, self._seen):
            self._seen[stage] = step
            events.append(Event("figures", self._id(), {"stage": stage, "step": step, "figures": figures}))
        state = (run.status, run.stage, run.cancel_requested_at)
        if state != self._state:
            self._state = state
            status = Event("status", self._id(), run_json(run))
            events = [*events, status] if self.ended else [status, *events]
        return events

    def _id(self) -> str:
        return ",".join([f"{stage}:{step}" for stage, step in sorted(self._seen.items())] + [END] * self.ended)


class RunDisplay:
    """The events of a run as lines: on a terminal the last of them moves, elsewhere every tenth step is one."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._moving: Status | None = None
        if self._console.is_terminal:
            self._moving = self._console.status("")
            self._moving.start()
        self._stage = ""
        self._began = time.monotonic()
        self._line = ""

    def __call__(self, event: Event) -> None:
        if event.name == "status":
            stage = event.data["stage"] if event.data["status"] == RunStatus.RUNNING else event.data["status"]
            if stage == self._stage:
                return
            if self._moving and self._line:
                self._print()
            self._stage, self._began = stage, time.monotonic()
            self._show(f"{stage or 'starting':<18}", line=True)
        else:
            stage, step, figures = event.data["stage"], event.data["step"], event.data["figures"]
            said = [f"{title} {figures[name]:.3g}" for name, title in SHOWN.items() if figures.get(name) is not None]
            took = timedelta(seconds=round(time.monotonic() - self._began))
            self._show("  ".join([f"{stage:<18}", f"step {step}", str(took), *said]), line=step % PLAIN_STEPS == 0)

    def close(self) -> None:
        if self._moving:
            self._moving.stop()

    def _show(self, text: str, *, line: bool) -> None:
        self._line = text
        if self._moving:
            self._moving.update(text)
        elif line:
            self._print()

    def _print(self) -> None:
        self._console.print(self._line, soft_wrap=True, markup=False, highlight=False)
