"""The operator's board, as it is seen."""

import re

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Locator, Page, expect
from sqlite_utils import Database

from data import duels, raters, runs, swaps
from data.database import transaction
from data.settings import GateSettings
from data.types import BASE_POLICY, DuelKind, PolicyStatus, Role, RunStatus
from tests.browser.board_record import FIGURES, fill
from tests.browser.conftest import PHONE, OpenPage
from tests.conftest import AddPair, AddPolicy, FakeEngine, House, MakeKey, OpenHouse, Refusal, eventually
from trainer import gate


def part(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name)


async def confirm(page: Page, action: str) -> None:
    await page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()


async def test_an_empty_board_says_what_to_do_next(house: House, open_page: OpenPage) -> None:
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await expect(page.get_by_role("heading", name="Is it learning?")).to_be_visible()
    await expect(page.get_by_text("Not yet: nobody has voted.")).to_be_visible()
    await expect(part(page, "Training run")).to_contain_text("a run needs about 143 votes that prefer an answer")
    await expect(part(page, "Trial")).to_contain_text("goes on trial by itself")
    await expect(part(page, "Votes a day")).to_contain_text("comparisons.rate says how often")
    await expect(part(page, "Reward models")).to_contain_text("Each run fits one")
    await expect(part(page, "Schedules")).to_contain_text("Add one")
    await expect(page.get_by_role("button", name="Roll back")).to_be_disabled()
    await page.get_by_role("button", name="Read 20 random pairs").click()
    await expect(page.get_by_text("Pairs come from its trial")).to_be_visible()


async def test_others_are_told_whose_board_it_is(house: House, open_page: OpenPage) -> None:
    page = await open_page(house, "/board", role=Role.RATER)
    await expect(page.get_by_role("heading", name="This board is for operators")).to_be_visible()
    await expect(page.get_by_role("button", name="Train now")).to_be_hidden()


async def test_a_run_is_asked_for_watched_and_fails_loudly(house: House, db: Database, open_page: OpenPage) -> None:
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await page.get_by_role("button", name="Train now").click()
    await expect(page.get_by_role("dialog", name="Train now?")).to_contain_text("The clock is not running")
    await confirm(page, "Train")
    run = part(page, "Training run")
    await expect(run).to_contain_text("It waits for the clock to start it.")
    await expect(page.get_by_role("alert").filter(has_text="The clock is not running")).to_be_visible()
    await expect(page.get_by_role("button", name="Train now")).to_be_disabled()

    with transaction(db):
        claimed = runs.claim(db)
        assert claimed is not None
        runs.beat(db, claimed.id, stage="ppo")
        for step, kl in enumerate((0.5, 1.5)):
            figures = {"score": 0.25 * step, "kl": kl, "length": 40, "entropy": 2.0, "episodes_per_s": 21.0}
            runs.add_metrics(db, claimed.id, step, {f"ppo/{name}": value for name, value in figures.items()})
    await expect(run).to_contain_text("It runs: ppo, step 2.")
    await expect(run.locator("[aria-current=step]")).to_have_text("PPO")
    kl = run.get_by_role("img", name="KL from the base")
    await expect(kl).to_have_accessible_name(re.compile(r"from 0\.5 to 1\.5\. The gate lets 12 nats through\."))
    await expect(kl.get_by_text("the gate's budget: 12")).to_be_visible()
    for name in ("Reward", "Length", "Entropy", "Episodes a second"):
        await expect(run.get_by_role("img", name=name)).to_be_visible()

    with transaction(db):
        runs.add_metrics(db, claimed.id, 2, {"ppo/kl": 2.5})
    await expect(kl).to_have_accessible_name(re.compile(r"3 steps.*to 2\.5\."))
    await expect(run.get_by_role("figure").filter(has_text="KL from the base")).to_contain_text("2.5")

    with transaction(db):
        runs.finish(db, claimed.id, RunStatus.FAILED, error="The disk is full: make room in the state folder.")
    await expect(run).to_contain_text("It failed. The disk is full: make room in the state folder.")
    alarm = page.get_by_role("alert").filter(has_text="The last run failed")
    await expect(alarm).to_contain_text("The disk is full: make room in the state folder.")
    await expect(part(page, "Runs")).to_contain_text("The disk is full")
    await expect(page.get_by_role("button", name="Train now")).to_be_enabled()


