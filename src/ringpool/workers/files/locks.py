"""The lock on a path: exclusive or shared, first come first served, among threads, tasks, processes, and users of
``filelock`` on the same lock file.

    PathLock        a thread's; blocks            with PathLock(path, "shared"): ...
    AsyncPathLock   an asyncio task's             async with AsyncPathLock(path): ...      (asynclocks.py)
    LockSet         several paths', all or none   with LockSet(paths): ...

    locks.py        what users see: owners, timeouts, errors
    asynclocks.py   the same for tasks; apart, because asyncio takes longer to import than all the rest
    turns.py        from a path to held: the open lock files, the steps of an acquisition
    stripes.py      one lock file: who of this process holds and awaits it; the flock; recovery; forks
    tickets.py      the order among processes
    lockfiles.py    which lock file is a path's

    acquire   nobody of this process has it, no ticket is out, flock (not blocking) is had:   it is held
              otherwise: draw a ticket, wait for the turn
    then      is the locked file still the one at its name?   no: somebody removed .ringpool; open anew, try again
              is it empty?   no: a transaction died while it held it, and is recovered first

What holds

- An owner (a thread, a task) may take what it has once more, shared inside exclusive as well, also where others wait.
  From shared to exclusive it may not: two who wanted that would wait for each other (``LockUpgradeError``). That holds
  for all paths of a stripe: the kernel lets go of a shared flock before it takes the exclusive one.
- First come, first served: who comes while others wait goes behind them, shared or not, so neither readers nor writers
  starve. Shared ones next to each other go in together. A waiter that is stopped (SIGSTOP) and leaves a free lock
  untaken for 0.1 s is overtaken.
- The kernel frees the lock of a process that dies, and the next one has it within some 20 ms.
- Two paths may share a stripe. One owner may hold both; who holds one must not wait for somebody who wants the other.
  Who wants several takes a ``LockSet``, or takes them in order.
- Whoever removes ``.ringpool`` under a holder lets a second one in; nothing can prevent that here. Everybody who comes
  or waits after it meets on the new file.
- Users of ``filelock.FileLock`` on the lock file are excluded and exclude, but do not queue. Before version 4.2.1 it
  empties the file, or removes it, and with it the mark of a dead transaction.
- On a network file system (NFS, SMB, ...) the lock is a ``filelock.SoftReadWriteLock``, because flock is emulated there
  or holds on one machine only. Who comes first is not promised to be first there, nor that a dead holder's lock is free
  before its lease has run out (90 s); an ``AsyncPathLock`` blocks its event loop for the file operations of each try.
- A ``.ringpool`` that is made further out takes over what lies deeper. Who holds a lock at that moment excludes nobody
  who comes later; who waits meets the others on the new file. So the outermost base is to have its ``.ringpool`` first.
- A Ctrl-C, or whatever else a signal handler raises, in ``acquire`` leaves the lock free. One that comes as a ``with``
  block ends or as ``release`` begins may leave it held: Python looks for signals there, and a function can do nothing
  before it has begun. ``release`` may be called again then. ``under`` does that for whoever locks by himself
  (``FileStore``, ``ErrorLog``, ``snapshot``, tasks' outputs), as ``FileTransaction`` does: those leave nothing locked.
- A signal handler must not take a lock that the code it interrupts may be taking.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, NoReturn, Self, TypeVar

from ringpool.errors import FileOperationError, LockTimeoutError, RingpoolError
from ringpool.workers.files import lockfiles, stripes, turns
from ringpool.workers.files.holds import OutOfTimeError
from ringpool.workers.files.lockfiles import root_of
from ringpool.workers.files.naming import FilePath, absolute, check_several, encoded, unusable
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.stripes import MARK_BYTES_MAX, Turn

__all__ = ["LockBase", "LockSet", "Mode", "PathLock", "root_of"]

IDLE_S = 0.05
PATH_BYTES_MAX = 4096  # linux/limits.h

Mode = Literal["exclusive", "shared"]

_T = TypeVar("_T")
_Lock = TypeVar("_Lock", bound="LockBase")


def _absolute(path: bytes) -> bytes:
    """``absolute(path)``, which takes longer than the rest, where it is not that already."""
    return path if path.startswith(b"/") and b"/." not in path and b"//" not in path else absolute(path)


def from_here(path: bytes, here: bytes | None = None) -> bytes:
    """``path``, as it leads from the current directory, which is ``here``: who waits for its lock waits for that file,
    wherever the process goes meanwhile. As it is, where that directory is gone or cannot be reached from the root, or
    the whole path would be longer than calls take.
    """
    if path.startswith(b"/"):
        return path
    try:
        whole = os.path.join(os.getcwdb() if here is None else here, path)
    except OSError:
        return path
    is_short = len(whole) < PATH_BYTES_MAX
    return whole if is_short and calls.access(os.path.dirname(whole), os.F_OK, effective_ids=True) else path


class LockBase:
    """What both kinds of lock on one path have in common: what they lock, and what they hold."""

    __slots__ = ("base", "mode", "path", "timeout_s", "turns")

    def __init__(
        self,
        path: FilePath,
        mode: Mode = "exclusive",
        *,
        base: FilePath | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if mode not in ("exclusive", "shared"):
            raise ValueError(f"mode {mode!r}: a lock is exclusive or shared")
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("timeout_s is no number: a wait for it would have no end")
        self.path = encoded(path)
        self.mode: Mode = mode
        self.base = None if base is None else _absolute(encoded(base))
        self.timeout_s = timeout_s
        if b"\0" in self.path or (self.base and b"\0" in self.base):
            raise unusable(self.path, "it holds a NUL byte")
        self.turns: list[Turn] = []  # held, or on their way: entered before anything is taken

    @property
    def stripe(self) -> int:
        """The number of the path's stripe, 0 to 255."""
        return lockfiles.stripe_of(self.path)

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        """A copy, in this process or another, is a lock on the same path that holds nothing."""
        return functools.partial(type(self), self.path, self.mode, base=self.base, timeout_s=self.timeout_s), ()

    def _deadline_s(self, began_s: float) -> float | None:
        return None if self.timeout_s is None else began_s + self.timeout_s

    def _undo(self, turn: Turn) -> None:
        """Whatever has become of ``turn``, nothing is left of it. May be done twice; raises no ``OSError``."""
        if turn.stripe is not None:
            try:
                turn.stripe.leave(turn)
            except OSError:
                turns.drop(turn.stripe, turn)
        if turn in self.turns:
            self.turns.remove(turn)

    def _fail(self, error: BaseException, turn: Turn, began_s: float) -> NoReturn:
        """Raise what the caller is to see of ``error``. Nothing is held any more."""
        if isinstance(error, OutOfTimeError):
            holder = error.holder or _holder_of(turn)
            raise LockTimeoutError(os.fsdecode(self.path), holder, time.monotonic() - began_s) from None
        if isinstance(error, OSError) and not isinstance(error, RingpoolError):
            raise operation_error(self.path, "lock", error) from error
        raise error

    def _release(self, whose: Callable[[], object], kind: str) -> None:
        turn: Turn | None = None
        try:
            turn = self._newest_of(whose())
            if turn is None:
                fault = f"released by a {kind} that does not hold it" if self.turns else "released, but not locked"
                raise RuntimeError(f"{os.fsdecode(self.path)}: {fault}")
            self._leave(turn)
        except RuntimeError:
            raise
        except BaseException as error:  # a Ctrl-C, or an error of the kernel's: to its end, from what stands there
            turn = turn or self._newest_of(whose())
            if turn is not None:
                self._undo(turn)
            if isinstance(error, OSError):
                raise operation_error(self.path, "unlock", error) from error
            raise

    def _newest_of(self, owner: object) -> Turn | None:
        """The turn that a release by ``owner`` ends. Those of others, who hold it or are on their way, are theirs.

        An owner that releases is not on its way in, so each turn of its own is one that it holds.
        """
        turns_now = self.turns[::-1]  # a copy: others come and go
        for turn in turns_now:
            if turn.owner == owner:
                return turn
        return next((turn for turn in turns_now if self._is_nobodys(turn)), None)

    def _is_nobodys(self, turn: Turn) -> bool:
        """Whether anybody may release it: in the child of a fork it is the parent's, and that has no effect."""
        return turn.stripe is not None and turn.stripe.abandoned

    def _leave(self, turn: Turn) -> None:
        assert turn.stripe is not None
        turn.stripe.leave(turn)
        self.turns.remove(turn)


