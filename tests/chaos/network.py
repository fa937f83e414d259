"""The line between a site and the servers: a small TCP proxy for each, which can be cut.

A cut line either refuses, as a host that is up without the service does, or hangs, as a lost network does: then
nothing passes in either direction, and what was sent meanwhile arrives after the repair.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK_BYTES = 1 << 16


class Network:
    """The event loop of all lines, in a thread of its own. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def line(self, *server_ports: int) -> Line:
        """A new line to these ports of the loopback interface."""
        return self.run(self._open_line(server_ports))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open_line(self, server_ports: tuple[int, ...]) -> Line:
        line = Line(self)
        for port in server_ports:
            server = await line.listen(port)
            self._servers.append(server)
        return line

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Line:
    """One site's ways to its servers. `ports` are where it finds them, in the order of the servers."""

    def __init__(self, network: Network) -> None:
        self.ports: list[int] = []
        self._network = network
        self._flows = asyncio.Event()
        self._flows.set()
        self._refuses = False
        self._connections: set[asyncio.StreamWriter] = set()

    async def listen(self, server_port: int) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(server_port, reader, writer)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.ports.append(int(server.sockets[0].getsockname()[1]))
        return server

    def cut(self, *, hang: bool) -> None:
        self._network.run(self._cut(hang))

    def repair(self) -> None:
        self._network.run(self._repair())

    async def _cut(self, hang: bool) -> None:
        if hang:
            self._flows.clear()
        else:
            self._refuses = True
            for writer in self._connections:
                writer.transport.abort()

    async def _repair(self) -> None:
        self._refuses = False
        self._flows.set()

    async def _serve(
        self, server_port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._flows.wait()
        try:
            if self._refuses:
                return
            there_reader, there = await asyncio.open_connection("127.0.0.1", server_port)
        except OSError:  # the server is down: so it looks from the site, too
            return
        else:
            await self._join(reader, writer, there_reader, there)
        finally:
            writer.transport.abort() if self._refuses else writer.close()

    async def _join(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there: asyncio.StreamWriter,
    ) -> None:
        """Pass on what either side says until one of them has finished."""
        ends = {writer, there}
        self._connections |= ends
        pumps = [
            asyncio.create_task(self._pump(reader, there)),
            asyncio.create_task(self._pump(there_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections -= ends
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            there.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
