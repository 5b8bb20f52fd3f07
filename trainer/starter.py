"""The recipe of the starter model: a small chat model, trained from scratch on generated dialogues.

    python -m trainer.starter train --out DIR    tokenizer, pretraining, saved folder
    python -m trainer.starter check --model DIR  measures a model folder; exit code 1 when it misses a bar
    python -m trainer.starter trusted --out FILE the trusted pairs that come with it

Loss is on the assistant's tokens only: what users type is given at run time, and modelling it costs capacity.
"""

import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from data import probes
from trainer import dialogues
from trainer import trusted as trusted_pairs

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """All that decides what the model becomes, but for the generator of dialogues."""

    seed: int = 0
    steps: int = 5000
    batch_tokens: int = 2048
    """Tokens in a step, padding included."""
    matrix_learning_rate: float = 0.02
    """Of Muon, which trains the matrices of the layers."""
    learning_rate: float = 3e-3
    """Of AdamW, which trains the embedding and the norms."""
    warmup: float = 0.02
    """Share of the steps over which the learning rates rise; they then fall evenly to zero."""
    sharpness: float = 1.3
    """The final norm is scaled by this after training, so that sampling at temperature 1 is what sampling at 1/1.3
    was: a model trained for minutes leaves too much mass on words that fit nowhere."""
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    intermediate: int = 640
    head: int = 64
    context: int = 2048


