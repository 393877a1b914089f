"""One federation call under a hostile or broken server: it ends in time, in a typed error, and betrays nothing."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuron.config import NeuronConfig, updated
from neuron.errors import (
    BadAnswer,
    ConfigError,
    FederationError,
    JournalUnavailable,
    Refused,
    Retryable,
    ServerFault,
    Throttled,
    Unauthorized,
    Unreachable,
)
from neuron.transport import MAX_REQUEST_BYTES, Answer, Transport, retry_waits, seconds_of_retry_after
from neuron_client import APINeuron
from tests.rig import raw_server
from tests.rig.fault_proxy import FaultProxy, Kind, TcpFault
from tests.rig.process import ROOT, wait_for
from tests.rig.raw_server import Behaviour, Conversation, RawServer, answer
from tests.rig.recording import Fault, RecordingFederation

DEADLINE = 0.4
TOKEN = "canary-token-0123456789"
MakeNeuron = Callable[..., APINeuron]


@contextlib.contextmanager
def transport_to(url: str, **tls: str) -> Iterator[Transport]:
    transport = Transport(url, user_agent="test", **tls)
    try:
        yield transport
    finally:
        transport.close()


def ask(url: str, *, token: str = TOKEN, timeout: float = 5.0, body: Any = None, **tls: str) -> Answer:
    with transport_to(url, **tls) as transport:
        method = "GET" if body is None else "POST"
        return transport.call("commands", method, "/commands/pending", body=body, token=token, timeout=timeout)


def data_of(json_text: bytes) -> Behaviour:
    return answer(b'{"success": true, "data": ' + json_text + b"}")


# -- the deadline ------------------------------------------------------------------------------------------------


def drip_chunks(conversation: Conversation) -> None:
    conversation.send(raw_server.HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        conversation.drip(b"1\r\n \r\n", 0.05)


def drip_endless_gzip(conversation: Conversation) -> None:
    conversation.send(raw_server.HEAD + b"Content-Encoding: gzip\r\n\r\n")
    conversation.drip(gzip.compress(b" " * 10_000_000), 0.05)


@pytest.mark.parametrize(
    "behaviour",
    [
        raw_server.silence,
        raw_server.endless_headers,
        raw_server.endless_continue(0.02),
        raw_server.drip_status_line(0.05),
        raw_server.drip_header(0.05),
        raw_server.drip_body(0.05),
        drip_chunks,
        drip_endless_gzip,
    ],
    ids=["silence", "headers", "continue", "drip_status", "drip_header", "drip_body", "drip_chunks", "drip_gzip"],
)
def test_no_call_outlives_its_deadline(behaviour: Behaviour) -> None:
    with RawServer(behaviour) as server:
        started = time.monotonic()
        with pytest.raises(Unreachable):
            ask(server.url, timeout=DEADLINE)
        assert time.monotonic() - started < DEADLINE + 0.5
        wait_for(lambda: server.conversations[0].closed, 2, "the end of the connection")
        assert server.conversations[0].seconds_open < DEADLINE + 1


def test_the_deadline_holds_for_a_connection_that_was_good_before() -> None:
    def once_good(conversation: Conversation) -> None:
        conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n" + b'{"success":true,"data": 1  }'[:27])
        conversation.request = b""
        conversation.read_head()
        conversation.drip(b"HTTP/1.1 200 " + b"O" * 1000, 0.05)

    with RawServer(once_good) as server, transport_to(server.url) as transport:
        with contextlib.suppress(BadAnswer):
            transport.call("heartbeat", "POST", "/heartbeat", body={}, timeout=5)
        started = time.monotonic()
        with pytest.raises(Unreachable):
            transport.call("heartbeat", "POST", "/heartbeat", body={}, timeout=DEADLINE)
        assert time.monotonic() - started < DEADLINE + 0.5
        assert len(server.conversations) == 1, "it was to be the same connection"


def test_a_tls_handshake_that_never_ends_is_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        started = time.monotonic()
        with pytest.raises(Unreachable):
            ask(f"https://127.0.0.1:{mute.getsockname()[1]}", timeout=DEADLINE)
        assert time.monotonic() - started < DEADLINE + 0.5


# -- where the token goes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status",
    ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"],
)
@pytest.mark.parametrize("body", [None, {"status": "active"}], ids=["GET", "POST"])
def test_a_redirect_is_an_error_and_nobody_else_hears_of_the_token(status: str, body: Any) -> None:
    with RawServer(raw_server.silence) as evil, RawServer(raw_server.redirect(f"{evil.url}/take", status)) as server:
        with pytest.raises(BadAnswer, match=f"{status[:3]} redirects elsewhere") as caught:
            ask(server.url, body=body)
        assert evil.conversations == []
        assert len(server.conversations) == 1
        assert TOKEN.encode() in server.conversations[0].request
        assert TOKEN not in str(caught.value)


def test_a_redirect_to_itself_is_asked_once() -> None:
    with RawServer(raw_server.silence) as server:
        server.behaviour = raw_server.redirect(server.url)
        with pytest.raises(BadAnswer):
            ask(server.url)
        assert len(server.conversations) == 1


@pytest.mark.parametrize("token", [TOKEN, ""], ids=["with a token", "without one"])
def test_a_netrc_replaces_no_token(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login mallory password stolen\ndefault login mallory password stolen\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    with RawServer(data_of(b"[]")) as server:
        ask(server.url, token=token)
        head = server.conversations[0].request
    sent = [line for line in head.split(b"\r\n") if line.lower().startswith(b"authorization:")]
    assert sent == ([f"Authorization: Bearer {token}".encode()] if token else [])


def test_a_body_over_100_kb_is_never_sent() -> None:
    with RawServer(data_of(b"{}")) as server:
        ask(server.url, body={"text": "x" * (MAX_REQUEST_BYTES - len('{"text":""}'))})
        with pytest.raises(Refused, match="not sent") as caught:
            ask(server.url, body={"text": "x" * (MAX_REQUEST_BYTES - len('{"text":""}') + 1)})
        assert caught.value.status == 413
        assert len(server.conversations) == 1


def test_nan_is_never_sent() -> None:
    with RawServer(data_of(b"{}")) as server:
        for number in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(ValueError, match="JSON compliant"):
                ask(server.url, body={"number": number})
        assert server.conversations == []


# -- answers too large -------------------------------------------------------------------------------------------

PROBE = """
import json, sys
from pathlib import Path
from neuron.errors import FederationError
from neuron.transport import Transport

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

