"""The numbers of an update: which version its merge makes, how stale it is then, how much it weighs.

`version` is the published model version, `position` the number of mergeable updates that stand before this
one in the queue. Together they give the version that the update will meet, even though it may never be
stored: several versions are made in one publish, and staleness is counted as if they were made one by one.

    strategy   updates per version   meets version                        weight
    fedasync   1                     version + position                   α·s(τ)
    fedbuff    K                     version + position // K              s(τ), or s(τ)·n
    fedavg     N participants        version + position // N              n

n: examples of the site, or for fedbuff objects that the update's steps have seen. A detector's loss is a mean over the
objects of a batch. In central training, whose batches mix crowded images with empty ones, each object counts the
same; a site whose images are all crowded would count no more than the others without such a weight.
"""

from __future__ import annotations

from aggregator.staleness import staleness_weight
from federation.jobs import OBJECTS, AggregationPolicy, JobSpec
from federation.types import MAX_EXAMPLES, ClientUpdate, Contribution


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


def amount(policy: AggregationPolicy, update: ClientUpdate) -> float:
    """n: how much an update weighs beside those that are as stale. Above 0."""
    if policy.strategy == "fedavg" or policy.weight_by_examples:
        return update.num_examples
    if policy.weight_by_objects:
        # a site's word, as num_examples is, and so within the same bounds
        return min(max(1.0, update.metrics.get(OBJECTS, 1.0)), MAX_EXAMPLES)
    return 1


def weight(spec: JobSpec, staleness: int, n: float) -> float:
    """Coefficient before normalisation over the group, as documented at `Contribution`. n: see `amount`.

    A function of its arguments: the policy's α is the same for every update, however stale the last one was.
    """
    policy = spec.aggregation
    if policy.strategy == "fedavg":
        return float(n)
    s = staleness_weight(policy.staleness, staleness)
    if policy.strategy == "fedasync":
        return policy.alpha * s
    return s * n


def assign(spec: JobSpec, update: ClientUpdate, version: int, position: int) -> Contribution:
    """Number `update`. Raises ValueError if its base is newer than the version that it would meet."""
    met = met_version(spec, version, position)
    staleness = met - update.base_version
    if staleness < 0:
        raise ValueError(f"base version {update.base_version} is newer than version {met} that it would meet")
    return Contribution(
        update=update,
        staleness=staleness,
        weight=weight(spec, staleness, amount(spec.aggregation, update)),
        version=met + 1,
    )
