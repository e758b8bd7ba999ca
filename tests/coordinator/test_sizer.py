"""How many items go together: what was observed long ago is forgotten, and never stands in the way."""

from __future__ import annotations

import pytest

from ringpool.coordinator import sizer
from ringpool.coordinator.sizer import Sizer

MS = 1_000_000


def observed(n_first: int, n_bytes: int, n_ending: int, n_later: int) -> Sizer:
    made = Sizer(None, 2, clock_ns=lambda: 0)
    made.observe(MS, n_first, n_bytes, n_ending)
    for _ in range(n_later):
        made.observe(4 * MS, 4, 0)
        assert 1 <= made.n <= sizer.VECTOR_ITEMS_MAX
        assert made.under_way_max >= made.n
    return made


@pytest.mark.parametrize(("n_bytes", "n_ending"), [(0, 0), (1, 0), (1 << 30, 0), (1 << 14, 1)])
def test_what_came_first_is_forgotten_in_a_long_map(n_bytes: int, n_ending: int) -> None:
    """A mean over results of which all but the first take no room was once divided by, and had become zero."""
    found, usual = observed(1, n_bytes, n_ending, 10_000), observed(1, 0, 0, 10_000)
    assert found.n == usual.n == sizer.VECTOR_NS / 2 // (MS + 1)
    assert found.under_way_max == usual.under_way_max


def test_large_results_make_short_vectors() -> None:
    made = Sizer(None, 2, clock_ns=lambda: 0)
    for _ in range(20):
        made.observe(1000, 100, 100 * 3000)
        assert made.n >= 1
    assert made.n == sizer.RESULT_BYTES // 3000


def test_a_share_of_results_that_end_vectors_makes_them_short() -> None:
    made = Sizer(None, 2, clock_ns=lambda: 0)
    for _ in range(200):
        made.observe(64_000, 32, 0, 1)
        assert made.n >= 1
    assert made.n == 32
    for _ in range(200):
        made.observe(64_000, 2, 0, 1)
    assert made.n == 1


def test_vectors_of_long_items_grow_with_the_time_that_a_run_has_taken() -> None:
    now_ns = 0
    made = Sizer(None, 2, clock_ns=lambda: now_ns)
    works: dict[int, int] = {}
    for now_ms in (1, 10, 100, 200, 400, 800, 10_000):
        now_ns = now_ms * MS
        for _ in range(3):
            made.observe(10 * MS, 10, 0)
            works[now_ms] = made.n
        assert made.overdue_ns >= sizer.OVERDUE_NS
    assert works == {1: 7, 10: 7, 100: 12, 200: 24, 400: 31, 800: 31, 10_000: 31}
    assert made.overdue_ns == sizer.VECTOR_NS_MAX
    assert Sizer(1, 2, clock_ns=lambda: 0).overdue_ns == sizer.OVERDUE_NS


def test_vectors_of_short_items_do_not_grow() -> None:
    now_ms = [0]
    made = Sizer(None, 2, clock_ns=lambda: now_ms[-1] * MS)
    for at_ms in (0, 1, 10_000):
        now_ms.append(at_ms)
        for _ in range(3):
            made.observe(MS, 10, 0)
            n = made.n
        assert n == sizer.VECTOR_NS // (MS // 10 + 1)
        assert made.overdue_ns == sizer.OVERDUE_NS
