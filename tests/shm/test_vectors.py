"""Vectors: what comes out of a chunk is what went in, whatever it is, wherever it stands; and no item has two owners.

Worker and publisher are two mappings of one arena, in one thread: what is tried here is each of their steps. That they
run at the same time, and die, is for tests/crash.
"""

from __future__ import annotations

import enum
import errno
import math
import os
import pickle
import random
import resource
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from tests.workers.test_values import same

from ringpool.errors import SegmentFormatError, SegmentMissingError, SharedMemoryFullError
from ringpool.shm import barrier, layout, vectors
from ringpool.shm.layout import CHUNK_BYTES, VECTOR_ITEMS_AT, OutcomeKind
from ringpool.shm.vectors import ALL, Arena, Chunks, Done, Span

N_CHUNKS = 3
CHUNK = 1  # the one that is used: a step beyond either end of it is seen
EARLY_MAX = 40  # so few items are looked at while they run as well
NO_QUOTA = 1 << 30
PICKLE, ERROR, BLOB, ERROR_BLOB = (
    int(kind) for kind in (OutcomeKind.PICKLE, OutcomeKind.ERROR, OutcomeKind.BLOB, OutcomeKind.ERROR_BLOB)
)
can_split = pytest.mark.skipif(not barrier.register(), reason="this kernel has no membarrier")


class Spare(int):
    pass


class Colour(enum.IntEnum):
    RED = 1


class Length(float):
    __slots__ = ()


