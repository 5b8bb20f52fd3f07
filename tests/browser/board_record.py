"""A made-up month for the board: votes, runs, policies, a trial under way, a schedule."""

import math
import random
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any

from sqlite_utils import Database

from data import audit, comparisons, completions, learning, leases, registry, runs, schedules
from data.database import transaction
from data.ids import new_id
from data.learning import RewardModelRow
from data.schedules import ScheduleKind
from data.settings import GateSettings
from data.types import (
    BASE_POLICY,
    Comparison,
    ComparisonKind,
    Completion,
    CompletionStatus,
    PolicyStatus,
    RunStatus,
    timestamp,
)
from service import trial
from trainer import gate

ASKED = [
    ("Give me a tip for better sleep.", "Sleep is important.", "Keep the same hours every day, and no screens in bed."),
    ("What is the capital of Australia?", "It is Canberra.", "Canberra. Many think of Sydney, which is larger."),
    (
        "How do I boil an egg?",
        "Boil it in water until it is done.",
        "**Eight minutes**, from cold water.",
    ),
    ("Why is the sky blue?", "Because of how light works.", "Air scatters *blue* light more than red, from all sides."),
    ("Is 91 a prime number?", "Yes, 91 is prime.", "No: 91 is 7 × 13."),
]
FIGURES = {
    **{"prompts": 212.0, "answers": 424.0, "judge_win_rate": 0.643, "judge_win_rate_low": 0.588},
    **{"conversations": 187.0, "judge_win_rate_high": 0.695, "kl": 7.82, "length": 41.3, "incumbent_length": 38.6},
    **{"unfinished": 0.012, "incumbent_unfinished": 0.014, "repetition": 0.019, "incumbent_repetition": 0.021},
    **{"reward_accuracy": 0.712, "reward_length_accuracy": 0.574, "reward_pairs": 268.0, "reward_equal_pairs": 268.0},
    **{"facts": 0.883, "incumbent_facts": 0.887, "base_facts": 0.885, "facts_answers": 600.0},
    **{"refusals": 0.962, "incumbent_refusals": 0.955, "base_refusals": 0.958, "refusals_answers": 600.0},
    **{"sycophancy": 0.741, "incumbent_sycophancy": 0.733, "base_sycophancy": 0.730, "sycophancy_answers": 600.0},
}


def fill(db: Database, add_policy: Callable[..., str], *, operator: str, people: list[str]) -> None:
    """`people`: the keys of at least two raters; `operator`: that of who runs the place."""
    chance = random.Random(7)
    with transaction(db):
        db.execute("UPDATE keys SET label = 'operator' WHERE id = ?", (operator,))
        leases.acquire(db, "clock", "elsewhere", for_s=86_400)
        _votes(db, chance, people)
    _policies(db, add_policy, operator)
    with transaction(db):
        _trial(db, people[0], challenger="policy-0005", incumbent="policy-0003")
        _running_run(db, chance, operator)
        nightly = schedules.add(db, ScheduleKind.CRON, "0 3 * * *", timezone="Europe/Berlin", actor=operator)
        schedules.add(db, ScheduleKind.VOTES, "500", actor=operator)
        schedules.pause(db, schedules.add(db, ScheduleKind.EVERY, "6h", actor=operator).id, actor=operator)
        audit.record(db, actor=nightly.id, action="run.request", subject=runs.list_runs(db)[0].id)


def _ago(**span: float) -> str:
    return timestamp(datetime.now(UTC) - timedelta(**span))


def _pair(
    db: Database, key: str, at: str, answers: tuple[str, str], policies: tuple[str, str], asked: str, duel: str | None
) -> str:
    messages = [{"role": "user", "content": asked}]
    ids = []
    for answer, policy in zip(answers, policies, strict=True):
        row = Completion(
            new_id("cpl"), key, key, completions.conversation_of(key, messages), messages, answer, policy, {},
            CompletionStatus.COMPLETE, "stop", 5, 9, None, 1.0, at,
        )  # fmt: skip
        completions.insert(db, row)
        ids.append(row.id)
    kind = ComparisonKind.TRIAL if duel else ComparisonKind.SAME_POLICY
    comparison = Comparison(new_id("cmp"), key, ids[0], ids[1], kind, False, at, timestamp(plus_s=9), duel)
    comparisons.insert(db, comparison)
    return comparison.id


