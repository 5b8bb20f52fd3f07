"""Trusted pairs: read whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from data import trusted
from data.database import connect, transaction

GOOD = {
    "prompt": [{"role": "user", "content": "Is the sun a star?"}],
    "chosen": [{"role": "assistant", "content": "Yes."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    db = connect(tmp_path / "nightshift.db")
    yield db
    db.close()


def take(db: Database, *records: object) -> tuple[int, int, int]:
    with transaction(db):
        return trusted.import_lines(db, [json.dumps(record) for record in records], actor="cli")


def test_both_of_trls_forms_are_read_and_nothing_twice(db: Database) -> None:
    plain = {"prompt": "Is the sun a star?", "chosen": "Yes.", "rejected": "No."}
    assert take(db, GOOD, GOOD | {"rejected": "A planet."}) == (2, 0, 0)
    assert take(db, plain) == (0, 1, 0)
    first = trusted.list_pairs(db)[0]
    assert (first.messages, first.chosen, first.rejected) == (GOOD["prompt"], "Yes.", "No.")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("not an object", "Line 2 is not an object"),
        ({"prompt": "?", "chosen": "a"}, "with prompt, chosen and rejected"),
        (GOOD | {"prompt": []}, "prompt is neither"),
        (GOOD | {"prompt": GOOD["prompt"] + GOOD["chosen"]}, "end before an assistant's turn"),
        (GOOD | {"chosen": GOOD["prompt"]}, "chosen is neither"),
        (GOOD | {"rejected": ""}, "rejected is neither"),
        (GOOD | {"rejected": "Yes."}, "are the same"),
        (GOOD | {"prompt": [{"role": "usre", "content": "?"}]}, "prompt is neither"),
        (GOOD | {"rejected": "\ud800"}, "Line 2 is not JSON"),
    ],
)
def test_one_bad_line_and_nothing_is_taken(db: Database, bad: object, says: str) -> None:
    with pytest.raises(trusted.BadPair, match=says):
        take(db, GOOD, bad)
    assert trusted.list_pairs(db) == []


def test_votes_of_our_export_that_are_for_neither_answer_are_left_out(db: Database) -> None:
    votes = [GOOD | {"prompt": f"{choice}?", "choice": choice} for choice in ("a", "tie", "both_bad", "b")]
    assert take(db, *votes) == (2, 0, 2)
    assert [pair.messages[0]["content"] for pair in trusted.list_pairs(db)] == ["a?", "b?"]
