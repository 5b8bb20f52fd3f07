"""Every error of the wire, one by one: its status, its type, its code, and a message that says what to do."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import keys
from data.types import Role
from service.state import State
from tests.conftest import (
    LIMIT_S,
    Answer,
    FakeEngine,
    House,
    OpenHouse,
    Refusal,
    Reply,
    database_locked,
    eventually,
    say,
    whole_body,
)


def assert_error(
    answer: Answer, status: int, type: str, code: str | None, *says: str, param: str | None = None
) -> None:
    """`answer` is the error, in exactly OpenAI's shape, and its message holds each of `says`."""
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json.keys() == {"error"}
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert (error["type"], error["code"], error["param"]) == (type, code, param)
    for words in says:
        assert words in error["message"]


# 401, 403


async def test_without_a_key_it_is_401_and_says_how_to_send_one(house: House) -> None:
    answer = await house.call("GET", "/v1/models", role=None)
    assert_error(
        answer, 401, "invalid_request_error", "missing_api_key", "Authorization: Bearer KEY", "nightshift keys create"
    )
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic bmlnaHQ6c2hpZnQ=", "ns-1234"])
async def test_a_header_that_is_not_bearer_and_a_key_is_401(house: House, header: str) -> None:
    answer = await house.call("GET", "/v1/models", role=None, headers={"Authorization": header})
    assert_error(answer, 401, "invalid_request_error", "missing_api_key", "Authorization: Bearer KEY")


@pytest.mark.parametrize("token", ["sk-of-somebody-else", "ns-", "ns--", "ns-x-y", "é", "ns-" + "9" * 26 + "-secret"])
async def test_an_unknown_or_malformed_key_is_401(house: House, token: str) -> None:
    answer = await house.call("GET", "/v1/models", token=token)
    assert_error(answer, 401, "invalid_request_error", "invalid_api_key", "unknown or was revoked", "operator")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_key_with_a_wrong_secret_is_401(house: House) -> None:
    token = house.tokens[Role.USER]
    answer = await house.call("GET", "/v1/models", token=token[:-1] + ("A" if token[-1] != "A" else "B"))
    assert_error(answer, 401, "invalid_request_error", "invalid_api_key")


async def test_a_revoked_key_is_401_at_once(house: House) -> None:
    assert (await house.call("GET", "/v1/models")).status == 200
    await house.call("DELETE", f"/v1/keys/{house.keys[Role.USER].id}", role=Role.OPERATOR)
    assert_error(await house.call("GET", "/v1/models"), 401, "invalid_request_error", "invalid_api_key", "revoked")


OPERATORS = [
    ("POST", "/v1/keys"),
    ("GET", "/v1/keys"),
    ("DELETE", "/v1/keys/key_x"),
    ("GET", "/v1/policies"),
    ("GET", "/v1/stats"),
    ("GET", "/v1/export/preferences"),
    ("DELETE", "/v1/users/key_x"),
]


async def test_what_is_for_operators_is_403_for_others(house: House) -> None:
    for method, path in OPERATORS:
        for role in (Role.USER, Role.RATER):
            answer = await house.call(method, path, role=role, json={"role": "user"} if method == "POST" else None)
            assert_error(
                answer, 403, "permission_error", "insufficient_role", "role operator", f"yours is of role {role}"
            )


async def test_the_queue_is_403_for_a_user(house: House) -> None:
    answer = await house.call("GET", "/v1/comparisons/next")
    assert_error(answer, 403, "permission_error", "insufficient_role", "needs a key of role rater")


# 404, 405


async def test_an_unknown_url_is_404_and_names_it(house: House) -> None:
    answer = await house.call("GET", "/v1/nothing")
    assert_error(answer, 404, "not_found_error", "unknown_url", "GET /v1/nothing")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions", "/tokenize"])
async def test_nothing_of_vllm_can_be_reached(house: House, engine: FakeEngine, path: str) -> None:
    answer = await house.call("POST", path, role=Role.OPERATOR, json={"lora_name": "mine", "lora_path": "/tmp"})
    assert_error(answer, 404, "not_found_error", "unknown_url")
    assert [load["lora_name"] for load in engine.loads] == ["policy-0000"]


async def test_a_wrong_method_is_405_and_names_it(house: House) -> None:
    answer = await house.call("GET", "/v1/chat/completions")
    assert_error(answer, 405, "invalid_request_error", "method_not_allowed", "/v1/chat/completions does not take GET")


