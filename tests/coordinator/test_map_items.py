"""Batching is invisible: whatever an item does or is, the others have their results, were run once, did not wait."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.coordinator import call_functions as functions
from tests.coordinator.program import WATCHDOG_S, shared_memory_of, wait_until

from ringpool import RingPoolExecutor, WorkerDiedError
from ringpool.coordinator.pieces import Piece
from ringpool.errors import ArgumentTransportError, RemoteError, ResultTransportError, TaskTimeoutError
from ringpool.shm import blobs, layout
from ringpool.shm.layout import CHUNK_BYTES, OutcomeKind

N = 2000
WHERE = frozenset({0, 1, 2, 777, 778, 1500, N - 1})  # alone, side by side, first and last
MANNERS = [("map", None), ("map", 64), ("map_unordered", None), ("map_unordered", 1)]
IN_ALL_MANNERS = pytest.mark.parametrize(("map_name", "chunksize"), MANNERS)


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        list(made.map(functions.process_id, range(64)))
        yield made


@pytest.fixture
def notes(tmp_path: Path) -> str:
    return os.path.join(tmp_path, "notes")


def is_error(kind: type[BaseException], *words: str) -> Callable[[int, Any], bool]:
    return lambda _, outcome: type(outcome) is kind and all(word in str(outcome) for word in words)


def has_died(signal_number: int | None, exitcode: int | None) -> Callable[[int, Any], bool]:
    return lambda _, outcome: (
        isinstance(outcome, WorkerDiedError)
        and (outcome.signal, outcome.exitcode, outcome.deaths) == (signal_number, exitcode, 1)
        and "tests.coordinator.call_functions.tolerate " in str(outcome)
    )


HAZARDS: dict[str, Callable[[int, Any], bool]] = {
    "raise": lambda item, outcome: type(outcome) is LookupError and outcome.args == (item,),
    "raise an interrupt": lambda item, outcome: type(outcome) is KeyboardInterrupt and outcome.args == (item,),
    "exit": lambda item, outcome: type(outcome) is SystemExit and outcome.code == item + 1,
    "raise what cannot be pickled": is_error(RemoteError, "NeverPickledError", "words of it"),
    "raise what cannot be rebuilt": is_error(RemoteError, "NeverRebuiltError", "words of it"),
    "raise what is rebuilt as a text": is_error(RemoteError, "RebuiltAsTextError", "words of it"),
    "raise what cannot be changed": lambda _, outcome: type(outcome) is functions.FrozenError,
    "raise what cannot be printed": lambda _, outcome: type(outcome) is functions.LengthlessError,
    "raise what is large": lambda item, outcome: outcome.args == (functions.large(item),),
    "return what cannot be pickled": lambda _, outcome: (
        type(outcome) is TypeError and "NeverPickled" in "".join(outcome.__notes__)
    ),
    "return what cannot be rebuilt": is_error(ResultTransportError, "ArithmeticError", "refuses to be rebuilt"),
    "return what is large": lambda item, outcome: outcome == functions.large(item),
    "die by a signal": has_died(signal.SIGKILL, None),
}
OTHER_DEATHS = {"die by a fault": has_died(signal.SIGSEGV, None), "die by os._exit": has_died(None, 5)}


@pytest.mark.parametrize(
    ("hazard", "map_name", "chunksize"),
    [(hazard, *manner) for hazard in HAZARDS for manner in MANNERS]
    + [(death, map_name, None) for death in OTHER_DEATHS for map_name in ("map", "map_unordered")],
)
def test_what_one_item_does_is_its_own(
    executor: RingPoolExecutor, notes: str, hazard: str, map_name: str, chunksize: int | None
) -> None:
    call = partial(functions.tolerate, notes, hazard, WHERE)
    found = list(getattr(executor, map_name)(call, range(N), chunksize=chunksize, return_exceptions=True))
    assert sorted(functions.noted(notes)) == list(range(N))
    is_right = (HAZARDS | OTHER_DEATHS)[hazard]
    good = [2 * item for item in range(N) if item not in WHERE]
    if map_name == "map":
        assert [found[item // 2] for item in good] == good
        assert [item for item in sorted(WHERE) if not is_right(item, found[item])] == []
    else:
        outcomes = [outcome for outcome in found if type(outcome) is not int]
        assert sorted(outcome for outcome in found if type(outcome) is int) == good
        assert len(outcomes) == len(WHERE)
        assert all(any(is_right(item, outcome) for item in WHERE) for outcome in outcomes)


def test_errors_of_items_say_where_they_were_raised(executor: RingPoolExecutor, notes: str) -> None:
    call = partial(functions.tolerate, notes, "raise", frozenset({70, 71}))
    found = list(executor.map(call, range(100), chunksize=50, return_exceptions=True))
    assert all("in meet" in str(found[item].__cause__) for item in (70, 71))
    assert found[70].__cause__ is not found[71].__cause__


ARGUMENTS: dict[str, tuple[Any, Callable[[int, Any], bool]]] = {
    "cannot be pickled": (functions.NeverPickled(), is_error(TypeError, "not to be pickled")),
    "cannot be rebuilt": (functions.NeverRebuilt(), is_error(ArgumentTransportError, "refuses to be rebuilt")),
    "is large": (functions.large(1), lambda _, outcome: outcome == functions.LARGE_BYTES),
}


@IN_ALL_MANNERS
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_one_item_is_is_its_own(
    executor: RingPoolExecutor, notes: str, argument: str, map_name: str, chunksize: int | None
) -> None:
    value, is_right = ARGUMENTS[argument]
    items = [value if item in WHERE else item for item in range(N)]
    call = partial(functions.measure, notes)
    found = list(getattr(executor, map_name)(call, items, chunksize=chunksize, return_exceptions=True))
    good = [item for item in range(N) if item not in WHERE]
    assert sorted(functions.noted(notes)) == good
    bad = [outcome for outcome in found if not (type(outcome) is int and outcome < 2 * N)]
    assert len(bad) == len(WHERE)
    assert all(is_right(0, outcome) for outcome in bad)
    if map_name == "map":
        assert [found[item] for item in good] == [2 * item for item in good]
    else:
        assert sorted(outcome for outcome in found if type(outcome) is int and outcome < 2 * N) == [
            2 * item for item in good
        ]


def test_an_argument_that_cannot_be_pickled_is_raised_at_its_turn(executor: RingPoolExecutor) -> None:
    results = executor.map(functions.identity, [1, 2, functions.NeverPickled(), 4])
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(TypeError, match="not to be pickled") as caught:
        next(results)
    assert "made of instead" in "".join(caught.value.__notes__)


def test_an_item_that_runs_over_its_time_fails_alone(executor: RingPoolExecutor, tmp_path: Path) -> None:
    never = tmp_path / "gate"
    call = partial(functions.wait_for_if, str(never), 150)
    found = list(executor.options(timeout=2).map(call, range(300), return_exceptions=True))
    assert [item for item, outcome in enumerate(found) if outcome != item] == [150]
    assert type(found[150]) is TaskTimeoutError


def test_items_that_are_large_all_of_them(executor: RingPoolExecutor) -> None:
    items = [functions.large(item) for item in range(30)]
    assert list(executor.map(functions.identity, items)) == items
    assert list(executor.map(functions.large, range(30), chunksize=10)) == items


@pytest.mark.parametrize("n_bytes", [900, 960, 961, 4096, 30_000, 130_000, 300_000])
def test_items_and_results_of_any_size(executor: RingPoolExecutor, n_bytes: int) -> None:
    items = [bytes([item]) * n_bytes for item in range(100)]
    assert list(executor.map(functions.identity, items)) == items
    assert list(executor.map(functions.identity, items, chunksize=100)) == items
    structured = [{"item": item} for item in items]
    assert list(executor.map(functions.identity, structured)) == structured


@pytest.mark.parametrize("chunksize", [None, 1000])
def test_items_of_sizes_that_differ_widely(executor: RingPoolExecutor, chunksize: int | None) -> None:
    sizes = [(1, 20, 300, 5_000, 131_000, 131_072, 280_000, 1_000_000)[n * n % 8] for n in range(400)]
    for items in ([bytes(size) for size in sizes], [{"of": bytes(size)} for size in sizes], [bytes(240_000)] * 2):
        assert list(executor.map(functions.identity, items, chunksize=chunksize)) == items
    assert list(executor.map(functions.add, sizes, sizes, chunksize=chunksize)) == [2 * size for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "chunksize", "most"),
    [([80_000] * 200, None, 1.5), ([400_000] * 128, 128, 4), ([100] * 127 + [400_000], 128, 4), ([10] * 500, None, 1)],
)
def test_an_item_is_pickled_a_few_times_at_most_however_large(
    executor: RingPoolExecutor, sizes: list[int], chunksize: int | None, most: float
) -> None:
    items = [functions.CountsPickles(size) for size in sizes]
    assert list(executor.map(functions.identity, items, chunksize=chunksize)) == sizes
    assert sum(item.n_pickled for item in items) <= most * len(items)


@pytest.mark.parametrize("chunksize", [None, 16])
def test_a_large_item_that_is_pickled_once_and_not_again_is_its_own_error(
    executor: RingPoolExecutor, chunksize: int | None
) -> None:
    """Which of them are pickled once more depends on how they fit."""
    small: list[Any] = [bytes(10)] * 500  # so that many go together
    items = [*small, *(functions.PickledOnce(120_000) for _ in range(64))]
    found = list(executor.map(functions.identity, items, chunksize=chunksize, return_exceptions=True))
    assert found[:500] == small
    for outcome in found[500:]:
        assert outcome == 120_000 or (type(outcome) is LookupError and outcome.args == ("pickled again",))
    assert list(executor.map(functions.double, range(10))) == list(range(0, 20, 2))


def test_large_results_go_together_as_far_as_there_is_room(executor: RingPoolExecutor) -> None:
    """... and a vector does not begin again and again, to end with its first item."""
    for n, most in ((600, 200), (8_000, 310), (40_000, 310)):
        n_before = executor.stats().completed
        assert [float(found.sum()) for found in executor.map(functions.ones, [n] * 300)] == [float(n)] * 300
        assert executor.stats().completed - n_before <= most


def test_results_that_nobody_takes_are_held_in_so_much_memory(executor: RingPoolExecutor) -> None:
    n_before = executor.stats().completed
    results = executor.map(functions.ones, [125_000] * 500)  # 1 MB each
    assert float(next(results).sum()) == 125_000

    def is_idle() -> bool:
        stats = executor.stats()
        return stats.queued == stats.in_ring == 0

    wait_until(is_idle, "results that nobody takes")
    assert executor.stats().completed - n_before < 150
    assert sum(float(found.sum()) for found in results) == 499 * 125_000


def test_of_large_items_only_so_many_are_under_way_as_keep_workers_busy(executor: RingPoolExecutor) -> None:
    there: list[int] = []

    def small_and_then_large() -> Iterator[bytes]:
        for _ in range(1000):  # quick ones, of which many are to be under way
            yield b""
        for _ in range(150):
            there.append(sum(".t" in name for name in shared_memory_of(os.getpid())))
            yield bytes(1 << 20)

    assert sum(executor.map(functions.length, small_and_then_large())) == 150 << 20
    assert max(there) <= 20


def test_of_large_items_behind_small_ones_no_more_are_under_way(executor: RingPoolExecutor) -> None:
    """Whether they are at hand or drawn: their size is known when they are encoded."""
    large = bytes(1 << 20)
    items = [b""] * 20_000 + [large] * 200 + [b"", large] * 100
    for source in (items, iter(items)):
        there: list[int] = []
        for n, found in enumerate(executor.map(functions.length, source)):
            assert found == len(items[n])
            if n >= 20_000 or n % 100 == 0:
                there.append(sum(".t" in name for name in shared_memory_of(os.getpid())))
        assert max(there) <= 24


@pytest.mark.parametrize("item", [1, None, (1, "a")], ids=str)
def test_a_chunksize_may_be_larger_than_a_vector_has_room_for(executor: RingPoolExecutor, item: Any) -> None:
    items = [item] * 70_000
    n_before = executor.stats().completed
    assert list(executor.map(functions.identity, items, chunksize=70_000)) == items
    assert executor.stats().completed - n_before < 100


def test_what_an_item_raises_that_no_exception_is_harms_no_other(executor: RingPoolExecutor) -> None:
    """In the thread of the pool that draws ahead, too."""
    results = executor.map(functions.identity, [1] * 30_000 + [functions.ExitsInPickling()] + [2] * 50)
    assert next(results) == 1
    wait_until(lambda: executor.stats()[1:3] == (0, 0), "what is drawn ahead")
    assert executor.submit(functions.double, 4).result(WATCHDOG_S) == 8
    with pytest.raises(SystemExit):
        list(results)
    assert list(executor.map(functions.double, range(10))) == list(range(0, 20, 2))


def test_values_come_back_as_they_were(executor: RingPoolExecutor) -> None:
    items = [
        0,
        -1,
        True,
        None,
        1 << 63,
        (1 << 64) - 1,
        1 << 64,
        -(1 << 63),
        1e308,
        -0.0,
        "",
        "\udc80",
        b"",
        (),
        [],
        {1},
    ]
    items *= 50
    found = list(executor.map(functions.identity, items))
    assert found == items
    assert list(map(type, found)) == list(map(type, items))
    assert list(map(repr, found)) == list(map(repr, items))


# ---- nobody waits behind a slow one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [0, 1, 1000, 2500, 4999])
@pytest.mark.parametrize("map_name", ["map", "map_unordered"])
def test_nobody_waits_behind_a_slow_item(executor: RingPoolExecutor, notes: str, map_name: str, slow: int) -> None:
    """It ends when all others have been run: one that was stuck behind it would never be."""
    call = partial(functions.note_but_one_waits, notes, slow, 4999)
    found = list(getattr(executor, map_name)(call, range(5000)))
    assert sorted(found) == list(range(5000))
    assert sorted(functions.noted(notes)) == [item for item in range(5000) if item != slow]


@pytest.mark.parametrize("map_name", ["map", "map_unordered"])
@pytest.mark.parametrize("chunksize", [None, 1250])
@pytest.mark.parametrize("kind", ["int", "large", "mixed"])
def test_results_do_not_wait_for_a_slow_item_behind_them(
    executor: RingPoolExecutor, tmp_path: Path, map_name: str, chunksize: int | None, kind: str
) -> None:
    gate = tmp_path / "gate"
    call = partial(functions.wait_for_if_and_give, str(gate), 2400, kind)
    results = getattr(executor, map_name)(call, range(5000), chunksize=chunksize)
    try:
        n = 2400 if map_name == "map" else 4999 if chunksize is None else 4900  # those in its chunk wait with it
        found = [next(results) for _ in range(n)]
        assert not gate.exists()
    finally:
        gate.touch()
    found += results
    expected = [functions.wait_for_if_and_give(str(gate), -1, kind, item) for item in range(5000)]
    assert (found if map_name == "map" else sorted(found, key=functions.item_of)) == expected


def test_calls_do_not_wait_behind_a_slow_one_either(executor: RingPoolExecutor, notes: str) -> None:
    call = partial(functions.note_but_one_waits, notes, 300, 999)
    futures = [executor.submit(call, item) for item in range(1000)]
    assert [future.result(WATCHDOG_S) for future in futures] == list(range(1000))
    assert len(functions.noted(notes)) == 999


def test_a_slow_map_does_not_keep_a_call_waiting(executor: RingPoolExecutor, tmp_path: Path, notes: str) -> None:
    gate = tmp_path / "gate"
    call = partial(functions.note_and_hold, notes, str(gate))
    results = executor.map(partial(functions.wait_for_if, str(gate), 5), range(10_000))
    assert next(results) == 0
    assert executor.submit(functions.double, 4).result(WATCHDOG_S) == 8
    gate.touch()
    assert list(results) == list(range(1, 10_000))
    assert executor.submit(call, 0).result(WATCHDOG_S) == 0


# ---- nothing is shared -----------------------------------------------------------------------------------------------


@IN_ALL_MANNERS
def test_items_share_no_argument(executor: RingPoolExecutor, map_name: str, chunksize: int | None) -> None:
    shared: list[int] = []
    found = list(getattr(executor, map_name)(functions.append, [shared] * 1000, chunksize=chunksize))
    assert found == [[1]] * 1000
    zipped = getattr(executor, map_name)(functions.append_to, [shared] * 1000, range(1000), chunksize=chunksize)
    assert sorted(zipped) == [[item] for item in range(1000)]
    assert shared == []


@IN_ALL_MANNERS
def test_what_the_function_holds_is_shared_in_a_worker(
    executor: RingPoolExecutor, map_name: str, chunksize: int | None
) -> None:
    """It is sent once for a map, since it may be large. Other maps and calls have their own, as the caller has."""
    held: list[int] = []
    call = partial(functions.append_to, held)
    for _ in range(2):
        found = list(getattr(executor, map_name)(call, range(1000), chunksize=chunksize))
        assert sorted(each[-1] for each in found) == list(range(1000))
        assert sum(len(each) == 1 for each in found) <= 2  # the first in each worker
    assert held == []
    futures = [executor.submit(call, item) for item in range(10)]
    assert [future.result(WATCHDOG_S) for future in futures] == [[item] for item in range(10)]


@pytest.mark.parametrize("with_handler", [True, False])
def test_a_timer_that_an_item_leaves_is_stopped_before_the_next(executor: RingPoolExecutor, with_handler: bool) -> None:
    items = partial(functions.leave_a_timer, with_handler=with_handler)
    assert list(executor.map(items, range(10), chunksize=10)) == [0.0] * 10


def test_what_an_item_shares_with_itself_stays_shared(executor: RingPoolExecutor) -> None:
    one: list[int] = []
    assert all(executor.map(functions.are_one, [[one, one]] * 100))


def test_results_share_nothing(executor: RingPoolExecutor) -> None:
    found = list(executor.map(functions.identity, [[1]] * 100))
    assert len(set(map(id, found))) == 100


# ---- one map after the other -----------------------------------------------------------------------------------------


def test_deaths_in_one_map_leave_the_other_alone(executor: RingPoolExecutor, tmp_path: Path) -> None:
    dying = executor.map(
        partial(functions.tolerate, str(tmp_path / "dying"), "die by a signal", frozenset({100, 101})),
        range(200),
        return_exceptions=True,
    )
    path = str(tmp_path / "living")
    found = list(executor.map(partial(functions.note, path), range(N)))
    assert found == list(range(N))
    lost = [item for item, outcome in enumerate(dying) if isinstance(outcome, WorkerDiedError)]
    assert lost == [100, 101]
    runs = functions.noted(path)
    assert len(runs) == len(set(runs)) == N


def test_the_errors_of_items_can_be_pickled(executor: RingPoolExecutor, notes: str) -> None:
    """So that they can be passed on."""
    for hazard in ("die by os._exit", "raise what cannot be pickled", "return what cannot be rebuilt"):
        call = partial(functions.tolerate, notes, hazard, frozenset({1}))
        [_, error] = executor.map(call, range(2), return_exceptions=True)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_nothing_stays_in_the_ring(executor: RingPoolExecutor) -> None:
    wait_until(lambda: executor.stats()[1:3] == (0, 0), "the end of all tasks")
    assert executor.submit(os.getppid).result(WATCHDOG_S) > 0


def test_a_map_goes_on_in_the_chunks_that_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fallocate, refused = os.posix_fallocate, []

    def refuse_more(file: int, offset: int, n_bytes: int) -> None:
        if n_bytes == CHUNK_BYTES:
            refused.append(offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(file, offset, n_bytes)

    monkeypatch.setattr(os, "posix_fallocate", refuse_more)
    with RingPoolExecutor(2) as own:
        assert list(own.map(functions.double, range(100_000), chunksize=100)) == list(range(0, 200_000, 2))
    assert set(refused) == {4 * CHUNK_BYTES}


def test_chunks_are_of_a_part_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "size_of_place", lambda: 20 * 8 * CHUNK_BYTES)
    for n_workers, n_chunks in ((2, 20), (30, 32)):  # the first are one for each, and two more
        with RingPoolExecutor(n_workers) as own:
            assert next(own.map(functions.double, range(100))) == 0
            arena = own._rp_pool.pump.publisher.arena
            assert arena is not None
            assert len(arena.mapping) == n_chunks * CHUNK_BYTES


def test_an_exception_for_which_there_was_no_room_at_all_is_one_in_words() -> None:
    piece = Piece(0, 1, [], outcomes=layout.OUTCOME.pack(0, OutcomeKind.ERROR_BLOB))
    piece.decode()
    [failure] = piece.values
    assert type(failure.error) is RemoteError
    assert "no room in shared memory" in str(failure.error)
