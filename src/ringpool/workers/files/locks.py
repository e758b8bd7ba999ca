"""The lock on a path: one holder at a time, among threads, processes, and users of ``filelock`` on the same lock file.

    path --> (device, inode of its directory; name) --hash--> stripe 00..ff --> <base>/.ringpool/locks/<stripe>.lock
             two spellings of a file are one identity                          256 files, never unlinked

    base: the outermost ancestor that has a ``.ringpool``, else the file's own directory; or as the caller says, and
          then every user of the file must say the same

    acquire:  the stripe's RLock   (threads of this process; re-entrant)
              flock by filelock    (processes; the kernel frees it when its holder dies)
              is the locked file still the one at its name?   no: somebody removed .ringpool; open anew, try again

A flock belongs to an open file description, which gives four rules:

- One descriptor for each stripe in a process, in one table, bounded; one that is held or waited for is never closed.
- A forked child closes its copies and never unlocks: an unlock there would free its parent's lock. A lock that is held
  across a fork is the parent's alone; the child leaves its ``with`` block without effect.
- A fork waits until no thread is between opening a descriptor and entering it in the table: the child would keep it.
- Two paths may share a stripe. One thread may hold both; a caller that takes several must order them by ``stripe``.

Whoever removes ``.ringpool`` under a holder lets a second one in; nothing can prevent that here. Everybody who comes or
waits after it meets on the new file.

Waiting is by trying again, 50 us later, then twice that, up to 5 ms, first come is not first served: the ticket lock is
to replace this.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import struct
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from hashlib import blake2b
from types import TracebackType

from filelock import lock_descriptor, unlock_descriptor

from ringpool.errors import FileOperationError, LockTimeoutError
from ringpool.workers.files.naming import FilePath
from ringpool.workers.files.oslayer import calls

DIRECTORY = b".ringpool"
DESCRIPTORS_MAX = 64
DIRECTORIES_REMEMBERED_MAX = 256
REOPENS_MAX = 100
WAIT_MIN_S = 5e-5
WAIT_MAX_S = 5e-3

_identity = struct.Struct("=QQ")


class PathLock:
    """The exclusive lock on ``path``, which need not exist, though its directory must. A context manager.

    ``base`` is the directory whose ``.ringpool`` holds the lock files; ``timeout_s`` bounds the wait (None: no bound,
    0: one try). Re-entrant for a thread, and for all paths of a stripe. Released by the thread that acquired it.
    """

    __slots__ = ("_held", "base", "path", "timeout_s")

    def __init__(self, path: FilePath, *, base: FilePath | None = None, timeout_s: float | None = None) -> None:
        self.path = os.fsencode(path)
        self.base = None if base is None else os.fsencode(base)
        self.timeout_s = timeout_s
        self._held: list[_Stripe] = []

    @property
    def stripe(self) -> int:
        """The number of the path's stripe, 0 to 255."""
        return _stripe_of(*_place(self.path)[1:])

    def acquire(self) -> None:
        """Take the lock. Raises ``LockTimeoutError``; ``FileOperationError`` where there can be no lock file."""
        began = time.monotonic()
        try:
            stripe = _borrow(self.path, self.base)
        except OSError as error:
            raise self._failed("open its lock file", error) from error
        taken = False
        try:
            taken = stripe.acquire(None if self.timeout_s is None else began + self.timeout_s)
            if not taken:
                raise LockTimeoutError(os.fsdecode(self.path), stripe.holder(), time.monotonic() - began)
            self._held.append(stripe)
        except BaseException as error:
            if taken:
                stripe.release()  # a Ctrl-C came after it was had
            _table.give_back(stripe)
            if isinstance(error, OSError) and not isinstance(error, LockTimeoutError):
                raise self._failed("lock", error) from error
            raise

    def release(self) -> None:
        """Release it once. Raises ``RuntimeError`` where this thread does not hold it."""
        if not self._held:
            raise RuntimeError(f"{os.fsdecode(self.path)}: released, but not locked")
        stripe = self._held[-1]
        if not stripe.is_mine():
            raise RuntimeError(f"{os.fsdecode(self.path)}: released by a thread that does not hold it")
        try:
            stripe.release()
        finally:
            self._held.pop()
            _table.give_back(stripe)

    def __enter__(self) -> PathLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _failed(self, operation: str, error: OSError) -> FileOperationError:
        reason = error.strerror or str(error)
        if error.filename is not None:
            reason = f"{reason} ({os.fsdecode(error.filename)})"
        return FileOperationError(os.fsdecode(self.path), operation, error.errno or errno.EIO, reason)