async def test_another_model_is_404_and_says_which_serves(house: House) -> None:
    answer = await house.chat(model="gpt-5")
    assert_error(
        answer, 404, "invalid_request_error", "model_not_found", "'gpt-5'", "called 'nightshift'", param="model"
    )


async def test_the_engine_s_own_names_are_not_ours(house: House) -> None:
    for name in ("base", "policy-0000"):
        assert_error(await house.chat(model=name), 404, "invalid_request_error", "model_not_found", param="model")


async def test_an_unknown_comparison_is_404(house: House) -> None:
    answer = await house.vote("cmp_nothing", "a")
    assert_error(answer, 404, "not_found_error", "unknown_comparison", "cmp_nothing")


async def test_an_unknown_key_is_404(house: House) -> None:
    answer = await house.call("DELETE", "/v1/keys/key_nobody", role=Role.OPERATOR)
    assert_error(answer, 404, "not_found_error", "unknown_key", "key_nobody")


async def test_a_user_of_whom_nothing_is_kept_is_404(house: House) -> None:
    answer = await house.call("DELETE", "/v1/users/key_a/somebody", role=Role.OPERATOR)
    assert_error(answer, 404, "not_found_error", "unknown_user", "key_a/somebody")


# 400


async def post(house: House, body: bytes, content_type: str = "application/json") -> Answer:
    return await house.call("POST", "/v1/chat/completions", data=body, headers={"Content-Type": content_type})


async def test_a_body_that_is_not_json_is_400_and_says_where(house: House) -> None:
    answer = await post(house, b'{"model": nightshift}')
    assert_error(answer, 400, "invalid_request_error", "invalid_json", "not valid JSON", "byte 10")


@pytest.mark.parametrize("body", [b"", b"[]", b'"hello"', b"7", b"null"])
async def test_a_body_that_is_not_an_object_is_400(house: House, body: bytes) -> None:
    assert_error(await post(house, body), 400, "invalid_request_error", "invalid_body", "must be a JSON object")


async def test_a_body_that_is_not_declared_as_json_is_400_and_says_so(house: House) -> None:
    answer = await post(house, b'{"model": "nightshift"}', "text/plain")
    assert_error(answer, 400, "invalid_request_error", "invalid_body", "Content-Type: application/json")


@pytest.mark.parametrize("body", [b'{"model": "\xff"}', b"[" * 100_000], ids=["not UTF-8", "too deep"])
async def test_a_body_that_cannot_be_parsed_is_400(house: House, body: bytes) -> None:
    assert_error(await post(house, body), 400, "invalid_request_error", "invalid_json", "not valid JSON")


@pytest.mark.parametrize("param", ["model", "messages"])
async def test_a_missing_parameter_is_400_by_name(house: House, param: str) -> None:
    body = {"model": "nightshift", "messages": [{"role": "user", "content": "Hello"}]}
    del body[param]
    answer = await house.call("POST", "/v1/chat/completions", json=body)
    says = f"Missing required parameter: '{param}'"
    assert_error(answer, 400, "invalid_request_error", "missing_required_parameter", says, param=param)


@pytest.mark.parametrize(
    "param",
    [
        *("priority", "prompt_logprobs", "return_token_ids", "kv_transfer_params", "vllm_xargs", "chat_template"),
        *("add_generation_prompt", "echo", "guided_json", "structured_outputs", "min_tokens", "ignore_eos", "store"),
        *("functions", "modalities", "audio", "lora_path", "mm_processor_kwargs", "cache_salt", "request_id"),
    ],
)
async def test_an_unknown_parameter_is_400_by_name(house: House, engine: FakeEngine, param: str) -> None:
    answer = await house.chat(**{param: 1})
    says = f"Unsupported parameter: '{param}'"
    assert_error(answer, 400, "invalid_request_error", "unsupported_parameter", says, param=param)
    assert engine.chats == []


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("temperature", -0.1), ("temperature", 2.1), ("temperature", "warm"), ("temperature", float("nan"))),
        *(("top_p", 0), ("top_p", 1.1), ("top_k", "many"), ("top_k", 10**30), ("min_p", -0.1), ("min_p", 1.1)),
        *(("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0)),
        *(("n", 0), ("max_tokens", 0), ("max_completion_tokens", -1), ("top_logprobs", 21), ("seed", 2**63)),
        *(("seed", 1.5), ("stream", "maybe"), ("feedback", "sometimes"), ("messages", []), ("user", "x" * 201)),
        *(("stop", list("abcde")), ("stop", ["x", ""]), ("stop", ""), ("stop", [7])),
        *(("logit_bias", 3), ("tools", "hammer"), ("response_format", "json"), ("metadata", {"a": {}})),
    ],
)
async def test_a_value_out_of_range_is_400_by_name(house: House, engine: FakeEngine, param: str, value: object) -> None:
    answer = await house.chat(**{param: value})
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert error["param"].split(".")[0] == param
    assert error["message"].startswith(f"Invalid value for '{error['param']}': ")
    assert engine.chats == []


