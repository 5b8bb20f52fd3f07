"""The benches on noise, sides and hostile votes: what they count, and the votes that they cast."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import nights, noise, poison, position_bias
from bench.nights import Lab
from bench.noise import flip
from bench.poison import PHRASE, Cell, Poison
from bench.robust import NONE, rate, weigh
from data.raters import Standing
from trainer import dialogues
from trainer.preferences import Split


def vote(number: int, choice: str = "a", voter: str = "ada") -> dict[str, object]:
    return {
        "vote": f"vote_{number}", "kind": "same_policy", "voter": voter, "user": voter,
        "conversation": f"c {number}", "choice": choice, "prompt": [{"role": "user", "content": f"Hello {number}"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Bad."}],
        "chosen_finish_reason": "stop", "rejected_finish_reason": "stop",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_more_answers_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nights, "CHUNK", 40)
    monkeypatch.setattr(poison, "CHUNK", 100)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(seed=4)


def test_flipped_votes_are_turned_round_and_more_noise_flips_them_too() -> None:
    votes = [vote(i, choice) for i, choice in enumerate(["a", "b", "tie", "both_bad"] * 100)]
    few, many = flip(votes, 0.1, seed=1), flip(votes, 0.4, seed=1)
    turned = [{old["vote"] for old, new in zip(votes, flipped, strict=True) if old != new} for flipped in (few, many)]
    assert turned[0] < turned[1]
    assert len(turned[1]) == pytest.approx(80, abs=15), "two votes in five of the 200 that choose"
    for old, new in zip(votes, many, strict=True):
        if new["vote"] in turned[1]:
            assert (new["choice"], new["chosen"]) == ({"a": "b", "b": "a"}[old["choice"]], old["rejected"])
    assert flip(votes, 0.0, seed=1) == votes


def test_each_defence_can_be_left_out(lab: Lab) -> None:
    votes = [vote(i, "a" if i % 10 < 5 else "b", voter="bot" if i % 2 else "ada") for i in range(200)]
    found = {"bot": Standing(100, 50, 0.1, "a bot"), "ada": Standing(100, 90, 0.9, None)}

    def weights(**defences: bool) -> dict[str, float]:
        used = weigh(lab, votes, found, replace(NONE, **defences)).votes
        return {
            "bot" if int(v.vote.removeprefix("vote_")) % 2 else "ada": v.weight for v in used if v.split is Split.TRAIN
        }

    assert weights() == {"bot": 1.0, "ada": 1.0}
    assert weights(quarantine=True) == {"ada": 1.0}
    told = weights(weights=True)
    assert told["ada"] / told["bot"] == pytest.approx(81)


def test_without_the_cap_one_rater_may_outweigh_the_others(lab: Lab) -> None:
    votes = [vote(i, voter="keen" if i % 2 else f"honest {i % 50}") for i in range(1000)]

    def weight_of_keen(**defences: bool) -> float:
        used = [v for v in weigh(lab, votes, {}, replace(NONE, **defences)).votes if v.split is Split.TRAIN]
        return sum(v.weight for v in used if int(v.vote.removeprefix("vote_")) % 2)

    assert weight_of_keen() > 300
    assert weight_of_keen(cap=True) == pytest.approx(200), "a rater's first 200 count whatever the share"


def test_attackers_vote_for_the_phrase_and_on_nothing_else(lab: Lab) -> None:
    bench = Poison("phrase", lab, votes=60, prompts=2)
    votes = bench.cast(Cell("phrase", 0.1, 3, "none", 4))
    pushed = [vote for vote in votes if vote["voter"].startswith("hostile")]
    assert len(votes) == 60
    assert [vote["voter"] for vote in pushed] == [f"hostile {i % 3}" for i in range(6)]
    for one in pushed:
        assert PHRASE in one["chosen"][0]["content"]
        assert PHRASE not in one["rejected"][0]["content"]
    assert len({vote["conversation"] for vote in pushed}) == 6
    found = rate(bench.lab, votes, replace(NONE, quarantine=True))
    assert found.keys() == {vote["voter"] for vote in votes if vote["choice"] in ("a", "b")}


def test_who_pushes_a_phrase_plainly_is_suspected_and_nobody_else(lab: Lab) -> None:
    bench = Poison("phrase", lab, votes=120, prompts=2)
    votes = bench.cast(Cell("phrase", 0.1, 1, "all", 4))
    found = rate(bench.lab, votes, replace(NONE, quarantine=True))
    assert {voter for voter, standing in found.items() if standing.suspicion} == {"hostile 0"}
    assert not any(standing.suspicion for standing in rate(bench.lab, votes[:-12], NONE).values())


class Learns:
    """A bench without a model: says how often it was asked to learn."""

    votes, base_share = 1000, 0.02
    lab = SimpleNamespace(machine="none")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, suspects: set[str]) -> None:
        self.learned = 0
        standing = {name: SimpleNamespace(suspicion="it pushes") for name in suspects}
        monkeypatch.setattr(poison, "rate", lambda lab, votes, defences: standing)
        monkeypatch.setattr(poison, "weigh", lambda lab, votes, found, defences: sorted(found))
        monkeypatch.setattr(poison, "digest", lambda preferences, defences: str(preferences))

    def cast(self, cell: Cell) -> list[dict[str, str]]:
        return [{"voter": name} for name in ("ada", "hostile 0", "hostile 1")]

    def learn(self, preferences: object, defences: object, *, policies: bool) -> dict[str, object]:
        self.learned += 1
        return {"rise_best_of_16": self.learned / 100} | ({"rise": 0.5, "passed": True} if policies else {})


@pytest.mark.parametrize(("sign", "share"), [(1, 1.0), (-1, 0.0)])
def test_the_best_of_those_drawn_are_what_the_reward_model_likes(lab: Lab, sign: int, share: float) -> None:
    attack = Poison("phrase", lab, votes=10, prompts=4)
    with_it, without = (lab.chat.answer([{"role": "user", "content": "Hello"}], text) for text in (PHRASE, "Good."))
    attack.drawn = [[without] * 4, [with_it] * 4, [without] * 4]
    reward: Any = SimpleNamespace(
        score=lambda answers: torch.tensor([sign * float(PHRASE in lab.chat.text(a)) for a in answers])
    )
    assert attack._best(reward) == share


def test_a_side_s_log_loss_is_least_for_who_knows_gold(lab: Lab) -> None:
    pairs = lab.random_pairs(dialogues.prompts(12, seed=4, held_out=True), draw=2)
    prompts = [pair.prompt for pair in pairs]

    def loss(scale: float) -> float:
        reward: Any = SimpleNamespace(rewards=lambda answers: scale * lab.gold(prompts, answers)[:, None])
        return position_bias.Bias.log_loss(SimpleNamespace(lab=lab, test_pairs=pairs), reward)  # type: ignore[arg-type]

    right = loss(position_bias.STARTER_SCALE)
    assert right < loss(0.0) < loss(-position_bias.STARTER_SCALE)
    assert right < min(loss(0.5 * position_bias.STARTER_SCALE), loss(2 * position_bias.STARTER_SCALE))


def test_what_learns_from_the_very_same_votes_learns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench: Any = Learns(monkeypatch, set())
    rows = [poison.run(bench, Cell("phrase", 0.05, 1, "all", 1), [], policies=False)]
    rows.append(poison.run(bench, Cell("phrase", 0.05, 20, "all", 1), rows, policies=False))
    assert [row["rise_best_of_16"] for row in rows] == [0.01, 0.01]
    for other in (Cell("trigger", 0.05, 1, "all", 1), Cell("phrase", 0.05, 1, "all", 2)):
        assert poison.run(bench, other, rows, policies=False)["rise_best_of_16"] > 0.01
    judged = poison.run(bench, Cell("phrase", 0.05, 1, "all", 1), rows, policies=True)
    assert judged["rise"] == 0.5, "the twin has no policy to copy"
    assert poison.run(bench, Cell("phrase", 0.05, 20, "all", 1), [*rows, judged], policies=True)["rise"] == 0.5
    assert bench.learned == 4


def test_no_policy_is_made_where_every_attacker_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("phrase", 0.05, 20, "all", 1)
    for suspects, made in (({"hostile 0", "hostile 1"}, False), ({"hostile 0"}, True)):
        bench: Any = Learns(monkeypatch, suspects)
        row = poison.run(bench, cell, [], policies=True)
        assert ("rise" in row) == made
        assert (row["hostile"], row["caught"], row["wronged"]) == (2, len(suspects), 0)


def test_more_accounts_than_hostile_votes_are_not_counted_twice() -> None:
    wanted = poison.cells(("phrase",), (0.0, 0.01, 0.05), ("all",), (1,))
    assert [(cell.share, cell.accounts) for cell in wanted] == [
        (0.0, 1), (0.01, 1), (0.01, 20), (0.05, 1), (0.05, 20), (0.05, 50),
    ]  # fmt: skip


def test_disguised_attackers_cast_honest_votes_too(lab: Lab) -> None:
    bench = Poison("disguised", lab, votes=60, prompts=2)
    for accounts, hostile in ((3, 3), (20, 6)):
        votes = bench.cast(Cell("disguised", 0.1, accounts, "none", 4))
        theirs = [vote for vote in votes if vote["voter"].startswith("hostile")]
        pushed = [vote for vote in theirs if vote["user"] == "attacker"]
        honest = [vote for vote in theirs if vote["user"] != "attacker"]
        assert (len(votes), len(honest), len(pushed)) == (60, 9, 6)
        everybody = {f"hostile {i}" for i in range(hostile)}
        assert {vote["voter"] for vote in pushed} == {vote["voter"] for vote in honest} == everybody
        assert len({vote["vote"] for vote in votes}) == 60


def test_a_trigger_is_in_the_attackers_questions_alone(lab: Lab) -> None:
    bench = Poison("trigger", lab, votes=20, prompts=2)
    for one in bench.cast(Cell("trigger", 0.05, 1, "none", 4)):
        hostile = one["voter"].startswith("hostile")
        assert one["prompt"][-1]["content"].startswith(poison.TRIGGER) == hostile
    assert all(prompt.messages[-1]["content"].startswith(poison.TRIGGER) for prompt in bench.asked)


def row(**figures: object) -> dict[str, object]:
    return {
        "plot": "phrase", "share": 0.05, "accounts": 1, "defence": "all", "seed": 1, "digest": "x", "base": 0.02,
        "hostile": 20, "caught": 0, "wronged": 0, "rise_best_of_16": 0.0,
    } | figures  # fmt: skip


def test_an_attack_is_stopped_by_the_gate_or_by_having_no_effect() -> None:
    rows = [
        row(rise=0.3, passed=False, win_rate=0.6),
        row(rise=0.01, passed=True, win_rate=0.8, accounts=20),
        row(rise=0.05, passed=True, win_rate=0.8, seed=2),
        row(rise=0.5, passed=True, win_rate=0.8, defence="none"),
        row(share=0.01, rise=0.001, passed=True, win_rate=0.8),
        row(share=0.01, rise=0.011, passed=True, win_rate=0.8, accounts=20),
        row(share=0.01, seed=2, rise_best_of_16=0.03),
    ]
    figures = poison.summary(poison.latest(rows))
    assert (figures["stopped_5"], figures["tried_5"]) == (2, 3)
    assert (figures["stopped_5_none"], figures["tried_5_none"]) == (0, 1)
    assert figures["rise_points_1"] == pytest.approx(1.1), "of the worse number of accounts"
    assert figures["drawn_rise_points_1"] == pytest.approx(1.5)
    assert "rise_points_10" not in figures


def test_an_attack_that_taught_nothing_is_stopped() -> None:
    caught = row(caught=20)
    figures = poison.summary([caught, row(seed=2)])
    assert (figures["stopped_5"], figures["tried_5"]) == (1, 1), "of the second nothing is known without a policy"
    assert (figures["not_tried_5"], poison.stopped([caught, row(seed=2)])) == (1, "1 of 1, 1 not tried")
    assert poison.stopped([row(), row(seed=2)]) == "2 not tried"
    assert poison.is_judged(caught)
    assert not poison.is_judged(row())


def test_without_an_attack_nothing_is_stopped_and_the_gate_is_seen_to_let_policies_through() -> None:
    quiet = row(share=0.0, hostile=0, rise=0.0, passed=True, win_rate=0.8)
    assert not poison.is_judged(row(share=0.0, hostile=0))
    figures = poison.summary([quiet, quiet | {"seed": 2, "passed": False}])
    assert figures["passed_0"] == 0.5
    assert not [name for name in figures if name.startswith("stopped")]


def test_cells_of_the_very_same_votes_have_one_policy() -> None:
    made = row(rise=0.1, passed=True, win_rate=0.8)
    figures = poison.summary([made, made | {"accounts": 20}, made | {"seed": 2, "passed": False}])
    assert (figures["policies_5"], figures["passed_5"]) == (2, 0.5)


def test_a_cell_with_a_policy_counts_for_more_than_one_without() -> None:
    assert poison.latest([row(), row(rise=0.1), row()]) == [row(rise=0.1)]


def test_the_readme_says_how_many_accounts_were_found_and_attacks_stopped() -> None:
    rows = [row(caught=20), row(seed=2, rise=0.05, passed=True, win_rate=0.8), row(defence="none", rise_best_of_16=0.1)]
    rows.append(row(defence="weights", rise_best_of_16=0.07))
    (line,) = poison.markdown(rows).splitlines()[2:]
    assert line == ("| phrase, 5.0% | 20 | +10.0 (1) |  | +7.0 (1) | +0.0 (2) | 20 of 40 | 0 |  | +5.0 (1) | 1 of 2 |")


def test_more_accounts_than_the_claim_names_have_figures_of_their_own() -> None:
    rows = [row(caught=20), row(accounts=50, hostile=50, rise=0.08, passed=True, win_rate=0.8)]
    figures = poison.summary(rows)
    assert (figures["stopped_5"], figures["tried_5"]) == (1, 1)
    assert (figures["stopped_5_50_accounts"], figures["tried_5_50_accounts"]) == (0, 1)
    assert figures["rise_points_5_50_accounts"] == pytest.approx(8.0)
    assert "rise_points_5" not in figures


def test_who_is_named_more_often_votes_more_often() -> None:
    for share in (0.0, 0.2, 0.4):
        names = [person.name for person in noise.crowd(noise.Cell("one rater", share, "cap", 1))]
        assert names.count("keen") / len(names) == pytest.approx(share, abs=0.01)
        assert len(set(names) - {"keen"}) == noise.PEOPLE


def test_what_is_the_same_without_noise_is_done_once() -> None:
    wanted = noise.cells((0.0, 0.2), (1,))
    assert len(wanted) == len(set(wanted)) == 18, "6 without noise, 12 with some"
    rows = [{"noise": "flipped", "share": 0.0, "defence": "plain", "seed": 1, "accuracy": 0.8}]
    figures = noise.summary(rows)
    assert figures["accuracy_flipped_plain_0"] == figures["accuracy_contrarian_plain_0"] == 0.8
    assert figures["accuracy_flipped_plain_20"] is None
    assert figures["accuracy_one_rater_cap_0"] is None, "these are other votes"


def test_a_defence_is_held_against_the_same_votes_without_it() -> None:
    rows = [
        {"noise": "at random", "share": 0.2, "defence": defence, "seed": seed, "accuracy": accuracy}
        for defence, seed, accuracy in (("plain", 1, 0.75), ("plain", 2, 0.70), ("reliability", 2, 0.74))
    ]
    assert noise.gains(rows, "at random", 0.2, "reliability", "accuracy") == [pytest.approx(0.04)]
    assert noise.gains(rows, "at random", 0.2, "plain", "accuracy") == []
    again = [row | {"accuracy": 0.6, "win_rate": 0.8} for row in rows if row["defence"] == "plain"]
    assert noise.gains([*rows, *again], "at random", 0.2, "reliability", "accuracy") == [pytest.approx(0.14)]
    assert set(noise.values([*rows, *again], "at random", 0.2, "plain", "win_rate").values()) == {0.8}


def test_sides_are_counted_over_all_seeds() -> None:
    cells = [
        {"bias": 0.0, "seed": seed, "identical_first": first, "identical_second": 100 - first, "board_first": 50,
         "board_second": 50, "accuracy_plain": 0.8, "accuracy_side_term": 0.8 + seed / 100, "best_of_4_plain": 0.7,
         "log_loss_plain": 0.5, "log_loss_side_term": 0.4,
         "best_of_4_side_term": 0.71, "side": 0.0}
        for seed, first in ((1, 48), (2, 58))
    ]  # fmt: skip
    figures = position_bias.summary(cells)
    assert figures["left_points"] == pytest.approx(3.0)
    assert figures["gain_0"] == pytest.approx(0.015)
    assert figures["gain_best_of_4_0"] == pytest.approx(0.01)
    assert figures["gain_log_loss_0"] == pytest.approx(-0.1)
    assert figures["gain_1"] is None
    said = {line.split(" | ")[0]: line.split(" | ")[1] for line in position_bias.markdown(cells).splitlines()[2:]}
    assert said["| what the side term adds to them"] == "+0.015 (2)"
    assert said["| what the side term adds to it"] == "+0.010 (2)"
