"""SIGKILL at the first, second, third … call of a system call, until a life is over before it comes to that many.

strace counts the calls of each thread for itself, and the busiest hides the others. So it is attached at a stage:
while the federation holds back its answer to one kind of request, after which each thread has little left to do.
"""

from __future__ import annotations

import collections
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.faults.launcher import Child, Launcher, attach
from tests.faults.trials import Trial
from tests.rig.process import ROOT
from tests.rig.recording import Hang

Stage = Literal["start", "register", "pending", "acknowledge", "complete"]
MOST = 400


@dataclass(frozen=True)
class Place:
    """Where to kill: from `stage` on, at every `every`-th call of `syscall`, while `issue`'s commands are worked on."""

    stage: Stage
    syscall: str
    every: int = 1


@dataclass
class Counts:
    points: collections.Counter[str] = field(default_factory=collections.Counter)
    violations: collections.Counter[str] = field(default_factory=collections.Counter)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    details: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.points.total()} kill points {dict(self.points)}, outcomes {dict(self.outcomes)}, "
            f"violations {dict(self.violations)}"
        )


def enumerate_kill_points(
    directory: Path,
    places: Mapping[Place, Callable[[Trial], None]] | list[tuple[Place, Callable[[Trial], None]]],
    *,
    source: Path = ROOT,
    registered: bool = True,
    workers: int = 2,
    stop_at_first: bool = False,
) -> Counts:
    """Kill at each place, start again, and count what is violated at the end.

    `places`: each with what issues the commands. `stop_at_first`: once something is violated the rest is not tried.
    """
    counts = Counts()
    todo = list(places.items()) if isinstance(places, Mapping) else list(places)
    guard = threading.Lock()

    def work() -> None:
        with Launcher(directory, source=source) as launcher:
            while True:
                with guard:
                    if not todo:
                        return
                    place, issue = todo.pop(0)
                for number in range(1, MOST, place.every):
                    if stop_at_first and counts.violations:
                        return
                    with Trial(launcher, directory, registered=registered) as trial:
                        if not _one_point(trial, place, issue, number):
                            break
                        with guard:
                            _count(counts, trial, place, number)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return counts


def _count(counts: Counts, trial: Trial, place: Place, number: int) -> None:
    counts.points[f"{place.stage} {place.syscall}"] += 1
    for command in trial.federation.issued:
        counts.outcomes[trial.outcome(command) if trial.ended(command) else "lost"] += 1
    for kind, faults in trial.violations().items():
        counts.violations[kind] += len(faults)
        counts.details.append(f"{place.stage}, {place.syscall} number {number}: {kind}: {faults}")


def _one_point(trial: Trial, place: Place, issue: Callable[[Trial], None], number: int) -> bool:
    """False: the neuron was through before it came to the call that kills."""
    if trial.neuron_id:
        issue(trial)
    injection = f"{place.syscall}:signal=KILL:when={number}"
    child = _killed_at(trial, place, injection)
    trial.until(lambda: child.ended() or trial.idle(), what=f"the end with {place.stage} {injection}")
    if not child.ended():
        return False
    assert child.wait() == -signal.SIGKILL, f"{injection}: {child.wait()}\n{child.text()}"
    trial.start()
    trial.until_settled(f"the end of all commands after {place.stage} {injection}")
    return True


def _killed_at(trial: Trial, place: Place, injection: str) -> Child:
    if place.stage == "start":
        return trial.start(inject=[injection])
    release = threading.Event()
    trial.federation.script(place.stage, [Hang(release, act=place.stage != "pending")])
    child = trial.start(request_timeout=5)
    trial.until(lambda: trial.federation.of(place.stage), what=f"a request of kind {place.stage}")
    child.strace = attach(child, [f"-einject={injection}", f"-etrace={place.syscall}", "-o", f"{trial.state}.strace"])
    release.set()
    return child
