"""Proximal policy optimisation of the policy adapter, held near the reference by a KL penalty.

The loop follows Ziegler et al. 2019 and Stiennon et al. 2020 with the details of Huang et al. 2024: a reward of
-beta * k1 per token and the score on the last, GAE, whitened advantages, clipped policy and value losses. Each
process samples and scores its share of a step's answers; then all of them hold the figures of every answer (a
few floats a token), compute the same advantages, and work on their share of each minibatch.

Not here: entropy bonuses, adaptive KL coefficients, best-of-n.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trainer import ppo_math
from trainer.backbone import Backbone
from trainer.encoding import Answer, Batch, by_length, collate
from trainer.rollout import Query, Sampler
from trainer.updates import CannotLearn, Optimizer, share, total

Score = Callable[[Sequence[Answer]], Tensor]
"""What a whole answer is worth: (N,) for N answers."""
OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    steps: int = 32
    """How often answers are sampled and learned from, at most."""
    rollouts: int = 128
    """Answers a step, over all processes."""
    epochs: int = 2
    """Passes over the answers of a step."""
    minibatch: int = 32
    """Answers an optimizer step, over all processes."""
    microbatch_tokens: int = 2048
    """Padded tokens in one forward and backward; changes the memory used, and no result."""
    learning_rate: float = 1.5e-3
    """Of policy and value adapters at the first step; falls to 0 in a straight line."""
    beta: float = 0.3
    """Price of one nat of KL divergence from the reference, in units of the score."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    clip: float = 0.2
    """How far the ratio of new to old probability counts, either way."""
    value_clip: float = 0.2
    """How far a value may move from its old estimate within one step."""
    temperature: float = 1.0
    """Of sampling, and of the policy and reference log-probabilities alike."""
    missing_end_score: float | None = -1.0
    """The score of an answer that was cut off; None: what the score function says."""
    kl_budget: float = 10.0
    """Mean KL divergence of an answer from the reference, in nats, beyond which training stops. It is looked at before
    each step: what the last one added is left to the gate."""
    importance_cap: float = 2.0
    """Highest weight of a token that an engine sampled, against the trainer's own probability for it."""
    max_grad_norm: float = 1.0
    """Of the policy's and of the value model's gradient, each."""
    seed: int = 0
    """Of the order of queries and answers, and of sampling."""


@dataclass(frozen=True, slots=True)
class Episode:
    """An answer and what was thought of it when it was sampled; R response tokens, on the CPU."""

    answer: Answer
    logprobs: Tensor  # (R,)
    ref_logprobs: Tensor  # (R,)
    values: Tensor  # (R,)
    score: float


