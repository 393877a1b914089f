"""The oracle: a federation that records what it is sent, and errs on demand."""

from __future__ import annotations

import collections
import http
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from types import TracebackType
from typing import Any, Literal, Self

import jwt

from local_federation.server import DEFAULT_ADMIN_KEY, DEFAULT_TOKEN_TTL, ServedApp, make_app
from local_federation.store import Row, Store
from local_federation.tokens import Tokens
from local_federation.wire import BASE_PATH, Refused, read_body
from tests.rig.invariants import Record, Request, Transition

KINDS = ("register", "heartbeat", "pending", "acknowledge", "complete", "analytics")
_PATHS = re.compile(
    rf"{BASE_PATH}/(?:(?P<single>register|heartbeat)|commands/(?P<pending>pending)"
    r"|commands/(?P<id>[^/]+)/(?P<step>acknowledge|complete)|(?P<analytics>analytics)/report)"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """An answer in the federation's place, after ``delay`` seconds.

    ``status`` None lets the federation answer itself. ``act``: the federation does what was asked, and the
    neuron is told this instead. A ``body`` that is neither bytes nor str is sent as JSON.
    """

    status: int | None = 503
    body: Any = field(default_factory=lambda: {"success": False, "error": "scripted fault"})
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    act: bool = False
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.status or 'delay'}{' after acting' if self.act else ''}"

    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


@dataclass(frozen=True, slots=True)
class Hang:
    """No answer until ``release`` is set or the neuron hangs up; then the federation's own.

    ``act``: the federation does what was asked before the wait, not after it.
    """

    release: threading.Event
    act: bool = False

    def __str__(self) -> str:
        return f"hang{' after acting' if self.act else ''}"


Step = Fault | Hang | None  # None: no fault this time
Chooser = Callable[[Request], Step]


