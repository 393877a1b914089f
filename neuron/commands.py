"""The command contract: one outcome for each command, written down before the federation hears of it.

    pending --receive--> received --acknowledge--> acknowledged --> running --> finished --complete--> reported

Every arrow is durable in the journal before the next begins, an acknowledge is never sent once completion was tried,
and nothing is acknowledged that cannot start now.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import datetime
from typing import Any, Protocol

from neuron import reports
from neuron.config import NeuronConfig
from neuron.errors import (
    BadAnswer,
    Cancelled,
    EngineUnavailable,
    FederationError,
    JournalUnavailable,
    Refused,
    Rejected,
    ServerFault,
    Unreachable,
    WorkerLost,
)
from neuron.executors import Call, DaemonThreads, Engine, ExecutorEngine, call_of
from neuron.journal import MAX_UNDELIVERED, Entry, Journal, digest_of
from neuron.logs import NeuronLogger, Throttle, redactor
from neuron.tasks import Run, Task, TaskRegistry
from neuron.transport import MAX_DEPTH, deeper_than, jittered

CONTROL = frozenset({"health_check", "config_update", "restart", "stop", "cancel_task", "pause", "resume"})
MAX_BATCH = 256  # commands looked at in one answer; the rest stays pending
CANCEL_GRACE = 5.0  # seconds a cancelled task has to end by itself before it is given up
DELIVERIES_IN_ORDER = 10  # failed deliveries after which a result waits an hour and lets others pass
LONGEST_WAIT = 3600.0  # seconds between tries of what the federation keeps failing at
TOO_DEEP = {"commandData": "was nested too deep to be kept"}  # written down in its place; the command is rejected
LATER = object()  # a handler's answer: the next process completes this command

Handler = Callable[[Entry], Any]


class TimedOut(Exception):
    """The task's time limit passed."""


class Neuron(Protocol):
    """What the desk needs of the neuron it works for."""

    config: NeuronConfig
    handlers: dict[str, Handler]
    idempotent_commands: set[str]
    paused: bool
    logger: NeuronLogger

    def now(self) -> float: ...
    def fetch_commands(self) -> list[Any]: ...
    def acknowledge(self, command_id: str) -> None: ...
    def complete(self, command_id: str, body: dict[str, Any]) -> None: ...
    def wake_commands(self) -> None: ...