for url in [sys.argv[1], *sys.argv[1:]]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = megabytes("VmRSS")
    transport = Transport(url, user_agent="probe")
    try:
        transport.call("commands", "GET", "/commands/pending", timeout=20)
        ended = "taken"
    except FederationError as error:
        ended = type(error).__name__
    transport.close()
    print(json.dumps([ended, megabytes("VmHWM") - before]))
"""


def test_no_answer_costs_20_mb_of_memory() -> None:
    shapes: dict[str, Behaviour] = {
        "a small one": data_of(b"[]"),
        "200 MB": raw_server.huge_body(),
        "gzip bomb": raw_server.gzip_bomb(),
        "nested gzip": raw_server.nested_gzip(),
        "depth bomb": raw_server.depth_bomb(),
        "million objects": raw_server.million_list(),
        "million floats": data_of(b"[" + b"1.5," * 990_000 + b"1]"),
        "million integers": data_of(b"[" + b"1," * 1_900_000 + b"1]"),
        "wide object": data_of(b"{" + b",".join(b'"%x":"%x"' % (n, n) for n in range(250_000)) + b"}"),
        "many texts": data_of(b"[" + b",".join(b'"%x"' % n for n in range(450_000)) + b"]"),
        "many quotes": data_of(b'["' + b'\\"' * 2_000_000),
    }
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(RawServer(behaviour)) for behaviour in shapes.values()]
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, *(server.url for server in servers)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )
    assert probe.returncode == 0, probe.stderr
    first, *lines = [json.loads(line) for line in probe.stdout.splitlines()]
    told = dict(zip(shapes, lines, strict=True))
    assert first[0] == told.pop("a small one")[0] == "taken"
    assert {ended for ended, _ in told.values()} == {"BadAnswer"}, told
    assert max(rise for _, rise in told.values()) < 20, told


def test_texts_full_of_brackets_and_commas_are_only_texts() -> None:
    text = "{[,:" * 200_000 + '\\"' * 1000
    with RawServer(data_of(json.dumps([text, "é", 1]).encode())) as server:
        assert ask(server.url).data == [text, "é", 1]


# -- answers that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 1000 + b"]" * 1000, "200 OK"),
        (b'{"success": true, "data": NaN}', "200 OK"),
        (b'{"success": true, "data": -Infinity}', "200 OK"),
        (b'{"success": true, "data": 1e400}', "200 OK"),
        (b'{"success": true, "data": ' + b"9" * 5000 + b"}", "200 OK"),
        (b"<html><body>Sign in to the hotel's network</body></html>", "200 OK"),
        (b"<html><h1>502 Bad Gateway</h1></html>", "404 Not Found"),
        (b"", "200 OK"),
        (b"", "204 No Content"),
        (b"[]", "200 OK"),
        (b"null", "200 OK"),
        (b"7", "200 OK"),
        (b'"text"', "200 OK"),
        (b"{}", "200 OK"),
        (b'{"success": 1, "data": []}', "200 OK"),
        (b'{"success": false, "error": "no"}', "200 OK"),
        (b'{"success": true, "data": [', "200 OK"),
        ('{"success": true}'.encode("utf-16"), "200 OK"),
        (b'{"success": true, "data": "\xff\xfe"}', "200 OK"),
    ],
)
def test_what_is_not_the_protocol_is_a_bad_answer(body: bytes, status: str) -> None:
    with RawServer(answer(body, status=status)) as server, pytest.raises(BadAnswer):
        ask(server.url)


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        ("401 Unauthorized", b"", Unauthorized),
        ("404 Not Found", b"", Refused),
        ("409 Conflict", b"", Refused),
        ("413 Payload Too Large", b"", Refused),
        ("408 Request Timeout", b"", ServerFault),
        ("429 Too Many Requests", b"", Throttled),
        ("500 Internal Server Error", b"", ServerFault),
        ("503 Service Unavailable", b"", ServerFault),
        ("503 Service Unavailable", b"Retry-After: 3\r\n", Throttled),
        ("599 Odd", b"", ServerFault),
    ],
)
def test_each_refusal_is_one_typed_error_with_the_federations_words(
    status: str, headers: bytes, error: type[FederationError]
) -> None:
    body = b'{"success": false, "error": "in its own words", "details": ["status: Required"]}'
    with RawServer(answer(body, status=status, headers=headers)) as server:
        with pytest.raises(error, match=r"in its own words.*status: Required") as caught:
            ask(server.url)
    assert type(caught.value) is error
    assert caught.value.status == int(status[:3])


def test_a_page_of_a_proxy_is_no_final_word() -> None:
    with RawServer(answer(b"<html>502 Bad Gateway</html>", status="502 Bad Gateway")) as server:
        with pytest.raises(ServerFault, match="HTML"):
            ask(server.url)


@pytest.mark.parametrize("charset", [b"", b"; charset=latin-1", b"; charset=utf-16", b"; charset=no-such"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["no BOM", "BOM"])
def test_an_answer_is_utf_8_whatever_its_header_says(charset: bytes, bom: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json%s\r\nContent-Length: %d\r\n\r\n"
    body = bom + '{"success": true, "data": "größer als €"}'.encode()
    with RawServer(lambda conversation: conversation.send(head % (charset, len(body)) + body)) as server:
        assert ask(server.url).data == "größer als €"


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc Odd\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnone",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n{}",
        b"\x00\x01\x02\r\n\r\n",
    ],
)
def test_what_is_not_even_http_is_a_federation_error(garbage: bytes) -> None:
    with RawServer(lambda conversation: conversation.send(garbage)) as server:
        with pytest.raises((Unreachable, BadAnswer)):
            ask(server.url, timeout=1)


# -- the network -------------------------------------------------------------------------------------------------


def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    with pytest.raises(Unreachable, match=r"Failed to resolve 'federation\.invalid'"):
        ask("http://federation.invalid:5000")


def test_a_closed_port_is_unreachable_and_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unreachable, match=r"commands: .*refused$"):
        ask(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("kind", ["rst_before", "rst_mid_request", "rst_mid_response", "drop_reply", "truncate"])
def test_a_broken_connection_is_unreachable_and_the_next_call_goes_through(
    kind: Kind, oracle: RecordingFederation
) -> None:
    token = oracle.token("n1")
    with FaultProxy(oracle.port) as proxy, transport_to(proxy.url) as transport:
        proxy.script([TcpFault(kind, after=-5)])
        with pytest.raises(Unreachable):
            transport.call("commands", "GET", "/commands/pending", token=token, timeout=3)
        assert transport.call("commands", "GET", "/commands/pending", token=token, timeout=3).data == []
        assert proxy.counts[kind] == 1


def test_a_kept_connection_that_the_federation_closed_is_opened_anew(oracle: RecordingFederation) -> None:
    token = oracle.token("n1")
    with transport_to(oracle.url) as transport:
        for _ in range(3):
            transport.call("commands", "GET", "/commands/pending", token=token, timeout=3)
            oracle.stop()
            oracle.start()
        assert transport.call("commands", "GET", "/commands/pending", token=token, timeout=3).status == 200


# -- TLS ---------------------------------------------------------------------------------------------------------


class TLSServer:
    """Answers one JSON success to each connection; `received` counts the bytes that came through TLS."""

    def __init__(self, certificate: trustme.LeafCert, *, client_ca: trustme.CA | None = None) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.context)
        if client_ca is not None:
            client_ca.configure_trust(self.context)
            self.context.verify_mode = ssl.CERT_REQUIRED
        self.received = 0
        self.handshakes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.handshakes += 1
            connection.settimeout(5)
            with contextlib.suppress(OSError), self.context.wrap_socket(connection, server_side=True) as secure:
                self.received += len(secure.recv(65_536))
                body = b'{"success": true, "data": "secret"}'
                secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raw_server.wake(self._listener)
        self._thread.join(5)
        self._listener.close()


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> str:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


def test_the_right_ca_is_trusted(ca: trustme.CA, ca_file: str) -> None:
    with TLSServer(ca.issue_cert("127.0.0.1")) as server:
        assert ask(server.url, ca=ca_file).data == "secret"
        assert server.received > 0


@pytest.mark.parametrize("case", ["unknown CA", "another CA", "wrong host", "expired"])
def test_a_wrong_certificate_gets_not_a_byte_of_a_request(case: str, ca: trustme.CA, ca_file: str) -> None:
    leaf = {
        "unknown CA": lambda: trustme.CA().issue_cert("127.0.0.1"),
        "another CA": lambda: trustme.CA().issue_cert("127.0.0.1"),
        "wrong host": lambda: ca.issue_cert("federation.example"),
        "expired": lambda: ca.issue_cert("127.0.0.1", not_after=datetime.now(UTC) - timedelta(days=1)),
    }[case]()
    with TLSServer(leaf) as server:
        with pytest.raises(Unreachable, match=r"(?i)certificate|hostname"):
            ask(server.url, ca="" if case == "unknown CA" else ca_file)
        wait_for(lambda: server.handshakes, 2, "the handshake")
        assert server.received == 0


def test_a_client_certificate_is_shown_to_who_asks_for_one(ca: trustme.CA, ca_file: str, tmp_path: Path) -> None:
    client = ca.issue_cert("neuron.example")
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"
    certificate.write_bytes(b"".join(part.bytes() for part in client.cert_chain_pems))
    client.private_key_pem.write_to_path(str(key))
    with TLSServer(ca.issue_cert("127.0.0.1"), client_ca=ca) as server:
        assert ask(server.url, ca=ca_file, cert=str(certificate), key=str(key)).data == "secret"
        received = server.received
        with pytest.raises(Unreachable):
            ask(server.url, ca=ca_file)
        assert server.received == received


def test_no_remote_hand_loosens_tls_or_moves_the_federation() -> None:
    for change in ({"tls_ca": "/etc/ssl/mallory.pem"}, {"federation_url": "http://127.0.0.1:1"}, {"verify": False}):
        with pytest.raises(ConfigError):
            updated(NeuronConfig(federation_url="https://federation.example"), change)


# -- when to come back -------------------------------------------------------------------------------------------

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("5", 5.0),
        (" 5 ", 5.0),
        ("0", 0.0),
        ("-10", 0.0),
        ("3600", 3600.0),
        ("1000000000", 3600.0),
        ("9" * 400, 3600.0),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("5 seconds", None),
        (formatdate(NOW + 30, usegmt=True), 30.0),
        (formatdate(NOW - 30, usegmt=True), 0.0),
        (formatdate(NOW + 86_400, usegmt=True), 3600.0),
        ("Mon, 99 Jun 2025 99:99:99 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_at_most_an_hour(value: str | None, seconds: float | None) -> None:
    assert seconds_of_retry_after(value, NOW) == seconds


class Recorder(threading.Event):
    """A stop event that nobody sets, which notes how long it was waited on instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return self.is_set()