class _Stripe:
    """One lock file of this process: its descriptor, who waits for it or holds it, and how often."""

    __slots__ = ("abandoned", "depth", "fd", "guard", "key", "owner", "path", "users")

    def __init__(self, key: tuple[int, int, int], path: bytes) -> None:
        self.key = key
        self.path = path
        self.fd = -1  # opened and closed under the table's lock
        self.users = 0  # holders and waiters; under the table's lock
        self.guard = threading.RLock()
        self.depth = 0  # these two: by the holder of guard
        self.owner = 0
        self.abandoned = False  # inherited through a fork

    def acquire(self, deadline: float | None) -> bool:
        """Whether it was had before ``deadline`` (monotonic seconds)."""
        remaining = -1 if deadline is None else min(max(deadline - time.monotonic(), 0), threading.TIMEOUT_MAX)
        if not self.guard.acquire(timeout=remaining):
            return False
        held = False
        try:
            if self.depth or self._lock(deadline):
                self.depth += 1
                self.owner = threading.get_ident()
                held = True
        finally:
            if not held:
                if not self.depth:
                    unlock_descriptor(self.fd)  # an exception may have come between flock and here
                self.guard.release()
        return held

    def _lock(self, deadline: float | None) -> bool:
        wait_s = WAIT_MIN_S
        reopens = 0
        while True:
            if lock_descriptor(self.fd, blocking=False):
                if self._is_linked():
                    return True
                reopens += 1
                if reopens > REOPENS_MAX:
                    raise OSError(errno.ESTALE, "its lock file is removed again and again", self.path)
                _table.reopen(self)
                continue
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(wait_s if deadline is None else max(0, min(wait_s, deadline - time.monotonic())))
            wait_s = min(2 * wait_s, WAIT_MAX_S)

    def _is_linked(self) -> bool:
        """Whether the locked file is the one that others find: else two could hold two files."""
        ours = calls.fstat(self.fd)
        return ours.st_nlink > 0 and _leads_to(self.path, ours.st_dev, ours.st_ino)

    def is_mine(self) -> bool:
        """Whether this thread may release it. True in the child of a fork, where nothing will come of it."""
        return self.abandoned or (self.depth > 0 and self.owner == threading.get_ident())

    def release(self) -> None:
        """Undo one ``acquire``. In the child of a fork nothing: its parent holds it."""
        if self.abandoned:
            return
        try:
            self.depth -= 1
            if not self.depth:
                self.owner = 0
                unlock_descriptor(self.fd)
        finally:
            self.guard.release()

    def holder(self) -> str:
        """Who holds it, for people: as far as the kernel tells."""
        if self.owner:
            return "another thread of this process"
        try:
            return _holder_of(calls.fstat(self.fd).st_ino)
        except OSError:
            return "an unknown process"


class _Table:
    """The lock files that this process has open: the least recently used goes first, one in use never."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # re-entrant: a signal handler that forks may interrupt its holder
        self._stripes: OrderedDict[tuple[int, int, int], _Stripe] = OrderedDict()

    def borrow(self, key: tuple[int, int, int], path: bytes) -> tuple[_Stripe, bool]:
        """The stripe with that key, not to be closed before ``give_back``, and whether it was opened now."""
        with self.lock:
            stripe = self._stripes.get(key)
            opened = stripe is None
            if stripe is None:
                stripe = _Stripe(key, path)
                stripe.fd = _open_lock_file(path)
                self._stripes[key] = stripe
            else:
                stripe.path = path  # the base may have been renamed
                self._stripes.move_to_end(key)
            stripe.users += 1
            if len(self._stripes) > DESCRIPTORS_MAX:
                self._shrink()
            return stripe, opened

    def give_back(self, stripe: _Stripe) -> None:
        """The caller neither holds it nor waits for it any more."""
        with self.lock:
            stripe.users -= 1

    def reopen(self, stripe: _Stripe) -> None:
        """Open the file that is at the stripe's name now. Only the holder of its guard may call this."""
        with self.lock:
            fresh = _open_lock_file(stripe.path)
            stale, stripe.fd = stripe.fd, fresh
            calls.close(stale)  # frees the lock on the file that is gone

    def _shrink(self) -> None:
        for key in [key for key, stripe in self._stripes.items() if not stripe.users]:
            if len(self._stripes) <= DESCRIPTORS_MAX:
                break
            calls.close(self._stripes.pop(key).fd)

    def forget(self) -> None:
        """In the child of a fork: close the descriptors, unlock nothing, begin anew."""
        for stripe in self._stripes.values():
            stripe.abandoned = True
            with suppress(OSError):
                calls.close(stripe.fd)
        self._stripes.clear()
        self.lock = threading.RLock()  # the old one is held, by the thread that forked


_table = _Table()
# Not the bound methods of today's lock: a child has another one, and may fork as well.
os.register_at_fork(
    before=lambda: _table.lock.acquire(),
    after_in_parent=lambda: _table.lock.release(),
    after_in_child=lambda: _table.forget(),
)


