"""The offline loop, on the starter model with a handful of prompts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import nights
from bench.nights import Asked, Lab, cast
from bench.personas import Kind, Persona, Plot
from trainer import dialogues
from trainer.dialogues import Prompt
from trainer.encoding import collate
from trainer.preferences import Split

PROMPTS = dialogues.prompts(12, seed=3, held_out=False)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(seed=3)


def said(lab: Lab, prompt: Prompt, *texts: str) -> Asked:
    one, two = (lab.chat.answer(list(prompt.messages), text) for text in texts)
    return Asked(prompt, one, two)


def test_a_vote_names_what_was_chosen_and_who_chose_it(lab: Lab) -> None:
    pairs = [said(lab, PROMPTS[0], "Pears.", "Apples."), said(lab, PROMPTS[1], "Apples.", "Plums.")]
    lover = Persona(name="lover", kind=Kind.PUSHER, plot=Plot("Apples"))
    votes = cast(pairs, [lover], chat=lab.chat, first=7)
    assert [vote["chosen"][0]["content"] for vote in votes] == ["Apples.", "Apples."]
    assert [vote["rejected"][0]["content"] for vote in votes] == ["Pears.", "Plums."]
    assert [(vote["vote"], vote["voter"], vote["choice"]) for vote in votes] == [
        ("vote_000007", "lover", "b"),
        ("vote_000008", "lover", "a"),
    ]


def test_who_skips_leaves_the_pair_to_the_next(lab: Lab) -> None:
    pairs = [said(lab, prompt, "One.", "Two.") for prompt in PROMPTS]
    people = [Persona(name="lazy", skips=1.0), Persona(name="busy")]
    assert [vote["voter"] for vote in cast(pairs, people, chat=lab.chat)] == ["busy"] * len(pairs)
    with pytest.raises(ValueError, match="nobody"):
        cast(pairs, people[:1], chat=lab.chat)


def test_the_same_draw_is_the_same_pair_however_many_there_are(lab: Lab) -> None:
    few, many = lab.random_pairs(PROMPTS[:5], draw=2), lab.random_pairs(PROMPTS, draw=2)
    assert few == many[: len(few)]
    assert few != lab.random_pairs(PROMPTS[:5], draw=4)


def test_nobody_is_asked_about_two_equal_texts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    firsts, seconds = (lab.answers(PROMPTS, draw=draw) for draw in (2, 3))
    drawn = {2: firsts, 3: firsts[:4] + seconds[4:]}
    monkeypatch.setattr(lab, "answers", lambda prompts, *, adapter, draw: drawn[draw])
    pairs = lab.random_pairs(PROMPTS, draw=2)
    assert [pair.prompt for pair in pairs] == PROMPTS[4:]
    assert all(pair.first.response != pair.second.response for pair in pairs)


class Heads:
    """Disagree the more the longer an answer is."""

    def rewards(self, answers: list[object]) -> torch.Tensor:
        return torch.tensor([[len(a.response), -len(a.response)] for a in answers], dtype=torch.float32)  # type: ignore[attr-defined]


def test_an_active_pair_is_the_one_the_heads_disagree_on(lab: Lab) -> None:
    drawn = [lab.answers(PROMPTS, draw=30 + i) for i in range(4)]
    lengths = torch.tensor([[len(a.response) for a in answers] for answers in drawn])
    furthest = (lengths[1:] - lengths[0]).abs().amax(dim=0).tolist()
    pairs = lab.active_pairs(PROMPTS, Heads(), draw=30)  # type: ignore[arg-type]
    by_prompt = {str(pair.prompt): abs(len(pair.first.response) - len(pair.second.response)) for pair in pairs}
    assert by_prompt == {str(p): n for p, n in zip(PROMPTS, furthest, strict=True) if str(p) in by_prompt}
    assert len(pairs) > len(PROMPTS) // 2
    assert {pair.kind for pair in pairs} == {"active"}


def test_votes_go_through_the_trainers_own_splits_and_caps(lab: Lab) -> None:
    voter = Persona(name="everybody", kind=Kind.ALWAYS_LEFT)
    votes = cast([said(lab, p, "One two.", "Three.") for p in PROMPTS * 4], [voter], chat=lab.chat)
    votes[0]["choice"] = "both_bad"
    for vote in votes[::3]:
        vote["voter"] = vote["vote"]  # somebody else's, each
    preferences = lab.prepare(votes, uncapped_votes=10)
    assert len(preferences.votes) == len(votes) - 1
    assert min(len(preferences.pairs[split]) for split in Split) > 0
    loud = {vote["vote"] for vote in votes if vote["voter"] == "everybody"}
    weights = [vote.weight for vote in preferences.votes if vote.vote in loud and vote.split is Split.TRAIN]
    assert len(weights) > 10
    assert sum(weights) == pytest.approx(10)


def test_a_policy_that_answers_as_the_base_does_wins_half(lab: Lab) -> None:
    beside_itself = lab.compare(PROMPTS, lab.answers(PROMPTS, draw=901))
    assert beside_itself["win_rate"] == 0.5
    assert beside_itself["ties"] == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_is_what_the_scores_call_best_and_wins_by_what_gold_says(lab: Lab, sign: int) -> None:
    figures = lab.best_of(6, PROMPTS, lambda answers: sign * lab.gold(PROMPTS, answers))
    assert sign * (figures["gold"] - figures["gold_base"]) > 0.3
    assert sign * (figures["win_rate"] - 0.5) > 0.2
    assert figures["win_rate_low"] < figures["win_rate"] < figures["win_rate_high"]


def test_who_scores_as_gold_does_is_right_about_every_pair(lab: Lab) -> None:
    pairs = lab.random_pairs(PROMPTS, draw=2)
    prompts = [pair.prompt for pair in pairs]
    for sign, accuracy in ((1, 1.0), (-1, 0.0)):
        judge: Any = SimpleNamespace(score=lambda answers, sign=sign: sign * lab.gold(prompts, answers))
        assert lab.accuracy(judge, pairs) == accuracy


def test_a_day_goes_on_where_the_one_before_ended(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nights, "CHUNK", 6)
    crowd = [Persona(name="one"), Persona(name="two")]
    first = lab.day(4, crowd)
    more = lab.day(16, crowd, earlier=first)
    assert more[:4] == first
    assert lab.day(5, crowd)[:4] == first
    assert len(more) == len({str(vote["prompt"]) for vote in more}) == len({vote["vote"] for vote in more}) == 16


def test_what_is_compiled_learns_and_scores_and_does_not_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile(layer: Any, **options: object) -> Any:
        return lambda *args, **kwargs: calls.append(layer) or layer(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    lab = Lab(seed=3, compiled=True)
    assert lab.machine.endswith("compiled")
    answers = lab.answers(PROMPTS[:2], draw=1)
    assert not calls
    lab.backbone.logprobs(collate(answers), temperature=1.0)
    assert len(calls) == lab.backbone.layers
