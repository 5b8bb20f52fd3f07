"""How much of a GPU the trainer uses, in scoring and in PPO's update, on a model of Qwen3-0.6B's shape.

The model is random, in bfloat16; 128 answers of 256 tokens to prompts of 256 tokens. Scoring is one pass that gives
the policy's log-probabilities of the answers. An update is all of a PPO step but the sampling: the passes of policy,
reference and value model over the answers, advantages, and one epoch of forward and backward passes of policy and
value model with an optimizer step at the end. The score itself is given, not computed.

The share is of a large bfloat16 matmul's FLOP/s, measured in the same run. Only work that the mathematics asks for is
counted: no padding, no prompt position in the output head, no recomputation, causal attention as half a square, and no
gradient of frozen weights. Peak memory is what PyTorch had allocated at most, the model included.

Where TRL 1.12.0, the last release with a PPOTrainer, can be imported, its update is timed in the same run, from the
end of its sampling: LoRA on the policy, a value model trained in full, a reward model of one tiny layer.

    python -m bench.gpu [--quick] [--json] [--seed N]
"""

import argparse
import gc
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer import ppo
from trainer.backbone import Backbone
from trainer.encoding import Answer, collate
from trainer.ppo import PPOConfig
from trainer.rollout import Query

TRL = "1.12.0"

QWEN3 = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 40960,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is done to which model."""

    batch: int = 128
    prompt: int = 256
    answer: int = 256
    microbatch_tokens: int = 16384
    matmul: int = 8192
    """Rows and columns of the matrices whose product is the ceiling."""
    repetitions: int = 5
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt + self.answer)

    @property
    def microbatch(self) -> int:
        """Answers in one forward and backward."""
        return max(1, self.microbatch_tokens // (self.prompt + self.answer))

    def answers(self, vocab_size: int) -> list[Answer]:
        """Random tokens; 0 and 1 are left to padding and the end."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(2, vocab_size, (self.batch, self.prompt + self.answer), generator=generator).tolist()
        return [Answer(tuple(row[: self.prompt]), tuple(row[self.prompt :]), True) for row in rows]


@dataclass(frozen=True, slots=True)
class Forward:
    """FLOP of one forward pass over a batch, a multiply-add being two."""

    linear: int
    """The frozen linear layers."""
    lora: int
    """One adapter on them."""
    attention: int
    """Scores and sums of values, under the causal mask."""
    head: int
    """The output head on the answers' positions."""
    value_head: int
    first: int
    """The part of a backward pass that nobody needs: gradients of what enters the first layer's attention."""

    @property
    def scoring(self) -> int:
        """Log-probabilities under an adapter."""
        return self.linear + self.lora + self.attention + self.head

    @property
    def update(self) -> int:
        """Three passes without gradients, then forward and backward of policy and value model.

        A backward pass costs as much as the forward in frozen layers (one gradient), twice as much elsewhere (two).
        """
        policy, reference = self.scoring, self.linear + self.attention + self.head
        value = self.linear + self.lora + self.attention + self.value_head
        learn_policy = 2 * self.linear + 3 * self.lora + 3 * self.attention + 2 * self.head - self.first
        learn_value = 2 * self.linear + 3 * self.lora + 3 * self.attention + 3 * self.value_head - self.first
        return policy + reference + value + learn_policy + learn_value


def forward_flop(backbone: Backbone, work: Work) -> Forward:
    config = backbone.base.config
    rank, hidden = backbone.adapters.rank, backbone.hidden_size
    weights = {path: layer.base.weight for path, layer in backbone.adapters.layers.items()}
    first = [w for path, w in weights.items() if path.endswith(tuple(f"layers.0.self_attn.{p}_proj" for p in "qkv"))]
    length = work.prompt + work.answer
    seen = work.batch * length * (length + 1) // 2  # pairs of a token and one that it sees
    positions = work.batch * work.answer
    return Forward(
        linear=2 * work.tokens * sum(w.numel() for w in weights.values()),
        lora=2 * work.tokens * rank * sum(sum(w.shape) for w in weights.values()),
        attention=4 * seen * config.num_hidden_layers * config.num_attention_heads * config.head_dim,
        head=2 * positions * hidden * backbone.vocab_size,
        value_head=2 * positions * hidden,
        first=2 * work.tokens * sum(w.numel() + rank * hidden for w in first),
    )


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    peak: int
    """Bytes; 0 where there is no GPU."""


