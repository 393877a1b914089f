"""Quantiles of an endless stream of numbers, in fixed memory and within one per cent."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

ALPHA = 0.01
MAX_BUCKETS = 2048
SMALLEST = 1e-6
"""Values below this count as zero. From here to 1e9 there are 1,728 buckets: times in ms never collapse."""

_GAMMA = (1 + ALPHA) / (1 - ALPHA)
_LOG_GAMMA = math.log(_GAMMA)
_BUCKETS_PER_E = 1 / _LOG_GAMMA
_TO_CENTRE = math.log(2 / (_GAMMA + 1))
_INFINITY = math.inf


class QuantileSketch:
    """A histogram whose buckets widen with the value, so that every quantile is off by at most 1 % of itself.

    Bucket i counts the values in (gamma^(i-1), gamma^i], gamma = (1 + alpha) / (1 - alpha), and answers for
    all of them with 2 gamma^i / (gamma + 1), which neither edge misses by more than alpha. Two sketches merge
    by adding counts, and the merged one is the sketch of the joined streams. From C. Masson, J. E. Rim, H. K.
    Lee: "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees", PVLDB 12(12),
    2019.

    Beyond 2,048 occupied buckets the lowest are joined: low quantiles blur, high ones stay exact. Not
    thread-safe.
    """

    __slots__ = ("_buckets", "_max", "_min", "_zeros", "count", "ignored")

    def __init__(self) -> None:
        self.count = 0
        self.ignored = 0
        """NaN and infinities, which are not part of `count`."""
        self._zeros = 0
        self._buckets: dict[int, int] = {}
        self._min = _INFINITY
        self._max = -_INFINITY

    def add(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times. Zero and below land in one bucket that answers 0."""
        if not -_INFINITY < value < _INFINITY:
            self.ignored += count
            return
        self.count += count
        if value < SMALLEST:
            value = 0.0
            self._zeros += count
        else:
            index = math.ceil(math.log(value) * _BUCKETS_PER_E)
            buckets = self._buckets
            buckets[index] = buckets.get(index, 0) + count
            if len(buckets) > MAX_BUCKETS:
                self._join_lowest()
        if value < self._min:
            self._min = value
        if value > self._max:
            self._max = value

    def add_many(self, values: Iterable[float]) -> None:
        """The same as `add` for each, at about a third of the price."""
        usable = []
        for value in values:
            if SMALLEST <= value < _INFINITY:
                usable.append(value)
            else:
                self.add(value)
        if not usable:
            return
        log, ceil = math.log, math.ceil
        buckets = self._buckets
        for index, count in Counter([ceil(log(value) * _BUCKETS_PER_E) for value in usable]).items():
            buckets[index] = buckets.get(index, 0) + count
        if len(buckets) > MAX_BUCKETS:
            self._join_lowest()
        self.count += len(usable)
        self._min = min(self._min, min(usable))
        self._max = max(self._max, max(usable))

    def quantile(self, q: float) -> float | None:
        """The smallest value that the share `q` (0..1) of all values does not exceed (nearest rank), ±1 %.

        None while nothing was counted. Never outside the smallest and largest value counted, so a stream of
        one value answers exactly that. Raises ValueError for a `q` outside 0..1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile lies between 0 and 1, not at {q!r}")
        if not self.count:
            return None
        # 0.07 * 100 is 7.000000000000001 in binary: without the slack it would ask for the 8th of 100.
        rank = max(1, math.ceil(q * self.count - 1e-9))
        seen = self._zeros
        if rank <= seen:
            return 0.0
        for index in sorted(self._buckets):
            seen += self._buckets[index]
            if rank <= seen:
                return min(max(_centre(index), self._min), self._max)
        return self._max

    def merge(self, other: QuantileSketch) -> None:
        """Add everything that `other` counted; `other` stays as it is."""
        self.count += other.count
        self.ignored += other.ignored
        self._zeros += other._zeros
        for index, count in other._buckets.items():
            self._buckets[index] = self._buckets.get(index, 0) + count
        if len(self._buckets) > MAX_BUCKETS:
            self._join_lowest()
        self._min = min(self._min, other._min)
        self._max = max(self._max, other._max)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: `buckets` is one flat list, index, count, index, count, lowest first."""
        buckets = [number for pair in sorted(self._buckets.items()) for number in pair]
        span = {"min": self._min, "max": self._max} if self.count else {}
        return {"alpha": ALPHA, "zeros": self._zeros, "ignored": self.ignored, "buckets": buckets} | span

    @classmethod
    def from_dict(cls, plain: Any) -> QuantileSketch:
        """The sketch that `to_dict` wrote. Raises ValueError for anything else, naming what is wrong."""
        if not isinstance(plain, dict):
            raise ValueError(f"a stored sketch is an object, not {type(plain).__name__}")
        if plain.get("alpha") != ALPHA:
            raise ValueError(f"a stored sketch has alpha {plain.get('alpha')!r}, not {ALPHA}")
        sketch = cls()
        sketch._zeros = _count(plain, "zeros")
        sketch.ignored = _count(plain, "ignored")
        numbers = plain.get("buckets")
        if not isinstance(numbers, list) or len(numbers) % 2 or any(type(n) is not int for n in numbers):
            raise ValueError("a stored sketch's 'buckets' is a list of pairs of whole numbers")
        sketch._buckets = dict(zip(numbers[0::2], numbers[1::2], strict=True))
        if len(sketch._buckets) != len(numbers) // 2 or len(sketch._buckets) > MAX_BUCKETS:
            raise ValueError("a stored sketch's 'buckets' repeats an index or has too many")
        if any(count <= 0 for count in sketch._buckets.values()):
            raise ValueError("a stored sketch's 'buckets' has a count that is not positive")
        sketch.count = sketch._zeros + sum(sketch._buckets.values())
        if sketch.count:
            low, high = plain.get("min"), plain.get("max")
            if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
                raise ValueError("a stored sketch lacks its 'min' or 'max'")
            if not 0 <= low <= high <= sys.float_info.max:
                raise ValueError(f"a stored sketch cannot span {low!r} to {high!r}")
            sketch._min, sketch._max = float(low), float(high)
        return sketch

    def _join_lowest(self) -> None:
        indexes = sorted(self._buckets)
        keep = indexes[-MAX_BUCKETS]
        for index in indexes[:-MAX_BUCKETS]:
            self._buckets[keep] += self._buckets.pop(index)


def _centre(index: int) -> float:
    try:
        return math.exp(index * _LOG_GAMMA + _TO_CENTRE)
    except OverflowError:  # the bucket around the largest float; the caller cuts at the largest seen
        return _INFINITY


def _count(plain: dict[str, Any], key: str) -> int:
    value = plain.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"a stored sketch's {key!r} is a whole number from 0, not {value!r}")
    return value