async def test_of_a_value_that_may_be_of_two_kinds_the_kind_that_was_meant_is_spoken_of(house: House) -> None:
    answer = await house.chat(stop=list("abcde"))
    assert_error(answer, 400, "invalid_request_error", "invalid_value", "at most 4 items", param="stop")
    answer = await house.chat(stop=["x", ""])
    assert_error(answer, 400, "invalid_request_error", "invalid_value", "at least 1 character", param="stop.1")


async def test_a_message_that_is_wrong_is_named_by_its_place(house: House) -> None:
    answer = await house.chat(messages=[{"role": "user", "content": "Hello"}, {"role": "wizard", "content": "Hm"}])
    assert_error(answer, 400, "invalid_request_error", "invalid_value", "'messages.1.role'", param="messages.1.role")


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
@pytest.mark.parametrize("nothing", [{}, {"content": None}], ids=["left out", "null"])
async def test_a_message_that_says_nothing_is_400(
    house: House, engine: FakeEngine, role: str, nothing: dict[str, Any]
) -> None:
    answer = await house.chat(messages=[{"role": "user", "content": "Hello"}, {"role": role} | nothing])
    says = f"a message of role '{role}' needs 'content'"
    assert_error(answer, 400, "invalid_request_error", "invalid_value", says, param="messages.1")
    assert engine.chats == []


async def test_of_many_wrong_parts_the_first_is_named_and_the_others_cost_nothing(house: House) -> None:
    """Each was looked for among all of them: 30,000 took hours, in which nobody was answered."""
    answer = await house.chat(messages=[{"role": "user", "content": [0] * 30_000}])
    assert_error(answer, 400, "invalid_request_error", "invalid_value", param="messages.0.content.0")
    answer = await house.chat(messages=[0] * 30_000)
    assert_error(answer, 400, "invalid_request_error", "invalid_value", param="messages.0")


async def test_who_has_no_key_sends_little(house: House) -> None:
    answer = await house.call("POST", "/sign-in", role=None, json={f"field {n}": 0 for n in range(1000)})
    assert_error(answer, 413, "invalid_request_error", "body_too_large", "8000 bytes")


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


BUSY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "names": (
        {"properties": {"deep": {"properties": {f"p{n}": {} for n in range(399)}}}},
        {"properties": {"deep": {"properties": {f"p{n}": {} for n in range(399)}}}, "enum": ["one more"]},
        "at most 400 properties and enum values here, and this one has 401",
    ),
    "parts": ({"anyOf": [{}] * 1998}, {"anyOf": [{}] * 2000}, "at most 2000 parts"),
    "depth": (nested(19), nested(20), "at most 40 objects and lists deep"),
    "a repetition": ({"pattern": "^[a-z]{1,1400}$"}, {"pattern": "^[a-z]{1,1501}$"}, "this one has 1501"),
    "a repetition of repetitions": (
        {"pattern": r"^((\d{1,3}\.){3}\d{1,3}|([0-9a-f]{1,4}:){7,7}[0-9a-f]{1,4})$"}, {"pattern": "(a{1,40}b){1,50}"},
        "this one has 2050",
    ),
    "a repetition of a long group": (
        {"pattern": "(" + "a" * 80 + "){1,15}"}, {"pattern": "(" + "a" * 100 + "){1,16}"}, "this one has 1600"
    ),
    "a long pattern": ({"pattern": "[a-z]?" * 700}, {"pattern": "[a-z]?" * 800}, "this one has 1600"),
    "a name's pattern": (
        {"patternProperties": {"^x{20}$": {}}}, {"patternProperties": {"(x{2000}|y)": {}}}, "this one has 2000"
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["response_format", "tools"])
@pytest.mark.parametrize(("taken", "refused", "says"), BUSY.values(), ids=BUSY)
async def test_a_schema_that_would_keep_the_engine_busy_is_400(
    house: House, engine: FakeEngine, where: str, taken: dict[str, Any], refused: dict[str, Any], says: str
) -> None:
    def asked(schema: dict[str, Any]) -> Any:
        if where == "tools":
            return [{"type": "function", "function": {"name": "look", "parameters": schema}}]
        return {"type": "json_schema", "json_schema": schema}

    assert (await house.chat(**{where: asked(taken)})).status == 200
    answer = await house.chat(**{where: asked(refused)})
    place = {"response_format": "response_format.json_schema", "tools": "tools.0.function.parameters"}[where]
    assert_error(answer, 400, "invalid_request_error", "invalid_value", says, param=place)
    assert len(engine.chats) == 1


