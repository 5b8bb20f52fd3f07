from collections import Counter
from typing import Any

import pytest

from data.trusted import TrustedPair
from trainer import preferences
from trainer.encoding import ChatFormat
from trainer.preferences import Preferences, Split, prepare, split_of, voter_weights
from trainer.reward_model import Pair


def record(number: int, *, choice: str = "a", voter: str = "key_1", talk: str = "") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad answer"}],
        "choice": choice, "voter": voter, "user": "key_1", "conversation": talk or f"talk {number}",
        "vote": f"vote_{number}", "kind": "same_policy",
        "chosen_finish_reason": "stop", "rejected_finish_reason": "stop",
    }  # fmt: skip


def prepared(chat: ChatFormat, records: list[dict[str, Any]], **changes: Any) -> Preferences:
    settings = {
        "rater_share": 1.0, "uncapped_votes": 0, "trusted_weight": 1.0, "max_prompt_tokens": 50,
        "max_answer_tokens": 50,
    } | {k: v for k, v in changes.items() if k != "trusted"}  # fmt: skip
    return prepare(records, changes.get("trusted", []), chat, **settings)


def test_a_conversation_is_on_one_side_only_and_stays_there() -> None:
    sides = [split_of("key_1", f"talk {i}") for i in range(5000)]
    assert sides == [split_of("key_1", f"talk {i}") for i in range(5000)]
    shares = {split: count / 5000 for split, count in Counter(sides).items()}
    assert shares == pytest.approx({Split.TRAIN: 0.7, Split.JUDGE: 0.2, Split.HELD_OUT: 0.1}, abs=0.02)
    assert any(split_of("key_1", f"talk {i}") != split_of("key_2", f"talk {i}") for i in range(20))


def test_every_vote_that_ranks_is_used_once(chat: ChatFormat) -> None:
    choices = ["a", "b", "tie", "both_bad"] * 25
    preferences = prepared(chat, [record(i, choice=choice) for i, choice in enumerate(choices)])
    assert sorted(v.vote for v in preferences.votes) == sorted(f"vote_{i}" for i in range(100) if i % 4 != 3)
    pairs = [pair for pairs in preferences.pairs.values() for pair in pairs]
    assert len(pairs) == 75
    assert sum(pair.tie for pair in pairs) == 25
    assert all(chat.text(p.chosen) == "good" and chat.text(p.rejected) == "bad answer" for p in pairs)
    assert {v.split for v in preferences.votes} == set(Split)


def test_turns_of_one_conversation_are_never_on_two_sides(chat: ChatFormat) -> None:
    preferences = prepared(chat, [record(i, talk=f"talk {i % 20}") for i in range(200)])
    sides: dict[int, set[Split]] = {}
    for vote in preferences.votes:
        sides.setdefault(int(vote.vote.removeprefix("vote_")) % 20, set()).add(vote.split)
    assert all(len(found) == 1 for found in sides.values())


def test_pairs_that_were_picked_for_being_disputed_are_known_as_such(chat: ChatFormat) -> None:
    kinds = ["same_policy", "trial", "active"] * 20
    preferences = prepared(chat, [record(i) | {"kind": kind} for i, kind in enumerate(kinds)])
    by_vote = zip(preferences.votes, [pair for pairs in preferences.pairs.values() for pair in pairs], strict=True)
    assert all(pair.active == (int(vote.vote.removeprefix("vote_")) % 3 == 2) for vote, pair in by_vote)


def test_prompts_are_listed_once(chat: ChatFormat) -> None:
    same = [record(1) | {"vote": f"vote_{i}"} for i in range(9)]
    assert sum(len(queries) for queries in prepared(chat, same).queries.values()) == 1


def test_held_out_prompts_are_known_by_their_conversations(chat: ChatFormat) -> None:
    records = [record(i, talk=f"talk {i % 50}") for i in range(100)]
    preferences = prepared(chat, [record(n, talk="elsewhere") for n in range(50)] + records)
    owners = {chat.query(row["prompt"]): ("key_1", row["conversation"]) for row in records}
    assert split_of("key_1", "elsewhere") is Split.TRAIN
    assert preferences.conversations == {q: o for q, o in owners.items() if split_of(*o) is Split.HELD_OUT}
    assert len(preferences.conversations) > 2


