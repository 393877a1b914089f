"""How well the neuron is, why, and since when: the score with its reasons, dependency checks, alerts."""

from __future__ import annotations

import difflib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

from neuron.machine import SystemSample
from neuron.telemetry import RequestSnapshot, iso_utc

logger = logging.getLogger(__name__)

DependencyStatus = Literal["healthy", "degraded", "unhealthy", "unknown"]
HealthStatus = Literal["healthy", "degraded", "unhealthy"]
Level = Literal["warning", "critical"]

MAX_DETAIL = 200
"""Characters of what a check says or raises that are kept."""


@dataclass(frozen=True, slots=True)
class Degraded:
    """What a dependency check returns for something that works, but not well."""

    why: str


def degraded(why: str) -> Degraded:
    return Degraded(why)


@dataclass(frozen=True, slots=True)
class Dependency:
    """Something the neuron needs. `timeout` and `every` (how long an answer is good for) in seconds.

    `check` returns for healthy (a text becomes the detail), returns `degraded("why")`, or raises or returns
    False for unhealthy. Without a check the dependency is only listed. While a critical one is unhealthy, so
    is the neuron.
    """

    name: str
    check: Callable[[], object] | None = None
    critical: bool = True
    timeout: float = 2.0
    every: float = 30.0


@dataclass(frozen=True, slots=True)
class DependencyState:
    """The last answer of a dependency. Times are UTC epoch seconds; `since` is when the status changed."""

    status: DependencyStatus
    critical: bool
    detail: str | None = None
    since: float | None = None
    checked_at: float | None = None
    duration_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the heartbeat's `dependencyStatus` and for `/health`; what is not known is absent."""
        plain = {
            "status": self.status,
            "critical": self.critical,
            "detail": self.detail,
            "since": None if self.since is None else iso_utc(self.since),
            "checkedAt": None if self.checked_at is None else iso_utc(self.checked_at),
            "durationMs": None if self.duration_ms is None else round(self.duration_ms, 1),
        }
        return {name: value for name, value in plain.items() if value is not None}


