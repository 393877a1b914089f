"""One HTTP call to the federation: a session per thread, a total deadline, bounded answers, typed errors.

`requests`' own timeouts bound single reads; a server that sends a byte a second outlives them for ever, in the
status line, the headers or the body. Here the socket itself knows the deadline of the call it serves: each read
and write gets the time that is left.
"""

from __future__ import annotations

import contextlib
import email.utils
import itertools
import json
import math
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from neuron import periodic
from neuron.errors import BadAnswer, Refused, Retryable, ServerFault, Throttled, Unauthorized, Unreachable

MAX_REQUEST_BYTES = 100_000  # the federation's own limit (body-parser's "100kb" is 102,400)
MAX_ANSWER_BYTES = 4 << 20
MAX_ANSWER_VALUES = 150_000  # 4 MB of "1.5," would become 50 MB of floats
MAX_DEPTH = 100
LONGEST_RETRY_AFTER = 3600.0
BASE_PATH = "/api/api-neurons"

# Texts as a whole, and what stands between values. A text without an end goes to the end, or this were quadratic.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,:]', re.DOTALL)

_call = threading.local()
_resolving: dict[tuple[int, str, int], Future[list[Any]]] = {}
_resolving_guard = threading.Lock()


def _time_left() -> float:
    left: float = _call.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the call's total deadline has passed")
    return left


