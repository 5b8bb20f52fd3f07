"""From votes to pairs: who is on which side of the splits, and how much a vote weighs.

A vote's side is decided by a hash of the person who chatted and the conversation, so that no conversation is on
two sides and a vote never changes sides between runs. `both_bad` ranks nothing and stays out.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from data.learning import TRAIN_SHARE
from data.trusted import TrustedPair
from data.types import ComparisonKind
from trainer.encoding import BadMessages, ChatFormat
from trainer.reward_model import Pair
from trainer.rollout import Query

FEWEST_HELD_OUT = 10
"""Of fewer conversations no interval says anything: then prompts count that the training side asked as well."""


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
    """Distinct prompts of the votes on each side, in order of the votes; held out, only those that nobody on the
    training side asked as well, unless there are hardly any others."""
    conversations: dict[Query, tuple[str, str]] = field(default_factory=dict)
    """Of each prompt held out: the user and the conversation, of those held out, in which it was asked first."""
    votes: list[UsedVote] = field(default_factory=list)


def split_of(user: str, conversation: str) -> Split:
    """70 % train, 20 % judge, 10 % held out."""
    digest = hashlib.sha256(f"{user}\0{conversation}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return Split.TRAIN if place < TRAIN_SHARE else Split.JUDGE if place < 0.9 else Split.HELD_OUT


def voter_weights(
    votes: Mapping[str, int], *, share: float, uncapped: int, reliability: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What one vote of each voter weighs: as much as it can be relied on, and so that nobody's votes together weigh
    more than `share` of all.

    Args:
        votes: how many votes each voter cast.
        share: the largest part of the total weight that one voter may have, in (0, 1]. Of few voters somebody has
            more, whatever the cap; each may have half as much again as if all had voted alike, since a cap that
            nobody keeps would make all alike, and give one who voted little as much as who voted all day. Who has
            less than half of `uncapped` counts as a part of a voter here, or one vote would silence a whole
            application's.
        uncapped: a voter's first so many votes count in full whatever the share, or a small crowd could not learn.
        reliability: of voters, from 0 to 1; see `trainer.raters`. A vote of half the reliability tells a quarter as
            much: the information in a vote that is cast with probability 1/2 + rho (p - 1/2) is rho^2 at p = 1/2. A
            mean vote weighs 1, and so does that of a voter who has none here.
    """
    told = {voter: rho**2 for voter, rho in (reliability or {}).items() if voter in votes}
    mean = sum(told[voter] * votes[voter] for voter in told) / max(1, sum(votes[voter] for voter in told))
    each = {voter: told[voter] / mean if voter in told and mean else 1.0 for voter in votes}
    totals = {voter: each[voter] * count for voter, count in votes.items()}
    ordered = sorted(totals.values(), reverse=True)
    voters = sum(min(1.0, 2 * total / uncapped) for total in ordered) if uncapped else len(ordered)
    share = max(share, 1.5 / voters) if voters else share
    limit = ordered[0] if ordered else 0.0
    for capped in range(len(ordered) + 1):
        # With the `capped` busiest voters at the limit L: L = share * (capped * L + the weight of the others).
        others = sum(ordered[capped:])
        if share * capped >= 1:
            limit = 0.0
            break
        limit = share * others / (1 - share * capped)
        if capped == len(ordered) or ordered[capped] <= limit:
            break
    limit = max(limit, float(uncapped))
    return {voter: each[voter] * min(1.0, limit / total) if total else 0.0 for voter, total in totals.items()}


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
    reliability: Mapping[str, float] | None = None,
) -> Preferences:
    """Split, weigh and tokenize.

    Args:
        records: votes as `data.comparisons.export_preferences` yields them.
        trusted: an operator's pairs; all train the reward model that are not too long and that the template takes.
        max_prompt_tokens: votes on longer prompts are left out.
        max_answer_tokens: votes on longer answers are left out.
        reliability: of each voter; see `voter_weights`.
    """
    preferences = Preferences()
    by_split: dict[Split, list[tuple[Mapping[str, Any], Pair]]] = {split: [] for split in Split}
    fitting = usable(records, chat, max_prompt_tokens=max_prompt_tokens, max_answer_tokens=max_answer_tokens)
    for record, pair in fitting:
        by_split[split_of(record["user"], record["conversation"])].append((record, pair))
    for split, rows in by_split.items():
        counts = Counter(record["voter"] for record, _ in rows)
        weights = voter_weights(counts, share=rater_share, uncapped=uncapped_votes, reliability=reliability)
        for record, pair in rows:
            weight = weights[record["voter"]]
            preferences.pairs[split].append(replace(pair, weight=weight))
            preferences.votes.append(UsedVote(record["vote"], record["choice"], split, weight))
        preferences.queries[split].extend(dict.fromkeys(pair.chosen.query for _, pair in rows))
    for trusted_pair in trusted:
        texts = trusted_pair.chosen, trusted_pair.rejected
        if known := _pair(chat, trusted_pair.messages, *texts, max_prompt_tokens, max_answer_tokens):
            preferences.pairs[Split.TRAIN].append(replace(known, weight=trusted_weight))
    for record, pair in by_split[Split.HELD_OUT]:
        preferences.conversations.setdefault(pair.chosen.query, (record["user"], record["conversation"]))
    seen = {pair.chosen.query for pair in preferences.pairs[Split.TRAIN]}
    held_out = preferences.queries[Split.HELD_OUT]
    unseen = [query for query in held_out if query not in seen]
    conversations = {preferences.conversations[query] for query in unseen}
    preferences.queries[Split.HELD_OUT] = unseen if len(conversations) >= FEWEST_HELD_OUT else held_out
    return preferences


def usable(
    records: Iterable[Mapping[str, Any]], chat: ChatFormat, *, max_prompt_tokens: int, max_answer_tokens: int
) -> list[tuple[Mapping[str, Any], Pair]]:
    """The votes that rank, on answers that are not too long and messages that the chat template takes, each with its
    tokens."""
    found = []
    for record in records:
        if record["choice"] == "both_bad":
            continue
        texts = record["chosen"][0]["content"], record["rejected"][0]["content"]
        # An end that was not there must not be learned as one.
        cut = ("length", "stop_sequence")
        finished = record["chosen_finish_reason"] not in cut, record["rejected_finish_reason"] not in cut
        if pair := _pair(chat, record["prompt"], *texts, max_prompt_tokens, max_answer_tokens, finished):
            shown = -1.0 if record["choice"] == "b" else 1.0
            tie, active = record["choice"] == "tie", record["kind"] == ComparisonKind.ACTIVE
            found.append((record, replace(pair, tie=tie, shown=shown, active=active)))
    return found


def _pair(
    chat: ChatFormat,
    messages: list[dict[str, Any]],
    chosen: str,
    rejected: str,
    max_prompt: int,
    max_answer: int,
    finished: tuple[bool, bool] = (True, True),
) -> Pair | None:
    """None where it is too long, in tokens, or the chat template does not take the messages."""
    try:
        query = chat.query(messages)  # one for both: of a long log it is most of what is kept
    except BadMessages:
        return None
    pair = Pair(
        chat.answer(messages, chosen, finished=finished[0], query=query),
        chat.answer(messages, rejected, finished=finished[1], query=query),
    )
    answers = max(len(pair.chosen.response), len(pair.rejected.response))
    return pair if len(pair.chosen.query) <= max_prompt and answers <= max_answer else None
