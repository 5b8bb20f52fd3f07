"""POST /v1/chat/completions: one answer, or two side by side and a question which is better."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response

from data import comparisons, completions
from data.ids import new_id
from data.types import (
    Comparison,
    ComparisonKind,
    CompletionStatus,
    DuelKind,
    Feedback,
    Key,
    Role,
    timestamp,
)
from service import generation, pairing, sse
from service.auth import needs
from service.chat_request import ChatRequest
from service.errors import ApiError, model_not_found, not_ready
from service.generation import Answer, Call, EngineChoice
from service.state import State, state_of

router = APIRouter()

_NOT_SAMPLING = {"model", "messages", "stream", "stream_options", "feedback", "user", "metadata"}


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, key: Annotated[Key, needs(Role.USER)]
) -> Response:
    """Answer, streaming or not. Where `feedback` leads to a comparison there are two choices and a `comparison`."""
    call = _prepare(state_of(request), body, key)
    if call.stream:
        respond = _stream_best if call.draws > 1 else _stream_plain
        if call.plan:
            respond = _stream_active if call.plan.more_seeds else _stream_pair
        return sse.EventStream(lambda send: respond(call, send))
    answer = _answer_pair if call.plan else _answer_best if call.draws > 1 else _answer_plain
    try:
        return Response(await sse.unless_gone(request.receive, answer(call)), media_type="application/json")
    except sse.ClientGone:
        return Response(status_code=499)  # nobody reads it


def _prepare(state: State, body: ChatRequest, key: Key) -> Call:
    """Check the caps, and decide whether to ask."""
    caps = state.settings.chat
    if body.model != caps.model_name:
        raise model_not_found(body.model, caps.model_name)
    if len(body.messages) > caps.max_messages:
        raise _over_cap("messages", f"at most {caps.max_messages} messages are taken. Begin a new conversation")
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
    plan = _plan(state, body, key, user, state.engines.serving)
    return Call(
        state=state,
        key=key,
        user=user,
        messages=given["messages"],
        sampling=sampling,
        serving=state.engines.serving,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        plan=plan,
        draws=1 if plan else _draws(state, body),
        started=time.perf_counter(),
    )


def _over_cap(param: str, rule: str) -> ApiError:
    return ApiError(400, f"Invalid value for '{param}': {rule}.", code="over_limit", param=param)


def _plan(state: State, body: ChatRequest, key: Key, user: str, serving: str) -> pairing.PairPlan | None:
    feedback = body.feedback or key.feedback
    # Only two free texts can be compared: `auto` leaves other requests alone, `always` says so.
    if uncomparable := _uncomparable(body):
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
    lately = partial(
        comparisons.shown_lately, state.reader, user, cap=settings.daily_cap, cooldown=settings.cooldown_turns
    )
    if not pairing.wants_pair(feedback, settings, lately=lately, rng=state.rng):
        return None
    duel = state.hot_swap.duel_beside(serving)
    gate = state.settings.gate
    share = gate.duel_share if duel and duel.kind is DuelKind.TRIAL else gate.watch_share
    return pairing.plan_pair(
        serving,
        seed=body.seed,
        rng=state.rng,
        duel=duel,
        share=share,
        active_share=settings.active_share if state.scorer.reward_model and body.temperature != 0 else 0.0,
        active_draws=settings.active_draws,
    )


def _uncomparable(body: ChatRequest) -> str | None:
    """What makes this request one for something else than a free text."""
    if (body.n or 1) > 1:
        return "n"
    return next((name for name in ("tools", "response_format") if getattr(body, name)), None)


def _draws(state: State, body: ChatRequest) -> int:
    draws = state.settings.serving.best_of_n
    if draws == 1 or not state.scorer.reward_model or body.temperature == 0 or _uncomparable(body):
        return 1
    return draws


# One answer


async def _answer_plain(call: Call) -> bytes:
    answer = generation.begin(call, call.serving)
    try:
        await generation.complete(call, answer)
    finally:
        generation.log(call, answer)
    return _body(call, answer)


def _body(call: Call, answer: Answer) -> bytes:
    assert answer.whole is not None
    return orjson.dumps(
        {
            "id": answer.id,
            "object": "chat.completion",
            "created": answer.whole.created,
            "model": call.state.settings.chat.model_name,
            "choices": [_choice(choice, choice.index) for choice in answer.whole.choices],
            "usage": answer.usage,
            "system_fingerprint": answer.policy,
        }
    )


async def _stream_plain(call: Call, send: sse.SendBytes) -> None:
    answer = generation.begin(call, call.serving)
    rewrite = sse.Rewriter(id=answer.id, model=call.state.settings.chat.model_name, fingerprint=answer.policy)
    try:
        await generation.forward(call, answer, rewrite, send)
        await send(_end(call, answer, rewrite.created), last=True)
    finally:
        generation.log(call, answer)


def _end(call: Call, answer: Answer, created: int) -> bytes:
    if call.include_usage and answer.usage:
        return sse.event(_last_chunk(call, answer.id, created, answer.policy, [answer])) + sse.DONE
    return sse.DONE


# One answer, the best of several


async def _answer_best(call: Call) -> bytes:
    drawn = _begin_draws(call)
    given = drawn[0]
    try:
        results = await asyncio.gather(*(generation.complete(call, answer) for answer in drawn), return_exceptions=True)
        given = await _best(call, drawn)
        _raise_faults(results)
        if given.whole is None:
            raise next(result for result in results if isinstance(result, ApiError))
    finally:
        generation.log(call, given)
    return _body(call, given)


async def _stream_best(call: Call, send: sse.SendBytes) -> None:
    drawn = _begin_draws(call)
    model = call.state.settings.chat.model_name
    rewriters = [sse.Rewriter(id=answer.id, model=model, fingerprint=answer.policy) for answer in drawn]
    held = [_Held() for _ in drawn]
    readers = [
        asyncio.create_task(generation.forward(call, answer, rewrite, hold))
        for answer, rewrite, hold in zip(drawn, rewriters, held, strict=True)
    ]
    on_record = [drawn[0]]
    async with _reading(call, readers, on_record):
        await asyncio.wait(readers)
        _raise_faults([reader.exception() for reader in readers])
        given = await _best(call, drawn)
        on_record[0] = given
        place = drawn.index(given)
        await readers[place]  # raises where all have failed
        given.first_token_ms = generation.elapsed_ms(call)
        await send(held[place].sent + _end(call, given, rewriters[place].created), last=True)
    generation.log(call, given)


def _begin_draws(call: Call) -> list[Answer]:
    """As many answers as are to be drawn, all but the first of no priority. With the user's own seed they can be
    repeated."""
    seed = call.sampling.get("seed")
    chance = call.state.rng if seed is None else random.Random(seed)
    call.state.metrics.unseen.inc(call.draws - 1)
    return [
        generation.begin(call, call.serving, priority=min(place, 1), seed=chance.randrange(2**31))
        for place in range(call.draws)
    ]


async def _best(call: Call, drawn: list[Answer]) -> Answer:
    """The answer that the reward model likes best; the first where there are no scores. One that was cut off for length
    is given only where all are: the reward model knows answers with an end, and reads one into it."""
    whole = [answer for answer in drawn if answer.status is CompletionStatus.COMPLETE]
    ended = [answer for answer in whole if answer.choices.get(0, {}).get("finish_reason") != "length"] or whole
    if len(whole) > 1 and (scores := await call.state.scorer.score(call.messages, [answer.text for answer in ended])):
        given = ended[pairing.best(scores)]
        given.sampling |= {"best_of_n": len(whole), "reward_model": call.state.scorer.reward_model}
        return given
    return ended[0] if ended else drawn[0]


class _Held:
    """Takes a stream in the client's place, until it is known whether that is to get it."""

    def __init__(self) -> None:
        self.sent = b""

    async def __call__(self, chunk: bytes, *, last: bool = False) -> None:
        self.sent += chunk