async def test_the_first_line_knows_of_the_first_run(
    house: House, db: Database, add_pair: AddPair, open_page: OpenPage
) -> None:
    await house.vote(add_pair(house.keys[Role.USER].id), "a")
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await expect(page.get_by_text("Not yet: a run needs about 143 votes that prefer an answer")).to_be_visible()
    with transaction(db):
        runs.request(db, requested_by="cli", config={})
    await expect(page.get_by_text("Not yet: 1 vote, and a run is queued.")).to_be_visible()
    with transaction(db):
        runs.claim(db)
    await expect(page.get_by_text("Not yet: 1 vote, and a run is under way.")).to_be_visible()


async def test_a_run_is_cancelled_after_asking_once(house: House, db: Database, open_page: OpenPage) -> None:
    with transaction(db):
        asked = runs.request(db, requested_by="cli", config={})
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await page.get_by_role("button", name="Cancel the run").click()
    await confirm(page, "Cancel")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    assert runs.get(db, asked.id).status is RunStatus.QUEUED
    await page.get_by_role("button", name="Cancel the run").click()
    await confirm(page, "Cancel the run")
    await expect(part(page, "Training run")).to_contain_text("It was cancelled.")
    assert runs.get(db, asked.id).status is RunStatus.CANCELLED
    await expect(page.get_by_text(f"operator cancelled {asked.id}")).to_be_visible()


async def test_a_policy_is_promoted_and_rolled_back_by_button(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy, open_page: OpenPage
) -> None:
    house = await open_house(engine, gate={"mode": "manual"})
    name = add_policy()
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await expect(part(page, "Trial")).to_contain_text("waits until you promote it")
    policies = part(page, "Policies")
    await expect(policies.get_by_role("button", name=f"{name} candidate")).to_have_attribute("aria-pressed", "true")
    await policies.get_by_role("button", name="Promote").click()
    await confirm(page, "Cancel")
    await expect(policies.get_by_role("button", name=f"{name} candidate")).to_be_visible()
    await policies.get_by_role("button", name="Promote").click()
    await confirm(page, "Promote")
    await expect(policies.get_by_role("button", name=f"{name} serving")).to_be_visible()
    await expect(policies).to_contain_text(f"{name} took the place of {BASE_POLICY}")
    await expect(page.get_by_text(f"operator promoted {name}")).to_be_visible()
    assert (await house.chat()).json["system_fingerprint"] == name

    await page.get_by_role("button", name="Roll back").click()
    await expect(page.get_by_role("dialog", name=f"Go back to {BASE_POLICY}?")).to_be_visible()
    await confirm(page, "Roll back")
    await expect(policies.get_by_role("button", name=f"{BASE_POLICY} serving")).to_be_visible()
    await expect(policies.get_by_role("button", name=f"{name} rolled back")).to_be_visible()
    await expect(page.get_by_role("button", name="Roll back")).to_be_disabled()
    assert (await house.chat()).json["system_fingerprint"] == BASE_POLICY


async def test_the_first_line_still_knows_what_serves_after_many_swaps_that_were_not_made(
    open_house: OpenHouse,
    engine: FakeEngine,
    db: Database,
    add_policy: AddPolicy,
    add_pair: AddPair,
    open_page: OpenPage,
) -> None:
    house = await open_house(engine, gate={"mode": "manual"})
    await house.vote(add_pair(house.keys[Role.USER].id), "a")
    name, another = add_policy(), add_policy()
    await house.call("POST", f"/v1/policies/{name}/promote", role=Role.OPERATOR)
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await expect(page.get_by_text(f"Yes: {name} serves; it took the place of {BASE_POLICY}")).to_be_visible()
    with transaction(db):
        for _ in range(10):
            swaps.promote(db, another, actor="test", reason="try it")
            swaps.promote(db, name, actor="test", reason="it stays")
    await expect(page.get_by_text(f"Yes: {name} serves.")).to_be_visible()


async def test_a_policy_that_no_engine_takes_is_said_loudly(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy, open_page: OpenPage
) -> None:
    house = await open_house(engine, gate={"mode": "manual"})
    name = add_policy()
    engine.refuses_load = Refusal(500, "CUDA out of memory")
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await page.get_by_role("button", name="Promote").click()
    await confirm(page, "Promote")
    alarm = page.get_by_role("alert").filter(has_text=f"{name} was to serve and does not.")
    await expect(alarm).to_contain_text("CUDA out of memory")
    await expect(page.get_by_role("button", name=f"{name} rejected")).to_be_visible()


