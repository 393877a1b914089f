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
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from neuron.errors import ConfigError, EngineUnavailable, WorkerLost
from neuron.tasks import CancelEvent, Run, Task, TaskContext

UNAVAILABLE_SECONDS = 5.0  # after an executor took no task, until it is asked again
LOOK_SECONDS = 0.5  # between two looks whether the process of a silent task is there
END_SECONDS = 5.0  # for the process of a task that has its result, to end by itself


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

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle:
        """Start the task. Its future fails with WorkerLost where what ran it is gone.

        Raises EngineUnavailable when nothing was started.
        """

    def close(self) -> None: ...


class Hold:
    """Why no task is started just now, for so many seconds: a failing start must not be tried without a pause."""

    def __init__(self) -> None:
        self.reason = ""
        self._until = float("-inf")

    def set(self, reason: str, seconds: float) -> None:
        self.reason, self._until = reason, time.monotonic() + seconds

    def lasts(self) -> bool:
        return time.monotonic() < self._until

    def check(self) -> None:
        if self.lasts():
            raise EngineUnavailable(self.reason)


def relay(source: Future[Any], future: Future[Any], lost: tuple[type[BaseException], ...]) -> None:
    """Let `future`, a running one, end as `source` does; the errors `lost` and a cancellation become WorkerLost."""

    def ended(_: Future[Any]) -> None:
        if future.done():
            return
        if source.cancelled():
            future.set_exception(WorkerLost("the executor dropped the task"))
            return
        error = source.exception()
        if error is None:
            future.set_result(source.result())
        else:
            future.set_exception(WorkerLost(f"the worker is gone: {error}") if isinstance(error, lost) else error)

    source.add_done_callback(ended)


def portable(value: Any) -> Any:
    """`value`, if it survives the way to another process. Raises TypeError, showing it, if it does not."""
    try:
        pickle.loads(pickle.dumps(value))  # noqa: S301 - our own, just made
    except Exception as error:
        raise TypeError(f"{type(value).__name__} {value!r:.300} cannot leave its process: {error}") from None
    return value


def forwarding_logger(send: Callable[[int, str], None]) -> logging.Logger:
    """A logger for `context.logger` whose records go as level and text to the neuron, wherever that is."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            with contextlib.suppress(OSError):
                send(record.levelno, text)

    # Not one of logging.getLogger(): runs beside each other have one each.
    task_logger = logging.Logger("neuron.task", logging.DEBUG)
    task_logger.addHandler(Forward())
    return task_logger


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

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._hold = Hold()
        self.importable = isinstance(executor, ProcessPoolExecutor)

    def ready(self) -> None:
        self._hold.check()

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            source = self._executor.submit(execute, call, Channel(run.cancelled, run.report, logger))
        except RuntimeError as error:
            # Shut down, broken, or out of threads: the host may give it room again.
            self._hold.set(f"the executor takes no task: {error}", UNAVAILABLE_SECONDS)
            raise EngineUnavailable(self._hold.reason) from error
        relay(source, future, (BrokenExecutor,))
        return Handle(future, kill=lambda: void(source.cancel()))

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
        # With its cancel event: one that is forgotten here is gone before a slow child has opened it.
        self._processes: dict[Any, Any] = {}
        self._hold = Hold()

    def ready(self) -> None:
        self._hold.check()

    def start(self, call: Call, run: Run, logger: logging.LoggerAdapter[Any]) -> Handle:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            ours, theirs = self._context.Pipe()
            cancelled = self._context.Event()
            process = self._context.Process(
                target=_process_main, args=(theirs, cancelled, call), name=f"neuron-task-{call.command_id}",
                daemon=True,
            )
        except OSError as error:
            raise self._unavailable(error) from error
        try:
            process.start()
        except OSError as error:
            ours.close()
            raise self._unavailable(error) from error
        except Exception as error:
            # What cannot be pickled shows here; it is this task's failure.
            ours.close()
            future.set_exception(error)
            return Handle(future)
        finally:
            theirs.close()
        self._processes[process] = cancelled
        threading.Thread(
            target=self._listen, args=(ours, process, future, run, logger), daemon=True,
            name=f"neuron-listen-{call.command_id}",
        ).start()
        return Handle(future, tell=cancelled.set, kill=process.kill)

    def _unavailable(self, error: OSError) -> EngineUnavailable:
        self._hold.set(f"no process can be started: {error}", UNAVAILABLE_SECONDS)
        return EngineUnavailable(self._hold.reason)

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
                # The pipe alone would not tell: something the task has forked may hold its other end.
                while not pipe.poll(LOOK_SECONDS):
                    if process.exitcode is not None and not pipe.poll():
                        raise EOFError
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
            # A thread that the task left behind must not keep its process.
            process.join(END_SECONDS)
            process.kill()
            process.join()
            self._processes.pop(process, None)

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
    # A supervisor may signal the whole group; when the task ends is for the neuron to say. Handlers that do nothing,
    # since ignored signals would be inherited by programs that the task starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # The neuron's stdout holds its log and nothing else.
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    parent = multiprocessing.parent_process()
    pid = os.getpid()
    guard = threading.Lock()

    def send(*message: Any) -> None:
        with guard:
            pipe.send(message)

    def end_with_parent() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def report(fraction: float, text: str) -> None:
        with contextlib.suppress(OSError):
            send("progress", fraction, text)

    logger = forwarding_logger(lambda level, text: send("log", level, text))
    outcome: tuple[str, Any]
    try:
        outcome = ("result", portable(execute(call, Channel(cancelled, report, logger))))
    except BaseException as error:
        error.add_note("in the process of the task:\n" + "".join(traceback.format_exception(error)))
        try:
            outcome = ("error", portable(error))
        except TypeError as fault:
            outcome = ("error", fault)
    if os.getpid() != pid:
        # A copy that the task forked came back from it too; it has nothing to say here.
        os._exit(0)
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