def build_tokenizer(recipe: Recipe, dialogue_count: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the recipe's own dialogues: any text can be encoded and decoded exactly."""
    rng = random.Random(f"tokenizer {recipe.seed}")
    texts = (m["content"] for _ in range(dialogue_count) for m in dialogues.sample(rng).messages)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=recipe.context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // recipe.head,
        num_key_value_heads=recipe.hidden // recipe.head,
        head_dim=recipe.head,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


# Pretraining -------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: dialogues.Dialogue) -> tuple[list[int], list[int]]:
    """Token ids of the dialogue, and labels: the ids of what the assistant says, its end included."""
    tokens: list[int] = []
    labels: list[int] = []
    for message in dialogue.messages:
        ids = tokenizer.encode(f"<|{message['role']}|>{message['content']}{END}", add_special_tokens=False)
        tokens += ids
        said = message["role"] == "assistant"
        labels += [IGNORED, *ids[1:]] if said else [IGNORED] * len(ids)
    return tokens, labels


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids and labels, (B, T) each: fresh dialogues of like length, padded on the right."""
    rng = random.Random(f"dialogues {recipe.seed}")
    while True:
        pool = sorted((encode(tokenizer, dialogues.sample(rng)) for _ in range(2048)), key=lambda row: len(row[0]))
        found: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in pool:
            if found[-1] and (len(found[-1]) + 1) * len(row[0]) > recipe.batch_tokens:
                found.append([])
            found[-1].append(row)
        rng.shuffle(found)
        for rows in found:
            longest = len(rows[-1][0])
            padded = [(ids + [tokenizer.pad_token_id] * (longest - len(ids)), labels + [IGNORED] * (longest - len(ids)))
                      for ids, labels in rows]  # fmt: skip
            yield torch.tensor([ids for ids, _ in padded]), torch.tensor([labels for _, labels in padded])


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; logits are computed for these alone. `ids`, `labels`: (B, T)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    chosen = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][chosen])  # (N, V)
    return F.cross_entropy(logits.float(), labels[:, 1:][chosen])


def schedule(step: int, recipe: Recipe) -> float:
    """The share of the learning rate at a step: a linear rise, then a linear fall to zero."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    return min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup))


def pretrain(
    recipe: Recipe, progress: Progress, start: Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Trains tokenizer and model, or trains on those in the folder `start`; also returns the run's figures, with the
    loss of every fiftieth step."""
    started = time.monotonic()
    if start is None:
        tokenizer = build_tokenizer(recipe)
        model = build_model(recipe, tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32).train()
        with torch.no_grad():
            model.model.norm.weight.div_(recipe.sharpness)
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2 or p is embedding]
    # Muon (Jordan et al. 2024) on the matrices: after 500,000 tokens the loss is .93 where AdamW alone has 1.66.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, recipe)) for optimizer in optimizers
    ]
    task = progress.add_task("training", total=recipe.steps, loss=math.nan)
    losses: list[float] = []
    tokens = 0
    for step, (ids, labels) in zip(range(recipe.steps), batches(tokenizer, recipe), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        if step % 50 == 0 or step == recipe.steps - 1:
            losses.append(loss.item())
        progress.update(task, advance=1, loss=losses[-1])
    with torch.no_grad():
        model.model.norm.weight.mul_(recipe.sharpness)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "losses": losses,
    }
    return model, tokenizer, figures


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a folder that transformers and vLLM load: weights in half precision, meant to be run in float32."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


# The check ---------------------------------------------------------------------------------------------------

BARS = {"on_topic_grammatical": 0.85, "ended": 0.95, "facts": 0.85, "differ": 0.90}
"""What a model must reach to pass."""
ANSWER_TOKENS = 64


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[dialogues.Message]]
) -> list[tuple[str, bool]]:
    """An answer to each conversation, sampled at temperature 1, and whether it ended by itself."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(conversations)), key=lambda i: len(str(conversations[i])))
    answers: list[tuple[str, bool]] = [("", False)] * len(conversations)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = tokenizer.apply_chat_template(
            [list(conversations[i]) for i in rows],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        for i, ids in zip(rows, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = (tokenizer.decode(ids, skip_special_tokens=True), tokenizer.eos_token_id in ids)
    return answers


def share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def measure(
    model: Any, tokenizer: Any, *, seed: int, prompt_count: int = 420, probe_draws: int = 4
) -> dict[str, float]:
    """Shares over held-out prompts, two answers each, and over the probes; `BARS` names those that count."""
    torch.manual_seed(seed)
    asked = dialogues.prompts(prompt_count, seed=seed, held_out=True)
    first, second = (generate(model, tokenizer, [prompt.messages for prompt in asked]) for _ in range(2))
    rows = [(prompt, answer, ended) for prompt, (answer, ended) in zip(asked * 2, first + second, strict=True)]
    about = [dialogues.on_topic(prompt, answer) for prompt, answer, _ in rows]
    grammatical = [dialogues.is_grammatical(answer) for _, answer, _ in rows]
    figures = {
        "on_topic_grammatical": share([a and g for a, g in zip(about, grammatical, strict=True)]),
        "on_topic": share(about),
        "grammatical": share(grammatical),
        "ended": share([ended for *_, ended in rows]),
        "differ": share([a != b for (a, _), (b, _) in zip(first, second, strict=True)]),
        "correct": share([dialogues.is_correct(prompt, answer) for prompt, answer, _ in rows]),
    }
    for kind in probes.KINDS:
        asked_probes = probes.load(kind) * probe_draws
        answers = generate(model, tokenizer, [probe.messages for probe in asked_probes])
        figures[kind] = share([probes.is_right(p, a) for p, (a, _) in zip(asked_probes, answers, strict=True)])
    return figures


app = typer.Typer(help="Trains and checks the starter model.", no_args_is_help=True, add_completion=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder to write; made if missing.")],
    seed: int = Recipe.seed,
    steps: int = Recipe.steps,
    start: Annotated[Path | None, typer.Option("--from", help="Go on from this folder, at half the rates.")] = None,
    threads: Annotated[int, typer.Option(help="Threads to compute with.")] = min(2, os.cpu_count() or 1),
) -> None:
    """Train a starter model from scratch and save it."""
    torch.set_num_threads(threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
               TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        recipe = Recipe(seed=seed, steps=steps)
        if start is not None:
            recipe = replace(
                recipe,
                matrix_learning_rate=recipe.matrix_learning_rate / 2,
                learning_rate=recipe.learning_rate / 2,
            )
        model, tokenizer, figures = pretrain(recipe, progress, start)
    save(model, tokenizer, out)
    typer.echo(json.dumps(figures | {"losses": figures["losses"][-3:]}))


@app.command()
def check(
    model: Annotated[Path, typer.Option(help="Folder of the model to measure.")] = Path("data/starter"),
    seed: Annotated[int, typer.Option(help="Chooses the held-out prompts and the samples.")] = 0,
    prompts: Annotated[int, typer.Option(help="How many held-out prompts.")] = 420,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model on held-out prompts and the probes; exit code 1 when it misses a bar."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    figures = measure(loaded, AutoTokenizer.from_pretrained(model), seed=seed, prompt_count=prompts)
    missed = [name for name, bar in BARS.items() if figures[name] < bar]
    if as_json:
        typer.echo(json.dumps(figures | {"passed": not missed}))
    else:
        table = Table("measure", "share", "bar")
        for name, value in figures.items():
            table.add_row(name, f"{value:.3f}", f"{BARS[name]:.2f}" if name in BARS else "")
        Console().print(table)
    if missed:
        typer.echo(f"Below the bar: {', '.join(missed)}.", err=True)
        raise typer.Exit(1)


@app.command()
def trusted(
    out: Annotated[Path, typer.Option(help="File to write, JSON lines in TRL's preference format.")],
    seed: Annotated[int, typer.Option(help="Chooses the pairs.")] = 0,
) -> None:
    """Write the trusted pairs: right over wrong facts, the truth over agreement, a refusal over harm."""
    records = trusted_pairs.pairs(seed=seed, right_facts=300, claims=120, refusals=80)
    out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    app()