async def test_of_tools_that_must_be_called_all_schemas_count_together(house: House, engine: FakeEngine) -> None:
    schema = {"properties": {f"p{n}": {} for n in range(201)}}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("look", "listen")]
    assert (await house.chat(tools=tools)).status == 200
    answer = await house.chat(tools=tools, tool_choice="required")
    assert_error(answer, 400, "invalid_request_error", "invalid_value", "this one has 402", param="tool_choice")
    assert len(engine.chats) == 1


async def test_a_part_that_is_not_text_is_400(house: House, engine: FakeEngine) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    answer = await house.chat(messages=[{"role": "user", "content": [image]}])
    assert_error(answer, 400, "invalid_request_error", "invalid_value", "'text'", param="messages.0.content.0.type")
    assert engine.chats == []


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look"}}
UNSHAPELY = {
    "tools, an object": ({"tools": TOOL}, "tools"),
    "a tool, a word": ({"tools": [TOOL, "look"]}, "tools.1"),
    "a tool of another type": ({"tools": [TOOL | {"type": "web_search"}]}, "tools.0.type"),
    "a tool without a type": ({"tools": [{"function": {"name": "look"}}]}, "tools.0.type"),
    "a tool without a function": ({"tools": [{"type": "function"}]}, "tools.0.function"),
    "a function, a word": ({"tools": [TOOL | {"function": "look"}]}, "tools.0.function"),
    "a function without a name": ({"tools": [TOOL | {"function": {"description": "x"}}]}, "tools.0.function.name"),
    "a function of no name": ({"tools": [TOOL | {"function": {"name": ""}}]}, "tools.0.function.name"),
    "a function's name, a number": ({"tools": [TOOL | {"function": {"name": 7}}]}, "tools.0.function.name"),
    "parameters, a list": (
        {"tools": [TOOL | {"function": {"name": "look", "parameters": []}}]},
        "tools.0.function.parameters",
    ),
    "a word beside the function": ({"tools": [TOOL | {"name": "look"}]}, "tools.0.name"),
    "another choice": ({"tool_choice": "always"}, "tool_choice"),
    "a choice, a number": ({"tool_choice": 7}, "tool_choice"),
    "a choice of another type": ({"tool_choice": {"type": "tool", "function": {"name": "look"}}}, "tool_choice.type"),
    "a choice without a function": ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    "a choice of no name": ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    "a choice with more": ({"tool_choice": TOOL | {"mode": "auto"}}, "tool_choice.mode"),
    "calls, an object": ({"tool_calls": CALL}, "tool_calls"),
    "a call, a word": ({"tool_calls": ["look"]}, "tool_calls.0"),
    "a call without an id": ({"tool_calls": [CALL | {"id": None}]}, "tool_calls.0.id"),
    "a call of another type": ({"tool_calls": [CALL | {"type": "custom"}]}, "tool_calls.0.type"),
    "a call of nothing": ({"tool_calls": [{"id": "call_1", "type": "function"}]}, "tool_calls.0.function"),
    "a call without a name": (
        {"tool_calls": [CALL | {"function": {"arguments": "{}"}}]},
        "tool_calls.0.function.name",
    ),
    "arguments, an object": (
        {"tool_calls": [CALL | {"function": {"name": "look", "arguments": {}}}]},
        "tool_calls.0.function.arguments",
    ),
}


@pytest.mark.parametrize(("parameters", "param"), UNSHAPELY.values(), ids=UNSHAPELY.keys())
async def test_tools_and_calls_of_another_shape_are_400_by_their_place(
    house: House, engine: FakeEngine, parameters: dict[str, Any], param: str
) -> None:
    if "tool_calls" in parameters:
        message = {"role": "assistant"} | parameters
        parameters, param = {"messages": [{"role": "user", "content": "Hello"}, message]}, f"messages.1.{param}"
    answer = await house.chat(**parameters)
    code = answer.json["error"]["code"]
    assert code in ("invalid_value", "missing_required_parameter", "unsupported_parameter")
    assert_error(answer, 400, "invalid_request_error", code, f"'{param}'", param=param)
    assert "_" not in answer.json["error"]["message"].replace(param, ""), "a class's name is shown"
    assert engine.chats == []


