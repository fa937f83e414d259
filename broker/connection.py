"""Connections to RabbitMQ: how pika is opened, bounded in time, and made to survive hostile headers.

Three things that pika's BlockingConnection does not do by itself:

- A wait for a confirm has no end as long as heartbeats come, for instance from a cluster without a majority.
  `deadline` aborts the connection.
- A header table that pika cannot decode (a timestamp beyond the year 9999, arrays in arrays in arrays) costs the
  connection, again with every redelivery. `_TolerantConnection` hands such a message on without its
  properties, so that it is refused like any other bad message.
- Its errors say what happened on the socket, not what to do. `translate` does.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Iterator
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPConnectionError, AMQPError, ChannelClosed, ConnectionClosed

from federation.errors import AccessDenied, BadMessage, BadSettings, BrokerUnavailable, FedqueueError

# Every failure leaves here as one of our errors. pika would log the same one up to five times, with stack
# traces, each time an agent tries whether the broker is back.
logging.getLogger("pika").setLevel(logging.CRITICAL)

LOST = (AMQPError, AMQPConnectorException, OSError)
"""What pika raises when a connection or channel is gone or could not be had."""

SOCKET_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 10.0  # TCP, TLS and the AMQP handshake together
CONFIRM_TIMEOUT_S = 15.0  # any answer to a request
CLOSE_TIMEOUT_S = 3.0
BLOCKED_TIMEOUT_S = 15.0  # the broker's memory or disk alarm stops publishers
UNDECODABLE = "undecodable"
"""The one header of a message whose own properties could not be decoded."""


def parse_url(url: str, name: str, heartbeat_s: int) -> pika.URLParameters:
    """Connection parameters. `name` is how the broker lists the connection. Raises BadSettings."""
    try:
        parameters = pika.URLParameters(url)
    except (ValueError, TypeError, AssertionError) as exc:
        # without `from`, so that no password reaches a log
        raise BadSettings(
            f"broker_url is not amqp[s]://user:password@host:port/vhost: {type(exc).__name__}"
        ) from None
    parameters.connection_attempts = 1  # attempts are counted in one place: the caller
    parameters.socket_timeout = SOCKET_TIMEOUT_S
    parameters.stack_timeout = CONNECT_TIMEOUT_S
    parameters.blocked_connection_timeout = BLOCKED_TIMEOUT_S
    parameters.heartbeat = heartbeat_s
    parameters.client_properties = {"connection_name": name}
    return parameters


def place(parameters: pika.URLParameters) -> str:
    """The address without the account, for messages."""
    return f"{parameters.host}:{parameters.port}{parameters.virtual_host}"


def open_connection(parameters: pika.URLParameters) -> pika.BlockingConnection:
    """Connect and authenticate within CONNECT_TIMEOUT_S. Raises one of LOST."""
    return pika.BlockingConnection(parameters, _impl_class=_TolerantConnection)


def close_quietly(connection: pika.BlockingConnection | None) -> None:
    """Close; what the broker says about it no longer matters."""
    if connection is not None and connection.is_open:
        with contextlib.suppress(*LOST), deadline(connection, CLOSE_TIMEOUT_S):
            connection.close()


@contextlib.contextmanager
def deadline(connection: pika.BlockingConnection, seconds: float) -> Iterator[None]:
    """Abort the connection if the block takes longer; its wait for the broker then raises one of LOST."""
    loop = connection._impl  # BlockingConnection's own timers do not fire inside its waits

    def expire() -> None:
        loop._terminate_stream(AMQPConnectionError(f"the broker did not answer within {seconds:g} s"))

    timer = loop._adapter_call_later(seconds, expire)
    try:
        yield
    finally:
        if connection.is_open:
            loop._adapter_remove_timeout(timer)


def translate(exc: BaseException, parameters: pika.URLParameters, doing: str) -> FedqueueError:
    """One of LOST in our words: AccessDenied, BadMessage (this message will never pass) or BrokerUnavailable."""
    code = exc.reply_code if isinstance(exc, (ChannelClosed, ConnectionClosed)) else None
    text = _text_of(exc)
    where = f"broker {place(parameters)}: {doing}: {text}"
    # pika also suspects a refusal when the socket dies during the handshake, so the broker's own word counts
    if "ACCESS_REFUSED" in text or code == 403:
        return AccessDenied(f"{where}; check user, password and permissions of this account")
    if ("NOT_ALLOWED" in text or code == 530) and "is down" not in text:
        return AccessDenied(f"{where}; check the virtual host in the URL and the account's permission for it")
    if code == 406 and "user_id" in text:
        return AccessDenied(f"{where}; a message carries the name of the account that sends it")
    if code == 406 and "message size" in text:
        return BadMessage(f"{where}; make the message smaller", "too-large")
    if code == 404:
        return BrokerUnavailable(f"{where}; run `fedqueue server init` to declare exchanges and queues")
    return BrokerUnavailable(where)


def refused_message(exc: BaseException) -> bool:
    """True if pika itself could not encode the message."""
    return isinstance(
        exc, (pika.exceptions.ShortStringTooLong, pika.exceptions.UnsupportedAMQPFieldException)
    )


def _text_of(exc: BaseException) -> str:
    """What pika wrapped, innermost: it often says more than the wrapping, whose text is empty."""
    inner = getattr(exc, "exception", None) or (exc.args[0] if exc.args else None)
    if isinstance(inner, BaseException):
        return _text_of(inner)
    if isinstance(exc, (ChannelClosed, ConnectionClosed)):
        return f"{exc.reply_code} {exc.reply_text}"
    return ": ".join([type(exc).__name__, *(str(arg) for arg in exc.args)])


class _TolerantConnection(SelectConnection):  # type: ignore[misc]  # pika carries no types
    """Reads frames as its base does, but a content header that cannot be decoded costs only the header."""

    def _read_frame(self) -> tuple[int, Any]:
        try:
            consumed, frame = super()._read_frame()
        except (AMQPError, ValueError, OverflowError, OSError, RecursionError, struct.error) as exc:
            salvaged = _salvage_header(bytes(self._frame_buffer), exc)
            if salvaged is None:
                raise
            return salvaged
        return int(consumed), frame


def _salvage_header(data: bytes, exc: BaseException) -> tuple[int, Any] | None:
    """A content header frame with its size and without its properties; None if the frame is another.

    AMQP 0-9-1 §4.2.3 and §4.2.6.1: type, channel, size; class, weight, body size, properties; end mark.
    """
    if len(data) < 7:
        return None
    kind, channel, size = struct.unpack(">BHL", data[:7])
    end = 7 + size + 1
    if kind != pika.spec.FRAME_HEADER or size < 12 or len(data) < end or data[end - 1] != pika.spec.FRAME_END:
        return None
    body_size: int = struct.unpack(">Q", data[11:19])[0]
    properties = pika.BasicProperties(headers={UNDECODABLE: type(exc).__name__})
    return end, pika.frame.Header(channel, body_size, properties)


def open_channel(connection: pika.BlockingConnection, *, confirm: bool = False) -> BlockingChannel:
    """A channel, with publisher confirms if asked. Raises one of LOST."""
    channel = connection.channel()
    if confirm:
        channel.confirm_delivery()
    return channel
