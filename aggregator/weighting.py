"""The numbers of an update: which version its merge makes, how stale it is then, how much it weighs.

`version` is the published model version, `position` the number of mergeable updates that stand before this
one in the queue. Together they give the version that the update will meet, even though it may never be
stored: several versions are made in one publish, and staleness is counted as if they were made one by one.

    strategy   updates per version   meets version                        weight
    fedasync   1                     version + position                   α·s(τ)
    fedbuff    K                     version + position // K              s(τ), or s(τ)·n
    fedavg     N participants        version + position // N              n
"""

from __future__ import annotations

from aggregator.staleness import staleness_weight
from federation.jobs import JobSpec
from federation.types import ClientUpdate, Contribution


def group_size(spec: JobSpec) -> int:
    """How many updates make one new version."""
    if spec.aggregation.strategy == "fedasync":
        return 1
    if spec.aggregation.strategy == "fedbuff":
        return spec.aggregation.buffer_size
    return len(spec.participants or ())


def met_version(spec: JobSpec, version: int, position: int) -> int:
    """The version that an update at `position` in the queue is merged into."""
    return version + position // group_size(spec)


def weight(spec: JobSpec, staleness: int, num_examples: int) -> float:
    """Coefficient before normalisation over the group, as documented at `Contribution`.

    A function of its arguments: the policy's α is the same for every update, however stale the last one was.
    """
    policy = spec.aggregation
    if policy.strategy == "fedavg":
        return float(num_examples)
    s = staleness_weight(policy.staleness, staleness)
    if policy.strategy == "fedasync":
        return policy.alpha * s
    return s * num_examples if policy.weight_by_examples else s


def assign(spec: JobSpec, update: ClientUpdate, version: int, position: int) -> Contribution:
    """Number `update`. Raises ValueError if its base is newer than the version that it would meet."""
    met = met_version(spec, version, position)
    staleness = met - update.base_version
    if staleness < 0:
        raise ValueError(f"base version {update.base_version} is newer than version {met} that it would meet")
    return Contribution(
        update=update,
        staleness=staleness,
        weight=weight(spec, staleness, update.num_examples),
        version=met + 1,
    )
