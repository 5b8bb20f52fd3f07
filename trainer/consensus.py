"""What the other raters make of a vote: reward models of half of the raters each judge the votes of the other half."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from trainer import reward_model
from trainer.backbone import Backbone
from trainer.raters import CROWD, JudgedVote
from trainer.reward_model import OnStep, Pair, RewardConfig

NO_WORD = 0.5
"""Of a vote that nobody else has anything to say about."""


def halves(voters: Sequence[str]) -> dict[str, int]:
    """0 or 1 for each rater, such that both halves have about as many votes."""
    sizes = [0, 0]
    half = {}
    for voter, count in sorted(Counter(voters).items(), key=lambda item: (-item[1], item[0])):
        half[voter] = sizes.index(min(sizes))
        sizes[half[voter]] += count
    return half


def steps(pairs: int, config: RewardConfig) -> int:
    """How many optimizer steps `expected` takes for so many pairs, within one."""
    return -(-pairs // config.batch)


def judge(
    backbone: Backbone,
    votes: Sequence[tuple[Mapping[str, Any], Pair]],
    config: RewardConfig,
    *,
    distrusted: Collection[str],
    at_least: int,
    accelerator: Accelerator,
    on_step: OnStep = lambda step, figures: None,
) -> list[JudgedVote]:
    """The decisive votes, each with what the others make of it; see `expected`.

    Args:
        votes: as `trainer.preferences.usable` yields them.
    """
    chances = expected(
        backbone,
        [record["voter"] for record, _ in votes],
        [pair for _, pair in votes],
        config,
        distrusted=distrusted,
        at_least=at_least,
        accelerator=accelerator,
        on_step=on_step,
    )
    return [
        JudgedVote(
            rater=record["voter"],
            chosen=record["chosen"][0]["content"],
            rejected=record["rejected"][0]["content"],
            first=pair.shown > 0,
            expected=chance,
        )
        for (record, pair), chance in zip(votes, chances, strict=True)
        if not pair.tie
    ]


def expected(
    backbone: Backbone,
    voters: Sequence[str],
    pairs: Sequence[Pair],
    config: RewardConfig,
    *,
    distrusted: Collection[str],
    at_least: int,
    accelerator: Accelerator,
    on_step: OnStep = lambda step, figures: None,
) -> list[float]:
    """Of each pair the chance that the other raters' consensus gives to the vote; NO_WORD where there are not CROWD
    raters, or not `at_least` decisive votes in each half.

    Args:
        voters: who voted on each pair.
        distrusted: raters of whose votes nothing is learned here; they are judged like the others.
    """
    half = halves(voters)
    chances = [NO_WORD] * len(pairs)
    halved: list[list[Pair]] = [[], []]
    for voter, pair in zip(voters, pairs, strict=True):
        if voter not in distrusted:
            halved[half[voter]].append(pair)
    if len(half) < CROWD or any(sum(not pair.tie for pair in side) < at_least for side in halved):
        return chances
    once = replace(config, epochs=1)  # a second one agrees with one vote in a hundred more, and takes as long again
    done = 0
    for side, others in enumerate(reversed(halved)):

        def count_on(step: int, figures: dict[str, float], done: int = done) -> None:
            on_step(done + step, figures)

        model = reward_model.train(backbone, "consensus", others, once, accelerator=accelerator, on_step=count_on)
        done += steps(len(others), once)
        judged = [i for i, voter in enumerate(voters) if half[voter] == side]
        rewards = model.rewards([pairs[i].chosen for i in judged] + [pairs[i].rejected for i in judged]).mean(dim=1)
        differences = rewards[: len(judged)] - rewards[len(judged) :]
        for i, chance in zip(judged, torch.sigmoid(differences).tolist(), strict=True):
            chances[i] = chance
    return chances
