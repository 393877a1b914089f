"""The neuron's own HTTP surface, over real sockets: codes, bodies, auth, limits, and what it survives."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
import requests

from neuron.endpoints import CONNECTIONS, THREADS, WORKING, is_loopback
from neuron.errors import DefinitionError, Rejected
from neuron_client import APINeuron
from tests.rig.process import NeuronProcess, wait_for
from tests.rig.recording import RecordingFederation

NOWHERE = "http://127.0.0.1:9"
SECRET = "canary-api-secret-of-32-bytes-or-more"
ROWS = [{"a": 1}, {"a": 3}]


class Surface:
    """A neuron that serves, and what a caller asks of it."""

    def __init__(self, neuron: APINeuron) -> None:
        self.neuron = neuron
        assert neuron.start()
        assert neuron.endpoints is not None
        self.port = neuron.endpoints.port

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", 10)
        return requests.request(method, f"http://127.0.0.1:{self.port}{path}", **options)

    def post(self, body: Any, content_type: str = "application/json", **options: Any) -> requests.Response:
        data = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = {"Content-Type": content_type, **options.pop("headers", {})}
        return self.ask("POST", options.pop("path", "/data/process"), data=data, headers=headers, **options)

    def raw(self, request: bytes, timeout: float = 10) -> bytes:
        """Everything that comes back until the server closes, or for half a second after the last byte."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(request)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while more := connection.recv(65_536):
                    answer += more
                    connection.settimeout(0.5)
            return answer

    def counted(self) -> tuple[int, int]:
        snapshot = self.neuron.statistics.snapshot()
        return snapshot.total_requests, snapshot.failed_requests


@pytest.fixture
def surface(make_neuron: Callable[..., APINeuron]) -> Surface:
    return Surface(make_neuron(federation_url=NOWHERE, neuron_id="n-1", max_body_bytes=10_000))


def error_of(answer: requests.Response) -> str:
    """The error of an answer that must be JSON, with nothing of the inside in it."""
    assert answer.headers["Content-Type"].startswith("application/json"), answer.text
    body = answer.json()
    assert body["success"] is False
    assert "Traceback" not in answer.text
    assert '.py"' not in answer.text
    return str(body["error"])


# -- health


def test_health_says_what_it_is_and_why(surface: Surface) -> None:
    answer = surface.ask("GET", "/health")
    body = answer.json()
    assert answer.status_code == 200
    assert body["status"] in ("healthy", "degraded")
    assert 0 <= body["healthScore"] <= 100
    assert isinstance(body["reasons"], list)
    assert body["neuronId"] == "n-1"
    assert body["dependencies"] == {}
    assert set(body) == {"status", "healthScore", "reasons", "dependencies", "neuronId", "timestamp"}


