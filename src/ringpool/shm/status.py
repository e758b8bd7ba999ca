"""The file status table: which process does what with which file. For processes that know nothing but its name.

    with FileStatusTable("nightly", capacity=65_536) as table:      create or attach
        if table.claim(path):                                       of all processes, one
            with table.processing(other, timeout_s=60):             waits for its turn; DONE or ERROR at the end
                ...

                             claim                set DONE, ERROR
    missing, AVAILABLE ----------------> held -------------------> DONE, ERROR
             ^                          LOCKED, PROCESSING             |
             |            release          |  ^        claim(take=...) |
             +-----------------------------+  +------------------------+

A held path belongs to its owner, a process: pid and start time. Any thread of it may change the entry; others may once
the owner is proven dead (then it reads as ``stale``), and never because time has passed. A forked child is another
owner. A path is a name here: its bytes are compared, and no file is looked at.

Every operation is one section under the table's robust mutex, reads too: a section takes a few microseconds, of which
the mutex is 0.2. So an entry is read as it was at one moment, and a process that is killed in the midst of an operation
leaves it done or not done (``entries``). /proc is asked about an owner outside of the mutex: an identity that is proven
dead stays dead, so the section need only compare it.

Waiting is sleeping in poll, on a FIFO that a release rings and on the owner's pidfd (``waiting``, ``bells``).
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from types import TracebackType
from typing import NamedTuple, TypeAlias

from ringpool.errors import StatusHeldError, StatusStepError, StatusTableFullError, words_of
from ringpool.shm import bells, owner, tables
from ringpool.shm.entries import CONTENT_BYTES, HELD, STATE_MASK, STEPS, Entries, FileState, Row, rows_of
from ringpool.shm.owner import Owner
from ringpool.shm.waiting import Wait, failed

__all__ = ["HELD", "STEPS", "FileState", "FileStatus", "FileStatusTable", "Owner", "unlink_status_table"]

AnyPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"
CAPACITY = 65_536
PATH_BYTES = 2 * CONTENT_BYTES
NOT_HELD = frozenset(FileState) - HELD
DETAIL_MAX = 500  # characters of an exception that ``processing`` keeps
_POLL_MAX_S = 1e6  # poll(2) takes an int of milliseconds
_SOURCES = {wanted: frozenset(state for state in FileState if wanted in STEPS[state]) | {None} for wanted in FileState}


class FileStatus(NamedTuple):
    """What a table says about a path.

    ``owner``: the process that holds it, or that gave it its state. ``since_s``: when, in seconds since the epoch.
    ``stale``: it is held, and its owner is dead. ``detail``: what was said with the state.
    """

    path: str
    state: FileState
    owner: Owner
    since_s: float
    stale: bool
    detail: str

    @property
    def pid(self) -> int:
        """The owner's pid."""
        return self.owner.pid


class _Obstacle(NamedTuple):
    """Why a path was not changed: its state (None: it is not there), and who holds it where that is a held one."""

    state: FileState | None
    owner: Owner