class PathLock(LockBase):
    """The lock on ``path``, which need not exist, though its directory must. A context manager; blocks the thread.

    ``mode`` is "exclusive" or "shared". ``base`` is the directory whose ``.ringpool`` holds the lock files; None: the
    outermost ancestor that has one, else the file's own directory. ``timeout_s`` bounds the wait (None: no bound, 0:
    one try). Re-entrant for a thread, and for all paths of a stripe. Released by the thread that acquired it. Several
    threads may use one object, as they may a ``threading.Lock``.
    """

    __slots__ = ()

    def acquire(self) -> None:
        """Take the lock.

        Raises ``LockTimeoutError``; ``LockUpgradeError`` where this thread holds it shared and wants it exclusive;
        ``FileOperationError`` where there can be no lock file.
        """
        began_s = time.monotonic()
        turn = Turn(threading.get_ident(), from_here(self.path), self.mode == "exclusive")
        try:
            self.turns.append(turn)
            deadline_s = self._deadline_s(began_s)
            if not turns.arrive(turn, self.base, deadline_s, may_wait=self.timeout_s != 0) or turn.is_marked:
                self._finish(turn, deadline_s)
        except BaseException as error:
            try:
                self._undo(turn)
            except BaseException:  # a Ctrl-C while a timeout was handled
                self._undo(turn)
                raise
            self._fail(error, turn, began_s)

    def _finish(self, turn: Turn, deadline_s: float | None) -> None:
        gate: SimpleQueue[None] = SimpleQueue()
        turn.alarm = functools.partial(gate.put, None)
        steps = turns.finish(turn, self.base, deadline_s, IDLE_S)
        try:
            pause_s = next(steps)
            while True:
                if pause_s is None:
                    turn.recover(deadline_s)
                    pause_s = next(steps)
                else:
                    pause_s = steps.send(turns.sleep(turn, gate, pause_s))
        except StopIteration:
            return

    def release(self) -> None:
        """Release it once. Raises ``RuntimeError`` where this thread does not hold it.

        ``FileOperationError`` where the kernel refuses to unlock: it is free all the same, its descriptor closed.
        """
        self._release(threading.get_ident, "thread")

    def __enter__(self) -> PathLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def under(lock: PathLock | LockSet, call: Callable[[], _T]) -> _T:
    """What ``call`` returns, under ``lock``, which is free afterwards: also where a signal handler raises anywhere.

    A ``with`` block cannot promise that: nobody is left to release where an exception comes as ``__exit__`` begins.
    Raises what both raise.
    """
    try:
        lock.acquire()
        result = call()
        with suppress(FileOperationError):  # what was done stands, and the lock is free all the same
            lock.release()
    except BaseException:
        with suppress(RuntimeError, FileOperationError):  # it is not held any more
            lock.release()
        raise
    return result


