"""Log lines: one JSON object each, no secret in any of them, and a stdout that is gone costs the line alone."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest

import neuron_client
from neuron import logs
from neuron.logs import REDACTED, JsonLines, NeuronLogger, TextLines, Throttle, logger, redactor
from neuron_client import APINeuron
from tests.rig.process import ROOT, NeuronProcess, wait_for
from tests.rig.recording import Fault, RecordingFederation

CANARY = "canary-5f3a-secret-value-of-32-bytes"
JWT = jwt.encode({"neuronId": "n-1", "canary": "canary"}, "x" * 32)
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class Output:
    """What a handler with the product's formatter writes for the product's logger."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(formatter)

    def text(self) -> str:
        return self.stream.getvalue()

    def entries(self) -> list[dict[str, Any]]:
        return [strict_json(line) for line in self.text().splitlines()]


def strict_json(line: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {line}")

    entry = json.loads(line, parse_constant=refuse)
    assert isinstance(entry, dict)
    return entry


@pytest.fixture
def identity() -> dict[str, Any]:
    return {"neuron_id": "n-1", "neuron_name": "Loom", "neuron_type": "weaver"}


def attached(formatter: logging.Formatter) -> Iterator[Output]:
    output = Output(formatter)
    level = logger.level
    logger.addHandler(output.handler)
    logger.setLevel(logging.DEBUG)
    yield output
    logger.removeHandler(output.handler)
    logger.setLevel(level)


@pytest.fixture
def json_lines() -> Iterator[Output]:
    yield from attached(JsonLines())


@pytest.fixture
def text_lines() -> Iterator[Output]:
    yield from attached(TextLines())


@pytest.fixture
def log(identity: dict[str, Any]) -> NeuronLogger:
    redactor.learn(CANARY)
    return NeuronLogger(identity)


# -- the shape of a line


def test_a_line_is_one_json_object_with_time_level_message_and_identity(json_lines: Output, log: NeuronLogger) -> None:
    log.warning("registered as %s", "n-1", extra={"commandId": "c-1", "nested": {"a": [1, None]}})
    (entry,) = json_lines.entries()
    assert TIMESTAMP.fullmatch(entry.pop("timestamp"))
    assert entry == {
        "level": "WARNING", "message": "registered as n-1", "neuron_id": "n-1", "name": "Loom", "type": "weaver",
        "commandId": "c-1", "nested": {"a": [1, None]},
    }


def test_the_timestamp_is_utc_whatever_the_time_zone(json_lines: Output, log: NeuronLogger) -> None:
    record = logging.LogRecord("neuron", logging.INFO, "", 0, "m", None, None)
    record.created = 1_700_000_000.1239
    assert json.loads(JsonLines().format(record))["timestamp"] == "2023-11-14T22:13:20.123Z"


def test_an_exception_is_within_its_one_line(json_lines: Output, log: NeuronLogger) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("it failed")
    (entry,) = json_lines.entries()
    assert "ValueError: first\nsecond" in entry["exc_info"]
    assert "Traceback" in entry["exc_info"]


def test_an_extra_never_overwrites_the_lines_own_fields(json_lines: Output, log: NeuronLogger) -> None:
    own = ("timestamp", "level", "message", "neuron_id", "name", "type")
    log.info("the message", extra={**dict.fromkeys(own, "forged"), "args": "a", "exc_info": "e", "lineno": 1})
    (entry,) = json_lines.entries()
    assert TIMESTAMP.fullmatch(entry["timestamp"])
    assert [entry[name] for name in own[1:]] == ["INFO", "the message", "n-1", "Loom", "weaver"]
    assert [entry[f"{name}_"] for name in own] == ["forged"] * len(own)


def test_control_characters_and_line_breaks_are_escaped(json_lines: Output, log: NeuronLogger) -> None:
    nasty = "a\nb\r\x00\x1b[2J\u2028\u202e\ud800\x85"
    log.info("hostile %s", nasty, extra={"value": nasty, nasty: "key"})
    text = json_lines.text()
    assert text.count("\n") == 1
    assert text.isascii()
    assert not [character for character in text[:-1] if ord(character) < 0x20]
    # Half a character is the one thing that no stream would take.
    assert json_lines.entries()[0]["message"] == f"hostile {nasty}".replace("\ud800", "?")


def test_values_that_json_does_not_know_still_make_a_line(json_lines: Output, log: NeuronLogger) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    values = [float("nan"), float("inf"), b"\xff", {1, 2}, object(), cycle, {(1, 2): 3}, Path("/x"), 10**400]
    for value in values:
        log.info("value", extra={"value": value})
    assert len(json_lines.entries()) == len(values)


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize("output", ["json_lines", "text_lines"])
def test_a_line_that_cannot_be_made_never_raises_into_the_caller(
    output: str, log: NeuronLogger, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Output = request.getfixturevalue(output)
    log.info("too %s many %s", "few")
    log.info("value %s", Unprintable())
    log.info("extra", extra={"value": Unprintable(), "values": [Unprintable()]})
    log.info("%d", "no number")
    assert len(lines.text().splitlines()) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_text_lines_are_for_people(text_lines: Output, log: NeuronLogger) -> None:
    log.warning("beat %d", 5, extra={"commandId": "c\n1"})
    line = text_lines.text()
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING beat 5 commandId='c\\n1'\n", line)


def test_text_lines_let_no_control_character_through(text_lines: Output, log: NeuronLogger) -> None:
    try:
        raise ValueError("\x1b[2J\x00 in the exception")
    except ValueError:
        log.exception("a\x1b[2J\r\nforged line", extra={"value": "\x07"})
    first, *traceback = text_lines.text().splitlines()
    assert "a\\x1b[2J\\r\\nforged line" in first
    assert traceback[-1].endswith("ValueError: \\x1b[2J\\x00 in the exception")
    assert not [c for c in text_lines.text() if ord(c) < 0x20 and c != "\n"]


def test_the_levels_of_the_logger_are_the_standard_ones(json_lines: Output, log: NeuronLogger) -> None:
    logger.setLevel(logging.ERROR)
    log.warning("unheard")
    neuron_client.logger.setLevel(logging.DEBUG)
    log.debug("heard")
    assert [entry["message"] for entry in json_lines.entries()] == ["heard"]


# -- secrets


class Holder:
    def __repr__(self) -> str:
        return f"Holder({CANARY})"


def records_with_secrets(log: NeuronLogger) -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "known %s", CANARY)
        log.log(level, f"Authorization: Bearer {JWT}")
    log.info("header %r", {"Authorization": f"Bearer {JWT}"})
    log.info("%(token)s", {"token": JWT})
    log.info("url http://user:canary@host:1/path")
    log.info("basic %s", "Basic Y2FuYXJ5OmNhbmFyeQ==")
    log.info("extra", extra={"token": "canary", "api_secret": b"canary", "X-Api-Key": "canary", "password": ["canary"]})
    log.info("nested", extra={"config": {"a": [{"deep": {"apiKey": "canary", "text": f"x {CANARY} y"}}]}})
    log.info("holder", extra={"holder": Holder(), "bytes": CANARY.encode(), "tuple": (CANARY, {CANARY: CANARY})})
    log.info("deep", extra={"deep": nested(CANARY, 60)})
    try:
        try:
            raise KeyError(CANARY)
        except KeyError:
            raise ConnectionError(f"headers: Bearer {JWT}") from None
    except ConnectionError:
        log.exception("with traceback")
    try:
        raise ValueError(f"cause {CANARY}")
    except ValueError as error:
        try:
            raise RuntimeError("effect") from error
        except RuntimeError:
            log.warning("chained", exc_info=True)
    logging.getLogger("neuron.adopters.own").warning("child %s", CANARY, extra={"token": "canary"})


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize("output", ["json_lines", "text_lines"])
def test_no_secret_is_in_any_line_at_any_level(
    output: str, log: NeuronLogger, request: pytest.FixtureRequest
) -> None:
    lines: Output = request.getfixturevalue(output)
    records_with_secrets(log)
    assert "canary" not in lines.text()
    assert JWT.split(".")[1] not in lines.text()
    assert "Y2FuYXJ5" not in lines.text()
    assert lines.text().count(REDACTED) > 25
    assert "with traceback" in lines.text()
    assert "headers: " in lines.text(), "what is no secret stays"


def test_a_hosts_own_handler_sees_cleaned_records(log: NeuronLogger, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="neuron"):
        log.error("known %s", CANARY, extra={"token": "canary", "list": [CANARY]})
        try:
            raise ValueError(CANARY)
        except ValueError:
            log.exception("failed")
    assert "canary" not in caplog.text
    assert "canary" not in repr([vars(record) for record in caplog.records])


def test_a_short_text_is_never_taken_for_a_secret() -> None:
    for text in ("", "a", "admin"):
        redactor.learn(text)
    assert redactor.text("a plain admin line") == "a plain admin line"
    assert redactor.text("bearer of bad news") == "bearer of bad news"


@pytest.mark.parametrize("key", ["tokenExpiresInSeconds", "secretCount"])
def test_a_number_under_a_secrets_name_stays(key: str) -> None:
    assert redactor.value({key: 5, "token": ""}) == {key: 5, "token": ""}


@pytest.mark.slow
def test_no_secret_reaches_a_line_of_a_running_neuron(
    oracle: RecordingFederation, run_neuron: Callable[..., NeuronProcess], tmp_path: Path
) -> None:
    script = tmp_path / "telling.py"
    script.write_text(
        "import logging, sys, neuron_client\n"
        "def build(config):\n"
        "    neuron = neuron_client.APINeuron(config)\n"
        "    @neuron.task('tell')\n"
        "    def tell(context):\n"
        "        token, secret = neuron.credentials.token, config.api_secret\n"
        "        context.logger.warning('told %s', token, extra={'header': {'Authorization': token}})\n"
        "        logging.getLogger('elsewhere').error('root %s %s', token, secret, extra={'token': 'canary'})\n"
        "        raise ValueError(f'Bearer {token} {config.api_secret}')\n"
        "    return neuron\n"
        "from neuron.program import run\n"
        "sys.exit(run(build))\n"
    )
    process = run_neuron(
        script=script, federation_url=oracle.url, neuron_id="n-1", log_level="DEBUG",
        environ={"NEURON_API_SECRET": CANARY},
    )
    oracle.wait_until(lambda: oracle.of("heartbeat"), what="a heartbeat")
    oracle.script("heartbeat", [Fault(401), Fault(500, body="<html>"), Fault(400)])
    command = oracle.issue("n-1", "run_task", {"task": "tell"})
    oracle.issue("n-1", "config_update", {"api_secret": CANARY + "-other", "token": "canary"})
    oracle.wait_until(lambda: oracle.of("complete", command), what="the completion")
    oracle.wait_until(lambda: len(oracle.of("heartbeat")) > 4, what="heartbeats after the faults")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    token = oracle.of("heartbeat")[0].headers["Authorization"].removeprefix("Bearer ")
    output = "".join(process.raw) + process.stderr
    assert process.logged("told ")
    assert process.logged("root ")
    assert token not in output
    assert token.split(".")[2] not in output
    assert "canary" not in output
    told = oracle.of("complete", command)[0].raw.decode() + json.dumps([one.body for one in oracle.of("heartbeat")])
    assert token not in told, "an error message holds the token"
    assert CANARY not in told, "an error message holds the secret"
    assert not [line for line in process.lines if "unparsed" in line]
    assert all(TIMESTAMP.fullmatch(line["timestamp"]) for line in process.lines)
    assert {line["neuron_id"] for line in process.lines if "neuron started" in line["message"]} == {"n-1"}


def test_libraries_log_in_the_same_form(
    oracle: RecordingFederation, run_neuron: Callable[..., NeuronProcess], tmp_path: Path
) -> None:
    script = tmp_path / "warning.py"
    script.write_text(
        "import logging, sys, neuron_client\n"
        "def build(config):\n"
        "    logging.getLogger('library').warning('from a library')\n"
        "    return neuron_client.APINeuron(config)\n"
        "from neuron.program import run\n"
        "sys.exit(run(build))\n"
    )
    process = run_neuron(script=script, federation_url=oracle.url)
    assert process.wait_logged("from a library")["level"] == "WARNING"


# -- stdout


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", ">&-", ">/dev/full 2>/dev/full", "| true"])
def test_a_stdout_that_is_gone_costs_the_lines_and_neither_life_nor_exit_code(
    redirection: str, oracle: RecordingFederation, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    command = (
        f'{{ echo $BASHPID > {pid_file}; exec "{sys.executable}" "{ROOT / "neuron_client.py"}" '
        f'--set federation_url={oracle.url} --set state_dir={tmp_path / "state"} --set port=0 '
        f"--set heartbeat_interval=0.2; }} {redirection}; exit ${{PIPESTATUS[0]}}"
    )
    shell = subprocess.Popen(["bash", "-c", command], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        oracle.wait_until(lambda: len(oracle.of("heartbeat")) >= 4, 20, "heartbeats without a stdout")
        os.kill(int(pid_file.read_text()), 15)
        _, errors = shell.communicate(timeout=20)
    finally:
        shell.kill()
        shell.wait()
    assert shell.returncode == 0
    assert "Traceback" not in errors
    assert oracle.of("heartbeat")[-1].body["status"] == "inactive"


def test_lines_that_stdout_did_not_take_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        handler = logs._Stdout()
        handler.emit(logging.makeLogRecord({"msg": "x"}))
        assert handler.lost == 1
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()


# -- embedded


def test_an_embedded_neuron_leaves_the_hosts_logging_alone(make_neuron: Callable[..., APINeuron]) -> None:
    root = list(logging.getLogger().handlers)
    own = list(logger.handlers)
    neuron = make_neuron(federation_url="http://127.0.0.1:9", log_level="DEBUG")
    assert neuron.start()
    assert logging.getLogger().handlers == root
    assert logger.propagate
    assert neuron_client.logger is logger
    neuron.stop()
    assert logger.handlers == own


def test_the_recent_problems_of_a_neuron_are_its_own(make_neuron: Callable[..., APINeuron], tmp_path: Path) -> None:
    one = make_neuron(federation_url="http://127.0.0.1:9", neuron_id="one", state_dir=str(tmp_path / "one"))
    two = make_neuron(federation_url="http://127.0.0.1:9", neuron_id="two", state_dir=str(tmp_path / "two"))
    assert one.start()
    assert two.start()
    one.logger.error("of the first")
    wait_for(lambda: any("of the first" in line for line in one.status()["log"]["errors"]), what="the error")
    assert not any("of the first" in line for line in two.status()["log"]["errors"])


# -- throttle


def test_an_identical_line_is_let_through_once_in_twenty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("neuron.logs.time.monotonic", lambda: now)
    throttle = Throttle()
    assert throttle.ready("outage") == 0
    assert [throttle.ready("outage") for _ in range(3)] == [None] * 3
    assert throttle.ready("another") == 0
    now += 19.9
    assert throttle.ready("outage") is None
    now += 0.2
    assert throttle.ready("outage") == 4, "and it says how many were held back"
    assert throttle.ready("outage") is None


def test_a_throttle_stays_small_however_many_keys_it_sees() -> None:
    throttle = Throttle()
    for number in range(5000):
        throttle.ready(str(number))
    assert len(throttle._last) <= 1001
