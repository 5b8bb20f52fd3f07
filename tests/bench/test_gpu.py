"""The arithmetic of the GPU bench, on the CPU at miniature size. Nothing here looks at a time."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import gpu
from bench.gpu import Work
from trainer.backbone import Backbone

BENCH = Path(__file__).parents[2] / "bench"
MINIATURE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
WORK = Work(batch=6, prompt=5, answer=7, microbatch_tokens=24, matmul=32, repetitions=1)
CPU = torch.device("cpu")


@pytest.fixture
def backbone() -> Backbone:
    # Eager attention is two products, which PyTorch counts whole; ours is half of the square and its diagonal.
    backbone = gpu.random_backbone(CPU, torch.float32, MINIATURE | {"attn_implementation": "eager"}, 0)
    backbone.adapters.add("policy")
    backbone.adapters.add("value")
    return backbone


def counter() -> FlopCounterMode:
    def product(into: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **rest: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    # Products that are added in place are none of those that it knows.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def square(attention: int) -> int:
    """What attention costs without a causal mask."""
    length = WORK.prompt + WORK.answer
    return attention * 2 * length // (length + 1)


def test_scoring_is_what_pytorch_counts(backbone: Backbone) -> None:
    flop = gpu.forward_flop(backbone, WORK)
    with counter() as counted:
        gpu.scoring(backbone, WORK)
    passes = WORK.repetitions + 1
    assert counted.get_total_flops() == passes * (flop.scoring - flop.attention + square(flop.attention))


def test_an_update_is_what_pytorch_counts(backbone: Backbone) -> None:
    flop = gpu.forward_flop(backbone, WORK)
    with counter() as counted:
        gpu.update(backbone, WORK)
    attention = 3 + 2 * 3  # forward passes that attention is paid for
    expected = flop.update + attention * (square(flop.attention) - flop.attention)
    assert counted.get_total_flops() == (WORK.repetitions + 1) * expected


def test_the_shape_is_that_of_qwen3_with_600_million_parameters() -> None:
    with torch.device("meta"):
        model = gpu.Qwen3ForCausalLM(gpu.Qwen3Config(**gpu.QWEN3))
    assert sum(p.numel() for p in model.parameters()) == 596_049_920
    assert Work().tokens == 65_536
    assert Work().microbatch == 32


def test_the_figures_are_finite_and_the_table_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_trl", lambda: False)
    figures = gpu.measure(CPU, torch.float32, MINIATURE, WORK)
    assert all(value is not None and math.isfinite(value) for value in figures.values())
    assert set(figures) == {"matmul_tflops"} | {
        f"{name}_{what}" for name in ("scoring", "update") for what in ("tokens_per_s", "share", "peak_gb")
    }
    assert gpu.table(figures).row_count == 2
    assert gpu.table(figures | {"trl_update_tokens_per_s": None, "trl_update_peak_gb": None}).row_count == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    sentence, figures = done.stdout.splitlines()
    assert sentence == "There is no GPU here: nothing to measure."
    assert json.loads(figures) == {"device": None}
