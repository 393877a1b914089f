"""The local federation, spoken to as neurons, people and parents of processes speak to it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests

from local_federation import LocalFederation
from local_federation.store import KEPT_HEARTBEATS
from local_federation.testing import Federation, federation

__all__ = ["federation"]

REGISTRATION: dict[str, Any] = {
    "neuronId": "scorer-1",
    "name": "Scorer",
    "type": "scoring",
    "language": "python",
    "version": "1.0.0",
    "healthcheckEndpoint": "/health",
    "apiEndpoints": ["/health"],
    "authentication": {"type": "jwt"},
    "capabilities": ["score"],
}
COMMAND = [sys.executable, "-m", "local_federation", "--port"]
BEAT: dict[str, Any] = {"status": "active", "healthScore": 90, "uptime": 5}


class Clock:
    """Epoch seconds that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Caller:
    """Calls a federation as one neuron, and as its administrator."""

    def __init__(self, url: str) -> None:
        self.base = f"{url}/api/api-neurons"
        self.token = ""

    def post(self, path: str, body: Any = None, *, token: str | None = None, raw: bytes | None = None) -> Any:
        data = raw if raw is not None else json.dumps(body if body is not None else {}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token or self.token}"}
        return requests.post(self.base + path, data=data, headers=headers, timeout=5)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.base + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=5)

    def admin(self, method: str, path: str, body: Any = None) -> requests.Response:
        headers = {"X-Admin-Key": "admin-secret-key"}
        return requests.request(method, self.base + path, json=body, headers=headers, timeout=5)

    def register(self, **changes: Any) -> requests.Response:
        answer = requests.post(f"{self.base}/register", json=REGISTRATION | changes, timeout=5)
        if answer.status_code == 201:
            self.token = answer.json()["data"]["token"]
        return answer

    def issue(self, neuron_id: str = "scorer-1", **changes: Any) -> str:
        body = {"commandType": "run_task", "commandData": {"task": "score"}} | changes
        answer = self.admin("POST", f"/{neuron_id}/commands", body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["data"]["commandId"])

    def command(self, command_id: str) -> dict[str, Any]:
        data: dict[str, Any] = self.admin("GET", f"/scorer-1/commands/{command_id}").json()["data"]
        return data

    def neuron(self) -> dict[str, Any]:
        data: dict[str, Any] = self.admin("GET", "/scorer-1").json()["data"]
        return data


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def correct(clock: Clock) -> Iterator[Caller]:
    with LocalFederation(clock=clock) as running:
        caller = Caller(running.url)
        assert caller.register().status_code == 201
        yield caller


@pytest.fixture
def real(clock: Clock) -> Iterator[Caller]:
    with LocalFederation(clock=clock, like_real=True) as running:
        caller = Caller(running.url)
        assert caller.register().status_code == 201
        yield caller


@pytest.fixture(params=["correct", "like_real"])
def either(request: pytest.FixtureRequest, clock: Clock) -> Iterator[Caller]:
    with LocalFederation(clock=clock, like_real=request.param == "like_real") as running:
        caller = Caller(running.url)
        assert caller.register().status_code == 201
        yield caller


# --- what bites, row by row, at the real one


def test_row_1_a_second_registration_is_a_500_without_a_token(real: Caller) -> None:
    for token in ("", real.token):
        answer = real.post("/register", REGISTRATION, token=token)
        assert answer.status_code == 500
        assert answer.json() == {"success": False, "error": "Failed to register API neuron"}


def test_row_2_a_missing_and_a_wrong_token_are_told_apart(either: Caller) -> None:
    missing = requests.post(f"{either.base}/heartbeat", json=BEAT, timeout=5)
    wrong = either.post("/heartbeat", BEAT, token="no.such.token")
    assert (missing.status_code, missing.json()["error"]) == (401, "Missing or invalid authorization header")
    assert (wrong.status_code, wrong.json()["error"]) == (401, "Invalid or expired token")


def test_row_2_a_token_ends_after_a_year_and_not_before(either: Caller, clock: Clock) -> None:
    clock.now += 365 * 86_400 - 1
    assert either.post("/heartbeat", BEAT).status_code == 200
    clock.now += 1
    assert either.post("/heartbeat", BEAT).status_code == 401


