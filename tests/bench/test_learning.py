"""What the learning benches measure is what ships."""

from bench import learning, nights
from bench.demo import Plan
from trainer.ppo import PPOConfig


def test_as_many_steps_are_measured_and_shown_as_a_run_takes_by_itself() -> None:
    assert PPOConfig() == learning.PPO
    assert PPOConfig().steps == nights.PPO_STEPS
    assert Plan().steps == PPOConfig().steps