class Elsewhere:
    """Where a reader finds that a value, or an exception, did not fit."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Elsewhere

    __hash__ = None  # type: ignore[assignment]


class NoHash(type):
    """Its classes cannot be looked up in a dictionary."""

    def __eq__(cls, other: object) -> bool:
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class Odd(metaclass=NoHash):
    pass


def encode(value: object, room: int) -> tuple[int, bytes]:
    body = pickle.dumps(value)
    return (PICKLE, body) if len(body) <= room else (BLOB, b"")


def encode_error(error: BaseException, room: int) -> tuple[int, bytes]:
    body = pickle.dumps((type(error).__name__, error.args))
    return (ERROR, body) if len(body) <= room else (ERROR_BLOB, b"")


def failure(error: BaseException) -> tuple[str, str, tuple[Any, ...]]:
    """What a reader makes of an exception here."""
    return "failed", type(error).__name__, error.args


def decode(kind: int, body: memoryview) -> Any:
    if kind >= BLOB:
        assert not body
        return Elsewhere()
    try:
        value = pickle.loads(body)
    except Exception as error:  # of bytes that nobody wrote as a value, anything is raised
        raise AssertionError(f"no outcome: {bytes(body)!r}") from error
    return ("failed", *value) if kind == ERROR else value


class Stand:
    """A publisher with its arena, and a worker that runs what it is given in ``CHUNK``."""

    def __init__(self, segment: str) -> None:
        self.arena = Arena(segment, N_CHUNKS)
        self.worker = Chunks.attach(segment)
        self.marks: list[Done] = []  # before each item, and at the end

    def close(self) -> None:
        self.worker.close()
        self.arena.close()

    def run(
        self,
        outcomes: Sequence[Any],
        *,
        first: int = 0,
        end: int | None = None,
        items_bytes: int = 10,
        quota: int = NO_QUOTA,
        before: Callable[[int], object] = lambda i: None,
    ) -> tuple[Span, int]:
        """Run items that return, or raise, these; ``before`` is called with each first. The span, and how many ran."""
        span = Span(CHUNK, first, len(outcomes) if end is None else end, items_bytes, 0)
        self.arena.write(span, bytes(items_bytes))

        early: list[Any] = []
        taken = Done()
        self.marks = []

        def call(item: int) -> Any:
            before(item)
            nonlocal taken
            assert self.arena.progress(span) == item
            self.marks.append(self.arena.done(span))
            if len(outcomes) <= EARLY_MAX:  # whoever looks in meanwhile sees what there is so far, and no more
                done = self.arena.done(span)
                assert done.n == item - first
                early.extend(self._read(span, done, taken))
                taken = done
                assert repr(early) == repr([as_read(outcome) for outcome in outcomes[first:item]])  # not a number too
            if isinstance(outcomes[item], BaseException):
                raise outcomes[item]
            return outcomes[item]

        n = self.worker.run(span, range(len(outcomes)), call, encode, encode_error, quota)
        assert self.arena.progress(span) == first + n
        self.marks.append(self.arena.done(span))
        return span, n

    def read(self, span: Span, n: int) -> list[Any]:
        """The first ``n`` outcomes of what was run last, as they were when they stood."""
        return self._read(span, self.marks[n] if n < len(self.marks) else self.arena.done(span))

    def _read(self, span: Span, done: Done, taken: Done = Done()) -> list[Any]:  # noqa: B008  (immutable)
        plain, stream = self.arena.outcomes(span, done, taken)
        return plain + [decode(kind, body) for kind, body in vectors.stream(stream)]


@pytest.fixture
def stand(stem: str) -> Iterator[Stand]:
    stand = Stand(stem)
    yield stand
    stand.close()


def as_read(outcome: Any) -> Any:
    return failure(outcome) if isinstance(outcome, BaseException) else outcome


# ---- outcomes --------------------------------------------------------------------------------------------------------

OUTCOMES = [
    None,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    2**63,
    -(2**63) - 1,
    10**40,
    0.0,
    -0.0,
    1.5,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    Colour.RED,
    Length(1.5),
    "",
    "text",
    "\ud800",
    b"\0\xff",
    (1, 2),
    [None],
    type(None),
    NotImplemented,
    ValueError("no"),
    KeyboardInterrupt(),
    SystemExit(3),
]


@pytest.mark.parametrize("others", [None, 7, 1.25, "text"], ids=repr)
@pytest.mark.parametrize("outcome", OUTCOMES, ids=repr)
def test_an_outcome_of_any_type_comes_back_from_any_place(stand: Stand, outcome: Any, others: Any) -> None:
    for n in (1, 2, 3, 5):
        for at in range(n):
            outcomes = [others] * n
            outcomes[at] = outcome
            span, n_run = stand.run(outcomes)
            assert n_run == n
            for n_done in range(1, n + 1):  # a worker may have died after any of them
                assert same(stand.read(span, n_done), [as_read(each) for each in outcomes[:n_done]])


@pytest.mark.parametrize("value", [None, -5, 0.5])
def test_outcomes_of_one_plain_type_take_a_word_each_and_none_takes_nothing(stand: Stand, value: Any) -> None:
    span, _ = stand.run([value] * 100)
    assert stand.arena.outcomes(span, stand.arena.done(span)) == ([value] * 100, b"")
    outcomes_at = CHUNK * CHUNK_BYTES + vectors.outcomes_at(span)
    written = stand.arena.mapping[outcomes_at : (CHUNK + 1) * CHUNK_BYTES].rstrip(b"\0")
    assert len(written) <= (0 if value is None else 800)


def test_a_type_that_has_no_hash_is_one_like_any_other(stand: Stand) -> None:
    def encode_odd(value: object, _room: int) -> tuple[int, bytes]:  # which pickle cannot
        return encode("odd" if type(value) is Odd else value, ALL)

    for outcomes in ([Odd(), 1, Odd()], [1, Odd(), 1]):
        span = Span(CHUNK, 0, 3, 10, 0)
        stand.arena.write(span, bytes(10))
        assert stand.worker.run(span, outcomes, lambda item: item, encode_odd, encode_error, NO_QUOTA) == 3
        assert stand.read(span, 3) == ["odd" if type(each) is Odd else each for each in outcomes]


plain = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
)
anything = st.one_of(
    plain,
    st.booleans(),
    st.integers(),
    st.sampled_from([Colour.RED, Length(2.5), "\udcff", (), NotImplemented, 2**63, -(2**63) - 1]),
    st.text(max_size=10),
    st.integers(0, 3000).map(bytes),
    st.integers(0, 300).map(lambda n: ValueError("x" * n)),
    st.sampled_from([SystemExit(1), KeyboardInterrupt(), RuntimeError(bytes(5000))]),
)
runs_of_one_type = st.one_of(
    st.lists(st.none(), max_size=20),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    st.lists(st.floats(), max_size=20),
    st.lists(st.text(max_size=10), max_size=20),
    st.lists(st.one_of(st.booleans(), st.binary(max_size=40), st.integers(), plain), max_size=20),
)


def packed(outcome: Any) -> bytes | None:
    """As msgpack, where it is of a type that comes back as it was."""
    try:
        return msgspec.msgpack.encode(outcome) if type(outcome) in (bool, str, bytes, int, float, type(None)) else None
    except (OverflowError, UnicodeEncodeError):
        return None


def runs_of(outcomes: list[Any], quota: int, room: int) -> int:
    """The model: how many items are run, where ``room`` bytes are left for outcomes."""
    kinds = {type(None): 0, int: 8, float: 8}
    n_plain = used = 0
    width = kinds.get(type(outcomes[0])) if outcomes else None
    if outcomes and type(outcomes[0]) in (bool, str, bytes):
        for outcome in outcomes:
            body = packed(outcome)
            if body is None or used + len(body) + 16 > room:
                break
            used += len(body)
            n_plain += 1
    if width is not None:
        while n_plain < len(outcomes) and type(outcomes[n_plain]) is type(outcomes[0]):
            if width and type(outcomes[0]) is int and not -(2**63) <= outcomes[n_plain] < 2**63:
                break
            n_plain += 1
        used = n_plain * width
    for i, outcome in enumerate(outcomes[:quota]):
        if i < n_plain:
            continue
        body = encode_error(outcome, ALL) if isinstance(outcome, BaseException) else encode(outcome, ALL)
        if used + 16 + len(body[1]) > room:
            return i + 1
        used += 8 + len(body[1])
    return min(quota, len(outcomes))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=150
)
@given(
    same_type=runs_of_one_type,
    mixed=st.lists(anything, max_size=12),
    first=st.integers(0, 5),
    left=st.sampled_from([0, 1, 7, 8, 9, 24, 100, 5000]),
    quota=st.one_of(st.just(NO_QUOTA), st.integers(1, 30)),
)
@example(same_type=[1], mixed=[2**63], first=0, left=0, quota=NO_QUOTA)
@example(same_type=[], mixed=[bytes(3000)] * 12, first=3, left=5000, quota=NO_QUOTA)
def test_a_vector_is_its_model(
    stand: Stand, same_type: list[Any], mixed: list[Any], first: int, left: int, quota: int
) -> None:
    """``left``: bytes of the chunk beyond what so many plain outcomes need."""
    outcomes = same_type + mixed
    n = len(outcomes)
    items_bytes = CHUNK_BYTES - VECTOR_ITEMS_AT - 8 * n - 24 - left  # more than half of it, which the publisher avoids
    around = [
        slice(0, CHUNK * CHUNK_BYTES),
        slice((CHUNK + 1) * CHUNK_BYTES, N_CHUNKS * CHUNK_BYTES),
    ]
    before = [stand.arena.mapping[each] for each in around]
    span, n_run = stand.run([None] * first + outcomes, first=first, items_bytes=items_bytes, quota=quota)
    room = CHUNK_BYTES - vectors.outcomes_at(span)
    assert n_run == runs_of(outcomes, quota, room)
    for n_done in range(1, n_run + 1):
        got = stand.read(span, n_done)
        if got and type(got[-1]) is Elsewhere:
            assert n_done == n_run
            got[-1] = as_read(outcomes[n_done - 1])
        assert same(got, [as_read(each) for each in outcomes[:n_done]])
    assert [stand.arena.mapping[each] for each in around] == before, "a neighbour was written into"
    items_at = CHUNK * CHUNK_BYTES + VECTOR_ITEMS_AT
    assert stand.arena.mapping[items_at : items_at + items_bytes] == bytes(items_bytes)


# ---- room ------------------------------------------------------------------------------------------------------------


def test_results_are_written_up_to_the_last_byte_of_a_chunk_and_one_more_is_sent_elsewhere(stand: Stand) -> None:
    room: list[int] = []

    def fill(value: int, room_now: int) -> tuple[int, bytes]:
        room.append(room_now)
        return (PICKLE, bytes(room_now - value)) if room_now >= value >= 0 else (BLOB, b"")

    span = Span(CHUNK, 0, 2, 10, 0)
    outcomes_at = vectors.outcomes_at(span)
    for spare in (0, 1, 8, 9):
        stand.arena.write(span, bytes(10))
        assert stand.worker.run(span, (spare, 1 << 40), Spare, fill, fill, 2) == 2
        first_bytes = CHUNK_BYTES - outcomes_at - 16 - spare
        assert room.pop() == spare - 8, "what is left beside the head of one that went elsewhere"
        assert stand.arena.outcomes(span, stand.arena.done(span))[1][8 + first_bytes :] == layout.OUTCOME.pack(0, BLOB)


@pytest.mark.parametrize("large", [bytes(CHUNK_BYTES), RuntimeError(bytes(CHUNK_BYTES))], ids=["value", "exception"])
@pytest.mark.parametrize("others", [None, 7, 0.5, "text"], ids=repr)
def test_what_does_not_fit_ends_the_vector_and_the_rest_comes_back(stand: Stand, others: Any, large: Any) -> None:
    span, n = stand.run([others, others, large, others])
    assert n == 3
    assert stand.read(span, 3) == [others, others, Elsewhere()]


@pytest.mark.parametrize("n", [1, 2, 100, 1000, 4000, 4096, 32_000, CHUNK_BYTES // 8 - 14])
def test_beside_items_that_take_all_their_room_any_outcomes_have_theirs(stand: Stand, n: int) -> None:
    items_bytes = vectors.room_for_items(n)
    assert items_bytes >= 0
    for outcomes in (
        [1] * n,
        [1] * (n - 1) + ["large" * CHUNK_BYTES],
        [1] * (n - 1) + [RuntimeError(bytes(CHUNK_BYTES))],
    ):
        span, n_run = stand.run(outcomes, items_bytes=items_bytes)
        assert stand.worker.items(span) == bytes(items_bytes)
        assert n_run == n
        assert len(stand.read(span, n)) == n
        head = stand.arena.mapping[(CHUNK + 1) * CHUNK_BYTES : (CHUNK + 1) * CHUNK_BYTES + VECTOR_ITEMS_AT]
        assert head == bytes(VECTOR_ITEMS_AT)


def test_more_items_than_a_chunk_has_words_have_no_room() -> None:
    assert vectors.room_for_items(CHUNK_BYTES // 8) < 0
    assert vectors.room_for_items(1) == CHUNK_BYTES // 2


# ---- quota and parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("quota", [-3, 0, 1, 4, 5, 6])
def test_no_more_are_run_than_the_quota(stand: Stand, first: int, quota: int) -> None:
    seen: list[int] = []
    span, n = stand.run(list(range(first + 5)), first=first, quota=quota, before=seen.append)
    assert n == max(0, min(quota, 5))
    assert seen == list(range(first, first + n))
    assert stand.read(span, n) == seen[:n]


def restored_before(
    stand: Stand, n: int, says: Callable[[int], bool], encoding: int = 0, *, each: bool = False
) -> tuple[list[int], int]:
    """Before which of ``n`` items ``restore`` was called, and how many of them were run."""
    seen: list[int] = []
    n_run = 0

    def restore() -> bool:
        seen.append(n_run)
        return says(n_run)

    def call(_: int) -> None:
        nonlocal n_run
        n_run += 1

    span = Span(CHUNK, 0, n, 10, encoding)
    stand.arena.write(span, bytes(10))
    run = stand.worker.run(span, range(n), call, encode, encode_error, NO_QUOTA, restore, restores_each=each)
    assert run == n_run
    assert stand.arena.progress(span) == n_run
    assert stand.read(span, n_run) == [None] * n_run
    return seen, n_run


def test_few_items_are_each_followed_by_a_restoration_and_many_by_some(stand: Stand) -> None:
    few, many = vectors.RESTORES, 100 * vectors.RESTORES
    assert restored_before(stand, few, lambda _: True) == (list(range(1, few)), few)
    seen, n_run = restored_before(stand, many, lambda _: True)
    assert n_run == many
    assert seen[0] == 1
    assert vectors.RESTORES - 1 <= len(seen) <= vectors.RESTORES + 1
    assert restored_before(stand, 1, lambda _: True) == ([], 1)


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_where_nothing_can_be_restored_the_vector_ends_and_the_rest_comes_back(stand: Stand, bad: int) -> None:
    assert restored_before(stand, 6, lambda n_run: n_run < bad) == (list(range(1, bad + 1)), bad)


def test_each_of_many_items_is_followed_by_a_restoration_where_that_is_asked_for(stand: Stand) -> None:
    n = 10 * vectors.RESTORES
    assert restored_before(stand, n, lambda _: True, each=True) == (list(range(1, n)), n)


FILES = int(layout.ItemsEncoding.FILES)


def test_between_any_two_files_there_is_a_restoration(stand: Stand) -> None:
    n = 10 * vectors.RESTORES
    assert restored_before(stand, n, lambda _: True, FILES) == (list(range(1, n)), n)


@pytest.mark.parametrize("outcomes", [[None] * 9, list(range(9)), [1, "a", None, ValueError(), 2.0, b"", (), [], 1]])
@pytest.mark.parametrize(("first", "end", "limit"), [(0, 9, 9), (3, 9, 9), (0, 5, 5), (2, 9, 6)])
def test_files_are_timed_each_by_itself(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, outcomes: list[Any], first: int, end: int, limit: int
) -> None:
    """File i takes i ns; some of the files may be taken away before the worker comes to them."""
    now_ns = 0
    monkeypatch.setattr(vectors.time, "monotonic_ns", lambda: now_ns)
    span = Span(CHUNK, first, end, 10, FILES)
    stand.arena.write(span, bytes(10))
    before = bytes(stand.arena.mapping[: CHUNK * CHUNK_BYTES]), bytes(stand.arena.mapping[(CHUNK + 1) * CHUNK_BYTES :])
    if limit < end:
        assert stand.arena.split(span, lambda n: limit - first - 1) == limit

    def call(item: int) -> Any:
        nonlocal now_ns
        now_ns += item
        if isinstance(outcomes[item], BaseException):
            raise outcomes[item]
        return outcomes[item]

    timed = stand.worker.timed(span, call)
    assert stand.worker.run(span, range(9), timed, encode, encode_error, NO_QUOTA) == limit - first
    span = span._replace(end=limit)  # as who has taken some away knows it
    assert stand._read(span, stand.arena.done(span)) == [as_read(outcome) for outcome in outcomes[first:limit]]
    for a in range(limit - first):
        for b in range(a, limit - first + 1):
            assert stand.arena.times(span, a, b)[::-1] == list(range(first + a, first + b))
    assert stand.arena.times(span._replace(encoding=0), 0, 1) == []
    mapping = stand.arena.mapping
    assert (mapping[: CHUNK * CHUNK_BYTES], mapping[(CHUNK + 1) * CHUNK_BYTES :]) == before


@pytest.mark.parametrize("n", [1, 50, CHUNK_BYTES // 64])
@pytest.mark.parametrize("outcome", ["x" * 40, 2**64, ValueError("y" * 30), (1,)], ids=repr)
def test_outcomes_that_fill_a_chunk_leave_the_times_of_files(stand: Stand, n: int, outcome: Any) -> None:
    items_bytes = vectors.room_for_items(n, timed=True)
    span = Span(CHUNK, 0, n, items_bytes, FILES)
    stand.arena.write(span, bytes(items_bytes))
    stand.worker.items(span)

    def call(_: int) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    n_run = stand.worker.run(span, range(n), stand.worker.timed(span, call), encode, encode_error, NO_QUOTA)
    assert n_run == n or n_run > 100
    values = stand._read(span, stand.arena.done(span))
    assert values[: n_run - 1] == [as_read(outcome)] * (n_run - 1)
    assert values[-1] in (as_read(outcome), Elsewhere())
    assert all(0 <= spent_ns < 60e9 for spent_ns in stand.arena.times(span, 0, n_run))
    assert len(stand.arena.times(span, 0, n_run)) == n_run


def test_files_whose_times_have_no_room_are_an_error(stand: Stand) -> None:
    n, items_bytes = CHUNK_BYTES * 3 // 64, vectors.room_for_items(1000)
    stand.worker.items(Span(CHUNK, 0, n, items_bytes, 0))
    with pytest.raises(SegmentFormatError):
        stand.worker.items(Span(CHUNK, 0, n, items_bytes, FILES))


def test_a_part_of_a_vector_runs_its_own_items_alone(stand: Stand) -> None:
    seen: list[int] = []
    span, n = stand.run(list(range(10)), first=4, end=7, before=seen.append)
    assert (seen, n) == ([4, 5, 6], 3)
    assert stand.read(span, 3) == [4, 5, 6]


def test_a_chunk_that_is_used_again_shows_nothing_of_its_last_vector(stand: Stand) -> None:
    stand.run(["a", "b"], quota=1)
    stand.run([1, 2, 3])
    span, n = stand.run([None, None])
    assert stand.read(span, n) == [None, None]
    head = stand.arena.words[CHUNK * CHUNK_BYTES >> 3 :]
    assert (head[layout.V_LIMIT], head[layout.V_PREFIX], head[layout.V_PREFIX_ITEMS]) == (2, layout.Prefix.NONE, ALL)
    head.release()


# ---- split -----------------------------------------------------------------------------------------------------------


@can_split
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=150
)
@given(
    n=st.integers(1, 12),
    first=st.integers(0, 3),
    shares=st.lists(st.tuples(st.integers(0, 15), st.floats(0, 1)), max_size=5),
    quota=st.one_of(st.just(NO_QUOTA), st.integers(1, 12)),
)
def test_splits_at_any_item_are_their_model(
    stand: Stand, n: int, first: int, shares: list[tuple[int, float]], quota: int
) -> None:
    """Each split is made while its item is run. The worker keeps that item, and its share of those behind it."""
    end = first + n
    span = Span(CHUNK, first, end, 10, 0)
    seen: list[int] = []
    n_left: list[int] = []

    def before(item: int) -> None:
        nonlocal span, end
        seen.append(item)
        for _, share in [each for each in shares if each[0] + first == item]:

            def kept(n: int, share: float = share) -> int:
                n_left.append(n)
                return int(share * n)

            n_behind = end - item - 1
            new_end = stand.arena.split(span, kept)
            if n_behind:
                assert n_left.pop() == n_behind
                end = item + 1 + int(share * n_behind)
            assert not n_left
            assert new_end == end
            span = span._replace(end=end)

    _, n_run = stand.run(list(range(first + n)), first=first, quota=quota, before=before)
    assert n_run == min(quota, end - first)
    assert seen == list(range(first, first + n_run))
    assert stand.read(span, n_run) == seen


@can_split
def test_a_worker_that_has_not_begun_keeps_its_first_item(stand: Stand) -> None:
    span = Span(CHUNK, 2, 6, 10, 0)
    stand.arena.write(span, bytes(10))
    assert stand.arena.split(span, lambda n: n - 3) == 3
    seen: list[int] = []
    assert stand.worker.run(span, range(6), seen.append, encode, encode_error, NO_QUOTA) == 1
    assert seen == [2]


@can_split
@pytest.mark.parametrize("n", [1, 4])
def test_of_a_vector_that_is_done_nothing_can_be_taken(stand: Stand, n: int) -> None:
    span, _ = stand.run([1] * n)
    assert stand.arena.split(span, lambda n: pytest.fail("nothing is left")) == n
    assert stand.read(span, n) == [1] * n


def test_where_the_kernel_has_no_membarrier_nothing_is_taken(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "fence_all", lambda: False)
    ends: list[int] = []
    span = Span(CHUNK, 0, 4, 10, 0)
    _, n = stand.run([1] * 4, before=lambda _: ends.append(stand.arena.split(span, lambda n: 0)))
    assert (n, ends) == (4, [4] * 4)


@pytest.mark.parametrize("decided", [1, 2, 3])
def test_while_it_is_being_decided_whose_an_item_is_the_worker_waits(stand: Stand, decided: int) -> None:
    limit = (CHUNK * CHUNK_BYTES >> 3) + layout.V_LIMIT
    seen: list[int] = []

    def before(item: int) -> None:
        seen.append(item)
        if item == 0:
            stand.arena.words[limit] = 0

    outcome: list[tuple[Span, int]] = []
    thread = threading.Thread(target=lambda: outcome.append(stand.run([1] * 3, before=before)))
    thread.start()
    try:
        while not is_in(thread, "_may_run"):
            assert thread.is_alive()
        assert seen == [0]
    finally:
        stand.arena.words[limit] = decided
        thread.join()
    span, n = outcome[0]
    assert n == decided
    assert seen == list(range(decided))
    assert stand.read(span, n) == [1] * n


def is_in(thread: threading.Thread, function: str) -> bool:
    """Whether some frame of the thread is that function's."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


