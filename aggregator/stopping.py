"""When a job is over: a pure function of its stop rule, what was measured of its versions, the head and the time.

`max_versions` is exact: the record that makes the last version closes the job (`last_version`). The others come a
little later, with a record of their own (`why_stop`).

A figure may come late, or that of version 8 before that of version 4. So nothing is counted as it comes: every call
looks at all that was measured, in the order of the versions. Versions that were rolled back never count.
"""

from __future__ import annotations

from pydantic import AwareDatetime

from federation.best import Course
from federation.jobs import StopRule
from federation.types import Head

ROUNDING = 1e-9
"""A figure that lies so close to a limit lies on it: 0.8 - 0.7 is more than 0.1 to a computer."""


def last_version(rule: StopRule, version: int) -> str | None:
    """Why the job closes in the very record that makes `version`; None: it does not."""
    if version < rule.max_versions:
        return None
    return f"version {version}, the last of stop.max_versions, is made"


def why_stop(rule: StopRule, course: Course, head: Head, now: AwareDatetime) -> str | None:
    """Why the job closes, in words with the numbers; None: it goes on, or is closed already."""
    if head.closed is not None:
        return None
    return _target(rule, course, head) or _patience(rule, course, head) or _deadline(rule, head, now)


def _target(rule: StopRule, course: Course, head: Head) -> str | None:
    """The first version that reached it; one in quarantine has not."""
    if rule.target is None:
        return None
    for version in course.versions:
        value = course.value(version)
        if value >= rule.target and course.is_settled(version) and not head.withdrawn(version):
            return f"version {version} reached {course.metric} {value:.4g}, the target is {rule.target:g}"
    return None


def _patience(rule: StopRule, course: Course, head: Head) -> str | None:
    """As of early stopping: a version improves if it beats the last one that did by more than `min_improvement`.

    So steps that are each too small add up. A version that cannot be compared with that one, because other sites
    measured it, counts neither way.
    """
    if rule.patience is None:
        return None
    improved: int | None = None
    since: list[int] = []
    for version in course.versions:
        if head.is_rolled_back(version) or not course.is_settled(version):
            continue
        gain = None if improved is None else course.gain(version, improved)
        if improved is None or (gain is not None and gain > rule.min_improvement + ROUNDING):
            improved, since = version, []
        elif gain is not None:
            since.append(version)
    if improved is None or len(since) < rule.patience:
        return None
    by = f" by more than {rule.min_improvement:g}" if rule.min_improvement else ""
    return (
        f"{len(since)} measured versions in a row, {since[0]} to {since[-1]}, did not beat {course.metric} "
        f"{course.value(improved):.4g} of version {improved}{by}"
    )


def _deadline(rule: StopRule, head: Head, now: AwareDatetime) -> str | None:
    if rule.deadline is None or now < rule.deadline:
        return None
    return f"the deadline, {rule.deadline:%Y-%m-%d %H:%M %Z}, has passed at version {head.version}"
