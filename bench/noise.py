"""How much noise the votes may have: reward accuracy and win rate against the share of votes that are flipped.

A crowd of 50 votes 1,000 times (`bench.personas`: their votes are drawn from sigma(difference) as it is, so that gold
agrees with some 80 % of them). Five kinds of noise come on top:

    flipped     each decisive vote is turned round by a chance of 0 to 40 %, whoever cast it
    at random   so many people vote by throwing a coin, the others as ever
    one side    so many people take the first answer, whatever it is
    contrarian  so many people take what they like less
    one rater   one person, who likes the longer answer, casts so many of 4,000 votes

and where it is some people's it is learned from with and without a run's defences: the reliability of raters as
weights, their quarantine, the cap on a rater's share. Each finished cell is a line of the results file and is skipped
the next time.

    OMP_NUM_THREADS=1 python -m bench.noise --quick --json
    OMP_NUM_THREADS=1 python -m bench.noise --minutes 60
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

from rich.table import Table

from bench import record
from bench.nights import Lab
from bench.personas import Kind, Persona, personas
from bench.record import Sheet, said
from bench.robust import NONE, Defences, Vote, rate, weigh
from trainer import dialogues
from trainer.ppo import PPOConfig

VOTES = 1000
OF_ONE_RATER = 4
"""Times as many votes, or the cap, which leaves a rater's first 200 alone, would not be seen."""
PEOPLE = 50
HELD_OUT = 500
TEST_PAIRS = 1500
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
SEEDS = (1, 2, 3)
BEST_OF = 4
RELIABILITY = replace(NONE, quarantine=True, weights=True)
QUARANTINE = replace(NONE, quarantine=True)
WEIGHTS = replace(NONE, weights=True)
WAYS: dict[tuple[str, str], Defences] = {
    ("flipped", "plain"): NONE,
    ("at random", "plain"): NONE,
    ("at random", "reliability"): RELIABILITY,
    ("one side", "plain"): NONE,
    ("one side", "quarantine"): QUARANTINE,
    ("one side", "weights"): WEIGHTS,
    ("contrarian", "plain"): NONE,
    ("contrarian", "quarantine"): QUARANTINE,
    ("contrarian", "weights"): WEIGHTS,
    ("one rater", "plain"): NONE,
    ("one rater", "cap"): replace(NONE, cap=True),
    ("one rater", "weights"): WEIGHTS,
}
SAME = {
    ("at random", "plain"): ("flipped", "plain"),
    ("one side", "plain"): ("flipped", "plain"),
    ("contrarian", "plain"): ("flipped", "plain"),
    ("contrarian", "quarantine"): ("one side", "quarantine"),
    ("contrarian", "weights"): ("one side", "weights"),
    ("one rater", "cap"): ("one rater", "plain"),
}
"""Which are one where nobody is noisy, so that is done once."""
VILLAINS = {"at random": Kind.RANDOM, "one side": Kind.ALWAYS_LEFT, "contrarian": Kind.CONTRARIAN}


@dataclass(frozen=True, slots=True)
class Cell:
    noise: str
    share: float
    defence: str
    seed: int


