"""Tasks: what may be run by name, the check of its parameters, and the context it runs in."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import logging
import math
import threading
import time
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from neuron.errors import Cancelled, DefinitionError, Rejected

TaskFunction = Callable[..., Any]
_PLAIN: dict[Any, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null",
    list: "a list", dict: "an object",
}
# What reading an annotation raises that was misspelt: an unknown name, attribute, or no expression at all.
_UNREADABLE = (TypeError, ValueError, NameError, AttributeError, SyntaxError)


class CancelEvent(Protocol):
    """The part of `threading.Event` that every executor can offer to a task."""

    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class TaskContext:
    """What a task knows about its run. Ask for it with a parameter named `context`.

    `cancelled`: event, set when the command was cancelled, timed out or the neuron stops.
    `deadline`: epoch seconds after which the run counts as timed out.
    `attempt`: 1 for the first run, counted over retries and restarts.
    `logger`: writes to the neuron's log with the command's id.
    """

    def __init__(
        self,
        *,
        task: str,
        command_id: str,
        attempt: int,
        deadline: float,
        cancelled: CancelEvent,
        logger: logging.Logger | logging.LoggerAdapter[Any],
        report: Callable[[float, str], None],
    ) -> None:
        self.task = task
        self.command_id = command_id
        self.attempt = attempt
        self.deadline = deadline
        self.cancelled = cancelled
        self.logger = logger
        self._report = report

    def progress(self, fraction: float, text: str = "") -> None:
        """Tell how far the run is: 0 to 1 (clamped), with a few words. Shows in /status and the heartbeat."""
        number = float(fraction)
        if not math.isfinite(number):
            number = 0.0
        self._report(min(1.0, max(0.0, number)), str(text)[:200])

    def check_cancelled(self) -> None:
        """Raise Cancelled if the run should end: one line for the top of a loop."""
        if self.cancelled.is_set():
            raise Cancelled(f"task {self.task} was cancelled")

    def remaining(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.time()


@dataclass(frozen=True)
class Task:
    """A registered task. `timeout` in seconds, None: the configured one."""

    name: str
    function: TaskFunction
    timeout: float | None
    idempotent: bool
    retries: int
    takes_context: bool
    takes_params: bool
    parameters: Mapping[str, Any]
    required: frozenset[str]
    open_ended: bool
    builtin: bool = False

    def arguments(self, params: Any) -> dict[str, Any]:
        """Keyword arguments for the function. Raises Rejected naming every fault of `params`."""
        if not isinstance(params, dict):
            raise Rejected(f"params: {_shown(params)} is not an object")
        if self.takes_params:
            faults = mismatches(params, self.parameters["params"], "params")
            arguments: dict[str, Any] = {"params": params}
        else:
            faults = _mapping_faults(params, self.parameters, self.required, self.open_ended, "params")
            arguments = dict(params)
        if faults:
            raise Rejected(f"task {self.name}: {'; '.join(faults)}", task=self.name, faults=faults)
        return arguments


class TaskRegistry:
    """Tasks by name. A name is registered once; a built-in one can be replaced only by saying so."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._builtin: set[str] = set()

    def add(
        self,
        name: str,
        function: TaskFunction,
        *,
        timeout: float | None = None,
        idempotent: bool = False,
        retries: int = 0,
        replace: bool = False,
        builtin: bool = False,
        importable: bool = False,
    ) -> Task:
        """Register a task. `importable`: it must be, because it will run in another process.

        Raises DefinitionError naming the place and the fault.
        """
        place = place_of(function)
        check_name(name, "task", place)
        if name in self._tasks and not (replace and name in self._builtin):
            if name in self._builtin:
                raise DefinitionError(f"{place}: task {name!r} is built in; give yours another name or replace=True")
            first = place_of(self._tasks[name].function)
            raise DefinitionError(f"{place}: task {name!r} is registered already, {first}")
        if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
            raise DefinitionError(f"{place}: task {name!r}: timeout={timeout!r} is not a number of seconds above 0")
        if not isinstance(retries, int) or retries < 0:
            raise DefinitionError(f"{place}: task {name!r}: retries={retries!r} is not a whole number from 0")
        if retries and not idempotent:
            raise DefinitionError(
                f"{place}: task {name!r}: retries={retries} wants idempotent=True, since a run that failed may have "
                "had its effect"
            )
        if importable and "<locals>" in getattr(function, "__qualname__", "<locals>"):
            raise DefinitionError(
                f"{place}: task {name!r} is defined inside a function; another process can only import it from the "
                "top level of a module"
            )
        task = _described(name, function, timeout, idempotent, retries, place)
        task = dataclasses.replace(task, builtin=builtin)
        self._tasks[name] = task
        if builtin:
            self._builtin.add(name)
        return task

    def names(self) -> list[str]:
        return sorted(self._tasks)

    def get(self, name: Any) -> Task:
        """Raises Rejected with the supported names where there is no such task."""
        task = self._tasks.get(name) if isinstance(name, str) else None
        if task is None:
            raise Rejected(f"there is no task {_shown(name)}{nearest(name, self._tasks)}", supported=self.names())
        return task


