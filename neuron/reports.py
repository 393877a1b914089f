"""The bodies the neuron sends, within the federation's limits: int4, no null, no NaN, at most 100 kB."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from neuron.config import NeuronConfig
from neuron.machine import Averages
from neuron.telemetry import RequestSnapshot
from neuron.transport import MAX_REQUEST_BYTES

INT4_MAX = 2**31 - 1
MAX_RESULT_BYTES = 64_000
OUTCOMES = ("succeeded", "failed", "rejected", "expired", "timed_out", "cancelled", "interrupted")


def int4(value: float | None) -> int:
    """Rounded and clamped to 0..2³¹-1, the federation's column; 0 where nothing was measured."""
    if value is None or value != value:  # NaN; math.isnan has no mind for an int beyond a double
        return 0
    return round(min(max(value, 0), INT4_MAX))


def registration(
    config: NeuronConfig, neuron_id: str, address: str, tasks: Sequence[str], endpoints: Sequence[str]
) -> dict[str, Any]:
    """The body of POST /register. `address`: base URL of the neuron's own endpoints, '' without any."""
    body = {
        "neuronId": neuron_id,
        "name": config.name,
        "type": config.type,
        "language": config.language,
        "version": config.version,
        "healthcheckEndpoint": f"{address}/health",
        "apiEndpoints": [*endpoints, *config.api_endpoints],
        "authentication": {"type": "jwt" if config.api_secret else "none"},
        "capabilities": list(dict.fromkeys([*tasks, *config.capabilities])),
        "dependencies": [item if isinstance(item, str) else item.get("name", "") for item in config.dependencies],
        "alertThresholds": config.alert_thresholds,
        "metadata": config.metadata,
        "autoRestartEnabled": True,
        "maxRestartAttempts": 3,
    }
    if address:
        body["baseUrl"] = address
    return fitted(plain(body), ("metadata", "apiEndpoints", "capabilities", "dependencies"))


def analytics(
    day: str,
    snapshot: RequestSnapshot,
    averages: Averages,
    *,
    uptime: float,
    network: tuple[float, float],
    custom_metrics: Mapping[str, Any],
    alerts: Sequence[Any],
    events: Sequence[Any],
) -> dict[str, Any]:
    """The body of POST /analytics/report for one UTC day. Rates and usages are percent × 100."""
    failed_share = snapshot.failed_requests / snapshot.total_requests if snapshot.total_requests else 0.0
    body = {
        "date": day,
        "requestCount": int4(snapshot.total_requests),
        "successfulRequests": int4(snapshot.successful_requests),
        "failedRequests": int4(snapshot.failed_requests),
        "averageResponseTime": int4(snapshot.average_response_time),
        "p95ResponseTime": int4(snapshot.p95_response_time),
        "p99ResponseTime": int4(snapshot.p99_response_time),
        "totalDataProcessed": int4(snapshot.data_processed),
        "errorRate": int4(failed_share * 10_000),
        "uptime": int4(uptime),
        "networkBytesIn": int4(network[0]),
        "networkBytesOut": int4(network[1]),
        "customMetrics": dict(custom_metrics),
        "alerts": list(alerts),
        "events": list(events),
    }
    for name, average in (
        ("cpuUsageAvg", averages.cpu_percent),
        ("memoryUsageAvg", averages.memory_percent),
        ("diskUsageAvg", averages.disk_percent),
    ):
        if average is not None:
            body[name] = int4(average * 100)
    return fitted(body, ("events", "customMetrics", "alerts"))


def completion(
    outcome: str,
    *,
    result: Any = None,
    error: str = "",
    details: Mapping[str, Any] | None = None,
    milliseconds: float | None = None,
) -> dict[str, Any]:
    """The body of POST …/complete: `{success, response: {outcome, result, …}, errorMessage}`, bounded.

    Raises TypeError or ValueError where `result` is not JSON.
    """
    response: dict[str, Any] = json.loads(json.dumps(details or {}, default=str))
    response["outcome"] = outcome
    if milliseconds is not None:
        response["durationMs"] = round(milliseconds, 1)
    if result is not None:
        text = json.dumps(result, allow_nan=False)
        if len(text) <= MAX_RESULT_BYTES:
            response["result"] = json.loads(text)
        else:
            response["resultTruncated"] = f"{len(text)} bytes are over {MAX_RESULT_BYTES}; this is the beginning"
            response["result"] = text[: MAX_RESULT_BYTES // 2]
    body: dict[str, Any] = {"success": outcome == "succeeded", "response": plain(response)}
    if error:
        body["errorMessage"] = plain(error[:4000])
    return body if len(json.dumps(body)) <= MAX_REQUEST_BYTES else trimmed(body)


def trimmed(body: dict[str, Any]) -> dict[str, Any]:
    """A completion the federation found too large, without its result."""
    response = {key: value for key, value in body["response"].items() if key in ("outcome", "durationMs")}
    response["resultTruncated"] = "the federation refused the whole result as too large"
    return {**body, "response": response, "errorMessage": body.get("errorMessage", "")[:200] or "result left out"}


def fitted(body: dict[str, Any], expendable: Sequence[str]) -> dict[str, Any]:
    """`body` within the federation's 100 kB: what is expendable is emptied in that order, and says so in its place."""
    for name in expendable:
        if len(json.dumps(body)) <= MAX_REQUEST_BYTES - 1000:
            break
        if body.get(name):
            body[name] = {"truncated": True} if isinstance(body[name], dict) else ["(truncated)"]
    return body


def plain(value: Any) -> Any:
    """`value` as JSON holds it: NaN and Infinity become null, lone surrogates and odd types become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        # PostgreSQL's JSON takes neither half characters nor NUL.
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, Mapping):
        return {str(plain(str(key))): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)
