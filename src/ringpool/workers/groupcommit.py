"""Put outputs that are whole, and staged, in their places: many together, for the price of a few syncs.

    sync      what was written: one syncfs where there are many files and the file system allows it, else fsync of each
    rename    task by task, its outputs in their order, each under the lock of its path: the commit point of each
    sync      the directories: fsync of each, or one syncfs where there are many

    level           first sync   second sync
    none, atomic    no           no
    data            yes          no
    full            yes          yes

Each step may be done again: a staged file that is missing was renamed already. So whoever comes after a death does the
same, with what it finds, and the outcome is what the dead would have had. An error costs the task that it belongs to;
one of syncfs, all that have an output on that file system. What a task that failed had staged is removed; or kept,
where the file that was its input is no more at its name: it may be the only copy.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from ringpool.errors import DurabilityError, LockTimeoutError, RingpoolError
from ringpool.workers.files.batch import TOGETHER_MIN, is_synced_whole
from ringpool.workers.files.durability import Durability, close_quietly, make_directories, sync
from ringpool.workers.files.locks import call_locked, root_of
from ringpool.workers.files.naming import is_staging_name, random_staging_name
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.output import discard_staged
from ringpool.workers.files.target import failed, lstat

DIRECTORIES_KNOWN_MAX = 4096
LOCK_BASES_S = 0.1  # how long it is taken for granted which lock files serve a directory, while outputs keep coming
NAME_TAIL_BYTES = 160  # of an output's name that its staged name ends in: tools choose formats by suffixes
CHARACTER_BYTES_MAX = 4
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # what any byte of a character but the first is in UTF-8


class Source(NamedTuple):
    """The input of a task that may have moved it to where its output is staged: its path, and the device and inode that
    it had when the task began, as far as they are known (0: not).
    """

    path: bytes
    device: int = 0
    inode: int = 0


class StagedOutput(NamedTuple):
    """One output: where it is, where it belongs (both absolute), whether its file has other names (rename(2) may do
    nothing); device and inode of that file, where they are known.
    """

    staged: bytes
    target: bytes
    is_linked: bool = False
    device: int = 0
    inode: int = 0


class StagedTask(msgspec.Struct, eq=False, gc=False):
    """The outputs of the task of ``entry``; ``error``: why they are not in their places, once that was tried;
    ``source``: its input; None: it is no file. See ``discard_or_keep``.
    """

    entry: int
    outputs: Sequence[StagedOutput]
    error: BaseException | None = None
    source: Source | None = None


def staged_name(directory: bytes, sequence: int, attempt: int, number: int, target: bytes) -> bytes:
    """Where an attempt writes its output ``number``. Whoever knows the task knows it."""
    tail = target[target.rfind(b"/") + 1 :]
    if len(tail) > NAME_TAIL_BYTES:
        tail = _end_of(tail)
    return b"%b/%d.%d.%d.%b" % (directory, sequence, attempt, number, tail)


def _end_of(name: bytes) -> bytes:
    """The last bytes of ``name``, from the beginning of a character on: a task may write the name as text."""
    tail = name[-NAME_TAIL_BYTES:]
    n_torn = len(tail) - len(tail.lstrip(_CONTINUATIONS))
    return tail[n_torn:] if n_torn < CHARACTER_BYTES_MAX else tail  # with more of them, it is no UTF-8 anyway


class _Place:
    """A directory in which outputs are staged, on the file system where they will be.

    Opened before anything is written there: syncfs tells of errors since then. Raises ``OSError``. A task may close it,
    and have its number for something else: then what is staged there is synced one by one, and nothing of the task's
    is closed.
    """

    __slots__ = ("_fd", "_identity", "_may_be_synced_whole", "path")

    def __init__(self, path: bytes) -> None:
        self.path = path
        self._fd = -1
        self._open()

    def _open(self) -> None:
        fd = calls.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = calls.fstat(fd)
            self._may_be_synced_whole = is_synced_whole(fd)
        except BaseException:
            close_quietly(fd)
            raise
        self._fd, self._identity = fd, (found.st_dev, found.st_ino)

    @property
    def is_synced_whole(self) -> bool:
        """Whether ``sync`` does all that fsync of each file there would."""
        return self._may_be_synced_whole and self._is_open()

    def _is_open(self) -> bool:
        try:
            found = calls.fstat(self._fd)
        except OSError as error:
            return error.errno != errno.EBADF
        return (found.st_dev, found.st_ino) == self._identity

    def renew(self) -> None:
        """Open it again, where a task has closed it."""
        if not self._is_open():
            with suppress(OSError):
                self._open()

    def close(self) -> None:
        """Close it, unless that was done."""
        if self._is_open():
            close_quietly(self._fd)

    def sync(self, operation: str) -> None:
        """Have all of the file system on disk. Raises ``DurabilityError``."""
        try:
            calls.syncfs(self._fd)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DurabilityError(os.fsdecode(self.path), operation, error.errno or errno.EIO, reason) from error


class Staging:
    """The directories ``paths`` in which outputs are staged: one on each file system that they are on.

    ``lock_timeout_s``: how long to wait for the lock of an output, and after a first one in vain for none any more;
    None: without end.
    """

    def __init__(self, paths: Iterable[bytes], lock_timeout_s: float | None = None) -> None:
        self._lock_timeout_s = lock_timeout_s
        self._places: dict[bytes, _Place] = {}
        self._lock_bases: dict[bytes, bytes] = {}
        try:
            for path in dict.fromkeys(paths):
                self._places[path] = _Place(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close them."""
        for place in self._places.values():
            place.close()

    def _place_of(self, output: StagedOutput) -> _Place:
        return self._places[os.path.dirname(output.staged)]

    def commit(
        self, tasks: Sequence[StagedTask], durability: Durability, new_directories: Iterable[bytes] = ()
    ) -> None:
        """Put the outputs of ``tasks`` in their places; ``error`` of each that could not be is set.

        ``new_directories``: of targets, whose own entries may not be on disk yet.
        """
        if durability in (Durability.DATA, Durability.FULL):
            self._sync_files(tasks, new_directories if durability is Durability.FULL else ())
        for task in _sound(tasks):
            self._rename(task)
        if durability is Durability.FULL:
            self._sync_directories(tasks)
        for place in self._places.values():
            place.renew()

    def _rename(self, task: StagedTask) -> None:
        try:
            for output in task.outputs:
                try:
                    self._rename_one(output)
                except OSError as error:
                    if error.errno != errno.ENOENT or not os.path.lexists(output.staged):
                        raise
                    make_directories(os.path.dirname(output.target), durable=True)  # it was removed since it was seen
                    self._rename_one(output)
        except BaseException as error:  # whatever it is, Ctrl-C in a program's own signal handler too: others go on
            _fail((task,), error)

    def _rename_one(self, output: StagedOutput) -> None:
        target = output.target
        try:
            base = self._lock_base(os.path.dirname(target))
        except OSError as error:
            raise failed(target, "lock", error) from error
        try:
            call_locked(target, base, functools.partial(_put_in_place, output), self._lock_timeout_s)
        except LockTimeoutError:
            self._lock_timeout_s = 0.0
            raise

    def _lock_base(self, directory: bytes) -> bytes:
        """The base whose lock files serve ``directory``: looked up once, which is half of what a lock costs."""
        base = self._lock_bases.get(directory)
        if base is None:
            if len(self._lock_bases) >= DIRECTORIES_KNOWN_MAX:
                self._lock_bases.clear()
            base = self._lock_bases[directory] = root_of(os.path.realpath(directory))
        return base

    def _sync_files(self, tasks: Sequence[StagedTask], new_directories: Iterable[bytes]) -> None:
        concerned: dict[_Place, list[StagedTask]] = {}
        for task in tasks:
            for output in task.outputs:
                concerned.setdefault(self._place_of(output), []).append(task)
        whole = [place for place, those in concerned.items() if place.is_synced_whole and len(those) >= TOGETHER_MIN]
        for place in whole:
            try:
                place.sync("syncfs of what was staged")
            except DurabilityError as error:
                _fail(concerned[place], error)
        if len(whole) == len(concerned):
            return
        try:
            for directory in new_directories:
                _sync_entries(directory)
        except RingpoolError as error:
            _fail(tasks, error)
        for task in _sound(tasks):
            try:
                for output in task.outputs:
                    if self._place_of(output) not in whole:
                        _sync_file(output)
            except RingpoolError as error:
                _fail((task,), error)

    def _sync_directories(self, tasks: Sequence[StagedTask]) -> None:
        concerned: dict[_Place, dict[bytes, list[StagedTask]]] = {}
        for task in _sound(tasks):
            for output in task.outputs:
                directories = concerned.setdefault(self._place_of(output), {})
                directories.setdefault(os.path.dirname(output.target), []).append(task)
        for place, directories in concerned.items():
            if place.is_synced_whole and len(directories) >= TOGETHER_MIN:
                try:
                    place.sync("syncfs, after the renames")
                except DurabilityError as error:
                    _fail([task for those in directories.values() for task in those], error)
                continue
            for directory, those in directories.items():
                try:
                    _sync_directory(directory)
                except RingpoolError as error:
                    _fail(those, error)


