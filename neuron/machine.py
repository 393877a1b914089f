"""The machine, or the container where a cgroup limits this process: sampled without ever blocking."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHORTEST_CPU_SPAN = 0.1
"""Seconds. The kernel counts processor time in hundredths: over less than ten of them it says little."""
UNLIMITED = 2**62
"""Bytes. cgroup v1 writes the largest page count of the machine where nothing is limited."""


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
    return present(
        cpu_percent=sample.cpu_percent,
        memory_percent=sample.memory_percent,
        disk_percent=sample.disk_percent,
        memory_used=sample.memory_used,
        memory_available=sample.memory_available,
        load=[round(load, 2) for load in sample.load] if sample.load else None,
        process=present(rss=sample.rss, threads=sample.threads, fds=sample.fds) or None,
    )


def present(**values: Any) -> dict[str, Any]:
    """The values that there are, floats rounded to three places."""
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
    return {name: value for name, value in rounded.items() if value is not None}
