"""Nightshift's reward model and PPO beside TRL's: how fast, how much memory, and how good after equally many episodes.

Peers: RewardTrainer of TRL 1.16.0, and the experimental PPOTrainer of 1.12.0, the last release that had one. Each has
an environment of its own under .bench/ with our torch, transformers, accelerate and peft; every measurement is a fresh
process, and the lanes take turns. All start from the same weights, on the same pairs and prompts, with the same
number of threads. "before" is the resident memory with everything imported and the models loaded, "growth" what the
peak is above it. Speeds leave out the first optimizer step (reward model) or the first PPO step, which warm up.

Alike in both halves: float32, LoRA of rank 16 and alpha 32 on all linear layers, AdamW (betas .9 and .95, eps 1e-5)
with a linearly falling rate, the batches and the number of epochs, answers of at most 48 tokens, no dropout.
Reward model: batches of 32 pairs, one epoch, centring .01. Both put pairs of like length into a batch; TRL pads all of
a batch to its longest answer. TRL recomputes activations by default; that is off, which makes it faster.
PPO: 128 answers a step, 2 epochs, minibatches of 64 (4 optimizer steps), and the same reward: a reward model that we
train and export, adapter merged, as the sequence-classification model that TRL takes. Ours scores an answer's mean
state, so the mean of its tokens' scores is taken there instead of the last one's; both say the same to 1e-4.

Where the reward models differ: TRL's reads the last token. Where PPO differs, because TRL knows no other way: its
value model is trained in full (ours is an adapter), it does not
clip gradients, it draws its prompts without replacement (we draw with), and policy and value share one loss with
`vf_coef` .1, its default. Where we differ: our processes start as `python -m trainer` does, with glibc told to keep
freed memory, and torch to take denormal numbers for 0. "bf16" is our default, matrix products in bfloat16; everything
else in that lane is the same.

Gold is the programmatic preference of `bench.learning`, in logits of a vote: the mean over held-out prompts.

    python -m bench.peers [--quick] [--json] [--seed N] [--trl auto|off]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.gateway import markdown, note, spread
from bench.learning import Bench
from data.settings import STARTER
from trainer import dialogues, reward_model
from trainer.ppo import PPOConfig
from trainer.reward_model import RewardConfig, RewardModel

TRL = {"reward": "1.16.0", "ppo": "1.12.0"}
ROOT = Path(__file__).parents[1]
THREADS = 2
RANK, ALPHA = 16, 32
MAX_TOKENS = 48

REWARD = RewardConfig(heads=1, batch=32, epochs=1)
PPO = PPOConfig(
    rollouts=128, minibatch=64, epochs=2,
    missing_end_score=None,  # TRL knows a penalty, we know a score: neither is used
    kl_budget=1e9,  # equally many episodes
)  # fmt: skip

OURS, BF16, PEER = "ours", "ours, bf16", "TRL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    pairs: int
    """For the reward model's race, and to train the one that both PPOs obey."""
    repetitions: int
    """Of the reward model's race."""
    seeds: int
    steps: int
    """Of PPO, for each seed."""
    held_out: int
    """Prompts for gold, and pairs for the accuracy of the reward models."""


FULL = Sizes(pairs=1024, repetitions=3, seeds=3, steps=12, held_out=300)
QUICK = Sizes(pairs=256, repetitions=2, seeds=1, steps=4, held_out=150)


# What all lanes start from


