"""The order in which those who wait for a lock file get it: by tickets, which die with their holders, and bells.

    byte of the lock file          locked (F_OFD_SETLK, F_RDLCK) by whoever waits
    t                              for the exclusive lock, since t
    2^62 + t                       for a shared lock, since t             t: CLOCK_MONOTONIC, ns

    waiter                                       whoever leaves the lock, or the queue
    1  lock byte t                               1  unlock
    2  once first of its process: hang a bell    2  is any byte locked? (F_OFD_GETLK)   no: done
    3  is a byte before t locked, or the lock    3  ring the bell of the lowest t
       itself?  no: it is ours
    4  sleep, until rung or for LOOK_S; then 3

Invariants

- Exclusion is the flock's business alone. Whatever goes wrong here, a lost bell, two equal tickets, somebody who does
  not queue, costs order or time, and never lets two in.
- A ticket is visible before its owner's last look at the lock, and a lock is free before its last holder looks for
  tickets: one of the two sees the other, so no ringing is missed.
- A place lasts as long as its process: the kernel unlocks the bytes of one that dies, and whoever is behind it finds
  out within LOOK_S. The same look finds a lock that was freed without ringing: by a killed holder, by a user of
  ``filelock``, by a holder in another network namespace.
- Bytes and lock are of different kinds (OFD record locks, flock) and do not meet. The file's content is not used. Bytes
  may be locked beyond its end, and by who may only read it: hence F_RDLCK for all. F_OFD_GETLK asks for F_WRLCK, which
  any of them conflicts with.
- The clock is the counter: the same for all processes of a machine, never set back, and it needs no short lock, in
  which a process could be stopped. (Processes in a time namespace of their own are ordered by their own clock.)

A blocking F_OFD_SETLKW on the byte ahead would need neither bells nor looks, but cannot time out, cannot be waited for
by an event loop, and would wait for a stopped process for ever. Source: fcntl_locking(2), unix(7).
"""

from __future__ import annotations

import atexit
import fcntl
import select
import socket
import struct
import time
from contextlib import suppress

from ringpool.workers.files.oslayer import calls

SHARED = 1 << 62  # where the tickets of shared waiters begin
LOOK_S = 0.01
OVERTAKEN = b"overtaken"

_record = struct.Struct("@hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid, as the compiler aligns it
_FREE = fcntl.F_UNLCK
_ANY = _record.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
_BELL = b"\0ringpool-bell/%x/%x/%x"  # an abstract address: nothing that a killed process could leave behind


class Tickets:
    """The tickets on one lock file, as seen through one descriptor of it: one's own do not show."""

    __slots__ = ("device", "fd", "inode")

    def __init__(self, fd: int, device: int, inode: int) -> None:
        self.fd = fd
        self.device = device
        self.inode = inode

    def any(self) -> bool:
        """Whether another process waits."""
        return calls.fcntl(self.fd, fcntl.F_OFD_GETLK, _ANY)[0] != _FREE

    def put(self, ticket: int, *, exclusive: bool) -> None:
        """Lock its byte. Raises ``OSError``: ENOLCK where the kernel has no room for more."""
        self._set(fcntl.F_RDLCK, ticket, exclusive)

    def take_back(self, ticket: int, *, exclusive: bool) -> None:
        """Unlock its byte, if it is locked."""
        self._set(fcntl.F_UNLCK, ticket, exclusive)

    def _set(self, kind: int, ticket: int, exclusive: bool) -> None:
        at = ticket if exclusive else SHARED + ticket
        calls.fcntl(self.fd, fcntl.F_OFD_SETLK, _record.pack(kind, 0, at, 1, 0))

    def is_ahead(self, after: int, ticket: int, *, exclusive: bool) -> bool:
        """Whether one between ``after`` and ``ticket`` has to go first: shared waiters go in together."""
        if ticket - after <= 1:
            return False
        if self._in(after + 1, ticket) >= 0:
            return True
        return exclusive and self._in(SHARED + after + 1, SHARED + ticket) >= 0

    def first(self, after: int) -> tuple[int, bool] | None:
        """The lowest ticket above ``after``, and whether it is for the exclusive lock."""
        exclusive = self._lowest(after + 1, SHARED)
        shared = self._lowest(SHARED + after + 1, SHARED << 1) - SHARED
        if exclusive < 0 and shared < 0:
            return None
        if shared < 0 or 0 <= exclusive < shared:
            return exclusive, True
        return shared, False

    def _lowest(self, start: int, end: int) -> int:
        """The lowest locked byte in start..end-1, or -1. The kernel names any one: ask again for those before it."""
        lowest = -1
        while start < end:
            found = self._in(start, end)
            if found < 0:
                break
            lowest = end = found
        return lowest

    def _in(self, start: int, end: int) -> int:
        """A locked byte in start..end-1, or -1."""
        reply = calls.fcntl(self.fd, fcntl.F_OFD_GETLK, _record.pack(fcntl.F_WRLCK, 0, start, end - start, 0))
        if reply[0] == _FREE:
            return -1
        return max(start, _record.unpack(reply)[2])

    def bell_name(self, ticket: int) -> bytes:
        """The address of the bell of whoever has that ticket, in any process."""
        return _BELL % (self.device, self.inode, ticket)


class NoTickets(Tickets):
    """Where the file system has none: everybody seems to be alone, and looks at intervals."""

    __slots__ = ()

    def any(self) -> bool:
        return False

    def first(self, after: int) -> tuple[int, bool] | None:
        return None

    def is_ahead(self, after: int, ticket: int, *, exclusive: bool) -> bool:
        return False

    def _set(self, kind: int, ticket: int, exclusive: bool) -> None:
        return


class Bell:
    """A socket that a waiter sleeps at, and anybody may ring. Raises ``OSError`` where there can be none."""

    __slots__ = ("name", "socket")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, _KIND)
        try:
            self.socket.bind(name)
        except BaseException:
            self.socket.close()
            raise

    def sleep(self, pause_s: float) -> bool:
        """Whether it was rung within so many seconds."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(pause_s * 1000))

    def heard(self) -> bytes:
        """What it was rung with, all together; nothing where it was not. It is silent from here on."""
        words = b""
        with suppress(BlockingIOError):
            while True:
                words += self.socket.recv(len(OVERTAKEN))
        return words

    def close(self) -> None:
        """Take it down. Ringing it reaches nobody then."""
        self.socket.close()


_KIND = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_ringer: socket.socket | None = None


def ring(name: bytes, word: bytes = b"!") -> None:
    """Ring the bell of that name. Where there is none, or it has been rung often and not answered, nothing happens."""
    global _ringer
    try:
        if _ringer is None:
            _ringer = socket.socket(socket.AF_UNIX, _KIND)
        _ringer.sendto(word, name)
    except OSError:
        return


def close_ringer() -> None:
    """In the child of a fork, where the socket is the parent's; and at the end."""
    global _ringer
    if _ringer is not None:
        _ringer.close()
        _ringer = None


atexit.register(close_ringer)


def next_ticket(last: int) -> int:
    """The ticket of one who comes now, after ``last`` of the same process."""
    return max(time.monotonic_ns(), last + 1)
