"""The hot swap: a new policy comes into service while people chat, and goes out again when it disappoints.

vLLM serves any number of LoRA adapters over one base model, each under a name of its own, and every request names the
one that it wants. So a swap needs no restart, and no request ever notices it:

    load     give the new adapter to every engine beside running traffic, and have it answer once, so that nobody waits
             for a first time. Where one engine fails, the others give it back, and nothing else has happened. But the
             way back waits for none that hangs: it stays out of traffic, and the others go on without it.
    flip     one transaction makes it the policy that serves; then new requests name it. Running ones end on the policy
             they began with, and their answers say so.
    drain    wait until no request of the old policy runs on any engine, then have the engines forget it. A name is
             never used again: vLLM's prefix cache knows adapters by name.

What is to serve stands in the record (`data.swaps`), never only here: a crash at any line leaves either a policy that
is still `promoted`, so that the next start loads and flips it, or one that serves already.

Before it serves, a candidate stands a trial: it is loaded beside the policy that serves, and people vote on pairs of
answers from both. After the flip the predecessor stays loaded and is asked now and then, and comes back when people
prefer it, or when more answers fail or stay without an end than before.

Every API process follows the record (`_follow`); one of them, the holder of a lease, changes it (`_advance`, `_tidy`).
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TypeVar

from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import completions, duels, leases, registry, swaps
from data.completions import Outcomes
from data.database import Writer, connect
from data.registry import RegistryError
from data.settings import Settings
from data.swaps import CannotPromote, Superseded
from data.types import Duel, DuelKind, Policy, PolicyStatus, Swap
from service import trial
from service.engine import UNREADABLE, EngineProblem, Engines, PolicyRefused, words
from service.metrics import Metrics

log = logging.getLogger("nightshift.swap")

T = TypeVar("T")

LOOK_S = 0.25
"""Between looks at the record: how soon a change that another process wrote is seen."""
LEASE_S = 6.0
BEAT_S = 1.5
LONGEST_PAUSE_S = 15.0
"""Between two tries to load a policy."""
BEFORE_ANSWERS = 200
"""Of the predecessor, the last ones, that a new policy's answers are held against."""
AFTER_ANSWERS = 1000
"""Of a new policy, the first ones, that are."""


class LostLease(Exception):
    """Another process swaps now."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A policy to be loaded, and what for."""

    policy: str
    to_serve: bool
    """Else it goes on trial, or back to the engines that came back without it while its duel runs."""


@dataclass(slots=True)
class _Pause:
    """Before something that failed is tried again."""

    seconds: float
    until: float = 0.0