def test_an_unhealthy_neuron_answers_503_and_is_still_alive(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron(federation_url=NOWHERE)
    broken = True

    @neuron.dependency("postgres", critical=True, every=0.05)
    def postgres() -> None:
        if broken:
            raise ConnectionError("no route")

    surface = Surface(neuron)
    wait_for(lambda: surface.ask("GET", "/health").status_code == 503, what="the failing dependency")
    answer = surface.ask("GET", "/health")
    assert answer.json()["status"] == "unhealthy"
    assert "postgres" in str(answer.json()["reasons"])
    assert "no route" in answer.json()["dependencies"]["postgres"]["detail"]
    assert surface.ask("GET", "/health/live").status_code == 200, "a failing dependency is no reason to be killed"
    broken = False
    wait_for(lambda: surface.ask("GET", "/health").status_code == 200, what="the recovery")


def test_ready_follows_registration_and_pause_and_live_does_not(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    oracle.stop()
    surface = Surface(make_neuron(federation_url=oracle.url))
    ready = surface.ask("GET", "/health/ready")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["not registered yet"])
    assert surface.ask("GET", "/health/live").json() == {"status": "ok", "reasons": []}
    assert surface.ask("GET", "/status").json()["status"] == "starting"
    oracle.start()
    wait_for(lambda: surface.ask("GET", "/health/ready").status_code == 200, what="ready after registration")
    surface.neuron.pause()
    paused = surface.ask("GET", "/health/ready")
    assert (paused.status_code, paused.json()["reasons"]) == (503, ["paused"])
    assert surface.ask("GET", "/health/live").status_code == 200
    surface.neuron.resume()
    assert surface.ask("GET", "/health/ready").status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_live_turns_503_when_a_loop_is_dead(surface: Surface, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface.neuron, "watch", lambda: None)  # which would start it again
    loop = surface.neuron.loops["commands"]
    loop._tick = dies
    loop.wake()
    loop.join(5)
    answer = surface.ask("GET", "/health/live")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["the commands loop has died"]
    assert surface.ask("GET", "/health").status_code == 503


def dies() -> float | None:
    raise SystemExit


# -- status


def test_status_has_what_a_person_debugging_asks_first(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(federation_url=oracle.url, neuron_id="n-1", name="Loom", dependencies=["postgres"])
    surface = Surface(neuron)
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
    command = oracle.issue("n-1", "run_task", {"task": "report_generation"})
    oracle.wait_until(lambda: oracle.of("complete", command), what="the completion")
    neuron.metric("rows").add(7)
    neuron.simple_request(True, 20)

    def shown() -> Any:
        status = surface.ask("GET", "/status").json()
        return status["commands"]["recent"] and status["commands"]["recent"][0].get("state") == "reported" and status

    status = wait_for(shown, what="the reported command in /status")
    assert (status["neuronId"], status["name"], status["status"]) == ("n-1", "Loom", "active")
    federation = status["federation"]
    assert (federation["url"], federation["registered"], federation["reachable"]) == (oracle.url, True, True)
    assert federation["tokenExpiresInSeconds"] > 0
    assert "ok" in federation["lastCalls"]["heartbeat"]
    assert status["commands"]["recent"][0]["commandId"] == command
    assert status["commands"]["recent"][0]["outcome"] == "succeeded"
    assert "run_task" in status["commands"]["supported"]
    assert "report_generation" in status["tasks"]
    assert status["customMetrics"] == {"rows": 7}
    assert status["requests"]["total_requests"] >= 1
    assert set(status["loops"]) == {"heartbeat", "commands", "analytics", "statistics"}
    assert all(loop["alive"] for loop in status["loops"].values())
    assert status["config"]["heartbeat_interval"] == neuron.config.heartbeat_interval
    assert status["configVersion"] == neuron.config.digest()
    for name in ("uptime", "pid", "health", "alerts", "dependencies", "system", "journal", "log", "version"):
        assert name in status
    assert status["journal"]["failure"] is None


def test_status_shows_what_last_went_wrong(surface: Surface) -> None:
    def warned() -> Any:
        status = surface.ask("GET", "/status").json()
        return status["log"]["warnings"] and not status["federation"]["reachable"] and status

    status = wait_for(warned, what="the outage's warning")
    assert any("refused" in line for line in status["log"]["warnings"])
    assert "refused" in status["federation"]["lastCalls"]["register"]


def test_no_secret_is_in_any_answer(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron], tmp_path: Path
) -> None:
    token = oracle.token("n-1")
    neuron = make_neuron(
        federation_url=oracle.url, neuron_id="n-1", token=token, api_secret=SECRET,
        metadata={"password": "canary", "nested": {"apiKey": "canary"}},
    )

    @neuron.endpoint("GET", "/leak")
    def leak(data: Any) -> None:
        raise ValueError(f"Bearer {token} {SECRET}")

    surface = Surface(neuron)
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
    neuron.logger.error("told %s and %s", token, SECRET)
    headers = {"Authorization": f"Bearer {caller_token()}"}
    answers = [
        surface.ask("GET", path, headers=headers).text
        for path in ("/status", "/health", "/health/live", "/health/ready", "/leak", "/absent")
    ]
    answers.append(surface.post(ROWS, headers={"Authorization": "Bearer wrong"}).text)
    assert "told [redacted] and [redacted]" in answers[0]
    for text in answers:
        assert "canary" not in text
        assert token not in text
        assert token.split(".")[2] not in text
        assert headers["Authorization"][7:] not in text


# -- data


@pytest.mark.parametrize(
    ("body", "content_type", "records"),
    [
        (b'[{"a": 1}, {"a": 3}]', "application/json", 2),
        (b'{"a": 1}', "application/json; charset=utf-8", 1),
        (b'{"a": 1}\n{"a": 3}\n\n', "application/x-ndjson", 2),
        (b"a,b\n1,x\n3,y\n", "text/csv", 2),
        ("a\n\u00e9\n".encode("latin-1"), "text/csv; charset=iso-8859-1", 1),
        (b"[]", "application/json", 0),
    ],
)
def test_records_are_profiled_whatever_their_form(
    surface: Surface, body: bytes, content_type: str, records: int
) -> None:
    answer = surface.post(body, content_type)
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"] is True
    data = answer.json()["data"]
    assert data == surface.neuron.process_data(data_of(body, content_type))
    assert records in data.values()
    assert surface.counted() == (1, 0)
    assert surface.neuron.statistics.snapshot().data_processed == len(body)


def data_of(body: bytes, content_type: str) -> list[Any]:
    from neuron.data_profile import parse_records

    return parse_records(body, content_type)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "words"),
    [
        (b"{", "application/json", 400, ""),
        (b"", "application/json", 400, ""),
        (b"5", "application/json", 400, ""),
        (b'{"a": NaN}', "application/json", 400, "NaN"),
        (b"[" * 9_000, "application/json", 400, "deep"),
        (b'{"a": 1}\n{"a": ', "application/x-ndjson", 400, "line 2"),
        (b"\xff", "application/json", 400, "utf-8"),
        (b"a", "text/plain", 415, "text/plain"),
        (b"a", "", 415, ""),
        (b"a", "application/json; charset=ebcdic", 415, "ebcdic"),
        (b"x" * 10_001, "application/json", 413, ""),
    ],
)
def test_a_callers_mistake_has_its_exact_code_and_is_told_in_json(
    surface: Surface, body: bytes, content_type: str, status: int, words: str
) -> None:
    answer = surface.post(body, content_type)
    assert answer.status_code == status, answer.text
    assert words.lower() in answer.text.lower()
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json()["error"]
    assert surface.counted() == (1, 0), "counted, and not as our failure"


