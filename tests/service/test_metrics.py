from data.types import Role
from tests.conftest import FakeEngine, House, OpenHouse, Refusal, eventually, say


async def metrics(house: House) -> list[str]:
    answer = await house.call("GET", "/metrics", role=None)
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return answer.body.decode().splitlines()


async def test_requests_are_counted_by_route_and_status(house: House) -> None:
    await house.chat()
    await house.chat(stream=True)
    await house.chat(temperature=9)
    await house.vote("cmp_one", "a")
    await house.vote("cmp_two", "a")
    await house.call("GET", "/v1/nothing/at/all")
    lines = await metrics(house)
    chat = 'nightshift_requests_total{method="POST",route="/v1/chat/completions",status="%d"} %d.0'
    assert chat % (200, 2) in lines
    assert chat % (400, 1) in lines
    vote = 'nightshift_requests_total{method="POST",route="/v1/comparisons/{id}/vote",status="404"} 2.0'
    assert vote in lines
    assert 'nightshift_requests_total{method="GET",route="unknown",status="404"} 1.0' in lines


async def test_no_id_of_a_client_becomes_a_label(house: House) -> None:
    await house.vote("cmp_secret", "a")
    await house.call("GET", "/secret")
    await house.call("DELETE", "/v1/users/secret", role=Role.OPERATOR)
    assert [line for line in await metrics(house) if "secret" in line] == []


async def test_answers_are_counted_by_how_they_ended(house: House, engine: FakeEngine) -> None:
    await house.chat()
    engine.answer = lambda body: Refusal(500)
    await house.chat()
    engine.answer = lambda body: say("One", " two", hold_after=1)
    async with house.open_chat(stream=True) as response:
        await response.content.readany()

    async def counted() -> bool:
        wanted = {f'nightshift_completions_total{{status="{s}"}} 1.0' for s in ("complete", "failed", "aborted")}
        return wanted <= set(await metrics(house))

    await eventually(counted)


async def test_the_first_token_of_a_stream_is_timed(house: House) -> None:
    await house.chat()
    assert "nightshift_first_token_seconds_count 0.0" in await metrics(house)
    await house.chat(stream=True)
    assert "nightshift_first_token_seconds_count 1.0" in await metrics(house)


async def test_what_runs_on_an_engine_is_shown_while_it_runs(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("One", " two", hold_after=1)
    running = 'nightshift_engine_in_flight{engine="1"} '
    async with house.open_chat(stream=True) as response:
        await response.content.readany()
        assert running + "1.0" in await metrics(house)
    await eventually(lambda: house.state.engines.engines[0].in_flight == 0)
    assert running + "0.0" in await metrics(house)


async def test_each_app_has_figures_of_its_own(open_house: OpenHouse, engine: FakeEngine) -> None:
    one, other = await open_house(engine), await open_house(engine)
    await one.chat()
    assert 'nightshift_completions_total{status="complete"} 1.0' in await metrics(one)
    assert 'nightshift_completions_total{status="complete"} 1.0' not in await metrics(other)
