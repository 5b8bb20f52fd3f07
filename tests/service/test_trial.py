"""A duel of two policies may be looked at after every vote: what it then promotes by chance, and how soon what is
better is seen to be."""

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from service.trial import PRIOR_VOTES, Standing, Verdict, e_value, interval, jumped, standing, verdict

ALPHA, THRESHOLD, BUDGET = 0.05, 20.0, 2000
Path = NDArray[np.int16]


def paths(rate: float, votes: int, runs: int, seed: int) -> Path:
    """(runs, votes) wins so far after each vote."""
    rng = np.random.default_rng(seed)
    return (rng.random((runs, votes), dtype=np.float32) < rate).cumsum(axis=1, dtype=np.int16)


def least(holds: Callable[[int, int], bool], votes: int) -> Path:
    """(votes,) the least number of wins after each vote with which `holds(wins, losses)`; it never falls."""
    wins, found = 0, []
    for n in range(1, votes + 1):
        while wins <= n and not holds(wins, n - wins):
            wins += 1
        found.append(wins)
    return np.array(found, dtype=np.int16)


@pytest.fixture(scope="module")
def to_promote() -> Path:
    return least(lambda wins, losses: e_value(wins, losses) >= THRESHOLD, BUDGET)


# The evidence


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 1), (5, 3), (60, 40), (40, 60), (330, 270), (0, 50)])
def test_the_evidence_is_the_average_that_it_is_said_to_be(wins: int, losses: int) -> None:
    q = (np.linspace(0.5, 1, 200_001)[1:] + np.linspace(0.5, 1, 200_001)[:-1]) / 2
    prior = (q * (1 - q)) ** PRIOR_VOTES
    ratios = np.exp(wins * np.log(2 * q) + losses * np.log(2 * (1 - q)))
    assert e_value(wins, losses) == pytest.approx(float((ratios * prior).sum() / prior.sum()), rel=1e-8)


def test_no_bet_on_the_next_vote_gains_where_the_challenger_is_no_better() -> None:
    for n in range(60):
        for wins in range(n + 1):
            now = e_value(wins, n - wins)
            won, lost = e_value(wins + 1, n - wins), e_value(wins, n - wins + 1)
            assert (won + lost) / 2 == pytest.approx(now, rel=1e-12)
            assert 0 < lost < now < won
            for rate in (0.0, 0.2, 0.45):
                assert rate * won + (1 - rate) * lost < now


def test_evidence_can_always_be_written_down() -> None:
    assert e_value(5000, 0) == sys.float_info.max
    assert 0 < e_value(0, 5000) < 1
    assert math.isfinite(e_value(100_000, 90_000))


def test_at_most_one_in_twenty_is_promoted_by_chance(to_promote: Path) -> None:
    """Looked at after every vote: 3.9 % of 8,000 (seed 0)."""
    promoted = (paths(0.5, BUDGET, 8000, seed=0) >= to_promote).any(axis=1).mean()
    assert promoted <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 8000)
    assert promoted > ALPHA / 2, "a test that never errs wastes votes"


@pytest.mark.parametrize(("rate", "soonest", "latest"), [(0.55, 540, 640), (0.60, 130, 159), (0.65, 64, 76)])
def test_how_many_votes_it_takes_to_see_who_is_better(to_promote: Path, rate: float, soonest: int, latest: int) -> None:
    """Medians 589, 148 and 72 (4,000 runs, seed 1)."""
    reached = paths(rate, BUDGET, 4000, seed=1) >= to_promote
    votes = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, BUDGET + 1)
    assert soonest <= np.median(votes) <= latest


