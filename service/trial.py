"""The live duel of a challenger and an incumbent: a test that may be looked at after every vote. Pure.

The challenger wins a decisive vote with an unknown rate. For every rate q the likelihood ratio of q against 1/2,
(2q)^wins * (2(1 - q))^losses, is a nonnegative martingale if the rate is 1/2, and for q > 1/2 a supermartingale if it
is less. So is their average over q, and by Ville's inequality (1939) it ever reaches 20 with a chance of 1 in 20 at
most, however often and whenever one looks (Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid
inference"). The interval inverts the same kind of average, over all rates, for every rate that might be the true one.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

PRIOR_VOTES = 9
"""More finds small differences sooner and large ones later: see DECISIONS.md."""

JUMP_P = 1e-3
JUMP_SEEN = 30
JUMP_POINTS = 0.10


class Verdict(StrEnum):
    GO_ON = "go_on"
    WON = "won"
    LOST = "lost"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a duel stands, seen from the challenger."""

    wins: int
    losses: int
    ties: int
    """Votes that prefer neither: they say nothing about who is better, and use up the budget all the same."""
    e_value: float
    """Evidence that the challenger wins more than half of the decisive votes."""
    e_mirrored: float
    """Evidence that the incumbent does."""
    rate_low: float
    rate_high: float
    """The interval that holds the challenger's win rate at all times together, with a chance of 1 - alpha."""


def standing(wins: int, losses: int, ties: int, *, alpha: float) -> Standing:
    low, high = interval(wins, losses, alpha)
    return Standing(wins, losses, ties, e_value(wins, losses), e_value(losses, wins), low, high)


def verdict(standing: Standing, *, threshold: float, reject_at: float, budget: int) -> Verdict:
    """WON at `threshold`, LOST when the mirrored evidence is at `reject_at`, UNDECIDED after `budget` votes.

    The vote that uses up the budget is heard first: it may still win or lose."""
    if standing.e_value >= threshold:
        return Verdict.WON
    if standing.e_mirrored >= reject_at:
        return Verdict.LOST
    if standing.wins + standing.losses + standing.ties >= budget:
        return Verdict.UNDECIDED
    return Verdict.GO_ON


def e_value(wins: int, losses: int) -> float:
    """The likelihood ratio against a win rate of 1/2, averaged over the rates above it; 1 before any vote.

    The rates weigh as in Beta(PRIOR_VOTES + 1, PRIOR_VOTES + 1), cut off below 1/2: as if that many votes each way had
    been seen. At most the largest float, so that it can be written down.
    """
    start = _average_ratio(PRIOR_VOTES, PRIOR_VOTES)
    return min(_average_ratio(wins + PRIOR_VOTES, losses + PRIOR_VOTES) / start, sys.float_info.max)


def _average_ratio(wins: int, losses: int) -> float:
    """2 * integral over q from 1/2 to 1 of (2q)^wins (2(1 - q))^losses.

    With n = wins + losses this is an incomplete beta function of whole numbers, and so a sum of binomial coefficients:
    sum over k from losses + 1 to n + 1 of C(n + 1, k), divided by (n + 1) C(n, wins). All terms are positive, and each
    is a simple multiple of the one before."""
    n = wins + losses
    term = 1 / (losses + 1)
    total = term
    for k in range(losses + 1, n + 1):
        term *= (n + 1 - k) / (k + 1)
        total += term
    return total


def interval(wins: int, losses: int, alpha: float) -> tuple[float, float]:
    """The win rates p whose own martingale, the likelihood ratio against p averaged over Beta(1/2, 1/2), has not
    reached 1/alpha. The true rate leaves it ever, at any number of votes, with a chance of alpha at most."""
    n = wins + losses
    if n == 0:
        return 0.0, 1.0
    averaged = math.lgamma(wins + 0.5) + math.lgamma(losses + 0.5) - math.lgamma(n + 1) - math.log(math.pi)

    def possible(p: float) -> bool:
        likelihood = (wins * math.log(p) if wins else 0.0) + (losses * math.log1p(-p) if losses else 0.0)
        return averaged - likelihood < -math.log(alpha)

    low = _edge(possible, wins / n, 0.0) if wins else 0.0
    high = _edge(possible, wins / n, 1.0) if losses else 1.0
    return low, high


def _edge(possible: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where what is possible ends between two points, by halving; the end that is just outside."""
    for _ in range(60):
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            break
        inside, outside = (middle, outside) if possible(middle) else (inside, middle)
    return outside


def total(counts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of all persons together: how often, out of how many."""
    return sum(bad for bad, _ in counts), sum(every for _, every in counts)


def jumped(before: tuple[int, int], after: Sequence[tuple[int, int]]) -> bool:
    """Whether something happens more often than it did: (how often, out of how many) before, and after for each
    person.

    Yes, if after at least JUMP_SEEN it is more frequent by at least JUMP_POINTS, and there is at most JUMP_P to so
    many by chance. Where the person whom it happens to most differs that clearly from the others, these alone count:
    nobody brings it about alone while others see nothing of it. Nothing is said where there is nothing to compare
    with."""
    worst = max(after, default=(0, 0))
    bad, every = total(after)
    others = bad - worst[0], every - worst[1]
    bad, every = others if _chance(others, worst) <= JUMP_P else (bad, every)
    if before[1] == 0 or every < JUMP_SEEN:
        return False
    return bad / every - before[0] / before[1] >= JUMP_POINTS and _chance(before, (bad, every)) <= JUMP_P


def _chance(few: tuple[int, int], many: tuple[int, int]) -> float:
    """Of as many in the second or more, where both are alike (Fisher's exact test, one-sided)."""
    bad, everything = few[0] + many[0], few[1] + many[1]
    return sum(
        math.exp(_log_choose(many[1], k) + _log_choose(few[1], bad - k) - _log_choose(everything, bad))
        for k in range(many[0], min(many[1], bad) + 1)
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
