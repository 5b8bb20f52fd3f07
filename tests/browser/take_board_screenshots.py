"""`make screenshots`: the operator's board in light and dark, over a made-up month."""

import pytest
from playwright.async_api import expect
from sqlite_utils import Database

from data.types import Role
from tests.browser.board_record import fill
from tests.browser.conftest import PHONE, OpenPage
from tests.browser.take_screenshots import shoot
from tests.conftest import AddPolicy, FakeEngine, House, MakeKey, OpenHouse

TALL = {"width": 1280, "height": 1500}


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_screenshots_of_the_board(
    open_house: OpenHouse,
    engine: FakeEngine,
    open_page: OpenPage,
    db: Database,
    add_policy: AddPolicy,
    make_key: MakeKey,
    scheme: str,
) -> None:
    house: House = await open_house(engine)
    people = [make_key(Role.RATER)[0].id for _ in range(2)]
    fill(db, add_policy, operator=house.keys[Role.OPERATOR].id, people=people)
    page = await open_page(house, "/board", role=Role.OPERATOR, color_scheme=scheme, viewport=TALL)
    await expect(page.get_by_text("Yes: policy-0003 serves")).to_be_visible()
    await expect(page.get_by_role("img", name="Reward, 24 steps")).to_be_visible()
    await shoot(page, f"board-{scheme}")
    await page.get_by_role("heading", name="Policies").scroll_into_view_if_needed()
    await page.get_by_role("button", name="Read 20 random pairs").click()
    await expect(page.get_by_role("article").first).to_be_visible()
    await expect(page.locator(".prose > .plain")).to_have_count(0)
    await page.evaluate(
        "scrollTo(0, document.getElementById('policies-title').getBoundingClientRect().top + scrollY - 90)"
    )
    await shoot(page, f"board-policies-{scheme}")
    phone = await open_page(house, "/board", role=Role.OPERATOR, color_scheme=scheme, viewport=PHONE)
    await expect(phone.get_by_role("img", name="Reward, 24 steps")).to_be_visible()
    await shoot(phone, f"board-phone-{scheme}")