def _vote(db: Database, comparison: str, key: str, choice: str, at: str) -> None:
    db.execute(
        "INSERT INTO votes (id, comparison_id, key_id, choice, decided_ms, created_at, updated_at)"
        " VALUES (?, ?, ?, ?, 4000, ?, ?)",
        (new_id("vote"), comparison, key, choice, at, at),
    )


def _votes(db: Database, chance: random.Random, people: list[str]) -> None:
    sides = cycle("ab")  # nobody votes for the place
    for day in range(29, 1, -1):  # then a trial began
        quiet = day % 7 in (1, 2)  # as weekends are, but the same whatever day it is today
        for _ in range(int((14 if quiet else 30) * (1.7 - day / 40) * chance.uniform(0.7, 1.2))):
            at = _ago(days=day, minutes=chance.random() * 600 + 1)
            asked, short, good = chance.choice(ASKED)
            comparison = _pair(db, people[0], at, (short, good), (BASE_POLICY, BASE_POLICY), asked, None)
            choice = chance.choices([next(sides), "tie", "both_bad"], [83, 12, 5])[0]
            _vote(db, comparison, people[0], choice, at)
            if chance.random() < 0.06:
                same = choice if choice in "ab" and chance.random() < 0.76 else next(sides)
                _vote(db, comparison, people[1], same, at)


def _run(
    db: Database, by: str, *, hours_ago: float, minutes: float, status: RunStatus, error: str | None = None
) -> str:
    runs.request(db, requested_by=by, config={})
    run = runs.claim(db)
    assert run is not None
    runs.finish(db, run.id, status, error=error)
    times = (_ago(hours=hours_ago), _ago(hours=hours_ago), _ago(hours=hours_ago - minutes / 60), run.id)
    db.execute("UPDATE runs SET stage = 'ppo', created_at = ?, started_at = ?, ended_at = ? WHERE id = ?", times)
    db.execute("UPDATE audit SET at = ? WHERE subject = ?", (times[0], run.id))
    return run.id


def _policies(db: Database, add_policy: Callable[..., str], operator: str) -> None:
    """The base, one that was rejected, two that went into service one after the other, one that the gate turned away,
    and the one that stands trial."""
    settings = GateSettings()
    bad = FIGURES | {"length": 52.4, "facts": 0.821}
    plan = [
        (BASE_POLICY, bad, 0.561, 0.552, 410),
        (BASE_POLICY, FIGURES, 0.634, 0.561, 290),
        ("policy-0002", FIGURES, 0.671, 0.569, 170),
        ("policy-0003", bad, 0.689, 0.577, 74),
        ("policy-0003", FIGURES, 0.712, 0.574, 45),
    ]
    for parent, figures, accuracy, length_accuracy, hours_ago in plan:
        with transaction(db):
            if hours_ago == 45:
                error = "Out of memory: lower microbatch_tokens in training.ppo and in training.reward."
                _run(db, operator, hours_ago=50, minutes=2, status=RunStatus.FAILED, error=error)
            run = _run(db, operator, hours_ago=hours_ago, minutes=19.5, status=RunStatus.SUCCEEDED)
            report = {"accuracy": accuracy, "length_accuracy": length_accuracy, "pairs": 268, "log_loss": 0.58}
            row = RewardModelRow(new_id("rm"), run, f"reward_models/{run}", "0", report)
            learning.insert_reward_model(db, row)
            db.execute("UPDATE reward_models SET created_at = ? WHERE id = ?", (_ago(hours=hours_ago), row.id))
        verdict = gate.judge(figures, settings)
        add_policy(
            PolicyStatus.REJECTED, parent=parent, run_id=run, metrics={"gate": verdict.as_dict()},
            created_at=_ago(hours=hours_ago - 0.3),
        )  # fmt: skip
    with transaction(db):
        registry.set_status(db, BASE_POLICY, PolicyStatus.RETIRED)
        registry.set_status(db, "policy-0002", PolicyStatus.RETIRED)
        registry.set_status(db, "policy-0003", PolicyStatus.SERVING)
        registry.set_status(db, "policy-0005", PolicyStatus.TRIAL)
        for replaced, policy, hours_ago, wins in (
            (BASE_POLICY, "policy-0002", 240, 71),
            ("policy-0002", "policy-0003", 110, 96),
        ):
            reason = f"Its trial was won: {wins} wins, {wins - 34} losses, 12 ties: E = 21.4, mirrored 0.04"
            at = _ago(hours=hours_ago)
            db.execute(
                "INSERT INTO swaps (id, policy, replaced, actor, reason, requested_at, flipped_at, drained_at)"
                " VALUES (?, ?, ?, 'trial', ?, ?, ?, ?)",
                (new_id("swap"), policy, replaced, reason, at, at, at),
            )
            db.execute(
                "INSERT INTO audit (at, actor, action, subject) VALUES (?, 'trial', 'policy.promote', ?)", (at, policy)
            )


