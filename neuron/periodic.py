"""The loop that repeats a tick, written once; joining threads; signals."""

from __future__ import annotations

import logging
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable

PATIENCE = 60.0  # seconds a tick may take, beyond the waits it announces, before it counts as stalled


class PeriodicThread(threading.Thread):
    """A daemon thread that calls `tick` at a fixed rate on the monotonic clock.

    `interval()` gives the seconds between beats and is read anew each time; every period is varied by a few
    per cent so that a fleet spreads. Missed beats are skipped, never bunched. A tick may return the seconds
    until the next one instead. Whatever a tick raises is logged and the loop goes on.
    """

    def __init__(
        self,
        name: str,
        tick: Callable[[], float | None],
        interval: Callable[[], float],
        *,
        stopping: threading.Event,
        logger: logging.LoggerAdapter[logging.Logger],
        jitter: float = 0.05,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._tick = tick
        self._interval = interval
        self._stopping = stopping
        self._logger = logger
        self._jitter = jitter
        self._wake = threading.Event()
        self._busy_until: float | None = None
        self.last_completed: float | None = None
        self.errors = 0

    def wake(self) -> None:
        """Tick now (or notice the stop) instead of at the end of the period."""
        self._wake.set()

    def stalled(self) -> bool:
        """A tick runs for longer than it may; see `allow`."""
        busy_until = self._busy_until
        return busy_until is not None and time.monotonic() > busy_until

    def run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            self._wake.clear()
            chosen = self._once()
            now = time.monotonic()
            period = self._interval() * random.uniform(1 - self._jitter, 1 + self._jitter)
            if chosen is not None:
                due = now + chosen
            else:
                due += period
                if due < now:
                    due = now + period
            # Early for a wake: the rate is counted from the tick that was woken.
            if not self._stopping.is_set() and self._wake.wait(max(0.0, due - now)):
                due = time.monotonic()
            if self._stopping.is_set():
                return

    def _once(self) -> float | None:
        self.allow(0)
        try:
            chosen = self._tick()
        except Exception:
            self.errors += 1
            self._logger.exception("%s failed; it goes on with the next period", self.name)
            return None
        finally:
            self._busy_until = None
        self.last_completed = time.monotonic()
        return chosen

    def allow(self, seconds: float) -> None:
        """The tick under way may take `seconds` more than the usual patience before it counts as stalled."""
        self._busy_until = time.monotonic() + seconds + max(PATIENCE, 2 * self._interval())


def allow(seconds: float) -> None:
    """Called from within a tick before a wait that is known and bounded. Elsewhere it does nothing."""
    thread = threading.current_thread()
    if isinstance(thread, PeriodicThread):
        thread.allow(seconds)


def join_all(threads: Iterable[threading.Thread], deadline: float) -> list[str]:
    """Join all threads by one monotonic deadline. Returns the names of those that did not end."""
    remaining = []
    for thread in threads:
        if thread is threading.current_thread() or thread.ident is None:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            remaining.append(thread.name)
    return remaining


def signal_queue(*numbers: signal.Signals) -> queue.SimpleQueue[int]:
    """Handlers that only put the signal's number here: SimpleQueue.put is safe in a handler, locks are not.

    For a program's main thread; a neuron inside a host installs none.
    """
    received: queue.SimpleQueue[int] = queue.SimpleQueue()

    def handler(number: int, _: object) -> None:
        received.put(number)

    for number in numbers:
        signal.signal(number, handler)
    return received