# The interval


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.62])
def test_the_interval_holds_the_rate_at_every_vote_together(rate: float) -> None:
    votes, runs = 1000, 4000
    inside_from = least(lambda wins, losses: interval(wins, losses, ALPHA)[1] >= rate, votes)
    outside_from = least(lambda wins, losses: interval(wins, losses, ALPHA)[0] > rate, votes)
    wins = paths(rate, votes, runs, seed=2)
    missed = ((wins < inside_from) | (wins >= outside_from)).any(axis=1).mean()
    assert 0.005 < missed <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def test_the_interval_is_about_what_was_seen_and_narrows() -> None:
    assert interval(0, 0, ALPHA) == (0.0, 1.0)
    width = 1.0
    for n in (10, 100, 1000, 10_000):
        low, high = interval(6 * n // 10, 4 * n // 10, ALPHA)
        assert low < 0.6 < high
        assert high - low < width
        width = high - low
    assert width < 0.05
    assert interval(70, 30, 0.01)[0] < interval(70, 30, 0.05)[0]


def test_the_interval_is_where_the_martingale_of_its_rate_reaches_one_in_alpha() -> None:
    (low, high), p = interval(7, 3, ALPHA), np.linspace(0, 1, 2_000_001)[1:-1]
    averaged = (p**6.5 * (1 - p) ** 2.5).mean() / (p**-0.5 * (1 - p) ** -0.5).mean()
    for edge in (low, high):
        assert averaged / (edge**7 * (1 - edge) ** 3) == pytest.approx(1 / ALPHA, rel=2e-3)


@pytest.mark.parametrize(("wins", "losses"), [(0, 4), (3, 0), (17, 40), (2000, 0)])
def test_the_other_side_sees_the_same_mirrored(wins: int, losses: int) -> None:
    ours, theirs = standing(wins, losses, 2, alpha=ALPHA), standing(losses, wins, 2, alpha=ALPHA)
    assert (ours.e_value, ours.e_mirrored) == (theirs.e_mirrored, theirs.e_value)
    assert (ours.rate_low, ours.rate_high) == pytest.approx((1 - theirs.rate_high, 1 - theirs.rate_low), abs=1e-9)
    assert 0 <= ours.rate_low < ours.rate_high <= 1


# The verdict


def seen(e: float = 1.0, mirrored: float = 1.0, votes: tuple[int, int, int] = (5, 5, 0)) -> Standing:
    return Standing(*votes, e_value=e, e_mirrored=mirrored, rate_low=0.0, rate_high=1.0)


@pytest.mark.parametrize(
    ("standing", "expected"),
    [
        (seen(), Verdict.GO_ON),
        (seen(e=19.9, mirrored=19.9, votes=(49, 50, 0)), Verdict.GO_ON),
        (seen(e=20.0), Verdict.WON),
        (seen(mirrored=20.0), Verdict.LOST),
        (seen(votes=(50, 50, 0)), Verdict.UNDECIDED),
        (seen(votes=(1, 0, 99)), Verdict.UNDECIDED),
        (seen(e=20.0, votes=(70, 30, 0)), Verdict.WON),
        (seen(mirrored=20.0, votes=(30, 70, 0)), Verdict.LOST),
    ],
    ids=["early", "just not", "won", "lost", "budget", "ties spend it too", "won with the last", "lost with the last"],
)
def test_the_verdict(standing: Standing, expected: Verdict) -> None:
    assert verdict(standing, threshold=20.0, reject_at=20.0, budget=100) is expected


def test_a_later_trial_needs_more_to_win_and_no_more_to_lose() -> None:
    assert verdict(seen(e=39.0), threshold=40.0, reject_at=20.0, budget=100) is Verdict.GO_ON
    assert verdict(seen(mirrored=20.0), threshold=40.0, reject_at=20.0, budget=100) is Verdict.LOST


def test_a_duel_of_real_votes_is_won_by_who_wins_them() -> None:
    def after(wins: int, losses: int) -> Verdict:
        return verdict(standing(wins, losses, 3, alpha=ALPHA), threshold=20.0, reject_at=20.0, budget=BUDGET)

    assert after(12, 10) is Verdict.GO_ON
    assert after(70, 30) is Verdict.WON
    assert after(30, 70) is Verdict.LOST
    assert after(1000, 997) is Verdict.UNDECIDED


# Jumps


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 1000), (10, 40), True),
        ((2, 1000), (10, 29), False),
        ((0, 10_000), (30, 400), False),
        ((0, 12), (4, 30), False),
        ((5, 5000), (0, 500), False),
        ((40, 40), (40, 40), False),
        ((0, 0), (30, 30), False),
        ((100, 1000), (500, 1000), True),
        ((500, 1000), (100, 1000), False),
    ],
    ids=["up", "few yet", "less than 10 points", "perhaps chance", "down", "always", "nothing before", "many", "fewer"],
)
def test_a_jump(before: tuple[int, int], after: tuple[int, int], expected: bool) -> None:
    assert jumped(before, [after]) is expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([(30, 40), (0, 200)], False),
        ([(30, 40), (0, 6)], False),
        ([(500, 500), (0, 1)], True),
        ([(200, 1000), (0, 5)], True),
        ([(30, 40), (4, 20)], False),
        ([(30, 40), (8, 40)], True),
        ([(30, 40), (5, 10)], True),
        ([(5, 200), (5, 200)], False),
        ([(30, 40)], True),
        ([], False),
    ],
    ids=[
        "many see none", "six see none", "one tells nothing", "five tell little", "others are too few", "others see it",
        "some see it", "no difference", "there is but one", "nobody",
    ],
)  # fmt: skip
def test_nobody_makes_a_jump_alone_where_there_are_others(after: list[tuple[int, int]], expected: bool) -> None:
    assert jumped((3, 200), after) is expected


def test_a_jump_is_as_unlikely_by_chance_as_it_is_said_to_be() -> None:
    """The first number of failures that counts as one, by Fisher's test in whole numbers."""

    def chance(before: tuple[int, int], after: tuple[int, int]) -> float:
        bad, everything = before[0] + after[0], before[1] + after[1]
        ways = (math.comb(after[1], k) * math.comb(before[1], bad - k) for k in range(after[0], bad + 1))
        return sum(ways) / math.comb(everything, bad)

    before = (6, 200)
    first = next(bad for bad in range(51) if jumped(before, [(bad, 50)]))
    assert chance(before, (first, 50)) <= 1e-3 < chance(before, (first - 1, 50))
