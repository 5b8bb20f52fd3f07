"""Whether to ask for a vote, between which policies, on which side. Pure: chance comes from outside."""

import random
from dataclasses import dataclass

from data.settings import ComparisonSettings
from data.types import ComparisonKind, Feedback


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Two answers to draw; `policies` and `seeds` are in the order of what is shown, index 0 first."""

    kind: ComparisonKind
    policies: tuple[str, str]
    seeds: tuple[int, int]
    swapped: bool
    """Whether the answer drawn second is the one shown at index 0."""


def wants_pair(
    feedback: Feedback,
    settings: ComparisonSettings,
    *,
    shown_today: int,
    turns_since: int | None,
    rng: random.Random,
) -> bool:
    """Whether this request is answered with two answers.

    `shown_today` comparisons were shown to this user in the last 24 hours, and `turns_since` plain answers were given
    since the last one (None: there was none)."""
    if feedback is not Feedback.AUTO:
        return feedback is Feedback.ALWAYS
    if shown_today >= settings.daily_cap:
        return False
    if turns_since is not None and turns_since < settings.cooldown_turns:
        return False
    return rng.random() < settings.rate


def plan_pair(serving: str, *, seed: int | None, rng: random.Random) -> PairPlan:
    """Two independent draws from the serving policy, on random sides.

    `seed` is the user's own: with it both draws can be repeated, whichever side they are shown on."""
    draws = random.Random(seed) if seed is not None else rng
    first, second = draws.sample(range(2**31), 2)
    swapped = rng.random() < 0.5
    seeds = (second, first) if swapped else (first, second)
    return PairPlan(ComparisonKind.SAME_POLICY, (serving, serving), seeds, swapped)


def same_text(a: str, b: str) -> bool:
    """Whether two answers read the same: nothing to vote on."""
    return a.split() == b.split()
