"""POST /v1/chat/completions: one answer, or two side by side and a question which is better."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data import comparisons, completions
from data.ids import new_id
from data.types import (
    Comparison,
    Completion,
    CompletionStatus,
    DuelKind,
    Feedback,
    Key,
    Role,
    timestamp,
)
from service import pairing, sse
from service.auth import needs
from service.chat_request import ChatRequest
from service.errors import ApiError, engine_failed, not_ready
from service.state import State, state_of

router = APIRouter()


_NOT_SAMPLING = {"model", "messages", "stream", "stream_options", "feedback", "user", "metadata"}


@dataclass(slots=True)
class _Call:
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
    started: float


@dataclass
class _Answer:
    """One generation: asked of one policy, and what became of it."""

    id: str
    policy: str
    sampling: dict[str, Any]
    request: bytes
    """What the engine is asked."""
    created_at: str
    status: CompletionStatus = CompletionStatus.ABORTED
    first_token_ms: float | None = None
    total_ms: float = 0.0
    usage: dict[str, int] | None = None
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


class _EngineChoice(_FromEngine):
    index: int
    message: _EngineMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None


class _EngineUsage(_FromEngine):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _EngineAnswer(_FromEngine):
    created: int
    choices: Annotated[list[_EngineChoice], Field(min_length=1)]
    usage: _EngineUsage


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, key: Annotated[Key, needs(Role.USER)]
) -> Response:
    """Answer, streaming or not. Where `feedback` leads to a comparison there are two choices and a `comparison`."""
    call = _prepare(state_of(request), body, key)
    if call.stream:
        respond = _stream_pair if call.plan else _stream_plain
        return sse.EventStream(lambda send: respond(call, send))
    answer = _answer_pair if call.plan else _answer_plain
    try:
        return Response(await sse.unless_gone(request.receive, answer(call)), media_type="application/json")
    except sse.ClientGone:
        return Response(status_code=499)  # nobody reads it


def _prepare(state: State, body: ChatRequest, key: Key) -> _Call:
    """Check the caps, and decide whether to ask."""
    caps = state.settings.chat
    if body.model != caps.model_name:
        raise ApiError(
            404,
            f"There is no model '{body.model}' here; the one that serves is called '{caps.model_name}'.",
            code="model_not_found",
            param="model",
        )
    if len(body.messages) > caps.max_messages:
        raise _over_cap("messages", f"at most {caps.max_messages} messages are taken")
    for param in ("max_tokens", "max_completion_tokens"):
        if (getattr(body, param) or 0) > caps.max_tokens:
            raise _over_cap(param, f"an answer has at most {caps.max_tokens} tokens here")
    if (body.n or 1) > caps.max_n:
        raise _over_cap("n", f"at most {caps.max_n} choices are given")
    if not state.engines.ready:
        raise not_ready()

    given = body.model_dump(exclude_none=True)
    sampling = {name: value for name, value in given.items() if name not in _NOT_SAMPLING}
    if not body.max_tokens and not body.max_completion_tokens:
        sampling["max_tokens"] = min(caps.max_tokens, state.engines.context_length or caps.max_tokens)
    user = f"{key.id}/{body.user}" if body.user else key.id
    return _Call(
        state=state,
        key=key,
        user=user,
        messages=given["messages"],
        sampling=sampling,
        serving=state.engines.serving,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        plan=_plan(state, body, key, user, state.engines.serving),
        started=time.perf_counter(),
    )


def _over_cap(param: str, rule: str) -> ApiError:
    return ApiError(400, f"Invalid value for '{param}': {rule}.", code="over_limit", param=param)


def _plan(state: State, body: ChatRequest, key: Key, user: str, serving: str) -> pairing.PairPlan | None:
    feedback = body.feedback or key.feedback
    # Only two free texts can be compared: `auto` leaves other requests alone, `always` says so.
    uncomparable = next((p for p in ("tools", "response_format") if getattr(body, p)), None)
    if (body.n or 1) > 1:
        uncomparable = "n"
    if uncomparable:
        if body.feedback is Feedback.ALWAYS:
            raise ApiError(
                400,
                f"'{uncomparable}' and feedback 'always' do not go together: a comparison is of two free texts."
                f" Leave out '{uncomparable}', or set feedback to 'off'.",
                code="incompatible_parameters",
                param=uncomparable,
            )
        return None
    if feedback is Feedback.OFF or (feedback is Feedback.AUTO and body.temperature == 0):
        return None
    settings = state.settings.comparisons
    shown, turns = comparisons.shown_lately(state.reader, user, cooldown=settings.cooldown_turns)
    if not pairing.wants_pair(feedback, settings, shown_today=shown, turns_since=turns, rng=state.rng):
        return None
    duel = state.hot_swap.duel_beside(serving)
    gate = state.settings.gate
    share = gate.duel_share if duel and duel.kind is DuelKind.TRIAL else gate.watch_share
    return pairing.plan_pair(serving, seed=body.seed, rng=state.rng, duel=duel, share=share)


# One answer


async def _answer_plain(call: _Call) -> bytes:
    answer = _begin(call, call.serving)
    try:
        async with _time_limit(call):
            engine_answer = await _complete(call, answer)
    finally:
        _log(call, answer)
    return orjson.dumps(
        {
            "id": answer.id,
            "object": "chat.completion",
            "created": engine_answer.created,
            "model": call.state.settings.chat.model_name,
            "choices": [_choice(choice, choice.index) for choice in engine_answer.choices],
            "usage": answer.usage,
            "system_fingerprint": answer.policy,
        }
    )


async def _stream_plain(call: _Call, send: sse.SendBytes) -> None:
    answer = _begin(call, call.serving)
    rewrite = sse.Rewriter(id=answer.id, model=call.state.settings.chat.model_name, fingerprint=answer.policy)
    try:
        async with _time_limit(call):
            await _forward(call, answer, rewrite, send)
        end = sse.DONE
        if call.include_usage and answer.usage:
            end = sse.event(_last_chunk(call, answer.id, rewrite.created, answer.policy, [answer])) + end
        await send(end, last=True)
    finally:
        _log(call, answer)


# Two answers


async def _answer_pair(call: _Call) -> bytes:
    pair = _begin_pair(call)
    try:
        async with _time_limit(call):
            results = await asyncio.gather(*(_complete(call, answer) for answer in pair), return_exceptions=True)
    except BaseException:
        for answer in pair:
            _log(call, answer)
        raise
    given = [result for result in results if isinstance(result, _EngineAnswer)]
    errors = [result for result in results if isinstance(result, BaseException)]
    if not given or not all(isinstance(error, ApiError) for error in errors):
        for answer in pair:
            _log(call, answer)
        raise errors[0]
    asked = await _log_pair(call, pair)
    whole = [answer for answer in pair if answer.status is CompletionStatus.COMPLETE]
    shown = whole if asked else whole[:1]
    response = {
        "id": shown[0].id,
        "object": "chat.completion",
        "created": given[0].created,
        "model": call.state.settings.chat.model_name,
        "choices": [_choice(one.choices[0], index) for index, one in enumerate(given[: len(shown)])],
        "usage": _sum_usage(shown),
        "system_fingerprint": None if asked else shown[0].policy,
    }
    if asked:
        response["comparison"] = asked
    return orjson.dumps(response)


async def _stream_pair(call: _Call, send: sse.SendBytes) -> None:
    pair = _begin_pair(call)
    model = call.state.settings.chat.model_name
    rewriters = [sse.Rewriter(id=pair[0].id, model=model, fingerprint=None, index=index) for index in (0, 1)]
    readers = [
        asyncio.create_task(_forward(call, answer, rewrite, send))
        for answer, rewrite in zip(pair, rewriters, strict=True)
    ]
    try:
        async with _time_limit(call):
            # The first answer is the one that stays if the other fails, so its failure is the request's.
            await asyncio.wait(readers, return_when=asyncio.FIRST_EXCEPTION)
            await readers[0]
            await asyncio.wait(readers)
            if (error := readers[1].exception()) and not isinstance(error, ApiError):
                raise error  # a fault of ours; an engine's makes the first a plain answer
    except BaseException:
        for reader in readers:
            reader.cancel()
        try:
            await asyncio.gather(*readers, return_exceptions=True)
        finally:  # the client may leave just now
            for answer in pair:
                _log(call, answer)
        raise
    asked = await _log_pair(call, pair)
    last = _last_chunk(call, pair[0].id, rewriters[0].created, None if asked else pair[0].policy, pair)
    if asked:
        last["comparison"] = asked
    await send(sse.event(last) + sse.DONE, last=True)


def _begin_pair(call: _Call) -> list[_Answer]:
    assert call.plan is not None
    return [_begin(call, policy, seed=seed) for policy, seed in zip(call.plan.policies, call.plan.seeds, strict=True)]


async def _log_pair(call: _Call, pair: list[_Answer]) -> dict[str, str] | None:
    """Put both answers on disk and, where they can be compared, the comparison; what the client is told of it."""
    assert call.plan is not None
    a, b = pair
    both_whole = a.status is b.status is CompletionStatus.COMPLETE
    if not both_whole or pairing.same_text(a.text, b.text):
        for answer in pair:
            _log(call, answer)
        return None
    comparison = Comparison(
        id=new_id("cmp"),
        key_id=call.key.id,
        a=a.id,
        b=b.id,
        kind=call.plan.kind,
        swapped=call.plan.swapped,
        created_at=timestamp(),
        expires_at=timestamp(plus_s=call.state.settings.comparisons.expires_after_s),
        duel_id=call.plan.duel_id,
    )
    rows = [row for answer in pair for row in _rows(call, answer)]

    def write(db: Any) -> None:
        for row in rows:
            completions.insert(db, row)
        comparisons.insert(db, comparison)

    await call.state.write(write)
    for answer in pair:
        _count(call, answer, 1)
    call.state.metrics.comparisons.inc()
    return {"id": comparison.id, "expires_at": comparison.expires_at}


# What both share


def _begin(call: _Call, policy: str, **more_sampling: Any) -> _Answer:
    sampling = call.sampling | more_sampling
    request = sampling | {"model": policy, "messages": call.messages, "priority": 0}
    if call.stream:
        request |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        return _Answer(new_id("cpl"), policy, sampling, orjson.dumps(request), timestamp())
    except orjson.JSONEncodeError as error:  # json reads more than can be written: half surrogates, numbers of any size
        raise ApiError(400, f"The request holds what cannot be passed on: {error}.", code="invalid_value") from None


async def _complete(call: _Call, answer: _Answer) -> _EngineAnswer:
    """The engine's whole answer to one request that does not stream."""
    try:
        async with call.state.engines.chat(answer.policy, answer.request) as upstream:
            whole = _EngineAnswer.model_validate_json(await upstream.read())
    except ValidationError as error:
        answer.status = CompletionStatus.FAILED
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise engine_failed(f"its answer is none of vLLM's: {place} {first['msg']}") from None
    except ApiError:
        answer.status = CompletionStatus.FAILED
        raise
    answer.read = lambda: {
        choice.index: {
            "content": choice.message.content,
            "tool_calls": choice.message.tool_calls,
            "finish_reason": choice.finish_reason,
        }
        for choice in whole.choices
    }
    answer.usage = whole.usage.model_dump()
    answer.status = CompletionStatus.COMPLETE
    answer.total_ms = _elapsed_ms(call)
    return whole


