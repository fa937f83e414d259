"""The optimiser's state, as a tensor file beside the model that it belongs to.

That of the server's optimiser, or of the sites' where a job shares it: vectors `m` and, with second moments, `v`, each
over the parameters of the model in their canonical order (federation.layout).
"""

from __future__ import annotations

import numpy as np

from aggregator.server_opt import OptimizerState
from federation.jobs import Job, ModelRef
from storage.blob import BlobStore
from storage.models import load_model, save_model
from storage.tensors import TensorFile, from_arrays


def load_state(store: BlobStore, ref: ModelRef | None) -> OptimizerState | None:
    """Writable vectors, or None at the start and for a job without such a state."""
    if ref is None:
        return None
    arrays = load_model(store, ref).arrays()
    second = arrays.get("v")
    return OptimizerState(np.array(arrays["m"]), None if second is None else np.array(second))


def save_state(store: BlobStore, job: Job, state: OptimizerState | None) -> ModelRef | None:
    return None if state is None else save_model(store, job.id, state_file(state), own=True)


def state_file(state: OptimizerState) -> TensorFile:
    return from_arrays({"m": state.m} if state.v is None else {"m": state.m, "v": state.v})
