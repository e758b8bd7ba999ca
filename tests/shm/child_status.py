"""What tests of the status table share: tables that are removed, an audit of a table's bytes, and what children do."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path

from tests.workers.files.child import listen, say

from ringpool.shm import entries as layout
from ringpool.shm.entries import HALF, HALF_MASK, Entries, Row
from ringpool.shm.owner import Owner
from ringpool.shm.segment import SHM_DIRECTORY
from ringpool.shm.status import FileState, FileStatusTable, unlink_status_table
from ringpool.shm.tables import segment_of


class TableOf(FileStatusTable):
    """A table as another process sees it, which ``process`` names."""

    process: Owner

    def _me(self) -> Owner:
        return self.process


def as_owner(name: str, process: Owner) -> TableOf:
    """The table of that name, used by ``process``."""
    table = TableOf.attach(name)
    assert isinstance(table, TableOf)
    table.process = process
    return table


def path_of(name: str) -> Path:
    """The segment of the table of that name."""
    return Path(SHM_DIRECTORY, segment_of(name))


def files_of(name: str) -> list[str]:
    """What stands in ``/dev/shm`` for the table of that name, bells too."""
    segment, found = segment_of(name), list[str]()
    for file in os.listdir(SHM_DIRECTORY):
        if file == segment:
            found.append(file)
        elif file.startswith(f"{segment}@"):
            found += [file, *(f"{file}/{bell}" for bell in os.listdir(f"{SHM_DIRECTORY}/{file}"))]
    return sorted(found)


@contextlib.contextmanager
def table_name() -> Generator[str]:
    """The name of a table that does not exist; the table is removed afterwards, and nothing of it may be left."""
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield name
    finally:
        unlink_status_table(name)
    assert files_of(name) == []


def until(condition: Callable[[], object], patience_s: float = 30.0) -> None:
    """Wait for ``condition``, half a minute at most."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.0005)


def is_asleep(task: int) -> bool:
    """Whether a process, or a thread by its native id, sleeps in poll(2)."""
    with open(f"/proc/{task}/syscall", encoding="ascii") as file:
        return file.read().split()[0] in ("7", "271", "73")  # poll, ppoll on x86-64; ppoll on aarch64


def audit(table: FileStatusTable) -> dict[bytes, Row]:
    """The rows of a table, after its bytes were checked: each entry and each chunk is in one place, none is lost."""
    entries = table._entries
    return entries.run(lambda: _audit(entries))


def _audit(entries: Entries) -> dict[bytes, Row]:
    words, header = entries.words, entries.header
    assert words[layout.LOG_PAIRS_AT >> 3] == 0
    rows: dict[bytes, Row] = {}
    used: list[int] = []
    chunks: list[int] = []
    for bucket in range(header.buckets):
        number = words[(header.buckets_at >> 3) + bucket]
        while number:
            used.append(number)
            assert len(used) <= header.capacity, "a bucket without an end"
            base = (header.entries_at >> 3) + (number - 1) * 8
            row = entries.row(base)
            assert row.path not in rows
            rows[row.path] = row
            digest = entries.hash_of(row.path)
            assert words[base + layout.E_HASH] == digest
            assert digest & header.buckets - 1 == bucket
            firsts, lengths = words[base + layout.E_CHUNKS], words[base + layout.E_LENGTHS]
            chunks += chain(entries, firsts & HALF_MASK, lengths & HALF_MASK)
            chunks += chain(entries, firsts >> HALF, lengths >> HALF)
            number = words[base + layout.E_NEXT]
    assert words[layout.N_ENTRIES_AT >> 3] == len(used)
    free = words[layout.FREE_ENTRY_AT >> 3]
    while free:
        used.append(free)
        assert len(used) <= header.capacity, "free entries without an end"
        base = (header.entries_at >> 3) + (free - 1) * 8
        assert words[base + layout.E_STATE] == 0
        free = words[base + layout.E_NEXT]
    assert sorted(used) == list(range(1, words[layout.ENTRIES_TOUCHED_AT >> 3] + 1)), (
        "an entry is lost, or in two places"
    )
    free = words[layout.FREE_CHUNK_AT >> 3]
    while free:
        chunks.append(free)
        assert len(chunks) <= header.chunks, "free chunks without an end"
        free = words[header.chunks_at + (free - 1) * layout.CHUNK_BYTES >> 3]
    assert sorted(chunks) == list(range(1, words[layout.CHUNKS_TOUCHED_AT >> 3] + 1)), (
        "a chunk is lost, or in two places"
    )
    return rows


def chain(entries: Entries, number: int, n_bytes: int) -> list[int]:
    """The chunks of a content."""
    found: list[int] = []
    while len(found) * layout.CONTENT_BYTES < n_bytes:
        found.append(number)
        number = entries.words[entries.header.chunks_at + (number - 1) * layout.CHUNK_BYTES >> 3]
    return found


# ---- what children do ------------------------------------------------------------------------------------------------


def hold(name: str, path: str, state: str = "PROCESSING") -> None:
    with FileStatusTable(name) as table:
        table.set(path, FileState[state])
        say("held")
        listen()
        table.release(path)
        say("released")
        listen()


def wait(name: str, path: str) -> None:
    with FileStatusTable(name) as table:
        say("waiting")
        status = table.wait_available(path, 60)
        say(
            f"{'missing' if status is None else status.state.name} {'stale' if status and status.stale else ''}".strip()
        )


def claim_all(name: str, n: str) -> None:
    """Claim path after path, from a place of one's own on; then say which were got."""
    n_paths = int(n)
    with FileStatusTable(name, 16_384) as table:
        say("ready")
        listen()
        first = os.getpid() * 7919 % n_paths
        got = [i for i in range(first, first + n_paths) if table.claim(f"/in/{i % n_paths}")]
        for i in got:
            table.set(f"/in/{i % n_paths}", FileState.DONE)
        say(" ".join(str(i % n_paths) for i in got))


def open_at_once(name: str, capacity: str) -> None:
    say("ready")
    listen()
    with FileStatusTable(name, int(capacity)) as table:
        table.claim(f"/of/{os.getpid()}")
        say(table._entries.header.uuid.hex())
        listen()


def churn(name: str) -> None:
    """Change one path without end; every state has its own detail and its own length."""
    with FileStatusTable(name) as table:
        say("ready")
        n = 0
        while True:
            n += 1
            table.set("/torn", FileState.PROCESSING, f"{n}:" * (n % 200))
            table.set("/torn", FileState.DONE, f"{-n}:" * (n % 200))
            if n % 3 == 0:
                table.remove("/torn")


def hold_the_mutex_and_die(name: str) -> None:
    with FileStatusTable(name) as table:
        table._entries.run(lambda: os.kill(os.getpid(), signal.SIGKILL))
