"""The HTTP connections of S3Store: no retries of their own, and no time limit on a large body as a whole.

A socket's timeout counts for a whole sendall(), and urllib3 sends under the *connect* timeout. So a model in
one piece would have to be sent within three seconds, which no site behind an ordinary line can do. Here a
large body goes out in pieces, each with a timeout of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

SEND_BYTES = 1 << 18
SEND_TIMEOUT_S = 30.0
"""For each SEND_BYTES of a body, so uploads work down to 9 KB/s."""


def new_pool(timeout: urllib3.Timeout) -> urllib3.PoolManager:
    """Connections that verify certificates and never send anything twice. SSL_CERT_FILE names own roots."""
    pool = urllib3.PoolManager(timeout=timeout, retries=False, maxsize=10, cert_reqs="CERT_REQUIRED")
    pool.pool_classes_by_scheme = {"http": _PiecewisePool, "https": _PiecewiseTlsPool}
    return pool


class _PiecewiseConnection(HTTPConnection):
    def send(self, data: Any) -> None:
        for piece in _pieces(self, data):
            super().send(piece)


class _PiecewiseTlsConnection(HTTPSConnection):
    def send(self, data: Any) -> None:
        for piece in _pieces(self, data):
            super().send(piece)


def _pieces(connection: HTTPConnection, data: Any) -> Iterator[Any]:
    if not isinstance(data, bytes | bytearray | memoryview) or len(data) <= SEND_BYTES:
        yield data
        return
    view = memoryview(data)
    for start in range(0, len(view), SEND_BYTES):
        if connection.sock is not None:
            connection.sock.settimeout(SEND_TIMEOUT_S)
        yield view[start : start + SEND_BYTES]


class _PiecewisePool(HTTPConnectionPool):
    ConnectionCls = _PiecewiseConnection


class _PiecewiseTlsPool(HTTPSConnectionPool):
    ConnectionCls = _PiecewiseTlsConnection
