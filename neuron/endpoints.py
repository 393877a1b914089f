"""The neuron's own HTTP surface: /health, /status, /data/process and what adopters add. Bottle on waitress."""

from __future__ import annotations

import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import bottle
import jwt
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore

from neuron.config import NeuronConfig
from neuron.data_profile import BadData, UnsupportedType, parse_records
from neuron.errors import DefinitionError, Rejected
from neuron.logs import NeuronLogger
from neuron.tasks import place_of
from neuron.telemetry import RequestStatistics

# Two threads are left for /health and for saying 503 while all the others work.
THREADS = 8
WORKING = THREADS - 2
CONNECTIONS = 2000
IDLE_SECONDS = 10
REQUEST_SECONDS = 60  # for a whole request to arrive
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

Reply = tuple[int, dict[str, Any]]


class Served(Protocol):
    """What the surface shows; APINeuron is one."""

    config: NeuronConfig
    statistics: RequestStatistics
    logger: NeuronLogger

    @property
    def neuron_id(self) -> str: ...

    def health(self) -> dict[str, Any]: ...
    def live(self) -> tuple[bool, list[str]]: ...
    def ready(self) -> tuple[bool, list[str]]: ...
    def status(self) -> dict[str, Any]: ...
    def process_data(self, data: Any) -> Any: ...
    def request_counted(self) -> None: ...


@dataclass(frozen=True)
class Route:
    """An adopter's endpoint: `function(data)` with the parsed body, or the query of a GET or DELETE, as data."""

    method: str
    path: str
    function: Callable[[Any], Any]


BUILT_IN = {"/health", "/health/live", "/health/ready", "/status", "/data/process"}


