"""The learning bench."""

import pytest

from bench import learning
from data.settings import STARTER
from trainer.ppo import PPOConfig
from trainer.reward_model import RewardConfig


def test_the_kl_is_that_of_the_policy_that_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning.Bench, "probes", lambda bench, adapter: {})  # thousands of answers
    bench = learning.Bench(seed=1, bf16=False, model=STARTER)
    once = PPOConfig(steps=1, rollouts=8, minibatch=4, learning_rate=0.01)
    figures = bench.run(16, 8, 0.0, once, RewardConfig(epochs=1))
    assert figures["curve"][0]["kl"] == 0  # the step's own answers are the reference's
    assert figures["kl"] != 0  # that of the answers after it
