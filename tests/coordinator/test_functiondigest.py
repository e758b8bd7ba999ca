"""What tells that the parameters of a job have changed, and that they have not."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.coordinator.program import ROOT

from ringpool.coordinator.functiondigest import encode_sorted

_IN_ANOTHER = """
from ringpool.coordinator.functiondigest import encode_sorted
from tests.coordinator.test_functiondigest import Words
print(encode_sorted({"words": Words("one", "two", "three", "four", "five")}).hex())
"""


class Words:
    """An object whose repr is its address, and whose set has an order of its own in each process."""

    def __init__(self, *words: str) -> None:
        self.words = set(words)


class Unpickled:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def __repr__(self) -> str:
        return "Unpickled()"


def ones_but(at: int) -> Any:
    array = np.ones(5000)
    array[at] = 0
    return array


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (ones_but(2500), ones_but(2501)),
        (re.compile("a" * 400 + "b"), re.compile("a" * 400 + "c")),
        (Words("one"), Words("two")),
        ([Words("one")], [Words("two")]),
    ],
)
def test_values_that_look_alike_are_told_apart(value: object, other: object) -> None:
    assert encode_sorted({"value": value}) != encode_sorted({"value": other})


def test_an_equal_value_is_the_same_in_another_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _IN_ANOTHER],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("value", "same", "other"),
    [
        ({"a": 10**30, "b": 1}, {"b": 1, "a": 10**30}, {"a": 10**30 + 1, "b": 1}),
        ({"a": "\udce9", "b": 1}, {"b": 1, "a": "\udce9"}, {"a": "\udcea", "b": 1}),
        ({"a": {1: "x", 2: "y"}}, {"a": {2: "y", 1: "x"}}, {"a": {1: "y", 2: "x"}}),
        ({"a": {1, "x", "\udce9"}}, {"a": {"\udce9", "x", 1}}, {"a": {1, "x"}}),
        (["a", "\udce9"], ["a", "\udce9"], ["\udce9", "a"]),
        ([["a"], 10**30], [["a"], 10**30], ["a", [10**30]]),
    ],
)
def test_what_messagepack_cannot_hold_is_told_apart_in_any_order(value: object, same: object, other: object) -> None:
    assert encode_sorted(value) == encode_sorted(same) != encode_sorted(other)


def test_what_cannot_be_pickled_is_told_by_its_repr() -> None:
    assert encode_sorted(Unpickled()) == encode_sorted("Unpickled()")


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        ({"b": 1, "a": [1.5, None, True]}, "82a16193cb3ff8000000000000c0c3a16201"),
        ({"z", "a", "m"}, "93a161a16da17a"),
        ((b"x", "é"), "92c40178a2c3a9"),
        (Path("a/b"), "b0506f736978506174682827612f622729"),
        (1 + 2j, "a628312b326a29"),
        (range(3), "ab72616e676528302c203329"),
        (Fraction(1, 3), "ae4672616374696f6e28312c203329"),
        (datetime.date(2026, 1, 2), "aa323032362d30312d3032"),
        (Decimal("1.50"), "a4312e3530"),
        ({"k": frozenset([3, 1, 2])}, "81a16b93010203"),
    ],
)
def test_plain_values_are_what_older_ledgers_have(value: object, encoded: str) -> None:
    assert encode_sorted(value).hex() == encoded