def _trial(db: Database, key: str, *, challenger: str, incumbent: str) -> None:
    chance = random.Random(27)  # goes the challenger's way, and is not over: E ends at 9
    duel = new_id("duel")
    db.execute(
        "INSERT INTO duels (id, kind, challenger, incumbent, threshold, budget, status, started_at)"
        " VALUES (?, 'trial', ?, ?, 20, 2000, 'running', ?)",
        (duel, challenger, incumbent, _ago(hours=44)),
    )
    wins = losses = ties = 0
    standing: dict[str, Any] = {}
    for votes in range(1, 118):
        asked, short, good = chance.choice(ASKED)
        at = _ago(hours=44 - votes / 2.7)
        comparison = _pair(db, key, at, (good, short), (challenger, incumbent), asked, duel)
        choice = chance.choices(["a", "b", "tie"], [0.56, 0.34, 0.1])[0]
        _vote(db, comparison, key, choice, at)
        wins, losses, ties = wins + (choice == "a"), losses + (choice == "b"), ties + (choice == "tie")
        if choice == "tie":
            continue
        standing = asdict(trial.standing(wins, losses, ties, alpha=0.05))
        db.execute(
            "INSERT INTO duel_curve VALUES (:duel, :votes, :e_value, :e_mirrored, :rate_low, :rate_high, :at)",
            standing | {"duel": duel, "votes": wins + losses, "at": at},
        )
    db.execute(
        "UPDATE duels SET wins = :wins, losses = :losses, ties = :ties, e_value = :e_value, e_mirrored = :e_mirrored,"
        " rate_low = :rate_low, rate_high = :rate_high WHERE id = :id",
        standing | {"id": duel, "ties": ties},
    )


def _running_run(db: Database, chance: random.Random, operator: str) -> None:
    runs.request(db, requested_by=operator, config={})
    run = runs.claim(db)
    assert run is not None
    runs.beat(db, run.id, stage="ppo")
    db.execute(
        "UPDATE runs SET started_at = ?, created_at = ? WHERE id = ?", (_ago(minutes=9), _ago(minutes=9), run.id)
    )
    for step in range(60):
        noise = chance.gauss(0, 0.05)
        runs.add_metrics(db, run.id, step, {"reward/accuracy": 0.72 - 0.2 * math.exp(-step / 14) + noise})
    for step in range(24):
        figures = {
            "score": 1.5 * (1 - math.exp(-step / 10)) + chance.gauss(0, 0.06),
            "kl": 0.011 * step**2 + chance.gauss(0, 0.08) * (step > 0),
            "length": 38 + 0.15 * step + chance.gauss(0, 0.7),
            "entropy": 2.1 - 0.02 * step + chance.gauss(0, 0.02),
            "episodes_per_s": 21 + chance.gauss(0, 0.9),
        }
        runs.add_metrics(db, run.id, step, {f"ppo/{name}": value for name, value in figures.items()})
