"""Tasks on a Dask cluster, for `executor: dask://host:8786`. What works how there: docs/executors.md."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any
from urllib.parse import urlsplit

from neuron.errors import Cancelled, ConfigError, EngineUnavailable, WorkerLost
from neuron.executors import Call, Channel, Handle, Hold, execute, forwarding_logger, portable, relay
from neuron.tasks import Run

logger = logging.getLogger("neuron")

PORT = 8786
CONNECT_SECONDS = 3.0
CALL_SECONDS = 5.0
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 2.0
LOOK_SECONDS = 0.2  # between two questions of a worker whether its task was cancelled
TELL_SECONDS = 0.1  # between two tellings of progress


class DaskEngine:
    """Runs tasks through `Client.get_executor(pure=False)` of a scheduler that need not be there yet.

    A thread of its own holds the connection, from the first `ready()` to the loss of it or to `close()`.
    Every run begins on one worker at most, whatever the scheduler repeats: see `run_on_worker`.
    Raises ConfigError for a URL that cannot be used, or used safely.
    """

    importable = True

    def __init__(self, url: str) -> None:
        self._distributed = _imported()
        self.address, self._security = _address(url, self._distributed)
        self._topic = f"neuron-{uuid.uuid4().hex}"
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._hold = Hold()
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._runs: dict[str, tuple[Future[Any], Run, logging.LoggerAdapter[Any]]] = {}

    def ready(self) -> None:
        with self._guard:
            if self._client is not None:
                if self._client.status == "running":
                    return
                self._hold.set("the connection was lost", 0)
                self._disconnect()
            reason = self._hold.reason or "connecting"
            waiting = self._closed or self._hold.lasts() or (self._thread is not None and self._thread.is_alive())
            if not waiting:
                self._thread = threading.Thread(target=self._stay_connected, name="neuron-dask", daemon=True)
                self._thread.start()
        raise EngineUnavailable(f"the dask scheduler {self.address} cannot be used: {reason}")

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle:
        with self._guard:
            client, loop = self._client, self._loop
        if client is None or loop is None:
            raise EngineUnavailable(f"the dask scheduler {self.address} is not connected")
        key = f"neuron-{call.command_id}-{uuid.uuid4().hex}"
        future: Future[Any] = Future()
        self._runs[key] = future, run, logger
        try:
            asyncio.run_coroutine_threadsafe(self._submit(client, call, key), loop).result(CALL_SECONDS)
        except (OSError, TimeoutError, RuntimeError, CancelledError) as error:
            # It may answer yet; what was cancelled before it was submitted never will be.
            if future.cancel():
                self._runs.pop(key, None)
                raise EngineUnavailable(f"the dask scheduler {self.address} takes no task: {error!r}") from error
        return Handle(future, tell=lambda: self._tell(client, key))

    def close(self) -> None:
        """Leave the cluster, which goes on without us."""
        with self._guard:
            self._closed = True
            self._disconnect()
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    # -- in the thread of the connection -------------------------------------------------------------------------

    def _stay_connected(self) -> None:
        try:
            asyncio.run(self._connection())
        except asyncio.CancelledError:
            logger.debug("left the dask scheduler %s", self.address)
        except Exception as error:
            # Refused, timed out, a certificate: whatever it is, it is told, and tried again when a task wants it.
            self._hold.set(f"{error}", RETRY_SECONDS)

    async def _connection(self) -> None:
        loop = asyncio.get_running_loop()
        with self._guard:
            if self._closed:
                return
            self._loop, self._task = loop, asyncio.current_task()
        client = self._distributed.Client(
            self.address, asynchronous=True, timeout=CONNECT_SECONDS, security=self._security,
            set_as_default=False, name="neuron",
        )
        try:
            await client
            with self._guard:
                self._client = client
                self._hold.set("", 0)
            await loop.create_future()  # until `_disconnect` cancels this
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                await client.close(timeout=CLOSE_SECONDS / 2)
            for future, *_ in list(self._runs.values()):
                if not future.cancel() and not future.done():
                    future.set_exception(WorkerLost(f"the connection to the dask scheduler {self.address} was lost"))

    def _disconnect(self) -> None:
        """Let the connection's thread end. Called with the guard held."""
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended already
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._client = self._loop = self._task = None

    async def _submit(self, client: Any, call: Call, key: str) -> None:
        future, run, _ = self._runs[key]
        # The one token that entitles to begin this run: a worker takes it from the scheduler, atomically.
        tokens = await self._distributed.Queue(key, client=client)
        await tokens.put(1)
        # Anew each time: a scheduler that was restarted in between does not know.
        client.subscribe_topic(self._topic, self._heard)

        def ended(_: Future[Any]) -> None:
            self._runs.pop(key, None)
            tokens.close()
            if run.cancelled.is_set() and client.status == "running":
                client.loop.add_callback(self._distributed.Event(key, client=client).clear)

        future.add_done_callback(ended)
        if not future.set_running_or_notify_cancel():
            return
        try:
            source = client.get_executor(pure=False).submit(run_on_worker, call, key, self._topic)
        except Exception as error:
            # What cannot be pickled shows here; it is this task's failure.
            future.set_exception(error)
        else:
            relay(source, future, (self._distributed.scheduler.KilledWorker,))

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        """Progress and log lines of all runs; here they find theirs."""
        message = event[1]
        entry = self._runs.get(message["run"])
        if entry is None:
            return
        _, run, logger = entry
        if "level" in message:
            logger.log(message["level"], message["text"])
        else:
            run.report(message["fraction"], message["text"])

    def _tell(self, client: Any, key: str) -> None:
        """Pass a cancellation on; without a connection there is nobody left to tell."""

        async def set_event() -> None:
            await self._distributed.Event(key, client=client).set()

        loop = self._loop
        if loop is not None and client is self._client:
            asyncio.run_coroutine_threadsafe(set_event(), loop)


