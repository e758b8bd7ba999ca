"""The layout: its table is what the code does, its words are aligned, and a changed struct is another format."""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, strategies as st

from ringpool.shm import layout
from ringpool.shm.layout import STATUS_STEPS, Status

SIZES = {"Q": 8, "I": 4, "H": 2, "B": 1}
CONSTANTS = (
    "MUTEX_AT",
    "VERSION_WORD_AT",
    "BLOCK_A_AT",
    "BLOCK_STRIDE",
    "DONE_HEAD_AT",
    "WORKERS_AT",
    "WORKER_BYTES",
    "RECORD_BYTES",
    "PAYLOAD_AT",
    "SLOT_BITS",
    "ATTEMPT_BITS",
    "SEQUENCE_BITS",
    "STATUS_BITS",
    "LENGTH_BITS",
    "CLAIM_SHIFT",
    "VECTOR_ITEMS_AT",
    "CHUNK_BYTES",
)


class Row(NamedTuple):
    """A line of the table."""

    at: int
    kind: str
    name: str

    @property
    def n_bytes(self) -> int:
        return SIZES.get(self.kind) or int(self.kind.removesuffix("s"))


def table() -> dict[str, list[Row]]:
    """The docstring's table by section; the fixed places of the cursors are FIXED, the block itself is CURSORS."""
    sections: dict[str, list[Row]] = {}
    rows: list[Row] = []
    for line in (layout.__doc__ or "").splitlines():
        if heading := re.match(r"    ([A-Z]+)(?:  .*)?$", line):
            name = "FIXED" if heading[1] == "CURSORS" and "CURSORS" not in sections and "FIXED" not in sections else ""
            rows = sections.setdefault(name or heading[1], [])
        elif row := re.match(r"    (0x[0-9a-f]+) +([QIHB]|\d+s) +(\w+)", line):
            rows.append(Row(int(row[1], 16), row[2], row[3]))
    return sections


def rows_of(form: struct.Struct, names: tuple[str, ...], at: int = 0) -> list[Row]:
    """The rows that a struct at offset ``at`` makes, when its fields have those names."""
    assert form.format.startswith("<")
    kinds: list[str] = []
    for count, kind in re.findall(r"(\d*)([QIHBs])", form.format):
        kinds += [f"{count}s"] if kind == "s" else [kind] * int(count or 1)
    rows: list[Row] = []
    for name, kind in zip(names, kinds, strict=True):
        rows.append(Row(at, kind, name))
        at += rows[-1].n_bytes
    return rows


def test_the_table_has_all_its_sections() -> None:
    assert list(table()) == ["HEADER", "FIXED", "COORDINATOR", "CURSORS", "WORKER", "TASK", "RESULT", "VECTOR"]


def test_the_header_is_as_the_table_says() -> None:
    *fields, checksum = table()["HEADER"]
    assert fields == rows_of(layout.HEADER, layout.Header._fields)
    assert checksum == (layout.CRC_AT, "Q", "crc32")
    assert checksum.at + checksum.n_bytes == layout.HEADER_BYTES
    assert layout.HEADER.size <= layout.CRC_AT


def test_the_fixed_places_are_as_the_table_says() -> None:
    block = f"{layout.CURSORS.size}s"
    assert table()["FIXED"] == [
        (layout.MUTEX_AT, f"{layout.MUTEX_BYTES_MAX}s", "mutex"),
        (layout.VERSION_WORD_AT, "Q", "version_word"),
        (layout.BLOCK_A_AT, block, "block_a"),
        (layout.BLOCK_A_AT + layout.BLOCK_STRIDE, block, "block_b"),
    ]


def test_the_coordinators_words_are_as_the_table_says() -> None:
    assert table()["COORDINATOR"] == [
        (layout.DONE_HEAD_AT, "Q", "done_head"),
        (layout.COORDINATOR_PID_AT, "Q", "coordinator_pid"),
        (layout.COORDINATOR_START_AT, "Q", "coordinator_start"),
        (layout.RUN_STATE_AT, "Q", "run_state"),
        (layout.N_REDONE_AT, "Q", "n_redone"),
        (layout.WORKERS_AT, f"{layout.WORKER_BYTES}s", "worker_0"),
    ]


def test_a_cursor_block_is_as_the_table_says() -> None:
    assert table()["CURSORS"] == rows_of(layout.CURSORS, layout.Cursors._fields)