class CommandDesk:
    """Takes commands in, runs their handlers, and sees that each outcome is delivered.

    `look` is one iteration and belongs to one thread; the other methods may be called from any.
    """

    def __init__(self, neuron: Neuron, journal: Journal, tasks: TaskRegistry, engine: Callable[[], Engine]) -> None:
        self._neuron = neuron
        self._journal = journal
        self._tasks = tasks
        self._engine = engine
        # The built-in tasks work on the neuron itself, so they stay with it whatever the executor.
        self._own_engine = ExecutorEngine(DaemonThreads())
        self._guard = threading.Lock()
        self._looking = threading.Lock()
        self._recovered = False
        self._stopping = False
        self._deliverable = True
        self._stuck: list[Entry] = []
        self._throttle = Throttle(60)  # of what is met again at each look
        self._backlog: dict[tuple[str, str], Entry] = {}
        self._unsaved: list[tuple[Entry, str, dict[str, Any]]] = []
        self._abandoned: dict[str, Future[Any]] = {}
        self._runs: dict[str, Run] = {}
        self._slots: set[str] = set()
        self.afterwards: list[Callable[[], None]] = []
        self.worked_at = float("-inf")

    # -- one iteration -------------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Deliver what is finished, go on with what was left, fetch and begin what is new. True: there was work.

        Raises FederationError when the federation could not be asked, JournalUnavailable when nothing may be begun.
        """
        try:
            with self._looking:
                if self._journal.failure is not None:
                    self._journal.set_setting("probe", time.time())
                worked = self._recover()
                self._save_unsaved()
                failure: FederationError | None = None
                self._stuck.clear()
                for step in (self._deliver, self._go_on):
                    try:
                        worked = step() or worked
                    except FederationError as error:
                        failure = failure or error
                if not self._stopping:
                    full = self._congested()
                    pending = self._neuron.fetch_commands()
                    self._put_off_stuck()
                    for command in [] if full else pending[:MAX_BATCH]:
                        worked = self._accept(command) or worked
                if failure is None and self._deliverable:
                    self._deliver()
        finally:
            # A stop or restart that was asked for above happens once its command is written down and, if the
            # federation listens, reported. If it does not, neither waits for it.
            while self.afterwards:
                self.afterwards.pop(0)()
        if worked:
            self.worked_at = time.monotonic()
        return worked

    def _put_off_stuck(self) -> None:
        """The federation answers, yet not to what is said of these commands: they wait and let others pass.

        In an outage nothing is put off, since it says nothing of a command.
        """
        while self._stuck:
            self._put_off(self._stuck.pop())

    def _congested(self) -> bool:
        """So many results wait for the federation that no more commands are taken: the journal stays bounded."""
        return self._deliverable and self._journal.counts().get("finished", 0) >= MAX_UNDELIVERED

    def _recover(self) -> bool:
        """What a former process left: see the table in the documentation."""
        if self._recovered:
            return False
        for entry in self._journal.unfinished():
            if entry.state != "running":
                self._backlog[entry.command_id, entry.digest] = entry
            elif entry.type == "restart":
                self._finish(entry, *_restarted(entry, self._journal.setting("restart")))
            elif entry.type == "stop":
                self._finish(entry, "succeeded", reports.completion("succeeded", result={"stopped": True}))
            elif entry.type in CONTROL or self._may_run_again(entry):
                self._journal.advance(entry, "acknowledged")
                self._backlog[entry.command_id, entry.digest] = self._journal.find(entry.command_id) or entry
            else:
                text = "the neuron's process ended while this ran; whether it took effect is unknown"
                self._neuron.logger.warning("command %s (%s): interrupted", entry.command_id, entry.type)
                self._finish(entry, "interrupted", reports.completion("interrupted", error=text))
        self._recovered = True
        return bool(self._backlog)

    def _may_run_again(self, entry: Entry) -> bool:
        if entry.type != "run_task":
            return entry.type in self._neuron.idempotent_commands
        try:
            return self._tasks.get(task_name(entry.data)).idempotent
        except Rejected:
            return False

    def _go_on(self) -> bool:
        worked = False
        # What is acknowledged wants nobody's answer; what is not may get none.
        for entry in sorted(self._backlog.values(), key=lambda entry: entry.state):
            if entry.command_id in self._runs or not self._may_begin(entry.type, entry.data):
                continue
            worked = self._begin(entry) or worked
        return worked

    def _accept(self, command: Any) -> bool:
        """Begin a command from the federation's list, if it is one and there is room for it."""
        parsed = _parsed(command)
        if isinstance(parsed, str):
            if self._throttle.ready(parsed) is not None:
                self._neuron.logger.warning("a pending command is no command (%s); left alone", parsed)
            return False
        command_id, kind, data, priority, timeout_at = parsed
        if command_id in self._runs or not self._may_begin(kind, data):
            return False
        entry, new = self._journal.receive(command_id, kind, data, priority=priority, timeout_at=timeout_at)
        if entry.digest != digest_of(kind, data):
            return self._refuse_reused_id(entry, kind, data)
        if entry.state == "reported":
            self._journal.deliver_again(entry)
            self._deliverable = True
            # Not counted as work: a list that names it for ever must not make us ask without a pause.
            return False
        if entry.state not in ("received", "acknowledged"):
            return False
        if new:
            self._neuron.logger.info(
                "command %s received", kind, extra={"commandId": command_id, "priority": priority}
            )
        return self._begin(entry)

    def _may_begin(self, kind: str, data: Any) -> bool:
        if self._stopping or self.afterwards:
            # A stop or restart has begun: what comes behind it is for the next process.
            return False
        if kind in CONTROL or kind not in self._neuron.handlers:
            return True
        if self._neuron.paused or len(self._slots) >= self._neuron.config.max_concurrent_tasks:
            return False
        if kind == "run_task":
            try:
                self._engine_for(self._tasks.get(task_name(data))).ready()
            except EngineUnavailable:
                return False
            except Rejected:
                return True
        return True

    def _engine_for(self, task: Task) -> Engine:
        return self._own_engine if task.builtin else self._engine()

    def _refuse_reused_id(self, entry: Entry, kind: str, data: Any) -> bool:
        if entry.state not in ("reported", "aside"):
            # Its first payload is still on its way to the one outcome of this id.
            return False
        self._neuron.logger.error(
            "command %s came again with another payload; rejected", entry.command_id, extra={"type": kind}
        )
        error = f"commandId {entry.command_id} was used before with another payload; issue a new command"
        self._journal.refuse_reused_id(
            entry.command_id, kind, data, reports.completion("rejected", error=error)
        )
        self._deliverable = True
        return False

    def _begin(self, entry: Entry) -> bool:
        """Acknowledge, then run: at once for a control command, in a slot of its own for others."""
        key = (entry.command_id, entry.digest)
        if entry.state == "received":
            if _waits(entry):
                return False
            # Until `acknowledged` is written: the federation may have acted, and then no list names it again.
            self._backlog[key] = entry
            try:
                self._neuron.acknowledge(entry.command_id)
            except Refused as error:
                self._neuron.logger.warning("command %s: acknowledge refused (%s); set aside", entry.command_id, error)
                self._journal.set_aside(entry)
                self._backlog.pop(key, None)
                return False
            except (ServerFault, BadAnswer) as error:
                if self._throttle.ready(entry.command_id) is not None:
                    self._neuron.logger.warning("command %s: acknowledge failed (%s)", entry.command_id, error)
                self._put_off(entry)
                return False
            except Unreachable:
                self._stuck.append(entry)
                raise
            self._journal.advance(entry, "acknowledged")
            if self._stopping:
                # Not begun, so the next process begins it; begun now, it would only be interrupted.
                self._backlog[key] = dataclasses.replace(entry, state="acknowledged")
                return False
        self._backlog.pop(key, None)
        run = Run(entry.command_id, entry.type, attempt=entry.runs + 1)
        with self._guard:
            self._runs[entry.command_id] = run
        if entry.type in CONTROL or entry.type not in self._neuron.handlers:
            self._run(entry, run)
        else:
            self._slots.add(entry.command_id)
            try:
                threading.Thread(
                    target=self._run, args=(entry, run), name=f"neuron-command-{entry.command_id}", daemon=True
                ).start()
            except RuntimeError as error:
                # No memory, or the limit of threads: it is acknowledged, and goes on when there is room.
                self._neuron.logger.error("command %s waits: %s", entry.command_id, error)
                self._slots.discard(entry.command_id)
                with self._guard:
                    self._runs.pop(entry.command_id, None)
                self._backlog[key] = dataclasses.replace(entry, state="acknowledged")
                return False
        return True

    # -- running -------------------------------------------------------------------------------------------------

    def _run(self, entry: Entry, run: Run) -> None:
        """Run the handler and write down the outcome, whatever happens in it."""
        try:
            outcome = self._outcome(entry, run)
            if outcome is not None:
                self._finish(entry, *outcome)
        except JournalUnavailable:
            # Not even `running` could be written: it has not begun, and goes on when the disk does.
            self._backlog[entry.command_id, entry.digest] = dataclasses.replace(entry, state="acknowledged")
        except EngineUnavailable as error:
            self._neuron.logger.warning("command %s waits: %s", entry.command_id, error)
            try:
                self._journal.advance(entry, "acknowledged")
            except JournalUnavailable:
                self._neuron.logger.debug("its state is written when the disk is back")
            self._backlog[entry.command_id, entry.digest] = dataclasses.replace(entry, state="acknowledged")
        finally:
            with self._guard:
                self._runs.pop(entry.command_id, None)
                self._slots.discard(entry.command_id)
            self._neuron.wake_commands()

    def _outcome(self, entry: Entry, run: Run) -> tuple[str, dict[str, Any]] | None:
        started = time.monotonic()
        details: Mapping[str, Any] = {}
        error, result = "", None
        try:
            if entry.timeout_at is not None and self._neuron.now() > entry.timeout_at:
                outcome, error = "expired", "its timeoutAt had passed before it could start"
            else:
                self._check(entry)
                self._journal.advance(entry, "running")
                result = self._neuron.handlers[entry.type](entry)
                if result is LATER:
                    return None
                outcome = "succeeded"
        except (JournalUnavailable, EngineUnavailable):
            raise
        except Rejected as refusal:
            outcome, error, details = "rejected", str(refusal), refusal.details
        except TimedOut as late:
            outcome, error = "timed_out", str(late)
        except Cancelled as cancelled:
            outcome, error = "cancelled", run.cancel_reason or str(cancelled)
            if self._stopping:
                if self._may_run_again(entry):
                    return None
                outcome, error = "interrupted", "the neuron stopped while this ran"
        except BaseException as failure:
            # SystemExit and KeyboardInterrupt too: a command must not end without an outcome.
            outcome, error = "failed", f"{type(failure).__name__}: {redactor.value(failure)}"
            self._neuron.logger.warning(
                "command %s failed", entry.type, exc_info=True, extra={"commandId": entry.command_id}
            )
        milliseconds = (time.monotonic() - started) * 1000
        try:
            body = reports.completion(outcome, result=result, error=error, details=details, milliseconds=milliseconds)
        except (TypeError, ValueError, RecursionError) as fault:
            outcome = "failed"
            body = reports.completion(
                outcome, error=f"it returned what is not JSON: {fault}", milliseconds=milliseconds
            )
        return outcome, body

    def _check(self, entry: Entry) -> None:
        if entry.type not in self._neuron.handlers:
            supported = sorted(self._neuron.handlers)
            raise Rejected(f"command type {entry.type!r} is not supported", supported=supported)
        if entry.data == TOO_DEEP:
            raise Rejected(f"commandData is nested deeper than {MAX_DEPTH} levels")
        try:
            _text_of(entry.data).encode()
        except UnicodeEncodeError:
            raise Rejected("commandData holds a lone surrogate, which is no Unicode text") from None

    def run_task(self, entry: Entry, name: Any, params: Any) -> Any:
        """Run a registered task for a command and return its result. Raises what `_outcome` tells apart."""
        task = self._tasks.get(name)
        arguments = task.arguments(params)
        run = self._runs[entry.command_id]
        run.task = task.name
        timeout = task.timeout or self._neuron.config.task_timeout
        lost = False
        failures = 0
        while True:
            call = call_of(task, arguments, entry.command_id, run.attempt, timeout)
            try:
                return self._one_run(self._engine_for(task), call, run, timeout)
            except WorkerLost:
                if lost or not task.idempotent or self._stopping:
                    raise
                lost = True
            except (Rejected, Cancelled, TimedOut, EngineUnavailable):
                raise
            except Exception as error:
                failures += 1
                if failures > task.retries or self._stopping:
                    raise
                self._neuron.logger.warning("task %s failed (%s); it is tried again", task.name, error)
                if run.cancelled.wait(jittered(failures, None)):
                    raise Cancelled(run.cancel_reason) from None
            run.attempt += 1

    def _one_run(self, engine: Engine, call: Call, run: Run, timeout: float) -> Any:
        run.changed.clear()
        handle = engine.start(call, run, self._neuron.logger)
        handle.future.add_done_callback(lambda _: run.changed.set())
        deadline = time.monotonic() + timeout
        told = False
        while not handle.future.done():
            if run.cancelled.is_set() and not told:
                told = True
                handle.tell()
                deadline = min(deadline, time.monotonic() + (0.5 if self._stopping else CANCEL_GRACE))
            left = deadline - time.monotonic()
            if left <= 0:
                self._give_up(call, handle.future)
                cancelled = run.cancelled.is_set()
                run.cancelled.set()
                handle.tell()
                handle.kill()
                if cancelled:
                    raise Cancelled(run.cancel_reason)
                raise TimedOut(f"task {call.task} took longer than {timeout:g} s")
            run.changed.wait(left)
            run.changed.clear()
        if run.cancelled.is_set():
            raise Cancelled(run.cancel_reason)
        return handle.future.result()

    def _give_up(self, call: Call, future: Future[Any]) -> None:
        """Its slot is free again; what still runs is watched until it ends."""
        since = time.monotonic()
        self._abandoned[call.command_id] = future

        def ended(_: Future[Any]) -> None:
            self._abandoned.pop(call.command_id, None)
            self._neuron.logger.info(
                "task %s ended %.1f s after it was given up", call.task, time.monotonic() - since,
                extra={"commandId": call.command_id},
            )

        future.add_done_callback(ended)

    # -- outcomes ------------------------------------------------------------------------------------------------

    def _finish(self, entry: Entry, outcome: str, body: dict[str, Any]) -> None:
        self._neuron.logger.info(
            "command %s %s", entry.type, outcome, extra={"commandId": entry.command_id, "outcome": outcome}
        )
        try:
            self._journal.finish(entry, outcome, body)
        except JournalUnavailable:
            # Reported from memory it could be contradicted by the next process, which would find it running.
            with self._guard:
                self._unsaved.append((entry, outcome, body))
        self._deliverable = True

    def _save_unsaved(self) -> None:
        while self._unsaved:
            entry, outcome, body = self._unsaved[0]
            self._journal.finish(entry, outcome, body)
            with self._guard:
                self._unsaved.pop(0)

    def _deliver(self) -> None:
        """Send finished results in the order they finished. What the federation does not take waits."""
        if not self._deliverable:
            return
        self._deliverable = False
        remaining = True
        try:
            remaining = self._send_waiting()
        finally:
            # Never set to False here: a result may have been finished meanwhile.
            if remaining:
                self._deliverable = True

    def _send_waiting(self) -> bool:
        """True: results are left that wait for their next try."""
        settled, remaining = True, False
        while settled and (waiting := self._journal.undelivered(DELIVERIES_IN_ORDER)):
            settled = remaining = False
            for entry in waiting:
                if not _waits(entry) and self._send(entry):
                    settled = True
                    continue
                remaining = True
                if entry.deliveries < DELIVERIES_IN_ORDER:
                    return True
        return remaining

    def _send(self, entry: Entry) -> bool:
        """True: this result is settled, for good or ill."""
        assert entry.result is not None
        try:
            try:
                self._neuron.complete(entry.command_id, entry.result)
            except Refused as error:
                if error.status != 413:
                    raise
                self._neuron.complete(entry.command_id, reports.trimmed(entry.result))
        except Refused as error:
            self._neuron.logger.error(
                "the outcome of command %s is refused for good (%s); set aside", entry.command_id, error
            )
            self._journal.set_aside(entry)
        except (ServerFault, BadAnswer):
            self._put_off(entry)
            return False
        except Unreachable:
            self._stuck.append(entry)
            raise
        else:
            self._journal.delivered(entry)
        return True

    def _put_off(self, entry: Entry) -> None:
        wait = LONGEST_WAIT if entry.deliveries + 1 >= DELIVERIES_IN_ORDER else jittered(entry.deliveries, None)
        self._journal.delivery_failed(entry, wait)
        key = (entry.command_id, entry.digest)
        if key in self._backlog:
            self._backlog[key] = dataclasses.replace(
                entry, deliveries=entry.deliveries + 1, next_delivery=time.time() + wait
            )

    # -- from outside --------------------------------------------------------------------------------------------

    def cancel(self, command_id: str) -> dict[str, Any]:
        """Tell a running command to end. Raises Rejected where none of that id runs."""
        with self._guard:
            run = self._runs.get(command_id)
        if run is None or command_id not in self._slots:
            raise Rejected(f"no command {command_id!r} is running", running=sorted(self._slots))
        run.cancel("cancelled by command")
        return {"cancelling": command_id, "task": run.task}

    def running(self) -> list[dict[str, Any]]:
        """What runs now, as `/status` and the heartbeat show it."""
        with self._guard:
            runs = [run for command_id, run in self._runs.items() if command_id in self._slots]
        return [run.shown() for run in runs]

    def given_up(self) -> int:
        """Tasks past their time limit that have not ended yet."""
        return len(self._abandoned)

    def busy(self) -> bool:
        return bool(self._slots)

    def drain(self, wait: float) -> None:
        """Begin nothing more; let what runs finish within `wait` seconds, then tell it to end."""
        self._stopping_soon(wait)
        self._stopping = True
        with self._guard:
            runs = [run for command_id, run in self._runs.items() if command_id in self._slots]
        for run in runs:
            run.cancel("the neuron stops")
        self._until_idle(time.monotonic() + (1.0 if runs else 0.0))

    def _stopping_soon(self, wait: float) -> None:
        paused, self._neuron.paused = self._neuron.paused, True
        try:
            self._until_idle(time.monotonic() + wait)
        finally:
            self._neuron.paused = paused

    def _until_idle(self, deadline: float) -> None:
        idle = threading.Event()
        while self._slots and time.monotonic() < deadline:
            idle.wait(0.02)

    def deliver_last(self) -> None:
        """The stopping neuron's last deliveries; what is not taken waits in the journal for the next process."""
        if self._looking.acquire(timeout=0.5):
            try:
                self._save_unsaved()
                self._deliver()
            finally:
                self._looking.release()


