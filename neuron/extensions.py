"""What adopters hang on a neuron, and what a host calls on it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import requests

from neuron.commands import Handler
from neuron.config import NeuronConfig
from neuron.endpoints import Endpoints, Route, check_route
from neuron.errors import DefinitionError
from neuron.executors import Engine, open_engine
from neuron.health import Dependency, DependencyChecks, parse_dependency
from neuron.metrics import Events, Metric, Metrics
from neuron.tasks import TaskRegistry, check_name, place_of
from neuron.telemetry import RequestStatistics

F = TypeVar("F", bound=Callable[..., Any])


class Extensions:
    """The part of APINeuron that programs around it use: registration of their own things, and the hooks.

    None of the hooks raises into the host for the neuron's own reasons, blocks, or needs the neuron to run.
    """

    # What a host calls once for each request it served: success, response time in milliseconds.
    simple_request: Callable[..., None]
    simulate_request: Callable[..., None]

    def __init__(self, config: NeuronConfig, executor: Executor | None, now: Callable[[], float]) -> None:
        self.tasks = TaskRegistry()
        self.handlers: dict[str, Handler] = {}
        self.idempotent_commands: set[str] = set()
        self.dependencies = DependencyChecks(now)
        for item in config.dependencies:
            self.dependencies.add(parse_dependency(item))
        self.routes: list[Route] = []
        self.endpoints: Endpoints | None = None
        self.statistics = RequestStatistics(now)
        # The bound method itself: a wrapper would double what each of the host's requests pays.
        self.simple_request = self.simulate_request = self.statistics.record
        self.metrics = Metrics()
        self.events = Events(now)
        self._executor: str | Executor = executor or config.executor
        self._engine: Engine | None = None
        self._engine_guard = threading.Lock()
        self._built_in_commands: frozenset[str] = frozenset()
        _all.add(self)

    def engine(self) -> Engine:
        """Where tasks run, opened when the first one needs it."""
        with self._engine_guard:
            if self._engine is None:
                self._engine = open_engine(self._executor)
            return self._engine

    def task(
        self,
        name: str,
        *,
        timeout: float | None = None,
        idempotent: bool = False,
        retries: int = 0,
        replace: bool = False,
    ) -> Callable[[F], F]:
        """Register a task: a plain function whose parameters are the keys of `params`, or `params` itself.

        `idempotent`: it may run again when a process died under it; `retries`: and after it failed. Raises
        DefinitionError, naming the line, for what could not work.
        """
        _named(name, "task")

        def register(function: F) -> F:
            self.tasks.add(
                name, function, timeout=timeout, idempotent=idempotent, retries=retries, replace=replace,
                importable=self.engine().importable,
            )
            return function

        return register

    def command(self, name: str, *, idempotent: bool = False) -> Callable[[F], F]:
        """Register a command type of your own: `function(data)` with the commandData; its return is the result."""
        _named(name, "command")

        def register(function: F) -> F:
            place = place_of(function)
            check_name(name, "command", place)
            if name in self.handlers:
                kind = "built in; override its handle_ method in a subclass" if name in self._built_in_commands else (
                    "registered already"
                )
                raise DefinitionError(f"{place}: command {name!r} is {kind}")
            if not callable(function):
                raise DefinitionError(f"command {name!r}: {function!r} is not a function")
            self.handlers[name] = lambda entry: function(entry.data)
            if idempotent:
                self.idempotent_commands.add(name)
            return function

        return register

    def dependency(
        self, name: str, *, critical: bool = True, timeout: float = 2.0, every: float = 30.0
    ) -> Callable[[F], F]:
        """Register a check: a function that returns (healthy), returns `degraded("why")`, or raises (unhealthy)."""
        _named(name, "dependency")

        def register(function: F) -> F:
            place = place_of(function)
            check_name(name, "dependency", place)
            if not callable(function):
                raise DefinitionError(f"dependency {name!r}: {function!r} is not a function")
            if not 0 < timeout <= 60 or not 0 < every <= 86_400:
                raise DefinitionError(f"{place}: dependency {name!r}: timeout is 0 to 60 s, every 0 to 86400 s")
            try:
                self.dependencies.add(Dependency(name, function, critical, timeout, every))
            except ValueError as error:
                raise DefinitionError(f"{place}: {error}") from None
            return function

        return register

    def endpoint(self, method: str, path: str) -> Callable[[F], F]:
        """Register a route: `function(data)` with the posted object or records, or the query of a GET."""

        def register(function: F) -> F:
            route = check_route(method, path, function, self.routes)
            self.routes.append(route)
            if self.endpoints is not None:
                self.endpoints.add(route)
            return function

        return register

    # -- hooks for the host --------------------------------------------------------------------------------------

    def track_request(self) -> Tracked:
        """`with neuron.track_request():` measures its block; an exception in it counts as failed and goes on."""
        return Tracked(self.statistics)

    def request(self, method: str, url: str, **options: Any) -> requests.Response:
        """`requests.request` that counts itself: 5xx and exceptions as failed. Without `timeout`, 30 s."""
        started = time.perf_counter()
        success = False
        options.setdefault("timeout", 30)
        try:
            response = requests.request(method, url, **options)  # noqa: S113 - set above
            success = response.status_code < 500
            return response
        finally:
            self.simple_request(success, (time.perf_counter() - started) * 1000)

    def metric(self, name: str) -> Metric:
        """A figure of your own, reported under customMetrics: `.add(n)` or `.set(value)`."""
        return self.metrics.metric(name)

    def event(self, name: str, /, **data: Any) -> None:
        """Something that happened, reported under events; the last hundred are kept."""
        self.events.event(name, **data)

    # -- forks ---------------------------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """A forked copy has none of the threads and may hold locks of theirs."""
        if self.endpoints is not None:
            self.endpoints.after_fork_in_child()
        self.endpoints = None
        self._engine = None
        self._engine_guard = threading.Lock()
        self.statistics.after_fork_in_child()
        self.metrics.after_fork_in_child()
        self.dependencies.after_fork_in_child()


def _named(name: object, kind: str) -> None:
    """Raises DefinitionError for a decorator written without its parentheses: nothing would be registered."""
    if callable(name):
        raise DefinitionError(f'{place_of(name)}: write @neuron.{kind}("a name")')


class Tracked:
    """Measures a block. A class and not a generator: it costs a third, and leaves the host's traceback as it is."""

    __slots__ = ("_started", "_statistics")

    def __init__(self, statistics: RequestStatistics) -> None:
        self._statistics = statistics
        self._started = 0.0

    def __enter__(self) -> Tracked:
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._statistics.record(kind is None, (time.perf_counter() - self._started) * 1000)


_all: weakref.WeakSet[Extensions] = weakref.WeakSet()


def _forked() -> None:
    for neuron in list(_all):
        neuron.after_fork_in_child()


os.register_at_fork(after_in_child=_forked)
