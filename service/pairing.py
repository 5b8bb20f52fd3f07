"""Whether to ask for a vote, between which policies, on which side. Pure: chance comes from outside."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import pvariance

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
    more_seeds: tuple[int, ...] = ()
    """Of an active pair: further answers to draw, unseen. The one that the reward model chooses is shown in the place
    of the answer drawn second."""

    @property
    def first(self) -> int:
        """The index at which the answer drawn first is shown."""
        return int(self.swapped)


def wants_pair(
    feedback: Feedback,
    settings: ComparisonSettings,
    *,
    lately: Callable[[], tuple[int, int | None]],
    rng: random.Random,
) -> bool:
    """Whether this request is answered with two answers.

    `lately()` looks up how many comparisons were shown to this user in the last 24 hours, and how many plain answers
    were given since the last one (None: there was none). It is asked only where that decides."""
    if feedback is not Feedback.AUTO:
        return feedback is Feedback.ALWAYS
    if rng.random() >= settings.rate:
        return False
    shown_today, turns_since = lately()
    return shown_today < settings.daily_cap and (turns_since is None or turns_since >= settings.cooldown_turns)


def plan_pair(
    serving: str,
    *,
    seed: int | None,
    rng: random.Random,
    duel: Duel | None = None,
    share: float = 0.0,
    active_share: float = 0.0,
    active_draws: int = 4,
) -> PairPlan:
    """Two independent draws, on random sides: both from the serving policy or, in a `share` of all cases while a
    `duel` runs, the second from its challenger. An `active_share` of the others is active: `active_draws` answers.

    `seed` is the user's own: with it all draws can be repeated, whichever side they are shown on."""
    draws = random.Random(seed) if seed is not None else rng
    first, second = draws.sample(range(2**31), 2)
    swapped = rng.random() < 0.5
    seeds = (second, first) if swapped else (first, second)
    if duel is None or rng.random() >= share:
        if active_share and rng.random() < active_share:
            more = tuple(draws.sample(range(2**31), active_draws - 2))
            return PairPlan(ComparisonKind.ACTIVE, (serving, serving), seeds, swapped, more_seeds=more)
        return PairPlan(ComparisonKind.SAME_POLICY, (serving, serving), seeds, swapped)
    policies = (duel.challenger, serving) if swapped else (serving, duel.challenger)
    return PairPlan(ComparisonKind.TRIAL, policies, seeds, swapped, duel.id)


def same_text(a: str, b: str) -> bool:
    """Whether two answers read the same: nothing to vote on."""
    return a.split() == b.split()


def most_disputed(first: Sequence[float], challengers: Sequence[Sequence[float]]) -> int | None:
    """The challenger on which the heads of a reward model disagree most with the first answer: the index of the
    largest variance over the heads of the difference of the two scores. None where they agree on all of them.

    What all heads see alike, a vote on it would teach them little; where they differ, one of them is wrong."""
    variances = [pvariance([b - a for a, b in zip(first, scores, strict=True)]) for scores in challengers]
    largest = max(variances)
    return variances.index(largest) if largest > 0 else None


def best(scores: Sequence[Sequence[float]]) -> int:
    """The answer with the highest mean over the heads; the earliest of several."""
    means = [sum(heads) / len(heads) for heads in scores]
    return means.index(max(means))
