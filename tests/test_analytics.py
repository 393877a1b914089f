"""The day's report: true counts, true quantiles, the federation's day, and bodies no column refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from neuron import reports
from neuron.config import NeuronConfig
from neuron.errors import FederationError, Unreachable
from neuron.health import degraded
from neuron.logs import logger
from neuron.machine import Averages, SystemSample
from neuron.metrics import Events, Metrics
from neuron.status import heartbeat
from neuron.telemetry import DayTotals, RequestSnapshot, RequestStatistics
from neuron.transport import encode
from neuron_client import APINeuron
from tests.rig.process import wait_for
from tests.rig.recording import RecordingFederation
from tests.rig.schema import faults_of

MakeNeuron = Callable[..., APINeuron]
DAY = 86_400.0
HOURLY = {"heartbeat_interval": 3600, "command_interval": 3600, "analytics_interval": 3600}


@pytest.fixture
def accepting() -> Iterator[RecordingFederation]:
    """As the real federation, but that it takes reports."""
    with RecordingFederation(analytics="accept") as running:
        yield running


def started(oracle: RecordingFederation, neuron: APINeuron) -> APINeuron:
    """The neuron after its loops' first round."""
    beats, reported = len(oracle.of("heartbeat")), len(oracle.of("analytics"))
    neuron.start()
    oracle.wait_until(lambda: any(one.until for one in oracle.of("heartbeat")[beats:]), what="a heartbeat")
    oracle.wait_until(lambda: any(one.until for one in oracle.of("analytics")[reported:]), what="a report")
    return neuron


def quiet(oracle: RecordingFederation, make_neuron: MakeNeuron, **settings: Any) -> APINeuron:
    """A neuron after its loops' first round, which do nothing more by themselves. It need not register first."""
    settings = {**HOURLY, "neuron_id": "probe-1", "token": oracle.token("probe-1"), **settings}
    return started(oracle, make_neuron(federation_url=oracle.url, **settings))


def reported(oracle: RecordingFederation) -> dict[str, Any]:
    return dict(oracle.of("analytics")[-1].body)


