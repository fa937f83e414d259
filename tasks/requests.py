"""fedqueue.handle_request: what a site or an operator asks, done and answered.

A handler does what its request says, and returns what it did in words. It raises Rejected for what cannot be done,
with every error found (`Refused`), and Transient for an outage. It must be harmless to repeat: a worker may die
before the answer is stored, and then the same request comes again.

    submit-job        tasks/jobs.py
    join-job, decline-job    tasks/members.py
    steer-job, steer-model   tasks/steer.py
    propose-release, answer-release    tasks/release.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from federation.errors import NotFound, Rejected
from federation.points import Point, reach
from federation.requests import Answer, Request
from federation.types import SERVER
from federation.wire import Answered
from storage.control import load_answer, save_answer
from tasks import celery
from tasks.context import Context, current
from tasks.tell import hint

log = logging.getLogger("fedqueue.requests")

Handler = Callable[[Context, Request], str]
"""Returns what was done, in words."""


class RequestRefused(Rejected):
    """Several things are wrong at once; `errors` has each."""

    reason = "refused"

    def __init__(self, *errors: str) -> None:
        super().__init__("; ".join(errors))
        self.errors = errors

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.errors


@celery.task(celery.HANDLE_REQUEST)
def handle_request(self: Any, request: str) -> None:
    """`request`: a Request as JSON, whose sender the ingress has checked, or an operator's."""
    handle(current(), Request.from_json(request))


def handle(context: Context, request: Request) -> Answer:
    """Do what is asked, once, and answer. Raises Transient if that cannot be decided now."""
    answer = load_answer(context.store, request.who, request.request_id)
    if answer is None:
        answer = _answer(context, request)
        save_answer(context.store, answer)
        reach(Point.ANSWERED)
    if request.what.kind == "submit-job":
        from tasks.jobs import discard_uploads

        discard_uploads(context, request, answer)
    if request.who != SERVER:
        hint(context, Answered(request_id=request.request_id), request.who)
    return answer


def _answer(context: Context, request: Request) -> Answer:
    errors: tuple[str, ...] = ()
    message = ""
    try:
        message = handlers()[request.what.kind](context, request)
    except RequestRefused as exc:
        errors = exc.errors
    except (Rejected, NotFound) as exc:
        errors = (str(exc),)
    if errors:
        log.warning("%s of %s refused: %s", request.what.kind, request.who, "; ".join(errors))
    else:
        log.info("%s of %s: %s", request.what.kind, request.who, message)
    return Answer(
        request_id=request.request_id,
        who=request.who,
        kind=request.what.kind,
        ok=not errors,
        job=getattr(request.what, "job", None),
        message=message[:2000],
        errors=tuple(error[:2000] for error in errors[:100]),
        at=datetime.now(UTC),
    )


def handlers() -> dict[str, Handler]:
    """By kind of request. A function, because the handlers' modules import this one for `RequestRefused`."""
    from tasks import jobs, members, release, steer

    return {
        "submit-job": jobs.submit,
        "join-job": members.join,
        "decline-job": members.decline,
        "steer-job": steer.steer_job,
        "steer-model": steer.steer_model,
        "propose-release": release.propose,
        "answer-release": release.answer,
    }