# Two answers


async def _answer_pair(call: Call) -> bytes:
    pair = _begin_pair(call)
    unseen = _begin_unseen(call)
    try:
        drawn = [*pair, *unseen]
        results = await asyncio.gather(*(generation.complete(call, answer) for answer in drawn), return_exceptions=True)
        _raise_faults(results)
        kind = await _settle(call, pair, unseen)
        whole = [(answer, answer.whole) for answer in pair if answer.whole]
        if not whole:
            raise next(result for result in results if isinstance(result, ApiError))
    except BaseException:
        for answer in pair:
            generation.log(call, answer)
        raise
    asked = await _log_pair(call, pair, kind)
    if not asked:
        whole = whole[:1]
    shown = [answer for answer, _ in whole]
    response = {
        "id": shown[0].id,
        "object": "chat.completion",
        "created": whole[0][1].created,
        "model": call.state.settings.chat.model_name,
        "choices": [_choice(said.choices[0], index) for index, (_, said) in enumerate(whole)],
        "usage": _sum_usage(shown),
        "system_fingerprint": None if asked else shown[0].policy,
    }
    if asked:
        response["comparison"] = asked
    return orjson.dumps(response)


async def _stream_pair(call: Call, send: sse.SendBytes) -> None:
    assert call.plan is not None
    pair = _begin_pair(call)
    model = call.state.settings.chat.model_name
    rewriters = [sse.Rewriter(id=pair[0].id, model=model, fingerprint=None, index=index) for index in (0, 1)]
    begun = False

    async def show(index: int, chunk: bytes, *, last: bool = False) -> None:
        nonlocal begun
        if not begun and index == 1:
            chunk = _opening(call, pair[0].id, rewriters[1].created, 0) + chunk
        begun = True
        await send(chunk, last=last)

    readers = [
        asyncio.create_task(generation.forward(call, answer, rewriters[index], partial(show, index)))
        for index, answer in enumerate(pair)
    ]
    async with _reading(call, readers, pair):
        # The first answer is the one that stays if the other fails, so its failure is the request's.
        await asyncio.wait(readers, return_when=asyncio.FIRST_EXCEPTION)
        await readers[0]
        await asyncio.wait(readers)
        _raise_faults([readers[1].exception()])
    await _end_pair(call, pair, call.plan.kind, rewriters[0].created, send)


