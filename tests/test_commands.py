"""Commands: one outcome each, what may wait for what, and what changes with a config_update."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import requests

from neuron.commands import CONTROL
from neuron.errors import DefinitionError, Rejected
from neuron.journal import Entry
from neuron.tasks import TaskContext
from neuron_client import APINeuron
from tests.rig.process import wait_for
from tests.rig.recording import Fault, RecordingFederation


class Post:
    """A neuron at the oracle, commands issued to it and what became of them."""

    def __init__(self, oracle: RecordingFederation, make: Callable[..., APINeuron]) -> None:
        self.oracle = oracle
        self._make = make
        self.neuron: APINeuron

    def hire(self, **settings: Any) -> APINeuron:
        self.neuron = self._make(federation_url=self.oracle.url, neuron_id="n-1", **settings)
        return self.neuron

    def start(self) -> None:
        assert self.neuron.start()
        wait_for(self.neuron.registered.is_set, what="the registration")

    def issue(self, kind: str, data: Any = None, priority: int = 5, **extra: Any) -> str:
        return self.oracle.issue("n-1", kind, data, priority, **extra)

    def task(self, name: str, params: Any = None, **extra: Any) -> str:
        return self.issue("run_task", {"task": name, "params": {} if params is None else params}, **extra)

    def completion(self, command_id: str, timeout: float = 15) -> dict[str, Any]:
        """The body of its one completion."""
        self.oracle.wait_until(lambda: self.oracle.of("complete", command_id), timeout, f"the end of {command_id}")
        body = self.oracle.of("complete", command_id)[0].body
        assert isinstance(body, dict)
        return body

    def outcome(self, command_id: str, timeout: float = 15) -> str:
        return str(self.completion(command_id, timeout)["response"]["outcome"])

    def status(self, command_id: str) -> str:
        return str(self.oracle.command(command_id)["status"])

    def polls(self) -> int:
        return len(self.oracle.of("pending"))

    def wait_for_polls(self, count: int) -> None:
        wanted = self.polls() + count
        self.oracle.wait_until(lambda: self.polls() >= wanted, what=f"{count} more looks for commands")


@pytest.fixture
def post(oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]) -> Post:
    return Post(oracle, make_neuron)


class Gate:
    """A task that tells it has begun, and ends when it is let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.open = threading.Event()

    def run(self, context: TaskContext, name: str = "") -> str:
        self.begun.append(name or context.command_id)
        self.open.wait(30)
        self.ended.append(name or context.command_id)
        return name


@pytest.fixture
def gate() -> Any:
    gate = Gate()
    yield gate
    gate.open.set()


# -- outcomes


def test_a_command_that_succeeds_is_acknowledged_and_then_completed_with_its_result(post: Post) -> None:
    neuron = post.hire()
    neuron.task("double")(lambda number: number * 2)
    post.start()
    command = post.task("double", {"number": 21})
    body = post.completion(command)
    assert body["success"] is True
    assert body["response"]["outcome"] == "succeeded"
    assert body["response"]["result"] == 42
    assert body["response"]["durationMs"] >= 0
    assert "errorMessage" not in body
    assert [(one.old, one.new) for one in post.oracle.transitions] == [
        ("pending", "acknowledged"), ("acknowledged", "completed"),
    ]


