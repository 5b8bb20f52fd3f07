"""What the others make of a vote."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from tests.trainer.test_reward_model import make_pairs
from trainer.backbone import Backbone
from trainer.consensus import NO_WORD, differences, expected, judge, parts
from trainer.encoding import Answer, collate
from trainer.reward_model import Pair

MakeBackbone = Callable[..., Backbone]
TASTE = torch.tensor([2.0, -1.0] + [0.0] * 10, dtype=torch.float64)


def crowd(people: int, votes: int, *, foes: Collection[str] = ()) -> tuple[torch.Tensor, list[str]]:
    """All like the same direction, but for the foes, who like its opposite; each vote is drawn from sigma."""
    generator = torch.Generator().manual_seed(0)
    voters = [f"rater {i % people}" for i in range(people * votes)]
    seen = torch.randn(len(voters), 12, generator=generator, dtype=torch.float64)
    sign = torch.tensor([-1.0 if voter in foes else 1.0 for voter in voters], dtype=torch.float64)
    drawn = torch.rand(len(voters), generator=generator, dtype=torch.float64)
    chosen = torch.where(drawn < torch.sigmoid(sign * (seen @ TASTE)), 1.0, -1.0)
    return seen * chosen[:, None], voters


def agreement(chances: list[float], voters: list[str]) -> dict[str, float]:
    """How many of each rater's votes the others would have cast."""
    agreed = Counter(voter for voter, chance in zip(voters, chances, strict=True) if chance > 0.5)
    return {voter: agreed[voter] / count for voter, count in Counter(voters).items()}


def test_parts_have_about_as_many_votes() -> None:
    voters = ["a"] * 50 + ["b"] * 48 + ["c"] * 30 + ["d"] * 20 + ["e"] * 50 + ["f"] * 52
    part = parts(voters)
    assert part == parts(voters[::-1])
    assert sorted(Counter(part[voter] for voter in voters).values()) == [48, 50, 50, 50, 52]


def test_the_chances_are_those_with_which_people_vote() -> None:
    seen, voters = crowd(10, 300)
    chances = torch.tensor(expected(seen, voters, distrusted=()))
    told = torch.nn.functional.logsigmoid(seen @ TASTE)
    assert chances.log().mean().item() == pytest.approx(told.mean().item(), abs=0.02), "as the taste itself has it"
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):
        sure = torch.maximum(chances, 1 - chances)
        here = (sure > low) & (sure <= high)
        assert (chances[here] > 0.5).double().mean().item() == pytest.approx(sure[here].mean().item(), abs=0.05)


def test_who_votes_against_the_others_is_told_from_them() -> None:
    seen, voters = crowd(8, 60, foes={"rater 7"})
    agreed = agreement(expected(seen, voters, distrusted=()), voters)
    assert agreed.pop("rater 7") < 0.3
    assert min(agreed.values()) > 0.65


def test_nobody_is_judged_by_their_own_votes() -> None:
    """One rater's votes alone have a mark: whoever learned from them would know it."""
    seen, voters = crowd(6, 50)
    mine = torch.tensor([voter == "rater 0" for voter in voters])
    seen[mine] = 0.0
    seen[mine, 5] = 3.0
    seen[~mine, 5] = 0.0
    chances = torch.tensor(expected(seen, voters, distrusted=()))
    assert chances[mine].tolist() == pytest.approx([0.5] * int(mine.sum()))


def test_nothing_is_learned_of_those_who_are_distrusted() -> None:
    foes = {f"rater {i}" for i in range(6)}
    seen, voters = crowd(9, 60, foes=foes)
    agreed = agreement(expected(seen, voters, distrusted=foes), voters)
    assert max(agreed[foe] for foe in foes) < 0.35, "and they are judged all the same"
    assert min(share for voter, share in agreed.items() if voter not in foes) > 0.65


def test_the_distrusted_leave_everybody_judged_however_many_votes_they_have() -> None:
    bots = {f"bot {i}" for i in range(4)}
    seen, voters = crowd(24, 60)
    flooding = [f"bot {i % 4}" for i in range(1600)]
    more, _ = crowd(1, len(flooding))
    chances = expected(torch.cat([seen, more]), voters + flooding, distrusted=bots)
    assert 0.5 not in chances
    assert chances[: len(voters)] == expected(seen, voters, distrusted=())


def test_differences_are_of_the_base_whatever_adapter_there_is(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("reward")
    pairs = make_pairs(9)
    found = differences(backbone, pairs)
    for pair, difference in zip(pairs, found, strict=True):
        with torch.no_grad():
            states = backbone.response_means(collate([pair.chosen, pair.rejected]))[:, 0]
        assert torch.allclose(difference, states[0] - states[1], atol=1e-10)


def test_who_waits_for_the_differences_is_told_of_each_step_and_may_end_them(tiny_backbone: MakeBackbone) -> None:
    seen: list[tuple[int, int]] = []

    def on_step(step: int, steps: int) -> None:
        seen.append((step, steps))
        if len(seen) == 2:
            raise KeyboardInterrupt

    query = tuple(range(3, 13)) * 100
    pairs = [Pair(Answer(query, (3, 4), True), Answer(query, (5, 4), True))] * 12
    with pytest.raises(KeyboardInterrupt):
        differences(tiny_backbone("reward"), pairs, on_step=on_step)
    assert seen == [(0, 3), (1, 3)]


def judged(backbone: Backbone, people: int, *, at_least: int = 10, distrusted: Collection[str] = ()) -> list[float]:
    pairs = make_pairs(120)
    said = {
        "chosen": [{"content": "yes"}], "rejected": [{"content": "no"}],
        "chosen_policy": "policy-0001", "rejected_policy": "policy-0000",
    }  # fmt: skip
    votes: list[tuple[dict[str, Any], Any]] = [
        ({"voter": f"rater {i % people}", **said}, pair) for i, pair in enumerate(pairs)
    ]
    judged = judge(backbone, votes, distrusted=distrusted, at_least=at_least)
    assert {vote.policies for vote in judged} == {frozenset({"policy-0000", "policy-0001"})}
    return [vote.expected for vote in judged]


def test_a_few_raters_or_votes_are_no_crowd(tiny_backbone: MakeBackbone) -> None:
    assert judged(tiny_backbone(), 4) == [NO_WORD] * 120
    assert judged(tiny_backbone(), 6, at_least=121) == [NO_WORD] * 120
    assert judged(tiny_backbone(), 6, distrusted=("rater 4", "rater 5")) == [NO_WORD] * 120
    chances = judged(tiny_backbone(), 6)
    assert sum(chance > 0.5 for chance in chances) > 70