class RecordingFederation(Record):
    """A federation with the real one's quirks on a loopback port of this process.

    ``requests``, ``transitions`` and the invariants are Record's. ``clock_offset`` (seconds) moves its clock
    and with it the Date header. ``stop`` and ``start`` play an outage: port, state and record stay.
    """

    def __init__(
        self,
        *,
        like_real: bool = True,
        analytics: Literal["refuse", "accept"] = "refuse",
        db: str = ":memory:",
        admin_key: str = DEFAULT_ADMIN_KEY,
        token_ttl: float = DEFAULT_TOKEN_TTL,
        port: int = 0,
    ) -> None:
        self.clock_offset = 0.0
        store = _WatchedStore(db, clock=self.now)
        super().__init__(store=store, analytics_refused=analytics == "refuse")
        store.watch = self.transitions.append
        self.admin_key = admin_key
        self._scripts: dict[str, collections.deque[Step] | Chooser] = {}
        self._always: dict[str, Step] = {}
        self._stopping = threading.Event()
        self._federation = make_app(
            store,
            like_real=like_real,
            admin_key=admin_key,
            token_ttl=token_ttl,
            refuse_analytics=self.analytics_refused,
        )
        # With a look-ahead the server notices a neuron that hangs up while its answer is held back.
        self._server = ServedApp(self._answer, port=port, threads=32, channel_request_lookahead=1)

    # --- its life

    def now(self) -> float:
        """Its epoch seconds."""
        return time.time() + self.clock_offset

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def port(self) -> int:
        return self._server.port

    def start(self) -> None:
        self._stopping.clear()
        self._server.start()

    def stop(self) -> None:
        """Refuses connections from now on; requests that hang are let go."""
        self._stopping.set()
        self._server.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.store.close()

    # --- what a test does with it

    def issue(
        self, neuron_id: str, command_type: str, command_data: Any = None, priority: int = 5, **extra: Any
    ) -> str:
        """Issues a command, unchecked, and returns its id. ``extra``: commandId, timeoutAt, metadata."""
        data = {} if command_data is None else command_data
        command = {"commandType": command_type, "commandData": data, "priority": priority, **extra}
        command_id = str(self.store.issue(neuron_id, command)["commandId"])
        self.issued.append(command_id)
        return command_id

    def command(self, command_id: str) -> Row:
        """The command's row. Raises LookupError."""
        command = self.store.command(command_id)
        if command is None:
            raise LookupError(f"command {command_id} was never issued")
        return command

    def token(self, neuron_id: str, ttl: float = DEFAULT_TOKEN_TTL) -> str:
        """A token for this neuron, who counts as registered from now on. ``ttl`` below 0: an expired one."""
        registration = {"neuronId": neuron_id, "name": neuron_id, "type": "test", "capabilities": []}
        self.store.register(registration)
        return Tokens(self.store.secret, ttl, self.now).issue(registration)

    def script(self, kind: str, steps: Iterable[Step] | Chooser) -> None:
        """What becomes of the next requests of ``kind``: a step each, then none; or as the callable says."""
        self._known(kind)
        self._scripts[kind] = steps if callable(steps) else collections.deque(steps)

    def always(self, kind: str, step: Step) -> None:
        """What becomes of every request of ``kind`` (``*``: of all a neuron makes) without a script."""
        self._known(kind)
        self._always[kind] = step

    def clear(self) -> None:
        """Ends every script; requests that hang stay so until released."""
        self._scripts.clear()
        self._always.clear()

    @staticmethod
    def _known(kind: str) -> None:
        if kind not in (*KINDS, "other", "*"):
            raise ValueError(f"no kind {kind!r}; there are {', '.join(KINDS)}, other, and * for always()")

    # --- a request

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self.changed:
            seen = self._see(environ)
            step = self._next_step(seen)
            seen.fault = "" if step is None else str(step)
        status, headers, payload = self._serve(environ, seen, step)
        dated = [("Date", formatdate(self.now(), usegmt=True))]
        start_response(f"{status} {_reason(status)}", [*headers, *(dated if not _has_date(headers) else [])])
        with self.changed:
            seen.until = time.monotonic()
            seen.status = None if self._gone(environ) else status
            self.changed.notify_all()
        return [payload]

    def _see(self, environ: dict[str, Any]) -> Request:
        raw = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(raw)
        match = _PATHS.fullmatch(environ["PATH_INFO"])
        kind = (
            (match["single"] or match["pending"] or match["step"] or match["analytics"]) if match else "other"
        )
        try:
            body = read_body(raw) if raw else None
        except Refused:
            body = None
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").title(): value
            for name, value in environ.items()
            if name.startswith("HTTP_") or name in ("CONTENT_TYPE", "CONTENT_LENGTH")
        }
        seen = Request(
            number=len(self.requests) + 1,
            at=time.monotonic(),
            wall=self.now(),
            method=environ["REQUEST_METHOD"],
            path=environ["PATH_INFO"],
            kind=kind,
            command_id=match["id"] if match else None,
            neuron_id=_neuron_id(kind, headers, body),
            headers=headers,
            raw=raw,
            body=body,
        )
        self.requests.append(seen)
        return seen

    def _next_step(self, seen: Request) -> Step:
        script = self._scripts.get(seen.kind)
        if callable(script):
            return script(seen)
        if script:
            return script.popleft()
        everyone = self._always.get("*") if seen.kind != "other" else None
        return self._always.get(seen.kind, everyone)

    def _serve(
        self, environ: dict[str, Any], seen: Request, step: Step
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        if step is None:
            return self._act(environ, seen)
        own = self._act(environ, seen) if step.act else None
        if isinstance(step, Hang):
            self._hold(environ, step.release, None)
        elif step.delay:
            self._hold(environ, threading.Event(), step.delay)
        if isinstance(step, Fault) and step.status is not None:
            payload = step.payload()
            headers = {"Content-Type": step.content_type, "Content-Length": str(len(payload)), **step.headers}
            return step.status, list(headers.items()), payload
        if own is None and self._gone(environ):
            return 503, [], b""  # nobody waits any more: what was asked is not done behind their back
        return own or self._act(environ, seen)

    def _act(self, environ: dict[str, Any], seen: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """The federation's own answer."""
        told: list[Any] = []
        payload = b"".join(self._federation(environ, lambda *answer: told.extend(answer)))
        seen.served = int(told[0].split()[0])
        return seen.served, told[1], payload

    def _hold(self, environ: dict[str, Any], release: threading.Event, seconds: float | None) -> None:
        deadline = time.monotonic() + (seconds if seconds is not None else 3_600)
        while not release.wait(0.02) and not self._gone(environ) and time.monotonic() < deadline:
            pass

    def _gone(self, environ: dict[str, Any]) -> bool:
        return self._stopping.is_set() or bool(environ["waitress.client_disconnected"]())


class _WatchedStore(Store):
    """Tells of every accepted acknowledge and completion under its lock, so in their true order."""

    watch: Callable[[Transition], None]

    def acknowledge(self, command_id: str, *, in_any_state: bool) -> Row:
        with self.lock:
            old = self._existing_command(command_id)["status"]
            row = super().acknowledge(command_id, in_any_state=in_any_state)
            self.watch(Transition(time.monotonic(), command_id, old, row["status"]))
            return row

    def complete(self, command_id: str, completion: Mapping[str, Any], *, in_any_state: bool) -> Row:
        with self.lock:
            old = self._existing_command(command_id)["status"]
            row = super().complete(command_id, completion, in_any_state=in_any_state)
            self.watch(Transition(time.monotonic(), command_id, old, row["status"], completion))
            return row


def _neuron_id(kind: str, headers: Mapping[str, str], body: Any) -> str | None:
    if kind == "register":
        return body.get("neuronId") if isinstance(body, dict) else None
    try:
        claims = jwt.decode(headers.get("Authorization", "")[7:], options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return None
    return claims.get("neuronId")


def _has_date(headers: Iterable[tuple[str, str]]) -> bool:
    return any(name.lower() == "date" for name, _ in headers)


def _reason(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Scripted"
