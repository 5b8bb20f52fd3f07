"""POST /v1/comparisons/{id}/vote and the raters' queue."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from data import comparisons, duels, gold, swaps
from data.types import Choice, Duel, DuelStatus, Key, Role
from service import trial
from service.auth import needs
from service.errors import ApiError
from service.state import state_of

router = APIRouter()


class VoteRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    choice: Choice
    comment: Annotated[str, Field(max_length=2000)] | None = None


@router.post("/v1/comparisons/{id}/vote")
async def cast_vote(
    id: str, body: VoteRequest, request: Request, key: Annotated[Key, needs(Role.USER)]
) -> dict[str, Any]:
    """Vote, repeat a vote, or change it within the window. 200 means that it is on disk."""
    state = state_of(request)
    window_s = state.settings.comparisons.vote_window_s
    given: dict[str, Any] = {"key_id": key.id, "choice": body.choice, "comment": body.comment, "window_s": window_s}

    def judge(duel: Duel, wins: int, losses: int, ties: int) -> tuple[trial.Standing, DuelStatus]:
        alpha = state.settings.gate.alpha
        standing = trial.standing(wins, losses, ties, alpha=alpha)
        verdict = trial.verdict(standing, threshold=duel.threshold, reject_at=1 / alpha, budget=duel.budget)
        return standing, DuelStatus.RUNNING if verdict is trial.Verdict.GO_ON else DuelStatus(verdict)

    def vote(db: Any) -> tuple[comparisons.CastVote, Duel | None]:
        try:
            cast = comparisons.vote(db, id, role=key.role, **given)
        except comparisons.UnknownComparison:
            return gold.vote(db, id, **given), None
        duel = duels.record_vote(db, id, judge)
        if duel is not None:
            swaps.settle(db, duel)
        return cast, duel

    try:
        cast, duel = await state.write(vote)
    except comparisons.UnknownComparison:
        raise ApiError(
            404,
            f"There is no comparison '{id}' for this key to vote on.",
            type="not_found_error",
            code="unknown_comparison",
        ) from None
    except comparisons.ComparisonExpired:
        raise ApiError(
            410,
            f"The time to vote on '{id}' is over. Ask again to get a fresh comparison.",
            code="comparison_expired",
        ) from None
    except comparisons.VoteIsFinal as final:
        raise ApiError(
            409,
            f"You voted '{final}' on this comparison, and a vote can be changed only within {window_s:g} s.",
            code="vote_is_final",
        ) from None
    if duel is not None:
        state.hot_swap.kick()
    state.metrics.votes.labels(cast.vote.choice).inc()
    return {
        "id": cast.vote.id,
        "comparison": id,
        "choice": cast.vote.choice,
        "comment": cast.vote.comment,
        "policies": {"a": cast.policy_a, "b": cast.policy_b},
        "created_at": cast.vote.created_at,
        "updated_at": cast.vote.updated_at,
    }


@router.get("/v1/comparisons/next", response_model=None)
async def next_comparison(request: Request, key: Annotated[Key, needs(Role.RATER)]) -> dict[str, Any] | Response:
    """The next pair that nobody has voted on, held for this rater for a while; 204 when the queue is empty."""
    state = state_of(request)
    lease_s, gold_rate = state.settings.comparisons.rater_lease_s, state.settings.comparisons.gold_rate

    def draw(db: Any) -> comparisons.QueuedPair | None:
        if question := gold.open_question(db, key.id):
            return question
        due = not comparisons.holds_one(db, key.id) and comparisons.one_waits(db, key.id)
        # Before a pair is held: neither its time nor its lease may run while the rater looks at something else.
        wants_gold = due and state.rng.random() < gold_rate
        question = gold.ask(db, key.id, lease_s=lease_s, rng=state.rng) if wants_gold else None
        return question or comparisons.next_for_rater(db, key_id=key.id, lease_s=lease_s)

    pair = await state.write(draw)
    if pair is None:
        return Response(status_code=204)
    return {
        "id": pair.id,
        "messages": pair.messages,
        "answers": {"a": pair.answer_a, "b": pair.answer_b},
        "expires_at": pair.until,
    }


@router.post("/v1/comparisons/{id}/pass", status_code=204)
async def pass_over(id: str, request: Request, key: Annotated[Key, needs(Role.RATER)]) -> Response:
    """Give a pair of the queue back without a vote; this rater does not get it again."""
    try:
        await state_of(request).write(lambda db: comparisons.pass_over(db, id, key_id=key.id))
    except comparisons.UnknownComparison:
        raise ApiError(
            404, f"You were not given a pair '{id}'.", type="not_found_error", code="unknown_comparison"
        ) from None
    return Response(status_code=204)
