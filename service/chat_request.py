"""What a chat request may hold: OpenAI's schema as far as vLLM serves it, and `feedback`."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from data.types import Feedback, MessageRole


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class _Called(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    arguments: str
    """JSON as a model wrote it, so perhaps none: a conversation that holds it must go on all the same."""


class _ToolCall(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: str
    type: Literal["function"]
    function: _Called


class _Message(BaseModel):
    # What an assistant message of ours carries beyond these fields may be sent back, and says nothing.
    model_config = ConfigDict(extra="ignore")
    role: MessageRole
    content: str | Annotated[list[_Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[_ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' needs 'content'")
        if self.content is None and not self.tool_calls:
            self.content = ""  # what a model says that is cut off while it thinks
        return self


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


MOST_TOOLS = 128
MOST_NAMES = 400
"""Properties and enum values. What vLLM makes of a schema takes the cube of them: .2 s for so many, half a minute for
three times as many, while every other request with a schema waits and nothing stops it. With a tool that must be called
it makes one schema of all tools."""
MOST_PARTS = 2000
MOST_DEEP = 40
"""Of objects and lists in one another: the cube again, 10 s for 380."""
MOST_REPEATED = 1000
"""What a pattern's {m,n} ask for, and groups in groups multiply: the square, 5 s for 5,000, and in vLLM's event loop,
so that every answer stands still."""
_REPEATED = re.compile(r"(\))?\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}")


def _are_not_too_much(schemas: Iterable[dict[str, Any]]) -> None:
    names = parts = repeated = 0
    left: list[tuple[Any, int]] = [(schema, 1) for schema in schemas]
    while left:
        part, depth = left.pop()
        if depth > MOST_DEEP:
            raise ValueError(f"a schema is at most {MOST_DEEP} objects and lists deep here, and this one is deeper")
        if isinstance(part, dict):
            parts += 1
            names += len(part["properties"]) if isinstance(part.get("properties"), dict) else 0
            names += len(part["enum"]) if isinstance(part.get("enum"), list) else 0
            patterns = part.get("patternProperties")
            repeated += sum(map(_repeats, (part.get("pattern"), *(patterns if isinstance(patterns, dict) else ()))))
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        left += [(one, depth + 1) for one in inner]
    for count, most, what in (
        (names, MOST_NAMES, "properties and enum values"),
        (parts, MOST_PARTS, "parts"),
        (repeated, MOST_REPEATED, "repetitions {m,n} in patterns, a group's times what is in it"),
    ):
        if count > most:
            raise ValueError(f"a request's schemas have at most {most} {what} here, and these have {count}")


def _repeats(pattern: Any) -> int:
    """What a pattern's counted repetitions come to, written out, as from above: groups as if each held all the others
    and the whole pattern, of which ten characters cost as much as one repetition."""
    single, groups = 0, 1
    for group, least, most in _REPEATED.findall(pattern) if isinstance(pattern, str) else ():
        count = int(most or least)
        if group:
            groups *= max(count, 1)
        else:
            single += count
    return (single + 1 + len(pattern) // 10) * groups if groups > 1 else single


def _is_not_too_much(schema: dict[str, Any]) -> dict[str, Any]:
    _are_not_too_much([schema])
    return schema


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[dict[str, Any], AfterValidator(_is_not_too_much)] | None = None


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: _Function


def _tools_are_not_too_much(tools: list[_Tool]) -> list[_Tool]:
    _are_not_too_much(tool.function.parameters or {} for tool in tools)
    return tools


class _FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


class _ToolChoice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: _FunctionName


_Stop = Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel):
    """OpenAI's request, as far as vLLM serves it, and `feedback`. What is not named here is refused by name."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: Annotated[str, Field(max_length=200)]
    messages: Annotated[list[_Message], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    feedback: Feedback | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=300)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _ResponseFormat | None = None
    tools: (
        Annotated[list[_Tool], Field(fail_fast=True, max_length=MOST_TOOLS), AfterValidator(_tools_are_not_too_much)]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