def task_name(data: Any) -> Any:
    """The task a run_task command names, under `task` or `task_type`."""
    return (data.get("task", data.get("task_type")) if isinstance(data, dict) else None) or ""


def task_params(data: Any) -> Any:
    """Its parameters: under `params`, or whatever else the command holds."""
    if not isinstance(data, dict):
        raise Rejected("run_task wants an object: {\"task\": name, \"params\": {…}}")
    if "params" in data:
        return data["params"]
    return {key: value for key, value in data.items() if key not in ("task", "task_type")}


def _waits(entry: Entry) -> bool:
    """Its next try is not due. A time further off than any wait is of a clock that has gone back since."""
    return 0 < entry.next_delivery - time.time() <= LONGEST_WAIT


def _parsed(command: Any) -> tuple[str, str, Any, int, float | None] | str:
    """`(commandId, commandType, commandData, priority, timeoutAt)`, or why it is no command."""
    if not isinstance(command, dict):
        return "not an object"
    command_id, kind = command.get("commandId"), command.get("commandType")
    if not isinstance(command_id, str) or not re.fullmatch(r"[!-~]{1,100}", command_id):
        return "no usable commandId"
    if not isinstance(kind, str) or not kind:
        return "no commandType"
    priority, data = command.get("priority"), command.get("commandData")
    return (
        command_id,
        kind.encode("utf-8", "replace").decode()[:100],
        TOO_DEEP if deeper_than(data, MAX_DEPTH) else data,
        priority if type(priority) is int and 1 <= priority <= 10 else 5,
        _epoch(command.get("timeoutAt")),
    )


def _epoch(value: Any) -> float | None:
    """An ISO-8601 time as epoch seconds; None where there is none."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _text_of(data: Any) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, dict):
        return "".join(_text_of(key) + _text_of(entry) for key, entry in data.items())
    if isinstance(data, list):
        return "".join(map(_text_of, data))
    return ""


def _restarted(entry: Entry, note: Any) -> tuple[str, dict[str, Any]]:
    """The outcome of a restart, told by the process that came of it."""
    note = note if isinstance(note, dict) and note.get("commandId") == entry.command_id else {}
    result = {"pid": os.getpid(), "previousPid": note.get("pid"), "seconds": None}
    if isinstance(note.get("at"), (int, float)):
        result["seconds"] = round(max(0.0, time.time() - note["at"]), 3)
    return "succeeded", reports.completion("succeeded", result=result)
