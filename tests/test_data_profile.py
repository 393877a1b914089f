"""Records are read strictly and described truthfully, whatever they hold."""

from __future__ import annotations

import io
import json
import math
import random
import statistics
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron import data_profile
from neuron.data_profile import (
    MAX_DISTINCT,
    MAX_FIELDS,
    SHOWN,
    BadData,
    UnsupportedType,
    parse_records,
    profile,
    read_records,
)

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def field(records: list[Any], name: str = "value") -> dict[str, Any]:
    described: dict[str, Any] = profile(records)["fields"][name]
    return described


# The profile


def test_a_numeric_field_has_the_figures_that_the_statistics_module_finds() -> None:
    pick = random.Random(3)
    values = [1e9 + pick.gauss(0, 1) for _ in range(5000)]
    described = field([{"x": value} for value in values], "x")
    assert described["type"] == "number"
    assert (described["min"], described["max"]) == (min(values), max(values))
    assert described["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert described["standardDeviation"] == pytest.approx(statistics.stdev(values), rel=1e-6)
    assert (described["missing"], described["distinct"]) == (0, len(set(values)))


def test_absent_and_null_are_missing_and_zero_is_not() -> None:
    records = [{"a": 1, "b": None}, {"a": 0}, {"b": "x"}, {}]
    assert field(records, "a")["missing"] == 2
    assert field(records, "b")["missing"] == 3
    assert profile(records)["count"] == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], "integer"),
        ([1, 2.5], "number"),
        (["a", ""], "string"),
        ([True, False, None], "boolean"),
        ([None, None], "null"),
        ([[1], []], "array"),
        ([1, "a"], "mixed"),
        ([1, True], "mixed"),
    ],
)
def test_the_type_is_that_of_all_values(values: list[Any], expected: str) -> None:
    assert field(values)["type"] == expected


def test_a_mixed_field_says_of_what() -> None:
    assert field([1, 2, "a", None, True])["types"] == {"integer": 2, "string": 1, "boolean": 1}


def test_true_is_no_number_and_not_the_same_as_one() -> None:
    described = field([True, True, 1])
    assert (described["distinct"], described["mean"], described["max"]) == (2, 1.0, 1)
    assert described["top"] == [{"value": True, "count": 2}, {"value": 1, "count": 1}]
    assert [type(top["value"]) for top in described["top"]] == [bool, int]


def test_one_value_has_a_mean_and_no_deviation() -> None:
    described = field([7])
    assert (described["mean"], "standardDeviation" in described) == (7.0, False)


def test_top_values_are_the_five_most_frequent_first_seen_first() -> None:
    values = ["b", "a", "c", "a", "d", "e", "f", "f"]
    assert [top["value"] for top in field(values)["top"]] == ["a", "f", "b", "c", "d"]
    assert [top["count"] for top in field(values)["top"]] == [2, 2, 1, 1, 1]


def test_distinct_is_exact_up_to_its_cap_and_then_says_that_it_is_a_lower_bound() -> None:
    exact = field(list(range(MAX_DISTINCT)) * 2)
    assert (exact["distinct"], "distinctIsLowerBound" in exact) == (MAX_DISTINCT, False)
    beyond = field(list(range(MAX_DISTINCT + 1)))
    assert (beyond["distinct"], beyond["distinctIsLowerBound"]) == (MAX_DISTINCT, True)
    assert (beyond["max"], beyond["top"][0]["count"]) == (MAX_DISTINCT, 1)


def test_all_fields_together_remember_a_bounded_number_of_values() -> None:
    records = ({f"f{column}": (row, column) for column in range(40)} for row in range(2600))
    fields = profile(records)["fields"]
    assert sum(described["distinct"] for described in fields.values()) == 10 * MAX_DISTINCT
    assert all(described["distinctIsLowerBound"] for described in fields.values())


def test_beyond_a_thousand_fields_the_rest_is_counted() -> None:
    described = profile([{f"f{number}": 1 for number in range(MAX_FIELDS + 7)}] * 2)
    assert len(described["fields"]) == MAX_FIELDS
    assert described["valuesInOtherFields"] == 14


def test_long_strings_are_told_apart_and_shown_cut() -> None:
    described = field(["x" * 5000 + "1", "x" * 5000 + "2", "x" * 5000 + "2"])
    assert (described["distinct"], described["minLength"], described["maxLength"]) == (2, 5001, 5001)
    assert described["top"][0] == {"value": "x" * SHOWN + "…", "count": 2}


