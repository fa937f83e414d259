"""A stateless model checker for workers that meet in an object store: every order of their steps is forced.

An *actor* is a plain function in a thread of its own. It waits for its turn before each operation on what is shared
(`pause`; `SteppedStore` does that for a store), and only one actor runs at any time. So the list of whose turn it
was, the *schedule*, determines a run. All schedules are enumerated depth first, each from the start in a new
`World`, which is checked when all actors have ended.

    explore(make_world)                     every order
    explore(make_world, crashes=1)          ... with one actor killed at any step, and its work delivered again
    explore(make_world, preemptions=2)      only those with at most two switches away from an actor that could have
                                            gone on, the order in which to look for the simplest failure

Steps that commute (two reads, different objects) need not be tried in both orders: of all schedules that differ in
nothing else, "every order" runs one. The bounded search runs each. A failure is shown as its schedule:

    A: list log, get log/0
    B: list log, get log/0, put_if_absent log/1
    A: put_if_absent log/1

Bounded search: Musuvathi, Qadeer, "Iterative Context Bounding for Systematic Testing of Multithreaded Programs", PLDI
2007 (CHESS). One order of each kind: Abdulla, Aronis, Jonsson, Sagonas, "Optimal Dynamic Partial Order Reduction",
POPL 2014, its source sets, with the sleep sets of Godefroid 1996.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Protocol

from storage.blob import BlobStore
from storage.files import Buffer

READS = frozenset({"get", "get_to_file", "size", "modified", "list"})
WRITES = frozenset({"put", "put_if_absent", "delete"})
DIE = "die"
ACKNOWLEDGE = "acknowledge"

LIMIT_S = 60.0
"""A schedule that takes longer waits for something that nobody steps."""
LONGEST = 1000
"""Steps of one schedule. More are a live-lock: actors that make each other start over for ever."""


class World(Protocol):
    """What one schedule runs in."""

    @property
    def actors(self) -> Mapping[str, Callable[[], None]]:
        """Their work by their names. It is called again, in another thread, if the actor was killed."""
        ...

    def check(self) -> str:
        """Called when all actors have ended. Returns the outcome in words; raises AssertionError."""
        ...


Choice = tuple[str, bool]
"""Whose turn it is, and whether he dies instead of taking the step."""


@dataclass(frozen=True)
class Step:
    """What an actor is about to do."""

    actor: str
    operation: str
    target: str = ""

    def __str__(self) -> str:
        return f"{self.operation} {_short(self.target)}".rstrip()

    @property
    def choice(self) -> Choice:
        return self.actor, self.operation == DIE

    def leads_to(self, later: Step) -> bool:
        """True if `later` is of the same actor, or does what this one was killed over."""
        again = self.operation == DIE and later.actor == f"{self.actor} again"
        return later.actor == self.actor or again

    def commutes_with(self, other: Step) -> bool:
        """True if it does not matter which of two actors' steps is done first."""
        if self.operation == other.operation == DIE:
            return False  # only so many may die
        return not (self._changes(other) or other._changes(self))

    def _changes(self, other: Step) -> bool:
        if self.operation not in WRITES or other.operation not in READS | WRITES:
            return False
        if other.operation == "list":
            return self.target.startswith(other.target)
        return self.target == other.target


class Counterexample(AssertionError):
    """A schedule that ends wrong. `turns`: who did what, in order."""

    def __init__(self, taken: Sequence[Step], cause: BaseException, number: int) -> None:
        turns = groupby(taken, key=lambda step: step.actor)
        self.turns = [f"{actor}: {', '.join(map(str, steps))}" for actor, steps in turns]
        said = "\n".join(self.turns)
        super().__init__(f"schedule {number} fails: {type(cause).__name__}: {cause}\n{said}")


@dataclass
class Explored:
    """How often each outcome came."""

    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def schedules(self) -> int:
        """That were run to their end."""
        return self.outcomes.total()


@dataclass
class _Decision:
    """Whose turn it was at one step of the schedule, and what is still to be tried there."""

    now: Choice
    todo: list[Choice]
    asleep: set[Choice]
    """What need not be tried: it was, here or earlier, and nothing since could make a difference to it."""
    taken: Step | None = None

    def want_one_of(self, choices: Sequence[Choice]) -> None:
        if self.asleep.union(self.todo, [self.now]).isdisjoint(choices):
            self.todo.append(choices[0])


