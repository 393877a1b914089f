"""JSON as it crosses the wire: what a body may be, and how an answer and a refusal look."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASE_PATH = "/api/api-neurons"
MAX_BODY = 102_400  # bytes; "100 kB" as the real federation's body parser counts it
MAX_DEPTH = 100  # levels of a body; what is stored must also survive being wrapped in an answer


class Refused(Exception):
    """An answer other than success: ``{"success": false, "error": …, "details": […]}``."""

    def __init__(self, status: int, error: str, details: Sequence[str] = ()) -> None:
        super().__init__(f"{status} {error}")
        self.status = status
        self.error = error
        self.details = list(details)

    def answer(self) -> dict[str, Any]:
        body: dict[str, Any] = {"success": False, "error": self.error}
        if self.details:
            body["details"] = self.details
        return body


class Unreadable(Refused):
    """A body that no route ever saw. Its answer has another shape: ``{"message": …}``."""

    def answer(self) -> dict[str, Any]:
        return {"message": self.error}


@dataclass(frozen=True, slots=True)
class Call:
    """What a route sees of a request: its two credentials, its query and its parsed body."""

    body: Any = field(default_factory=dict)
    authorization: str = ""
    admin_key: str = ""
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """A success: ``{"success": true, "data": …}``."""

    data: Any
    status: int = 200


def read_body(raw: bytes) -> Any:
    """The JSON value in ``raw``; ``{}`` where there is none. Raises Unreadable (400, 413)."""
    if len(raw) > MAX_BODY:
        raise Unreadable(413, "request entity too large")
    if not raw.strip():
        return {}
    try:
        value = json.loads(raw.decode("utf-8"))
        # Lone surrogates, NaN and 1e400 pass the parser, and fail only here.
        dumps(value).encode("utf-8")
    except RecursionError:
        raise Unreadable(400, "body is nested too deeply") from None
    except ValueError as error:
        raise Unreadable(400, f"body is not JSON in UTF-8: {error}"[:300]) from None
    if _deeper_than(MAX_DEPTH, value):
        raise Unreadable(400, "body is nested too deeply")
    return value


def _deeper_than(limit: int, value: Any) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def dumps(value: Any) -> str:
    """Canonical JSON text: equal values give equal texts."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
