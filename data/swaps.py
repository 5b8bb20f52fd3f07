"""Which policy serves, and how that came about.

Somebody decides that a policy is to serve (`promote`, `roll_back`, or a duel's verdict through `settle`): it becomes
`promoted`, with a row that says who and why. The service loads it on every engine, and then `flip` makes it the one
that serves. What happens between the two may be lost in a crash: the row is still there, and the work begins again.

The order of the rows tells what came later, not their times: a clock that was ahead may have been set right."""

from sqlite_utils import Database

from data import audit, duels, registry
from data.ids import new_id
from data.types import Duel, DuelKind, DuelStatus, Policy, PolicyStatus, Swap, timestamp

_COLUMNS = "id, policy, replaced, actor, reason, requested_at, flipped_at, drained_at, problem"


class CannotPromote(Exception):
    """A policy that cannot be made to serve; the message says why."""


class Superseded(Exception):
    """Something else is to serve by now."""


def promote(db: Database, name: str, *, actor: str, reason: str) -> Swap:
    """Decide that `name` is to serve, whatever was to serve before: the last word counts. A duel that runs is broken
    off, since whatever it was about has changed.

    Call inside a transaction. Raises UnknownPolicy, CannotPromote."""
    policy = registry.get(db, name)
    if policy.status is PolicyStatus.SERVING:
        stays = latest(db)
        if stays is None or pending(db) is None:
            raise CannotPromote(f"{name} serves already.")
        _overtake(db, f"{name} was to stay ({reason})")
        audit.record(db, actor=actor, action="policy.promote", subject=name)
        return stays
    if policy.gate is not None and not policy.gate["passed"]:
        failed = " ".join(check["sentence"] for check in policy.gate["checks"] if not check["passed"])
        raise CannotPromote(f"{name} did not pass the gate: {failed}")
    if policy.status is PolicyStatus.PROMOTED and pending(db) == name:
        swap = _open(db, name, actor, reason)
        if swap.actor not in UNASKED:
            return swap
        audit.record(db, actor=actor, action="policy.promote", subject=name)
        return _insert(db, name, actor, reason)  # now somebody has asked for it
    break_off(db, reason=f"{name} is to serve ({reason})")
    serving = registry.serving(db)
    if serving is not None and serving.status is PolicyStatus.SERVING:
        _overtake(db, f"{name} was promoted after it", but_trained_after=name)
    registry.set_status(db, name, PolicyStatus.PROMOTED)
    audit.record(db, actor=actor, action="policy.promote", subject=name)
    return _insert(db, name, actor, reason)


def roll_back(db: Database, *, actor: str, reason: str, seen: str | None = None) -> Swap:
    """Decide that the predecessor of the policy that serves is to serve again; with `seen`, only where that one still
    serves, or two who go back at once would go back two policies. Call inside a transaction. Raises CannotPromote."""
    return promote(db, predecessor(db, seen), actor=actor, reason=reason)


def predecessor(db: Database, seen: str | None = None) -> str:
    """The policy that the one that serves took the place of, as `line` has it; `seen` as in `roll_back`. Raises
    CannotPromote."""
    serving = registry.serving(db)
    if serving is None or serving.status is not PolicyStatus.SERVING:
        raise CannotPromote("Nothing serves yet: there is nothing to go back from.")
    if seen not in (None, serving.name):
        raise CannotPromote(f"{seen} does not serve any more, {serving.name} does. Go back from that if it is no good.")
    before = line(db)[-2:-1]
    if not before:
        raise CannotPromote(f"{serving.name} took no other policy's place: there is nothing to go back to.")
    return before[0]


def line(db: Database) -> list[str]:
    """The policies that lead to the one that serves, which is the last: each took the place of the one before it. Going
    back to one of them takes those after it out again; whatever else comes to serve goes on from there, be it trained
    earlier than what it replaces."""
    then: dict[str | None, list[str]] = {}
    # The rows are in the order in which swaps were asked for; what each replaced says in which they were made.
    for replaced, policy in db.execute(
        "SELECT replaced, policy FROM swaps WHERE flipped_at IS NOT NULL ORDER BY rowid DESC"
    ):
        then.setdefault(replaced, []).append(policy)
    found: list[str] = []
    while after := then.get(found[-1] if found else None):
        policy = after.pop()
        found = [*found[: found.index(policy)], policy] if policy in found else [*found, policy]
    return found


def settle(db: Database, duel: Duel) -> None:
    """Do what follows from a duel's end, where it has ended. Call inside the transaction that may have ended it."""
    if duel.status is DuelStatus.RUNNING:
        return
    if duel.status is DuelStatus.WON:
        what = "Its trial was won" if duel.kind is DuelKind.TRIAL else f"People prefer it to {duel.incumbent}"
        promote(db, duel.challenger, actor=duel.kind, reason=f"{what}: {duel.reason}")
    elif duel.kind is DuelKind.TRIAL:
        how = "lost" if duel.status is DuelStatus.LOST else "did not win"
        problem = f"It {how} its trial against {duel.incumbent}: {duel.reason}"
        registry.set_status(db, duel.challenger, PolicyStatus.REJECTED, problem=problem)


def break_off(db: Database, *, reason: str) -> None:
    """End the duel that runs, if one does; a candidate on trial goes back to wait for the next. Call inside a
    transaction."""
    duel = duels.end_running(db, reason=reason)
    if duel is not None and duel.kind is DuelKind.TRIAL:
        registry.set_status(db, duel.challenger, PolicyStatus.CANDIDATE)


UNASKED = ("trainer", "start")
"""Who begins a swap without anybody's word."""
_PENDING = (
    " FROM policies LEFT JOIN (SELECT policy, max(rowid) AS requested FROM swaps WHERE flipped_at IS NULL"
    f" AND actor NOT IN {UNASKED} GROUP BY policy) ON policy = name WHERE status = 'promoted'"
)


