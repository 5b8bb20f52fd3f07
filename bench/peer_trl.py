"""TRL's half of `bench.peers`: run by the Python of an environment that has TRL, and knows nothing of ours.

    PYTHON bench/peer_trl.py TASK.json

The task names the model, the data and the settings; the last line printed is the figures as JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def resident(field: str) -> int:
    """Bytes of memory: VmRSS now, VmHWM at most so far. ru_maxrss would count the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reward(task: dict[str, Any]) -> dict[str, Any]:
    """One epoch of RewardTrainer on the pairs."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    torch.manual_seed(task["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=torch.float32)
    nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)  # as ours begins
    before = resident("VmRSS")
    data = json.loads(Path(task["data"]).read_text())
    rows = [{"chosen_ids": q + c, "rejected_ids": q + r} for q, c, r in data["pairs"]]
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    settings = task["settings"]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.monotonic())

    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(Path(task["out"]) / "trainer"), seed=task["seed"], max_length=None,
            per_device_train_batch_size=settings["batch"], num_train_epochs=settings["epochs"],
            learning_rate=settings["learning_rate"], lr_scheduler_type="linear",
            adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5, max_grad_norm=settings["max_grad_norm"],
            center_rewards_coefficient=settings["centring"],
            train_sampling_strategy="group_by_length", remove_unused_columns=False,
            use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
            report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [row | {"length": length} for row, length in zip(rows, lengths, strict=True)]
        ),
        processing_class=tokenizer,
        callbacks=[Clock()],
        peft_config=LoraConfig(
            task_type="SEQ_CLS", r=task["rank"], lora_alpha=task["alpha"], lora_dropout=0.0,
            target_modules="all-linear", modules_to_save=["score"],
        ),
    )  # fmt: skip
    trainer.train()
    peak = resident("VmHWM")

    right = 0
    trainer.model.eval()
    held_out = [{"chosen_ids": q + c, "rejected_ids": q + r} for q, c, r in data["held_out"]]
    for start in range(0, len(held_out), 32):
        with torch.no_grad():
            rewards = trainer.model(**trainer.data_collator(held_out[start : start + 32])).logits[:, 0]
        chosen, rejected = rewards.chunk(2)
        right += int((chosen > rejected).sum())
    return {
        "before": before,
        "peak": peak,
        "pairs": len(rows) - settings["batch"],
        "seconds": ends[-1] - ends[0],
        "accuracy": right / len(held_out),
    }


def ppo(task: dict[str, Any]) -> dict[str, Any]:
    """Some steps of PPOTrainer; the policy's adapter is left in the task's folder."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    value, scorer = (
        AutoModelForSequenceClassification.from_pretrained(task["classifier"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    before = resident("VmRSS")
    data = json.loads(Path(task["data"]).read_text())
    settings = task["settings"]
    ends: list[float] = []
    tokens: list[int] = []
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=task["rank"], lora_alpha=task["alpha"], lora_dropout=0.0, target_modules="all-linear"
    )

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.monotonic())

    generate = ppo_trainer.batch_generation

    def counted(model: nn.Module, queries: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sequences, logits = generate(model, queries, *rest)
        tokens.append(int((sequences[:, queries.shape[1] :] != tokenizer.pad_token_id).sum()))
        return sequences, logits

    ppo_trainer.batch_generation = counted
    get_reward = ppo_trainer.get_reward

    def mean_reward(
        model: nn.Module, sequences: torch.Tensor, pad: int, context: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The reward of an answer is the mean of its tokens' scores; TRL itself takes the last one's."""
        scores, last, ends = get_reward(model, sequences, pad, context)
        if model is scorer:
            tokens = scores[:, context:, 0]
            inside = torch.arange(context, sequences.shape[1]) <= ends[:, None]
            last = (tokens * inside).sum(dim=1) / inside.sum(dim=1)
        return scores, last, ends

    ppo_trainer.get_reward = mean_reward
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(Path(task["out"]) / "trainer"), seed=task["seed"],
            total_episodes=settings["steps"] * settings["rollouts"],
            per_device_train_batch_size=settings["rollouts"], gradient_accumulation_steps=1,
            num_mini_batches=settings["rollouts"] // settings["minibatch"], num_ppo_epochs=settings["epochs"],
            response_length=task["max_tokens"], stop_token="eos", temperature=settings["temperature"],
            missing_eos_penalty=None, kl_coef=settings["beta"], gamma=settings["gamma"], lam=settings["lam"],
            cliprange=settings["clip"], cliprange_value=settings["value_clip"],
            learning_rate=settings["learning_rate"], lr_scheduler_type="linear",
            adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5,
            use_cpu=True, bf16=False, num_sample_generations=0,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=scorer,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": data["queries"]}),
        callbacks=[Clock()],
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    peak = resident("VmHWM")
    trainer.policy_model.save_pretrained(Path(task["out"]) / "policy")
    with torch.no_grad():
        checks = [
            float(mean_reward(scorer, torch.tensor([q + r]), tokenizer.pad_token_id, len(q))[1])
            for q, r in data["checks"]
        ]
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    return {
        "before": before,
        "peak": peak,
        "episodes": settings["rollouts"] * (len(ends) - 1),
        "tokens": sum(tokens[1:]),
        "seconds": ends[-1] - ends[0],
        "score": [log["objective/scores"] for log in logs],
        "kl": [log["objective/kl"] for log in logs],
        "checks": checks,
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    print(json.dumps({"reward": reward, "ppo": ppo}[task["kind"]](task)))


if __name__ == "__main__":
    main()
