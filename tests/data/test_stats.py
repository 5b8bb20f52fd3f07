from sqlite_utils import Database

from data import comparisons, stats
from data.database import transaction
from data.types import Choice, Role
from tests.conftest import AddPair, MakeKey


def test_an_empty_record_has_no_share(db: Database) -> None:
    figures = stats.summary(db)
    assert figures["completions"] == figures["comparisons"] == figures["votes"] == {}
    assert figures["first_share"] is None
    assert figures["serving"] is None


def test_the_share_of_the_first_is_of_the_decisive_votes(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    key_id = make_key()[0].id
    for choice in ("a", "a", "a", "b", "tie", "both_bad"):
        comparison = add_pair(key_id)
        with transaction(db):
            comparisons.vote(
                db, comparison, key_id=key_id, role=Role.USER, choice=Choice(choice), comment=None, window_s=600.0
            )
    figures = stats.summary(db)
    assert figures["completions"] == {"complete": 12}
    assert figures["comparisons"] == {"same_policy": 6}
    assert figures["votes"] == {"a": 3, "b": 1, "tie": 1, "both_bad": 1}
    assert figures["first_share"] == 0.75
