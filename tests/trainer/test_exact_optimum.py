"""The loop, unchanged, on a problem whose optimum is known in closed form.

Vocabulary 16, answers of three tokens: all 4,096 are enumerated. With a reward r and the reference's
probabilities at the temperature of sampling, E[r] - beta * KL is largest at pi* = ref * exp(r / beta) / Z, and is
beta * log Z there. The reward is a random table over successive tokens; whatever was drawn, the reference has 3 nats
of entropy and the optimum is half a nat away. The adapters of this model can get there: what is missing is the loop's.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import ppo, ppo_math
from trainer.backbone import Backbone
from trainer.encoding import Answer, Batch, collate
from trainer.ppo import PPOConfig, learn
from trainer.rollout import LocalSampler, Sampling

QUERY = (1, 2)
EVERY = [Answer(QUERY, response, False) for response in itertools.product(range(16), repeat=3)]
TEMPERATURE = 0.5
CONFIG = PPOConfig(
    steps=60, rollouts=512, minibatch=256, epochs=4, microbatch_tokens=10_000, learning_rate=5e-4, beta=1.0,
    temperature=TEMPERATURE, missing_end_score=None, kl_budget=1e9,
)  # fmt: skip


@dataclass
class World:
    """A backbone, a reward, and what is exactly true of them."""

    backbone: Backbone
    value_head: nn.Linear
    reward: Tensor  # (4096,)

    def score(self, answers: Sequence[Answer]) -> Tensor:
        tokens = torch.tensor([a.response for a in answers])
        return self.reward[(tokens[:, 0] * 16 + tokens[:, 1]) * 16 + tokens[:, 2]]

    def sampler(self) -> LocalSampler:
        sampling = Sampling(max_tokens=3, temperature=TEMPERATURE, end_ids=frozenset())
        return LocalSampler(self.backbone, "policy", sampling, rows=8192)

    @torch.no_grad()
    def logprobs(self, adapter: str | None) -> Tensor:
        """(4096,) of every answer, in float64."""
        with self.backbone.adapters.on(adapter):
            return self.backbone.logprobs(collate(EVERY), temperature=TEMPERATURE).double().sum(dim=1)

    def kl(self) -> float:
        logprobs = self.logprobs("policy")
        return float((logprobs.exp() * (logprobs - self.logprobs(None))).sum())

    def reached(self) -> float:
        """(J - J of the reference) / (J* - J of the reference)."""
        ref, reward = self.logprobs(None), self.reward.double()
        best = CONFIG.beta * torch.logsumexp(ref + reward / CONFIG.beta, dim=0)
        start = (ref.exp() * reward).sum()
        here = (self.logprobs("policy").exp() * reward).sum() - CONFIG.beta * self.kl()
        return float((here - start) / (best - start))

    def learn(self, config: PPOConfig) -> None:
        learn(
            self.backbone, self.value_head, [QUERY], self.sampler(), self.score, config, accelerator=Accelerator()
        )  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.1, attention_dropout=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    backbone = Backbone(model, rank=32, alpha=32)
    backbone.adapters.add("policy")
    backbone.adapters.add("value")
    head = nn.Linear(128, 1)
    nn.init.zeros_(head.weight)
    table = torch.randn(16, 16)  # of a token and the next
    reward = (table[QUERY[-1]][:, None, None] + table[:, :, None] + table).flatten()
    world = World(backbone, head, reward)

    drawn = model.lm_head.weight.clone()

    def entropy(scale: float) -> float:
        model.lm_head.weight.copy_(drawn * scale)
        ref = world.logprobs(None)
        return -float((ref.exp() * ref).sum())

    def distance(scale: float) -> float:
        best = (ref + scale * reward / CONFIG.beta).log_softmax(dim=0)
        return float((best.exp() * (best - ref)).sum())

    entropy(where(lambda scale: -entropy(scale), -3.0))
    ref = world.logprobs(None)
    world.reward = reward * where(distance, 0.5)
    return world


def where(rising: Callable[[float], float], wanted: float) -> float:
    """The number at which it takes the wanted value."""
    low, high = 0.01, 100.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return low


@pytest.fixture(scope="module")
def learned(world: World) -> World:
    world.learn(CONFIG)
    return world


def test_the_enumeration_is_complete(world: World) -> None:
    for adapter in (None, "policy"):
        assert world.logprobs(adapter).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_ppo_reaches_the_optimum(learned: World) -> None:
    assert learned.reached() >= 0.98


def test_the_sampled_kl_is_the_enumerated_one(learned: World) -> None:
    answers = learned.sampler()([QUERY] * 2**17, range(2**17))
    tokens = torch.tensor([a.response for a in answers])
    index = (tokens[:, 0] * 16 + tokens[:, 1]) * 16 + tokens[:, 2]
    k1 = (learned.logprobs("policy") - learned.logprobs(None))[index]
    assert k1.mean().item() == pytest.approx(learned.kl(), rel=0.02)


def k3_rewards(*, logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    difference = ref_logprobs - logprobs
    k3 = difference.exp() - 1 - difference
    return (-beta * k3).scatter_add(1, mask.sum(dim=1, keepdim=True) - 1, scores[:, None])


def with_k3(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_math, "kl_rewards", k3_rewards)


def with_unscaled_temperature(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Backbone.logprobs
    monkeypatch.setattr(Backbone, "logprobs", lambda self, batch, temperature: original(self, batch, temperature=1.0))


def with_dropout(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in world.backbone.base.modules():
        monkeypatch.setattr(module, "training", True)


def with_wrong_positions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(answers: Sequence[Answer], device: torch.device) -> Batch:
        batch = collate(answers, device)
        # As if each response began where a longer, padded query ends.
        positions = torch.arange(batch.input_ids.shape[1]) + 60 * (torch.arange(batch.input_ids.shape[1]) >= 2)
        mask = torch.ones_like(batch.input_ids)
        return replace(batch, position_ids=positions.expand_as(mask), attention_mask=mask)

    monkeypatch.setattr(ppo, "collate", shifted)


Mistake = Callable[[World, pytest.MonkeyPatch], None]


def after_a_mistake(world: World, mistake: Mistake | None) -> float:
    """Go on from the optimum for a while; give back what is left of it, and put policy and values back: after a head
    that one mistake has spoiled, another one says little."""
    kept = {name: world.backbone.adapters.state(name) for name in ("policy", "value")}
    head = {name: values.clone() for name, values in world.value_head.state_dict().items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        if mistake:
            mistake(world, monkeypatch)
        world.learn(replace(CONFIG, steps=7, learning_rate=3e-4, seed=1))
    left = world.reached()
    for name, state in kept.items():
        world.backbone.adapters.set_state(name, state)
    world.value_head.load_state_dict(head)
    return left


@pytest.fixture(scope="module")
def without_mistake(learned: World) -> float:
    return after_a_mistake(learned, None)


def test_the_loop_stays_at_the_optimum(without_mistake: float) -> None:
    assert without_mistake >= 0.97


@pytest.mark.parametrize("mistake", [with_k3, with_unscaled_temperature, with_dropout, with_wrong_positions])
def test_a_mistake_leads_away_from_the_optimum(learned: World, without_mistake: float, mistake: Mistake) -> None:
    assert after_a_mistake(learned, mistake) < without_mistake - 0.015
