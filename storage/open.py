"""From the settings' store_url to a store.

file:PATH                                    a local folder (embedded mode)
s3://host:port/bucket?tls=true&region=NAME   an S3 server; tls is false and region us-east-1 by default
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from federation.errors import BadSettings
from federation.settings import Settings
from storage.blob import BlobStore
from storage.folder import FolderStore
from storage.s3 import S3Store

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_ENDPOINT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?\Z")


def open_store(settings: Settings) -> BlobStore:
    """The store that the settings name. Sends nothing yet, and may be used after a fork.

    Raises BadSettings; for a folder also UnsafeStore, AccessDenied, StoreUnavailable.
    """
    if settings.store_url.startswith("file:"):
        return FolderStore(local_path(settings.store_url))
    return _open_s3(settings)


def create_bucket(settings: Settings) -> None:
    """Make the bucket or the folder, if it is not there yet: for operators, once.

    Raises BadSettings, AccessDenied, StoreUnavailable.
    """
    if settings.store_url.startswith("file:"):
        FolderStore(local_path(settings.store_url))
    else:
        _open_s3(settings).create_bucket()


def local_path(url: str) -> Path:
    """PATH of `file:PATH` or `file:///PATH`."""
    path = url.removeprefix("file:")
    return Path(path.removeprefix("//") if path.startswith("///") else path)


def bucket_name(store_url: str) -> str:
    """The bucket in an s3: store_url. Raises BadSettings."""
    bucket = urlsplit(store_url).path.strip("/")
    if not store_url.startswith("s3:") or not _BUCKET.match(bucket):
        raise BadSettings("store_url: must name one bucket in lower case, as in s3://host:9000/fedqueue")
    return bucket


def _open_s3(settings: Settings) -> S3Store:
    parts = urlsplit(settings.store_url)
    bucket = bucket_name(settings.store_url)
    if parts.username is not None or parts.password is not None:
        raise BadSettings("store_url: credentials go into store_access_key and store_secret_key")
    if not _ENDPOINT.match(parts.netloc):
        raise BadSettings("store_url: the host must be a name or an address, with :port where it is not 80")
    if not settings.store_access_key or not settings.store_secret_key.get_secret_value():
        raise BadSettings("store_access_key and store_secret_key: an S3 store needs both")
    options = parse_qs(parts.query, keep_blank_values=True)
    unknown = sorted(set(options) - {"tls", "region"})
    tls = options.get("tls", ["false"])[-1]
    if unknown or tls not in ("true", "false"):
        raise BadSettings("store_url: after the bucket only ?tls=true|false and &region=NAME are known")
    return S3Store(
        parts.netloc,
        bucket,
        settings.store_access_key,
        settings.store_secret_key.get_secret_value(),
        region=options.get("region", [""])[-1] or "us-east-1",
        tls=tls == "true",
    )
