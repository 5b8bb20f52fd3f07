"""What the pages weigh at their first load, and whether the chat page stays quick while a long answer streams in.

Chromium opens each page and every byte of JavaScript and CSS that it loads is counted. Then it asks for an answer of
2,000 tokens of Markdown, which a stand-in for vLLM sends at a fixed pace, and the browser's own list of long tasks
(what keeps the page from reacting for 50 ms or more) is read.

    python bench/pages.py [--quick] [--json] [--seed N]
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import web
from playwright.async_api import Browser, Page, Response, async_playwright

from bench.gateway import gateway, markdown, note
from bench.load import Target
from data import keys, sessions
from data.database import connect, transaction
from data.settings import STARTER
from data.types import Feedback, Role
from service.auth import COOKIE
from tests.conftest import FakeEngine, Reply, stream_chunks

PAGES = ("/", "/rate", "/board")
TOKENS_PER_S = 200.0
PARAGRAPHS = [
    "The sea was **calm** that morning, and a small boat went far out, past the *last* of the rocks.\n\n",
    "1. A rope that `holds`.\n2. Water for three days.\n3. Something to read, should there be no wind at all.\n\n",
    "```python\nfor wave in sea:\n    if wave.height > 2:\n        boat.turn(wave.direction)\n```\n\n",
    "> Whoever looks back sees the coast; whoever looks ahead sees the weather.\n\n",
    "| wind | sail |\n|---|---|\n| light | all of it |\n| strong | a third |\n\n",
    "## What was seen\n\nGulls, mostly, and [a light](https://example.org/light) that nobody could place.\n\n",
]
WATCH = """() => {
    window.tasks = [];
    new PerformanceObserver((list) => window.tasks.push(...list.getEntries().map((entry) => entry.duration)))
        .observe({ type: "longtask" });
}"""
BLOCK = "() => void setTimeout(() => { for (const end = performance.now() + 80; performance.now() < end; ); })"
"""As a task of the page's own: what a driver evaluates is not always counted as one."""


class PacedEngine(FakeEngine):
    """A stand-in for vLLM whose tokens come one by one."""

    async def _stream(self, request: web.Request, body: dict[str, Any], reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        first, deltas, last = stream_chunks(body["model"], reply)
        began = time.perf_counter()
        for number, chunk in enumerate([*first, *deltas, *last]):
            await asyncio.sleep(began + number / TOKENS_PER_S - time.perf_counter())
            await response.write(chunk)
        await response.write(b"data: [DONE]\n\n")
        return response


def long_answer(tokens: int, seed: int) -> list[str]:
    """Markdown of every kind in pieces of a few letters."""
    rng = random.Random(seed)
    pieces: list[str] = []
    while len(pieces) < tokens:
        text = rng.choice(PARAGRAPHS)
        pieces += [text[at : at + 4] for at in range(0, len(text), 4)]
    return pieces[:tokens]


async def signed_in(browser: Browser, url: str, database: Path) -> Page:
    """A page of a fresh operator."""
    db = connect(database)
    with transaction(db):
        key, _ = keys.create(db, role=Role.OPERATOR, feedback=Feedback.OFF, label="bench", actor="bench")
        secret = sessions.create(db, key.id, lasts_s=3600.0)
    db.close()
    context = await browser.new_context()
    await context.add_cookies([{"name": COOKIE, "value": secret, "url": url}])
    return await context.new_page()


async def weight(page: Page, url: str) -> int | None:
    """Bytes of JavaScript and CSS that opening `url` loads; None where there is no such page."""
    loaded: list[Response] = []
    page.on("response", lambda response: loaded.append(response))
    answer = await page.goto(url, wait_until="networkidle")
    assert answer is not None
    if answer.status == 404:
        return None
    files = [one for one in loaded if one.request.resource_type in ("script", "stylesheet")]
    return sum([len(await one.body()) for one in files])


async def stream(page: Page, url: str, tokens: int) -> list[float]:
    """The long tasks, milliseconds each, while an answer streams in and is rendered."""
    await page.goto(url, wait_until="networkidle")
    await page.evaluate(WATCH)
    await page.evaluate(BLOCK)
    while not await page.evaluate("window.tasks.length"):  # a long task is seen
        await page.wait_for_timeout(50)  # wait_for_function would be eval, which the page forbids
    await page.evaluate("window.tasks = []")
    await page.get_by_label("Message", exact=True).fill("Tell me of the sea.")
    await page.keyboard.press("Enter")
    again = page.get_by_role("button", name="Ask for another answer")
    await again.wait_for(timeout=1000 * (60 + 2 * tokens / TOKENS_PER_S))
    text = await page.get_by_role("article", name="Answer").inner_text()
    assert len(text) > 2 * tokens, "the page does not show the whole answer"
    tasks: list[float] = await page.evaluate("window.tasks")
    return tasks


async def bench(folder: Path, options: argparse.Namespace) -> tuple[dict[str, int], list[list[float]]]:
    """{page: bytes} and the long tasks of each repetition."""
    found = shutil.which("chromium")
    if found is None:
        raise SystemExit("This bench needs chromium: apt-get install chromium")
    tokens, repetitions = (300, 1) if options.quick else (2000, 3)
    engine = PacedEngine()
    pieces = long_answer(tokens, options.seed)
    engine.answer = lambda body: Reply(choices=[pieces])
    await engine.start()
    weights: dict[str, int] = {}
    tasks = []
    try:
        async with gateway(folder, Path(STARTER), Target(engine.url)) as (lane, database), async_playwright() as driver:
            arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
            async with await driver.chromium.launch(executable_path=found, args=arguments) as browser:
                for path in PAGES:
                    page = await signed_in(browser, lane.target.url, database)
                    if (weighs := await weight(page, lane.target.url + path)) is not None:
                        weights[path] = weighs
                for repetition in range(repetitions):
                    note(f"repetition {repetition + 1} of {repetitions}")
                    page = await signed_in(browser, lane.target.url, database)
                    tasks.append(await stream(page, lane.target.url, tokens))
    finally:
        await engine.stop()
    return weights, tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one answer of 300 tokens")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    Path(".bench").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pages-", dir=".bench")).absolute()
    load = os.getloadavg()[0]
    weights, tasks = asyncio.run(bench(folder, options))
    shutil.rmtree(folder)

    rows = [[page, f"{size / 1000:.1f}"] for page, size in weights.items()]
    print(f"\n{markdown(['page', 'JavaScript and CSS, kB'], rows)}\n")
    rows = [[str(n + 1), str(len(one)), f"{max(one, default=0.0):.0f}"] for n, one in enumerate(tasks)]
    print(markdown(["answer", "tasks of 50 ms and more", "the longest, ms"], rows))
    print(f"\n{os.cpu_count()} cores, load average {load:.1f} before the start.\n")
    if options.json:
        figures = {
            "first_load_kb": round(max(weights.values()) / 1000, 1),
            "long_tasks": median(len(one) for one in tasks),
            "longest_task_ms": max((task for one in tasks for task in one), default=0.0),
            "seed": options.seed,
            "quick": options.quick,
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
