"""The door."""

import re

from playwright.async_api import expect
from sqlite_utils import Database

from data import keys, sessions
from data.database import transaction
from data.types import Role
from service.auth import COOKIE
from tests.browser.conftest import OpenPage
from tests.conftest import House, eventually


async def test_an_api_key_signs_in_once_and_a_button_signs_out(house: House, open_page: OpenPage, db: Database) -> None:
    page = await open_page(house, role=None)
    await page.get_by_label("API key").fill("ns-wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("This API key is unknown or was revoked.")
    await page.get_by_label("API key").fill(house.tokens[Role.USER])
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_label("Message", exact=True)).to_be_visible()
    (cookie,) = await page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Lax")
    assert await page.evaluate("document.cookie") == ""
    stored = await page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    assert house.tokens[Role.USER] not in stored
    await page.reload()
    await expect(page.get_by_label("Message", exact=True)).to_be_visible()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("API key")).to_be_visible()
    assert await page.context.cookies() == []
    assert db.execute("SELECT count(*) FROM sessions").fetchone() == (0,)


async def test_a_link_signs_in_once_and_leaves_no_trace_in_the_address(
    house: House, open_page: OpenPage, db: Database
) -> None:
    with transaction(db):
        code = sessions.create_code(db, house.keys[Role.OPERATOR].id)
    page = await open_page(house, f"/sign-in#{code}", role=None)
    await expect(page.get_by_label("Message", exact=True)).to_be_visible()
    assert page.url == f"{house.url}/"
    other = await open_page(house, f"/sign-in#{code}", role=None)
    await expect(other.get_by_role("alert")).to_contain_text("This link was used before")
    assert code not in other.url


async def test_a_revoked_key_ends_its_session_and_the_page_says_so(
    house: House, open_page: OpenPage, db: Database
) -> None:
    page = await open_page(house)
    with transaction(db):
        keys.revoke(db, house.keys[Role.USER].id, actor="test")
    await page.get_by_label("Message", exact=True).fill("Hello")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert").filter(has_text="Your session is over.").first).to_be_visible()
    await page.get_by_role("button", name="Sign in").first.click()
    await expect(page.get_by_label("API key")).to_be_visible()


async def test_signing_in_again_leads_back_to_the_conversation_that_was_open(house: House, open_page: OpenPage) -> None:
    page = await open_page(house)
    await page.get_by_label("Message", exact=True).fill("Hello")
    await page.keyboard.press("Enter")
    await eventually(lambda: _is_kept(house, "Hi there."))
    await expect(page).to_have_url(re.compile("/#talk_"))
    await page.context.clear_cookies()
    await page.reload()
    await page.get_by_label("API key").fill(house.tokens[Role.USER])
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("article", name="Your message")).to_contain_text("Hello")
    await expect(page.get_by_role("article", name="Answer")).to_contain_text("Hi there.")


async def test_what_was_asked_when_the_session_was_over_is_in_the_composer_after_signing_in(
    house: House, open_page: OpenPage, db: Database
) -> None:
    page = await open_page(house)
    message = page.get_by_label("Message", exact=True)
    await message.fill("Hello")
    await page.keyboard.press("Enter")
    await eventually(lambda: _is_kept(house, "Hi there."))
    with transaction(db):
        db.execute("DELETE FROM sessions")
    await message.fill("A long story")
    await page.keyboard.press("Enter")
    await page.locator(".failure").get_by_role("button", name="Sign in").click()
    await page.get_by_label("API key").fill(house.tokens[Role.RATER])
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("link", name="Rate")).to_be_visible()
    await expect(message).to_have_value("")
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_label("API key").fill(house.tokens[Role.USER])
    await page.keyboard.press("Enter")
    await expect(message).to_have_value("A long story")
    await page.reload()
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    assert await page.evaluate("sessionStorage.length") == 0


async def test_a_message_that_another_session_in_this_browser_kept_from_being_sent_is_there_after_a_reload(
    house: House, open_page: OpenPage, db: Database
) -> None:
    page = await open_page(house)
    with transaction(db):
        secret = sessions.create(db, house.keys[Role.USER].id, lasts_s=600.0)
    await page.context.add_cookies([{"name": COOKIE, "value": secret, "url": house.url}])
    await page.get_by_label("Message", exact=True).fill("Hello")
    await page.keyboard.press("Enter")
    await page.get_by_role("button", name="Reload").click()
    await expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("article", name="Answer")).to_contain_text("Hi there.")


async def _is_kept(house: House, answer: str) -> bool:
    return any(answer in row["messages"] for row in await house.rows("conversations"))


async def test_after_signing_in_the_page_that_was_wanted_is_shown(house: House, open_page: OpenPage) -> None:
    page = await open_page(house, "/rate", role=None)
    await page.get_by_label("API key").fill(house.tokens[Role.RATER])
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Rating desk")).to_be_visible()