def test_long_field_names_stay_different_and_short() -> None:
    fields = profile([{"n" * 5000 + "1": 1, "n" * 5000 + "2": 2}])["fields"]
    assert [described["missing"] for described in fields.values()] == [0, 0]
    assert all(len(name) <= SHOWN for name in fields)


def test_numbers_that_no_float_holds_are_counted_apart() -> None:
    described = field([1.0, math.nan, math.inf, -math.inf, 10**400, 3.0])
    assert (described["notFinite"], described["min"], described["max"]) == (4, 1.0, 3.0)
    assert (described["mean"], described["distinct"]) == (2.0, 2)


def test_sums_that_leave_the_range_of_floats_are_absent() -> None:
    described = field([1.7e308, -1.7e308, 1.7e308])
    assert (described["min"], described["max"]) == (-1.7e308, 1.7e308)
    json.dumps(described, allow_nan=False)
    assert "standardDeviation" not in described


class Faulty:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __float__(self) -> float:
        raise RuntimeError("no number")


def test_what_python_has_beyond_json_is_described_and_never_raises() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert field([Decimal("1.5"), Fraction(1, 2)])["mean"] == 1.0
    assert field([{1, 2}, (3,)])["type"] == "array"
    described = profile(
        [{1: b"x", None: Faulty(), "circle": circle, "deep": deep, "s": "\ud800\0"}, "\ud800" * 999]
    )
    assert described["count"] == 2
    assert described["fields"]["None"]["top"] == [{"value": "<Faulty>", "count": 1}]
    assert described["fields"]["s"]["top"][0]["value"] == "?\N{REPLACEMENT CHARACTER}"


def test_one_object_is_one_record() -> None:
    assert profile({"a": 1})["count"] == 1
    assert set(profile({"a": 1})["fields"]) == {"a"}


def test_nothing_has_no_fields() -> None:
    assert profile([]) == {"count": 0, "fields": {}}


