"""What a candidate is like beside the reference, on prompts that neither it nor its reward model has seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import probes
from trainer.backbone import Backbone
from trainer.encoding import Answer, ChatFormat, by_length, collate
from trainer.rollout import LocalSampler, Query, Sampling


@dataclass(frozen=True, slots=True)
class Measurement:
    """A candidate's answers beside the reference's to the same prompts. Lengths in tokens, KL in nats an answer."""

    prompts: int
    judge_win_rate: float
    """The share of prompts where the judge scores the candidate's answer higher; ties count half."""
    judge_win_rate_low: float
    """Lower end of its 95 % interval (Wilson)."""
    judge_win_rate_high: float
    kl: float
    length: float
    ref_length: float
    finished: float
    ref_finished: float
    repetition: float
    """The share of answers in which some four tokens in a row come again."""
    ref_repetition: float


def measure(
    backbone: Backbone,
    judge: Callable[[Sequence[Answer]], Tensor],
    queries: Sequence[Query],
    sampling: Sampling,
    *,
    seed: int,
) -> Measurement:
    """Let the adapter "policy" and the reference each answer every query once."""
    seeds = range(seed, seed + len(queries))
    ours = LocalSampler(backbone, "policy", sampling)(queries, seeds)
    theirs = LocalSampler(backbone, None, sampling)(queries, range(seed + len(queries), seed + 2 * len(queries)))
    differences = judge(ours) - judge(theirs)
    wins = float((differences > 0).sum() + 0.5 * (differences == 0).sum())
    low, high = wilson(wins, len(queries))
    return Measurement(
        prompts=len(queries),
        judge_win_rate=wins / len(queries),
        judge_win_rate_low=low,
        judge_win_rate_high=high,
        kl=float(_k1(backbone, ours, sampling.temperature).mean()),
        length=_mean([len(a.response) for a in ours]),
        ref_length=_mean([len(a.response) for a in theirs]),
        finished=_mean([a.finished for a in ours]),
        ref_finished=_mean([a.finished for a in theirs]),
        repetition=_mean([repeats(a.response) for a in ours]),
        ref_repetition=_mean([repeats(a.response) for a in theirs]),
    )


def probe(
    backbone: Backbone, adapter: str | None, chat: ChatFormat, sampling: Sampling, *, seed: int
) -> dict[str, float]:
    """The share of each kind of frozen probe that the adapter's (None: the reference's) answers pass."""
    sample = LocalSampler(backbone, adapter, sampling)
    shares: dict[str, float] = {}
    for kind in probes.KINDS:
        asked = probes.load(kind)
        answers = sample([chat.query(p.messages) for p in asked], range(seed, seed + len(asked)))
        shares[kind] = _mean([probes.is_right(p, chat.text(a)) for p, a in zip(asked, answers, strict=True)])
    return shares


def repeats(tokens: Sequence[int], n: int = 4) -> bool:
    """Whether some n tokens in a row occur twice."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


def wilson(wins: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927)."""
    share = wins / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    margin = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5 / (1 + z * z / trials)
    return centre - margin, centre + margin


@torch.no_grad()
def _k1(backbone: Backbone, answers: Sequence[Answer], temperature: float) -> Tensor:
    """(N,) log p_policy - log p_reference of each answer."""
    k1 = torch.empty(len(answers))
    for group in by_length([len(a) for a in answers], 8192):
        batch = collate([answers[i] for i in group], backbone.device)
        with backbone.adapters.on("policy"):
            logprobs = backbone.logprobs(batch, temperature=temperature)
        k1[group] = (logprobs - backbone.logprobs(batch, temperature=temperature)).sum(dim=1).float().cpu()
    return k1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
