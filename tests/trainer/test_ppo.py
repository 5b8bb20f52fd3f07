"""The loop itself, on a model small enough for a second."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import ppo, ppo_math
from trainer.backbone import Backbone
from trainer.encoding import Answer
from trainer.ppo import PPOConfig, learn
from trainer.rollout import LocalSampler, Sampling
from trainer.updates import CannotLearn, Optimizer

MakeBackbone = Callable[..., Backbone]
QUERIES = [(3, 4, 5), (6,), (7, 8, 9, 10, 11, 12)]
CONFIG = PPOConfig(steps=1, rollouts=12, minibatch=4, epochs=2, kl_budget=1e9, temperature=0.8)


def count_of_sevens(answers: Sequence[Answer]) -> Tensor:
    return torch.tensor([float(a.response.count(7)) - 0.1 * len(a.response) for a in answers])


def run(backbone: Backbone, config: PPOConfig = CONFIG, **changes: object) -> tuple[list[dict[str, float]], bool]:
    """Learn with everything at its simplest; return the figures of each step."""
    torch.manual_seed(1)
    head = nn.Linear(backbone.hidden_size, 1).to(backbone.base.dtype)
    sampling = Sampling(max_tokens=8, temperature=config.temperature, end_ids=frozenset({2}))
    steps: list[dict[str, float]] = []
    arguments = {
        "sample": LocalSampler(backbone, "policy", sampling), "score": count_of_sevens, "queries": QUERIES,
        "accelerator": Accelerator(), "on_step": lambda _, figures: steps.append(figures),
    } | changes  # fmt: skip
    stopped = learn(backbone, head, config=config, **arguments)
    return steps, stopped


def test_in_the_first_minibatch_of_the_first_epoch_every_ratio_is_1(
    tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios: list[Tensor] = []
    original = ppo_math.policy_loss

    def spy(*, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, **rest: object) -> Tensor:
        ratios.append((logprobs - old_logprobs).detach()[mask].exp())
        return original(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask, **rest)

    monkeypatch.setattr(ppo_math, "policy_loss", spy)
    run(tiny_backbone("policy", "value"))
    assert torch.allclose(ratios[0], torch.ones_like(ratios[0]), atol=1e-12, rtol=0)
    assert not torch.allclose(ratios[1], torch.ones_like(ratios[1]), atol=1e-4, rtol=0), "nothing has moved"


def test_microbatches_change_no_loss_and_no_gradient(tiny_backbone: MakeBackbone) -> None:
    whole, _ = run(tiny_backbone("policy", "value"), replace(CONFIG, microbatch_tokens=10_000))
    split, _ = run(tiny_backbone("policy", "value"), replace(CONFIG, microbatch_tokens=12))
    speed = {"episodes_per_s": 0.0}
    assert whole[0] | speed == pytest.approx(split[0] | speed, abs=1e-6)


def test_the_score_goes_up_and_the_reference_stays(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("value")
    backbone.adapters.add("policy")
    ids = torch.tensor([[3, 4, 5, 6]])
    before = backbone.base(input_ids=ids).logits
    config = replace(CONFIG, steps=20, rollouts=32, minibatch=16, learning_rate=1e-2, beta=0.05)
    steps, stopped = run(backbone, config)
    assert not stopped
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-12), "a new policy is the reference"
    assert steps[-1]["score"] > steps[0]["score"] + 0.5
    assert steps[-1]["kl"] > 0.5
    assert torch.equal(backbone.base(input_ids=ids).logits, before)


def test_it_stops_at_the_kl_budget_with_the_last_policy_within_it(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("value")
    backbone.adapters.add("policy")
    config = replace(CONFIG, steps=50, rollouts=24, minibatch=24, learning_rate=1e-3, beta=0.0, kl_budget=0.3)
    states: list[dict[str, Tensor]] = []
    kls: list[float] = []

    def on_step(_: int, figures: dict[str, float]) -> None:
        kls.append(figures["kl"])
        states.append(backbone.adapters.state("policy"))

    _, stopped = run(backbone, config, on_step=on_step)
    assert stopped
    assert 1 < len(kls) < 50
    assert max(kls) <= 0.3
    final = backbone.adapters.state("policy")
    # The step before the last measurement ended within the budget; the one after it did not.
    assert all(torch.equal(final[k], states[-2][k]) for k in final)


@pytest.mark.parametrize(("missing_end_score", "total"), [(-1.0, 66 - 11 - 1), (-4.0, 66 - 11 - 4), (None, 66)])
def test_an_answer_that_was_cut_off_has_a_score_of_its_own(
    tiny_backbone: MakeBackbone, missing_end_score: float | None, total: float
) -> None:
    """Twelve answers, scored 0 to 11, of which the last is cut off."""
    backbone = tiny_backbone("policy", "value")
    sampler = LocalSampler(backbone, "policy", Sampling(max_tokens=4, end_ids=frozenset({2})))

    def sample(queries: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> list[Answer]:
        return [replace(a, finished=i < 11) for i, a in enumerate(sampler(queries, seeds))]

    config = replace(CONFIG, temperature=1.0, missing_end_score=missing_end_score)
    steps, _ = run(backbone, config, sample=sample, score=lambda answers: torch.arange(float(len(answers))))
    assert steps[0]["finished"] == 11 / 12
    assert steps[0]["score"] == pytest.approx(total / 12)


def test_answers_that_were_all_cut_off_end_with_a_sentence(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("policy", "value")
    never = LocalSampler(backbone, "policy", Sampling(max_tokens=4, end_ids=frozenset()))
    with pytest.raises(CannotLearn, match=r"no answer ended.*raise training.max_answer_tokens"):
        run(backbone, replace(CONFIG, temperature=1.0), sample=never)


def test_the_sampler_draws_what_the_trainer_computes(tiny_backbone: MakeBackbone) -> None:
    """Sampled k1 of the policy against itself at the temperature of sampling: entropies agree."""
    backbone = tiny_backbone("policy", "value", seed=3)
    sampling = Sampling(max_tokens=1, temperature=0.8, end_ids=frozenset())
    answers = LocalSampler(backbone, "policy", sampling)([QUERIES[2]] * 4000, range(4000))
    counts = torch.bincount(torch.tensor([a.response[0] for a in answers]), minlength=32) / 4000
    with torch.no_grad(), backbone.adapters.on("policy"):
        logits = backbone.base(input_ids=torch.tensor([QUERIES[2]])).logits[0, -1]
    assert torch.allclose(counts.double(), torch.softmax(logits / 0.8, dim=0), atol=0.03)


def test_an_engines_logprobs_weigh_its_tokens(tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("policy", "value")
    sample = LocalSampler(backbone, "policy", Sampling(max_tokens=8, temperature=0.8, end_ids=frozenset({2})))
    weights: list[Tensor] = []
    original = ppo_math.importance_weights
    monkeypatch.setattr(
        ppo_math, "importance_weights", lambda **kwargs: weights.append(original(**kwargs)) or weights[-1]
    )

    def from_engine(queries: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> list[Answer]:
        return [replace(a, sampler_logprobs=(-50.0,) * len(a.response)) for a in sample(queries, seeds)]

    run(backbone, sample=sample)
    run(backbone, sample=from_engine)
    assert set(weights[0].unique().tolist()) == {0.0, 1.0}
    assert set(weights[1].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_ends_with_a_sentence(tiny_backbone: MakeBackbone, broken: float) -> None:
    def score(answers: Sequence[Answer]) -> Tensor:
        return count_of_sevens(answers).index_fill(0, torch.tensor([0]), broken)

    with pytest.raises(CannotLearn, match="NaN or infinite"):
        run(tiny_backbone("policy", "value"), replace(CONFIG, missing_end_score=None), score=score)


def test_no_prompt_ends_with_a_sentence(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(CannotLearn, match="no prompt"):
        run(tiny_backbone("policy", "value"), queries=[])


def test_a_gradient_that_is_no_number_ends_with_a_sentence() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Optimizer([[parameter]], learning_rate=1.0, steps=2, accelerator=Accelerator())
    (parameter * math.nan).sum().backward()
    with pytest.raises(CannotLearn, match="NaN"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_the_learning_rate_falls_to_0_and_groups_are_clipped_alone() -> None:
    small, large = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Optimizer([[small], [large]], learning_rate=1.0, steps=2, accelerator=Accelerator(), max_grad_norm=1.0)
    rates = []
    for _ in range(2):
        (0.5 * small + 100 * large).sum().backward()
        rates.append(optimizer._adamw.param_groups[0]["lr"])
        assert optimizer.step() == pytest.approx([0.5, 100.0])
    assert rates == [1.0, 0.5]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_go_back_in_order(processes: int) -> None:
    items = list(range(11))
    gathered = [i for p in range(processes) for i in items[p::processes]]
    assert ppo._in_order(gathered, processes) == items
