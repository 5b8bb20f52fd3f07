"""When runs are due: a cron expression with its time zone, an interval, or so many new votes.

`since` is the moment that a schedule counts from: its creation, or the last time it came due. What is due follows from
the row alone, so a clock may die at any line: the next one sees the same rows, and a run that was due while none ran is
still due."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from sqlite_utils import Database

from data import audit, runs
from data.ids import new_id
from data.types import RunStatus, timestamp

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
SHORTEST = timedelta(seconds=1)
AHEAD_S = 60.0
"""A clock that is set back by less asks for no run twice."""
FURTHEST_DAYS = 40 * 366
"""A cron expression that matches no day of these never will: the calendar repeats after 28 years."""

_COLUMNS = "id, kind, spec, timezone, paused, created_by, created_at, updated_at, since, last_due_at, last_run, problem"


class BadSchedule(ValueError):
    """Not to be understood; the message says what is wrong and how it is written."""


class UnknownSchedule(LookupError):
    """No schedule of that id."""


class ScheduleKind(StrEnum):
    CRON = "cron"
    EVERY = "every"
    VOTES = "votes"


@dataclass(frozen=True, slots=True)
class Schedule:
    """One reason for runs to begin by themselves."""

    id: str
    kind: ScheduleKind
    spec: str
    """What the kind needs: `0 3 * * *`, `6h`, `500`."""
    timezone: str
    """Of a cron expression, as the IANA names it; UTC for the other kinds, which need none."""
    paused: bool
    created_by: str
    created_at: str
    updated_at: str
    since: str
    last_due_at: str | None
    last_run: str | None
    """The run that it asked for last, or that was under way when it came due."""
    problem: str | None

    @property
    def version(self) -> tuple[str, str]:
        """Another one after every change and every time that it came due."""
        return self.updated_at, self.since

    def next_due(self) -> datetime | None:
        """The first moment after `since` that a run is due, in the past where it is late; None for a number of votes.

        Raises BadSchedule."""
        since = datetime.fromisoformat(self.since)
        if self.kind is ScheduleKind.CRON:
            return Cron.parse(self.spec).next_after(since, find_timezone(self.timezone))
        if self.kind is ScheduleKind.EVERY:
            return since + parse_interval(self.spec)
        return None


LONGEST_CRON = 1000


@dataclass(frozen=True, slots=True)
class Cron:
    """The five fields of a cron expression, spelled out. Weekdays count from Sunday = 0."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool
    """Where both day fields say something, a day that matches one of them will do."""

    @classmethod
    def parse(cls, expression: str) -> "Cron":
        """Raises BadSchedule."""
        if len(expression) > LONGEST_CRON:
            raise BadSchedule(
                f"A cron expression has at most {LONGEST_CRON} characters, and this one {len(expression)}."
            )
        fields = expression.lower().split()
        if len(fields) != 5:
            raise BadSchedule(
                f"'{expression}' has {len(fields)} field{'s' * (len(fields) != 1)}, and a cron expression has five:"
                " minute, hour, day of the month, month, day of the week. '0 3 * * *' is every day at 3:00."
            )
        minute, hour, day, month, weekday = fields
        return cls(
            _numbers(minute, "minute", 0, 59),
            _numbers(hour, "hour", 0, 23),
            _numbers(day, "day of the month", 1, 31),
            _numbers(month, "month", 1, 12, MONTHS),
            _numbers(weekday, "day of the week", 0, 6, WEEKDAYS),
            either_day=not day.startswith("*") and not weekday.startswith("*"),
        )

    def next_after(self, moment: datetime, zone: ZoneInfo) -> datetime:
        """Raises BadSchedule where there is none.

        A time that the change to summer time skips comes an hour later. One that the change back repeats comes once, or
        twice where the expression says every hour, however it is spelled."""
        day = moment.astimezone(zone).date()
        folds = (0, 1) if len(self.hours) == 24 else (0,)
        for _ in range(FURTHEST_DAYS):
            if self._on(day):
                times = (time(hour, minute, fold=f) for hour in self.hours for minute in self.minutes for f in folds)
                moments = (datetime.combine(day, at, zone).astimezone(UTC) for at in times)
                later = [at for at in moments if at > moment]
                if later:
                    return min(later)
            day += timedelta(days=1)
        raise BadSchedule("No day of the calendar matches its day of the month and its month.")

    def _on(self, day: date) -> bool:
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        matches = of_month or of_week if self.either_day else of_month and of_week
        return day.month in self.months and matches