def check_name(name: Any, kind: str, place: str) -> None:
    """Raises DefinitionError where `name` cannot name a task, command, dependency or metric."""
    if not isinstance(name, str) or not name or len(name) > 100 or not name.isprintable() or name != name.strip():
        raise DefinitionError(f"{place}: {kind} name {name!r} is not a plain text of 1 to 100 characters")


def place_of(function: Any) -> str:
    """`file:line` of a function, for messages."""
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else f"{function!r}"


def nearest(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _described(
    name: str, function: TaskFunction, timeout: float | None, idempotent: bool, retries: int, place: str
) -> Task:
    if not callable(function):
        raise DefinitionError(f"task {name!r}: {function!r} is not a function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise DefinitionError(f"{place}: task {name!r} is a coroutine or generator; write a plain function")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function)
    except _UNREADABLE as error:
        raise DefinitionError(f"{place}: task {name!r}: its signature cannot be read: {error}") from None
    parameters: dict[str, Any] = {}
    required = set()
    open_ended = takes_context = False
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise DefinitionError(
                f"{place}: task {name!r}: parameter {parameter.name!r} cannot be given by name; tasks are called with "
                "params, or with its keys as keyword arguments"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.name == "context":
            takes_context = True
        else:
            annotation = hints.get(parameter.name, Any)
            if fault := _unsupported(annotation):
                raise DefinitionError(f"{place}: task {name!r}: parameter {parameter.name!r}: {fault}")
            parameters[parameter.name] = annotation
            if parameter.default is parameter.empty:
                required.add(parameter.name)
    takes_params = "params" in parameters
    if takes_params and (len(parameters) > 1 or open_ended):
        raise DefinitionError(
            f"{place}: task {name!r}: takes `params` whole and its keys by name; write one of the two"
        )
    return Task(
        name, function, timeout, idempotent, retries, takes_context, takes_params, parameters, frozenset(required),
        open_ended,
    )


def _unsupported(annotation: Any, seen: tuple[Any, ...] = ()) -> str | None:
    """Why values cannot be checked against this annotation; None where they can. `seen`: TypedDicts around it."""
    if annotation is Any or (isinstance(annotation, Hashable) and annotation in _PLAIN) or annotation in seen:
        return None
    if typing.is_typeddict(annotation):
        try:
            parts = typing.get_type_hints(annotation).values()
        except _UNREADABLE as error:
            return f"{annotation.__name__} cannot be read: {error}"
        return next((fault for part in parts if (fault := _unsupported(part, (*seen, annotation)))), None)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return None
    if origin in (typing.Union, types.UnionType, list, dict) or origin in (typing.Required, typing.NotRequired):
        return next((fault for part in typing.get_args(annotation) if (fault := _unsupported(part, seen))), None)
    return (
        f"{annotation!r} is not a JSON type; use str, int, float, bool, None, list[…], dict[str, …], Literal, "
        "a TypedDict, or unions of them"
    )


def mismatches(value: Any, annotation: Any, where: str) -> list[str]:
    """Sentences on how a JSON value differs from an annotation; empty where it fits."""
    if annotation is Any:
        return []
    origin = typing.get_origin(annotation)
    if origin in (typing.Required, typing.NotRequired):
        return mismatches(value, typing.get_args(annotation)[0], where)
    if origin is Literal:
        allowed = typing.get_args(annotation)
        fits = any(value == choice and type(value) is type(choice) for choice in allowed)
        return [] if fits else [f"{where}: {_shown(value)} is none of {', '.join(map(repr, allowed))}"]
    if origin in (typing.Union, types.UnionType):
        options = [mismatches(value, option, where) for option in typing.get_args(annotation)]
        if not all(options):
            return []
        # The option that got furthest tells most: a fault inside it, before a fault of kind.
        return max(options, key=lambda faults: len(faults[0].partition(":")[0]))
    if typing.is_typeddict(annotation):
        if not isinstance(value, dict):
            return [f"{where}: {_shown(value)} is not an object"]
        return _mapping_faults(value, typing.get_type_hints(annotation), _required_keys(annotation), False, where)
    plain = origin or annotation
    wanted = _PLAIN[plain]
    if plain is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif plain is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, plain)
    if not fits:
        return [f"{where}: {_shown(value)} is not {wanted}"]
    if not typing.get_args(annotation):
        return []
    if origin is list:
        (item,) = typing.get_args(annotation)
        return [f for at, entry in enumerate(value) for f in mismatches(entry, item, f"{where}[{at}]")][:20]
    if origin is dict:
        _, item = typing.get_args(annotation)
        return [f for key, entry in value.items() for f in mismatches(entry, item, f"{where}.{key}")][:20]
    return []


def _required_keys(annotation: Any) -> set[str]:
    """Of a TypedDict. Its own `__required_keys__` misses markers under `from __future__ import annotations`."""
    marked = typing.get_type_hints(annotation, include_extras=True)
    required = set(annotation.__required_keys__)
    required |= {name for name, hint in marked.items() if typing.get_origin(hint) is typing.Required}
    return required - {name for name, hint in marked.items() if typing.get_origin(hint) is typing.NotRequired}


def _mapping_faults(
    value: Mapping[str, Any], hints: Mapping[str, Any], required: Iterable[str], open_ended: bool, where: str
) -> list[str]:
    faults = [f"{where}.{name}: is missing" for name in sorted(set(required) - set(value))]
    for name, entry in value.items():
        if name in hints:
            faults += mismatches(entry, hints[name], f"{where}.{name}")
        elif not open_ended:
            faults.append(f"{where}.{name}: is unknown{nearest(name, hints)}")
    return faults[:20]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class Run:
    """A command under way: what `/status` and the heartbeat show of it, and how it is told to end."""

    command_id: str
    type: str
    task: str = ""
    started_at: float = dataclasses.field(default_factory=time.time)
    attempt: int = 1
    fraction: float | None = None
    text: str = ""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    changed: threading.Event = dataclasses.field(default_factory=threading.Event)
    cancel_reason: str = ""

    def report(self, fraction: float, text: str) -> None:
        self.fraction, self.text = fraction, text

    def cancel(self, reason: str) -> None:
        self.cancel_reason = self.cancel_reason or reason
        self.cancelled.set()
        self.changed.set()

    def shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "commandId": self.command_id,
            "type": self.type,
            "runningSeconds": round(time.time() - self.started_at, 1),
            "attempt": self.attempt,
        }
        if self.task:
            shown["task"] = self.task
        if self.fraction is not None:
            shown["progress"] = self.fraction
        if self.text:
            shown["text"] = self.text
        return shown
