"""What the learning benches measure is what ships."""

import pytest

from bench import learning, nights
from bench.demo import Plan
from data.settings import STARTER
from trainer.ppo import PPOConfig
from trainer.reward_model import RewardConfig


def test_as_many_steps_are_measured_and_shown_as_a_run_takes_by_itself() -> None:
    assert PPOConfig() == learning.PPO
    assert PPOConfig().steps == nights.PPO_STEPS
    assert Plan().steps == PPOConfig().steps


def test_the_kl_is_that_of_the_policy_that_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning.Bench, "probes", lambda bench, adapter: {})  # thousands of answers
    bench = learning.Bench(seed=1, bf16=False, model=STARTER)
    once = PPOConfig(steps=1, rollouts=8, minibatch=4, learning_rate=0.01)
    figures = bench.run(16, 8, 0.0, once, RewardConfig(epochs=1))
    assert figures["curve"][0]["kl"] == 0  # the step's own answers are the reference's
    assert figures["kl"] != 0  # that of the answers after it