class BadWords(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS: list[tuple[BaseException, str]] = [
    (ValueError("no such table"), "ValueError: no such table"),
    (SystemExit(3), "SystemExit: 3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (RecursionError("deep"), "RecursionError: deep"),
    (MemoryError(), "MemoryError"),
    (ValueError("x" * 50_000), "ValueError: xxx"),
    (ValueError("\ud800\0\n"), "ValueError: "),
    (BadWords(), "BadWords: "),
]


def test_whatever_a_task_or_a_handler_raises_it_failed_and_the_neuron_lives(post: Post) -> None:
    neuron = post.hire()

    @neuron.task("broken")
    def broken(number: int) -> None:
        raise ERRORS[number][0]

    @neuron.command("broken_too")
    def broken_too(number: int) -> None:
        raise ERRORS[number][0]

    post.start()
    for number, (_, words) in enumerate(ERRORS):
        for command in (post.task("broken", {"number": number}), post.issue("broken_too", number)):
            body = post.completion(command)
            assert (body["success"], body["response"]["outcome"]) == (False, "failed"), words
            assert body["errorMessage"].startswith(words)
            assert len(body["errorMessage"]) <= 4000
            assert "Traceback" not in body["errorMessage"]
    assert post.outcome(post.issue("health_check")) == "succeeded"
    assert post.oracle.schema_violations() == []


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def circular() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def test_a_result_that_is_no_json_failed_and_says_so(post: Post) -> None:
    results: dict[str, Any] = {
        "object": object(), "set": {"a": {1, 2}}, "bytes": b"bytes", "nan": float("nan"), "key": {(1, 2): 3},
        "infinity": {"a": [float("inf")]}, "deep": nested(100_000), "circular": circular(),
    }
    neuron = post.hire()
    neuron.task("strange")(lambda kind: results[kind])
    post.start()
    for kind in results:
        body = post.completion(post.task("strange", {"kind": kind}))
        assert (body["success"], body["response"]["outcome"]) == (False, "failed"), kind
        assert "not JSON" in body["errorMessage"]


def test_a_huge_result_is_cut_and_says_so(post: Post) -> None:
    neuron = post.hire()
    neuron.task("huge")(lambda: ["x" * 1000] * 10_000)
    neuron.task("wide")(lambda: "\u00e9" * 60_000)
    post.start()
    for name in ("huge", "wide"):
        command = post.task(name)
        response = post.completion(command)["response"]
        assert response["outcome"] == "succeeded"
        assert "bytes are over" in response["resultTruncated"]
        assert len(post.oracle.of("complete", command)[0].raw) <= 100_000
    assert post.oracle.own_4xx() == []


def test_an_unknown_command_is_rejected_with_the_supported_list(post: Post) -> None:
    neuron = post.hire()
    neuron.command("deploy")(lambda data: None)
    post.start()
    body = post.completion(post.issue("self_destruct", {"now": True}))
    assert body["response"]["outcome"] == "rejected"
    assert "'self_destruct' is not supported" in body["errorMessage"]
    assert set(body["response"]["supported"]) == {*CONTROL, "run_task", "deploy"}


def test_an_unknown_command_is_rejected_though_every_slot_is_taken(post: Post, gate: Gate) -> None:
    post.hire(max_concurrent_tasks=1).task("gate")(gate.run)
    post.start()
    post.task("gate")
    wait_for(lambda: gate.begun, what="the task")
    assert post.outcome(post.issue("self_destruct")) == "rejected"


def test_run_task_takes_the_name_and_the_parameters_where_callers_put_them(post: Post) -> None:
    understood: list[Any] = [
        {"task": "greet", "params": {"name": "you"}}, {"task_type": "greet", "params": {"name": "you"}},
        {"task": "greet", "name": "you"}, {"task_type": "greet", "name": "you"},
    ]
    rejected: list[Any] = [
        {"task": "greet", "params": {}}, {"task": "gret", "params": {"name": "you"}}, {}, [], None, "greet",
    ]
    neuron = post.hire()

    @neuron.task("greet")
    def greet(name: str) -> str:
        return f"hello {name}"

    post.start()
    for data in understood:
        assert post.completion(post.issue("run_task", data))["response"]["result"] == "hello you", data
    for data in rejected:
        assert post.outcome(post.issue("run_task", data)) == "rejected", data


def test_an_expired_command_is_told_so_and_does_not_run(post: Post, gate: Gate) -> None:
    post.hire().task("gate")(gate.run)
    gate.open.set()
    post.start()
    now = datetime.now(timezone.utc)  # noqa: UP017 - as callers of Python 3.10 write it
    late = post.task("gate", {"name": "late"}, timeoutAt=(now - timedelta(seconds=5)).isoformat())
    early = post.task("gate", {"name": "early"}, timeoutAt=(now + timedelta(hours=1)).isoformat())
    odd = post.task("gate", {"name": "odd"}, timeoutAt="tomorrow")
    assert post.outcome(late) == "expired"
    assert post.outcome(early) == post.outcome(odd) == "succeeded"
    assert sorted(gate.begun) == ["early", "odd"]


def test_a_command_expires_by_the_federations_clock(post: Post, gate: Gate) -> None:
    post.oracle.clock_offset = 7200
    post.hire().task("gate")(gate.run)
    gate.open.set()
    post.start()
    wait_for(lambda: post.neuron.transport.clock.offset > 7000, what="the clock's offset")
    there = datetime.fromtimestamp(post.oracle.now(), timezone.utc)  # noqa: UP017
    assert post.outcome(post.task("gate", timeoutAt=(there - timedelta(seconds=60)).isoformat())) == "expired"
    assert post.outcome(post.task("gate", timeoutAt=(there + timedelta(seconds=60)).isoformat())) == "succeeded"


# -- slots


def test_what_cannot_start_stays_pending_and_unacknowledged(post: Post, gate: Gate) -> None:
    post.hire(max_concurrent_tasks=2).task("gate")(gate.run)
    post.start()
    commands = [post.task("gate") for _ in range(5)]
    wait_for(lambda: len(gate.begun) == 2, what="two tasks")
    post.wait_for_polls(3)
    assert [post.status(one) for one in commands] == ["acknowledged"] * 2 + ["pending"] * 3
    assert len(post.oracle.of("acknowledge")) == 2
    assert len(gate.begun) == 2
    gate.open.set()
    assert [post.outcome(one) for one in commands] == ["succeeded"] * 5
    assert post.oracle.flips() == []


def test_a_freed_slot_is_taken_at_once(post: Post) -> None:
    neuron = post.hire(max_concurrent_tasks=1, command_interval=30)
    neuron.task("quick")(lambda: None)
    commands = [post.task("quick") for _ in range(10)]
    post.start()
    began = time.monotonic()
    assert [post.outcome(one) for one in commands] == ["succeeded"] * 10
    assert time.monotonic() - began < 8, "ten tasks one after the other, without a pause between them"


def test_control_commands_never_wait_behind_tasks(post: Post, gate: Gate) -> None:
    post.hire(max_concurrent_tasks=1).task("gate")(gate.run)
    post.start()
    running = post.task("gate")
    wait_for(lambda: gate.begun, what="the task")
    waiting = [post.task("gate", priority=10) for _ in range(20)]
    for kind, data in (
        ("health_check", None), ("config_update", {"log_level": "INFO"}), ("pause", None), ("resume", None),
    ):
        assert post.outcome(post.issue(kind, data, priority=1)) == "succeeded"
    assert post.outcome(post.issue("cancel_task", {"commandId": "absent"}, priority=1)) == "rejected"
    assert post.status(running) == "acknowledged"
    assert {post.status(one) for one in waiting} == {"pending"}


def test_commands_run_beside_each_other(post: Post) -> None:
    both = threading.Barrier(3)
    post.hire(max_concurrent_tasks=3).task("meet")(lambda: both.wait(10) >= 0)
    post.start()
    commands = [post.task("meet") for _ in range(3)]
    assert [post.outcome(one) for one in commands] == ["succeeded"] * 3


def test_the_more_urgent_command_goes_first(post: Post, gate: Gate) -> None:
    post.hire(max_concurrent_tasks=1).task("gate")(gate.run)
    post.start()
    post.task("gate", {"name": "first"})
    wait_for(lambda: gate.begun, what="the first task")
    commands = [post.task("gate", {"name": f"p{priority}"}, priority=priority) for priority in (1, 10, 5)]
    gate.open.set()
    for command in commands:
        post.outcome(command)
    assert gate.begun == ["first", "p10", "p5", "p1"]


def test_more_slots_from_remote_are_used_at_once(post: Post, gate: Gate) -> None:
    post.hire(max_concurrent_tasks=1).task("gate")(gate.run)
    post.start()
    for _ in range(3):
        post.task("gate")
    wait_for(lambda: gate.begun, what="the first task")
    post.wait_for_polls(2)
    assert len(gate.begun) == 1
    post.issue("config_update", {"max_concurrent_tasks": 3})
    wait_for(lambda: len(gate.begun) == 3, what="three tasks")


# -- ends that come from outside


def test_a_cancelled_task_is_told_and_ends_cancelled(post: Post) -> None:
    neuron = post.hire()
    begun, told = threading.Event(), threading.Event()

    @neuron.task("long")
    def long(context: TaskContext) -> str:
        begun.set()
        if context.cancelled.wait(20):
            told.set()
        return "half of it"

    post.start()
    command = post.task("long")
    assert begun.wait(10)
    cancel = post.completion(post.issue("cancel_task", {"commandId": command}))
    assert cancel["response"]["result"] == {"cancelling": command, "task": "long"}
    body = post.completion(command)
    assert (body["response"]["outcome"], body["success"]) == ("cancelled", False)
    assert told.is_set()


def test_a_task_that_will_not_hear_is_cancelled_after_a_grace_and_its_slot_freed(
    post: Post, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron.commands.CANCEL_GRACE", 0.3)
    neuron = post.hire(max_concurrent_tasks=1)
    neuron.task("gate")(gate.run)
    neuron.task("quick")(lambda: 1)
    post.start()
    command = post.task("gate")
    wait_for(lambda: gate.begun, what="the task")
    post.issue("cancel_task", {"commandId": command})
    assert post.outcome(command) == "cancelled"
    assert not gate.ended
    assert post.outcome(post.task("quick")) == "succeeded"


def test_a_cancel_of_nothing_is_rejected(post: Post) -> None:
    post.hire()
    post.start()
    for data in ({"commandId": "absent"}, {}, None, {"commandId": 5}, "absent", ["absent"]):
        assert post.outcome(post.issue("cancel_task", data)) == "rejected", data


def test_a_task_past_its_limit_is_timed_out_at_once_and_its_slot_freed(post: Post) -> None:
    neuron = post.hire(max_concurrent_tasks=1)
    release, told = threading.Event(), threading.Event()

    @neuron.task("deaf", timeout=0.3)
    def deaf(context: TaskContext) -> str:
        release.wait(30)
        if context.cancelled.is_set():
            told.set()
        return "too late"

    neuron.task("quick")(lambda: 1)
    post.start()
    began = time.monotonic()
    try:
        command = post.task("deaf")
        body = post.completion(command)
        assert time.monotonic() - began < 5
        assert body["response"]["outcome"] == "timed_out"
        assert "longer than 0.3 s" in body["errorMessage"]
        assert post.outcome(post.task("quick")) == "succeeded"
        assert any("past their time limit" in reason for reason in neuron.health()["reasons"])
    finally:
        release.set()
    wait_for(told.is_set, what="the task's end")
    wait_for(lambda: not neuron.desk.given_up(), what="the end of the watch over it")
    assert post.oracle.conflicting_outcomes() == []
    assert len(post.oracle.of("complete", command)) == 1


def test_the_configured_time_limit_holds_for_tasks_without_their_own(post: Post, gate: Gate) -> None:
    post.hire(task_timeout=0.2).task("gate")(gate.run)
    post.start()
    assert post.outcome(post.task("gate")) == "timed_out"


# -- pause


def test_a_paused_neuron_takes_no_new_work_and_says_maintenance(post: Post, gate: Gate) -> None:
    neuron = post.hire()
    neuron.task("gate")(gate.run)
    post.start()
    running = post.task("gate")
    wait_for(lambda: gate.begun, what="the running task")
    assert post.completion(post.issue("pause"))["response"]["result"] == {"paused": True}
    waiting = post.task("gate")
    post.oracle.wait_until(
        lambda: post.oracle.of("heartbeat")[-1].body["status"] == "maintenance", what="a heartbeat that says so"
    )
    assert neuron.ready() == (False, ["paused"])
    assert requests.get(f"{neuron.address()}/health/ready", timeout=5).status_code == 503
    assert requests.get(f"{neuron.address()}/health", timeout=5).status_code == 200
    post.wait_for_polls(2)
    assert post.status(waiting) == "pending"
    gate.open.set()
    assert post.outcome(running) == "succeeded", "what runs is not stopped by a pause"
    post.wait_for_polls(2)
    assert post.status(waiting) == "pending"
    assert post.completion(post.issue("resume"))["response"]["result"] == {"paused": False}
    assert post.outcome(waiting) == "succeeded"
    post.oracle.wait_until(lambda: post.oracle.of("heartbeat")[-1].body["status"] == "active", what="active again")


# -- config_update


def test_a_config_update_takes_effect_at_once_and_changes_the_config_version(post: Post) -> None:
    neuron = post.hire(heartbeat_interval=3600)
    post.start()
    post.oracle.wait_until(lambda: post.oracle.of("heartbeat"), what="the first heartbeat")
    before = neuron.config.digest()
    response = post.completion(post.issue("config_update", {"heartbeat_interval": 1}))["response"]
    assert response["result"]["changed"] == {"heartbeat_interval": 1.0}
    assert response["result"]["configVersion"] == neuron.config.digest() != before
    post.oracle.wait_until(lambda: len(post.oracle.of("heartbeat")) >= 3, 6, "heartbeats at the new rate")
    assert post.oracle.of("heartbeat")[-1].body["configVersion"] == neuron.config.digest()


def test_a_config_update_may_be_nested_and_is_not_mistaken_for_a_setting(post: Post) -> None:
    neuron = post.hire()
    post.start()
    assert post.outcome(post.issue("config_update", {"config": {"task_timeout": 77}})) == "succeeded"
    assert neuron.config.task_timeout == 77


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"task_timeout": 77, "federation_url": "http://evil"}, ["federation_url"]),
    ({"task_timeout": 77, "token": "x", "state_dir": "/tmp", "tls_ca": "", "host": "0.0.0.0"},
     ["token", "state_dir", "tls_ca", "host"]),
    ({"task_timeout": 77, "heartbeat_interval": "60"}, ["heartbeat_interval"]),
    ({"task_timeout": 77, "heartbeat_interval": 0, "command_interval": -1, "analytics_interval": 1e9},
     ["heartbeat_interval", "command_interval", "analytics_interval"]),
    ({"task_timeout": 77, "heartbeat_intervall": 5}, ["heartbeat_intervall"]),
    ({"task_timeout": 77, "executor": "processes", "data_dir": "/"}, ["executor", "data_dir"]),
    ({"task_timeout": 77, "log_file": "/etc/passwd"}, ["log_file"]),
    ({"task_timeout": 77, "reset": True}, ["reset"]),
    ({"task_timeout": 77, "__class__": 1}, ["__class__"]),
]


