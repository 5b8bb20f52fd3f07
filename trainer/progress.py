"""The live display of a run on standard error: stage, step, figures, time left."""

import time
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

SHOWN = {
    "score": "reward",
    "kl": "KL",
    "length": "tokens",
    "episodes_per_s": "episodes/s",
    "accuracy": "accuracy",
    "loss": "loss",
    "judge_win_rate": "win rate",
    "facts": "facts right",
    "waited_s": "waiting for chat, s",
}
"""Figures worth a place in the line, and what they are called there."""

PLAIN_STEPS = 10
"""Where there is no terminal, every so many steps are a line."""


class Display:
    """A watcher for `trainer.job.once`: a bar for the stage under way, and a line for each stage that has ended.

    Where there is no terminal there is no bar, but a line when a stage begins, when it first waits for chat, and every
    ten steps.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = _Bar(self._console) if self._console.is_terminal else None
        self._stage = ""
        self._began = time.monotonic()
        self._step = self._steps = 0
        self._has_waited = False
        self._figures: dict[str, float] = {}

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._print()
            self._bar.stop()

    def __call__(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        """`step` of at most `steps` (0: nobody knows) of a stage is done, and these were its figures."""
        begins = stage != self._stage
        news = step != self._step and (step % PLAIN_STEPS == 0 or step in (1, steps))
        waits = "waited_s" in figures
        if begins:
            if self._bar and self._stage:
                self._print()
            self._stage, self._began, self._has_waited = stage, time.monotonic(), False
        self._step, self._steps, self._figures = step, steps, figures
        if self._bar:
            self._bar.show(stage, step, steps, self._left(), self._said(), begins=begins)
        elif begins or news or (waits and not self._has_waited):
            self._print()
        self._has_waited |= waits

    def _said(self) -> str:
        return "  ".join(f"{title} {self._figures[name]:.3g}" for name, title in SHOWN.items() if name in self._figures)

    def _left(self) -> str:
        """How long the rest of the stage takes, should it go on as it went so far."""
        if not 0 < self._step < self._steps:
            return ""
        seconds = (time.monotonic() - self._began) * (self._steps - self._step) / self._step
        return f"{timedelta(seconds=round(seconds))} left"

    def _print(self) -> None:
        took = timedelta(seconds=round(time.monotonic() - self._began))
        count = f"{self._step}/{self._steps}" if self._steps else ""
        words = [f"{self._stage:<18}", f"{count:>9}", str(took), self._left(), self._said()]
        self._console.print("  ".join(word for word in words if word), soft_wrap=True, markup=False, highlight=False)


class _Bar(Progress):
    """One stage's bar, and its figures in a line of their own: together they are too long for a terminal's width."""

    def __init__(self, console: Console) -> None:
        self._said = ""
        super().__init__(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, transient=True,
        )  # fmt: skip

    def show(self, stage: str, step: int, steps: int, left: str, said: str, *, begins: bool) -> None:
        if begins:
            for task in self.task_ids:
                self.remove_task(task)
            self.add_task(stage, total=None, count="", left="")
        self._said = said
        count = f"{step}/{steps}" if steps else ""
        self.update(self.task_ids[0], completed=step, total=steps or None, count=count, left=left)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self._said)
