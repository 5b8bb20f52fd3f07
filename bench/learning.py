"""From votes to better answers: reward model and PPO on the starter model, judged by a gold preference.

The gold preference is a program: right, warm, concise and finished answers are better. Two answers to one prompt
differ by 2.4 on average, and each vote is drawn from sigma(difference), so votes are as noisy as people. Nothing
here is known to the training code but the votes, and the trusted pairs that come with the starter model.

    python -m bench.learning --quick --votes 1000 --json
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from bench.gold import MEAN_DIFFERENCE, worth
from data import probes
from data.settings import STARTER
from data.stats import wilson
from trainer import dialogues, ppo, reward_model
from trainer.backbone import Backbone
from trainer.dialogues import Prompt
from trainer.encoding import Answer, ChatFormat
from trainer.measure import log_ratios
from trainer.ppo import PPOConfig
from trainer.reward_model import Pair, RewardConfig
from trainer.rollout import LocalSampler, Sampling

PPO = PPOConfig(steps=16)
"""What two minutes of a small processor buy: half of the steps that a night takes by itself."""
REWARD = RewardConfig()
BEST_OF = 4
"""What the same reward model is worth without PPO: the best of so many answers of the base."""


@dataclass(frozen=True, slots=True)
class Gold:
    """What the votes are drawn from."""

    chat: ChatFormat
    scale: float = 1.0

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tensor:
        """(N,) in logits of a vote."""
        worths = [
            worth(prompt, self.chat.text(answer), finished=answer.finished)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return self.scale * torch.tensor(worths)


class Bench:
    def __init__(self, *, seed: int, bf16: bool, model: Path) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.backbone = Backbone.load(model, bf16=bf16)
        self.chat = ChatFormat(AutoTokenizer.from_pretrained(model), self.backbone.end_ids)
        self.sampling = Sampling(max_tokens=64, temperature=1.0, end_ids=self.backbone.end_ids)
        self.accelerator = Accelerator()
        self.gold = Gold(self.chat)

    def answers(self, prompts: Sequence[Prompt], *, adapter: str | None = None, draw: int) -> list[Answer]:
        sample = LocalSampler(self.backbone, adapter, self.sampling)
        first = (self.seed * 1000 + draw) * 1_000_000
        return sample([self.chat.query(p.messages) for p in prompts], range(first, first + len(prompts)))

    def pairs(self, prompts: Sequence[Prompt], *, draw: int) -> tuple[list[Pair], list[Pair]]:
        """The same pairs as voted, and in the order of gold."""
        first, second = self.answers(prompts, draw=draw), self.answers(prompts, draw=draw + 1)
        differences = self.gold(prompts, first) - self.gold(prompts, second)
        drawn = torch.rand(len(prompts), generator=torch.Generator().manual_seed(self.seed + draw))
        voted, golden = [], []
        for a, b, difference, u in zip(first, second, differences.tolist(), drawn.tolist(), strict=True):
            if a.response == b.response:
                continue  # nobody is asked to choose between two equal texts
            voted.append(Pair(a, b) if u < 1 / (1 + 2.718281828459045**-difference) else Pair(b, a))
            if difference:
                golden.append(Pair(a, b) if difference > 0 else Pair(b, a))
        return voted, golden

    def trusted(self, weight: float) -> list[Pair]:
        """The pairs shipped with the starter model; they share no entity with the probes."""
        pairs = []
        for record in map(json.loads, (STARTER / "trusted.jsonl").read_text(encoding="utf-8").splitlines()):
            chosen, rejected = (
                self.chat.answer(record["prompt"], record[side][0]["content"]) for side in ("chosen", "rejected")
            )
            pairs.append(Pair(chosen, rejected, weight=weight))
        return pairs

    def calibrate(self, prompts: Sequence[Prompt]) -> None:
        """Scale gold such that two answers differ by MEAN_DIFFERENCE on average."""
        first, second = self.answers(prompts, draw=0), self.answers(prompts, draw=1)
        difference = (self.gold(prompts, first) - self.gold(prompts, second)).abs().mean()
        self.gold = replace(self.gold, scale=MEAN_DIFFERENCE / float(difference))

    def probes(self, adapter: str | None, draws: int = 16) -> dict[str, float]:
        """The shares of the frozen probes of each kind answered right, at temperature 1."""
        sample = LocalSampler(self.backbone, adapter, self.sampling)
        shares: dict[str, float] = {}
        for kind in probes.KINDS:
            asked = probes.load(kind) * draws
            answers = sample([self.chat.query(p.messages) for p in asked], range(len(asked)))
            right = [probes.is_right(p, self.chat.text(a)) for p, a in zip(asked, answers, strict=True)]
            shares[kind] = sum(right) / len(right)
        return shares

    def run(
        self, votes: int, held_out: int, trusted_weight: float, ppo_config: PPOConfig, reward_config: RewardConfig
    ) -> dict[str, Any]:
        train_prompts = dialogues.prompts(votes, seed=self.seed, held_out=False)
        test_prompts = dialogues.prompts(held_out, seed=self.seed, held_out=True)
        self.calibrate(train_prompts[:500])
        voted, _ = self.pairs(train_prompts, draw=2)
        judged_prompts = dialogues.prompts(3 * held_out, seed=self.seed, held_out=True)
        test_voted, test_golden = self.pairs(judged_prompts, draw=4)
        training = voted + self.trusted(trusted_weight) if trusted_weight else voted

        started = time.monotonic()
        model = reward_model.train(self.backbone, "reward", training, reward_config, accelerator=self.accelerator)
        model.normalise(self.answers(train_prompts[:256], draw=6))
        reward_seconds = time.monotonic() - started
        report = reward_model.report(model, test_voted, voted)

        self.backbone.adapters.add("policy")
        curve: list[dict[str, float]] = []
        started = time.monotonic()
        queries = list(dict.fromkeys(self.chat.query(p.messages) for p in train_prompts))
        ppo.learn(
            self.backbone, model.value_start("value"), queries,
            LocalSampler(self.backbone, "policy", self.sampling), model.score, ppo_config,
            accelerator=self.accelerator, on_step=lambda _, figures: curve.append(figures),
        )  # fmt: skip
        ppo_seconds = time.monotonic() - started

        ours, theirs = self.answers(test_prompts, adapter="policy", draw=8), self.answers(test_prompts, draw=9)
        gold_ours, gold_theirs = self.gold(test_prompts, ours), self.gold(test_prompts, theirs)
        wins = _wins(gold_ours, gold_theirs)
        low, high = wilson(wins, len(test_prompts))
        drawn = [self.answers(test_prompts, draw=10 + i) for i in range(BEST_OF)]
        best = torch.stack([model.score(answers) for answers in drawn]).argmax(dim=0)
        gold_best = torch.stack([self.gold(test_prompts, answers) for answers in drawn]).gather(0, best[None])[0]
        return {
            "votes": len(voted),
            "rm_accuracy_votes": report.accuracy,
            "rm_accuracy_gold": reward_model.report(model, test_golden, voted).accuracy,
            "rm_length_accuracy": report.length_accuracy,
            "rm_log_loss": report.log_loss,
            "rm_calibration_error": report.calibration_error,
            "rm_spread": report.spread,
            "win_rate": wins / len(test_prompts),
            "win_rate_low": low,
            "win_rate_high": high,
            "win_rate_best_of_4": _wins(gold_best, gold_theirs) / len(test_prompts),
            "gold_before": float(gold_theirs.mean()),
            "gold_after": float(gold_ours.mean()),
            **{f"{kind}_before": share for kind, share in self.probes(None).items()},
            **{f"{kind}_after": share for kind, share in self.probes("policy").items()},
            "kl": float(log_ratios(self.backbone, ours, temperature=self.sampling.temperature).mean()),
            "length_before": sum(len(a.response) for a in theirs) / len(theirs),
            "length_after": sum(len(a.response) for a in ours) / len(ours),
            "finished_after": sum(a.finished for a in ours) / len(ours),
            "reward_seconds": reward_seconds,
            "ppo_seconds": ppo_seconds,
            "episodes_per_s": sum(f["episodes_per_s"] for f in curve) / len(curve),
            "pairs_per_s": len(training) / reward_seconds,
            "curve": [{k: round(f[k], 3) for k in ("score", "kl", "length", "entropy", "clipped")} for f in curve],
        }


def _wins(ours: Tensor, theirs: Tensor) -> float:
    """How often the first is better, ties counting half."""
    return float((ours > theirs).sum() + 0.5 * (ours == theirs).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 votes unless --votes says otherwise")
    parser.add_argument("--votes", type=int, help="votes to learn from (default 4,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 products")
    parser.add_argument("--model", type=Path, default=STARTER, help="folder of the starter model")
    parser.add_argument("--trusted-weight", type=float, default=0.5, help="of a trusted pair beside a vote; 0: none")
    parser.add_argument("--ppo", type=json.loads, default={}, help="fields of PPOConfig, as JSON")
    parser.add_argument("--reward", type=json.loads, default={}, help="fields of RewardConfig, as JSON")
    arguments = parser.parse_args()
    if arguments.votes is not None and arguments.votes < 1:
        parser.error("--votes is at least 1")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model is a model's folder, and {arguments.model} has no config.json")
    try:
        ppo = replace(PPO, seed=arguments.seed, **arguments.ppo)
        reward = replace(REWARD, seed=arguments.seed, **arguments.reward)
    except (TypeError, ValueError) as error:
        parser.error(f"--ppo, --reward: {error}")
    votes = arguments.votes or (1000 if arguments.quick else 4000)
    torch.set_flush_denormal(True)  # as `python -m trainer` does
    bench = Bench(seed=arguments.seed, bf16=not arguments.float32, model=arguments.model)
    figures = bench.run(votes, 500, arguments.trusted_weight, ppo, reward)

    console = Console()
    steps = Table("step", *figures["curve"][0], title="PPO")
    for step, row in enumerate(figures["curve"]):
        steps.add_row(str(step), *(f"{value:.3f}" for value in row.values()))
    console.print(steps)
    table = Table("figure", "value")
    for name, value in figures.items():
        if name != "curve":
            table.add_row(name, f"{value:.3f}")
    console.print(table)
    if arguments.json:
        print(json.dumps(figures | {"ppo": asdict(ppo), "seed": arguments.seed}))


if __name__ == "__main__":
    main()