class StagingBeside(Staging):
    """For outputs that are staged in the directories where they will be: what may be synced together is on one device.

    Nothing is open once all that was expected is committed, or forgotten: a file system that nobody writes to can be
    unmounted. A commit may come while an output is being written.
    """

    def __init__(self, lock_timeout_s: float | None = None) -> None:
        super().__init__((), lock_timeout_s)
        self._devices: dict[int, _Place] = {}
        self._n_expected = 0
        self._looked_up_s = -math.inf

    def expect(self, target: bytes) -> None:
        """An output will be written beside ``target``, and is to be synced: commit it, or ``forget`` it. Raises
        ``AtomicWriteError``.
        """
        directory = os.path.dirname(target) or b"."
        try:
            self._open(calls.stat(directory).st_dev, directory)
        except OSError as error:
            raise failed(target, "open its directory", error) from error
        self._n_expected += 1

    def find(self, target: bytes, device: int) -> None:
        """The output that was expected is on ``device``: not its directory's where that is overlaid, or where its task
        has put a link to another file system in its place. Raises ``AtomicWriteError``.
        """
        try:
            self._open(device, os.path.dirname(target) or b".")
        except OSError as error:
            raise failed(target, "open its directory", error) from error

    def _open(self, device: int, directory: bytes) -> None:
        if device not in self._devices:
            self._devices[device] = _Place(directory)

    def forget(self, n: int = 1) -> None:
        """So many that were expected are so no more."""
        self._n_expected = max(0, self._n_expected - n)  # those that need no sync were not expected
        if not self._n_expected:
            self.close()

    def commit(
        self, tasks: Sequence[StagedTask], durability: Durability, new_directories: Iterable[bytes] = ()
    ) -> None:
        """As there. Whose lock files serve a directory is looked up anew after a tenth of a second: one may appear."""
        now_s = time.monotonic()
        if now_s - self._looked_up_s > LOCK_BASES_S:
            self._lock_bases.clear()
            self._looked_up_s = now_s
        try:
            super().commit(tasks, durability, new_directories)
        finally:
            self.forget(len(tasks))

    def close(self) -> None:
        """Close what was opened for the tasks at hand."""
        while self._devices:
            self._devices.popitem()[1].close()

    def _place_of(self, output: StagedOutput) -> _Place:
        return self._devices[output.device]


