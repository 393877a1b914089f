"""JSON lines for machines, text for people, and no secret in either."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from neuron.telemetry import iso_utc

logger = logging.getLogger("neuron")
logger.addHandler(logging.NullHandler())

REDACTED = "[redacted]"
_SECRET_KEY = re.compile(r"token|secret|passw|authorization|api[_-]?key|credential|cookie", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"(?i:\b(bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}"
    r"|\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]+\.?[A-Za-z0-9_-]*"
    r"|(?<=://)[^/\s@:]+:[^/\s@]+(?=@)"
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NEURON = ("neuron_id", "neuron_name", "neuron_type")
_RESERVED = _STANDARD | {*_NEURON, "timestamp", "level", "type"}


class Redactor:
    """Removes known secrets, and whatever looks like one, from texts and JSON-able values."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._lock = threading.Lock()

    def learn(self, secret: str) -> None:
        """From now on `secret` (if at least 6 characters) shows in no redacted text."""
        if len(secret) >= 6:
            with self._lock:
                self._secrets = self._secrets | {secret}

    def text(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, REDACTED)
        text = _SECRET_TEXT.sub(REDACTED, text)
        # Half a character would make a handler of the host's fail at its stream.
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    def value(self, value: Any, depth: int = 0) -> Any:
        """`value` with secrets removed from its texts and under keys that name one; deeper than 20: its repr."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if depth >= 20:
            return REDACTED
        if isinstance(value, Mapping):
            return {
                self.text(_text_of(key)): REDACTED
                if entry and _SECRET_KEY.search(_text_of(key)) and isinstance(entry, (str, bytes, list, dict))
                else self.value(entry, depth + 1)
                for key, entry in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value(entry, depth + 1) for entry in value]
        return self.text(_text_of(value))


def _text_of(value: object) -> str:
    """`str`, for objects of others that may fail at it: a log call never raises."""
    try:
        return str(value)
    except Exception as error:
        return f"({type(value).__name__} without a text: {type(error).__name__})"


redactor = Redactor()


class RedactingFilter(logging.Filter):
    """Cleans a record before any handler, the host's included, sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception as error:
            message = f"{_text_of(record.msg)} (its arguments do not fit: {_text_of(error)})"
        record.msg, record.args = redactor.text(message), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redactor.text(record.exc_text)
            # Handlers format exc_info anew where they find it; the text alone has been cleaned.
            record.exc_info = None
        for key in set(vars(record)) - _STANDARD:
            if _SECRET_KEY.search(key):
                setattr(record, key, REDACTED)
            else:
                setattr(record, key, redactor.value(getattr(record, key)))
        return True


logger.addFilter(RedactingFilter())


class NeuronLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the neuron's identity to each record; `extra` given at the call is kept."""

    def __init__(self, identity: MutableMapping[str, Any]) -> None:
        """`identity` holds neuron_id, neuron_name and neuron_type, and may change later."""
        super().__init__(logger, identity)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        extra = {f"{key}_" if key in _RESERVED else key: value for key, value in (kwargs.get("extra") or {}).items()}
        kwargs["extra"] = {**(self.extra or {}), **extra}
        return msg, kwargs


# Of the program's one neuron, for lines of modules that know no neuron. Several in a host have none.
default_identity: Mapping[str, Any] = {}


class JsonLines(JsonFormatter):
    """One JSON object a line: timestamp, level, message, neuron_id, name, type, then extras."""

    def __init__(self) -> None:
        super().__init__("%(message)s", json_ensure_ascii=True)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        for key in ("neuron_name", "neuron_type"):
            log_data.pop(key, None)
        # A child logger's records reach the handlers past the filter of their parent.
        return dict(redactor.value(log_data))

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["timestamp"] = iso_utc(record.created)
        log_data["level"] = record.levelname
        super().add_fields(log_data, record, message_dict)
        for key in _NEURON:
            shown = key if key == "neuron_id" else key.removeprefix("neuron_")
            log_data[shown] = getattr(record, key, None) or default_identity.get(key, "")

    def format(self, record: logging.LogRecord) -> str:
        return redactor.text(super().format(record))


class TextLines(logging.Formatter):
    """`10:00:00.000 INFO  message key=value` for people; control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        extras = {
            key: value for key, value in vars(record).items() if key not in _STANDARD and key not in _NEURON
        }
        parts = [iso_utc(record.created)[11:-1], f"{record.levelname:<7}", record.getMessage()]
        parts += [f"{key}={value!r}" for key, value in redactor.value(extras).items()]
        line = _escaped(redactor.text(" ".join(parts)))
        if not record.exc_text:
            return line
        return "\n".join([line, *map(_escaped, redactor.text(record.exc_text).split("\n"))])


def _escaped(line: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )


class RecentProblems(logging.Handler):
    """The last warnings and errors of one neuron, for its heartbeat and `/status`."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        super().__init__(logging.WARNING)
        self._identity = identity
        self._lines: deque[tuple[int, float, str]] = deque(maxlen=20)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "neuron_id", None) == self._identity["neuron_id"]:
            self._lines.append((record.levelno, record.created, record.getMessage()[:300]))

    def lines(self, least: int, most: int, since: float = 0.0) -> list[str]:
        """`timestamp message` of the levels from `least` to `most` after `since` (epoch seconds), oldest first."""
        kept = list(self._lines)
        return [f"{iso_utc(at)} {text}" for level, at, text in kept if least <= level <= most and at > since]


class _Stdout(logging.StreamHandler[TextIO]):
    """Writes to the current stdout. A closed or full one costs the line, never the neuron."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        # There is nowhere left to say so; the count shows in /status.
        self.lost += 1


_handler: _Stdout | None = None


def configure(level: str, log_format: str, identity: Mapping[str, Any] | None = None) -> None:
    """Log to stdout. For the program `neuron_client.py`; a host configures its own logging."""
    global _handler, default_identity
    if identity is not None:
        default_identity = identity
    if _handler is None:
        _handler = _Stdout()
        logger.addHandler(_handler)
        logger.propagate = False
        # Warnings of the libraries come out in the same form.
        logging.getLogger().addHandler(_handler)
        # What it warns of in a broken answer is told once already, as the failure of the call.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
    _handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logger.setLevel(level)


def lost_lines() -> int:
    """Lines that stdout did not take."""
    return _handler.lost if _handler else 0


class Throttle:
    """Lets one line through every `seconds` and counts what it held back."""

    def __init__(self, seconds: float = 20.0) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def ready(self, key: str) -> int | None:
        """None: hold this line back. Otherwise the number of lines held back since the last one."""
        now = time.monotonic()
        with self._lock:
            last = self._last.get(key)
            if last is not None and now - last < self._seconds:
                self._held[key] = self._held.get(key, 0) + 1
                return None
            if len(self._last) > 1000:
                self._last.clear()
                self._held.clear()
            self._last[key] = now
            return self._held.pop(key, 0)
