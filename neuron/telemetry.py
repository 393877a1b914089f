"""What the neuron can truthfully say about its requests, its machine, and what the host measures itself."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

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
SHORTEST_CPU_SPAN = 0.1
"""Seconds. The kernel counts processor time in hundredths: over less than ten of them it says little."""
UNLIMITED = 2**62
"""Bytes. cgroup v1 writes the largest page count of the machine where nothing is limited."""


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


@dataclass(frozen=True, slots=True)
class SystemSample:
    """One look at the machine, or at the container where a cgroup limits this process. Unreadable is None.

    Percentages are 0..100; memory, rss and network in bytes; `cpu_seconds` of this process; network since the
    sampler began, without loopback.
    """

    cpu_percent: float | None = None
    memory_percent: float | None = None
    memory_used: int | None = None
    memory_available: int | None = None
    disk_percent: float | None = None
    load: tuple[float, float, float] | None = None
    rss: int | None = None
    threads: int | None = None
    fds: int | None = None
    cpu_seconds: float | None = None
    network_bytes_in: int | None = None
    network_bytes_out: int | None = None


class SystemSampler:
    """Samples without ever waiting: processor use is the mean since the previous sample.

    Asked again within a second it repeats its last answer, so that no number of readers makes it work more.
    `disk_path` is the directory whose file system is meant.
    """

    def __init__(
        self,
        disk_path: str | Path,
        cgroup_root: Path = Path("/sys/fs/cgroup"),
        own_cgroups: Path = Path("/proc/self/cgroup"),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disk_path = str(disk_path)
        self._cgroup = _Cgroup(cgroup_root, own_cgroups)
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._traffic = Traffic()
        self._sampled_at: float | None = None
        self._last = SystemSample()
        self._cpu_before = (self._monotonic(), _attempt(self._cpu))
        _attempt(self._network)

    def sample(self) -> SystemSample:
        with self._lock:
            now = self._monotonic()
            if self._sampled_at is None or now - self._sampled_at >= 1.0:
                self._sampled_at = now
                self._last = self._look()
            return self._last

    def _look(self) -> SystemSample:
        import psutil

        used, available, memory_percent = _attempt(self._memory) or (None, None, None)
        disk = _attempt(lambda: float(psutil.disk_usage(self._disk_path).percent))
        process = _attempt(psutil.Process)
        times = _attempt(process.cpu_times) if process else None
        memory = _attempt(process.memory_info) if process else None
        network_in, network_out = _attempt(self._network) or (None, None)
        return SystemSample(
            cpu_percent=self._cpu_percent(),
            memory_percent=memory_percent,
            memory_used=used,
            memory_available=available,
            disk_percent=disk,
            load=_attempt(psutil.getloadavg),
            rss=memory.rss if memory else None,
            threads=_attempt(process.num_threads) if process else None,
            fds=_attempt(lambda: process.num_fds()) if process else None,
            cpu_seconds=times.user + times.system if times else None,
            network_bytes_in=network_in,
            network_bytes_out=network_out,
        )

    def _cpu(self) -> tuple[str, float, float]:
        """Where it was read, processor seconds used so far, and processors available."""
        import psutil

        processors = psutil.cpu_count() or 1
        group = self._cgroup.cpu()
        if group and group[1] < processors:
            return "cgroup", *group
        times = psutil.cpu_times()
        # Linux counts a guest's time in `user` as well, and waiting for a disk is idling.
        idle = sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        return "host", sum(times) - idle, float(processors)

    def _cpu_percent(self) -> float | None:
        before_at, before = self._cpu_before
        now = self._monotonic()
        seconds = now - before_at
        if seconds < SHORTEST_CPU_SPAN:
            return None
        reading = _attempt(self._cpu)
        self._cpu_before = now, reading
        if not before or not reading or before[0] != reading[0] or reading[1] < before[1]:
            return None
        return min(100.0, 100 * (reading[1] - before[1]) / (seconds * reading[2]))

    def _memory(self) -> tuple[int | None, int | None, float | None]:
        import psutil

        host = psutil.virtual_memory()
        group = self._cgroup.memory()
        if group is None or group[1] >= host.total:
            busy = host.total - host.available
            return busy, host.available, 100 * busy / host.total
        used, limit = group
        if used is None:
            return None, None, None
        return used, max(0, limit - used), min(100.0, 100 * used / limit)

    def _network(self) -> tuple[int, int]:
        import psutil

        counters = psutil.net_io_counters(pernic=True, nowrap=False)
        return self._traffic.add({name: (nic.bytes_recv, nic.bytes_sent) for name, nic in counters.items()})


class Traffic:
    """Bytes in and out since the first reading, though interfaces come, go and restart their counters."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}
        self._total = [0, 0]

    def add(self, counters: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """Take a reading of name -> (received, sent); returns the totals (in, out)."""
        for name, reading in counters.items():
            if name in ("lo", "lo0") or name.startswith("Loopback"):
                continue
            before = self._seen.get(name, reading)
            for way in (0, 1):
                step = reading[way] - before[way]
                self._total[way] += step if step >= 0 else reading[way]
            self._seen[name] = reading
        return self._total[0], self._total[1]


class _Cgroup:
    """The limits nearest to this process: its own control group's, or those of a group above. v1 and v2."""

    def __init__(self, root: Path, own_cgroups: Path) -> None:
        self._v2 = (root / "cgroup.controllers").exists()
        self._root = root
        paths: dict[str, str] = {}
        for line in _text(own_cgroups).splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            paths |= dict.fromkeys(controllers.split(","), path)
        if self._v2:
            self._memory_groups = self._cpu_groups = _upwards(root, paths.get("", "/"))
        else:
            self._memory_groups = _upwards(root / "memory", paths.get("memory", "/"))
            self._cpu_groups = _upwards(root / "cpu", paths.get("cpu", "/"))

    def memory(self) -> tuple[int | None, int] | None:
        """(bytes used, limit), without file pages the kernel can drop. None where nothing is limited."""
        limit_file, used_file, inactive = (
            ("memory.max", "memory.current", "inactive_file")
            if self._v2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        for group in self._memory_groups:
            limit = _number(group / limit_file)
            if limit and limit < UNLIMITED:
                used = _number(group / used_file)
                reclaimable = _field(group / "memory.stat", inactive) or 0
                return (None if used is None else max(0, used - reclaimable)), limit
        return None

    def cpu(self) -> tuple[float, float] | None:
        """(processor seconds used so far, processors allowed). None: no limit, or use that cannot be read."""
        for group in self._cpu_groups:
            if self._v2:
                quota, _, period = _text(group / "cpu.max").partition(" ")
                used, unit = _field(group / "cpu.stat", "usage_usec"), 1e6
            else:
                quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
                usage = self._root / "cpuacct" / group.relative_to(self._root / "cpu")
                used, unit = _number(usage / "cpuacct.usage"), 1e9
            if quota.strip().isdigit() and period.strip().isdigit() and int(period):
                return None if used is None else (used / unit, int(quota) / int(period))
        return None


def _upwards(root: Path, own: str) -> list[Path]:
    """The groups from one's own to the root, as far as they can be seen from inside a container."""
    parts = [part for part in own.split("/") if part]
    if ".." in parts:  # the process was moved out of the part of the tree that its namespace shows
        parts = []
    groups = [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [group for group in groups if group.is_dir()]


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:  # a controller that is not there limits nothing
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None


def _attempt(read: Callable[[], T]) -> T | None:
    """What `read` returns, or None where this system does not tell."""
    try:
        return read()
    except Exception as error:  # psutil's, OSError, AttributeError on some systems, an odd /proc
        logger.debug("not measured: %r", error)
        return None


@dataclass(frozen=True, slots=True)
class Averages:
    """Means over a report's window, in percent; None where nothing was measured."""

    cpu_percent: float | None
    memory_percent: float | None
    disk_percent: float | None


class WindowAverages:
    """Means of the samples since the last `take`, in the memory of six numbers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, sample: SystemSample) -> None:
        with self._lock:
            for name in ("cpu_percent", "memory_percent", "disk_percent"):
                value = getattr(sample, name)
                if value is not None:
                    total, count = self._sums.get(name, (0.0, 0))
                    self._sums[name] = total + value, count + 1

    def take(self) -> Averages:
        """The averages so far; the next ones begin."""
        with self._lock:
            sums, self._sums = self._sums, {}
        means = {name: total / count for name, (total, count) in sums.items()}
        return Averages(means.get("cpu_percent"), means.get("memory_percent"), means.get("disk_percent"))


def system_metrics(sample: SystemSample) -> dict[str, Any]:
    """The heartbeat's `systemMetrics`; what was not measured is absent."""
    return _present(
        cpu_percent=sample.cpu_percent,
        memory_percent=sample.memory_percent,
        disk_percent=sample.disk_percent,
        memory_used=sample.memory_used,
        memory_available=sample.memory_available,
        load=[round(load, 2) for load in sample.load] if sample.load else None,
        process=_present(rss=sample.rss, threads=sample.threads, fds=sample.fds) or None,
    )


def application_metrics(snapshot: RequestSnapshot, running_commands: int) -> dict[str, Any]:
    """The heartbeat's `applicationMetrics`: the day's counts and ms, five minutes' error rate (0..1)."""
    return _present(
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


def _present(**values: Any) -> dict[str, Any]:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
    return {name: value for name, value in rounded.items() if value is not None}


MAX_METRICS = 100
MAX_NAME = 100
MAX_EVENTS = 100
MAX_EVENT_CHARACTERS = 400
"""Of one event's data as JSON: a hundred full ones stay near half of the federation's 100 kB body limit."""


class Metric:
    """One figure of the host's own: `add` counts, `set` replaces. Made by `Metrics.metric`."""

    __slots__ = ("_owner", "name", "value")

    def __init__(self, owner: Metrics, name: str) -> None:
        self._owner = owner
        self.name = name
        self.value: float = 0

    def add(self, n: float = 1) -> None:
        """Never raises; what is not a finite number is left out, counted, and warned of once."""
        self._owner.change(self, n, absolute=False)

    def set(self, value: float) -> None:
        """Never raises, as `add`."""
        self._owner.change(self, value, absolute=True)


class Metrics:
    """The host's own figures, at most 100 of them, for the analytics report's `customMetrics`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: dict[str, Metric] = {}
        self.dropped = 0
        """Changes that were not taken: a name too many, or no finite number."""

    def metric(self, name: str) -> Metric:
        """The metric of that name; beyond 100 names, one whose changes are dropped. Never raises."""
        name = _name(name)
        with self._lock:
            metric = self._metrics.get(name)
            if metric is None:
                metric = Metric(self, name)
                if len(self._metrics) < MAX_METRICS:
                    self._metrics[name] = metric
            return metric

    def change(self, metric: Metric, number: float, absolute: bool) -> None:
        with self._lock:
            known = self._metrics.get(metric.name) is metric
            after = _finite_sum(0 if absolute else metric.value, number)
            if known and after is not None:
                metric.value = after
                return
            self.dropped += 1
            if self.dropped > 1:
                return
        why = f"no finite number: a {type(number).__name__}" if known else f"{MAX_METRICS} others exist"
        logger.warning("metric %r was not taken: %s; further ones are only counted", metric.name, why)

    def export(self) -> dict[str, float]:
        """Name -> value, for `customMetrics`."""
        with self._lock:
            return {name: metric.value for name, metric in self._metrics.items()}

    def after_fork_in_child(self) -> None:
        """Replace the lock, which another thread of the parent may have held."""
        self._lock = threading.Lock()


def _finite_sum(value: float, number: Any) -> float | None:
    if isinstance(number, (bool, str, bytes, bytearray)):
        return None
    try:
        total: float = value + (number if isinstance(number, int) else float(number))
    except Exception:  # no number, or one too large for a float; the caller counts it as dropped
        return None
    return total if abs(total) <= 1e300 else None


def _name(name: Any) -> str:
    return name[:MAX_NAME] if isinstance(name, str) else type(name).__name__


class Events:
    """The host's last hundred events, for the analytics report's `events`."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def event(self, name: str, /, **data: Any) -> None:
        """Note that something happened. Never raises; over 400 characters, or no JSON, is cut to a text."""
        entry: dict[str, Any] = {"name": _name(name), "timestamp": iso_utc(self._now())}
        if data:
            try:
                text = json.dumps(data, allow_nan=False, default=str)
                fits = len(text) <= MAX_EVENT_CHARACTERS
                entry["data"] = json.loads(text) if fits else {"cut": text[:MAX_EVENT_CHARACTERS]}
            except Exception as error:  # NaN, a cycle, too deep, or a __str__ of the host's
                entry["data"] = {"cut": f"not JSON: {type(error).__name__}"}
        self._events.append(entry)

    def export(self) -> list[dict[str, Any]]:
        """Oldest first: name, timestamp, and `data` where there was any."""
        return list(self._events)


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
