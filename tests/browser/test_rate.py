"""The rating desk, as it is seen."""

import asyncio
import json

import pytest
from playwright.async_api import Page, Route, expect
from sqlite_utils import Database

from data import trusted
from data.database import transaction
from data.types import Role
from tests.browser.conftest import PHONE, OpenPage
from tests.conftest import AddPair, FakeEngine, House, MakeKey, OpenHouse, eventually

KEYS = {"a": "ArrowLeft", "b": "ArrowRight", "tie": "ArrowDown", "both_bad": "ArrowUp"}


@pytest.fixture
def queue(add_pair: AddPair, make_key: MakeKey) -> list[str]:
    """Four pairs that nobody has voted on, the oldest first."""
    owner = make_key()[0].id
    return [
        add_pair(
            owner,
            answers=(f"Left {n}", f"Right **{n}**"),
            messages=[{"role": "user", "content": f"Question {n}"}],
            age_s=60.0 - n,
        )
        for n in range(4)
    ]


async def open_desk(house: House, open_page: OpenPage, question: str, **more: object) -> Page:
    desk = await open_page(house, "/rate", role=Role.RATER, **more)
    await expect(desk.get_by_text(question)).to_be_visible()
    return desk


async def vote(desk: Page, key: str) -> None:
    """By a key, once the pair takes votes."""
    await expect(desk.get_by_role("button", name="First is better")).to_be_enabled()
    await desk.keyboard.press(key)


