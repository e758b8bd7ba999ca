"""The queue before the ring: it behaves as a model does, whatever other threads do between any two of its bytecodes."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from ringpool.coordinator import backlog as module
from ringpool.coordinator.backlog import Backlog

WATCHDOG_S = 30
_FILE = module.__file__


class Ticket:
    """With a number for the test, and a priority. Nobody may compare it with another."""

    def __init__(self, n: int, priority: int = 0) -> None:
        self.n = n
        self.priority = priority

    def __eq__(self, other: object) -> bool:
        raise AssertionError("tickets are compared")

    __lt__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.n}p{self.priority}"


def numbers(tickets: list[Ticket]) -> list[int]:
    return [ticket.n for ticket in tickets]


def filled(*priorities: int) -> Backlog[Ticket]:
    """With tickets 0, 1, 2 ... of these priorities."""
    backlog: Backlog[Ticket] = Backlog()
    for n, priority in enumerate(priorities):
        backlog.append(Ticket(n, priority))
    return backlog


# ---- the order -------------------------------------------------------------------------------------------------------


def test_an_empty_backlog_has_nothing() -> None:
    backlog: Backlog[Ticket] = Backlog()
    assert not backlog
    assert len(backlog) == 0
    assert backlog.peek() is None
    assert backlog.drain() == []
    assert backlog.remove_if(lambda _ticket: True) == []
    with pytest.raises(IndexError):
        backlog.popleft()


def test_equal_priorities_go_in_order() -> None:
    backlog = filled(0, 0, 0)
    assert [backlog.popleft().n for _ in range(3)] == [0, 1, 2]
    assert not backlog.has_priorities


def test_higher_priorities_go_first_and_lower_ones_last() -> None:
    backlog = filled(0, -1, 5, 0, 5, -7)
    assert backlog.has_priorities
    assert [backlog.popleft().n for _ in range(6)] == [2, 4, 0, 3, 1, 5]


def test_what_comes_back_is_first_among_its_equals_and_in_its_order() -> None:
    backlog = filled(0, 3, -2)
    backlog.append_front([Ticket(10), Ticket(11, 3), Ticket(12), Ticket(13, -2)])
    backlog.append_front([Ticket(20)])
    assert numbers(backlog.drain()) == [11, 1, 20, 10, 12, 0, 13, 2]


@pytest.mark.parametrize("add", [Backlog.append, lambda backlog, ticket: backlog.append_front([ticket])])
def test_a_priority_once_seen_is_remembered(add: Callable[[Backlog[Ticket], Ticket], None]) -> None:
    backlog = filled(0)
    assert not backlog.has_priorities
    add(backlog, Ticket(1, -1))
    backlog.drain()
    assert backlog.has_priorities


def test_what_is_taken_out_of_twice_stays_in_order() -> None:
    backlog = filled(0, 0, 0)
    assert numbers(backlog.remove_if(lambda ticket: ticket.n == 0)) == [0]
    for n in range(3, 6):
        backlog.append(Ticket(n))
    assert numbers(backlog.remove_if(lambda ticket: ticket.n == 4)) == [4]
    backlog.append(Ticket(6))
    assert numbers(backlog.drain()) == [1, 2, 3, 5, 6]


def test_a_predicate_that_raises_takes_nothing_out() -> None:
    backlog = filled(0, 1, 0, -1)

    def fails_at_the_last(ticket: Ticket) -> bool:
        if ticket.n == 3:
            raise LookupError
        return True

    with pytest.raises(LookupError):
        backlog.remove_if(fails_at_the_last)
    assert numbers(backlog.drain()) == [1, 0, 2, 3]


_priorities = st.sampled_from([0, 0, 0, 1, -1, 7, -300])
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), _priorities),
        st.tuples(st.just("front"), st.lists(_priorities, max_size=4)),
        st.tuples(st.just("back"), st.tuples(_priorities, st.integers(0, 1 << 36))),
        st.tuples(st.just("pop"), st.integers(1, 4)),
        st.tuples(st.just("remove"), st.integers(1, 5)),
        st.tuples(st.just("drain"), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(_steps)
def test_it_behaves_as_a_sorted_list_does(steps: list[tuple[str, Any]]) -> None:
    backlog: Backlog[Ticket] = Backlog()
    model: list[Ticket] = []  # in order, by a stable sort
    fresh = itertools.count()
    sequences: dict[int, int] = {}  # in the ring, of those that were in it
    for step, argument in steps:
        if step == "append":
            ticket = Ticket(next(fresh), argument)
            backlog.append(ticket)
            model.append(ticket)
        elif step == "front":
            tickets = [Ticket(next(fresh), priority) for priority in argument]
            backlog.append_front(tickets)
            model[:0] = tickets
        elif step == "back":
            ticket, sequence = Ticket(next(fresh), argument[0]), argument[1]
            if sequence not in sequences.values():  # the ring gives each once
                sequences[ticket.n] = sequence
                backlog.put_back(ticket, sequence)
                model.append(ticket)
        elif step == "pop":
            for _ in range(min(argument, len(model))):
                assert backlog.popleft().n == model.pop(0).n
        elif step == "remove":
            gone = [ticket for ticket in model if ticket.n % argument == 0]
            model = [ticket for ticket in model if ticket.n % argument]
            assert numbers(backlog.remove_if(lambda ticket, n=argument: ticket.n % n == 0)) == numbers(gone)
        else:
            assert numbers(backlog.drain()) == numbers(model)
            model.clear()
        model.sort(key=lambda ticket: (-ticket.priority, sequences.get(ticket.n, math.inf)))
        following = backlog.peek()
        assert (following.n if following else None) == (model[0].n if model else None)
        assert len(backlog) == len(model)
        assert bool(backlog) == bool(model)
    assert numbers(backlog.drain()) == numbers(model)


# ---- other threads, and Ctrl-C ---------------------------------------------------------------------------------------


def at_bytecode(n: int, call: Callable[[], object], act: Callable[[], object]) -> bool:
    """``call()``, and ``act()`` before the n-th bytecode of the module in it; whether there were so many."""
    left = n
    acted = False

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left, acted
        if frame.f_code.co_filename != _FILE:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                acted = True
                act()
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # CPython 3.12 traces bytecodes if a frame asks before settrace
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return acted


MIXED = (0, 1, 0, -1, 1, 0)
OPERATIONS: dict[str, Callable[[Backlog[Ticket]], list[Ticket]]] = {
    "popleft": lambda backlog: [backlog.popleft()],
    "peek": lambda backlog: [backlog.peek()][1:],
    "append_front": lambda backlog: backlog.append_front([Ticket(-1)]) or [],
    "put_back": lambda backlog: backlog.put_back(Ticket(-1), 7) or [],
    "remove some": lambda backlog: backlog.remove_if(lambda ticket: ticket.n % 2 == 0),
    "remove none": lambda backlog: backlog.remove_if(lambda ticket: False),
    "drain": lambda backlog: backlog.drain(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("priority", [0, 2, -2])
@pytest.mark.parametrize("priorities", [(0, 0, 0), MIXED], ids=["plain", "mixed"])
def test_a_ticket_appended_at_any_bytecode_is_there_once(
    operation: str, priority: int, priorities: tuple[int, ...]
) -> None:
    for n in itertools.count(1):
        backlog = filled(*priorities)
        taken: list[Ticket] = []
        late = Ticket(99, priority)
        reached = at_bytecode(
            n,
            lambda backlog=backlog, taken=taken: taken.extend(OPERATIONS[operation](backlog)),
            lambda backlog=backlog, late=late: backlog.append(late),
        )
        if not reached:
            backlog.append(late)
        left = backlog.drain()
        front = [-1] if operation in ("append_front", "put_back") else []
        assert sorted(numbers(taken + left)) == [*front, *range(len(priorities)), 99]
        by_priority = sorted(left, key=lambda ticket: (-ticket.priority, ticket.n))
        assert numbers(left) == numbers(by_priority), "in order, the late one last among its equals"
        if not reached:
            break
    assert n > 5, "there were bytecodes"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("priorities", [(0, 0, 0), (1, 1, 1), MIXED], ids=["plain", "ranked", "mixed"])
def test_whoever_looks_sees_what_is_there(operation: str, priorities: tuple[int, ...]) -> None:
    """The length at any bytecode of the pump's: never fewer than stay in any case."""
    staying = len(priorities) - len(OPERATIONS[operation](filled(*priorities)))
    for n in itertools.count(1):
        backlog = filled(*priorities)
        seen: list[tuple[int, bool]] = []
        if not at_bytecode(
            n,
            lambda backlog=backlog: OPERATIONS[operation](backlog),
            lambda backlog=backlog, seen=seen: seen.append((len(backlog), bool(backlog))),
        ):
            break
        [(length, some)] = seen
        assert length >= staying
        assert some or not staying


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in ("popleft", "drain")])
@pytest.mark.parametrize("priorities", [(0, 0, 0), (1, 1, 1), MIXED], ids=["plain", "ranked", "mixed"])
def test_whoever_is_overtaken_while_looking_sees_what_is_there(operation: str, priorities: tuple[int, ...]) -> None:
    """The pump's operation happens at any bytecode of the look."""
    staying = len(priorities) - len(OPERATIONS[operation](filled(*priorities)))
    for look in (len, bool):
        for n in itertools.count(1):
            backlog = filled(*priorities)
            seen: list[int] = []
            if not at_bytecode(
                n,
                lambda look=look, backlog=backlog, seen=seen: seen.append(look(backlog)),
                lambda backlog=backlog: OPERATIONS[operation](backlog),
            ):
                break
            assert seen[0] >= (staying if look is len else bool(staying))


