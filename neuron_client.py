"""An API-only neuron of the Findawise Empire Federation.

`python neuron_client.py` runs it. Copy this file and the `neuron` package to make a neuron of your own: what you
change stands at the end, from `build_neuron` on. A host program imports `APINeuron` instead and starts it beside its
own work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import backoff

from neuron import __version__, periodic, reports
from neuron.builtin_tasks import add_builtin_tasks
from neuron.commands import LATER, CommandDesk, task_name, task_params
from neuron.config import NeuronConfig, updated
from neuron.credentials import Credentials
from neuron.data_profile import profile
from neuron.endpoints import Endpoints
from neuron.errors import (
    BadAnswer,
    ConfigError,
    FederationError,
    IdentityConflict,
    JournalUnavailable,
    NeuronError,
    Refused,
    Rejected,
    Retryable,
    ServerFault,
    Throttled,
    Unauthorized,
    Unreachable,
)
from neuron.extensions import Extensions
from neuron.health import (
    Alerts,
    degraded,
)
from neuron.journal import Entry, Journal
from neuron.logs import NeuronLogger, RecentProblems, Throttle, configure, logger, redactor
from neuron.machine import SystemSampler, WindowAverages
from neuron.periodic import PeriodicThread, join_all
from neuron.status import health_report, heartbeat, status_report
from neuron.tasks import TaskContext
from neuron.telemetry import RequestStatistics, iso_utc
from neuron.transport import Answer, Transport, jittered, retry_waits

__all__ = ["APINeuron", "NeuronConfig", "Rejected", "TaskContext", "degraded", "logger"]

F = TypeVar("F", bound=Callable[..., Any])


class APINeuron(Extensions):
    """A neuron: registers, beats, obeys commands, reports, and serves its own endpoints.

    `start()` returns at once and never raises for what the surroundings do; daemon threads do the rest.
    `executor`: any `concurrent.futures.Executor` for the tasks, instead of the configured one.
    """

    def __init__(self, config: NeuronConfig | None = None, *, executor: Executor | None = None) -> None:
        self.local_config = self.config = config or NeuronConfig()
        self.transport = self._new_transport()
        super().__init__(self.config, executor, self.now)
        self.names = {"neuron_id": "", "neuron_name": self.config.name, "neuron_type": self.config.type}
        self.logger = NeuronLogger(self.names)
        for secret in (self.config.token, self.config.api_secret):
            redactor.learn(secret)
        self.credentials = Credentials(self.config, self.transport.clock, self.logger)
        self.journal = Journal(self.config.state_dir, self.logger, self.now)
        self.alerts = Alerts(self.now)
        self.sampler = SystemSampler(Path(self.config.state_dir).absolute().anchor)
        self.averages = WindowAverages()
        self.handlers.update({
            "health_check": self.handle_health_check,
            "config_update": self.handle_config_update,
            "restart": self.handle_restart,
            "stop": self.handle_stop,
            "cancel_task": self.handle_cancel_task,
            "pause": self.handle_pause,
            "resume": self.handle_resume,
            "run_task": self.handle_run_task,
        })
        self._built_in_commands = frozenset(self.handlers)
        self.desk = CommandDesk(self, self.journal, self.tasks, self.engine)
        self.paused = False
        self.registered = threading.Event()
        self.loops: dict[str, PeriodicThread] = {}
        self.restart_process: Callable[[], None] | None = None
        self.request_stop: Callable[[], None] = self._stop_from_within
        self.give_up: Callable[[], None] = self._give_up
        self._stopping = threading.Event()
        self._running = False
        self._stop_guard = threading.Lock()
        self.problems = RecentProblems(self.names)
        self._throttle = Throttle()
        self._refused_reports = Throttle(3600)
        self._not_before: dict[str, float] = {}
        self.last_call: dict[str, str] = {}
        self.outage_since: float | None = None
        self.conflicts = 0
        self._heartbeats = 0
        self._loop_restarts: list[float] = []
        self._watching = threading.Lock()
        self._problems_told_until = 0.0
        self._flap = 0
        self._started_at = time.monotonic()
        self.endpoints_failure = ""
        self._deadline: float | None = None
        self._restored = False
        self._restored_day = ""
        self._offset_seen = 0.0
        self._saving = threading.Lock()
        add_builtin_tasks(self)

    def _new_transport(self) -> Transport:
        config = self.config
        return Transport(
            config.federation_url, ca=config.tls_ca, cert=config.tls_cert, key=config.tls_key,
            user_agent=f"neuron/{__version__} (python)",
        )

    @property
    def neuron_id(self) -> str:
        return self.credentials.neuron_id

    def now(self) -> float:
        """UTC epoch seconds by the federation's clock."""
        return self.transport.clock.now()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Start beside a host's own work. False, with the reason logged, when it cannot; it never raises."""
        try:
            self.begin()
        except (NeuronError, OSError) as error:
            self.logger.error("the neuron did not start: %s", error)
            return False
        return True

    def begin(self) -> None:
        """As `start`, raising JournalLocked, JournalError, ConfigError (the executor) or OSError (the endpoints)."""
        if self._running:
            return
        # Of this life alone: a thread that outstayed a former one still sees that it was told to end.
        self._stopping = threading.Event()
        self.loops = {}
        self._deadline = None
        self._started_at = time.monotonic()
        logger.addHandler(self.problems)
        try:
            self.journal.open()
            self.credentials.load()
            self._identity_changed()
            self.desk = CommandDesk(self, self.journal, self.tasks, self.engine)
            with contextlib.suppress(JournalUnavailable):
                self._restore()
            self._engine = None  # a former life's is closed
            self.engine()
            self._serve()
        except BaseException:
            logger.removeHandler(self.problems)
            self.journal.close()
            raise
        self._running = True
        self.logger.info(
            "neuron started; federation %s, endpoints %s", self.config.federation_url, self.address() or "none",
            extra={"pid": os.getpid(), "stateDir": self.config.state_dir, "configVersion": self.config.digest()},
        )
        if self.endpoints is not None and self.endpoints.health_only:
            self.logger.warning(
                "endpoints on %s without api_secret: beyond loopback only /health* is served; set api_secret for the "
                "others", self.config.host,
            )
        for name in ("heartbeat", "commands", "analytics", "statistics"):
            self._start_loop(name)

    def _serve(self) -> None:
        self.endpoints_failure = ""
        if not self.config.host:
            return
        endpoints = Endpoints(self, self.routes)
        try:
            endpoints.start()
        except OSError as error:
            if self.restart_process is not None:
                raise
            # Beside a host's own work the endpoints are the lesser part; /health is not there to say so.
            self.endpoints_failure = f"the endpoints cannot listen on {self.config.host}:{self.config.port}: {error}"
            self.logger.error("%s; going on without them", self.endpoints_failure)
            return
        self.endpoints = endpoints

    def _start_loop(self, name: str) -> None:
        tick, interval = {
            "heartbeat": (self._beat, lambda: self.config.heartbeat_interval),
            "commands": (self._look, lambda: self.config.command_interval),
            "analytics": (self._report, lambda: self.config.analytics_interval),
            "statistics": (self._count, lambda: 1.0),
        }[name]
        loop = PeriodicThread(f"neuron-{name}", tick, interval, stopping=self._stopping, logger=self.logger)
        loop.start()
        self.loops[name] = loop  # once it is alive: the others watch each other

    def __enter__(self) -> APINeuron:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End within `shutdown_grace` seconds: tasks first, then a last report and heartbeat, then the threads."""
        with self._stop_guard:
            if not self._running:
                return
            grace = self.config.shutdown_grace
            self._deadline = time.monotonic() + grace
            self.logger.info("stopping within %g s", grace)
            # Tasks get most of the time; what follows needs a little each.
            self.desk.drain(grace * 0.5)
            self._stopping.set()
            self.statistics.wake()
            for loop in self.loops.values():
                loop.wake()
            remaining = join_all(self.loops.values(), time.monotonic() + grace * 0.15)
            self._say_goodbye()
            if self.endpoints is not None:
                remaining += self.endpoints.stop(time.monotonic() + grace * 0.05)
            if self._engine is not None:
                self._engine.close()
            remaining += join_all(self.loops.values(), time.monotonic())
            if remaining:
                self.logger.warning("did not end in time: %s", ", ".join(sorted(set(remaining))))
            self.logger.info("stopped")
            logger.removeHandler(self.problems)
            self.journal.close()
            self.transport.close()
            self._running = False

    def _say_goodbye(self) -> None:
        """The last totals, outcomes, report and heartbeat: each tried once, none of them in the way of the end."""
        last: list[Callable[[], object]] = [lambda: self._save_day(durable=True)]
        if self.registered.is_set() and self.outage_since is None:
            last += [self.desk.deliver_last, self.report_analytics, lambda: self.send_heartbeat("inactive")]
        for step in last:
            try:
                step()
            except NeuronError as error:
                self.logger.warning("on the way out: %s", error)
            except Exception:
                # An adopter's override; the steps after it are still wanted.
                self.logger.exception("on the way out")

    def _stop_from_within(self) -> None:
        """For a host: the thread that obeys `stop` cannot wait for its own end."""
        threading.Thread(target=self.stop, name="neuron-stop", daemon=True).start()

    def _restore(self) -> None:
        """What a former process left for this one: settings once, totals for each day. Raises JournalUnavailable."""
        if not self._restored:
            changes = self.journal.setting("config_update") or {}
            self.paused = bool(self.journal.setting("paused"))
            # A clock that is days off here counts on the right day before the federation's first answer.
            self.transport.clock.offset = float(self.journal.setting("clock_offset") or 0.0)
            self._restored = True
            if changes:
                try:
                    self._apply(updated(self.local_config, changes))
                except ConfigError as error:
                    self.logger.error("stored remote settings no longer fit and are left out: %s", error)
        held = self.statistics.export()
        if held["day"] != self._restored_day:
            totals = self.journal.day_totals(held["day"])
            first, self._restored_day = not self._restored_day, held["day"]
            # Later on, a clock that went back brings a day which is still held here, or was let go when it closed.
            if totals and (first or totals["successful"] + totals["failed"] > held["successful"] + held["failed"]):
                try:
                    self.statistics.restore(totals)
                except ValueError as error:
                    self.logger.error("the day's stored totals cannot be read (%s); counting from 0", error)

    def _identity_changed(self) -> None:
        self.names["neuron_id"] = self.neuron_id

    # -- calls to the federation ---------------------------------------------------------------------------------

    @backoff.on_exception(retry_waits, Retryable, jitter=None, logger=None)
    def _call(self, endpoint: str, send: Callable[[], Answer], *, tries: int | None = 1) -> Any:
        """Every federation call: `tries` attempts (None: until the stop) with jittered back-off between them.

        Returns the answer's `data`. Raises FederationError.
        """
        if not self.neuron_id:
            # Called by hand, without a start.
            self.journal.open()
            self.credentials.load()
            self._identity_changed()
        try:
            wait = self._not_before.get(endpoint, 0.0) - time.monotonic()
            if wait > 0:
                raise Throttled(endpoint, "the federation asked to come back later", retry_after=wait)
            answer = send()
        except Retryable as error:
            error.tries, error.stopping = tries, self._stopping
            if error.status is not None and error.retry_after:
                self._not_before[endpoint] = time.monotonic() + error.retry_after
            self._call_failed(endpoint, error)
            raise
        except FederationError as error:
            self._call_failed(endpoint, error)
            raise
        self._call_succeeded(endpoint)
        return answer.data

    def _authorized(self, endpoint: str, method: str, path: str, body: Any = None) -> Answer:
        """One attempt with the token; on a 401 the token is renewed, once for all threads, and the call repeated."""
        token = self.credentials.token
        try:
            return self.transport.call(endpoint, method, path, body=body, token=token, timeout=self._time_allowed())
        except Unauthorized:
            if not self._renew(token):
                raise
        answer = self.transport.call(
            endpoint, method, path, body=body, token=self.credentials.token, timeout=self._time_allowed()
        )
        self.credentials.renewal_helped()
        return answer

    def _time_allowed(self) -> float:
        """The call's deadline: the configured one; while stopping, a share of what is left."""
        if self._deadline is None:
            return self.config.request_timeout
        return min(self.config.request_timeout, max(0.2, (self._deadline - time.monotonic()) / 3))

    def _call_failed(self, endpoint: str, error: FederationError) -> None:
        self.last_call[endpoint] = f"{iso_utc(self.now())} {error.reason}"
        if not isinstance(error, Retryable) or isinstance(error, IdentityConflict):
            return
        if isinstance(error, Unreachable) and self.outage_since is None:
            self.outage_since = time.monotonic()
        held = self._throttle.ready("outage")
        if held is not None:
            self.logger.warning(
                "%s at %s: %s; trying again for as long as it takes, with pauses of up to 60 s. Is it running? Its "
                "address is the setting federation_url (FEDERATION_URL); --local starts one here",
                endpoint, self.config.federation_url, error.reason, extra={"held": held},
            )

    def _call_succeeded(self, endpoint: str) -> None:
        self.last_call[endpoint] = f"{iso_utc(self.now())} ok"
        if self.transport.clock.offset != self._offset_seen:
            self._offset_seen = self.transport.clock.offset
            self.statistics.adopt_day()
        if self.conflicts and not self.credentials.expires_soon():
            self.conflicts = 0  # the token that was refused is accepted after all
        if self.outage_since is not None:
            seconds, self.outage_since = time.monotonic() - self.outage_since, None
            held = self._throttle.ready("recovery")
            if held is not None:
                self.logger.info("the federation answers again after %.0f s", seconds, extra={"held": held})
            for loop in ("heartbeat", "commands", "analytics"):
                if loop in self.loops and threading.current_thread() is not self.loops[loop]:
                    self.loops[loop].wake()

    def register(self) -> None:
        """Register, trying until it is done or the neuron stops.

        Raises Refused when the federation will not have this registration at all, JournalUnavailable when the
        identity cannot be made durable first, and the last FederationError when stopped.
        """
        self._call("register", self._registration, tries=None)

    def _registration(self) -> Answer:
        """One attempt. The identity is durable before the federation can know it."""
        identity = self.credentials.identity
        if not identity.saved_at:
            self.credentials.save(identity)
        served = ["/health", "/health/live", "/health/ready", "/status", "/data/process"] if self.config.host else []
        body = reports.registration(
            self.config, self.neuron_id, self.address(), self.tasks.names(),
            [*served, *(route.path for route in self.routes)],
        )
        try:
            # The old token says whose renewal this is, where the federation cares to look.
            answer = self.transport.call(
                "register", "POST", "/register", body=body, token=identity.token, timeout=self._time_allowed()
            )
        except (ServerFault, Refused) as error:
            if error.status == 409 or (error.status == 500 and "Failed to register" in error.reason):
                raise self._conflict(error) from None
            raise
        data = answer.data if isinstance(answer.data, dict) else {}
        self.credentials.accept(data.get("token"))
        self.conflicts = 0
        self._identity_changed()
        self.registered.set()
        self.logger.info("registered as %s", self.neuron_id)
        for name in ("commands", "analytics"):
            if name in self.loops:
                self.loops[name].wake()
        return answer

    def _conflict(self, error: FederationError) -> IdentityConflict:
        """The federation knows the id and gives no token for it: go on as the operator allowed, or wait and say so."""
        identity = self.credentials.identity
        self.conflicts += 1
        wait = min(3600.0, 60.0 * 2 ** min(self.conflicts - 1, 6))
        own_choice = identity.generated and not identity.confirmed
        # A token that was accepted until now is not given up for one 401, nor before it has expired.
        left = self.credentials.expires_in()
        given_up = left is None or left <= 0 or (self.conflicts >= 2 and not self.credentials.expires_soon())
        if own_choice or (given_up and self.config.on_identity_conflict == "new-id"):
            # A first answer that got lost leaves an id behind that nobody can claim; it was our own invention.
            fresh = self.credentials.take_fresh_id()
            self._identity_changed()
            self.logger.warning("the federation has %s already; going on as %s", identity.neuron_id, fresh)
            wait = 0.0 if self.conflicts == 1 else wait
        else:
            self.logger.error(
                "the federation knows %s and issues no second token for it (%s). Restore its state_dir, supply "
                "NEURON_TOKEN, have the federation's staff remove the id, or set on_identity_conflict=new-id; trying "
                "again in %.0f s", identity.neuron_id, error.reason, wait,
            )
        return IdentityConflict("register", error.reason, status=error.status, retry_after=wait)

    def _renew(self, failed: str, why: str = "the federation does not accept the token") -> bool:
        """Get a new token instead of `failed`; True when there is one. One thread asks, the others wait for it."""
        credentials = self.credentials
        with credentials.renewing:
            if credentials.token != failed:
                return True
            if credentials.renewal_wait() > 0 or self._stopping.is_set():
                return False
            credentials.renewal_tried()
            self.logger.warning("%s; asking for a new one", why)
            try:
                self._registration()
            except NeuronError as error:
                held = self._throttle.ready("renewal")
                if held is not None:
                    self.logger.error(
                        "no new token (%s); the next try is in %.0f s at the earliest", error,
                        credentials.renewal_wait(), extra={"held": held},
                    )
                return False
            return True

    def send_heartbeat(self, status: str | None = None) -> None:
        """One heartbeat. Raises FederationError; a beat that fails is gone, the next one says the same newer."""
        since, self._problems_told_until = self._problems_told_until, time.time()
        sample = self.sampler.sample()
        self.averages.add(sample)
        body = heartbeat(self, sample, status, since)
        data = self._call(
            "heartbeat", lambda: self._authorized("heartbeat", "POST", "/heartbeat", body),
            tries=1 if self._stopping.is_set() else 3,
        )
        self._heartbeats += 1
        if isinstance(data, dict) and isinstance(data.get("pendingCommands"), int) and data["pendingCommands"] > 0:
            self.wake_commands()

    def fetch_commands(self) -> list[Any]:
        """The pending commands as the federation lists them. Raises FederationError."""
        data = self._call("commands", lambda: self._authorized("commands", "GET", "/commands/pending"))
        if not isinstance(data, list):
            raise BadAnswer("commands", "the pending commands are no list")
        return data

    def acknowledge(self, command_id: str) -> None:
        """Raises FederationError."""
        self._command_call("acknowledge", command_id, None)

    def complete(self, command_id: str, body: dict[str, Any]) -> None:
        """Report an outcome; `body` as `reports.completion` makes it. Raises FederationError."""
        self._command_call("complete", command_id, body)

    def _command_call(self, verb: str, command_id: str, body: Any) -> None:
        path = f"/commands/{urllib.parse.quote(command_id, safe='')}/{verb}"
        self._call(verb, lambda: self._authorized(verb, "POST", path, body))

    def report_analytics(self) -> None:
        """Send the reports of ended days that still wait, then the present day's totals. Raises FederationError."""
        self._close_ended_days()
        for day, report in self.journal.queued_reports():
            self._send_report(day, report)
            self.journal.report_settled(day)
        body = self.day_report()
        # What the federation has been told must be there after a crash: a day's totals never fall.
        self._save_day(durable=True)
        self._send_report(body["date"], body)

    def _send_report(self, day: str, body: dict[str, Any]) -> None:
        try:
            self._call("analytics", lambda: self._authorized("analytics", "POST", "/analytics/report", body))
        except Refused as error:
            # Final for this report; the figures are in the journal and in the next heartbeat.
            if self._refused_reports.ready(f"{error.status}") is not None:
                self.logger.warning("the federation refuses the report of %s (%s); not sent again", day, error.reason)

    # -- what it sends -------------------------------------------------------------------------------------------

    def day_report(self, day: dict[str, Any] | None = None) -> dict[str, Any]:
        """The body of POST /analytics/report for the present day, or of an ended one from its stored totals."""
        snapshot = self.statistics.snapshot()
        if day is not None:
            ended = RequestStatistics(lambda: _epoch_of(day["day"]))
            ended.restore(day)
            snapshot = ended.snapshot()
        sample = self.sampler.sample()
        self.averages.add(sample)
        body = reports.analytics(
            snapshot.day,
            snapshot,
            self.averages.take(),
            uptime=self.uptime(),
            network=(sample.network_bytes_in or 0, sample.network_bytes_out or 0),
            custom_metrics=self.metrics.export(),
            alerts=self.alerts.active(),
            events=self.events.export(),
        )
        return dict(reports.plain(body))

    def _close_ended_days(self) -> None:
        """Days that are over become queued reports, those of a former process included."""
        with self._saving:
            self._restore()
            for totals in self.statistics.closed_days():
                # A day without a request was told already while it was the present one, or never was: a start with
                # a wrong clock.
                if totals["successful"] or totals["failed"]:
                    self.journal.queue_report(totals["day"], totals, self.day_report(totals))
                self.statistics.forget_day(totals["day"])
            for day, totals in self.journal.open_days(self.statistics.snapshot().day):
                self.journal.queue_report(day, totals, self.day_report(totals))

    # -- the loops' ticks ----------------------------------------------------------------------------------------

    def _beat(self) -> float | None:
        self.watch()
        if not self.registered.is_set():
            # Expired or not is for the federation to say: before its first answer our own clock may be days off.
            if self.credentials.token:
                self.registered.set()
                self.logger.info("going on as %s with the stored token", self.neuron_id)
            else:
                # A fleet that starts at once must not arrive at once.
                self._stopping.wait(jittered(0, None, cap=min(1.0, self.config.heartbeat_interval / 10)))
                try:
                    self.register()
                except Refused as error:
                    self.logger.error("the federation refuses the registration: %s; next try in a minute", error)
                    return 60.0
                except JournalUnavailable as error:
                    self.logger.error("not registered before the identity can be stored: %s", error)
                    return min(5.0, self.config.heartbeat_interval)
                except FederationError:
                    return None
        self.credentials.save_again()
        with contextlib.suppress(FederationError):
            # Said already, once for the whole outage.
            self.send_heartbeat()
        if self.credentials.expires_soon() and self.credentials.renewal_wait() == 0:
            self._renew(self.credentials.token, "the token expires soon")
        return None

    def _look(self) -> float | None:
        self.watch()
        if not self.registered.is_set():
            return None
        try:
            worked = self.desk.look()
        except FederationError as error:
            # Commands are polled often: the longer nobody answers, the rarer.
            self._flap += 1
            return jittered(self._flap, error.retry_after, base=self.config.command_interval)
        except JournalUnavailable:
            return self.config.command_interval
        self._flap = 0
        if worked:
            return 0.0
        recent = time.monotonic() - self.desk.worked_at < 60
        return min(1.0, self.config.command_interval) if recent else None

    def _report(self) -> float | None:
        if self.registered.is_set():
            try:
                self.report_analytics()
            except FederationError as error:
                self.logger.debug("analytics wait: %s", error)
            except JournalUnavailable as error:
                self.logger.debug("analytics wait: %s", error)
            try:
                self.journal.prune()
                if abs(self.transport.clock.offset - (self.journal.setting("clock_offset") or 0.0)) > 2:
                    self.journal.set_setting("clock_offset", self.transport.clock.offset)
            except JournalUnavailable as error:
                self.logger.debug("not pruned: %s", error)
        return self._until_next_report()

    def _until_next_report(self) -> float | None:
        """The interval, but never past the day's last report before midnight, nor past midnight itself."""
        to_midnight = 86_400 - self.now() % 86_400
        # Its `Date` header tells the federation's time to within two seconds.
        for moment in (to_midnight - 5, to_midnight + 3):
            if 0 < moment < self.config.analytics_interval:
                return moment
        return None

    def _count(self) -> float | None:
        """Sleep until there is something to count; then count and save it about once a second."""
        periodic.allow(float("inf"))
        self.statistics.wait_for_work()
        if self._stopping.is_set():
            return None
        periodic.allow(0)
        self.request_counted()
        return 1.0

    def request_counted(self) -> None:
        """Save the day's totals where a crash of the process does not reach them."""
        with contextlib.suppress(JournalUnavailable):
            self._save_day()

    def _save_day(self, *, durable: bool = False) -> None:
        # Two threads must not save in another order than they counted, nor anybody before what was is restored.
        with self._saving:
            self._restore()
            days = (*self.statistics.closed_days(), self.statistics.export())
            for totals in (day for day in days if day["successful"] or day["failed"]):
                self.journal.save_day(totals["day"], totals, durable=durable)

    def wake_commands(self) -> None:
        if "commands" in self.loops:
            self.loops["commands"].wake()

    def watch(self) -> None:
        """Restart a loop whose thread has died. After five in ten minutes it is given up, and a program ends.

        The loops call it for each other, and a program's main thread for all of them.
        """
        if not self._running or self._stopping.is_set() or not self._watching.acquire(blocking=False):
            return
        try:
            now = time.monotonic()
            self._loop_restarts = [at for at in self._loop_restarts if now - at < 600]
            for name, loop in list(self.loops.items()):
                if loop.is_alive():
                    continue
                if len(self._loop_restarts) >= 5:
                    self.give_up()
                    return
                self._loop_restarts.append(now)
                self.logger.error("the %s loop had died; started again", name)
                self._start_loop(name)
        finally:
            self._watching.release()

    def _give_up(self) -> None:
        """For a host, whose process is not ours to end; `/health/live` is 503 from here on."""
        if self._throttle.ready("give up") is not None:
            self.logger.critical("loops keep dying and are not started again; restart this neuron")

    # -- health and status ---------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """What `GET /health` answers: status, healthScore, reasons, dependencies."""
        return health_report(self)

    def status(self) -> dict[str, Any]:
        """What a person debugging asks first; `GET /status`. No secret is in it."""
        return status_report(self)

    def live(self) -> tuple[bool, list[str]]:
        """Whether the process is worth keeping. It never depends on the federation."""
        reasons = [f"the {name} loop is stalled" for name, loop in self.loops.items() if loop.stalled()]
        if self._running and not self._stopping.is_set():
            reasons += [f"the {name} loop has died" for name, loop in self.loops.items() if not loop.is_alive()]
        return not reasons, reasons

    def ready(self) -> tuple[bool, list[str]]:
        """Whether new work is welcome."""
        reasons = []
        if not self.registered.is_set():
            reasons.append("not registered yet")
        if self.paused:
            reasons.append("paused")
        if not self._running or self._stopping.is_set():
            reasons.append("stopping")
        return not reasons, reasons

    def uptime(self) -> float:
        """Seconds since `start()`."""
        return time.monotonic() - self._started_at

    def address(self) -> str:
        """Base URL of the endpoints, '' without any."""
        if not self.config.host:
            return ""
        host = socket.gethostname() if self.config.host in ("0.0.0.0", "::") else self.config.host  # noqa: S104 - compared, not bound
        port = self.endpoints.port if self.endpoints is not None else self.config.port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    # -- commands ------------------------------------------------------------------------------------------------

    def handle_health_check(self, command: Entry) -> Any:
        return self.health()

    def handle_config_update(self, command: Entry) -> Any:
        """All of the changes or none; they take effect at once and survive a restart."""
        changes = command.data.get("config", command.data) if isinstance(command.data, dict) else command.data
        if not isinstance(changes, dict) or not changes:
            raise Rejected("config_update wants an object of settings, flat or under `config`")
        if changes == {"reset": True}:
            kept: dict[str, Any] = {}
        else:
            kept = {**(self.journal.setting("config_update") or {}), **changes}
        try:
            updated(self.config, changes if kept else {})
            config = updated(self.local_config, kept)
        except ConfigError as error:
            raise Rejected(str(error), faults=error.faults) from None
        before = self.config.public()
        self.journal.set_setting("config_update", kept)
        self._apply(config)
        changed = {name: value for name, value in config.public().items() if value != before[name]}
        self.logger.info("settings changed from remote", extra={"changed": changed})
        return {"changed": changed, "configVersion": config.digest()}

    def _apply(self, config: NeuronConfig) -> None:
        before, self.config = self.config, config
        if (before.log_level, before.log_format) != (config.log_level, config.log_format):
            if self.restart_process is not None:
                configure(config.log_level, config.log_format)
            else:
                logger.setLevel(config.log_level)
        if self.endpoints is not None:
            self.endpoints.apply(config)
        for name, loop in self.loops.items():
            if name != "statistics":
                loop.wake()

    def handle_restart(self, command: Entry) -> Any:
        """Replace the process; the new one completes this command. Three within five minutes are enough."""
        if self.restart_process is None:
            raise Rejected("this neuron is embedded in a host program, whose process is not its to restart")
        recent = [at for at in self.journal.setting("restarts") or [] if 0 <= time.time() - at < 300]
        if len(recent) >= 3:
            raise Rejected(f"restarted {len(recent)} times within five minutes; refused until that has passed")
        self.journal.set_setting("restarts", [*recent, time.time()])
        self.journal.set_setting(
            "restart", {"commandId": command.command_id, "pid": os.getpid(), "at": time.time()}
        )
        self.desk.afterwards.append(self.restart_process)
        return LATER

    def handle_stop(self, command: Entry) -> Any:
        self.desk.afterwards.append(self.request_stop)
        return {"stopping": True, "graceSeconds": self.config.shutdown_grace}

    def handle_cancel_task(self, command: Entry) -> Any:
        wanted = command.data.get("commandId") if isinstance(command.data, dict) else None
        if not isinstance(wanted, str):
            raise Rejected("cancel_task wants {\"commandId\": …} of a running command")
        return self.desk.cancel(wanted)

    def handle_pause(self, command: Entry) -> Any:
        self.pause()
        return {"paused": True}

    def handle_resume(self, command: Entry) -> Any:
        self.resume()
        return {"paused": False}

    def handle_run_task(self, command: Entry) -> Any:
        return self.desk.run_task(command, task_name(command.data), task_params(command.data))

    def pause(self) -> None:
        """Take no new work; go on beating, with status `maintenance`, also after a restart."""
        self._set_paused(True)

    def resume(self) -> None:
        """Take work again."""
        self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        self.paused = paused
        self.logger.info("paused: no new work is taken" if paused else "resumed")
        try:
            # Whoever paused it for maintenance does not expect a restart to undo that.
            self.journal.set_setting("paused", paused)
        except JournalUnavailable as error:
            self.logger.warning("paused=%s will not outlive this process: %s", paused, error)
        self._wake("heartbeat", "commands")

    def _wake(self, *names: str) -> None:
        for name in names:
            if name in self.loops:
                self.loops[name].wake()

    # -- built-in work -------------------------------------------------------------------------------------------

    def process_data(self, data: Any) -> Any:
        """What `POST /data/process` and the task `data_processing` do with records: by default a profile of them.

        `data`: list or iterator of records. Override it in a subclass. Returns what JSON can hold.
        """
        return profile(data)

    # -- forks ---------------------------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """A forked copy has no threads and must not beat for its parent; it may `start()` as a neuron of its own."""
        super().after_fork_in_child()
        self._running = False
        self.loops = {}
        self.registered = threading.Event()
        self._stopping = threading.Event()
        self._watching = threading.Lock()
        self._stop_guard = threading.Lock()
        self._saving = threading.Lock()
        self._restored = False
        self._restored_day = ""
        self._throttle, self._refused_reports = Throttle(), Throttle(3600)
        self.transport = self._new_transport()
        self.credentials = Credentials(self.config, self.transport.clock, self.logger)
        self.journal.after_fork_in_child()
        self.desk = CommandDesk(self, self.journal, self.tasks, self.engine)


def _epoch_of(day: str) -> float:
    return datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()


# ==================================================================================================================
# What follows is yours: the tasks, checks and processing of your own neuron.
# ==================================================================================================================


def word_count(text: str, top: int = 5) -> dict[str, Any]:
    """An example task: the most frequent words of a text."""
    words = text.lower().split()
    counts = {word: words.count(word) for word in set(words)}
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]
    return {"words": len(words), "top": dict(frequent)}


def build_neuron(config: NeuronConfig) -> APINeuron:
    """Make the neuron and hang your own on it."""
    neuron = APINeuron(config)

    neuron.task("word_count", idempotent=True, timeout=30)(word_count)

    @neuron.dependency("state_disk", critical=False, every=60)
    def state_disk() -> object:
        free = shutil.disk_usage(Path(config.state_dir).absolute().parent).free
        return degraded("less than 100 MB are free") if free < 100_000_000 else f"{free >> 20} MB free"

    return neuron


def main(arguments: Sequence[str] | None = None) -> int:
    """The program: returns its exit code."""
    from neuron.program import run

    return run(build_neuron, arguments)


if __name__ == "__main__":
    sys.exit(main())
