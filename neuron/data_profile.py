"""What a pile of records looks like: read from JSON, NDJSON or CSV, and described in one pass."""

from __future__ import annotations

import csv
import hashlib
import heapq
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

MAX_FIELDS = 1_000
MAX_DISTINCT = 10_000
"""Distinct values of one field that are told apart; in all fields together it is ten times as many."""
TOP = 5
SHOWN = 100
"""Characters of a field's name or value that are shown."""
LONGEST_LINE = 16 * 1024 * 1024
"""Characters in one line of NDJSON or CSV."""
CHARSETS = ("utf-8", "utf-16", "us-ascii", "iso-8859-1", "iso-8859-15", "windows-1250", "windows-1252")
"""Not every codec of Python: some of them decompress, and some take time quadratic in their input."""

_Reader = Callable[[TextIO], Iterator[Any]]

_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})(\.[0-9]{1,99})?([eE][+-]?[0-9]{1,3})?")


class BadData(ValueError):
    """The data is not what its type promises; the text says where. An endpoint answers 400."""


class UnsupportedType(ValueError):
    """Data of a type or charset that is not read here; the text names what is. Endpoints answer 415."""


def profile(records: Iterable[Any]) -> dict[str, Any]:
    """Describe `records` in one pass and bounded memory.

    Returns {"count": n, "fields": {name: description}}; records that are no objects are described as the
    field "value". A description holds

    - "type": integer, number, string, boolean, null, array or object; or mixed, with "types": {type: n}
    - "missing": records without the field or with null in it
    - "distinct": exact up to 10,000 values, then a lower bound with "distinctIsLowerBound": true
    - "top": up to five most frequent values, [{"value", "count"}], long ones cut, arrays and objects as JSON
      text; once distinct is a lower bound, those among the values that were seen first
    - of numbers "min", "max", "mean", "standardDeviation" (of a sample: n - 1; absent below two values), and
      "notFinite": how many were NaN, infinite or beyond a float, and are left out of all the other figures
    - of strings "minLength" and "maxLength"

    Beyond 1,000 fields "valuesInOtherFields" counts what was not described.
    """
    count = 0
    beyond = 0
    fields: dict[str, _Field] = {}
    budget = _Budget(10 * MAX_DISTINCT)
    single = isinstance(records, (Mapping, str, bytes))  # one record, not a row of keys or letters
    for record in (records,) if single else records:
        count += 1
        # Asking for dict first is ten times as fast as asking for Mapping, and nearly always the answer.
        items = record.items() if isinstance(record, (dict, Mapping)) else (("value", record),)
        for name, value in items:
            if not isinstance(name, str) or len(name) > SHOWN:
                name = _field_name(name)
            field = fields.get(name)
            if field is None:
                if len(fields) >= MAX_FIELDS:
                    beyond += 1
                    continue
                field = fields[name] = _Field(budget)
            field.add(value)
    described: dict[str, Any] = {
        "count": count,
        "fields": {_shown(name): field.describe(count) for name, field in fields.items()},
    }
    if beyond:
        described["valuesInOtherFields"] = beyond
    return described


