"""The score has its reasons, dependencies cannot hold anybody up, alerts know since when."""

from __future__ import annotations

import http.server
import json
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron.health import (
    DEFAULT_THRESHOLDS,
    MAX_DETAIL,
    MINIMUM_REQUESTS,
    Alerts,
    Dependency,
    DependencyChecks,
    DependencyState,
    Health,
    Reason,
    assess,
    check_thresholds,
    degraded,
    parse_dependency,
)
from neuron.machine import SystemSample
from neuron.telemetry import RequestSnapshot

QUIET = RequestSnapshot(day="2025-06-01")
CALM = SystemSample(cpu_percent=10.0, memory_percent=40.0, disk_percent=50.0)


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, at: float = 1_748_779_200.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def ticks() -> Clock:
    return Clock(50.0)


@pytest.fixture
def checks(ticks: Clock) -> DependencyChecks:
    return DependencyChecks(now=Clock(), monotonic=ticks)


def failing(failed: int, total: int, p95: float | None = None) -> RequestSnapshot:
    return RequestSnapshot(
        day="2025-06-01",
        window_requests=total,
        window_failed=failed,
        error_rate=failed / total,
        window_p95_response_time=p95,
    )


# Dependency checks


def test_four_words_say_four_different_things(checks: DependencyChecks) -> None:
    def broken() -> None:
        raise ConnectionError("connection refused")

    checks.add(Dependency("fine", lambda: "12 rows"))
    checks.add(Dependency("slow", lambda: degraded("replica lags")))
    checks.add(Dependency("down", broken))
    checks.add(Dependency("false", lambda: False))
    checks.add(Dependency("listed", None))
    states = checks.check_all()
    assert {name: (state.status, state.detail) for name, state in states.items()} == {
        "fine": ("healthy", "12 rows"),
        "slow": ("degraded", "replica lags"),
        "down": ("unhealthy", "ConnectionError: connection refused"),
        "false": ("unhealthy", "the check returned False"),
        "listed": ("unknown", "has no check"),
    }


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), Unreadable(), ValueError("x" * 9999)])
def test_whatever_a_check_raises_is_an_unhealthy_dependency(
    checks: DependencyChecks, error: BaseException
) -> None:
    def check() -> None:
        raise error

    checks.add(Dependency("d", check))
    state = checks.check_all()["d"]
    assert state.status == "unhealthy"
    assert (state.detail or "").startswith(type(error).__name__)
    assert len(state.detail or "") <= MAX_DETAIL


def test_an_answer_is_kept_as_long_as_it_is_good(checks: DependencyChecks, ticks: Clock) -> None:
    calls: list[int] = []
    checks.add(Dependency("d", lambda: calls.append(1), every=30.0))
    for _ in range(5):
        checks.check_all()
    assert len(calls) == 1
    ticks.at += 29.9
    checks.check_all()
    assert len(calls) == 1
    ticks.at += 0.2
    checks.check_all()
    assert len(calls) == 2
    checks.check_all(max_age=0)
    assert len(calls) == 3


def test_checks_run_beside_each_other(checks: DependencyChecks) -> None:
    meeting = threading.Barrier(5)
    for number in range(5):
        checks.add(Dependency(f"d{number}", lambda: meeting.wait(timeout=10) and None, timeout=20))
    assert {state.status for state in checks.check_all().values()} == {"healthy"}


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_check_that_hangs_is_unhealthy_holds_nobody_up_and_keeps_one_thread() -> None:
    checks = DependencyChecks()
    release, calls = threading.Event(), []

    def hang() -> None:
        calls.append(1)
        release.wait(30)

    checks.add(Dependency("stuck", hang, timeout=0.05, every=0.0))
    checks.add(Dependency("fine", lambda: None, every=0.0))
    first = checks.check_all()
    assert (first["stuck"].status, first["stuck"].detail) == ("unhealthy", "no answer within 0.05 s")
    for _ in range(20):
        states = checks.check_all()
        assert (states["stuck"], states["fine"].status) == (first["stuck"], "healthy")
    (thread,) = threads_named("dependency-stuck")
    assert len(calls) == 1
    release.set()
    thread.join(timeout=10)
    assert checks.check_all()["stuck"].status == "healthy"
    assert len(calls) == 2


