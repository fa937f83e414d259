"""Celery's settings, for `celery -A tasks worker` and for what sends tasks. Each value says why.

Where things are comes from federation/settings.py (FEDQUEUE_BROKER_URL …); what never changes is here. The set
was found by killing workers and brokers under load; docs/operations.md says what each outage looks like.
"""

from kombu import Exchange, Queue

from broker import topology as _topology
from federation.settings import Settings as _Settings

_settings = _Settings.load()
_tasks = Exchange(_topology.TASKS_EXCHANGE, type="topic", durable=True)

# --- the broker ------------------------------------------------------------------------------------------
# The embedded queue is served by tasks/embedded.py; Celery then never connects anywhere.
broker_url = "memory://" if _settings.embedded else _settings.broker_url.get_secret_value()
broker_transport_options = {"confirm_publish": True}  # a task that was sent is a task that the broker has
# seconds; a broker that is killed is mostly noticed at once, but now and then (seen with Celery 5.7) only after
# two heartbeats without a sign of it, so they must be short
broker_heartbeat = 15
broker_connection_timeout = 5  # seconds
broker_connection_max_retries = None  # default 100, after which a worker exits for good
broker_connection_retry_on_startup = True  # workers may start before the broker
broker_channel_error_retry = True
broker_pool_limit = 1

# --- queues: broker/topology.py names them, nothing else may appear ----------------------------------------
task_queues = [
    Queue(
        spec.name,
        exchange=_tasks,
        routing_key=spec.routing_key,
        durable=True,
        queue_arguments=_topology.queue_arguments(spec.name, _settings.delivery_limit),
    )
    for spec in _topology.TASK_QUEUES
]
task_default_queue = _topology.MERGE
task_default_exchange = _topology.TASKS_EXCHANGE
task_default_exchange_type = "topic"  # a direct one makes delayed tasks block a worker on quorum queues
task_default_routing_key = "merge.unknown"
task_create_missing_queues = False  # a misspelt queue is an error, not a new queue that nobody reads
task_routes = {
    f"fedqueue.{name}": {"queue": _topology.EVALUATE} for name in ("evaluate_version", "write_release")
}

# --- messages ----------------------------------------------------------------------------------------------
accept_content = ["json"]  # nothing is unpickled, ever
task_serializer = "json"
result_backend = None  # the log is the result; a result backend would be a second truth that can be down
task_ignore_result = True

# --- exactly once in effect: a message is acknowledged when its work is in the store, and never before ------
task_acks_late = True
task_reject_on_worker_lost = True  # kill -9 of a child gives the message back
task_acks_on_failure = False  # the default acknowledges a failed task and so loses it; this dead-letters it
task_acks_on_timeout = False
task_time_limit = _settings.task_time_limit_s  # seconds; well below the broker's consumer timeout of 30 min
task_soft_time_limit = _settings.task_time_limit_s * 0.9

# --- the worker ----------------------------------------------------------------------------------------------
worker_pool = "prefork"  # "solo" stalls for up to minutes on RabbitMQ
worker_concurrency = 1  # merges of a job are serial; more jobs or more speed: more workers
worker_prefetch_multiplier = 1  # what waits belongs in the queue, where another worker can take it
worker_cancel_long_running_tasks_on_connection_loss = (
    True  # else the redelivered task runs beside the old one
)
worker_soft_shutdown_timeout = 20  # seconds to finish the task at SIGTERM (start with REMAP_SIGTERM=SIGQUIT)
worker_max_memory_per_child = 4_000_000  # KiB; a child that grew is replaced after its task
worker_send_task_events = False
worker_enable_remote_control = (
    False  # else two workers of one host that forgot -n fight for one control queue, for ever
)
worker_hijack_root_logger = True
