"""What a chat request may hold: OpenAI's schema as far as vLLM serves it, and `feedback`."""

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


def _is_not_too_much(schema: dict[str, Any]) -> dict[str, Any]:
    names, left = 0, [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            names += len(part["properties"]) if isinstance(part.get("properties"), dict) else 0
            names += len(part["enum"]) if isinstance(part.get("enum"), list) else 0
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if names > MOST_NAMES:
        raise ValueError(f"a schema has at most {MOST_NAMES} properties and enum values here, and this one has {names}")
    return schema


MOST_NAMES = 400
"""What vLLM makes of a schema takes the cube of them: .2 s for so many, half a minute for three times as many, while
every other request with a schema waits and nothing stops it."""
_Schema = Annotated[dict[str, Any], AfterValidator(_is_not_too_much)]


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
    metadata: dict[str, str] | None = None

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
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
