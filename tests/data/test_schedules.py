"""Schedules: what a person wrote means what cron means by it, and what is due is due once."""

import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from apscheduler.triggers.cron import CronTrigger
from sqlite_utils import Database

from data import runs, schedules
from data.database import connect, transaction
from data.schedules import BadSchedule, Cron, Schedule, ScheduleKind
from data.types import RunStatus, timestamp

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    db = connect(tmp_path / "nightshift.db")
    yield db
    db.close()


def add(db: Database, kind: ScheduleKind, spec: str, timezone: str | None = None, *, since: str = "") -> Schedule:
    """A schedule that counts from `since`."""
    with transaction(db):
        schedule = schedules.add(db, kind, spec, timezone=timezone, actor="cli")
        if since:
            db.execute("UPDATE schedules SET since = ? WHERE id = ?", (since, schedule.id))
        return schedules.get(db, schedule.id)


def come_due(db: Database, schedule: Schedule, now: datetime | str) -> str | None:
    with transaction(db):
        return schedules.come_due(db, schedule, now=at(now) if isinstance(now, str) else now)


def end_the_run(db: Database) -> None:
    with transaction(db):
        run = runs.claim(db) or runs.active(db)
        assert run is not None
        runs.finish(db, run.id, RunStatus.SUCCEEDED)


def cast_votes(db: Database, n: int, when: str) -> None:
    """Votes on nothing: only their time is looked at."""
    db.execute("PRAGMA foreign_keys = OFF")
    first = db.execute("SELECT count(*) FROM votes").fetchone()[0]
    with transaction(db):
        for i in range(first, first + n):
            db.execute(
                "INSERT INTO votes (id, comparison_id, key_id, choice, decided_ms, created_at, updated_at)"
                " VALUES (?, ?, 'key', 'a', 1, ?, ?)",
                (f"vote_{i}", f"cmp_{i}", when, when),
            )
    db.execute("PRAGMA foreign_keys = ON")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(expression: str, start: str, n: int, zone: ZoneInfo = BERLIN) -> list[str]:
    """The first `n` times after `start`, both as the clocks of the zone show them."""
    cron, moment, found = Cron.parse(expression), datetime.fromisoformat(start).replace(tzinfo=zone), []
    for _ in range(n):
        moment = cron.next_after(moment, zone)
        found.append(moment.astimezone(zone).strftime("%a %Y-%m-%d %H:%M"))
    return found


# Cron expressions


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0 3 * * *", ["Thu 2026-10-01 03:00", "Fri 2026-10-02 03:00"]),
        ("0 3 * * 0", ["Sun 2026-10-04 03:00", "Sun 2026-10-11 03:00"]),
        ("0 3 * * 7", ["Sun 2026-10-04 03:00", "Sun 2026-10-11 03:00"]),
        ("0 3 * * sun", ["Sun 2026-10-04 03:00", "Sun 2026-10-11 03:00"]),
        ("0 3 * * 1", ["Mon 2026-10-05 03:00", "Mon 2026-10-12 03:00"]),
        ("0 3 * * 1-5", ["Thu 2026-10-01 03:00", "Fri 2026-10-02 03:00", "Mon 2026-10-05 03:00"]),
        ("0 3 * * FRI-Mon", ["Fri 2026-10-02 03:00", "Sat 2026-10-03 03:00", "Sun 2026-10-04 03:00"]),
        ("0 3 * * 5-7", ["Fri 2026-10-02 03:00", "Sat 2026-10-03 03:00", "Sun 2026-10-04 03:00"]),
        ("0 3 * * */3", ["Sat 2026-10-03 03:00", "Sun 2026-10-04 03:00", "Wed 2026-10-07 03:00"]),
        ("*/20 22-23 * * *", ["Wed 2026-09-30 22:00", "Wed 2026-09-30 22:20", "Wed 2026-09-30 22:40"]),
        ("0 8-18/5 1,15 * *", ["Thu 2026-10-01 08:00", "Thu 2026-10-01 13:00", "Thu 2026-10-01 18:00"]),
        ("50/5 20 * * *", ["Wed 2026-09-30 20:50", "Wed 2026-09-30 20:55", "Thu 2026-10-01 20:50"]),
        ("0 0 1 jan *", ["Fri 2027-01-01 00:00", "Sat 2028-01-01 00:00"]),
        ("0 0 29 2 *", ["Tue 2028-02-29 00:00", "Sun 2032-02-29 00:00"]),
        ("0 3 13 * 5", ["Fri 2026-10-02 03:00", "Fri 2026-10-09 03:00", "Tue 2026-10-13 03:00"]),
        ("0 3 */2 * 5", ["Fri 2026-10-09 03:00", "Fri 2026-10-23 03:00"]),
    ],
)  # fmt: skip
def test_an_expression_means_what_cron_means(expression: str, expected: list[str]) -> None:
    assert times(expression, "2026-09-30 12:00", len(expected)) == expected