def _put_in_place(output: StagedOutput) -> None:
    try:
        calls.rename(output.staged, output.target)  # the commit point
    except OSError as error:
        if error.errno != errno.ENOENT or not _is_in_place(output):
            raise failed(output.target, "rename", error) from error
    if output.is_linked:
        discard_staged(output.staged)


def _is_in_place(output: StagedOutput) -> bool:
    """Whether it was renamed before, by one who died; and not removed by a stranger, while an older output stands."""
    found = lstat(output.target)
    is_it = found is not None and (not output.inode or (found.st_dev, found.st_ino) == (output.device, output.inode))
    return is_it and not os.path.lexists(output.staged)


def _sound(tasks: Iterable[StagedTask]) -> Iterable[StagedTask]:
    return (task for task in tasks if task.error is None)


def _fail(tasks: Iterable[StagedTask], error: BaseException) -> None:
    for task in tasks:
        if task.error is None:
            task.error = error
            discard(task)


def discard(task: StagedTask) -> None:
    """Remove, or keep, what is staged of it."""
    for output in task.outputs:
        discard_or_keep(output.staged, task.source)


def find_source(path: bytes) -> Source | None:
    """The file at ``path``; None: there is none, it is the name of anything."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return Source(path, found.st_dev, found.st_ino)


def may_be_only_copy(staged: bytes, source: Source | None) -> bool:
    """Whether what is staged may be all that there is of the input: the file itself, moved, or made of one that is
    gone, or has given its name to another (a log that is taken away, while its program goes on with a new one). A
    symlink is where it leads.
    """
    try:
        found = os.lstat(staged)
    except OSError:
        return False
    if source is None:
        return False
    if found.st_nlink == 1 and found.st_ino == source.inode and found.st_dev == (source.device or found.st_dev):
        return True
    try:
        there = os.stat(source.path)
    except (OSError, ValueError):
        return True
    if source.inode not in (0, there.st_ino):
        return True
    return found.st_nlink == 1 and os.path.samestat(there, found)  # a symlink to what is staged


def discard_or_keep(staged: bytes, source: Source | None) -> None:
    """Remove what a task has staged of its input ``source`` (None: that was no file, or not there when the task was
    called); or keep it, as ``_kept_name`` has it, where it may be the only copy. The caller has stopped the timers of
    the task.
    """
    if source is None or not may_be_only_copy(staged, source):
        discard_staged(staged)
        return
    fate = "is another file now" if os.path.exists(source.path) else "is gone"
    keep(staged, f"input {os.fsdecode(source.path)} {fate}, and its output")


def keep(staged: bytes, what: str) -> None:
    """Give a staged file a name where nobody removes it, and say on standard error where it is. Never raises."""
    _keep_as(staged, _kept_name(staged), what)


def keep_output(path: bytes, what: str) -> None:
    """``keep`` a file that is in its place, beside that."""
    directory, name = os.path.split(path)
    _keep_as(path, os.path.join(directory, random_staging_name(name) + b".kept"), what)


def _keep_as(path: bytes, kept: bytes, what: str) -> None:
    try:
        calls.rename(path, kept)
        where = f"not in its place but in {os.fsdecode(kept)}"
    except OSError as error:
        where = f"lost, for {os.fsdecode(kept)} cannot be made: {error.strerror}"
    words = f"ringpool: {what} is {where}"
    with suppress(OSError, ValueError, AttributeError):  # nobody listens
        print(words.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _kept_name(staged: bytes) -> bytes:
    """``<staged>.kept`` beside an output's place, else the job's ``.ringpool/kept.<token>.<name>``: in no directory of
    its own, which a full disk may have no room for. What is kept already is of an earlier call, and has its name.
    """
    staging, name = os.path.split(staged)
    kept, n = staged, 1
    if not is_staging_name(name):
        kept = os.path.join(
            os.path.dirname(os.path.dirname(staging)), b"kept.%b.%b" % (os.path.basename(staging), name)
        )
    ending = b".kept" if kept is staged else b""
    while os.path.lexists(kept + ending):
        n += 1
        ending = b".%d.kept" % n if kept is staged else b".%d" % n
    return kept + ending


def _sync_file(output: StagedOutput) -> None:
    try:
        fd = calls.open(output.staged, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return  # it is in its place, so it was synced before
    except OSError as error:
        raise failed(output.target, "open what was staged", error) from error
    try:
        sync(fd, output.target, "fsync of the output")
    finally:
        close_quietly(fd)


def _sync_entries(directory: bytes) -> None:
    """Have ``directory`` and all above it on disk; each is synced once in a process."""
    above = os.path.dirname(directory)
    if above not in (directory, b""):
        _sync_entries(above)
    make_directories(directory or b"/", durable=True)


def _sync_directory(directory: bytes) -> None:
    try:
        fd = calls.open(directory or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DurabilityError(
            os.fsdecode(directory), "opening the directory, after the rename", error.errno or errno.EIO, reason
        ) from error
    try:
        sync(fd, directory, "fsync of the directory, after the rename")
    finally:
        close_quietly(fd)
