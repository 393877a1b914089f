"""Identity and token: they outlive the process, are asked for once, and are renewed at a bearable pace."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
import time_machine

import neuron.credentials
import neuron_client
from neuron.config import NeuronConfig
from neuron.credentials import Credentials, Identity, read_token
from neuron.errors import BadAnswer, FederationError, IdentityConflict, Unauthorized
from neuron.logs import NeuronLogger
from neuron.transport import FederationClock
from neuron_client import APINeuron
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.invariants import Request
from tests.rig.process import NeuronProcess, wait_for
from tests.rig.recording import Fault, RecordingFederation

MakeNeuron = Callable[..., APINeuron]
RunNeuron = Callable[..., NeuronProcess]

REMEDIES = ("state_dir", "NEURON_TOKEN", "federation's staff", "on_identity_conflict=new-id")


@contextlib.contextmanager
def by_hand(neuron: APINeuron) -> Iterator[APINeuron]:
    """The neuron with its journal and identity, and no thread of its own: a test makes its calls."""
    neuron.journal.open()
    neuron.credentials.load()
    try:
        yield neuron
    finally:
        neuron.transport.close()
        neuron.journal.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """`log("ERROR")`: the messages of that level so far."""
    caplog.set_level(logging.DEBUG, logger="neuron")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelname == level]


@pytest.fixture
def reissuing() -> Iterator[RecordingFederation]:
    """A federation that gives the holder of an old token a new one."""
    with RecordingFederation(like_real=False) as running:
        yield running


def identity_file(neuron: APINeuron) -> Path:
    return Path(neuron.config.state_dir) / "identity.json"


def settled(oracle: RecordingFederation, neuron: APINeuron) -> None:
    """The neuron has registered and beaten."""
    seen = len(oracle.of("heartbeat"))
    neuron.start()
    oracle.wait_until(lambda: any(one.status == 200 for one in oracle.of("heartbeat")[seen:]), what="a heartbeat")


def token_of(neuron_id: str, **claims: Any) -> str:
    now = int(time.time())
    return jwt.encode({"neuronId": neuron_id, "iat": now, "exp": now + 86_400, **claims}, "x" * 32, "HS256")


def bearer(request: Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


# -- the identity outlives the process ---------------------------------------------------------------------------


@pytest.mark.parametrize("neuron_id", ["", "probe-1"], ids=["its own choice", "configured"])
def test_one_registration_is_enough_for_every_start(
    neuron_id: str, oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    ids = set()
    for _ in range(3):
        neuron = make_neuron(federation_url=oracle.url, neuron_id=neuron_id, name="Größer als Neuron 7!")
        settled(oracle, neuron)
        neuron.stop()
        ids.add(neuron.neuron_id)
    assert len(oracle.of("register")) == 1
    assert len(ids) == 1
    assert ids == {neuron_id} if neuron_id else next(iter(ids)).startswith("groer-als-neuron-7-")


def test_the_identity_is_nobody_elses_to_read_even_under_an_open_umask(
    oracle: RecordingFederation, run_neuron: RunNeuron, tmp_path: Path
) -> None:
    process = run_neuron(prefix=["sh", "-c", 'umask 000; exec "$@"', "sh"], federation_url=oracle.url)
    process.wait_logged("registered as")
    oracle.wait_until(lambda: oracle.of("heartbeat"))
    state = tmp_path / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()}
    assert set(modes) >= {"identity.json", "journal.db"}
    assert set(modes.values()) == {0o600}, modes


def test_nothing_is_asked_of_the_federation_before_the_identity_is_durable(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Callable[[str], list[str]]
) -> None:
    neuron = make_neuron(federation_url=oracle.url)
    obstacle = Path(neuron.config.state_dir) / ".identity.json.new"
    obstacle.mkdir(parents=True, mode=0o700)
    neuron.start()
    wait_for(lambda: any("not registered before" in line for line in log("ERROR")), what="the reason in the log")
    assert oracle.of("register") == []
    obstacle.rmdir()
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat once the disk takes it")


def test_a_token_that_cannot_be_stored_is_used_and_stored_later(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Callable[[str], list[str]]
) -> None:
    def spoil(_: Request) -> None:
        obstacle.mkdir()

    with by_hand(make_neuron(federation_url=oracle.url)) as neuron:
        obstacle = identity_file(neuron).parent / ".identity.json.new"
        oracle.script("register", spoil)
        neuron.register()
        assert "kept in memory" in log("ERROR")[0]
        assert neuron.fetch_commands() == []
        assert neuron.credentials.token not in identity_file(neuron).read_text()
        obstacle.rmdir()
        neuron.credentials.save_again()
        assert neuron.credentials.token in identity_file(neuron).read_text()


# -- identity files as one finds them ----------------------------------------------------------------------------


class Stored:
    """A state directory with one registered identity, and what `Credentials` make of its file."""

    def __init__(self, directory: Path, *, configured_id: str = "") -> None:
        self.config = NeuronConfig(
            state_dir=str(directory), neuron_id=configured_id, federation_url="http://127.0.0.1:5000"
        )
        self.path = directory / "identity.json"
        directory.mkdir(mode=0o700)
        self.neuron_id = configured_id or "probe-1700000000"
        self.token = token_of(self.neuron_id)
        self.fresh().save(
            Identity(self.neuron_id, configured_id, generated=not configured_id, confirmed=True, token=self.token)
        )

    def fresh(self) -> Credentials:
        """As a new process has them, not loaded."""
        return Credentials(self.config, FederationClock(), NeuronLogger({"neuron_id": ""}))

    def loaded(self) -> Credentials:
        credentials = self.fresh()
        credentials.load()
        return credentials

    def set_aside(self) -> list[Path]:
        return list(self.path.parent.glob("identity.json.damaged-*"))


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "stored")


def test_what_was_stored_is_loaded(stored: Stored) -> None:
    assert (stored.loaded().neuron_id, stored.loaded().token) == (stored.neuron_id, stored.token)


def test_a_torn_identity_is_set_aside_wherever_it_was_torn(stored: Stored) -> None:
    whole = stored.path.read_bytes()
    for length in range(len(whole)):
        stored.path.write_bytes(whole[:length])
        loaded = stored.loaded()
        assert loaded.token == ""
        assert loaded.neuron_id.startswith("api-neuron-")
        assert not stored.path.exists()
        loaded.save(loaded.identity)
    assert stored.set_aside()[0].read_bytes() != whole


def test_a_flipped_bit_costs_at_most_the_identity(stored: Stored) -> None:
    whole = stored.path.read_bytes()
    chance = random.Random(1)
    kept = 0
    for _ in range(250):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        stored.path.write_bytes(flipped)
        loaded = stored.loaded()
        assert loaded.token == "" or read_token(loaded.token)["neuronId"] == loaded.neuron_id
        loaded.expires_in()
        loaded.expires_soon()
        loaded.save(loaded.identity)
        kept += loaded.neuron_id == stored.neuron_id
    assert 0 < kept < 250


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 500, b"null", b"[]", b"{}", b'{"identities": []}', b'{"identities": {"a": 5}}',
        b'{"identities": {"a": {"neuron_id": "", "configured_id": "", "generated": true}}}',
        b'{"identities": {"a": {"neuron_id": "x", "configured_id": "", "generated": true, "token": 5}}}',
        b'{"identities": {"a": {"neuron_id": "x", "configured_id": "", "generated": true, "saved_at": "y"}}}',
        b'{"identities": {"a": {"neuron_id": "x", "configured_id": "", "generated": true, "rank": 1}}}',
        b"[" * 100_000, b"\xff\xfe", b"<html>",
    ],
)
def test_a_file_that_holds_no_identity_is_set_aside_and_said_so(
    content: bytes, stored: Stored, log: Callable[[str], list[str]]
) -> None:
    stored.path.write_bytes(content)
    loaded = stored.loaded()
    loaded.save(loaded.identity)
    assert loaded.neuron_id.startswith("api-neuron-")
    assert [path.read_bytes() for path in stored.set_aside()] == [content]
    (line,) = log("ERROR")
    assert str(stored.path) in line
    assert stored.set_aside()[0].name in line


def test_a_token_of_another_neuron_is_not_used(stored: Stored) -> None:
    entries = json.loads(stored.path.read_text())
    next(iter(entries["identities"].values()))["token"] = token_of("somebody-else")
    stored.path.write_text(json.dumps(entries))
    assert stored.loaded().token == ""
    assert len(stored.set_aside()) == 1


def test_a_file_open_to_others_is_closed_and_used(stored: Stored, log: Callable[[str], list[str]]) -> None:
    stored.path.chmod(0o644)
    assert stored.loaded().token == stored.token
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
    assert "0600" in log("WARNING")[0]


def test_a_symbolic_link_is_not_followed(stored: Stored, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    stored.path.rename(elsewhere)
    before = elsewhere.read_bytes()
    stored.path.symlink_to(elsewhere)
    loaded = stored.loaded()
    assert loaded.token == ""
    loaded.save(loaded.identity)
    assert not stored.path.is_symlink()
    assert elsewhere.read_bytes() == before


def test_a_link_in_place_of_the_temporary_file_is_not_written_through(stored: Stored, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (stored.path.parent / ".identity.json.new").symlink_to(victim)
    loaded = stored.loaded()
    loaded.save(loaded.identity)
    assert victim.read_text() == "untouched"
    assert stored.loaded().token == stored.token


def test_a_change_of_the_configured_id_keeps_the_old_one_for_later(stored: Stored) -> None:
    config = NeuronConfig(state_dir=stored.config.state_dir, neuron_id="other-1", federation_url="http://127.0.0.1:5000")
    other = Credentials(config, FederationClock(), NeuronLogger({"neuron_id": ""}))
    other.load()
    assert (other.neuron_id, other.token) == ("other-1", "")
    other.save(other.identity)
    assert stored.loaded().token == stored.token


def test_an_expired_token_is_exchanged_where_the_federation_does_that(
    reissuing: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    old = reissuing.token("probe-1", ttl=-60)
    neuron = make_neuron(federation_url=reissuing.url, neuron_id="probe-1", token=old)
    settled(reissuing, neuron)
    (registration,) = reissuing.of("register")
    assert bearer(registration) == old
    assert neuron.credentials.token != old
    assert {one.status for one in reissuing.of("heartbeat") if bearer(one) != old} == {200}


def test_an_expired_token_that_nobody_exchanges_is_one_attempt_and_one_remedy(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Callable[[str], list[str]]
) -> None:
    neuron = make_neuron(federation_url=oracle.url, neuron_id="probe-1", token=oracle.token("probe-1", ttl=-60))
    neuron.start()
    wait_for(lambda: log("ERROR"), what="the remedy")
    # Five heartbeats: enough for a loop that asks blindly.
    beats = len(oracle.of("heartbeat"))
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= beats + 5)
    assert len(oracle.of("register")) == 1
    assert [all(remedy in line for remedy in REMEDIES) for line in log("ERROR")].count(True) == 1
    assert neuron.conflicts == 1


@pytest.mark.parametrize(
    "moment", [10**400, 1e308, float("inf"), "soon", True, -1, None], ids=lambda moment: str(moment)[:5]
)
def test_an_odd_expiry_stops_nothing(moment: Any, oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    oracle.always("*", Fault(200, {"success": True, "data": {}}))
    token = jwt.encode({"neuronId": "probe-1", "iat": moment, "exp": moment}, "x" * 32, "HS256")
    neuron = make_neuron(federation_url=oracle.url, token=token, heartbeat_interval=0.05)
    neuron.start()
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= 3)
    json.dumps(neuron.status())
    assert neuron.loops["heartbeat"].errors == 0


# -- a token from outside ----------------------------------------------------------------------------------------


def test_a_supplied_token_needs_no_registration(oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    token = oracle.token("given-1")
    neuron = make_neuron(federation_url=oracle.url, token=token)
    settled(oracle, neuron)
    assert neuron.neuron_id == "given-1"
    assert oracle.of("register") == []
    assert {bearer(one) for one in oracle.of("heartbeat")} == {token}


def test_neuron_token_reaches_the_program_and_none_of_its_output(
    oracle: RecordingFederation, run_neuron: RunNeuron
) -> None:
    token = oracle.token("given-1")
    process = run_neuron(federation_url=oracle.url, environ={"NEURON_TOKEN": token}, log_level="DEBUG")
    oracle.wait_until(lambda: oracle.of("heartbeat") and oracle.of("pending"))
    process.kill()
    assert oracle.of("register") == []
    assert token.split(".")[2] not in "".join(process.raw) + process.stderr


@pytest.mark.parametrize(
    ("supplied", "reason"),
    [
        (lambda: "not-a-token", "cannot be used"),
        (lambda: token_of("somebody-else"), "belongs to neuron somebody-else"),
        (lambda: jwt.encode({"sub": "me"}, "x" * 32, "HS256"), "cannot be used"),
    ],
    ids=["no JWT", "another neuron's", "of nobody"],
)
def test_a_supplied_token_that_does_not_fit_is_named_and_left_out(
    supplied: Callable[[], str],
    reason: str,
    oracle: RecordingFederation,
    make_neuron: MakeNeuron,
    log: Callable[[str], list[str]],
) -> None:
    token = supplied()
    neuron_id = "" if "sub" in (read_token(token) if "." in token else {}) else "probe-1"
    neuron = make_neuron(federation_url=oracle.url, neuron_id=neuron_id, token=token)
    settled(oracle, neuron)
    assert len(oracle.of("register")) == 1
    assert any(reason in line for line in log("ERROR"))
    assert token not in "".join(log("ERROR"))


def test_the_newer_of_the_stored_and_the_supplied_token_is_used(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    with time_machine.travel(time.time() - 3600):
        older = oracle.token("probe-1")
    newer = oracle.token("probe-1")
    for stored, supplied in ((older, newer), (newer, older)):
        with by_hand(make_neuron(federation_url=oracle.url, neuron_id="probe-1")) as neuron:
            neuron.credentials.accept(stored)
        with by_hand(make_neuron(federation_url=oracle.url, neuron_id="probe-1", token=supplied)) as neuron:
            assert neuron.credentials.token == newer


# -- renewal -----------------------------------------------------------------------------------------------------


class FastForward:
    """The clock of the credentials and of the neuron's pacing, which a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        clock = SimpleNamespace(
            time=time.time, monotonic=self.now, strftime=time.strftime, gmtime=time.gmtime
        )
        monkeypatch.setattr(neuron.credentials, "time", clock)
        monkeypatch.setattr(neuron_client, "time", clock)

    def now(self) -> float:
        return time.monotonic() + self.ahead


