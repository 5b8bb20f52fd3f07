"""The words everyone uses, as frozen dataclasses. Times are UTC, `YYYY-MM-DDTHH:MM:SS.mmmZ`, so they sort as text."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

BASE_POLICY = "policy-0000"
"""The base model under an adapter that changes nothing."""


MessageRole = Literal["system", "developer", "user", "assistant", "tool"]
"""Who says a message of a conversation."""


class Role(StrEnum):
    """What a key may do; each role may also do what the ones before it may."""

    USER = "user"
    RATER = "rater"
    OPERATOR = "operator"

    def covers(self, needed: "Role") -> bool:
        ranks = list(Role)
        return ranks.index(self) >= ranks.index(needed)


class Feedback(StrEnum):
    """Whether a chat request may be answered with a comparison."""

    OFF = "off"
    AUTO = "auto"
    ALWAYS = "always"


class Choice(StrEnum):
    """A vote on a comparison; `a` is the answer with index 0."""

    A = "a"
    B = "b"
    TIE = "tie"
    BOTH_BAD = "both_bad"


class ComparisonKind(StrEnum):
    """Why these two answers were put side by side."""

    SAME_POLICY = "same_policy"
    TRIAL = "trial"
    ACTIVE = "active"


class CompletionStatus(StrEnum):
    COMPLETE = "complete"
    ABORTED = "aborted"
    """Stopped before its end: the client went away, or the time limit passed."""
    FAILED = "failed"
    """The engine broke off."""


class PolicyStatus(StrEnum):
    CANDIDATE = "candidate"
    REJECTED = "rejected"
    TRIAL = "trial"
    PROMOTED = "promoted"
    SERVING = "serving"
    RETIRED = "retired"
    ROLLED_BACK = "rolled_back"


class DuelKind(StrEnum):
    TRIAL = "trial"
    """A candidate against the policy that serves: may it take its place?"""
    WATCH = "watch"
    """The predecessor against the policy that took its place: must it come back?"""


class DuelStatus(StrEnum):
    """How a duel stands, seen from the challenger."""

    RUNNING = "running"
    WON = "won"
    LOST = "lost"
    UNDECIDED = "undecided"
    """Nobody had won when the votes were used up."""
    ENDED = "ended"
    """Broken off: something else made it pointless."""


class RunStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Key:
    """An API key without its secret."""

    id: str
    role: Role
    feedback: Feedback
    label: str
    created_at: str
    revoked_at: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, as it was given."""

    id: str
    key_id: str
    user: str
    """The key, or `key/end user` where the request named one: who the splits keep together."""
    conversation: str
    """A digest of the talk's opening, the same on every turn."""
    messages: list[dict[str, Any]]
    answer: str
    policy: str
    sampling: dict[str, Any]
    status: CompletionStatus
    finish_reason: str | None
    """OpenAI's, and "stop_sequence" where the request's own `stop` cut it off."""
    prompt_tokens: int | None
    completion_tokens: int | None
    first_token_ms: float | None
    total_ms: float
    created_at: str
    tool_calls: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two completions shown side by side and waiting for a vote."""

    id: str
    key_id: str
    a: str
    """The completion shown as index 0."""
    b: str
    kind: ComparisonKind
    swapped: bool
    """Whether the answer drawn second is shown as `a`: with it position bias can be measured."""
    created_at: str
    expires_at: str
    duel_id: str | None = None
    """The duel that it is a part of: its answers come from the two policies of that."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one person said of one comparison."""

    id: str
    comparison_id: str
    key_id: str
    choice: Choice
    comment: str | None
    decided_ms: int
    """Milliseconds from showing the pair to the first vote on it."""
    created_at: str
    updated_at: str


@dataclass(frozen=True, slots=True)
class Policy:
    """One version of the policy: a LoRA adapter over the base model."""

    name: str
    parent: str | None
    path: str
    """The adapter's folder, relative to the state folder."""
    sha256: str
    base_model: str
    """Fingerprint of the base model that the adapter belongs to."""
    status: PolicyStatus
    created_at: str
    run_id: str | None = None
    reward_model: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """What keeps it from going further, or why it was turned away."""

    @property
    def gate(self) -> dict[str, Any] | None:
        """What the trainer's checks found, {"passed", "checks": [{"name", "figure", "threshold", "passed",
        "sentence"}, ...]}; None where it never met them."""
        return self.metrics.get("gate")


@dataclass(frozen=True, slots=True)
class Duel:
    """Two policies that answer the same people side by side, and the votes on that."""

    id: str
    kind: DuelKind
    challenger: str
    incumbent: str
    """The policy that serves while it runs."""
    threshold: float
    """Evidence at which the challenger has won."""
    budget: int
    """Votes after which it ends."""
    status: DuelStatus
    wins: int
    """Decisive votes for the challenger."""
    losses: int
    ties: int
    """Votes that prefer neither: ties, and both bad."""
    e_value: float
    e_mirrored: float
    """Evidence that the incumbent is the better one."""
    rate_low: float
    rate_high: float
    reason: str | None
    """Why it ended."""
    started_at: str
    ended_at: str | None


@dataclass(frozen=True, slots=True)
class Swap:
    """One change of the policy that serves: asked for, made, and the old one gone from the engines."""

    id: str
    policy: str
    replaced: str | None
    """The policy that served before; None at the first start, and until `flipped_at`."""
    actor: str
    """A key's id, `cli`, or which part of the service decided."""
    reason: str
    requested_at: str
    flipped_at: str | None
    """When new requests began to take it."""
    drained_at: str | None
    """When every engine had let `replaced` go."""
    problem: str | None
    """What keeps it from being made, or kept it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    id: str
    status: RunStatus
    requested_by: str
    """A key's id, `cli`, or the schedule that was due."""
    config: dict[str, Any]
    stage: str | None
    """What it does now, or did last."""
    pid: int | None
    heartbeat_at: str | None
    cancel_requested_at: str | None
    error: str | None
    """Why it failed, and what to do."""
    created_at: str
    started_at: str | None
    ended_at: str | None


def timestamp(at: datetime | None = None, *, plus_s: float = 0.0) -> str:
    """`at` (default: now) plus `plus_s` seconds, in the form the record keeps."""
    moment = (at or datetime.now(UTC)) + timedelta(seconds=plus_s)
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
