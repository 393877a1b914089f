"""The rig that judges the neuron is judged here: a rig that sees nothing would find everything right."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.rig import raw_server
from tests.rig.fault_proxy import FaultProxy, Kind, TcpFault
from tests.rig.invariants import double_effects, log_violations
from tests.rig.raw_server import Behaviour, RawServer
from tests.rig.recording import Fault, Hang, RecordingFederation
from tests.rig.schema import faults_of

BEAT = {"status": "active", "healthScore": 90, "uptime": 5}
DONE = {"success": True, "response": {"outcome": "succeeded"}}


@pytest.fixture
def oracle() -> Iterator[RecordingFederation]:
    with RecordingFederation() as running:
        yield running


@pytest.fixture
def proxy(oracle: RecordingFederation) -> Iterator[FaultProxy]:
    with FaultProxy(oracle.port) as running:
        yield running


class Neuron:
    """The least of a neuron: it calls one federation with one token, over one connection."""

    def __init__(self, oracle: RecordingFederation, url: str | None = None, neuron_id: str = "n1") -> None:
        self.base = f"{url or oracle.url}/api/api-neurons"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {oracle.token(neuron_id)}"

    def __enter__(self) -> Neuron:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def post(self, path: str, body: Any = None, timeout: float = 5) -> requests.Response:
        return self.session.post(self.base + path, json=body, timeout=timeout)

    def beat(self, timeout: float = 5) -> int:
        return self.post("/heartbeat", BEAT, timeout).status_code

    def pending(self) -> requests.Response:
        return self.session.get(self.base + "/commands/pending", timeout=5)


@pytest.fixture
def neuron(oracle: RecordingFederation) -> Iterator[Neuron]:
    with Neuron(oracle) as calling:
        yield calling


@pytest.fixture
def proxied(oracle: RecordingFederation, proxy: FaultProxy) -> Iterator[Neuron]:
    with Neuron(oracle, proxy.url) as calling:
        yield calling


# --- the oracle's record


def test_every_request_is_recorded_with_what_became_of_it(
    oracle: RecordingFederation, neuron: Neuron
) -> None:
    command_id = oracle.issue("n1", "run_task", {"task": "score"})
    neuron.pending()
    neuron.post(f"/commands/{command_id}/acknowledge")
    neuron.post(f"/commands/{command_id}/complete", DONE)
    neuron.post("/analytics/report", {"requestCount": 1})
    requests.get(f"{oracle.url}/elsewhere", timeout=5)
    seen = [(one.kind, one.command_id, one.neuron_id, one.served, one.status) for one in oracle.requests]
    assert seen == [
        ("pending", None, "n1", 200, 200),
        ("acknowledge", command_id, "n1", 200, 200),
        ("complete", command_id, "n1", 200, 200),
        ("analytics", None, "n1", 400, 400),
        ("other", None, None, 404, 404),
    ]
    assert oracle.of("complete")[0].body == DONE
    assert [(one.old, one.new) for one in oracle.transitions] == [
        ("pending", "acknowledged"),
        ("acknowledged", "completed"),
    ]
    assert oracle.transitions[1].body == DONE
    assert oracle.counts()["acknowledged commands"] == 1


def test_a_script_is_consumed_in_order_and_then_over(oracle: RecordingFederation, neuron: Neuron) -> None:
    html = Fault(502, "<html>bad gateway</html>", content_type="text/html")
    oracle.script("heartbeat", [Fault(429, headers={"Retry-After": "7"}), None, html])
    limited, fine, gateway, after = (neuron.post("/heartbeat", BEAT) for _ in range(4))
    assert (limited.status_code, limited.headers["Retry-After"]) == (429, "7")
    assert (gateway.status_code, gateway.headers["Content-Type"], gateway.text) == (
        502,
        "text/html",
        "<html>bad gateway</html>",
    )
    assert (fine.status_code, after.status_code) == (200, 200)
    assert [one.served for one in oracle.of("heartbeat")] == [None, 200, None, 200]
    assert oracle.counts()["fault 429"] == 1


def test_a_fault_after_acting_hides_what_was_done(oracle: RecordingFederation, neuron: Neuron) -> None:
    command_id = oracle.issue("n1", "stop")
    oracle.script("complete", [Fault(500, act=True)])
    assert neuron.post(f"/commands/{command_id}/complete", DONE).status_code == 500
    assert oracle.command(command_id)["status"] == "completed"
    assert oracle.of("complete")[0].served == 200


def test_a_standing_fault_strikes_until_cleared(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.always("*", Fault(503))
    oracle.always("pending", Fault(401))
    assert [neuron.beat(), neuron.pending().status_code, neuron.beat()] == [503, 401, 503]
    assert requests.get(f"{neuron.base}/all", timeout=5).status_code == 403
    oracle.clear()
    assert neuron.beat() == 200
    with pytest.raises(ValueError, match="no kind 'heartbeats'"):
        oracle.always("heartbeats", Fault())


def test_a_callable_chooses_by_the_request(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.script("heartbeat", lambda request: Fault(500) if request.number % 2 else None)
    assert [neuron.beat() for _ in range(3)] == [500, 200, 500]


def test_a_delayed_answer_is_the_federations_own(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.script("heartbeat", [Fault(None, delay=0.2)])
    assert neuron.beat() == 200
    assert oracle.overdue(0.15)
    assert not oracle.overdue(5)


@pytest.mark.parametrize(("act", "served"), [(False, None), (True, 200)])
def test_a_hang_ends_when_the_neuron_hangs_up(
    oracle: RecordingFederation, neuron: Neuron, act: bool, served: int | None
) -> None:
    oracle.script("heartbeat", [Hang(threading.Event(), act=act)])
    with pytest.raises(requests.Timeout):
        neuron.beat(timeout=0.1)
    neuron.session.close()
    oracle.wait_until(lambda: oracle.of("heartbeat")[0].until, what="the hang ends")
    seen = oracle.of("heartbeat")[0]
    assert (seen.status, seen.served) == (None, served)


def test_a_hang_ends_when_released(oracle: RecordingFederation, neuron: Neuron) -> None:
    release = threading.Event()
    oracle.script("heartbeat", [Hang(release)])
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(neuron.beat()))
    thread.start()
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="the heartbeat arrives")
    assert not answers
    release.set()
    thread.join(timeout=5)
    assert answers == [200]


def test_an_outage_keeps_port_state_and_record(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.stop()
    with pytest.raises(requests.ConnectionError):
        neuron.beat()
    oracle.issue("n1", "health_check")
    oracle.start()
    assert neuron.pending().json()["data"][0]["commandType"] == "health_check"
    assert [one.kind for one in oracle.requests] == ["pending"]


def test_an_outage_lets_go_of_what_hangs(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.script("heartbeat", [Hang(threading.Event())])

    def beat() -> None:
        # It is answered just before the end, or cut off by it.
        with contextlib.suppress(requests.ConnectionError):
            neuron.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="the heartbeat arrives")
    oracle.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_its_clock_can_be_moved(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.clock_offset = -400 * 86_400
    then = neuron.post("/heartbeat", BEAT)
    year = time.gmtime(time.time() - 400 * 86_400).tm_year
    assert f" {year} " in then.headers["Date"]
    assert then.json()["data"]["timestamp"].startswith(str(year))
    neuron.session.headers["Authorization"] = f"Bearer {oracle.token('n1', ttl=-1)}"
    assert neuron.beat() == 401


# --- the invariants: each sees the violation it is there for


def test_lost_flipped_and_conflicting_commands_are_seen(oracle: RecordingFederation, neuron: Neuron) -> None:
    lost, flipped, torn, fine = (oracle.issue("n1", "stop") for _ in range(4))
    for command_id in (lost, flipped, torn, fine):
        neuron.post(f"/commands/{command_id}/acknowledge")
    for command_id in (flipped, torn, fine, fine):
        neuron.post(f"/commands/{command_id}/complete", DONE)
    neuron.post(f"/commands/{flipped}/acknowledge")
    neuron.post(f"/commands/{torn}/complete", {"success": False, "response": {"outcome": "failed"}})
    assert [line.split()[0] for line in oracle.lost_commands()] == [lost, flipped]
    assert oracle.flips() == [f"{flipped}: completed -> acknowledged"]
    assert [line.split(":")[0] for line in oracle.conflicting_outcomes()] == [torn]
    assert oracle.counts()["duplicate completes"] == 2
    assert oracle.void_because() == ["acknowledged commands: 4, wanted 100", "interrupted: 0, wanted 1"]


def test_a_field_that_may_differ_is_no_conflict(oracle: RecordingFederation, neuron: Neuron) -> None:
    command_id = oracle.issue("n1", "stop")
    for seconds in (1, 2):
        body = {"success": True, "response": {"outcome": "succeeded", "seconds": seconds}}
        neuron.post(f"/commands/{command_id}/complete", body)
    assert oracle.conflicting_outcomes()
    assert not oracle.conflicting_outcomes(ignore=["seconds"])


def test_spurious_and_wrong_results_are_seen(oracle: RecordingFederation, neuron: Neuron) -> None:
    right, wrong = (oracle.issue("n1", "run_task", {"n": 2}) for _ in range(2))
    for command_id, result in ((right, 4), (wrong, 5)):
        body = {"success": True, "response": {"outcome": "succeeded", "result": result}}
        neuron.post(f"/commands/{command_id}/complete", body)
    assert oracle.spurious() == []
    neuron.post("/commands/never/acknowledge")
    found = oracle.spurious(lambda data, response: response["result"] == 2 * data["n"])
    assert ["never issued" in line for line in found] == [True, False]
    assert wrong in found[1]


def test_totals_that_fall_or_do_not_add_up_are_seen() -> None:
    with RecordingFederation(analytics="accept") as oracle, Neuron(oracle) as neuron:
        for count, day in ((5, "2026-01-01"), (7, "2026-01-01"), (1, "2026-01-02"), (0, "2026-01-02")):
            body = {"requestCount": count, "date": day}
            assert neuron.post("/analytics/report", body).status_code == 200
        assert len(oracle.analytics_regressions()) == 1
        assert "2026-01-02: requestCount fell from 1 to 0" in oracle.analytics_regressions()[0]
        found = oracle.analytics_regressions(accepted={"2026-01-01": 8}, sent={"2026-01-01": 6})
        assert found[1:] == ["2026-01-01: 8 accepted, 7 reported", "2026-01-01: 6 sent, 7 reported"]
        assert oracle.store.analytics("n1", days=9_999)[0]["requestCount"] == 7


def test_haste_is_seen(oracle: RecordingFederation, neuron: Neuron) -> None:
    for _ in range(5):
        neuron.beat()
    assert oracle.impolite(4, "heartbeat")
    assert not oracle.impolite(5)
    for index, one in enumerate(oracle.requests):
        one.at = float(index * 10)
    assert not oracle.synchronised()
    for one in oracle.requests[:4]:
        one.at = 0.0
    assert oracle.synchronised() == ["second 0: 4, mean 0.1"]


def test_a_400_of_the_neurons_own_making_is_seen(oracle: RecordingFederation, neuron: Neuron) -> None:
    oracle.script("heartbeat", [Fault(400)])
    neuron.beat()
    neuron.post("/analytics/report", {"requestCount": 1})
    assert not oracle.own_4xx()
    neuron.post("/heartbeat", BEAT | {"errorLog": None})
    neuron.post("/heartbeat", BEAT | {"errorLog": "x" * 110_000})
    assert [line.split(":")[0][-3:] for line in oracle.own_4xx()] == ["400", "413"]
    assert len(oracle.schema_violations()) == 2


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        ("heartbeat", BEAT | {"warningsLog": None}, "warningsLog"),
        ("heartbeat", BEAT | {"neuronId": "n1"}, "neuronId"),
        ("heartbeat", BEAT | {"uptime": 2**31}, "uptime"),
        ("heartbeat", BEAT | {"systemMetrics": float("nan")}, "not JSON"),
        ("analytics", {"requestCount": -1}, "requestCount"),
        ("analytics", {"errorRate": 1.5}, "errorRate"),
        ("complete", {"success": True, "response": {"outcome": "done"}}, "outcome"),
        ("complete", {"success": True, "response": {"outcome": "failed"}}, "success"),
        ("complete", {"success": True}, "outcome"),
        ("acknowledge", {"why": "not"}, "carries a body"),
    ],
)
def test_the_schema_sees_what_a_neuron_must_not_send(kind: str, body: dict[str, Any], named: str) -> None:
    assert named in " ".join(faults_of(kind, json.dumps(body).encode()))


def test_the_schema_passes_what_a_neuron_may_send() -> None:
    assert not faults_of("heartbeat", json.dumps(BEAT | {"systemMetrics": {"cpu_percent": 0.5}}).encode())
    assert not faults_of("complete", json.dumps(DONE | {"errorMessage": "none"}).encode())
    assert not faults_of("acknowledge", b"")


def test_effects_and_log_lines_are_counted(tmp_path: Path) -> None:
    effects = tmp_path / "effects"
    assert double_effects(effects) == []
    effects.write_text("a 1\nb 1\na 2\n")
    assert double_effects(effects) == ["a: 2 effects"]

    def line(second: int, level: str = "WARNING", message: str = "down") -> bytes:
        stamp = f"2026-01-01T00:00:{second:02}.000Z"
        return json.dumps({"timestamp": stamp, "level": level, "message": message}).encode() + b"\n"

    assert not log_violations(
        line(0) + line(20) + line(21, "INFO") + line(22, "INFO") + line(23, message="up")
    )
    found = log_violations(line(0) + line(19) + b"plain\n" + b'{"timestamp": "\x1b"}\n')
    assert [text.split(":")[0] for text in found] == ["line 2", "line 3", "line 4", "line 4"]


# --- the proxy


def test_without_a_fault_it_passes_on(
    oracle: RecordingFederation, proxied: Neuron, proxy: FaultProxy
) -> None:
    assert [proxied.beat() for _ in range(3)] == [200] * 3
    assert proxied.pending().json() == {"success": True, "data": []}
    assert not proxy.counts


@pytest.mark.parametrize(
    ("kind", "acted"),
    [
        ("rst_before", False),
        ("rst_mid_request", False),
        ("rst_mid_response", True),
        ("drop_reply", True),
        ("truncate", True),
    ],
)
def test_a_broken_exchange_acts_or_not(
    oracle: RecordingFederation, proxied: Neuron, proxy: FaultProxy, kind: Kind, acted: bool
) -> None:
    proxy.script([TcpFault(kind, path="/heartbeat", after=-5)])
    assert proxied.pending().status_code == 200
    with pytest.raises(requests.RequestException):
        proxied.beat()
    assert proxied.beat() == 200
    assert len(oracle.of("heartbeat")) == 1 + acted
    assert proxy.counts == {kind: 1}


@pytest.mark.parametrize("kind", ["silence", "drip_header", "drip_body", "slow"])
def test_a_slow_exchange_is_slow(
    oracle: RecordingFederation, proxied: Neuron, proxy: FaultProxy, kind: Kind
) -> None:
    proxy.always(TcpFault(kind, path="/heartbeat", interval=0.4))
    with pytest.raises(requests.RequestException):
        proxied.beat(timeout=0.2)
    proxy.clear()
    assert proxied.beat() == 200


def test_a_seed_fixes_the_faults(oracle: RecordingFederation, proxied: Neuron, proxy: FaultProxy) -> None:
    def fates() -> list[bool]:
        weights: dict[TcpFault | None, float] = {
            None: 0.3,
            TcpFault("silence", "/pending"): 0.3,
            TcpFault("drop_reply"): 0.2,
            TcpFault("rst_before", "/heartbeat"): 0.2,
        }
        proxy.randomly(7, weights)
        fates = []
        for _ in range(30):
            try:
                fates.append(proxied.beat() == 200)
            except requests.ConnectionError:
                fates.append(False)
        return fates

    first = fates()
    assert first == fates()
    assert 5 < sum(first) < 25
    assert set(proxy.counts) == {"drop_reply", "rst_before"}


def test_a_behaviour_may_answer_in_the_federations_place(
    oracle: RecordingFederation, proxied: Neuron, proxy: FaultProxy
) -> None:
    proxy.script([TcpFault("behave", path="/pending", behaviour=raw_server.million_list(10))])
    assert proxied.beat() == 200
    assert len(proxied.pending().json()["data"]) == 10
    assert proxied.pending().json()["data"] == []


def test_a_stopped_proxy_refuses_and_leaves_no_thread(oracle: RecordingFederation, proxy: FaultProxy) -> None:
    proxy.always(TcpFault("silence"))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as held:
        held.sendall(b"GET / HTTP/1.1\r\n\r\n")
        oracle.wait_until(lambda: proxy.counts["silence"], what="the silence begins")
        proxy.stop()
        assert held.recv(1) == b""
    assert not [thread for thread in threading.enumerate() if thread.name == "fault proxy"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
    proxy.start()
    proxy.clear()
    with Neuron(oracle, proxy.url) as neuron:
        assert neuron.beat() == 200


# --- the raw server


@pytest.mark.parametrize(
    "behaviour",
    [
        raw_server.silence,
        raw_server.endless_headers,
        raw_server.endless_continue(0.01),
        raw_server.drip_status_line(0.05),
        raw_server.drip_header(0.05),
        raw_server.drip_body(0.05),
    ],
)
def test_a_drip_lasts_until_the_client_hangs_up(behaviour: Behaviour, oracle: RecordingFederation) -> None:
    with RawServer(behaviour) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            oracle.wait_until(lambda: server.conversations and server.conversations[0].received)
            (talk,) = server.conversations
            if behaviour is not raw_server.silence:
                oracle.wait_until(lambda: talk.sent > 20, what="bytes are sent")
            assert talk.closed is None
        oracle.wait_until(lambda: talk.closed, what="the server sees the end")
        assert 0 < talk.seconds_open < 5


def test_a_stop_hangs_up_on_everybody(oracle: RecordingFederation) -> None:
    with RawServer(raw_server.silence) as server:
        client = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        oracle.wait_until(lambda: server.conversations, what="the server takes the connection")
        server.stop()
        with client:
            assert client.recv(1) == b""
    assert not [thread for thread in threading.enumerate() if thread.name == "raw server"]


def test_bombs_are_as_big_as_they_say() -> None:
    with RawServer(raw_server.answer(b"")) as server:

        def size(behaviour: Behaviour) -> int:
            server.behaviour = behaviour
            with requests.get(server.url, stream=True, timeout=10) as answer:
                return sum(len(chunk) for chunk in answer.iter_content(1 << 20))

        assert size(raw_server.huge_body(20_000_001)) == 20_000_001
        assert size(raw_server.gzip_bomb(10_500_000)) == 10_500_000
        assert server.conversations[-1].sent < 50_000
        assert size(raw_server.nested_gzip(3_000_000, times=2)) == 3_000_000
        server.behaviour = raw_server.depth_bomb(100_000)
        with pytest.raises(RecursionError):
            requests.get(server.url, timeout=5).json()
        server.behaviour = raw_server.million_list(1_000)
        assert len(requests.get(server.url, timeout=5).json()["data"]) == 1_000
        server.behaviour = raw_server.redirect("http://elsewhere.invalid/", "308 Permanent Redirect")
        moved = requests.get(server.url, allow_redirects=False, timeout=5)
        assert (moved.status_code, moved.headers["Location"]) == (308, "http://elsewhere.invalid/")
