"""F27, F28: commands that try to make the neuron do what nobody registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuron.config import NeuronConfig
from tests.faults.launcher import Launcher
from tests.faults.trials import Trial
from tests.rig.invariants import log_violations

TEXTS = [
    "$(touch /tmp/owned)", "`id`", "; rm -rf /", "| sh", "&& reboot", "../../etc/passwd", "/etc/passwd", "os.system",
    "builtins.exec", "__import__('os').system('id')", "subprocess.run", "neuron_client.main", "tests.faults.subject",
    "{0.__class__.__mro__}", "%s%s%n", "${jndi:ldap://127.0.0.1:9/x}", "effect\0", "effect\n", "\x1b[2J", "‮effect",
    "x" * 90_000, "", " ", "effect ", "EFFECT", "éffect", "-rf", "--config=/etc/passwd", "0", "null",
    "' OR 1=1 --", "\"); DROP TABLE commands; --", "<script>", "file:///etc/passwd", "http://127.0.0.1:9/",
]
VALUES: list[Any] = [
    None, True, 1, 1e308, -(2**63), [], ["effect"], {}, {"task": "effect"}, {"__class__": "os"}, {"$ref": "effect"},
    {"task": ["effect"]}, {"n": "1"}, {"n": None}, {"n": 1, "context": {}}, {"n": 1, "self": 1}, {"n": 1, "extra": 1},
    {"function": "os.system", "args": ["id"]},
]
LOCKED = {
    "federation_url": "http://127.0.0.1:9", "state_dir": "/tmp/elsewhere", "token": "x" * 40, "api_secret": "y" * 40,
    "host": "0.0.0.0", "port": 80, "tls_ca": "", "tls_cert": "/etc/passwd", "tls_key": "/etc/shadow", "neuron_id": "me",
    "executor": "dask://127.0.0.1:9", "data_dir": "/", "on_identity_conflict": "new-id", "metadata": {},
    "dependencies": ["tcp://127.0.0.1:9"], "name": "other", "type": "other", "capabilities": ["everything"],
}
NO_INTERVALS: list[Any] = [0, -1, 1e9, "60s", None, [], True, "NaN"]
WRONG: list[dict[str, Any]] = [
    *({"heartbeat_interval": value} for value in NO_INTERVALS), {"log_level": "/etc/passwd"}, {"log_level": "LOUD"},
    {"tasks": ["os.system"]}, {"heartbeat_interval": 5, "x": 1}, {},
]


@pytest.mark.slow
def test_hostile_commands_start_no_process_open_no_file_and_reach_nobody(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        deeds = tmp_path / "deeds"
        child = trial.start(environ={"DEEDS": str(deeds)})
        trial.until(lambda: trial.federation.of("heartbeat"))
        for text in TEXTS:
            trial.issue("run_task", {"task": text, "params": {}})
            trial.issue("run_task", {"task": "effect", "params": {"n": text}})
            trial.issue(text or "-", {"data": text})
        for value in VALUES:
            trial.issue("run_task", value)
            trial.issue("run_task", {"task": value, "params": {"n": 1}})
            if value != {"n": 1}:
                trial.issue("run_task", {"task": "effect", "params": value})
        trial.until(trial.idle, 40)
        outcomes = {trial.outcome(command) for command in trial.federation.issued}
        fresh = trial.issue_task("effect")
        trial.until(lambda: trial.ended(fresh))
        done = deeds.read_text()
        # A deed that it must see: this task's file is not among those allowed.
        trial.issue_task("again")
        trial.until(deeds.read_text, what="the deed of a registered task")
        child.kill()

        print(f"{len(outcomes)} kinds of outcome of {len(trial.federation.issued) - 2} commands: {set(outcomes)}")
        assert done == ""
        # The one that asks for a registered task with whole numbers may run.
        assert outcomes <= {"rejected", "succeeded"}
        assert len(trial.effects()) <= 4
        assert trial.federation.own_4xx() == []
        assert trial.federation.schema_violations() == []
        assert log_violations(child.log.read_bytes(), levels=()) == []


def test_remote_settings_widen_nothing_and_are_all_or_nothing(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path) as trial:
        child = trial.start()
        trial.until(lambda: trial.federation.of("heartbeat"))
        before = trial.federation.of("heartbeat")[-1].body["configVersion"]
        hostile = [trial.issue("config_update", {name: value}) for name, value in LOCKED.items()]
        hostile += [trial.issue("config_update", {"log_level": "DEBUG", name: value}) for name, value in LOCKED.items()]
        hostile += [trial.issue("config_update", changes) for changes in WRONG]
        trial.until(trial.idle, 20)
        outcomes = {command: trial.outcome(command) for command in hostile}
        child.kill()
        seen = len(trial.federation.of("heartbeat"))
        trial.start()
        trial.until(lambda: len(trial.federation.of("heartbeat")) > seen)
        after = trial.federation.of("heartbeat")[-1].body["configVersion"]

        assert set(outcomes.values()) == {"rejected"}
        assert after == before
        for command in hostile[: len(LOCKED)]:
            row = trial.federation.command(command)
            (name,) = row["commandData"]
            assert name in row["errorMessage"]
    unlocked = {name for name, field in NeuronConfig.__dataclass_fields__.items() if field.metadata["remote"]}
    assert not unlocked & set(LOCKED)