def random_backbone(device: torch.device, dtype: torch.dtype, shape: dict[str, Any], seed: int) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(random_model(Qwen3ForCausalLM, device, dtype, shape))


def random_model(kind: Any, device: torch.device, dtype: torch.dtype, shape: dict[str, Any]) -> Any:
    with device:
        model = kind(Qwen3Config(**shape))
    return model.to(dtype)


def matmul_flop_s(device: torch.device, dtype: torch.dtype, work: Work) -> float:
    """FLOP/s of one large product."""
    n = work.matmul
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 * 10 / timed(lambda: [a @ b for _ in range(10)], device, work.repetitions).seconds


def scoring(backbone: Backbone, work: Work) -> Measured:
    """One pass over all answers that gives the policy's log-probabilities."""
    answers = work.answers(backbone.vocab_size)
    batches = [
        collate(answers[i : i + work.microbatch], backbone.device) for i in range(0, work.batch, work.microbatch)
    ]

    @torch.no_grad()
    def score() -> None:
        with backbone.adapters.on("policy"):
            for batch in batches:
                backbone.logprobs(batch, temperature=1.0)

    return timed(score, backbone.device, work.repetitions)


def update(backbone: Backbone, work: Work) -> Measured:
    """PPO on answers that are given, so that a step is nothing but its update; the first one warms up."""
    answers = work.answers(backbone.vocab_size)
    head = nn.Linear(backbone.hidden_size, 1, device=backbone.device)
    config = PPOConfig(
        steps=work.repetitions + 1, rollouts=work.batch, epochs=1, minibatch=work.batch,
        microbatch_tokens=work.microbatch_tokens, learning_rate=1e-6, kl_budget=1e9, seed=work.seed,
    )  # fmt: skip
    starts: list[float] = []
    ends: list[float] = []

    def sample(queries: Sequence[Query], seeds: Sequence[int]) -> list[Answer]:
        return answers

    def score(answers: Sequence[Answer]) -> Tensor:
        starts.append(now(backbone.device))
        return torch.arange(len(answers)) / len(answers)

    forget_peak(backbone.device)
    ppo.learn(
        backbone, head, [answer.query for answer in answers], sample, score, config,
        accelerator=Accelerator(cpu=backbone.device.type == "cpu"),
        on_step=lambda step, figures: ends.append(now(backbone.device)),
    )  # fmt: skip
    return Measured(
        median(after - before for before, after in zip(starts[1:], ends[1:], strict=True)), peak(backbone.device)
    )


