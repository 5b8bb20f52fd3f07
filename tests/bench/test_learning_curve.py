"""What the learning curve makes of its cells; no model is loaded."""

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import learning_curve
from bench.learning_curve import VOTES, WAYS, Cell, append, cells, fit, paired, picture, points, read, summary


def row(way: str, votes: int, seed: int, win_rate: float) -> dict[str, object]:
    figures = {"best_of_4": 0.6, "reward_accuracy": 0.8, "kl": 2.0, "facts": 0.93, "facts_base": 0.94}
    nights = Cell(votes, seed, way).nights
    more = {"sycophancy": 0.7, "sycophancy_base": 0.7, "undecided": 0.2, "nights": nights}
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
    assert third.before.before.kept == Cell(250, 1, "once").kept
    assert third.kept != Cell(1000, 1, "random nights").kept
    assert Cell(1000, 1, "once").before is None


def test_a_line_that_was_cut_off_is_no_cell_and_spoils_none(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    append(path, {"votes": 250})
    with path.open("a") as file:
        file.write('{"votes": 5')
    append(path, {"votes": 1000})
    assert read(path) == [{"votes": 250}, {"votes": 1000}]
    assert read(tmp_path / "none.jsonl") == []


def test_the_fit_finds_the_curve_that_made_the_points() -> None:
    found = fit({n: 0.9 - 4 * n**-0.55 for n in VOTES})
    assert found is not None
    a, b, c = found
    for n in (300, 3000, 16000):
        assert a - b * n**-c == pytest.approx(0.9 - 4 * n**-0.55, abs=1e-3)
    assert fit({250: 0.7, 500: 0.8, 1000: 0.85}) is None


def test_the_ratio_says_where_active_pairs_reach_the_random_curve() -> None:
    rows = [row("once", n, 1, rate) for n, rate in ((250, 0.6), (1000, 0.7), (4000, 0.8))]
    assert summary(rows)["votes_ratio_active"] is None
    rows += [row("active nights", n, 1, rate) for n, rate in ((500, 0.7), (1000, 0.75), (2000, 0.85))]
    # Half way, over the logarithm, from 1,000 to 2,000 votes.
    assert summary(rows)["votes_ratio_active"] == pytest.approx(math.sqrt(2) / 4)
    assert summary(rows)["win_rate_1000_active_nights"] == 0.75
    assert summary(rows)["win_rate_1000"] == 0.7
    assert summary(rows)["win_rate_16000"] is None


def test_ways_are_compared_seed_by_seed() -> None:
    rows = [row("once", 500, 1, 0.7), row("once", 500, 2, 0.9), row("random nights", 500, 2, 0.91)]
    assert paired(rows, ("random nights", 500), ("once", 500)) == (pytest.approx(0.01), None, 1)
    rows.append(row("random nights", 500, 1, 0.73))
    mean, half, seeds = paired(rows, ("random nights", 500), ("once", 500)) or (0, None, 0)
    assert (mean, seeds) == (pytest.approx(0.02), 2)
    assert half == pytest.approx(12.71 * 0.01, rel=1e-3)
    assert paired(rows, ("active nights", 500), ("once", 500)) is None


def test_later_nights_are_held_against_the_first() -> None:
    rows = [row("once", 250, 1, 0.7), row("once", 250, 2, 0.8), row("random nights", 500, 1, 0.75)]
    rows += [row("random nights", 1000, 1, 0.8), row("random nights", 1000, 2, 0.82), row("once", 1000, 1, 0.9)]
    figures = summary(rows)
    assert figures["night_2_random_nights"] == pytest.approx(0.05)
    assert figures["night_3_random_nights"] == pytest.approx(0.06)
    assert figures["night_3_active_nights"] is None


def test_the_curves_of_nights_begin_with_the_first_night() -> None:
    rows = [row("once", 250, 1, 0.6), row("once", 500, 1, 0.7), row("random nights", 500, 1, 0.75)]
    assert points(rows, "random nights") == {250: [0.6], 500: [0.75]}


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
    append(path, row("once", 250, 1, 0.7))
    before = path.read_text()
    monkeypatch.setattr(learning_curve, "PICTURE", tmp_path / "picture.svg")
    monkeypatch.setattr(sys, "argv", ["learning_curve", "--cells", "0", "--json", "--results", str(path)])
    learning_curve.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["win_rate_250"] == 0.7
    assert path.read_text() == before
    assert not (tmp_path / "picture.svg").exists()