def explore(make: Callable[[], World], *, preemptions: int | None = None, crashes: int = 0) -> Explored:
    """Run every schedule. Raises Counterexample for the first one that fails.

    Nothing in a run may be left to chance, see `uuid4`.
    """
    explored = Explored()
    path: list[_Decision] = []
    while True:
        run = _Run(make(), path, preemptions, crashes)
        try:
            if run.to_its_end():
                explored.outcomes[run.world.check()] += 1
        except Exception as exc:
            raise Counterexample(run.taken, exc, explored.schedules + 1) from exc
        finally:
            run.abandon()
        if preemptions is None:
            _reverse_races(run.taken, path)
        while path and not path[-1].todo:
            path.pop()
        if not path:
            return explored
        last = path[-1]
        if preemptions is None:
            last.asleep.add(last.now)
        last.now, last.taken = last.todo.pop(0), None


def _reverse_races(taken: Sequence[Step], path: Sequence[_Decision]) -> None:
    """Where two steps that do not commute could have come the other way round, have that tried.

    They are j < i with no step between them that j causes and that causes i. Then all between them that j does not
    cause could have come before j, and i with it. For that, one that can be the first of these has its turn at j.
    """
    causes: list[
        set[int]
    ] = []  # of each step, the earlier ones that come before it in every equivalent schedule
    for i, step in enumerate(taken):
        causes.append(mine := set())
        for j in reversed(range(i)):
            own = taken[j].leads_to(step)
            if j in mine or not (own or not taken[j].commutes_with(step)):
                continue
            if not own:
                others = [k for k in range(j + 1, i) if j not in causes[k]] + [i]
                path[j].want_one_of([taken[k].choice for k in others if causes[k].isdisjoint(others)])
            mine |= causes[j] | {j}


class _Run:
    """One world, and its actors on their way along `path`, which grows if they go on after its end.

    The thread whose turn ends decides whose turn is next, so an actor that goes on costs no switch of threads.
    """

    def __init__(self, world: World, path: list[_Decision], preemptions: int | None, crashes: int) -> None:
        self.world = world
        self.taken: list[Step] = []
        self._path, self._preemptions, self._crashes = path, preemptions, crashes
        self._works = dict(world.actors)
        self._actors: dict[str, _Actor] = {}
        self._running = ""
        self._switches = 0
        self._asleep: set[Choice] = set()
        self._complete = False
        self._error: Exception | None = None
        self._over = _closed_gate()

    def to_its_end(self) -> bool:
        """False if it is not worth that: it would only repeat another one. Raises what an actor raised."""
        for name in self.world.actors:
            self._start(name)
        self.pass_on()
        assert self._over.acquire(timeout=LIMIT_S), "an actor does not come to its next step"
        if self._error is not None:
            raise self._error
        return self._complete

    def abandon(self) -> None:
        for actor in self._actors.values():
            actor.abandon()

    def pass_on(self, me: _Actor | None = None) -> bool:
        """Begin the next turn. True if it is the one of `me`, which then just goes on."""
        try:
            actor = self._next()
        except Exception as exc:  # noqa: BLE001  raised again where the run was begun
            self._error, actor = exc, None
        if actor is None:
            self._over.release()
        elif actor is not me:
            actor.turn.release()
        return actor is not None and actor is me

    def _next(self) -> _Actor | None:
        """Decide, and note the step that will be taken. None: the run is over."""
        options = self._options()
        if not options:
            self._complete = True
            return None
        assert len(self.taken) < LONGEST, "the actors go on for ever"
        if len(self.taken) == len(self._path):
            todo = self._worth_trying(options)
            if not todo:
                return None
            self._path.append(_Decision(todo.pop(0), todo, self._asleep))
        decision = self._path[len(self.taken)]
        step = options.get(decision.now)
        if step is None or decision.taken not in (None, step):
            raise AssertionError(
                f"the schedule does not determine the run: {step} was {decision.taken} before"
            )
        decision.taken = step
        self._asleep = {
            choice
            for choice in decision.asleep
            if choice[0] != step.actor and options[choice].commutes_with(step)
        }
        return self._take(step, options)

    def _options(self) -> dict[Choice, Step]:
        """What may happen next; that the running actor goes on comes first. Raises what an actor raised.

        An actor dies right after a step that changed something: after reading it may as well have died before.
        """
        for actor in self._actors.values():
            if actor.error is not None:
                raise actor.error
        alive = [actor for actor in self._actors.values() if actor.pending is not None]
        alive.sort(key=lambda actor: actor.name != self._running)
        steps = [actor.pending for actor in alive if actor.pending is not None]
        if self._crashes:
            steps += [Step(actor.name, DIE) for actor in alive if actor.has_changed]
        return {step.choice: step for step in steps}

    def _worth_trying(self, options: Mapping[Choice, Step]) -> list[Choice]:
        choices = [choice for choice in options if choice not in self._asleep]
        deaths = [choice for choice in choices if choice[1]]
        turns = [choice for choice in choices if not choice[1]]
        if self._preemptions is None:
            return turns[:1] + deaths  # and what _reverse_races adds
        if self._switches == self._preemptions and (self._running, False) in options:
            turns = [(self._running, False)]
        return turns + deaths

    def _take(self, step: Step, options: Mapping[Choice, Step]) -> _Actor:
        self.taken.append(step)
        actor = self._actors[step.actor]
        if step.operation == DIE:
            self._crashes -= 1
            actor.dying = True
            again = f"{step.actor} again"
            self._works[again] = self._works[step.actor]
            self._start(again)
        else:
            actor.has_changed = step.operation not in READS
            if step.actor != self._running:
                self._switches += (self._running, False) in options
                self._running = step.actor
        return actor

    def _start(self, name: str) -> None:
        self._actors[name] = _Actor(self, name, self._works[name], acknowledges=self._crashes > 0)


