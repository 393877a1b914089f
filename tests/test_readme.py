"""What the README says is run, or compared with the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import requests

from local_federation.testing import Federation
from neuron.config import FIELDS, NeuronConfig
from neuron_client import APINeuron
from tests.rig.process import NeuronProcess, wait_for

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_table_of_settings_is_the_code_s() -> None:
    config = NeuronConfig()
    rows = []
    for name, item in FIELDS.items():
        value = getattr(config, name)
        shown = json.dumps(list(value) if isinstance(value, tuple) else value)
        mark = " R" if item.metadata["remote"] else ""
        rows.append(f"| `{name}`{mark} | `{shown}` | {item.metadata['help']} |")
    table = README.partition("<!-- fields")[2].partition("<!-- /fields -->")[0]
    assert table.splitlines()[3:] == rows


def test_the_task_dependency_and_endpoint_of_the_readme_work_and_are_under_twenty_lines(
    federation: Federation, tmp_path: Path
) -> None:
    (snippet,) = [block for block in blocks("python") if "@neuron.task" in block]
    registrations = snippet[snippet.index("@neuron.task") :]
    assert len([line for line in registrations.splitlines() if line.strip()]) < 20
    settings = {
        "federation_url": federation.url, "state_dir": str(tmp_path / "state"), "port": 0, "command_interval": 0.1
    }
    snippet = snippet.replace('name="orders"', f'name="orders", **{settings!r}')
    names: dict[str, APINeuron] = {}
    exec(compile(snippet, str(ROOT / "README.md"), "exec"), names)
    with names["neuron"] as neuron:
        wait_for(lambda: federation.heartbeats(neuron.neuron_id), what="a heartbeat")
        command = federation.issue(
            neuron.neuron_id, "run_task", {"task": "reprice", "params": {"product": "tea", "percent": 5}}
        )
        assert federation.outcome(command)["response"]["result"] == {"product": "tea", "factor": 1.05, "dry_run": True}
        answer = requests.post(f"{neuron.address()}/score", json={"price": 2.5, "amount": 4}, timeout=5)
        assert answer.json() == {"success": True, "data": {"score": 10.0}}
        # There is no prices.csv here, and the README says what that means.
        assert neuron.health()["dependencies"]["price_list"]["status"] == "unhealthy"


def test_the_commands_of_the_readme_end_as_it_says(
    federation: Federation, run_neuron: Callable[..., NeuronProcess]
) -> None:
    (script,) = [block for block in blocks("bash") if "COMMANDS=" in block]
    process = run_neuron(federation_url=federation.url, command_interval=0.1)
    address = process.address()
    neuron_id = federation.wait_for_neuron()
    script = script.replace("localhost:8080", address.removeprefix("http://"))
    script = script.replace("http://127.0.0.1:5000", federation.url)
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout
    commands = federation.store.commands(neuron_id)
    assert len(commands) == 9
    # The neuron restarts and stops in between; what it left pending for the next start counts as well.
    assert process.wait() == 0
    again = run_neuron(federation_url=federation.url, command_interval=0.1)
    outcomes = {
        row["commandType"]: federation.outcome(row["commandId"])["response"]["outcome"] for row in commands
    }
    assert set(outcomes.values()) == {"succeeded"}, outcomes
    again.kill()


def test_every_file_the_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


def test_the_token_command_of_the_readme_opens_status(make_neuron: Callable[..., APINeuron]) -> None:
    secret = "s" * 40
    neuron = make_neuron(neuron_id="n-1", api_secret=secret, federation_url="http://127.0.0.1:9")
    neuron.start()
    (line,) = [block for block in blocks("bash") if "jwt.encode" in block]
    line = line.replace("NEURON_ID", "n-1").replace("THE_SECRET", secret)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    token = subprocess.run(
        ["bash", "-euc", line], capture_output=True, text=True, timeout=30, check=True, env=environment
    ).stdout.strip()
    assert requests.get(f"{neuron.address()}/status", timeout=5).status_code == 401
    answer = requests.get(f"{neuron.address()}/status", headers={"Authorization": f"Bearer {token}"}, timeout=5)
    assert answer.status_code == 200


def test_every_test_that_the_documents_name_exists() -> None:
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for document in (ROOT / "README.md", ROOT / "tests" / "faults.md"):
        text = document.read_text()
        for name in re.findall(r"`(?:tests/[\w/]+\.py::)?(test_[a-z0-9_]+)`", text):
            assert any(f"def {name}(" in source for source in sources.values()), f"{document.name}: {name}"
        for name in re.findall(r"`(tests/[\w/]+\.py)", text):
            assert (ROOT / name).exists(), f"{document.name}: {name}"