async def test_pairs_are_rated_one_after_another_with_keys_alone(
    house: House, open_page: OpenPage, queue: list[str]
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await expect(desk.get_by_text("0 rated today")).to_be_visible()
    for number, key in enumerate(KEYS.values()):
        await expect(desk.get_by_text(f"Question {number}")).to_be_visible()
        await expect(desk.get_by_role("article", name="Second answer").locator("strong")).to_have_text(str(number))
        await vote(desk, key)
    await expect(desk.get_by_role("heading", name="Nothing waits for a vote")).to_be_visible()
    await expect(desk.get_by_text("4 rated today")).to_be_visible()
    assert [(row["comparison_id"], row["choice"]) for row in await house.rows("votes")] == list(
        zip(queue, KEYS, strict=True)
    )
    await desk.reload()
    await expect(desk.get_by_text("4 rated today")).to_be_visible()


async def test_a_pair_that_has_just_come_takes_no_vote(house: House, open_page: OpenPage, queue: list[str]) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await vote(desk, "ArrowUp")
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await desk.evaluate(PRESS_AND_CLICK_AT_ONCE)
    await vote(desk, "ArrowRight")
    await expect(desk.get_by_text("Question 2")).to_be_visible()
    await expect(desk.get_by_text("Judge the last answer alone")).to_be_visible()
    await expect(desk.get_by_role("button", name="First is better")).to_be_enabled()
    await expect(desk.get_by_text("Question 2")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == ["both_bad", "b"]


PRESS_AND_CLICK_AT_ONCE = """new MutationObserver(() => {
    const vote = document.querySelector(".vote");
    vote?.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
    vote?.querySelector(".choice").click();
}).observe(document.getElementById("desk"), { childList: true })"""


async def test_a_vote_is_undone_by_choosing_again(house: House, open_page: OpenPage, queue: list[str]) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await expect(desk.get_by_role("button", name="Undo")).to_be_hidden()
    await desk.get_by_label("Comment").fill("clearer")
    await desk.get_by_role("button", name="First is better").click()
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await desk.keyboard.press("z")
    await expect(desk.get_by_text("Question 0")).to_be_visible()
    await expect(desk.get_by_text("You preferred the first answer. Choose again")).to_be_visible()
    await desk.get_by_role("button", name="Second is better").click()
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await expect(desk.get_by_text("1 rated today")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]
    assert [(row["choice"], row["comment"]) for row in await house.rows("vote_history")] == [("a", "clearer")]


async def test_a_vote_on_its_way_does_not_take_the_second_thought_away(
    house: House, open_page: OpenPage, queue: list[str]
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    let_go = asyncio.Event()

    async def hold(route: Route) -> None:
        await let_go.wait()
        await route.continue_()

    await desk.route("**/v1/comparisons/*/vote", hold)
    await vote(desk, "ArrowLeft")
    await desk.keyboard.press("z")
    await expect(desk.get_by_text("Choose again")).to_be_visible()
    let_go.set()
    await eventually(lambda: house.rows("votes"))
    await expect(desk.get_by_text("1 rated today")).to_be_visible()
    await expect(desk.get_by_text("Question 0")).to_be_visible()
    await vote(desk, "ArrowRight")
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    assert [(row["comparison_id"], row["choice"]) for row in await house.rows("votes")] == [(queue[0], "b")]


async def test_undo_is_over_with_the_window(
    open_house: OpenHouse, engine: FakeEngine, open_page: OpenPage, queue: list[str]
) -> None:
    house = await open_house(engine, comparisons={"vote_window_s": 0.0})
    desk = await open_desk(house, open_page, "Question 0")
    await vote(desk, "ArrowLeft")
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await expect(desk.get_by_role("button", name="Undo")).to_be_hidden()


async def test_a_pair_that_was_skipped_does_not_come_again(house: House, open_page: OpenPage, queue: list[str]) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await vote(desk, "Escape")
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await desk.reload()
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    for _ in range(3):
        question = await desk.locator(".bubble").inner_text()
        await vote(desk, "ArrowDown")
        await expect(desk.get_by_text(question)).to_have_count(0)
    await expect(desk.get_by_role("heading", name="Nothing waits for a vote")).to_be_visible()
    assert [row["comparison_id"] for row in await house.rows("votes")] == queue[1:]


async def test_a_vote_cast_offline_is_sent_later_and_then_the_next_pair_comes(
    house: House, open_page: OpenPage, queue: list[str]
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await desk.context.set_offline(True)
    await vote(desk, "ArrowLeft")
    await expect(desk.get_by_role("heading", name="Your vote waits")).to_be_visible()
    await desk.context.set_offline(False)
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == ["a"]


async def test_after_a_vote_that_waited_the_next_pair_comes_even_if_its_notice_was_dismissed(
    house: House, open_page: OpenPage, queue: list[str]
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await desk.context.set_offline(True)
    await vote(desk, "ArrowLeft")
    await expect(desk.get_by_role("heading", name="Your vote waits")).to_be_visible()
    await desk.get_by_role("button", name="Dismiss").click()
    await desk.context.set_offline(False)
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await expect(desk.get_by_text("1 rated today")).to_be_visible()


async def test_a_desk_that_opens_with_a_vote_to_send_sends_it_before_it_asks_for_more(
    house: House, open_page: OpenPage, queue: list[str]
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    held: asyncio.Queue[Route] = asyncio.Queue()
    await desk.route("**/vote", held.put)
    vote = {"comparison": queue[0], "choice": "a", "comment": None}
    name = f"nightshift.votes.{house.keys[Role.RATER].id}"
    await desk.evaluate("([name, votes]) => localStorage.setItem(name, votes)", [name, json.dumps([vote])])
    await desk.reload()
    route = await held.get()
    await expect(desk.get_by_role("heading", name="Your vote waits")).to_be_visible()
    await expect(desk.get_by_text("Question 0")).to_have_count(0)
    await desk.get_by_role("button", name="Send now").click()  # it is on its way
    await route.continue_()
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    assert [(row["comparison_id"], row["choice"]) for row in await house.rows("votes")] == [(queue[0], "a")]


async def test_after_a_vote_that_another_window_sent_the_next_pair_comes(
    house: House, open_page: OpenPage, queue: list[str]
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await desk.route("**/vote", lambda route: route.abort())
    await vote(desk, "ArrowLeft")
    await expect(desk.get_by_role("heading", name="Your vote waits")).to_be_visible()
    other = await desk.context.new_page()
    await other.goto(f"{house.url}/rate")
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await expect(desk.get_by_text("Your vote is kept")).to_have_count(0)
    assert [(row["comparison_id"], row["choice"]) for row in await house.rows("votes")] == [(queue[0], "a")]


async def test_a_vote_that_is_refused_is_neither_counted_nor_offered_for_undo(
    house: House, open_page: OpenPage, queue: list[str], db: Database
) -> None:
    desk = await open_desk(house, open_page, "Question 0")
    await expect(desk.get_by_text("0 rated today")).to_be_visible()
    with transaction(db):  # the rater thought for longer than the pair was held, and another has voted on it
        db.execute("UPDATE holds SET until = since")
        db.execute("UPDATE comparisons SET waits = 0 WHERE id = ?", (queue[0],))
    await vote(desk, "ArrowLeft")
    await expect(desk.get_by_text("A vote could not be cast.")).to_be_visible()
    await expect(desk.get_by_text("Question 1")).to_be_visible()
    await expect(desk.get_by_text("0 rated today")).to_be_visible()
    await expect(desk.get_by_role("button", name="Undo")).to_be_hidden()
    await vote(desk, "ArrowRight")
    await expect(desk.get_by_text("1 rated today")).to_be_visible()


async def test_the_desk_tells_a_user_who_is_no_rater_what_to_do(house: House, open_page: OpenPage) -> None:
    desk = await open_page(house, "/rate")
    await expect(desk.get_by_role("heading", name="This desk is for raters")).to_be_visible()
    await expect(desk.get_by_text("nightshift keys create --role rater")).to_be_visible()


async def test_the_desk_fits_a_phone(house: House, open_page: OpenPage, queue: list[str]) -> None:
    desk = await open_desk(house, open_page, "Question 0", viewport=PHONE)
    assert await desk.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await desk.get_by_role("button", name="Second is better").click()
    await expect(desk.get_by_text("Question 1")).to_be_visible()


async def test_gold_pairs_come_unseen_and_are_kept_apart(
    open_house: OpenHouse, engine: FakeEngine, open_page: OpenPage, queue: list[str], db: Database
) -> None:
    lines = [json.dumps({"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."})]
    with transaction(db):
        trusted.import_lines(db, lines, actor="test")
    house = await open_house(engine, comparisons={"gold_rate": 1.0})
    desk = await open_desk(house, open_page, "What is 2 + 2?")
    first = await desk.get_by_role("article", name="First answer").inner_text()
    await vote(desk, "ArrowLeft" if first == "It is 4." else "ArrowRight")
    await expect(desk.get_by_text("Question 0")).to_be_visible()
    await expect(desk.get_by_text("1 rated today")).to_be_visible()
    assert await house.rows("votes") == []
    await desk.keyboard.press("z")
    await expect(desk.get_by_text("What is 2 + 2?")).to_be_visible()
    await vote(desk, "ArrowDown")
    await expect(desk.get_by_text("Question 0")).to_be_visible()
    (rater,) = (await house.call("GET", "/v1/raters", role=Role.OPERATOR)).json["data"]
    assert (rater["key"], rater["gold"], rater["gold_right"]) == (house.keys[Role.RATER].id, 1, 0)
