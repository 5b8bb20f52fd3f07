import pytest
import torch

from trainer import ppo_math

torch.manual_seed(0)
LENGTHS = torch.tensor([5, 1, 7, 3])
MASK = torch.arange(7)[None, :] < LENGTHS[:, None]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_a_plain_double_loop(gamma: float, lam: float) -> None:
    rewards, values = random(4, 7), random(4, 7)
    advantages, returns = ppo_math.gae(rewards=rewards, values=values, mask=MASK, gamma=gamma, lam=lam)
    for b in range(4):
        n = int(LENGTHS[b])
        for t in range(n):
            expected = 0.0
            for k in range(t, n):
                following = values[b, k + 1].item() if k + 1 < n else 0.0
                delta = rewards[b, k].item() + gamma * following - values[b, k].item()
                expected += (gamma * lam) ** (k - t) * delta
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + values[b, t].item(), abs=1e-12)


def test_what_lies_in_the_padding_changes_no_advantage() -> None:
    rewards, values = random(4, 7), random(4, 7)
    plain = ppo_math.gae(rewards=rewards, values=values, mask=MASK, gamma=1.0, lam=0.95)
    junk = ppo_math.gae(
        rewards=rewards.masked_fill(~MASK, 1e9), values=values.masked_fill(~MASK, torch.nan), mask=MASK,
        gamma=1.0, lam=0.95,
    )  # fmt: skip
    assert torch.equal(plain[0][MASK], junk[0][MASK])


def test_rewards_charge_k1_on_each_token_and_pay_the_score_on_the_last() -> None:
    logprobs, ref_logprobs, scores = random(4, 7), random(4, 7), random(4)
    rewards = ppo_math.kl_rewards(logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores, mask=MASK, beta=0.3)
    for b in range(4):
        n = int(LENGTHS[b])
        for t in range(7):
            expected = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]).item() if t < n else 0.0
            expected += scores[b].item() if t == n - 1 else 0.0
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-12)


def test_whitened_entries_have_mean_0_and_variance_1_over_the_mask_alone() -> None:
    white = ppo_math.whiten(3 * random(4, 7) + 5, MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert torch.all(white[~MASK] == 0)


def test_constant_advantages_whiten_to_zero_and_not_to_nan() -> None:
    assert torch.all(ppo_math.whiten(torch.full((4, 7), 2.0), MASK) == 0)


def test_at_ratio_1_the_policy_gradient_is_the_plain_one() -> None:
    old, advantages = random(4, 7), random(4, 7)
    logprobs = old.clone().requires_grad_()
    tokens = int(MASK.sum())
    loss = ppo_math.policy_loss(
        logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=MASK, clip=0.2, tokens=tokens
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, torch.where(MASK, -advantages / tokens, 0.0))


@pytest.mark.parametrize(("shift", "advantage", "moves"), [(0.5, 1, 0), (0.5, -1, 1), (-0.5, 1, 1), (-0.5, -1, 0)])
def test_a_clipped_token_stops_moving_only_in_the_direction_it_went(shift: float, advantage: int, moves: int) -> None:
    logprobs = torch.full((1, 1), shift).requires_grad_()
    loss = ppo_math.policy_loss(
        logprobs=logprobs, old_logprobs=torch.zeros(1, 1), advantages=torch.full((1, 1), float(advantage)),
        mask=torch.ones(1, 1, dtype=torch.bool), clip=0.2, tokens=1,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert bool(gradient.abs() > 0) == bool(moves)


def test_losses_of_row_splits_add_up_to_the_loss_of_the_whole() -> None:
    x = {name: random(4, 7) for name in ("logprobs", "old_logprobs", "advantages", "weights")}
    v = {name: random(4, 7) for name in ("values", "old_values", "returns")}
    tokens = int(MASK.sum())

    def both(rows: slice) -> torch.Tensor:
        policy = ppo_math.policy_loss(**{k: t[rows] for k, t in x.items()}, mask=MASK[rows], clip=0.2, tokens=tokens)
        return policy + ppo_math.value_loss(
            **{k: t[rows] for k, t in v.items()}, mask=MASK[rows], clip=0.2, tokens=tokens
        )

    parts = both(slice(0, 1)) + both(slice(1, 3)) + both(slice(3, 4))
    assert parts.item() == pytest.approx(both(slice(0, 4)).item(), abs=1e-12)


def test_the_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    kwargs = {"old_values": torch.zeros(1, 1), "mask": one, "clip": 0.2, "tokens": 1}
    jumped = ppo_math.value_loss(values=torch.ones(1, 1), returns=torch.ones(1, 1), **kwargs)
    assert jumped.item() == pytest.approx(0.5 * 0.8**2)
    near = ppo_math.value_loss(values=torch.full((1, 1), 0.1), returns=torch.ones(1, 1), **kwargs)
    assert near.item() == pytest.approx(0.5 * 0.9**2)


def test_importance_weights_are_the_ratio_up_to_the_cap() -> None:
    old = torch.tensor([[0.0, 0.0, 0.0]])
    sampler = torch.tensor([[0.5, -0.5, -3.0]])
    weights = ppo_math.importance_weights(
        old_logprobs=old, sampler_logprobs=sampler, mask=torch.ones(1, 3, dtype=torch.bool), cap=2.0
    )
    assert weights.tolist()[0] == pytest.approx([0.6065307, 1.6487213, 2.0])


def test_the_clipped_fraction_counts_tokens_outside_the_band() -> None:
    logprobs = torch.tensor([[0.1, 0.3, -0.3, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    fraction = ppo_math.clipped_fraction(
        logprobs=logprobs, old_logprobs=torch.zeros(1, 4), mask=mask, clip=0.2, tokens=3
    )
    assert fraction.item() == pytest.approx(2 / 3)