async def test_a_call_whose_arguments_are_no_json_does_not_end_the_conversation(
    house: House, engine: FakeEngine
) -> None:
    call = CALL | {"function": {"name": "look", "arguments": '{"at": '}, "index": 0}
    answer = await house.chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert answer.status == 200
    del call["index"]
    assert engine.chats[0].body["messages"] == [{"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    "value",
    [
        {"title": "\ud800"},
        {"maximum": 10**30},
    ],
    ids=["half a surrogate", "a huge number"],
)
async def test_what_cannot_be_passed_on_is_400(house: House, engine: FakeEngine, value: object) -> None:
    answer = await house.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": value}}])
    assert_error(answer, 400, "invalid_request_error", "invalid_value", "cannot be passed on")
    assert engine.chats == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("feedback", ["off", "always"])
@pytest.mark.parametrize(
    "parameters",
    [{"user": "\ud800"}, {"model": "\ud800"}, {"messages": [{"role": "user", "content": "\ud800"}]}],
    ids=lambda p: next(iter(p)),
)
async def test_half_a_character_is_400_wherever_it_stands(
    house: House, engine: FakeEngine, stream: bool, feedback: str, parameters: dict[str, Any]
) -> None:
    answer = await house.chat(stream=stream, feedback=feedback, **parameters)
    assert answer.status == 400
    assert answer.json["error"]["code"] == "invalid_value"
    assert engine.chats == []
    assert await house.rows("completions") == []


async def test_a_name_that_is_no_text_is_refused_as_any_other(house: House) -> None:
    answer = await post(house, b'{"model": "nightshift", "messages": [{"role": "user"}], "\\ud800": 1}')
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("param", "value", "rule"),
    [
        ("n", 3, "at most 2 choices"),
        ("max_tokens", 513, "at most 512 tokens"),
        ("max_completion_tokens", 513, "at most 512 tokens"),
        ("messages", [{"role": "user", "content": "Hello"}] * 101, "at most 100 messages"),
    ],
)
async def test_over_a_cap_is_400_and_says_the_cap(
    house: House, engine: FakeEngine, param: str, value: object, rule: str
) -> None:
    answer = await house.chat(**{param: value})
    assert_error(answer, 400, "invalid_request_error", "over_limit", f"'{param}'", rule, param=param)
    assert engine.chats == []


async def test_at_the_caps_it_is_answered(house: House) -> None:
    messages = [{"role": "user", "content": "Hello"}] * 100
    assert (await house.chat(n=2, max_tokens=512, max_completion_tokens=512, messages=messages)).status == 200


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
    ],
)
async def test_feedback_always_beside_what_cannot_be_compared_is_400(
    house: House, engine: FakeEngine, param: str, value: object
) -> None:
    answer = await house.chat(feedback="always", **{param: value})
    assert_error(answer, 400, "invalid_request_error", "incompatible_parameters", f"Leave out '{param}'", param=param)
    assert engine.chats == []


async def test_what_the_engine_refuses_is_400_in_its_words(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: Refusal(400, "This model's maximum context length is 64 tokens.", "messages")
    for stream in (False, True):
        answer = await house.chat(stream=stream)
        assert_error(
            answer,
            400,
            "invalid_request_error",
            "rejected_by_engine",
            "maximum context length is 64",
            param="messages",
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("feedback", ["off", "always"])
async def test_what_the_engine_refuses_does_not_speak_against_the_policy(
    house: House, engine: FakeEngine, stream: bool, feedback: str
) -> None:
    engine.answer = lambda body: Refusal(400, "This model's maximum context length is 64 tokens.")
    assert (await house.chat(stream=stream, feedback=feedback)).status == 400
    # A stream does not wait for what becomes of the second answer.
    assert {row["status"] for row in await house.rows("completions")} <= {"aborted"}


async def test_what_the_engine_refuses_without_json_is_400_all_the_same(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: Refusal(422, text="unprocessable")
    assert_error(await house.chat(), 400, "invalid_request_error", "rejected_by_engine", "unprocessable")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"choice": "c"}, "invalid_value", "choice"),
        ({"choice": "a", "comment": "x" * 2001}, "invalid_value", "comment"),
        ({"choice": "a", "why": ""}, "unsupported_parameter", "why"),
        ({}, "missing_required_parameter", "choice"),
    ],
)
async def test_a_vote_that_is_none_is_400_by_name(house: House, body: dict[str, str], code: str, param: str) -> None:
    answer = await house.call("POST", "/v1/comparisons/cmp_x/vote", json=body)
    assert_error(answer, 400, "invalid_request_error", code, f"'{param}'", param=param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"role": "king"}, "invalid_value", "role"),
        ({"role": "user", "feedback": "never"}, "invalid_value", "feedback"),
        ({"role": "user", "name": "Ada"}, "unsupported_parameter", "name"),
        ({}, "missing_required_parameter", "role"),
    ],
)
async def test_a_key_that_cannot_be_made_is_400_by_name(
    house: House, body: dict[str, str], code: str, param: str
) -> None:
    answer = await house.call("POST", "/v1/keys", role=Role.OPERATOR, json=body)
    assert_error(answer, 400, "invalid_request_error", code, f"'{param}'", param=param)


