"""HTTP/1.1 as the real server speaks it: its headers in their order, its chunks, its patience with idle connections."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

KEEP_ALIVE_SECONDS = 5
LONGEST_HEAD = 1 << 20


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Response:
    """A whole body, or one that comes in pieces."""

    status: int = 200
    body: bytes = b""
    kind: str = ""
    pieces: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    early: bool = False
    """Answered before the part that names the origin, or past it: the real server then leaves that header out."""


Answer = Callable[[Request], Awaitable[Response]]


class BadRequestError(Exception):
    """Not HTTP."""


class Connection(asyncio.Protocol):
    """One connection: requests one after the other, each ended when its client goes away."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = b""
        self.transport: asyncio.Transport
        self.task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.idle: asyncio.TimerHandle | None = None
        self.peer = "-"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream socket has no other
        self.transport = transport
        self.writable.set()
        peer = transport.get_extra_info("peername")
        self.peer = f"{peer[0]}:{peer[1]}" if peer else "-"
        self.server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.go_on()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.server.connections.discard(self)
        self.writable.set()
        if self.idle:
            self.idle.cancel()
        if self.task:
            self.task.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def go_on(self) -> None:
        """Begin with the next request when it is there as a whole and none is being answered."""
        if self.task or self.transport.is_closing():
            return
        try:
            request = self.take()
        except BadRequestError:
            self.head(400, {"content-type": "text/plain; charset=utf-8", "connection": "close"})
            self.transport.write(b"Invalid HTTP request received.")
            self.transport.close()
            return
        if request:
            if self.idle:
                self.idle.cancel()
            self.task = asyncio.get_running_loop().create_task(self.serve(request))

    def take(self) -> Request | None:
        """The next request of the buffer; None while it is not complete."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > LONGEST_HEAD:
                raise BadRequestError
            return None
        first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise BadRequestError
        headers: dict[str, str] = {"http-version": words[2]}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise BadRequestError
            headers[name.strip().lower()] = value.strip()
        rest = self.buffer[end + 4 :]
        if headers.get("transfer-encoding", "").lower() == "chunked":
            whole = unchunked(rest)
        else:
            length = headers.get("content-length", "0")
            if not length.isdigit():
                raise BadRequestError
            whole = (rest[: int(length)], int(length)) if len(rest) >= int(length) else None
        if whole is None:
            if headers.pop("expect", "").lower() == "100-continue" and not rest:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        self.buffer = rest[whole[1] :]
        return Request(words[0], words[1].partition("?")[0], headers, whole[0])

    async def serve(self, request: Request) -> None:
        try:
            response = await self.server.answer(request)
            self.server.log(self.peer, request, response.status)
            await self.send(request, response)
        except asyncio.CancelledError:
            if not self.transport.is_closing():
                self.transport.abort()
            raise
        except Exception:
            self.transport.abort()
            raise
        finally:
            self.task = None
        if request.headers.get("connection", "").lower() == "close" or self.server.closing:
            self.transport.close()
            return
        self.idle = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self.transport.close)
        self.go_on()

    async def send(self, request: Request, response: Response) -> None:
        headers = dict(response.headers)
        if response.pieces is None:
            headers["content-length"] = str(len(response.body))
        if response.kind:
            headers["content-type"] = response.kind
        if not response.early:
            headers["vary"] = "Origin"
        if request.headers.get("connection", "").lower() == "close" or self.server.closing:
            headers["connection"] = "close"
        if response.pieces is None:
            self.head(response.status, headers)
            self.transport.write(b"" if request.method == "HEAD" else response.body)
            await self.writable.wait()
            return
        self.head(response.status, {**headers, "transfer-encoding": "chunked"})
        async for piece in response.pieces:
            self.transport.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await self.writable.wait()
        self.transport.write(b"0\r\n\r\n")

    def head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"date: {self.server.date()}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


def unchunked(raw: bytes) -> tuple[bytes, int] | None:
    """A chunked body and how many bytes it took; None while it is not complete."""
    body, at = b"", 0
    while True:
        end = raw.find(b"\r\n", at)
        if end < 0:
            return None
        try:
            size = int(raw[at:end].split(b";")[0], 16)
        except ValueError:
            raise BadRequestError from None
        if len(raw) < end + 2 + size + 2:
            return None
        body += raw[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
        if size == 0:
            return body, at


class Server:
    """The listening socket and all connections behind it."""

    def __init__(self, answer: Answer, access_log: bool) -> None:
        self.answer = answer
        self.access_log = access_log
        self.connections: set[Connection] = set()
        self.closing = False
        self.listener: asyncio.AbstractServer | None = None
        self._date = (0, "")

    async def listen(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(lambda: Connection(self), host or "0.0.0.0", port, backlog=2048)  # noqa: S104

    async def close(self) -> None:
        """Take no more connections, end the idle ones, let the others have their answer."""
        self.closing = True
        if self.listener:
            self.listener.close()
        for connection in list(self.connections):
            if connection.task is None:
                connection.transport.close()
        tasks = [connection.task for connection in self.connections if connection.task]
        if tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(tasks)
        await asyncio.sleep(0)

    def date(self) -> str:
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True))
        return self._date[1]

    def log(self, peer: str, request: Request, status: int) -> None:
        if self.access_log:
            phrase = HTTPStatus(status).phrase
            print(f'INFO:     {peer} - "{request.method} {request.path} HTTP/1.1" {status} {phrase}', flush=True)
