"""The chat page, as it is seen."""

import asyncio
import json
from functools import partial

import pytest
from playwright.async_api import Locator, Page, Route, expect
from sqlite_utils import Database

from data.types import Role, timestamp
from tests.browser.conftest import PHONE, OpenPage
from tests.conftest import FakeEngine, House, Refusal, Reply, eventually, say

CUT = "This answer reached the longest length and was cut off."


async def ask(page: Page, text: str, *, by: str = "Enter") -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await (page.keyboard.press("Enter") if by == "Enter" else page.get_by_role("button", name=by, exact=True).click())


async def test_an_answer_streams_in_and_is_rendered(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    pieces = ["It is **Par", "is**:\n\n", "```\nx = 1\n```\n", "- one\n- two"]
    engine.answer = lambda body: Reply(choices=[pieces], hold_after=2)
    page = await open_page(house)
    await ask(page, "What is the capital of France?")
    answer = page.get_by_role("article", name="Answer")
    await expect(answer).to_contain_text("Paris")
    await expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    await expect(page.get_by_role("button", name="Send", exact=True)).to_be_hidden()
    engine.go_on.set()
    await expect(answer.locator("strong")).to_have_text("Paris")
    await expect(answer.locator("pre")).to_have_text("x = 1")
    await expect(answer.locator("li")).to_have_text(["one", "two"])
    await expect(answer).to_contain_text("policy-0000")
    await expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert engine.chats[0].body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize("by", ["Enter", "Send"])
@pytest.mark.parametrize("late", ["**/v1/session", "**/v1/conversations/*"])
async def test_what_is_sent_before_the_page_knows_who_asks_and_where_is_not_lost(
    house: House, engine: FakeEngine, open_page: OpenPage, by: str, late: str
) -> None:
    held: asyncio.Queue[Route] = asyncio.Queue()
    page = await open_page(house)
    await begin_talk(house, engine, page)
    answer = page.get_by_role("article", name="Answer")
    await page.route(late, lambda route: _hold(route, held))
    await page.reload(wait_until="domcontentloaded")
    route = await held.get()
    message = page.get_by_label("Message", exact=True)
    await ask(page, "Second", by=by)
    await expect(message).to_have_value("Second")
    await route.continue_()
    await expect(answer).to_have_count(2)
    await expect(message).to_have_value("")
    assert [said["content"] for said in engine.chats[1].body["messages"] if said["role"] == "user"] == [
        *("First", "Second")
    ]


@pytest.mark.parametrize("by", ["Enter", "Send"])
async def test_what_is_sent_before_a_conversation_turns_out_to_be_gone_is_not_said_in_another(
    house: House, engine: FakeEngine, open_page: OpenPage, by: str
) -> None:
    held: asyncio.Queue[Route] = asyncio.Queue()
    page = await open_page(house)
    await page.evaluate("history.replaceState(null, '', '#talk_gone')")
    await page.route("**/v1/conversations/*", lambda route: _hold(route, held))
    await page.reload(wait_until="domcontentloaded")
    route = await held.get()
    message = page.get_by_label("Message", exact=True)
    await ask(page, "Second", by=by)
    await route.continue_()
    await expect(page.get_by_text("could not be opened")).to_be_visible()
    await expect(message).to_have_value("Second")
    assert engine.chats == []


async def test_what_was_changed_after_it_was_sent_early_is_not_said(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    held: asyncio.Queue[Route] = asyncio.Queue()
    page = await open_page(house)
    await page.route("**/v1/session", lambda route: _hold(route, held))
    message = page.get_by_label("Message", exact=True)
    for before in ("", "Second"):  # nothing is sent early, and something
        await page.reload(wait_until="domcontentloaded")
        route = await held.get()
        await message.fill(before)
        await message.press("Enter")
        await message.press_sequentially(" and half a th")
        await route.continue_()
        await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
        await expect(message).to_have_value(f"{before} and half a th")
        assert engine.chats == []
    await message.press("Enter")
    await expect(page.get_by_role("article", name="Answer")).to_have_count(1)


@pytest.mark.parametrize("late", ["**/v1/conversations/*", "**/v1/markdown"])
async def test_while_a_conversation_comes_another_can_be_begun(
    house: House, engine: FakeEngine, open_page: OpenPage, late: str
) -> None:
    held: asyncio.Queue[Route] = asyncio.Queue()
    page = await open_page(house)
    await begin_talk(house, engine, page)
    await page.route(late, lambda route: _hold(route, held, "GET", "POST"))
    await page.reload()
    await held.get()
    await page.get_by_role("button", name="New conversation").click()
    await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    await ask(page, "Another")
    await eventually(lambda: len(engine.chats) == 2)
    assert [said["content"] for said in engine.chats[1].body["messages"]] == ["Another"]


async def test_while_answers_wait_for_their_look_one_can_ask_on(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    page = await open_page(house)
    await begin_talk(house, engine, page)
    await page.route("**/v1/markdown", lambda route: _hold(route, asyncio.Queue(), "POST"))
    await page.reload()
    await expect(page.get_by_role("article", name="Your message")).to_be_visible()
    await ask(page, "Second")
    await eventually(lambda: len(engine.chats) == 2)
    assert [said["content"] for said in engine.chats[1].body["messages"]][::2] == ["First", "Second"]


async def test_the_skip_link_leaves_the_conversation_open(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    page = await open_page(house)
    await begin_talk(house, engine, page)
    await page.get_by_role("link", name="Skip to the message").focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await ask(page, "Second")
    await expect(page.locator(".bubble")).to_have_text(["First", "Second"])


async def begin_talk(house: House, engine: FakeEngine, page: Page) -> None:
    """Leaves "First" and its answer open, as the service has them."""
    engine.answer = lambda body: say(f"Of {body['messages'][-1]['content']}")
    await ask(page, "First")
    await eventually(partial(_is_kept, house, "Of First"))
    await expect(link_to(page, "First")).to_have_attribute("aria-current", "page")


async def _hold(route: Route, held: asyncio.Queue[Route], *methods: str) -> None:
    await (held.put(route) if route.request.method in (methods or ("GET",)) else route.continue_())


async def test_what_was_said_goes_along_and_is_listed(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.answer = lambda body: say(f"Answer {len(body['messages'])}")
    page = await open_page(house)
    await ask(page, "First question")
    await expect(page.get_by_text("Answer 1")).to_be_visible()
    await ask(page, "Second question")
    await expect(page.get_by_text("Answer 3")).to_be_visible()
    assert [message["content"] for message in engine.chats[1].body["messages"]] == [
        *("First question", "Answer 1", "Second question")
    ]
    await page.get_by_role("button", name="New conversation").click()
    await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    await page.get_by_role("navigation", name="Earlier conversations").get_by_text("First question").click()
    await expect(page.get_by_text("Answer 3")).to_be_visible()
    await page.reload()
    await expect(page.get_by_text("Answer 3")).to_be_visible()
    await page.get_by_role("button", name="Delete the conversation “First question”").click()
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(page.get_by_text("What you talk about is listed here.")).to_be_visible()
    assert await house.rows("conversations") == []


async def test_a_conversation_deleted_while_it_is_answered_stays_deleted(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    engine.answer = lambda body: Reply(choices=[["It was a dark", " and stormy night"]], hold_after=1)
    page = await open_page(house)
    await ask(page, "Tell me a story")
    await expect(page.get_by_text("It was a dark")).to_be_visible()
    await page.get_by_role("button", name="Delete the conversation “Tell me a story”").click()
    async with page.expect_response(lambda answer: answer.request.method == "PUT"):  # what was written of it
        await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    engine.answer = lambda body: say("Hi")
    await ask(page, "Another")
    await eventually(lambda: _is_kept(house, "Hi"))
    await page.reload()
    listed = page.get_by_role("navigation", name="Earlier conversations")
    await expect(listed.get_by_role("link")).to_have_text(["Another"])


async def test_a_conversation_that_could_not_be_deleted_is_kept_on(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    """And is written anew if it is gone all the same: from another window, say."""
    page = await open_page(house)
    await page.route("**/v1/conversations/*", lambda route: _refuse(route, "DELETE"))
    await page.reload()
    await ask(page, "First")
    await eventually(lambda: _is_kept(house, "Hi there."))
    await page.get_by_role("button", name="Delete the conversation “First”").click()
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(page.get_by_text("It is still there.")).to_be_visible()
    await house.state.write(lambda db: db.execute("DELETE FROM conversations"))
    await ask(page, "Second")
    await eventually(lambda: _is_kept(house, "Second"))
    await expect(page.get_by_role("article", name="Your message")).to_have_count(2)


async def _is_kept(house: House, text: str) -> bool:
    return any(text in row["messages"] for row in await house.rows("conversations"))


async def _refuse(route: Route, *methods: str) -> None:
    await (route.abort() if route.request.method in methods else route.continue_())


@pytest.fixture
async def two_talks(house: House, engine: FakeEngine, open_page: OpenPage) -> tuple[Page, asyncio.Queue[Route]]:
    """A page with the conversations "First" and "Second", the second one open; whatever is opened next waits in the
    queue."""
    page = await open_page(house)
    opened: asyncio.Queue[Route] = asyncio.Queue()
    await page.route("**/v1/conversations/*", lambda route: _hold(route, opened))
    await page.reload()
    engine.answer = lambda body: say(f"Of {body['messages'][0]['content']}")
    for text in ("First", "Second"):
        await page.get_by_role("button", name="New conversation").click()
        await ask(page, text)
        await eventually(partial(_is_kept, house, f"Of {text}"))
        await expect(link_to(page, text)).to_have_attribute("aria-current", "page")
    return page, opened


def link_to(page: Page, title: str) -> Locator:
    return page.get_by_role("navigation", name="Earlier conversations").get_by_role("link", name=title)


async def test_what_is_asked_while_another_conversation_opens_stays_in_its_own(
    house: House, engine: FakeEngine, two_talks: tuple[Page, asyncio.Queue[Route]]
) -> None:
    page, opened = two_talks
    await link_to(page, "First").click()
    route = await opened.get()
    engine.answer = lambda body: Reply(choices=[["It was a dark", " and stormy night"]], hold_after=1)
    await ask(page, "Third")
    await expect(page.get_by_text("It was a dark")).to_be_visible()
    await route.continue_()
    await expect(page.get_by_text("Of First")).to_be_visible()
    await eventually(lambda: _is_kept(house, "It was a dark"))
    await expect(page.get_by_role("article")).to_have_count(2)
    rows = {row["title"]: json.loads(row["messages"]) for row in await house.rows("conversations")}
    assert {title: [turn["content"] for turn in turns] for title, turns in rows.items()} == {
        "First": ["First", "Of First"],
        "Second": ["Second", "Of Second", "Third", "It was a dark"],
    }


async def test_of_two_conversations_opened_at_once_the_last_one_stays(
    house: House, engine: FakeEngine, two_talks: tuple[Page, asyncio.Queue[Route]]
) -> None:
    page, opened = two_talks
    await page.get_by_role("button", name="New conversation").click()
    await link_to(page, "First").click()
    first = await opened.get()
    await link_to(page, "Second").click()
    await (await opened.get()).continue_()
    await expect(page.get_by_text("Of Second")).to_be_visible()
    engine.answer = lambda body: Reply(choices=[["Of", " Third"]], hold_after=1)
    await ask(page, "Third")
    await eventually(lambda: len(engine.chats) == 3)
    async with page.expect_response(first.request.url):
        await first.continue_()
    engine.go_on.set()
    await eventually(lambda: _is_kept(house, "Third"))
    await expect(page.get_by_text("You stopped this answer.")).to_have_count(0)
    await expect(page.get_by_text("Of Second").first).to_be_visible()
    assert [message["content"] for message in engine.chats[-1].body["messages"]] == ["Second", "Of Second", "Third"]


async def test_a_conversation_that_is_not_kept_yet_is_opened_as_it_is_here(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    """Not as the service has it: what is sent again later would take the place of what was said after that."""
    engine.answer = lambda body: say(f"Of {body['messages'][-1]['content']}")
    page = await open_page(house)
    refused: set[str] = set()
    await page.route("**/v1/conversations/*", lambda route: _refuse(route, *refused))
    await page.reload()
    for text in ("First", "Second"):
        await page.get_by_role("button", name="New conversation").click()
        await ask(page, text)
        await eventually(partial(_is_kept, house, f"Of {text}"))
    refused.add("PUT")
    await ask(page, "Third")
    await expect(page.get_by_text("Of Third")).to_be_visible()
    await expect(page.get_by_text("This conversation is not kept yet.")).to_be_visible()
    await link_to(page, "First").click()
    await expect(page.get_by_text("Of First")).to_be_visible()
    await link_to(page, "Second").click()
    await expect(page.get_by_text("Of Third")).to_be_visible()
    refused.clear()
    await ask(page, "Fourth")
    await eventually(lambda: _is_kept(house, "Of Fourth"))
    (kept,) = [json.loads(row["messages"]) for row in await house.rows("conversations") if row["title"] == "Second"]
    assert [turn["content"] for turn in kept][::2] == ["Second", "Third", "Fourth"]


async def test_of_a_long_conversation_every_answer_is_rendered(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    engine.answer = lambda body: say("word " * 25_000 + "**the end**")
    page = await open_page(house)
    for text in ("First", "Second"):
        await ask(page, text)
        await eventually(lambda text=text: _is_kept(house, text))
        await expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    await page.reload()
    await expect(page.locator("strong").get_by_text("the end")).to_have_count(2)


async def test_a_title_ends_before_an_emoji_or_after_it(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    page = await open_page(house)
    title = "x" * 79 + "\U0001f600"  # the emoji's second half is the 81st code unit
    await ask(page, f"{title} and more")
    listed = page.get_by_role("navigation", name="Earlier conversations")
    await expect(listed.get_by_role("link")).to_have_text([title])
    await expect(page.get_by_text("not kept yet")).to_have_count(0)
    await page.reload()
    await expect(page.get_by_role("article", name="Your message")).to_contain_text(f"{title} and more")


async def test_an_answer_can_be_stopped(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.answer = lambda body: Reply(choices=[["It was a dark", " and stormy night"]], hold_after=1)
    page = await open_page(house)
    await ask(page, "Tell me a story")
    await expect(page.get_by_text("It was a dark")).to_be_visible()
    await page.get_by_role("button", name="Stop", exact=True).click()
    await expect(page.get_by_text("You stopped this answer.")).to_be_visible()
    await expect(page.get_by_text("stormy")).to_have_count(0)
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await eventually(lambda: engine.chats[0].cut_off)


async def test_an_answer_that_was_cut_off_says_so(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.answer = lambda body: say("It was a dark", finish_reason="length")
    page = await open_page(house)
    await ask(page, "Tell me a story")
    await expect(page.get_by_text(CUT)).to_be_visible()
    await expect(page.locator("#status")).to_have_text("The answer was cut off at the longest length.")
    await eventually(lambda: _is_kept(house, "It was a dark"))
    await page.reload()
    await expect(page.get_by_text(CUT)).to_be_visible()


async def test_a_message_can_be_edited_and_sent_again(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.answer = lambda body: say("About " + body["messages"][-1]["content"])
    page = await open_page(house)
    await ask(page, "cats")
    await expect(page.get_by_text("About cats")).to_be_visible()
    await ask(page, "cows")
    await expect(page.get_by_text("About cows")).to_be_visible()
    await page.get_by_role("button", name="Edit this message and send it again").first.click()
    await page.get_by_label("Your message").get_by_role("textbox").fill("dogs")
    await page.get_by_role("button", name="Send", exact=True).first.click()
    await expect(page.get_by_text("About dogs")).to_be_visible()
    await expect(page.get_by_text("About cats")).to_have_count(0)
    await expect(page.get_by_text("cows")).to_have_count(0)
    assert engine.chats[-1].body["messages"] == [{"role": "user", "content": "dogs"}]


async def test_an_answer_that_ends_leaves_the_rest_of_the_page_as_it_is(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await page.get_by_role("button", name="First is better").click()
    await eventually(lambda: _is_kept(house, '"cast": {'))
    await house.state.write(lambda db: db.execute("UPDATE keys SET feedback = 'off'"))
    await page.reload()
    asked.answer = lambda body: Reply(choices=[["Now", " and then"]], hold_after=1)
    await ask(page, "And?")
    await expect(page.get_by_text("Now")).to_be_visible()
    await page.get_by_text("The other answer").click()
    await page.get_by_role("button", name="Edit this message and send it again").first.click()
    edited = page.get_by_label("Your message").get_by_role("textbox")
    await edited.fill("Hello again, and")
    asked.go_on.set()
    await expect(page.get_by_role("button", name="Ask for another answer")).to_be_visible()
    await expect(edited).to_have_value("Hello again, and")
    await expect(edited).to_be_focused()
    await expect(page.locator("details .prose")).to_be_visible()

    asked.go_on.clear()
    asked.answer = lambda body: Reply(choices=[["Never"]], hold_after=0)
    await ask(page, "And then?")
    await eventually(lambda: len(asked.chats) == 4)
    await page.get_by_role("button", name="Edit this message and send it again").first.click()
    await edited.fill("Hello again, and")
    await page.get_by_role("button", name="Stop", exact=True).click()
    await expect(page.get_by_text("You stopped before the answer began.")).to_be_visible()
    await expect(edited).to_have_value("Hello again, and")
    await expect(page.get_by_role("article", name="Answer")).to_have_count(2)


async def test_a_vote_leaves_the_rest_of_the_page_as_it_is(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await page.get_by_role("button", name="Edit this message and send it again").click()
    edited = page.get_by_label("Your message").get_by_role("textbox")
    await edited.fill("Hello again, and")
    await page.get_by_role("button", name="First is better").click()
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    await expect(edited).to_have_value("Hello again, and")
    await page.get_by_role("button", name="Change your vote").click()
    await expect(page.get_by_role("region", name="Which answer is better?")).to_be_focused()
    await page.keyboard.press("ArrowRight")
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer. Both were written by")
    await expect(edited).to_have_value("Hello again, and")
    await expect(page.get_by_role("button", name="Ask for another answer")).to_have_count(1)


async def test_an_answer_can_be_copied(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.answer = lambda body: say("It is **Paris**.")
    page = await open_page(house, permissions=["clipboard-read", "clipboard-write"])
    await ask(page, "Hello")
    await page.get_by_role("button", name="Copy this answer").click()
    await page.wait_for_function("async () => await navigator.clipboard.readText() === 'It is **Paris**.'")


async def test_a_failure_is_said_and_can_be_tried_again(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.answer = lambda body: Refusal(400, "too long for me")
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("alert").filter(has_text="too long for me")).to_be_visible()
    engine.answer = lambda body: say("Now it works")
    await page.get_by_role("button", name="Try again").click()
    await expect(page.get_by_text("Now it works")).to_be_visible()
    await expect(page.get_by_text("too long for me")).to_have_count(0)


async def test_what_is_said_after_a_failure_is_one_message_with_what_was_said_before(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    """Many models take no two messages of one side in a row."""
    engine.answer = lambda body: Refusal(400, "not now")
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("alert").filter(has_text="not now")).to_be_visible()
    engine.answer = lambda body: say("Now it works")
    await ask(page, "Anybody?")
    await expect(page.get_by_text("Now it works")).to_be_visible()
    assert engine.chats[-1].body["messages"] == [{"role": "user", "content": "Hello\n\nAnybody?"}]


# Two answers


@pytest.fixture
def asked(engine: FakeEngine) -> FakeEngine:
    """An engine whose two answers differ."""
    engine.answer = lambda body: say("Seed ", str(body.get("seed")))
    return engine


async def always(house: House) -> None:
    """Every chat of the test's user is a comparison."""
    key = house.keys[Role.USER].id
    await house.state.write(lambda db: db.execute("UPDATE keys SET feedback = 'always' WHERE id = ?", (key,)))


async def pair_of(page: Page) -> tuple[str, str]:
    first = await page.get_by_role("article", name="First answer").inner_text()
    second = await page.get_by_role("article", name="Second answer").inner_text()
    return first, second


async def test_voting_opens_when_both_answers_have_ended(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    engine.answer = lambda body: Reply(choices=[["Seed ", str(body["seed"])]], hold_after=1)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("article", name="Second answer")).to_contain_text("Seed")
    button = page.get_by_role("button", name="First is better")
    await expect(button).to_be_disabled()
    await page.keyboard.press("ArrowLeft")
    engine.go_on.set()
    await expect(button).to_be_enabled()
    await expect(page.get_by_text("Your vote trains the model")).to_be_visible()
    await expect(page.get_by_text("policy-0000")).to_have_count(0)
    assert await house.rows("votes") == []


@pytest.mark.parametrize(
    ("name", "choice"),
    [("First is better", "a"), ("Second is better", "b"), ("Equally good", "tie"), ("Both bad", "both_bad")],
)
async def test_a_vote_by_mouse(house: House, asked: FakeEngine, open_page: OpenPage, name: str, choice: str) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    button = page.get_by_role("button", name=name)
    await expect(button).to_be_enabled()
    first, second = await pair_of(page)
    await page.get_by_label("Comment").fill("because")
    await button.click()
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    chosen = second if choice == "b" else first
    await expect(page.get_by_role("article", name="Answer").locator(".prose").first).to_have_text(chosen)
    (vote,) = await house.rows("votes")
    assert (vote["choice"], vote["comment"]) == (choice, "because")
    await ask(page, "And then?")
    await expect(page.get_by_role("article", name="Second answer")).to_be_visible()
    assert asked.chats[-1].body["messages"][1]["content"] == chosen


@pytest.mark.parametrize(
    ("key", "choice"),
    [("ArrowLeft", "a"), ("ArrowRight", "b"), ("ArrowDown", "tie"), ("ArrowUp", "both_bad")],
)
async def test_a_vote_by_keyboard(house: House, asked: FakeEngine, open_page: OpenPage, key: str, choice: str) -> None:
    await always(house)
    page = await open_page(house)
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await page.keyboard.type("Hello")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    await expect(page.get_by_role("region", name="Which answer is better?")).to_be_focused()
    await page.keyboard.press(key)
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == [choice]
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()


async def test_who_scrolls_by_keyboard_does_not_vote(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    code = "```\n" + "wide " * 100 + "\n```\n\n"
    engine.answer = lambda body: say(code, "\n\n".join(f"Line {n} of {body['seed']}" for n in range(100)))
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    await page.keyboard.press("ArrowUp")
    await page.locator("pre").first.focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    await page.get_by_role("region", name="Which answer is better?").focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


async def test_who_goes_on_writing_does_not_vote(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    await expect(page.get_by_role("region", name="Which answer is better?")).to_be_focused()
    await page.keyboard.type("but tell me more")
    await expect(page.get_by_label("Message", exact=True)).to_have_value("but tell me more")
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    assert await house.rows("votes") == []


@pytest.mark.parametrize("where", ["the comment", "a message that is edited"])
async def test_two_answers_that_end_take_the_keyboard_from_nobody_who_writes(
    house: House, engine: FakeEngine, open_page: OpenPage, where: str
) -> None:
    await always(house)
    engine.answer = lambda body: Reply(choices=[["Seed ", str(body["seed"])]], hold_after=1)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("article", name="Second answer")).to_contain_text("Seed")
    if where == "the comment":
        field = page.get_by_label("Comment")
        await field.focus()
    else:
        await page.get_by_role("button", name="Edit this message and send it again").click()
        field = page.get_by_label("Your message").get_by_role("textbox")
        await field.fill("")
    await page.keyboard.type("hort")
    engine.go_on.set()
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    await expect(page.locator("#status")).to_have_text("Both answers have ended. Which is better?")
    for _ in "hort":
        await page.keyboard.press("ArrowLeft")
    await page.keyboard.type("s")
    await expect(field).to_have_value("short")
    await expect(page.get_by_label("Message", exact=True)).to_have_value("")
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    assert await house.rows("votes") == []


async def test_of_two_answers_the_one_that_was_cut_off_says_so(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    reasons = iter(["length", "stop"])
    engine.answer = lambda body: say("Seed ", str(body["seed"]), finish_reason=next(reasons))
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    for _ in range(2):
        await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
        await expect(page.locator(".card").filter(has_text=CUT)).to_have_count(1)
        await expect(page.locator(".card").filter(has_text="Seed")).to_have_count(2)
        await eventually(lambda: _has_pair(house))
        await page.reload()
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()
    cut = await page.get_by_role("article", name="First answer").get_by_text(CUT).count()
    await page.keyboard.press("ArrowLeft")
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    await expect(page.get_by_role("article", name="Answer").get_by_text(CUT)).to_have_count(1)
    await expect(page.locator("details").get_by_text(CUT)).to_have_count(1 - cut)


async def test_a_pair_can_be_skipped(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    first, _ = await pair_of(page)
    await page.keyboard.press("Escape")
    await expect(page.locator(".verdict")).to_contain_text("You skipped this one")
    await expect(page.get_by_role("article", name="Answer").locator(".prose").first).to_have_text(first)
    assert await house.rows("votes") == []


async def test_arrows_in_the_comment_do_not_vote(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await page.get_by_label("Comment").focus()
    await page.keyboard.type("shorter")
    await page.keyboard.press("ArrowLeft")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("region", name="Which answer is better?")).to_be_focused()
    assert await house.rows("votes") == []
    await page.keyboard.press("ArrowRight")
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer")
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    assert [(row["choice"], row["comment"]) for row in await house.rows("votes")] == [("b", "shorter")]


async def test_a_vote_can_be_changed(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await page.get_by_role("button", name="First is better").click()
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    await page.get_by_role("button", name="Change your vote").click()
    await page.keyboard.press("ArrowRight")
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer")
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


async def test_a_vote_that_was_not_changed_after_all_holds(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    _, second = await pair_of(page)
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    change = page.get_by_role("button", name="Change your vote")
    await change.click()
    await page.keyboard.press("Escape")
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer")
    await change.click()
    await ask(page, "And then?")
    await expect(page.get_by_role("article", name="Second answer")).to_be_visible()
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer")
    await expect(page.get_by_role("article", name="Answer").locator(".prose").first).to_have_text(second)
    assert asked.chats[-1].body["messages"][1]["content"] == second
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


async def test_a_vote_that_came_too_late_was_not_said(
    house: House, asked: FakeEngine, open_page: OpenPage, db: Database
) -> None:
    """The page shows, keeps and goes on with what is on record: the first vote, or none."""
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await page.get_by_role("button", name="First is better").click()
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    first = await page.get_by_role("article", name="Answer").locator(".prose").first.inner_text()
    await page.get_by_role("button", name="Change your vote").click()
    db.execute("UPDATE votes SET created_at = ?", (timestamp(plus_s=-3600),))
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_text("A vote could not be cast.")).to_be_visible()
    await expect(page.locator(".verdict")).to_contain_text("You preferred the first answer")
    await expect(page.get_by_text("Both were written by")).to_be_visible()
    await page.reload()
    await expect(page.locator(".verdict")).to_contain_text("You preferred the first answer")

    await ask(page, "And then?")
    await expect(page.get_by_role("button", name="Second is better")).to_be_enabled()
    assert asked.chats[-1].body["messages"][1]["content"] == first
    db.execute("UPDATE comparisons SET expires_at = ?", (timestamp(plus_s=-1),))
    await page.get_by_role("button", name="Second is better").click()
    await expect(page.get_by_text("A vote could not be cast.")).to_be_visible()
    await expect(page.locator(".verdict").last).to_contain_text("You skipped this one")
    assert [row["choice"] for row in await house.rows("votes")] == ["a"]


async def test_a_pair_waits_for_its_vote_over_a_reload(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    seen = await pair_of(page)
    await eventually(lambda: house.rows("conversations"))
    await eventually(lambda: _has_pair(house))
    await page.reload()
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    assert await pair_of(page) == seen
    await page.keyboard.press("ArrowLeft")
    await expect(page.get_by_text("Both were written by")).to_be_visible()


async def _has_pair(house: House) -> bool:
    return '"pair": {' in (await house.rows("conversations"))[0]["messages"]


async def test_a_vote_cast_offline_is_kept_and_sent_later(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await eventually(lambda: _has_pair(house))
    await page.context.set_offline(True)
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_text("Your vote is kept in this browser and will be sent again.")).to_be_visible()
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer")
    assert await house.rows("votes") == []
    await page.context.set_offline(False)
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    await expect(page.get_by_text("Your vote is kept")).to_have_count(0)
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


async def test_a_vote_that_was_kept_is_sent_when_the_page_is_opened_again(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    page = await open_page(house)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await eventually(lambda: _has_pair(house))
    await page.route("**/vote", lambda route: route.abort())
    await page.reload()  # what a page that is open already asks for may still go past the route
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await page.keyboard.press("ArrowLeft")
    await expect(page.get_by_text("Your vote is kept in this browser")).to_be_visible()
    await page.unroute("**/vote")
    await page.reload()
    await eventually(lambda: house.rows("votes"))
    await expect(page.get_by_text("Your vote is kept")).to_have_count(0)


async def test_a_vote_that_something_else_answers_is_kept_and_sent_later(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    """A hotel's network answers everything with 200 and its sign-in page."""
    await always(house)
    page = await open_page(house)
    await page.route("**/vote", lambda route: route.fulfill(body="<!doctype html><p>Room number?"))
    await page.reload()
    await vote_once(page, house)
    await expect(page.get_by_text("Your vote is kept in this browser and will be sent again.")).to_be_visible()
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer")
    await page.unroute("**/vote")
    await page.reload()
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


async def vote_once(page: Page, house: House) -> None:
    """For the second answer, by a page that knows where the conversation is kept."""
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await eventually(lambda: _has_pair(house))
    await page.keyboard.press("ArrowRight")


async def test_a_vote_that_arrived_while_its_conversation_was_not_open_is_told_when_it_is(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    page = await open_page(house)
    await page.route("**/vote", lambda route: route.abort())
    await page.reload()
    await vote_once(page, house)
    await expect(page.get_by_text("Your vote is kept in this browser")).to_be_visible()
    await eventually(lambda: _is_kept(house, '"choice": "b"'))
    await page.unroute("**/vote")
    await page.goto(house.url)
    await eventually(lambda: house.rows("votes"))
    await page.get_by_role("navigation", name="Earlier conversations").get_by_role("link", name="Hello").click()
    await expect(page.locator(".verdict")).to_contain_text("Both were written by policy-0000.")
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]
    assert await house.rows("vote_history") == []


async def test_a_late_change_of_a_vote_whose_arrival_was_not_seen_leaves_it_as_it_was(
    house: House, asked: FakeEngine, open_page: OpenPage, db: Database
) -> None:
    await always(house)
    page = await open_page(house)

    async def lose_the_answer(route: Route) -> None:
        await route.fetch()
        await route.abort()

    await page.route("**/vote", lose_the_answer)
    await page.reload()
    await vote_once(page, house)
    await expect(page.get_by_text("Your vote is kept in this browser")).to_be_visible()
    db.execute("UPDATE votes SET created_at = ?", (timestamp(plus_s=-3600),))
    await page.unroute("**/vote")
    await page.get_by_role("button", name="Change your vote").click()
    await page.keyboard.press("ArrowLeft")
    await expect(page.get_by_text("A vote could not be cast. You voted 'b'")).to_be_visible()
    await expect(page.locator(".verdict")).to_contain_text("You preferred the second answer. Both were written by")
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


async def test_a_vote_that_arrives_late_disturbs_nothing_else(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    """Neither a message that is being edited, nor a second thought about the vote itself, nor an answer that grows."""
    await always(house)
    page = await open_page(house)
    held: asyncio.Queue[Route] = asyncio.Queue()
    await page.route("**/vote", held.put)
    await page.reload()
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await page.keyboard.press("ArrowLeft")
    await expect(page.get_by_text("shown when the vote has arrived")).to_be_visible()
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await page.get_by_role("button", name="Edit this message and send it again").click()
    edited = page.get_by_label("Your message").get_by_role("textbox")
    await edited.fill("Hello again, and")
    await (await held.get()).continue_()
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    await expect(edited).to_have_value("Hello again, and")
    await expect(edited).to_be_focused()

    await page.get_by_role("button", name="Change your vote").click()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_text("shown when the vote has arrived")).to_be_visible()
    await page.get_by_role("button", name="Change your vote").click()
    await page.get_by_label("Comment").fill("on second")
    await (await held.get()).continue_()
    await eventually(lambda: _has_authors(house, "b"))
    await expect(page.get_by_label("Comment")).to_have_value("on second")
    await page.get_by_role("button", name="Skip").click()

    asked.answer = lambda body: Reply(choices=[["Seed ", str(body["seed"])]], hold_after=1)
    await ask(page, "And then?")
    await expect(page.get_by_role("article", name="Second answer")).to_contain_text("Seed")
    await (await held.get()).continue_()
    await expect(page.get_by_text("Both were written by policy-0000.")).to_be_visible()
    await expect(page.get_by_role("article", name="Second answer")).to_contain_text("Seed")
    asked.go_on.set()
    await expect(page.get_by_role("button", name="First is better")).to_be_enabled()


async def _has_authors(house: House, choice: str) -> bool:
    pair = json.loads((await house.rows("conversations"))[0]["messages"])[1]["pair"]
    return pair["choice"] == choice and pair["policies"] is not None


async def test_the_two_answers_are_side_by_side_or_stacked_on_a_phone(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    for viewport, beside in (({"width": 1280, "height": 800}, True), (PHONE, False)):
        page = await open_page(house, viewport=viewport)
        await ask(page, "Hello")
        await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
        first = await page.get_by_role("article", name="First answer").bounding_box()
        second = await page.get_by_role("article", name="Second answer").bounding_box()
        assert first is not None
        assert second is not None
        assert (first["y"] == second["y"]) is beside
        assert (first["x"] == second["x"]) is not beside
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_on_a_phone_the_conversations_are_behind_a_button(
    house: House, engine: FakeEngine, open_page: OpenPage
) -> None:
    page = await open_page(house, viewport=PHONE)
    await ask(page, "Hello")
    await expect(page.get_by_text("Hi there.")).to_be_visible()
    await expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    await page.get_by_role("button", name="Conversations", exact=True).click()
    await expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    await expect(page.get_by_role("button", name="Conversations", exact=True)).to_be_focused()


async def test_what_closes_the_conversations_on_a_phone_skips_no_pair(
    house: House, asked: FakeEngine, open_page: OpenPage
) -> None:
    await always(house)
    page = await open_page(house, viewport=PHONE)
    await ask(page, "Hello")
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await page.get_by_role("button", name="Conversations", exact=True).click()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="New conversation")).to_be_hidden()
    await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
    await page.keyboard.press("Escape")
    await expect(page.locator(".verdict")).to_contain_text("You skipped this one")


async def test_all_of_it_by_keyboard(house: House, asked: FakeEngine, open_page: OpenPage) -> None:
    """A conversation, an edit, a way back to it and its end, without a mouse."""
    page = await open_page(house)
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await page.keyboard.type("Hello")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("Seed None")).to_be_visible()
    await tab_to(page, "Edit this message and send it again")
    await page.keyboard.press("Enter")
    await page.keyboard.type(", world")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("article", name="Your message")).to_contain_text("Hello, world")
    await expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    await tab_to(page, "New conversation")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    await tab_to(page, "Delete the conversation “Hello, world”")
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("What you talk about is listed here.")).to_be_visible()
    await tab_to(page, "Sign out")
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("API key")).to_be_focused()


async def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element of that name has the focus."""
    seen = []
    for _ in range(60):
        await page.keyboard.press("Tab")
        focused = await page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
        )
        if focused == name:
            return
        seen.append(focused)
    raise AssertionError(f"{name} cannot be reached with Tab, only {seen}")
