"""What the bodies of the protocol must hold, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

from local_federation.wire import Refused

INT4_MAX = 2**31 - 1

Kind = Literal["string", "integer", "boolean", "array", "object", "json", "day", "instant"]
Fields = Mapping[str, "Field"]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body. ``least`` and ``most`` bound a string's length or an integer's value."""

    kind: Kind
    least: int = 0
    most: int = INT4_MAX
    required: bool = False


def _text(most: int = INT4_MAX) -> Field:
    return Field("string", least=1, most=most, required=True)


_COUNT = Field("integer", least=-INT4_MAX - 1)
_JSON = Field("json")

_REGISTRATION_OPTIONAL: Fields = {
    "baseUrl": Field("string"),
    "dependencies": _JSON,
    "resourceRequirements": _JSON,
    "deploymentInfo": _JSON,
    "alertThresholds": _JSON,
    "metadata": _JSON,
    "autoRestartEnabled": Field("boolean"),
    "maxRestartAttempts": _COUNT,
}

REGISTRATION: Fields = {
    "neuronId": _text(100),
    "name": _text(255),
    "type": _text(100),
    "language": _text(50),
    "version": _text(50),
    "healthcheckEndpoint": _text(),
    "apiEndpoints": Field("array", required=True),
    "authentication": Field("object", required=True),
    "capabilities": Field("array", required=True),
    **_REGISTRATION_OPTIONAL,
}

# What an administrator may change: a registration without its identity, each field at will.
NEURON_UPDATE: Fields = {
    "name": Field("string", least=1, most=255),
    "type": Field("string", least=1, most=100),
    "language": Field("string", least=1, most=50),
    "version": Field("string", least=1, most=50),
    "healthcheckEndpoint": Field("string", least=1),
    "apiEndpoints": Field("array"),
    "authentication": Field("object"),
    "capabilities": Field("array"),
    "isActive": Field("boolean"),
    **_REGISTRATION_OPTIONAL,
}

HEARTBEAT: Fields = {
    "status": _text(50),
    "healthScore": Field("integer", most=100, required=True),
    "uptime": Field("integer", required=True),
    "processId": Field("string"),
    "hostInfo": _JSON,
    "systemMetrics": _JSON,
    "applicationMetrics": _JSON,
    "dependencyStatus": _JSON,
    "performanceMetrics": _JSON,
    "errorLog": Field("string"),
    "warningsLog": _JSON,
    "configVersion": Field("string", most=50),
    "buildVersion": Field("string", most=100),
}

ANALYTICS_COUNTS = (
    "requestCount",
    "successfulRequests",
    "failedRequests",
    "averageResponseTime",
    "p95ResponseTime",
    "p99ResponseTime",
    "totalDataProcessed",
    "errorRate",
    "uptime",
    "cpuUsageAvg",
    "memoryUsageAvg",
    "diskUsageAvg",
    "networkBytesIn",
    "networkBytesOut",
)

ANALYTICS: Fields = {
    "date": Field("day"),
    **dict.fromkeys(ANALYTICS_COUNTS, _COUNT),
    "customMetrics": _JSON,
    "alerts": _JSON,
    "events": _JSON,
}

COMMAND: Fields = {
    "commandType": _text(100),
    "commandData": Field("json", required=True),
    "priority": Field("integer", least=1, most=10),
    "commandId": Field("string", least=1, most=36),
    "timeoutAt": Field("instant"),
    "metadata": _JSON,
    "maxRetries": Field("integer"),
}

COMPLETION: Fields = {
    "success": Field("boolean", required=True),
    "response": _JSON,
    "errorMessage": Field("string"),
}

SLA_TARGETS: Fields = {
    "uptimePercent": Field("integer", most=100),
    "averageResponseTime": Field("integer"),
    "errorRatePercent": Field("integer", most=100),
    "healthScore": Field("integer", most=100),
}


def check(body: Any, fields: Fields, error: str, *, overflow_status: int = 400) -> dict[str, Any]:
    """The known fields of ``body``, each as its kind wants it; unknown ones are dropped.

    Raises Refused: 400 naming every field at fault, or ``overflow_status`` where the only fault is an
    integer that no int4 column holds.
    """
    if not isinstance(body, dict):
        raise Refused(400, error, [f"body: Expected object, received {_json_type(body)}"])
    clean: dict[str, Any] = {}
    problems: list[str] = []
    overflows: list[str] = []
    for name, rule in fields.items():
        if name not in body:
            if rule.required:
                problems.append(f"{name}: Required")
            continue
        value = body[name]
        if rule.kind == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        problem = _problem(value, rule)
        if problem is None:
            clean[name] = _normal(value, rule)
        elif rule.kind == "integer" and isinstance(value, int) and value > rule.most == INT4_MAX:
            overflows.append(f"{name}: {problem}")
        else:
            problems.append(f"{name}: {problem}")
    if problems:
        raise Refused(400, error, problems + overflows)
    if overflows:
        raise Refused(overflow_status, error, overflows if overflow_status == 400 else ())
    return clean


def _problem(value: Any, rule: Field) -> str | None:
    if rule.kind == "json":
        return None
    wanted = "string" if rule.kind in ("day", "instant") else rule.kind
    received = _json_type(value)
    if received != wanted:
        return f"Expected {wanted}, received {received}"
    match rule.kind:
        case "string" if not rule.least <= len(value) <= rule.most:
            return f"must have {rule.least} to {rule.most} characters, has {len(value)}"
        case "integer" if not rule.least <= value <= rule.most:
            return f"must be {rule.least} to {rule.most}"
        case "day":
            return None if _day(value) else "must be a date as YYYY-MM-DD"
        case "instant":
            return None if _instant(value) else "must be an ISO-8601 time with its offset"
    return None


def _normal(value: Any, rule: Field) -> Any:
    return _instant(value) if rule.kind == "instant" else value


def _day(value: str) -> bool:
    try:
        return date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _instant(value: str) -> str | None:
    try:
        moment = datetime.fromisoformat(value)
        return iso(moment.timestamp()) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def iso(epoch: float) -> str:
    """Epoch seconds as the wire writes them: UTC, milliseconds, ``Z``."""
    moment = datetime.fromtimestamp(epoch, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    # A bool is an int to Python, so it comes first.
    names = {bool: "boolean", str: "string", int: "integer", float: "number", list: "array"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "object")
