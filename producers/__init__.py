"""The site agent: what runs beside a company's cameras. Only tensors and declared numbers leave it.

agent.py              the loop: deliver, look, train, hand over; the Trainer port
detection_trainer.py  local training of detectors behind that port
custom_trainer.py     somebody else's training behind it
validation.py         the images that a site measures with
evaluation.py         versions measured on them, and reported
outbox.py             finished updates on disk until the broker has confirmed them
delivery.py           upload, then publish
follow.py             what the job's log says: newest version, what became of our updates
local.py              from a stored version to weights and back to a payload (norm policy, differences)
offline.py            versions to predict with, also while the store is away
heartbeat.py          tells the server what this site is doing
machine.py            ... and how busy its computer is
backoff.py            how long to wait after a failure
niceness.py           giving way to other programs
"""
