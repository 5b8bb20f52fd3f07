"""The arithmetic of over-optimisation, and what a step of it is held against."""

from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench import nights, overoptimise
from bench.nights import Lab, Scores
from bench.overoptimise import HEADS, Cell, gain_at, markdown, pessimistic, picture, smooth, summary
from trainer import dialogues
from trainer.preferences import Preferences, Split


def run(points: list[tuple[float, float, float]], heads: str = "one", seed: int = 1) -> dict[str, Any]:
    return {
        "votes": 250, "heads": heads, "seed": seed, "gain_best_of_4": 0.5, "points": [list(point) for point in points],
    }  # fmt: skip


FALLS = [(0.0, 0.0, 0.0), (1.0, 0.5, 0.3), (2.0, 1.0, 0.6), (3.0, 1.5, 0.9), (4.0, 2.0, 0.6), (16.0, 2.5, -0.3)]


def test_a_step_with_a_lucky_draw_is_no_peak() -> None:
    lucky = [(float(kl), 0.0, 0.1 * kl + (0.5 if kl == 3 else 0.0)) for kl in range(12)]
    (only,) = summary([run(lucky)], [])
    assert only["peak_kl"] == 10.0
    assert only["peak_gain"] == pytest.approx(1.0)


def test_the_summary_says_where_gold_is_highest_and_how_far_it_falls() -> None:
    (only,) = summary([run(FALLS), run([(2 * kl, proxy, gain) for kl, proxy, gain in FALLS], seed=2)], [])
    assert only["seeds"] == 2
    # At a KL of 4 the second is at .6, and the first, which was at .7 at 3 and will be at .4 at 23 / 3, at .636.
    assert only["peak_kl"] == pytest.approx(4.0)
    assert only["peak_gain"] == pytest.approx((0.6 + 0.7 - 0.3 * 3 / 14) / 2)
    assert only["end_gain"] < only["peak_gain"]


def test_gains_between_two_steps_lie_between_theirs() -> None:
    curve = smooth(run(FALLS))
    assert gain_at(curve, 2.5) == pytest.approx((0.6 + 0.7) / 2)
    assert gain_at(curve, 0.1) == pytest.approx(0.3)


def test_the_picture_has_proxy_and_gold_of_each_kind_of_heads_inside_its_frame() -> None:
    rows = [run([*FALLS, (90.0, 4.0, -1.0)], heads, seed) for heads in HEADS for seed in (1, 2)]
    root = ElementTree.fromstring(picture(rows))
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert sorted(line.attrib["class"] for line in lines) == [
        "first", "first dashed", "second", "second dashed", "third", "third dashed",
    ]  # fmt: skip
    dots = {
        line.attrib["class"]: [tuple(map(float, dot.split(","))) for dot in line.attrib["points"].split()]
        for line in lines
    }
    assert all(40 <= x <= 40 + 272 and 40 <= y <= 330 for line in dots.values() for x, y in line)
    gold, proxy = ([y for _, y in dots[name]] for name in ("first", "first dashed"))
    assert proxy == sorted(proxy, reverse=True), "it rises, and y counts from above"
    assert 0 < gold.index(min(gold)) < len(gold) - 1, "gold falls after its peak"


def test_what_was_not_reached_is_not_guessed() -> None:
    (near,) = summary([run(FALLS[:5])], [])
    assert near["gain_at_budget"] is None
    (one_of_two,) = summary([run([*FALLS, *[(40.0, 3.0, -1.0)] * 3]), run(FALLS[:5], seed=2)], [])
    assert one_of_two["gain_at_budget"] is None


def test_beside_it_stands_what_ships_with_as_many_votes_of_the_same_seeds() -> None:
    cells = [
        {"way": "once", "votes": 250, "seed": 1, "kl": 1.8, "gold": 4.3, "gold_base": 3.5},
        {"way": "once", "votes": 250, "seed": 2, "kl": 9.0, "gold": 9.0, "gold_base": 3.5},
        {"way": "once", "votes": 1000, "seed": 1, "kl": 9.0, "gold": 9.0, "gold_base": 3.5},
        {"way": "active nights", "votes": 250, "seed": 1, "kl": 9.0, "gold": 9.0, "gold_base": 3.5},
    ]
    (only,) = summary([run(FALLS)], cells)
    assert only["shipped_kl"] == 1.8
    assert only["shipped_gain"] == pytest.approx(0.8)
    shown = markdown([only])
    assert "| a run as it ships, five heads and their mean, other prompts |  |  |  |\n" in shown, (
        "those have five heads"
    )
    assert f"| at its peak, one head | {only['peak_gain']:.2f} at {only['peak_kl']:.1f} (1) |  |  |\n" in shown


def test_pessimism_believes_the_lowest_head_on_the_scale_of_other_scores() -> None:
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0], [9.0, 3.0]])
    score = pessimistic(SimpleNamespace(rewards=lambda answers: rewards), [])  # type: ignore[arg-type]
    assert score([]).tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_a_step_s_gain_is_gold_s_over_the_base_s_answers_to_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(seed=4)
    monkeypatch.setattr(overoptimise, "HELD_OUT", 8)
    monkeypatch.setattr(overoptimise, "BASE_DRAWS", 1)
    monkeypatch.setattr(nights, "CHUNK", 20)
    prompts = {lab.chat.query(p.messages): p for p in dialogues.prompts(290, seed=4, held_out=False)}

    def improve(reward: object, preferences: Preferences, config: object, *, score: Scores) -> Any:
        """The worst of six answers by gold."""
        asked = [prompts[query] for query in preferences.queries[Split.TRAIN]]
        drawn = [lab.answers(asked, draw=20 + i) for i in range(6)]
        order = torch.stack([lab.gold(asked, answers) for answers in drawn]).argsort(dim=0)
        score([drawn[k][i] for i, k in enumerate(order[0].tolist())])
        return SimpleNamespace(curve=[{"kl": 1.5}])

    reward = SimpleNamespace(score=lambda answers: torch.full((len(answers),), 0.25))
    monkeypatch.setattr(lab, "reward", lambda preferences, config: reward)
    monkeypatch.setattr(lab, "improve", improve)
    row = overoptimise.run(lab, Cell(20, "one", 4), steps=1)
    ((kl, proxy, gain),) = row["points"]
    assert (kl, proxy) == (1.5, 0.25)
    assert gain < -0.3
