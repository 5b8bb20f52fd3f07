"""Two processes under gloo, each with its share of the work, learn what one process learns."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import reward_model, updates
from trainer.backbone import Backbone
from trainer.ppo import PPOConfig, learn
from trainer.reward_model import Pair, RewardConfig
from trainer.rollout import LocalSampler, Sampling


def learn_a_little() -> dict[str, list[float]]:
    """Three reward steps and three PPO steps, with numbers of rows that two processes cannot share evenly."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    backbone = Backbone(LlamaForCausalLM(config).double(), rank=8, alpha=16)
    queries = [(3, 4, 5), (6,), (7, 8, 9, 10, 11, 12)]
    samples = LocalSampler(backbone, None, Sampling(max_tokens=8, end_ids=frozenset({2})))(queries * 22, range(66))
    pairs = [Pair(a, b, tie=i % 5 == 0) for i, (a, b) in enumerate(zip(samples[:33], samples[33:], strict=True))]
    figures: dict[str, list[float]] = {}

    def record(step: int, values: dict[str, float]) -> None:
        for name, value in (values | {"episodes_per_s": 0.0}).items():
            figures.setdefault(f"{step} {name}", []).append(value)

    model = reward_model.train(
        backbone, "reward", pairs, RewardConfig(batch=11, learning_rate=1e-2), accelerator=accelerator,
        on_step=record,
    )  # fmt: skip
    model.normalise(samples)
    backbone.adapters.add("policy")
    learn(
        backbone, model.value_start("value"), queries,
        LocalSampler(backbone, "policy", Sampling(max_tokens=8, end_ids=frozenset({2}))), model.score,
        PPOConfig(steps=3, rollouts=13, minibatch=5, kl_budget=1e9), accelerator=accelerator, on_step=record,
    )  # fmt: skip
    return figures


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"{rank}.json")],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    alone = learn_a_little()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answer["processes"] == 2
        assert answer["figures"].keys() == alone.keys()
        for name, values in alone.items():
            assert answer["figures"][name] == pytest.approx(values, abs=1e-5), name
    assert len(alone["2 policy_loss"]) == 1
    assert abs(alone["2 kl"][0]) > 1e-3


def test_sums_are_added_up_where_the_processes_can_speak_to_one_another() -> None:
    """NCCL knows the memory of GPUs alone, and losses are summed in the processor's."""

    def reduce(value: torch.Tensor, reduction: str) -> torch.Tensor:
        assert value.device.type == "meta"
        return torch.tensor(7.0)

    gpus = SimpleNamespace(num_processes=2, device=torch.device("meta"), reduce=reduce)
    assert updates.total(torch.tensor(3.0), gpus) == 7.0


if __name__ == "__main__":
    result = learn_a_little()
    Path(sys.argv[1]).write_text(json.dumps({"processes": Accelerator().num_processes, "figures": result}))
    torch.distributed.destroy_process_group()
