"""A neuron beside a host's own work: in one process, under gunicorn's workers, over forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from local_federation.testing import Federation
from neuron_client import APINeuron, NeuronConfig
from tests.rig.process import ROOT, wait_for

GUNICORN = """
import os
import sys

from flask import Flask

from neuron_client import APINeuron, NeuronConfig

app = Flask(__name__)
neuron = APINeuron(NeuronConfig(
    federation_url=sys.argv[-1], state_dir={state_dir!r}, host="", name="shop", heartbeat_interval=0.2,
    command_interval=0.1,
))


@neuron.task("who")
def who() -> int:
    return os.getpid()


@app.after_request
def report(response):
    neuron.simple_request(response.status_code < 500, 1.0)
    return response


@app.get("/")
def index():
    return {{"pid": os.getpid()}}
"""

HOOKS = """
def post_worker_init(worker):
    from service import neuron
    neuron.start()


def worker_exit(server, worker):
    from service import neuron
    neuron.stop()
"""


class Gunicorn:
    """Two workers of the service above; `state_dir` is Python, evaluated in each."""

    def __init__(self, directory: Path, federation: Federation, *arguments: str, hooks: str = HOOKS) -> None:
        (directory / "service.py").write_text(GUNICORN.format(state_dir=str(directory / "state")))
        (directory / "gunicorn.conf.py").write_text(hooks)
        self.log = directory / "gunicorn.log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", "127.0.0.1:0", *arguments,
                    "service:app", federation.url,
                ],
                cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=stream, stderr=subprocess.STDOUT,
            )
        self.address = wait_for(self._address, 15, "gunicorn")

    def _address(self) -> str:
        _, found, rest = self.log.read_text().partition("Listening at: ")
        return rest.split()[0] if found and "\n" in rest else ""

    def workers(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.process.pid).children()}

    def stop(self) -> None:
        self.process.terminate()
        try:
            assert self.process.wait(15) == 0, self.log.read_text()
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def gunicorn(tmp_path: Path, federation: Federation) -> Iterator[Callable[..., Gunicorn]]:
    started: list[Gunicorn] = []

    def start(*arguments: str, **options: Any) -> Gunicorn:
        started.append(Gunicorn(tmp_path, federation, *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def beating_pid(federation: Federation, neuron_id: str) -> int:
    return int(federation.heartbeats(neuron_id)[-1]["processId"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--preload",)], ids=["as it comes", "--preload"])
def test_of_two_workers_with_one_state_directory_one_is_the_neuron_and_the_next_takes_over_when_it_dies(
    arguments: tuple[str, ...], gunicorn: Callable[..., Gunicorn], federation: Federation
) -> None:
    server = gunicorn(*arguments)
    neuron_id = federation.wait_for_neuron(timeout=20)
    first = beating_pid(federation, neuron_id)
    wait_for(lambda: len(server.workers()) == 2, 10, "two workers")
    assert first in server.workers()
    # Both serve; only one beats, and it is the one that runs commands.
    assert {requests.get(server.address, timeout=5).json()["pid"] for _ in range(20)} <= server.workers()
    command = federation.issue(neuron_id, "run_task", {"task": "who", "params": {}})
    assert federation.outcome(command)["response"]["result"] == first
    assert {beat["processId"] for beat in federation.heartbeats(neuron_id)} == {str(first)}

    os.kill(first, signal.SIGKILL)
    # gunicorn starts another worker, which finds the directory free: the same neuron, another process.
    wait_for(lambda: beating_pid(federation, neuron_id) != first, 20, "the next worker's heartbeat")
    assert beating_pid(federation, neuron_id) in server.workers()
    assert len(federation.store.neurons()) == 1


@pytest.mark.slow
def test_started_before_the_fork_it_beats_from_the_master_alone(
    gunicorn: Callable[..., Gunicorn], federation: Federation
) -> None:
    hooks = "def when_ready(server):\n    from service import neuron\n    neuron.start()\n"
    server = gunicorn("--preload", hooks=hooks)
    neuron_id = federation.wait_for_neuron(timeout=20)
    wait_for(lambda: len(server.workers()) == 2, 10, "two workers")
    for _ in range(10):
        requests.get(server.address, timeout=5)
    seen = len(federation.heartbeats(neuron_id))
    wait_for(lambda: len(federation.heartbeats(neuron_id)) > seen + 5, 10, "more heartbeats")
    assert {beat["processId"] for beat in federation.heartbeats(neuron_id)} == {str(server.process.pid)}


def test_a_forked_copy_does_not_beat_for_its_parent_and_may_become_a_neuron_of_its_own(
    federation: Federation, tmp_path: Path
) -> None:
    program = f"""
import dataclasses, os, sys
from neuron_client import APINeuron, NeuronConfig
from tests.rig.process import wait_for