class _Run:
    """One check under way in a thread of its own."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.done = threading.Event()
        self.overdue = False


class _Entry:
    def __init__(self, dependency: Dependency) -> None:
        self.dependency = dependency
        detail = "not checked yet" if dependency.check else "has no check"
        self.state = DependencyState("unknown", dependency.critical, detail)
        self.settled_at: float | None = None
        self.run: _Run | None = None


class DependencyChecks:
    """Runs the checks when somebody asks and the last answer is too old; between questions nothing runs.

    Each check has a daemon thread of its own, so they run beside each other and a reader waits no longer than
    the longest timeout. One that hangs is unhealthy, keeps its one thread, and is asked again once that
    thread has come back. `now` stamps answers in UTC epoch seconds; `monotonic` measures.
    """

    def __init__(
        self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    def add(self, dependency: Dependency) -> None:
        """Raises ValueError if there is one of that name."""
        with self._lock:
            if dependency.name in self._entries:
                raise ValueError(f"there is a dependency {dependency.name!r} already: use another name")
            self._entries[dependency.name] = _Entry(dependency)

    def check_all(self, max_age: float | None = None) -> dict[str, DependencyState]:
        """Every dependency's state by name, none older than `max_age` seconds (default: its own `every`)."""
        with self._lock:
            running = []
            for entry in self._entries.values():
                if entry.run is None and self._is_stale(entry, max_age):
                    self._begin(entry)
                if entry.run is not None:
                    running.append((entry, entry.run))
        for entry, run in running:
            run.done.wait(max(0.0, run.began + entry.dependency.timeout - self._monotonic()))
        with self._lock:
            for entry, run in running:
                if entry.run is run and not run.overdue:
                    run.overdue = True
                    self._settle(entry, run, "unhealthy", f"no answer within {entry.dependency.timeout:g} s")
            return {name: entry.state for name, entry in self._entries.items()}

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, which do not exist in the child, and a lock one of them may hold."""
        self._lock = threading.Lock()
        for entry in self._entries.values():
            entry.run = None

    def _is_stale(self, entry: _Entry, max_age: float | None) -> bool:
        if entry.dependency.check is None:
            return False
        allowed = entry.dependency.every if max_age is None else max_age
        return entry.settled_at is None or self._monotonic() - entry.settled_at >= allowed

    def _begin(self, entry: _Entry) -> None:
        run = entry.run = _Run(self._monotonic())
        name = f"dependency-{entry.dependency.name}"
        try:
            threading.Thread(target=self._answer, args=(entry, run), name=name, daemon=True).start()
        except RuntimeError as error:  # the process has all the threads it may have, or is ending
            entry.run = None
            self._settle(entry, run, "unknown", f"not checked: {error}")

    def _answer(self, entry: _Entry, run: _Run) -> None:
        status: DependencyStatus = "healthy"
        detail: str | None = None
        try:
            assert entry.dependency.check is not None
            answer = entry.dependency.check()
            if isinstance(answer, Degraded):
                status, detail = "degraded", str(answer.why)
            elif answer is False:
                status, detail = "unhealthy", "the check returned False"
            elif isinstance(answer, str):
                detail = answer
        except BaseException as error:  # SystemExit as well: it ends this thread, and the reader must hear
            status, detail = "unhealthy", f"{type(error).__name__}: {_words(error)}".removesuffix(": ")
        with self._lock:
            if entry.run is run:
                entry.run = None
                if not run.overdue:
                    self._settle(entry, run, status, detail)
        run.done.set()

    def _settle(self, entry: _Entry, run: _Run, status: DependencyStatus, detail: str | None) -> None:
        now = self._now()
        before = entry.state
        changed = before.status != status or before.since is None
        detail = detail[:MAX_DETAIL] if detail else None
        if changed:
            level = logging.INFO if status == "healthy" else logging.WARNING
            logger.log(level, "dependency %s is %s: %s", entry.dependency.name, status, detail or "no detail")
        entry.settled_at = self._monotonic()
        entry.state = DependencyState(
            status=status,
            critical=entry.dependency.critical,
            detail=detail,
            since=now if changed else before.since,
            checked_at=now,
            duration_ms=(entry.settled_at - run.began) * 1000,
        )


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a faulty exception class of the host's
        return "without a readable message"


def parse_dependency(item: Any) -> Dependency:
    """A dependency as the configuration writes it.

    A text is a name that is listed and not checked. Otherwise an object with "name", "type" "tcp" ("host",
    "port") or "http" ("url"), and perhaps "critical", "timeout", "every". Raises ValueError naming everything
    that is wrong.
    """
    if isinstance(item, str):
        item = item.strip()
        if not 0 < len(item) <= 100:
            raise ValueError("a dependency's name has 1 to 100 characters")
        return Dependency(item)
    if not isinstance(item, dict):
        raise ValueError(f"a dependency is a name or an object, not {type(item).__name__}")
    name, kind = item.get("name"), item.get("type")
    host, port, url = item.get("host"), item.get("port"), item.get("url")
    critical = item.get("critical", True)
    faults = []
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        faults.append(f"'name' is a text of 1 to 100 characters, not {name!r:.50}")
    if kind not in ("tcp", "http"):
        faults.append(f"'type' is 'tcp' (with 'host' and 'port') or 'http' (with 'url'), not {kind!r:.50}")
    places = {"tcp": ["host", "port"], "http": ["url"]}.get(str(kind), ["host", "port", "url"])
    faults += _unknown_keys(item, ["name", "type", "critical", "timeout", "every", *places])
    if kind == "tcp" and (not isinstance(host, str) or not host.strip()):
        faults.append(f"'host' is a host name or address, not {host!r:.50}")
    if kind == "tcp" and (type(port) is not int or not 1 <= port <= 65535):
        faults.append(f"'port' is a whole number from 1 to 65535, not {port!r:.50}")
    if kind == "http" and not _is_http_url(url):
        faults.append("'url' is an address such as http://host:port/path")
    if not isinstance(critical, bool):
        faults.append(f"'critical' is true or false, not {critical!r:.50}")
    for key, high in (("timeout", 60), ("every", 86400)):
        if key in item and not (_is_number(item[key]) and 0 < item[key] <= high):
            faults.append(f"{key!r} is a number of seconds above 0 and up to {high}, not {item[key]!r:.50}")
    if faults:
        raise ValueError(f"dependency {name!r:.50}: " + "; ".join(faults))
    timeout, every = float(item.get("timeout", 2.0)), float(item.get("every", 30.0))
    if kind == "tcp":
        check = partial(_check_tcp, str(host), int(str(port)), timeout)
    else:
        check = partial(_check_http, str(url), timeout)
    return Dependency(str(name), check, critical, timeout, every)


def _check_tcp(host: str, port: int, timeout: float) -> object:
    socket.create_connection((host, port), timeout).close()
    return "accepts connections"


def _check_http(url: str, timeout: float) -> object:
    import requests

    # The no-op auth keeps a ~/.netrc from adding credentials; the body is never read, whatever its size.
    # Messages leave the URL out, which may hold a password.
    try:
        with requests.get(
            url, timeout=timeout, allow_redirects=False, stream=True, auth=lambda request: request
        ) as answer:
            status = answer.status_code
    except requests.Timeout:
        raise TimeoutError("no answer in time") from None
    except requests.RequestException as error:
        raise ConnectionError(f"no HTTP answer ({type(error).__name__})") from None
    if not 200 <= status < 400:
        raise ConnectionError(f"answered {status}")
    return f"answered {status}"


def _is_http_url(url: Any) -> bool:
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or parts.scheme not in ("http", "https"):
            return False
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def _unknown_keys(given: Mapping[Any, Any], known: Iterable[str]) -> list[str]:
    known = list(known)
    faults = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            faults.append(f"unknown key {key!r:.50}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return faults


DEFAULT_THRESHOLDS: Mapping[str, float] = {
    "cpu_warning": 85.0,
    "cpu_critical": 97.0,
    "memory_warning": 85.0,
    "memory_critical": 95.0,
    "disk_warning": 85.0,
    "disk_critical": 95.0,
    "error_rate_warning": 5.0,
    "error_rate_critical": 25.0,
}
"""In percent. `response_time_warning` and `response_time_critical` (p95 in ms) count once both are set."""

MINIMUM_REQUESTS = 10
"""Requests in five minutes below which an error rate or p95 says nothing."""

_WEIGHTS = {"cpu": 20, "memory": 30, "disk": 30, "error_rate": 40, "response_time": 20}
_WORDS = {"error_rate": ("five-minute error rate", "%"), "response_time": ("five-minute p95", "ms")}
_DEPENDENCY_POINTS = {"unhealthy": 20, "degraded": 10}
_CRITICAL_DEPENDENCY_POINTS = {"unhealthy": 60, "degraded": 20}
_UNHEALTHY_BELOW = 50


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that counts against the neuron: `points` are taken off the score; `fatal` makes it unhealthy
    at once.

    `metric` names it for alerts: "cpu", "dependency:postgres". `value` and `threshold` are in the threshold's
    unit.
    """

    metric: str
    level: Level
    points: int
    text: str
    value: float | None = None
    threshold: float | None = None
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """`score` is 0..100, 100 the best. The federation stores a 0 as 100, so send at least 1."""

    score: int
    status: HealthStatus
    details: tuple[Reason, ...] = ()

    @property
    def reasons(self) -> list[str]:
        """One sentence each: the figure, the threshold it passed, the points it costs."""
        return [f"{reason.text} (-{reason.points})" for reason in self.details]


