"""A neuron inside a host program: its hooks, its threads, forks, and an exit that it never delays."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from neuron_client import APINeuron
from tests.rig.process import ROOT, wait_for
from tests.rig.raw_server import RawServer, silence
from tests.rig.recording import Fault, RecordingFederation

NOWHERE = "http://127.0.0.1:9"


def counted(neuron: APINeuron) -> tuple[int, int]:
    snapshot = neuron.statistics.snapshot()
    return snapshot.total_requests, snapshot.failed_requests


def run_host(tmp_path: Path, code: str, **environ: str) -> subprocess.Popen[str]:
    """A host program of its own, with `make(**settings)` for neurons."""
    script = tmp_path / "host.py"
    script.write_text(
        "import os, sys, threading, time, json\n"
        "from neuron_client import APINeuron, NeuronConfig\n"
        "def make(state='state', **settings):\n"
        f"    state = os.path.join({str(tmp_path)!r}, state)\n"
        "    settings = {'heartbeat_interval': 0.2, 'command_interval': 0.1, 'port': 0, **settings}\n"
        "    return APINeuron(NeuronConfig(state_dir=state, federation_url=os.environ['FEDERATION'], **settings))\n"
        "def wait(predicate):\n"
        "    until = time.monotonic() + 10\n"
        "    while not predicate():\n"
        "        assert time.monotonic() < until, 'not in time'\n"
        "        threading.Event().wait(0.01)\n"
        f"{code}\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    return subprocess.Popen(
        [sys.executable, str(script)], env={**clean, "PYTHONPATH": str(ROOT), **environ}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )


def ended(process: subprocess.Popen[str], timeout: float = 30) -> str:
    """What it printed, once it ended well."""
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    return output


# -- counting


def test_requests_are_counted_exactly_before_during_and_after_the_neurons_life(
    make_neuron: Callable[..., APINeuron],
) -> None:
    neuron = make_neuron(federation_url=NOWHERE)
    for life in ("before", "during", "after"):
        if life == "during":
            assert neuron.start()
        if life == "after":
            neuron.stop()
        before = counted(neuron)

        def serve() -> None:
            for number in range(2000):
                neuron.simple_request(number % 4 != 0, response_time=number % 100)

        hosts = [threading.Thread(target=serve) for _ in range(6)]
        for host in hosts:
            host.start()
        for host in hosts:
            host.join()
        after = counted(neuron)
        assert (after[0] - before[0], after[1] - before[1]) == (12_000, 3_000), life


def test_the_hook_has_two_names_and_both_count(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron()
    neuron.simple_request()
    neuron.simple_request(False, 50)
    neuron.simulate_request(success=True, response_time=100)
    snapshot = neuron.statistics.snapshot()
    assert (snapshot.total_requests, snapshot.failed_requests) == (3, 1)
    assert snapshot.average_response_time == pytest.approx((100 + 50 + 100) / 3)


class Hostile:
    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __float__(self) -> float:
        raise RuntimeError("no number")


STRANGE: list[Any] = [
    None, "", "fast", "12", [], {}, object(), Hostile(), math.nan, math.inf, -math.inf, -1, 10**400, 1e308, b"1", 1j,
]


@pytest.mark.parametrize("value", STRANGE, ids=[type(value).__name__ + str(n) for n, value in enumerate(STRANGE)])
def test_no_hook_raises_whatever_it_is_given(make_neuron: Callable[..., APINeuron], value: Any) -> None:
    neuron = make_neuron(federation_url=NOWHERE, host="")
    assert neuron.start()
    neuron.simple_request(True, value)
    neuron.simple_request(value, 10)
    neuron.metric("figure").add(value)
    neuron.metric("figure").set(value)
    neuron.metric(value).add(1)
    neuron.event("happened", value=value)
    neuron.event(value)
    neuron.simple_request(True, 10)
    assert counted(neuron)[0] in (1, 2, 3), "what is no request may go uncounted; the others may not"
    json.dumps(neuron.status(), allow_nan=False)
    json.dumps(neuron.day_report(), allow_nan=False)
    assert neuron.loops["statistics"].is_alive()
    assert neuron.loops["statistics"].errors == 0


def test_hooks_work_though_the_state_directory_is_gone(make_neuron: Callable[..., APINeuron], tmp_path: Path) -> None:
    neuron = make_neuron(federation_url=NOWHERE)
    assert neuron.start()
    shutil.rmtree((tmp_path / "state").rename(tmp_path / "gone"))
    for _ in range(100):
        neuron.simple_request()
    with neuron.track_request():
        pass
    wait_for(lambda: counted(neuron)[0] == 101, what="the counting")


# -- measuring


def test_a_tracked_block_counts_and_its_exception_goes_on(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron()
    pause = threading.Event()
    with neuron.track_request():
        pause.wait(0.05)
    assert counted(neuron) == (1, 0)
    average = neuron.statistics.snapshot().average_response_time
    assert average is not None
    assert 45 <= average < 2000
    for error in (ValueError("mine"), KeyboardInterrupt(), SystemExit(2)):
        with pytest.raises(type(error)) as caught, neuron.track_request():
            raise error
        assert caught.value is error
    assert counted(neuron) == (4, 3)
    with neuron.track_request(), neuron.track_request():
        pass
    assert counted(neuron) == (6, 3)


def test_an_outgoing_call_counts_itself_and_is_otherwise_plain_requests(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron()
    url = f"{oracle.url}/anything"
    answer = neuron.request("GET", url, headers={"X-Mine": "1"}, params={"q": "x"})
    assert isinstance(answer, requests.Response)
    assert oracle.of("other")[0].headers["X-Mine"] == "1"
    assert counted(neuron) == (1, 0), "a 404 is an answer"
    oracle.script("other", [Fault(500), Fault(204, b""), Fault(None, delay=3)])
    assert neuron.request("POST", url, json={}).status_code == 500
    assert counted(neuron) == (2, 1)
    assert neuron.request("DELETE", url).status_code == 204
    with pytest.raises(requests.Timeout):
        neuron.request("GET", url, timeout=0.2)
    with pytest.raises(requests.ConnectionError):
        neuron.request("GET", NOWHERE)
    with pytest.raises(requests.exceptions.MissingSchema):
        neuron.request("GET", "no-url")
    with pytest.raises(TypeError):
        neuron.request("GET", url, no_such_option=1)
    assert counted(neuron) == (7, 5)


# -- starting and stopping


def test_a_with_statement_starts_and_stops_and_passes_the_hosts_exception(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(federation_url=oracle.url, neuron_id="n-1")

    def serve() -> None:
        with neuron as entered:
            assert entered is neuron
            oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
            neuron.simple_request()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        serve()
    assert oracle.of("heartbeat")[-1].body["status"] == "inactive"
    assert oracle.of("analytics")[-1].body["requestCount"] == 1
    assert not any(loop.is_alive() for loop in neuron.loops.values())


def test_starting_twice_and_stopping_twice_or_before_a_start_is_harmless(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(federation_url=oracle.url)
    neuron.stop()
    assert neuron.start()
    loops = dict(neuron.loops)
    assert neuron.start()
    assert neuron.loops == loops
    wait_for(neuron.registered.is_set, what="the registration")
    neuron.stop()
    neuron.stop()
    beats = len(oracle.of("heartbeat"))
    assert neuron.start(), "and a second life is possible"
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) > beats, what="a heartbeat of the second life")
    assert len(oracle.of("register")) == 1


def test_start_and_stop_do_not_wait_for_a_federation_that_says_nothing(make_neuron: Callable[..., APINeuron]) -> None:
    with RawServer(silence) as silent:
        neuron = make_neuron(federation_url=silent.url, request_timeout=30, shutdown_grace=2)
        began = time.monotonic()
        assert neuron.start()
        assert time.monotonic() - began < 1
        wait_for(lambda: silent.conversations, what="the registration under way")
        began = time.monotonic()
        neuron.stop()
        assert time.monotonic() - began < 3


def test_start_says_no_and_does_not_raise_where_it_cannot(
    make_neuron: Callable[..., APINeuron], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert make_neuron(federation_url=NOWHERE, state_dir=str(tmp_path / "file")).start() is False
    assert make_neuron(federation_url=NOWHERE).start() is True
    second = make_neuron(federation_url=NOWHERE)
    assert second.start() is False, "the directory is the first one's"
    assert sum("did not start" in record.getMessage() for record in caplog.records) == 2
    second.simple_request()
    second.stop()


def test_a_taken_port_costs_an_embedded_neuron_its_endpoints_alone(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        neuron = make_neuron(federation_url=oracle.url, port=taken.getsockname()[1])
        assert neuron.start()
        oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
        assert any("cannot listen" in reason for reason in neuron.health()["reasons"])


def answering(number: int) -> Callable[[], int]:
    return lambda: number


def test_several_neurons_live_in_one_process(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], tmp_path: Path
) -> None:
    neurons = [
        make_neuron(federation_url=oracle.url, neuron_id=f"n-{number}", state_dir=str(tmp_path / f"state-{number}"))
        for number in range(3)
    ]
    for number, neuron in enumerate(neurons):
        neuron.task("who")(answering(number))
        assert neuron.start()
        for _ in range(number + 1):
            neuron.simple_request()
    oracle.wait_until(lambda: len({one.neuron_id for one in oracle.of("heartbeat")}) == 3, what="heartbeats of all")
    for number in range(3):
        oracle.issue(f"n-{number}", "run_task", {"task": "who"})
    oracle.wait_until(lambda: len(oracle.of("complete")) == 3, what="the completions")
    told = {str(one.neuron_id): one.body["response"]["result"] for one in oracle.of("complete")}
    assert told == {"n-0": 0, "n-1": 1, "n-2": 2}
    assert [counted(neuron)[0] for neuron in neurons] == [1, 2, 3]
    assert len({neuron.address() for neuron in neurons}) == 3
    neurons[0].stop()
    beats = len([one for one in oracle.of("heartbeat") if one.neuron_id == "n-1"])
    oracle.wait_until(
        lambda: len([one for one in oracle.of("heartbeat") if one.neuron_id == "n-1"]) > beats + 1,
        what="heartbeats of those that go on",
    )


def test_an_embedded_neuron_has_daemon_threads_alone_and_no_signal_handler(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    before = set(threading.enumerate())
    neuron = make_neuron(federation_url=oracle.url, neuron_id="n-1")
    release = threading.Event()
    neuron.task("wait")(lambda: release.wait(20))
    neuron.dependency("slow")(lambda: release.wait(20))
    assert neuron.start()
    command = oracle.issue("n-1", "run_task", {"task": "wait"})
    try:
        oracle.wait_until(lambda: oracle.of("acknowledge", command), what="the task")
        requests.get(f"{neuron.address()}/health", timeout=5)
        ours = [thread for thread in threading.enumerate() if thread not in before and "neuron" in thread.name]
        assert len(ours) >= 6
        served = [thread for thread in threading.enumerate() if thread not in before and "waitress" in thread.name]
        assert not [thread.name for thread in [*ours, *served] if not thread.daemon]
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    finally:
        release.set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        pytest.param("", id="beating"),
        pytest.param("neuron.task('hang')(lambda: threading.Event().wait(60))\n", id="with a running task"),
        pytest.param("neuron.dependency('hang')(lambda: threading.Event().wait(60))\n", id="with a hanging check"),
    ],
)
def test_an_interpreter_exits_promptly_with_a_running_neuron(
    oracle: RecordingFederation, tmp_path: Path, work: str
) -> None:
    oracle.issue("n-1", "run_task", {"task": "hang"})
    host = run_host(
        tmp_path,
        "neuron = make(neuron_id='n-1')\n" + work + "assert neuron.start()\n"
        "neuron.simple_request()\n"
        "wait(lambda: neuron.registered.is_set())\n"
        "wait(lambda: neuron.journal.counts())\n"
        "print(time.time(), flush=True)\n"
        "sys.exit(0)\n",
        FEDERATION=oracle.url,
    )
    output = ended(host)
    assert time.time() - float(output.strip().splitlines()[-1]) < 3


@pytest.mark.slow
def test_an_interpreter_exits_promptly_while_the_federation_says_nothing(tmp_path: Path) -> None:
    with RawServer(silence) as silent:
        host = run_host(
            tmp_path,
            "neuron = make(request_timeout=60)\nassert neuron.start()\nthreading.Event().wait(0.5)\n"
            "print(time.time(), flush=True)\n",
            FEDERATION=silent.url,
        )
        output = ended(host)
    assert time.time() - float(output.strip().splitlines()[-1]) < 3


# -- forks


@pytest.mark.slow
def test_a_forked_child_does_not_beat_for_its_parent_and_may_start_its_own(
    oracle: RecordingFederation, tmp_path: Path
) -> None:
    host = run_host(
        tmp_path,
        "neuron = make(neuron_id='parent')\n"
        "assert neuron.start()\n"
        "wait(lambda: neuron.registered.is_set())\n"
        "for _ in range(5):\n"
        "    neuron.simple_request()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert threading.active_count() == 1\n"
        "    assert neuron.start() is False, 'the directory is the parent\\'s'\n"
        "    own = make('state-of-child', neuron_id='child')\n"
        "    own.simple_request()\n"
        "    neuron.simple_request()\n"
        "    neuron.stop()\n"
        "    with own:\n"
        "        wait(lambda: own.registered.is_set() and own.uptime() > 1)\n"
        "        assert own.statistics.snapshot().total_requests == 1\n"
        "    os._exit(7)\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert os.waitstatus_to_exitcode(status) == 7\n"
        "beats = neuron._heartbeats\n"
        "wait(lambda: neuron._heartbeats > beats + 1)\n"
        "assert neuron.statistics.snapshot().total_requests == 5\n"
        "neuron.stop()\n"
        "print(os.getpid(), child)\n",
        FEDERATION=oracle.url,
    )
    parent, child = ended(host).split()
    beats = {(one.neuron_id, one.body["processId"]) for one in oracle.of("heartbeat")}
    assert beats == {("parent", parent), ("child", child)}
    assert sorted(str(one.neuron_id) for one in oracle.of("register")) == ["child", "parent"]
    assert oracle.of("analytics")[-1].body["requestCount"] == 5


@pytest.mark.slow
def test_a_child_may_take_over_the_neuron_that_its_parent_never_started(
    oracle: RecordingFederation, tmp_path: Path
) -> None:
    host = run_host(
        tmp_path,
        "neuron = make(neuron_id='n-1')\n"
        "neuron.simple_request()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    with neuron:\n"
        "        wait(lambda: neuron.registered.is_set())\n"
        "        neuron.simple_request()\n"
        "    os._exit(0)\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert status == 0\n"
        "print(child)\n",
        FEDERATION=oracle.url,
    )
    child = ended(host).strip()
    assert {one.body["processId"] for one in oracle.of("heartbeat")} == {child}
    assert oracle.of("analytics")[-1].body["requestCount"] == 1, "what the parent served is not the child's"


@pytest.mark.slow
def test_a_child_does_not_hold_its_parents_port(oracle: RecordingFederation, tmp_path: Path) -> None:
    host = run_host(
        tmp_path,
        "import socket\n"
        "neuron = make()\n"
        "assert neuron.start()\n"
        "port = neuron.endpoints.port\n"
        "client = socket.create_connection(('127.0.0.1', port))\n"
        "client.sendall(b'GET /health/live HTTP/1.1\\r\\nHost: h\\r\\n\\r\\n')\n"
        "answer = b''\n"
        "while b'reasons' not in answer:\n"
        "    answer += client.recv(9999)\n"
        "ours, theirs = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.close(theirs)\n"
        "    client.close()\n"
        "    os.read(ours, 1)\n"
        "    os._exit(0)\n"
        "neuron.stop()\n"
        "client.settimeout(5)\n"
        "assert client.recv(9999) == b''\n"
        "socket.create_server(('127.0.0.1', port)).close()\n"
        "os.close(theirs)\n"
        "os.wait()\n",
        FEDERATION=oracle.url,
    )
    ended(host)
