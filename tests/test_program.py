"""The program as a process: how it starts, waits, ends by signal and command, restarts itself, and `--local`."""

from __future__ import annotations

import re
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

from local_federation.server import DEFAULT_ADMIN_KEY
from tests.rig.process import ROOT, NeuronProcess, wait_for
from tests.rig.recording import Fault, Hang, RecordingFederation

Run = Callable[..., NeuronProcess]

pytestmark = pytest.mark.slow

TASKS = """
import sys, threading, neuron_client
def build(config):
    neuron = neuron_client.APINeuron(config)
    @neuron.task("polite")
    def polite(context):
        context.progress(0.5)
        context.cancelled.wait(60)
        context.check_cancelled()
    @neuron.task("deaf")
    def deaf():
        threading.Event().wait(60)
    @neuron.task("short")
    def short():
        threading.Event().wait(1)
        return "whole"
    return neuron
from neuron.program import run
sys.exit(run(build))
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    script = tmp_path / "tasks.py"
    script.write_text(TASKS)
    return script


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def beating(oracle: RecordingFederation, count: int = 1) -> None:
    wanted = len(oracle.of("heartbeat")) + count
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= wanted, 15, "heartbeats")


def running(oracle: RecordingFederation) -> None:
    """A task is known to run, and not only to be about to."""
    oracle.wait_until(
        lambda: any(one.body["performanceMetrics"]["runningCommands"] for one in oracle.of("heartbeat")), 15, "a task"
    )


def outcome(oracle: RecordingFederation, command_id: str, timeout: float = 15) -> dict[str, Any]:
    oracle.wait_until(lambda: oracle.of("complete", command_id), timeout, "the completion")
    response = oracle.of("complete", command_id)[-1].body["response"]
    assert isinstance(response, dict)
    return response


# -- starting


def test_without_a_federation_it_says_what_it_tries_how_often_and_what_to_do_and_joins_later(run_neuron: Run) -> None:
    port = free_port()
    neuron = run_neuron(federation_url=f"http://127.0.0.1:{port}")
    line = str(neuron.wait_logged("trying again")["message"])
    for words in (
        f"register at http://127.0.0.1:{port}", "Connection refused", "as long as it takes", "up to 60 s",
        "federation_url", "FEDERATION_URL", "--local",
    ):
        assert words in line
    assert requests.get(f"{neuron.address()}/health", timeout=5).status_code == 200
    assert requests.get(f"{neuron.address()}/status", timeout=5).json()["status"] == "starting"
    with RecordingFederation(port=port) as late:
        beating(late)
        neuron.wait_logged("registered as")
        neuron.wait_logged("answers again")
        neuron.signal(signal.SIGTERM)
        assert neuron.wait() == 0
    assert sum("trying again" in str(entry["message"]) for entry in neuron.lines) == 1


def test_a_neuron_id_is_made_once_and_kept(oracle: RecordingFederation, run_neuron: Run) -> None:
    for _ in range(2):
        neuron = run_neuron(federation_url=oracle.url, name="Weaver of Tales")
        beating(oracle)
        neuron.signal(signal.SIGTERM)
        assert neuron.wait() == 0
    (registration,) = oracle.of("register")
    assert re.fullmatch(r"weaver-of-tales-\d{10}", registration.body["neuronId"])


def test_a_second_process_on_one_state_directory_ends_with_75_and_asks_nobody(
    oracle: RecordingFederation, run_neuron: Run
) -> None:
    run_neuron(federation_url=oracle.url)
    beating(oracle)
    with RecordingFederation() as others:
        began = time.monotonic()
        second = run_neuron(federation_url=others.url)
        assert second.wait() == 75
        assert time.monotonic() - began < 5
        assert others.requests == []
    assert "another" in second.stderr
    assert "Traceback" not in second.stderr
    beating(oracle, 2)


def test_a_state_directory_that_cannot_be_used_ends_with_77_and_a_line(run_neuron: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    neuron = run_neuron(state_dir=tmp_path / "file", federation_url="http://127.0.0.1:9")
    assert neuron.wait() == 77
    assert "file" in neuron.stderr
    assert "Traceback" not in neuron.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "--print-config"), (["--confg", "x"], 2, "--confg"),
        (["--config", "absent.json"], 2, "absent.json: cannot be read"),
    ],
)
def test_the_command_line_explains_itself(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "neuron_client.py"), *arguments], capture_output=True, text=True, timeout=30,
        cwd=tmp_path, check=False,
    )
    assert ended.returncode == code
    assert words in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_registration_ends_with_2_and_its_line(run_neuron: Run, tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(TASKS.replace('@neuron.task("deaf")', '@neuron.task("polite")'))
    neuron = run_neuron(script=script, federation_url="http://127.0.0.1:9")
    assert neuron.wait() == 2
    assert "wrong.py:" in neuron.stderr
    assert "registered already" in neuron.stderr
    assert "Traceback" not in neuron.stderr


def test_loops_that_keep_dying_end_the_process_with_70(
    oracle: RecordingFederation, run_neuron: Run, tmp_path: Path
) -> None:
    script = tmp_path / "dying.py"
    script.write_text(
        "import sys, threading, neuron_client, neuron.program\n"
        "neuron.program.WATCH_SECONDS = 0.1\n"
        "class Dying(neuron_client.APINeuron):\n"
        "    def report_analytics(self):\n"
        "        if threading.current_thread() is not threading.main_thread():\n"
        "            raise SystemExit\n"
        "sys.exit(neuron.program.run(Dying))\n"
    )
    neuron = run_neuron(script=script, federation_url=oracle.url)
    assert neuron.wait() == 70
    assert sum("had died; started again" in str(line["message"]) for line in neuron.lines) == 5
    assert neuron.logged("supervisor")


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_gracefully_with_its_last_word(
    oracle: RecordingFederation, run_neuron: Run, number: signal.Signals
) -> None:
    neuron = run_neuron(federation_url=oracle.url, analytics_interval=3600)
    beating(oracle, 2)
    for _ in range(7):
        answer = requests.post(f"{neuron.address()}/data/process", json=[{"a": 1}], timeout=5)
        assert answer.status_code == 200
    began = time.monotonic()
    neuron.signal(number)
    assert neuron.wait() == 0
    assert time.monotonic() - began < 4
    kinds = [one.kind for one in oracle.requests if one.kind in ("heartbeat", "analytics")]
    assert kinds[-2:] == ["analytics", "heartbeat"]
    assert oracle.of("heartbeat")[-1].body["status"] == "inactive"
    assert oracle.of("heartbeat")[-1].body["applicationMetrics"]["total_requests"] == 7
    assert oracle.of("analytics")[-1].body["requestCount"] == 7
    assert neuron.lines[-1]["message"] == "stopped"
    assert neuron.stderr == ""


@pytest.mark.parametrize("phase", ["silent registration", "back-off", "silent heartbeat", "silent look", "paused"])
def test_a_signal_ends_it_in_time_while_the_federation_is_no_help(
    oracle: RecordingFederation, run_neuron: Run, phase: str
) -> None:
    release = threading.Event()
    kinds = {"silent registration": "register", "silent heartbeat": "heartbeat", "silent look": "pending"}
    if phase == "back-off":
        oracle.stop()
    if phase in kinds:
        oracle.always(kinds[phase], Hang(release))
    neuron = run_neuron(federation_url=oracle.url, request_timeout=60, shutdown_grace=2)
    if phase == "back-off":
        neuron.wait_logged("trying again")
    elif phase in kinds:
        oracle.wait_until(lambda: oracle.of(kinds[phase]), what=f"the hanging {kinds[phase]}")
    else:
        oracle.issue(neuron_id_of(oracle), "pause")
        neuron.wait_logged("paused")
    neuron.wait_logged("neuron started")
    began = time.monotonic()
    neuron.signal(signal.SIGTERM)
    try:
        assert neuron.wait() == 0
        assert time.monotonic() - began < 4.5
    finally:
        release.set()
    assert "Traceback" not in neuron.stderr
    assert neuron.logged("stopped")


def neuron_id_of(oracle: RecordingFederation) -> str:
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
    return str(oracle.of("heartbeat")[0].neuron_id)


@pytest.mark.parametrize(
    ("task", "told"), [("polite", "interrupted"), ("deaf", "interrupted"), ("short", "succeeded")]
)
def test_a_signal_during_a_task_waits_a_little_and_reports_how_it_ended(
    oracle: RecordingFederation, run_neuron: Run, tasks: Path, task: str, told: str
) -> None:
    neuron = run_neuron(
        script=tasks, federation_url=oracle.url, neuron_id="n-1", shutdown_grace=3, heartbeat_interval=0.1
    )
    command = oracle.issue("n-1", "run_task", {"task": task})
    running(oracle)
    began = time.monotonic()
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0
    assert time.monotonic() - began < 4.5
    if not oracle.of("complete", command):
        run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1")
    assert outcome(oracle, command)["outcome"] == told
    assert oracle.conflicting_outcomes() == []
    assert oracle.flips() == []


def test_what_is_acknowledged_while_it_stops_is_left_whole_to_the_next_process(
    oracle: RecordingFederation, run_neuron: Run, tasks: Path
) -> None:
    neuron = run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1", shutdown_grace=4)
    oracle.script("acknowledge", [Fault(None, delay=0.3)])
    command = oracle.issue("n-1", "run_task", {"task": "short"})
    oracle.wait_until(lambda: oracle.of("acknowledge", command), what="the acknowledge under way")
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0
    assert oracle.of("complete", command) == []
    run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1")
    assert outcome(oracle, command)["result"] == "whole"
    assert len(oracle.of("acknowledge", command)) == 1


def test_a_step_that_fails_on_the_way_out_keeps_no_other_from_its_turn(
    oracle: RecordingFederation, run_neuron: Run, tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(
        "import sys, neuron_client, neuron.program\n"
        "class Failing(neuron_client.APINeuron):\n"
        "    def report_analytics(self):\n"
        "        raise ValueError('an override of an adopter')\n"
        "sys.exit(neuron.program.run(Failing))\n"
    )
    neuron = run_neuron(script=script, federation_url=oracle.url)
    beating(oracle)
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0
    assert oracle.of("heartbeat")[-1].body["status"] == "inactive"
    assert neuron.logged("stopped")


def test_a_signal_during_a_completion_that_hangs_leaves_it_to_the_next_process(
    oracle: RecordingFederation, run_neuron: Run, tasks: Path
) -> None:
    release = threading.Event()
    oracle.always("complete", Hang(release))
    neuron = run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1", request_timeout=60, shutdown_grace=2)
    command = oracle.issue("n-1", "run_task", {"task": "short"})
    oracle.wait_until(lambda: oracle.of("complete", command), what="the completion under way")
    began = time.monotonic()
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0
    assert time.monotonic() - began < 4.5
    oracle.clear()
    release.set()
    run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1")
    oracle.wait_until(lambda: oracle.command(command)["status"] == "completed", what="the stored result")
    assert oracle.conflicting_outcomes() == []
    assert len(oracle.of("acknowledge", command)) == 1


def test_a_second_signal_ends_it_at_once(oracle: RecordingFederation, run_neuron: Run, tasks: Path) -> None:
    neuron = run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1", shutdown_grace=30)
    oracle.issue("n-1", "run_task", {"task": "deaf"})
    running(oracle)
    neuron.signal(signal.SIGINT)
    neuron.wait_logged("stopping within 30 s")
    began = time.monotonic()
    neuron.signal(signal.SIGINT)
    assert neuron.wait() == 130
    assert time.monotonic() - began < 2
    assert "Traceback" not in neuron.stderr


# -- commands for the process


def test_a_stop_command_is_completed_and_ends_the_process_with_0(oracle: RecordingFederation, run_neuron: Run) -> None:
    neuron = run_neuron(federation_url=oracle.url, neuron_id="n-1")
    beating(oracle)
    command = oracle.issue("n-1", "stop")
    assert neuron.wait() == 0
    assert outcome(oracle, command)["outcome"] == "succeeded"
    assert oracle.command(command)["status"] == "completed"
    assert oracle.of("heartbeat")[-1].body["status"] == "inactive"
    assert oracle.of("complete")[0].number < oracle.of("heartbeat")[-1].number


def test_a_restart_is_completed_by_the_new_process_and_the_fourth_in_five_minutes_refused(
    oracle: RecordingFederation, run_neuron: Run, tmp_path: Path
) -> None:
    secret = "a-secret-of-at-least-32-bytes-long"
    neuron = run_neuron(
        federation_url=oracle.url, neuron_id="n-1", name="Phoenix", environ={"NEURON_API_SECRET": secret}
    )
    beating(oracle)
    for times in range(1, 4):
        command = oracle.issue("n-1", "restart")
        response = outcome(oracle, command)
        assert response["outcome"] == "succeeded"
        assert response["result"]["previousPid"] == response["result"]["pid"] == neuron.pid, "replaced, not followed"
        assert 0 < response["result"]["seconds"] < 30
        assert sum("neuron started" in str(line["message"]) for line in neuron.lines) == times + 1
        assert len(oracle.of("complete", command)) == 1
    refused = oracle.issue("n-1", "restart")
    assert outcome(oracle, refused)["outcome"] == "rejected"
    assert "three" in oracle.of("complete", refused)[0].body["errorMessage"] or "3 times" in (
        oracle.of("complete", refused)[0].body["errorMessage"]
    )
    assert len(oracle.of("register")) == 1
    assert oracle.flips() == []
    beating(oracle, 2)
    starts = [line for line in neuron.lines if "neuron started" in str(line["message"])]
    address = str(starts[-1]["message"]).rpartition("endpoints ")[2]
    assert requests.get(f"{address}/status", timeout=5).status_code == 401, "the settings came along"
    assert {line["name"] for line in starts} == {"Phoenix"}
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0
    assert neuron.stderr == ""


def test_a_restart_during_a_task_ends_both(oracle: RecordingFederation, run_neuron: Run, tasks: Path) -> None:
    neuron = run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1", shutdown_grace=2)
    task = oracle.issue("n-1", "run_task", {"task": "deaf"})
    running(oracle)
    restart = oracle.issue("n-1", "restart")
    assert outcome(oracle, restart)["outcome"] == "succeeded"
    assert outcome(oracle, task)["outcome"] == "interrupted"
    assert neuron.process.poll() is None


def test_a_signal_during_a_restart_turns_it_into_an_end(
    oracle: RecordingFederation, run_neuron: Run, tasks: Path
) -> None:
    neuron = run_neuron(script=tasks, federation_url=oracle.url, neuron_id="n-1", shutdown_grace=2)
    oracle.issue("n-1", "run_task", {"task": "deaf"})
    running(oracle)
    oracle.issue("n-1", "restart")
    neuron.wait_logged("stopping within")
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0
    assert sum("neuron started" in str(line["message"]) for line in neuron.lines) == 1


# -- --local


class Local:
    """A neuron with a federation of its own, asked as a person would."""

    def __init__(self, neuron: NeuronProcess) -> None:
        self.neuron = neuron
        self.url = str(wait_for(lambda: re.search(r"runs at (\S+)", neuron.stderr), 20, "the federation's address")[1])
        wait_for(lambda: "how it ended" in neuron.stderr, what="the first command")
        self.commands = re.findall(r"http\S+/commands", neuron.stderr)[0]
        self._admin = {"X-Admin-Key": DEFAULT_ADMIN_KEY}

    def issue(self, kind: str, data: Any) -> str:
        body = {"commandType": kind, "commandData": data}
        answer = requests.post(self.commands, json=body, headers=self._admin, timeout=5)
        assert answer.status_code == 201
        return str(answer.json()["data"]["commandId"])

    def ended(self, command_id: str) -> dict[str, Any]:
        def found() -> Any:
            try:
                listed = requests.get(self.commands, headers=self._admin, timeout=5).json()["data"]
            except requests.ConnectionError:
                return None  # it restarts
            (command,) = [one for one in listed if one["commandId"] == command_id]
            return command["status"] in ("completed", "failed") and command

        command = wait_for(found, 20, "the command's end")
        assert isinstance(command, dict)
        return command

    def gone(self) -> bool:
        try:
            requests.get(self.url, timeout=1)
        except requests.ConnectionError:
            return True
        return False


@pytest.fixture
def local(run_neuron: Run, tmp_path: Path) -> Local:
    return Local(run_neuron(arguments=["--local"]))


def test_local_starts_a_federation_that_is_joined_commanded_and_ended_with_the_neuron(local: Local) -> None:
    local.neuron.wait_logged("registered as")
    command = local.issue("run_task", {"task": "word_count", "params": {"text": "to be or not to be"}})
    assert local.ended(command)["response"]["result"]["words"] == 6
    assert "curl" in local.neuron.stderr
    restart = local.issue("restart", {})
    assert local.ended(restart)["response"]["outcome"] == "succeeded", "also of a process with its own federation"
    local.neuron.signal(signal.SIGINT)
    assert local.neuron.wait() == 0
    assert not local.neuron.logged("on the way out"), "the federation was there to the last heartbeat"
    assert local.gone()
    assert "Traceback" not in local.neuron.stderr


def test_the_local_federation_ends_though_the_neuron_is_killed(local: Local) -> None:
    local.neuron.kill()
    wait_for(local.gone, 10, "the end of the federation")


def test_local_takes_the_next_port_where_5000_is_taken(run_neuron: Run, tmp_path: Path) -> None:
    first = Local(run_neuron(arguments=["--local"]))
    second = Local(run_neuron(state_dir=tmp_path / "second", arguments=["--local"]))
    assert first.url != second.url
    for one in (first, second):
        one.neuron.signal(signal.SIGTERM)
        assert one.neuron.wait() == 0
        assert one.gone()
