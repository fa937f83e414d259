"""store_url becomes the store that it names, or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from federation.errors import BadSettings
from federation.settings import Settings
from storage.folder import FolderStore
from storage.open import bucket_name, create_bucket, local_path, open_store
from storage.s3 import S3Store


def s3_settings(url: str, access_key: str = "a", secret_key: str = "s") -> Settings:
    return Settings(store_url=url, store_access_key=access_key, store_secret_key=SecretStr(secret_key))


def test_a_folder(tmp_path: Path) -> None:
    settings = Settings(store_url=f"file:{tmp_path}/a/b")
    create_bucket(settings)
    store = open_store(settings)
    assert isinstance(store, FolderStore)
    store.put("k", b"1")
    assert (tmp_path / "a" / "b" / "k").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("url", "path"), [("file:a/b", "a/b"), ("file:/a/b", "/a/b"), ("file:///a/b", "/a/b"), ("file:.x", ".x")]
)
def test_paths(url: str, path: str) -> None:
    assert str(local_path(url)) == path


@pytest.mark.parametrize(
    "url",
    [
        "s3://minio:9000/fedqueue",
        "s3://minio/fedqueue?tls=true&region=eu-central-1",
        "s3://10.0.0.1:9000/fedqueue?tls=false",
        "s3://[::1]:9000/fedqueue",
    ],
)
def test_an_s3_server_is_not_asked_anything_yet(url: str) -> None:
    assert isinstance(open_store(s3_settings(url)), S3Store)
    assert bucket_name(url) == "fedqueue"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://host:9000", "must name one bucket"),
        ("s3://host:9000/", "must name one bucket"),
        ("s3://host:9000/a/b", "must name one bucket"),
        ("s3://host:9000/Upper", "must name one bucket"),
        ("s3://user:secret@host:9000/bucket", "credentials go into"),
        ("s3://host:9000/bucket?tls=yes", "only"),
        ("s3://host:9000/bucket?secure=true", "only"),
        ("s3://ho st/bucket", "the host must be"),
    ],
)
def test_a_bad_url_is_named(url: str, message: str) -> None:
    with pytest.raises(BadSettings, match=message) as caught:
        open_store(s3_settings(url))
    assert "secret" not in str(caught.value).replace("store_secret_key", "")


@pytest.mark.parametrize(("access_key", "secret_key"), [("", "s"), ("a", "")])
def test_an_s3_store_needs_both_keys(access_key: str, secret_key: str) -> None:
    with pytest.raises(BadSettings, match="needs both"):
        open_store(s3_settings("s3://host:9000/bucket", access_key, secret_key))