async def test_a_policy_that_cannot_be_loaded_yet_is_said_loudly(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy, open_page: OpenPage
) -> None:
    house = await open_house(engine, gate={"mode": "manual"})
    name = add_policy()
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await expect(page.get_by_role("button", name="Promote")).to_be_visible()
    await engine.stop()
    await page.get_by_role("button", name="Promote").click()
    await confirm(page, "Promote")
    await expect(page.get_by_role("alert").filter(has_text=f"{name} cannot serve yet.")).to_be_visible()
    await expect(part(page, "Policies")).to_contain_text("The engines are loading it")
    await engine.start()
    await expect(page.get_by_role("button", name=f"{name} serving")).to_be_visible()
    await expect(page.get_by_role("alert").filter(has_text=name)).to_have_count(0)


async def test_an_engine_that_is_away_is_said_loudly(house: House, engine: FakeEngine, open_page: OpenPage) -> None:
    page = await open_page(house, "/board", role=Role.OPERATOR)
    await expect(part(page, "Policies")).to_be_visible()
    await engine.stop()
    alarm = page.get_by_role("alert").filter(has_text=f"The engine at {engine.url} gets no traffic")
    await expect(alarm).to_be_visible()
    await engine.start()
    await expect(alarm).to_be_hidden()


async def test_the_gates_sentences_are_shown_and_what_failed_comes_first(
    house: House, add_policy: AddPolicy, open_page: OpenPage
) -> None:
    report = gate.judge(FIGURES | {"length": 60.0}, GateSettings())
    name = add_policy(PolicyStatus.REJECTED, metrics={"gate": report.as_dict()})
    page = await open_page(house, "/board", role=Role.OPERATOR)
    policies = part(page, "Policies")
    await expect(policies.get_by_role("heading", name=name)).to_be_visible()
    await expect(policies).to_contain_text("The gate turned it away: 1 of 9 checks failed")
    checks = policies.get_by_role("listitem").filter(has_text=re.compile("passed|failed"))
    await expect(checks.first).to_contain_text("Length failed. Its answers are 55% longer than the incumbent's")
    for check in report.checks:
        await expect(policies).to_contain_text(check.sentence)
    await expect(policies.get_by_role("button", name="Promote")).to_have_count(0)


async def test_the_trial_is_drawn_and_told_and_its_pairs_are_read(
    house: House, add_policy: AddPolicy, add_pair: AddPair, open_page: OpenPage
) -> None:
    name = add_policy()
    await eventually(lambda: house.state.hot_swap.duel)
    duel = house.state.hot_swap.duel
    assert duel is not None
    asked = [{"role": "user", "content": "Capital of France?"}]
    policies, answers = (name, BASE_POLICY), ("**Paris**", "Rome")
    for choice in ("a", "a", "b"):
        pair = add_pair(house.keys[Role.USER].id, answers=answers, policies=policies, messages=asked, duel_id=duel.id)
        await house.vote(pair, choice)
    page = await open_page(house, "/board", role=Role.OPERATOR)
    trial = part(page, "Trial")
    await expect(trial).to_contain_text(f"{name} was preferred in 67% of 3 decisive votes")
    chart = trial.get_by_role("img", name="Evidence after 3 decisive votes")
    await expect(chart).to_have_accessible_name(re.compile(rf"for {name}, and promotes it at 20; for {BASE_POLICY}"))
    await expect(chart.get_by_text("promote: E = 20")).to_be_visible()
    await expect(chart.get_by_text("reject: 20 the other way")).to_be_visible()

    await page.get_by_role("button", name="Read 20 random pairs").click()
    read = page.get_by_role("article", name=f"Answer of {name}")
    await expect(read).to_have_count(3)
    await expect(read.first.locator("strong")).to_have_text("Paris")
    await expect(read.filter(has_text="1 vote")).to_have_count(2)
    await expect(page.get_by_role("article", name=f"Answer of {BASE_POLICY}").filter(has_text="Rome")).to_have_count(3)
    await page.context.set_offline(True)
    await page.get_by_role("button", name="Draw others").click()
    await expect(page.get_by_text("The pairs cannot be had.")).to_be_visible()
    await page.context.set_offline(False)
    await page.get_by_role("button", name="Draw others").click()
    await expect(page.get_by_text("The pairs cannot be had.")).to_have_count(0)

    await house.vote(add_pair(house.keys[Role.USER].id, answers=answers, policies=policies, duel_id=duel.id), "a")
    await expect(trial).to_contain_text("75% of 4 decisive votes")


