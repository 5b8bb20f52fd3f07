"""What a candidate is like beside the incumbent that it would replace, on prompts that neither it nor its reward model
has seen, and on the frozen probes."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import probes
from data.stats import Z, wilson
from trainer.backbone import Backbone
from trainer.encoding import Answer, ChatFormat, by_length, collate
from trainer.rollout import Query, Sampler

FEWEST_CONVERSATIONS = 6
ANSWERS = 256
"""Of each policy, at least: with fewer prompts each is answered more than once."""
PROBE_ANSWERS = 600
"""The same for each kind of probe: more of them, since a loss of two points in a hundred is looked for there."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A candidate's answers beside the incumbent's to the same prompts. Lengths in tokens, KL in nats an answer."""

    prompts: int
    conversations: int
    """Those that the prompts are turns of."""
    answers: int
    """Of each policy, each prompt being answered equally often."""
    judge_win_rate: float
    """The share of answers that the judge scores higher than the incumbent's, each conversation counting alike; ties
    count half."""
    judge_win_rate_low: float
    """Lower end of its 95 % interval: see `clustered`."""
    judge_win_rate_high: float
    kl: float
    """From the base model, whoever is the incumbent."""
    length: float
    incumbent_length: float
    unfinished: float
    """The share of answers that were cut off before they came to an end."""
    incumbent_unfinished: float
    repetition: float
    """The share of answers in which some four tokens in a row come again."""
    incumbent_repetition: float


def measure(
    candidate: Sampler,
    incumbent: Sampler,
    judge: Callable[[Sequence[Answer]], Tensor],
    log_ratios: Callable[[Sequence[Answer]], Tensor],
    queries: Sequence[Query],
    conversations: Sequence[Hashable],
    *,
    seed: int,
) -> Measurement:
    """Let both answer every query.

    Args:
        judge: the score of each answer, (N,).
        log_ratios: log p_candidate - log p_base of each answer of the candidate's, (N,).
        conversations: which one each query is a turn of.
    """
    asked = list(queries) * -(-ANSWERS // len(queries))
    ours = candidate(asked, range(seed, seed + len(asked)))
    theirs = incumbent(asked, range(seed + len(asked), seed + 2 * len(asked)))
    differences = judge(ours) - judge(theirs)
    wins = (differences > 0).double() + 0.5 * (differences == 0).double()
    rate, low, high = clustered(wins.view(-1, len(queries)), conversations)
    return Measurement(
        prompts=len(queries),
        conversations=len(set(conversations)),
        answers=len(asked),
        judge_win_rate=rate,
        judge_win_rate_low=low,
        judge_win_rate_high=high,
        kl=float(log_ratios(ours).mean()),
        length=_mean([len(a.response) for a in ours]),
        incumbent_length=_mean([len(a.response) for a in theirs]),
        unfinished=_mean([not a.finished for a in ours]),
        incumbent_unfinished=_mean([not a.finished for a in theirs]),
        repetition=_mean([repeats(a.response) for a in ours]),
        incumbent_repetition=_mean([repeats(a.response) for a in theirs]),
    )


def probe(
    kind: probes.Kind, candidate: Sampler, incumbent: Sampler, chat: ChatFormat, *, base: Sampler | None, seed: int
) -> dict[str, float]:
    """Let each of them answer the frozen probes of a kind, each probe equally often.

    Args:
        base: the base model; None where it is the incumbent.

    Returns:
        The candidate's share of right answers as `facts`, the incumbent's as `incumbent_facts`, the base model's as
        `base_facts`, and the number of answers of each as `facts_answers`; for another kind the same.
    """
    frozen = probes.load(kind)
    draws = -(-PROBE_ANSWERS // len(frozen))
    asked, queries = frozen * draws, [chat.query(p.messages) for p in frozen] * draws

    def share(sample: Sampler, first_seed: int) -> float:
        answers = sample(queries, range(first_seed, first_seed + len(queries)))
        return _mean([probes.is_right(p, chat.text(a)) for p, a in zip(asked, answers, strict=True)])

    incumbent_share = share(incumbent, seed + len(asked))
    return {
        kind: share(candidate, seed),
        f"incumbent_{kind}": incumbent_share,
        f"base_{kind}": incumbent_share if base is None else share(base, seed + 2 * len(asked)),
        f"{kind}_answers": len(asked),
    }


def repeats(tokens: Sequence[int], n: int = 4) -> bool:
    """Whether some n tokens in a row occur twice."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


def clustered(wins: Tensor, conversations: Sequence[Hashable]) -> tuple[float, float, float]:
    """A share and its 95 % interval where the answers in one conversation are alike, for other conversations of the
    same kind. Each counts alike, or the longest would be the share, and nothing would tell how it varies.

    Wilson's, with as many trials as independent answers would have to be to vary as much as the conversations' own
    shares do (Kish's design effect): the number of conversations where each is all won or all lost, at most the number
    of answers. How much they vary is learned from the conversations themselves, so of few by Student's t; of fewer than
    FEWEST_CONVERSATIONS nothing, since by a coin all of five are won more often than 2.5 times in a hundred.

    Args:
        wins: (draws, prompts) of 0 to 1.
        conversations: of each prompt.
    """
    by_conversation: dict[Hashable, list[float]] = defaultdict(list)
    for won, conversation in zip(wins.double().mean(dim=0).tolist(), conversations, strict=True):
        by_conversation[conversation].append(won)
    count = len(by_conversation)
    shares = torch.tensor([_mean(won) for won in by_conversation.values()], dtype=torch.float64)
    share = float(shares.mean())
    if count < FEWEST_CONVERSATIONS:
        return share, 0.0, 1.0
    spread = float(shares.var(correction=1))
    # A mean of means of independent answers varies as if each were of the harmonic mean of their numbers.
    each = len(wins) * count / sum(1 / len(won) for won in by_conversation.values())
    # Nothing varies less than by one answer, or who wins all of them would be known less well than who loses one.
    least = 1 / (each * count)
    varying = max(share * (1 - share), least * (1 - least))
    trials = count * min(max(varying / max(spread, least / each), 1.0), each)
    return share, *wilson(share * trials, trials, z=_student(count - 1))


def _student(freedom: int) -> float:
    """Student's t at 97.5 %, by Abramowitz and Stegun 26.7.5: within .04 from two degrees of freedom on, and 11.3
    instead of 12.7 of one."""
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


@torch.no_grad()
def log_ratios(backbone: Backbone, answers: Sequence[Answer], *, temperature: float) -> Tensor:
    """(N,) log p_policy - log p_base of each answer, under the adapter "policy" and under none."""
    ratios = torch.empty(len(answers))
    for group in by_length([len(a) for a in answers], 8192):
        batch = collate([answers[i] for i in group], backbone.device)
        with backbone.adapters.on("policy"):
            logprobs = backbone.logprobs(batch, temperature=temperature)
        ratios[group] = (logprobs - backbone.logprobs(batch, temperature=temperature)).sum(dim=1).float().cpu()
    return ratios


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
