"""The site agent: what runs beside a company's cameras. Only tensors and declared numbers leave it.

agent.py              the site: learns of jobs, answers them, lets one train at a time
work.py               one job: deliver, look, measure, train
policy.py             which jobs the site takes part in, and when it trains
fairness.py           whose turn it is
membership.py         joined or declined: told to the server until the bucket shows it
turns.py              invitations that were used, and the interval between two trainings
trainer.py            the Trainer port: all that the agent does not know of training
problems.py           what the server may be told of a failure
detection_trainer.py  local training of detectors behind that port
custom_trainer.py     somebody else's training behind it
validation.py         the images that a site measures with
evaluation.py         versions measured on them, and reported
outbox.py             finished updates on disk until the broker has confirmed them
delivery.py           upload, then publish
follow.py             what the job's log says: newest version, what became of our updates
local.py              from a stored version to weights and back to a payload (norm policy, differences)
offline.py            versions to predict with, also while the store is away
deployed.py           the folder that an inference process reads: versions, links, manifest, history
deployment.py         keeps it what a channel says
postcheck.py          is a deployed model fit for use?
site_key.py           the key by which this site signs
heartbeat.py          tells the server what this site is doing
machine.py            ... and how busy its computer is
backoff.py            how long to wait after a failure
niceness.py           giving way to other programs
"""
