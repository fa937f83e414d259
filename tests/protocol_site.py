"""A site written from docs/protocol.md alone: standard library, pika, minio, and nothing of fedqueue.

It contributes one update, each weight of the newest version plus one, reports a measurement of the version that holds
it, and prints what became of the update as JSON:

    python protocol_site.py JOB SITE     with AMQP_URL, S3_ENDPOINT, S3_BUCKET, S3_ACCESS_KEY, S3_SECRET_KEY

The sections named below are those of docs/protocol.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import time
import urllib.error
import urllib.request
from array import array
from datetime import UTC, datetime
from typing import Any

import pika
from minio import Minio

PATIENCE_S = 60.0


class Site:
    """One site's two accounts, and the job that it works for."""

    def __init__(self, job: str, name: str) -> None:
        self.job, self.name = job, name
        self.bucket = os.environ["S3_BUCKET"]
        self.s3 = Minio(
            os.environ["S3_ENDPOINT"],
            access_key=os.environ["S3_ACCESS_KEY"],
            secret_key=os.environ["S3_SECRET_KEY"],
            secure=False,
            region="us-east-1",
        )

    # --- §1, §2: objects and the log ---------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        reply = self.s3.get_object(self.bucket, key)
        try:
            return bytes(reply.read())
        finally:
            reply.close()
            reply.release_conn()

    def records_after(self, key: str) -> list[str]:
        """Keys of the log records that follow `key`, by listing; "" lists all."""
        prefix = f"jobs/{self.job}/log/"
        listing = self.s3.list_objects(self.bucket, prefix=prefix, recursive=True, start_after=key or None)
        return [str(entry.object_name) for entry in listing]

    def put_if_absent(self, key: str, data: bytes) -> None:
        """§3: a 412 says that an earlier attempt of ours got through."""
        url = self.s3.presigned_put_object(self.bucket, key)
        request = urllib.request.Request(url, data, {"If-None-Match": "*"}, method="PUT")
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code != 412:
                raise

    # --- §4, §7, §8: messages ----------------------------------------------------------------------------------

    def publish(self, kind: str, message_type: str, mode: int, body: dict[str, Any], **more: str) -> None:
        """Returns when the broker has confirmed. pika raises UnroutableError or NackError if it did not."""
        connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish(
                "fed.updates",
                f"{kind}.{self.name}",
                json.dumps(body).encode(),
                pika.BasicProperties(
                    delivery_mode=mode,
                    content_type="application/json",
                    type=message_type,
                    user_id=self.name,
                    **more,
                ),
                mandatory=True,
            )
        finally:
            connection.close()

    # --- one contribution ----------------------------------------------------------------------------------

    def contribute(self) -> dict[str, Any]:
        job = json.loads(self.get(f"jobs/{self.job}/job.json"))
        assert job["spec"]["aggregation"]["strategy"] in ("fedasync", "fedavg")  # payload_kind "weights"
        seen = self.records_after("")[-1]
        head = json.loads(self.get(seen))["head"]
        assert head["closed"] is None
        current = head["current"]
        model = self.get(current["model"]["key"])
        assert len(model) == current["model"]["nbytes"]
        assert hashlib.sha256(model).hexdigest() == current["model"]["sha256"]
        payload = plus_one(model)

        update_id = uuid7()
        key = f"jobs/{self.job}/updates/{self.name}/{update_id}.safetensors"
        update = {
            "schema_version": 1,
            "update_id": update_id,
            "job": self.job,
            "site": self.name,
            "base_version": current["version"],
            "num_examples": 10,
            "payload_kind": "weights",
            "payload_key": key,
            "payload_sha256": hashlib.sha256(payload).hexdigest(),
            "payload_bytes": len(payload),
            "metrics": {"loss": 0.5},
            "created_at": now(),
        }
        heartbeat = {
            "schema_version": 1,
            "site": self.name,
            "state": "uploading",
            "job": self.job,
            "base_version": current["version"],
            "detail": "written from the protocol alone",
            "at": now(),
        }
        self.publish("heartbeats", "fedqueue.heartbeat.v1", 1, heartbeat)
        self.put_if_absent(key, payload)
        self.put_if_absent(key, payload)  # as after a lost reply
        self.publish("updates", "fedqueue.update.v1", 2, update, message_id=update_id)
        outcome = self.outcome(update_id, seen)
        if outcome["result"] == "merged":
            self.report(outcome["version"], job["spec"]["classes"][0])
        return outcome

    def report(self, version: int, class_name: str) -> None:
        """§8. Returns when the server has stored it."""
        report = {
            "schema_version": 1,
            "job": self.job,
            "version": version,
            "who": self.name,
            "num_images": 12,
            "metrics": {"mAP@0.5": 0.5, "my own": 7},
            "per_class": {"mAP@0.5": {class_name: 0.5}},
            "at": now(),
        }
        self.publish("reports", "fedqueue.report.v1", 2, report)
        prefix = f"jobs/{self.job}/metrics/"
        wanted = f"{prefix}{version:010d}/{self.name}.json"
        deadline = time.monotonic() + PATIENCE_S
        while wanted not in {
            entry.object_name for entry in self.s3.list_objects(self.bucket, prefix=prefix, recursive=True)
        }:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{wanted} is not there")
            time.sleep(0.2)
        assert json.loads(self.get(wanted))["metrics"] == {"mAP@0.5": 0.5, "my own": 7}

    def outcome(self, update_id: str, seen: str) -> dict[str, Any]:
        """§2, §5: read the log onward until a record decides on the update."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for key in self.records_after(seen):
                event = json.loads(self.get(key))["event"]
                refusals = event.get("refused", []) + ([event["refusal"]] if "refusal" in event else [])
                for refusal in refusals:
                    if refusal["update"]["update_id"] == update_id:
                        return {"result": "rejected", "update_id": update_id, "reason": refusal["reason"]}
                for contribution in event.get("merged", []):
                    if contribution["update"]["update_id"] == update_id:
                        numbers = {name: contribution[name] for name in ("version", "staleness", "weight")}
                        return {"result": "merged", "update_id": update_id, **numbers}
                seen = key
            time.sleep(0.2)
        raise TimeoutError(f"the log does not name {update_id}")


def plus_one(model: bytes) -> bytes:
    """§3: the header as it is, group 1 plus one, the other groups as they are."""
    (header_bytes,) = struct.unpack_from("<Q", model)
    header = json.loads(model[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    data = bytearray(model)
    for name, tensor in header.items():
        if tensor["dtype"] != "F32" or name.endswith((".running_mean", ".running_var")):
            continue
        begin, end = (8 + header_bytes + offset for offset in tensor["data_offsets"])
        values = array("f", bytes(data[begin:end]))
        if sys.byteorder == "big":
            values.byteswap()
        values = array("f", (value + 1.0 for value in values))
        if sys.byteorder == "big":
            values.byteswap()
        data[begin:end] = values.tobytes()
    return bytes(data)


def uuid7() -> str:
    """RFC 9562 §5.7: 48 bits of Unix milliseconds, the version, random bits with the variant."""
    digits = f"{time.time_ns() // 1_000_000:012x}7{os.urandom(2).hex()[:3]}8{os.urandom(8).hex()[:15]}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def now() -> str:
    return datetime.now(UTC).isoformat()


if __name__ == "__main__":
    print(json.dumps(Site(sys.argv[1], sys.argv[2]).contribute()))