async def test_a_schedule_is_added_paused_changed_and_removed(house: House, db: Database, open_page: OpenPage) -> None:
    page = await open_page(house, "/board", role=Role.OPERATOR, timezone_id="Europe/Berlin")
    schedules = part(page, "Schedules")
    await schedules.get_by_role("button", name="Add a schedule").click()
    dialog = page.get_by_role("dialog", name="Add a schedule")
    await expect(dialog.get_by_label("Time zone")).to_have_value("Europe/Berlin")
    await dialog.get_by_label("Cron expression").fill("0 3 * *")
    await dialog.get_by_role("button", name="Add").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("has 4 fields, and a cron expression has five")
    await dialog.get_by_label("A run begins").select_option("After so many votes")
    await expect(dialog.get_by_label("Time zone")).to_be_hidden()
    await dialog.get_by_label("New votes").fill("250")
    await dialog.get_by_role("button", name="Add").click()
    await expect(schedules.get_by_role("listitem")).to_contain_text("after 250 new votes")

    await schedules.get_by_role("button", name="Pause the schedule after 250 new votes").click()
    await expect(schedules.get_by_role("listitem")).to_contain_text("Nothing is due until you resume it.")
    await schedules.get_by_role("button", name="Resume the schedule after 250 new votes").click()
    await expect(schedules.get_by_role("button", name="Pause the schedule after 250 new votes")).to_be_visible()

    await schedules.get_by_role("button", name="Edit the schedule after 250 new votes").click()
    dialog = page.get_by_role("dialog", name="Change the schedule")
    await expect(dialog.get_by_label("New votes")).to_have_value("250")
    await dialog.get_by_label("A run begins").select_option("Every so often")
    await dialog.get_by_label("Interval").fill("12h")
    await dialog.get_by_role("button", name="Save").click()
    await expect(schedules.get_by_role("listitem")).to_contain_text("every 12h")
    await expect(page.get_by_text("operator changed a schedule")).to_be_visible()

    await schedules.get_by_role("button", name="Remove the schedule every 12h").click()
    await confirm(page, "Remove")
    await expect(schedules).to_contain_text("None: a run begins only when you ask for it.")


async def test_whose_votes_are_left_out_is_told_and_ruled_on(
    house: House, db: Database, open_page: OpenPage, make_key: MakeKey
) -> None:
    key = make_key()[0].id
    with transaction(db):
        db.execute("UPDATE keys SET label = 'Ada' WHERE id = ?", (key,))
        run = runs.request(db, requested_by="test", config={})
        raters.keep(db, run.id, {key: raters.Standing(30, 16, 0.12, "30 of 30 votes are for the answer shown first.")})
    page = await open_page(house, "/board", role=Role.OPERATOR)
    card = part(page, "Raters")
    await expect(card.get_by_role("listitem")).to_contain_text("30 of 30 votes are for the answer shown first.")
    await expect(card.get_by_role("listitem")).to_contain_text("Ada · 0 votes, reliability 0.12")
    await card.get_by_role("button", name="Release Ada").click()
    await expect(card.get_by_text("released", exact=True)).to_be_visible()
    assert raters.left_out(db) == set()
    await card.get_by_role("button", name="Leave out Ada").click()
    await expect(page.get_by_role("dialog")).to_contain_text("you can release them")
    await confirm(page, "Leave out")
    await expect(card.get_by_text("left out", exact=True)).to_be_visible()
    await expect(part(page, "Who did what")).to_contain_text("operator left out the votes of")
    assert raters.left_out(db) == {key}
    await card.get_by_role("button", name="Reconsider Ada").click()
    await expect(card.get_by_role("button", name="Reconsider Ada")).to_have_count(0)
    await expect(part(page, "Who did what")).to_contain_text("left to the next run the votes of")
    assert raters.left_out(db) == raters.released(db) == set()


