import json
import random
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from trainer import dialogues, starter

SHIPPED = Path(starter.__file__).parents[1] / "data" / "starter"
MINIATURE = starter.Recipe(
    steps=200, batch_tokens=768, learning_rate=1e-2, vocabulary=600, hidden=64, layers=2, intermediate=128, head=32
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Naïve 東京?"},
]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder written by the recipe in miniature, and the figures of its training."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("starter")
    with Progress(disable=True) as progress:
        model, tokenizer, figures = starter.pretrain(MINIATURE, progress)
    starter.save(model, tokenizer, out)
    return out, figures


def test_the_loss_of_a_miniature_falls(miniature: tuple[Path, dict]) -> None:
    losses = miniature[1]["losses"]
    assert losses[0] > 5
    assert losses[-1] < 0.5 * losses[0]


def test_a_saved_miniature_loads_in_float32_and_answers(miniature: tuple[Path, dict]) -> None:
    model = AutoModelForCausalLM.from_pretrained(miniature[0])
    tokenizer = AutoTokenizer.from_pretrained(miniature[0])
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    torch.manual_seed(0)
    (answer, _), (other, _) = starter.generate(model, tokenizer, [TALK, TALK[:2]])
    assert answer.strip()
    assert other.strip()


def test_a_prompt_in_a_padded_batch_is_answered_as_it_is_alone(miniature: tuple[Path, dict]) -> None:
    model = AutoModelForCausalLM.from_pretrained(miniature[0])
    tokenizer = AutoTokenizer.from_pretrained(miniature[0])
    dialogue = dialogues.sample(random.Random(4))
    torch.manual_seed(0)
    model.generation_config.do_sample = False
    alone = model.generate(
        **tokenizer.apply_chat_template(TALK[1:2], add_generation_prompt=True, return_tensors="pt", return_dict=True),
        max_new_tokens=8,
    )
    batch = tokenizer.apply_chat_template(
        [TALK[1:2], list(dialogue.messages[:1])],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    padded = model.generate(**batch, max_new_tokens=8)
    assert padded[0, -8:].tolist() == alone[0, -8:].tolist()


def test_the_template_ends_every_turn_with_eos_and_opens_the_assistants(miniature: tuple[Path, dict]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(miniature[0])
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hi!<|end|><|assistant|>Hello.<|end|><|user|>Naïve 東京?<|end|><|assistant|>"
    )
    ids = tokenizer.apply_chat_template(TALK[:3], return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer.encode("Naïve 東京 🙂  x")) == "Naïve 東京 🙂  x"


def test_training_encodes_as_the_template_does_and_learns_from_the_assistant_alone(
    miniature: tuple[Path, dict],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(miniature[0])
    dialogue = dialogues.sample(random.Random(4))
    ids, labels = starter.encode(tokenizer, dialogue)
    assert ids == tokenizer.apply_chat_template(list(dialogue.messages), return_dict=False)
    learned = tokenizer.decode([label for label in labels if label != starter.IGNORED])
    assert learned == "".join(m["content"] + "<|end|>" for m in dialogue.messages if m["role"] == "assistant")


def test_padding_does_not_change_the_loss(miniature: tuple[Path, dict]) -> None:
    model = AutoModelForCausalLM.from_pretrained(miniature[0])
    tokenizer = AutoTokenizer.from_pretrained(miniature[0])
    ids, labels = (torch.tensor([row]) for row in starter.encode(tokenizer, dialogues.sample(random.Random(4))))
    padded_ids = torch.nn.functional.pad(ids, (0, 7), value=tokenizer.pad_token_id)
    padded_labels = torch.nn.functional.pad(labels, (0, 7), value=starter.IGNORED)
    with torch.inference_mode():
        plain, padded = starter.answer_loss(model, ids, labels), starter.answer_loss(model, padded_ids, padded_labels)
    assert torch.allclose(plain, padded, atol=1e-5)


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    recipe = starter.Recipe(steps=100, warmup=0.1)
    shares = [starter.schedule(step, recipe) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[10] == 1
    assert shares[100] == 0


def test_the_check_fails_an_untrained_model_and_says_which_bars_it_missed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = starter.build_tokenizer(MINIATURE, 200)
    starter.save(starter.build_model(MINIATURE, tokenizer), tokenizer, tmp_path)
    result = CliRunner().invoke(starter.app, ["check", "--model", str(tmp_path), "--prompts", "20", "--json"])
    assert result.exit_code == 1
    figures = json.loads(result.stdout)
    assert figures["passed"] is False
    assert figures["on_topic_grammatical"] == 0
    assert "facts" in result.stderr


def test_the_shipped_model_is_small_and_holds_what_a_server_needs() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8_000_000
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["head_dim"], config["dtype"], config["tie_word_embeddings"]) == (64, "float32", True)
    assert config["max_position_embeddings"] >= 1024
    generation = json.loads((SHIPPED / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] != generation["pad_token_id"]
    assert (SHIPPED / "README.md").is_file()


def test_the_shipped_model_passes_its_check() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    figures = starter.measure(model, AutoTokenizer.from_pretrained(SHIPPED), seed=11, prompt_count=300, probe_draws=1)
    assert all(figures[name] >= bar for name, bar in starter.BARS.items()), figures
