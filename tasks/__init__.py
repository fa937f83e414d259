"""The server: the Celery app and its tasks, and the ingress before them. `celery -A tasks worker` finds `app`.

ingress.py      sites' queue -> checked -> Celery task; heartbeats -> liveness; dead letters -> their task
celery.py       the Celery app, how a task ends, how it is sent: over RabbitMQ or the embedded queue
site_messages.py  what a site's message becomes
context.py      what one process works with: settings, store, logs
accept.py       fedqueue.accept_update     one update -> one log record
publish.py      fedqueue.publish_version   all pending updates -> one model version
state.py        the optimiser's state, stored beside the model
tell.py         hints to the sites, after the log has it
evaluate.py     fedqueue.evaluate_version  one version -> metrics on the held-out set (torch, as in bundle.py)
jobs.py         a job that is submitted: job description -> job.json and version 0
requests.py     fedqueue.handle_request    what a site or an operator asks: done and answered
members.py      which sites take part in a job
invite.py       which sites train next, in jobs that invite them
steer.py        pause, resume, stop; promote, roll back, clear a quarantine
judge.py        what follows from measurements and the clock: quarantine, the end of a job
release.py      a version proposed for release, and the sites' answers
bundle.py       fedqueue.write_release     a release whose rule is met -> its bundle
model_card.py   the bundle's card, for programs and for people
closing.py      the end of a job
oversee.py      fedqueue.oversee_jobs      what a job needs by the clock
records.py      appending to a log what is no update
report.py       fedqueue.record_report     what a site measured of a version -> the store
deadletters.py  fedqueue.keep_dead_letter  what nobody could handle -> the store, with its reason
retention.py    fedqueue.tend_jobs         publishes that are due, leftovers of closed jobs, retention
replay.py       every version made again from the log and the updates, and compared
embedded.py     ingress and tasks in one process, on the embedded queue
"""

from tasks.celery import app

__all__ = ["app"]
