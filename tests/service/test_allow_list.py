"""What of a chat request reaches the engine: each parameter unchanged, and never anything else."""

from typing import Any

import pytest

from service.chat_request import ChatRequest
from tests.conftest import FakeEngine, House

PARAMETERS = {"type": "object", "properties": {"at": {"type": ["string", "null"], "default": None}}}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look up.", "parameters": PARAMETERS, "strict": True},
}
SCHEMA = {"name": "sky", "schema": {"type": "object", "properties": {"stars": {"type": "integer"}}}, "strict": True}

PASSED_ON: list[tuple[str, Any]] = [
    *(("temperature", 0), ("temperature", 0.7), ("temperature", 2)),
    *(("top_p", 0.5), ("top_p", 1), ("top_k", -1), ("top_k", 0), ("top_k", 40), ("min_p", 0), ("min_p", 0.05)),
    *(("presence_penalty", -2), ("frequency_penalty", 1.5), ("repetition_penalty", 1.1)),
    *(("seed", 0), ("seed", -(2**63)), ("seed", 2**63 - 1), ("n", 1), ("n", 2)),
    *(("max_tokens", 1), ("max_completion_tokens", 512)),
    *(("stop", "\n"), ("stop", ["\n", "END"]), ("stop", []), ("logit_bias", {"17": -100, "18": 0.5})),
    *(("logprobs", True), ("logprobs", False), ("top_logprobs", 5)),
    *(
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": SCHEMA}),
    ),
    *(("tools", []), ("tools", [TOOL, {"type": "function", "function": {"name": "wait"}}])),
    *(("tool_choice", choice) for choice in ("none", "auto", "required")),
    ("tool_choice", {"type": "function", "function": {"name": "look"}}),
    *(("parallel_tool_calls", False), ("reasoning_effort", "low")),
]
OURS = {"model", "messages", "stream", "stream_options", "feedback", "user", "metadata"}
"""What the service itself answers to."""


@pytest.mark.parametrize("stream", [False, True])
async def test_each_parameter_reaches_the_engine_unchanged_and_nothing_else_does(
    house: House, engine: FakeEngine, stream: bool
) -> None:
    own = {"model", "messages", "priority"} | ({"stream", "stream_options"} if stream else set())
    for name, value in PASSED_ON:
        answer = await house.chat(stream=stream, **{name: value})
        assert answer.status == 200, (name, answer.body)
        body = engine.chats[-1].body
        assert body[name] == value, name
        assert type(body[name]) in (type(value), float), name
        assert body.keys() - own - {"max_tokens"} - {name} == set(), name
    assert len(engine.chats) == len(PASSED_ON)


async def test_an_explicit_null_is_as_good_as_nothing(house: House, engine: FakeEngine) -> None:
    names = set(ChatRequest.model_fields) - {"model", "messages"}
    answer = await house.chat(**dict.fromkeys(names))
    assert answer.status == 200
    assert engine.chats[0].body.keys() == {"model", "messages", "max_tokens", "priority"}


def test_every_parameter_of_the_schema_is_tried_here() -> None:
    assert {name for name, _ in PASSED_ON} | OURS == set(ChatRequest.model_fields)
