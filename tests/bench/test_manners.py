"""The arithmetic of the manners bench. Nothing here looks at a time."""

import argparse
import json
import random
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from bench import manners
from bench.manners import Repetition, Window
from data import runs
from data.database import connect, transaction

OPTIONS = argparse.Namespace(rate=3.0, seed=1, quick=False)


def repetition(alone: list[float], beside: list[float], *, steps: tuple[list[float], list[float]]) -> Repetition:
    return Repetition(Window(alone), Window(beside, steps_s=steps[1]), Window(steps_s=steps[0]))


def test_the_slowdown_is_over_the_steps_that_both_came_to() -> None:
    assert manners.slowdown([10, 11, 12, 13, 14], [20, 23, 26]) == 3
    assert manners.slowdown([10, 11], [5, 5.5, 6]) == 0.5


@pytest.mark.parametrize("beside", [[], [4.0]])
def test_without_two_steps_in_both_there_is_no_slowdown(beside: list[float]) -> None:
    assert manners.slowdown([1, 2, 3], beside) is None


def test_a_slowdown_that_one_repetition_lacks_is_null_and_the_table_says_so() -> None:
    taken = [
        repetition([10.0], [20.0], steps=([1, 2], [1, 3])),
        repetition([10.0], [20.0], steps=([1, 2], [1])),
    ]
    found = json.loads(json.dumps(manners.figures(taken, OPTIONS), allow_nan=False))
    assert found["training_slowdown"] is None
    assert "unknown" in manners.table(taken)


def test_the_steps_are_counted_by_stage_over_all_windows() -> None:
    taken = [
        Repetition(
            Window([10.0]),
            Window([20.0], steps_s=[1, 3], stages=Counter(ppo=2)),
            Window(steps_s=[1, 2, 3], stages=Counter(ppo=2, measuring=1)),
        )
    ]
    assert manners.figures(taken, OPTIONS)["training_steps"] == {"ppo": 4, "measuring": 1}


def test_what_a_run_does_before_its_first_step_of_ppo_is_not_noted(tmp_path: Path) -> None:
    window, seen = Window(), dict[str, int]()
    with closing(connect(tmp_path / "nightshift.db")) as db:
        with transaction(db):
            runs.request(db, requested_by="bench", config={})
            run = runs.claim(db)
            assert run is not None
            runs.add_metrics(db, run.id, 0, {"reward/loss": 0.7})
        manners.look(db, window, seen)
        assert window.steps_s == []
        for step in (0, 1):
            with transaction(db):
                runs.add_metrics(db, run.id, step, {"ppo/score": 0.1, "ppo/kl": 0.0})
            manners.look(db, window, seen)
            manners.look(db, window, seen)
    assert len(window.steps_s) == 2
    assert window.stages == {"ppo": 2}


def test_chats_arrive_within_the_window_at_the_rate_asked_for() -> None:
    moments = manners.arrivals(random.Random(0), rate=5, seconds=200)
    assert moments == sorted(moments) == manners.arrivals(random.Random(0), rate=5, seconds=200)
    assert moments[0] > 0
    assert moments[-1] < 200
    assert 900 < len(moments) < 1100


def test_a_ratio_is_of_the_quantiles_over_all_repetitions() -> None:
    taken = [
        repetition([10.0] * 9 + [100.0], [20.0] * 9 + [110.0], steps=([1, 2], [1, 4])),
        repetition([10.0] * 9 + [200.0], [20.0] * 9 + [500.0], steps=([1, 2], [1, 3])),
        repetition([10.0] * 9 + [300.0], [20.0] * 9 + [450.0], steps=([1, 2], [1, 2])),
    ]
    found = manners.figures(taken, OPTIONS)
    assert found["ttft_p50_ratio"] == 2
    assert found["ttft_p95_ratio"] == 2.25  # 200 and 450, the second largest of 30
    assert found["training_slowdown"] == 2
    assert found["chats"] == 30
    printed = manners.table(taken)
    assert "2.25 [1.10, 2.50]" in printed
    assert "2.00 [1.00, 3.00]" in printed


@pytest.mark.parametrize("arguments", [["--rate", "0"], ["--rate", "-1"], ["--rate", "nan"], ["--rate", "often"]])
def test_bad_arguments_end_before_anything_starts(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["manners", *arguments])
    with pytest.raises(SystemExit, match="2"):
        manners.main()
    assert not list(tmp_path.iterdir())