# 409, 410


async def pair(house: House) -> str:
    body = (await house.chat(feedback="always")).json
    comparison: str = body["comparison"]["id"]
    return comparison


async def test_a_late_change_of_a_vote_is_409_and_says_what_stands(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    house = await open_house(engine, comparisons={"vote_window_s": 0.0})
    comparison = await pair(house)
    assert (await house.vote(comparison, "a")).status == 200
    await asyncio.sleep(0.003)
    answer = await house.vote(comparison, "b")
    assert_error(answer, 409, "invalid_request_error", "vote_is_final", "You voted 'a'", "within 0 s")


async def test_a_vote_on_an_expired_comparison_is_410(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    house = await open_house(engine, comparisons={"expires_after_s": 0.001})
    comparison = await pair(house)
    await asyncio.sleep(0.003)
    answer = await house.vote(comparison, "a")
    assert_error(answer, 410, "invalid_request_error", "comparison_expired", comparison, "Ask again")


# 413


async def test_a_body_declared_too_large_is_413(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine, server={"max_body_bytes": 1024})
    answer = await house.chat(messages=[{"role": "user", "content": "x" * 1100}])
    assert_error(answer, 413, "invalid_request_error", "body_too_large", "larger than 1024 bytes", "shorter messages")
    assert engine.chats == []


async def test_a_body_declared_too_large_is_not_waited_for(house: House) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
    try:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        async with asyncio.timeout(5):
            status = await reader.readline()
    finally:
        writer.close()
        await writer.wait_closed()
    assert status.startswith(b"HTTP/1.1 413 ")


async def test_a_chunked_body_that_grows_too_large_is_413(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine, server={"max_body_bytes": 1024})

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model": "nightshift", "messages": [{"role": "user", "content": "'
        for _ in range(20):
            yield b"x" * 100
        yield b'"}]}'

    headers = {"Content-Type": "application/json"}
    answer = await house.call("POST", "/v1/chat/completions", data=pieces(), headers=headers)
    assert_error(answer, 413, "invalid_request_error", "body_too_large", "larger than 1024 bytes")
    assert engine.chats == []


async def test_a_body_of_just_the_limit_is_taken(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine, server={"max_body_bytes": 1024})
    empty = json.dumps({"model": "nightshift", "messages": [{"role": "user", "content": ""}]})
    body = empty.replace('"content": ""', f'"content": "{"x" * (1024 - len(empty))}"').encode()
    assert len(body) == 1024
    assert (await post(house, body)).status == 200
    assert (await post(house, body + b" ")).status == 413


# 500


async def test_a_mistake_of_ours_is_500_and_says_nothing_of_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: State) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("data.stats.summary", broken)
    answer = await house.call("GET", "/v1/stats", role=Role.OPERATOR)
    assert_error(answer, 500, "server_error", "internal", "the log has the details")
    assert b"secret detail" not in answer.body


# 502


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("die_after", [0, None])
async def test_an_engine_that_dies_before_the_answer_is_502(
    house: House, engine: FakeEngine, stream: bool, die_after: int | None
) -> None:
    engine.answer = lambda body: Reply(die_after=0) if die_after == 0 else Refusal(500, "Internal Server Error")
    answer = await house.chat(stream=stream)
    assert_error(answer, 502, "server_error", "engine_failed", "broke off", "try again")
    (row,) = await house.rows("completions")
    assert (row["status"], row["answer"]) == ("failed", "")


async def test_an_engine_that_dies_amid_a_body_is_502(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: Reply(die_after=40)
    assert_error(await house.chat(), 502, "server_error", "engine_failed", "broke off")
    (row,) = await house.rows("completions")
    assert (row["status"], row["answer"]) == ("failed", "")


WHOLE = whole_body("policy-0000", Reply())
CHOICE = WHOLE["choices"][0]
NO_ANSWERS = {
    "cut off": json.dumps(WHOLE).encode()[:-40],
    "not UTF-8": b'{"created": 1, "choices": "\xff"}',
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "without choices": json.dumps({name: value for name, value in WHOLE.items() if name != "choices"}).encode(),
    "no choice": json.dumps(WHOLE | {"choices": []}).encode(),
    "choices, an object": json.dumps(WHOLE | {"choices": CHOICE}).encode(),
    "a choice, a word": json.dumps(WHOLE | {"choices": ["Hi"]}).encode(),
    "a choice without a message": json.dumps(WHOLE | {"choices": [{"index": 0, "finish_reason": "stop"}]}).encode(),
    "a message, a word": json.dumps(WHOLE | {"choices": [CHOICE | {"message": "Hi"}]}).encode(),
    "content, a number": json.dumps(
        WHOLE | {"choices": [CHOICE | {"message": {"role": "assistant", "content": 7}}]}
    ).encode(),
    "an index, a word": json.dumps(WHOLE | {"choices": [CHOICE | {"index": "0"}]}).encode(),
    "an end, a number": json.dumps(WHOLE | {"choices": [CHOICE | {"finish_reason": 1}]}).encode(),
    "without usage": json.dumps({name: value for name, value in WHOLE.items() if name != "usage"}).encode(),
    "usage, null": json.dumps(WHOLE | {"usage": None}).encode(),
    "usage, words": json.dumps(WHOLE | {"usage": dict.fromkeys(WHOLE["usage"], "many")}).encode(),
    "a time, a word": json.dumps(WHOLE | {"created": "now"}).encode(),
}


@pytest.mark.parametrize("body", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
@pytest.mark.parametrize("feedback", ["off", "always"])
async def test_a_body_that_is_no_answer_is_502_and_never_logged_as_complete(
    house: House, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, body: bytes, feedback: str
) -> None:
    async def whole(*_: object) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    monkeypatch.setattr(engine, "_whole", whole)
    answer = await house.chat(feedback=feedback)
    assert_error(answer, 502, "server_error", "engine_failed", "none of vLLM's", "try again")
    assert {(row["status"], row["answer"]) for row in await house.rows("completions")} == {("failed", "")}
    assert await house.rows("comparisons") == []


async def test_a_stream_that_is_none_is_502_and_never_logged_as_complete(
    house: House, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stream(*_: object) -> web.Response:
        return web.Response(body=b"data: {broken\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    monkeypatch.setattr(engine, "_stream", stream)
    answer = await house.chat(stream=True)
    assert_error(answer, 502, "server_error", "engine_failed", "none of vLLM's")
    (row,) = await house.rows("completions")
    assert (row["status"], row["answer"]) == ("failed", "")


# 503


async def test_before_an_engine_is_ready_chat_is_503_with_retry_after(open_house: OpenHouse) -> None:
    house = await open_house(ready=False)
    for stream in (False, True):
        answer = await house.chat(stream=stream)
        assert_error(answer, 503, "service_unavailable_error", "engine_not_ready", "not ready yet", "Try again")
        assert int(answer.headers["Retry-After"]) > 0


async def test_when_the_only_engine_is_gone_chat_is_503_with_retry_after(house: House, engine: FakeEngine) -> None:
    await engine.stop()
    answer = await house.chat()
    assert_error(answer, 503, "service_unavailable_error", "engine_not_ready")
    assert "Retry-After" in answer.headers


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_engine_is_503_with_retry_after(
    house: House, engine: FakeEngine, status: int, stream: bool
) -> None:
    engine.answer = lambda body: Refusal(status, "The request queue is full.")
    answer = await house.chat(stream=stream)
    assert_error(answer, 503, "service_unavailable_error", "engine_overloaded", "All places are taken", "in a moment")
    assert answer.headers["Retry-After"] == "2"
    assert (await house.call("GET", "/readyz", role=None)).status == 200


async def test_an_engine_that_lost_the_policy_is_503_until_it_has_it_again(house: House, engine: FakeEngine) -> None:
    engine.adapters.clear()
    answer = await house.chat()
    assert_error(answer, 503, "service_unavailable_error", "engine_not_ready")
    await eventually(house.is_ready)
    assert (await house.chat()).status == 200


async def test_a_vote_that_the_disk_does_not_take_is_503_and_not_acknowledged(
    house: House, engine: FakeEngine, db: Database
) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    comparison = await pair(house)
    with database_locked(house, db):
        answer = await house.vote(comparison, "a")
    assert_error(answer, 503, "server_error", "storage_unavailable", "Nothing was acknowledged", "check the disk")
    assert answer.headers["Retry-After"] == "10"
    assert await house.rows("votes") == []
    assert (await house.vote(comparison, "a")).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_pair_that_the_disk_does_not_take_is_an_error_and_no_comparison(
    house: House, engine: FakeEngine, db: Database, stream: bool
) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    with database_locked(house, db):
        answer = await house.chat(feedback="always", stream=stream)
    if stream:
        assert json.loads(answer.events[-1])["error"]["code"] == "storage_unavailable"
    else:
        assert_error(answer, 503, "server_error", "storage_unavailable")
    assert await house.rows("comparisons") == []


async def test_a_plain_answer_is_given_even_when_it_cannot_be_logged(house: House, db: Database) -> None:
    async def lost() -> bool:
        metrics = await house.call("GET", "/metrics", role=None)
        return b"nightshift_lost_writes_total 1.0" in metrics.body

    with database_locked(house, db):
        assert (await house.chat()).status == 200
        await eventually(lost)
    assert await house.rows("completions") == []


async def test_a_record_that_cannot_be_read_is_503_and_the_reason_is_in_the_log(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(keys, "authenticate", broken)
    answer = await house.call("GET", "/v1/models")
    assert_error(answer, 503, "server_error", "storage_unavailable", "check the disk")
    assert answer.headers["Retry-After"] == "10"
    assert b"disk I/O error" not in answer.body
    assert "disk I/O error" in caplog.text


# 504, and what happens amid a stream


@pytest.mark.parametrize("feedback", ["off", "always"])
async def test_an_answer_over_the_time_limit_is_504_and_stopped(
    open_house: OpenHouse, engine: FakeEngine, time_is_up: Callable[[], None], feedback: str
) -> None:
    house = await open_house(engine, chat={"timeout_s": LIMIT_S})
    engine.answer = lambda body: Reply(hold_after=0)
    asking = asyncio.create_task(house.chat(feedback=feedback))
    await eventually(lambda: len(engine.chats) == (2 if feedback == "always" else 1))
    time_is_up()
    answer = await asking
    assert_error(answer, 504, "timeout_error", "timeout", "longer than 123 s", "fewer tokens")
    assert answer.headers["x-should-retry"] == "false", "OpenAI's client would have it written twice more"
    await eventually(lambda: all(chat.cut_off for chat in engine.chats))
    rows = await house.rows("completions")
    assert {row["status"] for row in rows} == {"aborted"}


@pytest.mark.parametrize("feedback", ["off", "always"])
async def test_a_stream_over_the_time_limit_ends_with_an_error_event(
    open_house: OpenHouse, engine: FakeEngine, time_is_up: Callable[[], None], feedback: str
) -> None:
    house = await open_house(engine, chat={"timeout_s": LIMIT_S})
    engine.answer = lambda body: say("One", " two", hold_after=1)
    async with house.open_chat(stream=True, feedback=feedback) as response:
        seen = b""
        while seen.count(b"One") < (2 if feedback == "always" else 1):
            seen += await response.content.readany()
        time_is_up()
        answer = Answer(response.status, {}, seen + await response.content.read())
    assert answer.status == 200
    assert answer.streamed() == "One"
    error = json.loads(answer.events[-1])["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    await eventually(lambda: all(chat.cut_off for chat in engine.chats))
    rows = await house.rows("completions")
    assert {(row["status"], row["answer"]) for row in rows} == {("aborted", "One")}
    assert await house.rows("comparisons") == []


BROKEN_OFF = {
    "the socket closes": Reply(choices=[["One", " two", " three"]], die_after=2),
    "vLLM says that its engine died": Reply(choices=[["One", " two", " three"]], error_after=2),
    "the stream ends early": Reply(choices=[["One", " two", " three"]], silent_end_after=2),
}


@pytest.mark.parametrize("reply", BROKEN_OFF.values(), ids=BROKEN_OFF.keys())
async def test_an_engine_that_dies_amid_a_stream_ends_it_with_an_error_event(
    house: House, engine: FakeEngine, reply: Reply
) -> None:
    engine.answer = lambda body: reply
    answer = await house.chat(stream=True)
    assert answer.status == 200
    assert answer.streamed() == "One two"
    last = json.loads(answer.events[-1])
    assert last.keys() == {"error"}
    assert last["error"].keys() == {"message", "type", "code", "param"}
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "engine_failed")
    assert "try again" in last["error"]["message"]
    (row,) = await house.rows("completions")
    assert (row["status"], row["answer"], row["finish_reason"]) == ("failed", "One two", None)
    engine.answer = lambda body: Reply()
    await eventually(house.is_ready)
    assert (await house.chat()).status == 200