@pytest.mark.parametrize("date", [{}, {"date": "2026-01-31"}, {"date": 1_700_000_000_000}])
def test_row_3_every_analytics_report_is_refused(real: Caller, date: dict[str, Any]) -> None:
    answer = real.post("/analytics/report", {"requestCount": 1, **date})
    assert answer.status_code == 400
    assert "Expected date, received string" in answer.text


@pytest.mark.parametrize("name", ["errorLog", "processId", "configVersion", "buildVersion"])
def test_row_4_a_null_is_not_an_absent_string(either: Caller, name: str) -> None:
    answer = either.post("/heartbeat", BEAT | {name: None})
    assert answer.status_code == 400
    assert answer.json()["details"] == [f"{name}: Expected string, received null"]


def test_row_5_a_score_of_0_is_stored_as_100_and_1_as_1(real: Caller) -> None:
    real.post("/heartbeat", BEAT | {"healthScore": 0})
    assert real.neuron()["lastHeartbeat"]["healthScore"] == 100
    real.post("/heartbeat", BEAT | {"healthScore": 1})
    assert real.neuron()["lastHeartbeat"]["healthScore"] == 1


def test_row_6_what_no_int4_column_holds_is_a_500(real: Caller) -> None:
    assert real.post("/heartbeat", BEAT | {"healthScore": 101}).status_code == 400
    assert real.post("/heartbeat", {"healthScore": 90, "uptime": 5}).status_code == 400
    assert real.post("/heartbeat", BEAT | {"uptime": 2**31 - 1}).status_code == 200
    assert real.post("/heartbeat", BEAT | {"uptime": 2**31}).status_code == 500


def test_row_7_a_body_over_100_kb_is_a_413(either: Caller) -> None:
    room = 102_400 - len(json.dumps(BEAT | {"errorLog": ""}))
    assert either.post("/heartbeat", BEAT | {"errorLog": "x" * room}).status_code == 200
    answer = either.post("/heartbeat", BEAT | {"errorLog": "x" * (room + 1)})
    assert (answer.status_code, answer.json()) == (413, {"message": "request entity too large"})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_row_8_a_number_that_is_none_is_a_400(either: Caller, number: str) -> None:
    raw = json.dumps(BEAT | {"systemMetrics": {"cpu": "here"}}).replace('"here"', number)
    answer = either.post("/heartbeat", raw=raw.encode())
    assert answer.status_code == 400
    assert list(answer.json()) == ["message"]


def test_row_9_an_acknowledge_works_in_any_state(real: Caller, clock: Clock) -> None:
    command_id = real.issue()
    first = real.post(f"/commands/{command_id}/acknowledge").json()["data"]["acknowledgedAt"]
    clock.now += 10
    second = real.post(f"/commands/{command_id}/acknowledge").json()["data"]["acknowledgedAt"]
    assert second > first
    real.post(f"/commands/{command_id}/complete", {"success": True})
    assert real.command(command_id)["status"] == "completed"
    real.post(f"/commands/{command_id}/acknowledge")
    assert real.command(command_id)["status"] == "acknowledged"


def test_row_10_the_last_completion_wins(real: Caller) -> None:
    command_id = real.issue()
    real.post(f"/commands/{command_id}/complete", {"success": True, "response": {"outcome": "succeeded"}})
    real.post(f"/commands/{command_id}/complete", {"success": False, "errorMessage": "late"})
    command = real.command(command_id)
    assert (command["status"], command["errorMessage"]) == ("failed", "late")


def test_row_11_an_acknowledged_command_is_no_longer_pending(either: Caller) -> None:
    command_id = either.issue()
    assert [row["commandId"] for row in either.get("/commands/pending").json()["data"]] == [command_id]
    assert either.post("/heartbeat", BEAT).json()["data"]["pendingCommands"] == 1
    either.post(f"/commands/{command_id}/acknowledge")
    assert either.get("/commands/pending").json()["data"] == []
    assert either.post("/heartbeat", BEAT).json()["data"]["pendingCommands"] == 0


def test_row_12_a_deactivated_neuron_may_still_beat(either: Caller) -> None:
    assert either.admin("DELETE", "/scorer-1").status_code == 200
    assert either.post("/heartbeat", BEAT).status_code == 200
    assert not either.neuron()["isActive"]


def test_row_13_the_config_route_is_shadowed_by_an_admin_route(real: Caller) -> None:
    assert real.get("/config").status_code == 403


