"""What a federation saw of its neurons, and the counting of what must never be in it.

Each method that counts returns a list of violations in words, empty where the invariant held. I1 to I13 are
the invariants' numbers in tests/faults.md.
"""

from __future__ import annotations

import bisect
import collections
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from local_federation.bodies import iso
from local_federation.store import Store
from local_federation.wire import dumps
from tests.rig import schema

ENDED = ("completed", "failed")
DAY_TOTALS = ("requestCount", "successfulRequests", "failedRequests", "totalDataProcessed")


@dataclass(slots=True)
class Request:
    """One request as it arrived. ``at`` and ``until`` are monotonic seconds, ``wall`` is epoch seconds."""

    number: int
    at: float
    wall: float
    method: str
    path: str
    kind: str  # register heartbeat pending acknowledge complete analytics other
    command_id: str | None
    neuron_id: str | None
    headers: dict[str, str]
    raw: bytes
    body: Any  # None where it is no JSON
    status: int | None = None  # what the neuron was answered; None while, or because, it was not
    served: int | None = (
        None  # what the federation itself answered; None where a fault kept the request from it
    )
    until: float | None = None
    fault: str = ""

    def __str__(self) -> str:
        return f"#{self.number} {self.method} {self.path} -> {self.status}"


@dataclass(frozen=True, slots=True)
class Transition:
    """An accepted acknowledge or completion; ``old`` and ``new`` statuses are the same for a repeat."""

    at: float
    command_id: str
    old: str
    new: str
    body: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Record:
    """Everything seen, and the invariants over it."""

    store: Store
    analytics_refused: bool
    requests: list[Request] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    issued: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def of(self, kind: str, command_id: str | None = None) -> list[Request]:
        """The requests of one kind so far, of one command where given, in order of arrival."""
        with self.changed:
            seen = list(self.requests)
        return [one for one in seen if one.kind == kind and command_id in (None, one.command_id)]

    def wait_until(self, predicate: Callable[[], object], timeout: float = 10, what: str = "") -> None:
        """Returns once ``predicate()`` is true. Raises TimeoutError saying ``what`` did not happen."""
        deadline = time.monotonic() + timeout
        while not predicate():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not within {timeout:g} s: {what or predicate}; counted: {self.counts()}")
            with self.changed:
                self.changed.wait(0.05)

    def counts(self) -> dict[str, int]:
        """How much happened, to tell a run that proves something from one that does not."""
        with self.changed:
            seen = list(self.requests)
        tally = collections.Counter(one.kind for one in seen)
        tally.update(f"fault {one.fault}" for one in seen if one.fault)
        completes = collections.Counter(one.command_id for one in seen if one.kind == "complete")
        tally["acknowledged commands"] = len({one.command_id for one in seen if one.kind == "acknowledge"})
        tally["duplicate completes"] = sum(times - 1 for times in completes.values())
        tally["interrupted"] = len(
            {one.command_id for one in seen if one.kind == "complete" and _outcome(one.body) == "interrupted"}
        )
        return dict(tally)

    def void_because(self, *, acknowledged: int = 100) -> list[str]:
        """Why a run of random faults proves nothing; empty where it does."""
        counts = self.counts()
        wanted = {"acknowledged commands": acknowledged, "duplicate completes": 1, "interrupted": 1}
        return [
            f"{name}: {counts[name]}, wanted {least}"
            for name, least in wanted.items()
            if counts[name] < least
        ]

    # --- commands

    def lost_commands(self) -> list[str]:
        """I1, once all is quiet: issued commands that did not end."""
        rows = {command_id: self.store.command(command_id) for command_id in self.issued}
        return [
            f"{name} is {row and row['status']}"
            for name, row in rows.items()
            if not row or row["status"] not in ENDED
        ]

    def flips(self) -> list[str]:
        """I3: commands acknowledged after their end."""
        return [
            f"{one.command_id}: {one.old} -> {one.new}"
            for one in list(self.transitions)
            if one.old in ENDED and one.new == "acknowledged"
        ]

    def conflicting_outcomes(self, *, ignore: Iterable[str] = ()) -> list[str]:
        """I4: commands of which two different completions were sent, delivered or not.

        ``ignore`` names fields of ``response`` that may differ.
        """
        told: dict[str | None, set[str]] = collections.defaultdict(set)
        for one in self.of("complete"):
            told[one.command_id].add(dumps(_without(one.body, frozenset(ignore))))
        return [f"{name}: {sorted(bodies)}" for name, bodies in told.items() if len(bodies) > 1]

    def spurious(self, correct: Callable[[Any, Any], bool] | None = None) -> list[str]:
        """I5: acknowledges and completions of commands never issued, and results that ``correct(commandData,
        response)`` denies of commands that succeeded."""
        found = []
        for one in [*self.of("acknowledge"), *self.of("complete")]:
            command = self.store.command(str(one.command_id))
            if command is None:
                found.append(f"{one}: never issued")
                continue
            succeeded = one.kind == "complete" and _outcome(one.body) == "succeeded"
            if correct and succeeded and not correct(command["commandData"], one.body["response"]):
                found.append(f"{one}: wrong result {str(one.body['response'])[:200]}")
        return found

    # --- figures

    def analytics_regressions(
        self,
        *,
        totals: Sequence[str] = DAY_TOTALS,
        accepted: Mapping[str, int] | None = None,
        sent: Mapping[str, int] | None = None,
    ) -> list[str]:
        """I6: totals that fell within a day. With the requests ``accepted`` and ``sent`` by UTC day
        (``YYYY-MM-DD``): days whose last ``requestCount`` is not between the two."""
        found = []
        last: dict[tuple[str | None, str], Mapping[str, int]] = {}
        for one in self.of("analytics"):
            if not isinstance(one.body, dict):
                continue
            day = str(one.body.get("date") or iso(one.wall)[:10])
            before = last.get((one.neuron_id, day), {})
            for name in totals:
                if one.body.get(name, 0) < before.get(name, 0):
                    found.append(f"{one} of {day}: {name} fell from {before[name]} to {one.body.get(name)}")
            last[one.neuron_id, day] = one.body
        reported: collections.Counter[str] = collections.Counter()
        for (_, day), body in last.items():
            reported[day] += body.get("requestCount", 0)
        for day, least in (accepted or {}).items():
            if reported[day] < least:
                found.append(f"{day}: {least} accepted, {reported[day]} reported")
        for day, most in (sent or {}).items():
            if reported[day] > most:
                found.append(f"{day}: {most} sent, {reported[day]} reported")
        return found

    # --- manners

    def impolite(self, per_minute: int, kind: str | None = None) -> list[str]:
        """I10: the minutes that began with a request and held more than ``per_minute``."""
        times = self._arrivals(kind)
        counted = ((at, bisect.bisect_left(times, at + 60) - index) for index, at in enumerate(times))
        return [
            f"{count} requests in the minute from {at:.1f}" for at, count in counted if count > per_minute
        ]

    def synchronised(self, kind: str | None = None, *, since: float = 0.0, factor: float = 3.0) -> list[str]:
        """I10: the seconds that held over ``factor`` times the mean of all since ``since`` (monotonic)."""
        times = [at for at in self._arrivals(kind) if at >= since]
        if not times:
            return []
        buckets = collections.Counter(int(at - times[0]) for at in times)
        mean = len(times) / (int(times[-1] - times[0]) + 1)
        return [
            f"second {at}: {n}, mean {mean:.1f}"
            for at, n in sorted(buckets.items())
            if n > max(1, factor * mean)
        ]

    def _arrivals(self, kind: str | None) -> list[float]:
        return sorted(
            one.at for one in list(self.requests) if kind in (None, one.kind) and one.kind != "other"
        )

    def overdue(self, deadline: float) -> list[str]:
        """I11: requests that were held open longer than ``deadline`` seconds."""
        now = time.monotonic()
        return [
            f"{one} open for {(one.until or now) - one.at:.2f} s"
            for one in list(self.requests)
            if (one.until or now) - one.at > deadline
        ]

    def own_4xx(self) -> list[str]:
        """I13: requests that the federation itself answered 400 or 413 (refused analytics apart)."""
        return [
            f"{one}: {one.raw[:300]!r}"
            for one in list(self.requests)
            if one.served in (400, 413) and not (one.kind == "analytics" and self.analytics_refused)
        ]

    def schema_violations(self) -> list[str]:
        """I13, stricter: bodies with a null, too many bytes, a strange field, a number no column holds."""
        return [
            f"{one}: {fault}"
            for one in list(self.requests)
            if one.kind != "other"
            for fault in schema.faults_of(one.kind, one.raw)
        ]


