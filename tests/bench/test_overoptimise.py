"""The arithmetic of over-optimisation; no model is loaded."""

import math
from types import SimpleNamespace

import pytest
import torch

from bench.overoptimise import fit, gain_at, peak, pessimistic, summary

KLS = [0.1 * i for i in range(1, 300)]


def test_the_fit_finds_the_curve_that_made_the_points() -> None:
    assert fit(KLS, [gain_at(kl, 0.9, 0.4) for kl in KLS]) == (pytest.approx(0.9), pytest.approx(0.4))


def test_the_peak_is_where_nothing_near_it_is_higher() -> None:
    top = peak(0.9, 0.4)
    assert top is not None
    assert gain_at(top, 0.9, 0.4) > max(gain_at(0.95 * top, 0.9, 0.4), gain_at(1.05 * top, 0.9, 0.4))
    assert peak(0.9, -0.1) is None


def test_the_summary_tells_a_fall_from_a_rise_that_goes_on() -> None:
    def row(heads: str, alpha: float, beta: float) -> dict[str, object]:
        points = [[kl, math.sqrt(kl), 3.5 + gain_at(kl, alpha, beta)] for kl in KLS]
        return {"votes": 250, "heads": heads, "seed": 1, "gold_base": 3.5, "gain_best_of_4": 0.5, "points": points}

    falls, rises = summary([row("one", 0.9, 0.6), row("five, mean", 0.9, 0.1)], 2.0)
    assert falls["peak_kl"] == pytest.approx(math.exp(2 * (0.9 / 0.6 - 1)))
    assert falls["end_gain"] < falls["peak_gain"]
    assert rises["peak_kl"] is None
    assert rises["peak_gain"] == pytest.approx(rises["end_gain"], rel=0.02)
    assert falls["gain_at_stop"] == pytest.approx(gain_at(2.0, 0.9, 0.6))


def test_what_was_not_reached_is_not_guessed() -> None:
    points = [[kl, 0.0, 3.5 + kl] for kl in (0.1, 0.5, 2.0, 4.0)]
    (only,) = summary(
        [{"votes": 250, "heads": "one", "seed": 1, "gold_base": 3.5, "gain_best_of_4": 0.5, "points": points}], 2.0
    )
    assert only["gain_at_stop"] is not None
    assert only["gain_at_budget"] is None


def test_pessimism_believes_the_lowest_head_on_the_scale_of_other_scores() -> None:
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0], [9.0, 3.0]])
    score = pessimistic(SimpleNamespace(rewards=lambda answers: rewards), [])  # type: ignore[arg-type]
    assert score([]).tolist() == pytest.approx([-1.0, 0.0, 1.0])