def test_times_are_those_of_apscheduler_where_it_agrees_with_cron() -> None:
    """Weekdays by name, and never both day fields, outside the hours in which clocks change."""
    rng = random.Random(0)

    def field(low: int, high: int) -> str:
        first = rng.randint(low, high)
        last = rng.randint(first, high)
        return rng.choice(["*", str(first), f"{first}-{last}", f"*/{rng.randint(2, 5)}", f"{low},{first}"])

    for _ in range(300):
        by_week = rng.random() < 0.5
        weekday = rng.choice(["mon-fri", "sun", "tue,sat"]) if by_week else "*"
        expression = f"{field(0, 59)} {field(4, 23)} {'*' if by_week else field(1, 31)} {field(1, 12)} {weekday}"
        zone = ZoneInfo(rng.choice(["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "UTC"]))
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(3 * 365 * 86_400))
        theirs = CronTrigger.from_crontab(expression, timezone=zone)
        expected = theirs.get_next_fire_time(None, moment + timedelta(microseconds=1))
        if expected is None or expected.astimezone(zone).hour < 4:
            continue  # * as the hour
        assert Cron.parse(expression).next_after(moment, zone) == expected, (expression, moment, zone)


def test_the_change_of_clocks_neither_loses_a_run_nor_doubles_it() -> None:
    spring = times("30 2 * * *", "2026-03-28 12:00", 2)
    assert spring == ["Sun 2026-03-29 03:30", "Mon 2026-03-30 02:30"], "half past two did not exist"
    autumn = times("30 2 * * *", "2026-10-24 12:00", 2)
    assert autumn == ["Sun 2026-10-25 02:30", "Mon 2026-10-26 02:30"], "half past two came twice"
    for every_hour in ("*", "*/1", "0-23"):
        hourly = times(f"0 {every_hour} * * *", "2026-10-25 01:30", 3)
        assert hourly == ["Sun 2026-10-25 02:00", "Sun 2026-10-25 02:00", "Sun 2026-10-25 03:00"]


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("0 3 * *", "'0 3 \\* \\*' has 4 fields, and a cron expression has five"),
        ("", "has 0 fields"),
        ("@daily", "has 1 field,"),
        ("60 3 * * *", "'60' is no minute: 60 is out of range. It takes 0 to 59"),
        ("0 24 * * *", "'24' is no hour"),
        ("0 3 0 * *", "'0' is no day of the month"),
        ("0 3 * 13 *", "'13' is no month"),
        ("0 3 * jan/2x *", "'2x' is no step"),
        ("0 3 * * 8", "'8' is no day of the week: 8 is out of range. It takes 0 to 6, or sun to sat"),
        ("0 3 * * sunday", "'sunday' is not a number nor a name"),
        ("0 3 * * *  *", "has 6 fields"),
        ("*/0 3 * * *", "'0' is no step"),
        ("30-10 3 * * *", "30-10 goes backwards"),
        ("*/" + "9" * 5000 + " 3 * * *", "at most 1000 characters"),
        ("0 3 1,,2 * *", "'' is not a number"),
        ("-5 3 * * *", "'' is not a number"),
        ("0 3 30 2 *", "No day of the calendar matches"),
    ],
)
def test_what_is_no_expression_is_refused_with_what_is_wrong(db: Database, expression: str, sentence: str) -> None:
    with pytest.raises(BadSchedule, match=sentence):
        add(db, ScheduleKind.CRON, expression)
    assert schedules.list_all(db) == []


@pytest.mark.parametrize("name", ["Mars/Phobos", "", "Europe", "../etc/passwd", "/etc/passwd", "x" * 5000, "\0"])
def test_what_is_no_time_zone_is_refused(name: str) -> None:
    with pytest.raises(BadSchedule, match="is no time zone: name one as the IANA does"):
        schedules.find_timezone(name)