def test_unknown_paths_and_methods_are_told_in_json(surface: Surface) -> None:
    absent = surface.ask("GET", "/absent/%ff")
    assert absent.status_code in (400, 404)
    assert error_of(surface.ask("GET", "/absent")).startswith("404")
    refused = surface.ask("GET", "/data/process")
    assert refused.status_code == 405
    assert refused.headers["Allow"] == "POST"
    assert error_of(refused).startswith("405")
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        answer = surface.ask(method, "/status")
        assert answer.status_code == 405, method
        error_of(answer)
    head = surface.ask("HEAD", "/health")
    assert (head.status_code, head.content) == (200, b"")


class Failing(APINeuron):
    def process_data(self, data: Any) -> Any:
        kind = data[0]["kind"]
        if kind == "raises":
            raise KeyError("the inside of the processor")
        if kind == "rejects":
            raise Rejected("no such table")
        if kind == "exits":
            raise SystemExit(3)
        return {"object": object(), "nan": float("nan"), "surrogate": "\ud800", "fine": 1}[kind]


def test_a_failing_processor_is_500_without_its_inside(
    make_neuron: Callable[..., APINeuron], caplog: pytest.LogCaptureFixture
) -> None:
    surface = Surface(make_neuron(neuron_class=Failing, federation_url=NOWHERE))
    answer = surface.post({"kind": "raises"})
    assert answer.status_code == 500
    assert "KeyError" in error_of(answer)
    assert "inside" not in answer.text
    assert any("KeyError: 'the inside of the processor'" in str(record.exc_text) for record in caplog.records)
    for kind in ("object", "nan", "exits"):
        answer = surface.post({"kind": kind})
        assert answer.status_code == 500, kind
        error_of(answer)
    assert surface.counted() == (4, 4)
    rejected = surface.post({"kind": "rejects"})
    assert (rejected.status_code, error_of(rejected)) == (400, "no such table")
    assert surface.post({"kind": "surrogate"}).status_code == 200
    assert surface.post({"kind": "fine"}).json() == {"success": True, "data": 1}
    assert surface.counted() == (7, 4)


def test_a_saturated_neuron_answers_503_with_retry_after_and_health_at_once(
    make_neuron: Callable[..., APINeuron],
) -> None:
    release, inside = threading.Event(), threading.Semaphore(0)

    class Slow(APINeuron):
        def process_data(self, data: Any) -> Any:
            inside.release()
            release.wait(30)
            return len(data)

    surface = Surface(make_neuron(neuron_class=Slow, federation_url=NOWHERE))
    statuses: list[int] = []
    callers = [
        threading.Thread(target=lambda: statuses.append(surface.post(ROWS, timeout=30).status_code))
        for _ in range(WORKING)
    ]
    for caller in callers:
        caller.start()
    try:
        for _ in callers:
            assert inside.acquire(timeout=10)
        for _ in range(3):
            refused = surface.post(ROWS)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
            error_of(refused)
            began = time.monotonic()
            assert surface.ask("GET", "/health/live").status_code == 200
            assert time.monotonic() - began < 2
    finally:
        release.set()
        for caller in callers:
            caller.join(10)
    assert statuses == [200] * WORKING
    assert surface.counted() == (WORKING + 3, 3)
    assert surface.post(ROWS).status_code == 200


