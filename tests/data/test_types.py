import dataclasses
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import types
from data.types import Role, timestamp

MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2999, 1, 1), timezones=st.just(UTC))


@given(MOMENTS, MOMENTS)
def test_timestamps_sort_as_text_and_read_back(one: datetime, other: datetime) -> None:
    assert abs(datetime.fromisoformat(timestamp(one)) - one) < timedelta(milliseconds=1)
    if abs(one - other) >= timedelta(milliseconds=1):
        assert (timestamp(one) < timestamp(other)) == (one < other)


def test_a_timestamp_is_utc_whatever_zone_it_came_from() -> None:
    moment = datetime(2026, 11, 22, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert timestamp(moment) == "2026-11-21T23:30:00.000Z"
    assert timestamp(moment, plus_s=0.25) == "2026-11-21T23:30:00.250Z"


def test_each_role_may_do_what_the_ones_before_it_may() -> None:
    covers = [[held.covers(needed) for needed in Role] for held in Role]
    assert covers == [[True, False, False], [True, True, False], [True, True, True]]


def test_the_words_everyone_uses_cannot_be_changed() -> None:
    key = types.Key("key_1", Role.USER, types.Feedback.OFF, "", timestamp())
    with pytest.raises(dataclasses.FrozenInstanceError):
        key.role = Role.OPERATOR  # type: ignore[misc]
