"""Debian's chromium in front of the real app, with the fake engine behind it."""

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect
from sqlite_utils import Database

from data import sessions
from data.database import transaction
from data.types import Role
from service.auth import COOKIE
from tests.conftest import House

LIMIT_MS = 60_000.0
"""How long a page that does what it should may take on a slow machine."""
expect.set_options(timeout=LIMIT_MS)

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        assert "CI" not in os.environ, "no chromium: .ci/run installs it"
        pytest.skip("no chromium here: apt-get install chromium")
    async with async_playwright() as playwright:
        # In a container neither its sandbox nor a large /dev/shm is there.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        async with await playwright.chromium.launch(executable_path=found, args=arguments) as running:
            yield running


OpenPage = Callable[..., Awaitable[Page]]


@pytest.fixture
async def open_page(browser: Browser, db: Database) -> AsyncIterator[OpenPage]:
    """Open a page of a house, signed in by a session of the role (None: not signed in).

    Any error that the page does not catch, and whatever its Content-Security-Policy stops, fails the test."""
    wrong: list[str] = []
    async with AsyncExitStack() as stack:

        async def open_(house: House, path: str = "/", *, role: Role | None = Role.USER, **more: object) -> Page:
            context = await stack.enter_async_context(
                await browser.new_context(**({"viewport": DESKTOP} | more))  # type: ignore[arg-type]
            )
            context.set_default_timeout(LIMIT_MS)
            if role is not None:
                with transaction(db):
                    secret = sessions.create(db, house.keys[role].id, lasts_s=600.0)
                await context.add_cookies([{"name": COOKIE, "value": secret, "url": house.url}])
            page = await context.new_page()
            page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
            page.on("console", lambda said: _note_breach(said.text))
            await page.goto(house.url + path)
            return page

        def _note_breach(text: str) -> None:
            if "Content Security Policy" in text or "Trusted" in text:
                wrong.append(text)

        yield open_
        assert wrong == []
