"""What the neuron can truthfully say about its requests: exact counts of a day, quantiles, the last minutes."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, TypeVar

from neuron.machine import present
from neuron.sketch import QuantileSketch

logger = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 300.0
"""Seconds that "now" reaches back: error rate, requests per minute and health are of these."""
SLOT = 10.0
"""Seconds in one slot of the window."""
PENDING_LIMIT = 100_000
"""Requests that may wait to be folded, about 9 MB; beyond, each caller of `record` folds a chunk itself."""
CHUNK = 4_000
"""Requests folded under one hold of the lock: about 2 ms, the longest a reader or such a caller waits."""
LONGEST_RESPONSE_TIME = 1e9
"""Milliseconds (eleven days). Above it, below zero or no number: a request without a usable response time."""
CLOCK_JUMP_HOLD = 300.0
"""Seconds for which the clock must insist on a leap of more than a day before it is believed."""
CLOSED_DAYS_KEPT = 31


@dataclass(slots=True)
class DayTotals:
    """One UTC day of requests. `day` is "2025-01-31", response times are in ms, `data_processed` in bytes.

    `invalid` counts requests with an unusable argument: they are in the counts, not in the response times.
    """

    day: str
    successful: int = 0
    failed: int = 0
    invalid: int = 0
    data_processed: int = 0
    response_time_sum: float = 0.0
    response_times: QuantileSketch = field(default_factory=QuantileSketch)

    @property
    def total(self) -> int:
        return self.successful + self.failed

    @property
    def error_rate(self) -> float:
        """Share of the day's requests that failed, 0..1."""
        return self.failed / self.total if self.total else 0.0

    @property
    def average_response_time(self) -> float | None:
        return self.response_time_sum / self.response_times.count if self.response_times.count else None

    def merge(self, other: DayTotals) -> None:
        self.successful += other.successful
        self.failed += other.failed
        self.invalid += other.invalid
        self.data_processed += other.data_processed
        self.response_time_sum += other.response_time_sum
        self.response_times.merge(other.response_times)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the journal."""
        return {
            "day": self.day,
            "successful": self.successful,
            "failed": self.failed,
            "invalid": self.invalid,
            "dataProcessed": self.data_processed,
            "responseTimeSum": self.response_time_sum,
            "responseTimes": self.response_times.to_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Any) -> DayTotals:
        """The totals that `to_dict` wrote. Raises ValueError for anything else, naming what is wrong."""
        if not isinstance(plain, dict):
            raise ValueError(f"stored day totals are an object, not {type(plain).__name__}")
        for key in ("successful", "failed", "invalid", "dataProcessed"):
            if type(plain.get(key)) is not int or plain[key] < 0:
                raise ValueError(f"stored day totals have no count in {key!r}: {plain.get(key)!r}")
        time_sum = plain.get("responseTimeSum")
        if not isinstance(time_sum, (int, float)) or not 0 <= time_sum <= sys.float_info.max:
            raise ValueError(f"stored day totals have an impossible responseTimeSum {time_sum!r}")
        try:
            day = date.fromisoformat(plain["day"]).isoformat()
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"stored day totals have no date in 'day': {plain.get('day')!r}") from None
        totals = cls(
            day=day,
            successful=plain["successful"],
            failed=plain["failed"],
            invalid=plain["invalid"],
            data_processed=plain["dataProcessed"],
            response_time_sum=float(time_sum),
            response_times=QuantileSketch.from_dict(plain.get("responseTimes")),
        )
        if totals.response_times.count > totals.total:
            raise ValueError("stored day totals have more response times than requests")
        return totals


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """The open day so far, and the last five minutes. Times in ms; None where nothing was measured."""

    day: str
    total_requests: int = 0
    successful_requests: int = 0
    failed_requests: int = 0
    invalid_requests: int = 0
    data_processed: int = 0
    average_response_time: float | None = None
    p95_response_time: float | None = None
    p99_response_time: float | None = None
    window_requests: int = 0
    window_failed: int = 0
    window_p95_response_time: float | None = None
    error_rate: float = 0.0
    requests_per_minute: float = 0.0


@dataclass(slots=True)
class _Slot:
    number: int
    total: int = 0
    failed: int = 0
    response_times: QuantileSketch = field(default_factory=QuantileSketch)


class RequestStatistics:
    """Counts requests exactly, at the price of one list operation each for the caller.

    `record` only puts the request on a list. Counting happens in `fold`, which every reader calls, and which
    the owner repeats in a thread of its own: `wait_for_work`, wait a second for more, `fold`, and again.

    `now` is the federation's time in UTC epoch seconds and decides the day; `monotonic` decides the window.
    """

    def __init__(
        self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._monotonic = monotonic
        self._begin()

    def _begin(self) -> None:
        # One list for good: appending to it, copying its front and cutting that off are single operations of
        # the interpreter, so nothing falls in between. Were it swapped, a thread might append to the old one.
        self._pending: list[tuple[Any, Any]] = []
        # How many may wait before `record` does more than append: none while the folding thread sleeps.
        self._limit = PENDING_LIMIT
        self._work = threading.Event()
        self._lock = threading.Lock()
        self._open = DayTotals(_utc_day(self._now()))
        self._closed: deque[DayTotals] = deque(maxlen=CLOSED_DAYS_KEPT)
        self._window: deque[_Slot] = deque()
        self._began = self._monotonic()
        self._clock_odd_since: float | None = None

    def record(self, success: bool = True, response_time: float = 100.0) -> None:
        """Note one finished request; `response_time` in milliseconds. Never raises, whatever it is given."""
        self._pending.append((success, response_time))
        if len(self._pending) > self._limit:
            self._hurry()

    def add_data_processed(self, n_bytes: int) -> None:
        """Add to the day's bytes processed. Never raises; what is no count of bytes is logged, not added."""
        if type(n_bytes) is not int or n_bytes < 0:
            logger.warning("ignored %.100r as a number of bytes processed", n_bytes)
            return
        with self._lock:
            self._turn_day()
            self._open.data_processed += n_bytes

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Block until a request is to be folded, or `wake`, or `timeout` seconds passed; True if one is.

        For one thread, the one that folds. Without requests it sleeps through.
        """
        self._work.clear()
        # Lowered before looking at the list, while `record` looks at it after appending: one of them sees.
        self._limit = 0
        if not self._pending:
            self._work.wait(timeout)
        self._limit = PENDING_LIMIT
        return bool(self._pending)

    def wake(self) -> None:
        """End a `wait_for_work` now."""
        self._limit = PENDING_LIMIT
        self._work.set()

    def fold(self) -> int:
        """Count what was recorded up to now; returns how many requests that were."""
        waiting = len(self._pending)
        folded = 0
        while folded < waiting:
            with self._lock:
                taken = self._fold_chunk()
            if not taken:
                break
            folded += taken
        return folded

    def snapshot(self) -> RequestSnapshot:
        self.fold()
        with self._lock:
            self._turn_day()
            day = self._open
            self._forget_old_slots()
            recent = QuantileSketch()
            for slot in self._window:
                recent.merge(slot.response_times)
            total = sum(slot.total for slot in self._window)
            failed = sum(slot.failed for slot in self._window)
            now = self._monotonic()
            # At least a minute: two requests in the first second are not 120 a minute.
            seconds = max(60.0, min(now - self._began, WINDOW - SLOT + now % SLOT))
            return RequestSnapshot(
                day=day.day,
                total_requests=day.total,
                successful_requests=day.successful,
                failed_requests=day.failed,
                invalid_requests=day.invalid,
                data_processed=day.data_processed,
                average_response_time=day.average_response_time,
                p95_response_time=day.response_times.quantile(0.95),
                p99_response_time=day.response_times.quantile(0.99),
                window_requests=total,
                window_failed=failed,
                window_p95_response_time=recent.quantile(0.95),
                error_rate=failed / total if total else 0.0,
                requests_per_minute=total * 60 / seconds,
            )

    def export(self) -> dict[str, Any]:
        """The open day as `DayTotals.to_dict` writes it, for the journal."""
        self.fold()
        with self._lock:
            self._turn_day()
            return self._open.to_dict()

    def restore(self, exported: Any) -> bool:
        """Add what an earlier process exported of this same day; False, with nothing added, for another day.

        Raises ValueError for what is no export.
        """
        totals = DayTotals.from_dict(exported)
        with self._lock:
            self._turn_day()
            if totals.day != self._open.day:
                return False
            self._open.merge(totals)
            return True

    def adopt_day(self) -> None:
        """The clock was corrected: a day without a count becomes the corrected one at once, without the wait."""
        self.fold()
        with self._lock:
            today = _utc_day(self._now())
            if today != self._open.day and not self._open.total and not self._open.data_processed:
                self._open = DayTotals(today)
                self._clock_odd_since = None

    def closed_days(self) -> list[dict[str, Any]]:
        """The final exports of days that ended, oldest first, each until `forget_day` is called for it."""
        self.fold()
        with self._lock:
            self._turn_day()
            return [totals.to_dict() for totals in self._closed]

    def forget_day(self, day: str) -> None:
        with self._lock:
            remaining = [totals for totals in self._closed if totals.day != day]
            self._closed.clear()
            self._closed.extend(remaining)

    def after_fork_in_child(self) -> None:
        """Begin as new, with locks nobody holds: what the parent counted is the parent's to report."""
        self._begin()

    def _hurry(self) -> None:
        if self._limit < PENDING_LIMIT:
            self.wake()
        if len(self._pending) <= PENDING_LIMIT:
            return
        # Not for ever: a signal handler or destructor may record in the very thread that holds the lock.
        if self._lock.acquire(timeout=1.0):
            try:
                self._fold_chunk()
            except Exception:
                logger.exception("could not count up to %d requests", CHUNK)
            finally:
                self._lock.release()

    def _fold_chunk(self) -> int:
        batch = self._pending[:CHUNK]
        del self._pending[: len(batch)]
        if not batch:
            return 0
        total = len(batch)
        successful = invalid = 0
        measured: list[float] = []
        for success, response_time in batch:
            usable = True
            if type(response_time) is float and 0.0 <= response_time <= LONGEST_RESPONSE_TIME:
                measured.append(response_time)
            elif (milliseconds := _milliseconds(response_time)) is not None:
                measured.append(milliseconds)
            else:
                usable = False
            if success is True:
                successful += 1
            elif success is not False:
                truth = _truth(success)
                successful += truth is True
                usable = usable and truth is not None
            invalid += not usable
        times = QuantileSketch()
        times.add_many(measured)
        self._turn_day()
        day = self._open
        day.successful += successful
        day.failed += total - successful
        day.invalid += invalid
        day.response_time_sum += sum(measured)
        day.response_times.merge(times)
        slot = self._current_slot()
        slot.total += total
        slot.failed += total - successful
        slot.response_times.merge(times)
        return total

    def _current_slot(self) -> _Slot:
        number = int(self._monotonic() // SLOT)
        if not self._window or self._window[-1].number < number:
            self._window.append(_Slot(number))
            self._forget_old_slots()
        return self._window[-1]

    def _forget_old_slots(self) -> None:
        oldest = int(self._monotonic() // SLOT) - int(WINDOW // SLOT) + 1
        while self._window and self._window[0].number < oldest:
            self._window.popleft()

    def _turn_day(self) -> None:
        """Close the open day when its midnight has passed. Days only go forward; none begins from zero twice.

        A step back over midnight leaves the day open until the clock is there again. A leap of more than a
        day either way is first taken for a fault that the next answer of the federation corrects; once the
        clock has insisted for five minutes, a leap forward (a machine that slept) closes the day, and a leap
        back (a clock that was wrong before) keeps the counts under the corrected date.
        """
        today = _utc_day(self._now())
        days = (date.fromisoformat(today) - date.fromisoformat(self._open.day)).days
        if days in (-1, 0):
            self._clock_odd_since = None
            return
        if days != 1:
            if self._clock_odd_since is None:
                self._clock_odd_since = self._monotonic()
            if self._monotonic() - self._clock_odd_since < CLOCK_JUMP_HOLD:
                return
        self._clock_odd_since = None
        if days < 0:
            logger.warning("the clock went back to %s: the counts of %s go on there", today, self._open.day)
            self._open.day = today
        else:
            self._closed.append(self._open)
            self._open = DayTotals(today)
        for totals in [totals for totals in self._closed if totals.day == today]:
            self._open.merge(totals)
            self._closed.remove(totals)


def application_metrics(snapshot: RequestSnapshot, running_commands: int) -> dict[str, Any]:
    """The heartbeat's `applicationMetrics`: the day's counts and ms, five minutes' error rate (0..1)."""
    return present(
        total_requests=snapshot.total_requests,
        successful_requests=snapshot.successful_requests,
        failed_requests=snapshot.failed_requests,
        average_response_time=snapshot.average_response_time,
        p95_response_time=snapshot.p95_response_time,
        p99_response_time=snapshot.p99_response_time,
        error_rate=round(snapshot.error_rate, 4),
        requests_per_minute=snapshot.requests_per_minute,
        running_commands=running_commands,
    )


def iso_utc(epoch_seconds: float) -> str:
    """The moment as in 2025-01-31T09:30:00.250Z."""
    moment = datetime.fromtimestamp(epoch_seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _utc_day(epoch_seconds: float) -> str:
    return datetime.fromtimestamp(epoch_seconds, UTC).date().isoformat()


def _milliseconds(value: Any) -> float | None:
    if type(value) is not float:
        if isinstance(value, (bool, str, bytes, bytearray)):
            return None
        try:
            value = float(value)
        except Exception:  # any object of the host's may raise anything here; the caller counts it as invalid
            return None
    return value if 0.0 <= value <= LONGEST_RESPONSE_TIME else None


def _truth(value: Any) -> bool | None:
    try:
        return bool(value)
    except Exception:  # as above
        return None