def test_a_workers_entry_is_as_the_table_says() -> None:
    indices = {
        "pid": layout.W_PID,
        "start": layout.W_START,
        "claim": layout.W_CLAIM,
        "running": layout.W_RUNNING,
        "revoke": layout.W_REVOKE,
        "task_start_ns": layout.W_TASK_START,
        "n_tasks": layout.W_N_TASKS,
        "n_errors": layout.W_N_ERRORS,
        "busy_ns": layout.W_BUSY,
        "input": layout.W_INPUT,
    }
    assert table()["WORKER"] == [(8 * index, "Q", name) for name, index in indices.items()]
    assert table()["WORKER"] == rows_of(layout.WORKER, tuple(indices))
    assert layout.WORKER.size <= layout.WORKER_BYTES


def test_a_task_record_is_as_the_table_says() -> None:
    *head, payload = table()["TASK"]
    names = ("entry", "function", "length", "blob", "form", "cancel", "blame")
    assert head == rows_of(layout.TASK, names)
    assert head[1:-1] == rows_of(layout.TASK_READ, names[1:-1], head[1].at)
    assert (head[5].at, head[6].at) == (layout.TASK_CANCEL_AT, layout.TASK_BLAME_AT)
    assert payload == (layout.PAYLOAD_AT, f"{layout.INLINE_BYTES}s", "payload")


def test_a_result_record_is_as_the_table_says() -> None:
    word, *head, payload = table()["RESULT"]
    names = ("duration_ns", "blob_bytes", "worker", "calls", "encoding", "device", "inode")
    assert word == (0, "Q", "word")
    assert head == rows_of(layout.RESULT, names, 8)
    assert head[:5] == rows_of(layout.RESULT_HEAD, names[:5], 8)
    assert payload == (layout.PAYLOAD_AT, f"{layout.INLINE_BYTES}s", "payload")


def test_a_vectors_head_is_as_the_table_says() -> None:
    indices = {
        "progress": layout.V_PROGRESS,
        "limit": layout.V_LIMIT,
        "prefix": layout.V_PREFIX,
        "prefix_items": layout.V_PREFIX_ITEMS,
    }
    assert table()["VECTOR"] == [(8 * index, "Q", name) for name, index in indices.items()]
    assert table()["VECTOR"] == rows_of(layout.VECTOR, tuple(indices))
    assert layout.VECTOR.size <= layout.VECTOR_ITEMS_AT < layout.CHUNK_BYTES


def test_a_record_holds_its_head_and_its_payload_and_no_more() -> None:
    assert max(layout.TASK.size, 8 + layout.RESULT.size) <= layout.PAYLOAD_AT
    assert layout.PAYLOAD_AT + layout.INLINE_BYTES == layout.RECORD_BYTES
    assert layout.INLINE_BYTES <= layout.LENGTH_MASK


@pytest.mark.parametrize("section", table())
def test_fields_are_aligned_and_do_not_overlap(section: str) -> None:
    rows = table()[section]
    for row in rows:
        assert row.at % (SIZES.get(row.kind) or 8) == 0, row
    for row, following in pairwise(rows):
        assert row.at + row.n_bytes <= following.at, row


def test_the_fixed_part_of_a_segment_does_not_overlap() -> None:
    sections = table()
    rows = sections["HEADER"] + sections["FIXED"] + sections["COORDINATOR"]
    for row, following in pairwise(rows):
        assert row.at + row.n_bytes <= following.at, row