class _Dead(BaseException):
    """kill -9: nothing catches it, and whatever is attempted on the way out fails like this again."""


class _Actor:
    """A thread that runs only when it is its turn."""

    def __init__(self, run: _Run, name: str, work: Callable[[], None], *, acknowledges: bool) -> None:
        """Returns when the actor waits before its first step."""
        self.name = name
        self.turn = _closed_gate()
        self.pending: Step | None = None
        self.has_changed = False
        self.named = 0
        self.dying = False
        self.error: Exception | None = None
        self._run: _Run | None = None
        self._work, self._acknowledges = work, acknowledges
        self._ready = _closed_gate()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        assert self._ready.acquire(timeout=LIMIT_S), f"{name} does not come to its first step"
        self._run = run

    def pause(self, operation: str, target: str) -> None:
        if not self.dying:
            self.pending = Step(self.name, operation, target)
            if not self._pass_on():
                self.turn.acquire()
        if self.dying:
            raise _Dead

    def abandon(self) -> None:
        self._run = None
        if self.pending is not None:
            self.dying = True
            self.turn.release()
        self._thread.join()

    def _main(self) -> None:
        _here.actor = self
        try:
            self._work()
            if self._acknowledges:
                self.pause(ACKNOWLEDGE, "")
        except _Dead:
            pass
        except Exception as exc:  # noqa: BLE001  raised again where the run was begun
            self.error = exc
        self.pending = None
        self._pass_on()

    def _pass_on(self) -> bool:
        if self._run is not None:
            return self._run.pass_on(self)
        self._ready.release()
        return False


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


_here = threading.local()


def pause(operation: str, target: str = "") -> None:
    """Wait for one's turn before `operation` on something shared. Does nothing in a thread that is no actor.

    What is neither among READS nor among WRITES commutes with everything.
    """
    actor: _Actor | None = getattr(_here, "actor", None)
    if actor is not None:
        actor.pause(operation, target)


def uuid4() -> uuid.UUID:
    """In place of `uuid.uuid4`: for an actor its own first, second … one, the same in every schedule."""
    actor: _Actor | None = getattr(_here, "actor", None)
    if actor is None:
        return _random_uuid4()
    actor.named += 1
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{actor.name} {actor.named}")


_random_uuid4 = uuid.uuid4


class SteppedStore:
    """BlobStore over `inner`: each operation is a step. A listing is one, taken when its first key is asked for."""

    def __init__(self, inner: BlobStore) -> None:
        self._inner = inner

    def get(self, key: str, *, max_bytes: int) -> bytes:
        pause("get", key)
        return self._inner.get(key, max_bytes=max_bytes)

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        pause("get_to_file", key)
        self._inner.get_to_file(key, path, nbytes=nbytes, sha256=sha256)

    def size(self, key: str) -> int:
        pause("size", key)
        return self._inner.size(key)

    def modified(self, key: str) -> datetime:
        pause("modified", key)
        return self._inner.modified(key)

    def put(self, key: str, data: Buffer) -> None:
        pause("put", key)
        self._inner.put(key, data)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        pause("put_if_absent", key)
        return self._inner.put_if_absent(key, data)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        pause("list", prefix)
        yield from list(self._inner.list(prefix, start_after=start_after))

    def delete(self, key: str) -> None:
        pause("delete", key)
        self._inner.delete(key)


def _short(target: str) -> str:
    """A key as one says it: `log/2`, `updates/site-a/…1f3b`."""
    target = re.sub(r"jobs/[^/]+/", "", target)
    target = re.sub(r"log/0*(\d+)\.json", r"log/\1", target).removesuffix("/")
    return re.sub(r"[0-9a-f-]{28,}([0-9a-f]{4})(\.\w+)?\b", r"…\1", target)