def _numbers(field: str, what: str, low: int, high: int, names: Sequence[str] = ()) -> frozenset[int]:
    """`*`, `1,15`, `mon-fri`, `*/10`, `8-18/2` as the numbers that it means. Raises BadSchedule."""

    def bad(why: str) -> BadSchedule:
        by_name = f", or {names[0]} to {names[-1]}" if names else ""
        return BadSchedule(
            f"'{field}' is no {what}: {why}. It takes {low} to {high}{by_name}, lists (1,5), ranges (1-5), steps (*/2)"
            " and *."
        )

    def number(word: str) -> int:
        if word in names:
            return names.index(word) + low
        if not word.isdecimal():
            raise bad(f"'{word}' is not a number" + (" nor a name" if names else ""))
        if int(word) == 7 and names is WEEKDAYS:
            return 7  # Sunday, too
        if not low <= int(word) <= high:
            raise bad(f"{word} is out of range")
        return int(word)

    found: set[int] = set()
    for part in field.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isdecimal() and int(step) > 0):
            raise bad(f"'{step}' is no step")
        first, dash, last = span.partition("-")
        if span == "*":
            begin, end = low, high
        elif dash:
            begin, end = number(first), number(last)
        else:
            begin = number(first)
            end = high if slash else begin
        if begin > end and names is WEEKDAYS:
            end += 7  # fri-mon
        if begin > end:
            raise bad(f"{span} goes backwards")
        found.update(range(begin, end + 1, int(step) if slash else 1))
    return frozenset(n % 7 for n in found) if names is WEEKDAYS else frozenset(found)


def find_timezone(name: str) -> ZoneInfo:
    """Raises BadSchedule."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise BadSchedule(
            f"'{name}' is no time zone: name one as the IANA does, e.g. Europe/Berlin, America/New_York or UTC."
        ) from None


def parse_interval(text: str) -> timedelta:
    """`90s`, `30m`, `6h`, `1d`, `1.5h`. Raises BadSchedule."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)\s*([smhd])", text.strip().lower())
    seconds = float(match[1]) * UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds <= FURTHEST_DAYS * UNITS_S["d"]:
        raise BadSchedule(f"'{text}' is no interval: write a number above 0 and s, m, h or d, e.g. 30m, 6h or 1d.")
    return timedelta(seconds=seconds)


def parse_votes(text: str) -> int:
    """Raises BadSchedule."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise BadSchedule(f"'{text}' is no number of votes: write a whole number above 0, e.g. 500.")
    return int(text)


def choose(*, cron: str | None, every: str | None, votes: str | int | None) -> tuple[ScheduleKind, str]:
    """The kind and the spec of the one that is given. Raises BadSchedule."""
    given = {ScheduleKind.CRON: cron, ScheduleKind.EVERY: every, ScheduleKind.VOTES: votes}
    chosen = [(kind, str(spec)) for kind, spec in given.items() if spec is not None]
    if len(chosen) != 1:
        raise BadSchedule(
            f"{'Both ' if len(chosen) == 2 else ''}{' and '.join(kind for kind, _ in chosen) or 'Nothing'} given: a"
            " schedule has one of cron (e.g. '0 3 * * *'), every (e.g. 6h) and votes (e.g. 500)."
        )
    return chosen[0]


def _check(kind: ScheduleKind, spec: str, timezone: str | None) -> tuple[str, str]:
    """The spec and the time zone as they are kept. Raises BadSchedule."""
    if kind is not ScheduleKind.CRON and timezone is not None:
        raise BadSchedule("Only a cron expression has a time zone: leave it out.")
    timezone = timezone or "UTC"
    if kind is ScheduleKind.CRON:
        spec = " ".join(spec.split())
        Cron.parse(spec).next_after(datetime.now(UTC), find_timezone(timezone))
    elif kind is ScheduleKind.EVERY:
        if parse_interval(spec) < SHORTEST:
            raise BadSchedule(f"Every {spec} is too often: the shortest interval is {SHORTEST.seconds} second.")
    else:
        parse_votes(spec)
    return spec.strip(), timezone


def add(db: Database, kind: ScheduleKind, spec: str, *, timezone: str | None = None, actor: str) -> Schedule:
    """`timezone` is a cron expression's, UTC by default. Raises BadSchedule. Call inside a transaction."""
    spec, timezone = _check(kind, spec, timezone)
    id, now = new_id("sched"), timestamp()
    db.execute(
        "INSERT INTO schedules (id, kind, spec, timezone, paused, created_by, created_at, updated_at, since)"
        " VALUES (?, ?, ?, ?, 0, ?, ?, ?, ?)",
        (id, kind, spec, timezone, actor, now, now, now),
    )
    audit.record(db, actor=actor, action="schedule.create", subject=id)
    return get(db, id)


