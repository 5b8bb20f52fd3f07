"""The arithmetic of the swap bench, and that its policies say what they are to say. Nothing here looks at a time."""

import argparse
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from transformers import AutoTokenizer

from bench import swap
from bench.load import Exchange
from bench.swap import Answer, Kind, Restart, Taken, Window
from data.settings import STARTER
from trainer.backbone import Backbone
from trainer.encoding import ChatFormat
from trainer.lora import Adapters
from trainer.rollout import LocalSampler, Sampling

ASKED_FOR = 40
WORDS = {"policy-0001": "cat", "policy-0002": "dog"}


def exchange(
    *words: str, policy: str = "policy-0001", done: bool = True, reason: str | None = "length",
    tokens: int = ASKED_FOR, status: int = 200,
) -> Exchange:  # fmt: skip
    def event(delta: dict[str, Any], *, reason: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return b"data: " + orjson.dumps({"choices": choices, "system_fingerprint": policy} | more) + b"\n\n"

    body = event({"role": "assistant", "content": ""}) + b"".join(event({"content": f" {word}"}) for word in words)
    body += event({}, reason=reason) + event({}, choices=[], usage={"completion_tokens": tokens})
    return Exchange(1.0, status=status, body=bytearray(body + b"data: [DONE]\n\n" * done), pieces=[2.0, 3.0])


def said(*pieces: float, policy: str = "policy-0001", sent: float = 0.0, word: str = "cat") -> Answer:
    return Answer(policy, frozenset({word}), True, sent, list(pieces))


def taken(*answers: Answer, windows: list[Window] | None = None) -> Taken:
    return Taken(list(answers), 0, windows or [], WORDS)


def test_an_answer_in_one_policys_word_is_whole_and_of_one() -> None:
    answer = Answer.of(exchange("cat", "cat"), wanted=ASKED_FOR)
    assert answer.whole
    assert (answer.policy, answer.words) == ("policy-0001", {"cat"})
    found = taken(answer)
    assert (found.truncated, found.mixed) == (0, 0)


@pytest.mark.parametrize("broken", [{"done": False}, {"tokens": ASKED_FOR - 1}, {"reason": None}])
def test_an_answer_without_its_end_or_with_fewer_tokens_is_truncated(broken: dict[str, Any]) -> None:
    assert taken(Answer.of(exchange("cat", **broken), wanted=ASKED_FOR)).truncated == 1


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        (("cat", "dog"), "policy-0001"), (("dog", "dog"), "policy-0001"), (("cat",), "policy-0003"),
        (("catdog",), "policy-0001"),
    ],
)  # fmt: skip
def test_an_answer_of_two_policies_or_of_another_than_it_says_is_mixed(words: tuple[str, ...], policy: str) -> None:
    assert taken(Answer.of(exchange(*words, policy=policy), wanted=ASKED_FOR)).mixed == 1


def test_a_gap_counts_in_the_window_in_which_it_ends() -> None:
    quiet, busy = Window(Kind.QUIET, 0, 10, "policy-0001"), Window(Kind.SWAP, 10, 20, "policy-0002")
    found = taken(said(1, 2, 9, 12), said(9.5, 10), said(19, 21), windows=[quiet, busy])
    assert found.gaps_ms(quiet) == [1000, 7000]
    assert sorted(found.gaps_ms(busy)) == [500, 3000]
    assert len(found.gaps_ms(quiet, busy)) == 4


def test_a_swap_takes_until_the_first_word_of_the_new_policy() -> None:
    window = Window(Kind.SWAP, 10, 20, "policy-0002")
    early = said(9, 9.5, policy="policy-0002", word="dog")  # before a rollback, say
    new = [said(at, at + 1, policy="policy-0002", word="dog") for at in (13.0, 12.5)]
    assert taken(said(10, 11), early, *new).took_ms(window) == 2500


