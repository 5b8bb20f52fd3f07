from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.backbone import Backbone
from trainer.encoding import Answer, ChatFormat

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


@pytest.fixture
def chat() -> ChatFormat:
    """A tokenizer of single bytes, with turns that end in <end>."""
    special = ["<pad>", "<eos>", "<end>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=special[2:], chat_template=template,
    )  # fmt: skip
    return ChatFormat(fast, frozenset({1, 2}))
