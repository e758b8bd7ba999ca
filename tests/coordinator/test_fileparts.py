"""Parts that are filled while they wait: whichever way caller and pump meet, each path is in exactly one part."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import msgspec
import pytest
from tests.coordinator.program import WATCHDOG_S

from ringpool.coordinator import fileinbox
from ringpool.coordinator.fileinbox import OPEN, FilePart

MORE = b"the last one"


def at_bytecode(n: int, act: Callable[[], None], body: Callable[[], Any]) -> tuple[Any, int]:
    """Run ``body``; before its n-th bytecode in ``fileinbox``, ``act``. What it returned, and how many it had."""
    met = 0

    def step(frame: FrameType, event: str, _: object) -> Any:
        nonlocal met
        if frame.f_code.co_filename != fileinbox.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            met += 1
            if met == n:
                act()
        return step

    former = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # CPython 3.12 traces bytecodes if a frame asks before settrace
    sys.settrace(step)
    try:
        return body(), met
    finally:
        sys.settrace(former)


def items_of(part: FilePart) -> list[bytes]:
    assert part.end != OPEN
    items = msgspec.msgpack.decode(part.items)
    assert len(items) == part.n == part.end
    return items


def meet_in_add(n: int) -> int:
    """The pump seals the part before the n-th bytecode of ``add``."""
    part = FilePart.begin(7, b"first")
    is_in, n_met = at_bytecode(n, part.seal, lambda: part.add(MORE))
    if n > n_met:
        part.seal()
    assert items_of(part) == ([b"first", MORE] if is_in else [b"first"])
    return n_met


def meet_in_seal(n: int) -> int:
    """The caller adds, in another thread, from before the n-th bytecode of ``seal`` on."""
    part = FilePart.begin(7, b"first")
    found: list[bool] = []
    caller = threading.Thread(target=lambda: found.append(part.add(MORE)))
    _, n_met = at_bytecode(n, lambda: begin(caller, found), part.seal)
    if n > n_met:
        caller.start()
    caller.join(WATCHDOG_S)
    assert items_of(part) == ([b"first", MORE] if found == [True] else [b"first"])
    assert len(found) == 1
    return n_met


def begin(caller: threading.Thread, found: list[bool]) -> None:
    """Start the thread, and let it run until it is done or waits for the other."""
    caller.start()
    caller.join(0.01)


@pytest.mark.parametrize("meet", [meet_in_add, meet_in_seal])
def test_a_path_that_is_added_while_the_part_is_sealed_is_in_it_or_comes_too_late(meet: Callable[[int], int]) -> None:
    n = meet(1 << 30)
    assert 10 <= n < 100
    for at in range(1, n + 1):
        meet(at)


def test_an_open_part_has_as_many_items_as_were_added() -> None:
    part = FilePart.begin(3, b"a")
    assert (part.index, part.first, part.n) == (3, 0, 1)
    assert part.add(b"b")
    assert part.n == 2
    part.seal()
    assert part.n == 2
    assert not part.add(b"c")
    assert items_of(part) == [b"a", b"b"]
    assert part.of(1, 2, 1).n == 1
    assert FilePart.begin(0, b"x").loose == [b"x"], "no two share theirs"
