"""A raw TCP server that answers as no federation would, and what it may answer.

A behaviour is a function of one conversation: it writes what it likes, and returns to hang up. The fault
proxy takes the same behaviours for single requests.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK = 65_536


class Gone(Exception):
    """The other side hung up, or the server stops."""


@dataclass(slots=True)
class Conversation:
    """One connection, as a behaviour holds it and a test reads it. Times are monotonic seconds."""

    socket: socket.socket
    opened: float = field(default_factory=time.monotonic)
    closed: float | None = None
    received: int = 0  # bytes
    sent: int = 0  # bytes handed to the kernel
    request: bytes = b""  # the head of the request, and what came with it

    @property
    def seconds_open(self) -> float:
        return (self.closed or time.monotonic()) - self.opened

    def read_head(self) -> None:
        while b"\r\n\r\n" not in self.request:
            self._receive()

    def send(self, data: bytes) -> None:
        """Raises Gone."""
        view = memoryview(data)
        try:
            while view:
                count = self.socket.send(view[:_CHUNK])
                self.sent += count
                view = view[count:]
        except OSError:
            raise Gone from None

    def drip(self, data: bytes, interval: float) -> None:
        """One byte every ``interval`` seconds. Raises Gone."""
        for index in range(len(data)):
            self.send(data[index : index + 1])
            self.wait(interval)

    def wait(self, seconds: float) -> None:
        """Raises Gone as soon as the other side hangs up."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._receive(left)

    def _receive(self, timeout: float | None = None) -> None:
        try:
            self.socket.settimeout(timeout)
            data = self.socket.recv(_CHUNK)
        except TimeoutError:
            return
        except OSError:
            data = b""
        finally:
            self.socket.settimeout(None)
        if not data:
            raise Gone
        self.received += len(data)
        if len(self.request) < 10 * _CHUNK:
            self.request += data


Behaviour = Callable[[Conversation], None]

FOREVER = 3_600.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def silence(conversation: Conversation) -> None:
    conversation.wait(FOREVER)


def endless_headers(conversation: Conversation) -> None:
    conversation.send(HEAD)
    while True:
        conversation.send(b"X-More: and more\r\n" * 100)


def endless_continue(interval: float = 0.05) -> Behaviour:
    def behave(conversation: Conversation) -> None:
        while True:
            conversation.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            conversation.wait(interval)

    return behave


def drip_status_line(interval: float = 0.2) -> Behaviour:
    return lambda conversation: conversation.drip(b"HTTP/1.1 200 " + b"O" * 100_000, interval)


def drip_header(interval: float = 0.2) -> Behaviour:
    def behave(conversation: Conversation) -> None:
        conversation.send(HEAD + b"X-Slow: ")
        conversation.drip(b"x" * 100_000, interval)

    return behave


def drip_body(interval: float = 0.2) -> Behaviour:
    def behave(conversation: Conversation) -> None:
        conversation.send(HEAD + b"Content-Length: 100000\r\n\r\n")
        conversation.drip(b" " * 100_000, interval)

    return behave


def answer(body: bytes, *, status: str = "200 OK", headers: bytes = b"") -> Behaviour:
    """A whole answer; ``headers`` are lines that end in CR LF."""
    head = (
        b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n"
    )
    return lambda conversation: conversation.send(head % (status.encode(), headers, len(body)) + body)


def huge_body(size: int = 200_000_000) -> Behaviour:
    """A JSON string of ``size`` bytes, never whole in memory here."""

    def behave(conversation: Conversation) -> None:
        conversation.send(HEAD + b'Content-Length: %d\r\n\r\n"' % size)
        block = b"x" * _CHUNK
        for _ in range((size - 2) // _CHUNK):
            conversation.send(block)
        conversation.send(block[: (size - 2) % _CHUNK] + b'"')

    return behave


def gzip_bomb(size: int = 300_000_000) -> Behaviour:
    """``size`` spaces, packed to about a thousandth."""
    return answer(_packed_spaces(size), headers=b"Content-Encoding: gzip\r\n")


def nested_gzip(size: int = 300_000_000, times: int = 3) -> Behaviour:
    """A bomb packed again and again, each packing named in Content-Encoding."""
    packed = _packed_spaces(size)
    for _ in range(times - 1):
        packed = gzip.compress(packed)
    return answer(packed, headers=b"Content-Encoding: " + b", ".join([b"gzip"] * times) + b"\r\n")


def _packed_spaces(size: int) -> bytes:
    # A gzip stream may have many members, each of which unpacks to the same block.
    block = 1_000_000
    return gzip.compress(b" " * block) * (size // block) + gzip.compress(b" " * (size % block))


def depth_bomb(depth: int = 100_000) -> Behaviour:
    return answer(b"[" * depth + b"]" * depth)


def million_list(count: int = 1_000_000) -> Behaviour:
    """A success with ``count`` elements in ``data``."""
    return answer(b'{"success":true,"data":[' + b"{}," * (count - 1) + b"{}]}")


def redirect(location: str, status: str = "307 Temporary Redirect") -> Behaviour:
    return answer(b"{}", status=status, headers=b"Location: %s\r\n" % location.encode())


class RawServer:
    """Answers every connection by one behaviour, which may be changed between requests.

    ``conversations`` has all of them, the latest last, open or closed.
    """

    def __init__(self, behaviour: Behaviour, *, port: int = 0) -> None:
        self.behaviour = behaviour
        self.conversations: list[Conversation] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept, name="raw server", daemon=True)]

    def start(self) -> None:
        self._threads[0].start()

    def stop(self) -> None:
        """Hangs up on everybody and joins."""
        wake(self._listener)
        self._threads[0].join(timeout=5)
        self._listener.close()
        for conversation in self.conversations:
            wake(conversation.socket)
        for thread in self._threads[1:]:
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            conversation = Conversation(connection)
            self.conversations.append(conversation)
            thread = threading.Thread(target=self._talk, args=(conversation,), name="raw server", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _talk(self, conversation: Conversation) -> None:
        with conversation.socket:
            try:
                conversation.read_head()
                self.behaviour(conversation)
                conversation.socket.shutdown(socket.SHUT_WR)
                silence(conversation)  # so that what was sent is read before the connection ends
            except (Gone, OSError):
                pass
            finally:
                conversation.closed = time.monotonic()


def wake(sock: socket.socket) -> None:
    """Ends what another thread is blocked in with this socket.

    Closing it is for that thread: a descriptor closed here may be somebody else's by the time it looks.
    """
    with contextlib.suppress(OSError):  # not connected, or closed already
        sock.shutdown(socket.SHUT_RDWR)