async def _stream_active(call: Call, send: sse.SendBytes) -> None:
    """The answer drawn first streams at once, on its side; on the other side, once all have ended, the one that is
    worth asking about. If no other came whole, the first stands on both sides, as where two read the same."""
    plan = call.plan
    assert plan is not None
    first, other = plan.first, 1 - plan.first
    pair = _begin_pair(call)
    drawn = [pair[first], pair[other], *_begin_unseen(call)]
    rewriter = partial(sse.Rewriter, id=pair[0].id, model=call.state.settings.chat.model_name, fingerprint=None)
    rewriters = [rewriter(index=first), *(rewriter(index=other) for _ in drawn[1:])]
    held = [_Held() for _ in drawn[1:]]
    begun = False

    async def show(chunk: bytes, *, last: bool = False) -> None:
        nonlocal begun
        if not begun:  # that there will be two, for whoever lays them out
            begun = True
            opening = _opening(call, pair[0].id, rewriters[0].created, other)
            chunk = opening + chunk if other == 0 else chunk + opening
        await send(chunk, last=last)

    outlets: list[sse.SendBytes] = [show, *held]
    readers = [
        asyncio.create_task(generation.forward(call, answer, rewrite, out))
        for answer, rewrite, out in zip(drawn, rewriters, outlets, strict=True)
    ]
    on_record = [drawn[0]]
    async with _reading(call, readers, on_record):
        await readers[0]
        await asyncio.wait(readers)
        _raise_faults([reader.exception() for reader in readers])
        kind = await _settle(call, pair, drawn[2:])
        chosen = next(place for place, answer in enumerate(drawn) if answer is pair[other])
        second = held[chosen - 1].sent
        if pair[other].status is not CompletionStatus.COMPLETE:
            second = rewriter(index=other)(rewriters[0].events)
        on_record[:] = pair
        pair[other].first_token_ms = generation.elapsed_ms(call)
        await send(second)
    await _end_pair(call, pair, kind, rewriters[0].created, send)


def _opening(call: Call, id: str, created: int, index: int) -> bytes:
    """That there is an answer at this index. OpenAI's client fails where the first chunk of all is not of index 0."""
    empty = {"index": index, "delta": {"content": ""}, "logprobs": None, "finish_reason": None}
    opening = _last_chunk(call, id, created, None, []) | {"choices": [empty]}
    opening.pop("usage", None)
    return sse.event(opening)


async def _end_pair(call: Call, pair: list[Answer], kind: ComparisonKind, created: int, send: sse.SendBytes) -> None:
    asked = await _log_pair(call, pair, kind)
    whole = [answer for answer in pair if answer.status is CompletionStatus.COMPLETE]
    last = _last_chunk(call, pair[0].id, created, None if asked else whole[0].policy, pair)
    if asked:
        last["comparison"] = asked
    await send(sse.event(last) + sse.DONE, last=True)