def test_row_14_the_instructions_name_the_paths_of_another_kind_of_neuron(real: Caller) -> None:
    instructions = real.register(neuronId="scorer-2").json()["data"]["instructions"]
    assert "/api/neuron/" in instructions["heartbeat"]
    assert "/api/api-neurons" not in json.dumps(instructions)


def test_row_15_a_neuron_id_in_the_body_overrides_the_tokens(real: Caller) -> None:
    real.register(neuronId="scorer-2")
    real.post("/heartbeat", BEAT | {"neuronId": "scorer-1"})
    assert real.neuron()["lastHeartbeat"]
    assert real.admin("GET", "/scorer-2").json()["data"]["lastHeartbeat"] is None


# --- where the local one does right


def test_a_registration_answers_with_neuron_token_and_the_right_paths(correct: Caller) -> None:
    data = correct.register(neuronId="scorer-2").json()["data"]
    assert data["neuron"] == {
        "neuronId": "scorer-2",
        "name": "Scorer",
        "type": "scoring",
        "status": "active",
        "healthcheckEndpoint": "/health",
        "apiEndpoints": ["/health"],
    }
    assert set(data["instructions"]) == {"heartbeat", "analytics", "commands", "config"}
    assert "/api/api-neurons/heartbeat" in data["instructions"]["heartbeat"]
    claims = jwt.decode(data["token"], options={"verify_signature": False})
    assert jwt.get_unverified_header(data["token"])["alg"] == "HS256"
    assert claims["exp"] - claims["iat"] == 365 * 86_400
    assert claims["neuronId"] == "scorer-2"
    assert claims["capabilities"] == ["score"]


def test_a_taken_id_is_a_409_that_says_what_to_do(correct: Caller) -> None:
    correct.register(neuronId="scorer-2")
    others = correct.token
    for token in ("", "no.such.token", others):
        answer = correct.post("/register", REGISTRATION, token=token)
        assert answer.status_code == 409
        assert answer.json()["error"] == "Neuron scorer-1 is already registered"
        assert "Authorization" in " ".join(answer.json()["details"])


def test_the_holder_of_an_old_token_gets_a_new_one(correct: Caller, clock: Clock) -> None:
    clock.now += 400 * 86_400
    assert correct.post("/heartbeat", BEAT).status_code == 401
    answer = correct.post("/register", REGISTRATION | {"version": "2.0.0"})
    renewed = answer.json()["data"]["token"]
    assert answer.status_code == 200
    assert correct.post("/heartbeat", BEAT, token=renewed).status_code == 200
    assert correct.neuron()["version"] == "2.0.0"


def test_two_renewals_in_one_second_give_two_tokens(correct: Caller) -> None:
    tokens = {correct.post("/register", REGISTRATION).json()["data"]["token"] for _ in range(2)}
    assert len(tokens | {correct.token}) == 3


def test_a_registration_names_every_field_at_fault(correct: Caller) -> None:
    body = REGISTRATION | {"neuronId": "x" * 101, "apiEndpoints": "/health", "version": 1}
    del body["name"]
    answer = correct.post("/register", body)
    assert answer.status_code == 400
    assert [line.split(":")[0] for line in answer.json()["details"]] == [
        "neuronId",
        "name",
        "version",
        "apiEndpoints",
    ]


def test_a_report_replaces_its_days_row(correct: Caller) -> None:
    correct.post("/analytics/report", {"requestCount": 5, "failedRequests": 1})
    correct.post("/analytics/report", {"requestCount": 9, "failedRequests": 2, "customMetrics": {"rows": 7}})
    correct.post("/analytics/report", {"requestCount": 3, "date": "2023-11-13"})
    rows = correct.admin("GET", "/scorer-1/analytics?days=7").json()["data"]
    assert [(row["date"], row["requestCount"]) for row in rows] == [("2023-11-13", 3), ("2023-11-14", 9)]
    assert rows[1]["customMetrics"] == {"rows": 7}
    today = correct.admin("GET", "/scorer-1/analytics?days=1").json()["data"]
    assert [row["date"] for row in today] == ["2023-11-14"]
    summary = correct.admin("GET", "/all").json()["data"][0]["analytics"]
    assert (summary["requestCount"], summary["errorRatePercent"]) == (12, 16.67)