# ---- a fork that comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], [None], [1], [0.5], ["text"], [1, "text"]], ids=repr)
@pytest.mark.parametrize("outcome", [None, 2, 1.5, "more", ValueError("no")], ids=repr)
def test_a_fork_that_comes_back_from_a_call_writes_nothing(stand: Stand, before: list[Any], outcome: Any) -> None:
    """It has let go of the mapping: the next store raises. And it encodes nothing, which might write a blob."""
    encoded: list[str] = []

    def fork(item: int) -> None:
        if item == len(before):
            stand.worker.close()

    def encode_noted(value: Any, room: int) -> tuple[int, bytes]:
        if stand.worker.mapping.closed:
            encoded.append("a result")
        return encode(value, room)

    def encode_error_noted(error: BaseException, room: int) -> tuple[int, bytes]:
        if stand.worker.mapping.closed:
            encoded.append("an exception")
        return encode_error(error, room)

    outcomes = [*before, outcome, 7]
    span = Span(CHUNK, 0, len(outcomes), 10, 0)
    stand.arena.write(span, bytes(10))

    def call(item: int) -> Any:
        assert item <= len(before), "it went on"
        fork(item)
        if isinstance(outcomes[item], BaseException):
            raise outcomes[item]
        return outcomes[item]

    with pytest.raises((ValueError, TypeError)):
        stand.worker.run(span, range(len(outcomes)), call, encode_noted, encode_error_noted, NO_QUOTA)
    assert not encoded
    assert stand.arena.progress(span) == len(before)
    stand.worker = Chunks.attach(stand.arena.segment)


