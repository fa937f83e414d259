"""Folding a queue of client updates into the global model, one payload at a time.

    merge = Merge(spec, layout, flat, ints, state, head.version)
    for left, update in countdown(pending):         # what is still to be read, this one included
        if merge.full or merge.needed > left:       # stop rule, or the open group cannot be completed
            break
        payload = read_and_verify(update)           # a bad one is refused and simply not added
        merge.add(update, payload.flat, payload.ints)
        del payload                                 # before the next one is loaded
    result = merge.finish()                         # result.flat and .ints hold version result.version

In a job that shares the sites' optimiser state a payload holds moments between its weights and its statistics, and
`state` is what they are merged into (aggregator/moments.py).

Folding n updates in one Merge gives the same bytes as n Merges with float32 storage between them (for the
buffered strategies: one Merge per flush). Memory: the model, one accumulator (fedbuff, fedavg) with its moments, the
optimiser state and one payload, however many updates there are; beyond that, temporaries of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

from aggregator import fedasync, fedavg, fedbuff, moments
from aggregator.blocks import Floats, Ints
from aggregator.group import empty_group, reset
from aggregator.server_opt import OptimizerState, check_state, initial_state, moment_count, no_state
from aggregator.tensors import Tensors, split
from aggregator.weighting import assign, group_size
from federation.jobs import JobSpec
from federation.layout import Layout
from federation.types import ClientUpdate, Contribution


@dataclass(frozen=True)
class MergeResult:
    """What a Merge came to. If nothing was merged, it is the model and the version that it began with."""

    flat: Floats  # [W+2S], the vector that the Merge was given
    ints: Ints  # [I], likewise
    version: int
    merged: tuple[Contribution, ...]
    """In log order, with their final numbers: only updates of complete groups."""
    state: OptimizerState | None
    """Of the server optimiser after `version`, or what the sites' became together; None if the job has neither."""


class Merge:
    """The global model while updates are folded into it. Not for sharing between threads."""

    def __init__(
        self,
        spec: JobSpec,
        layout: Layout,
        flat: Floats,
        ints: Ints,
        state: OptimizerState | None,
        version: int,
    ) -> None:
        """Begin with published `version`. `flat` [W+2S], `ints` [I] and `state` are modified in place.

        `state` is None for a job without one, and for the first step of a job with a server optimiser or a shared one.
        Raises ValueError for vectors that are not of this layout, or not writable.
        """
        if not (flat.flags.writeable and ints.flags.writeable):
            raise ValueError("the model is modified in place: give a writable copy of its vectors")
        self._spec = spec
        self._policy = spec.aggregation
        self._layout = layout
        self._flat, self._ints = flat, ints
        self._model = split(layout, flat, ints)
        shared, optimizer = spec.plan.shared_moments, self._policy.server_optimizer
        check_state(shared or moment_count(optimizer), state, layout.weight_count)
        self._has_moments = state is not None
        if state is None and shared:
            state = no_state(shared, layout.weight_count)
        elif state is None and optimizer is not None:
            state = initial_state(optimizer, layout.weight_count)
        self._state = state
        self._base = version
        self._version = version
        self._merged: list[Contribution] = []
        self._open: list[Contribution] = []
        # FedAsync folds straight into the model; the others pay for an accumulator
        self._group = None if self._policy.strategy == "fedasync" else empty_group(layout, shared)
        self._payload_layout = layout.with_moments(shared)

    @property
    def version(self) -> int:
        """The version that the vectors hold now."""
        return self._version

    @property
    def merged(self) -> tuple[Contribution, ...]:
        """The contributions of complete groups, in the order of `add`."""
        return tuple(self._merged)

    @property
    def full(self) -> bool:
        """True when the job's last version is made: add no more, and close the job."""
        return self._version >= self._spec.stop.max_versions

    @property
    def needed(self) -> int:
        """How many more updates complete the next version. With fewer left, reading them is wasted."""
        return group_size(self._spec) - len(self._open)

    def add(self, update: ClientUpdate, flat: Floats, ints: Ints) -> Contribution:
        """Fold one verified payload and return its final numbers. `flat` [W+2S, or with moments] and `ints` [I] are
        only read.

        The numbers count what was added before, so an update that was skipped as unreadable leaves no gap.
        Raises ValueError if the payload does not fit, or if `full`; then nothing has changed.
        """
        contribution = assign(self._spec, update, self._base, len(self._merged) + len(self._open))
        self.replay(contribution, flat, ints)
        return contribution

    def replay(self, contribution: Contribution, flat: Floats, ints: Ints) -> None:
        """Fold one payload with the numbers that the log has for it, to recompute a version from the log.

        The recorded weight is used as it is: another machine's power function may round differently.
        Raises ValueError as `add` does, and if the contribution does not make the next version.
        """
        update = contribution.update
        if self.full:
            raise ValueError(f"the job ends with version {self._version}: no more updates are merged")
        if contribution.version != self._version + 1:
            raise ValueError(
                f"{update.update_id} belongs to version {contribution.version}, not {self._version + 1}"
            )
        if update.payload_kind != self._policy.payload_kind:
            raise ValueError(
                f"{update.update_id} holds {update.payload_kind}, not {self._policy.payload_kind}"
            )
        payload = split(self._payload_layout, flat, ints)
        counters = self._layout.counter_slices
        if self._group is None:
            fedasync.fold(self._model, payload, counters, contribution)
        elif self._policy.strategy == "fedbuff":
            fedbuff.fold(self._group, payload, counters, contribution, self._policy)
        else:
            fedavg.fold(self._group, payload, counters, contribution)
        self._fold_moments(payload, contribution)
        self._open.append(contribution)
        if self.needed == 0:
            self._complete()

    def _fold_moments(self, payload: Tensors, contribution: Contribution) -> None:
        if not payload.moments:
            return
        if self._group is None:
            self._flush_moments(payload.moments, contribution.weight)
        else:
            moments.fold(self._group, payload.moments, contribution)

    def _flush_moments(self, means: tuple[Floats, ...], share: float) -> None:
        """There is nothing to mix the first ones with: zeros would be no moments of anything."""
        assert self._state is not None
        moments.flush(self._state, means, share if self._has_moments else 1.0)
        self._has_moments = True

    def finish(self) -> MergeResult:
        """The result after the last `add`. An incomplete group is not in it: its updates stay pending."""
        return MergeResult(self._flat, self._ints, self._version, self.merged, self._state)

    def _complete(self) -> None:
        """The open group is complete: it becomes the next version."""
        if self._group is not None:
            flush = fedbuff.flush if self._policy.strategy == "fedbuff" else fedavg.flush
            flush(self._model, self._group, self._layout.counter_slices, self._policy, self._state)
            if self._group.moments:
                share = fedbuff.share(self._group) if self._policy.strategy == "fedbuff" else 1.0
                self._flush_moments(self._group.moments, share)
            reset(self._group)
        self._merged += self._open
        self._open.clear()
        self._version += 1
