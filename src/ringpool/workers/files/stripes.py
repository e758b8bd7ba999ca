"""The lock files that this process has open, who in it holds or awaits each, and how one gets from waiting to holding.

    a turn       arrive ------------------------------> holding ------> left
                    |      nobody waits, flock is had       ^     leave
                    +--> waiting ---------------------------+
                            |    look: first, flock is had
                            +-----------------------------------------> left     timeout, Ctrl-C, cancelled

    look, for one who waits                              then
    somebody of this process holds, and not both share   sleep
    somebody is ahead (here, or by the tickets)          sleep; but see below
    the flock cannot be had                              sleep
    the flock is had, of a file that is not linked       away with this stripe; open the file that is there now
    the flock is had, and the file is not empty          a transaction died: recover it, as the only holder
    the flock is had                                     hold

Out of turn: a lock that was found free at each look for ``PATIENCE_S``, while somebody ahead did not take it (a stopped
process), may be had by the next. One who was overtaken so gets a new ticket, behind the others, when it wakes.

Rules

- A turn is entered in ``holds`` before the flock is tried, and in ``queue`` before its ticket is put. ``leave`` undoes
  both from what stands there, every step of it can be done twice, and all of it after any exception: a Ctrl-C anywhere
  leaves nothing held that nobody knows of.
- All of this happens under ``mutex``, which is held for a few system calls, never while waiting or recovering.
- A flock belongs to an open file description. A stripe has one descriptor, in one table, bounded; one that is held or
  waited for is never closed.
- A forked child closes its copies and never unlocks: an unlock there would free its parent's lock. A lock that is held
  across a fork is the parent's alone; the child leaves its ``with`` block without effect. A fork waits for ``mutex``:
  between opening a descriptor and entering it in the table, the child would keep it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from filelock import Timeout

from ringpool.errors import LockUpgradeError
from ringpool.workers.files import recovery, tickets
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.tickets import LOOK_S, Bell, NoTickets, Tickets

MARK_BYTES_MAX = 4096
PATIENCE_S = 0.1
SOFT_LOOK_S = 0.25  # each look there writes and removes files

mutex = threading.RLock()  # re-entrant: a signal handler that forks may interrupt its holder
retired: set[Stripe] = set()  # not in the table any more, though somebody still holds or awaits it


class StaleError(Exception):
    """The locked file is not the one that others find: somebody removed ``.ringpool``. Never leaves this package."""


class Turn:
    """One acquisition by ``owner`` (a thread's number, a task), from its arrival until it leaves."""

    stripe: Stripe | None = None
    ticket = 0
    bell: Bell | None = None
    alarm: Callable[[], object] | None = None  # wakes one who is not first of its process, so has no bell
    is_waiting = False
    free_since_s = 0.0  # at every look since then the lock was free, and not its turn; 0: not so
    is_marked = False  # it holds, and has to recover what a dead transaction left
    place: tuple[bytes, int] = b"", 0  # its base and stripe, as they were found on its arrival

    def __init__(self, owner: object, path: bytes, exclusive: bool) -> None:
        self.owner = owner
        self.path = path
        self.exclusive = exclusive

    def recover(self, deadline_s: float | None) -> None:
        """See ``Stripe.recover``."""
        assert self.stripe is not None
        self.stripe.recover(self, deadline_s)

    def wake(self) -> None:
        """Have it look. It may be asleep, and another thread's."""
        if self.bell is not None:
            tickets.ring(self.bell.name)
        elif self.alarm is not None:
            with suppress(RuntimeError):  # its event loop is closed
                self.alarm()


class Stripe:
    """One lock file of this process. Everything under ``mutex``."""

    look_s = LOOK_S

    def __init__(self, root: bytes, path: bytes, fd: int) -> None:
        found = calls.fstat(fd)
        self.root = root
        self.path = path
        self.fd = fd
        self.inode = found.st_ino
        self.device = found.st_dev
        self.tickets = Tickets(fd, self.device, self.inode)
        self.holds: dict[Turn, None] = {}
        self.queue: list[Turn] = []  # by ticket
        self.exclusive = False  # how the flock is held, where there are holds
        self.last_ticket = 0  # of this process
        self.passed = 0  # other processes' tickets up to here were overtaken
        self.is_listed = True  # in the table
        self.when_idle: Callable[[], object] | None = None  # called where the table was full of others when it came
        self.abandoned = False  # inherited through a fork

    # ---- in

    def arrive(self, turn: Turn, *, may_wait: bool) -> bool:
        """Whether it holds; otherwise it waits, if it may. Raises ``StaleError``, ``LockUpgradeError``."""
        if not self.holds:
            if not self.queue and not self.tickets.any() and self._seize(turn):
                return True
        else:
            if not self._is_current():
                raise StaleError
            if self._owns(turn):
                self.holds[turn] = None
                return True
            if not (turn.exclusive or self.exclusive or self.queue or self.tickets.any()):
                self.holds[turn] = None
                return True
        if may_wait:
            self._enqueue(turn)
        return False

    def _owns(self, turn: Turn) -> bool:
        for held in self.holds:
            if held.owner == turn.owner:
                if turn.exclusive and not self.exclusive:
                    raise LockUpgradeError(os.fsdecode(turn.path), os.fsdecode(held.path))
                return True
        return False

    def look(self, turn: Turn, *, rung: bool) -> bool:
        """Whether one who waits holds now. Raises ``StaleError``."""
        if self.abandoned:
            raise StaleError
        if self.holds and (turn.exclusive or self.exclusive):
            turn.free_since_s = 0
            return False
        if self._is_behind(turn) and (rung or self.holds or not self._pass_sleeper(turn)):
            return False
        if self.holds:
            self.holds[turn] = None
        elif not self._seize(turn):
            turn.free_since_s = 0
            return False
        self._unqueue(turn)
        if not self.exclusive:
            self._call_next(if_shared=True)
        return True

    def _is_behind(self, turn: Turn) -> bool:
        for other in self.queue:
            if other is turn:
                break
            if turn.exclusive or other.exclusive:
                return True
        return self.tickets.is_ahead(self.passed, turn.ticket, exclusive=turn.exclusive)

    def _seize(self, turn: Turn) -> bool:
        self.holds[turn] = None
        self.exclusive = turn.exclusive
        if not self._lock(turn.exclusive):
            del self.holds[turn]
            return False
        try:
            found = calls.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise StaleError from None
        if found.st_ino != self.inode or found.st_dev != self.device:
            raise StaleError
        if not found.st_size:
            return True
        if not turn.exclusive:
            self._unlock()
            if not self._lock(True):
                del self.holds[turn]
                return False
            self.exclusive = True
        turn.is_marked = True
        return True

    def _pass_sleeper(self, turn: Turn) -> bool:
        """Whether nobody is ahead of it any more, because one who left a free lock untaken was overtaken."""
        now_s = time.monotonic()
        is_free = self._lock(True)
        if not is_free:
            turn.free_since_s = 0
            return False
        self._unlock()
        if not turn.free_since_s:
            turn.free_since_s = now_s
        elif now_s - turn.free_since_s > PATIENCE_S:
            turn.free_since_s = 0
            self._pass_first(turn)
            if not self._is_behind(turn):
                return True
        self._call_next()
        return False

    def _pass_first(self, turn: Turn) -> None:
        """Overtake the first of all who wait."""
        local, foreign = self.queue[0], self.tickets.first(self.passed)
        if foreign is not None and foreign[0] < local.ticket:
            self.passed = foreign[0]
            tickets.ring(self.tickets.bell_name(foreign[0]), tickets.OVERTAKEN)
        elif local is not turn:
            self.send_back(local)

    def _is_current(self) -> bool:
        try:
            found = calls.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return found.st_ino == self.inode and found.st_dev == self.device

    # ---- waiting

    def _enqueue(self, turn: Turn) -> None:
        turn.is_waiting = True  # first: so that ``leave`` looks for it
        self.queue.append(turn)
        self._draw(turn)

    def _draw(self, turn: Turn) -> None:
        self.last_ticket = turn.ticket = tickets.next_ticket(self.last_ticket)
        self.tickets.put(turn.ticket, exclusive=turn.exclusive)

    def send_back(self, turn: Turn) -> None:
        """Behind all others. Its bell is its owner's, who hangs another one."""
        if not turn.is_waiting or (len(self.queue) == 1 and not self.tickets.any()):
            return
        self.tickets.take_back(turn.ticket, exclusive=turn.exclusive)
        self._draw(turn)
        self.queue.sort(key=lambda each: each.ticket)
        self.queue[0].wake()

    def hang_bell(self, turn: Turn) -> bool:
        """Give the first of the queue a bell. True where it is new: look once more before sleeping."""
        name = self.tickets.bell_name(turn.ticket)
        if turn.bell is not None and turn.bell.name != name:
            turn.bell.close()
            turn.bell = None
        if turn.bell is not None or self.queue[0] is not turn:
            return False
        try:
            turn.bell = Bell(name)
        except OSError:
            return False  # out of descriptors: it looks more often instead
        return True

    # ---- out

    def leave(self, turn: Turn) -> None:
        """Hold or wait no more. Whatever of it is done already, is done once more without effect."""
        with mutex:
            if self.abandoned:  # its parent holds it
                return
            waited = turn.is_waiting
            if waited:
                self._unqueue(turn)
            self.holds.pop(turn, None)
            if not self.holds:
                self._unlock()
                self._call_next()
                if not self.queue:
                    if not self.is_listed:
                        self.close()
                    elif self.when_idle is not None:
                        self.when_idle()
            elif waited:
                self._call_next()

    def _unqueue(self, turn: Turn) -> None:
        self.tickets.take_back(turn.ticket, exclusive=turn.exclusive)
        if turn.bell is not None:
            turn.bell.close()
        if turn in self.queue[:1] and len(self.queue) > 1:
            self.queue[1].wake()  # it is to hang a bell
        with suppress(ValueError):
            self.queue.remove(turn)
        turn.is_waiting = False  # last: until then, all this is done again

    def _call_next(self, *, if_shared: bool = False) -> None:
        """Wake whoever waits longest, in any process; with ``if_shared`` only one who may join those that hold now."""
        foreign = self.tickets.first(self.passed) if self.tickets.any() else None
        if self.queue and (foreign is None or self.queue[0].ticket <= foreign[0]):
            if not (if_shared and self.queue[0].exclusive):
                self.queue[0].wake()
        elif foreign is not None and not (if_shared and foreign[1]):
            tickets.ring(self.tickets.bell_name(foreign[0]))

    def forget(self, turn: Turn) -> None:
        """What ``leave`` is to do of it without the kernel, which has refused."""
        self.holds.pop(turn, None)
        if turn in self.queue:
            self.queue.remove(turn)
        if turn.bell is not None:
            turn.bell.close()
        turn.is_waiting = False

    def close(self) -> None:
        """Close the descriptor, which nobody of this process needs any more.

        Where a task has closed it, that is no error of whoever comes now, and its number may be another file's.
        """
        retired.discard(self)
        fd, self.fd = self.fd, -1
        if fd >= 0 and self._is_own(fd):
            calls.close(fd)

    def _is_own(self, fd: int) -> bool:
        try:
            found = calls.fstat(fd)
        except OSError as error:
            return error.errno != errno.EBADF
        return (found.st_ino, found.st_dev) == (self.inode, self.device)

    def abandon(self) -> None:
        """In the child of a fork: it is the parent's."""
        self.abandoned = True
        for turn in self.queue:
            if turn.bell is not None:
                turn.bell.close()
        with suppress(OSError):
            self.close()

    # ---- the flock, and what it protects

    def _lock(self, exclusive: bool) -> bool:
        if exclusive:
            return calls.lock_descriptor(self.fd, blocking=False)
        try:
            calls.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(self) -> None:
        if self.fd >= 0:
            calls.unlock_descriptor(self.fd)

    def recover(self, turn: Turn, deadline_s: float | None) -> None:
        """Finish the transaction that the file names; not under ``mutex``, and ``turn`` is the only holder until then.

        It may wait afterwards, if it is to share: the kernel cannot turn one lock into the other at one moment. Raises
        ``OutOfTimeError`` where another recovers it, and that lasts until ``deadline_s`` (monotonic).
        """
        text = calls.pread(self.fd, MARK_BYTES_MAX, 0)
        if text:
            recovery.recover_marked(self.root, text, deadline_s)
            self.write_mark(b"")
        turn.is_marked = False
        if turn.exclusive:
            return
        with mutex:
            if self._lock(False):
                self.exclusive = False
                self._call_next(if_shared=True)
            else:
                del self.holds[turn]
                self._enqueue(turn)

    def write_mark(self, text: bytes) -> None:
        """Make ``text`` the file's content, by the exclusive holder. Who may only read leaves a dead one's there."""
        try:
            if text:
                calls.pwrite(self.fd, text, 0)
            calls.ftruncate(self.fd, len(text))
        except OSError as error:
            if text or error.errno not in (errno.EBADF, errno.EINVAL):
                raise


class SoftStripe(Stripe):
    """A lock file on a network file system: excluded by ``filelock.SoftReadWriteLock``, which looks at intervals.

    Between processes the first come is not the first served there; in a process it is.
    """

    look_s = SOFT_LOOK_S

    def __init__(self, root: bytes, path: bytes, fd: int) -> None:
        super().__init__(root, path, fd)
        from filelock import SoftReadWriteLock  # here: few need it, and with asyncio it takes 40 ms to import

        self.tickets = NoTickets(fd, self.device, self.inode)
        self._soft = SoftReadWriteLock(os.fsdecode(path), is_singleton=False)

    def _lock(self, exclusive: bool) -> bool:
        self._unlock()
        try:
            # ignored twice: filelock leaves parts of these signatures without types
            if exclusive:
                self._soft.acquire_write(0)  # pyright: ignore[reportUnknownMemberType]
            else:
                self._soft.acquire_read(0)  # pyright: ignore[reportUnknownMemberType]
        except Timeout:
            return False
        return True

    def _unlock(self) -> None:
        self._soft.release(force=True)

    def close(self) -> None:
        super().close()
        self._soft.close()
