"""How many votes until the answers are better: gold's win rate of the new policy against votes.

A crowd of 50 simulated people (`bench.personas`) votes, the trainer's own code learns (`bench.nights`), and gold judges
the new policy beside the base on 500 held-out prompts. A vote is a vote that was cast: ties, both_bad and the three in
ten that the judge and the held-out side keep for themselves are counted too. Three ways to spend the votes:

    once            all of them on random pairs of the base's answers, one night
    random nights   a night at 250, 500, 1,000, ... votes; the pairs between two nights are those of the last policy
                    and PPO goes on from it
    active nights   the same, but half of the pairs are those on which the last reward model's heads disagree most

Each finished cell (way, votes, seed) is a line of the results file, and is skipped the next time; Ctrl-C loses the cell
under way. Nights that a later one needs are kept under .bench/learning_curve and made again where they are missing.

    OMP_NUM_THREADS=1 python -m bench.learning_curve --minutes 60 --votes 1000
    python -m bench.learning_curve --cells 0 --json         only the tables (the README's too), the fit and the picture
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import mkdtemp
from typing import Any

import numpy as np
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench import record
from bench.nights import Asked, Lab
from bench.personas import personas
from bench.record import ROOT, Sheet, interval, said
from trainer import dialogues
from trainer.dialogues import Prompt
from trainer.ppo import PPOConfig
from trainer.reward_model import RewardModel

PICTURE = ROOT / "docs/learning-curve.svg"
KEPT = ROOT / ".bench/learning_curve"
VOTES = (250, 500, 1000, 2000, 4000, 8000, 16000)
WORDS = {
    "once": "random pairs, one night",
    "random nights": "random pairs, night by night",
    "active nights": "half active pairs, night by night",
}
WAYS = tuple(WORDS)
SEEDS = (1, 2, 3, 4, 5)
PEOPLE = 50
HELD_OUT = 500
BEST_OF = 4
RATIO_OF = 4000


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    votes: int
    seed: int
    way: str

    @property
    def nights(self) -> int:
        return 1 if self.way == "once" else VOTES.index(self.votes) + 1

    @property
    def before(self) -> "Cell | None":
        """The night whose policy wrote the newer half of this one's pairs."""
        return None if self.nights == 1 else Cell(VOTES[self.nights - 2], self.seed, self.way)

    @property
    def folder(self) -> Path:
        # The first night is the same whatever comes after it.
        way = self.way if self.nights > 1 or self.votes > VOTES[0] else "once"
        return Path(f"seed-{self.seed}", way.replace(" ", "-"), str(self.votes))


