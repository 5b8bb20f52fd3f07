"""What becomes of gold when PPO goes on after its reward model has nothing more to say (Gao et al., arXiv 2210.10760).

Reward models of 250, 1,000 and 4,000 votes, with one head, with five and their mean (as trained), and with five and
their minimum. PPO against each with next to no price on KL and no KL budget. Each step's answers say how far it has
gone, what the reward model thinks (the proxy) and how much better than the base's gold finds them, prompt by prompt.
The mean over three steps and over the seeds, at the same KL, says where that is highest; being the highest of many,
it is a little too high. Beside it stands where a run as it ships ends: at its KL, by the learning curve's held-out
prompts, and at the latest at its KL budget.

Each finished run (votes, heads, seed) is a line of the results file, and is skipped the next time.

    OMP_NUM_THREADS=1 python -m bench.overoptimise --minutes 60
    python -m bench.overoptimise --cells 0 --json                      only the table
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from bench import learning_curve, record
from bench.learning_curve import PEOPLE
from bench.nights import Lab
from bench.personas import personas
from bench.record import ROOT, Sheet, read
from trainer import dialogues
from trainer.dialogues import Prompt
from trainer.encoding import Answer
from trainer.ppo import PPOConfig
from trainer.preferences import Split
from trainer.reward_model import RewardConfig, RewardModel

PICTURE = ROOT / "docs/overoptimise.svg"
VOTES = (250, 1000, 4000)
HEADS = ("one", "five, mean", "five, minimum")
SEEDS = (1, 2, 3)
HELD_OUT = 500
BEST_OF = 4
BASE_DRAWS = 4
KL_STEP = 0.1
FREE = PPOConfig(steps=40, beta=0.01, kl_budget=math.inf)
"""Next to no price: none at all ends in text that nobody wrote."""
SHIPS = PPOConfig()


@dataclass(frozen=True, slots=True)
class Cell:
    votes: int
    heads: str
    seed: int


def run(lab: Lab, cell: Cell, *, steps: int) -> dict[str, Any]:
    """One line of the results file; `points` holds KL, proxy and gold's gain of each step."""
    started = time.monotonic()
    preferences = lab.prepare(lab.day(cell.votes, personas(PEOPLE, seed=lab.seed)))
    reward = lab.reward(preferences, RewardConfig(heads=1 if cell.heads == "one" else 5, seed=lab.seed))
    prompts = dialogues.prompts(2 * cell.votes + 250, seed=lab.seed, held_out=False)
    prompt_of = {lab.chat.query(prompt.messages): prompt for prompt in prompts}
    base = golds_of_the_base(lab, [prompt_of[query] for query in preferences.queries[Split.TRAIN]])
    samples = lab.answers(prompts[:1000], draw=700)
    score = pessimistic(reward, samples) if cell.heads == "five, minimum" else reward.score
    gain: list[float] = []
    proxy: list[float] = []

    def listen(answers: Sequence[Answer]) -> Tensor:
        scores = score(answers)
        proxy.append(float(scores.mean()))
        golds = lab.gold([prompt_of[a.query] for a in answers], answers)
        gain.append(float(golds.mean()) - fmean(base[a.query] for a in answers))
        return scores

    config = PPOConfig(steps=steps, beta=FREE.beta, kl_budget=FREE.kl_budget, seed=lab.seed)
    night = lab.improve(reward, preferences, config, score=listen)
    best = lab.best_of(BEST_OF, dialogues.prompts(HELD_OUT, seed=lab.seed, held_out=True), score)
    kls = [figures["kl"] for figures in night.curve]
    return {
        **asdict(cell), "on": lab.machine,
        "gain_best_of_4": round(best["gold"] - best["gold_base"], 4),
        "points": [[round(v, 4) for v in point] for point in zip(kls, proxy, gain, strict=True)],
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def golds_of_the_base(lab: Lab, prompts: Sequence[Prompt]) -> dict[tuple[int, ...], float]:
    """What the base's answers to each query are worth: the mean of BASE_DRAWS."""
    golds = torch.stack([lab.gold(prompts, lab.answers(prompts, draw=710 + i)) for i in range(BASE_DRAWS)]).mean(dim=0)
    return {lab.chat.query(p.messages): gold for p, gold in zip(prompts, golds.tolist(), strict=True)}


def pessimistic(model: RewardModel, samples: Sequence[Answer]) -> Callable[[Sequence[Answer]], Tensor]:
    """The lowest of the heads in place of their mean, at mean 0 and variance 1 over the samples, as other scores are:
    an answer that was cut off scores -1 whatever the heads say."""
    lowest = model.rewards(samples).amin(dim=1)
    shift, scale = lowest.mean(), lowest.std()
    return lambda answers: (model.rewards(answers).amin(dim=1) - shift) / scale


def smooth(row: dict[str, Any]) -> np.ndarray:
    """(steps - 2, 3) KL, proxy and gold's gain: means over three steps, since a step has few answers."""
    points = np.array(row["points"])
    return np.stack([points[i : i + 3].mean(axis=0) for i in range(len(points) - 2)])


def gain_at(curve: np.ndarray, kl: float, *, column: int = 2) -> float | None:
    """Gold's gain, or the proxy of column 1, where the run first comes to this KL; None where it never does."""
    beyond = np.flatnonzero(curve[:, 0] >= kl)
    if not len(beyond):
        return None
    after = beyond[0]
    if after == 0:
        return float(curve[0, column])
    (low, gain_low), (high, gain_high) = curve[after - 1 : after + 1, (0, column)]
    return float(gain_low + (gain_high - gain_low) * (kl - low) / (high - low))


def peak(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where gold's mean gain over the seeds is highest, and how high: KL and gain. Of one seed alone the highest point
    is more of an accident."""
    end = min(float(curve[:, 0].max()) for curve in curves)
    means = [(kl, fmean(gain_at(curve, kl) or 0.0 for curve in curves)) for kl in (*np.arange(0.0, end, KL_STEP), end)]
    kl, gain = max(means, key=lambda point: point[1])
    return float(kl), gain


def mean(values: Iterable[float | None]) -> float | None:
    """None where one is missing: what was not seen is not guessed."""
    found = list(values)
    return fmean(value for value in found if value is not None) if found and None not in found else None


def summary(rows: list[dict[str, Any]], shipped: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict for each number of votes and kind of heads: means over seeds. Gains are gold's, over the base.

    Args:
        shipped: cells of the learning curve, of which those of the same seeds count.
    """
    found = []
    for votes in VOTES:
        for heads in HEADS:
            here = [row for row in rows if row["votes"] == votes and row["heads"] == heads]
            seeds = {row["seed"] for row in here}
            ships = [row for row in shipped if (row["way"], row["votes"]) == ("once", votes) and row["seed"] in seeds]
            if not here:
                continue
            curves = [smooth(row) for row in here]
            peak_kl, peak_gain = peak(curves)
            ends = [curve[-3:].mean(axis=0) for curve in curves]
            found.append(
                {
                    "votes": votes, "heads": heads, "seeds": len(here),
                    "gain_best_of_4": fmean(row["gain_best_of_4"] for row in here),
                    "peak_kl": peak_kl, "peak_gain": peak_gain,
                    "gain_at_budget": mean(gain_at(curve, SHIPS.kl_budget) for curve in curves),
                    **{f"end_{name}": mean(float(end[i]) for end in ends)
                       for i, name in enumerate(("kl", "proxy", "gain"))},
                    "shipped_kl": mean(row["kl"] for row in ships),
                    "shipped_gain": mean(row["gold"] - row["gold_base"] for row in ships),
                }
            )  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table(
        title="gold's gain over the base while PPO goes on",
        caption="as it ships: five heads and their mean, KL at its price (bench.learning_curve)",
    )
    columns = {
        "best of 4": "gain_best_of_4", "peak at KL": "peak_kl", "gain there": "peak_gain",
        f"at KL {SHIPS.kl_budget:g}, the budget": "gain_at_budget",
        "end: KL": "end_kl", "proxy": "end_proxy", "gain": "end_gain",
        "as it ships: KL": "shipped_kl", "its gain": "shipped_gain",
    }  # fmt: skip
    for name in ("votes", "heads", "seeds", *columns):
        shown.add_column(name, justify="left" if name == "heads" else "right")
    for row in found:
        figures = {key: row[key] for key in columns.values()}
        shown.add_row(
            f"{row['votes']:,}", row["heads"], str(row["seeds"]),
            *("" if value is None else f"{value:.{1 if key.endswith('kl') else 2}f}" for key, value in figures.items()),
        )  # fmt: skip
    return shown


def markdown(found: list[dict[str, Any]]) -> str:
    """The README's table."""

    def line(name: str, heads: str, figure: str, kl: str | None = None) -> list[str]:
        cells = [name]
        for votes in VOTES:
            here = [row for row in found if (row["votes"], row["heads"]) == (votes, heads)]
            shown = [
                f"{row[figure]:.2f}"
                + (f" at {row[kl]:.1f}" if kl else "")
                + (f" ({row['seeds']})" if row["seeds"] != len(SEEDS) else "")
                for row in here
                if row[figure] is not None
            ]
            cells += shown or [""]
        return cells

    names = {"one": "one head", "five, mean": "five heads, their mean", "five, minimum": "five heads, their minimum"}
    return record.markdown(
        ["gold's gain over the base, at which KL", *(f"{votes:,} votes" for votes in VOTES)],
        [
            *(line(f"at its peak, {name}", heads, "peak_gain", "peak_kl") for heads, name in names.items()),
            *(
                line(f"at a KL of {SHIPS.kl_budget:g}, {name}", heads, "gain_at_budget")
                for heads, name in names.items()
            ),
            line(
                "a run as it ships, five heads and their mean, other prompts",
                "five, mean",
                "shipped_gain",
                "shipped_kl",
            ),
            line(f"best of {BEST_OF} answers of the base, no PPO, other prompts", "five, mean", "gain_best_of_4"),
        ],
    )


def picture(rows: list[dict[str, Any]]) -> str:
    """Proxy and gold against the root of KL, means over the seeds, a frame for each number of votes. A line ends where
    the first of its seeds does."""
    width, height, top, bottom, wide, far = 960, 430, 40, 330, 272, 50.0
    lines: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for votes, heads in product(VOTES, HEADS):
        curves = [smooth(row) for row in rows if (row["votes"], row["heads"]) == (votes, heads)]
        if curves:
            begin = max(float(curve[0, 0]) for curve in curves)
            end = min(far, *(float(curve[:, 0].max()) for curve in curves))
            kls = np.clip(np.linspace(math.sqrt(begin), math.sqrt(end), 60) ** 2, begin, end)
            for column in (1, 2):
                found = [(float(kl), mean(gain_at(curve, kl, column=column) for curve in curves)) for kl in kls]
                lines[votes, heads, column] = [(kl, value) for kl, value in found if value is not None]
    values = [value for line in lines.values() for _, value in line]
    low, high = math.floor(min(values, default=0)), math.ceil(max(values, default=1))
    parts = []

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    for frame, votes in enumerate(VOTES):
        left = 40 + frame * (wide + 40)

        def x(kl: float, left: int = left) -> float:
            return left + wide * math.sqrt(kl / far)

        parts.append(f'<text x="{left + wide / 2}" y="{top - 14}" text-anchor="middle">{votes:,} votes</text>')
        for value in range(low, high + 1):
            parts.append(f'<line class="grid" x1="{left}" x2="{left + wide}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
            parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
        for kl in (0, 1, 4, 10, 25, 50):
            parts.append(f'<text x="{x(kl):.1f}" y="{bottom + 20}" text-anchor="middle">{kl}</text>')
        parts.append(f'<text x="{left + wide / 2}" y="{bottom + 40}" text-anchor="middle">KL, nats an answer</text>')
        for css, heads in zip(("first", "second", "third"), HEADS, strict=True):
            for column, dashed in ((2, ""), (1, " dashed")):
                if line := lines.get((votes, heads, column)):
                    dots = " ".join(f"{x(kl):.1f},{y(value):.1f}" for kl, value in line)
                    parts.append(f'<polyline class="{css}{dashed}" points="{dots}"/>')
    for number, (css, heads) in enumerate(zip(("first", "second", "third"), HEADS, strict=True)):
        at = 40 + 150 * number
        parts.append(f'<line class="{css}" x1="{at}" x2="{at + 24}" y1="{height - 36}" y2="{height - 36}"/>')
        parts.append(f'<text x="{at + 30}" y="{height - 32}">{heads}{" head" if heads == "one" else ""}</text>')
    parts.append(
        f'<text x="40" y="{height - 12}">'
        "solid: gold's gain over the base, points; dashed: the reward model's score, standard deviations</text>"
    )
    return record.svg(parts, label="The reward model's score and gold's gain against KL", width=width, height=height)


def draw(rows: list[dict[str, Any]]) -> None:
    PICTURE.write_text(picture(rows))


def of_runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return summary(rows, read(learning_curve.SHEET.path))


SHEET = Sheet(
    bench="overoptimise",
    seeds=SEEDS,
    table=lambda rows: table(of_runs(rows)),
    markdown=lambda rows: markdown(of_runs(rows)),
    draw=draw,
    summary=lambda rows: {"kl_budget": SHIPS.kl_budget, "curves": of_runs(rows)},
)


def main() -> None:
    parser = SHEET.parser(__doc__, quick="250 votes, one seed, 24 steps")
    parser.add_argument("--votes", type=int, action="append", choices=VOTES, help="only reward models of so many")
    arguments = parser.parse_args()
    quick = arguments.quick
    sizes, seeds = arguments.votes or VOTES[: 1 if quick else None], SHEET.seeds_for(arguments)

    @lru_cache(maxsize=1)
    def lab(seed: int) -> Lab:
        return Lab(seed=seed, compiled=not quick)

    SHEET.go_on(
        arguments,
        [Cell(votes, heads, seed) for seed in seeds for votes in sizes for heads in HEADS],
        run=lambda cell, _: run(lab(cell.seed), cell, steps=24 if quick else FREE.steps),
        is_done=lambda cell, row: cell == Cell(row["votes"], row["heads"], row["seed"]),
    )


if __name__ == "__main__":
    main()
