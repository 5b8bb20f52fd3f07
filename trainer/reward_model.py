"""A reward model from comparisons: the base under a LoRA adapter, K scalar heads on an answer's mean state.

Bradley-Terry, with Davidson's extension (1970) for ties: P(first wins) : P(second wins) : P(tie)
= e^r1 : e^r2 : nu e^((r1 + r2) / 2). Without ties nu is 0 and the loss is -log sigma(r_chosen - r_rejected).

The heads see the mean of the last hidden states over the response. What a base that never had to sum up an answer
holds at its last token is next to nothing: see DECISIONS.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from trainer.backbone import Backbone
from trainer.encoding import Answer, by_length, collate, collate_pairs
from trainer.updates import CannotLearn, Optimizer, share, total

OnStep = Callable[[int, dict[str, float]], None]

SIDE_UNIT = 20.0
"""Logits of a side for each unit of its parameter: Adam moves a parameter by about the learning rate a step, however
much there is to learn, and that is too little for a logit."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one query and what was said of them; in a tie their order means nothing."""

    chosen: Answer
    rejected: Answer
    tie: bool = False
    weight: float = 1.0
    shown: float = 0.0
    """1 where the chosen answer was the one shown first, -1 where it was the second, 0 where nobody was shown both."""
    active: bool = False
    """Picked because a reward model was in doubt about it."""

    def __post_init__(self) -> None:
        if self.chosen.query != self.rejected.query:
            raise ValueError("a pair needs two answers to the same query")

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def measures(self) -> bool:
        """Whether it says how often a reward model is right: it prefers an answer, was drawn by chance, and counts."""
        return not self.tie and not self.active and self.weight > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    heads: int = 5
    """Scalar heads on the shared trunk; the score is their mean."""
    epochs: int = 2
    """Passes over all votes."""
    batch: int = 8
    """Pairs an optimizer step, over all processes."""
    microbatch_tokens: int = 4096
    """Padded tokens in one forward and backward; changes the memory used, and no result."""
    learning_rate: float = 1.5e-3
    """Of adapter and heads at the first step; falls to 0 in a straight line."""
    centring: float = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0."""
    side_term: bool = True
    """Learn what the place of an answer alone is worth to people; scores know nothing of it."""
    max_grad_norm: float = 1.0
    """Of the gradient, but for the side's, which is clipped alone."""
    seed: int = 0
    """Of the heads, the adapter and the order of pairs."""


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What a reward model is worth on pairs it has not seen, each counting by its weight."""

    pairs: int
    """Decisive pairs; ties are not counted."""
    equal_pairs: float
    """As many pairs of equal weight would be known as well: (sum w)^2 / sum w^2 (Kish)."""
    accuracy: float
    """The share in which the chosen answer has the higher score."""
    log_loss: float
    """Mean -log sigma(difference), nats; 0.693 is a coin."""
    calibration_error: float
    """Mean gap between confidence and accuracy over ten bins of confidence."""
    spread: float
    """Mean standard deviation over the heads of the difference of a pair's scores."""
    length_accuracy: float
    """The same accuracy for a model that sees nothing but the lengths, fitted to the training pairs."""
    length_log_loss: float


def davidson_loss(difference: Tensor, tie: Tensor, log_nu: Tensor) -> Tensor:
    """-log P(what was voted | r_chosen - r_rejected), elementwise.

    Args:
        difference: r_chosen - r_rejected, any shape.
        tie: True where the vote was a tie; broadcasts.
        log_nu: the log of Davidson's tie parameter, a scalar; -inf where nobody ever votes a tie.
    """
    half = difference / 2
    tied = log_nu.expand_as(half)
    voted = torch.where(tie, tied, half)
    return torch.logsumexp(torch.stack([half, -half, tied]), dim=0) - voted


