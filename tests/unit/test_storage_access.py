"""What a site's policy allows: by the rules that policies have, and on a real S3 server."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from federation.errors import AccessDenied, BadSettings, NotFound
from federation.settings import Settings
from storage.access import site_policy
from storage.blob import BlobStore
from storage.jobs import load_job
from storage.open import create_bucket, open_store
from storage.s3 import S3Store
from tests.servers.rgw import Account, Rgw

URL = "s3://host:9000/bucket"
ID = "01890a5d-ac96-774b-bcce-b302099a8057"
LOG = f"jobs/j/log/{0:020d}.json"


def matches(pattern: str, text: str) -> bool:
    """`*` of a policy matches anything, "/" too."""
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), text) is not None


def allows(policy: Any, arn: str, action: str, key: str) -> bool:
    """Decide as a policy is read: denied if any Deny matches, else allowed if any Allow does."""
    effects = set()
    for statement in policy["Statement"]:
        if "Principal" in statement and arn not in statement["Principal"]["AWS"]:
            continue
        if action not in statement["Action"]:
            continue
        if action == "s3:ListBucket":
            patterns, text = statement["Condition"]["StringLike"]["s3:prefix"], key
        else:
            patterns, text = statement["Resource"], f"arn:aws:s3:::bucket/{key}"
        if any(matches(pattern, text) for pattern in patterns):
            effects.add(statement["Effect"])
    return effects == {"Allow"}


READ, WRITE, LIST, DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
ALLOWED = [
    *(READ, "jobs/j/job.json"),
    *(READ, LOG),
    *(READ, "jobs/j/models/0.safetensors"),
    *(READ, "jobs/j/metrics/0000000001/server.json"),
    *(LIST, "jobs/j/log/"),
    *(LIST, "jobs/j/metrics/"),
    *(WRITE, f"jobs/j/updates/north/{ID}.safetensors"),
]
REFUSED = [
    *(READ, "jobs/j/updates/south/x.safetensors"),
    *(READ, "jobs/j/updates/log/x.safetensors"),
    *(READ, "jobs/j/rejected/south/x.json"),
    *(READ, "deadletters/x.json"),
    *(LIST, ""),
    *(LIST, "jobs/"),
    *(LIST, "jobs/j/"),
    *(LIST, "jobs/j/updates/"),
    *(LIST, "jobs/j/updates/log/"),
    *(LIST, "jobs/j/updates/metrics/"),
    *(WRITE, "jobs/j/updates/south/x.safetensors"),
    *(WRITE, "jobs/j/updates/north-2/x.safetensors"),
    *(WRITE, LOG),
    *(WRITE, "jobs/j/job.json"),
    *(WRITE, "jobs/j/models/0.safetensors"),
    *(WRITE, "jobs/j/metrics/0000000001/server.json"),
    *(WRITE, "jobs/j/rejected/north/x.json"),
    *(WRITE, "jobs/j/log/updates/north/x"),
    *(WRITE, "jobs/j/models/updates/north/x"),
    *(WRITE, "jobs/j/metrics/updates/north/x"),
    *(WRITE, "jobs/j/rejected/updates/north/x"),
    *(WRITE, "jobs/j/updates/south/updates/north/x"),
    *(WRITE, "deadletters/x.json"),
    *(DELETE, f"jobs/j/updates/north/{ID}.safetensors"),
    *(DELETE, LOG),
]


def pairs(flat: list[str]) -> list[tuple[str, str]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@pytest.mark.parametrize("arn", ["arn:aws:iam:::user/north", ""])
@pytest.mark.parametrize(("action", "key"), pairs(ALLOWED))
def test_a_site_may(action: str, key: str, arn: str) -> None:
    assert allows(site_policy(URL, {"north": arn}), arn, action, key)


@pytest.mark.parametrize("arn", ["arn:aws:iam:::user/north", ""])
@pytest.mark.parametrize(("action", "key"), pairs(REFUSED))
def test_a_site_may_not(action: str, key: str, arn: str) -> None:
    assert not allows(site_policy(URL, {"north": arn}), arn, action, key)


def test_each_site_has_its_own_prefix() -> None:
    policy = site_policy(URL, {"north": "arn:n", "south": "arn:s"})
    for (site, arn), other in itertools.product((("north", "arn:n"), ("south", "arn:s")), ("north", "south")):
        assert allows(policy, arn, WRITE, f"jobs/j/updates/{other}/x") == (site == other)
    assert not allows(policy, "arn:x", READ, LOG)


@pytest.mark.parametrize("site", ["log", "models", "metrics", "rejected", "releases", "a/*", "*", ""])
def test_a_name_that_would_open_more_is_refused(site: str) -> None:
    with pytest.raises(BadSettings):
        site_policy(URL, {site: "arn:n"})


def test_several_sites_need_their_users() -> None:
    with pytest.raises(BadSettings, match="ARN"):
        site_policy(URL, {"north": "", "south": "arn:s"})


@pytest.fixture(scope="module")
def stores(s3_server: Rgw) -> tuple[BlobStore, BlobStore]:
    """The bucket as the server's account and as site north see it."""

    def settings(account: Account) -> Settings:
        return Settings(
            store_url=s3_server.url("access"),
            store_access_key=account.access_key,
            store_secret_key=SecretStr(account.secret_key),
        )

    north = s3_server.user(Account("north", "north-key", "north-secret"))
    south = s3_server.user(Account("south", "south-key", "south-secret"))
    create_bucket(settings(s3_server.admin))
    server = open_store(settings(s3_server.admin))
    assert isinstance(server, S3Store)
    policy = site_policy(s3_server.url("access"), {"north": north.arn, "south": south.arn})
    server.set_policy(json.dumps(policy))
    return server, open_store(settings(north))


