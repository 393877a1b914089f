"""What a neuron shows of itself: the heartbeat, /health and /status."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any, Protocol

from neuron import __version__, reports
from neuron.commands import CommandDesk, Handler
from neuron.config import NeuronConfig
from neuron.credentials import Credentials
from neuron.errors import EngineUnavailable, JournalUnavailable
from neuron.executors import Engine
from neuron.health import Alerts, DependencyChecks, Health, Reason, assess
from neuron.journal import Journal
from neuron.logs import RecentProblems, lost_lines, redactor
from neuron.machine import SystemSample, SystemSampler, system_metrics
from neuron.metrics import Metrics
from neuron.periodic import PeriodicThread
from neuron.tasks import TaskRegistry
from neuron.telemetry import RequestStatistics, application_metrics, iso_utc
from neuron.transport import Transport


class Neuron(Protocol):
    """What is shown of; APINeuron is one."""

    config: NeuronConfig
    paused: bool
    registered: threading.Event
    loops: dict[str, PeriodicThread]
    handlers: dict[str, Handler]
    tasks: TaskRegistry
    desk: CommandDesk
    journal: Journal
    transport: Transport
    credentials: Credentials
    statistics: RequestStatistics
    sampler: SystemSampler
    metrics: Metrics
    alerts: Alerts
    dependencies: DependencyChecks
    problems: RecentProblems
    last_call: dict[str, str]
    outage_since: float | None
    conflicts: int
    endpoints_failure: str

    @property
    def neuron_id(self) -> str: ...
    def engine(self) -> Engine: ...
    def live(self) -> tuple[bool, list[str]]: ...
    def uptime(self) -> float: ...


def assessed(neuron: Neuron) -> Health:
    """The score with its reasons, from a fresh sample and cached dependency checks."""
    extra = []
    if neuron.journal.failure is not None:
        extra.append(Reason("journal", "critical", 30, f"the journal cannot be written: {neuron.journal.failure}"))
    if neuron.endpoints_failure:
        extra.append(Reason("endpoints", "warning", 10, neuron.endpoints_failure))
    if neuron.conflicts:
        extra.append(Reason("identity", "critical", 30, "the federation issues no token for this id"))
    if given_up := neuron.desk.given_up():
        extra.append(Reason("tasks", "warning", 5, f"{given_up} tasks run on past their time limit"))
    try:
        neuron.engine().ready()
    except EngineUnavailable as error:
        extra.append(Reason("executor", "warning", 20, str(error)))
    good, reasons = neuron.live()
    extra += [Reason("loop", "critical", 60, reason, fatal=True) for reason in reasons if not good]
    health = assess(
        neuron.sampler.sample(), neuron.statistics.snapshot(), neuron.dependencies.check_all(),
        neuron.config.alert_thresholds, extra,
    )
    neuron.alerts.update(health)
    return health


def status_word(neuron: Neuron, health: Health) -> str:
    if not neuron.registered.is_set():
        return "starting"
    if neuron.paused:
        return "maintenance"
    return "error" if health.status == "unhealthy" else "active"


def health_report(neuron: Neuron) -> dict[str, Any]:
    """What `GET /health` answers: status, score, reasons, dependencies."""
    health = assessed(neuron)
    return {
        "status": health.status,
        "healthScore": health.score,
        "reasons": health.reasons,
        "dependencies": {name: state.to_dict() for name, state in neuron.dependencies.check_all().items()},
        "neuronId": neuron.neuron_id,
        "timestamp": iso_utc(time.time()),
    }


def status_report(neuron: Neuron) -> dict[str, Any]:
    """What a person debugging asks first; `GET /status`. No secret is in it."""
    snapshot = neuron.statistics.snapshot()
    sample = neuron.sampler.sample()
    health = assessed(neuron)
    expires = neuron.credentials.expires_in()
    try:
        commands: dict[str, Any] = {"counts": neuron.journal.counts(), "recent": neuron.journal.recent()}
    except JournalUnavailable as error:
        commands = {"error": str(error)}
    status = {
        "neuronId": neuron.neuron_id,
        "name": neuron.config.name,
        "type": neuron.config.type,
        "version": neuron.config.version,
        "status": status_word(neuron, health),
        "uptime": int(neuron.uptime()),
        "pid": os.getpid(),
        "federation": {
            "url": neuron.config.federation_url,
            "registered": neuron.registered.is_set(),
            "reachable": neuron.outage_since is None,
            "outageSeconds": None if neuron.outage_since is None else int(time.monotonic() - neuron.outage_since),
            "tokenExpiresInSeconds": None if expires is None else int(expires),
            "clockOffsetSeconds": round(neuron.transport.clock.offset, 1),
            "lastCalls": dict(neuron.last_call),
        },
        "health": {"status": health.status, "healthScore": health.score, "reasons": health.reasons},
        "alerts": neuron.alerts.active(),
        "dependencies": {name: state.to_dict() for name, state in neuron.dependencies.check_all().items()},
        "requests": application_metrics(snapshot, len(neuron.desk.running())),
        "system": system_metrics(sample),
        "commands": {"running": neuron.desk.running(), "supported": sorted(neuron.handlers), **commands},
        "tasks": neuron.tasks.names(),
        "loops": {
            name: {"alive": loop.is_alive(), "stalled": loop.stalled(), "errors": loop.errors}
            for name, loop in neuron.loops.items()
        },
        "journal": {
            "path": str(neuron.journal.path),
            "bytes": neuron.journal.size(),
            "failure": neuron.journal.failure,
            "setAside": neuron.journal.set_aside_files,
        },
        "log": {
            "lostLines": lost_lines(),
            "errors": neuron.problems.lines(40, 50),
            "warnings": neuron.problems.lines(30, 39),
        },
        "customMetrics": neuron.metrics.export(),
        "configVersion": neuron.config.digest(),
        "config": neuron.config.public(),
    }
    return dict(redactor.value(reports.plain(status)))


def heartbeat(neuron: Neuron, sample: SystemSample, status: str | None, since: float) -> dict[str, Any]:
    """The body of POST /heartbeat. `status` None: by health; warnings and errors logged after `since` (epoch)."""
    snapshot = neuron.statistics.snapshot()
    health = assessed(neuron)
    errors = neuron.problems.lines(40, 50, since)
    body: dict[str, Any] = {
        "status": status or status_word(neuron, health),
        "healthScore": max(1, min(100, health.score)),
        "uptime": reports.int4(neuron.uptime()),
        "processId": str(os.getpid()),
        "hostInfo": {
            "hostname": socket.gethostname(),
            "platform": sys.platform,
            "python": sys.version.split()[0],
            "cpus": os.cpu_count() or 1,
        },
        "systemMetrics": system_metrics(sample),
        "applicationMetrics": application_metrics(snapshot, len(neuron.desk.running())),
        "dependencyStatus": {
            name: state.to_dict() for name, state in neuron.dependencies.check_all().items()
        },
        "performanceMetrics": {
            "healthReasons": health.reasons,
            "runningCommands": neuron.desk.running(),
            "customMetrics": neuron.metrics.export(),
            "dataProcessed": snapshot.data_processed,
            "cpuSeconds": sample.cpu_seconds,
            "stalledLoops": [name for name, loop in neuron.loops.items() if loop.stalled()],
        },
        "warningsLog": neuron.problems.lines(30, 39, since),
        "configVersion": neuron.config.digest(),
        "buildVersion": f"{neuron.config.version}+neuron.{__version__}"[:100],
    }
    if errors:
        body["errorLog"] = "\n".join(errors)[:4000]
    return reports.fitted(
        _without_none(reports.plain(body)), ("warningsLog", "performanceMetrics", "dependencyStatus")
    )


def _without_none(body: dict[str, Any]) -> dict[str, Any]:
    """The federation refuses some nulls; an absent key says the same."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in body.items()
        if value is not None
    }