def edit(db: Database, id: str, kind: ScheduleKind, spec: str, *, timezone: str | None = None, actor: str) -> Schedule:
    """Make it another one, from now on; for another number of votes, those that it has counted stay counted. A cron
    expression keeps its time zone where none is given. Raises BadSchedule and UnknownSchedule. Call inside a
    transaction."""
    before = get(db, id)
    if kind is before.kind is ScheduleKind.CRON:
        timezone = timezone or before.timezone
    spec, timezone = _check(kind, spec, timezone)
    now = timestamp()
    since = before.since if kind is before.kind is ScheduleKind.VOTES else now
    db.execute(
        "UPDATE schedules SET kind = ?, spec = ?, timezone = ?, since = ?, updated_at = ?, problem = NULL WHERE id = ?",
        (kind, spec, timezone, since, now, id),
    )
    audit.record(db, actor=actor, action="schedule.edit", subject=id)
    return get(db, id)


def pause(db: Database, id: str, *, actor: str) -> Schedule:
    """Nothing is due until `resume`. Raises UnknownSchedule. Call inside a transaction."""
    get(db, id)
    db.execute("UPDATE schedules SET paused = 1, updated_at = ? WHERE id = ? AND NOT paused", (timestamp(), id))
    audit.record(db, actor=actor, action="schedule.pause", subject=id)
    return get(db, id)


def resume(db: Database, id: str, *, actor: str) -> Schedule:
    """Go on from now: what was due meanwhile is not made up for, though votes cast meanwhile count. Raises
    UnknownSchedule. Call inside a transaction."""
    get(db, id)
    now = timestamp()
    db.execute(
        "UPDATE schedules SET paused = 0, updated_at = :now, since = CASE kind WHEN 'votes' THEN since ELSE :now END"
        " WHERE id = :id AND paused",
        {"now": now, "id": id},
    )
    audit.record(db, actor=actor, action="schedule.resume", subject=id)
    return get(db, id)


def remove(db: Database, id: str, *, actor: str) -> Schedule:
    """What it was. Raises UnknownSchedule. Call inside a transaction."""
    schedule = get(db, id)
    db.execute("DELETE FROM schedules WHERE id = ?", (id,))
    audit.record(db, actor=actor, action="schedule.remove", subject=id)
    return schedule