def waits_after(error: Retryable, count: int) -> list[float]:
    """The first `count` waits of a caller that tries for ever and always gets `error`."""
    recorder = Recorder()
    error.tries, error.stopping = None, recorder
    waits = retry_waits()
    next(waits)
    for _ in range(count):
        waits.send(error)
    return recorder.waits


def test_waits_grow_with_full_jitter_up_to_a_minute() -> None:
    runs = [waits_after(Unreachable("heartbeat", "refused"), 12) for _ in range(200)]
    for attempt in range(12):
        cap = min(60.0, 2.0**attempt)
        column = sorted(run[attempt] for run in runs)
        assert 0 <= column[0] < 0.1 * cap
        assert 0.9 * cap < column[-1] <= cap


def test_retry_after_is_a_floor_and_the_jitter_comes_on_top() -> None:
    waits = waits_after(Throttled("heartbeat", "429", status=429, retry_after=120.0), 12)
    assert min(waits) >= 120
    assert max(waits) <= 180
    assert len(set(waits)) == 12


def test_a_stop_ends_the_waiting_at_once() -> None:
    error = Unreachable("register", "refused")
    error.tries, error.stopping = None, threading.Event()
    error.retry_after = 3600.0
    waits = retry_waits()
    next(waits)
    timer = threading.Timer(0.1, error.stopping.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(StopIteration):
        waits.send(error)
    assert time.monotonic() - started < 1
    timer.join()


def test_a_neuron_told_to_come_back_later_does(oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.1)
    oracle.script("heartbeat", [None, Fault(429, headers={"Retry-After": "1"})])
    neuron.start()
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= 3)
    _, told, after = oracle.of("heartbeat")[:3]
    assert after.at - told.at >= 1.0