# Intervals and numbers of votes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("6h", 21_600), ("1d", 86_400), (" 1.5H ", 5400), ("2 d", 172_800)],
)
def test_an_interval_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert schedules.parse_interval(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["0s", "6", "h", "-6h", "6h30m", "1w", "", "1e3s", "999999999d"])
def test_what_is_no_interval_is_refused(db: Database, text: str) -> None:
    with pytest.raises(BadSchedule, match="is no interval: write a number above 0 and s, m, h or d"):
        add(db, ScheduleKind.EVERY, text)


def test_an_interval_too_short_for_anything_is_refused(db: Database) -> None:
    with pytest.raises(BadSchedule, match="the shortest interval is 1 second"):
        add(db, ScheduleKind.EVERY, "0.5s")


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "many", ""])
def test_what_is_no_number_of_votes_is_refused(db: Database, text: str) -> None:
    with pytest.raises(BadSchedule, match="is no number of votes"):
        add(db, ScheduleKind.VOTES, text)


def test_only_a_cron_expression_has_a_time_zone(db: Database) -> None:
    assert add(db, ScheduleKind.CRON, "0 3 * * *").timezone == "UTC"
    with pytest.raises(BadSchedule, match="Only a cron expression has a time zone"):
        add(db, ScheduleKind.EVERY, "6h", "Europe/Berlin")


# What is due


def test_a_time_that_passed_unseen_is_due_once_and_then_no_more(db: Database) -> None:
    nightly = add(db, ScheduleKind.CRON, "0 3 * * *", "Europe/Berlin", since="2026-01-10T12:00:00.000Z")
    assert nightly.next_due() == at("2026-01-11 02:00")
    assert come_due(db, nightly, "2026-01-11 01:59:59") is None
    run = come_due(db, nightly, "2026-01-14 09:30")  # three nights were missed
    assert run is not None
    assert runs.get(db, run).requested_by == nightly.id
    after = schedules.get(db, nightly.id)
    assert (after.last_due_at, after.last_run) == ("2026-01-11T02:00:00.000Z", run)
    assert after.next_due() == at("2026-01-15 02:00")
    end_the_run(db)
    assert come_due(db, nightly, "2026-01-14 09:31") is None, "what was read before it came due is out of date"
    assert come_due(db, after, "2026-01-14 09:31") is None


def test_a_time_is_answered_at_its_very_moment_and_not_again(db: Database) -> None:
    nightly = add(db, ScheduleKind.CRON, "0 3 * * *", since="2026-01-10T12:00:00.000Z")
    assert come_due(db, nightly, "2026-01-11 03:00:00")
    assert schedules.get(db, nightly.id).next_due() == at("2026-01-12 03:00")


def test_an_interval_keeps_its_beat_however_late_it_is_answered(db: Database) -> None:
    hourly = add(db, ScheduleKind.EVERY, "1h", since="2026-01-10T12:00:00.000Z")
    assert come_due(db, hourly, "2026-01-10 13:25")
    late = schedules.get(db, hourly.id)
    assert (late.last_due_at, late.next_due()) == ("2026-01-10T13:00:00.000Z", at("2026-01-10 14:00"))
    end_the_run(db)
    assert come_due(db, late, "2026-01-11 09:59")
    assert schedules.get(db, hourly.id).next_due() == at("2026-01-11 10:00"), "many that were missed are one"


def test_two_that_are_due_at_once_are_one_run(db: Database) -> None:
    one = add(db, ScheduleKind.CRON, "0 3 * * *", since="2026-01-10T12:00:00.000Z")
    other = add(db, ScheduleKind.EVERY, "15h", since="2026-01-10T12:00:00.000Z")
    run = come_due(db, one, "2026-01-11 03:00")
    assert come_due(db, other, "2026-01-11 03:00") == run
    assert len(runs.list_runs(db)) == 1
    assert schedules.get(db, other.id).last_run == run
    end_the_run(db)
    assert come_due(db, schedules.get(db, other.id), "2026-01-11 04:00") is None, "it was answered by that run"
    joined = db.execute("SELECT actor, subject FROM audit WHERE action = 'schedule.join'").fetchall()
    assert joined == [(other.id, run)]


def test_votes_that_come_due_beside_a_time_join_its_run_while_it_has_not_begun(db: Database) -> None:
    nightly = add(db, ScheduleKind.CRON, "0 3 * * *", since="2026-01-10T12:00:00.000Z")
    votes = add(db, ScheduleKind.VOTES, "2", since="2026-01-10T12:00:00.000Z")
    cast_votes(db, 2, "2026-01-10T13:00:00.000Z")
    run = come_due(db, nightly, "2026-01-11 03:00")
    assert come_due(db, votes, "2026-01-11 03:00") == run
    end_the_run(db)
    assert come_due(db, schedules.get(db, votes.id), "2026-01-11 04:00") is None, "that run learned from them"