def test_the_body_limit_follows_a_config_update_at_once(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    surface = Surface(make_neuron(federation_url=oracle.url, neuron_id="n-1", max_body_bytes=100))
    wait_for(surface.neuron.registered.is_set, what="the registration")
    body = json.dumps([{"a": "x" * 200}])
    with requests.Session() as kept_alive:
        url = f"http://127.0.0.1:{surface.port}/data/process"
        headers = {"Content-Type": "application/json"}
        assert kept_alive.post(url, data="[]", headers=headers, timeout=10).status_code == 200
        assert surface.post(body).status_code == 413
        command = oracle.issue("n-1", "config_update", {"max_body_bytes": 1000})
        oracle.wait_until(lambda: oracle.of("complete", command), what="the config_update")
        assert surface.post(body).status_code == 200
        assert kept_alive.post(url, data=body, headers=headers, timeout=10).status_code == 200
    assert surface.post(b"x" * 1001).status_code == 413
    command = oracle.issue("n-1", "config_update", {"max_body_bytes": 150})
    oracle.wait_until(lambda: oracle.of("complete", command), what="the config_update")
    assert surface.post(body).status_code == 413


# -- auth


def caller_token(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    payload = {"aud": "n-1", "exp": time.time() + 60, **claims}
    return jwt.encode({name: value for name, value in payload.items() if value is not None}, secret, algorithm)


def rsa_token() -> str:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return caller_token(pem.decode(), "RS256")


@pytest.fixture
def guarded(make_neuron: Callable[..., APINeuron]) -> Surface:
    neuron = make_neuron(federation_url=NOWHERE, neuron_id="n-1", api_secret=SECRET)
    neuron.endpoint("POST", "/score")(lambda data: data)
    return Surface(neuron)


def test_with_a_secret_all_but_health_wants_a_callers_token(guarded: Surface) -> None:
    for path in ("/health", "/health/live"):
        assert guarded.ask("GET", path).status_code == 200
    assert guarded.ask("GET", "/health/ready").status_code == 503, "not registered, which needs no token to know"
    headers = {"Authorization": f"Bearer {caller_token()}"}
    for method, path in (("GET", "/status"), ("POST", "/data/process"), ("POST", "/score")):
        options = {"json": ROWS} if method == "POST" else {}
        refused = guarded.ask(method, path, **options)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        error_of(refused)
        assert guarded.ask(method, path, headers=headers, **options).status_code == 200
    assert guarded.counted() == (4, 0)


@pytest.mark.parametrize(
    "header",
    [
        "Bearer ", "Bearer", "", "Basic dXNlcjpwYXNz", f"Token {SECRET}", f"Bearer {SECRET}", "Bearer a.b.c",
        "Bearer " + "x" * 8000,
    ],
)
def test_what_is_no_token_is_401(guarded: Surface, header: str) -> None:
    answer = guarded.ask("GET", "/status", headers={"Authorization": header})
    assert answer.status_code == 401
    error_of(answer)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(lambda: caller_token(exp=time.time() - 1), id="expired"),
        pytest.param(lambda: caller_token(exp=None), id="without exp"),
        pytest.param(lambda: caller_token(aud=None), id="without aud"),
        pytest.param(lambda: caller_token(aud="n-2"), id="for another neuron"),
        pytest.param(lambda: caller_token(exp="soon"), id="exp no number"),
        pytest.param(lambda: caller_token(nbf=time.time() + 60), id="not yet"),
        pytest.param(lambda: caller_token("another-secret-of-at-least-32-bytes"), id="another secret"),
        pytest.param(lambda: caller_token("", "none"), id="alg none"),
        pytest.param(lambda: caller_token(SECRET * 2, "HS512"), id="another algorithm"),
        pytest.param(rsa_token, id="RS256"),
        pytest.param(lambda: caller_token()[:-4], id="signature cut"),
        pytest.param(lambda: caller_token().rpartition(".")[0] + ".", id="signature empty"),
    ],
)
def test_a_token_that_is_not_for_this_neuron_now_is_401(guarded: Surface, token: Callable[[], str]) -> None:
    answer = guarded.ask("GET", "/status", headers={"Authorization": f"Bearer {token()}"})
    assert answer.status_code == 401, answer.text
    error_of(answer)
    assert guarded.ask("GET", f"/status?access_token={caller_token()}").status_code == 401


