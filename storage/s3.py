"""A bucket of any S3 server that honours `If-None-Match: *` (`storage.probe` finds out).

Every request here may be sent twice: reads, listings, deletions, and writes of the same bytes under the same
key. So there is one rule for all: what is ambiguous (no answer, 409, 429, 5xx) is sent again a few times with
jittered backoff, then StoreUnavailable. The client library itself must never send anything again: its retry
of a conditional put whose reply was lost turns our own success into "412, somebody else was first".

Uses the portable subset of S3 only: PUT in one part (up to 5 GiB), GET, HEAD, DELETE, ListObjectsV2. No
ETags, no versions, no checksum headers: servers differ in all three.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from federation.errors import (
    AccessDenied,
    BadPayload,
    BadSettings,
    FedqueueError,
    NotFound,
    StoreUnavailable,
    UnsafeStore,
)
from storage.files import CHUNK_BYTES, Buffer, verified
from storage.key_rules import check_key, check_prefix
from storage.s3_connection import new_pool

ATTEMPTS = 4
BACKOFF_S = 0.2
"""First pause between two attempts; doubles each time."""
PATIENCE_S = 60.0
"""No new attempt is begun after this time: a server that hangs costs one read timeout more, not four."""
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 30.0
MAX_OBJECT_BYTES = 5 << 30
"""The limit of S3 for a put in one part; a conditional put in several parts is not portable."""
PAGE = 1000
"""Keys per listing request, the most that S3 gives."""
CHECK_FIRST_BYTES = 1 << 20
"""From this size on, a repeated conditional put first looks whether the object is there by now."""

_FAILURES = (MinioException, HTTPError, ParseError, UnicodeDecodeError)
"""All that minio-py and urllib3 raise when a request fails, a broken error document included."""

_DENIED = {
    "AccessDenied": "the account's policy does not allow it",
    "InvalidAccessKeyId": "the access key is unknown: check store_access_key",
    "SignatureDoesNotMatch": "the secret key is wrong: check store_secret_key and the region",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "AccountProblem": "the account is suspended",
    "AuthorizationHeaderMalformed": "the region is wrong: set ?region= in store_url",
}
_NOT_NOW = {"SlowDown", "QuotaExceeded", "RequestTimeout"}
"""Besides 409, 429 and 5xx."""

T = TypeVar("T")


class S3Store:
    """BlobStore over minio-py. Opening it sends nothing; safe for threads, and for use after a fork."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        *,
        region: str = "us-east-1",
        tls: bool = False,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._endpoint, self._bucket = endpoint, bucket
        self._access_key, self._secret_key = access_key, secret_key
        self._region, self._tls = region, tls
        self._timeout = urllib3.Timeout(connect=connect_timeout_s, read=read_timeout_s)
        self._minio: Minio | None = None
        self._pid = 0

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._send(f"get {check_key(key)}", partial(self._get, key, max_bytes))

    def get_to_file(self, key: str, path: Path, *, nbytes: int, sha256: str) -> None:
        self._send(f"get {check_key(key)}", partial(self._download, key, path, nbytes, sha256))

    def size(self, key: str) -> int:
        return self._send(f"head {check_key(key)}", partial(self._size, key))

    def modified(self, key: str) -> datetime:
        return self._send(f"head {check_key(key)}", partial(self._modified, key))

    def put(self, key: str, data: Buffer) -> None:
        self._send(f"put {check_key(key)}", partial(self._put, key, data))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        attempts = 0

        def request() -> bool:
            nonlocal attempts
            attempts += 1
            # A server may refuse and hang up while a large body is still on its way; that looks like a lost
            # connection, each time. So ask before sending it all again. What is seen there is there.
            if attempts > 1 and len(data) >= CHECK_FIRST_BYTES and self._visible(key):
                return False
            try:
                self._put(key, data, only_if_absent=True)
            except MinioException as exc:
                if _status(exc) == 412:
                    return False
                raise
            return True

        return self._send(f"put {check_key(key)}", request)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[str]:
        check_prefix(prefix)
        return self._list(prefix, start_after)

    def delete(self, key: str) -> None:
        try:
            self._send(f"delete {check_key(key)}", partial(self._client().remove_object, self._bucket, key))
        except NotFound:
            return

    def create_bucket(self) -> None:
        """Make the bucket; silent if this account has it already. For operators: sites may not."""
        request = partial(self._client().make_bucket, self._bucket, location=self._region)
        try:
            self._send("create bucket", request)
        except BadSettings as exc:
            if not (isinstance(exc.__cause__, S3Error) and exc.__cause__.code == "BucketAlreadyOwnedByYou"):
                raise

    def set_policy(self, policy: str) -> None:
        """Replace the bucket's policy by this JSON document (storage.access). For operators."""
        request = partial(self._client().set_bucket_policy, self._bucket, policy)
        self._send("set the bucket's policy", request)

    # --- one request each, sent by _send ------------------------------------------------------------------

    def _put(self, key: str, data: Buffer, *, only_if_absent: bool = False) -> None:
        """The only place that uses a private function of minio-py: its public put cannot carry the header
        (it would become x-amz-meta-if-none-match, and overwrite). The contract test keeps watch."""
        body = memoryview(data).cast("B")
        if body.nbytes > MAX_OBJECT_BYTES:
            raise ValueError(f"{key}: {body.nbytes} bytes, one object holds at most {MAX_OBJECT_BYTES}")
        headers: dict[str, Any] = {"Content-Type": "application/octet-stream"}
        if only_if_absent:
            headers["If-None-Match"] = "*"
        self._client()._put_object(self._bucket, key, cast(bytes, body), headers=headers)

    def _get(self, key: str, max_bytes: int) -> bytes:
        with self._opened(key) as (response, nbytes):
            if nbytes > max_bytes:
                raise BadPayload(f"{key} has {nbytes} bytes, at most {max_bytes} are read", "too-large")
            # Never decoded: a writer can declare any Content-Encoding, and a small gzip unpacks to terabytes
            return response.read(decode_content=False)

    def _download(self, key: str, path: Path, nbytes: int, sha256: str) -> None:
        with self._opened(key) as (response, found):
            if found != nbytes:
                raise BadPayload(f"{key} has {found} bytes, declared are {nbytes}", "wrong-size")
            with verified(path, key, nbytes=nbytes, sha256=sha256) as sink:
                for chunk in response.stream(CHUNK_BYTES, decode_content=False):
                    sink(chunk)

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[BaseHTTPResponse, int]]:
        """The response to a GET, its body unread, and its length in bytes."""
        response = self._client().get_object(self._bucket, key)
        try:
            length = response.headers.get("Content-Length", "")
            if not length.isdigit():
                raise StoreUnavailable(f"get {key}: the server does not say how long the object is")
            yield response, int(length)
        finally:
            response.close()  # drops the connection if the body was not read to its end

    def _size(self, key: str) -> int:
        return self._client().stat_object(self._bucket, key).size or 0

    def _modified(self, key: str) -> datetime:
        when = self._client().stat_object(self._bucket, key).last_modified
        if when is None:
            raise StoreUnavailable(f"head {key}: the server does not say when the object was written")
        return when.astimezone(UTC)

    def _visible(self, key: str) -> bool:
        try:
            self._size(key)
        except S3Error:  # not there, or this account may not look
            return False
        return True

    def _list(self, prefix: str, start_after: str) -> Iterator[str]:
        last = start_after
        while True:
            page = self._send(f"list {prefix}", partial(self._page, prefix, last))
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1]

    def _page(self, prefix: str, start_after: str) -> tuple[str, ...]:
        found = self._client().list_objects(
            self._bucket, prefix=prefix, recursive=True, start_after=start_after or None
        )
        return tuple(str(item.object_name) for item in islice(found, PAGE))

    # --- sending ------------------------------------------------------------------------------------------

    def _send(self, what: str, request: Callable[[], T]) -> T:
        limit = time.monotonic() + PATIENCE_S
        attempt = 0
        while True:
            attempt += 1
            try:
                return request()
            except _FAILURES as exc:
                error = self._error(what, exc)
                last = attempt == ATTEMPTS or time.monotonic() > limit
                if last or not isinstance(error, StoreUnavailable):
                    raise error from exc
            time.sleep(random.uniform(0.5, 1.0) * BACKOFF_S * 2 ** (attempt - 1))

    def _error(self, what: str, exc: Exception) -> FedqueueError:
        """The meaning of a failed request."""
        place = f"{what} (bucket {self._bucket} at {self._endpoint})"
        status = _status(exc)
        code, message = (str(exc.code), exc.message) if isinstance(exc, S3Error) else ("", "")
        if code == "NoSuchKey":
            return NotFound(f"{what}: no such object")
        if code == "NoSuchBucket":
            return BadSettings(f"{place}: the bucket does not exist: create it, or correct store_url")
        if code in _DENIED:
            return AccessDenied(f"{place}: {_DENIED[code]}")
        if code.startswith("BucketAlready"):
            return BadSettings(f"{place}: {code}: the name belongs to another account, take another")
        if status is None or status in (409, 429) or code in _NOT_NOW:
            return StoreUnavailable(f"{place}: {exc}")
        if status == 501:
            return UnsafeStore(f"{place}: the server does not implement this request; docs/operations.md")
        if status >= 500:
            return StoreUnavailable(f"{place}: {exc}")
        if status == 403:
            return AccessDenied(f"{place}: {code} {message}")
        if code:
            return BadSettings(f"{place}: refused with {status} {code}: {message}")
        return BadSettings(f"{place}: the answer ({status}) is not of an S3 server: check store_url")

    def _client(self) -> Minio:
        # Pooled connections must not be shared across a fork: two processes would read one another's answers
        if self._minio is None or self._pid != os.getpid():
            self._minio = Minio(
                self._endpoint,
                access_key=self._access_key,
                secret_key=self._secret_key,
                secure=self._tls,
                region=self._region,  # else an extra request that a site may not make
                http_client=new_pool(self._timeout),
            )
            self._pid = os.getpid()
        return self._minio


def _status(exc: Exception) -> int | None:
    """The HTTP status of a failed request, if there was an answer."""
    if isinstance(exc, S3Error):
        return int(exc.response.status)
    if isinstance(exc, ServerError):
        return exc.status_code
    if isinstance(exc, InvalidResponseError):
        return int(exc.args[0].partition("Response code: ")[2].partition(",")[0])
    return None