def test_votes_are_counted_from_the_last_run_that_they_asked_for(db: Database) -> None:
    schedule = add(db, ScheduleKind.VOTES, "5", since="2026-01-10T12:00:00.000Z")
    assert schedule.next_due() is None
    cast_votes(db, 3, "2026-01-10T11:00:00.000Z")  # before
    cast_votes(db, 4, "2026-01-10T13:00:00.000Z")
    assert come_due(db, schedule, "2026-01-10 14:00") is None
    assert schedules.new_votes(db, schedule, at("2026-01-10 14:00")) == 4
    cast_votes(db, 3, "2026-01-10T13:30:00.000Z")
    assert come_due(db, schedule, "2026-01-10 14:00")
    end_the_run(db)
    after = schedules.get(db, schedule.id)
    assert schedules.new_votes(db, after, at("2026-01-10 14:01")) == 0
    assert come_due(db, after, "2026-01-10 14:01") is None


def test_votes_wait_for_the_end_of_a_run_that_began_without_them(db: Database) -> None:
    with transaction(db):
        runs.request(db, requested_by="cli", config={})
        runs.claim(db)
    schedule = add(db, ScheduleKind.VOTES, "2", since="2026-01-10T12:00:00.000Z")
    cast_votes(db, 2, "2026-01-10T13:00:00.000Z")
    assert come_due(db, schedule, "2026-01-10 14:00") is None
    assert schedules.get(db, schedule.id) == schedule
    end_the_run(db)
    assert come_due(db, schedule, "2026-01-10 15:00") is not None


def test_what_counts_from_a_time_to_come_counts_from_now(db: Database) -> None:
    """A clock was a month ahead, and came due in it."""
    ahead = [add(db, *of, since=timestamp(plus_s=30 * 86_400)) for of in (
        (ScheduleKind.EVERY, "1d"), (ScheduleKind.CRON, "0 3 * * *"), (ScheduleKind.VOTES, "1"),
    )]  # fmt: skip
    a_little = add(db, ScheduleKind.EVERY, "1d", since=timestamp(plus_s=30))
    with transaction(db):
        schedules.set_right(db)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    cast_votes(db, 1, timestamp(plus_s=1))
    assert all(schedules.is_due(db, schedules.get(db, schedule.id), tomorrow) for schedule in ahead)
    assert schedules.get(db, a_little.id) == a_little, "or what came due just now would again"


def test_votes_that_were_cast_ahead_start_no_run_after_run(db: Database) -> None:
    """A clock was a day ahead, and a run has answered them."""
    schedule = add(db, ScheduleKind.VOTES, "3", since=timestamp(plus_s=86_400))
    cast_votes(db, 3, timestamp(plus_s=86_300))
    with transaction(db):
        schedules.set_right(db)
    schedule = schedules.get(db, schedule.id)
    assert come_due(db, schedule, datetime.now(UTC) + timedelta(hours=1)) is None
    cast_votes(db, 3, timestamp(plus_s=1))
    assert come_due(db, schedule, datetime.now(UTC) + timedelta(hours=1)) is not None