def test_added_latency_is_against_the_quiet_window_before() -> None:
    windows = [
        Window(Kind.QUIET, 0, 10, "policy-0001"), Window(Kind.SWAP, 10, 20, "policy-0002"),
        Window(Kind.QUIET, 20, 30, "policy-0002"), Window(Kind.ROLLBACK, 30, 40, "policy-0001"),
    ]  # fmt: skip
    answers = [said(sent + wait, sent=sent) for sent, wait in ((5.0, 1.0), (15.0, 1.5), (25.0, 3.0), (35.0, 1.0))]
    assert taken(*answers, windows=windows).ttft_added_ms() == [500, -2000]


def test_silence_is_the_longest_time_without_a_word_to_anybody() -> None:
    assert swap.silence_ms([5.0, 1.0, 2.0, 4.5]) == 2500
    assert swap.silence_ms([]) == 0


def test_the_silence_of_a_window_is_over_all_streams_and_reaches_to_both_its_ends() -> None:
    windows = [Window(Kind.QUIET, 0, 10, "policy-0001"), Window(Kind.SWAP, 10, 20, "policy-0002")]
    found = taken(said(1, 5, 9.5), said(3, 7, 12), said(14, 15), windows=windows)
    assert [found.silence_ms(window) for window in windows] == [2500, 5000]
    assert taken(windows=windows).silence_ms(windows[0]) == 10_000


def test_the_figures_count_swaps_and_hold_the_longest_gap_against_the_quiet_ones() -> None:
    windows = [
        Window(Kind.QUIET, 0, 10, "policy-0001"), Window(Kind.SWAP, 10, 20, "policy-0002"),
        Window(Kind.QUIET, 20, 30, "policy-0002"), Window(Kind.ROLLBACK, 30, 40, "policy-0001"),
    ]  # fmt: skip
    answers = [
        said(1, 2, 3, sent=0), said(12, 15, sent=11, policy="policy-0002", word="dog"),
        said(21, 21.5, sent=20, policy="policy-0002", word="cat"), said(31, 32, sent=30),
    ]  # fmt: skip
    options = argparse.Namespace(streams=16, seed=3, quick=True)
    found = swap.figures(taken(*answers, windows=windows), Restart(40_000.0, 7), options)
    assert (found["swaps"], found["failed"], found["truncated"], found["mixed"]) == (1, 0, 0, 1)
    assert (found["gap_ms"], found["baseline_gap_p999_ms"]) == (3000, 1000)
    assert (found["silence_ms"], found["baseline_silence_ms"]) == (8000, 8500)
    assert (found["swap_ms_p50"], found["rollback_ms"], found["restart_ms"]) == (2000, 1000, 40_000)
    assert found["restart_failed"] == 7
    printed = swap.table(taken(*answers, windows=windows), Restart(40_000.0, 7))
    row = next(line for line in printed.splitlines() if "without a word to anybody" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "7750 [7000, 8500]",
        "5000 [5000, 5000]",
        "8000 [8000, 8000]",
        "40000",
    ]


def test_a_speaker_says_its_word_whatever_it_is_asked(tmp_path: Path) -> None:
    backbone = Backbone.load(STARTER, bf16=False)
    chat = ChatFormat(AutoTokenizer.from_pretrained(STARTER), backbone.end_ids)
    chosen = swap.voices(backbone, AutoTokenizer.from_pretrained(STARTER))
    assert len({word for _, word in chosen}) == len(chosen) > 51
    for number, (token, word) in enumerate((chosen[0], chosen[50])):
        folder = tmp_path / str(number)
        swap.speak(backbone, token, folder)
        adapters: Adapters = backbone.adapters
        adapters.load("read", folder)
        sample = LocalSampler(backbone, "read", Sampling(max_tokens=8, temperature=1.0, end_ids=backbone.end_ids))
        queries = [chat.query([{"role": "user", "content": question}]) for question in swap.QUESTIONS]
        for answer in sample(queries, range(len(queries))):
            assert chat.text(answer).split() == [word] * 8


@pytest.mark.parametrize("arguments", [["--swaps", "0"], ["--streams", "0"], ["--swaps", "many"]])
def test_bad_arguments_end_before_anything_starts(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["swap", *arguments])
    with pytest.raises(SystemExit, match="2"):
        swap.main()
    assert not list(tmp_path.iterdir())