class Skipped(threading.Event):
    """A stop event whose waits take no time, but count for the clock; it stops after `most` of them."""

    def __init__(self, clock: FastForward, most: int) -> None:
        super().__init__()
        self._clock = clock
        self._most = most
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        self._clock.ahead += timeout or 0.0
        if len(self.waits) >= self._most:
            self.set()
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FastForward:
    return FastForward(monkeypatch)


UNAUTHORIZED = Fault(401, {"success": False, "error": "Invalid or expired token"})


def test_eight_threads_on_a_401_storm_renew_once_and_repeat_their_calls_once(
    reissuing: RecordingFederation, make_neuron: MakeNeuron, log: Callable[[str], list[str]]
) -> None:
    with by_hand(make_neuron(federation_url=reissuing.url)) as neuron:
        neuron.register()
        old = neuron.credentials.token
        barrier = threading.Barrier(8)

        def revoked(request: Request) -> Fault | None:
            return UNAUTHORIZED if bearer(request) == old else None

        reissuing.script("heartbeat", revoked)
        reissuing.script("pending", revoked)
        reissuing.script("register", [Fault(None, delay=0.3)])
        failures: list[BaseException] = []

        def storm(call: Callable[[], Any]) -> None:
            barrier.wait()
            try:
                call()
            except BaseException as failure:
                failures.append(failure)
            finally:
                neuron.transport.close()

        calls = [neuron.send_heartbeat, neuron.fetch_commands] * 4
        threads = [threading.Thread(target=storm, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(reissuing.of("register")) == 2
        asked = [*reissuing.of("heartbeat"), *reissuing.of("pending")]
        assert [one.status for one in asked].count(200) == 8
        assert len(asked) <= 16
        for secret in (old, neuron.credentials.token):
            assert secret.split(".")[2] not in "".join(log("WARNING") + log("ERROR") + log("INFO") + log("DEBUG"))


@pytest.mark.parametrize("renewal", ["new token", "401", "500", "conflict", "empty", "same token"])
def test_a_401_storm_gets_one_renewal_a_minute_and_after_six_one_an_hour(
    renewal: str, reissuing: RecordingFederation, make_neuron: MakeNeuron, clock: FastForward
) -> None:
    with by_hand(make_neuron(federation_url=reissuing.url)) as neuron:
        neuron.register()
        answers: dict[str, Any] = {
            "401": UNAUTHORIZED,
            "500": Fault(500),
            "conflict": Fault(500, {"success": False, "error": "Failed to register API neuron"}),
            "empty": Fault(200, ""),
            "same token": Fault(201, {"success": True, "data": {"token": neuron.credentials.token}}),
        }
        renewals: list[float] = []

        def counted(_: Request) -> Fault | None:
            renewals.append(clock.now())
            return answers.get(renewal)

        reissuing.script("register", counted)
        reissuing.always("pending", UNAUTHORIZED)
        began = clock.now()
        while clock.now() - began < 3 * 3600:
            with pytest.raises(Unauthorized):
                neuron.fetch_commands()
            clock.ahead += 61
        gaps = [after - before for before, after in itertools.pairwise(renewals)]
        assert renewals[0] - began < 1
        assert all(60 <= gap < 65 for gap in gaps[:5]), gaps
        assert all(3600 <= gap < 3670 for gap in gaps[5:]), gaps
        assert len(renewals) == 8


def test_the_pace_of_renewals_is_the_same_for_eight_threads(
    reissuing: RecordingFederation, make_neuron: MakeNeuron, clock: FastForward
) -> None:
    with by_hand(make_neuron(federation_url=reissuing.url)) as neuron:
        neuron.register()
        reissuing.always("*", UNAUTHORIZED)
        reissuing.script("register", lambda _: None)
        refused: list[BaseException] = []

        def storm() -> None:
            for _ in range(10):
                try:
                    neuron.fetch_commands()
                except Unauthorized as error:
                    refused.append(error)
            neuron.transport.close()

        for minute in range(3):
            threads = [threading.Thread(target=storm) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(reissuing.of("register")) == 2 + minute
            clock.ahead += 61
        assert len(refused) == 240


def test_heartbeats_resume_within_an_interval_once_the_token_is_accepted_again(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    neuron = make_neuron(federation_url=oracle.url, heartbeat_interval=0.2)
    settled(oracle, neuron)
    oracle.always("heartbeat", UNAUTHORIZED)
    oracle.always("pending", UNAUTHORIZED)
    seen = len(oracle.of("heartbeat"))
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= seen + 3)
    oracle.clear()
    cured = time.monotonic()
    oracle.wait_until(lambda: oracle.of("heartbeat")[-1].status == 200)
    assert time.monotonic() - cured < 1.0
    assert len(oracle.of("register")) == 2
    # What the federation refused while it lasted is no lasting illness.
    wait_for(lambda: neuron.conflicts == 0, 2, "the end of the conflict")


def test_a_token_is_renewed_ahead_of_its_expiry(make_neuron: MakeNeuron) -> None:
    with RecordingFederation(like_real=False, token_ttl=1000) as oracle:
        neuron = make_neuron(federation_url=oracle.url)
        settled(oracle, neuron)
        old = neuron.credentials.token
        assert neuron.credentials.expires_in() == pytest.approx(1000, abs=10)
        oracle.clock_offset = 880.0
        beats = len(oracle.of("heartbeat"))
        oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= beats + 3)
        assert len(oracle.of("register")) == 1
        oracle.clock_offset = 920.0
        oracle.wait_until(lambda: len(oracle.of("register")) == 2, what="the renewal")
        beats = len(oracle.of("heartbeat"))
        oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= beats + 3)
        assert len(oracle.of("register")) == 2
        assert bearer(oracle.of("register")[1]) == old
        assert {bearer(one) for one in oracle.of("heartbeat")[beats + 1 :]} == {neuron.credentials.token}
        assert {one.status for one in oracle.of("heartbeat")} == {200}


def test_a_machine_whose_clock_is_wrong_renews_nothing(oracle: RecordingFederation, make_neuron: MakeNeuron) -> None:
    with by_hand(make_neuron(federation_url=oracle.url)) as neuron:
        neuron.register()
        for days in (400, -400):
            oracle.clock_offset = -days * 86_400.0
            with time_machine.travel(time.time() + days * 86_400.0):
                neuron.fetch_commands()
                assert neuron.credentials.expires_in() == pytest.approx(365 * 86_400, rel=0.001)
                assert not neuron.credentials.expires_soon()
            oracle.clock_offset = 0.0
        assert len(oracle.of("register")) == 1


# -- registration ------------------------------------------------------------------------------------------------


def test_an_id_that_is_taken_is_asked_for_ever_more_rarely_and_the_remedy_is_one_line(
    oracle: RecordingFederation, make_neuron: MakeNeuron, clock: FastForward, log: Callable[[str], list[str]]
) -> None:
    oracle.token("taken-1")
    with by_hand(make_neuron(federation_url=oracle.url, neuron_id="taken-1")) as neuron:
        waiting = neuron._stopping = Skipped(clock, 9)
        with pytest.raises(IdentityConflict):
            neuron.register()
        assert len(oracle.of("register")) == 9
        floors = [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
        for wait, floor in zip(waiting.waits, floors, strict=True):
            assert floor <= wait <= floor + 60
        assert {one.body["neuronId"] for one in oracle.of("register")} == {"taken-1"}
        lines = log("ERROR")
        assert len(lines) == 9
        for line in lines:
            assert "\n" not in line
            assert all(remedy in line for remedy in ("taken-1", *REMEDIES))


def test_new_id_goes_on_under_a_fresh_id_that_the_next_start_keeps(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    oracle.token("taken-1")
    ids = []
    for _ in range(2):
        neuron = make_neuron(federation_url=oracle.url, neuron_id="taken-1", on_identity_conflict="new-id")
        settled(oracle, neuron)
        ids.append(neuron.neuron_id)
        neuron.stop()
    assert ids[0] == ids[1]
    assert ids[0].startswith("taken-1-")
    assert [one.status for one in oracle.of("register")] == [500, 201]


def test_a_generated_id_whose_first_answer_was_lost_is_given_up_for_another(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    with FaultProxy(oracle.port) as proxy:
        proxy.script([TcpFault("drop_reply", path="/register")])
        neuron = make_neuron(federation_url=proxy.url)
        settled(oracle, neuron)
        lost, refused, taken = oracle.of("register")
        assert (lost.served, refused.served, taken.served) == (201, 500, 201)
        assert lost.body["neuronId"] == refused.body["neuronId"] != taken.body["neuronId"] == neuron.neuron_id
        neuron.stop()


def test_a_process_killed_before_the_answer_came_recovers_with_the_next(
    oracle: RecordingFederation, run_neuron: RunNeuron
) -> None:
    oracle.script("register", [Fault(None, act=True, delay=30)])
    first = run_neuron(federation_url=oracle.url, request_timeout=20)
    oracle.wait_until(lambda: any(one.served == 201 for one in oracle.of("register")))
    first.kill()
    run_neuron(federation_url=oracle.url)
    oracle.wait_until(lambda: any(one.status == 200 for one in oracle.of("heartbeat")), 15, "a heartbeat")
    assert [one.served for one in oracle.of("register")] == [201, 500, 201]


def test_a_federation_that_is_down_at_the_start_is_joined_when_it_comes(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Callable[[str], list[str]]
) -> None:
    oracle.stop()
    neuron = make_neuron(federation_url=oracle.url)
    started = time.monotonic()
    assert neuron.start()
    assert time.monotonic() - started < 2, "start() is not to wait for the federation"
    wait_for(lambda: log("WARNING"), what="a word about it")
    assert oracle.url in log("WARNING")[0]
    assert "refused" in log("WARNING")[0]
    assert neuron.live()[0]
    assert not neuron.ready()[0]
    oracle.start()
    oracle.wait_until(lambda: oracle.of("heartbeat"), 15, "a heartbeat")
    outage = [line for line in log("WARNING") if "trying again" in line]
    assert len(outage) == 1, "an outage is one line in twenty seconds"


@pytest.mark.parametrize("status", [429, 500])
def test_registration_waits_as_long_as_retry_after_says(
    status: int, oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    oracle.script("register", [Fault(status, headers={"Retry-After": "1"})])
    neuron = make_neuron(federation_url=oracle.url)
    settled(oracle, neuron)
    told, after = oracle.of("register")
    assert 1.0 <= after.at - told.at < 4.0


@pytest.mark.parametrize(
    "token",
    [
        None, "", 5, ["token"], "not-a-token", "a.b.c", token_of("somebody-else"), "\ud800",
        jwt.encode({"neuronId": "probe-1", "exp": 1_000_000_000}, "x" * 32, "HS256"),
        "eyJhbGciOiJIUzI1NiJ9." + "W1tb" * 10_000 + ".e30",
    ],
    ids=["null", "empty", "number", "list", "no JWT", "dots", "another's", "surrogate", "expired", "deep"],
)
def test_a_registration_without_a_usable_token_is_a_bad_answer_and_stores_nothing(
    token: Any, oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    with by_hand(make_neuron(federation_url=oracle.url, neuron_id="probe-1")) as neuron:
        oracle.script("register", [Fault(201, {"success": True, "data": {"token": token}})])
        neuron._stopping.set()
        with pytest.raises(BadAnswer, match="register"):
            neuron.register()
        assert neuron.credentials.token == ""
        assert not neuron.registered.is_set()
        neuron._stopping.clear()
        neuron.register()
        assert neuron.credentials.token


def test_a_refused_registration_is_said_and_tried_again_in_a_minute(
    oracle: RecordingFederation, make_neuron: MakeNeuron, log: Callable[[str], list[str]]
) -> None:
    with by_hand(make_neuron(federation_url=oracle.url)) as neuron:
        oracle.script("register", [Fault(400, {"success": False, "error": "name: Required"})])
        assert neuron._beat() == 60.0
        assert "name: Required" in log("ERROR")[0]
        assert len(oracle.of("register")) == 1


# -- a federation that moved -------------------------------------------------------------------------------------


def test_a_federation_at_a_new_address_is_tried_with_the_old_token_first(
    make_neuron: MakeNeuron, tmp_path: Path, log: Callable[[str], list[str]]
) -> None:
    db = str(tmp_path / "federation.db")
    with RecordingFederation(db=db) as before:
        neuron = make_neuron(federation_url=before.url)
        settled(before, neuron)
        neuron.stop()
    with RecordingFederation(db=db) as after:
        moved = make_neuron(federation_url=after.url)
        settled(after, moved)
        assert moved.neuron_id == neuron.neuron_id
        assert after.of("register") == []
        assert any("new to neuron" in line for line in log("WARNING"))


def test_a_mistyped_address_does_not_cost_the_token_of_the_right_one(make_neuron: MakeNeuron) -> None:
    with RecordingFederation() as right, RecordingFederation() as wrong:
        neuron = make_neuron(federation_url=right.url)
        settled(right, neuron)
        neuron.stop()
        strayed = make_neuron(federation_url=wrong.url)
        settled(wrong, strayed)
        strayed.stop()
        assert [one.status for one in wrong.of("register")] == [201]
        settled(right, make_neuron(federation_url=right.url))
        assert len(right.of("register")) == 1


def test_the_token_goes_to_no_address_that_a_command_names(
    oracle: RecordingFederation, make_neuron: MakeNeuron
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as evil:
        evil.settimeout(0.3)
        neuron = make_neuron(federation_url=oracle.url)
        settled(oracle, neuron)
        address = f"http://127.0.0.1:{evil.getsockname()[1]}"
        command = oracle.issue(neuron.neuron_id, "config_update", {"federation_url": address})
        oracle.wait_until(lambda: oracle.command(command)["status"] == "failed")
        with pytest.raises(TimeoutError):
            evil.accept()
        assert "federation_url" in oracle.command(command)["errorMessage"]


def test_two_threads_may_save_at_once(stored: Stored) -> None:
    credentials = stored.loaded()
    failures: list[BaseException] = []

    def save(number: int) -> None:
        try:
            for _ in range(10):
                credentials.save(Identity(f"n{number}", f"n{number}", generated=False))
        except FederationError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    kept = json.loads(stored.path.read_text())["identities"]
    assert {entry["neuron_id"] for entry in kept.values()} == {stored.neuron_id, "n0", "n1", "n2", "n3"}
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