def perform(store: BlobStore, action: str, key: str) -> object:
    calls: dict[str, Callable[[], object]] = {
        READ: lambda: store.get(key, max_bytes=10),
        WRITE: lambda: store.put_if_absent(key, b"1"),
        LIST: lambda: list(store.list(key)),
        DELETE: lambda: store.delete(key),
    }
    return calls[action]()


@pytest.mark.s3
@pytest.mark.parametrize(("action", "key"), pairs(ALLOWED))
def test_on_a_real_server_a_site_may(stores: tuple[BlobStore, BlobStore], action: str, key: str) -> None:
    server, north = stores
    if action == READ:
        server.put(key, b"1")
    perform(north, action, key)


@pytest.mark.s3
@pytest.mark.parametrize(("action", "key"), pairs(REFUSED))
def test_on_a_real_server_a_site_may_not(stores: tuple[BlobStore, BlobStore], action: str, key: str) -> None:
    server, north = stores
    if action == READ:
        server.put(key, b"1")
    with pytest.raises(AccessDenied, match="policy does not allow"):
        perform(north, action, key)


@pytest.mark.s3
def test_a_site_cannot_tell_a_missing_object_from_a_forbidden_one_but_can_list_the_log(
    stores: tuple[BlobStore, BlobStore],
) -> None:
    """Why the version log is read by listing (storage/log.py)."""
    server, north = stores
    server.put(LOG, b"1")
    with pytest.raises(AccessDenied):
        north.get(f"jobs/j/log/{1:020d}.json", max_bytes=10)
    assert list(north.list("jobs/j/log/", start_after=LOG)) == []
    server.put(f"jobs/j/log/{1:020d}.json", b"2")
    assert list(north.list("jobs/j/log/", start_after=LOG)) == [f"jobs/j/log/{1:020d}.json"]


@pytest.mark.s3
def test_a_site_is_told_that_a_job_does_not_exist_yet(
    stores: tuple[BlobStore, BlobStore], s3_server: Rgw
) -> None:
    _, north = stores
    with pytest.raises(NotFound, match="no job 'later'"):
        load_job(north, "later")
    stranger = s3_server.user(Account("stranger", "stranger-key", "stranger-secret"))
    settings = Settings(
        store_url=s3_server.url("access"),
        store_access_key=stranger.access_key,
        store_secret_key=SecretStr(stranger.secret_key),
    )
    with pytest.raises(AccessDenied):
        load_job(open_store(settings), "later")


@pytest.mark.s3
def test_an_upload_may_be_repeated(stores: tuple[BlobStore, BlobStore]) -> None:
    _, north = stores
    key = "jobs/j/updates/north/again.safetensors"
    assert north.put_if_absent(key, b"1")
    assert not north.put_if_absent(key, b"1")