def test_held_out_prompts_are_those_that_nobody_trained_on(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "FEWEST_HELD_OUT", 1)
    records = [record(i % 60, talk=f"talk {i}") for i in range(150)]
    queries = prepared(chat, records).queries
    assert queries[Split.HELD_OUT]
    assert not set(queries[Split.HELD_OUT]) & set(queries[Split.TRAIN])
    held_out = next(i for i in range(99) if split_of("key_1", f"talk {i}") is Split.HELD_OUT)
    known = TrustedPair("pair_1", record(held_out)["prompt"], "yes", "no")
    other = next(i for i in range(held_out + 1, 99) if split_of("key_1", f"talk {i}") is Split.HELD_OUT)
    queries = prepared(chat, [record(held_out), record(other)], trusted=[known]).queries
    assert queries[Split.HELD_OUT] == [chat.query(record(other)["prompt"])]


@pytest.mark.parametrize(("others", "are_enough"), [(9, False), (10, True)])
def test_where_hardly_anybody_asks_something_else_what_all_ask_is_held_out_too(
    chat: ChatFormat, others: int, are_enough: bool
) -> None:
    held_out = [f"talk {i}" for i in range(300) if split_of("key_1", f"talk {i}") is Split.HELD_OUT]
    trains = next(f"talk {i}" for i in range(99) if split_of("key_1", f"talk {i}") is Split.TRAIN)
    records = [record(i, talk=talk) for i, talk in enumerate(held_out[: others + 1])] + [record(0, talk=trains)]
    asked = prepared(chat, records).queries[Split.HELD_OUT]
    assert len(asked) == (others if are_enough else others + 1)
    turns = [row | {"prompt": record(1000 + i)["prompt"]} for i, row in enumerate(records[1:-1])]
    asked = prepared(chat, records + turns).queries[Split.HELD_OUT]
    assert len(asked) == 2 * others + (not are_enough), "what counts is how many conversations they are of"


def test_where_everybody_asks_the_same_it_is_held_out_all_the_same(chat: ChatFormat) -> None:
    same = [record(1, talk=f"talk {i}") for i in range(50)]
    assert len(prepared(chat, same).queries[Split.HELD_OUT]) == 1


def test_a_vote_that_the_template_cannot_read_is_left_out(chat: ChatFormat) -> None:
    chat.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        + "{{ messages[0]['content'] }}"
    )
    refused = record(1) | {"prompt": [{"role": "system", "content": "hello"}]}
    trusted = TrustedPair("pair_1", refused["prompt"], "4", "5")
    preferences = prepared(chat, [refused, record(2)], trusted=[trusted])
    assert [vote.vote for vote in preferences.votes] == ["vote_2"]
    assert sum(map(len, preferences.pairs.values())) == 1


def test_what_is_too_long_is_left_out(chat: ChatFormat) -> None:
    long = record(1) | {"chosen": [{"role": "assistant", "content": "good " * 100}]}
    assert prepared(chat, [long, record(2)]).votes[0].vote == "vote_2"
    assert prepared(chat, [record(2)], max_prompt_tokens=2).votes == []


def test_trusted_pairs_train_with_their_own_weight(chat: ChatFormat) -> None:
    trusted = TrustedPair("pair_1", [{"role": "user", "content": "2 + 2?"}], "4", "5")
    preferences = prepared(chat, [record(i) for i in range(20)], trusted=[trusted], trusted_weight=3.0)
    last = preferences.pairs[Split.TRAIN][-1]
    assert (chat.text(last.chosen), chat.text(last.rejected), last.weight) == ("4", "5", 3.0)
    assert all(pair.weight == 1 for split in (Split.JUDGE, Split.HELD_OUT) for pair in preferences.pairs[split])


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ({"a": 900, "b": 50, "c": 50}, 0.5),
        ({"a": 100, "b": 100, "c": 100, "d": 1000}, 0.4),
        (dict.fromkeys("abcdefghijkl", 10), 0.1),
    ],
)
def test_nobody_weighs_more_than_their_share(votes: dict[str, int], share: float) -> None:
    weights = voter_weights(votes, share=share, uncapped=0)
    totals = {voter: weights[voter] * count for voter, count in votes.items()}
    assert max(totals.values()) <= share * sum(totals.values()) * (1 + 1e-9)
    assert max(weights.values()) == 1


