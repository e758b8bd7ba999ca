"""What a power cut can leave of what file code does: a model of the page cache.

    recording = Recording(root, Random(1))   root: what is there now is on disk
    with recording:
        atomic_write(root / "a", b"new")     any code that makes its system calls through oslayer, in one thread
        recording.mark("returned")
    for disk in recording.disks(Random(1)):  every state that a cut at any point of it can leave, or a sample of them
        disk.contents                        {b"a": b"new"}: the files by path; .ringpool and temporary names left out
        disk.marks                           ("returned",), or () where the cut came before
        with disk.materialised(directory) as numbers:        the same, as real files below an empty directory

What is not synced is on disk or not, in any combination:

    directory operations    create, link, unlink, rename, mkdir: each whole or not at all, a rename at both its ends;
                            on disk for certain after fsync of one of their directories, or syncfs
    a file's bytes          as last synced | the first half of what came since | all, but with zeros for it | all;
                            on disk for certain after fsync of that file, or syncfs; independent of its name

A real file system leaves fewer states. What this one does to the code under test: it gives a freed inode number to the
next file at once, as ext4 does, or never, as tmpfs does, on which a recording should run; by lot, for each file. Two
files with one number are never on disk together. ``intercepted(seen_as(numbers))``
lets a recovery see the inode numbers that the recorded code saw; fsync, which it needs no more, does nothing in it.
``Recording(directory, random, numbers)`` records the recovery, for the states of a second power cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import combinations, count
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, NamedTuple

from ringpool.workers.files.naming import is_staging_name
from ringpool.workers.files.oslayer import Around, intercepted

ALL_SUBSETS_MAX = 7  # of more unsynced operations not every combination is taken, but a sample

Place = tuple[int, bytes]  # a directory's inode, and a name there

# Nothing that a power cut could undo: reads, locks, and metadata, which the model leaves out.
_WITHOUT_EFFECT = frozenset(
    {
        *("access", "close", "fstat", "getxattr", "listdir", "listxattr", "pread", "read", "readlink"),
        *("openat2", "scandir", "stat", "sync_file_range"),  # openat2 opens directories only
        *("fcntl", "flock", "lock_descriptor", "unlock_descriptor"),
        *("chmod", "fchmod", "fchown", "removexattr", "setxattr"),
    }
)


class _Entries(NamedTuple):
    """A directory operation: what is at these places after it; 0 for nothing."""

    changes: tuple[tuple[Place, int], ...]


class _Bytes(NamedTuple):
    """A file's content after a write or a truncation."""

    inode: int
    content: bytes


class _Sync(NamedTuple):
    """fsync of a file or directory; of everything where ``inode`` is 0."""

    inode: int


class _Mark(NamedTuple):
    text: str


class Disk(NamedTuple):
    """One state that a power cut can leave."""

    root: int
    entries: dict[Place, int]
    files: dict[int, bytes]  # what is not in it is a directory
    numbers: dict[int, int]  # the inode numbers that the code under test saw
    marks: tuple[str, ...]

    @property
    def contents(self) -> dict[bytes, bytes]:
        """The files by their paths from the root, but for ringpool's own."""
        found: dict[bytes, bytes] = {}
        for path, inode in self._walk():
            ours = b".ringpool" in path.split(b"/") or is_staging_name(path.rpartition(b"/")[2])
            if inode in self.files and not ours:
                found[path] = self.files[inode]
        return found

    def is_possible(self) -> bool:
        """Whether no two files have one inode number: then the second one would not be there before the first went."""
        numbers = [self.numbers[inode] for inode in self.files]
        return len(set(numbers)) == len(numbers)

    @contextmanager
    def materialised(self, directory: Path) -> Generator[dict[int, int]]:
        """Make it, in a directory that is empty, and remove it afterwards, with whatever came to be there."""
        top = os.fsencode(directory)
        numbers: dict[int, int] = {}  # from those of the real files
        made: dict[int, bytes] = {}
        try:
            for path, inode in self._walk():
                place = top + b"/" + path
                if inode not in self.files:
                    os.mkdir(place)
                elif inode in made:
                    os.link(made[inode], place)
                else:
                    made[inode] = place
                    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    os.write(fd, self.files[inode])
                    numbers[os.fstat(fd).st_ino] = self.numbers[inode]
                    os.close(fd)
            yield numbers
        finally:
            _empty(top)

    def _walk(self) -> Generator[tuple[bytes, int]]:
        """Paths and inodes of what can be reached, a directory before what is in it."""
        below: dict[int, list[tuple[bytes, int]]] = {}
        for (parent, name), inode in self.entries.items():
            below.setdefault(parent, []).append((name, inode))
        waiting = [(b"", self.root)]
        while waiting:
            prefix, directory = waiting.pop()
            for name, inode in below.get(directory, ()):
                yield prefix + name, inode
                if inode not in self.files:
                    waiting.append((prefix + name + b"/", inode))