async def _forward(call: _Call, answer: _Answer, rewrite: sse.Rewriter, send: sse.SendBytes) -> None:
    """Send one upstream stream on, chunk by chunk, up to its end."""
    answer.read = rewrite.transcripts
    try:
        async with call.state.engines.chat(answer.policy, answer.request) as upstream:
            async for events in sse.read_events(upstream):
                chunk = rewrite(events)
                if chunk:
                    if answer.first_token_ms is None:
                        answer.first_token_ms = _elapsed_ms(call)
                    await send(chunk)
            if not rewrite.ended:
                raise engine_failed("the stream ended early")
            answer.status = CompletionStatus.COMPLETE
    except ApiError:
        answer.status = CompletionStatus.FAILED
        raise
    finally:
        answer.usage = rewrite.usage
        answer.total_ms = _elapsed_ms(call)


@asynccontextmanager
async def _time_limit(call: _Call) -> AsyncIterator[None]:
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
        ) from error


def _elapsed_ms(call: _Call) -> float:
    return round((time.perf_counter() - call.started) * 1000, 3)


def _choice(choice: _EngineChoice, index: int) -> dict[str, Any]:
    said = choice.message
    message: dict[str, Any] = {"role": said.role, "content": said.content, "refusal": said.refusal}
    if said.tool_calls:
        message["tool_calls"] = said.tool_calls
    if said.reasoning:
        message["reasoning"] = said.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": choice.logprobs,
        "finish_reason": choice.finish_reason,
    }