@pytest.mark.parametrize("more", [{}, {"viewport": PHONE}, {"color_scheme": "dark"}], ids=["desktop", "phone", "dark"])
async def test_a_full_board_is_whole_and_accessible(
    house: House,
    db: Database,
    open_page: OpenPage,
    add_policy: AddPolicy,
    make_key: MakeKey,
    more: dict[str, object],
) -> None:
    people = [make_key(Role.RATER)[0].id for _ in range(2)]
    fill(db, add_policy, operator=house.keys[Role.OPERATOR].id, people=people)
    page = await open_page(house, "/board", role=Role.OPERATOR, **more)
    await expect(page.get_by_text("Yes: policy-0003 serves")).to_be_visible()
    figures = page.get_by_role("region", name="Figures")
    await expect(figures).to_contain_text("no position bias seen")
    await expect(figures).to_contain_text("length alone about 57%")
    await expect(page.get_by_role("img", name="Votes a day over 30 days")).to_be_visible()
    await expect(page.get_by_role("img", name="Accuracy of the last 5 reward models")).to_be_visible()
    await expect(page.get_by_role("img", name="Reward, 24 steps")).to_be_visible()
    # The line to what serves is straight; what came of it and does not serve hangs off it.
    await expect(page.get_by_role("list", name="Made from policy-0003").get_by_role("listitem")).to_have_count(2)
    await page.get_by_role("button", name="policy-0001 rejected").click()
    await expect(page.get_by_role("heading", name="policy-0001")).to_be_visible()
    await page.get_by_role("button", name="Curves").last.click()
    await expect(part(page, "Training run")).to_contain_text("It has ended well.")
    wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide == 0
    found = await Axe().run(page)
    grave = [one for one in found.response["violations"] if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in grave] == []


async def test_the_keyboard_is_enough_and_keeps_its_place(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy, db: Database, open_page: OpenPage
) -> None:
    house = await open_house(engine, gate={"mode": "manual"})
    name = add_policy()
    page = await open_page(house, "/board", role=Role.OPERATOR)
    node = page.get_by_role("button", name=f"{name} candidate")
    for _ in range(30):
        await page.keyboard.press("Tab")
        if await node.evaluate("(element) => element === document.activeElement"):
            break
    await expect(node).to_be_focused()
    another = add_policy()
    await expect(page.get_by_role("button", name=f"{another} candidate")).to_be_visible()
    await expect(node).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name=name)).to_be_visible()
    await page.get_by_role("button", name="Promote").focus()
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name=f"Let {name} serve?")
    await expect(dialog).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await expect(page.get_by_role("button", name="Promote")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name=f"{name} serving")).to_be_visible()
    assert db.execute("SELECT count(*) FROM swaps WHERE policy = ?", (name,)).fetchone() == (1,)


HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


async def test_hostile_texts_are_only_text(
    house: House, db: Database, add_policy: AddPolicy, add_pair: AddPair, open_page: OpenPage
) -> None:
    check = {"name": HOSTILE, "figure": 1.0, "threshold": 1.0, "passed": False, "sentence": HOSTILE}
    metrics = {"gate": {"passed": False, "checks": [check]}}
    name = add_policy(PolicyStatus.REJECTED, metrics=metrics, problem=HOSTILE)
    with transaction(db):
        db.execute("UPDATE keys SET label = ? WHERE id = ?", (HOSTILE, house.keys[Role.OPERATOR].id))
        runs.request(db, requested_by=house.keys[Role.OPERATOR].id, config={})
        run = runs.claim(db)
        assert run is not None
        runs.beat(db, run.id, stage=HOSTILE)
        runs.add_metrics(db, run.id, 0, {"ppo/score": 1.0})
        runs.finish(db, run.id, RunStatus.FAILED, error=HOSTILE)
        duel = duels.begin(db, DuelKind.TRIAL, challenger=name, incumbent=BASE_POLICY, threshold=20.0, budget=9)
        duels.end_running(db, reason=HOSTILE)
    messages = [{"role": "user", "content": HOSTILE}]
    add_pair(house.keys[Role.USER].id, answers=(HOSTILE, HOSTILE), policies=(name, BASE_POLICY), messages=messages,
             duel_id=duel.id)  # fmt: skip
    page = await open_page(house, "/board", role=Role.OPERATOR)
    strangers = []
    page.on("request", lambda request: request.url.startswith(house.url) or strangers.append(request.url))
    await expect(part(page, "Training run")).to_contain_text(HOSTILE)
    await expect(part(page, "Trial")).to_contain_text(HOSTILE)
    await expect(part(page, "Runs")).to_contain_text(HOSTILE)
    await expect(part(page, "Who did what")).to_contain_text(HOSTILE)
    await page.get_by_role("button", name="Read 20 random pairs").click()
    await expect(page.get_by_role("article").first).to_contain_text("<img src=x")
    await expect(page).to_have_title("Board · Nightshift")
    assert strangers == []
    assert await page.locator("main img, main script").count() == 0
