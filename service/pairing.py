"""Whether to ask for a vote, between which policies, on which side. Pure: chance comes from outside."""

import random
from dataclasses import dataclass

from data.settings import ComparisonSettings
from data.types import ComparisonKind, Duel, Feedback


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Two answers to draw; `policies` and `seeds` are in the order of what is shown, index 0 first."""

    kind: ComparisonKind
    policies: tuple[str, str]
    seeds: tuple[int, int]
    swapped: bool
    """Whether the answer drawn second is the one shown at index 0."""
    duel_id: str | None = None


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


def plan_pair(
    serving: str, *, seed: int | None, rng: random.Random, duel: Duel | None = None, share: float = 0.0
) -> PairPlan:
    """Two independent draws, on random sides: both from the serving policy or, in a `share` of all cases while a
    `duel` runs, the second from its challenger.

    `seed` is the user's own: with it both draws can be repeated, whichever side they are shown on."""
    draws = random.Random(seed) if seed is not None else rng
    first, second = draws.sample(range(2**31), 2)
    swapped = rng.random() < 0.5
    seeds = (second, first) if swapped else (first, second)
    if duel is None or rng.random() >= share:
        return PairPlan(ComparisonKind.SAME_POLICY, (serving, serving), seeds, swapped)
    policies = (duel.challenger, serving) if swapped else (serving, duel.challenger)
    return PairPlan(ComparisonKind.TRIAL, policies, seeds, swapped, duel.id)


def same_text(a: str, b: str) -> bool:
    """Whether two answers read the same: nothing to vote on."""
    return a.split() == b.split()