# ---- damage ----------------------------------------------------------------------------------------------------------

DAMAGED_SPANS = [
    ("a chunk that is not there", Span(N_CHUNKS, 0, 1, 0, 0)),
    ("a chunk far away", Span(2**32 - 1, 0, 1, 10, 0)),
    ("an end before the first", Span(CHUNK, 2, 1, 10, 0)),
    ("more items than a chunk", Span(0, 0, 1, CHUNK_BYTES + 1, 0)),
    ("items up to the chunk's end", Span(0, 0, 1, CHUNK_BYTES - VECTOR_ITEMS_AT, 0)),
    ("items into the next chunk", Span(0, 0, 1, CHUNK_BYTES - VECTOR_ITEMS_AT + 1, 0)),
    ("items without bounds", Span(0, 0, 1, 2**32 - 1, 0)),
    ("outcomes into the next chunk", Span(0, 0, CHUNK_BYTES // 8, 0, 0)),
    ("outcomes without bounds", Span(0, 0, 2**32 - 1, 0, 0)),
]


@pytest.mark.parametrize("span", [pytest.param(span, id=name) for name, span in DAMAGED_SPANS])
def test_a_span_that_is_not_within_its_chunk_is_an_error(stand: Stand, span: Span) -> None:
    read = vectors.unpack_span(vectors.pack_span(span))
    assert read == span
    with pytest.raises(SegmentFormatError, match="vector"):
        stand.worker.items(read)


def test_a_span_of_more_items_than_there_are_is_an_error(stand: Stand) -> None:
    with pytest.raises(SegmentFormatError, match="vector"):
        stand.run([1, 2], end=3)


def test_a_payload_of_another_length_is_no_span() -> None:
    for payload in (b"", bytes(layout.SPAN.size - 1), bytes(layout.SPAN.size + 1)):
        with pytest.raises(struct.error):
            vectors.unpack_span(payload)


def test_an_outcome_that_is_longer_than_its_chunk_is_an_error(stand: Stand) -> None:
    span, n = stand.run([Length(1.5), "b", "c"])
    at = CHUNK * CHUNK_BYTES + vectors.outcomes_at(span)
    second = at + 8 + layout.OUTCOME.unpack_from(stand.arena.mapping, at)[0]
    for length in (CHUNK_BYTES, 2**31, 2**32 - 1, (CHUNK + 1) * CHUNK_BYTES - second - 8 + 1):
        layout.OUTCOME.pack_into(stand.arena.mapping, second, length, PICKLE)
        assert stand.read(span, 1) == [1.5]
        with pytest.raises(SegmentFormatError, match="run over its chunk"):
            stand.read(span, n)


def test_so_many_plain_outcomes_as_no_vector_has_are_an_error(stand: Stand) -> None:
    span, n = stand.run([1, 2])
    for n_done in (-1, n + 1, ALL):
        with pytest.raises(SegmentFormatError, match="vector"):
            stand.arena.outcomes(span, Done(n_done))


def test_a_prefix_of_a_type_that_is_none_is_an_error(stand: Stand) -> None:
    span, _ = stand.run([1, 2])
    for prefix in (4, ALL):
        stand.arena.words[(CHUNK * CHUNK_BYTES >> 3) + layout.V_PREFIX] = prefix
        with pytest.raises(SegmentFormatError, match="vector"):
            stand.arena.outcomes(span, stand.arena.done(span))


@pytest.mark.parametrize("seed", range(3))
def test_a_chunk_full_of_anything_is_read_or_refused(stand: Stand, seed: int) -> None:
    lots = random.Random(seed)
    n_refused = 0
    for _ in range(300):
        span, n = stand.run([1, 2, "a", None, ValueError(), "b"])
        for _ in range(lots.randint(1, 4)):
            at = CHUNK * CHUNK_BYTES + lots.choice((lots.randrange(8, 32), lots.randrange(64, 300)))
            stand.arena.mapping[at] = lots.choice((0, 1, 0x7F, 0xFF, lots.randrange(256)))
        try:
            plain, stream = stand.arena.outcomes(span, stand.arena.done(span))
        except SegmentFormatError:
            n_refused += 1
            continue
        assert len(plain) + len([*vectors.stream(stream)]) == n
    assert n_refused


# ---- the arena -------------------------------------------------------------------------------------------------------


def test_chunks_are_given_out_once_until_they_come_back(stem: str) -> None:
    arena = Arena(stem, 3)
    taken = [arena.take() for _ in range(3)]
    assert sorted(each for each in taken if each is not None) == [0, 1, 2]
    assert arena.take() is None
    arena.give(1)
    assert arena.take() == 1
    assert arena.take() is None
    arena.close()


def test_chunks_have_their_memory_when_they_are_wanted(stem: str) -> None:
    """And a worker, which has mapped the arena before, sees what is in them."""
    arena, file = Arena(stem, 5, 2), f"/dev/shm/{stem}.v"
    worker = Chunks.attach(stem)

    def reserved() -> int:
        return os.stat(file).st_blocks * 512

    assert os.stat(file).st_size == len(worker.mapping) == 5 * CHUNK_BYTES
    assert reserved() == 2 * CHUNK_BYTES
    taken = [arena.take(), arena.take()]
    assert reserved() == 2 * CHUNK_BYTES
    taken += [arena.take()]
    assert taken == [1, 0, 2]
    assert reserved() == 3 * CHUNK_BYTES
    arena.mapping[3 * CHUNK_BYTES - 1] = worker.mapping[2 * CHUNK_BYTES] = 7
    assert worker.mapping[3 * CHUNK_BYTES - 1] == arena.mapping[2 * CHUNK_BYTES] == 7
    arena.give(0)
    assert arena.take() == 0
    assert [arena.take(), arena.take(), arena.take()] == [3, 4, None]
    assert reserved() == 5 * CHUNK_BYTES
    worker.close()
    arena.close()


@pytest.mark.parametrize("why", ["no room", "no descriptor", "no name"])
def test_a_chunk_that_cannot_be_had_is_not_there_for_now(stem: str, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    arena = Arena(stem, 3, 1)
    assert arena.take() == 0
    with monkeypatch.context() as patch, ExitStack() as stack:
        if why == "no room":
            patch.setattr(os, "posix_fallocate", refuse_room)
        elif why == "no descriptor":
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        else:
            os.rename(f"/dev/shm/{stem}.v", f"/dev/shm/{stem}.w")
            stack.callback(os.rename, f"/dev/shm/{stem}.w", f"/dev/shm/{stem}.v")
        assert arena.take() is None
        arena.give(0)
        assert arena.take() == 0
    assert arena.take() == 1
    arena.close()


def refuse_room(*_arguments: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_segment_without_an_arena_is_an_error(stem: str) -> None:
    with pytest.raises(SegmentMissingError, match="no arena"):
        Chunks.attach(stem)


def test_an_arena_that_shared_memory_has_no_room_for_leaves_nothing(stem: str) -> None:
    place = os.statvfs("/dev/shm")
    n = place.f_blocks * place.f_frsize // CHUNK_BYTES + 1024
    with pytest.raises(SharedMemoryFullError, match="no room"):
        Arena(stem, n)
    with pytest.raises(SegmentMissingError):
        Chunks.attach(stem)


def test_closing_twice_does_no_harm(stand: Stand) -> None:
    stand.worker.close()
    stand.worker.close()
    stand.worker = Chunks.attach(stand.arena.segment)
