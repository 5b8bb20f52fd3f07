"""Who is to serve, and the rows that say how that came about."""

import pytest
from sqlite_utils import Database

from data import audit, registry, swaps
from data.database import transaction
from data.types import BASE_POLICY, PolicyStatus
from tests.conftest import AddPolicy


def flip(db: Database, name: str) -> str | None:
    with transaction(db):
        return swaps.flip(db, swaps.begin(db, name))


def promote(db: Database, name: str) -> None:
    with transaction(db):
        swaps.promote(db, name, actor="key_1", reason="because")


def statuses(db: Database) -> list[str]:
    return [policy.status.value for policy in registry.list_policies(db)]


def test_the_first_start_replaces_nobody(db: Database) -> None:
    assert swaps.pending(db) == BASE_POLICY
    assert flip(db, BASE_POLICY) is None
    assert swaps.pending(db) is None
    (swap,) = swaps.list_swaps(db)
    assert (swap.policy, swap.replaced, swap.actor, swap.reason) == (BASE_POLICY, None, "start", "the first start")


def test_what_was_promoted_before_the_first_start_comes_after_it(db: Database, add_policy: AddPolicy) -> None:
    promote(db, add_policy())
    assert swaps.pending(db) == BASE_POLICY
    assert [policy.name for policy in swaps.wanted(db)] == [BASE_POLICY]
    flip(db, BASE_POLICY)
    assert swaps.pending(db) == "policy-0001"
    assert flip(db, "policy-0001") == BASE_POLICY


