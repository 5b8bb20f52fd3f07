"""What axe finds wrong for people who use a screen reader or a keyboard: nothing serious."""

from importlib.resources import files
from typing import Any

import pytest
from playwright.async_api import Page, expect

from data.types import Role
from tests.browser.conftest import PHONE, OpenPage
from tests.conftest import AddPair, FakeEngine, House, MakeKey, say

AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
TEXT = """# A title

Some **text** with `code`, [a link](https://example.org) and

```
long = 'code'
```

|a|b|
|-|-|
|1|2|
"""


async def findings(page: Page) -> list[tuple[str, str, list[Any]]]:
    """(rule, impact, where) of all that is serious or critical."""
    await page.wait_for_load_state("networkidle")
    await page.evaluate(AXE)
    found = await page.evaluate("axe.run()")
    assert found["passes"]
    return [
        (one["id"], one["impact"], [node["html"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_serious_is_wrong(
    house: House, engine: FakeEngine, open_page: OpenPage, add_pair: AddPair, make_key: MakeKey, scheme: str
) -> None:
    user = house.keys[Role.USER].id
    engine.answer = lambda body: say(TEXT, f"\n\nSeed {body.get('seed')}")
    looks: dict[str, Any] = {"color_scheme": scheme, "bypass_csp": True}  # axe itself is an inline script

    door = await open_page(house, role=None, **looks)
    assert await findings(door) == []
    await door.get_by_label("API key").fill("wrong")
    await door.keyboard.press("Enter")
    await expect(door.get_by_role("alert")).to_contain_text("unknown")
    assert await findings(door) == []

    page = await open_page(house, **looks)
    assert await findings(page) == []
    await page.get_by_label("Message", exact=True).fill("Hello")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Ask for another answer")).to_be_visible()
    assert await findings(page) == []
    await page.get_by_role("button", name="Edit this message and send it again").click()
    assert await findings(page) == []
    await page.get_by_role("button", name="Delete the conversation “Hello”").click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    assert await findings(page) == []

    await house.state.write(lambda db: db.execute("UPDATE keys SET feedback = 'always' WHERE id = ?", (user,)))
    for viewport in ({"width": 1280, "height": 800}, PHONE):
        page = await open_page(house, viewport=viewport, **looks)
        await page.get_by_label("Message", exact=True).fill("Which?")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("button", name="Skip")).to_be_enabled()
        assert await findings(page) == []
        await page.keyboard.press("ArrowLeft")
        await expect(page.get_by_text("Both were written by")).to_be_visible()
        await page.get_by_text("The other answer").click()
        assert await findings(page) == []
    await page.get_by_role("button", name="Conversations", exact=True).click()
    assert await findings(page) == []

    add_pair(make_key()[0].id, answers=(TEXT, "Another"), messages=[{"role": "user", "content": "Hello"}])
    desk = await open_page(house, "/rate", role=Role.RATER, **looks)
    await expect(desk.get_by_role("button", name="First is better")).to_be_enabled()
    assert await findings(desk) == []
    await desk.keyboard.press("ArrowLeft")
    await expect(desk.get_by_role("heading", name="Nothing waits for a vote")).to_be_visible()
    assert await findings(desk) == []
