"""What the real federation was measured to do to its neurons: the neuron survives each row of it.

The oracle errs as the real one errs. A row's number is the one in its docstring.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from neuron.reports import INT4_MAX
from neuron.telemetry import DayTotals
from neuron_client import APINeuron
from tests.rig.invariants import Request
from tests.rig.process import NeuronProcess, wait_for
from tests.rig.recording import Fault, Hang, RecordingFederation

MakeNeuron = Callable[..., APINeuron]
RunNeuron = Callable[..., NeuronProcess]
Log = Callable[[str], list[str]]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """`log("ERROR")`: the messages of that level so far."""
    caplog.set_level(logging.INFO, logger="neuron")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelname == level]


def started(oracle: RecordingFederation, neuron: APINeuron) -> APINeuron:
    """The neuron, registered and beating."""
    seen = len(oracle.of("heartbeat"))
    neuron.start()
    oracle.wait_until(lambda: any(one.status == 200 for one in oracle.of("heartbeat")[seen:]), what="a heartbeat")
    return neuron


def outcome(oracle: RecordingFederation, command_id: str) -> dict[str, Any]:
    """The completion of a command, once the federation has it."""
    oracle.wait_until(lambda: oracle.command(command_id)["status"] in ("completed", "failed"), what="its end")
    return oracle.command(command_id)


def test_a_known_id_keeps_its_token_and_a_lost_one_is_said_clearly_and_replaced_only_where_allowed(
    oracle: RecordingFederation, make_neuron: MakeNeuron, tmp_path: Path, log: Log
) -> None:
    """Row 1: registering a neuronId that exists is a 500 without a token."""
    for _ in range(2):
        started(oracle, make_neuron(federation_url=oracle.url, neuron_id="probe-1")).stop()
    assert [one.status for one in oracle.of("register")] == [201]

    lost = str(tmp_path / "lost")
    waiting = make_neuron(federation_url=oracle.url, neuron_id="probe-1", state_dir=lost)
    waiting.start()
    wait_for(lambda: any("issues no second token" in line for line in log("ERROR")), what="the remedy")
    assert waiting.neuron_id == "probe-1"
    assert waiting.live()[0]
    waiting.stop()

    allowed = make_neuron(
        federation_url=oracle.url, neuron_id="probe-1", state_dir=lost, on_identity_conflict="new-id"
    )
    started(oracle, allowed)
    assert allowed.neuron_id.startswith("probe-1-")


def test_all_threads_together_renew_a_refused_token_once(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    """Row 2: 401 for a missing, invalid or expired token."""
    neuron = started(oracle, make_neuron(federation_url=oracle.url, heartbeat_interval=600, command_interval=600))
    old = neuron.credentials.token

    def revoked(request: Request) -> Fault | None:
        if request.headers["Authorization"] != f"Bearer {old}":
            return None
        return Fault(401, {"success": False, "error": "Invalid or expired token"})

    for kind in ("heartbeat", "pending", "analytics"):
        oracle.script(kind, revoked)
    fresh = oracle.token(neuron.neuron_id)
    told = Fault(201, {"success": True, "data": {"token": fresh}}, delay=0.2)
    oracle.script("register", [told, Fault(500), Fault(500)])
    barrier = threading.Barrier(8)
    failures: list[BaseException] = []

    def call(step: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            step()
        except BaseException as failure:
            failures.append(failure)
        finally:
            neuron.transport.close()

    steps = [neuron.send_heartbeat, neuron.fetch_commands, neuron.report_analytics, neuron.fetch_commands] * 2
    threads = [threading.Thread(target=call, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(oracle.of("register")) == 2
    assert neuron.credentials.token == fresh


def test_a_refused_report_is_final_warned_of_once_and_its_figures_reach_the_federation_in_the_heartbeat(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Log
) -> None:
    """Row 3: every analytics report over JSON is refused with 400."""
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1, analytics_interval=3600)
    for milliseconds in range(50):
        neuron.simple_request(milliseconds % 5 != 0, milliseconds)
    started(oracle, neuron)
    oracle.wait_until(lambda: any(one.status for one in oracle.of("analytics")), what="the loop's first report")
    sent = len(oracle.of("analytics"))
    for _ in range(5):
        neuron.report_analytics()
    assert len(oracle.of("analytics")) == sent + 5, "one request for each report, and no other try"
    assert {one.status for one in oracle.of("analytics")} == {400}
    assert len([line for line in log("WARNING") if "refuses the report" in line]) == 1

    oracle.wait_until(
        lambda: oracle.of("heartbeat")[-1].body["applicationMetrics"]["total_requests"] == 50, what="its figures"
    )
    figures = oracle.of("heartbeat")[-1].body["applicationMetrics"]
    assert (figures["successful_requests"], figures["failed_requests"]) == (40, 10)
    assert figures["p95_response_time"] == pytest.approx(47, rel=0.02)
    neuron.stop()
    again = make_neuron(federation_url=oracle.url)
    with again:
        assert again.statistics.snapshot().total_requests == 50, "nothing is lost here"


def test_what_has_no_value_is_absent_from_every_body(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    """Row 4: a null for errorLog, processId, configVersion or buildVersion is a 400."""
    neuron = started(oracle, make_neuron(federation_url=oracle.url, heartbeat_interval=0.1))
    first = oracle.of("heartbeat")[0].body
    assert "errorLog" not in first
    assert all(isinstance(first[name], str) for name in ("processId", "configVersion", "buildVersion"))
    neuron.logger.error("something to tell")
    oracle.wait_until(lambda: any("errorLog" in one.body for one in oracle.of("heartbeat")), what="the error")
    outcome(oracle, oracle.issue(neuron.neuron_id, "health_check"))
    outcome(oracle, oracle.issue(neuron.neuron_id, "run_task", {"task": "report_generation"}))
    neuron.stop()
    assert oracle.schema_violations() == []
    assert oracle.own_4xx() == []


def test_the_lowest_score_arrives_as_one_and_not_as_a_hundred(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    """Row 5: healthScore 0 is stored as 100."""
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1)
    for name in ("database", "disk"):

        @neuron.dependency(name)
        def check() -> object:
            raise ConnectionError("gone")

    started(oracle, neuron)
    wait_for(lambda: neuron.health()["healthScore"] == 0, what="a score of 0")
    beats = len(oracle.of("heartbeat"))
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= beats + 2)
    assert oracle.of("heartbeat")[-1].body["healthScore"] == 1
    assert oracle.of("heartbeat")[-1].body["status"] == "error"
    assert oracle.store.heartbeats(neuron.neuron_id)[-1]["healthScore"] == 1


def test_every_number_fits_the_column_it_is_meant_for(make_neuron: MakeNeuron) -> None:
    """Row 6: scores over 100 and an absent status are a 400, numbers beyond int4 a 500."""
    with RecordingFederation(analytics="accept") as oracle:
        neuron = started(oracle, make_neuron(federation_url=oracle.url, heartbeat_interval=600))
        day = neuron.statistics.snapshot().day
        totals = DayTotals(day, successful=2**33, failed=2**32, data_processed=2**60)
        assert neuron.statistics.restore(totals.to_dict())
        neuron._started_at -= 2**32
        neuron.send_heartbeat()
        neuron.report_analytics()
        assert oracle.of("heartbeat")[-1].body["uptime"] == INT4_MAX
        (row,) = oracle.store.analytics(neuron.neuron_id)
        for name in ("requestCount", "successfulRequests", "failedRequests", "totalDataProcessed", "uptime"):
            assert row[name] == INT4_MAX
        assert row["errorRate"] == 3333
        for one in oracle.of("heartbeat"):
            assert 1 <= one.body["healthScore"] <= 100
            assert one.body["status"]
        assert {one.status for one in oracle.of("heartbeat")} == {200}


def test_no_body_is_over_100_kb_and_what_was_cut_is_said(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    """Row 7: a body over 100 kB is a 413."""
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1, metadata={"map": "x" * 300_000})
    neuron.task("large")(lambda: ["é" * 1000] * 500)
    neuron.task("verbose")(_fails_verbosely)
    for number in range(300):
        neuron.metric(f"{number}" * 40).add(number)
        neuron.event("n" * 500, text="x" * 5000)
        neuron.logger.error("problem %d %s", number, "y" * 5000)
    started(oracle, neuron)
    assert oracle.of("register")[0].body["metadata"] == {"truncated": True}

    large = outcome(oracle, oracle.issue(neuron.neuron_id, "run_task", {"task": "large"}))
    assert large["status"] == "completed"
    assert "bytes are over" in large["response"]["resultTruncated"]
    assert large["response"]["result"].startswith('["')
    verbose = outcome(oracle, oracle.issue(neuron.neuron_id, "run_task", {"task": "verbose"}))
    assert verbose["errorMessage"].startswith("RuntimeError: zzz")
    neuron.stop()
    assert oracle.of("analytics")
    assert [one for one in oracle.requests if 413 in (one.status, one.served)] == []
    assert max(len(one.raw) for one in oracle.requests) <= 100_000


def _fails_verbosely() -> None:
    raise RuntimeError("z" * 1_000_000)


def test_no_nan_and_no_infinity_leaves_the_neuron(oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    """Row 8: NaN or Infinity in JSON is a 400."""
    nan, infinity = float("nan"), float("inf")
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1)
    neuron.task("odd")(lambda: {"mean": nan, "most": infinity})
    neuron.task("records")(lambda: neuron.process_data([{"a": 1e308}, {"a": 1e308}, {"a": -1e308}]))
    for number in (nan, infinity, -infinity):
        neuron.metric("odd").set(number)
        neuron.event("odd", number=number)
        neuron.simple_request(True, number)
    started(oracle, neuron)
    odd = outcome(oracle, oracle.issue(neuron.neuron_id, "run_task", {"task": "odd"}))
    assert odd["response"]["outcome"] == "failed"
    assert "not JSON" in odd["errorMessage"]
    assert outcome(oracle, oracle.issue(neuron.neuron_id, "run_task", {"task": "records"}))["status"] == "completed"
    neuron.stop()
    for one in oracle.requests:
        json.loads(one.raw or b"{}", parse_constant=pytest.fail)
    assert oracle.own_4xx() == []


def test_an_acknowledge_comes_before_the_completion_and_never_after(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    """Row 9: an acknowledge works in any state, and after the completion it undoes it for good."""
    neuron = started(oracle, make_neuron(federation_url=oracle.url, heartbeat_interval=0.1))
    lost = Fault(503, act=True)
    oracle.script("acknowledge", [lost, lost])
    oracle.script("complete", [lost, None, lost])
    ids = [oracle.issue(neuron.neuron_id, "health_check") for _ in range(3)]
    for command_id in ids:
        outcome(oracle, command_id)
    oracle.wait_until(lambda: neuron.journal.counts().get("reported") == 3, 15, "three outcomes delivered")
    assert oracle.counts()["duplicate completes"] >= 2
    assert oracle.flips() == []
    for command_id in ids:
        steps = [one.kind for one in oracle.requests if one.command_id == command_id]
        assert steps == sorted(steps), "acknowledge … complete …"
        assert oracle.command(command_id)["status"] == "completed"


def test_one_outcome_is_told_until_it_is_accepted(oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    """Row 10: a completion works in any state and the last one wins, a failure over a success too."""
    runs = []
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1)
    neuron.task("once")(lambda: runs.append(1) or len(runs))  # type: ignore[func-returns-value]
    oracle.script("complete", [Fault(503), Fault(200, "<html>", act=True), None])
    started(oracle, neuron)
    command_id = oracle.issue(neuron.neuron_id, "run_task", {"task": "once"})
    oracle.wait_until(lambda: neuron.journal.counts().get("reported") == 1, 30, "the outcome delivered")
    told = oracle.of("complete", command_id)
    assert len(told) == 3
    assert len({one.raw for one in told}) == 1
    assert runs == [1]
    assert oracle.command(command_id)["response"]["result"] == 1


def test_a_command_that_only_the_journal_knows_of_is_finished_by_the_next_process(
    oracle: RecordingFederation, run_neuron: RunNeuron
) -> None:
    """Row 11: an acknowledged command leaves the pending list at once."""
    first = run_neuron(federation_url=oracle.url)
    oracle.wait_until(lambda: oracle.of("heartbeat"), 15)
    neuron_id = str(oracle.of("register")[0].body["neuronId"])
    release = threading.Event()
    oracle.script("acknowledge", [Hang(release, act=True)])
    command_id = oracle.issue(neuron_id, "health_check")
    oracle.wait_until(lambda: oracle.command(command_id)["status"] == "acknowledged")
    first.kill()
    release.set()
    assert oracle.store.pending(neuron_id) == []
    run_neuron(federation_url=oracle.url)
    assert outcome(oracle, command_id)["response"]["outcome"] == "succeeded"
    assert oracle.flips() == []


def test_a_deactivated_neuron_goes_on_as_before(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Log
) -> None:
    """Row 12: the heartbeats of a deactivated neuron are still answered with 200."""
    neuron = started(oracle, make_neuron(federation_url=oracle.url, heartbeat_interval=0.1))
    requests.delete(
        f"{oracle.url}/api/api-neurons/{neuron.neuron_id}", headers={"X-Admin-Key": oracle.admin_key}, timeout=5
    ).raise_for_status()
    row = oracle.store.neuron(neuron.neuron_id)
    assert row is not None
    assert not row["isActive"]
    beats = len(oracle.of("heartbeat"))
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= beats + 3)
    # The last one may be on its way still; those before it were answered.
    assert {one.status for one in oracle.of("heartbeat")[: beats + 2]} == {200}
    assert outcome(oracle, oracle.issue(neuron.neuron_id, "health_check"))["status"] == "completed"
    assert len(oracle.of("register")) == 1
    assert log("ERROR") == []


def test_remote_settings_arrive_by_command_and_are_never_asked_for(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    """Row 13: GET /config answers 403."""
    assert requests.get(f"{oracle.url}/api/api-neurons/config", timeout=5).status_code == 403
    neuron = started(oracle, make_neuron(federation_url=oracle.url))
    before = oracle.of("heartbeat")[-1].body["configVersion"]
    outcome(oracle, oracle.issue(neuron.neuron_id, "config_update", {"task_timeout": 77}))
    assert neuron.config.task_timeout == 77
    oracle.wait_until(lambda: oracle.of("heartbeat")[-1].body["configVersion"] != before, what="its configVersion")
    neuron.stop()
    assert [one.path for one in oracle.of("other")] == ["/api/api-neurons/config"], "the test's own, above"


def test_the_instructions_of_the_registration_are_not_followed(
    oracle: RecordingFederation, make_neuron: MakeNeuron, tmp_path: Path
) -> None:
    """Row 14: data.instructions names paths of another, older kind of neuron."""
    elsewhere = dict.fromkeys(("heartbeat", "commands"), "POST http://127.0.0.1:1/x")
    told = {"token": oracle.token("probe-1"), "instructions": elsewhere}
    oracle.script("register", [Fault(201, {"success": True, "data": told})])
    for neuron_id in ("probe-1", "probe-2"):
        settings = {"neuron_id": neuron_id, "state_dir": str(tmp_path / neuron_id)}
        with started(oracle, make_neuron(federation_url=oracle.url, **settings)) as neuron:
            outcome(oracle, oracle.issue(neuron.neuron_id, "health_check"))
    assert {one.kind for one in oracle.requests} >= {"register", "heartbeat", "pending", "acknowledge", "complete"}
    assert all(one.path.startswith("/api/api-neurons/") for one in oracle.requests)
    assert oracle.of("other") == []


def test_no_heartbeat_names_a_neuron(oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    """Row 15: a neuronId in the heartbeat's body overrides the token's."""
    oracle.token("bystander")
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1, metadata={"neuronId": "bystander"})
    neuron.metric("neuronId").set(1)
    started(oracle, neuron)
    neuron.stop()
    for kind in ("heartbeat", "analytics", "complete"):
        assert all("neuronId" not in one.body for one in oracle.of(kind))
    assert oracle.store.heartbeats("bystander") == []