@pytest.mark.parametrize("priority", [0, 3])
def test_an_interrupted_append_leaves_all_well(priority: int) -> None:
    """KeyboardInterrupt at any bytecode of ``append``: the ticket is in or not, and nothing is held."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for n in itertools.count(1):
        backlog = filled(0, 1)
        try:
            reached = at_bytecode(n, lambda backlog=backlog: backlog.append(Ticket(2, priority)), interrupt)
        except KeyboardInterrupt:
            reached = True
        backlog.append(Ticket(3, priority))
        found = numbers(backlog.drain())
        assert sorted(found) in ([0, 1, 3], [0, 1, 2, 3])
        if not reached:
            break
    assert n > 3, "there were bytecodes to interrupt"


def test_many_threads_append_and_the_pump_pops() -> None:
    """Nothing is lost, nothing comes twice, and each thread's tickets of a priority stay in order."""
    n_threads, n_each = 4, 3_000
    backlog: Backlog[Ticket] = Backlog()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def append_all(thread: int) -> None:
        for i in range(n_each):
            backlog.append(Ticket(thread * n_each + i, (i * 7 + thread) % 5 - 2 if i % 3 else 0))

    threads = [threading.Thread(target=append_all, args=(thread,)) for thread in range(n_threads)]
    found: list[Ticket] = []
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or backlog:
            if backlog:
                found.append(backlog.popleft())
            if len(found) % 50 == 1:
                backlog.append_front([found.pop()])
                assert backlog.remove_if(lambda ticket: ticket.n < 0) == []
                backlog.append_front(backlog.remove_if(lambda ticket: ticket.n % 11 == 0))
                found.append(backlog.popleft())
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join(WATCHDOG_S)
    assert sorted(numbers(found)) == list(range(n_threads * n_each))


def test_those_who_drain_at_once_share_the_tickets() -> None:
    for n in itertools.count(1):
        backlog = filled(*MIXED)
        backlog.peek()  # some are ranked by now, and some arrive
        backlog.append(Ticket(len(MIXED), 1))
        drained: list[Ticket] = []
        reached = at_bytecode(
            n,
            lambda backlog=backlog, drained=drained: drained.extend(backlog.drain()),
            lambda backlog=backlog, drained=drained: drained.extend(backlog.drain()),
        )
        assert sorted(numbers(drained)) == list(range(len(MIXED) + 1))
        assert not backlog
        if not reached:
            break