def cells(shares: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    found = [Cell(noise, share, defence, seed) for seed in seeds for share in shares for noise, defence in WAYS]
    return [cell for cell in found if cell.share or (cell.noise, cell.defence) not in SAME]


def flip(votes: Sequence[Vote], share: float, *, seed: int) -> list[Vote]:
    """Each decisive vote turned round by this chance. More noise flips the same votes and others."""
    chance = random.Random(f"flip {seed}")
    flipped = []
    for vote in votes:
        turned = chance.random() < share and vote["choice"] in ("a", "b")
        other = {"a": "b", "b": "a"}.get(vote["choice"], vote["choice"])
        flipped.append(
            vote | {"chosen": vote["rejected"], "rejected": vote["chosen"], "choice": other} if turned else vote
        )
    return flipped


def crowd(cell: Cell) -> list[Persona]:
    """Who votes, in turns: who is named more than once votes more often."""
    if cell.noise in VILLAINS:
        return personas(PEOPLE, seed=cell.seed, villains={VILLAINS[cell.noise]: round(cell.share * PEOPLE)})
    people = personas(PEOPLE, seed=cell.seed)
    if cell.noise == "one rater":
        keen = Persona(name="keen", seed=cell.seed, kind=Kind.LENGTH_LOVER)
        people += [keen] * round(PEOPLE * cell.share / (1 - cell.share))
    return people


class Noise:
    def __init__(self, lab: Lab, *, votes: int, held_out: int, policies: bool) -> None:
        self.lab = lab
        self.votes = votes
        self.policies = policies
        self.test_pairs = lab.random_pairs(dialogues.prompts(TEST_PAIRS, seed=lab.seed, held_out=True), draw=800)
        self.held_out = dialogues.prompts(held_out, seed=lab.seed, held_out=True)

    def run(self, cell: Cell) -> dict[str, Any]:
        started = time.monotonic()
        lab, defences = self.lab, WAYS[cell.noise, cell.defence]
        votes = lab.day(self.votes * (OF_ONE_RATER if cell.noise == "one rater" else 1), crowd(cell))
        if cell.noise == "flipped":
            votes = flip(votes, cell.share, seed=cell.seed)
        preferences = weigh(lab, votes, rate(lab, votes, defences), defences)
        reward = lab.reward(preferences, defences.reward(cell.seed))
        figures = {
            "accuracy": lab.accuracy(reward, self.test_pairs),
            "best_of_4": lab.best_of(BEST_OF, self.held_out, reward.score)["win_rate"],
        }
        if self.policies:
            night = lab.improve(reward, preferences, PPOConfig(seed=cell.seed))
            figures |= {"win_rate": lab.win_rate(self.held_out)["win_rate"], "kl": night.curve[-1]["kl"]}
        return {
            "noise": cell.noise, "share": cell.share, "defence": cell.defence, "seed": cell.seed, "votes": len(votes),
            "on": lab.machine,
            **{name: round(figure, 4) for name, figure in figures.items()},
            "seconds": round(time.monotonic() - started),
        }  # fmt: skip


def values(rows: Sequence[dict[str, Any]], noise: str, share: float, defence: str, figure: str) -> dict[int, float]:
    """By seed; of a cell that was run again, the latest."""
    noise, defence = (noise, defence) if share else SAME.get((noise, defence), (noise, defence))
    found: dict[int, float] = {}
    for row in rows:
        if (row["noise"], row["share"], row["defence"]) == (noise, share, defence) and figure in row:
            found[row["seed"]] = row[figure]
    return found


def gains(rows: Sequence[dict[str, Any]], noise: str, share: float, defence: str, figure: str) -> list[float]:
    """What the defence adds to learning from the same votes without it, by seed; empty for no defence."""
    if defence == "plain":
        return []
    with_it, without = (values(rows, noise, share, way, figure) for way in (defence, "plain"))
    return [with_it[seed] - without[seed] for seed in sorted(with_it.keys() & without.keys())]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of `--json`: means over seeds, None where no cell says."""
    figures: dict[str, Any] = {"cells": len(rows)}
    for noise, defence in WAYS:
        for share in SHARES:
            for figure in ("accuracy", "best_of_4", "win_rate"):
                found = values(rows, noise, share, defence, figure)
                name = f"{figure}_{noise.replace(' ', '_')}_{defence}_{share:.0%}".replace("%", "")
                figures[name] = fmean(found.values()) if found else None
    return figures


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="what noise does to votes", caption="mean and 95 % interval over seeds")
    for name in ("noise", "share", "defence", "seeds", "reward right", "beside plain", "best of 4",
                 "beside plain", "win rate"):  # fmt: skip
        shown.add_column(name, justify="left" if name in ("noise", "defence") else "right", no_wrap=True)
    for noise, defence in WAYS:
        for share in SHARES:
            right, best, wins = (
                values(rows, noise, share, defence, figure) for figure in ("accuracy", "best_of_4", "win_rate")
            )
            if right:
                shown.add_row(
                    noise, f"{share:.0%}", defence, str(len(right)),
                    said(right.values()), said(gains(rows, noise, share, defence, "accuracy"), "+.3f"),
                    said(best.values()), said(gains(rows, noise, share, defence, "best_of_4"), "+.3f"),
                    said(wins.values()),
                )  # fmt: skip
    return shown


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table."""
    flipped = {
        "votes flipped at random: pairs in gold's order": "accuracy",
        f"the best of {BEST_OF} by that reward model, no PPO": "best_of_4",
        "win rate of a policy that learned from the same votes": "win_rate",
    }
    others = {
        "this share of people vote at random": ("at random", "plain"),
        "the same, raters weighed by reliability or left out": ("at random", "reliability"),
        "this share of people always take the first answer": ("one side", "plain"),
        "the same, who takes one side left out": ("one side", "quarantine"),
        "the same, raters weighed by reliability and nobody left out": ("one side", "weights"),
        "this share of people take what they like less": ("contrarian", "plain"),
        "the same, who votes against the others left out": ("contrarian", "quarantine"),
        "the same, all weighed by reliability": ("contrarian", "weights"),
        f"one person, who likes it long, casts this share of {VOTES * OF_ONE_RATER:,} votes": (
            "one rater",
            "plain",
        ),
        "the same, no rater's votes with more weight than a tenth of all": ("one rater", "cap"),
        "the same, no cap, all weighed by reliability": ("one rater", "weights"),
    }

    def line(name: str, noise: str, way: str, *figures: str) -> list[str]:
        def cell(share: float) -> str:
            found = [said(values(rows, noise, share, way, figure).values(), of=len(SEEDS)) for figure in figures]
            return " / ".join(found) if any(found) else ""

        return [name, *(cell(share) for share in SHARES)]

    head = f"share of noise; of two figures pairs in gold's order / the best of {BEST_OF}"
    return record.markdown(
        [head, *(f"{share:.0%}" for share in SHARES)],
        [
            *(line(name, "flipped", "plain", figure) for name, figure in flipped.items()),
            *(line(name, noise, way, "accuracy", "best_of_4") for name, (noise, way) in others.items()),
        ],
    )


SHEET = Sheet(bench="noise", seeds=SEEDS, table=table, markdown=markdown, summary=summary)


def main() -> None:
    parser = SHEET.parser(__doc__, quick="one seed, three shares, 500 votes, no policies")
    parser.add_argument("--shares", type=record.share, nargs="+", default=SHARES, help="of noise")
    parser.add_argument("--noise", choices=sorted({noise for noise, _ in WAYS}), help="only this kind")
    parser.add_argument("--rewards-only", action="store_true", help="no policies: minutes instead of hours")
    arguments = parser.parse_args()
    quick = arguments.quick
    policies = not (quick or arguments.rewards_only)
    wanted = cells((0.0, 0.2, 0.4) if quick else arguments.shares, SHEET.seeds_for(arguments))

    @lru_cache(maxsize=1)
    def noise(seed: int) -> Noise:
        lab = Lab(seed=seed, compiled=not quick)
        return Noise(lab, votes=500 if quick else VOTES, held_out=HELD_OUT, policies=policies)

    SHEET.go_on(
        arguments,
        [cell for cell in wanted if arguments.noise in (None, cell.noise)],
        run=lambda cell, _: noise(cell.seed).run(cell),
        is_done=lambda cell, row: (
            cell == Cell(row["noise"], row["share"], row["defence"], row["seed"])
            and ("win_rate" in row or not policies)
        ),
    )


if __name__ == "__main__":
    main()
