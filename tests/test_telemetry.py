"""Requests are counted exactly, quantiles hold their one per cent, and samples mean the container."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron import telemetry
from neuron.machine import SystemSample, SystemSampler, Traffic, WindowAverages, system_metrics
from neuron.metrics import Events, Metrics
from neuron.sketch import ALPHA, MAX_BUCKETS, SMALLEST, QuantileSketch
from neuron.telemetry import (
    CLOCK_JUMP_HOLD,
    CLOSED_DAYS_KEPT,
    PENDING_LIMIT,
    DayTotals,
    RequestSnapshot,
    RequestStatistics,
    application_metrics,
)

JUNE_FIRST = datetime(2025, 6, 1, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0
DAY = 24 * HOUR
TOLERANCE = ALPHA * 1.000001  # the floor of a logarithm may sit one rounding beside the truth


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def wall() -> Clock:
    return Clock(JUNE_FIRST)


@pytest.fixture
def ticks() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def requests(wall: Clock, ticks: Clock) -> RequestStatistics:
    return RequestStatistics(now=wall, monotonic=ticks)


def nearest_rank(values: list[float], q: float) -> float:
    return sorted(values)[max(0, math.ceil(q * len(values) - 1e-9) - 1)]


# The sketch


@given(
    st.lists(st.floats(SMALLEST, 1e300), min_size=1, max_size=300),
    st.sampled_from([0.0, 0.01, 0.5, 0.95, 0.99, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_every_quantile_is_within_one_per_cent_of_the_true_one(values: list[float], q: float) -> None:
    sketch = QuantileSketch()
    for value in values:
        sketch.add(value)
    assert sketch.quantile(q) == pytest.approx(nearest_rank(values, q), rel=TOLERANCE)


@given(st.lists(st.lists(st.floats(0, 1e9), max_size=60), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_merged_sketches_are_the_sketch_of_all_values(parts: list[list[float]]) -> None:
    merged, whole = QuantileSketch(), QuantileSketch()
    for part in parts:
        sketch = QuantileSketch()
        sketch.add_many(part)
        merged.merge(sketch)
        for value in part:
            whole.add(value)
    assert merged.to_dict() == whole.to_dict()
    assert merged.count == sum(len(part) for part in parts)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=100))
@settings(max_examples=100, deadline=None)
def test_a_sketch_survives_json_unchanged(values: list[float]) -> None:
    sketch = QuantileSketch()
    sketch.add_many(values)
    again = QuantileSketch.from_dict(json.loads(json.dumps(sketch.to_dict(), allow_nan=False)))
    assert again.to_dict() == sketch.to_dict()
    assert (again.count, again.quantile(0.9)) == (sketch.count, sketch.quantile(0.9))


def test_many_log_normal_times_have_their_p95_and_p99_within_one_per_cent() -> None:
    pick = random.Random(1)
    values = [pick.lognormvariate(3, 1.5) for _ in range(100_000)]
    sketch = QuantileSketch()
    sketch.add_many(values)
    for q in (0.5, 0.95, 0.99, 0.999):
        assert sketch.quantile(q) == pytest.approx(nearest_rank(values, q), rel=TOLERANCE)


def test_zero_and_below_answer_zero_and_what_is_not_finite_is_only_counted() -> None:
    sketch = QuantileSketch()
    for value in (0.0, -5.0, math.nan, math.inf, -math.inf, 10.0):
        sketch.add(value)
    assert (sketch.count, sketch.ignored) == (3, 3)
    assert (sketch.quantile(0.5), sketch.quantile(1.0)) == (0.0, 10.0)


def test_one_value_repeated_is_answered_exactly() -> None:
    sketch = QuantileSketch()
    sketch.add(123.456, count=1_000_000)
    assert {sketch.quantile(q) for q in (0.0, 0.5, 0.99, 1.0)} == {123.456}


def test_a_share_that_binary_fractions_miss_does_not_ask_for_the_next_value() -> None:
    sketch = QuantileSketch()
    sketch.add_many(range(1, 101))
    assert 0.07 * 100 > 7
    assert sketch.quantile(0.07) == pytest.approx(7, rel=TOLERANCE)


def test_an_empty_sketch_has_no_quantiles_and_a_share_above_one_is_refused() -> None:
    assert QuantileSketch().quantile(0.5) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        QuantileSketch().quantile(95)


def test_beyond_its_buckets_a_sketch_blurs_the_lowest_values_and_keeps_the_highest() -> None:
    sketch = QuantileSketch()
    values = [10 ** (exponent / 20) for exponent in range(-100, 6000)]
    sketch.add_many(values)
    assert len(sketch.to_dict()["buckets"]) == 2 * MAX_BUCKETS
    for value in values:
        sketch.add(value)
    assert len(sketch.to_dict()["buckets"]) == 2 * MAX_BUCKETS
    assert sketch.count == 2 * len(values)
    assert sketch.quantile(0.99) == pytest.approx(nearest_rank(values, 0.99), rel=TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.05},
        {"alpha": None},
        {"zeros": -1},
        {"zeros": True},
        {"ignored": "0"},
        {"buckets": [1]},
        {"buckets": [1, 0]},
        {"buckets": [1, 2, 1, 2]},
        {"buckets": [1.5, 2]},
        {"buckets": {"1": 2}},
        {"buckets": [0, 1] * (MAX_BUCKETS + 1)},
        {"min": None},
        {"min": "1"},
        {"min": 9.0, "max": 1.0},
        {"max": math.nan},
        {"max": 10**400},
    ],
)
def test_a_stored_sketch_that_is_damaged_is_a_value_error(change: dict[str, Any]) -> None:
    sketch = QuantileSketch()
    sketch.add(5.0)
    with pytest.raises(ValueError, match="stored sketch"):
        QuantileSketch.from_dict(sketch.to_dict() | change)


@pytest.mark.parametrize("garbage", [None, [], "sketch", 7, {}])
def test_what_is_no_stored_sketch_is_a_value_error(garbage: Any) -> None:
    with pytest.raises(ValueError, match="stored sketch"):
        QuantileSketch.from_dict(garbage)


# Requests


def test_a_day_counts_successes_failures_and_times(requests: RequestStatistics) -> None:
    for milliseconds in range(1, 101):
        requests.record(milliseconds % 4 != 0, float(milliseconds))
    snapshot = requests.snapshot()
    assert (snapshot.total_requests, snapshot.successful_requests, snapshot.failed_requests) == (100, 75, 25)
    assert snapshot.average_response_time == pytest.approx(50.5)
    assert snapshot.p95_response_time == pytest.approx(95, rel=TOLERANCE)
    assert snapshot.p99_response_time == pytest.approx(99, rel=TOLERANCE)
    assert (snapshot.day, snapshot.error_rate) == ("2025-06-01", 0.25)


def test_without_requests_there_are_no_times_and_no_error_rate(requests: RequestStatistics) -> None:
    assert requests.snapshot() == RequestSnapshot(day="2025-06-01")


class Hostile:
    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def test_no_argument_makes_record_raise_or_a_request_vanish(requests: RequestStatistics) -> None:
    unusable: list[Any] = [
        None,
        "12",
        b"1",
        "x",
        math.nan,
        math.inf,
        -1.0,
        1e10,
        10**400,
        True,
        [],
        Hostile(),
    ]
    for junk in unusable:
        requests.record(True, junk)
    requests.record(Hostile(), 5.0)  # type: ignore[arg-type]
    requests.record(1, 5)  # type: ignore[arg-type]
    requests.record([], 5.0)  # type: ignore[arg-type]
    snapshot = requests.snapshot()
    assert snapshot.successful_requests == len(unusable) + 1
    assert snapshot.failed_requests == 2
    assert snapshot.invalid_requests == len(unusable) + 1
    assert snapshot.average_response_time == 5.0


def test_nothing_is_lost_or_counted_twice_between_eight_recorders_and_three_folders() -> None:
    requests = RequestStatistics()
    each, threads = 20_000, 8
    done = threading.Event()

    def hammer(seed: int) -> None:
        for number in range(each):
            requests.record((number + seed) % 5 != 0, float(number % 50 + 1))

    def fold() -> None:
        while not done.is_set():
            if requests.wait_for_work(0.01):
                requests.fold()

    in_order: list[bool] = []

    def read() -> None:
        readings = [0]
        while not done.is_set():
            readings.append(requests.snapshot().total_requests)
        in_order.append(readings == sorted(readings))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        others = [threading.Thread(target=target) for target in (fold, read, read)]
        hammers = [threading.Thread(target=hammer, args=(seed,)) for seed in range(threads)]
        for thread in others + hammers:
            thread.start()
        for thread in hammers:
            thread.join()
        done.set()
        requests.wake()
        for thread in others:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    snapshot = requests.snapshot()
    assert in_order == [True, True]
    assert snapshot.total_requests == each * threads
    assert snapshot.failed_requests == each * threads // 5
    assert snapshot.average_response_time == pytest.approx(25.5)
    assert snapshot.invalid_requests == 0
    assert DayTotals.from_dict(requests.export()).response_times.count == each * threads


def test_without_a_folding_thread_memory_stays_bounded_and_the_count_exact(
    requests: RequestStatistics,
) -> None:
    for _ in range(PENDING_LIMIT + 20_000):
        requests.record()
    assert len(requests._pending) <= PENDING_LIMIT
    assert requests.snapshot().total_requests == PENDING_LIMIT + 20_000


def test_a_recorder_that_interrupts_the_folding_thread_itself_does_not_hang(
    requests: RequestStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "PENDING_LIMIT", 1)
    requests._limit = 1
    with requests._lock:
        requests.record()
        requests.record()
    assert requests.snapshot().total_requests == 2


def test_the_folding_thread_sleeps_until_the_first_request(requests: RequestStatistics) -> None:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(requests.wait_for_work(timeout=30)))
    thread.start()
    requests.record()
    thread.join(timeout=10)
    assert answers == [True]
    assert requests.fold() == 1
    assert requests.wait_for_work(timeout=0.0) is False


def test_wake_ends_the_wait_of_an_idle_folding_thread(requests: RequestStatistics) -> None:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(requests.wait_for_work(timeout=None)))
    thread.start()
    while requests._limit:  # until it sleeps: a wake before that is for nobody
        thread.join(timeout=0.001)
    requests.wake()
    thread.join(timeout=10)
    assert answers == [False]


def test_the_error_rate_is_of_the_last_five_minutes_and_the_count_of_the_day(
    requests: RequestStatistics, ticks: Clock
) -> None:
    for _ in range(60):
        requests.record(success=False, response_time=500.0)
    requests.fold()
    ticks.at += 301
    for _ in range(30):
        requests.record(success=True, response_time=10.0)
    snapshot = requests.snapshot()
    assert (snapshot.window_requests, snapshot.window_failed, snapshot.error_rate) == (30, 0, 0.0)
    assert snapshot.window_p95_response_time == pytest.approx(10.0, rel=TOLERANCE)
    assert snapshot.p95_response_time == pytest.approx(500.0, rel=TOLERANCE)
    assert (snapshot.total_requests, snapshot.failed_requests) == (90, 60)


def test_requests_leave_the_window_after_five_minutes_and_not_before(
    requests: RequestStatistics, ticks: Clock
) -> None:
    requests.record()
    requests.fold()
    ticks.at += 289
    assert requests.snapshot().window_requests == 1
    ticks.at += 11
    assert requests.snapshot().window_requests == 0
    assert len(requests._window) == 0


def test_the_pace_is_per_minute_of_the_time_that_was_watched(
    requests: RequestStatistics, ticks: Clock
) -> None:
    for _ in range(30):
        requests.record()
    assert requests.snapshot().requests_per_minute == 30
    ticks.at += 120
    assert requests.snapshot().requests_per_minute == 15
    for _ in range(300):
        ticks.at += 1
        requests.record()
        requests.fold()
    assert requests.snapshot().requests_per_minute == pytest.approx(60, rel=0.01)


def test_bytes_processed_add_up_and_junk_among_them_is_logged(
    requests: RequestStatistics, caplog: pytest.LogCaptureFixture
) -> None:
    requests.add_data_processed(1000)
    requests.add_data_processed(24)
    requests.add_data_processed(-5)
    requests.add_data_processed("7")  # type: ignore[arg-type]
    assert requests.snapshot().data_processed == 1024
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


# Days


def test_a_restart_within_the_day_goes_on_where_the_last_process_stopped(wall: Clock) -> None:
    first, second, whole = (RequestStatistics(now=wall) for _ in range(3))
    pick = random.Random(2)
    for number in range(2000):
        succeeded, milliseconds = pick.random() < 0.9, pick.lognormvariate(3, 1)
        (first if number < 1200 else second).record(succeeded, milliseconds)
        whole.record(succeeded, milliseconds)
    first.add_data_processed(10)
    whole.add_data_processed(10)
    assert second.restore(json.loads(json.dumps(first.export(), allow_nan=False)))
    joined, expected = second.export(), whole.export()
    assert joined.pop("responseTimeSum") == pytest.approx(expected.pop("responseTimeSum"))
    assert joined == expected


def test_what_was_stored_of_another_day_is_not_added(requests: RequestStatistics, wall: Clock) -> None:
    requests.record()
    yesterday = requests.export()
    wall.at += DAY
    tomorrow = RequestStatistics(now=wall)
    assert tomorrow.restore(yesterday) is False
    assert tomorrow.snapshot().total_requests == 0


@pytest.mark.parametrize(
    "change",
    [
        {"successful": -1},
        {"failed": 1.0},
        {"failed": None},
        {"invalid": True},
        {"dataProcessed": "1"},
        {"responseTimeSum": math.nan},
        {"responseTimeSum": -1},
        {"responseTimeSum": None},
        {"responseTimeSum": 10**400},
        {"day": "yesterday"},
        {"day": 20250601},
        {"day": None},
        {"responseTimes": {}},
        {"successful": 0},
    ],
)
def test_stored_totals_that_are_damaged_are_a_value_error_and_add_nothing(
    requests: RequestStatistics, change: dict[str, Any]
) -> None:
    requests.record()
    with pytest.raises(ValueError, match="stored"):
        requests.restore(requests.export() | change)
    with pytest.raises(ValueError, match="stored day totals"):
        requests.restore(["garbage"])
    assert requests.snapshot().total_requests == 1


def test_at_midnight_the_day_is_closed_and_kept_until_it_is_forgotten(
    requests: RequestStatistics, wall: Clock
) -> None:
    requests.record(False, 20.0)
    requests.fold()
    wall.at += 12 * HOUR - 0.001
    assert (requests.snapshot().total_requests, requests.closed_days()) == (1, [])
    wall.at += 0.001
    requests.record(True, 10.0)
    snapshot = requests.snapshot()
    assert (snapshot.day, snapshot.total_requests, snapshot.failed_requests) == ("2025-06-02", 1, 0)
    (closed,) = requests.closed_days()
    totals = DayTotals.from_dict(closed)
    assert (totals.day, totals.total, totals.error_rate) == ("2025-06-01", 1, 1.0)
    assert (totals.average_response_time, totals.response_times.quantile(0.99)) == (20.0, 20.0)
    assert requests.closed_days() == [closed]
    requests.forget_day("2025-06-01")
    assert requests.closed_days() == []


def test_a_clock_set_back_over_midnight_neither_reopens_nor_resets_a_day(
    requests: RequestStatistics, wall: Clock, ticks: Clock
) -> None:
    wall.at += 13 * HOUR
    requests.record()
    assert requests.snapshot().day == "2025-06-02"
    requests.forget_day("2025-06-01")
    totals = []
    for step in (-2 * HOUR, -10 * HOUR, 1 * HOUR, 11 * HOUR):
        wall.at += step
        requests.fold()
        ticks.at += CLOCK_JUMP_HOLD
        requests.record()
        totals.append((requests.snapshot().day, requests.snapshot().total_requests))
    assert totals == [("2025-06-02", count) for count in (2, 3, 4, 5)]
    assert requests.closed_days() == []


@pytest.mark.parametrize("leap", [400 * DAY, -400 * DAY])
def test_a_clock_that_leaps_and_is_corrected_costs_the_day_nothing(
    requests: RequestStatistics, wall: Clock, ticks: Clock, leap: float
) -> None:
    requests.record()
    for _ in range(3):
        wall.at += leap
        requests.record()
        requests.fold()
        ticks.at += CLOCK_JUMP_HOLD - 1
        assert requests.snapshot().day == "2025-06-01"
        wall.at -= leap
        requests.record()
        requests.fold()
    assert (requests.snapshot().day, requests.snapshot().total_requests) == ("2025-06-01", 7)
    assert requests.closed_days() == []


def test_a_day_without_a_count_follows_a_corrected_clock_at_once(
    requests: RequestStatistics, wall: Clock
) -> None:
    wall.at += 400 * DAY
    requests.adopt_day()
    requests.record()
    assert (requests.snapshot().day, requests.snapshot().total_requests) == ("2026-07-06", 1)
    wall.at -= 400 * DAY
    requests.adopt_day()
    assert requests.snapshot().day == "2026-07-06", "a day with counts waits until the clock insists"
    assert requests.closed_days() == []


def test_a_leap_forward_that_lasts_closes_the_day(
    requests: RequestStatistics, wall: Clock, ticks: Clock
) -> None:
    requests.record()
    requests.fold()
    wall.at += 3 * DAY
    assert requests.snapshot().day == "2025-06-01"
    ticks.at += CLOCK_JUMP_HOLD
    assert (requests.snapshot().day, requests.snapshot().total_requests) == ("2025-06-04", 0)
    assert [closed["day"] for closed in requests.closed_days()] == ["2025-06-01"]


def test_a_wrong_clock_that_is_corrected_for_good_takes_the_counts_back_to_the_true_day(
    requests: RequestStatistics, wall: Clock, ticks: Clock
) -> None:
    requests.record()
    for leap in (400 * DAY, -400 * DAY):
        wall.at += leap
        requests.snapshot()
        ticks.at += CLOCK_JUMP_HOLD
        requests.record()
        requests.fold()
    snapshot = requests.snapshot()
    assert (snapshot.day, snapshot.total_requests) == ("2025-06-01", 3)
    assert requests.closed_days() == []


def test_days_that_nobody_collects_are_kept_in_bounded_number(
    requests: RequestStatistics, wall: Clock
) -> None:
    for _ in range(CLOSED_DAYS_KEPT + 5):
        requests.snapshot()
        wall.at += DAY
    closed = requests.closed_days()
    assert len(closed) == CLOSED_DAYS_KEPT
    assert [day["day"] for day in closed] == sorted(day["day"] for day in closed)


def test_a_forked_child_begins_as_new_even_if_a_lock_was_held(requests: RequestStatistics) -> None:
    requests.record()
    with requests._lock:
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(10)  # a child that waits for ever would outlive the test
            try:
                requests.after_fork_in_child()
                requests.record()
                code = 0 if requests.snapshot().total_requests == 1 else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert requests.snapshot().total_requests == 1


# The machine


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.fixture
def sampler_of(tmp_path: Path, ticks: Clock) -> Callable[..., SystemSampler]:
    """Makes a sampler that sees the given control group files; `own` is its /proc/self/cgroup."""

    def make(files: dict[str, str], own: str = "0::/\n") -> SystemSampler:
        write(tmp_path / "cgroup", files)
        write(tmp_path, {"own": own})
        return SystemSampler(tmp_path, tmp_path / "cgroup", tmp_path / "own", ticks)

    return make


V2_MEMORY = {
    "cgroup.controllers": "cpu memory\n",
    "memory.max": "200000000\n",
    "memory.current": "120000000\n",
    "memory.stat": "anon 60000000\ninactive_file 20000000\n",
}


def test_under_a_cgroup_v2_limit_memory_is_the_containers(sampler_of: Callable[..., SystemSampler]) -> None:
    sample = sampler_of(V2_MEMORY).sample()
    assert (sample.memory_used, sample.memory_available) == (100_000_000, 100_000_000)
    assert sample.memory_percent == 50.0


def test_under_a_cgroup_v2_quota_cpu_is_the_share_of_the_quota(
    sampler_of: Callable[..., SystemSampler], tmp_path: Path, ticks: Clock
) -> None:
    files = {"cgroup.controllers": "cpu\n", "cpu.max": "50000 100000\n", "cpu.stat": "usage_usec 1000000\n"}
    sampler = sampler_of(files)
    ticks.at += 10
    write(tmp_path / "cgroup", {"cpu.stat": "usage_usec 3500000\nuser_usec 1\n"})
    assert sampler.sample().cpu_percent == pytest.approx(50.0)
    ticks.at += 1
    write(tmp_path / "cgroup", {"cpu.stat": "usage_usec 9500000\n"})
    assert sampler.sample().cpu_percent == 100.0


def test_under_cgroup_v1_limits_memory_and_cpu_are_the_containers(
    sampler_of: Callable[..., SystemSampler], tmp_path: Path, ticks: Clock
) -> None:
    sampler = sampler_of(
        {
            "memory/memory.limit_in_bytes": "100000000\n",
            "memory/memory.usage_in_bytes": "40000000\n",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 10000000\n",
            "cpu/cpu.cfs_quota_us": "10000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "cpuacct/cpuacct.usage": "1000000000\n",
        },
        own="4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n",
    )
    ticks.at += 10
    write(tmp_path / "cgroup", {"cpuacct/cpuacct.usage": "1250000000\n"})
    sample = sampler.sample()
    assert (sample.memory_percent, sample.memory_used) == (30.0, 30_000_000)
    assert sample.cpu_percent == pytest.approx(25.0)


def test_the_nearest_limit_above_the_process_counts(sampler_of: Callable[..., SystemSampler]) -> None:
    service = {f"system.slice/neuron.service/{name}": text for name, text in V2_MEMORY.items()}
    files = service | {
        "cgroup.controllers": "memory\n",
        "system.slice/neuron.service/memory.max": "max\n",
        "system.slice/memory.max": "400000000\n",
        "system.slice/memory.current": "100000000\n",
    }
    sample = sampler_of(files, own="0::/system.slice/neuron.service\n").sample()
    assert (sample.memory_percent, sample.memory_used) == (25.0, 100_000_000)


def test_a_group_that_v1_calls_limited_by_the_largest_number_is_passed_over(
    sampler_of: Callable[..., SystemSampler],
) -> None:
    files = {
        "memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/docker/abc/memory.usage_in_bytes": "1\n",
        "memory/docker/memory.limit_in_bytes": "1000000\n",
        "memory/docker/memory.usage_in_bytes": "600000\n",
    }
    assert sampler_of(files, own="4:memory:/docker/abc\n").sample().memory_percent == 60.0


def test_a_process_outside_of_the_tree_it_sees_reads_nothing_outside(
    sampler_of: Callable[..., SystemSampler], tmp_path: Path
) -> None:
    write(tmp_path / "outside", {"memory.max": "1000\n", "memory.current": "999\n"})
    assert sampler_of(V2_MEMORY, own="0::/../outside\n").sample().memory_percent == 50.0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cgroup.controllers": "memory\n", "memory.max": "max\n", "cpu.max": "max 100000\n"},
        {"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n"},
        {"cgroup.controllers": "memory\n", "memory.max": "garbage\n", "cpu.max": "\n"},
        {"cgroup.controllers": "memory\n", "memory.max": f"{2**50}\n", "memory.current": "1\n"},
    ],
)
def test_without_a_limit_the_figures_are_the_machines(
    sampler_of: Callable[..., SystemSampler], files: dict[str, str]
) -> None:
    sampler = sampler_of(files)
    assert sampler._cpu()[0] == "host"
    sample = sampler.sample()
    assert (sample.memory_used or 0) + (sample.memory_available or 0) == psutil.virtual_memory().total


def test_a_limit_whose_use_cannot_be_read_leaves_the_figure_out(
    sampler_of: Callable[..., SystemSampler],
) -> None:
    sample = sampler_of({"cgroup.controllers": "memory\n", "memory.max": "200000000\n"}).sample()
    assert (sample.memory_percent, sample.memory_used, sample.memory_available) == (None, None, None)
    assert "memory_percent" not in system_metrics(sample)


def test_a_sample_of_this_machine_is_complete_and_json(tmp_path: Path) -> None:
    sampler = SystemSampler(tmp_path)
    sampler._cpu_before = (sampler._cpu_before[0] - 5, ("host", 0.0, 1.0))
    sampler._cgroup._cpu_groups = []
    metrics = system_metrics(sampler.sample())
    assert set(metrics) == {
        "cpu_percent",
        "memory_percent",
        "disk_percent",
        "memory_used",
        "memory_available",
        "load",
        "process",
    }
    assert set(metrics["process"]) == {"rss", "threads", "fds"}
    assert all(0 <= metrics[name] <= 100 for name in ("cpu_percent", "memory_percent", "disk_percent"))
    json.dumps(metrics, allow_nan=False)


def test_what_cannot_be_read_is_absent_and_not_zero(tmp_path: Path) -> None:
    sample = SystemSampler(tmp_path / "missing").sample()
    assert sample.disk_percent is None
    assert sample.rss is not None
    assert system_metrics(SystemSample()) == {}


def test_a_second_look_within_a_second_costs_nothing(
    sampler_of: Callable[..., SystemSampler], ticks: Clock
) -> None:
    sampler = sampler_of({})
    first = sampler.sample()
    ticks.at += 0.9
    assert sampler.sample() is first
    ticks.at += 0.2
    assert sampler.sample() is not first


def test_traffic_adds_up_over_resets_and_interfaces_that_come_and_go() -> None:
    traffic = Traffic()
    assert traffic.add({"lo": (5, 5), "eth0": (1000, 100)}) == (0, 0)
    assert traffic.add({"lo": (9, 9), "eth0": (1500, 150)}) == (500, 50)
    assert traffic.add({"eth0": (200, 20), "eth1": (7000, 7000)}) == (700, 70)
    assert traffic.add({"eth1": (7001, 7000)}) == (701, 70)
    assert traffic.add({"eth0": (300, 20), "eth1": (7001, 7000)}) == (801, 70)


def test_averages_are_of_the_samples_since_they_were_last_taken() -> None:
    averages = WindowAverages()
    averages.add(SystemSample(cpu_percent=10.0, memory_percent=50.0))
    averages.add(SystemSample(cpu_percent=30.0, memory_percent=None))
    taken = averages.take()
    assert (taken.cpu_percent, taken.memory_percent, taken.disk_percent) == (20.0, 50.0, None)
    assert averages.take().cpu_percent is None


def test_application_metrics_leave_out_what_was_not_measured(requests: RequestStatistics) -> None:
    empty = application_metrics(requests.snapshot(), running_commands=2)
    assert empty == {
        "total_requests": 0,
        "successful_requests": 0,
        "failed_requests": 0,
        "error_rate": 0.0,
        "requests_per_minute": 0.0,
        "running_commands": 2,
    }
    requests.record(True, 12.0)
    measured = set(application_metrics(requests.snapshot(), 0)) - set(empty)
    assert measured == {"average_response_time", "p95_response_time", "p99_response_time"}


# The host's own figures


def test_metrics_add_and_set_across_threads_exactly() -> None:
    metrics = Metrics()
    counter = metrics.metric("records_processed")

    def count() -> None:
        for _ in range(5000):
            counter.add(2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics.metric("depth").set(1.5)
    assert metrics.metric("records_processed") is counter
    assert metrics.export() == {"records_processed": 40_000, "depth": 1.5}


def test_beyond_a_hundred_names_metrics_are_dropped_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    for number in range(103):
        metrics.metric(f"m{number}").add()
    assert len(metrics.export()) == 100
    assert metrics.dropped == 3
    assert len(caplog.records) == 1


@pytest.mark.parametrize("junk", [None, "7", math.nan, math.inf, 10**400, True, [], Hostile()])
def test_junk_in_a_metric_changes_nothing_and_raises_nothing(junk: Any) -> None:
    metrics = Metrics()
    metrics.metric("m").set(2.5)
    metrics.metric("m").add(junk)
    metrics.metric("m").set(junk)
    assert (metrics.export(), metrics.dropped) == ({"m": 2.5}, 2)
    assert metrics.metric(junk).name


def test_events_keep_the_last_hundred_with_their_time(wall: Clock) -> None:
    events = Events(now=wall)
    for number in range(150):
        events.event("batch_completed", batchId=number, name="a data key may be called name")
    kept = events.export()
    assert [event["data"]["batchId"] for event in kept] == list(range(50, 150))
    assert kept[0]["timestamp"] == "2025-06-01T12:00:00.000Z"
    assert kept[0]["name"] == "batch_completed"


def test_an_event_is_bounded_and_always_json(wall: Clock) -> None:
    events = Events(now=wall)
    circle: list[Any] = []
    circle.append(circle)
    for junk in (
        "x" * 10_000,
        math.nan,
        circle,
        Hostile(),
        datetime(2025, 1, 1, tzinfo=UTC),
        b"bytes",
        "\ud800",
    ):
        events.event("n" * 1000, value=junk)
    text = json.dumps(events.export(), allow_nan=False)
    assert len(text) < 7 * 1000
    assert events.export()[4]["data"] == {"value": "2025-01-01 00:00:00+00:00"}
