"""What a site's S3 account may do, as a bucket policy.

    read    jobs/*/job.json, log/*, models/*, metrics/*, members/*, invitations/*, releases/*
            announced/*, sites/*, answers/<site>/*
    list    jobs/*/log/*, jobs/*/metrics/*, jobs/*/members/*, jobs/*/releases/*, announced/*
    write   jobs/*/updates/<site>/*

A policy's `*` also matches "/" on most servers. So an allowed pattern alone would let a site write
jobs/x/log/updates/<site>/y, which lies in a log, and read the uploads of a site whose name is "log". What must
never happen is therefore denied as well, which outweighs every allowance.
"""

from __future__ import annotations

from collections.abc import Mapping

from federation.errors import BadSettings
from federation.ids import is_name
from storage.open import bucket_name

READABLE = ("job.json", "log/*", "models/*", "metrics/*", "members/*", "invitations/*", "releases/*")
LISTABLE = ("jobs/*/log/*", "jobs/*/metrics/*", "jobs/*/members/*", "jobs/*/releases/*", "announced/*")
NOT_BELOW = (
    "log",
    "models",
    "metrics",
    "rejected",
    "members",
    "invitations",
    "releases",
    "updates/*/updates",
)

Statement = dict[str, object]


def site_policy(store_url: str, sites: Mapping[str, str], server: str = "") -> dict[str, object]:
    """The policy document of the bucket in `store_url`: site name -> ARN of its S3 user.

    `server`: ARN of the account of the server's processes. Needed where an object belongs to who uploaded it
    (Ceph RGW, old AWS buckets): there even the bucket's owner may not read a site's update without it.

    An empty ARN leaves the principal out: a user policy, as MinIO attaches to one account; then name one site.
    Raises BadSettings.
    """
    bucket = bucket_name(store_url)
    statements: list[Statement] = []
    for site, user_arn in sorted(sites.items()):
        if not is_name(site):
            raise BadSettings(f"{site!r} cannot name a site: use lower-case letters, digits and hyphens")
        if site in NOT_BELOW:
            raise BadSettings(
                f"a site cannot be called {site!r}: its uploads would look like a job's own {site}"
            )
        if not user_arn and len(sites) > 1:
            raise BadSettings("a policy for several sites needs the ARN of each one's user")
        statements += _statements(f"arn:aws:s3:::{bucket}", site, user_arn)
    if server:
        statements.append(
            {
                "Effect": "Allow",
                "Principal": {"AWS": [server]},
                "Action": ["s3:*"],
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
            }
        )
    return {"Version": "2012-10-17", "Statement": statements}


def _statements(bucket: str, site: str, user_arn: str) -> list[Statement]:
    principal: Statement = {"Principal": {"AWS": [user_arn]}} if user_arn else {}
    jobs = f"{bucket}/jobs/*"

    def statement(effect: str, action: str, resources: list[str], **more: object) -> Statement:
        return {"Effect": effect, **principal, "Action": [action], "Resource": resources, **more}

    def prefix(*patterns: str) -> dict[str, object]:
        return {"StringLike": {"s3:prefix": [*patterns]}}

    return [
        statement(
            "Allow",
            "s3:GetObject",
            [
                *(f"{jobs}/{what}" for what in READABLE),
                *(f"{bucket}/{what}" for what in ("announced/*", "sites/*", f"answers/{site}/*")),
            ],
        ),
        statement("Allow", "s3:ListBucket", [bucket], Condition=prefix(*LISTABLE)),
        statement("Allow", "s3:PutObject", [f"{jobs}/updates/{site}/*"]),
        statement("Deny", "s3:GetObject", [f"{jobs}/updates/*"]),
        statement("Deny", "s3:ListBucket", [bucket], Condition=prefix("jobs/*/updates/*")),
        statement("Deny", "s3:PutObject", [f"{jobs}/{what}/*" for what in NOT_BELOW]),
    ]