def test_an_answer_after_the_timeout_comes_too_late(checks: DependencyChecks, ticks: Clock) -> None:
    release = threading.Event()
    checks.add(Dependency("late", lambda: release.wait(30) and None, timeout=0.05, every=30.0))
    assert checks.check_all()["late"].status == "unhealthy"
    (thread,) = threads_named("dependency-late")
    release.set()
    thread.join(timeout=10)
    assert checks.check_all()["late"].status == "unhealthy"
    ticks.at += 31
    assert checks.check_all()["late"].status == "healthy"


def test_readers_at_the_same_time_share_one_check(checks: DependencyChecks) -> None:
    calls: list[int] = []
    began, release = threading.Event(), threading.Event()

    def check() -> None:
        calls.append(1)
        began.set()
        release.wait(30)

    checks.add(Dependency("d", check, timeout=30))
    found: list[str] = []
    readers = [
        threading.Thread(target=lambda: found.append(checks.check_all()["d"].status)) for _ in range(8)
    ]
    for reader in readers:
        reader.start()
    assert began.wait(10)
    release.set()
    for reader in readers:
        reader.join()
    assert (found, len(calls)) == (["healthy"] * 8, 1)


def test_a_state_knows_since_when_and_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    now, ticks = Clock(1_748_779_200.0), Clock(50.0)
    checks = DependencyChecks(now=now, monotonic=ticks)
    up = [True]
    checks.add(Dependency("db", lambda: up[0] or degraded("slow")))
    states = []
    with caplog.at_level(logging.INFO):
        for healthy in (True, True, False, False, True):
            up[0] = healthy
            states.append(checks.check_all(max_age=0)["db"])
            now.at += 60
            ticks.at += 60
    assert [state.since and state.since - 1_748_779_200 for state in states] == [0, 0, 120, 120, 240]
    assert [state.checked_at and state.checked_at - 1_748_779_200 for state in states] == [
        0,
        60,
        120,
        180,
        240,
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert states[2].to_dict() == {
        "status": "degraded",
        "critical": True,
        "detail": "slow",
        "since": "2025-06-01T12:02:00.000Z",
        "checkedAt": "2025-06-01T12:02:00.000Z",
        "durationMs": 0.0,
    }


def test_a_second_dependency_of_one_name_is_refused(checks: DependencyChecks) -> None:
    checks.add(Dependency("db"))
    with pytest.raises(ValueError, match="'db' already"):
        checks.add(Dependency("db"))


def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    checks = DependencyChecks()
    release = threading.Event()
    checks.add(Dependency("d", lambda: release.wait(30) and None, timeout=0.3))
    checks.check_all()
    with checks._lock:
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(10)  # a child that waits for ever would outlive the test
            try:
                checks.after_fork_in_child()
                release.set()
                code = 0 if checks.check_all(max_age=0)["d"].status == "healthy" else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    release.set()
    for thread in threads_named("dependency-d"):
        thread.join(timeout=10)


# Dependencies from the configuration


@pytest.fixture
def http_port() -> Iterator[int]:
    """A server that answers /<code> with that status, and redirects to a place nobody may follow."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:].partition("?")[0]))
            self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def answer_of(item: dict[str, Any]) -> DependencyState:
    checks = DependencyChecks()
    checks.add(parse_dependency({"name": "d", "timeout": 10} | item))
    return checks.check_all()["d"]


@pytest.mark.parametrize(
    ("code", "status"),
    [(200, "healthy"), (204, "healthy"), (302, "healthy"), (404, "unhealthy"), (503, "unhealthy")],
)
def test_an_http_dependency_is_judged_by_its_own_status(http_port: int, code: int, status: str) -> None:
    state = answer_of({"type": "http", "url": f"http://127.0.0.1:{http_port}/{code}"})
    assert state.status == status
    assert str(code) in (state.detail or "")


def test_a_tcp_dependency_is_healthy_while_it_accepts(http_port: int) -> None:
    assert answer_of({"type": "tcp", "host": "127.0.0.1", "port": http_port}).status == "healthy"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = answer_of({"type": "tcp", "host": "127.0.0.1", "port": unused.getsockname()[1]})
    assert refused.status == "unhealthy"
    assert "refused" in (refused.detail or "")


def test_a_password_in_an_address_never_reaches_a_detail(http_port: int) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = unused.getsockname()[1]
        details = [
            answer_of({"type": "http", "url": f"http://user:s3cret@127.0.0.1:{port}/503?token=s3cret"}).detail
            for port in (http_port, refused)
        ]
    assert all(detail and "s3cret" not in detail for detail in details), details


def test_a_bare_name_is_listed_without_a_check() -> None:
    assert parse_dependency(" postgres ") == Dependency("postgres", None)


def test_an_object_sets_every_option() -> None:
    item = {
        "name": "db",
        "type": "tcp",
        "host": "h",
        "port": 5432,
        "critical": False,
        "timeout": 1,
        "every": 5,
    }
    parsed = parse_dependency(item)
    assert (parsed.name, parsed.critical, parsed.timeout, parsed.every) == ("db", False, 1.0, 5.0)


@pytest.mark.parametrize(
    ("item", "faults"),
    [
        ("", ["name"]),
        ("x" * 101, ["name"]),
        (5, ["not int"]),
        ({"name": "db"}, ["'db'", "'type' is 'tcp'", "'http'"]),
        ({"type": "tcp", "host": "", "port": 0}, ["'name'", "'host'", "'port'"]),
        ({"name": "d", "type": "tcp", "host": "h", "port": True}, ["'port'"]),
        ({"name": "d", "type": "http", "url": "ftp://h"}, ["'url'"]),
        ({"name": "d", "type": "http", "url": "http://h:port"}, ["'url'"]),
        ({"name": "d", "type": "http", "url": "http://h", "host": "h"}, ["unknown key 'host'"]),
        (
            {"name": "d", "type": "http", "url": "http://h", "timout": 2},
            ["'timout' (did you mean 'timeout'?)"],
        ),
        ({"name": "d", "type": "http", "url": "http://h", "timeout": 10**400}, ["'timeout'"]),
        (
            {"name": "d", "type": "http", "url": "http://h", "every": math.nan, "critical": 1},
            ["every", "critical"],
        ),
    ],
)
def test_a_faulty_dependency_is_refused_with_every_fault(item: Any, faults: list[str]) -> None:
    with pytest.raises(ValueError, match="dependency") as caught:
        parse_dependency(item)
    assert all(fault in str(caught.value) for fault in faults), caught.value


# The score


def test_without_anything_wrong_the_score_is_a_hundred() -> None:
    assert assess(CALM, QUIET, {}, {}) == Health(100, "healthy")
    assert assess(SystemSample(), QUIET, {}, {}) == Health(100, "healthy")


@pytest.mark.parametrize(
    ("cpu", "score"), [(84.9, 100), (85.0, 99), (88.0, 95), (91.0, 90), (94.0, 85), (97.0, 80), (100.0, 80)]
)
def test_points_grow_in_a_straight_line_from_warning_to_critical(cpu: float, score: int) -> None:
    assert assess(SystemSample(cpu_percent=cpu), QUIET, {}, {}).score == score


def test_a_reason_names_figure_threshold_and_points() -> None:
    health = assess(SystemSample(memory_percent=90.0), QUIET, {}, {})
    assert health.reasons == ["memory 90.0 % has reached the warning threshold of 85 % (-15)"]
    assert (health.score, health.status) == (85, "degraded")


def test_thresholds_are_configurable() -> None:
    thresholds = {"cpu_warning": 10.0, "cpu_critical": 20.0}
    assert assess(SystemSample(cpu_percent=15.0), QUIET, {}, thresholds).score == 90


def test_the_error_rate_counts_once_there_are_enough_requests() -> None:
    assert assess(CALM, failing(MINIMUM_REQUESTS - 1, MINIMUM_REQUESTS - 1), {}, {}).score == 100
    health = assess(CALM, failing(15, 100), {}, {})
    assert health.reasons == ["five-minute error rate 15.0 % has reached the warning threshold of 5 % (-20)"]


def test_slow_answers_count_once_thresholds_for_them_are_set() -> None:
    slow = failing(0, 100, p95=750.0)
    assert assess(CALM, slow, {}, {}).score == 100
    thresholds = {"response_time_warning": 500.0, "response_time_critical": 1000.0}
    assert assess(CALM, slow, {}, thresholds).score == 90


@pytest.mark.parametrize(
    ("status", "critical", "score", "overall"),
    [
        ("healthy", True, 100, "healthy"),
        ("unknown", True, 100, "healthy"),
        ("degraded", False, 90, "degraded"),
        ("unhealthy", False, 80, "degraded"),
        ("degraded", True, 80, "degraded"),
        ("unhealthy", True, 40, "unhealthy"),
    ],
)
def test_a_dependency_weighs_by_its_state_and_whether_it_is_critical(
    status: Any, critical: bool, score: int, overall: str
) -> None:
    health = assess(CALM, QUIET, {"db": DependencyState(status, critical, "why")}, {})
    assert (health.score, health.status) == (score, overall)
    assert all("dependency db" in reason and "why" in reason for reason in health.reasons)


def test_reasons_from_elsewhere_count_and_a_fatal_one_is_unhealthy_whatever_the_score() -> None:
    health = assess(CALM, QUIET, {}, {}, [Reason("journal", "warning", 10, "the journal is read-only")])
    assert (health.score, health.status, health.reasons) == (
        90,
        "degraded",
        ["the journal is read-only (-10)"],
    )
    assert (
        assess(CALM, QUIET, {}, {}, [Reason("loop", "critical", 5, "stalled", fatal=True)]).status
        == "unhealthy"
    )


PERCENT = st.none() | st.floats(0, 100)


@given(PERCENT, PERCENT, PERCENT, st.integers(0, 50), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_the_score_is_a_hundred_less_its_reasons_whatever_the_input(
    cpu: float | None, memory: float | None, disk: float | None, failed: int, down: int
) -> None:
    dependencies = {f"d{n}": DependencyState("unhealthy", critical=n > 6) for n in range(down)}
    health = assess(SystemSample(cpu, memory, disk_percent=disk), failing(failed, 50), dependencies, {})
    assert health.score == max(0, 100 - sum(reason.points for reason in health.details))
    assert all(reason.points >= 1 for reason in health.details)
    assert (health.status == "healthy") == (health.score == 100)


def test_a_figure_that_worsens_never_raises_the_score() -> None:
    scores = [assess(SystemSample(disk_percent=percent / 10), QUIET, {}, {}).score for percent in range(1001)]
    assert scores == sorted(scores, reverse=True)


# Thresholds from the configuration


@pytest.mark.parametrize(
    "thresholds",
    [
        {},
        dict(DEFAULT_THRESHOLDS),
        {"cpu_warning": 50, "cpu_critical": 60.5},
        {"response_time_warning": 800, "response_time_critical": 5000},
    ],
)
def test_sound_thresholds_have_no_faults(thresholds: dict[str, float]) -> None:
    assert check_thresholds(thresholds) == []


@pytest.mark.parametrize(
    ("thresholds", "faults"),
    [
        ([], ["not list"]),
        ({"cpu_warnin": 50}, ["did you mean 'cpu_warning'?"]),
        ({"cpu_warning": 99}, ["'cpu_warning' (99) must be below 'cpu_critical' (97, the default)"]),
        ({"disk_critical": 80.5}, ["'disk_warning' (85, the default) must be below 'disk_critical' (80.5)"]),
        ({"memory_warning": 0, "disk_critical": 101}, ["'memory_warning'", "'disk_critical'"]),
        ({"cpu_warning": True}, ["'cpu_warning'"]),
        ({"cpu_warning": "80"}, ["'cpu_warning'"]),
        ({"cpu_warning": math.nan}, ["'cpu_warning'"]),
        ({"response_time_warning": 10**400}, ["'response_time_warning'", "set together"]),
        ({"response_time_critical": 100}, ["set together"]),
    ],
)
def test_faulty_thresholds_are_all_named(thresholds: Any, faults: list[str]) -> None:
    found = check_thresholds(thresholds)
    assert len(found) == len(faults), found
    assert all(fault in text for fault, text in zip(faults, found, strict=True)), found


# Alerts


@pytest.fixture
def health_of() -> Callable[..., Health]:
    def make(**points: int) -> Health:
        return Health(50, "degraded", tuple(Reason(m, "warning", n, f"{m} bad") for m, n in points.items()))

    return make


def test_an_alert_keeps_its_beginning_through_changes_of_level(ticks: Clock) -> None:
    now = Clock(1_748_779_200.25)
    alerts = Alerts(now=now, monotonic=ticks)
    alerts.update(assess(SystemSample(disk_percent=90.0), QUIET, {}, {}))
    now.at += 60
    ticks.at += 60
    alerts.update(assess(SystemSample(disk_percent=99.0), QUIET, {}, {}))
    assert alerts.active() == [
        {
            "metric": "disk",
            "level": "critical",
            "since": "2025-06-01T12:00:00.250Z",
            "message": "disk 99.0 % has reached the critical threshold of 95 %",
            "value": 99.0,
            "threshold": 95.0,
        }
    ]


def test_a_figure_that_swings_about_its_threshold_is_one_alert(
    ticks: Clock, health_of: Callable[..., Health]
) -> None:
    now = Clock()
    alerts = Alerts(now=now, monotonic=ticks)
    begins = set()
    for second in range(0, 600, 20):
        alerts.update(health_of(cpu=1) if second % 40 == 0 else Health(100, "healthy"))
        begins |= {alert["since"] for alert in alerts.active()}
        now.at += 20
        ticks.at += 20
    assert begins == {"2025-06-01T12:00:00.000Z"}


def test_an_alert_ends_once_its_reason_has_been_gone_for_a_minute_and_a_half(
    ticks: Clock, health_of: Callable[..., Health]
) -> None:
    alerts = Alerts(monotonic=ticks)
    alerts.update(health_of(cpu=1))
    ticks.at += 89
    alerts.update(Health(100, "healthy"))
    assert [alert["metric"] for alert in alerts.active()] == ["cpu"]
    ticks.at += 1
    alerts.update(Health(100, "healthy"))
    assert alerts.active() == []


def test_alerts_are_bounded_and_keep_the_critical_ones(ticks: Clock) -> None:
    alerts = Alerts(monotonic=ticks)
    reasons = [Reason(f"m{n}", "critical" if n >= 95 else "warning", 1, "bad") for n in range(100)]
    alerts.update(Health(0, "unhealthy", tuple(reasons)))
    active = alerts.active()
    assert len(active) == Alerts.LIMIT
    assert [alert["metric"] for alert in active[:5]] == ["m95", "m96", "m97", "m98", "m99"]
    json.dumps(active, allow_nan=False)
