"""What people vote for when the two answers are the same, and what a crowd that votes for the place does to learning.

    identical pairs   each person of a crowd of 50 is shown the same text on both sides; who votes decisively votes for
                      the first or the second by chance, unless the place is what counts: a check of the crowd, which
                      the service does not ask for
    the board         the share of ordinary votes for the answer shown first, as the board shows it; sides are random,
                      so far from one half means position bias too
    learning          a reward model from 1,000 votes of crowds with more and more bias (logits in favour of the first
                      answer), with and without the side term: a scalar that is learned with the reward model and
                      dropped at scoring. How many pairs it puts in gold's order, how well it foretells the votes of
                      people without a bias (log-loss, nats), and what the best of 4 by it wins

Each finished cell is a line of the results file and is skipped the next time.

    OMP_NUM_THREADS=1 python -m bench.position_bias --quick --json
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from torch.nn.functional import binary_cross_entropy_with_logits

from bench import record
from bench.gold import STARTER_SCALE
from bench.nights import Asked, Lab, cast
from bench.personas import personas
from bench.record import Sheet, said
from bench.robust import NONE, rate, weigh
from data.stats import wilson
from trainer import dialogues
from trainer.reward_model import RewardModel

VOTES = 1000
PEOPLE = 50
IDENTICAL = 4000
TEST_PAIRS = 1500
HELD_OUT = 500
BIASES = (0.0, 1.0, 2.0, 4.0)
"""Logits: of otherwise even votes 1 makes 73 % go to the first answer, 2 88 %, 4 98 %."""
SEEDS = tuple(range(1, 11))


@dataclass(frozen=True, slots=True)
class Cell:
    bias: float
    seed: int


class Bias:
    def __init__(self, lab: Lab, *, votes: int) -> None:
        self.lab = lab
        self.votes = votes
        prompts = dialogues.prompts(IDENTICAL, seed=lab.seed, held_out=True)
        self.prompts = prompts[:HELD_OUT]
        self.identical = [
            Asked(prompt, answer, answer)
            for prompt, answer in zip(prompts, lab.answers(prompts, draw=700), strict=True)
        ]
        self.test_pairs = lab.random_pairs(prompts[:TEST_PAIRS], draw=800)

    def run(self, cell: Cell) -> dict[str, Any]:
        started = time.monotonic()
        lab, crowd = self.lab, personas(PEOPLE, seed=cell.seed, left=cell.bias)
        same = [vote["choice"] for vote in cast(self.identical, crowd, chat=lab.chat)]
        votes = lab.day(self.votes, crowd)
        choices = [vote["choice"] for vote in votes]
        figures: dict[str, float] = {}
        for name, defences in (("plain", NONE), ("side_term", replace(NONE, side_term=True))):
            preferences = weigh(lab, votes, rate(lab, votes, defences), defences)
            reward = lab.reward(preferences, defences.reward(cell.seed))
            figures[f"accuracy_{name}"] = lab.accuracy(reward, self.test_pairs)
            figures[f"log_loss_{name}"] = self.log_loss(reward)
            figures[f"best_of_4_{name}"] = lab.best_of(4, self.prompts, reward.score)["win_rate"]
        figures["side"] = float(reward.first_bonus.detach())
        return {
            "bias": cell.bias, "seed": cell.seed, "votes": self.votes, "on": lab.machine,
            "identical_first": same.count("a"), "identical_second": same.count("b"),
            "board_first": choices.count("a"), "board_second": choices.count("b"),
            **{name: round(figure, 4) for name, figure in figures.items()},
            "seconds": round(time.monotonic() - started),
        }  # fmt: skip

    def log_loss(self, reward: RewardModel) -> float:
        """Nats a vote, of people without any bias and without leans of their own, on the test pairs."""
        lab, prompts = self.lab, [pair.prompt for pair in self.test_pairs]
        firsts, seconds = [pair.first for pair in self.test_pairs], [pair.second for pair in self.test_pairs]
        likely = torch.sigmoid(STARTER_SCALE * (lab.gold(prompts, firsts) - lab.gold(prompts, seconds)))
        said = (reward.rewards(firsts) - reward.rewards(seconds)).mean(dim=1)
        return float(binary_cross_entropy_with_logits(said, likely))


def share(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Of decisive votes for the answer shown first, with its 95 % interval (Wilson)."""
    first = sum(row[f"{name}_first"] for row in rows)
    both = first + sum(row[f"{name}_second"] for row in rows)
    return (first / both if both else 0.5, *wilson(first, both))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of `--json`; `left_points` is how far from one half an unbiased crowd is, in points."""
    figures: dict[str, Any] = {"cells": len(rows)}
    for bias in BIASES:
        here = [row for row in rows if row["bias"] == bias]
        name = f"{bias:g}".replace(".", "_")
        figures[f"identical_first_{name}"] = share(here, "identical")[0] if here else None
        figures[f"board_first_{name}"] = share(here, "board")[0] if here else None
        for figure, of in (("gain", "accuracy"), ("gain_log_loss", "log_loss"), ("gain_best_of_4", "best_of_4")):
            gains = _gains(here, of)
            figures[f"{figure}_{name}"] = fmean(gains) if gains else None
    unbiased = figures["identical_first_0"]
    figures["left_points"] = None if unbiased is None else 100 * (unbiased - 0.5)
    return figures


def _gains(rows: Sequence[dict[str, Any]], of: str) -> list[float]:
    """What the side term adds, by seed."""
    return [row[f"{of}_side_term"] - row[f"{of}_plain"] for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="votes for the answer shown first", caption="95 % intervals; of accuracies over seeds")
    for name in ("bias", "seeds", "identical pairs", "all pairs (the board)", "side found", "reward right", "with side",
                 "log-loss", "with side", "best of 4", "with side"):  # fmt: skip
        shown.add_column(name, justify="right", no_wrap=True)
    for bias in BIASES:
        here = [row for row in rows if row["bias"] == bias]
        if not here:
            continue
        shares = ["{:.1%} [{:.1%}, {:.1%}]".format(*share(here, name)) for name in ("identical", "board")]
        shown.add_row(
            f"{bias:g}", str(len(here)), *shares, f"{fmean(row['side'] for row in here):+.2f}",
            *(text for of in ("accuracy", "log_loss", "best_of_4")
              for text in (said(row[f"{of}_plain"] for row in here), said(_gains(here, of), "+.3f"))),
        )  # fmt: skip
    return shown


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table."""
    by_bias = [[row for row in rows if row["bias"] == bias] for bias in BIASES]
    lines = [
        [name, *("{:.1%} [{:.1%}, {:.1%}]".format(*share(here, of)) if here else "" for here in by_bias)]
        for name, of in (
            ("votes for the first of two identical answers", "identical"),
            ("of all votes for the answer shown first, on the board", "board"),
        )
    ]
    for name, it, of in (
        ("pairs in gold's order", "them", "accuracy"),
        ("the best of 4 by that reward model, no PPO", "it", "best_of_4"),
    ):
        plain = ([row[f"{of}_plain"] for row in here] for here in by_bias)
        gains = (_gains(here, of) for here in by_bias)
        lines.append([name, *(said(found, of=len(SEEDS)) for found in plain)])
        lines.append([f"what the side term adds to {it}", *(said(found, "+.3f", of=len(SEEDS)) for found in gains)])
    return record.markdown(["logits for the answer shown first", *(f"{bias:g}" for bias in BIASES)], lines)


SHEET = Sheet(bench="position_bias", seeds=SEEDS, table=table, markdown=markdown, summary=summary, width=176)


def main() -> None:
    parser = SHEET.parser(__doc__, quick="one seed, 0 and 1 logit, 500 votes")
    parser.add_argument("--biases", type=float, nargs="+", default=BIASES, help="logits")
    arguments = parser.parse_args()
    quick = arguments.quick
    seeds, biases = SHEET.seeds_for(arguments), BIASES[:2] if quick else arguments.biases

    @lru_cache(maxsize=1)
    def bias(seed: int) -> Bias:
        return Bias(Lab(seed=seed, compiled=not quick), votes=500 if quick else VOTES)

    SHEET.go_on(
        arguments,
        [Cell(logits, seed) for seed in seeds for logits in biases],
        run=lambda cell, _: bias(cell.seed).run(cell),
        is_done=lambda cell, row: cell == Cell(row["bias"], row["seed"]),
    )


if __name__ == "__main__":
    main()