@pytest.mark.parametrize("fault", [{"date": "14.11.2023"}, {"requestCount": 2**31}, {"uptime": 1.5}])
def test_a_report_with_a_wrong_field_is_a_400_that_names_it(correct: Caller, fault: dict[str, Any]) -> None:
    answer = correct.post("/analytics/report", {"requestCount": 1} | fault)
    assert answer.status_code == 400
    assert answer.json()["details"][0].startswith(next(iter(fault)))


def test_a_score_of_0_is_0(correct: Caller) -> None:
    correct.post("/heartbeat", BEAT | {"healthScore": 0})
    assert correct.neuron()["lastHeartbeat"]["healthScore"] == 0


def test_an_uptime_beyond_int4_is_a_400(correct: Caller) -> None:
    answer = correct.post("/heartbeat", BEAT | {"uptime": 2**31})
    assert answer.status_code == 400
    assert answer.json()["details"][0].startswith("uptime:")


def test_a_neuron_id_in_a_heartbeat_is_ignored(correct: Caller) -> None:
    correct.post("/heartbeat", BEAT | {"neuronId": "someone-else"})
    assert correct.neuron()["lastHeartbeat"]


def test_config_is_a_404_that_says_where_settings_come_from(correct: Caller) -> None:
    answer = correct.get("/config")
    assert answer.status_code == 404
    assert "config_update" in answer.text


def test_an_acknowledge_may_be_repeated_but_not_follow_the_end(correct: Caller, clock: Clock) -> None:
    command_id = correct.issue()
    first = correct.post(f"/commands/{command_id}/acknowledge").json()["data"]
    clock.now += 10
    again = correct.post(f"/commands/{command_id}/acknowledge")
    assert (again.status_code, again.json()["data"]) == (200, first)
    correct.post(f"/commands/{command_id}/complete", {"success": True})
    assert correct.post(f"/commands/{command_id}/acknowledge").status_code == 409
    assert correct.command(command_id)["status"] == "completed"


def test_the_first_completion_stands(correct: Caller, clock: Clock) -> None:
    command_id = correct.issue()
    body = {"success": True, "response": {"outcome": "succeeded", "result": [1, 2.5, None]}}
    first = correct.post(f"/commands/{command_id}/complete", body).json()["data"]
    clock.now += 10
    repeat = correct.post(f"/commands/{command_id}/complete", body)
    assert (repeat.status_code, repeat.json()["data"]) == (200, first)
    other = correct.post(f"/commands/{command_id}/complete", body | {"success": False})
    assert other.status_code == 409
    assert correct.command(command_id) == first


def test_a_command_that_did_not_succeed_reads_failed(correct: Caller) -> None:
    command_id = correct.issue()
    correct.post(f"/commands/{command_id}/complete", {"success": False, "errorMessage": "no such task"})
    command = correct.command(command_id)
    assert (command["status"], command["errorMessage"]) == ("failed", "no such task")
    assert command["failedAt"]
    assert command["completedAt"] is None


def test_another_neurons_command_is_a_404(either: Caller) -> None:
    command_id = either.issue()
    either.register(neuronId="scorer-2")
    for path in (f"/commands/{command_id}/acknowledge", "/commands/unknown/acknowledge"):
        assert either.post(path).status_code == 404
    assert either.post(f"/commands/{command_id}/complete", {"success": True}).status_code == 404
    assert either.get("/commands/pending").json()["data"] == []


def test_pending_commands_come_by_priority_then_age(either: Caller) -> None:
    ids = [either.issue(priority=priority) for priority in (5, 10, 5, 1)]
    rows = either.get("/commands/pending").json()["data"]
    assert [row["commandId"] for row in rows] == [ids[1], ids[0], ids[2], ids[3]]
    assert all(row["sentAt"] and len(row["commandId"]) == 36 for row in rows)


def test_one_answer_carries_at_most_100_commands(federation: Federation) -> None:
    caller = Caller(federation.url)
    caller.register()
    for _ in range(105):
        federation.issue("scorer-1", "health_check")
    assert len(caller.get("/commands/pending").json()["data"]) == 100


def test_one_answer_carries_about_a_mebibyte_of_commands(federation: Federation) -> None:
    caller = Caller(federation.url)
    caller.register()
    for _ in range(20):
        federation.issue("scorer-1", "run_task", {"blob": "x" * 100_000})
    answer = caller.get("/commands/pending")
    assert len(answer.json()["data"]) == 10
    assert len(answer.content) < 1_100_000