def test_a_config_update_is_all_or_nothing_and_names_each_fault(post: Post) -> None:
    neuron = post.hire()
    post.start()
    before = neuron.config
    for data, faults in REFUSED:
        body = post.completion(post.issue("config_update", data))
        assert body["response"]["outcome"] == "rejected", data
        assert sorted(fault.partition(":")[0] for fault in body["response"]["faults"]) == sorted(faults)
        assert all(fault in body["errorMessage"] for fault in faults)
        assert neuron.config == before
        assert neuron.journal.setting("config_update") is None


def test_a_config_update_without_settings_is_rejected(post: Post) -> None:
    neuron = post.hire()
    post.start()
    before = neuron.config
    nothing: list[Any] = [{}, [], None, "reset", 5, {"config": {}}, {"config": [1]}, {"reset": False}]
    for data in nothing:
        assert post.outcome(post.issue("config_update", data)) == "rejected", data
        assert neuron.config == before


def test_config_updates_add_up_survive_a_restart_and_are_taken_back_by_a_reset(post: Post) -> None:
    neuron = post.hire()
    post.start()
    local = neuron.config.digest()
    assert post.outcome(post.issue("config_update", {"task_timeout": 77})) == "succeeded"
    assert post.outcome(post.issue("config_update", {"max_body_bytes": 5000})) == "succeeded"
    changed = neuron.config.digest()
    neuron.stop()

    again = post.hire()
    post.start()
    assert (again.config.task_timeout, again.config.max_body_bytes) == (77, 5000)
    assert again.config.digest() == changed != local
    response = post.completion(post.issue("config_update", {"reset": True}))["response"]
    assert response["result"]["changed"] == {"task_timeout": 300.0, "max_body_bytes": 1_000_000}
    assert again.config.digest() == local
    again.stop()

    last = post.hire()
    post.start()
    assert last.config.digest() == local


