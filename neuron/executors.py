"""Where tasks run: threads, processes, or any `concurrent.futures.Executor`; one entry in ENGINES each."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol

from neuron.errors import ConfigError, WorkerLost
from neuron.tasks import CancelEvent, Run, Task, TaskContext


@dataclass(frozen=True)
class Call:
    """One run of a task, picklable if its function is. `deadline`: epoch seconds."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    takes_context: bool
    task: str
    command_id: str
    attempt: int
    deadline: float


class Channel:
    """What runs beside a task: its cancel event, progress and log.

    Pickled into an executor of somebody else's, it arrives detached: never cancelled, progress dropped.
    """

    def __init__(
        self,
        cancelled: CancelEvent | None = None,
        report: Callable[[float, str], None] | None = None,
        logger: logging.Logger | logging.LoggerAdapter[Any] | None = None,
    ) -> None:
        self.cancelled = cancelled or threading.Event()
        self.report = report or (lambda *_: None)
        self.logger = logger or logging.getLogger("neuron.task")

    def __reduce__(self) -> tuple[type[Channel], tuple[()]]:
        return Channel, ()


def execute(call: Call, channel: Channel) -> Any:
    """Call the task's function: what every executor is given to run."""
    arguments = call.arguments
    if call.takes_context:
        context = TaskContext(
            task=call.task,
            command_id=call.command_id,
            attempt=call.attempt,
            deadline=call.deadline,
            cancelled=channel.cancelled,
            logger=channel.logger,
            report=channel.report,
        )
        arguments = {**arguments, "context": context}
    return call.function(**arguments)


@dataclass
class Handle:
    """A task under way. `tell` passes the cancellation on; `kill` ends it by force where that is possible."""

    future: Future[Any]
    tell: Callable[[], None] = lambda: None
    kill: Callable[[], None] = lambda: None


class Engine(Protocol):
    """What the neuron wants of a place to run tasks."""

    importable: bool  # tasks must be importable by name there

    def ready(self) -> None:
        """Raises EngineUnavailable when no task can be started now. Does not block."""

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle: ...

    def close(self) -> None: ...


class DaemonThreads(Executor):
    """A daemon thread for each call. The standard pool's threads would keep the host alive at its exit."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                # SystemExit too: a task that calls sys.exit() has failed, and nothing else ends.
                future.set_exception(error)
            else:
                future.set_result(result)

        name = args[0].command_id if args and isinstance(args[0], Call) else "call"
        threading.Thread(target=work, name=f"neuron-task-{name}", daemon=True).start()
        return future


class ExecutorEngine:
    """Any `concurrent.futures.Executor`. Across a process boundary, progress and cancel do not work there."""

    importable = False

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def ready(self) -> None:
        """An executor takes calls at any time."""

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle:
        future = self._executor.submit(execute, call, Channel(run.cancelled, run.report, logger))
        return Handle(future, tell=lambda: None, kill=lambda: void(future.cancel()))

    def close(self) -> None:
        """The executor belongs to whoever made it."""


def void(_: object) -> None:
    """For a callback whose answer nobody needs."""


class ProcessEngine:
    """A fresh process for each task: a crash or a kill ends that task alone."""

    importable = True

    def __init__(self) -> None:
        # Never fork: a child of a threaded process inherits locks that nobody will release.
        self._context = multiprocessing.get_context("spawn")
        self._processes: set[Any] = set()

    def ready(self) -> None:
        """Processes can be started at any time."""

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle:
        ours, theirs = self._context.Pipe()
        cancelled = self._context.Event()
        future: Future[Any] = Future()
        process = self._context.Process(
            target=_process_main, args=(theirs, cancelled, call), name=f"neuron-task-{call.command_id}", daemon=True
        )
        future.set_running_or_notify_cancel()
        try:
            process.start()
        except Exception as error:
            # What cannot be pickled shows here; it is this task's failure.
            ours.close()
            future.set_exception(error)
            return Handle(future)
        finally:
            theirs.close()
        self._processes.add(process)
        threading.Thread(
            target=self._listen, args=(ours, process, future, run, logger), daemon=True,
            name=f"neuron-listen-{call.command_id}",
        ).start()
        return Handle(future, tell=cancelled.set, kill=process.kill)

    def _listen(
        self,
        pipe: multiprocessing.connection.Connection[Any, Any],
        process: Any,
        future: Future[Any],
        run: Run,
        logger: logging.LoggerAdapter[Any],
    ) -> None:
        try:
            while not future.done():
                kind, *values = pipe.recv()
                if kind == "progress":
                    run.report(*values)
                elif kind == "log":
                    logger.log(*values)
                elif kind == "result":
                    future.set_result(values[0])
                else:
                    future.set_exception(values[0])
        except (EOFError, OSError):
            process.join()
            future.set_exception(WorkerLost(f"the process of the task ended with {_ended(process.exitcode)}"))
        except Exception as error:
            # Unpickling runs the task's own classes.
            future.set_exception(error)
        finally:
            pipe.close()
            process.join()
            self._processes.discard(process)

    def close(self) -> None:
        for process in list(self._processes):
            process.kill()


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _process_main(pipe: Any, cancelled: Any, call: Call) -> None:
    """The task's process. It ends with the neuron's, so that no effect comes after a restart."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    guard = threading.Lock()

    def send(*message: Any) -> None:
        with guard:
            pipe.send(message)

    def end_with_parent() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(OSError):
                send("log", record.levelno, record.getMessage())

    logger = logging.getLogger("neuron.task")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(Forward())

    def report(fraction: float, text: str) -> None:
        with contextlib.suppress(OSError):
            send("progress", fraction, text)

    try:
        outcome: tuple[str, Any] = ("result", execute(call, Channel(cancelled, report, logger)))
    except BaseException as error:
        outcome = ("error", error)
    try:
        pickle.loads(pickle.dumps(outcome))  # noqa: S301 - our own, to see that it survives the way
    except Exception as error:
        outcome = ("error", RuntimeError(f"{type(outcome[1]).__name__}: {outcome[1]!r:.300} (not picklable: {error})"))
    send(*outcome)


def _threads(_: str) -> Engine:
    return ExecutorEngine(DaemonThreads())


def _processes(_: str) -> Engine:
    return ProcessEngine()


def _dask(url: str) -> Engine:
    from neuron.dask_engine import DaskEngine

    return DaskEngine(url)


# The reading of an executor URL: its scheme chooses here. Another engine is another entry.
ENGINES: dict[str, Callable[[str], Engine]] = {"threads": _threads, "processes": _processes, "dask": _dask}


def open_engine(executor: str | Executor) -> Engine:
    """The engine for the setting `executor`, or for an Executor object. Raises ConfigError for an unknown one."""
    if isinstance(executor, Executor):
        return ExecutorEngine(executor)
    scheme = executor.partition("://")[0]
    if scheme not in ENGINES:
        raise ConfigError([f"executor: {executor!r} is none of {', '.join(ENGINES)}"])
    return ENGINES[scheme](executor)


def call_of(task: Task, arguments: dict[str, Any], command_id: str, attempt: int, timeout: float) -> Call:
    return Call(
        task.function, arguments, task.takes_context, task.name, command_id, attempt, time.time() + timeout
    )