def assess(
    sample: SystemSample,
    snapshot: RequestSnapshot,
    dependencies: Mapping[str, DependencyState],
    thresholds: Mapping[str, float],
    extra_reasons: Iterable[Reason] = (),
) -> Health:
    """The neuron's health, from nothing but the arguments; `thresholds` overrides DEFAULT_THRESHOLDS.

    score = 100 - the points of all reasons, at least 0. A metric costs

        0                                              below its warning threshold
        w * (value - warning) / (critical - warning)   from there on, at least 1
        w                                              from its critical threshold on

    with w = 20 for cpu, 30 for memory, 30 for disk, 40 for the five-minute error rate, 20 for the five-minute
    p95. An unhealthy dependency costs 20, a degraded one 10; a critical one 60 and 20; an unknown one
    nothing.

    status is unhealthy below 50, or for a fatal reason, such as a critical dependency that is unhealthy;
    degraded for any other reason; else healthy.
    """
    limits = {**DEFAULT_THRESHOLDS, **thresholds}
    values: dict[str, float | None] = {
        "cpu": sample.cpu_percent,
        "memory": sample.memory_percent,
        "disk": sample.disk_percent,
    }
    if snapshot.window_requests >= MINIMUM_REQUESTS:
        values["error_rate"] = 100 * snapshot.error_rate
        values["response_time"] = snapshot.window_p95_response_time
    reasons = [
        reason
        for metric, value in values.items()
        if value is not None and (reason := _passed(metric, value, limits)) is not None
    ]
    for name, state in dependencies.items():
        points = (_CRITICAL_DEPENDENCY_POINTS if state.critical else _DEPENDENCY_POINTS).get(state.status)
        if points is not None:
            fatal = state.critical and state.status == "unhealthy"
            text = f"{'critical ' if state.critical else ''}dependency {name} is {state.status}"
            text += f": {state.detail}" if state.detail else ""
            level: Level = "critical" if fatal else "warning"
            reasons.append(Reason(f"dependency:{name}", level, points, text, fatal=fatal))
    reasons += extra_reasons
    score = max(0, 100 - sum(reason.points for reason in reasons))
    status: HealthStatus = "degraded" if reasons else "healthy"
    if score < _UNHEALTHY_BELOW or any(reason.fatal for reason in reasons):
        status = "unhealthy"
    return Health(score, status, tuple(reasons))


