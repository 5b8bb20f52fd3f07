"""The live display of a run: stage, step, figures, time left."""

from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "score": "reward",
    "kl": "KL",
    "length": "tokens",
    "episodes_per_s": "episodes/s",
    "accuracy": "accuracy",
    "loss": "loss",
}
"""Figures worth a place in the line, and what they are called there."""


class Display:
    """A watcher for `trainer.job.once`: one line a stage."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if stage != self._stage or self._task is None:
            self._close()
            self._stage = stage
            self._task = self._progress.add_task(stage, total=1, figures="")
        shown = "  ".join(f"{title} {figures[name]:.3g}" for name, title in SHOWN.items() if name in figures)
        self._progress.update(self._task, completed=step, total=max(steps, 1), figures=shown)

    def _close(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[-1]
            self._progress.update(self._task, completed=task.total)
