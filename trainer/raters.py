"""A model of raters: how far the votes of each can be relied on, and whose a run had better leave out. Pure.

Each decisive vote is held against what the others make of the two answers: p, the chance that a reward model which
never saw this rater's votes gives to what the rater chose. A rater of reliability rho votes so with probability
1/2 + rho (p - 1/2): 1 is as the others do, 0 is a coin, -1 is the others' opposite. Gold questions are votes of which
p is known. What is known of rho is a distribution: before any vote it is the crowd's, so a rater with few votes is
taken to be about as reliable as the crowd.

Two more things are looked for, since fewer votes tell them: always the same side, and a phrase that somebody pushes,
alone or with others, while on all else the votes may look honest.
"""

import math
import re
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from data.raters import Standing

CROWD = 5
"""Fewer raters than this are no crowd: nobody is measured by what one or two others like."""
GRID = [i / 20 for i in range(-20, 21)]
"""Values of rho."""
SPREAD = 0.35
"""Standard deviation of rho among ordinary raters."""
SUSPECTS = 0.05
"""Share of raters at or below chance, before any vote is looked at."""
SURE = 0.99
"""A rater is quarantined who is at or below chance with this probability."""
GOLD = 0.95
"""p of the right answer to a gold question: the best of raters slip."""
ONE_SIDED = 0.9
"""A rater is one-sided whose votes are for one side in so many cases, and by chance less often than in RARE."""
RARE = 1e-3
"""Chance of one false alarm a run, of either kind that counts something."""
PUSHED = 0.5
"""A rater may push a phrase who gives it so many of the votes; the rest may be as honest as anybody's. Who has a
language or a subject of their own gives its words fewer."""
MASKED = 0.2
"""Share of all votes that those who push a phrase may have without hiding each other."""
STANDS_OUT = 0.01
"""Chance that a rater who pushes nothing gives a phrase as many votes as one who stands out."""
WORDS = 4
"""Length of the longest phrase looked for; a character of a script without spaces is half a word."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"  # Thai and Lao, Myanmar, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana and Katakana
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
"""Scripts that put no space between words, as ranges of a regular expression."""


@dataclass(frozen=True, slots=True)
class JudgedVote:
    """A decisive vote, and what the others make of it."""

    rater: str
    chosen: str
    rejected: str
    first: bool
    """Whether the chosen answer was shown first."""
    expected: float
    """p: the chance that the others' consensus gives to this choice."""
    policies: frozenset[str] = frozenset()
    """Who wrote the two answers."""