def trl_update(device: torch.device, dtype: torch.dtype, shape: dict[str, Any], work: Work) -> Measured:
    """The same of TRL's PPOTrainer, which must sample first."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3ForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.manual_seed(work.seed)
    tiny = shape | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 1}
    policy = random_model(Qwen3ForCausalLM, device, dtype, shape)
    value = random_model(Qwen3ForSequenceClassification, device, dtype, shape | {"num_labels": 1})
    scorer = random_model(Qwen3ForSequenceClassification, device, dtype, tiny)
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    starts: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now(device))

    generate = ppo_trainer.batch_generation

    def sampled(*args: Any) -> Any:
        out = generate(*args)
        forget_peak(device)
        starts.append(now(device))
        return out

    ppo_trainer.batch_generation = sampled
    try:
        with tempfile.TemporaryDirectory() as folder:
            PPOTrainer(
                args=PPOConfig(
                    output_dir=folder, seed=work.seed, total_episodes=work.batch * (work.repetitions + 1),
                    per_device_train_batch_size=work.microbatch,
                    gradient_accumulation_steps=work.batch // work.microbatch, num_mini_batches=1,
                    num_ppo_epochs=1, response_length=work.answer, temperature=1.0, learning_rate=1e-6,
                    num_sample_generations=0, use_cpu=device.type == "cpu",
                    report_to="none", save_strategy="no", disable_tqdm=True,
                ),
                processing_class=tokenizer,
                model=policy,
                ref_model=None,
                reward_model=scorer,
                value_model=value,
                train_dataset=Dataset.from_dict(
                    {"input_ids": [answer.query for answer in work.answers(shape["vocab_size"])]}
                ),
                callbacks=[Clock()],
                peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
            ).train()  # fmt: skip
    finally:
        ppo_trainer.batch_generation = generate
    return Measured(median(after - before for before, after in zip(starts[1:], ends[1:], strict=True)), peak(device))


# Clocks


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def timed(work: Callable[[], object], device: torch.device, repetitions: int) -> Measured:
    """The median of some repetitions, after one that warms up."""
    work()
    forget_peak(device)
    taken = []
    for _ in range(repetitions):
        started = now(device)
        work()
        taken.append(now(device) - started)
    return Measured(median(taken), peak(device))


# What is printed


def measure(device: torch.device, dtype: torch.dtype, shape: dict[str, Any], work: Work) -> dict[str, float | None]:
    """The figures of the JSON; None for what did not fit into memory, no TRL where it cannot be imported."""
    ceiling = matmul_flop_s(device, dtype, work)
    figures: dict[str, float | None] = {"matmul_tflops": ceiling / 1e12}
    backbone = random_backbone(device, dtype, shape, work.seed)
    for adapter in ("policy", "value"):
        backbone.adapters.add(adapter)
    flop = forward_flop(backbone, work)
    for name, measured, done in (
        ("scoring", scoring(backbone, work), flop.scoring),
        ("update", update(backbone, work), flop.update),
    ):
        figures[f"{name}_tokens_per_s"] = work.tokens / measured.seconds
        figures[f"{name}_share"] = done / measured.seconds / ceiling
        figures[f"{name}_peak_gb"] = measured.peak / 1e9
    del backbone
    gc.collect()
    if has_trl():
        try:
            theirs = trl_update(device, dtype, shape, work)
        except torch.OutOfMemoryError:
            figures |= {"trl_update_tokens_per_s": None, "trl_update_peak_gb": None}
        else:
            figures["trl_update_tokens_per_s"] = work.tokens / theirs.seconds
            figures["trl_update_peak_gb"] = theirs.peak / 1e9
    return figures


def has_trl() -> bool:
    try:
        return importlib.metadata.version("trl") == TRL
    except importlib.metadata.PackageNotFoundError:
        return False


def table(figures: dict[str, float | None]) -> Table:
    rows = Table("", "tokens/s", "share of matmul", "peak, GB")
    for title, name in (("scoring", "scoring"), ("update", "update"), (f"update, TRL {TRL}", "trl_update")):
        if f"{name}_tokens_per_s" in figures:
            speed, share, memory = (figures.get(f"{name}_{what}") for what in ("tokens_per_s", "share", "peak_gb"))
            rows.add_row(
                title,
                "out of memory" if speed is None else f"{speed:,.0f}",
                "" if share is None else f"{share:.3f}",
                "" if memory is None else f"{memory:.1f}",
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two repetitions")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing to measure.")
        if options.json:
            print(json.dumps({"device": None}))
        return
    work = Work(repetitions=2 if options.quick else 5, seed=options.seed)
    device = torch.device("cuda")
    figures = measure(device, torch.bfloat16, QWEN3, work)
    name = torch.cuda.get_device_name(device)
    print(f"{name}: {figures['matmul_tflops']:.0f} TFLOP/s in a matmul of {work.matmul} x {work.matmul}, bfloat16.")
    Console().print(table(figures))
    if options.json:
        print(json.dumps({"device": name, "seed": options.seed, "quick": options.quick} | figures))


if __name__ == "__main__":
    main()