class _DeadlineSocket(socket.socket):
    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_time_left())
        return super().recv_into(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self.settimeout(_time_left())
        super().sendall(*args, **kwargs)


class _DeadlineSSLSocket(ssl.SSLSocket):
    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(_time_left())
        return super().recv_into(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self.settimeout(_time_left())
        super().sendall(*args, **kwargs)


def _addresses(host: str, port: int) -> list[Any]:
    """`getaddrinfo` within the call's deadline, which it does not know itself.

    A name is asked for in a thread that is left to end by itself; calls that come meanwhile wait for the same one.
    Raises OSError and UnicodeError.
    """
    with contextlib.suppress(OSError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    key = (os.getpid(), host, port)
    with _resolving_guard:
        answer = _resolving.get(key)
        if answer is None:
            answer = _resolving[key] = Future()
            try:
                threading.Thread(target=_resolve, args=(key, answer), name="neuron-resolver", daemon=True).start()
            except RuntimeError as error:
                del _resolving[key]
                raise OSError(str(error)) from None
    return answer.result(_time_left())


def _resolve(key: tuple[int, str, int], answer: Future[list[Any]]) -> None:
    try:
        answer.set_result(socket.getaddrinfo(key[1], key[2], type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        answer.set_exception(error)
    finally:
        _resolving.pop(key, None)


def _connect(connection: HTTPConnection) -> socket.socket:
    """urllib3's `_new_conn`, with one deadline over all addresses of the name."""
    host = connection._dns_host.strip("[]")
    try:
        addresses = _addresses(host, connection.port or 0)
    except (OSError, UnicodeError) as error:
        raise urllib3.exceptions.NameResolutionError(host, connection, socket.gaierror(str(error))) from error
    failure: OSError = OSError("the name has no address")
    for position, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = _DeadlineSocket(family, kind, protocol)
        try:
            # A silent first address (a dead IPv6 route) must leave time for the others.
            sock.settimeout(_time_left() / (len(addresses) - position))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise urllib3.exceptions.NewConnectionError(connection, str(failure)) from failure


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _connect(self)


class _TLSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connect(self)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        context = urllib3.util.create_urllib3_context()
        context.sslsocket_class = _DeadlineSSLSocket
        super().init_poolmanager(*args, ssl_context=context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager


class _Bearer(requests.auth.AuthBase):
    """Sets exactly this credential. A session without an `auth` would take one from ~/.netrc instead."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class FederationClock:
    """UTC epoch seconds as the federation counts them, learnt from its `Date` headers."""

    def __init__(self) -> None:
        self.offset = 0.0

    def now(self) -> float:
        return time.time() + self.offset

    def learn(self, date_header: str | None) -> None:
        try:
            there = email.utils.parsedate_to_datetime(date_header or "").timestamp()
        except (ValueError, TypeError, OverflowError):
            return
        # The header has whole seconds, cut: half of one is its middle. Less than two is noise.
        offset = there + 0.5 - time.time()
        if 1.5e9 < there < 5e9:
            self.offset = offset if abs(offset) > 2 else 0.0


@dataclass(frozen=True)
class Answer:
    """A 2xx answer: HTTP status and the envelope's `data`."""

    status: int
    data: Any


class Transport:
    """Calls below one federation's base path. Threads may share it; each gets a session of its own."""

    def __init__(self, federation_url: str, *, ca: str = "", cert: str = "", key: str = "", user_agent: str) -> None:
        self.origin = federation_url
        self._ca = ca
        self._cert = (cert, key) if cert else None
        self._user_agent = user_agent
        self._local = threading.local()
        self.clock = FederationClock()

    def _session(self) -> requests.Session:
        # A forked child must not speak on its parent's sockets.
        if getattr(self._local, "pid", None) != os.getpid():
            session = requests.Session()
            adapter = _Adapter(pool_connections=1, pool_maxsize=1)
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            session.headers.update({"User-Agent": self._user_agent, "Accept": "application/json"})
            session.headers["Accept-Encoding"] = "identity"
            self._local.session, self._local.pid = session, os.getpid()
        return cast(requests.Session, self._local.session)

    def close(self) -> None:
        """Close this thread's connection."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.session.close()
            del self._local.pid

    def call(
        self, endpoint: str, method: str, path: str, *, body: Any = None, token: str = "", timeout: float
    ) -> Answer:
        """One attempt, over by `timeout` seconds whatever the server does.

        `endpoint` is the protocol's name of the call, for errors. Raises the subclasses of FederationError.
        """
        payload = None if body is None else encode(body)
        if payload is not None and len(payload) > MAX_REQUEST_BYTES:
            raise Refused(endpoint, f"body of {len(payload)} bytes is over {MAX_REQUEST_BYTES}; not sent", status=413)
        _call.deadline = time.monotonic() + timeout
        periodic.allow(timeout)
        session = self._session()
        try:
            response = session.request(
                method,
                self.origin + BASE_PATH + path,
                data=payload,
                headers={"Content-Type": "application/json"} if payload is not None else {},
                auth=_Bearer(token),
                allow_redirects=False,
                stream=True,
                timeout=timeout,
                verify=self._ca or True,
                cert=self._cert,
            )
            with response:
                content = _read(endpoint, response)
        except BadAnswer:
            self.close()
            raise
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            # ValueError: http.client and urllib3 let some malformed answers through as one.
            self.close()
            raise Unreachable(endpoint, _cause(error)) from None
        return self._judge(endpoint, response, content)

    def _judge(self, endpoint: str, response: requests.Response, content: bytes) -> Answer:
        status = response.status_code
        retry_after = seconds_of_retry_after(response.headers.get("Retry-After"), self.clock.now())
        if 300 <= status < 400:
            raise BadAnswer(
                endpoint, f"{status} redirects elsewhere; the token goes to {self.origin} alone", status=status
            )
        if status >= 400:
            reason = f"{status} {_error_text(content)}"
            if status == 401:
                raise Unauthorized(endpoint, reason, status=status)
            if status == 429 or (status == 503 and retry_after is not None):
                raise Throttled(endpoint, reason, status=status, retry_after=retry_after)
            if status >= 500 or status == 408:
                raise ServerFault(endpoint, reason, status=status, retry_after=retry_after)
            if status != 413 and content.lstrip()[:1] != b"{":
                # A proxy's page, as during a deployment: not the federation's own word, so not final.
                raise BadAnswer(endpoint, reason, status=status)
            raise Refused(endpoint, reason, status=status)
        envelope = decode(endpoint, content, status)
        if not isinstance(envelope, dict) or envelope.get("success") is not True:
            raise BadAnswer(endpoint, f"{status} without the envelope {{success, data}}", status=status)
        self.clock.learn(response.headers.get("Date"))
        return Answer(status, envelope.get("data"))


def retry_waits(base: float = 1.0, cap: float = 60.0) -> Generator[float, Retryable, None]:
    """A wait generator for `backoff`: capped full jitter, Retry-After as a floor, ended by the stop event.

    `backoff` sleeps deaf, so the wait happens here, on the event, and what is yielded is zero. The exception
    carries the event and the number of tries its caller wants (None: for ever).
    """
    error = yield 0.0
    for attempt in itertools.count():
        if error.tries is not None and attempt + 1 >= error.tries:
            return
        wait = jittered(attempt, error.retry_after, base=base, cap=cap)
        periodic.allow(wait)
        if error.stopping is not None and error.stopping.wait(wait):
            return
        error = yield 0.0


def jittered(attempt: int, floor: float | None, *, base: float = 1.0, cap: float = 60.0) -> float:
    """Seconds to wait after failure number `attempt` (from 0): full jitter above the floor.

    Source: Brooker, "Exponential Backoff and Jitter", 2015.
    """
    return (floor or 0.0) + random.uniform(0, min(cap, base * 2 ** min(attempt, 30)))


def seconds_of_retry_after(value: str | None, now: float) -> float | None:
    """Retry-After (seconds or an HTTP date) as seconds from `now`, 0 to an hour; None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(int(value))
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    except OverflowError:
        seconds = LONGEST_RETRY_AFTER
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def encode(body: Any) -> bytes:
    """JSON in ASCII. Raises ValueError on NaN and Infinity, TypeError on what JSON does not know."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond a double")
    return number


def decode(endpoint: str, content: bytes, status: int | None = None) -> Any:
    """Parse an answer's JSON. Raises BadAnswer on whatever is not plain, finite, bounded JSON."""
    if _crowded(content):
        raise BadAnswer(endpoint, f"more than {MAX_ANSWER_VALUES} values in one answer", status=status)
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise BadAnswer(endpoint, "JSON nested too deep", status=status) from None
    except ValueError as error:
        kind = "HTML" if content.lstrip()[:1] == b"<" else "an empty body" if not content.strip() else "no JSON"
        raise BadAnswer(endpoint, f"{status} with {kind}: {str(error)[:100]}", status=status) from None


def deeper_than(value: Any, levels: int) -> bool:
    """Whether JSON is nested so deep that what was read from a shallow stack might not be written from a deeper one."""
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    return levels < 0 or any(deeper_than(entry, levels - 1) for entry in inner)


def _crowded(content: bytes) -> bool:
    """Whether it holds more values than its size lets one expect, before any of them is made."""
    if sum(map(content.count, (b"[", b"{", b",", b":"))) <= MAX_ANSWER_VALUES:
        return False
    between = (token for token in _TOKENS.finditer(content) if token[0][:1] != b'"')
    return next(itertools.islice(between, MAX_ANSWER_VALUES, None), None) is not None


def _read(endpoint: str, response: requests.Response) -> bytes:
    chunks = []
    size = 0
    while chunk := response.raw.read(65536, decode_content=True):
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise BadAnswer(endpoint, f"answer over {MAX_ANSWER_BYTES} bytes", status=response.status_code)
        chunks.append(chunk)
    return b"".join(chunks)


def _error_text(content: bytes) -> str:
    """The federation's own words in an error answer, at most 300 characters; '' where it has none."""
    try:
        answer = decode("", content)
    except BadAnswer:
        return "(HTML)" if content.lstrip()[:1] == b"<" else ""
    if not isinstance(answer, dict) or deeper_than(answer, MAX_DEPTH):
        return ""
    text = str(answer.get("error") or answer.get("message") or "")
    if details := answer.get("details"):
        text = f"{text} {json.dumps(details)}"
    return text[:300]


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests/urllib3 exception, without object addresses."""
    seen = error
    for _ in range(10):
        inner = getattr(seen, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in seen.args if isinstance(arg, BaseException)), None)
        if inner is None:
            break
        seen = inner
    text = str(seen).rpartition(": ")[2] if " object at 0x" in str(seen) else str(seen)
    if isinstance(seen, urllib3.exceptions.NewConnectionError):
        # To urllib3 a refused connection is a timeout too; its text begins with the connection's repr.
        text = text.partition("): ")[2] or text
    elif isinstance(seen, (TimeoutError, urllib3.exceptions.TimeoutError)):
        text = "no whole answer within the deadline"
    return (text or type(seen).__name__)[:300]


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL: what a token belongs to."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{parts.hostname}:{port}"
