"""Any decoder that AutoModelForCausalLM loads: one reward step, one PPO step and publishing, for six families."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from trainer import reward_model
from trainer.backbone import Backbone
from trainer.encoding import Answer, collate
from trainer.ppo import PPOConfig, learn
from trainer.reward_model import Pair, RewardConfig
from trainer.rollout import LocalSampler, Sampling

SIZES = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=20.0, query_pre_attn_scalar=32,
    ),
    "phi3": Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
}  # fmt: skip
TREATED = {
    "gemma2": (
        Gemma2Config(**SIZES, final_logit_softcapping=20.0, query_pre_attn_scalar=32),
        lambda logits: 20 * torch.atanh(logits / 20),
    ),
    "granite": (
        GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=3.0),
        lambda logits: 3 * logits,
    ),
    "cohere": (
        CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.3),
        lambda logits: logits / 0.3,
    ),
}
"""What does something to its logits after the head, and how to undo that."""
QUERIES = [(3, 4, 5, 6, 7), (8,), (9, 10, 11)]


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model of the family, on disk."""
    config: PretrainedConfig = CONFIGS[request.param]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_family_learns_and_publishes_what_it_learned(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder, rank=8, bf16=False)
    accelerator = Accelerator()
    reference = LocalSampler(backbone, None, Sampling(max_tokens=10, end_ids=backbone.end_ids))
    samples = reference(QUERIES * 8, range(24))

    pairs = [Pair(a, b) for a, b in zip(samples[:12], samples[12:], strict=True)]
    model = reward_model.train(
        backbone, "reward", pairs, RewardConfig(batch=12, learning_rate=1e-2), accelerator=accelerator
    )
    model.normalise(samples)

    backbone.adapters.add("policy")
    figures: list[dict[str, float]] = []
    learn(
        backbone, model.value_start("value"), QUERIES,
        LocalSampler(backbone, "policy", Sampling(max_tokens=10, end_ids=backbone.end_ids)), model.score,
        PPOConfig(steps=2, rollouts=12, minibatch=6, learning_rate=1e-2, kl_budget=1e9, missing_end_score=None),
        accelerator=accelerator, on_step=lambda _, f: figures.append(f),
    )  # fmt: skip
    assert figures[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(figures[1]["kl"]) > 1e-3

    backbone.publish("policy", tmp_path / "adapter")
    published = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad(), backbone.adapters.on("policy"):
        ours = backbone.logprobs(collate(samples), temperature=1.0)
        bare = backbone.adapters.state("policy")
        for row, answer in zip(ours, samples, strict=True):
            assert torch.allclose(row[: len(answer.response)], whole_logprobs(published, answer), atol=1e-4), answer
    assert any(tensor.abs().max() > 0 for name, tensor in bare.items() if "lora_B" in name)


def whole_logprobs(model: torch.nn.Module, answer: Answer) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([answer.query + answer.response])).logits[0]
    rows = functional.log_softmax(logits.float(), dim=-1)[len(answer.query) - 1 : -1]
    return rows.gather(1, torch.tensor(answer.response)[:, None])[:, 0]


def test_a_family_samples_with_its_cache_what_it_would_say_without(folder: Path) -> None:
    """Left padding, sliding windows, rows that leave: greedy answers are those of the whole model."""
    backbone = Backbone.load(folder, rank=8, bf16=False)
    greedy = Sampling(max_tokens=12, temperature=1e-4, end_ids=backbone.end_ids)
    for answer in LocalSampler(backbone, None, greedy)(QUERIES, range(3)):
        tokens = list(answer.query)
        for token in answer.response:
            with torch.no_grad():
                logits = backbone.base(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-3
            tokens.append(token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TREATED)
def test_logits_are_known_where_the_model_rounds_them_too_and_wrong_ones_are_not(
    family: str, dtype: torch.dtype
) -> None:
    """transformers scales and caps in bfloat16 what we do in float32."""
    config, untreated = TREATED[family]
    for seed in range(5):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        Backbone(model, rank=8)
        for wrong in (untreated, lambda logits: 1.1 * logits):
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            model.register_forward_hook(lambda _, __, output, w=wrong: setattr(output, "logits", w(output.logits)))
            with pytest.raises(ValueError, match="changes its logits"):
                Backbone(model, rank=8)