def cells(ways: Sequence[str], votes: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """Few votes first. After VOTES[0] of them every way has seen one night and is the same, so that is done once."""
    found = [Cell(n, seed, way) for n in votes for seed in seeds for way in ways]
    return [cell for cell in found if cell.way == "once" or cell.nights > 1]


# One cell -----------------------------------------------------------------------------------------------------


class Curve:
    def __init__(self, lab: Lab, *, held_out: int, kept: Path, steps: int) -> None:
        self.lab = lab
        self.kept = kept
        self.policy = PPOConfig(seed=lab.seed, steps=steps)
        self.crowd = personas(PEOPLE, seed=lab.seed)
        self.held_out = dialogues.prompts(held_out, seed=lab.seed, held_out=True)
        self.base_probes = lab.probes(adapter=None)
        self.test_pairs = lab.random_pairs(self.held_out, draw=800)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Make a night, judge it, and keep what a later one needs."""
        started = time.monotonic()
        votes = self._votes(cell)
        day_s = time.monotonic() - started
        preferences = self.lab.prepare(votes)
        night = self.lab.night(preferences, policy=self.policy, start_from="incumbent" if cell.before else "base")
        night_s = time.monotonic() - started - day_s
        measure_s = -time.monotonic()
        newest = votes[cell.before.votes if cell.before else 0 :]
        figures = {
            **self.lab.win_rate(self.held_out),
            **self.lab.probes(),
            **{f"{kind}_base": share for kind, share in self.base_probes.items()},
            "reward_accuracy": self.lab.accuracy(night.reward, self.test_pairs),
            "best_of_4": self.lab.best_of(BEST_OF, self.held_out, night.reward.score)["win_rate"],
            "undecided": fmean(vote["choice"] in ("tie", "both_bad") for vote in newest),
        }
        measure_s += time.monotonic()
        if cell.before:
            # Its own first night: on another machine, whose rounding draws other answers, that was another one.
            first = self._row(cell.before)
            figures["first_night"] = first.get("first_night", first["win_rate"])
        row = {
            "way": cell.way, "votes": cell.votes, "seed": cell.seed, "nights": cell.nights, "on": self.lab.machine,
            **{name: round(figure, 4) for name, figure in figures.items()},
            "day_s": round(day_s), "night_s": round(night_s), "measure_s": round(measure_s),
        }  # fmt: skip
        folder = self.kept / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "row.json").unlink(missing_ok=True)
        (folder / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
        night.reward.save(folder / "reward")
        save_file(self.lab.backbone.adapters.state("policy"), folder / "policy.safetensors")
        (folder / "row.json").write_text(json.dumps(row))  # last: all is there
        return row

    def _row(self, cell: Cell) -> dict[str, Any]:
        """What a night came to, which is made where none of this kind of machine is kept."""
        path = self.kept / cell.folder / "row.json"
        row = dict(json.loads(path.read_text())) if path.exists() else {}
        return row if row.get("on") == self.lab.machine else self.run(cell)

    def _votes(self, cell: Cell) -> list[dict[str, Any]]:
        """All votes to date: those of the nights before, and what this day adds."""
        if cell.before is None:
            return self.lab.day(cell.votes, self.crowd)
        self._row(cell.before)
        folder = self.kept / cell.before.folder
        earlier = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
        self.lab.backbone.adapters.set_state("policy", load_file(folder / "policy.safetensors"))
        pairs = None
        if cell.way == "active nights":
            pairs = self._half_active(RewardModel.load(self.lab.backbone, "reward", folder / "reward"))
        return self.lab.day(cell.votes, self.crowd, earlier=earlier, adapter="policy", pairs=pairs)

    def _half_active(self, reward: RewardModel) -> Callable[[Sequence[Prompt], int], list[Asked]]:
        def pairs(prompts: Sequence[Prompt], draw: int) -> list[Asked]:
            half = len(prompts) // 2
            random_half = self.lab.random_pairs(prompts[:half], adapter="policy", draw=draw)
            return random_half + self.lab.active_pairs(prompts[half:], reward, adapter="policy", draw=draw)

        return pairs


# What came out ------------------------------------------------------------------------------------------------


def points(rows: Iterable[dict[str, Any]], way: str, figure: str = "win_rate") -> dict[int, dict[int, float]]:
    """By votes and by seed. Nights begin with the first one that they came from."""
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        if row["way"] == way:
            found.setdefault(row["votes"], {})[row["seed"]] = row[figure]
            if "first_night" in row:
                found.setdefault(VOTES[0], {})[row["seed"]] = row["first_night"]
    return dict(sorted(found.items()))


def of_several(found: dict[int, dict[int, float]]) -> dict[int, float]:
    """Means over seeds, of the points that have more than one."""
    return {votes: fmean(by_seed.values()) for votes, by_seed in found.items() if len(by_seed) > 1}


def fit(means: dict[int, float]) -> tuple[float, float, float] | None:
    """(a, b, c) of win rate = a - b * votes^-c, a at most 1, by least squares; None for fewer than four points."""
    if len(means) < 4:
        return None
    votes, rates = np.array(list(means)), np.array(list(means.values()))
    best: tuple[float, tuple[float, float, float]] | None = None
    for c in np.linspace(0.05, 2.0, 118):
        columns = np.stack([np.ones(len(votes)), -(votes.astype(float) ** -c)], axis=1)
        solution = np.linalg.lstsq(columns, rates, rcond=1e-12)[0]
        if solution[0] > 1:  # no answers win more often than always
            fall = columns[:, 1]
            solution = np.array([1.0, (rates - 1) @ fall / (fall @ fall)])
        error = float(((columns @ solution - rates) ** 2).sum())
        if best is None or error < best[0]:
            best = error, (float(solution[0]), float(solution[1]), float(c))
    return best and best[1]


def votes_to_reach(means: dict[int, float], rate: float) -> float | None:
    """Where the line through the points, over the logarithm of the votes, first reaches the rate."""
    before: tuple[int, float] | None = None
    for votes, here in means.items():
        if here >= rate:
            if before is None:
                return float(votes)
            share = (rate - before[1]) / (here - before[1])
            return float(before[0] * (votes / before[0]) ** share)
        before = votes, here
    return None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of `--json`. What no cell says yet is None."""
    means = {way: {n: fmean(values.values()) for n, values in points(rows, way).items()} for way in WAYS}
    figures: dict[str, Any] = {"cells": len(rows)}
    for n in VOTES:
        figures[f"win_rate_{n}"] = means["once"].get(n)
    for way in WAYS[1:]:
        for n in VOTES[1:]:
            figures[f"win_rate_{n}_{way.replace(' ', '_')}"] = means[way].get(n)
            gains = paired(rows, (way, n), ("once", n))
            figures[f"gain_{n}_{way.replace(' ', '_')}"] = fmean(gains) if gains else None
    figures |= {name: fmean(gains) if gains else None for name, gains in cycles(rows).items()}
    lost = [
        fmean(row["facts"] for row in rows if (row["way"], row["votes"]) == cell) - of_the_base(rows, "facts")
        for cell in {(row["way"], row["votes"]) for row in rows}
    ]
    figures["facts_change_worst"] = min(lost) if lost else None
    for way in WAYS[1:]:
        name = f"votes_ratio_{way.removesuffix(' nights')}"
        figures[name], figures[f"{name}_low"], figures[f"{name}_high"] = votes_ratio(rows, way)
    figures["fit"] = {way: fit(of_several(points(rows, way))) for way in WAYS}
    return figures


def of_the_base(rows: Iterable[dict[str, Any]], kind: str) -> float:
    """How the base does at probes of this kind: over all its draws, many of which are the same in several rows, since
    one draw alone has luck that all of these rows would be held against."""
    return fmean({row[f"{kind}_base"] for row in rows})


def votes_ratio(rows: Sequence[dict[str, Any]], way: str) -> tuple[float | None, float | None, float | None]:
    """How many votes nights of this way need for the win rate that one night on random pairs has with RATIO_OF votes,
    as a share of these, and its bootstrap interval of 95 %: the seeds that have both, drawn again from themselves in
    every way there is. None for fewer than two seeds, and where no such rate is reached. Where the curve is flat it
    says little."""
    goals, nights = points(rows, "once").get(RATIO_OF, {}), points(rows, way)
    seeds = sorted(goals.keys() & set.intersection(*(set(nights.get(n, ())) for n in VOTES if n <= RATIO_OF // 2)))
    if len(seeds) < 2:
        return None, None, None
    whole = {n: found for n, found in nights.items() if found.keys() >= set(seeds)}

    def ratio(drawn: Sequence[int]) -> float | None:
        means = {n: fmean(found[seed] for seed in drawn) for n, found in whole.items()}
        needed = votes_to_reach(means, fmean(goals[seed] for seed in drawn))
        return needed and needed / RATIO_OF

    again = sorted(ratio(drawn) or math.inf for drawn in product(seeds, repeat=len(seeds)))
    low, high = (again[round(share * (len(again) - 1))] for share in (0.025, 0.975))
    return ratio(seeds), low if low < math.inf else None, high if high < math.inf else None


def paired(rows: Iterable[dict[str, Any]], here: tuple[str, int], there: tuple[str, int]) -> list[float]:
    """What (way, votes) is better by than another in win rate, of each seed that has both."""
    by_cell: dict[tuple[str, int], dict[int, float]] = {here: {}, there: {}}
    for row in rows:
        if (cell := (row["way"], row["votes"])) in by_cell:
            by_cell[cell][row["seed"]] = row["win_rate"]
    both = sorted(by_cell[here].keys() & by_cell[there].keys())
    return [by_cell[here][seed] - by_cell[there][seed] for seed in both]


def cycles(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """What the second and the third night, with the votes of their days, add to the first, of each seed."""
    return {
        f"night_{night}_{way.replace(' ', '_')}": [
            row["win_rate"] - row["first_night"] for row in rows if (row["way"], row["nights"]) == (way, night)
        ]
        for way in WAYS[1:]
        for night in (2, 3)
    }


def table(rows: list[dict[str, Any]]) -> Table:
    added = "; ".join(
        f"{name.replace('_', ' ')}: {said(gains, '+.3f')}" for name, gains in cycles(rows).items() if gains
    )
    shown = Table(
        title="gold win rate against the base, held-out prompts",
        caption="mean and 95 % interval over seeds" + (f"; over the first night, {added}" if added else ""),
    )
    for name in ("votes", "way", "seeds", "win rate", "beside once", "best of 4", "reward right", "KL",
                 "facts", "sycophancy", "undecided"):  # fmt: skip
        shown.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for n in VOTES:
        for way in WAYS:
            here = [row for row in rows if row["way"] == way and row["votes"] == n]
            if not here:
                continue
            lost = [fmean(row[kind] for row in here) - of_the_base(rows, kind) for kind in ("facts", "sycophancy")]
            shown.add_row(
                f"{n:,}", way, str(len(here)),
                said(row["win_rate"] for row in here),
                said(paired(rows, (way, n), ("once", n)), "+.3f") if way != "once" else "",
                *(f"{fmean(row[name] for row in here):.3f}" for name in ("best_of_4", "reward_accuracy")),
                f"{fmean(row['kl'] for row in here):.1f}",
                *(f"{100 * change:+.1f}" for change in lost),
                f"{fmean(row['undecided'] for row in here):.2f}",
            )  # fmt: skip
    return shown


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table."""

    by_votes = {way: [[row for row in rows if (row["way"], row["votes"]) == (way, n)] for n in VOTES] for way in WAYS}

    def line(name: str, way: str, figure: str) -> list[str]:
        return [name, *(said((row[figure] for row in here), of=len(SEEDS)) for here in by_votes[way])]

    def gained(name: str, way: str, points: Callable[[dict[str, Any]], float]) -> list[str]:
        return [name, *(said((100 * points(row) for row in here), "+.1f", of=len(SEEDS)) for here in by_votes[way])]

    def beside(name: str, way: str, other: str) -> list[str]:
        """Of the seeds that have both."""
        gains = ([100 * gain for gain in paired(rows, (way, n), (other, n))] for n in VOTES)
        return [name, *(said(found, "+.1f", of=len(SEEDS)) for found in gains)]

    _, random_nights, active_nights = WAYS
    facts_base = of_the_base(rows, "facts") if rows else 0.0
    table = [
        *(line(f"win rate, {words}", way, "win_rate") for way, words in WORDS.items()),
        *(
            gained(
                f"points over its own first night (250 votes), {WORDS[way]}",
                way,
                lambda row: row["win_rate"] - row["first_night"],
            )
            for way in WAYS[1:]
        ),
        *(beside(f"points over one night on as many votes, {WORDS[way]}", way, "once") for way in WAYS[1:]),
        beside("points that half active pairs are worth, night by night", active_nights, random_nights),
        line(f"best of {BEST_OF} answers by the same reward model, no PPO", "once", "best_of_4"),
        line("pairs that the reward model puts in gold's order, one night", "once", "reward_accuracy"),
        *(
            gained(f"facts right, points more than the base's, {words}", way, lambda row: row["facts"] - facts_base)
            for way, words in WORDS.items()
        ),
    ]
    return record.markdown(["votes", *(f"{n:,}" for n in VOTES)], table)


def picture(rows: list[dict[str, Any]]) -> str:
    width, height, left, top, right, bottom = 720, 400, 56, 24, 684, 344
    low, high = 0.5, 0.95

    def x(votes: float) -> float:
        return left + (right - left) * math.log(votes / VOTES[0]) / math.log(VOTES[-1] / VOTES[0])

    def y(rate: float) -> float:
        return bottom - (bottom - top) * (rate - low) / (high - low)

    parts = []
    for step in range(10):
        rate = low + step * 0.05
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(rate):.1f}" y2="{y(rate):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:.2f}</text>')
    for votes in VOTES:
        parts.append(f'<text x="{x(votes):.1f}" y="{bottom + 20}" text-anchor="middle">{votes:,}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">votes</text>')
    best_of = of_several(points(rows, "once", "best_of_4"))
    if len(best_of) > 1:
        line = " ".join(f"{x(n):.1f},{y(rate):.1f}" for n, rate in best_of.items())
        parts.append(f'<polyline class="aside" points="{line}"/>')
    for number, (css, way) in enumerate(zip(("first", "second", "third"), WAYS, strict=True)):
        found = points(rows, way)
        shift = 4 * (number - 1)
        means = of_several(found)
        fitted = fit(means)
        if fitted:
            a, b, c = fitted
            steps = [min(means) * (max(means) / min(means)) ** (i / 40) for i in range(41)]
            line = " ".join(f"{x(n):.1f},{y(a - b * n**-c):.1f}" for n in steps)
        else:
            line = " ".join(f"{x(n):.1f},{y(rate):.1f}" for n, rate in means.items())
        parts.append(f'<polyline class="{css}" points="{line}"/>')
        for n, by_seed in found.items():
            mean, half = interval(list(by_seed.values()))
            here = x(n) + shift
            parts.append(f'<circle class="{css}" cx="{here:.1f}" cy="{y(mean):.1f}" r="4"/>')
            if half is not None:
                ends = (y(max(low, mean - half)), y(min(high, mean + half)))
                parts.append(
                    f'<line class="{css}" x1="{here:.1f}" x2="{here:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
                )
        parts.append(f'<circle class="{css}" cx="{right - 220}" cy="{bottom - 66 + 20 * number}" r="4"/>')
        parts.append(f'<text x="{right - 208}" y="{bottom - 62 + 20 * number}">{WORDS[way]}</text>')
    parts.append(f'<line class="aside" x1="{right - 226}" x2="{right - 214}" y1="{bottom - 6}" y2="{bottom - 6}"/>')
    parts.append(f'<text x="{right - 208}" y="{bottom - 2}">best of {BEST_OF}, no PPO</text>')
    return record.svg(parts, label="Win rate of the learned policy against votes", width=width, height=height)


def draw(rows: list[dict[str, Any]]) -> None:
    PICTURE.write_text(picture(rows))


SHEET = Sheet(
    bench="learning_curve", seeds=SEEDS, table=table, markdown=markdown, summary=summary, draw=draw, width=136
)


def main() -> None:
    parser = SHEET.parser(__doc__, quick="250 and 500 votes, one seed, 200 prompts, 8 steps")
    parser.add_argument("--votes", type=int, default=VOTES[-1], help="up to so many")
    parser.add_argument("--way", action="append", choices=WAYS, help="only these ways")
    arguments = parser.parse_args()
    quick = arguments.quick
    votes = [n for n in VOTES if n <= (500 if quick else arguments.votes)]
    kept = Path(mkdtemp()) if quick else KEPT

    @lru_cache(maxsize=1)
    def curve(seed: int) -> Curve:
        lab, steps = Lab(seed=seed, compiled=not quick), 8 if quick else PPOConfig().steps
        return Curve(lab, held_out=200 if quick else HELD_OUT, kept=kept, steps=steps)

    SHEET.go_on(
        arguments,
        cells(arguments.way or WAYS, votes, SHEET.seeds_for(arguments)),
        run=lambda cell, _: curve(cell.seed).run(cell),
        is_done=lambda cell, row: cell == Cell(row["votes"], row["seed"], row["way"]),
    )


if __name__ == "__main__":
    main()
