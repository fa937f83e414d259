"""From a stored version to local weights, and from trained weights to what is uploaded.

A version holds the exchanged tensors. The job's initial model holds all; those that are not exchanged are
BatchNorm layers, which a site with norm policy `local` keeps to itself (FedBN, arXiv 2102.07623) in
`<folder>/norm.safetensors`, and with `frozen` never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from federation.errors import BadPayload, StoreUnavailable
from federation.jobs import Job, JobSpec, ModelRef
from federation.layout import MOMENT_SUFFIXES, Layout, is_moment
from federation.types import ModelVersion
from storage.blob import BlobStore
from storage.files import replace_durably
from storage.models import ModelCache
from storage.tensors import TensorFile, decode, encode, from_arrays

Arrays = dict[str, NDArray[Any]]

NORM_FILE = "norm.safetensors"


def payload(spec: JobSpec, version: TensorFile, trained: Mapping[str, NDArray[Any]]) -> TensorFile:
    """The exchanged tensors of weights `trained` that started from `version`, with moments if the job shares them.

    The weights themselves, or for "difference" their difference to `version`; moments, running statistics and
    integers always as values. Raises BadPayload if a tensor is missing.
    """
    layout = version.layout.with_moments(spec.plan.shared_moments)
    for tensor in layout.tensors:
        if tensor.name not in trained:
            raise BadPayload(f"training returned no tensor {tensor.name!r}, which this job's sites send")
    exchanged = from_arrays({t.name: trained[t.name] for t in layout.tensors})
    if spec.aggregation.payload_kind == "weights":
        return exchanged
    weights = layout.weight_count
    flat = exchanged.flat.copy()
    flat[:weights] -= version.flat[:weights]
    return TensorFile(layout, flat, exchanged.ints)


def moments(layout: Layout, state: TensorFile) -> Arrays:
    """The moments of a version's parameters by name, from the file of its optimiser state. Raises BadPayload."""
    stored = state.arrays()
    found: Arrays = {}
    for suffix, key in zip(MOMENT_SUFFIXES, ("m", "v"), strict=True):
        if key not in stored:
            continue
        if stored[key].shape != (layout.weight_count,):
            raise BadPayload(
                f"optimiser state {key!r} has shape {stored[key].shape}, must have ({layout.weight_count},)"
            )
        at = 0
        for parameter in layout.parameters:
            found[parameter.name + suffix] = stored[key][at : at + parameter.size].reshape(parameter.shape)
            at += parameter.size
    return found


def has_own_norm(job: Job, folder: Path) -> bool:
    """True if `folder` holds norm layers that this site has trained for itself."""
    return job.spec.plan.norm == "local" and (folder / NORM_FILE).exists()


def assemble(job: Job, initial: TensorFile, version: TensorFile, folder: Path) -> Arrays:
    """All tensors of a model: the version's, this site's own in `folder` where they stay here, else the initial."""
    arrays: Arrays = dict(initial.arrays())
    if has_own_norm(job, folder):
        arrays.update(decode((folder / NORM_FILE).read_bytes()).arrays())
    arrays.update(version.arrays())
    return arrays


@dataclass(frozen=True)
class LocalModel:
    """The models of one job on this site's disk."""

    job: Job
    store: BlobStore
    cache: ModelCache
    folder: Path

    def pull(self, ref: ModelRef) -> TensorFile:
        """The exchanged tensors of a version: downloaded once, verified, cached.

        Raises StoreUnavailable, also for a download that is not what the log names: the next may be.
        """
        try:
            return decode(self.cache.fetch(self.store, ref).read_bytes())
        except BadPayload as exc:
            raise StoreUnavailable(f"downloaded model: {exc}") from exc

    def assemble(self, version: TensorFile) -> Arrays:
        """All tensors to start training from: the version's, ours where they stay here, else the initial."""
        return assemble(self.job, self.pull(self.job.initial), version, self.folder)

    def moments(self, of: ModelVersion, version: TensorFile) -> Arrays:
        """What the job's optimisers know together at version `of`, to train on with; none before the first merge."""
        if not self.job.spec.plan.shared_moments or of.server_state is None:
            return {}
        return moments(version.layout, self.pull(of.server_state))

    def payload(self, version: TensorFile, trained: Arrays) -> TensorFile:
        """What to upload for weights `trained` that started from `version`."""
        return payload(self.job.spec, version, trained)

    def keep_norm(self, version: TensorFile, trained: Arrays) -> None:
        """With norm policy `local`, store what this site does not send."""
        if self.job.spec.plan.norm != "local":
            return
        exchanged = {t.name for t in version.layout.tensors}
        freezes = self.job.spec.plan.freezes  # what is frozen is in the initial model
        own = {
            name: array
            for name, array in trained.items()
            if name not in exchanged and not freezes(name) and not is_moment(name)
        }
        if own:
            replace_durably(self.folder / NORM_FILE, bytes(encode(from_arrays(own))))