def _passed(metric: str, value: float, limits: Mapping[str, float]) -> Reason | None:
    warning, critical = limits.get(f"{metric}_warning"), limits.get(f"{metric}_critical")
    if warning is None or critical is None or value < warning:
        return None
    weight = _WEIGHTS[metric]
    share = min(1.0, (value - warning) / (critical - warning))
    level: Level = "critical" if value >= critical else "warning"
    threshold = critical if level == "critical" else warning
    what, unit = _WORDS.get(metric, (metric, "%"))
    text = f"{what} {value:.1f} {unit} has reached the {level} threshold of {threshold:g} {unit}"
    return Reason(metric, level, max(1, round(weight * share)), text, round(value, 1), threshold)


def check_thresholds(thresholds: Any) -> list[str]:
    """What is wrong with a configuration's `alert_thresholds`, a sentence per fault."""
    if not isinstance(thresholds, dict):
        return [f"thresholds are an object, not {type(thresholds).__name__}"]
    known = [f"{metric}_{level}" for metric in _WEIGHTS for level in ("warning", "critical")]
    faults = _unknown_keys(thresholds, known)
    sound: dict[str, float] = dict(DEFAULT_THRESHOLDS)
    for key in known:
        if key not in thresholds:
            continue
        value, high = thresholds[key], math.inf if key.startswith("response_time") else 100
        if _is_number(value) and 0 < value <= high:
            sound[key] = value
        else:
            unit = "milliseconds above 0" if high == math.inf else "per cent above 0 and up to 100"
            faults.append(f"{key!r} is a number of {unit}, not {value!r:.50}")
            sound.pop(key, None)
    for metric in _WEIGHTS:
        warning, critical = f"{metric}_warning", f"{metric}_critical"
        if warning in sound and critical in sound and sound[warning] >= sound[critical]:
            low, top = (_with_origin(key, sound[key], thresholds) for key in (warning, critical))
            faults.append(f"{low} must be below {top}")
    if ("response_time_warning" in thresholds) != ("response_time_critical" in thresholds):
        faults.append("'response_time_warning' and 'response_time_critical' are set together or not at all")
    return faults


def _with_origin(key: str, value: float, thresholds: dict[str, Any]) -> str:
    return f"{key!r} ({value:g}{'' if key in thresholds else ', the default'})"


class Alerts:
    """What is wrong and since when, from one assessment to the next.

    An alert begins with its reason and ends once that has been gone for a minute and a half, so that a figure
    which swings about its threshold is one alert with one beginning. At most 50, the critical and oldest
    first.
    """

    LIMIT = 50
    CALM = 90.0

    def __init__(
        self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._monotonic = monotonic
        self._lock = threading.Lock()
        # Metric: (since, last seen on the monotonic clock, its newest reason).
        self._alerts: dict[str, tuple[float, float, Reason]] = {}

    def update(self, health: Health) -> None:
        now, tick = self._now(), self._monotonic()
        with self._lock:
            for reason in health.details:
                since = self._alerts[reason.metric][0] if reason.metric in self._alerts else now
                self._alerts[reason.metric] = since, tick, reason
            kept = [(metric, alert) for metric, alert in self._alerts.items() if tick - alert[1] < self.CALM]
            kept.sort(key=lambda item: (item[1][2].level != "critical", item[1][0]))
            self._alerts = dict(kept[: self.LIMIT])

    def active(self) -> list[dict[str, Any]]:
        """metric, level, since, message, and value and threshold where the reason has them."""
        with self._lock:
            alerts = list(self._alerts.values())
        plain = [
            {
                "metric": reason.metric,
                "level": reason.level,
                "since": iso_utc(since),
                "message": reason.text,
                "value": reason.value,
                "threshold": reason.threshold,
            }
            for since, _, reason in alerts
        ]
        return [{name: value for name, value in alert.items() if value is not None} for alert in plain]