def test_whoever_asks_again_too_early_is_held_back_here_and_nothing_counts_as_an_outage(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = make_neuron(federation_url=oracle.url, command_interval=3600)
    neuron.start()
    oracle.wait_until(lambda: oracle.of("pending"))
    oracle.script("pending", [Fault(503, headers={"Retry-After": "7"})])
    for _ in range(3):
        with pytest.raises(Throttled):
            neuron.fetch_commands()
    assert len(oracle.of("pending")) == 2
    assert neuron.status()["federation"]["reachable"]


# -- no thread dies of an answer ---------------------------------------------------------------------------------

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
COMMANDS = st.fixed_dictionaries(
    {},
    optional={
        "commandId": st.text(max_size=4) | st.sampled_from(["a", "b", "../x", "c d", "é"]) | JUNK,
        "commandType": st.sampled_from(["health_check", "run_task", "no such", "cancel_task", "config_update"]) | JUNK,
        "commandData": JUNK | st.fixed_dictionaries({"task": JUNK, "params": JUNK}),
        "priority": JUNK,
        "timeoutAt": JUNK | st.sampled_from(["2001-01-01T00:00:00Z", "9999-99-99", "0001-01-01T00:00:00"]),
    },
)
DATA = (
    JUNK
    | st.lists(COMMANDS | JUNK, max_size=3)
    | st.fixed_dictionaries({"pendingCommands": JUNK | st.integers(), "token": JUNK})
)
ENVELOPES = st.fixed_dictionaries(
    {"success": st.just(True) | JUNK}, optional={"data": DATA, "error": JUNK, "details": JUNK}
)
BODIES = (
    ENVELOPES.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"success": st.just(True), "data": DATA}).map(lambda value: json.dumps(value).encode())
    | JUNK.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
)
STATUSES = st.sampled_from([200] * 12 + [201, 204, 302, 400, 401, 404, 409, 413, 418, 429, 500, 502, 503])
HEADERS = st.sampled_from(
    [
        b"", b"Retry-After: 0\r\n", b"Retry-After: soon\r\n", b"Date: never\r\n",
        b"Date: Mon, 01 Jan 0001 00:00:00 GMT\r\n", b"Content-Encoding: gzip\r\n", b"Content-Type: text/html\r\n",
    ]
)


