"""What somebody sees who watches a run."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from trainer import progress
from trainer.progress import Display

PPO = {"score": 1.234, "kl": 3.21, "length": 23.1, "episodes_per_s": 10.24, "entropy": 0.5}


class Clock(SimpleNamespace):
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def show(display: Display, clock: Clock) -> None:
    """A stage nobody can foresee, 25 steps of 2 seconds, and waits after the last two."""
    with display:
        display("loading the model", 0, 0, {})
        clock.now += 3
        for step in range(26):
            display("ppo", step, 40, PPO if step else {})
            if step >= 24:
                display("ppo", step, 40, PPO | {"waited_s": 0.0})
                display("ppo", step, 40, PPO | {"waited_s": 0.5})
                display("ppo", step, 40, PPO)
            clock.now += 2


def test_without_a_terminal_there_is_a_line_a_stage_and_every_ten_steps(clock: Clock) -> None:
    output = io.StringIO()
    show(Display(Console(file=output, width=20)), clock)
    loading, begins, first, tenth, twentieth, waits = output.getvalue().splitlines()
    assert loading.split() == ["loading", "the", "model", "0:00:00"]
    assert begins.split() == ["ppo", "0/40", "0:00:00"]
    assert re.fullmatch(r"ppo +1/40  0:00:02  0:01:18 left  reward 1\.23  KL 3\.21  tokens 23\.1  .*10\.2", first)
    assert re.match(r"ppo +10/40  0:00:20  0:01:00 left  reward", tenth)
    assert re.match(r"ppo +20/40  0:00:40  0:00:40 left  reward", twentieth)
    assert waits.endswith("waiting for chat, s 0")


def test_a_terminal_of_80_columns_shows_everything(clock: Clock) -> None:
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True, color_system=None)
    display = Display(console)
    with display:
        display("loading the model", 0, 0, {})
        display("ppo", 0, 40, {})
        clock.now += 46
        display("ppo", 23, 40, PPO | {"waited_s": 2.0})
        output.truncate(0)
        assert display._bar is not None
        display._bar.refresh()
        seen = output.getvalue()
        for shown in ("ppo", "23/40", "0:00:34 left", "reward 1.23", "KL 3.21", "tokens 23.1", "episodes/s 10.2"):
            assert shown in seen, seen
        assert "waiting for chat, s 2" in seen
    ended = output.getvalue().splitlines()
    assert any("23/40  0:00:46" in line and "reward 1.23" in line for line in ended), "the last stage stays readable"


def test_it_speaks_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display("starting", 0, 0, {})
    seen = capsys.readouterr()
    assert "starting" in seen.err
    assert seen.out == ""