def get(db: Database, id: str) -> Schedule:
    """Raises UnknownSchedule."""
    row = db.execute(f"SELECT {_COLUMNS} FROM schedules WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise UnknownSchedule(id)
    return _schedule(row)


def list_all(db: Database) -> list[Schedule]:
    """The oldest first."""
    return [_schedule(row) for row in db.execute(f"SELECT {_COLUMNS} FROM schedules ORDER BY id")]


def _schedule(row: tuple[Any, ...]) -> Schedule:
    return Schedule(row[0], ScheduleKind(row[1]), row[2], row[3], bool(row[4]), *row[5:])


def new_votes(db: Database, schedule: Schedule, now: datetime) -> int:
    """Votes cast since the moment that the schedule counts from. Those of a time to come, cast while a clock was ahead,
    would be new again after every run."""
    count: int = db.execute(
        "SELECT count(*) FROM votes WHERE created_at > ? AND created_at <= ?", (schedule.since, timestamp(now))
    ).fetchone()[0]
    return count


def describe(db: Database, schedule: Schedule) -> dict[str, Any]:
    """The schedule as people see it. `next_due_at` is past where a run is late, and None where only votes can tell, or
    nothing is due since it is paused or not to be understood."""
    problem, next_due = schedule.problem, None
    try:
        next_due = None if schedule.paused else schedule.next_due()
    except BadSchedule as error:
        problem = str(error)
    counts = schedule.kind is ScheduleKind.VOTES
    return {
        "id": schedule.id,
        "kind": schedule.kind,
        "cron": schedule.spec if schedule.kind is ScheduleKind.CRON else None,
        "timezone": schedule.timezone if schedule.kind is ScheduleKind.CRON else None,
        "every": schedule.spec if schedule.kind is ScheduleKind.EVERY else None,
        "votes": parse_votes(schedule.spec) if counts else None,
        "new_votes": new_votes(db, schedule, datetime.now(UTC)) if counts else None,
        "paused": schedule.paused,
        "next_due_at": timestamp(next_due) if next_due else None,
        "last_due_at": schedule.last_due_at,
        "last_run": schedule.last_run,
        "problem": problem,
        "created_by": schedule.created_by,
        "created_at": schedule.created_at,
        "updated_at": schedule.updated_at,
    }


def is_due(db: Database, schedule: Schedule, now: datetime) -> bool:
    """Whether a run is due, paused or not. Raises BadSchedule."""
    if schedule.kind is ScheduleKind.VOTES:
        return new_votes(db, schedule, now) >= parse_votes(schedule.spec)
    due_at = schedule.next_due()
    return due_at is not None and due_at <= now


def come_due(db: Database, schedule: Schedule, *, now: datetime | None = None) -> str | None:
    """Ask for the run that is due, once: the id of the run that answers it, or None where there is nothing to do, since
    it is not due, was answered by another clock, or has changed since `schedule` was read.

    Times that were missed are answered together. A run that is active already answers a time, and one that has not
    begun a number of votes as well; that number stays due until a run has ended that began without them. Raises
    BadSchedule. Call inside a transaction."""
    now = now or datetime.now(UTC)
    current = db.execute("SELECT updated_at, since, paused FROM schedules WHERE id = ?", (schedule.id,)).fetchone()
    if current != (*schedule.version, 0) or not is_due(db, schedule, now):
        return None
    due_at = schedule.next_due() or now
    since = now
    if schedule.kind is ScheduleKind.EVERY:
        interval = parse_interval(schedule.spec)
        since = due_at + interval * ((now - due_at) // interval)  # keep to its beat
    try:
        run_id = runs.request(db, requested_by=schedule.id, config={}).id
    except runs.RunActive as active:
        run_id = str(active)
        if schedule.kind is ScheduleKind.VOTES and runs.get(db, run_id).status is not RunStatus.QUEUED:
            return None
        audit.record(db, actor=schedule.id, action="schedule.join", subject=run_id)
    db.execute(
        "UPDATE schedules SET since = ?, last_due_at = ?, last_run = ?, problem = NULL WHERE id = ?",
        (timestamp(since), timestamp(due_at), run_id, schedule.id),
    )
    return run_id


def set_right(db: Database) -> None:
    """Have those that count from a time to come, since a clock was ahead, count from now: nothing would be due before
    that time. Call inside a transaction."""
    db.execute("UPDATE schedules SET since = ? WHERE since > ?", (timestamp(), timestamp(plus_s=AHEAD_S)))


def record_problem(db: Database, id: str, problem: str | None) -> None:
    """Why it cannot come due. Call inside a transaction."""
    db.execute("UPDATE schedules SET problem = ? WHERE id = ? AND problem IS NOT ?", (problem, id, problem))
