"""Figures about neurons, computed from what they sent. Pure functions over the store's rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from local_federation.store import DAY, KEPT_HEARTBEATS, ONLINE_FOR, Row

_SUMMED = ("requestCount", "successfulRequests", "failedRequests", "totalDataProcessed")


def analytics_summary(days: Sequence[Row]) -> Row | None:
    """Totals over daily rows; the response time is the mean weighted by requests. None without a row."""
    if not days:
        return None
    summary: Row = {name: sum(day.get(name, 0) for day in days) for name in _SUMMED}
    requests = summary["requestCount"]
    weighted = sum(day.get("averageResponseTime", 0) * day.get("requestCount", 0) for day in days)
    summary["averageResponseTime"] = round(weighted / requests) if requests else 0
    summary["errorRatePercent"] = round(100 * summary["failedRequests"] / requests, 2) if requests else 0.0
    summary["days"] = len(days)
    return summary


def fleet_health(neurons: Sequence[Row]) -> Row:
    """Counts over all neurons, and the mean score of those that have beaten."""
    scores = [neuron["lastHeartbeat"]["healthScore"] for neuron in neurons if neuron["lastHeartbeat"]]
    return {
        "total": len(neurons),
        "online": sum(neuron["isOnline"] for neuron in neurons),
        "byStatus": dict(Counter(neuron["status"] for neuron in neurons)),
        "averageHealthScore": round(sum(scores) / len(scores), 1) if scores else None,
    }


def fleet_alerts(neurons: Iterable[Row]) -> list[Row]:
    """What a person on duty should look at: active neurons that are silent or score below 50."""
    alerts = []
    for neuron in neurons:
        beat = neuron["lastHeartbeat"]
        if neuron["isActive"] and not neuron["isOnline"]:
            since = beat["timestamp"] if beat else neuron["registeredAt"]
            alerts.append({"neuronId": neuron["neuronId"], "message": f"silent since {since}"})
        elif neuron["isActive"] and beat["healthScore"] < 50:
            message = f"health score {beat['healthScore']}"
            alerts.append({"neuronId": neuron["neuronId"], "message": message})
    return alerts


def neuron_health(neuron: Row, heartbeats: Sequence[Row], now: float) -> Row:
    """Availability and scores of the last 24 hours. A heartbeat vouches for the 120 s after it, no longer."""
    start = max(now - DAY, _epoch(neuron["registeredAt"]))
    beats = [beat for beat in heartbeats if _epoch(beat["timestamp"]) >= start]
    times = [_epoch(beat["timestamp"]) for beat in beats] + [now]
    if len(beats) == KEPT_HEARTBEATS:
        start = times[0]  # older ones may have been dropped from the store: judge what is there
    window = now - start
    heard = sum(min(later - earlier, ONLINE_FOR) for earlier, later in itertools.pairwise(times))
    scores = [beat["healthScore"] for beat in beats]
    return {
        "neuronId": neuron["neuronId"],
        "status": neuron["status"],
        "isOnline": neuron["isOnline"],
        "lastHeartbeat": neuron["lastHeartbeat"],
        "heartbeats": len(beats),
        "uptimePercent": round(100 * min(1.0, heard / window), 2) if beats and window > 0 else None,
        "averageHealthScore": round(sum(scores) / len(scores), 1) if scores else None,
        "lowestHealthScore": min(scores, default=None),
    }


def sla(targets: Row, health: Row, summary: Row | None) -> list[Row]:
    """Each target beside what was measured; ``met`` is None where nothing was."""
    measured: dict[str, Any] = {
        "uptimePercent": health["uptimePercent"],
        "healthScore": health["averageHealthScore"],
        "averageResponseTime": summary and summary["averageResponseTime"],
        "errorRatePercent": summary and summary["errorRatePercent"],
    }
    rows = []
    for name, target in targets.items():
        value = measured[name]
        at_least = name in ("uptimePercent", "healthScore")
        met = None if value is None else (value >= target if at_least else value <= target)
        rows.append({"name": name, "target": target, "measured": value, "met": met})
    return rows


def _epoch(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