config = NeuronConfig(
    federation_url={federation.url!r}, neuron_id="parent", state_dir="parent", host="", heartbeat_interval=0.1,
)
neuron = APINeuron(config)
assert neuron.start()
wait_for(neuron.registered.is_set)
if (pid := os.fork()) == 0:
    # The hooks stay harmless, the copy's directory is taken, and a copy that did not start has nothing to stop.
    neuron.simple_request(True, 1.0)
    neuron.metric("m").add(1)
    assert neuron.live() == (True, [])
    assert not neuron.start()
    neuron.stop()
    with APINeuron(dataclasses.replace(config, neuron_id="child", state_dir="child")) as own:
        wait_for(own.registered.is_set)
        own.send_heartbeat()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
neuron.send_heartbeat()
neuron.stop()
print(os.getpid(), pid)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    parent, child = done.stdout.split()
    assert {beat["processId"] for beat in federation.heartbeats("parent")} == {parent}
    assert {beat["processId"] for beat in federation.heartbeats("child")} == {child}
    assert federation.heartbeats("parent")[-1]["status"] == "inactive"


def test_with_a_neuron_that_registers_serves_and_says_goodbye(federation: Federation, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    before = set(threading.enumerate())
    with APINeuron(config(federation, tmp_path / "state")) as neuron:
        neuron_id = federation.wait_for_neuron()
        with neuron.track_request():
            pass
        assert requests.get(f"{neuron.address()}/health", timeout=5).status_code == 200
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    assert federation.heartbeats(neuron_id)[-1]["status"] == "inactive"
    assert federation.heartbeats(neuron_id)[-1]["applicationMetrics"]["total_requests"] == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def config(federation: Federation, state_dir: Path, **settings: Any) -> NeuronConfig:
    defaults = {"heartbeat_interval": 0.2, "command_interval": 0.1, "port": 0, "shutdown_grace": 2}
    return NeuronConfig(**{**defaults, **settings}, federation_url=federation.url, state_dir=str(state_dir))


def test_an_exception_in_the_block_ends_the_neuron_and_goes_on(federation: Federation, tmp_path: Path) -> None:
    def work() -> None:
        with APINeuron(config(federation, tmp_path / "state")):
            federation.wait_for_neuron()
            raise KeyError("the host's own")

    with pytest.raises(KeyError, match="the host's own"):
        work()


def test_several_neurons_of_one_process_keep_to_themselves(federation: Federation, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    neurons = {
        name: APINeuron(config(federation, tmp_path / name, name=name, neuron_id=f"neuron-{name}")) for name in names
    }
    for name, neuron in neurons.items():
        neuron.task("who")(lambda name=name: name)
        assert neuron.start()
    try:
        for name in names:
            federation.wait_for_neuron(f"neuron-{name}")
        commands = {name: federation.issue(f"neuron-{name}", "run_task", {"task": "who"}) for name in names}
        assert {name: federation.outcome(commands[name])["response"]["result"] for name in names} == {
            name: name for name in names
        }
        neurons["a"].simple_request(False, 5.0)
        neurons["a"].logger.warning("only a's")
        assert neurons["a"].status()["requests"]["failed_requests"] == 1
        assert neurons["b"].status()["requests"]["failed_requests"] == 0
        assert any("only a's" in line for line in neurons["a"].status()["log"]["warnings"])
        assert not any("only a's" in line for line in neurons["b"].status()["log"]["warnings"])
        assert len({neuron.address() for neuron in neurons.values()}) == 3
        neurons["b"].stop()
        seen = len(federation.heartbeats("neuron-c"))
        wait_for(lambda: len(federation.heartbeats("neuron-c")) > seen + 1, 10, "c's next heartbeats")
        assert federation.heartbeats("neuron-b")[-1]["status"] == "inactive"
    finally:
        for neuron in neurons.values():
            neuron.stop()


def test_a_second_neuron_on_the_same_directory_does_not_start_and_says_why(
    federation: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with APINeuron(config(federation, tmp_path / "state")):
        federation.wait_for_neuron()
        second = APINeuron(config(federation, tmp_path / "state"))
        assert not second.start()
        assert "did not start" in caplog.text
        second.simple_request(True, 1.0)
        second.stop()
    assert len(federation.store.neurons()) == 1


def test_a_host_may_start_its_neuron_again_after_a_stop(federation: Federation, tmp_path: Path) -> None:
    neuron = APINeuron(config(federation, tmp_path / "state"))
    neuron.task("double")(lambda n: 2 * n)
    for n in (1, 2):
        assert neuron.start()
        neuron_id = federation.wait_for_neuron()
        command = federation.issue(neuron_id, "run_task", {"task": "double", "params": {"n": n}})
        assert federation.outcome(command)["response"]["result"] == 2 * n
        neuron.stop()
    assert len(federation.store.neurons()) == 1


def test_a_host_ends_when_it_wants_to_though_it_never_stopped_its_neuron(
    federation: Federation, tmp_path: Path
) -> None:
    program = f"""
from neuron_client import APINeuron, NeuronConfig
neuron = APINeuron(NeuronConfig(federation_url={federation.url!r}, state_dir="state", port=0, heartbeat_interval=0.1))
assert neuron.start() and neuron.registered.wait(10)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=20, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