class RewardModel:
    """K scalar heads on the backbone under one adapter. Scores are shifted and scaled by `normalise`."""

    def __init__(self, backbone: Backbone, adapter: str, *, heads: int, seed: int = 0) -> None:
        """A fresh model: an adapter that changes nothing, heads drawn from N(0, 1 / (d + 1)), bias 0."""
        self.backbone = backbone
        self.adapter = adapter
        torch.manual_seed(seed)
        backbone.adapters.add(adapter)
        # Float32 even where the base is bfloat16: differences of scores are small beside the scores.
        dtype = torch.promote_types(backbone.base.dtype, torch.float32)
        self.head = nn.Linear(backbone.hidden_size, heads, device=backbone.device, dtype=dtype)
        nn.init.normal_(self.head.weight, std=(backbone.hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.log_nu = nn.Parameter(torch.tensor(-math.inf, device=backbone.device, dtype=dtype))
        self.side = nn.Parameter(torch.zeros((), device=backbone.device, dtype=dtype))
        self.shift, self.scale = 0.0, 1.0

    def parameters(self) -> list[nn.Parameter]:
        return [*self.backbone.adapters.parameters(self.adapter), *self.head.parameters(), self.log_nu, self.side]

    @property
    def first_bonus(self) -> Tensor:
        """What being shown first is worth to the voters, in logits: a scalar that is learned with the rest and is no
        part of any score."""
        return SIDE_UNIT * self.side

    def pair_rewards(self, pairs: Sequence[Pair]) -> Tensor:
        """(2, B, K): raw rewards of the chosen and of the rejected answers, from one forward."""
        chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
        if self._shared_query_pays(pairs):
            batch = collate_pairs(chosen, rejected, self.backbone.device)
        else:
            batch = collate([*chosen, *rejected], self.backbone.device)
        with self.backbone.adapters.on(self.adapter):
            hidden = self.backbone.response_means(batch)
        rewards = self.head(hidden.to(self.head.weight.dtype))  # (B, 2, K) or (2B, 1, K)
        return rewards.transpose(0, 1) if rewards.shape[1] == 2 else rewards.view(2, len(pairs), -1)

    def _shared_query_pays(self, pairs: Sequence[Pair]) -> bool:
        """One row query-chosen-rejected saves a query, and costs a mask and longer attention."""
        longest = max(len(p) - len(p.chosen.query) for p in pairs)
        saved = sum(len(p.chosen.query) for p in pairs) / sum(len(p) for p in pairs)
        return self.backbone.takes_masks(longest) and saved > 0.25

    @torch.no_grad()
    def rewards(self, answers: Sequence[Answer], *, microbatch_tokens: int = 8192) -> Tensor:
        """(N, K) raw rewards, on the CPU."""
        rewards = torch.empty(len(answers), self.head.out_features, dtype=self.head.weight.dtype)
        for group in by_length([len(a) for a in answers], microbatch_tokens):
            batch = collate([answers[i] for i in group], self.backbone.device)
            with self.backbone.adapters.on(self.adapter):
                hidden = self.backbone.response_means(batch)[:, 0]
            rewards[group] = self.head(hidden.to(self.head.weight.dtype)).cpu()
        return rewards

    def score(self, answers: Sequence[Answer]) -> Tensor:
        """(N,) scores: the mean of the heads, with mean 0 and variance 1 over the samples of `normalise`."""
        return (self.rewards(answers).mean(dim=1) - self.shift) / self.scale

    def normalise(self, samples: Sequence[Answer]) -> None:
        """Choose shift and scale such that these samples of the reference score 0 +- 1.

        Raises:
            CannotLearn: the model says the same of all of them.
        """
        raw = self.rewards(samples).mean(dim=1)
        if not raw.std() > 1e-6:
            raise CannotLearn("the reward model says the same of every answer: collect more votes")
        self.shift, self.scale = float(raw.mean()), float(raw.std())

    def value_start(self, adapter: str) -> nn.Linear:
        """Copy the trunk to another adapter; return the head (d -> 1) under which that predicts the score."""
        adapters = self.backbone.adapters
        adapters.set_state(adapter, adapters.state(self.adapter))
        head = nn.Linear(self.head.in_features, 1, device=self.head.weight.device, dtype=self.head.weight.dtype)
        with torch.no_grad():
            head.weight.copy_(self.head.weight.mean(dim=0, keepdim=True) / self.scale)
            head.bias.copy_((self.head.bias.mean() - self.shift) / self.scale)
        return head

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT does, and beside it the heads."""
        self.backbone.publish(self.adapter, folder)
        tensors = {
            "weight": self.head.weight,
            "bias": self.head.bias,
            "log_nu": self.log_nu,
            "shift_and_scale": torch.tensor([self.shift, self.scale], dtype=torch.float64),
        }
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "heads.safetensors")

    @classmethod
    def load(cls, backbone: Backbone, adapter: str, folder: Path) -> "RewardModel":
        """Read what `save` wrote, under any adapter name."""
        tensors = load_file(folder / "heads.safetensors")
        model = cls(backbone, adapter, heads=len(tensors["bias"]))
        backbone.adapters.load(adapter, folder)
        with torch.no_grad():
            model.head.weight.copy_(tensors["weight"])
            model.head.bias.copy_(tensors["bias"])
            model.log_nu.copy_(tensors["log_nu"])
        model.shift, model.scale = tensors["shift_and_scale"].tolist()
        return model


def train(
    backbone: Backbone,
    adapter: str,
    pairs: Sequence[Pair],
    config: RewardConfig,
    *,
    accelerator: Accelerator,
    on_step: OnStep = lambda step, figures: None,
) -> RewardModel:
    """Fit a new reward model to the pairs. A pair counts by its weight beside the mean weight of all, in whatever batch
    it comes; one of weight 0 stays out.

    Args:
        on_step: called in every process after each optimizer step; what it raises ends the training.

    Raises:
        CannotLearn: no decisive pair, or numbers that are not finite.
    """
    pairs = [pair for pair in pairs if pair.weight]
    if all(pair.tie for pair in pairs):
        raise CannotLearn("no vote prefers one answer to another: collect votes before training")
    mean_weight = sum(pair.weight for pair in pairs) / len(pairs)
    model = RewardModel(backbone, adapter, heads=config.heads, seed=config.seed)
    if any(pair.tie for pair in pairs):
        # Adam moves it by about the learning rate a step, so it begins where two equal answers would tie so often.
        tied = sum(pair.weight for pair in pairs if pair.tie) / (mean_weight * len(pairs))
        nn.init.constant_(model.log_nu, math.log(2 * tied / (1 - tied)))
    else:
        model.log_nu.requires_grad_(False)
    model.side.requires_grad_(config.side_term)
    batches_an_epoch = -(-len(pairs) // config.batch)
    # Sides are drawn by chance: clipped with the rest, their gradient would say how much a batch's answers count.
    said = [p for p in model.parameters() if p.requires_grad and p is not model.side]
    optimizer = Optimizer(
        [said, [model.side]] if config.side_term else [said],
        learning_rate=config.learning_rate,
        steps=config.epochs * batches_an_epoch,
        accelerator=accelerator,
        max_grad_norm=config.max_grad_norm,
    )
    generator = torch.Generator().manual_seed(config.seed)
    step = 0
    for _ in range(config.epochs):
        for batch in batches_by_length(pairs, config.batch, generator):
            mine = share(batch, accelerator)
            sums = torch.zeros(2, dtype=torch.float64)  # loss, weight of those in the right order
            for group in by_length([len(pair) for pair in mine], config.microbatch_tokens):
                # Divided by the batch's own weight, one of a single rater's long chats would count in full.
                sums += _backward([mine[i] for i in group], model, config, mean_weight * len(batch))
            norm, *_ = optimizer.step()
            loss, right = (total(s, accelerator) for s in sums)
            accuracy = right / sum(pair.weight for pair in batch)
            side = float(model.first_bonus.detach())
            on_step(step, {"loss": loss, "accuracy": accuracy, "grad_norm": norm, "first_bonus": side})
            step += 1
    return model


def _backward(pairs: Sequence[Pair], model: RewardModel, config: RewardConfig, divisor: float) -> Tensor:
    """Add a microbatch's gradients; return its part of the batch's loss, and the weight of those in the right order."""
    chosen, rejected = model.pair_rewards(pairs)  # (B, K) each
    tie = torch.tensor([pair.tie for pair in pairs], device=chosen.device)
    weights = torch.tensor([pair.weight for pair in pairs], device=chosen.device, dtype=chosen.dtype)
    shown = torch.tensor([pair.shown for pair in pairs], device=chosen.device, dtype=chosen.dtype)
    liked = chosen - rejected + (shown * model.first_bonus)[:, None]
    losses = davidson_loss(liked, tie[:, None], model.log_nu) + config.centring * (chosen + rejected).square()
    loss = (losses.mean(dim=1) * weights).sum() / divisor
    loss.backward()
    right = torch.where(tie, 0.5, ((chosen - rejected).mean(dim=1) > 0).to(weights.dtype))
    return torch.stack([loss.detach(), (right * weights).sum().detach()]).double().cpu()


def batches_by_length(pairs: Sequence[Pair], size: int, generator: torch.Generator) -> list[list[Pair]]:
    """All pairs once, in random batches of similar length: sorted within random stretches of 16 batches."""
    order = torch.randperm(len(pairs), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 16 * size):
        stretch = sorted(order[start : start + 16 * size], key=lambda i: len(pairs[i]))
        batches += [[pairs[i] for i in stretch[k : k + size]] for k in range(0, len(stretch), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def report(model: RewardModel, held_out: Sequence[Pair], training: Sequence[Pair]) -> RewardReport:
    """Measure the model on pairs that were drawn by chance and that it has not seen, beside a baseline that sees the
    lengths alone, fitted to the `training` pairs.

    Raises:
        CannotLearn: no such pair is decisive.
    """
    pairs = [pair for pair in held_out if pair.measures]
    if not pairs:
        raise CannotLearn("no vote is left to measure the reward model on: collect more votes")
    rewards = model.rewards([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]).double()
    differences = rewards[: len(pairs)] - rewards[len(pairs) :]  # (N, K)
    mean = differences.mean(dim=1)
    weights = _weights(pairs)
    slope = _length_slope([pair for pair in training if not pair.tie and pair.weight])
    by_lengths = slope * _length_differences(pairs)
    return RewardReport(
        pairs=len(pairs),
        equal_pairs=float(weights.sum().square() / weights.square().sum()),
        accuracy=_accuracy(mean, weights),
        log_loss=_mean(functional.softplus(-mean), weights),
        calibration_error=_calibration_error(mean, weights),
        spread=_mean(differences.std(dim=1), weights) if differences.shape[1] > 1 else 0.0,
        length_accuracy=_accuracy(by_lengths, weights),
        length_log_loss=_mean(functional.softplus(-by_lengths), weights),
    )


def _weights(pairs: Sequence[Pair]) -> Tensor:
    """(N,) the largest of them 1."""
    most = max((pair.weight for pair in pairs), default=1.0)
    return torch.tensor([pair.weight / most for pair in pairs], dtype=torch.float64)


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def _accuracy(differences: Tensor, weights: Tensor) -> float:
    return _mean(torch.where(differences == 0, 0.5, (differences > 0).double()), weights)


def _calibration_error(differences: Tensor, weights: Tensor) -> float:
    confidence, right = torch.sigmoid(differences.abs()), (differences > 0).double()
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)
    gaps = torch.zeros(10, dtype=torch.float64).index_add(0, bins, (confidence - right) * weights)
    return float(gaps.abs().sum() / weights.sum())


def _length_differences(pairs: Sequence[Pair]) -> Tensor:
    lengths = [len(pair.chosen.response) - len(pair.rejected.response) for pair in pairs]
    return torch.tensor(lengths, dtype=torch.float64)


def _length_slope(pairs: Sequence[Pair]) -> float:
    """The maximum-likelihood w of P(chosen) = sigma(w * length difference), under a weak prior, by Newton."""
    x, weights = _length_differences(pairs), _weights(pairs)
    slope = 0.0
    for _ in range(50):
        p = torch.sigmoid(slope * x)
        gradient = float(((1 - p) * x * weights).sum()) - slope
        curvature = float((p * (1 - p) * x.square() * weights).sum()) + 1
        slope += gradient / curvature
    return slope
