"""F39: a canary token and a canary secret, through a life of faults, are nowhere but at the federation."""

from __future__ import annotations

import os
from pathlib import Path

import requests

from tests.faults.launcher import Launcher
from tests.faults.trials import Trial
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.raw_server import RawServer, redirect
from tests.rig.recording import Fault

SECRET = "canary-secret-of-callers-0123456789abcdef"


def test_a_canary_token_is_in_no_file_line_answer_or_argument(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path, registered=False) as trial:
        with FaultProxy(trial.federation.port) as proxy, RawServer(redirect("http://127.0.0.1:9/")) as elsewhere:
            child = trial.start(
                federation_url=proxy.url, host="127.0.0.1", port=0, log_level="DEBUG", analytics_interval=0.2,
                environ={"NEURON_API_SECRET": SECRET, "NEURON_METADATA": '{"note": "n"}'},
            )
            trial.until(lambda: trial.federation.of("heartbeat"))
            token = (trial.state / "identity.json").read_text().split('"token": "')[1].split('"')[0]
            trial.neuron_id = str(trial.federation.of("heartbeat")[0].neuron_id)
            proxy.script(TcpFault(kind) for kind in ("rst_before", "drop_reply", "truncate"))
            trial.federation.script("heartbeat", [Fault(401), Fault(500, token), Fault(200, f"<html>{token}")])
            trial.federation.script("register", [Fault(500, {"success": False, "error": f"no {token}"})])
            command = trial.issue("run_task", {"task": "effect", "params": {"n": token}})
            trial.issue("config_update", {"federation_url": elsewhere.url, "log_level": "DEBUG"})
            trial.until(trial.idle, 20)
            address = str(child.wait_logged("neuron started")["message"]).rpartition("endpoints ")[2]
            answers = [requests.get(f"{address}{path}", timeout=5).text for path in ("/health", "/status", "/nowhere")]
            arguments = Path(f"/proc/{child.pid}/cmdline").read_bytes() + b"".join(
                path.read_bytes() for path in Path(f"/proc/{child.pid}/task").glob("*/comm")
            )
            child.kill()
            assert elsewhere.conversations == []
            assert trial.outcome(command) == "rejected"

    assert len(token) > 100
    allowed = {trial.state / "identity.json", trial.state / "journal.db", trial.state / "journal.db-wal"}
    for needle in (token, SECRET):
        for text in [*answers, arguments.decode(errors="replace"), child.text()]:
            assert needle not in text
        for path in (path for path in tmp_path.rglob("*") if path.is_file() and path not in allowed):
            assert needle.encode() not in path.read_bytes(), path
        # The command that named it is in the journal as the federation sent it, 0600; nothing else is.
    assert SECRET.encode() not in (trial.state / "journal.db-wal").read_bytes()
    for one in trial.federation.requests:
        if one.kind != "complete":
            assert token.encode() not in one.raw, one
            assert SECRET.encode() not in one.raw, one
    assert os.environ.get("NEURON_API_SECRET") is None
