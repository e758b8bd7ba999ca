"""The entries: never half changed, room that is used again, and a layout that is as its table says."""

from __future__ import annotations

import gc
import mmap
import random
import re
import struct
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from tests.crash.opcodes import Bytecodes, interrupt_before
from tests.shm import child_status
from tests.shm.child_status import audit, path_of, table_name
from tests.workers.files.child import Child

from ringpool.errors import (
    StatusReentryError,
    StatusTableFullError,
)
from ringpool.shm import entries as layout, lock
from ringpool.shm.status import FileState, FileStatusTable

# ---- full, and room that is used again -------------------------------------------------------------------------------


def test_a_full_table_is_an_error_that_changes_nothing(name: str) -> None:
    with FileStatusTable(name, 3) as table:
        for i in range(3):
            assert table.claim(f"{i}")
        before = sorted(table)
        with pytest.raises(
            StatusTableFullError, match=f"{name}, made for 3 paths, is full: every entry is in use; remo"
        ):
            table.claim("3")
        assert sorted(table) == before
        assert not table.claim("1")
        table.remove("1")
        assert table.claim("3")
        assert len(audit(table)) == 3


def test_too_many_bytes_are_an_error_that_changes_nothing(name: str) -> None:
    with FileStatusTable(name, 4, path_bytes=120) as table:
        table.set("a", FileState.DONE, "x")
        before = audit(table)
        for change in (
            lambda: table.set("p" * 481, FileState.DONE),
            lambda: table.set("b", FileState.DONE, "x" * 120 * 2),
            lambda: table.set("a", FileState.DONE, "x" * 120 * 3),
        ):
            with pytest.raises(StatusTableFullError, match=r"bytes more do not fit into its 480; "):
                change()
            assert audit(table) == before
        table.set("b" * 240, FileState.DONE)