def check_route(method: str, path: str, function: Callable[[Any], Any], known: Iterable[Route]) -> Route:
    """Raises DefinitionError, naming the line, for an endpoint that cannot be served."""
    place = place_of(function)
    method = method.upper() if isinstance(method, str) else method
    if method not in METHODS:
        raise DefinitionError(f"{place}: endpoint {path!r}: method {method!r} is none of {', '.join(METHODS)}")
    if not isinstance(path, str) or not path.startswith("/") or any(c in path for c in "<>?# \n") or len(path) > 200:
        raise DefinitionError(f"{place}: endpoint path {path!r} is not a plain path such as /score")
    if path in BUILT_IN:
        raise DefinitionError(f"{place}: endpoint {path} is built in; give yours another path")
    if any((route.method, route.path) == (method, path) for route in known):
        raise DefinitionError(f"{place}: endpoint {method} {path} is registered already")
    if not callable(function):
        raise DefinitionError(f"endpoint {method} {path}: {function!r} is not a function")
    return Route(method, path, function)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Endpoints:
    """Serves one neuron on its own threads, all of them daemons."""

    def __init__(self, neuron: Served, routes: list[Route]) -> None:
        self._neuron = neuron
        self._working = threading.BoundedSemaphore(WORKING)
        self._closing = False
        self._thread: threading.Thread | None = None
        self._server: Any = None
        self._sockets: dict[int, Any] = {}
        config = neuron.config
        self.open_to_all = not config.api_secret
        self.health_only = self.open_to_all and not is_loopback(config.host)
        self._app = bottle.Bottle(catchall=True)
        self._app.default_error_handler = self._error_page
        self._get("/health", self._health)
        self._get("/health/live", lambda: _verdict(*neuron.live()))
        self._get("/health/ready", lambda: _verdict(*neuron.ready()))
        self._get("/status", self._guarded(lambda: (200, neuron.status())))
        self._app.route("/data/process", "POST", self._counted(self._guarded(self._process)))
        for route in routes:
            self.add(route)

    @property
    def port(self) -> int:
        return int(self._server.effective_port) if self._server is not None else self._neuron.config.port

    def add(self, route: Route) -> None:
        def reply() -> Reply:
            if route.method in ("GET", "DELETE"):
                return self._work(route.function, dict(bottle.request.query.decode()))
            content = self._content()
            records = self._records(content)
            # An adopter's endpoint gets the object that was posted, not a list with it.
            posted_object = bottle.request.content_type.startswith("application/json") and content.lstrip()[:1] == b"{"
            return self._work(route.function, records[0] if posted_object else records)

        self._app.route(route.path, route.method, self._counted(self._guarded(reply)))

    def _get(self, path: str, reply: Callable[[], Reply]) -> None:
        def answer() -> str:
            try:
                status, body = reply()
                return _write(status, json.dumps(body, allow_nan=False), {})
            except _Answer as refusal:
                return _write(refusal.status, json.dumps(refusal.body), refusal.headers)
            except Exception:
                self._neuron.logger.exception("GET %s failed", path)
                return _write(500, json.dumps({"success": False, "error": "internal error; see the neuron's log"}), {})

        self._app.route(path, "GET", answer)

    # -- start and stop ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and answer. Raises OSError where the address cannot be had."""
        config = self._neuron.config
        neuron = self._neuron

        class RefusedRequest(waitress.task.ErrorTask):
            """What waitress refuses before the application: counted and in JSON like every other answer."""

            def execute(self) -> None:
                neuron.statistics.record(True, 0.0)
                error = self.request.error
                body = json.dumps({"error": f"{error.reason}: {error.body}"}).encode()
                self.status = f"{error.code} {error.reason}"
                self.response_headers.append(("Content-Type", "application/json"))
                self.set_close_on_finish()
                self.content_length = len(body)
                self.write(body)

        class Parser(waitress.parser.HTTPRequestParser):
            def __init__(self, adj: Any) -> None:
                super().__init__(adj)
                self.begun = time.monotonic()

            def parse_header(self, header_plus: bytes) -> None:
                super().parse_header(header_plus)
                if self.chunked and "CONTENT_LENGTH" in self.headers:
                    # A proxy in front may go by the other one, and see one request where two are (RFC 9112, 6.3).
                    raise waitress.parser.ParsingError("Content-Length and Transfer-Encoding exclude each other")

        class Channel(waitress.channel.HTTPChannel):
            error_task_class = RefusedRequest
            parser_class = Parser

            def received(self, data: bytes) -> Any:
                # waitress times out silence alone; a byte a second would hold a connection for ever.
                if self.request is not None and time.monotonic() - self.request.begun > REQUEST_SECONDS:
                    self.will_close = True
                return super().received(data)

        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        workers = waitress.task.ThreadedTaskDispatcher()
        workers.set_thread_count(THREADS)
        try:
            self._server = waitress.server.create_server(
                self._app,
                map=self._sockets,
                _dispatcher=workers,
                host=config.host,
                port=config.port,
                # As shipped: 100 connections, after which nobody is answered, and 120 s for each silent one.
                connection_limit=CONNECTIONS,
                asyncore_use_poll=True,
                channel_timeout=IDLE_SECONDS,
                cleanup_interval=IDLE_SECONDS // 2,
                backlog=1024,
                max_request_header_size=16_384,
                max_request_body_size=config.max_body_bytes,
                ident=None,
            )
        except OSError:
            # The host goes on without endpoints, and must not keep their threads.
            workers.shutdown(timeout=0.5)
            waitress.wasyncore.close_all(self._sockets)
            raise
        for listener in _listeners(self._server):
            listener.channel_class = Channel
        self._thread = threading.Thread(target=self._serve, name="neuron-endpoints", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        listeners = _listeners(self._server)
        while not self._closing:
            # waitress would wake every second; only open connections want their time-out looked after.
            busy = any(listener.active_channels for listener in listeners)
            try:
                wait = IDLE_SECONDS / 2 if busy else 3600
                waitress.wasyncore.loop(timeout=wait, map=self._sockets, use_poll=True, count=1)
            except Exception:
                if not self._closing:
                    self._neuron.logger.exception("the endpoints stumbled; they go on")
        self._server.task_dispatcher.shutdown(timeout=0.5)
        waitress.wasyncore.close_all(self._sockets)

    def after_fork_in_child(self) -> None:
        """Let go of the parent's sockets: held here, its callers would wait for an end that does not come."""
        waitress.wasyncore.close_all(self._sockets)

    def apply(self, config: NeuronConfig) -> None:
        """Take over the settings that may change while running."""
        if self._server is not None:
            for listener in _listeners(self._server):
                listener.adj.max_request_body_size = config.max_body_bytes

    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self, deadline: float) -> list[str]:
        """Stop listening and end. Returns the names of threads that did not, by the monotonic deadline."""
        if self._thread is None:
            return []
        self._closing = True
        try:
            _listeners(self._server)[0].pull_trigger()
        except OSError as error:
            self._neuron.logger.debug("the endpoints had ended already: %s", error)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return [self._thread.name] if self._thread.is_alive() else []

    # -- answers -------------------------------------------------------------------------------------------------

    def _health(self) -> Reply:
        report = self._neuron.health()
        return (503 if report["status"] == "unhealthy" else 200), report

    def _process(self) -> Reply:
        return self._work(self._neuron.process_data, self._records(self._content()))

    def _content(self) -> bytes:
        request = bottle.request
        content: bytes = request.environ["wsgi.input"].read(max(0, request.content_length))
        if len(content) > self._neuron.config.max_body_bytes:
            raise _Answer(413, f"the body is over {self._neuron.config.max_body_bytes} bytes")
        return content

    def _records(self, content: bytes) -> list[Any]:
        records = parse_records(content, bottle.request.content_type or "")
        self._neuron.statistics.add_data_processed(len(content))
        return records

    def _work(self, function: Callable[[Any], Any], data: Any) -> Reply:
        if not self._working.acquire(blocking=False):
            raise _Answer(503, "all workers are busy; try again", {"Retry-After": "1"})
        try:
            result = function(data)
        finally:
            self._working.release()
        return 200, {"success": True, "data": result}

    def _counted(self, reply: Callable[[], Reply]) -> Callable[[], str]:
        def answer() -> str:
            started = time.perf_counter()
            status, body, headers = 500, {"success": False, "error": "internal error"}, {}
            try:
                status, body = reply()
                text = json.dumps(body, allow_nan=False)
            except _Answer as refusal:
                status, body, headers = refusal.status, refusal.body, refusal.headers
            except UnsupportedType as error:
                status, body = 415, {"success": False, "error": str(error)}
            except (BadData, Rejected) as error:
                status, body = 400, {"success": False, "error": str(error)}
            except BaseException as error:
                # SystemExit too: it would end the server's thread, and leave the caller without an answer.
                status = 500
                self._neuron.logger.exception("%s %s failed", bottle.request.method, bottle.request.path)
                # The type helps the caller; the message and traceback may hold what is not theirs to see.
                body = {"success": False, "error": f"processing failed ({type(error).__name__}); see the neuron's log"}
            if status != 200:
                text = json.dumps(body)
            # A caller's mistake is a request that was answered well; what failed is what we failed at.
            self._neuron.statistics.record(status < 500, (time.perf_counter() - started) * 1000)
            self._neuron.request_counted()
            return _write(status, text, headers)

        return answer

    def _guarded(self, reply: Callable[[], Reply]) -> Callable[[], Any]:
        """Wants the caller's JWT when `api_secret` is set; without one, only loopback is served."""

        def guarded() -> Any:
            refusal = self._refusal()
            if refusal is not None:
                raise refusal
            return reply()

        return guarded

    def _refusal(self) -> _Answer | None:
        if self.health_only:
            return _Answer(403, "served beyond loopback only with api_secret set; see the neuron's documentation")
        if self.open_to_all:
            return None
        challenge = {"WWW-Authenticate": "Bearer"}
        scheme, _, token = bottle.request.get_header("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return _Answer(401, "this endpoint wants Authorization: Bearer <JWT>", challenge)
        try:
            jwt.decode(
                token.strip(), self._neuron.config.api_secret, algorithms=["HS256"], audience=self._neuron.neuron_id,
                options={"require": ["exp", "aud"]},
            )
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            return _Answer(401, f"the token is not accepted: {error}", challenge)
        return None

    def _error_page(self, error: Any) -> str:
        """What bottle refuses by itself: unknown paths and methods, a path that is no text."""
        if error.status_code >= 500:
            self._neuron.logger.error("%s %s failed: %r", bottle.request.method, bottle.request.path, error.exception)
        error.set_header("Content-Type", "application/json")
        return json.dumps({"success": False, "error": error.status_line})


class _Answer(Exception):
    """An answer other than 200, from anywhere below."""

    def __init__(self, status: int, error: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"success": False, "error": error}
        self.headers = headers or {}


def _verdict(good: bool, reasons: list[str]) -> Reply:
    return (200 if good else 503), {"status": "ok" if good else "not ok", "reasons": reasons}


def _write(status: int, text: str, headers: dict[str, str]) -> str:
    response = bottle.response
    response.status = status
    response.content_type = "application/json"
    for name, value in headers.items():
        response.set_header(name, value)
    return text


def _listeners(server: Any) -> list[Any]:
    """The listening sockets of a waitress server: a name such as localhost may stand for several."""
    first = waitress.server.BaseWSGIServer
    if isinstance(server, first):
        return [server]
    return [entry for entry in server.map.values() if isinstance(entry, first)]