def exact(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


# -- counts and quantiles ----------------------------------------------------------------------------------------


def test_the_report_is_what_happened_counted_exactly_with_quantiles_within_one_per_cent(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = quiet(accepting, make_neuron)
    chance = random.Random(7)
    requests = [(chance.random() < 0.93, chance.lognormvariate(6, 0.8)) for _ in range(20_000)]

    def serve(part: list[tuple[bool, float]]) -> None:
        for success, milliseconds in part:
            neuron.simple_request(success=success, response_time=milliseconds)

    threads = [threading.Thread(target=serve, args=(requests[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    neuron.statistics.add_data_processed(123_456)
    neuron.metric("orders").add(5)
    neuron.event("deployed", version="2.0")
    neuron.report_analytics()

    body = reported(accepting)
    failed = sum(not success for success, _ in requests)
    times = [milliseconds for _, milliseconds in requests]
    assert body["requestCount"] == 20_000
    assert (body["successfulRequests"], body["failedRequests"]) == (20_000 - failed, failed)
    assert body["errorRate"] == round(failed / 2)
    assert body["averageResponseTime"] == round(sum(times) / len(times))
    # Half a millisecond is the column's rounding.
    assert body["p95ResponseTime"] == pytest.approx(exact(times, 0.95), rel=0.01, abs=0.5 + 0.01 * exact(times, 0.95))
    assert body["p99ResponseTime"] == pytest.approx(exact(times, 0.99), rel=0.01, abs=0.5 + 0.01 * exact(times, 0.99))
    assert body["totalDataProcessed"] == 123_456
    assert body["customMetrics"] == {"orders": 5}
    assert [(event["name"], event["data"]) for event in body["events"]] == [("deployed", {"version": "2.0"})]
    assert 0 < body["memoryUsageAvg"] < 10_000
    assert 0 < body["diskUsageAvg"] < 10_000
    assert accepting.of("analytics")[-1].status == 200
    (row,) = accepting.store.analytics(neuron.neuron_id)
    assert row["requestCount"] == 20_000


def test_a_day_without_requests_claims_nothing(accepting: RecordingFederation, make_neuron: MakeNeuron) -> None:
    quiet(accepting, make_neuron)
    body = reported(accepting)
    for name in ("requestCount", "failedRequests", "errorRate", "p95ResponseTime", "totalDataProcessed"):
        assert body[name] == 0
    assert (body["customMetrics"], body["events"]) == ({}, [])


def test_reports_go_out_by_themselves_at_their_interval(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = make_neuron(federation_url=accepting.url, analytics_interval=0.2, heartbeat_interval=3600)
    neuron.start()
    accepting.wait_until(lambda: accepting.of("analytics"))
    neuron.simple_request()
    accepting.wait_until(lambda: reported(accepting)["requestCount"] == 1, 3, "a report with it")
    seen = accepting.of("analytics")
    neuron.stop()
    gaps = [after.at - before.at for before, after in itertools.pairwise(seen[1:])]
    assert all(0.1 < gap < 1.0 for gap in gaps), gaps
    assert accepting.analytics_regressions() == []


def test_the_last_report_on_the_way_out_holds_the_last_request(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = quiet(accepting, make_neuron)
    for _ in range(17):
        neuron.simple_request()
    neuron.stop()
    assert reported(accepting)["requestCount"] == 17


# -- refusal and outage ------------------------------------------------------------------------------------------


def test_a_400_is_final_for_that_report_and_one_line_in_the_log(
    oracle: RecordingFederation, make_neuron: MakeNeuron, caplog: pytest.LogCaptureFixture
) -> None:
    neuron = make_neuron(federation_url=oracle.url, analytics_interval=0.1)
    neuron.start()
    oracle.wait_until(lambda: len(oracle.of("analytics")) >= 8, what="eight refused reports")
    gaps = [after.at - before.at for before, after in itertools.pairwise(oracle.of("analytics"))]
    assert sorted(gaps)[len(gaps) // 2] > 0.08, "reports at their interval, not tries"
    warnings = [record for record in caplog.records if "refuses the report" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING
    assert "Expected date, received string" in warnings[0].getMessage()
    assert neuron.journal.queued_reports() == []


def test_the_refused_report_of_an_ended_day_is_not_kept_for_another_try(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = quiet(oracle, make_neuron)
    neuron.journal.save_day("2020-02-02", DayTotals("2020-02-02", successful=3).to_dict())
    neuron.report_analytics()
    neuron.report_analytics()
    assert [one.body["date"] for one in oracle.of("analytics")].count("2020-02-02") == 1


def test_over_an_outage_the_newest_report_wins_and_totals_never_fall(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = quiet(accepting, make_neuron)
    neuron.journal.save_day("2020-02-02", DayTotals("2020-02-02", successful=3, failed=1).to_dict())
    before = len(accepting.of("analytics"))
    accepting.stop()
    for count in (10, 20, 30):
        for _ in range(10):
            neuron.simple_request()
        with pytest.raises(Unreachable):
            neuron.report_analytics()
        assert neuron.statistics.snapshot().total_requests == count
    accepting.start()
    neuron.report_analytics()
    neuron.report_analytics()
    neuron.stop()
    first, *others = [(one.body["date"], one.body["requestCount"]) for one in accepting.of("analytics")[before:]]
    today = neuron.statistics.snapshot().day
    assert first == ("2020-02-02", 4)
    assert set(others) == {(today, 30)}, "the old day went out first, and once"
    assert accepting.analytics_regressions(sent={today: 30}, accepted={today: 30}) == []


def test_what_the_outage_held_back_goes_out_when_the_federation_is_heard_again(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = make_neuron(federation_url=accepting.url, heartbeat_interval=0.1, analytics_interval=3600)
    started(accepting, neuron)
    accepting.stop()
    wait_for(lambda: neuron.outage_since is not None, what="the outage")
    neuron.simple_request()
    accepting.start()
    accepting.wait_until(lambda: reported(accepting)["requestCount"] == 1, what="the report")


# -- restarts and midnight ---------------------------------------------------------------------------------------


def test_a_restart_in_the_middle_of_the_day_goes_on_counting(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    times: list[float] = []
    chance = random.Random(3)
    for count in (400, 350, 250):
        neuron = quiet(accepting, make_neuron)
        assert reported(accepting)["requestCount"] == len(times)
        for _ in range(count):
            times.append(chance.uniform(10, 5000))
            neuron.simple_request(len(times) % 4 != 0, times[-1])
        neuron.stop()
    body = reported(accepting)
    assert (body["requestCount"], body["failedRequests"]) == (1000, 250)
    assert body["averageResponseTime"] == round(sum(times) / 1000)
    assert body["p95ResponseTime"] == pytest.approx(exact(times, 0.95), rel=0.011)
    assert accepting.analytics_regressions() == []


def test_a_day_that_ended_while_no_process_ran_is_reported_by_the_next(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    before = quiet(accepting, make_neuron)
    before.journal.save_day("2020-02-02", DayTotals("2020-02-02", successful=7, failed=2).to_dict())
    before.stop()
    quiet(accepting, make_neuron).stop()
    days = [(one.body["date"], one.body["requestCount"]) for one in accepting.of("analytics")]
    assert days.count(("2020-02-02", 9)) == 1


def test_the_day_ends_at_the_federations_midnight_with_its_last_report(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    midnight = (accepting.now() // DAY + 1) * DAY
    accepting.clock_offset = midnight - 60 - time.time()
    neuron = quiet(accepting, make_neuron)
    neuron.send_heartbeat()
    old = neuron.statistics.snapshot().day
    for _ in range(100):
        neuron.simple_request(True, 20)
    neuron.report_analytics()
    assert (reported(accepting)["date"], reported(accepting)["requestCount"]) == (old, 100)
    for _ in range(11):
        neuron.simple_request(False, 40)
    assert neuron.statistics.snapshot().total_requests == 111

    accepting.clock_offset += 120
    neuron.send_heartbeat()
    for _ in range(7):
        neuron.simple_request(True, 30)
    seen = len(accepting.of("analytics"))
    neuron.report_analytics()
    ended, begun = [one.body for one in accepting.of("analytics")[seen:]]
    assert (ended["date"], ended["requestCount"], ended["failedRequests"]) == (old, 111, 11)
    assert begun["date"] > old
    assert (begun["requestCount"], begun["failedRequests"]) == (7, 0)
    neuron.report_analytics()
    assert len(accepting.of("analytics")) == seen + 3, "the ended day is told once"
    rows = accepting.store.analytics(neuron.neuron_id)
    assert [row["requestCount"] for row in rows] == [111, 7]
    assert accepting.analytics_regressions() == []


def test_the_loop_reports_just_before_and_just_after_midnight_whatever_its_interval(make_neuron: MakeNeuron) -> None:
    neuron = make_neuron(federation_url="http://127.0.0.1:1", analytics_interval=3600)
    midnight = (time.time() // DAY + 1) * DAY
    for before, wait in ((4000, None), (3500, 3495), (6, 1), (4.9, 7.9), (0.1, 3.1)):
        neuron.transport.clock.offset = midnight - before - time.time()
        assert neuron._until_next_report() == (wait and pytest.approx(wait, abs=0.05))


def test_the_ended_day_is_told_by_the_loop_soon_after_its_midnight(
    accepting: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    midnight = (accepting.now() // DAY + 1) * DAY
    accepting.clock_offset = midnight - 1 - time.time()
    neuron = quiet(accepting, make_neuron, heartbeat_interval=0.2)
    neuron.simple_request()
    old = neuron.statistics.snapshot().day
    accepting.wait_until(lambda: reported(accepting)["date"] > old, 8, "the new day's first report")
    neuron.stop()
    last = [one.body for one in accepting.of("analytics") if one.body["date"] == old][-1]
    assert last["requestCount"] == 1
    assert accepting.analytics_regressions() == []


# -- bodies that no column refuses -------------------------------------------------------------------------------

TEXTS = st.text(max_size=20) | st.sampled_from(["\0", "\ud800", "\x1b[31m", "‮", "😀" * 50, "é" * 300])
NUMBERS = st.floats() | st.integers() | st.sampled_from([2**31, 2**63, -1, 10**400, 1e308, -0.0])
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.binary(max_size=5) | st.builds(object),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(TEXTS, inner, max_size=4)
    | st.tuples(inner)
    | st.frozensets(st.integers(), max_size=3),
    max_leaves=8,
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
COUNTS = st.integers(0, 2**70)
MILLISECONDS = st.none() | st.floats(0, 1e9)
PERCENT = st.none() | st.floats(0, 100)
NAMES = st.text(st.characters(min_codepoint=32), min_size=1, max_size=50).filter(lambda name: name.strip())
PHASES = (Phase.generate, Phase.shrink)
EXAMPLES = settings(max_examples=120, deadline=None, database=None, phases=PHASES)


def refused(kind: str, body: dict[str, Any]) -> list[str]:
    raw = encode(body)
    unstorable = [f"NUL, which PostgreSQL does not store: {text!r}" for text in texts(json.loads(raw)) if "\0" in text]
    return faults_of(kind, raw) + unstorable


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from texts(entry)


def test_the_schema_that_judges_here_refuses_what_the_federation_refuses() -> None:
    good = {"status": "active", "healthScore": 50, "uptime": 3}
    assert refused("heartbeat", good) == []
    wrong: list[dict[str, Any]] = [{"errorLog": None}, {"uptime": 2**31}, {"healthScore": 101}, {"neuronId": "n"}]
    for bad in (*wrong, {"hostInfo": "x" * 100_000}, {"hostInfo": {"a": ["\0"]}}):
        assert refused("heartbeat", good | bad), bad


@EXAMPLES
@given(
    name=NAMES,
    metadata=st.dictionaries(TEXTS, JSON, max_size=4),
    endpoints=st.lists(JSON, max_size=4),
    capabilities=st.lists(TEXTS, max_size=4),
    tasks=st.lists(NAMES, max_size=4),
    address=st.sampled_from(["", "http://127.0.0.1:8080"]),
)
def test_every_registration_is_one_the_federation_takes(
    name: str, metadata: dict[str, Any], endpoints: list[Any], capabilities: list[str], tasks: list[str], address: str
) -> None:
    config = NeuronConfig(
        name=name, metadata=metadata, api_endpoints=tuple(endpoints), capabilities=tuple(capabilities)
    )
    assert refused("register", reports.registration(config, "probe-1", address, tasks, ["/health"])) == []


@EXAMPLES
@given(
    counts=st.tuples(COUNTS, COUNTS, COUNTS),
    times=st.tuples(MILLISECONDS, MILLISECONDS, MILLISECONDS),
    averages=st.tuples(PERCENT, PERCENT, PERCENT),
    uptime=st.floats(0, 1e12),
    network=st.tuples(COUNTS, COUNTS),
    metrics=st.lists(st.tuples(TEXTS, NUMBERS), max_size=5),
    events=st.lists(st.tuples(TEXTS, st.dictionaries(TEXTS, ANYTHING, max_size=2)), max_size=5),
    alerts=st.lists(st.fixed_dictionaries({"name": TEXTS, "since": TEXTS}), max_size=5),
)
def test_every_report_is_one_the_federation_takes(
    counts: tuple[int, int, int],
    times: tuple[float | None, float | None, float | None],
    averages: tuple[float | None, float | None, float | None],
    uptime: float,
    network: tuple[int, int],
    metrics: list[tuple[str, float]],
    events: list[tuple[str, dict[str, Any]]],
    alerts: list[dict[str, str]],
) -> None:
    snapshot = RequestSnapshot(
        "2025-06-01", counts[0] + counts[1], counts[0], counts[1], 0, counts[2], *times
    )
    figures, happened = Metrics(), Events()
    for name, number in metrics:
        figures.metric(name).add(number)
    for name, data in events:
        happened.event(name, **data)
    body = reports.analytics(
        "2025-06-01", snapshot, Averages(*averages), uptime=uptime, network=network,
        custom_metrics=figures.export(), alerts=alerts, events=happened.export(),
    )
    assert refused("analytics", reports.plain(body)) == []


@EXAMPLES
@given(
    outcome=st.sampled_from(reports.OUTCOMES),
    result=JSON,
    error=TEXTS,
    details=st.dictionaries(TEXTS | st.sampled_from(["outcome", "durationMs", "result"]), ANYTHING, max_size=3),
    milliseconds=st.none() | st.floats(0, 1e9),
)
def test_every_completion_is_one_the_federation_takes(
    outcome: str, result: Any, error: str, details: dict[str, Any], milliseconds: float | None
) -> None:
    body = reports.completion(outcome, result=result, error=error, details=details, milliseconds=milliseconds)
    assert refused("complete", body) == []
    assert refused("complete", reports.trimmed(body)) == []
    assert body["response"]["outcome"] == outcome


LARGE = {"metadata": {"map": "x" * 120_000}, "api_endpoints": ("/x",) * 30_000, "capabilities": ("é" * 90,) * 3000}


@pytest.mark.parametrize("name", [*LARGE, "all"])
def test_a_registration_with_too_much_in_it_is_cut(name: str) -> None:
    config = NeuronConfig(**(LARGE if name == "all" else {name: LARGE[name]}))  # type: ignore[arg-type]
    assert refused("register", reports.registration(config, "probe-1", "", ["hello"], ["/health"])) == []


@pytest.mark.parametrize(
    "parts",
    [
        {"result": ["é" * 120_000]}, {"result": "\\" * 63_000}, {"error": "\ud800" * 120_000},
        {"details": {"rows": ["😀"] * 120_000}},
        {"result": "é" * 10_600, "error": "😀" * 5000, "details": {"rows": "é" * 10_000}},
    ],
    ids=["result", "backslashes", "error", "details", "all"],
)
def test_a_completion_with_too_much_in_it_is_cut_and_says_so(parts: dict[str, Any]) -> None:
    body = reports.completion("failed", **parts)
    assert refused("complete", body) == []
    assert body["response"]["outcome"] == "failed"
    assert len(body["errorMessage"]) <= 4000 if "error" in parts else "resultTruncated" in body["response"]


@EXAMPLES
@given(result=ANYTHING)
def test_a_result_that_is_not_json_raises_what_the_command_desk_expects(result: Any) -> None:
    try:
        body = reports.completion("succeeded", result=result)
    except (TypeError, ValueError):
        return
    assert refused("complete", body) == []


def test_every_heartbeat_is_one_the_federation_takes(make_neuron: MakeNeuron) -> None:
    neuron = make_neuron(federation_url="http://127.0.0.1:1")
    neuron.names["neuron_id"] = "probe-1"
    said: list[Any] = [True]
    neuron.dependency("talkative", every=0.001)(lambda: said[-1])
    measured = {item.name: st.none() | st.floats() for item in dataclasses.fields(SystemSample) if item.name != "load"}
    samples = st.builds(SystemSample, **measured, load=st.none() | st.tuples(st.floats(), st.floats(), st.floats()))

    @settings(max_examples=80, deadline=None, database=None, phases=PHASES)
    @given(
        sample=samples,
        requests=st.lists(st.tuples(ANYTHING, ANYTHING | st.floats(0, 1e6)), max_size=5),
        problems=st.lists(TEXTS, max_size=3),
        answer=TEXTS,
        metric=st.tuples(TEXTS, NUMBERS),
        uptime=st.floats(-1e3, 1e12),
    )
    def check(
        sample: SystemSample, requests: list[tuple[Any, Any]], problems: list[str], answer: str,
        metric: tuple[str, float], uptime: float,
    ) -> None:
        neuron.statistics = RequestStatistics(neuron.now)
        neuron._started_at = time.monotonic() - uptime
        for success, milliseconds in requests:
            neuron.statistics.record(success, milliseconds)
        for problem in problems:
            neuron.logger.error("%s", problem)
            neuron.logger.warning("%s", problem)
        said.append(degraded(answer))
        neuron.metric(metric[0]).set(metric[1])
        body = heartbeat(neuron, sample, None, 0.0)
        assert refused("heartbeat", body) == []
        json.dumps(body)

    logger.addHandler(neuron.problems)
    try:
        check()
    finally:
        logger.removeHandler(neuron.problems)
        wait_for(lambda: not any("dependency" in thread.name for thread in threading.enumerate()), 5, "its check's end")


@pytest.mark.parametrize(
    ("value", "column"),
    [
        (None, 0), (float("nan"), 0), (float("inf"), 2**31 - 1), (float("-inf"), 0), (-5, 0), (0.5, 0), (0.51, 1),
        (2**31 - 1, 2**31 - 1), (2**31, 2**31 - 1), (10**400, 2**31 - 1), (1e308, 2**31 - 1),
    ],
    ids=lambda value: str(value)[:12],
)
def test_int4_is_rounded_and_clamped(value: float | None, column: int) -> None:
    assert reports.int4(value) == column


def test_a_whole_life_breaks_no_rule_of_the_protocol(
    accepting: RecordingFederation, make_neuron: MakeNeuron, tmp_path: Path
) -> None:
    neuron = make_neuron(federation_url=accepting.url, analytics_interval=0.1, heartbeat_interval=0.1)
    neuron.task("hello")(lambda name: {"hello": name})
    started(accepting, neuron)
    ids = [
        accepting.issue(neuron.neuron_id, "run_task", {"task": "hello", "params": {"name": "é\0\x1b"}}),
        accepting.issue(neuron.neuron_id, "run_task", {"task": "unknown"}),
        accepting.issue(neuron.neuron_id, "make_coffee", {}),
        accepting.issue(neuron.neuron_id, "config_update", {"heartbeat_interval": 2, "log_level": "INFO"}),
    ]
    accepting.wait_until(lambda: not accepting.lost_commands(), what="the end of every command")
    assert [accepting.command(one)["response"]["outcome"] for one in ids] == [
        "succeeded", "rejected", "rejected", "succeeded"
    ]
    with pytest.raises(FederationError):
        neuron.complete("never-issued", reports.completion("succeeded"))
    neuron.stop()
    assert accepting.schema_violations() == []
    assert accepting.own_4xx() == []