# -- on a worker -----------------------------------------------------------------------------------------------------


def run_on_worker(call: Call, key: str, topic: str) -> Any:
    """Run the task, if nobody has begun to.

    A scheduler repeats what it lost: a task whose worker died, or whose finished result died with its worker. It
    cannot know whether that is safe; the neuron does, so here it becomes WorkerLost and the neuron decides.
    """
    distributed = _imported()
    client = distributed.get_client()
    tokens = distributed.Queue(key, client=client)
    try:
        if not tokens.get(batch=True):
            raise WorkerLost("the worker that had begun this task is gone")
    finally:
        tokens.close()
    cancelled = _RemoteEvent(distributed.Event(key, client=client))
    if cancelled.is_set():
        raise Cancelled(f"task {call.task} was cancelled before it began")
    worker = distributed.get_worker()
    told = float("-inf")

    def report(fraction: float, text: str) -> None:
        nonlocal told
        if fraction >= 1 or time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            worker.log_event(topic, {"run": key, "fraction": fraction, "text": text})

    task_logger = forwarding_logger(
        lambda level, text: worker.log_event(topic, {"run": key, "level": level, "text": text})
    )
    try:
        return portable(execute(call, Channel(cancelled, report, task_logger)))
    except (SystemExit, KeyboardInterrupt) as error:
        # Either would end the worker, and others' tasks with it.
        raise RuntimeError(f"the task ended with {error!r}") from error


class _RemoteEvent:
    """An event at the scheduler, asked for seldom enough for the top of a loop."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self._is_set = False
        self._asked = float("-inf")

    def is_set(self) -> bool:
        if not self._is_set and time.monotonic() - self._asked >= LOOK_SECONDS:
            self._asked = time.monotonic()
            self._is_set = self._answer(self._event.is_set)
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        self._is_set = self._is_set or self._answer(lambda: self._event.wait(timeout))
        return self._is_set

    def _answer(self, ask: Callable[[], Any]) -> bool:
        try:
            return bool(ask())
        except OSError:
            # Without the scheduler nobody will hear of the result.
            return True


# -- settings --------------------------------------------------------------------------------------------------------


def _imported() -> Any:
    """The package `distributed`, kept from logging for itself if the host does not use it."""
    try:
        if "distributed" not in sys.modules:
            import dask

            names = ("distributed", "distributed.client", "tornado.application", "bokeh")
            with dask.config.set(logging=dict.fromkeys(names, logging.CRITICAL + 1)):
                import distributed
        import distributed
    except ImportError as error:
        raise ConfigError([
            f"executor: dask://… wants the package distributed ({error}): pip install -r requirements-dask.txt"
        ]) from error
    return distributed


def _address(url: str, distributed: Any) -> tuple[str, Any]:
    """The scheduler's address and the Security to go there with."""
    # Here, since a worker, which imports this module too, serves no endpoints.
    from neuron.endpoints import is_loopback

    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or PORT
    except ValueError as error:
        raise ConfigError([f"executor: {url!r} is not a URL: {error}"]) from None
    if not host or parts.path.strip("/") or parts.query or parts.username:
        raise ConfigError([f"executor: {url!r} is not of the form dask://host:{PORT}"])
    try:
        security = distributed.Security()
        encrypted = security.get_connection_args("client").get("ssl_context") is not None
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError([f"executor: {url}: Dask's TLS settings cannot be used: {error}"]) from None
    if not encrypted and not is_loopback(host):
        raise ConfigError([
            f"executor: {url}: whoever reaches a scheduler without TLS runs code on all of it, so beyond loopback TLS "
            "is a must: set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and "
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY (docs/executors.md)"
        ])
    shown = f"[{host}]" if ":" in host else host
    return f"{'tls' if encrypted else 'tcp'}://{shown}:{port}", security