def test_a_refused_caller_leaves_no_trace_on_stderr(guarded: Surface, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/status", "/absent", "/data/process"):
        assert guarded.ask("GET", path).status_code >= 400
        assert guarded.post(ROWS, path=path).status_code >= 400
    assert capsys.readouterr().err == ""


class Broken(APINeuron):
    def health(self) -> dict[str, Any]:
        raise KeyError("the inside")


def test_an_answer_about_itself_that_fails_is_500_in_json(
    make_neuron: Callable[..., APINeuron], capsys: pytest.CaptureFixture[str]
) -> None:
    surface = Surface(make_neuron(neuron_class=Broken, federation_url=NOWHERE))
    answer = surface.ask("GET", "/health")
    assert answer.status_code == 500
    assert "inside" not in error_of(answer)
    assert capsys.readouterr().err == ""


def test_beyond_loopback_without_a_secret_only_health_is_served(
    make_neuron: Callable[..., APINeuron], caplog: pytest.LogCaptureFixture
) -> None:
    neuron = make_neuron(federation_url=NOWHERE, host="0.0.0.0")
    neuron.endpoint("GET", "/score")(lambda data: data)
    surface = Surface(neuron)
    assert any("without api_secret" in record.getMessage() for record in caplog.records)
    assert surface.ask("GET", "/health").status_code == 200
    assert surface.ask("GET", "/health/live").status_code == 200
    for answer in (surface.ask("GET", "/status"), surface.post(ROWS), surface.ask("GET", "/score")):
        assert answer.status_code == 403
        assert "api_secret" in error_of(answer)


def test_beyond_loopback_with_a_secret_everything_is_served(make_neuron: Callable[..., APINeuron]) -> None:
    surface = Surface(make_neuron(federation_url=NOWHERE, neuron_id="n-1", host="0.0.0.0", api_secret=SECRET))
    assert surface.ask("GET", "/status").status_code == 401
    assert surface.ask("GET", "/status", headers={"Authorization": f"Bearer {caller_token()}"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("neuron.example", False), ("localhost.example", False)],
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# -- an adopter's endpoint


def test_an_endpoint_of_ones_own_has_the_same_statistics_limits_and_errors(
    make_neuron: Callable[..., APINeuron],
) -> None:
    neuron = make_neuron(federation_url=NOWHERE, max_body_bytes=1000)

    @neuron.endpoint("post", "/score")
    def score(data: Any) -> Any:
        if isinstance(data, dict):
            return {"score": data["value"] * 2}
        return [row["value"] for row in data]

    @neuron.endpoint("GET", "/lookup")
    def lookup(data: dict[str, str]) -> Any:
        return data

    surface = Surface(neuron)

    @neuron.endpoint("DELETE", "/late")
    def late(data: Any) -> str:
        return "gone"

    assert surface.post({"value": 4}, path="/score").json() == {"success": True, "data": {"score": 8}}
    assert surface.post([{"value": 4}], path="/score").json()["data"] == [4]
    assert surface.post("value\n4\n", "text/csv", path="/score").json()["data"] == [4]
    assert surface.ask("GET", "/lookup?a=%C3%A9&b=").json()["data"] == {"a": "é", "b": ""}
    assert surface.ask("DELETE", "/late").json()["data"] == "gone"
    assert surface.counted() == (5, 0)
    assert surface.post({"no": 1}, path="/score").status_code == 500
    assert surface.post("{", path="/score").status_code == 400
    assert surface.post("x" * 1001, path="/score").status_code == 413
    assert surface.post("x", "text/plain", path="/score").status_code == 415
    assert surface.ask("GET", "/score").status_code == 405
    assert surface.counted()[1] == 1


def test_an_endpoint_that_cannot_be_served_is_refused_with_its_line(make_neuron: Callable[..., APINeuron]) -> None:
    neuron = make_neuron()

    def score(data: Any) -> Any:
        return data

    place = f"{Path(__file__).name}:{score.__code__.co_firstlineno}"
    neuron.endpoint("POST", "/score")(score)
    for method, path, words in (
        ("FETCH", "/x", "'FETCH' is none of"), ("POST", "x", "not a plain path"), ("GET", "/<id>", "not a plain path"),
        ("GET", "/a?b", "not a plain path"), ("GET", "/status", "is built in"), ("POST", "/health", "is built in"),
        ("POST", "/score", "registered already"), (5, "/x", "is none of"), ("GET", None, "not a plain path"),
    ):
        with pytest.raises(DefinitionError, match=words) as caught:
            neuron.endpoint(method, path)(score)  # type: ignore[arg-type]
        assert place in str(caught.value)
    with pytest.raises(DefinitionError, match="is not a function"):
        neuron.endpoint("GET", "/y")(5)  # type: ignore[type-var]


# -- hostile callers


def statuses_of(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


HEAD = b"POST /data/process HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        pytest.param(HEAD + b"Content-Length: -1\r\n\r\n", [400], id="negative length"),
        pytest.param(HEAD + b"Content-Length: abc\r\n\r\n", [400], id="length no number"),
        pytest.param(HEAD + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\n[]xxx", [400], id="two lengths"),
        pytest.param(HEAD + b"Content-Length: 9999999999\r\n\r\n", [413], id="huge length"),
        pytest.param(
            HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n", [200], id="chunked"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"2000\r\n" + b"x" * 0x2000 + b"\r\n" + b"2000\r\n"
            + b"x" * 0x2000 + b"\r\n0\r\n\r\n", [413], id="chunked over the limit",
        ),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n", [400], id="chunk size no number"),
        pytest.param(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", [431], id="70 kB path"),
        pytest.param(
            b"GET /health/live HTTP/1.1\r\nHost: h\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n", [431], id="20 kB header"
        ),
        pytest.param(
            b"GET /health/live HTTP/1.1\r\nHost: h\r\n\r\n"
            b"GET /health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", [200, 200], id="pipelined",
        ),
        pytest.param(b"GET /health/live HTTP/1.1\r\nHost : h\r\n\r\n", [400], id="space before the colon"),
        pytest.param(b"NONSENSE\r\n\r\n", [400], id="no request line"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", [400], id="TLS"),
    ],
)
def test_a_malformed_request_has_one_exact_answer_in_json(
    surface: Surface, request_bytes: bytes, statuses: list[int]
) -> None:
    answer = surface.raw(request_bytes)
    assert statuses_of(answer) == statuses, answer[:500]
    for body in answer.split(b"\r\n\r\n")[1:]:
        json.loads(body.split(b"HTTP/1.")[0])
    assert surface.ask("GET", "/health/live").status_code == 200


def test_no_second_request_is_smuggled_behind_a_length_and_chunks(surface: Surface) -> None:
    smuggled = b"0\r\n\r\nPOST /data/process HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n" \
        b"Content-Length: 2\r\n\r\n[]"
    answer = surface.raw(HEAD + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(smuggled) + smuggled)
    assert statuses_of(answer) == [400]
    assert "exclude each other" in answer.decode()
    assert surface.counted() == (1, 0)


def test_an_old_request_without_version_is_answered_and_closed(surface: Surface) -> None:
    assert json.loads(surface.raw(b"GET /health/live\r\n\r\n").rpartition(b"\r\n\r\n")[2])["status"] == "ok"


def test_a_foreign_page_may_not_post(surface: Surface) -> None:
    preflight = surface.ask(
        "OPTIONS", "/data/process", headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.lower().startswith("access-control")]
    assert surface.post("[]", "application/x-www-form-urlencoded").status_code == 415


@contextlib.contextmanager
def half_open(port: int, count: int) -> Iterator[list[socket.socket]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 500 if hard < 0 else min(hard, count + 500), hard))
    with contextlib.ExitStack() as stack:
        connections = []
        for number in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            if number % 2:
                connection.sendall(b"POST /data/process HTTP/1.1\r\nHost: h\r\nContent-Length: 50\r\n\r\n{")
            else:
                connection.sendall(b"GET /health HT")
            connections.append(connection)
        yield connections


@pytest.mark.slow
def test_a_thousand_half_open_connections_leave_health_answering(run_neuron: Callable[..., NeuronProcess]) -> None:
    neuron = run_neuron(federation_url=NOWHERE)
    port = int(neuron.address().rpartition(":")[2])
    threads = psutil.Process(neuron.pid).num_threads()
    times = []
    with half_open(port, 1000):
        for _ in range(50):
            began = time.monotonic()
            answer = requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
            times.append(time.monotonic() - began)
            assert answer.status_code == 200
        assert sorted(times)[48] < 0.5, sorted(times)
        assert psutil.Process(neuron.pid).num_threads() <= threads + THREADS + 2
    assert CONNECTIONS > 1000
    neuron.signal(signal.SIGTERM)
    assert neuron.wait() == 0


@pytest.mark.slow
def test_a_silent_connection_is_closed_in_time(
    make_neuron: Callable[..., APINeuron], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron.endpoints.IDLE_SECONDS", 2)
    surface = Surface(make_neuron(federation_url=NOWHERE))
    with half_open(surface.port, 4) as connections:
        wait_for(lambda: all(map(closed, connections)), 8, "the end of the silent ones")
    assert surface.ask("GET", "/health/live").status_code == 200


def test_a_request_that_drips_in_is_closed_in_time(
    surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron.endpoints.REQUEST_SECONDS", 0.5)
    pause = threading.Event()
    with socket.create_connection(("127.0.0.1", surface.port), timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        began = time.monotonic()
        while not closed(connection):
            assert time.monotonic() - began < 5, "it drips on"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b" ")
            pause.wait(0.05)
        assert time.monotonic() - began >= 0.5
    assert surface.counted() == (0, 0)


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


@pytest.mark.slow
def test_an_idle_server_uses_no_processor(run_neuron: Callable[..., NeuronProcess]) -> None:
    neuron = run_neuron(federation_url=NOWHERE, heartbeat_interval=600, command_interval=600, analytics_interval=600)
    port = int(neuron.address().rpartition(":")[2])
    neuron.wait_logged("trying again")
    process = psutil.Process(neuron.pid)
    for keep_open in (False, True):
        with contextlib.ExitStack() as stack:
            if keep_open:
                session = stack.enter_context(requests.Session())
                assert session.get(f"http://127.0.0.1:{port}/health/live", timeout=5).status_code == 200
            used = processor_seconds(process, over=1)
        assert used <= 0.04, f"{used} s of processor within a second of idleness"


def processor_seconds(process: psutil.Process, over: float) -> float:
    began, before = time.monotonic(), process.cpu_times()
    wait_for(lambda: time.monotonic() - began > over, what="the time to measure over")
    after = process.cpu_times()
    return float(after.user + after.system - before.user - before.system)


# -- start and stop


def test_a_taken_port_ends_the_program_with_69_and_a_line(run_neuron: Callable[..., NeuronProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        neuron = run_neuron(federation_url=NOWHERE, port=port)
        assert neuron.wait() == 69
    line = f"the endpoints cannot listen on 127.0.0.1:{port}"
    assert neuron.logged(line)
    assert line in neuron.stderr
    assert "Traceback" not in neuron.stderr


def test_without_a_host_there_are_no_endpoints(
    oracle: RecordingFederation, make_neuron: Callable[..., APINeuron]
) -> None:
    neuron = make_neuron(federation_url=oracle.url, host="")
    assert neuron.start()
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
    assert neuron.endpoints is None
    assert neuron.address() == ""
    registration = oracle.of("register")[0].body
    assert "baseUrl" not in registration
    assert registration["healthcheckEndpoint"] == "/health"
    assert oracle.schema_violations() == []


def test_the_port_is_free_again_after_a_stop(make_neuron: Callable[..., APINeuron]) -> None:
    surface = Surface(make_neuron(federation_url=NOWHERE))
    with requests.Session() as kept_alive:
        assert kept_alive.get(f"http://127.0.0.1:{surface.port}/health/live", timeout=5).status_code == 200
        surface.neuron.stop()
    with pytest.raises(requests.ConnectionError):
        surface.ask("GET", "/health/live")
    assert surface.neuron.start()
    assert surface.neuron.endpoints is not None
    surface.port = surface.neuron.endpoints.port
    assert surface.ask("GET", "/health/live").status_code == 200


def test_endpoints_log_no_line_for_each_request(surface: Surface, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            surface.ask("GET", "/health/live")
            surface.post(ROWS)
    assert not [record for record in caplog.records if "/health" in record.getMessage()]