def prepare(folder: Path, sizes: Sizes, seed: int, model: Path = STARTER) -> Bench:
    """Pairs, prompts and a reward model, in this folder; and the bench that knows gold."""
    bench = Bench(seed=seed, bf16=False, model=model)
    bench.sampling = replace(bench.sampling, max_tokens=MAX_TOKENS)
    prompts = dialogues.prompts(sizes.pairs, seed=seed, held_out=False)
    bench.calibrate(prompts)
    voted, _ = bench.pairs(prompts, draw=2)
    _, golden = bench.pairs(dialogues.prompts(sizes.held_out, seed=seed, held_out=True), draw=4)
    voted = voted[: len(voted) // REWARD.batch * REWARD.batch]
    checks = [pair.chosen for pair in voted[:32]]

    scorer = reward_model.train(bench.backbone, "reward", voted, RewardConfig(seed=seed), accelerator=Accelerator())
    scorer.normalise([answer for pair in voted[:128] for answer in (pair.chosen, pair.rejected)])
    # A sequence-classification head has no bias: shift such that ours cancels.
    scorer.shift = float(scorer.head.bias.detach().mean())
    scorer.save(folder / "reward")
    export(scorer, model, folder / "classifier")
    data = {
        "pairs": [[p.chosen.query, p.chosen.response, p.rejected.response] for p in voted],
        "held_out": [[p.chosen.query, p.chosen.response, p.rejected.response] for p in golden],
        "queries": list(dict.fromkeys(bench.chat.query(prompt.messages) for prompt in prompts)),
        "checks": [[answer.query, answer.response] for answer in checks],
    }
    (folder / "data.json").write_text(json.dumps(data))
    return bench


@torch.no_grad()
def export(scorer: RewardModel, base: Path, folder: Path) -> None:
    """Write a reward model whose constant is 0 as the sequence-classification model that gives the same scores."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    modules = dict(classifier.named_modules())
    for path, layer in scorer.backbone.adapters.layers.items():
        modules[path].weight += layer.scaling * layer.lora_b[scorer.adapter] @ layer.lora_a[scorer.adapter]
    classifier.score.weight.copy_(scorer.head.weight.mean(dim=0, keepdim=True) / scorer.scale)
    tokenizer = AutoTokenizer.from_pretrained(base)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.save_pretrained(folder)


def gold(bench: Bench, policy: Path | None, held_out: int) -> float:
    """The mean over held-out prompts of a policy's answers, or of the base's."""
    prompts = dialogues.prompts(held_out, seed=bench.seed, held_out=True)
    if policy is not None:
        bench.backbone.adapters.load("candidate", policy)
    answers = bench.answers(prompts, adapter=None if policy is None else "candidate", draw=8)
    return float(bench.gold(prompts, answers).mean())


# The lanes


def lanes(kind: str, option: str) -> dict[str, list[str]]:
    """{lane: the command to which the path of its task is added}."""
    ours = [sys.executable, str(ROOT / "bench" / "peer_ours.py")]
    python = find_trl(TRL[kind]) if option == "auto" else None
    peer = {PEER: [str(python), "-P", str(ROOT / "bench" / "peer_trl.py")]} if python else {}
    return {OURS: ours, BF16: ours} | peer


def find_trl(version: str) -> Path | None:
    """The Python of an environment with this TRL, made now where there is none; None: do without."""
    folder = Path(".bench").absolute() / f"trl-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        note(f"installing TRL {version} into {folder}")
        uv = str(Path(sys.executable).with_name("uv"))
        same = ["--constraint", str(ROOT / "constraints.txt")]
        commands = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(python), *same, f"trl=={version}", "peft", "torch"],
        ]
        try:
            for command in commands:
                subprocess.run(command, env=os.environ | uv_settings(), check=True)
        except (OSError, subprocess.CalledProcessError):
            shutil.rmtree(folder, ignore_errors=True)
            note(f"TRL {version} cannot be installed here: its column is left out")
            return None
    return python


def uv_settings() -> dict[str, str]:
    """What pip is configured with, for uv, which does not read it; as the Makefile does."""

    def pip(option: str) -> str:
        get = [sys.executable, "-m", "pip", "config", "get", f"global.{option}"]
        variable = os.environ.get(f"PIP_{option.upper().replace('-', '_')}")
        return variable or subprocess.run(get, capture_output=True, text=True, check=False).stdout.strip()

    settings = {"UV_SYSTEM_CERTS": "1"}
    if links := pip("find-links"):
        settings["UV_FIND_LINKS"] = ",".join(links.split())
    else:
        settings["UV_TORCH_BACKEND"] = "cpu"
    if index := pip("index-url"):
        settings["UV_DEFAULT_INDEX"] = index
    if certificates := pip("cert"):
        settings["SSL_CERT_FILE"] = certificates
    return settings


def run(lane: str, command: list[str], task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One measurement in a fresh process; its log stays beside its task.

    Raises:
        RuntimeError: the process failed; the message ends with its last words.
    """
    out = folder / f"{task['kind']}-{lane.replace(', ', '-')}-{task['seed']}"
    out.mkdir(exist_ok=True)
    path = out / "task.json"
    path.write_text(json.dumps(task | {"out": str(out), "bf16": lane == BF16}))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    note(f"{task['kind']}, seed {task['seed']}: {lane}")
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True, check=False)
    (out / "log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{lane} failed, its log is {out / 'log'}: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures | {"out": str(out)}


Taken = dict[str, list[dict[str, Any]]]
"""{lane: the figures of its runs}"""


def in_turn(
    kind: str, config: RewardConfig | PPOConfig, seeds: Iterable[int], folder: Path, model: Path, option: str
) -> Taken:
    """Every lane once for each seed; the lanes take turns in being first."""
    commands = lanes(kind, option)
    taken: Taken = {lane: [] for lane in commands}
    for turn, seed in enumerate(seeds):
        task = {
            "kind": kind, "seed": seed, "threads": THREADS, "model": str(model), "data": str(folder / "data.json"),
            "reward": str(folder / "reward"), "classifier": str(folder / "classifier"),
            "rank": RANK, "alpha": ALPHA, "max_tokens": MAX_TOKENS, "settings": asdict(config),
        }  # fmt: skip
        names = list(commands)
        for lane in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[lane].append(run(lane, commands[lane], task, folder))
    return taken


def check_scores(taken: Taken) -> None:
    """
    Raises:
        RuntimeError: the peer's reward model does not say what ours says.
    """
    for ours, theirs in zip(taken[OURS], taken.get(PEER, []), strict=False):
        worst = max(abs(a - b) for a, b in zip(ours["checks"], theirs["checks"], strict=True))
        if worst > 1e-4:
            raise RuntimeError(f"the exported reward model's scores differ from ours by {worst:.1e}")


# What is printed


def rates(runs: list[dict[str, Any]], what: str) -> list[float]:
    """`what` a second in each run."""
    return [run[what] / run["seconds"] for run in runs]


def growths(runs: list[dict[str, Any]]) -> list[float]:
    """Peak resident memory over that before training, MB."""
    return [(run["peak"] - run["before"]) / 1e6 for run in runs]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios within a repetition."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def reward_table(taken: Taken) -> str:
    rows = [
        [
            lane,
            spread(rates(runs, "pairs"), 1),
            times(taken, lane, "pairs"),
            spread((run["before"] / 1e6 for run in runs), 0),
            spread(growths(runs), 0),
            spread((run["accuracy"] for run in runs), 3),
        ]
        for lane, runs in taken.items()
    ]
    return markdown(["reward model", "pairs/s", "of TRL", "before, MB", "growth, MB", "pairs in gold order"], rows)


def ppo_table(taken: Taken, base: float) -> str:
    rows = [["base", "", "", "", "", "", f"{base:.2f}", "", ""]]
    rows += [
        [
            lane,
            spread(rates(runs, "episodes"), 1),
            times(taken, lane, "episodes"),
            spread(rates(runs, "tokens"), 0),
            spread((run["before"] / 1e6 for run in runs), 0),
            spread(growths(runs), 0),
            spread((run["gold"] for run in runs), 2),
            spread((run["score"][-1] for run in runs), 2),
            spread((run["kl"][-1] for run in runs), 2),
        ]
        for lane, runs in taken.items()
    ]
    header = ["PPO", "episodes/s", "of TRL", "response tokens/s", "before, MB", "growth, MB", "gold", "score", "KL"]
    return markdown(header, rows)


def times(taken: Taken, lane: str, what: str) -> str:
    if PEER not in taken or lane == PEER:
        return ""
    return f"{ratio(rates(taken[lane], what), rates(taken[PEER], what)):.2f}"


def figures(pairs: Taken, episodes: Taken, base: float) -> dict[str, float]:
    """The JSON. Ratios are ours / TRL's; without TRL there are none."""
    out = {"gold_base": base, "gold_ours": mean(run["gold"] for run in episodes[OURS])}
    out["gold_ours_default"] = mean(run["gold"] for run in episodes[BF16])
    if PEER in pairs:
        theirs = rates(pairs[PEER], "pairs")
        out["pairs_ratio"] = ratio(rates(pairs[OURS], "pairs"), theirs)
        out["pairs_ratio_default"] = ratio(rates(pairs[BF16], "pairs"), theirs)
    if PEER in episodes:
        theirs = rates(episodes[PEER], "episodes")
        out["episodes_ratio"] = ratio(rates(episodes[OURS], "episodes"), theirs)
        out["episodes_ratio_default"] = ratio(rates(episodes[BF16], "episodes"), theirs)
        out["memory_ratio"] = ratio(growths(episodes[OURS]), growths(episodes[PEER]))
        out["gold_trl"] = mean(run["gold"] for run in episodes[PEER])
    return {name: round(value, 4) for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer pairs and episodes")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl", choices=["auto", "off"], default="auto", help="off: our half alone")
    options = parser.parse_args()

    sizes = QUICK if options.quick else FULL
    Path(".bench").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="peers-", dir=".bench")).absolute()
    load = os.getloadavg()[0]
    pairs, episodes, base = race(folder, sizes, seed=options.seed, option=options.trl)
    shutil.rmtree(folder)

    print(f"\n{reward_table(pairs)}\n\n{ppo_table(episodes, base)}\n")
    print("Median over the runs [least, greatest]; ratios are within a repetition.")
    print(f"{THREADS} threads, {os.cpu_count()} cores, load average {load:.1f} before the start.\n")
    if options.json:
        print(json.dumps(figures(pairs, episodes, base) | {"seed": options.seed, "quick": options.quick}))


def race(folder: Path, sizes: Sizes, *, seed: int, option: str, model: Path = STARTER) -> tuple[Taken, Taken, float]:
    """The runs of the reward models, those of PPO, and the base's gold."""
    torch.set_num_threads(THREADS)
    note("making pairs and the reward model")
    bench = prepare(folder, sizes, seed, model)
    pairs = in_turn("reward", REWARD, range(seed, seed + sizes.repetitions), folder, model, option)
    config = replace(PPO, steps=sizes.steps)
    episodes = in_turn("ppo", config, range(seed, seed + sizes.seeds), folder, model, option)
    check_scores(episodes)
    for runs in episodes.values():
        for taken in runs:
            taken["gold"] = gold(bench, Path(taken["out"]) / "policy", sizes.held_out)
    return pairs, episodes, gold(bench, None, sizes.held_out)


if __name__ == "__main__":
    main()