def test_a_small_crowd_is_not_silenced_by_the_cap() -> None:
    assert voter_weights({"a": 150, "b": 3}, share=0.1, uncapped=200) == {"a": 1.0, "b": 1.0}
    assert voter_weights({"a": 400}, share=0.1, uncapped=200) == {"a": 1.0}, "there is nobody to be outvoted"


@pytest.mark.parametrize("votes", [{"app": 5000, "one": 200}, {"app": 2000, "site": 2000, "one": 200}])
def test_of_few_people_one_who_voted_little_does_not_get_as_much_as_the_others(votes: dict[str, int]) -> None:
    weights = voter_weights(votes, share=0.1, uncapped=200)
    totals = {voter: weights[voter] * count for voter, count in votes.items()}
    assert totals["one"] <= 0.25 * sum(totals.values())
    assert totals["app"] <= 0.75 * sum(totals.values())


@pytest.mark.parametrize(
    "votes",
    [
        {"app": 5000, "me": 1},
        {"app": 5000, "site": 5000, "me": 1, "you": 1},
        {"a": 3000, "b": 3000} | dict.fromkeys("cdefgh", 5),
    ],
)
def test_who_hardly_votes_is_no_voter_to_be_outvoted(votes: dict[str, int]) -> None:
    """The others' weight would come down to the uncapped votes, and most that is learned to the trusted pairs."""
    assert set(voter_weights(votes, share=0.1, uncapped=200).values()) == {1.0}


def test_many_who_vote_a_little_are_a_crowd() -> None:
    people = {f"person {n}": 20 for n in range(40)}
    weights = voter_weights({"loud": 5000} | people, share=0.1, uncapped=200)
    assert weights["loud"] * 5000 <= 200


def test_no_votes_need_no_weights() -> None:
    assert voter_weights({}, share=0.1, uncapped=200) == {}


def test_votes_weigh_as_much_as_they_can_be_relied_on() -> None:
    weights = voter_weights({"a": 10, "b": 10, "new": 5}, share=1.0, uncapped=0, reliability={"a": 0.6, "b": 0.3})
    assert weights == pytest.approx({"a": 1.6, "b": 0.4, "new": 1.0})
    capped = voter_weights(
        {"a": 60, "b": 20, "c": 20}, share=0.5, uncapped=0, reliability={"a": 0.8, "b": 0.8, "c": 0.1}
    )
    assert capped["a"] * 60 == pytest.approx((capped["b"] + capped["c"]) * 20)
    assert capped["b"] / capped["c"] == pytest.approx(64)
    assert voter_weights({"a": 5, "b": 5}, share=1.0, uncapped=0, reliability={"a": 0.0, "b": 1.0})["a"] == 0
    alone = voter_weights({"a": 5}, share=1.0, uncapped=0, reliability={"a": 0.0})
    assert alone == {"a": 1.0}, "there is nobody else to learn from"


@pytest.mark.parametrize("reason", ["length", "stop_sequence"])
def test_an_answer_that_was_cut_off_is_not_learned_as_one_that_ended(chat: ChatFormat, reason: str) -> None:
    def pair(**change: str) -> Pair:
        (known,) = (pair for pairs in prepared(chat, [record(1) | change]).pairs.values() for pair in pairs)
        return known

    whole, broken = pair(), pair(chosen_finish_reason=reason)
    assert (whole.chosen.finished, broken.chosen.finished, broken.rejected.finished) == (True, False, True)
    assert whole.chosen.response == (*broken.chosen.response, chat.end_id)


def test_the_side_that_was_shown_first_is_known(chat: ChatFormat) -> None:
    preferences = prepared(chat, [record(i, choice=choice) for i, choice in enumerate(["a", "b", "tie"] * 30)])
    sides = {"a": 1.0, "b": -1.0, "tie": 1.0}
    for split, pairs in preferences.pairs.items():
        votes = [vote for vote in preferences.votes if vote.split is split]
        assert [pair.shown for pair in pairs] == [sides[vote.choice] for vote in votes]
    trusted = TrustedPair("pair_1", [{"role": "user", "content": "2 + 2?"}], "4", "5")
    assert prepared(chat, [], trusted=[trusted]).pairs[Split.TRAIN][0].shown == 0