@given(st.lists(ANY_JSON | st.dictionaries(st.sampled_from("abc"), ANY_JSON), max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_records_give_a_profile_that_is_json_and_adds_up(records: list[Any]) -> None:
    described = json.loads(json.dumps(profile(records), allow_nan=False))
    assert described["count"] == len(records)
    for name, about in described["fields"].items():
        assert 0 <= about["missing"] <= len(records), name
        counted = sum(top["count"] for top in about["top"])
        assert counted <= len(records) - about["missing"]
        assert len(about["top"]) == min(5, about["distinct"])


def test_records_are_taken_one_at_a_time() -> None:
    alive = 0

    class Record(dict[str, int]):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[Record]:
        nonlocal alive
        for number in range(100):
            alive += 1
            yield Record(a=number)
            assert alive <= 3

    assert profile(stream())["fields"]["a"]["max"] == 99


# Reading bodies


@pytest.mark.parametrize(
    ("body", "content_type", "records"),
    [
        (b'[{"a": 1}, 2, null]', "application/json", [{"a": 1}, 2, None]),
        (b'{"a": 1}', "Application/JSON; charset=UTF-8", [{"a": 1}]),
        (b"[]", "application/json", []),
        (b"\xef\xbb\xbf[1]", "application/json", [1]),
        (b'{"a": 1, "a": 2}', "application/json", [{"a": 2}]),
        (b'{"a": 1}\n\n[2]\r\n3', "application/x-ndjson", [{"a": 1}, [2], 3]),
        ('{"a": "\u2028"}\n'.encode(), "application/ndjson", [{"a": "\u2028"}]),
        (b"", "application/jsonl", []),
        (b"a,b\n1,x\n", "text/csv", [{"a": 1, "b": "x"}]),
        (b"\xef\xbb\xbfa\r\n1.5\r\n", "text/csv", [{"a": 1.5}]),
        (
            b'a,b\n"x, ""y""\nz",\n\n-2e3,0\n',
            "text/csv",
            [{"a": 'x, "y"\nz', "b": None}, {"a": -2000.0, "b": 0}],
        ),
        (
            "a\nM\xfcnchen\n".encode("latin-1"),
            'text/csv; header=present; charset="ISO-8859-1"',
            [{"a": "München"}],
        ),
        ("a\n1\n".encode("utf-16"), "text/csv; charset=utf-16", [{"a": 1}]),
    ],
)
def test_a_body_gives_the_records_its_type_promises(
    body: bytes, content_type: str, records: list[Any]
) -> None:
    assert parse_records(body, content_type) == records
    assert parse_records(io.BytesIO(body), content_type) == records


def test_csv_cells_are_numbers_only_where_nothing_is_lost() -> None:
    cells = [
        "12",
        "-3",
        "1.5",
        "0",
        "0.50",
        "1e3",
        "007",
        "+49",
        "1e999",
        "NaN",
        "inf",
        "1_000",
        " 1",
        "٣",
        ".5",
    ]
    found = [record["a"] for record in parse_records(("a\n" + "\n".join(cells)).encode(), "text/csv")]
    assert found[:6] == [12, -3, 1.5, 0, 0.5, 1000.0]
    assert [type(value) for value in found[:6]] == [int, int, float, int, float, float]
    assert found[6:] == cells[6:]


@pytest.mark.parametrize(
    ("body", "content_type", "where"),
    [
        (b'[\n{"a": }]', "application/json", r"line 2, column 7"),
        (b"", "application/json", "line 1, column 1"),
        (b"42", "application/json", "array or object"),
        (b"[NaN]", "application/json", "NaN is no JSON number"),
        (b"[-Infinity]", "application/json", "-Infinity is no JSON number"),
        (b"[1e400]", "application/json", "1e400 is larger"),
        (b"[" + b"9" * 5000 + b"]", "application/json", "thousands of digits"),
        (b"[" * 200_000, "application/json", "nested too deeply"),
        (b'[1]\n["\xff"]', "application/json", "line 2: byte 6 is not utf-8"),
        (b'{"a": 1}\n\n{"a": \n', "application/x-ndjson", "line 3: not JSON"),
        (b"1\n" + b"[" * 200_000, "application/x-ndjson", "line 2: not read: JSON nested too deeply"),
        (b"1\nInfinity", "application/x-ndjson", "line 2: not JSON: Infinity"),
        (b"", "text/csv", "line 1: CSV begins"),
        (b"a,a\n1,2", "text/csv", "name of its own"),
        (b"a,\n1,2", "text/csv", "name of its own"),
        (b'a,b\n"1\n1",2\n3\n', "text/csv", "line 4: 1 cells under 2"),
        (b"a,b\n1,2,3\n", "text/csv", "line 2: 3 cells under 2"),
        (b'a\n"1', "text/csv", "line 2: unexpected end"),
        (b"a\n" + b"x" * 200_000, "text/csv", "line 2: field larger"),
    ],
)
def test_a_faulty_body_is_bad_data_that_says_where(body: bytes, content_type: str, where: str) -> None:
    with pytest.raises(BadData, match=where):
        parse_records(body, content_type)


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/xml; charset=utf-8", "json", "\ud800"]
)
def test_another_content_type_is_refused_with_the_supported_ones(content_type: str) -> None:
    with pytest.raises(UnsupportedType, match=r"application/json, .*text/csv"):
        parse_records(b"[]", content_type)


@pytest.mark.parametrize("charset", ["zlib", "punycode", "klingon", ""])
def test_codecs_that_are_no_ordinary_charset_are_refused(charset: str) -> None:
    with pytest.raises(UnsupportedType, match="charset"):
        parse_records(b"[]", f"application/json; charset={charset}")


@given(st.binary(max_size=200), st.sampled_from(["application/json", "application/x-ndjson", "text/csv"]))
@settings(max_examples=60, deadline=None)
def test_no_body_raises_anything_but_bad_data(body: bytes, content_type: str) -> None:
    try:
        records = parse_records(body, content_type)
    except BadData:
        return
    json.dumps(profile(records), allow_nan=False)


# Reading files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", b'[{"a": 1}, {"a": null}]'),
        ("r.ndjson", b'\xef\xbb\xbf{"a": 1}\n{"a": null}\n'),
        ("r.JSONL", b'{"a": 1}\n{"a": null}'),
        ("r.csv", b'a\n1\n""\n'),
    ],
)
def test_a_file_is_read_by_its_suffix(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_records(tmp_path / name)) == [{"a": 1}, {"a": None}]


def test_a_line_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "r.ndjson").write_bytes(b"1\n" * 100_000 + b"broken\n")
    records = read_records(tmp_path / "r.ndjson")
    assert [next(records) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(BadData, match=r"r\.ndjson: line 100001: not JSON"):
        list(records)


def test_a_file_of_another_suffix_or_encoding_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedType, match=r"r\.xml.*\.csv"):
        read_records(tmp_path / "r.xml")
    (tmp_path / "r.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(BadData, match=r"r\.csv is not utf-8"):
        list(read_records(tmp_path / "r.csv"))
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "missing.json"))


def test_a_line_without_end_is_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_profile, "LONGEST_LINE", 1000)
    (tmp_path / "r.ndjson").write_bytes(b"1\n" + b" " * 5000)
    with pytest.raises(BadData, match="line 2 is longer"):
        list(read_records(tmp_path / "r.ndjson"))
