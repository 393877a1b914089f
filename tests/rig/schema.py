"""What a neuron may send, stricter than any federation asks for."""

from __future__ import annotations

from typing import Any

from local_federation import bodies
from local_federation.wire import Refused, read_body

MOST_BYTES = 100_000  # the federation takes a little more; who keeps to this is right however it counts
OUTCOMES = ("succeeded", "failed", "rejected", "expired", "timed_out", "cancelled", "interrupted")

_FIELDS: dict[str, bodies.Fields] = {
    "register": bodies.REGISTRATION,
    "heartbeat": bodies.HEARTBEAT,
    "complete": bodies.COMPLETION,
    "analytics": bodies.ANALYTICS,
}


def faults_of(kind: str, raw: bytes) -> list[str]:
    """What is wrong with the body ``raw`` of a request of this kind; empty where nothing is."""
    if len(raw) > MOST_BYTES:
        return [f"{len(raw)} bytes; at most {MOST_BYTES}"]
    try:
        body = read_body(raw)
        if kind not in _FIELDS:
            return [f"{kind} carries a body: {raw[:80]!r}"] if body else []
        bodies.check(body, _FIELDS[kind], "body")
    except Refused as refused:
        return refused.details or [refused.error]
    faults = [
        f"{name}: null; leave absent what has no value" for name, value in body.items() if value is None
    ]
    faults += [f"{name}: unknown to the protocol" for name in body.keys() - _FIELDS[kind].keys()]
    if kind == "analytics":
        faults += [f"{name}: negative" for name in bodies.ANALYTICS_COUNTS if body.get(name, 0) < 0]
    if kind == "complete":
        faults += _outcome_faults(body)
    return faults


def _outcome_faults(body: dict[str, Any]) -> list[str]:
    response = body.get("response")
    outcome = response.get("outcome") if isinstance(response, dict) else None
    if outcome not in OUTCOMES:
        return [f"response.outcome: {outcome!r} is none of {', '.join(OUTCOMES)}"]
    if body["success"] != (outcome == "succeeded"):
        return [f"success: {body['success']} with outcome {outcome}"]
    return []