class Recording:
    """What the code in its block does to the files under ``root``."""

    def __init__(self, root: Path, random: Random, numbers: dict[int, int] | None = None) -> None:
        self.root = os.stat(root).st_ino
        self._random = random
        self._given = numbers or {}
        self._trace: list[_Entries | _Bytes | _Sync | _Mark] = []
        self._entries: dict[Place, int] = {}  # as the running system sees them
        self._files: dict[int, bytes] = {}
        self._numbers: dict[int, int] = {}
        self._open: dict[int, list[int]] = {}  # descriptor -> inode, position
        self._opaque: set[int] = set()  # directories of lock files, whose content no power cut keeps, nor needs to
        for directory, _, names in os.walk(os.fsencode(root)):
            self._adopt(directory, names, top=directory == os.fsencode(root))
        self._first = (dict(self._entries), dict(self._files))
        self._block: AbstractContextManager[None] | None = None
        self.around: Around | None = None  # between the code and the recording: a test may make calls fail there

    def _adopt(self, directory: bytes, names: list[bytes], *, top: bool) -> None:
        inode = os.stat(directory).st_ino
        if not top:
            parent, name = os.path.split(directory)
            self._entries[os.stat(parent).st_ino, name] = inode
        if directory.endswith(b"/.ringpool/locks"):
            self._opaque.add(inode)
            return
        for name in names:
            path = os.path.join(directory, name)
            found = os.lstat(path).st_ino
            self._entries[inode, name] = found
            self._files[found] = Path(os.fsdecode(path)).read_bytes()
            self._number(found)

    def mark(self, text: str) -> None:
        """The code has come to this."""
        self._trace.append(_Mark(text))

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(each.text for each in self._trace if isinstance(each, _Mark))

    def __enter__(self) -> Recording:
        self._block = intercepted(self._call)
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._block is not None
        self._block.__exit__(kind, error, trace)

    # -- recording

    def _call(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            handle = getattr(self, f"_on_{name}", None)
            if handle is None:
                assert name in _WITHOUT_EFFECT, f"the model does not know {name}"
                return call(*args, **kwargs)
            return handle(call, *args, **kwargs)

        if self.around is not None:
            return self.around(name, recorded, args, kwargs)
        return recorded(*args, **kwargs)

    def _place(self, path: Any, dir_fd: int | None) -> Place:
        parent, name = os.path.split(os.fsencode(path))
        return os.stat(parent or b".", dir_fd=None if os.path.isabs(parent) else dir_fd).st_ino, name

    def _number(self, inode: int) -> None:
        """A number that no living file has: the lowest one, or a fresh one."""
        taken = set(self._numbers.values())
        if self._random.random() < 0.5:
            taken = {self._numbers[each] for each in self._entries.values() if each in self._numbers}
        self._numbers[inode] = self._given.get(inode, 0) or next(
            number for number in count(1000) if number not in taken
        )

    def _change(self, *changes: tuple[Place, int]) -> None:
        if any(place[0] in self._opaque for place, _ in changes):
            return
        for place, inode in changes:
            if inode:
                self._entries[place] = inode
            else:
                del self._entries[place]
        self._trace.append(_Entries(changes))

    def _set(self, inode: int, content: bytes) -> None:
        self._files[inode] = content
        self._trace.append(_Bytes(inode, content))

    def _on_open(self, call: Callable[..., int], path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
        fd = call(path, flags, *rest, dir_fd=dir_fd)
        inode = os.fstat(fd).st_ino
        if flags & os.O_CREAT and flags & os.O_TMPFILE != os.O_TMPFILE:
            place = self._place(path, dir_fd)
            if place[0] not in self._opaque and place not in self._entries:
                self._number(inode)
                self._set(inode, b"")
                self._change((place, inode))
        self._open.pop(fd, None)
        if inode in self._files:
            if flags & os.O_TRUNC and self._files[inode]:
                self._set(inode, b"")
            self._open[fd] = [inode, -1 if flags & os.O_APPEND else 0]
        return fd

    def _on_write(self, call: Callable[..., int], fd: int, content: Any) -> int:
        count = call(fd, content)
        if fd in self._open:
            inode, position = self._open[fd]
            old = self._files[inode]
            at = len(old) if position < 0 else position
            self._set(inode, old[:at].ljust(at, b"\0") + bytes(content[:count]) + old[at + count :])
            if position >= 0:
                self._open[fd][1] += count
        return count

    def _on_pwrite(self, call: Callable[..., int], fd: int, content: Any, offset: int) -> int:
        count = call(fd, content, offset)
        if fd in self._open:
            inode = self._open[fd][0]
            old = self._files[inode]
            self._set(inode, old[:offset].ljust(offset, b"\0") + bytes(content[:count]) + old[offset + count :])
        return count

    def _on_ftruncate(self, call: Callable[..., None], fd: int, length: int) -> None:
        call(fd, length)
        if fd in self._open:
            inode = self._open[fd][0]
            self._set(inode, self._files[inode][:length].ljust(length, b"\0"))

    def _on_fsync(self, call: Callable[..., None], fd: int) -> None:
        self._trace.append(_Sync(os.fstat(fd).st_ino))

    _on_fdatasync = _on_fsync

    def _on_syncfs(self, call: Callable[..., None], fd: int) -> None:
        self._trace.append(_Sync(0))

    def _on_rename(
        self,
        call: Callable[..., None],
        source: Any,
        target: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        old, new = self._place(source, src_dir_fd), self._place(target, dst_dir_fd)
        call(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        inode = self._entries[old]
        if self._entries.get(new) != inode:  # two links of one file: nothing happens
            self._change((old, 0), (new, inode))

    def _on_rename_exclusive(self, call: Callable[..., None], source: Any, target: Any, *dir_fds: int) -> None:
        old, new = self._place(source, dir_fds[0]), self._place(target, dir_fds[1])
        call(source, target, *dir_fds)
        self._change((old, 0), (new, self._entries[old]))

    def _on_link(
        self,
        call: Callable[..., None],
        source: Any,
        target: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        old, new = self._place(source, src_dir_fd), self._place(target, dst_dir_fd)
        call(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
        self._change((new, self._entries[old]))

    def _on_unlink(self, call: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        call(path, dir_fd=dir_fd)
        self._change((place, 0))

    _on_rmdir = _on_unlink

    def _on_mkdir(self, call: Callable[..., None], path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        call(path, mode, dir_fd=dir_fd)
        inode = os.stat(path, dir_fd=dir_fd).st_ino
        self._change((self._place(path, dir_fd), inode))
        if os.fsencode(path).endswith(b"/.ringpool/locks"):
            self._opaque.add(inode)

    def _on_stat(self, call: Callable[..., os.stat_result], *args: Any, **kwargs: Any) -> os.stat_result:
        return _with_number(call(*args, **kwargs), self._numbers)

    _on_fstat = _on_stat

    # -- replaying

    def disks(self, random: Random, subsets_max: int | None = None) -> Iterator[Disk]:
        """The states, each once for the marks that it may be met under; ``subsets_max``: as many at each point."""
        seen: set[tuple[Any, ...]] = set()
        cache = _PageCache(*self._first)
        for at in range(len(self._trace) + 1):
            if at:
                cache.step(self._trace[at - 1])
            marks = tuple(each.text for each in self._trace[:at] if isinstance(each, _Mark))
            for entries, files in cache.states(random, subsets_max):
                disk = Disk(self.root, entries, files, self._numbers, marks)
                key = (marks, frozenset(entries.items()), frozenset(files.items()))
                if key not in seen and disk.is_possible():
                    seen.add(key)
                    yield disk


class _PageCache:
    """What is on disk for certain, and what is on its way there."""

    def __init__(self, entries: dict[Place, int], files: dict[int, bytes]) -> None:
        self.entries = dict(entries)  # on disk
        self.synced = dict(files)  # on disk
        self.files = dict(files)  # as the running system sees them
        self.pending: list[tuple[bool, _Entries]] = []  # whether it is on disk for certain, while one before it is not

    def step(self, event: _Entries | _Bytes | _Sync | _Mark) -> None:
        match event:
            case _Entries():
                self.pending.append((False, event))
            case _Bytes(inode, content):
                self.synced.setdefault(inode, b"")
                self.files[inode] = content
            case _Sync(0):
                self.synced.update(self.files)
                self.pending = [(True, each) for _, each in self.pending]
            case _Sync(inode) if inode in self.files:
                self.synced[inode] = self.files[inode]
            case _Sync(inode):
                self.pending = [
                    (certain or any(place[0] == inode for place, _ in each.changes), each)
                    for certain, each in self.pending
                ]
            case _Mark():
                pass
        while self.pending and self.pending[0][0]:
            _apply(self.entries, self.pending.pop(0)[1])

    def states(self, random: Random, subsets_max: int | None) -> Iterator[tuple[dict[Place, int], dict[int, bytes]]]:
        uncertain = [at for at, (certain, _) in enumerate(self.pending) if not certain]
        chosen = list(_subsets(uncertain, random))
        if subsets_max is not None and len(chosen) > subsets_max:
            chosen = random.sample(chosen, subsets_max)
        for subset in chosen:
            entries = dict(self.entries)
            for at, (certain, event) in enumerate(self.pending):
                if certain or at in subset:
                    _apply(entries, event)
            inodes = {inode for inode in entries.values() if inode in self.files}
            dirty = sorted(inode for inode in inodes if self.synced[inode] != self.files[inode])
            for bytes_of in self._variants(dirty, random):
                yield entries, {inode: bytes_of.get(inode, self.files[inode]) for inode in inodes}

    def _variants(self, dirty: list[int], random: Random) -> Iterator[dict[int, bytes]]:
        """Contents of the files that are not synced: alike for all of them, and at random."""
        choices = {inode: _partly(self.synced[inode], self.files[inode]) for inode in dirty}
        if not dirty:
            yield {}
            return
        for at in range(4):
            yield {inode: contents[at] for inode, contents in choices.items()}
        for _ in range(2 if len(dirty) > 1 else 0):
            yield {inode: random.choice(contents) for inode, contents in choices.items()}


def _partly(old: bytes, new: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """None, half, none but as many zeros, and all of what came after ``old``."""
    kept = len(old) if new.startswith(old) else 0
    half = kept + (len(new) - kept) // 2
    return old, new[:half] + old[half:], new[:kept].ljust(len(new), b"\0"), new


def _subsets(uncertain: list[int], random: Random) -> Iterator[set[int]]:
    if len(uncertain) <= ALL_SUBSETS_MAX:
        for size in range(len(uncertain) + 1):
            yield from map(set, combinations(uncertain, size))
        return
    whole = set(uncertain)
    yield from (set(uncertain[:length]) for length in range(len(uncertain) + 1))
    yield from (whole - {each} for each in uncertain)
    yield from ({each} for each in uncertain)
    yield from ({each for each in uncertain if random.random() < 0.5} for _ in range(2**ALL_SUBSETS_MAX))


def _apply(entries: dict[Place, int], event: _Entries) -> None:
    for place, inode in event.changes:
        if inode:
            entries[place] = inode
        else:
            entries.pop(place, None)


def seen_as(numbers: dict[int, int]) -> Around:
    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fsync":
            return None
        result = call(*args, **kwargs)
        return _with_number(result, numbers) if name in ("stat", "fstat") else result

    return around


def _with_number(found: os.stat_result, numbers: dict[int, int]) -> os.stat_result:
    """The same, with the inode number that stands for its own, if one does."""
    number = numbers.get(found.st_ino)
    return found if number is None else os.stat_result((found.st_mode, number, *found[2:]))


def _empty(directory: bytes) -> None:
    """Remove all that is in it."""
    with os.scandir(directory) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                _empty(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)
