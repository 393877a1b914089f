"""F9 to F12, F17, F18 and the outbox: a federation that cannot be reached, errs, drips, or is overrun."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron.periodic import PeriodicThread
from neuron.transport import Transport, jittered
from neuron_client import APINeuron
from tests.faults import scenarios
from tests.faults.launcher import Launcher
from tests.faults.trials import Trial
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.invariants import log_violations
from tests.rig.process import ROOT, wait_for
from tests.rig.raw_server import RawServer, endless_continue
from tests.rig.recording import Fault, RecordingFederation

KINDS = (
    TcpFault("rst_before"), TcpFault("rst_mid_request"), TcpFault("rst_mid_response"), TcpFault("drop_reply"),
    TcpFault("truncate", after=30), TcpFault("truncate", after=-2),
)
ENDPOINTS = ("/heartbeat", "/pending", "/acknowledge", "/complete", "/analytics")


# -- F9, F10, F11 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", KINDS, ids=lambda fault: f"{fault.kind}{fault.after or ''}")
def test_a_broken_exchange_at_any_endpoint_costs_nothing(fault: TcpFault, launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.script(TcpFault(fault.kind, path, after=fault.after) for path in ENDPOINTS)
            trial.one_of_each_kind()
            trial.start(federation_url=proxy.url, analytics_interval=0.2, heartbeat_interval=0.2)
            trial.until(lambda: proxy.counts[fault.kind] == len(ENDPOINTS) and trial.idle())

        assert trial.violations() == {}


def test_lost_answers_to_acknowledge_and_complete_are_asked_for_again(tmp_path: Path) -> None:
    assert scenarios.replies_lost(ROOT, tmp_path) == []


def test_a_registration_whose_answer_was_lost_is_recovered_from(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path, registered=False) as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.script([TcpFault("drop_reply", "/register")])
            trial.start(federation_url=proxy.url)
            trial.until(lambda: trial.federation.of("heartbeat"), what="a heartbeat")

            assert proxy.counts["drop_reply"] == 1
        assert len(trial.federation.of("register")) == 3  # the lost one, the id that exists, the fresh one


def test_no_call_of_a_running_neuron_outlives_its_deadline(tmp_path: Path) -> None:
    assert scenarios.dripped(ROOT, tmp_path) == []


def test_an_endless_introduction_ends_at_the_deadline_and_the_neuron_serves_on(
    make_neuron: Callable[..., APINeuron],
) -> None:
    with RawServer(endless_continue()) as server:
        neuron = make_neuron(federation_url=server.url, request_timeout=0.5, host="")
        assert neuron.start()
        wait_for(lambda: server.conversations and server.conversations[0].closed, what="the first call's end")

        assert server.conversations[0].seconds_open < 1.5
        assert neuron.live() == (True, [])
        neuron.stop()


# -- F12 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Names are resolved after thirty seconds, or at the end of the test; addresses at once."""
    over = threading.Event()
    asked: Counter[str] = Counter()
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        if host != "federation.test" or options.get("flags"):
            return real(host, *args, **options)
        asked[host] += 1
        over.wait(30)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield asked
    over.set()


