"""F31: what was accepted is counted, whatever ends the process; and what the host's own counts may lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests

from tests.faults.launcher import Launcher
from tests.faults.random_kills import kills_under_load
from tests.faults.trials import Trial
from tests.rig.process import wait_for

PROMISED_SECONDS = 2.0  # of the hooks' counts, at most, that a SIGKILL costs


@pytest.mark.slow
def test_no_kill_loses_a_request_that_was_accepted_or_counts_one_twice(tmp_path: Path) -> None:
    totals = kills_under_load(1, 20, tmp_path, senders=6)

    print(totals)
    assert not totals.violations
    assert totals.kills == 20
    assert totals.accepted > 500


@pytest.mark.slow
def test_a_kill_costs_the_hooks_no_more_than_the_promised_seconds_and_nothing_that_was_reported(
    launcher: Launcher, tmp_path: Path
) -> None:
    rate, counted = 500, tmp_path / "counted"
    with Trial(launcher, tmp_path, analytics="accept") as trial:
        made = 0
        for life in range(1, 4):
            child = trial.start(
                environ={"HOOK_RATE": str(rate), "HOOK_COUNT": str(counted)}, analytics_interval=0.07
            )
            wait_for(lambda: counted.exists() and int(counted.read_text() or 0) > 1.3 * rate, what="some counts")
            child.kill()
            made += int(counted.read_text())
            counted.unlink()
            child = trial.start(host="127.0.0.1", port=0, analytics_interval=0.07)
            address = str(child.wait_logged("neuron started")["message"]).rpartition("endpoints ")[2]
            kept = requests.get(f"{address}/status", timeout=5).json()["requests"]["total_requests"]
            child.kill()
            print(f"{made} counted by the host, {kept} kept")
            assert made - PROMISED_SECONDS * rate * life <= kept <= made + 1

        assert trial.federation.analytics_regressions() == []


def test_totals_wait_for_a_disk_that_cannot_be_read_and_never_fall(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path, analytics="accept") as trial:
        settings = {"host": "127.0.0.1", "port": 0, "analytics_interval": 0.1}
        child = trial.start(**settings)
        _post(child.wait_logged("neuron started"), 5)
        trial.until(lambda: 5 in _reported(trial), what="a report of five")
        child.kill()

        # The journal can neither be read nor written while the second life starts.
        child = trial.start(inject=["pwrite64:error=ENOSPC"], **settings)
        _post(child.wait_logged("neuron started"), 3)
        child.wait_logged("cannot be written")
        assert child.strace is not None
        child.strace.terminate()
        trial.until(lambda: 8 in _reported(trial), what="a report of all eight")

        assert trial.federation.analytics_regressions() == []


def _post(started: dict[str, object], times: int) -> None:
    address = str(started["message"]).rpartition("endpoints ")[2]
    for _ in range(times):
        answer = requests.post(
            f"{address}/data/process", data=json.dumps([{"x": 1}]), headers={"Content-Type": "application/json"},
            timeout=5,
        )
        assert answer.status_code == 200


def _reported(trial: Trial) -> list[int]:
    return [one.body["requestCount"] for one in trial.federation.of("analytics")]
