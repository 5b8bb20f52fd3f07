"""The official client against the whole house."""

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.e2e.conftest import House, never_ending

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(house: House) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0)


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def test_a_plain_answer_names_the_policy_that_wrote_it(client: openai.OpenAI, house: House) -> None:
    answer = client.chat.completions.create(model="nightshift", messages=QUESTION, extra_body={"feedback": "off"})
    assert answer.model == "nightshift"
    assert answer.system_fingerprint == "policy-0000"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.completion_tokens > 0
    # The write follows the answer; the next request's write comes after it in the same queue.
    client.chat.completions.create(model="nightshift", messages=QUESTION, extra_body={"feedback": "always"}, seed=1)
    rows = house.rows("SELECT answer, status, policy FROM completions WHERE id = ?", answer.id)
    assert rows == [(answer.choices[0].message.content, "complete", "policy-0000")]


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    request = {"model": "nightshift", "messages": QUESTION, "temperature": 0.0}
    whole = client.chat.completions.create(**request)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options=options))
    assert text_of(chunks) == whole.choices[0].message.content
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.system_fingerprint for chunk in chunks} == {"policy-0000"}
    assert chunks[-1].usage == whole.usage


async def test_the_async_client_streams(house: House) -> None:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
        request = {"model": "nightshift", "messages": QUESTION, "extra_body": {"feedback": "off"}}
        stream = await client.chat.completions.create(**request, stream=True)
        chunks = [chunk async for chunk in stream]
        assert text_of(chunks)
        assert (await client.chat.completions.create(**request)).choices[0].message.content


def test_a_comparison_shows_two_answers_and_hides_who_wrote_them(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="nightshift", messages=QUESTION, seed=3, extra_body={"feedback": "always"}
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert answer.system_fingerprint is None
    assert answer.model_extra
    assert answer.model_extra["comparison"]["id"].startswith("cmp_")


async def test_both_answers_of_a_comparison_stream_together(house: House) -> None:
    # Short answers lie whole in their sockets, one after the other, when a busy machine lets the service read.
    request = {"messages": QUESTION, "seed": 3, **never_ending(200), "extra_body": {"feedback": "always"}}
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.key, max_retries=0) as client:
        stream = await client.chat.completions.create(model="nightshift", stream=True, **request)
        chunks = [chunk async for chunk in stream]
    assert text_of(chunks, 0)
    assert text_of(chunks, 1)
    assert chunks[-1].model_extra
    assert chunks[-1].model_extra["comparison"]["id"].startswith("cmp_")
    order = [choice.index for chunk in chunks for choice in chunk.choices]
    assert order != sorted(order), "one answer waited for the other"


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    def ask() -> str | None:
        answer = client.chat.completions.create(
            model="nightshift", messages=QUESTION, seed=11, extra_body={"feedback": "off"}
        )
        return answer.choices[0].message.content

    assert ask() == ask()


def test_logprobs_stop_and_n_are_passed_on(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="nightshift", messages=QUESTION, n=2, logprobs=True, top_logprobs=2, max_completion_tokens=3, stop=["\n"]
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs
        assert choice.logprobs.content
        assert 1 <= len(choice.logprobs.content) <= 3
        assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="nightshift",
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert "7" in (answer.choices[0].message.content or "")


def test_the_clients_own_errors_come_up(client: openai.OpenAI, house: House) -> None:
    stranger = openai.OpenAI(base_url=f"{house.url}/v1", api_key="ns-nobody-nothing", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="called 'nightshift'"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="'echo'"):
        client.chat.completions.create(model="nightshift", messages=QUESTION, extra_body={"echo": True})
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.chat.completions.create(model="nightshift", messages=[{"role": "user", "content": "word " * 5000}])


def test_models_lists_the_one_that_serves(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nightshift"]
