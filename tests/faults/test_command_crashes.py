"""The design's table of crashes, row by row; F25 and F26; and what a stop, a full disk or a lack of threads cost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neuron import commands
from neuron.journal import Journal
from neuron_client import APINeuron
from tests.faults import scenarios
from tests.faults.launcher import Launcher, afflicted
from tests.faults.trials import Trial
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.process import ROOT, wait_for
from tests.rig.recording import Fault, Hang, RecordingFederation


@dataclass(frozen=True)
class Row:
    """What the process left in the journal, what the federation shows, and how it must end."""

    left: str
    shown: str
    kind: str
    outcome: str
    effects: int
    acknowledges: int
    completes: int = 1


ROWS = [
    Row("nothing", "pending", "effect", "succeeded", 1, 1),
    Row("received", "pending", "effect", "succeeded", 1, 1),
    Row("received", "acknowledged", "effect", "succeeded", 1, 1),
    Row("acknowledged", "acknowledged", "effect", "succeeded", 1, 0),
    Row("acknowledged", "acknowledged", "config_update", "succeeded", 0, 0),
    Row("running", "acknowledged", "effect", "interrupted", 0, 0),
    Row("running", "acknowledged", "again", "succeeded", 0, 0),
    Row("running", "acknowledged", "config_update", "succeeded", 0, 0),
    Row("running", "acknowledged", "no_such_command", "interrupted", 0, 0),
    Row("running", "acknowledged", "restart", "succeeded", 0, 0),
    Row("running", "acknowledged", "stop", "succeeded", 0, 0),
    Row("finished", "acknowledged", "effect", "timed_out", 0, 0),
    Row("finished", "completed", "effect", "timed_out", 0, 0),
    Row("reported", "pending", "effect", "timed_out", 0, 0),
    Row("reported", "failed", "effect", "timed_out", 0, 0, completes=0),
]
STORED = {"success": False, "response": {"outcome": "timed_out"}, "errorMessage": "as it was stored"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind} {row.left}, {row.shown} there")
def test_each_row_of_the_table_of_crashes_ends_in_its_one_outcome(row: Row, launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        data: dict[str, Any] = {"log_level": "DEBUG"} if row.kind == "config_update" else {}
        kind = row.kind
        if kind in ("effect", "again"):
            kind, data = "run_task", {"task": row.kind, "params": {"n": 1}}
        command = trial.issue(kind, data)
        leave(trial, command, kind, data, row)

        child = trial.start()
        looks = len(trial.federation.of("pending"))
        trial.until(lambda: len(trial.federation.of("pending")) > looks + 5 and (not row.completes or trial.idle()))

        assert not child.ended()
        assert trial.outcome(command) == row.outcome
        assert len(trial.effects()) == row.effects
        assert len(trial.federation.of("acknowledge")) == row.acknowledges
        assert len(trial.federation.of("complete")) == row.completes
        if row.outcome == "timed_out":
            assert trial.federation.command(command)["errorMessage"] == "as it was stored"
        assert trial.violations() == {}


def leave(trial: Trial, command: str, kind: str, data: Any, row: Row) -> None:
    """The journal and the federation's row as the crash left them."""
    journal = Journal(str(trial.state), trial_logger())
    journal.open()
    if row.left != "nothing":
        entry, _ = journal.receive(command, kind, data, priority=5, timeout_at=None)
        if row.left in ("acknowledged", "running"):
            journal.advance(entry, row.left)
        elif row.left in ("finished", "reported"):
            journal.finish(entry, "timed_out", STORED)
        if row.left == "reported":
            journal.delivered(entry)
    journal.close()
    with trial.federation.store._transaction() as rows:
        ended = row.shown in ("completed", "failed")
        rows.execute(
            "UPDATE command SET status = ?, response = ?, errorMessage = ? WHERE commandId = ?",
            (row.shown, '{"outcome":"timed_out"}' if ended else None, "as it was stored" if ended else None, command),
        )


def trial_logger() -> Any:
    from neuron.logs import NeuronLogger

    return NeuronLogger({"neuron_id": "t", "neuron_name": "t", "neuron_type": "t"})


