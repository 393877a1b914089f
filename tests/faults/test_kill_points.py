"""F1, F3: whatever system call the neuron dies at, and in whatever order a power cut finds the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.durability import SYSCALLS, out_of_order
from tests.faults.kill_points import Counts, Place, enumerate_kill_points
from tests.faults.launcher import Launcher
from tests.faults.trials import Trial
from tests.rig.process import ROOT


def issuing(kind: str) -> Callable[[Trial], None]:
    """One command: the name of a task of the subject, or a command type."""

    def issue(trial: Trial) -> None:
        if kind in ("effect", "again"):
            trial.issue_task(kind)
        else:
            trial.issue(kind, {"log_level": "DEBUG"} if kind == "config_update" else {})

    return issue


def places(*, every: int) -> list[tuple[Place, Callable[[Trial], None]]]:
    """One command of each kind, and where to kill: at all syncs and messages, at every `every`-th write."""
    found: list[tuple[Place, Callable[[Trial], None]]] = []
    for kind in ("config_update", "no_such_command"):
        found += [(Place("pending", "pwrite64", every), issuing(kind))]
        found += [(Place("pending", name), issuing(kind)) for name in ("fdatasync", "sendto")]
    for kind in ("effect", "again"):
        found += [(Place(stage, "pwrite64", every), issuing(kind)) for stage in ("pending", "acknowledge")]
        found += [(Place("acknowledge", name), issuing(kind)) for name in ("fdatasync", "sendto", "recvfrom")]
    found += [(Place("complete", "pwrite64", every), issuing("effect"))]
    found += [(Place("start", "fdatasync", 2), issuing("effect")), (Place("start", "unlink"), issuing("effect"))]
    return found


@pytest.mark.slow
def test_a_kill_at_any_system_call_loses_doubles_and_contradicts_nothing(tmp_path: Path) -> None:
    counts = enumerate_kill_points(tmp_path, places(every=4))

    print(counts)
    assert not counts.violations, counts.details
    assert counts.points.total() >= 60
    assert set(counts.outcomes) >= {"succeeded", "rejected", "interrupted"}


@pytest.mark.slow
def test_a_kill_at_any_step_of_a_restart_ends_in_one_completed_restart(tmp_path: Path) -> None:
    counts = enumerate_kill_points(
        tmp_path,
        [(Place("pending", "fdatasync", 2), issuing("restart")), (Place("pending", "execve"), issuing("restart"))],
    )

    print(counts)
    assert not counts.violations, counts.details
    assert counts.points["pending execve"] == 1
    assert set(counts.outcomes) == {"succeeded"}


def killed_and_back(trial: Trial, injection: str) -> bool:
    """Whether it was killed before its first heartbeat. The next life must beat in any case."""
    child = trial.start(inject=[injection])
    trial.until(lambda: child.ended() or trial.federation.of("heartbeat"))
    killed = child.ended()
    child.kill()
    trial.start()
    beats = len(trial.federation.of("heartbeat"))
    trial.until(lambda: len(trial.federation.of("heartbeat")) > beats, what="a heartbeat")
    return killed


@pytest.mark.slow
def test_a_kill_at_any_step_of_the_registration_is_recovered_from(tmp_path: Path) -> None:
    counts = Counts()
    with Launcher(tmp_path) as launcher:
        for syscall in ("fsync", "rename"):
            for number in range(1, 5):
                with Trial(launcher, tmp_path, registered=False) as trial:
                    counts.points[syscall] += killed_and_back(trial, f"{syscall}:signal=KILL:when={number}")

    print(counts)
    assert counts.points == {"fsync": 4, "rename": 2}


def test_what_a_step_rests_on_is_durable_before_that_step(tmp_path: Path) -> None:
    assert scenarios.power_cut(ROOT, tmp_path) == []


def test_the_identity_is_durable_before_the_federation_can_know_it(launcher: Launcher, tmp_path: Path) -> None:
    with Trial(launcher, tmp_path, registered=False) as trial:
        child = trial.start(trace=[SYSCALLS])
        trial.until(lambda: trial.federation.of("heartbeat"))
        child.kill()

        trace = Path(f"{trial.state}.strace").read_text(errors="replace")
        seen, faults = out_of_order(trace, Path(f"{trial.state}.effects"))

    print(seen)
    assert not faults
    assert (seen.registrations, seen.renames) == (1, 2)
