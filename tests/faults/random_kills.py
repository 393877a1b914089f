"""F2 and F31: SIGKILL at random moments while the network misbehaves; everything that happened is counted."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.faults.launcher import Child, Launcher
from tests.faults.trials import Trial
from tests.rig.fault_proxy import FaultProxy, TcpFault
from tests.rig.invariants import log_violations

NETWORK_FAULTS: dict[TcpFault | None, float] = {
    None: 60,
    TcpFault("rst_before"): 7,
    TcpFault("rst_mid_request"): 5,
    TcpFault("rst_mid_response"): 7,
    TcpFault("drop_reply"): 12,
    TcpFault("truncate", after=30): 5,
    TcpFault("slow", interval=0.05): 4,
}
LIFE = (0.1, 0.6)  # seconds, as far as it is not said otherwise
COMMANDS_IN_A_LIFE = 5


@dataclass
class Run:
    """What a seed did and found."""

    seed: int
    kills: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    violations: dict[str, list[str]] = field(default_factory=dict)
    void: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counted = {name: self.counts.get(name, 0) for name in (
            "acknowledged commands", "acknowledge", "complete", "duplicate completes", "interrupted",
        )}
        void = f"; VOID: {self.void}" if self.void else ""
        return (
            f"seed {self.seed}: {self.kills} kills, {sum(self.faults.values())} network faults {self.faults}, "
            f"{counted}, violations {self.violations}{void}"
        )


def kills_and_network_faults(seed: int, kills: int, directory: Path, *, acknowledged: int = 100) -> Run:
    """`kills` lives of one neuron behind a bad network, then one in peace; void below `acknowledged` commands."""
    chance = random.Random(seed)
    run = Run(seed)
    pause = threading.Event()
    with Launcher(directory) as launcher, Trial(launcher, directory) as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.randomly(seed, NETWORK_FAULTS)
            for _ in range(kills):
                for _ in range(COMMANDS_IN_A_LIFE):
                    _issue_something(trial, chance)
                child = trial.start(federation_url=proxy.url, heartbeat_interval=0.2)
                pause.wait(chance.uniform(*LIFE))
                child.kill()
                run.kills += 1
                _list_one_again(trial, chance)
            run.faults = dict(proxy.counts)
            proxy.clear()
            last = trial.start(federation_url=proxy.url)
            trial.until(trial.idle, 60, "the end of all commands in peace")
            fresh = trial.issue_task("effect")
            trial.until(lambda: trial.ended(fresh), what="a fresh command once all is quiet")
            last.kill()
        run.counts = trial.federation.counts()
        run.void = trial.federation.void_because(acknowledged=acknowledged)
        run.void += [f"no {fault.kind}" for fault in NETWORK_FAULTS if fault and not run.faults.get(fault.kind)]
        run.violations = trial.violations()
        for log in sorted(directory.glob(f"{trial.state.name}.*.log")):
            if odd := log_violations(log.read_bytes()):
                run.violations.setdefault("I12 log", []).extend(odd)
    return run


def _issue_something(trial: Trial, chance: random.Random) -> None:
    kind = chance.choice(["effect", "effect", "again", "slow", "slow", "config_update", "no_such_command"])
    if kind == "config_update":
        trial.issue(kind, {"log_level": chance.choice(["DEBUG", "INFO"])}, chance.randint(1, 10))
    elif kind == "no_such_command":
        trial.issue(kind, {}, chance.randint(1, 10))
    else:
        trial.issue_task(kind, chance.randint(1, 10))


def _list_one_again(trial: Trial, chance: random.Random) -> None:
    """Now and then the federation forgets that it was told of an end."""
    over = [command for command in trial.federation.issued if trial.ended(command)]
    if over and chance.random() < 0.3:
        trial.list_again(chance.choice(over))


@dataclass
class Totals:
    """Of a load on /data/process through kills."""

    kills: int
    sent: int
    accepted: int
    reported: int
    violations: list[str]

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.sent} requests sent, {self.accepted} accepted, {self.reported} reported, "
            f"violations {self.violations}"
        )


class Load:
    """Posts to the neuron that lives at present, one request after the other, and counts."""

    def __init__(self) -> None:
        self.sent = self.accepted = 0
        self.address = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._post, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)

    def _post(self) -> None:
        with requests.Session() as session:
            while not self._over.is_set():
                if not self.address:
                    self._over.wait(0.01)
                    continue
                self.sent += 1
                try:
                    answer = session.post(f"{self.address}/data/process", json=[{"x": 1}], timeout=2)
                    self.accepted += answer.status_code == 200
                except requests.RequestException:
                    self._over.wait(0.01)


def kills_under_load(seed: int, kills: int, directory: Path, *, senders: int = 2) -> Totals:
    """I6: what was accepted is in the day's report, through kills and lost replies to reports."""
    chance = random.Random(seed)
    pause = threading.Event()
    loads = [Load() for _ in range(senders)]
    settings: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "analytics_interval": 0.1}
    with Launcher(directory) as launcher, Trial(launcher, directory, analytics="accept") as trial:
        with FaultProxy(trial.federation.port) as proxy:
            proxy.randomly(seed, {None: 70, TcpFault("drop_reply", "/analytics"): 30})
            for load in loads:
                load.start()
            try:
                for _ in range(kills):
                    child = trial.start(federation_url=proxy.url, **settings)
                    _aim(loads, child)
                    pause.wait(chance.uniform(0.1, 0.4))
                    child.kill()
            finally:
                for load in loads:
                    load.stop()
            proxy.clear()
            child = trial.start(federation_url=proxy.url, **settings)
            seen = len(trial.federation.of("analytics"))
            trial.until(lambda: len(trial.federation.of("analytics")) > seen + 1, what="the last report")
            child.kill()
        sent, accepted = sum(load.sent for load in loads), sum(load.accepted for load in loads)
        by_day = {one.body["date"]: one.body["requestCount"] for one in trial.federation.of("analytics")}
        reported = sum(by_day.values())
        violations = trial.federation.analytics_regressions()
        if not accepted <= reported <= sent:
            violations.append(f"accepted {accepted}, reported {reported}, sent {sent}")
    return Totals(kills, sent, accepted, reported, violations)


def _aim(loads: list[Load], child: Child) -> None:
    address = str(child.wait_logged("neuron started")["message"]).rpartition("endpoints ")[2]
    for load in loads:
        load.address = address