class _Budget:
    """Distinct values that may still be remembered, in all fields together."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Field:
    def __init__(self, budget: _Budget) -> None:
        self._budget = budget
        self._types: dict[str, int] = {}
        # Key: the value, or a digest of what is long. Entry: how often, and what to show.
        self._values: dict[Any, list[Any]] = {}
        self._overflowed = False
        self._not_finite = 0
        self._n = 0
        self._mean = 0.0
        self._squares = 0.0
        self._min: float | None = None
        self._max: float | None = None
        self._lengths: tuple[int, int] | None = None

    def add(self, value: Any) -> None:
        kind = _KINDS.get(type(value))
        if kind is None:
            value, kind = _plain(value)
        self._types[kind] = self._types.get(kind, 0) + 1
        if kind == "integer" or kind == "number":
            if _is_finite(value):
                self._add_number(value)
                self._tally(value, value)
            else:
                self._not_finite += 1
        elif kind == "string":
            length = len(value)
            low, high = self._lengths or (length, length)
            if not low <= length <= high or self._lengths is None:
                self._lengths = min(low, length), max(high, length)
            self._tally(value if length <= SHOWN else _digest(value), value)
        elif kind == "boolean":
            self._tally((value,), value)  # in a tuple, as Python takes True and 1 for one key
        elif kind != "null":
            text = _as_json(value)
            self._tally(_digest(text), text)

    def _add_number(self, value: float) -> None:
        # B. P. Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products",
        # Technometrics 4(3), 1962.
        self._n += 1
        delta = value - self._mean
        self._mean += delta / self._n
        self._squares += delta * (value - self._mean)
        if self._min is None or value < self._min:
            self._min = value
        if self._max is None or value > self._max:
            self._max = value

    def _tally(self, key: Any, value: Any) -> None:
        known = self._values.get(key)
        if known is not None:
            known[0] += 1
        elif len(self._values) < MAX_DISTINCT and self._budget.left > 0:
            self._budget.left -= 1
            self._values[key] = [1, value[: SHOWN + 1] if isinstance(value, str) else value]
        else:
            self._overflowed = True

    def describe(self, records: int) -> dict[str, Any]:
        present = {kind: n for kind, n in self._types.items() if kind != "null"}
        kinds = set(present)
        described: dict[str, Any] = {"type": "mixed"}
        if not kinds:
            described["type"] = "null"
        elif kinds <= {"integer", "number"}:
            described["type"] = "number" if "number" in kinds else "integer"
        elif len(kinds) == 1:
            described["type"] = kinds.pop()
        else:
            described["types"] = present
        described["missing"] = max(0, records - sum(present.values()))
        described["distinct"] = len(self._values)
        if self._overflowed:
            described["distinctIsLowerBound"] = True
        if self._n:
            described |= {"min": self._min, "max": self._max}
            if math.isfinite(self._mean):
                described["mean"] = self._mean
            if self._n > 1 and math.isfinite(self._squares):
                described["standardDeviation"] = math.sqrt(self._squares / (self._n - 1))
        if self._not_finite:
            described["notFinite"] = self._not_finite
        if self._lengths:
            described["minLength"], described["maxLength"] = self._lengths
        top = heapq.nlargest(TOP, self._values.values(), key=lambda known: known[0])
        described["top"] = [
            {"value": _shown(value) if isinstance(value, str) else value, "count": n} for n, value in top
        ]
        return described


_KINDS: dict[type, str] = {
    type(None): "null",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    tuple: "array",
}


def _plain(value: Any) -> tuple[Any, str]:
    """A value of no JSON type as one that is, with that type's name: what a host's own records may hold."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value), _KINDS[kind]
    if isinstance(value, Mapping):
        return value, "object"
    if isinstance(value, (list, tuple, set, frozenset)):
        return value, "array"
    if hasattr(value, "__float__"):  # Decimal, Fraction, numpy's numbers
        try:
            return float(value), "number"
        except OverflowError:
            return math.inf, "number"
        except Exception:  # an array, or a faulty class of the host's: described by its text
            return _text(value), "string"
    return _text(value), "string"


def _field_name(name: Any) -> str:
    """A short name for a long one, and no other's."""
    return f"{name[: SHOWN - 9]}…{_digest(name).hex()[:8]}" if isinstance(name, str) else _text(name)


def _text(value: Any) -> str:
    try:
        return str(value)[:SHOWN]
    except Exception:  # a faulty __str__ of the host's must not end the profile of all its other records
        return f"<{type(value).__name__}>"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=_text)
    except Exception:  # too deep, circular, or keys that cannot be sorted
        return type(value).__name__


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _shown(text: str) -> str:
    """Cut to what is shown, and fit for any JSON reader and database: no half characters, no NUL."""
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return cut.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def parse_records(body: bytes | BinaryIO, content_type: str) -> list[Any]:
    """The records in a request body: the items of a JSON array, one JSON object, each NDJSON line, each CSV
    row.

    CSV has a header row; its rows become dicts in which "12" is an integer, "1.5" a number and an empty cell
    None, while "007" and "+49" stay text. Raises BadData, or UnsupportedType for another content type or
    charset.
    """
    media_type, charset = _media_type(content_type)
    reader = _BY_MEDIA_TYPE.get(media_type)
    if reader is None:
        supported = ", ".join(_BY_MEDIA_TYPE)
        raise UnsupportedType(f"content type {media_type[:SHOWN]!r} is not one of {supported}")
    if charset not in CHARSETS:
        raise UnsupportedType(f"charset {charset[:SHOWN]!r} is not one of {', '.join(CHARSETS)}")
    raw = body if isinstance(body, bytes) else body.read()
    try:
        text = raw.decode("utf-8-sig" if charset == "utf-8" else charset)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadData(f"line {line}: byte {error.start} is not {charset}: {error.reason}") from None
    return list(reader(io.StringIO(text, newline="")))