def test_the_version_word_has_a_cache_line_of_its_own() -> None:
    sections = table()
    neighbours = [row for row in sections["FIXED"] + sections["COORDINATOR"] if row.at // 64 == 0x140 // 64]
    assert [row.name for row in neighbours] == ["version_word"]


def test_the_head_of_the_table_gives_the_limits() -> None:
    assert f"W workers (at most {layout.WORKERS_MAX})" in (layout.__doc__ or "")
    assert layout.WORKERS_MAX <= 64  # ``parked`` is a bitmap in one word
    assert layout.CLAIMS_MAX <= layout.CLAIM_COUNT_MASK
    assert layout.SLOTS_MAX <= layout.SLOT_MASK


@given(
    slots=st.one_of(st.integers(1, 2000), st.integers(1, layout.SLOTS_MAX)),
    workers=st.integers(1, layout.WORKERS_MAX),
    claims_max=st.integers(1, layout.CLAIMS_MAX),
)
def test_sections_are_disjoint_and_start_on_pages(slots: int, workers: int, claims_max: int) -> None:
    places = layout.sections(slots, workers, claims_max)
    n_bytes = (workers * 2 * claims_max * 8, *(slots * 8,) * 3, *(slots * layout.RECORD_BYTES,) * 2)
    end = layout.WORKERS_AT + workers * layout.WORKER_BYTES
    for at, length in zip(places[:-1], n_bytes, strict=True):
        assert at >= end
        assert at % layout.PAGE_BYTES == 0
        assert at - end < layout.PAGE_BYTES
        end = at + length
    assert end <= places.size_bytes < end + layout.PAGE_BYTES
    assert places.size_bytes % layout.PAGE_BYTES == 0


SEQUENCES = st.integers(0, (1 << layout.SEQUENCE_BITS) - 1)
ATTEMPTS = st.integers(0, layout.ATTEMPT_MAX)
SLOTS = st.integers(0, layout.SLOTS_MAX)


@given(SEQUENCES, ATTEMPTS, SLOTS)
def test_an_entry_gives_back_what_was_put_into_it(sequence: int, attempt: int, slot: int) -> None:
    entry = layout.entry_of(sequence, attempt, slot)
    assert 0 <= entry < 1 << 64
    assert (layout.sequence_of(entry), layout.attempt_of(entry), layout.slot_of(entry)) == (sequence, attempt, slot)
    assert entry & layout.IDENTITY_MASK == layout.entry_of(sequence, attempt, 0)


@given(SEQUENCES, st.integers(0, layout.ATTEMPT_MAX - 1), SLOTS)
def test_the_next_attempt_is_one_addition(sequence: int, attempt: int, slot: int) -> None:
    entry = layout.entry_of(sequence, attempt, slot)
    assert entry + layout.ATTEMPT_ONE == layout.entry_of(sequence, attempt + 1, slot)


@given(SEQUENCES, ATTEMPTS, st.sampled_from(Status), st.integers(0, layout.INLINE_BYTES))
def test_a_result_word_gives_back_what_was_put_into_it(
    sequence: int, attempt: int, status: Status, length: int
) -> None:
    word = layout.entry_of(sequence, attempt, 0) | status << layout.STATUS_SHIFT | length
    assert (layout.sequence_of(word), layout.attempt_of(word)) == (sequence, attempt)
    assert (word & layout.STATUS_MASK) >> layout.STATUS_SHIFT == status
    assert word & layout.LENGTH_MASK == length


def test_the_parts_of_a_word_fill_it() -> None:
    assert layout.SEQUENCE_BITS + layout.ATTEMPT_BITS + layout.SLOT_BITS == 64
    assert layout.STATUS_BITS + layout.LENGTH_BITS == layout.SLOT_BITS
    assert f"entry = seq:{layout.SEQUENCE_BITS} | attempt:{layout.ATTEMPT_BITS} | slot:{layout.SLOT_BITS}" in (
        layout.__doc__ or ""
    )
    assert max(Status) < 1 << layout.STATUS_BITS


def test_every_status_has_its_steps_and_only_an_unfinished_one_goes_on() -> None:
    assert set(STATUS_STEPS) == set(Status)
    for status in set(Status) - {Status.EMPTY, Status.STAGED}:
        assert STATUS_STEPS[status] == {Status.EMPTY}


# ---- the format's identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HEADER", "CURSORS", "WORKER", "TASK", "RESULT", "VECTOR"])
def test_a_changed_struct_is_another_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    former: struct.Struct = getattr(layout, name)
    monkeypatch.setattr(layout, name, struct.Struct(former.format + "Q"))
    assert layout._format_id() != layout.FORMAT_ID


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_moved_place_is_another_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, name, getattr(layout, name) + 1)
    assert layout._format_id() != layout.FORMAT_ID


@pytest.mark.parametrize("name", ["RunState", "Status", "Encoding"])
def test_a_renumbered_code_is_another_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {member.name: member.value + 1 for member in getattr(layout, name)}
    monkeypatch.setattr(layout, name, IntEnum(name, members))
    assert layout._format_id() != layout.FORMAT_ID


def test_the_same_layout_is_the_same_format() -> None:
    assert layout._format_id() == layout.FORMAT_ID
    assert 0 < layout.FORMAT_ID < 1 << 64