def test_room_of_paths_and_details_is_used_again(name: str) -> None:
    lengths = (1, 119, 120, 121, 240, 241, 700)
    kept: list[str] = []
    with FileStatusTable(name, 4, path_bytes=1000) as table:
        for round_ in range(300):
            path = f"{round_:03}" * (lengths[round_ % 7] // 3 + 1)
            table.set(path, FileState.PROCESSING, "d" * lengths[round_ * 3 % 7])
            table.set(path, FileState.DONE, "e" * lengths[round_ * 5 % 7])
            kept.append(path)
            if len(kept) > 2:
                assert table.remove(kept.pop(0))
            if round_ % 50 == 0:
                audit(table)


def churn(table: FileStatusTable, n: int) -> None:
    """``n`` times a path more and a path less, of changing lengths, at three quarters of the capacity."""
    kept: list[str] = []
    draw = random.Random(n)
    for i in range(n):
        if len(kept) >= 48:
            at = draw.randrange(len(kept))
            kept[at], kept[-1] = kept[-1], kept[at]
            assert table.remove(kept.pop())
        kept.append(f"{i:x}/" * draw.randrange(1, 30))
        table.set(kept[-1], FileState.DONE)
    assert len(audit(table)) == len(kept)


@pytest.mark.parametrize(
    "n", [pytest.param(20_000, id="sample"), pytest.param(1_000_000, id="full", marks=(pytest.mark.crash,))]
)
def test_churn_needs_no_more_room_and_no_more_time(n: int, name: str) -> None:
    with FileStatusTable(name, 64, path_bytes=200) as table:
        size_bytes = path_of(name).stat().st_size
        churn(table, n)
        assert path_of(name).stat().st_size == size_bytes
        header = table._entries.header
        assert table._entries.words[layout.ENTRIES_TOUCHED_AT >> 3] <= 49  # slots were used again, not fresh ones
        longest = max(
            sum(1 for row in audit(table) if table._entries.hash_of(row) & header.buckets - 1 == bucket)
            for bucket in range(header.buckets)
        )
        assert longest < 10


def test_paths_of_one_hash_are_told_apart(table: FileStatusTable) -> None:
    table._entries.hash_of = lambda path: 7  # type: ignore[method-assign]
    paths = [f"{i}" * (i * 37 % 300 + 1) for i in range(20)]
    for path in paths:
        assert table.claim(path)
    for path in paths[::2]:
        table.remove(path)
    assert {status.path for status in table} == set(paths[1::2])
    assert [path in table for path in paths] == [False, True] * 10
    audit(table)
    for path in paths[1::2]:
        table.remove(path)
    del table._entries.hash_of


# ---- no operation is ever half done ----------------------------------------------------------------------------------


def test_no_torn_entry_is_read_while_another_process_writes(table: FileStatusTable) -> None:
    seen: set[int] = set()

    def look() -> bool:
        status = table.get("/torn")
        parts = status.detail.split(":")[:-1] if status is not None else []
        assert len(set(parts)) <= 1
        if status is not None and parts:
            n = int(parts[0])
            assert len(parts) == abs(n) % 200
            assert status.state == (FileState.PROCESSING if n > 0 else FileState.DONE)
            seen.add(n)
        return len(seen) > 200

    with Child(child_status.churn, table.name) as child:
        child.wait_for("ready")
        deadline_s = time.monotonic() + 30
        while not look():
            assert time.monotonic() < deadline_s
        child.kill()
    audit(table)


@pytest.mark.parametrize("stride", [pytest.param(7, id="sample"), pytest.param(1, id="full", marks=pytest.mark.crash)])
def test_an_operation_that_is_interrupted_at_any_bytecode_is_done_or_not_done(stride: int, name: str) -> None:
    def contents(table: FileStatusTable) -> dict[bytes, tuple[FileState, bytes]]:
        return {path: (row.state, row.detail) for path, row in audit(table).items()}

    def prepare(table: FileStatusTable) -> None:
        for status in table:
            table.remove(status.path)
        table.set("a" * 200, FileState.PROCESSING, "x" * 200)
        table.set("b", FileState.AVAILABLE)

    operations: list[Callable[[FileStatusTable], object]] = [
        lambda table: table.set("c" * 300, FileState.DONE, "y" * 130),
        lambda table: table.set("a" * 200, FileState.DONE, "z" * 300),
        lambda table: table.claim("b"),
        lambda table: table.remove("a" * 200),
    ]
    with FileStatusTable(name, 8) as table:
        for operation in operations:
            prepare(table)
            before = contents(table)
            operation(table)
            after = contents(table)
            at, interrupted = random.randrange(stride), True
            while interrupted:
                at, interrupted = at + stride, False
                prepare(table)
                try:
                    with Bytecodes(interrupt_before(at)):
                        operation(table)
                except KeyboardInterrupt:
                    interrupted = True
                assert contents(table) in (before, after), f"interrupted before bytecode {at}"
            assert at > 100


@pytest.mark.parametrize("by", ["the same object", "another one"])
def test_a_signal_handler_in_the_midst_of_an_operation_is_refused_and_harms_nothing(
    by: str, table: FileStatusTable
) -> None:
    refused, handlers = 0, table if by == "the same object" else FileStatusTable.attach(table.name)

    def nested(n: int) -> None:
        nonlocal refused
        bytecodes.paused = True
        try:
            handlers.set("nested", FileState.DONE)
        except StatusReentryError:
            refused += 1
        bytecodes.paused = False

    with Bytecodes(nested) as bytecodes:
        table.set("a", FileState.PROCESSING, "x")
    assert refused > 100
    assert bytecodes.n > refused  # before and after the section it works
    assert set(audit(table)) == {b"a", b"nested"}


def test_a_mutex_that_an_exception_left_held_is_taken_over_by_the_next_operation(table: FileStatusTable) -> None:
    table._entries.lock.acquire()
    assert table.claim("a")
    assert not table._entries.lock.held_by_this_thread


# ---- the layout ------------------------------------------------------------------------------------------------------

SIZES = {"Q": 8, "I": 4, "H": 2, "B": 1}
Line = tuple[int, str, str]


def lines_of(section: str) -> list[Line]:
    text = (layout.__doc__ or "").partition(f"    {section} ")[2] or (layout.__doc__ or "").partition(
        f"    {section}\n"
    )[2]
    found: list[Line] = []
    for line in text.splitlines()[0 if text.startswith("    0x") else 1 :]:
        row = re.match(r"    (0x[0-9a-f]+) +([QIHB]|\d+s) +(\w+)", line)
        if row is None:
            break
        found.append((int(row[1], 16), row[2], row[3]))
    return found


def size_of(kind: str) -> int:
    return SIZES.get(kind) or int(kind.removesuffix("s"))


def fields_of(form: struct.Struct, names: tuple[str, ...]) -> list[Line]:
    kinds: list[str] = []
    for count, kind in re.findall(r"(\d*)([QIHBs])", form.format):
        kinds += [f"{count}s"] if kind == "s" else [kind] * int(count or 1)
    at, found = 0, list[Line]()
    for kind, field in zip(kinds, names, strict=True):
        found.append((at, kind, field))
        at += size_of(kind)
    return found


def test_the_layout_is_as_its_table_says() -> None:
    *header, checksum = lines_of("HEADER")
    assert header == fields_of(layout.HEADER, layout.TableHeader._fields)
    assert checksum == (layout.CRC_AT, "Q", "crc32")
    places = {
        "mutex": layout.MUTEX_AT,
        "unlinked": layout.UNLINKED_AT,
        "log_pairs": layout.LOG_PAIRS_AT,
        "n_entries": layout.N_ENTRIES_AT,
        "entries_touched": layout.ENTRIES_TOUCHED_AT,
        "free_entry": layout.FREE_ENTRY_AT,
        "chunks_touched": layout.CHUNKS_TOUCHED_AT,
        "free_chunk": layout.FREE_CHUNK_AT,
        "log": layout.LOG_AT,
    }
    kinds = {"mutex": "64s", "log": f"{16 * layout.LOG_PAIRS_MAX}s"}
    assert lines_of("CONTROL") == [(at, kinds.get(field, "Q"), field) for field, at in places.items()]
    names = ("hash", "next", "chunks", "lengths", "state", "pid", "start", "since_ns")
    words = ("E_HASH", "E_NEXT", "E_CHUNKS", "E_LENGTHS", "E_STATE", "E_PID", "E_START", "E_SINCE")
    assert lines_of("ENTRY") == fields_of(layout.ENTRY, names)
    assert [getattr(layout, word) for word in words] == list(range(8))
    assert lines_of("CHUNK") == [(0, "Q", "next"), (layout.CONTENT_AT, f"{layout.CONTENT_BYTES}s", "content")]
    for section in ("HEADER", "CONTROL", "ENTRY", "CHUNK"):
        rows = lines_of(section)
        for (at, kind, field), (following, _, _) in pairwise(rows):
            assert at % min(size_of(kind), 8) == 0, field
            assert at + size_of(kind) <= following, field
    at, kind, _ = lines_of("CONTROL")[-1]
    assert at + size_of(kind) <= layout.SECTIONS_AT
    assert lock.MUTEX_BYTES <= 64


@pytest.mark.parametrize(
    "constant",
    [
        name
        for name in vars(layout)
        if re.fullmatch(r"(E_\w+|\w+_AT|LOG_PAIRS_MAX|CHUNK_BYTES|HALF|WAITED|STATE_MASK)", name)
    ],
)
def test_a_moved_place_is_another_format(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout._format_id() == layout.FORMAT_ID
    monkeypatch.setattr(layout, constant, getattr(layout, constant) + 1)
    assert layout._format_id() != layout.FORMAT_ID


@pytest.mark.parametrize("capacity", [1, 2, 3, 64, 65, 511, 512, 513, 65_536])
def test_sections_are_disjoint_and_start_on_pages(capacity: int) -> None:
    places = layout.places_of(capacity, 2 * capacity)
    ends = (places.buckets * 8, capacity * layout.ENTRY.size, 2 * capacity * layout.CHUNK_BYTES)
    starts = (places.buckets_at, places.entries_at, places.chunks_at, places.size_bytes)
    assert capacity <= places.buckets < 2 * capacity or capacity == places.buckets == 1
    for start, length, following in zip(starts, ends, starts[1:], strict=False):
        assert start % mmap.PAGESIZE == 0
        assert start + length <= following < start + length + mmap.PAGESIZE


def test_an_entry_changes_in_fewer_words_than_the_log_has() -> None:
    with table_name() as name, FileStatusTable(name, 4, path_bytes=480) as table:
        most = 0
        commit = table._entries.commit

        def count(change: dict[int, int]) -> None:
            nonlocal most
            most = max(most, len(change))
            commit(change)

        table._entries.commit = count  # type: ignore[method-assign]
        for path in ("a" * 200, "b" * 300):
            table.set(path, FileState.DONE, "x" * 250)
        table.remove("a" * 200)
        table.set("c" * 600, FileState.DONE, "y" * 300)
        table.set("c" * 600, FileState.DONE, "z" * 130)
        table.remove("c" * 600)
        assert 10 < most <= layout.LOG_PAIRS_MAX
        del table._entries.commit
        gc.collect()
