import time

from hypothesis import given
from hypothesis import strategies as st

from data.ids import new_id


def test_an_id_says_what_it_names_and_has_26_characters_of_crockford() -> None:
    prefix, _, rest = new_id("cmp").partition("_")
    assert prefix == "cmp"
    assert len(rest) == 26
    assert set(rest) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")


@given(st.lists(st.integers(0, 2**47), min_size=2, max_size=2, unique=True))
def test_ids_sort_by_the_millisecond_they_were_made_in(moments: list[int]) -> None:
    ids = {}
    real = time.time_ns
    try:
        for ms in moments:
            time.time_ns = lambda ms=ms: ms * 1_000_000  # type: ignore[misc]
            ids[ms] = new_id("x")
    finally:
        time.time_ns = real
    assert (ids[moments[0]] < ids[moments[1]]) == (moments[0] < moments[1])


def test_ids_of_one_moment_differ() -> None:
    assert len({new_id("x") for _ in range(5000)}) == 5000
