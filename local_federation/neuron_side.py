"""The routes a neuron calls with its token, and the one that gives it the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from local_federation import bodies
from local_federation.store import Conflict, Row, Store
from local_federation.tokens import Tokens
from local_federation.wire import BASE_PATH, Answer, Call, Refused

Handler = Callable[..., Answer]
Route = tuple[str, str, Handler]


class NeuronSide:
    """``like_real`` does wrong what the real federation does wrong; each place says what."""

    def __init__(self, store: Store, tokens: Tokens, *, like_real: bool, refuse_analytics: bool) -> None:
        self._store = store
        self._tokens = tokens
        self._like_real = like_real
        self._refuse_analytics = refuse_analytics
        self._overflow_status = 500 if like_real else 400

    def routes(self) -> list[Route]:
        routes: list[Route] = [
            ("POST", "/register", self.register),
            ("POST", "/heartbeat", self.heartbeat),
            ("GET", "/commands/pending", self.pending),
            ("POST", "/commands/<command_id>/acknowledge", self.acknowledge),
            ("POST", "/commands/<command_id>/complete", self.complete),
            ("POST", "/analytics/report", self.report_analytics),
        ]
        if not self._like_real:
            # The real one has no such route: there the admin's GET /{neuronId} catches it and answers 403.
            routes.append(("GET", "/config", self.config))
        return routes

    def register(self, call: Call) -> Answer:
        registration = bodies.check(
            call.body,
            bodies.REGISTRATION,
            "Invalid registration data",
            overflow_status=self._overflow_status,
        )
        neuron_id = registration["neuronId"]
        if self._store.register(registration):
            return Answer(self._registered(registration), 201)
        if self._like_real:
            raise Refused(500, "Failed to register API neuron")
        if self._holder(call) != neuron_id:
            raise Refused(
                409,
                f"Neuron {neuron_id} is already registered",
                [
                    "A new token goes to the holder of an old one, even an expired one: repeat this with"
                    " 'Authorization: Bearer <token>'.",
                    "Without one, register under another neuronId.",
                ],
            )
        self._store.update_neuron(neuron_id, registration)
        return Answer(self._registered(registration))

    def _holder(self, call: Call) -> str | None:
        try:
            return self._tokens.bearer(call.authorization, even_expired=True)
        except Refused:
            return None

    def _registered(self, registration: Row) -> Row:
        # The real one points at the paths of an older kind of neuron. They are prose: nothing there works.
        base = "/api/neuron" if self._like_real else BASE_PATH
        named = ("neuronId", "name", "type", "healthcheckEndpoint", "apiEndpoints")
        return {
            "neuron": {name: registration[name] for name in named} | {"status": "active"},
            "token": self._tokens.issue(registration),
            "instructions": {
                "heartbeat": f"POST {base}/heartbeat every 60 seconds",
                "analytics": f"POST {base}/analytics/report",
                "commands": f"GET {base}/commands/pending",
                "config": f"GET {base}/config" if self._like_real else "arrives as a config_update command",
            },
        }

    def heartbeat(self, call: Call) -> Answer:
        neuron_id = self._tokens.bearer(call.authorization)
        beat = bodies.check(
            call.body, bodies.HEARTBEAT, "Invalid heartbeat data", overflow_status=self._overflow_status
        )
        if self._like_real:
            # `healthScore || 100`, and a neuronId in the body that wins over the token's.
            beat["healthScore"] = beat["healthScore"] or 100
            neuron_id = str(call.body.get("neuronId", neuron_id))
        data = self._store.record_heartbeat(neuron_id, beat)
        if data is None:
            raise Refused(500 if self._like_real else 401, f"No neuron {neuron_id} is registered here")
        return Answer(data)

    def pending(self, call: Call) -> Answer:
        return Answer(self._store.pending(self._tokens.bearer(call.authorization)))

    def acknowledge(self, call: Call, command_id: str) -> Answer:
        self._own_command(call, command_id)
        try:
            return Answer(self._store.acknowledge(command_id, in_any_state=self._like_real))
        except Conflict as conflict:
            raise Refused(409, str(conflict), ["Acknowledge before completing, never after."]) from None

    def complete(self, call: Call, command_id: str) -> Answer:
        self._own_command(call, command_id)
        completion = bodies.check(call.body, bodies.COMPLETION, "Invalid completion data")
        try:
            return Answer(self._store.complete(command_id, completion, in_any_state=self._like_real))
        except Conflict as conflict:
            raise Refused(409, str(conflict), ["The first result stands."]) from None

    def _own_command(self, call: Call, command_id: str) -> None:
        neuron_id = self._tokens.bearer(call.authorization)
        command = self._store.command(command_id)
        if command is None or command["neuronId"] != neuron_id:
            raise Refused(404, "Command not found")

    def report_analytics(self, call: Call) -> Answer:
        neuron_id = self._tokens.bearer(call.authorization)
        if self._refuse_analytics:
            # Whatever is sent: the real route overwrites the date with a string that its own check refuses.
            raise Refused(400, "Invalid analytics data", ["date: Expected date, received string"])
        report: dict[str, Any] = bodies.check(
            call.body, bodies.ANALYTICS, "Invalid analytics data", overflow_status=self._overflow_status
        )
        day = report.pop("date", None) or self._store.today()
        return Answer(self._store.report_analytics(neuron_id, day, report))

    def config(self, call: Call) -> Answer:
        raise Refused(404, "There is no GET /config", ["Remote settings arrive as a config_update command."])