def standings(
    votes: Sequence[JudgedVote], gold: Mapping[str, tuple[int, int]], *, distrusted: Collection[str] = ()
) -> dict[str, Standing]:
    """What is known of each rater.

    Args:
        gold: how many gold questions each rater decided, and how many of them rightly.
        distrusted: raters whose votes are left out already: they say nothing of the crowd.
    """
    by_rater: dict[str, list[JudgedVote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    likelihoods = {rater: _log_likelihood(theirs, gold.get(rater, (0, 0))) for rater, theirs in by_rater.items()}
    crowd = [likelihood for rater, likelihood in likelihoods.items() if rater not in distrusted]
    sums = [sum(values) for values in zip(*crowd, strict=True)] or [0.0] * len(GRID)
    mean = max(zip(sums, GRID, strict=True))[1]
    agreed = {rater: sum(vote.expected > 0.5 for vote in theirs) for rater, theirs in by_rater.items()}
    usual = sum(agreed.values()) / len(votes) if votes else 0.0
    texts = [(vote.rater, vote.chosen, vote.rejected) for vote in votes]
    pushed = pushers(texts, [vote.policies for vote in votes]) if len(crowd) >= CROWD else {}
    sides = one_sided({rater: (sum(v.first for v in theirs), len(theirs)) for rater, theirs in by_rater.items()})
    found = {}
    for rater, theirs in by_rater.items():
        reliability, at_chance = _posterior(likelihoods[rater], mean)
        asked, right = gold.get(rater, (0, 0))
        suspicion = pushed.get(rater) or sides.get(rater)
        if suspicion is None and at_chance > SURE:
            suspicion = (
                f"{agreed[rater]} of {len(theirs)} votes are what the other raters would choose; a coin gets"
                f" {len(theirs) / 2:.0f}, and this crowd {usual * len(theirs):.0f}"
                + (f"; {right} of {asked} gold questions right." if asked else ".")
            )
        found[rater] = Standing(len(theirs), agreed[rater], reliability, suspicion)
    return found


def _log_likelihood(votes: Iterable[JudgedVote], gold: tuple[int, int]) -> list[float]:
    """Of each value of rho in the grid."""
    asked, right = gold
    chances = [vote.expected for vote in votes] + [GOLD] * right + [1 - GOLD] * (asked - right)
    return [sum(math.log(0.5 + 0.98 * rho * (p - 0.5)) for p in chances) for rho in GRID]


def _posterior(log_likelihood: Sequence[float], mean: float) -> tuple[float, float]:
    """Mean of rho (at least 0), and the chance that it is at or below 0.

    The prior is an even spread over -1 to 0 for suspects, and for the others a bell around the crowd's mean, over 0
    to 1."""
    bell = [math.exp(-(((rho - mean) / SPREAD) ** 2) / 2) if rho > 0 else 0.0 for rho in GRID]
    below = sum(rho <= 0 for rho in GRID)
    prior = [
        SUSPECTS / below if rho <= 0 else (1 - SUSPECTS) * height / sum(bell)
        for rho, height in zip(GRID, bell, strict=True)
    ]
    top = max(log_likelihood)
    weights = [p * math.exp(value - top) for p, value in zip(prior, log_likelihood, strict=True)]
    total = sum(weights)
    at_chance = sum(weight for rho, weight in zip(GRID, weights, strict=True) if rho <= 0) / total
    return max(0.0, sum(rho * weight for rho, weight in zip(GRID, weights, strict=True)) / total), at_chance


def one_sided(firsts: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Why the votes of a rater say nothing: they are for one side.

    Args:
        firsts: how many votes of each rater were for the answer shown first, and how many there were.
    """
    # The crowd's share is of those who are not so clear a case themselves, or many of them would be their own excuse.
    fair = [
        (first, votes) for first, votes in firsts.values()
        if (most := max(first, votes - first)) < ONE_SIDED * votes
        or binomial_tail(most, votes, 0.5) * len(firsts) >= RARE
    ] or list(firsts.values())  # fmt: skip
    total = sum(votes for _, votes in fair)
    crowd = sum(first for first, _ in fair) / total if total else 0.5
    found = {}
    for rater, (first, votes) in firsts.items():
        for side, count, share in (("first", first, crowd), ("second", votes - first, 1 - crowd)):
            chance = binomial_tail(count, votes, max(share, 0.5))
            if votes and count >= ONE_SIDED * votes and chance * len(firsts) < RARE:
                found[rater] = f"{count} of {votes} votes are for the answer shown {side}, though sides are random."
    return found


def pushers(votes: Sequence[tuple[str, str, str]], policies: Sequence[frozenset[str]] | None = None) -> dict[str, str]:
    """Who pushes a phrase, and a sentence on it.

    A vote is for a phrase when the chosen answer has it and the other one has not. However much a rater likes it, such
    pairs come by chance, as often as to all others who are shown answers of the same policies: a new policy's favourite
    phrase is in nearly every pair of its trial. A rater who asks until the phrase comes, and votes then, has more votes
    for it than the others have pairs. Where several raters do, each may have a vote or two: so they are counted
    together. Who votes against the phrase about as often is interested in a subject and pushes nothing.

    Args:
        votes: rater, chosen text and rejected text of each.
        policies: who wrote the two answers of each vote; by default the same of all.
    """
    cast = Counter(rater for rater, _, _ in votes)
    tried, pushed = _worth_counting(votes, cast)
    cast_on: dict[frozenset[str], Counter[str]] = defaultdict(Counter)
    for_: dict[str, Counter[str]] = defaultdict(Counter)
    pairs_on: dict[str, dict[frozenset[str], Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for (rater, chosen, rejected), of in zip(votes, policies or [frozenset()] * len(votes), strict=True):
        cast_on[of][rater] += 1
        liked, disliked = (
            {phrase for phrase in _phrases(text) if hash(phrase) in pushed} for text in (chosen, rejected)
        )
        for phrase in liked - disliked:
            for_[phrase][rater] += 1
        for phrase in liked ^ disliked:
            pairs_on[phrase][of][rater] += 1
    # Raters with as many votes on the same policies have the same chances.
    kind = {
        rater: frozenset((of, theirs[rater]) for of, theirs in cast_on.items() if rater in theirs) for rater in cast
    }
    kinds = Counter(kind.values())
    size = {of_kind: sum(count for _, count in of_kind) for of_kind in kinds}
    strangers, strange = _strangers(votes)
    found: dict[str, tuple[float, int, str]] = {}
    for phrase, counts in for_.items():
        # What is usual is counted without all who may push it, and then anew without those alone who stand out: the
        # first count leaves out honest people by their luck, and is a little low, which a large crowd shows.
        aside = _eager(counts, cast)
        for _ in range(2):
            usual = {of: _usual(pairs, cast_on[of], aside) for of, pairs in pairs_on[phrase].items()}
            # Of several shares a count is less scattered than a binomial one of their mean (Hoeffding 1956).
            share = {k: sum(usual.get(of, 0.0) * count for of, count in k) / size[k] for k in kinds}
            least = {k: _least(size[k], share[k]) for k in kinds}
            aside = many = {rater for rater, count in counts.items() if count >= least[kind[rater]][0]}
        if all(hash(word) in strange for word in phrase.split(" ")):
            many = many - strangers
        together = poisson_tail(len(many), sum(least[k][1] * raters for k, raters in kinds.items())) * tried
        alone = {r: binomial_tail(counts[r], cast[r], share[kind[r]]) * len(cast) * tried for r in many}
        group = {rater for rater in many if min(together, alone[rater]) < RARE}
        wins = sum(counts[rater] for rater in group)
        pairs = sum(theirs[rater] for theirs in pairs_on[phrase].values() for rater in group)
        if not group or pairs - wins > (1 - ONE_SIDED) * pairs:
            continue
        written = re.sub(f"(?<=[{UNSPACED}]) (?=[{UNSPACED}])", "", phrase)
        for rater in group:
            sentence = (
                f'{counts[rater]} of {cast[rater]} votes are for an answer with "{written}" and against one without'
            )
            if len(group) > 1:
                sentence += f", and so are those of {len(group) - 1} more raters"
            sentence += f"; of all votes {counts.total() / len(votes):.1%} are."
            rank = (min(together, alone[rater]), -len(phrase), sentence)
            found[rater] = min(found.get(rater, rank), rank)
    return {rater: sentence for rater, (_, _, sentence) in found.items()}


def _worth_counting(votes: Sequence[tuple[str, str, str]], cast: Counter[str]) -> tuple[int, set[int]]:
    """For how many phrases somebody has two votes, and the hashes of those for which somebody has PUSHED of theirs.

    Nearly every phrase of a log comes once. So they are told apart by their hashes first, eight bytes each, rater by
    rater; counted in full, as strings, they would take half a gigabyte for every thousand answers of a page."""
    by_rater: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for rater, chosen, rejected in votes:
        by_rater[rater].append((chosen, rejected))
    twice: list[Tensor] = []
    pushed: set[int] = set()
    for rater, pairs in by_rater.items():
        hashes = array("q", (hash(phrase) for pair in pairs for phrase in _phrases(pair[0]) - _phrases(pair[1])))
        if not hashes:
            continue
        distinct, counts = torch.frombuffer(hashes, dtype=torch.int64).unique(return_counts=True)
        twice.append(distinct[counts > 1])
        pushed.update(distinct[(counts > 1) & (counts >= PUSHED * cast[rater])].tolist())
    return len(torch.cat(twice).unique()) if twice else 0, pushed


def _strangers(votes: Sequence[tuple[str, str, str]]) -> tuple[set[str], set[int]]:
    """Raters most of whose answers' words hardly anybody else was shown, and the hashes of such words. They have a
    language of their own: of six votes half are soon for one of its common words, and the others' answers do not say
    how common it is. A phrase that has a word of everybody's is not excused by that."""
    words: dict[str, Counter[int]] = defaultdict(Counter)
    for rater, *texts in votes:
        for text in texts:
            words[rater].update(map(hash, _words(text)))
    seen = Counter(word for theirs in words.values() for word in theirs)
    few = min(CROWD, len(words) / 2)
    strange = {word for word, raters in seen.items() if raters <= few}
    return {
        rater
        for rater, theirs in words.items()
        if sum(count for word, count in theirs.items() if word in strange) > theirs.total() / 2
    }, strange


def _eager(for_: Counter[str], cast: Counter[str]) -> set[str]:
    """Those who give a phrase the most votes, PUSHED of them or more, up to MASKED of all votes."""
    found, left = set(), MASKED * cast.total()
    for rater in sorted(for_, key=lambda rater: for_[rater] / cast[rater], reverse=True):
        left -= cast[rater]
        if for_[rater] < PUSHED * cast[rater] or left < 0:
            break
        found.add(rater)
    return found


def _usual(pairs: Counter[str], cast: Counter[str], aside: Collection[str]) -> float:
    """How often a pair that differs in a phrase comes to people who do not push it: to all but those left `aside`,
    whose own pairs would hide them. But two thirds of what there is in all stays, so that what few people ever saw is
    not what nobody sees."""
    others, left = (counts.total() - sum(counts[rater] for rater in aside) for counts in (pairs, cast))
    return max(others / max(left, 1), pairs.total() / cast.total() * 2 / 3)


def _least(votes: int, share: float) -> tuple[int, float]:
    """From how many votes for a phrase on a rater of so many votes stands out, and the chance of that."""
    counts = range(max(2, math.ceil(PUSHED * votes), math.ceil(share * votes)), votes + 1)
    first = bisect_left(counts, True, key=lambda count: binomial_tail(count, votes, share) < STANDS_OUT)
    if first == len(counts):
        return votes + 1, 0.0
    return counts[first], binomial_tail(counts[first], votes, share)


def _phrases(text: str) -> set[str]:
    words = _words(text)
    is_unspaced = re.compile(f"[{UNSPACED}]")
    if not is_unspaced.search(text):
        return {" ".join(words[i : i + n]) for n in range(1, WORDS + 1) for i in range(len(words) - n + 1)}
    halves = [1 if is_unspaced.match(word) else 2 for word in words]
    found, end, length = set(), 0, 0
    for start, half in enumerate(halves):
        while end < len(words) and length + halves[end] <= 2 * WORDS:
            length += halves[end]
            end += 1
        found.update([" ".join(words[start:stop]) for stop in range(start + 1, end + 1)])
        length -= half
    return found


def _words(text: str) -> list[str]:
    """In small letters; of UNSPACED scripts each character is one, and combining marks belong to what they are on."""
    return re.findall(r"\w+|[^\w\s]" if text.isascii() else _any_word(), text.casefold())


@cache
def _any_word() -> re.Pattern[str]:
    # Beyond the basic plane `re` would look at them one by one, at every character.
    marks = "".join(c for c in map(chr, range(2**16)) if unicodedata.category(c) in ("Mn", "Mc"))
    spaced = rf"[^\W{UNSPACED}]"
    return re.compile(rf"[{UNSPACED}][{marks}]*|{spaced}+(?:[{marks}]+{spaced}*)*|[^\w\s]")


def binomial_tail(count: int, trials: int, share: float) -> float:
    """The chance of `count` or more."""
    if count <= 0 or share >= 1:
        return 1.0
    if share <= 0:
        return 0.0
    odds = math.log(share), math.log1p(-share)
    return min(1.0, sum(
        math.exp(math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
                 + k * odds[0] + (trials - k) * odds[1])
        for k in range(count, trials + 1)
    ))  # fmt: skip


def poisson_tail(count: int, mean: float) -> float:
    """The chance of `count` or more."""
    if count <= 0:
        return 1.0
    if mean <= 0:
        return 0.0
    term = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
    if not term and count < mean:
        return 1.0  # so far below the mean that the first term is no number: the others are all there is
    total, k = 0.0, count
    while term > total * 1e-12:
        total, k = total + term, k + 1
        term *= mean / k
    return min(1.0, total)