def test_no_answer_raises_anything_that_a_loop_does_not_expect(make_neuron: MakeNeuron) -> None:
    with RawServer(raw_server.silence) as server:
        neuron = make_neuron(federation_url=server.url, neuron_id="n1", host="", request_timeout=2.0)
        neuron.journal.open()
        neuron.credentials.load()
        # The loops' own iterations, without waits in between.
        neuron._stopping.set()
        calls: list[Callable[[], object]] = [
            neuron.register, neuron.send_heartbeat, neuron.desk.look, neuron.report_analytics
        ]
        counted = 0

        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
        @given(STATUSES, HEADERS, BODIES)
        def check(status: int, headers: bytes, body: bytes) -> None:
            nonlocal counted
            server.behaviour = answer(body, status=f"{status} Scripted", headers=headers)
            neuron._not_before.clear()
            for call in calls:
                counted += 1
                with contextlib.suppress(FederationError, JournalUnavailable):
                    call()
            json.dumps(neuron.status())
            for conversation in server.conversations[:]:
                if conversation.closed:
                    server.conversations.remove(conversation)

        try:
            check()
        finally:
            neuron.desk.drain(2)
            neuron.journal.close()
            neuron.transport.close()
    assert counted >= 800
    assert neuron.journal.failure is None


def test_loops_live_through_every_bad_answer_and_beat_again_when_it_ends(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    shapes: list[Behaviour] = [
        answer(b"<html>502</html>", status="502 Bad Gateway"), answer(b"<html>login</html>"), answer(b""),
        answer(b"[]"), answer(b"null"), data_of(b"null"), data_of(b"7"), data_of(b'"text"'), data_of(b"{}"),
        data_of(b'[null, 5, {"commandId": null}, {"commandId": "x", "commandType": 7}]'),
        data_of(b'{"pendingCommands": "many"}'), raw_server.depth_bomb(), answer(b"[" * 1000 + b"]" * 1000),
        raw_server.million_list(200_000), raw_server.gzip_bomb(20_000_000), data_of(b"1e400"),
        raw_server.redirect("http://127.0.0.1:1"), lambda conversation: conversation.send(b"SSH-2.0\r\n"),
    ]
    turn = 0

    def each_in_turn(conversation: Conversation) -> None:
        nonlocal turn
        turn += 1
        shapes[turn % len(shapes)](conversation)

    with FaultProxy(oracle.port) as proxy:
        neuron = make_neuron(
            federation_url=proxy.url, heartbeat_interval=0.05, command_interval=0.05, analytics_interval=0.05
        )
        neuron.start()
        oracle.wait_until(lambda: oracle.of("heartbeat"))
        proxy.always(TcpFault("behave", behaviour=each_in_turn))
        wait_for(lambda: turn > 2 * len(shapes), 15, "two bad answers of each kind")
        beaten = len(oracle.of("heartbeat"))
        proxy.clear()
        oracle.wait_until(lambda: len(oracle.of("heartbeat")) > beaten, 10, "a heartbeat after the bad answers")
        command = oracle.issue(neuron.neuron_id, "health_check")
        oracle.wait_until(lambda: oracle.command(command)["status"] == "completed", 10, "a command afterwards")
        assert {name: (loop.is_alive(), loop.errors) for name, loop in neuron.loops.items()} == dict.fromkeys(
            neuron.loops, (True, 0)
        )
        neuron.stop()


def test_a_connection_is_not_shared_between_threads(oracle: RecordingFederation) -> None:
    token = oracle.token("n1")
    failures: list[BaseException] = []
    with transport_to(oracle.url) as transport:

        def many() -> None:
            try:
                for _ in range(20):
                    transport.call("commands", "GET", "/commands/pending", token=token, timeout=5)
            except BaseException as failure:
                failures.append(failure)
            finally:
                transport.close()

        threads = [threading.Thread(target=many) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(oracle.of("pending")) == 160
