"""The server optimiser's state, as a tensor file beside the model that it belongs to."""

from __future__ import annotations

import numpy as np

from aggregator.server_opt import OptimizerState
from federation.jobs import Job, ModelRef
from storage.blob import BlobStore
from storage.models import load_model, save_model
from storage.tensors import from_arrays


def load_state(store: BlobStore, ref: ModelRef | None) -> OptimizerState | None:
    """Writable vectors, or None at the start and for a job without server optimiser."""
    if ref is None:
        return None
    arrays = load_model(store, ref).arrays()
    second = arrays.get("v")
    return OptimizerState(np.array(arrays["m"]), None if second is None else np.array(second))


def save_state(store: BlobStore, job: Job, state: OptimizerState | None) -> ModelRef | None:
    if state is None:
        return None
    arrays = {"m": state.m} if state.v is None else {"m": state.m, "v": state.v}
    return save_model(store, job.id, from_arrays(arrays), own=True)