def pending(db: Database) -> str | None:
    """The policy that is to serve and does not yet: the last one that somebody asked for, before one that the trainer
    promoted; at the first start, the first one."""
    serving = registry.serving(db)
    if serving is not None and serving.status is PolicyStatus.PROMOTED:
        return serving.name
    row = db.execute(f"SELECT name {_PENDING} ORDER BY requested DESC NULLS LAST, name DESC LIMIT 1").fetchone()
    return row[0] if row else None


def begin(db: Database, name: str) -> Swap:
    """The row of a pending swap, made now where the policy came promoted. Call inside a transaction."""
    policy = registry.get(db, name)
    if policy.run_id is None:
        return _open(db, name, "start", "the first start")
    return _open(db, name, "trainer", "it passed the gate, and gate.mode is offline")


def _open(db: Database, name: str, actor: str, reason: str) -> Swap:
    row = db.execute(
        f"SELECT {_COLUMNS} FROM swaps WHERE policy = ? AND flipped_at IS NULL ORDER BY rowid DESC LIMIT 1",
        (name,),
    ).fetchone()
    return Swap(*row) if row else _insert(db, name, actor, reason)


def _insert(db: Database, name: str, actor: str, reason: str) -> Swap:
    swap = Swap(new_id("swap"), name, None, actor, reason, timestamp(), None, None, None)
    db.execute(
        "INSERT INTO swaps (id, policy, actor, reason, requested_at) VALUES (?, ?, ?, ?, ?)",
        (swap.id, name, actor, reason, swap.requested_at),
    )
    return swap


def note_problem(db: Database, name: str, problem: str) -> None:
    """Say what keeps a policy from going further, and its swap, where it has one, from being made; nothing where it
    serves or was given up by now. Call inside a transaction."""
    if _waits(db, name):
        registry.note_problem(db, name, problem)
        _say_of_open(db, name, problem)


def _waits(db: Database, name: str) -> bool:
    return registry.get(db, name).status in (PolicyStatus.PROMOTED, PolicyStatus.CANDIDATE)


def _say_of_open(db: Database, name: str, problem: str) -> None:
    """Why the swaps to this policy that were asked for have not been made."""
    db.execute("UPDATE swaps SET problem = ? WHERE policy = ? AND flipped_at IS NULL", (problem, name))


def refuse(db: Database, name: str, problem: str) -> None:
    """Give a policy up that cannot be served, unless it serves or was given up by now. Call inside a transaction."""
    if _waits(db, name):
        note_problem(db, name, problem)
        registry.set_status(db, name, PolicyStatus.REJECTED, problem=problem)


def wanted(db: Database) -> list[Policy]:
    """The policies that every engine must hold: the one that serves, then the other one of the duel that runs; none
    before there is one to serve."""
    serving, duel = registry.serving(db), duels.running(db)
    if serving is None:
        return []
    others = {duel.challenger, duel.incumbent} - {serving.name} if duel else set()
    return [serving, *(registry.get(db, name) for name in sorted(others))]


def flip(db: Database, swap: Swap) -> str | None:
    """Make the policy serve that every engine holds now; the one that it replaced. Call inside a transaction. Raises
    Superseded."""
    if pending(db) != swap.policy:
        raise Superseded(swap.policy)
    break_off(db, reason=f"{swap.policy} serves")
    replaced = registry.set_serving(db, swap.policy, back=swap.policy in line(db))
    db.execute(
        "UPDATE swaps SET flipped_at = ?, replaced = ?, problem = NULL WHERE id = ?", (timestamp(), replaced, swap.id)
    )
    _say_of_open(db, swap.policy, "It was asked for once more, and serves by that.")
    if replaced is None:
        return None
    _overtake(db, f"{swap.policy} was promoted after it", but_trained_after=swap.policy)
    return replaced


def _overtake(db: Database, reason: str, *, but_trained_after: str | None = None) -> None:
    """Retire what is to serve and does not yet; but what the trainer alone promoted only where it is no newer than
    `but_trained_after`."""
    for name, requested in db.execute(f"SELECT name, requested {_PENDING}").fetchall():
        if requested is not None or but_trained_after is None or name < but_trained_after:
            registry.set_status(db, name, PolicyStatus.RETIRED, problem=reason)
            _say_of_open(db, name, reason)


def undrained(db: Database) -> set[str]:
    """The policies whose place another took, and that some engine may still hold."""
    rows = db.execute("SELECT replaced FROM swaps WHERE replaced IS NOT NULL AND drained_at IS NULL")
    return {row[0] for row in rows}


def drained(db: Database, name: str) -> None:
    """Every engine has let `name` go. Call inside a transaction."""
    db.execute(
        "UPDATE swaps SET drained_at = ? WHERE replaced = ? AND flipped_at IS NOT NULL AND drained_at IS NULL",
        (timestamp(), name),
    )


def list_swaps(db: Database, *, policy: str | None = None, limit: int = 50) -> list[Swap]:
    """The latest first; with `policy`, those that brought it in or took it out."""
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM swaps WHERE :policy IS NULL OR :policy IN (policy, replaced)"
        " ORDER BY rowid DESC LIMIT :limit",
        {"policy": policy, "limit": limit},
    )
    return [Swap(*row) for row in rows]


def latest(db: Database) -> Swap | None:
    """The swap that brought in what serves."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM swaps WHERE flipped_at IS NOT NULL"
        " AND policy = (SELECT name FROM policies WHERE status = 'serving') ORDER BY rowid DESC LIMIT 1"
    ).fetchone()
    return Swap(*row) if row else None
