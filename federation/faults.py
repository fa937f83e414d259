"""Faults made on purpose, for tests: what can go wrong in one call to a store or a broker, and when it does.

    fault         means                                             applies to
    fail-before   nothing was done, and an error says so            everything
    fail-after    it was done, but the reply was lost               everything
    delay         it is done later                                  everything
    truncate      the read returns only the beginning               get, get_to_file
    stale         the read shows an earlier state                   get, get_to_file, size, modified, list
    repeat        an earlier message is published once more         publish
                  after this one: a duplicate, out of order

The operations are the methods of the ports: those of storage/blob.py on a key (`list`: on a prefix); of
broker/port.py `publish` and `consume` on a routing key, where consume means one delivery, and `drain` on a queue.

A plan says which calls go wrong; storage/faulty.py and broker/faulty.py wrap any implementation and obey it:

    plan = Scripted([Rule("put_if_absent", Fault.FAIL_AFTER, target="jobs/*/log/*", nth=2)])
    store = FaultyStore(MemoryStore(), plan)
    …
    assert store.counts == {Fault.FAIL_AFTER: 1}

put_if_absent is never stale: a store that lies there is not one to be survived but one to be refused
(storage/probe.py).
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Protocol

from federation.errors import Transient

READS = frozenset({"get", "get_to_file", "size", "modified", "list"})
WRITES = frozenset({"put", "put_if_absent", "delete"})
QUEUES = frozenset({"publish", "drain", "consume"})
OPERATIONS = READS | WRITES | QUEUES

DELAY_S = 0.05


class Fault(StrEnum):
    FAIL_BEFORE = "fail-before"
    FAIL_AFTER = "fail-after"
    DELAY = "delay"
    TRUNCATE = "truncate"
    STALE = "stale"
    REPEAT = "repeat"


_APPLIES: Mapping[Fault, Collection[str]] = {
    Fault.FAIL_BEFORE: OPERATIONS,
    Fault.FAIL_AFTER: OPERATIONS,
    Fault.DELAY: OPERATIONS,
    Fault.TRUNCATE: {"get", "get_to_file"},
    Fault.STALE: READS,
    Fault.REPEAT: {"publish"},
}


def applies_to(fault: Fault, operation: str) -> bool:
    """True if `fault` can happen to `operation`; the table at the top."""
    return operation in _APPLIES[fault]


class FaultPlan(Protocol):
    def next(self, operation: str, target: str) -> Fault | None:
        """What goes wrong in the call that is about to be made, None: nothing. Asked once per call."""
        ...


@dataclass(frozen=True)
class Rule:
    """The `nth` call of `operation` on `target`, and `times` calls from there on, end in `fault`.

    Both are globs, whose "*" also matches "/". Raises ValueError if the fault applies to no such operation.
    """

    operation: str
    fault: Fault
    _: KW_ONLY
    target: str = "*"
    nth: int = 1
    times: int | None = 1
    """None: for ever."""

    def __post_init__(self) -> None:
        if not any(self._concerns(operation) for operation in OPERATIONS):
            raise ValueError(f"{self.fault} applies to no operation that matches {self.operation!r}")
        if self.nth < 1 or (self.times is not None and self.times < 1):
            raise ValueError(f"calls are counted from 1: nth={self.nth}, times={self.times}")

    def matches(self, operation: str, target: str) -> bool:
        return self._concerns(operation) and fnmatchcase(target, self.target)

    def is_due(self, call: int) -> bool:
        """For the `call`th call that matches, from 1."""
        return call >= self.nth and (self.times is None or call < self.nth + self.times)

    def _concerns(self, operation: str) -> bool:
        return fnmatchcase(operation, self.operation) and applies_to(self.fault, operation)


class Scripted:
    """A plan of rules. Each counts the calls that it matches; of those that are due the first one decides.

    Without rules nothing goes wrong. Safe for threads.
    """

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.counts: Counter[Fault] = Counter()
        self._rules = tuple(rules)
        self._calls = [0] * len(self._rules)
        self._lock = threading.Lock()

    def next(self, operation: str, target: str) -> Fault | None:
        due: Fault | None = None
        with self._lock:
            for i, rule in enumerate(self._rules):
                if rule.matches(operation, target):
                    self._calls[i] += 1
                    if due is None and rule.is_due(self._calls[i]):
                        due = rule.fault
            if due is not None:
                self.counts[due] += 1
        return due


class Seeded:
    """A plan of chance: the same seed gives the same faults to the same sequence of calls. Safe for threads."""

    def __init__(
        self,
        seed: int,
        rates: Mapping[Fault, float],
        *,
        operations: Collection[str] = OPERATIONS,
        target: str = "*",
    ) -> None:
        """`rates`: share of the calls that end in each fault, among those to which it applies; in sum at most 1.
        Only calls of `operations` on a target that matches the glob `target` are considered.

        Raises ValueError.
        """
        if min(rates.values(), default=0.0) < 0.0 or math.fsum(rates.values()) > 1.0:
            raise ValueError(f"rates are shares of all calls, in sum at most 1: {dict(rates)}")
        if unknown := set(operations) - OPERATIONS:
            raise ValueError(f"no operations of a port: {', '.join(sorted(unknown))}")
        for fault in rates:
            if not any(applies_to(fault, operation) for operation in operations):
                raise ValueError(f"{fault} applies to none of {', '.join(sorted(operations))}")
        self.counts: Counter[Fault] = Counter()
        self._random = random.Random(seed)
        self._rates = dict(rates)
        self._operations, self._target = frozenset(operations), target
        self._lock = threading.Lock()

    def next(self, operation: str, target: str) -> Fault | None:
        if operation not in self._operations or not fnmatchcase(target, self._target):
            return None
        with self._lock:
            point = self._random.random()
            for fault in Fault:  # an order of its own: that of `rates` must not matter
                if applies_to(fault, operation):
                    point -= self._rates.get(fault, 0.0)
                    if point < 0.0:
                        self.counts[fault] += 1
                        return fault
        return None


class Injector:
    """What the wrappers share: asks the plan, fails and delays, and counts what took effect.

    The plan counts what it asked for. That is more: a stale read of what was not written lately, a truncated
    read of an empty object and a repetition before any message are asked for and change nothing.
    """

    def __init__(
        self,
        plan: FaultPlan,
        error: type[Transient],
        delay_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`error`: what a failing call raises."""
        self.counts: Counter[Fault] = Counter()
        self._plan, self._error = plan, error
        self._delay_s, self._sleep = delay_s, sleep
        self._lock = threading.Lock()

    @contextmanager
    def call(self, operation: str, target: str) -> Iterator[Fault | None]:
        """Around the real call. Fails and delays by itself; any other fault is for the body to obey."""
        fault = self._plan.next(operation, target)
        if fault is Fault.FAIL_BEFORE:
            self.count(fault)
            raise self._error(f"{operation} {target}: injected: nothing was done")
        if fault is Fault.DELAY:
            self.count(fault)
            self._sleep(self._delay_s)
        yield fault
        if fault is Fault.FAIL_AFTER:
            self.count(fault)
            raise self._error(f"{operation} {target}: injected: it was done, the reply was lost")

    def count(self, fault: Fault) -> None:
        """`fault` took effect."""
        with self._lock:
            self.counts[fault] += 1
