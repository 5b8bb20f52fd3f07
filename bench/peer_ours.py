"""Our half of `bench.peers`, one measurement in a process of its own.

    python bench/peer_ours.py TASK.json

The task names the model, the data and the settings; the last line printed is the figures as JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from bench.peer_trl import resident
from data.settings import Settings, TrainingSettings
from trainer import ppo as learning
from trainer import reward_model
from trainer.__main__ import be_a_guest
from trainer.backbone import Backbone
from trainer.encoding import Answer
from trainer.ppo import PPOConfig
from trainer.reward_model import Pair, RewardConfig, RewardModel
from trainer.rollout import LocalSampler, Sampling


def reward(task: dict[str, Any]) -> dict[str, Any]:
    """Fit a reward model to the pairs."""
    backbone = Backbone.load(task["model"], rank=task["rank"], alpha=task["alpha"], bf16=task["bf16"])
    before = resident("VmRSS")
    data = json.loads(Path(task["data"]).read_text())
    config = RewardConfig(**task["settings"] | {"seed": task["seed"]})
    ends: list[float] = []
    model = reward_model.train(
        backbone, "reward", _pairs(data["pairs"]), config,
        accelerator=Accelerator(), on_step=lambda step, figures: ends.append(time.monotonic()),
    )  # fmt: skip
    peak = resident("VmHWM")
    held_out = _pairs(data["held_out"])
    return {
        "before": before,
        "peak": peak,
        "pairs": len(data["pairs"]) - config.batch,
        "seconds": ends[-1] - ends[0],
        "accuracy": reward_model.report(model, held_out, held_out).accuracy,
    }


def ppo(task: dict[str, Any]) -> dict[str, Any]:
    """Some steps of PPO; the policy's adapter is left in the task's folder."""
    backbone = Backbone.load(task["model"], rank=task["rank"], alpha=task["alpha"], bf16=task["bf16"])
    scorer = RewardModel.load(backbone, "reward", Path(task["reward"]))
    before = resident("VmRSS")
    data = json.loads(Path(task["data"]).read_text())
    config = PPOConfig(**task["settings"] | {"seed": task["seed"]})
    ends: list[float] = []
    steps: list[dict[str, float]] = []

    def on_step(step: int, figures: dict[str, float]) -> None:
        ends.append(time.monotonic())
        steps.append(figures)

    torch.manual_seed(task["seed"])
    backbone.adapters.add("policy")
    sampling = Sampling(max_tokens=task["max_tokens"], temperature=config.temperature, end_ids=backbone.end_ids)
    learning.learn(
        backbone, scorer.value_start("value"), [tuple(query) for query in data["queries"]],
        LocalSampler(backbone, "policy", sampling), scorer.score, config, accelerator=Accelerator(), on_step=on_step,
    )  # fmt: skip
    peak = resident("VmHWM")
    backbone.publish("policy", Path(task["out"]) / "policy")
    checks = [Answer(tuple(query), tuple(response), True) for query, response in data["checks"]]
    return {
        "before": before,
        "peak": peak,
        "episodes": config.rollouts * (len(ends) - 1),
        "tokens": round(config.rollouts * sum(figures["length"] for figures in steps[1:])),
        "seconds": ends[-1] - ends[0],
        "score": [figures["score"] for figures in steps],
        "kl": [figures["kl"] for figures in steps],
        "checks": scorer.score(checks).tolist(),
    }


def _pairs(rows: list[list[list[int]]]) -> list[Pair]:
    return [Pair(Answer(tuple(q), tuple(c), True), Answer(tuple(q), tuple(r), True)) for q, c, r in rows]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    be_a_guest(Settings(training=TrainingSettings(nice=0)))
    torch.set_flush_denormal(True)  # as `python -m trainer` does
    torch.set_num_threads(task["threads"])
    print(json.dumps({"reward": reward, "ppo": ppo}[task["kind"]](task)))


if __name__ == "__main__":
    main()
