"""What the benches on noise, sides and hostile votes share: the defences of a run, each of which can be left out.

A run (`trainer.job`) has them all. Here a reward model is made from the same votes with some of them, so that each
shows what it is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.nights import Lab
from data.raters import Standing
from data.settings import TrainingSettings
from trainer import consensus
from trainer.preferences import Preferences, prepare, usable
from trainer.raters import standings
from trainer.reward_model import RewardConfig

Vote = dict[str, Any]

NEVER = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Defences:
    quarantine: bool = True
    """Leave out who pushes a phrase, takes one side, or votes as a coin does."""
    weights: bool = True
    """Weigh votes by the rater's reliability."""
    cap: bool = True
    """Let nobody's votes weigh more than a share of all."""
    side_term: bool = True
    """Learn what the place of an answer is worth."""

    def reward(self, seed: int) -> RewardConfig:
        return RewardConfig(seed=seed, side_term=self.side_term)


NONE = Defences(quarantine=False, weights=False, cap=False, side_term=False)


def rate(lab: Lab, votes: Sequence[Vote], defences: Defences) -> dict[str, Standing]:
    """What a run finds of each rater."""
    training = TrainingSettings()
    ranked = usable(
        votes, lab.chat, max_prompt_tokens=training.max_prompt_tokens, max_answer_tokens=training.max_answer_tokens
    )
    at_least = training.min_votes // 2 if defences.quarantine or defences.weights else NEVER
    return standings(consensus.judge(lab.backbone, ranked, distrusted=(), at_least=at_least), {})


def weigh(lab: Lab, votes: Sequence[Vote], found: dict[str, Standing], defences: Defences) -> Preferences:
    """The votes as a run learns from them."""
    training = TrainingSettings()
    left_out = {voter for voter, standing in found.items() if standing.suspicion} if defences.quarantine else set()
    return prepare(
        [vote for vote in votes if vote["voter"] not in left_out],
        lab.trusted,
        lab.chat,
        rater_share=training.max_rater_share if defences.cap else 1.0,
        uncapped_votes=training.uncapped_votes,
        trusted_weight=training.trusted_weight,
        max_prompt_tokens=training.max_prompt_tokens,
        max_answer_tokens=training.max_answer_tokens,
        reliability={voter: standing.reliability for voter, standing in found.items()} if defences.weights else None,
    )
