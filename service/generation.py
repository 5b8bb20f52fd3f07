"""One generation: what the engine is asked, what it said, and what goes on record of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data import completions
from data.ids import new_id
from data.types import Completion, CompletionStatus, Key, timestamp
from service import pairing, sse
from service.errors import ApiError, engine_failed
from service.state import State


@dataclass(slots=True)
class Call:
    """One request on its way: what every answer to it has in common."""

    state: State
    key: Key
    user: str
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    serving: str
    stream: bool
    include_usage: bool
    plan: pairing.PairPlan | None
    draws: int
    """How many answers are drawn where one is given: the best of them."""
    started: float


@dataclass
class Answer:
    """One generation: asked of one policy, and what became of it."""

    id: str
    policy: str
    sampling: dict[str, Any]
    request: bytes
    """What the engine is asked."""
    created_at: str
    status: CompletionStatus = CompletionStatus.ABORTED
    refused: bool = False
    """The engine did not take the request: no answer was begun, and there is none to put on record."""
    first_token_ms: float | None = None
    total_ms: float = 0.0
    usage: dict[str, int] | None = None
    whole: "EngineAnswer | None" = None
    """Of an answer that does not stream, all that the engine said."""
    read: Callable[[], dict[int, dict[str, Any]]] = dict
    """Reads what was said, as far as it came: of a stream, all its JSON."""

    @cached_property
    def choices(self) -> dict[int, dict[str, Any]]:
        """{index: {"content", "tool_calls", "finish_reason"}}, read once the answer has ended."""
        return self.read()

    @property
    def text(self) -> str:
        return self.choices.get(0, {}).get("content") or ""


class _FromEngine(BaseModel):
    """What is passed on of vLLM's answer to a request that does not stream."""

    model_config = ConfigDict(strict=True)


class _EngineMessage(_FromEngine):
    role: str
    content: str | None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None


class EngineChoice(_FromEngine):
    index: int
    message: _EngineMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    """The text of `stop` that it came to, or a token; None for the model's own end."""


class _EngineUsage(_FromEngine):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class EngineAnswer(_FromEngine):
    created: int
    choices: Annotated[list[EngineChoice], Field(min_length=1)]
    usage: _EngineUsage


def begin(call: Call, policy: str, *, priority: int = 0, **more_sampling: Any) -> Answer:
    """`priority`: 0 for what people wait for, 1 for what may come after that."""
    sampling = call.sampling | more_sampling
    request = sampling | {"model": policy, "messages": call.messages, "priority": priority}
    if call.stream:
        request |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        return Answer(new_id("cpl"), policy, sampling, orjson.dumps(request), timestamp())
    except orjson.JSONEncodeError as error:  # json reads more than can be written: half surrogates, numbers of any size
        raise ApiError(400, f"The request holds what cannot be passed on: {error}.", code="invalid_value") from None


async def complete(call: Call, answer: Answer) -> None:
    """Read the engine's whole answer to one request that does not stream, within the time limit."""
    try:
        async with _time_limit(call), call.state.engines.chat(answer.policy, answer.request) as upstream:
            whole = EngineAnswer.model_validate_json(await upstream.read())
    except ValidationError as error:
        answer.status = CompletionStatus.FAILED
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise engine_failed(f"its answer is none of vLLM's: {place} {first['msg']}") from None
    except ApiError as error:
        _note_failure(answer, error)
        raise
    answer.read = lambda: {
        choice.index: {
            "content": choice.message.content,
            "tool_calls": choice.message.tool_calls,
            "finish_reason": sse.end_of(choice.finish_reason, choice.stop_reason),
        }
        for choice in whole.choices
    }
    answer.usage = whole.usage.model_dump()
    answer.whole = whole
    answer.status = CompletionStatus.COMPLETE
    answer.total_ms = elapsed_ms(call)


async def forward(call: Call, answer: Answer, rewrite: sse.Rewriter, send: sse.SendBytes) -> None:
    """Send one upstream stream on, chunk by chunk, up to its end, within the time limit."""
    answer.read = rewrite.transcripts
    try:
        async with _time_limit(call), call.state.engines.chat(answer.policy, answer.request) as upstream:
            async for events in sse.read_events(upstream):
                chunk = rewrite(events)
                if chunk:
                    if answer.first_token_ms is None:
                        answer.first_token_ms = elapsed_ms(call)
                    await send(chunk)
            if not rewrite.ended:
                raise engine_failed("the stream ended early")
            answer.status = CompletionStatus.COMPLETE
    except ApiError as error:
        _note_failure(answer, error)
        raise
    finally:
        answer.usage = rewrite.usage
        answer.total_ms = elapsed_ms(call)


def _note_failure(answer: Answer, error: ApiError) -> None:
    # A request that vLLM will not have (400), or has no place for (503), must not speak against the policy: clients
    # bring either about. One that took too long (504) was broken off.
    if error.status_code == 502:
        answer.status = CompletionStatus.FAILED
    elif error.status_code != 504:
        answer.refused = True


@asynccontextmanager
async def _time_limit(call: Call) -> AsyncIterator[None]:
    seconds = call.state.settings.chat.timeout_s
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise ApiError(
            504,
            f"The answer took longer than {seconds:g} s and was stopped. Ask for fewer tokens.",
            type="timeout_error",
            code="timeout",
            again=False,
        ) from error


def elapsed_ms(call: Call) -> float:
    return round((time.perf_counter() - call.started) * 1000, 3)


def rows(call: Call, answer: Answer) -> list[Completion]:
    """One row for every choice."""
    usage = answer.usage or {}
    choices = answer.choices or {0: {}}
    return [
        Completion(
            id=answer.id if index == 0 else new_id("cpl"),
            key_id=call.key.id,
            user=call.user,
            conversation=completions.conversation_of(call.user, call.messages),
            messages=call.messages,
            answer=choice.get("content") or "",
            tool_calls=choice.get("tool_calls") or None,
            policy=answer.policy,
            sampling=answer.sampling,
            status=answer.status,
            finish_reason=choice.get("finish_reason"),
            prompt_tokens=usage.get("prompt_tokens"),
            # vLLM counts the tokens of all choices together.
            completion_tokens=usage.get("completion_tokens") if len(choices) == 1 else None,
            first_token_ms=answer.first_token_ms,
            total_ms=answer.total_ms or elapsed_ms(call),
            created_at=answer.created_at,
        )
        for index, choice in sorted(choices.items())
    ]


def log(call: Call, answer: Answer) -> None:
    """Put the answer on record, in the event loop's next turn: the last bytes leave first, and what was said is read
    after them."""
    if not answer.refused:
        asyncio.get_running_loop().call_soon(_hand_to_writer, call, answer)


def _hand_to_writer(call: Call, answer: Answer) -> None:
    found = rows(call, answer)
    count(call, answer, len(found))

    def write(db: Any) -> None:
        for row in found:
            completions.insert(db, row)

    call.state.write_later(write)


def count(call: Call, answer: Answer, choices: int) -> None:
    call.state.metrics.completions.labels(answer.status).inc(choices)
    if answer.first_token_ms is not None:
        call.state.metrics.first_token_s.observe(answer.first_token_ms / 1000)
