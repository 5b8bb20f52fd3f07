"""From votes to pairs: who is on which side of the splits, and how much a vote weighs.

A vote's side is decided by a hash of the person who chatted and the conversation, so that no conversation is on
two sides and a vote never changes sides between runs. `both_bad` ranks nothing and stays out.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from data.trusted import TrustedPair
from trainer.encoding import ChatFormat
from trainer.reward_model import Pair
from trainer.rollout import Query


class Split(StrEnum):
    TRAIN = "train"
    """Fits the reward model; its prompts are PPO's."""
    JUDGE = "judge"
    """Fits the judge, a second reward model that the policy was never trained against."""
    HELD_OUT = "held_out"
    """Measures both reward models, and the candidate by its prompts."""


@dataclass(frozen=True, slots=True)
class UsedVote:
    """A vote as a run learned from it."""

    vote: str
    choice: str
    split: Split
    weight: float


@dataclass(frozen=True, slots=True)
class Preferences:
    pairs: dict[Split, list[Pair]] = field(default_factory=lambda: {split: [] for split in Split})
    queries: dict[Split, list[Query]] = field(default_factory=lambda: {split: [] for split in Split})
    """Distinct prompts of the votes on each side, in order of the votes."""
    votes: list[UsedVote] = field(default_factory=list)


def split_of(user: str, conversation: str) -> Split:
    """70 % train, 20 % judge, 10 % held out."""
    digest = hashlib.sha256(f"{user}\0{conversation}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return Split.TRAIN if place < 0.7 else Split.JUDGE if place < 0.9 else Split.HELD_OUT


def voter_weights(votes: Mapping[str, int], *, share: float, uncapped: int) -> dict[str, float]:
    """What one vote of each voter weighs, so that nobody's votes together weigh more than `share` of all.

    Args:
        votes: how many votes each voter cast.
        share: the largest part of the total weight that one voter may have, in (0, 1].
        uncapped: a voter's first so many votes count in full whatever the share, or a small crowd could not learn.
    """
    counts = sorted(votes.values(), reverse=True)
    limit = float(counts[0]) if counts else 0.0
    for capped in range(len(counts) + 1):
        # With the `capped` busiest voters at the limit L: L = share * (capped * L + the votes of the others).
        others = sum(counts[capped:])
        if share * capped >= 1:
            limit = 0.0
            break
        limit = share * others / (1 - share * capped)
        if capped == len(counts) or counts[capped] <= limit:
            break
    limit = max(limit, float(uncapped))
    return {voter: min(1.0, limit / count) for voter, count in votes.items()}


def prepare(
    records: Iterable[Mapping[str, Any]],
    trusted: Iterable[TrustedPair],
    chat: ChatFormat,
    *,
    rater_share: float,
    uncapped_votes: int,
    trusted_weight: float,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> Preferences:
    """Split, weigh and tokenize.

    Args:
        records: votes as `data.comparisons.export_preferences` yields them.
        trusted: an operator's pairs; all of them train the reward model.
        max_prompt_tokens: votes on longer prompts are left out.
        max_answer_tokens: votes on longer answers are left out.
    """
    preferences = Preferences()
    usable: dict[Split, list[tuple[Mapping[str, Any], Pair]]] = {split: [] for split in Split}
    for record in records:
        if record["choice"] == "both_bad":
            continue
        pair = _pair(chat, record["prompt"], record["chosen"][0]["content"], record["rejected"][0]["content"])
        if _fits(pair, max_prompt_tokens, max_answer_tokens):
            usable[split_of(record["user"], record["conversation"])].append((record, pair))
    for split, rows in usable.items():
        counts = Counter(record["voter"] for record, _ in rows)
        weights = voter_weights(counts, share=rater_share, uncapped=uncapped_votes)
        for record, pair in rows:
            weight = weights[record["voter"]]
            weighed = Pair(pair.chosen, pair.rejected, tie=record["choice"] == "tie", weight=weight)
            preferences.pairs[split].append(weighed)
            preferences.votes.append(UsedVote(record["vote"], record["choice"], split, weight))
        preferences.queries[split].extend(dict.fromkeys(pair.chosen.query for _, pair in rows))
    for trusted_pair in trusted:
        pair = _pair(chat, trusted_pair.messages, trusted_pair.chosen, trusted_pair.rejected)
        if _fits(pair, max_prompt_tokens, max_answer_tokens):
            preferences.pairs[Split.TRAIN].append(Pair(pair.chosen, pair.rejected, weight=trusted_weight))
    return preferences


def _pair(chat: ChatFormat, messages: list[dict[str, Any]], chosen: str, rejected: str) -> Pair:
    return Pair(chat.answer(messages, chosen), chat.answer(messages, rejected))


def _fits(pair: Pair, max_prompt_tokens: int, max_answer_tokens: int) -> bool:
    answers = max(len(pair.chosen.response), len(pair.rejected.response))
    return len(pair.chosen.query) <= max_prompt_tokens and answers <= max_answer_tokens
