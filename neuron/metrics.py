"""What the host measures itself: figures and events of its own, bounded, for the analytics report."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from neuron.telemetry import iso_utc

logger = logging.getLogger(__name__)

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
