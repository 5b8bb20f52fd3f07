"""Whether to ask, and on which side: pure, so chance is the test's own."""

import random
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.settings import ComparisonSettings
from data.types import ComparisonKind, Duel, DuelKind, DuelStatus, Feedback
from service.pairing import PairPlan, best, most_disputed, plan_pair, same_text, wants_pair

SETTINGS = st.builds(
    ComparisonSettings, rate=st.floats(0, 1), daily_cap=st.integers(0, 5), cooldown_turns=st.integers(0, 5)
)
SHOWN = st.integers(0, 10)
TURNS = st.none() | st.integers(0, 10)


def wants(feedback: Feedback, settings: ComparisonSettings, shown: int, turns: int | None, seed: int) -> bool:
    return wants_pair(feedback, settings, lately=lambda: (shown, turns), rng=random.Random(seed))


@given(SETTINGS, SHOWN, TURNS, st.integers())
def test_off_never_wants_a_pair_and_always_always_does(
    settings: ComparisonSettings, shown: int, turns: int | None, seed: int
) -> None:
    assert not wants(Feedback.OFF, settings, shown, turns, seed)
    assert wants(Feedback.ALWAYS, settings, shown, turns, seed)


@given(SETTINGS, SHOWN, TURNS, st.integers())
def test_auto_keeps_the_cap_the_cool_down_and_the_rate(
    settings: ComparisonSettings, shown: int, turns: int | None, seed: int
) -> None:
    allowed = shown < settings.daily_cap and (turns is None or turns >= settings.cooldown_turns)
    by_chance = random.Random(seed).random() < settings.rate
    assert wants(Feedback.AUTO, settings, shown, turns, seed) == (allowed and by_chance)


def test_auto_wants_a_pair_as_often_as_the_rate_says() -> None:
    rng, n = random.Random(11), 20_000
    for rate in (0.0, 0.05, 0.3, 1.0):
        settings = ComparisonSettings(rate=rate)
        asked = sum(wants_pair(Feedback.AUTO, settings, lately=lambda: (0, None), rng=rng) for _ in range(n))
        assert abs(asked - rate * n) <= 4 * sqrt(n * rate * (1 - rate))


def test_what_a_user_was_shown_lately_is_looked_up_only_where_it_decides() -> None:
    rng, looked = random.Random(3), []

    def lately() -> tuple[int, int | None]:
        looked.append(1)
        return 0, None

    for feedback, rate in ((Feedback.OFF, 1.0), (Feedback.ALWAYS, 1.0), (Feedback.AUTO, 0.0)):
        wants_pair(feedback, ComparisonSettings(rate=rate), lately=lately, rng=rng)
    assert looked == []
    asked = [wants_pair(Feedback.AUTO, ComparisonSettings(rate=0.3), lately=lately, rng=rng) for _ in range(1000)]
    assert len(looked) == sum(asked) > 200


def plans(n: int, *, seed: int | None = None) -> list[PairPlan]:
    rng = random.Random(5)
    return [plan_pair("policy-0007", seed=seed, rng=rng) for _ in range(n)]


def test_a_plan_is_of_two_draws_from_the_serving_policy() -> None:
    (plan,) = plans(1)
    assert plan.kind is ComparisonKind.SAME_POLICY
    assert plan.policies == ("policy-0007", "policy-0007")


def test_each_side_shows_the_first_draw_half_of_the_time() -> None:
    n = 20_000
    for seed in (None, 3):
        swapped = sum(plan.swapped for plan in plans(n, seed=seed))
        assert abs(swapped - n / 2) <= 4 * sqrt(n / 4)


def test_without_a_seed_all_draws_are_independent() -> None:
    seeds = [seed for plan in plans(2000) for seed in plan.seeds]
    assert len(set(seeds)) >= len(seeds) - 2  # 4,000 of 2**31 meet once in 270 runs
    above = sum(seed > 2**30 for seed in seeds)
    assert abs(above - len(seeds) / 2) <= 4 * sqrt(len(seeds) / 4)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(), st.integers())
def test_the_user_s_seed_decides_both_draws_whatever_the_side(seed: int, one: int, other: int) -> None:
    first = plan_pair("policy-0000", seed=seed, rng=random.Random(one))
    second = plan_pair("policy-0000", seed=seed, rng=random.Random(other))
    drawn_first = first.seeds[::-1] if first.swapped else first.seeds
    drawn_second = second.seeds[::-1] if second.swapped else second.seeds
    assert drawn_first == drawn_second
    assert drawn_first[0] != drawn_first[1]
    assert all(0 <= seed < 2**31 for seed in drawn_first)


def test_neighbouring_seeds_have_nothing_in_common() -> None:
    drawn = [seed for own in range(1000) for seed in plan_pair("p", seed=own, rng=random.Random(0)).seeds]
    assert len(set(drawn)) >= 1999


@given(st.lists(st.text("ab", min_size=1), max_size=4), st.lists(st.sampled_from([" ", "\n", "\t  "]), min_size=5))
def test_texts_that_differ_in_white_space_only_read_the_same(words: list[str], spaces: list[str]) -> None:
    spaced = spaces[0] + "".join(word + space for word, space in zip(words, spaces[1:], strict=False))
    assert same_text(" ".join(words), spaced)
    assert not same_text(" ".join(words), spaced + " more")


# Duels


