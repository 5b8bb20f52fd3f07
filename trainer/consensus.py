"""What the other raters make of a vote, in seconds: a logistic regression on what the frozen base holds of the answers.

Bradley-Terry on the difference of the two answers' mean last hidden states, fitted by Newton's method under a Gaussian
prior. Each fifth of the trusted raters is judged by a fit to the votes of the other four fifths. Such a fit knows less
than a reward model of all votes, and more than one of half of them: see DECISIONS.md.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.backbone import Backbone
from trainer.encoding import by_length, collate
from trainer.raters import CROWD, JudgedVote
from trainer.reward_model import Pair

NO_WORD = 0.5
"""p of a vote that nobody else has anything to say about."""
PRIOR = 1.0
"""Standard deviation, before any vote, of what a pair's difference is worth: logits."""

OnStep = Callable[[int, int], None]
"""Called with the number of a step, from 0, and how many there are."""


def judge(
    backbone: Backbone,
    votes: Sequence[tuple[Mapping[str, Any], Pair]],
    *,
    distrusted: Collection[str],
    at_least: int,
    on_step: OnStep = lambda step, steps: None,
) -> list[JudgedVote]:
    """The decisive votes, each with the chance that the consensus of the other raters gives to it; NO_WORD for all
    where there are not CROWD trusted raters, or not `at_least` votes to learn from.

    Args:
        votes: as `trainer.preferences.usable` yields them.
        distrusted: raters of whose votes nothing is learned here; they are judged like the others.
        on_step: see `differences`.
    """
    decisive = [(record, pair) for record, pair in votes if not pair.tie]
    voters = [record["voter"] for record, _ in decisive]
    chances = [NO_WORD] * len(decisive)
    trusted = [voter for voter in voters if voter not in distrusted]
    if len(set(trusted)) >= CROWD and len(trusted) >= at_least:
        chances = expected(
            differences(backbone, [pair for _, pair in decisive], on_step=on_step), voters, distrusted=distrusted
        )
    return [
        JudgedVote(
            rater=record["voter"],
            chosen=record["chosen"][0]["content"],
            rejected=record["rejected"][0]["content"],
            first=pair.shown > 0,
            expected=chance,
            policies=frozenset({record["chosen_policy"], record["rejected_policy"]}),
        )
        for (record, pair), chance in zip(decisive, chances, strict=True)
    ]


def is_one(judged: Sequence[JudgedVote]) -> bool:
    """Whether there was a consensus to judge votes by."""
    return any(vote.expected != NO_WORD for vote in judged)


@torch.no_grad()
def differences(backbone: Backbone, pairs: Sequence[Pair], *, on_step: OnStep = lambda step, steps: None) -> Tensor:
    """(N, d) mean state of the chosen response minus that of the rejected one, by the base; float64, on the CPU.

    Args:
        on_step: called after each batch with its number, from 0, and how many there are: of many long votes they take
            the better part of an hour. What it raises ends this.
    """
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    states = torch.empty(len(answers), backbone.hidden_size, dtype=torch.float64)
    groups = list(by_length([len(answer) for answer in answers], 8192))
    for step, group in enumerate(groups):
        batch = collate([answers[i] for i in group], backbone.device)
        states[group] = backbone.response_means(batch)[:, 0].double().cpu()
        on_step(step, len(groups))
    return states[: len(pairs)] - states[len(pairs) :]


def expected(differences: Tensor, voters: Sequence[str], *, distrusted: Collection[str]) -> list[float]:
    """Of each vote the chance that a fit to the votes of other raters gives to it.

    Args:
        differences: (N, d) of what was chosen and what was not.
    """
    part = parts([voter for voter in voters if voter not in distrusted])
    of_vote = torch.tensor([part.get(voter, CROWD) for voter in voters])
    trusted = of_vote < CROWD
    # Of unit length in the mean, a pair is worth N(0, PRIOR^2) to weights of N(0, PRIOR^2) each.
    scaled = differences / (differences[trusted].std(dim=0, correction=0) + 1e-9) / differences.shape[1] ** 0.5
    chances = torch.empty(len(voters), dtype=torch.float64)
    for number in range(CROWD + 1):  # the distrusted, last, by a fit to all trusted votes
        judged = of_vote == number
        chances[judged] = torch.sigmoid(scaled[judged] @ _fit(scaled[~judged & trusted]))
    return [float(chance) for chance in chances]


def parts(voters: Sequence[str]) -> dict[str, int]:
    """The part of each rater, of CROWD parts with about as many votes each."""
    sizes = [0] * CROWD
    part = {}
    for voter, count in sorted(Counter(voters).items(), key=lambda item: (-item[1], item[0])):
        part[voter] = sizes.index(min(sizes))
        sizes[part[voter]] += count
    return part


def _fit(chosen: Tensor) -> Tensor:
    """(d,) the likeliest weights under which each row has the better sign."""
    weights = torch.zeros(chosen.shape[1], dtype=chosen.dtype)
    prior = torch.eye(chosen.shape[1], dtype=chosen.dtype) / PRIOR**2
    for _ in range(8):  # the likelihood is concave, and the steps shrink quadratically
        p = torch.sigmoid(chosen @ weights)
        gradient = chosen.T @ (1 - p) - weights / PRIOR**2
        weights = weights + torch.linalg.solve((chosen * (p * (1 - p))[:, None]).T @ chosen + prior, gradient)
    return weights
