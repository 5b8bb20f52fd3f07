"""What a chat request may hold: OpenAI's schema as far as vLLM serves it, and `feedback`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

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
three times as many, while every other request with a schema waits and nothing stops it."""
MOST_PARTS = 2000
MOST_DEEP = 40
"""Of objects and lists in one another: the cube again, 10 s for 380."""
MOST_WRITTEN_OUT = 1500
"""What patterns come to with all repetitions written out: the square, 5 s for 5,000 of {1,5000}, which stands in
vLLM's event loop so that no answer moves, and 17 s for 2,000 of "[a-z]?"."""
_PIECES = re.compile(
    r"\\.|\[(?:\\.|[^\]\\])*\]|(?P<open>\()|(?P<close>\))|\{(?P<least>\d+)\s*(?:,\s*(?P<most>\d*)\s*)?\}|.", re.S
)


def _is_not_too_much(*schemas: dict[str, Any]) -> None:
    names = parts = written_out = 0
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
            written_out += sum(map(_length, (part.get("pattern"), *(patterns if isinstance(patterns, dict) else ()))))
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        left += [(one, depth + 1) for one in inner]
    for count, most, what in (
        (names, MOST_NAMES, "properties and enum values"),
        (parts, MOST_PARTS, "parts"),
        (written_out, MOST_WRITTEN_OUT, "characters in patterns with their repetitions written out"),
    ):
        if count > most:
            raise ValueError(f"a schema has at most {most} {what} here, and this one has {count}")


def _length(pattern: Any) -> int:
    """Of a pattern, in characters and classes of them, with its counted repetitions written out."""
    if not isinstance(pattern, str):
        return 0
    if len(pattern) > 10 * MOST_WRITTEN_OUT:
        return len(pattern)
    groups, last = [0], 0
    for piece in _PIECES.finditer(pattern):
        if piece["open"]:
            groups.append(0)
        elif piece["close"] and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif piece["least"]:
            times = max(int(piece["most"] or piece["least"]), 1)
            groups[-1] += last * (times - 1)
            last *= times
            if last > MOST_WRITTEN_OUT:
                return last
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)


def _checked(schema: dict[str, Any]) -> dict[str, Any]:
    _is_not_too_much(schema)
    return schema


_Schema = Annotated[dict[str, Any], AfterValidator(_checked)]


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: _Schema | None = None
    strict: bool | None = None


class _Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: _Function


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
    tools: Annotated[list[_Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None

    @field_validator("tool_choice")
    @classmethod
    def _is_not_too_much_in_all(cls, choice: object, info: ValidationInfo) -> object:
        if choice == "required":  # vLLM makes one schema of all tools then
            _is_not_too_much(*(tool.function.parameters or {} for tool in info.data.get("tools") or ()))
        return choice
