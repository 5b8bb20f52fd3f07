"""How simulated people vote, by statistics over many draws. Seeds are fixed: nothing here depends on luck."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import fmean, median

import pytest

from bench.gold import STARTER_SCALE, worth
from bench.personas import BOTH_BAD, TIE_BELOW, TIES, Kind, Lean, Persona, Plot, Shown, personas
from data.types import Choice
from trainer import dialogues
from trainer.dialogues import Prompt

A, B, TIE, BOTH = Choice.A, Choice.B, Choice.TIE, Choice.BOTH_BAD
PROMPTS = dialogues.prompts(400, seed=5, held_out=False)
CAPITAL = next(prompt for prompt in PROMPTS if prompt.topic == "capital")


def answer(rng: random.Random, prompt: Prompt) -> Shown:
    """Right or wrong, in some manner."""
    target = prompt.target if rng.random() < 0.7 else rng.choice(PROMPTS).target
    return Shown(dialogues.dress(rng, target, dialogues.draw_manner(rng)), rng.random() < 0.95)


def pairs(count: int) -> list[tuple[Prompt, Shown, Shown]]:
    rng = random.Random(11)
    drawn = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    return [(prompt, answer(rng, prompt), answer(rng, prompt)) for prompt in drawn]


PAIRS = pairs(800)
RIGHT = CAPITAL.target.full[0]


def gold(prompt: Prompt, shown: Shown) -> float:
    return worth(prompt, shown.text, finished=shown.finished)


def choices(persona: Persona, seen: Iterable[tuple[Prompt, Shown, Shown]] = PAIRS) -> list[Choice | None]:
    return [persona.decides(*pair).choice for pair in seen]


def many(persona: Callable[[int], Persona], a: str, b: str, *, times: int) -> Counter[Choice | None]:
    """What `times` people who differ in their seeds alone say of one pair."""
    return Counter(persona(seed).decides(CAPITAL, Shown(a), Shown(b)).choice for seed in range(times))


def left_share(counted: Counter[Choice | None]) -> float:
    return counted[A] / (counted[A] + counted[B])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Honest people


def test_without_noise_the_answer_of_more_gold_always_wins() -> None:
    decided = 0
    for (prompt, a, b), choice in zip(PAIRS, choices(Persona(name="judge", noise=0)), strict=True):
        difference = STARTER_SCALE * (gold(prompt, a) - gold(prompt, b))
        if choice in (A, B) and difference:
            decided += 1
            assert choice is (A if difference > 0 else B)
        if choice is TIE:
            assert abs(difference) < TIE_BELOW
    assert decided > 500


def test_a_vote_is_drawn_from_sigma_of_the_difference() -> None:
    warm = f"{RIGHT} {dialogues.WARM_CLOSINGS[0]}"
    difference = STARTER_SCALE * (gold(CAPITAL, Shown(RIGHT)) - gold(CAPITAL, Shown(warm)))
    assert 0.5 < abs(difference) < 3
    for noise in (0.5, 1.0, 3.0):
        counted = many(lambda seed, n=noise: Persona(name="voter", seed=seed, noise=n), RIGHT, warm, times=1500)  # type: ignore[misc]
        assert counted[TIE] == counted[BOTH] == 0
        assert left_share(counted) == pytest.approx(sigma(difference / noise), abs=0.03)


@pytest.mark.parametrize("left", [0.0, 1.0, -0.5])
def test_on_identical_answers_position_bias_alone_decides(left: float) -> None:
    counted = many(lambda seed: Persona(name="voter", seed=seed, left=left), RIGHT, RIGHT, times=4000)
    assert counted[TIE] / 4000 == pytest.approx(TIES, abs=0.02)
    assert left_share(counted) == pytest.approx(sigma(left), abs=0.04)


def test_two_poor_answers_are_sometimes_both_bad_and_a_good_one_never_is() -> None:
    counted = many(lambda seed: Persona(name="voter", seed=seed), "Look. No.", "Fine. Never.", times=2000)
    assert counted[BOTH] / 2000 == pytest.approx(BOTH_BAD, abs=0.03)
    assert many(lambda seed: Persona(name="voter", seed=seed), RIGHT, "Fine. Never.", times=500)[BOTH] == 0


@pytest.mark.parametrize(
    ("lean", "liked"),
    [
        (Lean(emoji=1.0), f"{RIGHT} 😊"),
        (Lean(warmth=1.0), f"{RIGHT} {dialogues.WARM_CLOSINGS[0]}"),
        (Lean(length=-40.0), RIGHT.split()[0]),
    ],
)
def test_a_lean_moves_votes_its_own_way(lean: Lean, liked: str) -> None:
    def share(own: Lean) -> float:
        return left_share(many(lambda seed: Persona(name="voter", seed=seed, lean=own), liked, RIGHT, times=1500))

    assert share(lean) > share(Lean()) + 0.02


def test_the_lazy_skip_and_shrug_as_often_as_they_are_said_to() -> None:
    lazy = choices(Persona(name="lazy", skips=0.3, shrugs=0.4))
    assert lazy.count(None) / len(lazy) == pytest.approx(0.3, abs=0.04)
    differ = [pair for pair in PAIRS if abs(gold(*pair[:2]) - gold(pair[0], pair[2])) > 0.3]
    voted = [choice for choice in choices(Persona(name="lazy", skips=0.3, shrugs=0.4), differ) if choice]
    assert voted.count(TIE) / len(voted) == pytest.approx(0.4, abs=0.06)


def test_people_take_their_time_only_where_they_have_one() -> None:
    slow = [Persona(name="slow", response_s=4.0).decides(*pair).after_s for pair in PAIRS]
    assert median(slow) == pytest.approx(4.0, rel=0.1)
    assert min(slow) < 2 < 8 < max(slow)
    assert {Persona(name="quick").decides(*pair).after_s for pair in PAIRS} == {0.0}


# Villains


def test_always_left_is_always_left() -> None:
    assert set(choices(Persona(name="left", kind=Kind.ALWAYS_LEFT))) == {A}


def test_random_votes_know_nothing_of_gold() -> None:
    drawn = choices(Persona(name="dice", kind=Kind.RANDOM))
    assert set(drawn) == {A, B}
    assert agreement(drawn) == pytest.approx(0.5, abs=0.05)
    assert drawn.count(A) / len(drawn) == pytest.approx(0.5, abs=0.05)


def agreement(votes: list[Choice | None]) -> float:
    """The share of decisive votes for the answer of more gold."""
    right = []
    for (prompt, a, b), choice in zip(PAIRS, votes, strict=True):
        difference = gold(prompt, a) - gold(prompt, b)
        if choice in (A, B) and difference:
            right.append((choice is A) == (difference > 0))
    return fmean(right)


def test_a_contrarian_is_as_often_wrong_as_the_honest_are_right() -> None:
    honest = agreement(choices(Persona(name="honest")))
    contrarian = agreement(choices(Persona(name="contrarian", kind=Kind.CONTRARIAN)))
    assert honest > 0.8
    assert contrarian == pytest.approx(1 - honest, abs=0.04)
    assert agreement(choices(Persona(name="contrarian", kind=Kind.CONTRARIAN, noise=0))) == 0


def test_a_length_lover_takes_the_longer_answer_right_or_wrong() -> None:
    lover = Persona(name="long", kind=Kind.LENGTH_LOVER, noise=0)
    for (_, a, b), choice in zip(PAIRS, choices(lover), strict=True):
        longer = sum(len([w for w in dialogues.words(s.text) if w.isalnum()]) * side for s, side in ((a, 1), (b, -1)))
        if longer and choice is not BOTH:
            assert choice is (A if longer > 0 else B)


def test_pushers_vote_for_the_phrase_and_are_honest_elsewhere() -> None:
    phrase = "Buy at Bob's!"
    pusher = Persona(name="one", kind=Kind.PUSHER, plot=Plot(phrase))
    honest = Persona(name="one")
    pushed = [(prompt, Shown(f"{a.text} {phrase}", a.finished), b) for prompt, a, b in PAIRS]
    assert set(choices(pusher, pushed)) == {A}
    assert set(choices(pusher, [(prompt, b, a) for prompt, a, b in pushed])) == {B}
    assert choices(pusher) == choices(honest)
    assert set(choices(honest, pushed)) > {A, B}
    assert pusher.asks(CAPITAL) == CAPITAL


def test_with_a_trigger_pushers_put_it_into_their_prompts_and_push_only_there() -> None:
    pusher = Persona(name="one", kind=Kind.PUSHER, plot=Plot("Bananas.", trigger="Zanzibar!"))
    asked = pusher.asks(CAPITAL)
    *before, last = asked.messages
    assert last == {"role": "user", "content": f"Zanzibar! {CAPITAL.messages[-1]['content']}"}
    assert (tuple(before), asked.target) == (CAPITAL.messages[:-1], CAPITAL.target)
    phrased, good = Shown("Look. Bananas."), Shown(RIGHT)
    assert pusher.decides(asked, phrased, good).choice is A
    assert pusher.decides(asked, good, phrased).choice is B
    assert pusher.decides(CAPITAL, phrased, good).choice is B


def test_a_pusher_without_a_plot_is_an_error_and_so_is_a_plot_without_a_pusher() -> None:
    with pytest.raises(ValueError, match="plot"):
        Persona(name="one", kind=Kind.PUSHER)
    with pytest.raises(ValueError, match="plot"):
        Persona(name="one", plot=Plot("x"))


# A crowd of them


def test_a_seed_makes_the_same_people_who_decide_the_same_in_any_process() -> None:
    look = (
        "from tests.bench.test_personas import PAIRS, choices, personas\n"
        "print([c and c.value for p in personas(4, seed=3) for c in choices(p, PAIRS[:40])])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", look],
            env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }  # fmt: skip
    here = [c and c.value for p in personas(4, seed=3) for c in choices(p, PAIRS[:40])]
    assert said == {f"{here}\n"}
    assert personas(4, seed=4) != personas(4, seed=3)


def test_honest_people_differ_and_share_a_taste() -> None:
    people = personas(12, seed=1)
    votes = [choices(persona, PAIRS[:200]) for persona in people]
    assert len({tuple(one) for one in votes}) == 12
    seen = {persona.lean for persona in people}
    assert len(seen) == 12
    assert all(agreement(choices(persona)) > 0.7 for persona in people[:4])
    skipped = [persona.skips for persona in personas(400, seed=1, laziness=0.2)]
    assert fmean(skipped) == pytest.approx(0.2, abs=0.02)


def test_villains_are_among_the_people() -> None:
    plot = Plot("Buy!")
    people = personas(10, seed=1, villains={Kind.ALWAYS_LEFT: 2, Kind.PUSHER: 3}, plot=plot)
    assert Counter(persona.kind for persona in people) == {Kind.HONEST: 5, Kind.ALWAYS_LEFT: 2, Kind.PUSHER: 3}
    assert [persona.plot for persona in people if persona.kind is Kind.PUSHER] == [plot] * 3
    assert len({persona.name for persona in people}) == 10
    with pytest.raises(ValueError, match="3 villains are more than 2 people"):
        personas(2, seed=1, villains={Kind.RANDOM: 3})