DUEL = Duel(
    "duel_1", DuelKind.TRIAL, "policy-0001", "policy-0000", 20.0, 100, DuelStatus.RUNNING, 0, 0, 0, 1.0, 1.0, 0.0, 1.0,
    None, "", None,
)  # fmt: skip


@given(st.integers(), st.none() | st.integers(0, 2**31))
def test_a_duel_draws_one_answer_from_each_policy(chance: int, seed: int | None) -> None:
    plan = plan_pair("policy-0000", seed=seed, rng=random.Random(chance), duel=DUEL, share=1.0)
    assert (plan.kind, plan.duel_id) == (ComparisonKind.TRIAL, "duel_1")
    assert plan.policies == (("policy-0001", "policy-0000") if plan.swapped else ("policy-0000", "policy-0001"))
    plain = plan_pair("policy-0000", seed=seed, rng=random.Random(chance))
    assert (plan.seeds, plan.swapped) == (plain.seeds, plain.swapped)


def test_a_duel_takes_its_share_of_the_pairs_and_both_sides() -> None:
    rng = random.Random(0)
    plans = [plan_pair("policy-0000", seed=None, rng=rng, duel=DUEL, share=0.3) for _ in range(2000)]
    duels = [plan for plan in plans if plan.duel_id]
    assert abs(len(duels) / 2000 - 0.3) < 4 * sqrt(0.3 * 0.7 / 2000)
    swapped = sum(plan.swapped for plan in duels) / len(duels)
    assert abs(swapped - 0.5) < 4 * sqrt(0.25 / len(duels))
    assert all(plan == PairPlan(ComparisonKind.SAME_POLICY, ("policy-0000",) * 2, plan.seeds, plan.swapped)
               for plan in plans if not plan.duel_id)  # fmt: skip


# Active pairs


def test_an_active_pair_draws_more_answers_and_shows_the_first_on_either_side() -> None:
    rng, n = random.Random(0), 20_000
    plans = [plan_pair("p", seed=None, rng=rng, active_share=0.8, active_draws=5) for _ in range(n)]
    active = [plan for plan in plans if plan.kind is ComparisonKind.ACTIVE]
    assert abs(len(active) - 0.8 * n) <= 4 * sqrt(n * 0.8 * 0.2)
    assert all(len({*plan.seeds, *plan.more_seeds}) == 5 for plan in active)
    assert abs(sum(plan.first for plan in active) - len(active) / 2) <= 4 * sqrt(len(active) / 4)
    assert all(plan.more_seeds == () for plan in plans if plan.kind is ComparisonKind.SAME_POLICY)


@given(st.integers(0, 2**31), st.integers())
def test_the_user_s_seed_decides_all_draws_of_an_active_pair(seed: int, chance: int) -> None:
    one = plan_pair("p", seed=seed, rng=random.Random(chance), active_share=1.0)
    other = plan_pair("p", seed=seed, rng=random.Random(chance + 1), active_share=1.0)
    plain = plan_pair("p", seed=seed, rng=random.Random(chance))
    assert one.more_seeds == other.more_seeds
    assert one.seeds[one.first] == other.seeds[other.first] == plain.seeds[plain.first]


def test_a_duel_is_never_active() -> None:
    rng = random.Random(0)
    plans = [plan_pair("p", seed=None, rng=rng, duel=DUEL, share=0.5, active_share=1.0) for _ in range(200)]
    assert {(plan.kind, plan.more_seeds == ()) for plan in plans} == {
        (ComparisonKind.TRIAL, True),
        (ComparisonKind.ACTIVE, False),
    }


def test_at_least_a_fifth_of_the_pairs_stays_random() -> None:
    with pytest.raises(ValidationError, match="active_share"):
        ComparisonSettings(active_share=0.81)


def test_the_most_disputed_is_where_the_heads_differ_about_the_difference() -> None:
    first = [5.0, -5.0]
    better = [8.0, -2.0]  # both heads: 3 better
    disputed = [5.5, -5.5]  # one: better, the other: worse
    assert most_disputed(first, [better, disputed]) == 1
    assert most_disputed(first, [disputed, better]) == 0
    assert most_disputed([0.0, 0.0], [better, disputed]) == 1, "5.5 and -5.5 are further apart than 8 and -2"


SCORES = st.lists(st.integers(-8, 8).map(float), min_size=3, max_size=3)


@given(SCORES, st.lists(SCORES, min_size=1, max_size=4), st.integers(-8, 8))
def test_what_all_heads_see_alike_changes_no_choice(
    first: list[float], challengers: list[list[float]], shift: int
) -> None:
    chosen = most_disputed(first, challengers)
    moved = [[score + shift for score in scores] for scores in challengers]
    assert most_disputed(first, moved) == chosen
    assert most_disputed([score * 4 for score in first], [[s * 4 for s in scores] for scores in challengers]) == chosen


@given(SCORES, st.lists(st.integers(-8, 8), min_size=1, max_size=4))
def test_heads_that_agree_on_every_difference_dispute_nothing(first: list[float], steps: list[int]) -> None:
    assert most_disputed(first, [[score + step for score in first] for step in steps]) is None
    assert most_disputed(first[:1], [[float(step)] for step in steps]) is None, "one head cannot disagree"


def test_the_best_has_the_highest_mean_and_comes_first_among_equals() -> None:
    assert best([[0.0, 0.0], [3.0, -1.0], [4.0, -5.0]]) == 1
    assert best([[1.0, 1.0], [2.0, 0.0]]) == 0
