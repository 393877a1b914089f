"""The federation over HTTP: its WSGI application, and a server that runs it in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import bottle
import waitress.server

from local_federation.admin_side import AdminSide
from local_federation.neuron_side import Handler, NeuronSide
from local_federation.store import DAY, Store
from local_federation.tokens import Tokens
from local_federation.wire import BASE_PATH, MAX_BODY, Call, Refused, dumps, read_body

DEFAULT_ADMIN_KEY = "admin-secret-key"
DEFAULT_TOKEN_TTL = 365 * DAY  # seconds

WsgiApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


def make_app(
    store: Store,
    *,
    like_real: bool = False,
    admin_key: str = DEFAULT_ADMIN_KEY,
    token_ttl: float = DEFAULT_TOKEN_TTL,
    refuse_analytics: bool | None = None,
) -> WsgiApp:
    """The WSGI application over ``store``.

    ``like_real`` errs where the real federation errs. It refuses every analytics report, unless
    ``refuse_analytics`` says otherwise.
    """
    tokens = Tokens(store.secret, token_ttl, store.clock)
    neuron_side = NeuronSide(
        store,
        tokens,
        like_real=like_real,
        refuse_analytics=like_real if refuse_analytics is None else refuse_analytics,
    )
    # Bottle prefers a fixed path over `/<neuron_id>`, whatever the order.
    app = bottle.Bottle()
    for method, path, handler in (*neuron_side.routes(), *AdminSide(store, admin_key).routes()):
        app.route(BASE_PATH + path, method, _over_http(handler))
    app.default_error_handler = _unrouted
    wsgi: WsgiApp = app
    return wsgi


def _over_http(handler: Handler) -> Callable[..., Any]:
    def respond(**parts: str) -> Any:
        try:
            # Headers straight from the environ: bottle's own reader fails on bytes that are not UTF-8.
            environ = bottle.request.environ
            call = Call(
                body=read_body(bottle.request.body.read(MAX_BODY + 1)),
                authorization=environ.get("HTTP_AUTHORIZATION", ""),
                admin_key=environ.get("HTTP_X_ADMIN_KEY", ""),
                query=bottle.request.query,
            )
            answer = handler(call, **parts)
        except Refused as refused:
            return _json(refused.status, refused.answer())
        return _json(answer.status, {"success": True, "data": answer.data})

    return respond


def _unrouted(error: Any) -> str:
    bottle.response.content_type = "application/json"
    if error.status_code == 404:
        return dumps({"success": False, "error": f"No such path; the protocol is under {BASE_PATH}"})
    return dumps({"success": False, "error": str(error.body)})


def _json(status: int, body: Any) -> Any:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    return bottle.HTTPResponse(dumps(body).encode(), status, headers)


class ServedApp:
    """A WSGI application on waitress in a daemon thread of its own. Can be stopped and started again."""

    def __init__(
        self, app: WsgiApp, *, host: str = "127.0.0.1", port: int = 0, threads: int = 8, **settings: Any
    ) -> None:
        """``port`` 0 takes any free one, at the first start, and keeps it. ``settings`` are waitress's."""
        self._app = app
        self._settings: dict[str, Any] = {"threads": threads, **settings}
        self._loop: threading.Thread | None = None
        self._server: Any = None
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Listens. Raises OSError where the address is taken or not this machine's."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, self.port), family=family)
        self.port = listener.getsockname()[1]
        self._server = waitress.server.create_server(
            self._app,
            sockets=[listener],
            asyncore_use_poll=True,
            connection_limit=1_000,
            max_request_body_size=10 * MAX_BODY,  # above ours, so that ours answers
            **self._settings,
        )
        self._loop = threading.Thread(target=self._server.run, name="federation", daemon=True)
        self._loop.start()

    def stop(self) -> None:
        """Closes the listener and every connection, and joins. Does nothing where nothing listens."""
        if self._loop is None:
            return
        server = self._server
        server.trigger.pull_trigger(lambda: _hang_up(server))
        server.task_dispatcher.shutdown()
        server.trigger.pull_trigger(server._map.clear)  # the loop ends when it has nothing to watch
        self._loop.join(timeout=5)
        # Last: whoever still wrote to this pipe would write to whatever got its descriptor next.
        server.trigger.close()
        self._loop = self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _hang_up(server: Any) -> None:
    server.accepting = False
    for channel in list(server.active_channels.values()):
        channel.handle_close()
    server.del_channel()
    server.socket.close()


class LocalFederation(ServedApp):
    """A federation of this process: ``with LocalFederation() as federation: … federation.url``.

    ``stop`` and ``start`` play an outage: the port and the state stay. ``close``, or the end of the ``with``
    block, closes the database as well. Raises sqlite3.Error where the database cannot be opened.
    """

    def __init__(
        self,
        db: str = ":memory:",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        admin_key: str = DEFAULT_ADMIN_KEY,
        like_real: bool = False,
        token_ttl: float = DEFAULT_TOKEN_TTL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = Store(db, clock=clock)
        self.admin_key = admin_key
        app = make_app(self.store, like_real=like_real, admin_key=admin_key, token_ttl=token_ttl)
        super().__init__(app, host=host, port=port)

    def close(self) -> None:
        self.stop()
        self.store.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
