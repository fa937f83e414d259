"""What a site's message becomes: the task that the ingress sends for it, and an operator who requeues it.

updates.<site>    fedqueue.accept_update     update: a ClientUpdate
reports.<site>    fedqueue.record_report     report: an Evaluation
"""

from __future__ import annotations

from federation.wire import Delivery, decode_report, decode_update
from tasks.celery import ACCEPT, RECORD_REPORT


def task_for(delivery: Delivery) -> tuple[str, dict[str, str]]:
    """Name and arguments of the task. Raises BadMessage with the reason for the dead letter."""
    if delivery.routing_key.startswith("reports."):
        return RECORD_REPORT, {"report": decode_report(delivery).to_json().decode()}
    return ACCEPT, {"update": decode_update(delivery).to_json().decode()}