def _sum_usage(answers: list[_Answer]) -> dict[str, int]:
    usages = [answer.usage for answer in answers if answer.usage]
    return {name: sum(usage[name] for usage in usages) for name in usages[0]} if usages else {}


def _last_chunk(call: _Call, id: str, created: int, fingerprint: str | None, answers: list[_Answer]) -> dict[str, Any]:
    chunk: dict[str, Any] = {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": call.state.settings.chat.model_name,
        "system_fingerprint": fingerprint,
        "choices": [],
    }
    if call.include_usage:
        chunk["usage"] = _sum_usage(answers)
    return chunk


def _rows(call: _Call, answer: _Answer) -> list[Completion]:
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
            total_ms=answer.total_ms or _elapsed_ms(call),
            created_at=answer.created_at,
        )
        for index, choice in sorted(choices.items())
    ]


def _log(call: _Call, answer: _Answer) -> None:
    """Put the answer on record, in the event loop's next turn: the last bytes leave first, and what was said is read
    after them."""
    asyncio.get_running_loop().call_soon(_hand_to_writer, call, answer)


def _hand_to_writer(call: _Call, answer: _Answer) -> None:
    rows = _rows(call, answer)
    _count(call, answer, len(rows))

    def write(db: Any) -> None:
        for row in rows:
            completions.insert(db, row)

    call.state.write_later(write)


def _count(call: _Call, answer: _Answer, choices: int) -> None:
    call.state.metrics.completions.labels(answer.status).inc(choices)
    if answer.first_token_ms is not None:
        call.state.metrics.first_token_s.observe(answer.first_token_ms / 1000)
