"""`make screenshots`: each page in light and dark, from a service with the fake engine and a made-up conversation."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.async_api import Page, expect

from data.types import Role
from tests.browser.conftest import PHONE, OpenPage
from tests.conftest import AddPair, FakeEngine, House, MakeKey, say

DOCS = Path(__file__).parents[2] / "docs"
TALKS = ["A weekend in Porto", "Why is the sky blue?", "Explain list comprehensions", "A birthday poem for my sister"]
QUESTION = "Give me a tip for better sleep."
ANSWERS = [
    "Go to bed at the **same time** every evening, also at weekends. Your body likes a rhythm more than it likes long"
    " mornings.\n\nIf you lie awake, get up, read something dull in a dim light, and try again when you are tired.",
    "Here are three things that help:\n\n1. No screens in the last hour.\n2. A cool, dark room, about 18 °C.\n3. Coffee"
    " only before noon.\n\nStart with one of them and keep it up for a week.",
]
LESSON = """A list comprehension builds a list from another, in one line:

```python
squares = [n * n for n in range(10) if n % 2 == 0]
```

Read it from the middle: *for each* `n`, *if* it is even, take `n * n`. It is

- shorter than a loop with `append`,
- quicker to read, as long as it fits on one line.
"""


def answer(body: dict[str, Any]) -> Any:
    if "comprehension" in body["messages"][-1]["content"]:
        return say(LESSON)
    return say(ANSWERS[body.get("seed", 0) % 2])


async def shoot(page: Page, name: str) -> None:
    DOCS.mkdir(exist_ok=True)
    await page.wait_for_load_state("networkidle")
    picture = Image.open(BytesIO(await page.screenshot(animations="disabled"))).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(DOCS / f"{name}.png", optimize=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_screenshots(
    house: House, engine: FakeEngine, open_page: OpenPage, add_pair: AddPair, make_key: MakeKey, scheme: str
) -> None:
    engine.answer = answer
    key = house.keys[Role.RATER].id
    house.settings.comparisons.rate = 0.0
    await house.state.write(lambda db: db.execute("UPDATE keys SET label = 'somebody' WHERE id = ?", (key,)))

    door = await open_page(house, role=None, color_scheme=scheme)
    await shoot(door, f"sign-in-{scheme}")

    page = await open_page(house, role=Role.RATER, color_scheme=scheme)
    await expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    await shoot(page, f"chat-empty-{scheme}")
    for title in TALKS:
        await page.evaluate(_KEEP, title)
    await page.reload()
    message = page.get_by_label("Message", exact=True)
    await message.fill("How do list comprehensions work in Python? I keep writing loops.")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Ask for another answer")).to_be_visible()
    await shoot(page, f"chat-{scheme}")

    await house.state.write(lambda db: db.execute("UPDATE keys SET feedback = 'always' WHERE id = ?", (key,)))
    for name, viewport in (("pair", None), ("pair-phone", PHONE)):
        more = {"viewport": viewport} if viewport else {}
        page = await open_page(house, role=Role.RATER, color_scheme=scheme, **more)
        for _ in range(20):  # until the two differ
            await page.get_by_label("Message", exact=True).fill(QUESTION)
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
            await page.wait_for_load_state("networkidle")
            if await page.get_by_role("button", name="Skip").count():
                break
            await page.get_by_role("button", name="New conversation").click()
        await shoot(page, f"{name}-{scheme}")
        if name == "pair":
            await page.keyboard.press("ArrowRight")
            await expect(page.get_by_text("Both were written by")).to_be_visible()
            await shoot(page, f"verdict-{scheme}")

    for _ in range(3):
        add_pair(make_key()[0].id, answers=tuple(ANSWERS), messages=[{"role": "user", "content": QUESTION}])
    desk = await open_page(house, "/rate", role=Role.RATER, color_scheme=scheme)
    await expect(desk.get_by_role("button", name="First is better")).to_be_enabled()
    await desk.keyboard.press("ArrowRight")
    await expect(desk.get_by_text("2 rated today")).to_be_visible()
    await expect(desk.get_by_role("button", name="First is better")).to_be_enabled()
    await shoot(desk, f"rate-{scheme}")


_KEEP = """async (title) => {
    const { csrf } = await (await fetch("/v1/session")).json();
    const headers = { "Content-Type": "application/json", "X-CSRF-Token": csrf };
    await fetch("/v1/conversations", { method: "POST", headers, body: JSON.stringify({ title, messages: [] }) });
}"""