def test_the_old_policy_retires_and_one_that_was_left_again_is_rolled_back(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    promote(db, add_policy())
    flip(db, "policy-0001")
    assert statuses(db) == ["retired", "serving"]
    promote(db, BASE_POLICY)
    assert flip(db, BASE_POLICY) == "policy-0001"
    assert statuses(db) == ["serving", "rolled_back"]


def test_the_last_that_was_asked_for_is_pending_and_overtakes_the_others(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    one, two, three = (add_policy() for _ in range(3))
    for name in (one, three, two):
        promote(db, name)
    assert swaps.pending(db) == "policy-0002"
    assert statuses(db) == ["serving", "retired", "promoted", "retired"]
    flip(db, "policy-0002")
    assert statuses(db) == ["retired", "retired", "serving", "retired"]
    assert swaps.pending(db) is None
    assert "promoted after it" in str(registry.get(db, "policy-0003").problem)


@pytest.mark.parametrize("begun", [False, True], ids=["not looked at yet", "waits for an engine"])
def test_what_an_operator_asked_for_comes_before_what_the_trainer_promoted_and_does_not_undo_it(
    db: Database, add_policy: AddPolicy, begun: bool
) -> None:
    flip(db, BASE_POLICY)
    promote(db, add_policy())
    flip(db, "policy-0001")
    trained = add_policy(PolicyStatus.PROMOTED)
    if begun:
        with transaction(db):
            swaps.begin(db, trained)
    promote(db, BASE_POLICY)
    assert swaps.pending(db) == BASE_POLICY
    flip(db, BASE_POLICY)
    assert swaps.pending(db) == "policy-0002"


def test_what_an_operator_asks_for_while_the_trainer_s_swap_waits_is_asked_for(
    db: Database, add_policy: AddPolicy
) -> None:
    flip(db, BASE_POLICY)
    first = add_policy(PolicyStatus.PROMOTED)
    with transaction(db):
        swaps.begin(db, first)
    promote(db, first)
    promote(db, first)
    assert [swap.actor for swap in swaps.list_swaps(db) if swap.policy == first] == ["key_1", "start"]
    add_policy(PolicyStatus.PROMOTED)
    assert swaps.pending(db) == first


def test_a_swap_that_was_overtaken_is_not_made(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    older, newer = add_policy(), add_policy()
    promote(db, older)
    swap = swaps.list_swaps(db)[0]
    promote(db, newer)
    with pytest.raises(swaps.Superseded), transaction(db):
        swaps.flip(db, swap)
    assert registry.get(db, older).status is PolicyStatus.RETIRED


def test_a_last_word_that_is_refused_brings_nothing_back_that_it_overtook(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    one, two, three = (add_policy() for _ in range(3))
    for name in (one, two):
        promote(db, name)
        flip(db, name)
    promote(db, three)
    with transaction(db):
        swaps.roll_back(db, actor="key_1", reason="because")
        swaps.refuse(db, one, "it is broken")
    assert swaps.pending(db) is None
    assert registry.serving(db) == registry.get(db, two)


def test_an_open_swap_is_continued_and_a_new_promotion_is_a_new_swap(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    name = add_policy(PolicyStatus.PROMOTED)
    with transaction(db):
        first, again = swaps.begin(db, name), swaps.begin(db, name)
        swaps.refuse(db, name, "it is broken")
    assert first == again
    assert registry.get(db, name).status is PolicyStatus.REJECTED
    assert swaps.list_swaps(db)[0].problem == "it is broken"
    promote(db, name)
    assert len(swaps.list_swaps(db, policy=name)) == 2
    assert registry.get(db, name).problem is None


def test_what_serves_or_was_given_up_is_not_refused(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    name = add_policy()
    promote(db, name)
    promote(db, BASE_POLICY)
    before = registry.list_policies(db)
    with transaction(db):
        for policy in before:
            swaps.refuse(db, policy.name, "it is broken")
    assert registry.list_policies(db) == before
    assert [policy.status for policy in before] == [PolicyStatus.SERVING, PolicyStatus.RETIRED]


def test_the_predecessor_is_the_one_that_the_serving_policy_first_took_over_from(
    db: Database, add_policy: AddPolicy
) -> None:
    with pytest.raises(swaps.CannotPromote, match="Nothing serves yet"):
        swaps.predecessor(db)
    flip(db, BASE_POLICY)
    with pytest.raises(swaps.CannotPromote, match="nothing to go back to"):
        swaps.predecessor(db)
    for name in (add_policy(), add_policy()):
        promote(db, name)
        flip(db, name)
    for predecessor in ("policy-0001", BASE_POLICY):
        with transaction(db):
            assert swaps.roll_back(db, actor="key_1", reason="because").policy == predecessor
        flip(db, predecessor)
    with pytest.raises(swaps.CannotPromote, match="nothing to go back to"):
        swaps.predecessor(db)


def test_what_was_trained_earlier_and_never_served_goes_on_from_what_it_replaces(
    db: Database, add_policy: AddPolicy
) -> None:
    flip(db, BASE_POLICY)
    one, two, three = (add_policy() for _ in range(3))
    for name in (one, three, two):
        promote(db, name)
        flip(db, name)
    assert statuses(db) == ["retired", "retired", "serving", "retired"], "policy-0003 was not turned away"
    for predecessor in (three, one, BASE_POLICY):
        assert swaps.predecessor(db) == predecessor
        promote(db, predecessor)
        flip(db, predecessor)
    assert statuses(db) == ["serving", "rolled_back", "rolled_back", "rolled_back"]
    promote(db, two)
    flip(db, two)
    assert swaps.predecessor(db) == BASE_POLICY
    assert statuses(db) == ["retired", "rolled_back", "serving", "rolled_back"]


def test_the_line_is_that_of_the_swaps_that_were_made_however_they_were_asked_for(
    db: Database, add_policy: AddPolicy
) -> None:
    flip(db, BASE_POLICY)
    promote(db, add_policy())
    flip(db, "policy-0001")
    trained = add_policy(PolicyStatus.PROMOTED)
    with transaction(db):
        swaps.begin(db, trained)
    promote(db, BASE_POLICY)
    flip(db, BASE_POLICY)
    flip(db, trained)
    assert swaps.line(db) == [BASE_POLICY, trained]
    assert statuses(db) == ["retired", "rolled_back", "serving"]


def test_who_goes_back_from_what_serves_no_more_does_not(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    for name in (add_policy(), add_policy()):
        promote(db, name)
        flip(db, name)
    promote(db, "policy-0001")
    with transaction(db):
        assert swaps.roll_back(db, actor="key_1", reason="because", seen="policy-0002").policy == "policy-0001"
    flip(db, "policy-0001")
    with pytest.raises(swaps.CannotPromote, match="policy-0002 does not serve any more"), transaction(db):
        swaps.roll_back(db, actor="key_1", reason="because", seen="policy-0002")
    assert swaps.pending(db) is None


def test_of_what_was_asked_for_the_last_word_counts(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    one, two = add_policy(), add_policy()
    for name in (one, two, one, one):
        promote(db, name)
    assert swaps.pending(db) == one
    flip(db, one)
    assert registry.get(db, two).status is PolicyStatus.RETIRED
    assert swaps.pending(db) is None
    assert all(swap.flipped_at or swap.problem for swap in swaps.list_swaps(db)), "none is on its way"


def test_a_clock_that_was_ahead_and_is_set_right_turns_nothing_round(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    one, two, three = (add_policy() for _ in range(3))
    promote(db, two)
    flip(db, two)
    promote(db, three)
    db.execute("UPDATE swaps SET requested_at = '9999', flipped_at = replace(flipped_at, '20', '90')")
    promote(db, one)
    assert swaps.pending(db) == one
    flip(db, one)
    latest = swaps.latest(db)
    assert latest is not None
    assert latest.policy == one
    assert swaps.predecessor(db) == two
    promote(db, two)
    flip(db, two)
    assert swaps.predecessor(db) == BASE_POLICY


def test_what_serves_can_be_told_to_stay(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    one, two = add_policy(), add_policy()
    promote(db, one)
    flip(db, one)
    before = swaps.latest(db)
    promote(db, two)
    promote(db, one)
    assert swaps.pending(db) is None
    assert swaps.latest(db) == before
    told = registry.get(db, two)
    assert (told.status, told.problem) == (PolicyStatus.RETIRED, f"{one} was to stay (because)")
    assert audit.latest(db, limit=1)[0]["subject"] == one
    with pytest.raises(swaps.CannotPromote, match="serves already"):
        promote(db, one)
    promote(db, two)
    assert swaps.pending(db) == two
    trained = add_policy(PolicyStatus.PROMOTED)
    promote(db, one)
    assert swaps.pending(db) is None, "what the trainer promoted as well"
    assert registry.get(db, trained).status is PolicyStatus.RETIRED


def test_what_serves_or_failed_the_gate_cannot_be_promoted(db: Database, add_policy: AddPolicy) -> None:
    flip(db, BASE_POLICY)
    with pytest.raises(swaps.CannotPromote, match="serves already"):
        promote(db, BASE_POLICY)
    with pytest.raises(swaps.CannotPromote, match="KL is 3 nats"):
        promote(db, add_policy(PolicyStatus.REJECTED, gate=False))
    with pytest.raises(registry.UnknownPolicy):
        promote(db, "policy-0009")