class FileStatusTable:
    """The table called ``name``, of this user: created where there is none, else attached.

    ``capacity``: how many paths it has room for. ``path_bytes``: room for the bytes of an average path and its detail;
    single ones may be of any length. Both count for the process that creates it; one that attaches may leave
    ``capacity`` out, and gets ``ValueError`` where it names another. Memory: at most 80 bytes a path, and 128 for each
    120 of ``path_bytes``, all of it allocated at creation.

    Raises ``SharedMemoryFullError``, or the ``SegmentError`` that says why what stands there cannot be used
    (``unlink_status_table`` removes it). A table outlives its processes, until ``unlink`` or a reboot. Usable from
    threads and after a fork; pickled, it is attached by its name. Any operation may raise ``SegmentMissingError`` once
    the table was unlinked. Waiting, and waking those who wait, takes a descriptor; without one they raise
    ``FileOperationError``, and nothing was changed.
    """

    def __init__(self, name: str, capacity: int | None = None, *, path_bytes: int = PATH_BYTES) -> None:
        wanted = CAPACITY if capacity is None else capacity
        chunks = wanted * max(1, -(-path_bytes // CONTENT_BYTES))
        self._use(tables.create_or_attach(name, wanted, chunks))
        if capacity not in (None, self.capacity):
            self.close()
            raise ValueError(f"status table {name} was made with capacity={self.capacity:,}, not {capacity:,}")

    @classmethod
    def attach(cls, name: str) -> FileStatusTable:
        """The table of that name. Raises ``SegmentMissingError`` where there is none, and other ``SegmentError``s."""
        table = cls.__new__(cls)
        table._use(tables.attach(name))
        return table

    def _use(self, entries: Entries) -> None:
        self._open: Entries | None = entries
        self._bells = bells.directory_of(entries.segment, entries.header.uuid)
        self.name = entries.table
        self.capacity = entries.header.capacity
        self._owner, self._forks = owner.this_process(), owner.forks()

    @property
    def _entries(self) -> Entries:
        if self._open is None:
            raise ValueError(f"status table {self.name} is closed")
        return self._open

    def __reduce__(self) -> tuple[Callable[[str], FileStatusTable], tuple[str]]:
        return FileStatusTable.attach, (self.name,)

    def __repr__(self) -> str:
        return f"FileStatusTable({self.name!r}, capacity={self.capacity})"

    def __enter__(self) -> FileStatusTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach this object. What the process holds stays held as long as the process lives."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def unlink(self) -> None:
        """Remove the table, for everybody: all who use it or wait get ``SegmentMissingError``, and whoever opens it
        gets a new one.
        """
        tables.unlink(self._entries)

    # ---- writing

    def set(self, path: AnyPath, state: FileState, detail: str = "") -> None:
        """Give ``path`` a state; with ``LOCKED`` or ``PROCESSING`` it is this process's from here on.

        Raises ``StatusHeldError`` where another living process has it, ``StatusStepError`` where the state does not
        follow from the present one, ``StatusTableFullError``.
        """
        obstacle = self._write(path, FileState(state), detail, _SOURCES[FileState(state)])
        if obstacle is not None:
            raise _refusal(path, obstacle, FileState(state).name)

    def claim(
        self,
        path: AnyPath,
        *,
        state: FileState = FileState.PROCESSING,
        take: Collection[FileState] = (FileState.AVAILABLE,),
        detail: str = "",
    ) -> bool:
        """Make ``path`` this process's; of all who try at once, one gets True.

        It is to be had where it is missing, stale, or in a state of ``take``: name ``DONE`` or ``ERROR`` there to do
        it again. False for a path that a living process holds, this one included. Raises ``StatusTableFullError``.
        """
        if state not in HELD or not NOT_HELD.issuperset(take):
            raise ValueError("a claim makes a path LOCKED or PROCESSING, and takes it from the other states")
        return self._write(path, state, detail, {None, *take}) is None

    def release(self, path: AnyPath, detail: str = "") -> None:
        """Make a path that this process, or a dead one, holds ``AVAILABLE``, and wake those who wait.

        Raises ``StatusHeldError`` where another living process has it, ``StatusStepError`` where nobody has.
        """
        obstacle = self._write(path, FileState.AVAILABLE, detail, HELD)
        if obstacle is not None:
            raise _refusal(path, obstacle, FileState.AVAILABLE.name)

    def remove(self, path: AnyPath) -> bool:
        """Forget ``path``; whether it was there. Raises ``StatusHeldError`` where another living process has it."""
        obstacle = self._write(path, None, "", frozenset(FileState))
        if obstacle is not None and obstacle.state is not None:
            raise _refusal(path, obstacle, "missing")
        return obstacle is None

    @contextlib.contextmanager
    def processing(
        self, path: AnyPath, *, take: Collection[FileState] = NOT_HELD, timeout_s: float | None = 0.0
    ) -> Generator[None]:
        """Have ``path``, as ``PROCESSING``, for the block. Then it is ``DONE``; after an exception ``ERROR``, with the
        exception in words; after a ``KeyboardInterrupt`` or the like ``AVAILABLE``. What the block itself has made of
        it stays.

        ``timeout_s``: how long to wait for another owner, None for ever. Raises ``StatusTimeoutError``, and
        ``StatusStepError`` where its state is not among ``take``: name ``AVAILABLE`` alone to do each path once.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self.claim(path, take=take):
            status = self.wait_available(path, max(0.0, deadline_s - time.monotonic()))
            if status is not None and not status.stale and status.state not in {*take, *HELD}:
                raise StatusStepError(status.path, status.state.name, FileState.PROCESSING.name)
        try:
            yield
        except Exception as error:
            self._end(path, FileState.ERROR, f"{type(error).__name__}: {words_of(error)}"[:DETAIL_MAX])
            raise
        except BaseException:
            self._end(path, FileState.AVAILABLE, "")
            raise
        self._end(path, FileState.DONE, "")

    def _end(self, path: AnyPath, state: FileState, detail: str) -> None:
        """Give a path that is still this process's its last state; where there is no room for words, without."""
        try:
            self._write(path, state, detail, HELD)
        except StatusTableFullError:
            self._write(path, state, "", HELD)

    def _write(
        self, path: AnyPath, wanted: FileState | None, detail: str, sources: Collection[FileState | None]
    ) -> _Obstacle | None:
        """Every change of an entry: to ``wanted`` (None: away), from a state in ``sources`` (None: missing).

        A held one only where its owner is this process, or dead. What is in the way, if anything is.
        """
        entries, key, me = self._entries, _key(path), self._me()
        digest, words = entries.hash_of(key), detail.encode("utf-8", "surrogatepass")
        dead: Owner | None = None

        def section() -> _Obstacle | None:
            found = entries.find(key, digest)
            state, holder = (entries.state(found.base), entries.owner(found.base)) if found.base else (None, me)
            if not (state in HELD and holder == dead) and (state not in sources or (state in HELD and holder != me)):
                return _Obstacle(state, holder)
            if found.base and wanted not in HELD and entries.is_waited(found.base):
                bells.ring(self._bells, digest)
            if wanted is None:
                entries.remove(found)
            elif not found.base:
                entries.insert(found, digest, Row(key, wanted, me, time.time_ns(), words))
            else:
                goes_on = state == wanted and holder == me
                since_ns = entries.since_ns(found.base) if goes_on else time.time_ns()
                entries.update(found.base, Row(key, wanted, me, since_ns, words))
            return None

        try:
            while (obstacle := entries.run(section)) is not None:
                if obstacle.state not in HELD or obstacle.owner == me or obstacle.owner.alive:
                    break
                dead = obstacle.owner
        except OSError as error:
            raise failed(key, "wake those who wait for it", error) from error
        return obstacle

    def _me(self) -> Owner:
        """This process, which may be a fork of the one that made this object."""
        if self._forks != owner.forks():  # not the pid: a fork of a fork may have that of the first
            self._owner, self._forks = owner.this_process(), owner.forks()
        return self._owner

    # ---- reading

    def get(self, path: AnyPath) -> FileStatus | None:
        """What is known of ``path``; None where it is not in the table."""
        row = self._row(_key(path))
        return None if row is None else _status_of(row, self._is_alive)

    def _row(self, key: bytes) -> Row | None:
        entries = self._entries
        digest = entries.hash_of(key)

        def section() -> Row | None:
            base = entries.find(key, digest).base
            return entries.row(base) if base else None

        return entries.run(section)

    def _is_alive(self, process: Owner) -> bool:
        return process == self._me() or process.alive

    def snapshot(self) -> list[FileStatus]:
        """All paths as they were at one moment, in no order. Others wait while it copies: 0.3 ms per 10,000."""
        lives: dict[Owner, bool] = {}

        def is_alive(process: Owner) -> bool:
            if process not in lives:
                lives[process] = self._is_alive(process)
            return lives[process]

        return [_status_of(row, is_alive) for row in rows_of(*self._entries.run(self._entries.copy))]

    def counts(self) -> dict[FileState, int]:
        """How many paths are in each state, at one moment. Held ones count whether their owner lives or not."""
        found = Counter(word & STATE_MASK for word in self._entries.run(self._entries.states))
        return {state: found[state] for state in FileState}

    def __iter__(self) -> Iterator[FileStatus]:
        return iter(self.snapshot())

    def __len__(self) -> int:
        return self._entries.run(self._entries.n_entries)

    def __contains__(self, path: AnyPath) -> bool:
        return self._row(_key(path)) is not None

    # ---- waiting

    def wait_available(self, path: AnyPath, timeout_s: float | None = None) -> FileStatus | None:
        """Sleep until nobody holds ``path``: it was released, has ended, was removed, or its owner has died.

        What it was then, as ``get`` says it. Nothing is reserved: ``claim`` it, and wait again where somebody was
        faster. ``timeout_s`` None: for ever. Raises ``StatusTimeoutError``, ``SegmentMissingError`` where the table is
        unlinked meanwhile, ``FileOperationError`` where there is no descriptor left.
        """
        with Wait(self._entries, _key(path), timeout_s) as wait:
            while wait.begin():
                sleep = select.poll()
                for fd in wait.descriptors:
                    sleep.register(fd, select.POLLIN)
                sleep.poll(None if math.isinf(wait.left_s) else math.ceil(min(wait.left_s, _POLL_MAX_S) * 1000))
        return self.get(path)

    async def wait_available_async(self, path: AnyPath, timeout_s: float | None = None) -> FileStatus | None:
        """``wait_available`` for a coroutine; may be cancelled."""
        import asyncio  # here: it takes longer to import than all the rest

        loop = asyncio.get_running_loop()
        with Wait(self._entries, _key(path), timeout_s) as wait:
            while wait.begin():
                woken = asyncio.Event()
                for fd in wait.descriptors:
                    loop.add_reader(fd, woken.set)
                try:
                    async with asyncio.timeout(None if math.isinf(wait.left_s) else wait.left_s):
                        await woken.wait()
                except TimeoutError:
                    pass  # ``begin`` looks once more, and then says so
                finally:
                    for fd in wait.descriptors:
                        loop.remove_reader(fd)
        return self.get(path)


def unlink_status_table(name: str) -> bool:
    """Remove the table of that name, whatever its condition; whether there was one.

    Also what cannot be attached, because another version, boot or pid namespace has left it.
    """
    return tables.unlink_by_name(name)


def _key(path: AnyPath) -> bytes:
    key = os.fsencode(path)
    if not key:
        raise ValueError("a path has at least one character")
    return key


def _status_of(row: Row, is_alive: Callable[[Owner], bool]) -> FileStatus:
    stale = row.state in HELD and not is_alive(row.owner)
    detail = row.detail.decode("utf-8", "surrogatepass")
    return FileStatus(os.fsdecode(row.path), row.state, row.owner, row.since_ns / 1e9, stale, detail)


def _refusal(path: AnyPath, obstacle: _Obstacle, wanted: str) -> StatusHeldError | StatusStepError:
    state = "missing" if obstacle.state is None else obstacle.state.name
    if obstacle.state in HELD:
        return StatusHeldError(os.fsdecode(path), state, obstacle.owner.pid)
    return StatusStepError(os.fsdecode(path), state, wanted)
