"""What the learning curve makes of its cells; no model is loaded."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench import learning_curve, record
from bench.learning_curve import (
    VOTES,
    WAYS,
    Cell,
    cells,
    fit,
    markdown,
    paired,
    picture,
    points,
    summary,
)
from trainer.ppo import PPOConfig


def row(way: str, votes: int, seed: int, win_rate: float, first_night: float = 0.6) -> dict[str, object]:
    figures = {"best_of_4": 0.6, "reward_accuracy": 0.8, "kl": 2.0, "facts": 0.93, "facts_base": 0.94}
    nights = Cell(votes, seed, way).nights
    more = {"sycophancy": 0.7, "sycophancy_base": 0.7, "undecided": 0.2, "nights": nights}
    if nights > 1:
        more["first_night"] = first_night
    return {"way": way, "votes": votes, "seed": seed, "win_rate": win_rate} | figures | more


def test_few_votes_come_first_and_the_first_night_only_once() -> None:
    wanted = cells(WAYS, VOTES, (1, 2))
    assert [cell.votes for cell in wanted] == sorted(cell.votes for cell in wanted)
    assert [cell for cell in wanted if cell.votes == 250] == [Cell(250, 1, "once"), Cell(250, 2, "once")]
    assert len(wanted) == len(set(wanted)) == 2 * (1 + 3 * 6)


def test_a_night_builds_on_the_one_before_and_all_ways_on_the_first() -> None:
    third = Cell(1000, 1, "active nights")
    assert third.nights == 3
    assert third.before == Cell(500, 1, "active nights")
    assert third.before.before is not None
    assert third.before.before.folder == Cell(250, 1, "once").folder
    assert third.folder != Cell(1000, 1, "random nights").folder
    assert Cell(1000, 1, "once").before is None


def test_the_fit_finds_the_curve_that_made_the_points() -> None:
    found = fit({n: 0.9 - 4 * n**-0.55 for n in VOTES})
    assert found is not None
    a, b, c = found
    for n in (300, 3000, 16000):
        assert a - b * n**-c == pytest.approx(0.9 - 4 * n**-0.55, abs=1e-3)
    assert fit({250: 0.7, 500: 0.8, 1000: 0.85}) is None


def test_no_fit_promises_more_than_every_answer() -> None:
    straight = {n: 0.6 + 0.05 * i for i, n in enumerate(VOTES)}
    found = fit(straight)
    assert found
    a, b, c = found
    assert a == 1
    assert all(a - b * n**-c == pytest.approx(rate, abs=0.04) for n, rate in straight.items())


def test_the_ratio_says_where_active_pairs_reach_the_random_curve() -> None:
    rows = [row("once", n, seed, rate) for seed in (1, 2) for n, rate in ((250, 0.6), (1000, 0.7), (4000, 0.8))]
    assert summary(rows)["votes_ratio_active"] is None
    chain = ((500, 0.7), (1000, 0.75), (2000, 0.85))
    rows += [row("active nights", n, 1, rate) for n, rate in chain]
    assert summary(rows)["votes_ratio_active"] is None, "one seed tells nothing"
    rows += [row("active nights", n, 2, rate) for n, rate in chain]
    # Half way, over the logarithm, from 1,000 to 2,000 votes.
    assert summary(rows)["votes_ratio_active"] == pytest.approx(math.sqrt(2) / 4)
    rows += [row("once", 4000, 3, 0.9), row("active nights", 500, 3, 0.9), row("active nights", 4000, 3, 0.9)]
    assert summary(rows)["votes_ratio_active"] == pytest.approx(math.sqrt(2) / 4), "half a chain is none"
    assert summary(rows)["votes_ratio_active_high"] == pytest.approx(math.sqrt(2) / 4), "both seeds say the same"
    assert summary(rows)["win_rate_1000_active_nights"] == 0.75
    assert summary(rows)["win_rate_1000"] == 0.7
    assert summary(rows)["win_rate_16000"] is None


def test_how_sure_the_ratio_is_is_said_by_seeds_drawn_again() -> None:
    rows = [row("once", 4000, seed, 0.8) for seed in (1, 2)]
    rows += [row("active nights", n, 1, 0.8) for n in (500, 1000, 2000, 4000)]
    rows += [row("active nights", n, 2, rate) for n, rate in ((500, 0.6), (1000, 0.7), (2000, 0.75), (4000, 0.8))]
    figures = summary(rows)
    assert (figures["votes_ratio_active_low"], figures["votes_ratio_active_high"]) == (pytest.approx(500 / 4000), 1)
    rows[-1] = row("active nights", 4000, 2, 0.79)
    assert summary(rows)["votes_ratio_active_high"] is None, "drawn twice, the second seed never gets there"


def test_facts_are_held_against_all_draws_of_the_base() -> None:
    lucky = row("once", 500, 1, 0.8) | {"facts": 0.93, "facts_base": 0.96}
    same = [lucky | {"seed": seed} for seed in (2, 3)]
    assert summary([lucky, *same])["facts_change_worst"] == pytest.approx(-0.03)
    other = row("once", 250, 1, 0.8) | {"facts": 0.95, "facts_base": 0.92}
    assert summary([lucky, *same, other])["facts_change_worst"] == pytest.approx(0.93 - 0.94)


def test_ways_are_compared_seed_by_seed() -> None:
    rows = [row("once", 500, 1, 0.7), row("once", 500, 2, 0.9), row("random nights", 500, 2, 0.91)]
    assert paired(rows, ("random nights", 500), ("once", 500)) == [pytest.approx(0.01)]
    rows.append(row("random nights", 500, 1, 0.73))
    assert paired(rows, ("random nights", 500), ("once", 500)) == [pytest.approx(0.03), pytest.approx(0.01)]
    assert paired(rows, ("active nights", 500), ("once", 500)) == []


def test_later_nights_are_held_against_their_own_first_one() -> None:
    rows = [row("once", 250, 1, 0.9), row("random nights", 500, 1, 0.75, 0.7)]
    rows += [row("random nights", 1000, 1, 0.8, 0.7), row("random nights", 1000, 2, 0.82, 0.8)]
    figures = summary(rows)
    assert figures["night_2_random_nights"] == pytest.approx(0.05)
    assert figures["night_3_random_nights"] == pytest.approx(0.06)
    assert figures["night_3_active_nights"] is None


class FakeLab:
    """Counts votes and nights; its policy wins by the votes that it was made of, and a little by chance."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self.machine = "none"
        self.drawn = torch.rand(100).tolist()
        self.backbone = SimpleNamespace(adapters=self)
        self.policy = torch.zeros(1)
        self.asked: list[tuple[int, int, str | None, float, bool]] = []

    def state(self, name: str) -> dict[str, torch.Tensor]:
        return {"weight": self.policy}

    def set_state(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.policy = tensors["weight"]

    def day(self, count: int, crowd: object, *, earlier: Any = (), adapter: Any = None, pairs: Any = None) -> Any:
        self.asked.append((count, len(earlier), adapter, float(self.policy), pairs is not None))
        return [*earlier, *({"choice": "a", "number": i} for i in range(len(earlier), count))]

    def prepare(self, votes: list[Any]) -> int:
        return len(votes)

    def night(self, votes: int, *, policy: PPOConfig, start_from: str) -> Any:
        assert policy.steps == 1
        assert start_from == ("base" if not float(self.policy) else "incumbent")
        self.policy = torch.tensor([float(votes)])
        return SimpleNamespace(reward=SimpleNamespace(save=lambda folder: folder.mkdir(exist_ok=True), score=None))

    def win_rate(self, prompts: object) -> dict[str, float]:
        return {"win_rate": float(self.policy) / 2000 + 0.01 * self.drawn.pop()}

    def probes(self, adapter: str | None = "policy") -> dict[str, float]:
        return {"facts": 0.9}

    def random_pairs(self, prompts: object, draw: int) -> list[object]:
        return []

    def accuracy(self, reward: object, pairs: object) -> float:
        return 0.8

    def best_of(self, n: int, prompts: object, score: object) -> dict[str, float]:
        return {"win_rate": 0.7}


def test_a_night_that_is_missing_is_made_again_and_counts_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab: Any = FakeLab(seed=1)
    monkeypatch.setattr(learning_curve.RewardModel, "load", lambda *args: None)
    curve = learning_curve.Curve(lab, held_out=2, kept=tmp_path, steps=1)
    third = curve.run(Cell(1000, 1, "active nights"))
    assert lab.asked == [
        (250, 0, None, 0.0, False),
        (500, 250, "policy", 250.0, True),
        (1000, 500, "policy", 500.0, True),
    ]
    first = json.loads((tmp_path / Cell(250, 1, "once").folder / "row.json").read_text())
    assert third["first_night"] == first["win_rate"]
    assert third["nights"] == 3

    lab.asked.clear()
    again = curve.run(Cell(500, 1, "random nights"))
    assert lab.asked == [(500, 250, "policy", 250.0, False)], "what is kept is not made again"
    assert again["first_night"] == first["win_rate"]


def test_a_night_that_broke_off_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab: Any = FakeLab(seed=1)
    curve = learning_curve.Curve(lab, held_out=2, kept=tmp_path, steps=1)
    curve.run(Cell(250, 1, "once"))
    lab.policy = torch.zeros(1)
    with monkeypatch.context() as broken:
        broken.setattr(learning_curve, "save_file", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curve.run(Cell(250, 1, "once"))
    lab.policy = torch.zeros(1)
    lab.asked.clear()
    curve.run(Cell(500, 1, "random nights"))
    assert [count for count, *_ in lab.asked] == [250, 500]


def test_the_curves_of_nights_begin_with_their_own_first_night() -> None:
    rows = [row("once", 250, 1, 0.6), row("once", 500, 1, 0.7), row("random nights", 500, 1, 0.75, first_night=0.62)]
    assert points(rows, "random nights") == {250: {1: 0.62}, 500: {1: 0.75}}


def test_the_readmes_table_says_how_many_seeds_there_are_where_some_are_missing() -> None:
    rows = [row("once", 250, seed, 0.7) for seed in (1, 2, 3, 4, 5)] + [row("active nights", 500, 1, 0.8)]
    lines = markdown(rows).splitlines()
    assert lines[2].startswith("| win rate, random pairs, one night | 0.700 ± 0.000 |  |")
    assert lines[4].startswith("| win rate, half active pairs, night by night |  | 0.800 (1) |")
    assert lines[6].startswith("| points over its own first night (250 votes), half active")
    assert lines[6].count("| +20.0 (1) |") == 1
    assert lines[-3].startswith("| facts right, points more than the base's, random pairs, one night | -1.0 ± 0.0 |")
    assert len({line.count("|") for line in lines}) == 1


def test_nights_are_held_against_one_night_and_active_pairs_against_random_ones_seed_by_seed() -> None:
    rows = [row("once", 500, seed, 0.7 + seed / 100) for seed in (1, 2, 3)]
    rows += [row("random nights", 500, seed, 0.72 + seed / 100, first_night=0.6) for seed in (1, 2, 3, 4)]
    rows += [row("active nights", 500, seed, 0.75 + seed / 100, first_night=0.6) for seed in (2, 3, 4)]
    said = {line.split(" | ")[0]: line.split(" | ")[2] for line in markdown(rows).splitlines()[2:]}
    assert said["| points over one night on as many votes, random pairs, night by night"] == "+2.0 ± 0.0 (3)"
    assert said["| points over one night on as many votes, half active pairs, night by night"] == "+5.0 (2)"
    assert said["| points that half active pairs are worth, night by night"] == "+3.0 ± 0.0 (3)"


def test_the_picture_has_every_point_inside_its_frame() -> None:
    rows = [row(way, n, seed, 0.7 + 0.01 * seed) for way in WAYS for n in VOTES for seed in (1, 2)]
    root = ElementTree.fromstring(picture(rows))
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 3 * 7 + 3  # and the legend's
    assert all(0 < float(c.attrib["cx"]) < 720 and 0 < float(c.attrib["cy"]) < 400 for c in circles)


def test_showing_what_there_is_needs_no_model_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.jsonl"
    record.append(path, row("once", 250, 1, 0.7))
    before = path.read_text()
    monkeypatch.setattr(learning_curve, "PICTURE", tmp_path / "picture.svg")
    monkeypatch.setattr(sys, "argv", ["learning_curve", "--cells", "0", "--json", "--results", str(path)])
    learning_curve.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["win_rate_250"] == 0.7
    assert path.read_text() == before
    assert not (tmp_path / "picture.svg").exists()
