"""The loop that repeats a tick: its rate, its wakes, what it survives, and how it ends."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from neuron import periodic
from neuron.periodic import PeriodicThread, join_all, signal_queue
from tests.rig.process import wait_for


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Loops:
    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.lines = Lines()
        logger = logging.Logger("loops")
        logger.addHandler(self.lines)
        self._logger = logging.LoggerAdapter(logger, {})
        self.started: list[PeriodicThread] = []

    def start(
        self, tick: Callable[[], float | None], interval: float = 0.05, *, name: str = "loop", jitter: float = 0.0
    ) -> PeriodicThread:
        loop = PeriodicThread(
            name, tick, lambda: interval, stopping=self.stopping, logger=self._logger, jitter=jitter
        )
        self.started.append(loop)
        loop.start()
        return loop

    def stop(self) -> list[str]:
        self.stopping.set()
        for loop in self.started:
            loop.wake()
        return join_all(self.started, time.monotonic() + 5)


@pytest.fixture
def loops() -> Iterator[Loops]:
    running = Loops()
    yield running
    running.stop()


class Ticks:
    """Notes the time of each tick. Of `answers` a number is returned, an exception raised, a function called."""

    def __init__(self, *answers: Any) -> None:
        self.at: list[float] = []
        self._answers = list(answers)

    def __call__(self) -> float | None:
        self.at.append(time.monotonic())
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer = answer()
        return answer

    def reach(self, count: int, timeout: float = 10) -> list[float]:
        wait_for(lambda: len(self.at) >= count, timeout, f"{count} ticks")
        return list(self.at)


def test_the_first_tick_comes_at_once_and_the_rate_does_not_drift(loops: Loops) -> None:
    pause = threading.Event()
    ticks = Ticks(*[lambda: void(pause.wait(0.07))] * 20)
    began = time.monotonic()
    loops.start(ticks, 0.1)
    times = ticks.reach(11)
    assert times[0] - began < 0.1
    # Ten periods of 0.1 s; the 0.07 s that each tick takes are not added to them.
    assert 0.9 < times[10] - times[0] < 1.4


def void(_: object) -> None:
    """For a tick whose answer is None."""


def test_periods_are_varied_by_a_few_per_cent(loops: Loops) -> None:
    ticks = Ticks()
    loops.start(ticks, 0.05, jitter=0.4)
    times = ticks.reach(15)
    periods = [after - before for before, after in itertools.pairwise(times)]
    assert max(periods) - min(periods) > 0.01


def test_missed_beats_are_skipped_and_never_bunched(loops: Loops) -> None:
    release = threading.Event()
    ticks = Ticks(lambda: void(release.wait(10)))
    loops.start(ticks, 0.05)
    ticks.reach(1)
    wait_for(lambda: time.monotonic() - ticks.at[0] > 0.6, what="twelve missed beats")
    release.set()
    released = time.monotonic()
    times = ticks.reach(5)
    assert times[4] - released > 0.15, "the beats missed came bunched"
    assert all(after - before > 0.03 for before, after in itertools.pairwise(times[1:]))


def test_a_tick_that_raises_is_logged_and_the_loop_goes_on(loops: Loops) -> None:
    ticks = Ticks(ValueError("no luck"), RecursionError(), MemoryError())
    loop = loops.start(ticks, 0.01, name="heartbeat")
    ticks.reach(5)
    wait_for(lambda: loop.last_completed, what="a completed tick")
    assert loop.errors == 3
    assert "heartbeat failed; it goes on" in loops.lines.records[0].getMessage()
    assert loops.lines.records[0].exc_info is not None
    assert loop.is_alive()
    assert not loop.stalled()


def test_a_tick_may_choose_the_time_of_the_next_one(loops: Loops) -> None:
    ticks = Ticks(0.0, 0.0, 0.2)
    loops.start(ticks, 3600)
    times = ticks.reach(4)
    assert times[2] - times[0] < 0.15
    assert times[3] - times[2] >= 0.19


def test_a_wake_ticks_at_once_and_the_rate_is_counted_from_there(loops: Loops) -> None:
    ticks = Ticks()
    loop = loops.start(ticks, 0.4)
    ticks.reach(1)
    woken = time.monotonic()
    loop.wake()
    times = ticks.reach(3)
    assert times[1] - woken < 0.2
    assert 0.35 < times[2] - times[1] < 0.7


def test_a_wake_during_a_tick_is_not_lost(loops: Loops) -> None:
    inside, release = threading.Event(), threading.Event()

    def long() -> None:
        inside.set()
        release.wait(10)

    ticks = Ticks(long)
    loop = loops.start(ticks, 3600)
    assert inside.wait(10)
    loop.wake()
    release.set()
    ticks.reach(2, timeout=2)


def test_a_shorter_interval_holds_from_the_next_wake(loops: Loops) -> None:
    interval = 3600.0
    ticks = Ticks()
    loop = PeriodicThread(
        "loop", ticks, lambda: interval, stopping=loops.stopping, logger=logging.LoggerAdapter(logging.Logger("x"), {})
    )
    loops.started.append(loop)
    loop.start()
    ticks.reach(1)
    interval = 0.02
    loop.wake()
    ticks.reach(6, timeout=5)


def test_a_stop_ends_the_loop_within_milliseconds(loops: Loops) -> None:
    ticks = Ticks()
    loop = loops.start(ticks, 3600)
    ticks.reach(1)
    asked = time.monotonic()
    assert loops.stop() == []
    assert time.monotonic() - asked < 0.5
    assert not loop.is_alive()
    assert len(ticks.at) == 1, "no tick follows a stop"


def test_a_loop_never_keeps_its_process_alive(loops: Loops) -> None:
    assert loops.start(Ticks(), 3600).daemon


def test_a_tick_that_hangs_shows_as_stalled_until_it_returns(loops: Loops, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = 0.0
    clock = time.monotonic
    inside, release = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        release.wait(10)

    ticks = Ticks(hang)
    loop = loops.start(ticks, 0.05)
    assert inside.wait(10)
    assert not loop.stalled()
    monkeypatch.setattr("neuron.periodic.time.monotonic", lambda: clock() + offset)
    offset = 59.0
    assert not loop.stalled(), "a minute is its usual patience"
    offset = 61.0
    assert loop.stalled()
    loop.allow(120)
    assert not loop.stalled(), "a wait that is known and bounded is no stall"
    offset = 300.0
    assert loop.stalled()
    offset = 0.0
    release.set()
    ticks.reach(2)
    wait_for(lambda: not loop.stalled(), what="the end of the stall")


def test_allowing_a_wait_from_another_thread_does_nothing() -> None:
    periodic.allow(60)


def test_joining_names_what_did_not_end_by_the_one_deadline() -> None:
    release = threading.Event()
    stuck = [threading.Thread(target=release.wait, name=f"stuck-{n}", daemon=True) for n in range(3)]
    done = threading.Thread(target=lambda: None, name="done")
    never = threading.Thread(target=lambda: None, name="never-started")
    for thread in (*stuck, done):
        thread.start()
    began = time.monotonic()
    remaining = join_all([*stuck, done, never, threading.current_thread()], time.monotonic() + 0.3)
    assert remaining == ["stuck-0", "stuck-1", "stuck-2"]
    assert 0.25 < time.monotonic() - began < 0.9, "one deadline for all, not one for each"
    release.set()


def test_a_signal_is_put_on_the_queue_and_interrupts_nothing() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        received = signal_queue(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received.get(timeout=5) == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)