def read_records(path: str | Path) -> Iterator[Any]:
    """The records of a UTF-8 file, by its suffix: .json (read whole), .ndjson, .jsonl or .csv (read as it
    goes).

    Raises OSError, UnsupportedType for another suffix, and BadData, the latter perhaps after the first
    records.
    """
    path = Path(path)
    reader = _BY_SUFFIX.get(path.suffix.lower())
    if reader is None:
        raise UnsupportedType(f"{path.name}: suffix {path.suffix!r} is not one of {', '.join(_BY_SUFFIX)}")
    return _read_file(path, reader)


def _read_file(path: Path, reader: _Reader) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            yield from reader(stream)
        except UnicodeDecodeError as error:
            raise BadData(f"{path.name} is not utf-8: {error.reason}") from None
        except BadData as error:
            raise BadData(f"{path.name}: {error}") from None


def _media_type(content_type: str) -> tuple[str, str]:
    media_type, *parameters = content_type.split(";")
    charset = "utf-8"
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip('"').lower()
    aliases = {"utf8": "utf-8", "ascii": "us-ascii", "latin-1": "iso-8859-1", "cp1252": "windows-1252"}
    return media_type.strip().lower(), aliases.get(charset, charset)


def _read_json(stream: TextIO) -> Iterator[Any]:
    document = _load(stream.read())
    if isinstance(document, list):
        yield from document
    elif isinstance(document, dict):
        yield document
    else:
        raise BadData("records are a JSON array or object, not a single value")


def _read_ndjson(stream: TextIO) -> Iterator[Any]:
    for number, line in enumerate(_lines(stream), 1):
        if line.strip():
            try:
                yield _load(line)
            except BadData as error:
                raise BadData(f"line {number}: {error}") from None


def _read_csv(stream: TextIO) -> Iterator[Any]:
    rows = csv.reader(_lines(stream), strict=True)
    try:
        header = next(rows, None)
        if not header:
            raise BadData("line 1: CSV begins with a row of field names")
        if "" in header or len(set(header)) < len(header):
            raise BadData("line 1: each CSV column needs a field name of its own")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise BadData(f"line {rows.line_num}: {len(row)} cells under {len(header)} field names")
            yield dict(zip(header, map(_cell, row), strict=True))
    except csv.Error as error:
        raise BadData(f"line {rows.line_num}: {error}") from None


def _cell(text: str) -> Any:
    if not text:
        return None
    found = _NUMBER.fullmatch(text)
    if not found:
        return text
    if found[2] is None and found[3] is None:
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else text


def _lines(stream: TextIO) -> Iterator[str]:
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise BadData(f"line {number} is longer than {LONGEST_LINE} characters")
        yield line


def _load(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise BadData(f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise BadData("not read: JSON nested too deeply") from None
    except BadData:
        raise
    except ValueError:  # int() refuses to convert thousands of digits
        raise BadData("not read: a whole number of thousands of digits") from None


def _refuse(literal: str) -> Any:
    raise BadData(f"not JSON: {literal} is no JSON number")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise BadData(f"not read: {literal[:30]} is larger than any 64-bit float")
    return number


_BY_MEDIA_TYPE: dict[str, _Reader] = {
    "application/json": _read_json,
    "application/x-ndjson": _read_ndjson,
    "application/ndjson": _read_ndjson,
    "application/jsonl": _read_ndjson,
    "text/csv": _read_csv,
}
_BY_SUFFIX: dict[str, _Reader] = {
    ".json": _read_json,
    ".ndjson": _read_ndjson,
    ".jsonl": _read_ndjson,
    ".csv": _read_csv,
}