def double_effects(path: Path) -> list[str]:
    """I2: ids that stand more than once in a file of lines ``id pid``, one line appended by each effect."""
    lines = path.read_text().splitlines() if path.exists() else []
    times = collections.Counter(line.split()[0] for line in lines if line.strip())
    return [f"{name}: {count} effects" for name, count in times.items() if count > 1]


def log_violations(
    log: bytes, *, apart: float = 20.0, levels: Sequence[str] = ("WARNING", "ERROR")
) -> list[str]:
    """I12: lines that are no JSON object or hold a control byte; messages of ``levels`` repeated within
    ``apart`` seconds, by the lines' own ``timestamp``."""
    found = []
    last: dict[tuple[str, str], float] = {}
    for number, line in enumerate(log.split(b"\n")[:-1], 1):
        if any(byte < 0x20 for byte in line):
            found.append(f"line {number}: control byte in {line[:120]!r}")
        try:
            entry = json.loads(line)
            at = datetime.fromisoformat(entry["timestamp"]).timestamp()
            key = (entry["level"], entry["message"])
        except (ValueError, TypeError, KeyError) as error:
            found.append(f"line {number}: {error!r} in {line[:120]!r}")
            continue
        if key[0] in levels:
            if at - last.get(key, -apart) < apart:
                found.append(f"line {number}: again after {at - last[key]:.1f} s: {key[1][:120]}")
            else:
                last[key] = at
    return found


def _outcome(body: Any) -> Any:
    response = body.get("response") if isinstance(body, dict) else None
    return response.get("outcome") if isinstance(response, dict) else None


def _without(body: Any, names: frozenset[str]) -> Any:
    if names and isinstance(body, dict) and isinstance(body.get("response"), dict):
        kept = {name: value for name, value in body["response"].items() if name not in names}
        return body | {"response": kept}
    return body