def test_a_slow_resolver_holds_up_neither_a_call_nor_the_end(
    slow_resolver: Counter[str], make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(federation_url="http://federation.test:9", request_timeout=0.5, host="")
    assert neuron.start()
    neuron.registered.set()  # so that three loops call at once
    wait_for(lambda: len(neuron.last_call) >= 2, what="calls given up")
    began = time.monotonic()
    neuron.stop()

    assert time.monotonic() - began < 3
    assert all("deadline" in told or "resolve" in told for told in neuron.last_call.values())
    # They wait for one and the same answer: no thread for each attempt.
    assert slow_resolver == {"federation.test": 1}


def test_a_name_that_resolves_late_but_in_time_is_reached(
    oracle: RecordingFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    pause = threading.Event()

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host == "federation.test" and not options.get("flags"):
            pause.wait(0.3)
            host = "127.0.0.1"
        return real(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    transport = Transport(f"http://federation.test:{oracle.port}", user_agent="test")
    answer = transport.call(
        "commands", "GET", "/commands/pending", token=oracle.token("someone"), timeout=5
    )
    transport.close()

    assert answer.data == []


# -- F17, F18: pace ----------------------------------------------------------------------------------------------------


STORMS: dict[str, Callable[[], Fault]] = {
    "500": lambda: Fault(500),
    "503": lambda: Fault(503),
    "503 Retry-After 5": lambda: Fault(503, headers={"Retry-After": "5"}),
    "429 Retry-After 2": lambda: Fault(429, headers={"Retry-After": "2"}),
    "429 Retry-After -5": lambda: Fault(429, headers={"Retry-After": "-5"}),
    "429 Retry-After soon": lambda: Fault(429, headers={"Retry-After": "soon"}),
    "401": lambda: Fault(401),
    "HTML": lambda: Fault(200, "<html>", content_type="text/html"),
}


def asked_twice(trial: Trial) -> bool:
    return len(trial.federation.requests) >= 2


@pytest.mark.slow
def test_a_federation_that_only_errs_is_asked_at_a_moderate_pace(launcher: Launcher, tmp_path: Path) -> None:
    """Eight neurons with the intervals as shipped, each in a storm of its own."""
    with contextlib.ExitStack() as stack:
        trials = {name: stack.enter_context(Trial(launcher, tmp_path)) for name in STORMS}
        for name, trial in trials.items():
            trial.federation.always("*", STORMS[name]())
            trial.start(heartbeat_interval=60, command_interval=5, analytics_interval=300)
        for trial in trials.values():
            trial.federation.wait_until(functools.partial(asked_twice, trial), what="first requests")
        threading.Event().wait(2.5)
        for name, trial in trials.items():
            seen = Counter(one.kind for one in trial.federation.requests)
            print(f"{name}: {dict(seen)}")
            # The beat up to three times with back-off, a look or two for commands, one report, one renewal for a 401.
            assert sum(seen.values()) <= 8, name
            assert trial.child is not None
            assert not log_violations(trial.child.log.read_bytes()), name


def test_an_hours_outage_is_asked_about_ever_more_rarely() -> None:
    """The loops' own arithmetic, over an hour of simulated time: requests a minute once the back-off is at its cap."""
    chance = random.Random(3)
    times: list[float] = []
    for first in (0.0, 1.0, 2.0):  # heartbeat, commands, analytics
        now, flap = first, 0
        while now < 3600:
            times.append(now)
            flap += 1
            now += jittered(flap, None, base=5.0) if first == 1.0 else 60 * chance.uniform(0.95, 1.05)
    late = [at for at in times if at > 600]
    per_minute = Counter(int(at // 60) for at in late)

    assert max(per_minute.values()) <= 15
    assert sum(per_minute.values()) / 50 < 6


def test_fifty_neurons_come_back_from_an_outage_one_by_one() -> None:
    """F18: each has retried with full jitter up to a minute; the federation returns at an arbitrary moment."""
    returns = 1000.0
    arrivals = []
    for _ in range(50):
        now = random.uniform(0, 5)
        for attempt in itertools.count():
            now += jittered(attempt, None)
            if now > returns:
                break
        arrivals.append(now - returns)
    seconds = Counter(int(at) for at in arrivals)

    print(f"50 arrivals over {max(arrivals):.0f} s, at most {max(seconds.values())} in one second")
    assert max(arrivals) > 20
    assert max(seconds.values()) <= 8


def test_fifty_neurons_started_at_once_do_not_register_in_the_same_moment() -> None:
    first = [jittered(0, None, cap=1.0) for _ in range(50)]
    tenths = Counter(int(at * 10) for at in first)

    assert max(tenths.values()) <= 3 * 50 / 10 + 5
    assert max(first) - min(first) > 0.5


# -- outages and the outbox --------------------------------------------------------------------------------------------


def test_results_of_an_outage_go_out_in_order_and_once(tmp_path: Path) -> None:
    assert scenarios.served_late(ROOT, tmp_path) == []


@pytest.mark.slow
def test_an_outage_is_lived_through_with_one_line_and_ended_with_one_heartbeat(
    launcher: Launcher, tmp_path: Path
) -> None:
    with Trial(launcher, tmp_path, analytics="accept") as trial:
        with FaultProxy(trial.federation.port) as proxy:
            child = trial.start(
                federation_url=proxy.url, heartbeat_interval=0.1, analytics_interval=0.1, max_concurrent_tasks=1
            )
            commands = [trial.issue_task("slow", seconds=0.5) for _ in range(2)]
            trial.until(trial.effects, what="a running task")
            proxy.stop()
            child.wait_logged("trying again for as long as it takes")
            child.wait_logged("command run_task succeeded")
            pause = threading.Event()
            pause.wait(2.0)  # twenty heartbeats that nobody hears
            lines = len(child.lines())
            pause.wait(0.5)
            assert len(child.lines()) - lines <= 1
            seen = len(trial.federation.of("heartbeat"))
            proxy.start()
            trial.until(trial.idle, what="the results after the outage")
            returned = trial.federation.of("heartbeat")[seen:]

        assert trial.violations() == {}
        assert [one.command_id for one in trial.federation.transitions if one.new == "completed"] == commands
        # Not queued: the ones after the outage are as far apart as ever.
        # One extra may come with the good news itself.
        gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(returned)]
        assert sum(gap < 0.05 for gap in gaps) <= 1, gaps
        assert trial.federation.analytics_regressions() == []
        assert not log_violations(child.log.read_bytes())


@pytest.mark.slow
def test_a_result_that_never_gets_through_holds_up_neither_work_nor_a_stop(launcher: Launcher, tmp_path: Path) -> None:
    """A proxy in between that resets one certain request, for ever, while all else passes."""
    with Trial(launcher, tmp_path) as trial:
        poisoned = trial.issue_task("effect", 9)
        with FaultProxy(trial.federation.port) as proxy:
            proxy.always(TcpFault("rst_before", f"{poisoned}/complete"))
            trial.start(federation_url=proxy.url)
            trial.until(lambda: proxy.counts["rst_before"] >= 2, what="two tries")
            trial.issue_task("effect", 5)
            trial.until(lambda: len(trial.effects()) == 2, what="the effect of the next")
            trial.issue("stop", priority=1)
            assert trial.child is not None
            assert trial.child.wait() == 0
            assert trial.status(poisoned) == "acknowledged"
            proxy.clear()
            trial.start(federation_url=proxy.url)
            trial.until(trial.idle)

        assert trial.violations() == {}


@pytest.mark.slow
def test_a_process_that_was_stopped_for_a_while_catches_up_with_one_heartbeat(
    launcher: Launcher, tmp_path: Path
) -> None:
    """F24: SIGSTOP for twenty intervals, SIGCONT."""
    with Trial(launcher, tmp_path) as trial:
        child = trial.start(heartbeat_interval=0.1)
        trial.until(lambda: len(trial.federation.of("heartbeat")) > 5)
        child.signal(signal.SIGSTOP)
        before = len(trial.federation.of("heartbeat"))
        pause = threading.Event()
        pause.wait(2.0)
        stopped_until = time.monotonic()
        child.signal(signal.SIGCONT)
        trial.until(lambda: len(trial.federation.of("heartbeat")) > before + 4)
        after = [one.at for one in trial.federation.of("heartbeat")[before:]]

        in_first_interval = [at for at in after if at < stopped_until + 0.09]
        assert len(in_first_interval) <= 2


def test_a_loop_that_was_stopped_ticks_once_and_goes_on_at_its_rate() -> None:
    ticks: list[float] = []
    stopping = threading.Event()
    block = threading.Event()

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            block.wait(1.0)

    loop = PeriodicThread(
        "neuron-test", tick, lambda: 0.1, stopping=stopping, logger=logging.LoggerAdapter(logging.getLogger("t"))
    )
    loop.start()
    wait_for(lambda: len(ticks) >= 6)
    stopping.set()
    loop.wake()
    loop.join(2)

    assert ticks[4] - ticks[3] > 0.05