def test_heartbeats_are_kept_in_bounded_number(federation: Federation) -> None:
    Caller(federation.url).register()
    for uptime in range(KEPT_HEARTBEATS + 5):
        federation.store.record_heartbeat("scorer-1", BEAT | {"uptime": uptime})
    beats = federation.store.heartbeats("scorer-1", limit=2 * KEPT_HEARTBEATS)
    assert [beats[0]["uptime"], beats[-1]["uptime"]] == [5, KEPT_HEARTBEATS + 4]


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"\xff\xfe",
        json.dumps(BEAT | {"errorLog": "\ud800"}).encode(),
        b"[" * 50_000,
        json.dumps(BEAT | {"systemMetrics": "here"}).replace('"here"', "[" * 200 + "]" * 200).encode(),
        b"9" * 5_000,
        b"[]",
        b"null",
        b'"text"',
    ],
)
def test_a_body_that_is_no_body_is_a_400(correct: Caller, raw: bytes) -> None:
    for path in ("/heartbeat", "/register"):
        assert correct.post(path, raw=raw).status_code == 400
    headers = {"X-Admin-Key": "admin-secret-key"}
    answer = requests.post(f"{correct.base}/scorer-1/commands", data=raw, headers=headers, timeout=5)
    assert answer.status_code == 400


def test_every_answer_is_json_and_dated(correct: Caller) -> None:
    answers = [
        correct.get("/commands/pending"),
        correct.get("/nowhere/at/all/here"),
        requests.patch(f"{correct.base}/register", timeout=5),
        requests.get(correct.base.removesuffix("/api/api-neurons"), timeout=5),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 405, 404]
    for answer in answers:
        assert answer.headers["Content-Type"].startswith("application/json")
        assert "success" in answer.json()
        assert parsedate_to_datetime(answer.headers["Date"])


# --- the administrator


@pytest.mark.parametrize("key", [{}, {"X-Admin-Key": "wrong"}, {"X-Admin-Key": "schlüssel"}])
def test_the_admin_side_wants_its_key(either: Caller, key: dict[str, str]) -> None:
    routes = [
        ("GET", "/all"), ("GET", "/analytics/overview"), ("GET", "/health/overview"),
        ("GET", "/monitoring/dashboard"), ("GET", "/scorer-1"), ("PUT", "/scorer-1"), ("DELETE", "/scorer-1"),
        ("POST", "/scorer-1/commands"), ("GET", "/scorer-1/commands"), ("GET", "/scorer-1/commands/x"),
        ("GET", "/scorer-1/analytics"), ("GET", "/scorer-1/monitoring/health"),
        ("GET", "/scorer-1/monitoring/sla"), ("POST", "/scorer-1/monitoring/sla/targets"),
    ]  # fmt: skip
    for method, path in routes:
        answer = requests.request(method, either.base + path, headers=key, timeout=5)
        assert answer.status_code == 403, f"{method} {path}"
    assert either.neuron()["isActive"]


def test_a_silent_neuron_goes_offline_then_inactive(correct: Caller, clock: Clock) -> None:
    assert not correct.neuron()["isOnline"]
    correct.post("/heartbeat", BEAT | {"status": "maintenance"})
    seen = []
    for silence in (120, 1, 179, 1):
        clock.now += silence
        neuron = correct.neuron()
        seen.append((neuron["isOnline"], neuron["status"]))
    silent = (False, "maintenance")
    assert seen == [(True, "maintenance"), silent, silent, (False, "inactive")]


def test_an_administrator_may_change_a_neuron_but_not_its_id(correct: Caller) -> None:
    answer = correct.admin("PUT", "/scorer-1", {"name": "Renamed", "neuronId": "other", "isActive": False})
    assert answer.status_code == 200
    neuron = correct.neuron()
    assert (neuron["neuronId"], neuron["name"], neuron["isActive"]) == ("scorer-1", "Renamed", False)
    assert correct.admin("PUT", "/scorer-1", {"capabilities": "all"}).status_code == 400
    assert correct.admin("PUT", "/nobody", {"name": "x"}).status_code == 404