def test_a_command_listed_again_is_answered_from_the_journal_and_a_reused_id_refused(tmp_path: Path) -> None:
    assert scenarios.listed_again(ROOT, tmp_path) == []


def test_a_restarted_process_tells_who_it_was_and_how_long_it_took(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        child = trial.start()
        command = trial.issue("restart")
        trial.until(trial.idle)
        result = trial.federation.command(command)["response"]["result"]

    assert result["previousPid"] == result["pid"] == child.pid  # replaced by exec
    assert 0 < result["seconds"] < 15


# -- F26: what the federation will not take ----------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short, as if the clock ran faster."""
    monkeypatch.setattr(commands, "jittered", lambda attempt, floor: 0.01)


@pytest.mark.parametrize("kind", ["acknowledge", "complete"])
@pytest.mark.parametrize("status", [404, 409])
def test_what_is_refused_for_good_is_set_aside_after_one_try(
    kind: str, status: int, oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = started(oracle, make_neuron)
    oracle.script(kind, [Fault(status)])
    refused = oracle.issue(neuron.neuron_id, "health_check")
    wait_for(lambda: neuron.journal.counts().get("aside") == 1, what="the refused one set aside")
    second = oracle.issue(neuron.neuron_id, "health_check")
    wait_for(lambda: oracle.command(second)["status"] == "completed")

    wait_for(lambda: neuron.status()["commands"]["counts"] == {"aside": 1, "reported": 1}, what="both over")
    assert len(oracle.of(kind, refused)) == 1


def test_a_result_too_large_is_sent_once_more_without_it(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = started(oracle, make_neuron)
    oracle.script("complete", [Fault(413), Fault(413), None, Fault(413), None])
    hopeless = oracle.issue(neuron.neuron_id, "health_check")
    wait_for(lambda: neuron.journal.counts().get("aside") == 1, what="the hopeless one set aside")
    oracle.script("complete", [Fault(413), None])
    trimmed = oracle.issue(neuron.neuron_id, "health_check")
    wait_for(lambda: oracle.command(trimmed)["status"] == "completed")

    assert len(oracle.of("complete", hopeless)) == 2
    response = oracle.command(trimmed)["response"]
    assert response["outcome"] == "succeeded"
    assert "too large" in response["resultTruncated"]
    assert "result" not in response


@pytest.mark.parametrize("kind", ["acknowledge", "complete"])
def test_what_fails_again_and_again_is_tried_ten_times_then_hourly_and_holds_up_nothing(
    kind: str, oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], impatient: None
) -> None:
    neuron = started(oracle, make_neuron, command_interval=0.05)
    poisoned = oracle.issue(neuron.neuron_id, "health_check", {"poison": True})
    oracle.script(kind, lambda request: Fault(500) if request.command_id == poisoned else None)
    wait_for(lambda: len(oracle.of(kind, poisoned)) >= 10, what="ten tries")
    second = oracle.issue(neuron.neuron_id, "health_check")
    wait_for(lambda: oracle.command(second)["status"] == "completed", what="the command behind it")
    looks = len(oracle.of("pending"))
    oracle.wait_until(lambda: len(oracle.of("pending")) > looks + 5)

    assert len(oracle.of(kind, poisoned)) == 10
    (waiting,) = [
        entry for entry in [*neuron.journal.unfinished(), *neuron.journal.undelivered(10)]
        if entry.command_id == poisoned
    ]
    assert waiting.deliveries == 10


def test_results_that_wait_an_hour_let_a_new_one_pass_however_many_they_are(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = started(oracle, make_neuron)
    for number in range(60):
        entry, _ = neuron.journal.receive(f"hourly-{number}", "x", None, priority=5, timeout_at=None)
        neuron.journal.finish(entry, "failed", {"success": False, "response": {"outcome": "failed"}})
        for _ in range(10):
            neuron.journal.delivery_failed(entry, 3600)
    command = oracle.issue(neuron.neuron_id, "health_check")

    wait_for(lambda: oracle.command(command)["status"] == "completed", what="the result behind sixty that wait")


def test_what_is_met_again_at_each_look_is_one_line(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], impatient: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    neuron = started(oracle, make_neuron, command_interval=0.05)
    oracle.always("acknowledge", Fault(500))
    oracle.issue(neuron.neuron_id, "health_check")
    oracle.issue(neuron.neuron_id, "health_check", commandId="not usable, for its blanks")
    wait_for(lambda: len(oracle.of("acknowledge")) == 10, what="ten tries")

    for text in ("acknowledge failed", "is no command"):
        assert sum(text in record.getMessage() for record in caplog.records) == 1, text


def started(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], **settings: Any
) -> APINeuron:
    neuron = make_neuron(federation_url=oracle.url, host="", **settings)
    assert neuron.start()
    wait_for(neuron.registered.is_set)
    return neuron


# -- between the steps -------------------------------------------------------------------------------------------------


def test_a_stop_happens_though_nobody_can_be_told_and_is_told_by_the_next_process(
    launcher: Launcher, tmp_path: Path
) -> None:
    with Trial(launcher, tmp_path) as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.always(TcpFault("rst_before", "/complete"))
            child = trial.start(federation_url=proxy.url)
            command = trial.issue("stop")
            assert child.wait(6) == 0
        assert trial.status(command) == "acknowledged"
        trial.start()
        trial.until(trial.idle)

        assert trial.outcome(command) == "succeeded"
        assert trial.violations() == {}


def test_a_restart_happens_though_another_result_cannot_be_delivered(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.always(TcpFault("rst_before", "/complete"))
            child = trial.start(federation_url=proxy.url)
            trial.issue_task("effect", 9)
            trial.until(lambda: proxy.counts["rst_before"] > 1)
            trial.issue("restart", priority=1)
            trial.until(lambda: child.text().count("neuron started") == 2, what="the new process")
            proxy.clear()
            trial.until(trial.idle)

        assert trial.violations() == {}


def test_a_disk_that_fills_up_between_a_completion_and_its_note_holds_up_no_later_result(
    launcher: Launcher, tmp_path: Path
) -> None:
    with Trial(launcher, tmp_path) as trial:
        trial.federation.always("complete", Fault(503))
        child = trial.start(request_timeout=5)
        for _ in range(3):
            trial.issue_task("effect")
        trial.until(lambda: len(trial.effects()) == 3 and trial.federation.of("complete"), what="three results")
        release = threading.Event()
        trial.federation.script("complete", [Hang(release, act=True)])
        trial.federation.always("complete", None)
        trial.until(lambda: any(trial.ended(command) for command in trial.federation.issued), what="the first taken")
        with afflicted(child, "pwrite64:error=ENOSPC"):
            release.set()
            child.wait_logged("cannot be written")
        trial.until(trial.idle, what="the other results")

        assert trial.violations() == {}


def test_a_command_that_finds_no_thread_is_run_when_there_is_one(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron = started(oracle, make_neuron)
    refused = 0
    start = threading.Thread.start

    def refusing(thread: threading.Thread) -> None:
        nonlocal refused
        if thread.name.startswith("neuron-command-") and refused < 2:
            refused += 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    command = oracle.issue(neuron.neuron_id, "run_task", {"task": "report_generation"})
    wait_for(lambda: oracle.command(command)["status"] == "completed")

    assert refused == 2
    assert len(oracle.of("acknowledge")) == 1


def test_the_outcome_of_a_process_that_is_killed_with_many_tasks_is_told_for_each(
    launcher: Launcher, tmp_path: Path
) -> None:
    with Trial(launcher, tmp_path) as trial:
        child = trial.start(max_concurrent_tasks=8)
        running = [trial.issue_task("slow", seconds=30) for _ in range(8)]
        trial.until(lambda: len(trial.effects()) == 8, what="eight running tasks")
        waiting = trial.issue_task("effect")
        child.signal(signal.SIGKILL)
        child.wait()
        trial.start(max_concurrent_tasks=8)
        trial.until(trial.idle)

        assert [trial.outcome(command) for command in running] == ["interrupted"] * 8
        assert trial.outcome(waiting) == "succeeded"
        assert trial.violations() == {}
