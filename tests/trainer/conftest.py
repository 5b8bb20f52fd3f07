from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.backbone import Backbone
from trainer.encoding import Answer

MakeBackbone = Callable[..., Backbone]


@pytest.fixture
def tiny_backbone() -> MakeBackbone:
    """Make a small random Llama in float64 with the adapters named, each of them doing something."""

    def make(*adapters: str, seed: int = 0, **changes: object) -> Backbone:
        torch.manual_seed(seed)
        config = {
            "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
            "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1,
        }  # fmt: skip
        backbone = Backbone(LlamaForCausalLM(LlamaConfig(**config | changes)).double(), rank=8, alpha=16)
        for name in adapters:
            backbone.adapters.add(name)
            for layer in backbone.adapters.layers.values():
                torch.nn.init.normal_(layer.lora_b[name], std=0.1)
        return backbone

    return make


@pytest.fixture
def answers() -> list[Answer]:
    """Six answers of many lengths over 32 tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 32, (n,), generator=generator).tolist())

    return [Answer(tokens(q), tokens(r), True) for q, r in [(3, 5), (9, 2), (1, 1), (4, 11), (6, 6), (2, 3)]]
