"""What a site's message becomes: the task that the ingress sends for it, and an operator who requeues it.

updates.<site>    fedqueue.accept_update     update: a ClientUpdate
reports.<site>    fedqueue.record_report     report: an Evaluation
requests.<site>   fedqueue.handle_request    request: a Request
"""

from __future__ import annotations

from federation.wire import Delivery, decode_report, decode_request, decode_update
from tasks.celery import ACCEPT, HANDLE_REQUEST, RECORD_REPORT


def task_for(delivery: Delivery) -> tuple[str, dict[str, str]]:
    """Name and arguments of the task. Raises BadMessage with the reason for the dead letter."""
    if delivery.routing_key.startswith("reports."):
        return RECORD_REPORT, {"report": decode_report(delivery).to_json().decode()}
    if delivery.routing_key.startswith("requests."):
        return HANDLE_REQUEST, {"request": decode_request(delivery).to_json().decode()}
    return ACCEPT, {"update": decode_update(delivery).to_json().decode()}