def test_a_command_keeps_what_it_was_issued_with(correct: Caller) -> None:
    command_id = correct.issue(
        commandId="mine", priority=9, timeoutAt="2026-05-01T12:00:00+02:00", metadata={"by": "test"}
    )
    command = correct.command(command_id)
    assert command_id == "mine"
    assert (command["priority"], command["status"], command["metadata"]) == (9, "pending", {"by": "test"})
    assert command["timeoutAt"] == "2026-05-01T10:00:00.000Z"
    body = {"commandType": "x", "commandData": {}, "commandId": "mine"}
    assert correct.admin("POST", "/scorer-1/commands", body).status_code == 409
    assert [row["commandId"] for row in correct.admin("GET", "/scorer-1/commands").json()["data"]] == ["mine"]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"commandType": ""}, "commandType"),
        ({"commandType": "x" * 101}, "commandType"),
        ({"priority": 0}, "priority"),
        ({"priority": 11}, "priority"),
        ({"priority": True}, "priority"),
        ({"commandId": "x" * 37}, "commandId"),
        ({"timeoutAt": "soon"}, "timeoutAt"),
    ],
)
def test_a_malformed_command_is_a_400_that_names_the_field(
    correct: Caller, fault: dict[str, Any], named: str
) -> None:
    body = {"commandType": "x", "commandData": {}} | fault
    answer = correct.admin("POST", "/scorer-1/commands", body)
    assert answer.status_code == 400
    assert [line.split(":")[0] for line in answer.json()["details"]] == [named]


def test_a_command_without_data_or_for_nobody_is_refused(correct: Caller) -> None:
    body: dict[str, Any] = {"commandType": "x"}
    assert correct.admin("POST", "/scorer-1/commands", body).status_code == 400
    body["commandData"] = {}
    assert correct.admin("POST", "/nobody/commands", body).status_code == 404


def test_the_overviews_count_what_was_sent(correct: Caller, clock: Clock) -> None:
    correct.post("/heartbeat", BEAT | {"healthScore": 40})
    correct.post("/analytics/report", {"requestCount": 4, "averageResponseTime": 20})
    correct.register(neuronId="scorer-2")
    assert correct.admin("GET", "/health/overview").json()["data"] == {
        "total": 2,
        "online": 1,
        "byStatus": {"active": 2},
        "averageHealthScore": 40.0,
    }
    alerts = correct.admin("GET", "/monitoring/dashboard").json()["data"]["alerts"]
    assert [alert["neuronId"] for alert in alerts] == ["scorer-1", "scorer-2"]
    overview = correct.admin("GET", "/analytics/overview").json()["data"]
    assert overview["total"]["requestCount"] == 4
    assert overview["neurons"]["scorer-2"] is None
    assert correct.admin("GET", "/analytics/overview?days=x").status_code == 400


def test_service_levels_are_measured_against_their_targets(correct: Caller, clock: Clock) -> None:
    targets = {"uptimePercent": 90, "averageResponseTime": 100, "healthScore": 95}
    assert correct.admin("POST", "/scorer-1/monitoring/sla/targets", targets).status_code == 201
    for _ in range(3):
        correct.post("/heartbeat", BEAT)
        clock.now += 60
    clock.now += 180  # heard for 240 of these 360 seconds
    correct.post("/analytics/report", {"requestCount": 4, "averageResponseTime": 20})
    health = correct.admin("GET", "/scorer-1/monitoring/health").json()["data"]
    assert (health["heartbeats"], health["uptimePercent"], health["lowestHealthScore"]) == (3, 66.67, 90)
    sla = correct.admin("GET", "/scorer-1/monitoring/sla").json()["data"]
    assert {row["name"]: row["met"] for row in sla} == {
        "uptimePercent": False,
        "averageResponseTime": True,
        "healthScore": False,
    }
    bad = correct.admin("POST", "/scorer-1/monitoring/sla/targets", {"uptimePercent": 101})
    assert bad.status_code == 400


# --- the process