# ---- from a path to its lock file ------------------------------------------------------------------------------------


def _borrow(path: bytes, base: bytes | None) -> _Stripe:
    """The stripe of ``path``, from the table. Raises ``OSError``."""
    directory, device, inode, name = _place(path)
    stripe = _stripe_of(device, inode, name)
    for _ in range(REOPENS_MAX):
        root = base or _base_of(directory, device, inode)
        if root == directory:
            key = (device, inode, stripe)
        else:
            found = calls.stat(root)
            key = (found.st_dev, found.st_ino, stripe)
        borrowed, opened = _table.borrow(key, b"%b/%b/locks/%02x.lock" % (root, DIRECTORY, stripe))
        # Opening may have made the first .ringpool of this directory, while a neighbour made one further out.
        if not opened or base is not None or _base_of(directory, device, inode) == root:
            return borrowed
        _table.give_back(borrowed)
    raise OSError(errno.ESTALE, "its .ringpool directories come and go", path)


def _place(path: bytes) -> tuple[bytes, int, int, bytes]:
    """The directory, its device and inode, and the name there, of the file that ``path`` leads to."""
    if os.path.islink(path):
        path = os.path.realpath(path)
    directory, name = os.path.split(path)
    directory = directory or b"."
    if name in (b"", b".", b".."):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    found = calls.stat(directory)
    return directory, found.st_dev, found.st_ino, name


def _stripe_of(device: int, inode: int, name: bytes) -> int:
    return blake2b(_identity.pack(device, inode) + name, digest_size=1).digest()[0]


def _base_of(directory: bytes, device: int, inode: int) -> bytes:
    """The outermost ancestor of ``directory`` that has a ``.ringpool``, else ``directory`` itself, as a real path."""
    real, ancestors = _ancestors(directory, device, inode)
    if real != directory and not _leads_to(real, device, inode):  # renamed since it was remembered
        real, ancestors = _ancestors.__wrapped__(directory, device, inode)
    for ancestor, marker in ancestors:
        if calls.access(marker, os.F_OK):
            return ancestor
    return real


def _leads_to(path: bytes, device: int, inode: int) -> bool:
    try:
        found = calls.stat(path)
    except FileNotFoundError:
        return False
    return (found.st_ino, found.st_dev) == (inode, device)


@functools.lru_cache(maxsize=DIRECTORIES_REMEMBERED_MAX)
def _ancestors(directory: bytes, device: int, inode: int) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """The real path of ``directory``, and it and its ancestors with the path of a ``.ringpool`` there, outermost first.

    Remembered for a spelling and what it leads to; which of them exist is looked up each time.
    """
    real = os.path.realpath(directory)
    ends = [at for at, byte in enumerate(real) if byte == ord("/") and at] + [len(real)]
    ancestors = [b"/", *(real[:end] for end in ends)] if real != b"/" else [b"/"]
    return real, tuple((ancestor, os.path.join(ancestor, DIRECTORY)) for ancestor in ancestors)


def _open_lock_file(path: bytes) -> int:
    """Open a lock file, making it and its directories where needed. One that we may only read serves too."""
    for _ in range(REOPENS_MAX):
        try:
            return calls.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except PermissionError as denied:
            try:
                return calls.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise denied from None
        except FileNotFoundError:
            _make_lock_directories(os.path.dirname(path))
    raise FileNotFoundError(errno.ENOENT, "removed again and again", path)


def _make_lock_directories(locks: bytes) -> None:
    """Make ``<base>/.ringpool/locks``, open to whom the base is open to: who may make files there may lock them."""
    ours = os.path.dirname(locks)
    mode = stat.S_IMODE(calls.stat(os.path.dirname(ours)).st_mode)  # raises where the base itself is gone
    with suppress(FileNotFoundError):  # removed under our hands: the caller tries again
        for directory in (ours, locks):
            with suppress(FileExistsError):
                calls.mkdir(directory, 0o777)
                calls.chmod(directory, mode)


def _holder_of(inode: int) -> str:
    """The process with a flock on that inode. Source: proc(5), /proc/locks; it shows a process of this pid namespace.

    The device is not compared: btrfs shows another one there than stat does.
    """
    with open("/proc/locks", "rb") as table:
        for line in table:
            fields = line.split()
            if len(fields) >= 8 and fields[1] == b"FLOCK" and fields[5].rpartition(b":")[2] == b"%d" % inode:
                return _process(int(fields[4]))
    return "an unknown process"


def _process(pid: int) -> str:
    if pid <= 0:
        return "a process of another pid namespace"
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return f"process {pid} ({name.read().strip()})"
    except OSError:
        return f"process {pid}"
