"""A TCP proxy that breaks what passes through it.

It reads HTTP/1.1 just enough to know where a request and its answer end, so that a fault can be aimed at an
endpoint and a connection kept alive for the next request.
"""

from __future__ import annotations

import collections
import random
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from tests.rig.raw_server import Behaviour, Conversation, Gone, silence, wake

Kind = Literal[
    "rst_before",  # the request is read and goes nowhere
    "rst_mid_request",  # half of it reaches the federation
    "rst_mid_response",  # the federation acted, half of its answer comes back
    "drop_reply",  # the federation acted, the connection just ends
    "truncate",  # the answer ends after `after` bytes, or where negative, short of its end by so many
    "silence",  # the request is read and goes nowhere, and nothing is ever said
    "drip_header",  # the answer, a byte every `interval` seconds
    "drip_body",  # its head at once, its body so
    "slow",  # the answer after `interval` seconds
    "behave",  # `behaviour` talks in the federation's place
]


@dataclass(frozen=True, slots=True)
class TcpFault:
    """``path`` is a part of the request line that it is meant for; empty for any."""

    kind: Kind
    path: str = ""
    after: int = 0
    interval: float = 0.2
    behaviour: Behaviour = silence


class FaultProxy:
    """Forwards a loopback port to ``upstream``, another one. ``counts`` tells the faults done, by kind.

    ``stop`` and ``start`` again make connections refused in between; the port stays.
    """

    def __init__(self, upstream: int, *, port: int = 0) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._upstream = upstream
        self._script: list[TcpFault] = []
        self._always: list[TcpFault] = []
        self._random = random.Random(0)
        self._weights: list[tuple[TcpFault | None, float]] = []
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # --- what goes wrong

    def script(self, faults: Iterable[TcpFault]) -> None:
        """Each fault strikes once: the first request its path is part of, in the order given."""
        with self._lock:
            self._script = list(faults)

    def always(self, *faults: TcpFault) -> None:
        """Each fault strikes every request its path is part of."""
        with self._lock:
            self._always = list(faults)

    def randomly(self, seed: int, weights: Mapping[TcpFault | None, float]) -> None:
        """For each request one of ``weights`` (None: no fault) by its weight; the seed fixes the sequence."""
        with self._lock:
            self._random = random.Random(seed)
            self._weights = list(weights.items())

    def clear(self) -> None:
        """Ends every fault, those under way apart."""
        with self._lock:
            self._script, self._always, self._weights = [], [], []

    def _fault_for(self, request_line: bytes) -> TcpFault | None:
        with self._lock:
            line = request_line.decode("latin-1")
            fault = next((one for one in self._script if one.path in line), None)
            if fault:
                self._script.remove(fault)
            else:
                fault = next((one for one in self._always if one.path in line), None)
            if fault is None and self._weights:
                faults, weights = zip(*self._weights, strict=True)
                (fault,) = self._random.choices(faults, weights)
                fault = fault if fault and fault.path in line else None
            if fault:
                self.counts[fault.kind] += 1
            return fault

    # --- its life

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), name="fault proxy", daemon=True
        )
        self._acceptor.start()

    def stop(self) -> None:
        """Ends every connection, refuses new ones, and joins. ``start`` takes the same port again."""
        if self._listener is None or self._acceptor is None:
            return
        wake(self._listener)
        self._acceptor.join(timeout=5)
        self._listener.close()
        self._listener = self._acceptor = None
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with self._lock:
                sockets, threads = list(self._sockets), list(self._threads)
            for sock in sockets:
                wake(sock)
            if not threads:
                return
            threads[0].join(timeout=0.1)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- a connection

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="fault proxy", daemon=True)
            with self._lock:
                self._threads.add(thread)
                self._sockets.add(client)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                while self._pass_on(client):
                    pass
        except (OSError, Gone):
            pass  # either side hung up, as they may
        finally:
            with self._lock:
                self._sockets.discard(client)
                self._threads.discard(threading.current_thread())

    def _pass_on(self, client: socket.socket) -> bool:
        """One request and its answer; False where the connection is over."""
        request = _message(client)
        if not request:
            return False
        fault = self._fault_for(request.split(b"\r\n", 1)[0])
        conversation = Conversation(client, request=request)
        if fault:
            return self._misbehave(fault, conversation)
        reply = self._ask(request)
        conversation.send(reply)
        return bool(reply) and b"connection: close" not in reply.split(b"\r\n\r\n")[0].lower()

    def _misbehave(self, fault: TcpFault, conversation: Conversation) -> bool:
        request, client = conversation.request, conversation.socket
        match fault.kind:
            case "silence" | "behave":
                fault.behaviour(conversation)
                return False
            case "rst_before":
                _reset(client)
                return False
            case "rst_mid_request":
                with socket.create_connection(("127.0.0.1", self._upstream), timeout=5) as upstream:
                    upstream.sendall(request[: len(request) // 2])
                    _reset(upstream)
                _reset(client)
                return False
        reply = self._ask(request)
        head, _, body = reply.partition(b"\r\n\r\n")
        match fault.kind:
            case "rst_mid_response":
                conversation.send(reply[: len(reply) // 2])
                _reset(client)
            case "truncate":
                conversation.send(reply[: fault.after])
            case "drip_header":
                conversation.drip(reply, fault.interval)
            case "drip_body":
                conversation.send(head + b"\r\n\r\n")
                conversation.drip(body, fault.interval)
            case "slow":
                conversation.wait(fault.interval)
                conversation.send(reply)
                return True
        return False

    def _ask(self, request: bytes) -> bytes:
        """The federation's whole answer; empty where it hung up."""
        with socket.create_connection(("127.0.0.1", self._upstream), timeout=30) as upstream:
            with self._lock:
                self._sockets.add(upstream)
            try:
                upstream.sendall(request)
                return _message(upstream)
            finally:
                with self._lock:
                    self._sockets.discard(upstream)


def _message(sock: socket.socket) -> bytes:
    """One request or answer, by its Content-Length; empty where the other side ended before it was whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := sock.recv(65_536)):
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    wanted = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            wanted = int(value)
    while len(body) < wanted:
        if not (more := sock.recv(65_536)):
            return b""
        body += more
    return head + b"\r\n\r\n" + body


def _reset(sock: socket.socket) -> None:
    # Lingering for no time makes close() send RST where it would send FIN.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