def test_stored_settings_that_no_longer_fit_are_left_out_and_said(
    post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    neuron = post.hire()
    post.start()
    neuron.journal.set_setting("config_update", {"heartbeat_interval": 30, "gone_since": 1})
    neuron.stop()
    again = post.hire()
    post.start()
    assert again.config == again.local_config
    assert any("no longer fit" in record.getMessage() for record in caplog.records)


# -- the pace of looking


def test_a_heartbeats_pending_commands_wake_the_command_loop(post: Post) -> None:
    post.hire(command_interval=3600, heartbeat_interval=0.3)
    post.start()
    post.oracle.wait_until(lambda: post.polls() >= 1, what="the first look")
    assert post.outcome(post.issue("health_check"), timeout=5) == "succeeded"


@pytest.mark.slow
def test_it_looks_every_second_for_a_minute_after_a_command(post: Post) -> None:
    neuron = post.hire(command_interval=30, heartbeat_interval=0.2)
    post.start()
    post.oracle.wait_until(lambda: len(post.oracle.of("heartbeat")) >= 4, what="heartbeats without commands")
    assert post.polls() <= 3, "before the first command it looks at the configured pace"
    post.outcome(post.issue("health_check"))
    at = len(post.oracle.of("pending"))
    post.oracle.wait_until(lambda: post.polls() >= at + 2, 6, "a look each second")
    times = [one.at for one in post.oracle.of("pending")[at:]]
    assert times[-1] - times[0] > 0.5, "and no faster"
    neuron.desk.worked_at -= 60
    post.oracle.wait_until(
        lambda: post.oracle.of("heartbeat")[-1].at > post.oracle.of("pending")[-1].at + 1.5, what="heartbeats alone"
    )


# -- of ones own


def test_a_command_of_ones_own_runs_in_a_slot_with_its_data(post: Post) -> None:
    neuron = post.hire()
    seen = []

    @neuron.command("deploy")
    def deploy(data: Any) -> Any:
        seen.append((data, threading.current_thread() is not neuron.loops["commands"]))
        if data == "no":
            raise Rejected("not on a Friday", day="Friday")
        return {"deployed": data}

    post.start()
    assert post.completion(post.issue("deploy", {"version": 2}))["response"]["result"] == {
        "deployed": {"version": 2}
    }
    refused = post.completion(post.issue("deploy", "no"))
    assert (refused["response"]["outcome"], refused["response"]["day"]) == ("rejected", "Friday")
    assert seen == [({"version": 2}, True), ("no", True)]


def test_a_method_of_a_subclass_replaces_a_built_in_handler(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    class Mine(APINeuron):
        def handle_health_check(self, command: Entry) -> Any:
            return {"mine": True}

    post = Post(oracle, lambda **settings: make_neuron(neuron_class=Mine, **settings))
    post.hire()
    post.start()
    assert post.completion(post.issue("health_check"))["response"]["result"] == {"mine": True}


def test_a_command_that_cannot_be_registered_is_refused_with_its_line(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron()

    def deploy(data: Any) -> None: ...

    neuron.command("deploy")(deploy)
    place = f"test_commands.py:{deploy.__code__.co_firstlineno}"
    for name, words in (("deploy", "registered already"), ("stop", "built in"), ("run_task", "handle_"), ("", "name")):
        with pytest.raises(DefinitionError, match=words) as caught:
            neuron.command(name)(deploy)
        assert place in str(caught.value)
    with pytest.raises(DefinitionError, match="not a function"):
        neuron.command("other")(5)  # type: ignore[type-var]


# -- embedded


def test_an_embedded_neuron_refuses_to_restart_its_host(post: Post) -> None:
    post.hire()
    post.start()
    body = post.completion(post.issue("restart"))
    assert body["response"]["outcome"] == "rejected"
    assert "host" in body["errorMessage"]


def test_a_stop_command_ends_an_embedded_neuron_and_not_its_host(post: Post) -> None:
    neuron = post.hire()
    post.start()
    command = post.issue("stop")
    body = post.completion(command)
    assert body["response"]["outcome"] == "succeeded"
    wait_for(lambda: not any(loop.is_alive() for loop in neuron.loops.values()), what="the end of the loops")
    wait_for(lambda: post.oracle.of("heartbeat")[-1].body["status"] == "inactive", what="the last heartbeat")
    neuron.stop()


# -- what is no command


def listed(*commands: Any) -> Fault:
    return Fault(200, {"success": True, "data": list(commands)})


def run_gate(command_id: str, name: str) -> dict[str, Any]:
    data = {"task": "gate", "params": {"name": name}}
    return {"commandId": command_id, "commandType": "run_task", "commandData": data}


def test_what_is_no_command_is_left_alone_and_the_others_run(post: Post) -> None:
    post.hire()
    good = {"commandType": "health_check", "commandData": {}}
    strange: list[Any] = [
        None, 5, "x", [], {}, good, {**good, "commandId": ""}, {**good, "commandId": "a b"}, {**good, "commandId": 5},
        {**good, "commandId": "x" * 101}, {**good, "commandId": "../../admin"}, {"commandId": "c", "commandType": 5},
        {"commandId": "d", "commandType": ""},
    ]
    post.oracle.script("pending", [listed(*strange)] * 3)
    post.start()
    post.wait_for_polls(4)
    assert post.outcome(post.issue("health_check")) == "succeeded"
    assert {one.path.split("/")[-2] for one in post.oracle.of("acknowledge")} <= {"admin", post.oracle.issued[0]}
    assert post.neuron.loops["commands"].errors == 0


def test_deeply_nested_data_ends_its_command_and_holds_up_no_other(post: Post) -> None:
    neuron = post.hire()
    neuron.task("echo")(lambda params: params)
    post.start()
    deep = post.task("echo", {"deep": nested(90)}, priority=10)
    wide = post.issue("config_update", {"alert_thresholds": nested(90)}, priority=9)
    assert post.outcome(post.issue("health_check", priority=1)) == "succeeded"
    assert post.outcome(deep) == "succeeded"
    assert post.outcome(wide) == "rejected"
    assert neuron.loops["commands"].errors == 0


def test_data_nested_too_deep_to_be_kept_is_rejected_and_holds_up_no_other(post: Post) -> None:
    neuron = post.hire()
    command = post.issue("health_check")
    other = post.issue("health_check")
    deep = {"commandId": command, "commandType": "health_check", "commandData": nested(300)}
    post.oracle.script("pending", [listed(deep, {"commandId": other, "commandType": "health_check"})])
    post.start()
    assert "deeper than 100 levels" in post.completion(command)["errorMessage"]
    assert post.outcome(other) == "succeeded"
    assert neuron.loops["commands"].errors == 0


def test_an_answer_nested_too_deep_costs_neither_the_loop_nor_what_comes_later(post: Post) -> None:
    neuron = post.hire()
    deep = {"commandId": "c", "commandType": "health_check", "commandData": nested(980)}
    post.oracle.script("pending", [listed(deep), listed(deep)])
    post.start()
    assert post.outcome(post.issue("health_check")) == "succeeded"
    assert neuron.loops["commands"].errors == 0


def test_data_that_is_no_unicode_is_rejected(post: Post) -> None:
    neuron = post.hire()
    neuron.task("echo")(lambda params: params)
    command = post.task("echo", {"text": "fine"})
    replaced = {
        "commandId": command, "commandType": "run_task", "commandData": {"task": "echo", "params": {"text": "\ud800"}},
    }
    post.oracle.script("pending", [listed(replaced)])
    post.start()
    body = post.completion(command)
    assert body["response"]["outcome"] == "rejected"
    assert "surrogate" in body["errorMessage"]
    assert post.oracle.conflicting_outcomes() == []


def test_a_command_listed_again_after_its_end_is_answered_and_not_run_again(post: Post, gate: Gate) -> None:
    post.hire().task("gate")(gate.run)
    gate.open.set()
    post.start()
    command = post.task("gate", {"name": "once"})
    first = post.completion(command)
    post.oracle.script("pending", [listed(run_gate(command, "once"))])
    post.oracle.wait_until(lambda: len(post.oracle.of("complete", command)) >= 2, what="the second answer")
    assert post.oracle.of("complete", command)[1].body == first
    assert gate.begun == ["once"]
    assert len(post.oracle.of("acknowledge", command)) == 1
    assert post.oracle.flips() == []


def test_an_id_used_again_with_another_payload_is_rejected_and_not_run(post: Post, gate: Gate) -> None:
    post.hire().task("gate")(gate.run)
    gate.open.set()
    post.start()
    command = post.task("gate", {"name": "once"})
    assert post.outcome(command) == "succeeded"
    post.oracle.script("pending", [listed(run_gate(command, "another"))])
    post.oracle.wait_until(lambda: len(post.oracle.of("complete", command)) >= 2, what="the refusal")
    assert post.oracle.of("complete", command)[1].body["response"]["outcome"] == "rejected"
    assert gate.begun == ["once"]


@pytest.mark.slow
def test_many_pending_commands_are_worked_through(post: Post) -> None:
    neuron = post.hire(max_concurrent_tasks=2)
    done = []
    neuron.task("count")(lambda number: done.append(number))
    commands = [post.task("count", {"number": number}) for number in range(60)]
    post.start()
    post.oracle.wait_until(lambda: not post.oracle.lost_commands(), 40, "an end of every command")
    assert sorted(done) == list(range(60))
    assert [post.outcome(one) for one in commands] == ["succeeded"] * 60
    assert post.oracle.flips() == []
