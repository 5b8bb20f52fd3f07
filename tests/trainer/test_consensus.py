"""What the others make of a vote."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from accelerate import Accelerator

from tests.trainer.test_reward_model import make_pairs
from trainer.backbone import Backbone
from trainer.consensus import NO_WORD, expected, halves
from trainer.reward_model import Pair, RewardConfig

MakeBackbone = Callable[..., Backbone]
CONFIG = RewardConfig(batch=8, heads=2, learning_rate=0.02)


def flipped(pair: Pair) -> Pair:
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def test_halves_have_about_as_many_votes() -> None:
    voters = ["a"] * 50 + ["b"] * 30 + ["c"] * 15 + ["d"] * 5
    half = halves(voters)
    assert half == halves(voters[::-1])
    assert set(Counter(half[voter] for voter in voters).values()) == {50}


def test_who_votes_against_the_others_is_told_from_them(tiny_backbone: MakeBackbone) -> None:
    pairs = make_pairs(420)
    voters = [f"rater {i % 7}" for i in range(420)]
    pairs = [flipped(pair) if voter == "rater 6" else pair for voter, pair in zip(voters, pairs, strict=True)]
    seen: list[int] = []
    chances = expected(
        tiny_backbone(), voters, pairs, CONFIG, distrusted=(), at_least=50, accelerator=Accelerator(),
        on_step=lambda step, figures: seen.append(step),
    )  # fmt: skip
    by_voter = {voter: [c for c, v in zip(chances, voters, strict=True) if v == voter] for voter in set(voters)}
    agreed = {voter: sum(chance > 0.5 for chance in theirs) / 60 for voter, theirs in by_voter.items()}
    assert agreed.pop("rater 6") < 0.25
    assert min(agreed.values()) > 0.75
    assert seen == sorted(set(seen)), "progress goes on"


def test_nothing_is_learned_of_those_who_are_distrusted(tiny_backbone: MakeBackbone) -> None:
    pairs = make_pairs(300)
    voters = [f"rater {i % 6}" for i in range(300)]
    liars = {"rater 0", "rater 1", "rater 2", "rater 3"}
    pairs = [flipped(pair) if voter in liars else pair for voter, pair in zip(voters, pairs, strict=True)]
    chances = expected(tiny_backbone(), voters, pairs, CONFIG, distrusted=liars, at_least=20, accelerator=Accelerator())
    honest = [chance for chance, voter in zip(chances, voters, strict=True) if voter not in liars]
    assert sum(chance > 0.5 for chance in honest) / len(honest) > 0.7
    lies = [chance for chance, voter in zip(chances, voters, strict=True) if voter in liars]
    assert sum(chance > 0.5 for chance in lies) / len(lies) < 0.3, "and they are judged all the same"


def test_a_few_raters_or_votes_are_no_crowd(tiny_backbone: MakeBackbone) -> None:
    pairs = make_pairs(40)
    for voters, at_least in (([f"{i % 4}" for i in range(40)], 1), ([f"{i % 8}" for i in range(40)], 30)):
        chances = expected(
            tiny_backbone(), voters, pairs, CONFIG, distrusted=(), at_least=at_least, accelerator=Accelerator()
        )
        assert chances == [NO_WORD] * 40