def learn(
    backbone: Backbone,
    value_head: nn.Linear,
    queries: Sequence[Query],
    sample: Sampler,
    score: Score,
    config: PPOConfig,
    *,
    accelerator: Accelerator,
    on_step: OnStep = lambda step, figures: None,
) -> bool:
    """Train the adapters "policy" and "value" and the value head in place.

    Args:
        value_head: d -> 1, in float32; adapter and head start from the reward model's.
        sample: draws from the adapter "policy" at `config.temperature`.
        on_step: called in every process after each step with its figures; what it raises ends the training.

    Returns:
        Whether the KL budget ended it; the policy is then that of the last step within the budget.

    Raises:
        CannotLearn: no query, a reward that is the same everywhere, or numbers that are not finite.
    """
    if not queries:
        raise CannotLearn("no prompt to train on: raise training.max_prompt_tokens, or collect votes")
    groups = [
        backbone.adapters.parameters("policy"),
        [*backbone.adapters.parameters("value"), *value_head.parameters()],
    ]
    minibatches = -(-config.rollouts // config.minibatch)
    optimizer = Optimizer(
        groups,
        learning_rate=config.learning_rate,
        steps=config.steps * config.epochs * minibatches,
        accelerator=accelerator,
        max_grad_norm=config.max_grad_norm,
    )
    order = torch.Generator().manual_seed(config.seed)
    loop = _Loop(backbone, value_head, config, accelerator, optimizer, order)
    within_budget = backbone.adapters.state("policy")
    for step in range(config.steps):
        started = time.monotonic()
        # 1. Sample answers and take down what policy, reference, value model and score say of them.
        chosen = torch.randint(len(queries), (config.rollouts,), generator=order).tolist()
        rows = share(range(config.rollouts), accelerator)
        first = (config.seed * config.steps + step) * config.rollouts  # no two steps or seeds draw alike
        answers = sample([queries[chosen[i]] for i in rows], [first + i for i in rows])
        episodes = _in_order(gather_object(loop.episodes(answers, score)), accelerator.num_processes)
        # 2. Stop where the policy has gone too far.
        figures = _figures(episodes)
        if step == 0 and figures["score_std"] == 0:
            if figures["finished"] == 0:
                raise CannotLearn("no answer ended before it was cut off: raise training.max_answer_tokens")
            raise CannotLearn("the reward is the same for every answer: collect more votes")
        if figures["kl"] > config.kl_budget:
            backbone.adapters.set_state("policy", within_budget)
            return True
        within_budget = backbone.adapters.state("policy")
        # 3. Learn.
        losses = loop.update(episodes)
        speed = {"episodes_per_s": len(episodes) / (time.monotonic() - started)}
        on_step(step, figures | losses | speed)
    return False


@dataclass(frozen=True, slots=True)
class _Loop:
    backbone: Backbone
    value_head: nn.Linear
    config: PPOConfig
    accelerator: Accelerator
    optimizer: Optimizer
    order: torch.Generator

    @torch.no_grad()
    def episodes(self, answers: Sequence[Answer], score: Score) -> list[Episode]:
        """Old log-probabilities are the trainer's own, so that the first ratio is exactly 1."""
        scores = score(answers).tolist()
        episodes: dict[int, Episode] = {}
        for group in by_length([len(a) for a in answers], self.config.microbatch_tokens):
            batch = collate([answers[i] for i in group], self.backbone.device)
            logprobs, values = self._logprobs(batch, "policy"), self._values(batch)
            ref_logprobs = self._logprobs(batch, None)
            for row, i in enumerate(group):
                n = len(answers[i].response)
                worth = scores[i]
                if not answers[i].finished and self.config.missing_end_score is not None:
                    worth = self.config.missing_end_score
                episodes[i] = Episode(
                    answers[i],
                    logprobs[row, :n].cpu(),
                    ref_logprobs[row, :n].cpu(),
                    values[row, :n].cpu(),
                    worth,
                )
        return [episodes[i] for i in range(len(answers))]

    def update(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Take the optimizer steps of one PPO step; return the mean losses."""
        config = self.config
        mask = pad_sequence([torch.ones(len(e.logprobs), dtype=torch.bool) for e in episodes], batch_first=True)
        old_logprobs = pad_sequence([e.logprobs for e in episodes], batch_first=True)
        old_values = pad_sequence([e.values for e in episodes], batch_first=True)
        rewards = ppo_math.kl_rewards(
            logprobs=old_logprobs,
            ref_logprobs=pad_sequence([e.ref_logprobs for e in episodes], batch_first=True),
            scores=torch.tensor([e.score for e in episodes]),
            mask=mask,
            beta=config.beta,
        )
        advantages, returns = ppo_math.gae(
            rewards=rewards, values=old_values, mask=mask, gamma=config.gamma, lam=config.lam
        )
        advantages = ppo_math.whiten(advantages, mask)
        weights = ppo_math.importance_weights(
            old_logprobs=old_logprobs, sampler_logprobs=_sampler_logprobs(episodes), mask=mask,
            cap=config.importance_cap,
        )  # fmt: skip

        sums = torch.zeros(3, dtype=torch.float64)  # policy loss, value loss, clipped fraction
        norms = []
        for _ in range(config.epochs):
            for minibatch in torch.randperm(len(episodes), generator=self.order).split(config.minibatch):
                tokens = int(mask[minibatch].sum())
                mine = share(minibatch.tolist(), self.accelerator)
                for group in by_length([len(episodes[i].answer) for i in mine], config.microbatch_tokens):
                    rows = torch.tensor([mine[i] for i in group])
                    batch = collate([episodes[i].answer for i in rows], self.backbone.device)
                    width = batch.mask.shape[1]

                    def cut(x: Tensor, rows: Tensor = rows, width: int = width) -> Tensor:
                        return x[rows, :width].to(self.backbone.device)

                    # One model at a time: its activations are gone before the next one's are made.
                    with self.backbone.adapters.on("policy"):
                        logprobs = self.backbone.logprobs(batch, temperature=config.temperature)
                        policy_loss = ppo_math.policy_loss(
                            logprobs=logprobs, old_logprobs=cut(old_logprobs), advantages=cut(advantages),
                            mask=batch.mask, clip=config.clip, tokens=tokens, weights=cut(weights),
                        )  # fmt: skip
                        policy_loss.backward()
                    clipped = ppo_math.clipped_fraction(
                        logprobs=logprobs, old_logprobs=cut(old_logprobs), mask=batch.mask, clip=config.clip,
                        tokens=tokens,
                    )  # fmt: skip
                    with self.backbone.adapters.on("value"):
                        values = self._values(batch)
                        value_loss = ppo_math.value_loss(
                            values=values, old_values=cut(old_values), returns=cut(returns), mask=batch.mask,
                            clip=config.value_clip, tokens=tokens,
                        )  # fmt: skip
                        value_loss.backward()
                    sums += torch.stack([policy_loss, value_loss, clipped]).detach().cpu()
                norms.append(self.optimizer.step())
        means = [total(s, self.accelerator) / len(norms) for s in sums]
        policy_norms, value_norms = zip(*norms, strict=True)
        return {
            "policy_loss": means[0],
            "value_loss": means[1],
            "clipped": means[2],
            "policy_grad_norm": sum(policy_norms) / len(norms),
            "value_grad_norm": sum(value_norms) / len(norms),
        }

    def _logprobs(self, batch: Batch, adapter: str | None) -> Tensor:
        with self.backbone.adapters.on(adapter):
            return self.backbone.logprobs(batch, temperature=self.config.temperature)

    def _values(self, batch: Batch) -> Tensor:
        """(B, R): what is still to come, as seen before each response token: the head on the mean state of the response
        so far, which is where the reward model looks."""
        with self.backbone.adapters.on("value"):
            states = self.backbone.before_responses(batch)
        steps = torch.arange(1, states.shape[1] + 1, device=states.device)
        means = states.to(self.value_head.weight.dtype).cumsum(dim=1) / steps[:, None]
        return self.value_head(means)[:, :, 0]


def _in_order(shares: list[Episode], processes: int) -> list[Episode]:
    """Undo `share`: process p's k-th episode is the (k * processes + p)-th of all."""
    sizes = [len(range(p, len(shares), processes)) for p in range(processes)]
    starts = [sum(sizes[:p]) for p in range(processes)]
    return [shares[starts[i % processes] + i // processes] for i in range(len(shares))]


def _sampler_logprobs(episodes: Sequence[Episode]) -> Tensor:
    """(N, R) what the sampler says; the trainer's own where the trainer sampled, for a ratio of 1."""
    rows = [
        e.logprobs if e.answer.sampler_logprobs is None else e.logprobs.new_tensor(e.answer.sampler_logprobs)
        for e in episodes
    ]
    return pad_sequence(rows, batch_first=True)


def _figures(episodes: Sequence[Episode]) -> dict[str, float]:
    """What a step's answers are like, before anything is learned from them."""
    scores = torch.tensor([e.score for e in episodes], dtype=torch.float64)
    k1 = torch.stack([(e.logprobs - e.ref_logprobs).sum() for e in episodes])
    lengths = torch.tensor([len(e.logprobs) for e in episodes], dtype=torch.float64)
    figures = {
        "score": float(scores.mean()),
        "score_std": float(scores.std(unbiased=False)),
        "kl": float(k1.mean()),
        "length": float(lengths.mean()),
        "finished": sum(e.answer.finished for e in episodes) / len(episodes),
        "entropy": float(-torch.cat([e.logprobs for e in episodes]).mean()),
    }
    if not all(map(torch.isfinite, torch.tensor(list(figures.values())))):
        raise CannotLearn("a log-probability or a score is NaN or infinite: lower the learning rate")
    return figures