def call_locked(path: bytes, base: bytes | None, call: Callable[[], object], timeout_s: float | None = None) -> None:
    """``call`` under the exclusive ``PathLock`` of that path, base and timeout, at half the cost where that is free.

    ``path``: absolute, and no symlink. Raises what both raise.
    """
    turn = Turn(threading.get_ident(), path, exclusive=True)
    is_held = False
    try:
        is_held = turns.arrive_at_once(turn, base)
        if is_held:
            call()
        _leave_at_once(turn)
    except BaseException:
        _leave_at_once(turn)
        raise
    if not is_held:
        under(PathLock(path, base=base, timeout_s=timeout_s), call)


def _leave_at_once(turn: Turn) -> None:
    if turn.stripe is not None:
        try:
            turn.stripe.leave(turn)
        except OSError:
            turns.drop(turn.stripe, turn)


class LockSet:
    """The locks on ``paths``, all or none, for a thread. A context manager.

    Taken in one order by everybody (base, then stripe), each stripe once: sets do not wait for each other in a circle.
    ``mode``, ``base`` and ``timeout_s`` as in ``PathLock``; the timeout is for all together. Raises ``TypeError`` where
    ``paths`` is a single path.
    """

    def __init__(
        self,
        paths: Iterable[FilePath],
        mode: Mode = "exclusive",
        *,
        base: FilePath | None = None,
        timeout_s: float | None = None,
    ) -> None:
        check_several(paths)
        self.mode: Mode = mode
        self.timeout_s = timeout_s
        self._wanted = [PathLock(path, mode, base=base, timeout_s=timeout_s) for path in paths]
        self.held: list[PathLock] = []

    def __getstate__(self) -> dict[str, object]:
        state: dict[str, object] = {**self.__dict__, "held": []}  # a copy holds nothing
        return state

    @property
    def paths(self) -> list[bytes]:
        """The paths, in the order in which they were given."""
        return [lock.path for lock in self._wanted]

    def acquire(self) -> None:
        """Take all of them. Raises as ``PathLock.acquire`` does; then none is held that was not before."""
        if self.held:
            raise RuntimeError("a set of locks is not re-entrant; make another one")
        deadline_s = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        try:
            for lock in in_order(self._all_from_here()):
                lock.timeout_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                self.held.append(lock)
                lock.acquire()
        except BaseException:
            with suppress(FileOperationError):
                self._let_go_surely()
            raise

    def _all_from_here(self) -> list[PathLock]:
        """The locks, on paths from one and the same directory."""
        if all(path.startswith(b"/") for path in self.paths):
            return self._wanted
        try:
            here = os.getcwdb()
        except OSError:
            return self._wanted
        return [PathLock(from_here(lock.path, here), lock.mode, base=lock.base) for lock in self._wanted]

    def release(self) -> None:
        """Release all of them. Raises as ``PathLock.release`` does; after a ``FileOperationError`` all are free."""
        if self._wanted and not self.held:
            raise RuntimeError("a set of locks: released, but not locked")
        self._let_go_surely()

    def _let_go_surely(self) -> None:
        try:
            self._let_go()
        except (RuntimeError, FileOperationError):
            raise
        except BaseException:  # a Ctrl-C: not one of them stays
            self._let_go()
            raise

    def _let_go(self) -> None:
        failure: FileOperationError | None = None
        while self.held:
            lock = self.held[-1]
            try:
                if lock.turns:
                    lock.release()
            except FileOperationError as error:
                failure = failure or error
            self.held.pop()
        if failure is not None:
            raise failure

    def mark(self, text: bytes) -> None:
        """Write ``text`` into the lock file of each stripe held: who gets one of them next has to recover it first.

        ``text`` has 1 to 4096 bytes. Not durable. Raises ``FileOperationError``.
        """
        if not 0 < len(text) <= MARK_BYTES_MAX:
            raise ValueError(f"a mark has 1 to {MARK_BYTES_MAX} bytes, this one {len(text)}")
        self._write_marks(text)

    def clear_marks(self) -> None:
        """Empty the lock file of each stripe held. Raises ``FileOperationError``."""
        self._write_marks(b"")

    def _write_marks(self, text: bytes) -> None:
        if self.mode != "exclusive" or not self.held:
            raise RuntimeError("only a set of exclusive locks that is held can be marked")
        for lock in self.held:
            stripe = lock.turns[-1].stripe
            assert stripe is not None
            try:
                stripe.write_mark(text)
            except OSError as error:
                raise operation_error(lock.path, "mark the lock", error) from error

    def __enter__(self) -> LockSet:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def in_order(locks: Iterable[_Lock]) -> list[_Lock]:
    """One of ``locks`` for each lock file's stripe, in the order in which everybody takes several."""
    ordered: dict[tuple[int, int, int], _Lock] = {}
    for lock in locks:
        try:
            place = lockfiles.find(lock.path, lock.base)
            found = calls.stat(place.root)
        except OSError as error:
            raise operation_error(lock.path, "lock", error) from error
        ordered.setdefault((found.st_dev, found.st_ino, place.stripe), lock)
    return [lock for _, lock in sorted(ordered.items())]


def operation_error(path: bytes, operation: str, error: OSError) -> FileOperationError:
    if isinstance(error, FileOperationError):
        return error
    reason = error.strerror or str(error)
    if error.filename is not None:
        reason = f"{reason} ({os.fsdecode(error.filename)})"
    return FileOperationError(os.fsdecode(path), operation, error.errno or errno.EIO, reason)


def _holder_of(turn: Turn) -> str:
    """Who holds what ``turn`` waits for, for people: as far as the kernel tells."""
    stripe = turn.stripe
    assert stripe is not None
    with stripes.mutex:
        holder = next(iter(stripe.holds), None)
    if holder is not None:
        return f"another {'thread' if isinstance(holder.owner, int) else 'task'} of this process"
    try:
        return lockfiles.holder_of(stripe.inode)
    except OSError:
        return "an unknown process"
