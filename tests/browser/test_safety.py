"""200 hostile texts in every field that is ever shown: no script runs, nothing is asked of another host."""

from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, expect

from data.types import Role
from tests.browser.conftest import OpenPage
from tests.browser.hostile import hostile_texts
from tests.conftest import AddPair, FakeEngine, House, MakeKey, Refusal, say

TEXTS = hostile_texts(200)
SHOWN = [text.replace("\u0000", "\ufffd") for text in TEXTS]

WATCH = "window.ran = []; window.hacked = () => window.ran.push('hacked'); window.alert = window.hacked;"
HURRY = "const later = setTimeout; window.setTimeout = (f, ms, ...more) => later(f, ms / 100, ...more);"
LOOK = """() => {
    const allowed = new Set(("P BR HR H1 H2 H3 H4 H5 H6 UL OL LI BLOCKQUOTE PRE CODE A EM STRONG S TABLE THEAD TBODY TR"
        + " TH TD DIV SPAN BUTTON").split(" "));
    const wrong = [];
    for (const element of document.querySelectorAll(".prose *, .bubble *, .talks *, .failure *, .who *")) {
        if (!allowed.has(element.tagName)) wrong.push(element.outerHTML);
        for (const { name, value } of element.attributes) {
            if (name.startsWith("on") || name === "style" || name === "src") wrong.push(element.outerHTML);
            if (name === "href" && !/^(https?:|mailto:|#talk_)/.test(value)) wrong.push(element.outerHTML);
        }
    }
    return { wrong, ran: window.ran, images: document.images.length };
}"""


class Watch:
    """What a page asks of other hosts, and what runs in it that is not ours."""

    def __init__(self, house: House) -> None:
        self.own = urlsplit(house.url).netloc
        self.elsewhere: list[str] = []

    async def start(self, page: Page) -> None:
        page.context.on("request", lambda request: self._note(request.url))
        page.on("dialog", lambda dialog: self.elsewhere.append(f"a dialog: {dialog.message}"))
        await page.context.add_init_script(WATCH)
        await page.reload()

    def _note(self, url: str) -> None:
        if urlsplit(url).netloc != self.own:
            self.elsewhere.append(url)

    async def check(self, page: Page) -> None:
        found = await page.evaluate(LOOK)
        assert found == {"wrong": [], "ran": [], "images": 1}
        assert self.elsewhere == []
        assert urlsplit(page.url).netloc == self.own


@pytest.fixture
def watch(house: House) -> Watch:
    return Watch(house)


async def test_in_a_kept_conversation_and_in_titles(house: House, open_page: OpenPage, watch: Watch) -> None:
    turns = []
    for number, text in enumerate(TEXTS):
        turns.append({"role": "user", "content": text})
        pair = {"id": f"cmp_{number}", "expires_at": "2020-01-01T00:00:00.000Z", "answers": [TEXTS[-1 - number], text]}
        pair |= {"choice": "b", "policies": {"a": "policy-0000", "b": "policy-0000"}}
        turns.append({"role": "assistant", "content": text, "pair": pair if number % 2 else None})
    made = await house.call("POST", "/v1/conversations", json={"title": TEXTS[0], "messages": turns})
    for text in TEXTS:
        answer = await house.call("POST", "/v1/conversations", json={"title": text[:200], "messages": []})
        assert answer.status == 201
    page = await open_page(house)
    await watch.start(page)
    await expect(page.locator(".talks li")).to_have_count(201)
    await page.goto(f"{house.url}/#{made.json['id']}")
    await expect(page.locator(".bubble")).to_have_count(200)
    await expect(page.locator(".prose > .plain")).to_have_count(0)
    for details in await page.locator("details summary").all():
        await details.click()
    await watch.check(page)
    assert await page.locator(".bubble").all_text_contents() == TEXTS
    delete = page.locator(".talks li").last.get_by_role("button")
    await delete.click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    await watch.check(page)


async def test_in_streamed_answers(house: House, engine: FakeEngine, open_page: OpenPage, watch: Watch) -> None:
    user = house.keys[Role.USER].id
    await house.state.write(lambda db: db.execute("UPDATE keys SET feedback = 'always' WHERE id = ?", (user,)))
    answers = iter(TEXTS)

    def answer(body: object) -> object:
        text = next(answers)
        return say(*(text[at : at + 7] for at in range(0, len(text), 7)))

    engine.answer = answer  # type: ignore[assignment]
    page = await open_page(house)
    await watch.start(page)
    for number in range(0, len(TEXTS), 2):
        await page.get_by_label("Message", exact=True).fill(TEXTS[number].replace("\x00", ""))
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        await expect(page.locator(".prose > .plain")).to_have_count(0)
        await watch.check(page)
        await page.keyboard.press("Escape")
        await page.get_by_role("button", name="New conversation").click()
        await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    assert len(engine.chats) == len(TEXTS)


async def test_at_the_rating_desk(
    house: House, open_page: OpenPage, watch: Watch, add_pair: AddPair, make_key: MakeKey
) -> None:
    owner = make_key()[0].id
    for number in range(0, len(TEXTS), 2):
        a, b = TEXTS[number], TEXTS[number + 1]
        roles = ["system", "user", "assistant", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, (a, b, a, b), strict=True)]
        add_pair(owner, answers=(a, b), messages=messages)
    desk = await open_page(house, "/rate", role=Role.RATER)
    await desk.context.add_init_script(HURRY)
    await watch.start(desk)
    for number in range(len(TEXTS) // 2):
        await expect(desk.get_by_text(f"{number} rated today")).to_be_visible()
        await expect(desk.get_by_role("button", name="Equally good")).to_be_enabled()
        await expect(desk.locator(".prose > .plain")).to_have_count(0)
        await watch.check(desk)
        await desk.keyboard.press("t")
    await expect(desk.get_by_role("heading", name="Nothing waits for a vote")).to_be_visible()


async def test_in_a_key_s_label_and_in_what_an_engine_says(
    house: House, engine: FakeEngine, open_page: OpenPage, watch: Watch
) -> None:
    user = house.keys[Role.USER].id
    page = await open_page(house)
    await watch.start(page)
    for text in TEXTS[:40]:
        refusal = Refusal(400, text)
        engine.answer = lambda body, refusal=refusal: refusal  # type: ignore[misc]
        label = (text, user)
        await house.state.write(lambda db, label=label: db.execute("UPDATE keys SET label = ? WHERE id = ?", label))
        await page.goto(f"{house.url}/")
        await page.get_by_label("Message", exact=True).fill("Hello")
        await page.keyboard.press("Enter")
        await expect(page.locator(".failure")).to_be_visible()
        await watch.check(page)
