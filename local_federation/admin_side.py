"""The routes of the control centre: watch neurons and command them. All want the X-Admin-Key header."""

from __future__ import annotations

import functools
import hmac

from local_federation import bodies, monitoring
from local_federation.neuron_side import Handler, Route
from local_federation.store import Conflict, Row, Store
from local_federation.wire import Answer, Call, Refused


class AdminSide:
    def __init__(self, store: Store, admin_key: str) -> None:
        self._store = store
        self._admin_key = admin_key.encode()

    def routes(self) -> list[Route]:
        table: list[Route] = [
            ("GET", "/all", self.all_neurons),
            ("GET", "/analytics/overview", self.analytics_overview),
            ("GET", "/health/overview", self.health_overview),
            ("GET", "/monitoring/dashboard", self.dashboard),
            ("GET", "/<neuron_id>", self.neuron),
            ("PUT", "/<neuron_id>", self.update),
            ("DELETE", "/<neuron_id>", self.deactivate),
            ("POST", "/<neuron_id>/commands", self.issue),
            ("GET", "/<neuron_id>/commands", self.commands),
            ("GET", "/<neuron_id>/commands/<command_id>", self.command),
            ("GET", "/<neuron_id>/analytics", self.analytics),
            ("GET", "/<neuron_id>/monitoring/health", self.health),
            ("GET", "/<neuron_id>/monitoring/sla", self.sla),
            ("GET", "/<neuron_id>/monitoring/sla/targets", self.sla_targets),
            ("POST", "/<neuron_id>/monitoring/sla/targets", self.set_sla_targets),
        ]
        return [(method, path, self._guarded(handler)) for method, path, handler in table]

    def _guarded(self, handler: Handler) -> Handler:
        @functools.wraps(handler)
        def guarded(call: Call, **parts: str) -> Answer:
            if not hmac.compare_digest(call.admin_key.encode("latin-1"), self._admin_key):
                raise Refused(403, "Admin access required", ["Send the key in the X-Admin-Key header."])
            return handler(call, **parts)

        return guarded

    def _known(self, neuron_id: str) -> Row:
        neuron = self._store.neuron(neuron_id)
        if neuron is None:
            raise Refused(404, "Neuron not found")
        return neuron

    def all_neurons(self, call: Call) -> Answer:
        return Answer(
            [
                neuron
                | {"analytics": monitoring.analytics_summary(self._store.analytics(neuron["neuronId"]))}
                for neuron in self._store.neurons()
            ]
        )

    def neuron(self, call: Call, neuron_id: str) -> Answer:
        return Answer(self._known(neuron_id))

    def update(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        changes = bodies.check(call.body, bodies.NEURON_UPDATE, "Invalid neuron data")
        return Answer(self._store.update_neuron(neuron_id, changes))

    def deactivate(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        return Answer(self._store.update_neuron(neuron_id, {"isActive": False}))

    # --- commands

    def issue(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        command = bodies.check(call.body, bodies.COMMAND, "Invalid command")
        try:
            return Answer(self._store.issue(neuron_id, command), 201)
        except Conflict as conflict:
            raise Refused(409, str(conflict)) from None

    def commands(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        return Answer(self._store.commands(neuron_id))

    def command(self, call: Call, neuron_id: str, command_id: str) -> Answer:
        command = self._store.command(command_id)
        if command is None or command["neuronId"] != neuron_id:
            raise Refused(404, "Command not found")
        return Answer(command)

    # --- figures

    def analytics(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        return Answer(self._store.analytics(neuron_id, days=_days(call)))

    def analytics_overview(self, call: Call) -> Answer:
        days = _days(call)
        per_neuron = {
            neuron["neuronId"]: self._store.analytics(neuron["neuronId"], days=days)
            for neuron in self._store.neurons()
        }
        rows = [row for rows in per_neuron.values() for row in rows]
        return Answer(
            {
                "total": monitoring.analytics_summary(rows),
                "neurons": {name: monitoring.analytics_summary(rows) for name, rows in per_neuron.items()},
            }
        )

    def health_overview(self, call: Call) -> Answer:
        return Answer(monitoring.fleet_health(self._store.neurons()))

    def dashboard(self, call: Call) -> Answer:
        neurons = self._store.neurons()
        return Answer(
            {
                "health": monitoring.fleet_health(neurons),
                "alerts": monitoring.fleet_alerts(neurons),
                "neurons": neurons,
            }
        )

    def health(self, call: Call, neuron_id: str) -> Answer:
        return Answer(self._health(neuron_id))

    def _health(self, neuron_id: str) -> Row:
        neuron = self._known(neuron_id)
        return monitoring.neuron_health(neuron, self._store.heartbeats(neuron_id), self._store.clock())

    def sla(self, call: Call, neuron_id: str) -> Answer:
        health = self._health(neuron_id)
        summary = monitoring.analytics_summary(self._store.analytics(neuron_id, days=1))
        return Answer(monitoring.sla(self._store.sla_targets(neuron_id), health, summary))

    def sla_targets(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        return Answer(self._store.sla_targets(neuron_id))

    def set_sla_targets(self, call: Call, neuron_id: str) -> Answer:
        self._known(neuron_id)
        targets = bodies.check(call.body, bodies.SLA_TARGETS, "Invalid targets")
        self._store.set_sla_targets(neuron_id, targets)
        return Answer(targets, 201)


def _days(call: Call) -> int:
    text = call.query.get("days", "7")
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 4 and int(text)):
        raise Refused(400, "Invalid query", ["days: must be a whole number from 1 to 9999"])
    return int(text)