def test_of_four_who_answer_the_same_200_times_at_once_one_does_each_time(tmp_path: Path, db: Database) -> None:
    """None of them holds a lease: the row itself sees to it."""
    schedule = add(db, ScheduleKind.EVERY, "1h", since="2026-01-10T12:00:00.000Z")
    start, ticks = at("2026-01-10 12:00"), 200
    answered: list[tuple[int, str]] = []
    together = threading.Barrier(4)

    def tick() -> None:
        own = connect(tmp_path / "nightshift.db")
        for number in range(1, ticks + 1):
            seen = schedules.get(own, schedule.id)
            together.wait(60)
            run = come_due(own, seen, start + timedelta(hours=number))
            if run is not None:
                answered.append((number, run))
                end_the_run(own)
            together.wait(60)
        own.close()

    threads = [threading.Thread(target=tick) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [number for number, _ in answered] == list(range(1, ticks + 1))
    assert len(runs.list_runs(db, limit=1000)) == ticks


# Changes


def test_a_paused_schedule_is_not_due_and_goes_on_from_where_it_is_resumed(db: Database) -> None:
    nightly = add(db, ScheduleKind.CRON, "0 3 * * *", since="2026-01-10T12:00:00.000Z")
    with transaction(db):
        paused = schedules.pause(db, nightly.id, actor="key_1")
    assert paused.paused
    assert come_due(db, paused, "2026-01-12 03:00") is None
    assert come_due(db, nightly, "2026-01-12 03:00") is None, "a clock that read it before the pause"
    with transaction(db):
        resumed = schedules.resume(db, nightly.id, actor="key_1")
    assert not resumed.paused
    due = resumed.next_due()
    assert due is not None
    assert due > datetime.now(UTC), "what was due meanwhile is not made up for"


def test_votes_cast_during_a_pause_count(db: Database) -> None:
    schedule = add(db, ScheduleKind.VOTES, "2", since="2026-01-10T12:00:00.000Z")
    with transaction(db):
        schedules.pause(db, schedule.id, actor="cli")
    cast_votes(db, 2, timestamp(plus_s=-1))
    with transaction(db):
        resumed = schedules.resume(db, schedule.id, actor="cli")
    assert come_due(db, resumed, datetime.now(UTC)) is not None


def test_an_edited_schedule_counts_from_the_edit(db: Database) -> None:
    schedule = add(db, ScheduleKind.EVERY, "1h", since="2026-01-10T12:00:00.000Z")
    with transaction(db):
        edited = schedules.edit(db, schedule.id, ScheduleKind.CRON, "0  3 * * 1", timezone="Europe/Berlin", actor="cli")
    assert (edited.kind, edited.spec, edited.timezone) == (ScheduleKind.CRON, "0 3 * * 1", "Europe/Berlin")
    assert edited.since == edited.updated_at > schedule.since
    assert come_due(db, schedule, "2026-01-10 13:00") is None, "a clock that read it before the edit"
    with transaction(db):
        later = schedules.edit(db, schedule.id, ScheduleKind.CRON, "0 4 * * 1", actor="cli")
    assert later.timezone == "Europe/Berlin"


def test_another_number_of_votes_keeps_the_count(db: Database) -> None:
    schedule = add(db, ScheduleKind.VOTES, "10", since="2026-01-10T12:00:00.000Z")
    cast_votes(db, 3, "2026-01-10T13:00:00.000Z")
    with transaction(db):
        edited = schedules.edit(db, schedule.id, ScheduleKind.VOTES, "3", actor="cli")
    assert schedules.new_votes(db, edited, datetime.now(UTC)) == 3
    assert come_due(db, edited, "2026-01-10 14:00") is not None


def test_a_bad_edit_changes_nothing(db: Database) -> None:
    schedule = add(db, ScheduleKind.EVERY, "1h")
    with pytest.raises(BadSchedule), transaction(db):
        schedules.edit(db, schedule.id, ScheduleKind.EVERY, "0h", actor="cli")
    assert schedules.list_all(db) == [schedule]


def test_a_removed_schedule_is_never_due_again_and_its_runs_stay(db: Database) -> None:
    schedule = add(db, ScheduleKind.EVERY, "1h", since="2026-01-10T12:00:00.000Z")
    run = come_due(db, schedule, "2026-01-10 13:00")
    assert run is not None
    with transaction(db):
        schedules.remove(db, schedule.id, actor="cli")
    assert come_due(db, schedule, "2026-01-10 14:00") is None
    assert schedules.list_all(db) == []
    assert runs.get(db, run).requested_by == schedule.id


@pytest.mark.parametrize("act", [schedules.pause, schedules.resume, schedules.remove])
def test_an_unknown_schedule_is_said_to_be_so_and_leaves_no_trace(db: Database, act: type) -> None:
    with pytest.raises(schedules.UnknownSchedule), transaction(db):
        act(db, "sched_x", actor="cli")
    assert db.execute("SELECT count(*) FROM audit").fetchone() == (0,)


def test_every_act_leaves_a_row_in_the_audit(db: Database) -> None:
    schedule = add(db, ScheduleKind.EVERY, "1h")
    with transaction(db):
        schedules.pause(db, schedule.id, actor="key_1")
        schedules.resume(db, schedule.id, actor="key_2")
        schedules.edit(db, schedule.id, ScheduleKind.VOTES, "5", actor="key_3")
        schedules.remove(db, schedule.id, actor="key_4")
    acts = db.execute("SELECT actor, action FROM audit WHERE subject = ?", (schedule.id,)).fetchall()
    assert acts == [
        ("cli", "schedule.create"), ("key_1", "schedule.pause"), ("key_2", "schedule.resume"),
        ("key_3", "schedule.edit"), ("key_4", "schedule.remove"),
    ]  # fmt: skip
