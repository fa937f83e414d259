"""Small valid values for tests: a job with a toy model, updates, payloads. Everything can be overridden."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.ids import new_update_id
from federation.jobs import AggregationPolicy, JobSpec, StopRule
from federation.keys import update_key
from federation.types import ClientUpdate
from storage.tensors import encode, from_arrays

Arrays = dict[str, NDArray[Any]]

ALPHA = 0.5


def toy_arrays(value: float = 0.0) -> Arrays:
    """A model of one convolution and one BatchNorm layer, every weight `value`."""
    return {
        "conv.weight": np.full((4, 2, 3, 3), value, np.float32),
        "norm.weight": np.full(4, value, np.float32),
        "norm.bias": np.full(4, value, np.float32),
        "norm.running_mean": np.full(4, value, np.float32),
        "norm.running_var": np.full(4, 1.0 + abs(value), np.float32),
        "norm.num_batches_tracked": np.array(int(np.nan_to_num(value, posinf=0.0)), np.int64),
    }


def payload_of(arrays: Arrays) -> bytes:
    return bytes(encode(from_arrays(arrays)))


def job_spec(job: str = "toy", **changes: Any) -> JobSpec:
    """FedAsync with alpha 0.5 and constant staleness weight, so that results can be computed in the head."""
    values: dict[str, Any] = {
        "id": job,
        "classes": ("thing",),
        "arch": "toy",
        "aggregation": AggregationPolicy.from_json(
            '{"strategy": "fedasync", "alpha": 0.5, "staleness": {"kind": "constant"}, "max_staleness": 3}'
        ),
        "stop": StopRule(max_versions=1000),
    }
    return JobSpec(**(values | changes))


def client_update(payload: bytes = b"payload", **changes: Any) -> ClientUpdate:
    """An update of site-a for job toy, based on version 0, that describes `payload` truly."""
    update_id = changes.pop("update_id", None) or new_update_id()
    values: dict[str, Any] = {
        "update_id": update_id,
        "job": "toy",
        "site": "site-a",
        "base_version": 0,
        "num_examples": 10,
        "payload_kind": "weights",
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "payload_bytes": len(payload),
        "created_at": datetime.now(UTC),
    } | changes
    values.setdefault("payload_key", update_key(values["job"], values["site"], update_id))
    return ClientUpdate(**values)