class HotSwap:
    """One per app. `duel` and the engines' pointer are as the record says, at most LOOK_S later."""

    def __init__(self, settings: Settings, reader: Database, writer: Writer, engines: Engines, metrics: Metrics):
        self.duel: Duel | None = None
        """The duel that runs."""
        self._settings = settings
        self._reader = reader
        self._writer = writer
        self._engines = engines
        self._metrics = metrics
        self._holder = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._leads = False
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._task: _Task | None = None
        self._work: asyncio.Task[None] | None = None
        self._pauses: dict[_Task, _Pause] = {}
        self._ready: set[str] = set()
        """The engines that were in traffic at our last look, by URL."""
        self._unwanted: dict[str, float] = {}
        """Policies that the engines hold and nobody wants, each with the time (monotonic) since when."""
        self._settled = ""
        """The swap whose policy has given all the answers that were to be held against its predecessor's."""
        self._logged = ""

    def start(self) -> None:
        loops = (self._keep_lease, self._follow, self._tidy)
        self._loops = [asyncio.create_task(loop()) for loop in loops]

    async def close(self) -> None:
        tasks = [*self._loops, *([self._work] if self._work else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(sqlite3.Error):
            await self._write(lambda db: leases.release(db, "swap", self._holder))

    def kick(self) -> None:
        """Look at the record now: something in it has changed."""
        self._wake.set()

    def duel_beside(self, serving: str) -> Duel | None:
        """The running duel against the policy that new requests take, if all engines in traffic hold its challenger."""
        duel = self.duel
        if duel is not None and duel.incumbent == serving and self._engines.all_hold(duel.challenger):
            return duel
        return None

    # Every process

    async def _keep_lease(self) -> None:
        while True:
            led = self._leads
            try:
                self._leads = await self._write(lambda db: leases.acquire(db, "swap", self._holder, for_s=LEASE_S))
            except sqlite3.Error as error:
                self._leads = False
                log.warning("The lease of the swap cannot be renewed: %s", error)
            if self._leads and not led:
                self.kick()
            await asyncio.sleep(BEAT_S)

    async def _follow(self) -> None:
        """Keep the duel and the pointer as the record has them, and set to work what it asks for."""
        while True:
            self._wake.clear()
            try:
                self.duel = duels.running(self._reader)
                self._engines.follow()
                ready = {engine.url for engine in self._engines.engines if engine.ready}
                if ready - self._ready:
                    self._pauses.clear()  # what failed because an engine was away need not wait any longer
                self._ready = ready
                self._set_to_work(self._next_task() if self._leads else None)
            except UNREADABLE as error:
                self._tell(f"The record cannot be followed: {error}")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):  # wait_for of Python 3.11 can swallow a cancel, and we never end
                    await self._wake.wait()

    def _next_task(self) -> _Task | None:
        """What the record asks for: a promoted policy is to serve; or a candidate is to go on trial, where none is, or
        an engine does not take the one that is; or an engine lacks the challenger of the duel that runs."""
        name = swaps.pending(self._reader)
        if name is not None:
            return _Task(name, to_serve=True)
        serving = registry.serving(self._reader)
        challenger = registry.get(self._reader, self.duel.challenger) if self.duel is not None else None
        on_trial = challenger is not None and challenger.status is PolicyStatus.TRIAL and challenger.problem is None
        if self._settings.gate.mode == "trial" and not on_trial and serving is not None:
            candidate = registry.next_for_trial(self._reader)
            if candidate is not None:
                return _Task(candidate.name, to_serve=False)
        if challenger is None or (challenger.problem is None and self._engines.all_hold(challenger.name)):
            return None
        return _Task(challenger.name, to_serve=False)

    def _set_to_work(self, task: _Task | None) -> None:
        if self._work is not None and self._work.done():
            if not self._work.cancelled() and (error := self._work.exception()):
                log.error("Making %s serve or stand its trial went wrong", self._task, exc_info=error)
            self._work = None
        elif self._work is not None and task != self._task:
            self._work.cancel()  # what is to serve now must not wait for what was
            self._work = None
        if self._work is not None:
            return
        self._task = task
        if task is None:
            self._pauses.clear()
            return
        pause = self._pauses.setdefault(task, _Pause(self._settings.engine.poll_s))
        if time.monotonic() >= pause.until:
            pause.until = time.monotonic() + pause.seconds
            pause.seconds = min(2 * pause.seconds, LONGEST_PAUSE_S)
            self._work = asyncio.create_task(self._advance(task))

    # The holder of the lease: load, and then flip or begin a trial

    async def _advance(self, task: _Task) -> None:
        policy = registry.get(self._reader, task.policy)
        try:
            if task.to_serve:
                swap = await self._write(lambda db: swaps.begin(db, policy.name))
                await self._swap(policy, swap)
            elif self.duel is not None and self.duel.challenger == policy.name:
                await self._give_back(policy)
            else:
                await self._begin_trial(policy)
        except (Superseded, LostLease):
            pass  # the next look says what is to be done instead
        except (PolicyRefused, RegistryError) as error:
            problem = words(error)
            self._tell(f"{task.policy} cannot be served: {problem}")

            def refuse(db: Database) -> None:
                self._check_lease(db)
                if registry.get(db, task.policy).status is PolicyStatus.TRIAL:
                    swaps.break_off(db, reason=f"{task.policy} cannot be served")
                swaps.refuse(db, task.policy, problem)

            with suppress(LostLease):
                await self._write(refuse)
        except (EngineProblem, *UNREADABLE) as error:
            problem = words(error)
            self._tell(f"{task.policy} cannot be loaded yet: {problem}")
            if problem != policy.problem:
                await self._write(lambda db: swaps.note_problem(db, task.policy, problem))

    async def _swap(self, policy: Policy, swap: Swap) -> None:
        began = time.monotonic()
        line = swaps.line(self._reader)
        if line and policy.name not in line:
            await self._engines.load(policy, self._engines.engines)
        else:  # the way back waits for no engine that is away or hangs
            await self._engines.load_back(policy)

        gate = self._settings.gate

        def flip(db: Database) -> str | None:
            self._check_lease(db)
            replaced = swaps.flip(db, swap)
            if replaced is not None and replaced in swaps.line(db) and gate.watch_share > 0:
                duels.begin(
                    db, DuelKind.WATCH, challenger=replaced, incumbent=policy.name,
                    threshold=1 / gate.alpha, budget=gate.max_watch_votes,
                )  # fmt: skip
            return replaced

        replaced = await self._write(flip)
        self._engines.follow()
        self.duel = duels.running(self._reader)
        self._metrics.swaps.inc()
        seconds = time.monotonic() - began
        log.info("%s serves in place of %s after %.2f s: %s", policy.name, replaced or "none", seconds, swap.reason)

    async def _begin_trial(self, candidate: Policy) -> None:
        incumbent = registry.serving(self._reader)
        if incumbent is None or incumbent.status is not PolicyStatus.SERVING:
            raise Superseded(candidate.name)
        await self._engines.load(candidate, self._engines.engines)

        gate = self._settings.gate

        def begin(db: Database) -> Duel:
            self._check_lease(db)
            now, latest = registry.serving(db), registry.next_for_trial(db)
            same = (
                now is not None and latest is not None and (now.name, latest.name) == (incumbent.name, candidate.name)
            )
            if not same or swaps.pending(db) is not None:
                raise Superseded(candidate.name)
            swaps.break_off(db, reason=f"the trial of {candidate.name} begins")
            registry.set_status(db, candidate.name, PolicyStatus.TRIAL)
            while older := registry.next_for_trial(db):
                problem = f"{candidate.name} came before its trial could begin"
                registry.set_status(db, older.name, PolicyStatus.REJECTED, problem=problem)
            # Every further trial against the same policy needs twice the evidence: over any number of them the chance
            # of promoting one that is no better stays below alpha (1 + 1/2 + 1/4 + …) = 2 alpha.
            threshold = 2.0 ** duels.trials_under_incumbent(db) / gate.alpha
            return duels.begin(
                db, DuelKind.TRIAL, challenger=candidate.name, incumbent=incumbent.name,
                threshold=threshold, budget=gate.max_trial_votes,
            )  # fmt: skip

        self.duel = await self._write(begin)
        log.info("%s is on trial against %s", candidate.name, incumbent.name)

    async def _give_back(self, challenger: Policy) -> None:
        """To the engines in traffic that lack it: its duel waits for them. What keeps it is said of one on trial, and
        taken back when they hold it. Raises RegistryError."""
        problem = None
        try:
            await self._engines.load(challenger, [engine for engine in self._engines.engines if engine.ready])
        except RegistryError:
            raise  # no time mends a folder
        except (EngineProblem, *UNREADABLE) as error:
            problem = f"its duel waits: {words(error)}"
            self._tell(f"{challenger.name} cannot be given back yet: {problem}")

        def note(db: Database) -> None:
            if registry.get(db, challenger.name).status is PolicyStatus.TRIAL:
                registry.note_problem(db, challenger.name, problem)

        if problem != challenger.problem:
            await self._write(note)

    # The holder of the lease: drain, and look after a new policy

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(self._settings.engine.poll_s)
            if not self._leads:
                continue
            try:
                await self._drain()
                await self._compare_with_predecessor()
            except (EngineProblem, CannotPromote, LostLease, *UNREADABLE) as error:
                self._tell(f"What follows a swap cannot be done yet: {words(error)}")

    async def _drain(self) -> None:
        """Unload what no engine needs any more."""
        now, poll_s = time.monotonic(), self._settings.engine.poll_s
        unwanted = self._engines.held() - self._kept()
        self._unwanted = {name: self._unwanted.get(name, now) for name in unwanted}
        for name, since in self._unwanted.items():
            # Other processes find out at their next look, and may have sent requests until then.
            if now - since < 2 * poll_s + 2 * LOOK_S:
                continue
            if now - since < self._settings.chat.timeout_s and await self._engines.busy_with(name):
                continue
            if name in self._kept():  # somebody went back to it meanwhile
                continue
            await self._engines.unload(name)
            if name not in self._engines.held():
                log.info("%s has left the engines", name)
        if self._engines.problems:  # who is away may still hold anything
            return
        for name in swaps.undrained(self._reader) - self._engines.held() - self._kept():
            await self._write(partial(swaps.drained, name=name))

    def _kept(self) -> set[str | None]:
        """The policies that engines must not forget: what serves, duels, is to serve, or is being loaded."""
        kept = {policy.name for policy in swaps.wanted(self._reader)} | {swaps.pending(self._reader)}
        return kept | {self._task.policy} if self._task is not None else kept

    async def _compare_with_predecessor(self) -> None:
        """Go back by ourselves where more answers fail, or stay without an end, than under the predecessor."""
        swap = swaps.latest(self._reader)
        if swap is None or swap.replaced not in swaps.line(self._reader) or swap.id == self._settled:
            return
        if swaps.pending(self._reader) is not None:
            return
        before, after = await asyncio.to_thread(self._outcomes, swap)
        figures = {
            "failed": attrgetter("failed", "answers"),
            "were cut off at their most tokens": attrgetter("unfinished", "free"),
        }
        for what, counts in figures.items():
            by_key = [counts(o) for o in after]
            was, is_now = trial.total([counts(o) for o in before]), trial.total(by_key)
            if trial.jumped(was, by_key):
                reason = (
                    f"{is_now[0]} of {is_now[1]} answers of {swap.policy} {what}, and {was[0]} of {was[1]} of"
                    f" {swap.replaced}'s"
                )
                log.error("Going back to %s: %s", swap.replaced, reason)
                await self._write(partial(self._go_back, swap=swap, reason=reason))
                self.kick()
                return
        if sum(o.answers for o in after) >= AFTER_ANSWERS:
            self._settled = swap.id

    def _outcomes(self, swap: Swap) -> tuple[list[Outcomes], list[Outcomes]]:
        """How the predecessor's last and the new policy's first answers ended, key by key; it reads many rows."""
        assert swap.replaced is not None
        most = self._settings.chat.max_tokens
        most = min(most, self._engines.context_length or most)
        with closing(connect(self._settings.database)) as db:
            look = partial(completions.outcomes, db, most_tokens=most)
            before = look(swap.replaced, until=swap.flipped_at, limit=BEFORE_ANSWERS)
            return before, look(swap.policy, since=swap.flipped_at, limit=AFTER_ANSWERS)

    def _go_back(self, db: Database, swap: Swap, reason: str) -> None:
        self._check_lease(db)
        if swaps.latest(db) == swap and swaps.pending(db) is None:
            swaps.roll_back(db, actor="watch", reason=reason)

    # What they share

    def _check_lease(self, db: Database) -> None:
        """Inside the transaction that must not happen twice."""
        if not leases.acquire(db, "swap", self._holder, for_s=LEASE_S):
            raise LostLease("another process swaps now")

    async def _write(self, work: Callable[[Database], T]) -> T:
        return await asyncio.wrap_future(self._writer.submit(work))

    def _tell(self, problem: str) -> None:
        """Log what goes wrong, once for as long as it does."""
        if problem != self._logged:
            log.warning("%s", problem)
        self._logged = problem
