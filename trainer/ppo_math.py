"""The arithmetic of PPO: tensors in, tensors out, no model in sight.

Every tensor is (B, R): B answers, R response positions, padded on the right; `mask` is True on real response
tokens. Losses are sums divided by `tokens`, the number of response tokens of the whole minibatch on all
processes, so that the gradients of microbatches simply add up.
"""

import torch
from torch import Tensor


def kl_rewards(*, logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Per-token rewards: -beta * k1 on every token, plus the answer's score on its last token.

    k1 = logprob - ref_logprob (nats) is the estimator whose expected gradient through the reward is that of
    the KL divergence; k3 has a lower variance and is biased there.

    Args:
        scores: (B,) what the reward model says of the whole answer.
        mask: (B, R), at least one True in every row.
    """
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(*, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16) and the returns values + advantages.

    An answer ends after its last token: the value of what follows is 0.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the masked entries to mean 0 and variance 1; the rest becomes 0."""
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count
    centred = torch.where(mask, x - mean, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / count + 1e-8)


def policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    tokens: int,
    weights: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate (Schulman et al. 2017, eq. 7), each token weighted by `weights` where given."""
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if weights is not None:
        loss = loss * weights
    return torch.where(mask, loss, 0.0).sum() / tokens


def value_loss(
    *, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, tokens: int
) -> Tensor:
    """Half the squared error, or that of the values kept within `clip` of the old, if it is larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    loss = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return torch.where(mask, loss, 0.0).sum() / tokens


def clipped_fraction(*, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip: float, tokens: int) -> Tensor:
    """The share of tokens whose ratio has left [1 - clip, 1 + clip]."""
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    return ((ratio - 1).abs() > clip).sum() / tokens


def importance_weights(*, old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """What a token sampled elsewhere counts for: min(p_trainer / p_sampler, cap), and 0 outside the mask.

    Truncated importance sampling (Ionides 2008) between the trainer's policy and the engine that sampled.
    """
    ratio = torch.exp(torch.where(mask, old_logprobs - sampler_logprobs, 0.0))
    return torch.where(mask, ratio.clamp(max=cap), 0.0)