def start(*arguments: str, stdin: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[str], str]:
    command = [*COMMAND, "0", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, text=True, stdin=stdin, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    line = process.stdout.readline()
    url = next(word for word in line.split() if word.startswith("http://"))
    return process, url


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error, with every pipe closed."""
    _, errors = process.communicate(timeout=10)
    return process.returncode, errors


def test_tokens_and_state_outlive_the_process(tmp_path: Path) -> None:
    db = str(tmp_path / "federation.db")
    process, url = start("--db", db)
    caller = Caller(url)
    caller.register()
    command_id = caller.issue()
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")

    process, url = start("--db", db)
    caller.base = f"{url}/api/api-neurons"
    assert caller.post("/heartbeat", BEAT).json()["data"]["pendingCommands"] == 1
    assert caller.command(command_id)["status"] == "pending"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "")


def test_the_process_obeys_its_options() -> None:
    process, url = start("--like-real", "--admin-key", "other", "--token-ttl", "0")
    caller = Caller(url)
    caller.register()
    assert caller.register().status_code == 500
    assert caller.post("/heartbeat", BEAT).status_code == 401
    assert caller.admin("GET", "/all").status_code == 403
    process.terminate()
    assert ended(process) == (0, "")


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*COMMAND, port], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"local_federation: port {port} on 127.0.0.1 is taken: choose another, or --port 0 for any free one"
    ]


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    db = tmp_path / "federation.db"
    db.write_text("not a database, but long enough to be looked at " * 40)
    command = [*COMMAND, "0", "--db", str(db)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_it_ends_with_its_parents_end_of_the_pipe() -> None:
    process, url = start("--exit-with-stdin", stdin=subprocess.PIPE)
    assert Caller(url).register().status_code == 201
    assert process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert ended(process) == (0, "")


# --- the handle for tests of one's own


def test_the_handle_waits_for_a_neuron_and_an_outcome(federation: Federation) -> None:
    caller = Caller(federation.url)
    issued = threading.Event()

    def neuron() -> None:
        caller.register()
        caller.post("/heartbeat", BEAT)
        issued.wait(timeout=10)
        (row,) = caller.get("/commands/pending").json()["data"]
        caller.post("/analytics/report", {"requestCount": 1})
        body = {"success": True, "response": {"outcome": "succeeded", "result": row["commandData"]}}
        caller.post(f"/commands/{row['commandId']}/complete", body)

    thread = threading.Thread(target=neuron)
    thread.start()
    neuron_id = federation.wait_for_neuron()
    command_id = federation.issue(neuron_id, "run_task", {"task": "score"}, 9, metadata=[1])
    issued.set()
    outcome = federation.outcome(command_id)
    thread.join()
    assert (outcome["status"], outcome["priority"], outcome["metadata"]) == ("completed", 9, [1])
    assert outcome["response"] == {"outcome": "succeeded", "result": {"task": "score"}}
    assert federation.neuron(neuron_id)["name"] == "Scorer"
    assert [beat["uptime"] for beat in federation.heartbeats(neuron_id)] == [5]
    assert [row["requestCount"] for row in federation.analytics(neuron_id)] == [1]


def test_the_handle_says_what_it_waited_for_in_vain(federation: Federation) -> None:
    with pytest.raises(TimeoutError, match="registered: none"):
        federation.wait_for_neuron(timeout=0)
    Caller(federation.url).register()
    with pytest.raises(TimeoutError, match=r"other has not .* registered: scorer-1"):
        federation.wait_for_neuron("other", timeout=0)
    with pytest.raises(TimeoutError, match="last status: pending"):
        federation.outcome(federation.issue("scorer-1", "stop"), timeout=0)
    with pytest.raises(LookupError, match="registered: scorer-1"):
        federation.issue("other", "stop")


def test_the_handle_plays_an_outage(federation: Federation) -> None:
    caller = Caller(federation.url)
    caller.register()
    federation.stop()
    with pytest.raises(requests.ConnectionError):
        caller.post("/heartbeat", BEAT)
    federation.issue("scorer-1", "health_check")
    federation.start()
    assert caller.post("/heartbeat", BEAT).json()["data"]["pendingCommands"] == 1


def test_a_stopped_federation_leaves_no_thread_and_no_connection() -> None:
    before = set(threading.enumerate())
    with LocalFederation() as running, socket.create_connection(("127.0.0.1", running.port)) as idle:
        idle.settimeout(5)
        idle.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert b"404" in idle.recv(4_096)
        running.stop()
        while idle.recv(4_096):
            pass  # the rest of the answer, then the end of the connection
        left = [thread for thread in threading.enumerate() if thread not in before]
        for thread in left:
            thread.join(timeout=1)
        assert not [thread for thread in left if thread.is_alive()]