def _begin_pair(call: Call) -> list[Answer]:
    assert call.plan is not None
    return [
        generation.begin(call, policy, seed=seed)
        for policy, seed in zip(call.plan.policies, call.plan.seeds, strict=True)
    ]


def _begin_unseen(call: Call) -> list[Answer]:
    """The further answers of an active pair, which people's own go before."""
    assert call.plan is not None
    call.state.metrics.unseen.inc(len(call.plan.more_seeds))
    return [generation.begin(call, call.serving, priority=1, seed=seed) for seed in call.plan.more_seeds]


async def _settle(call: Call, pair: list[Answer], unseen: list[Answer]) -> ComparisonKind:
    """Of the answers beside that drawn first, put the one to be shown in its place in `pair`; the pair's kind.

    It is the one that the reward model is least sure about; without scores, the first that differs: a random pair."""
    plan = call.plan
    assert plan is not None
    first, drawn_second = pair[plan.first], pair[1 - plan.first]
    if plan.kind is not ComparisonKind.ACTIVE or first.status is not CompletionStatus.COMPLETE:
        return plan.kind
    kind = ComparisonKind.SAME_POLICY
    whole = [answer for answer in [drawn_second, *unseen] if answer.status is CompletionStatus.COMPLETE]
    different = [answer for answer in whole if not pairing.same_text(answer.text, first.text)]
    chosen = next(iter(different or whole), drawn_second)
    if len(different) > 1:
        scores = await call.state.scorer.score(call.messages, [first.text, *(answer.text for answer in different)])
        place = pairing.most_disputed(scores[0], scores[1:]) if scores else None
        if place is not None:
            kind, chosen = ComparisonKind.ACTIVE, different[place]
    # The response bears the id of the answer at index 0, and has begun.
    chosen.id, drawn_second.id = drawn_second.id, chosen.id
    pair[1 - plan.first] = chosen
    return kind


def _raise_faults(results: Sequence[object]) -> None:
    """Raise what is a fault of ours; where the engine's make one answer fail, the others stay."""
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ApiError):
            raise result


@asynccontextmanager
async def _reading(call: Call, readers: list[asyncio.Task[None]], on_record: list[Answer]) -> AsyncIterator[None]:
    """Should anything go wrong inside, stop the readers and log the answers of `on_record`."""
    try:
        yield
    except BaseException:
        for reader in readers:
            reader.cancel()
        try:
            await asyncio.gather(*readers, return_exceptions=True)
        finally:  # the client may leave just now
            for answer in on_record:
                generation.log(call, answer)
        raise


async def _log_pair(call: Call, pair: list[Answer], kind: ComparisonKind) -> dict[str, str] | None:
    """Put both answers on disk and, where they can be compared, the comparison; what the client is told of it."""
    assert call.plan is not None
    a, b = pair
    both_whole = a.status is b.status is CompletionStatus.COMPLETE
    if not both_whole or pairing.same_text(a.text, b.text):
        for answer in pair:
            generation.log(call, answer)
        return None
    comparison = Comparison(
        id=new_id("cmp"),
        key_id=call.key.id,
        a=a.id,
        b=b.id,
        kind=kind,
        swapped=call.plan.swapped,
        created_at=timestamp(),
        expires_at=timestamp(plus_s=call.state.settings.comparisons.expires_after_s),
        duel_id=call.plan.duel_id,
    )
    rows = [row for answer in pair for row in generation.rows(call, answer)]

    def write(db: Any) -> None:
        for row in rows:
            completions.insert(db, row)
        comparisons.insert(db, comparison)

    await call.state.write(write)
    for answer in pair:
        generation.count(call, answer, 1)
    call.state.metrics.comparisons.inc()
    return {"id": comparison.id, "expires_at": comparison.expires_at}


# What a response is made of


def _choice(choice: EngineChoice, index: int) -> dict[str, Any]:
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


def _sum_usage(answers: list[Answer]) -> dict[str, int]:
    usages = [answer.usage for answer in answers if answer.usage]
    return {name: sum(usage[name] for usage in usages) for name in usages[0]} if usages else {}


def _last_chunk(call: Call, id: str, created: int, fingerprint: str | None, answers: list[Answer]) -> dict[str, Any]:
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
