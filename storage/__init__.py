"""Object stores, tensor files, the version log, site liveness, faults for tests.

blob.py         the port to a bucket
folder.py, s3.py, memory.py   a local folder, an S3 server, a dict; open.py opens what a URL names
s3_connection.py  how the S3 client connects, and for how long it waits
key_rules.py    what a key may be
files.py        files that appear whole and durable, or not at all
probe.py        does the store honour put-if-absent?
access.py       what a site's S3 account may do, as a bucket policy
faulty.py       any store, with faults made on purpose
readonly.py     any store, to look at: asked again, never written
metered.py      any store, and how much was read from it
reading.py      reading values, and twice what looks broken

tensors.py      safetensors files in canonical layout
models.py       models and payloads, written and read under their digest; a site's cache
jobs.py         job.json, evaluations, refusals, dead letters
control.py      announcements, answers to requests, members, invitations, sites' keys
releases.py     proposals to give a version away, the sites' answers, the bundle
channels.py     which version is latest, best, stable
account.py      what a job cost and brought, counted from the log
log.py          the version log: append by compare-and-swap, read, follow
retention.py    what may go, and how it goes
leftovers.py    ... of what belongs to no job's log

audit.py        is everything there, and does everything count once?
ledger.py       ... what the log says of each update and object
succession.py   ... does a record follow from the one before it?
salvage.py      ... reading a log that may be broken

liveness.py     which sites are there, in Redis or a folder

minio and redis are imported here alone.
"""
