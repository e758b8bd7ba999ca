"""Concurrent file operations as a guide to them teaches: the way that ringpool is measured against.

    what            how                                                                     survives a kill
    LockedWriter    written in place, under a lock of the process's or of multiprocessing   perhaps torn
    LockedFiles     a FileLock for each file; read; or temporary file, fsync, replace       yes
    Transaction     FileLocks, backups, temporary files, renames; at an error put back      no: half of it may stand
    JsonQueue       all tasks in one JSON file, written anew at each claim and each result  a claimed task is lost
    TextStatus      a text file in memory, one line of fixed width a file                   yes; no owner is known dead

Written for this comparison, as such code is written with care: locks are kept and not made anew, a temporary file has a
fixed name (its lock makes it its writer's), JSON is dumped compactly, a line is searched by ``mmap.find``. ``durable``
adds what a write needs to survive a power cut: fsync of the file, and of its directory after the rename.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any
from zlib import crc32

from filelock import FileLock

AnyLock = AbstractContextManager[Any]
END_S = 60.0  # how long a queue's workers may take to start


# ---- files


class LockedWriter:
    """Writes files where they stand. ``locks``: of which each path has one, by its name."""

    def __init__(self, locks: Sequence[AnyLock] | None = None) -> None:
        self._locks = [threading.Lock() for _ in range(64)] if locks is None else locks

    def write(self, path: str, content: bytes) -> None:
        """Make ``content`` the file's, while no other user of the same locks writes it."""
        with self._locks[crc32(path.encode()) % len(self._locks)], open(path, "wb") as file:
            file.write(content)


class FileLocks:
    """A ``FileLock`` beside each file, kept. For one process: a fork makes its own."""

    def __init__(self) -> None:
        self._locks: dict[str, FileLock] = {}

    def lock(self, path: str) -> FileLock:
        """The lock of ``path``."""
        lock = self._locks.get(path)
        return self._locks.setdefault(path, FileLock(f"{path}.lock")) if lock is None else lock


class LockedFiles(FileLocks):
    """Reads files, and replaces them as a whole, under their ``FileLock``."""

    def read(self, path: str) -> bytes:
        """The content. Raises ``FileNotFoundError``."""
        with self.lock(path), open(path, "rb") as file:
            return file.read()

    def write(self, path: str, content: bytes, *, durable: bool = False) -> None:
        """Make ``content`` the file's: the old or the new one is there, never a part."""
        with self.lock(path):
            temporary = f"{path}.tmp"
            write_temporary(temporary, content, durable=durable)
            os.replace(temporary, path)
            if durable:
                sync_directory(os.path.dirname(path))


def write_temporary(path: str, content: bytes, *, durable: bool) -> None:
    """Write a file; with ``durable``, onto the disk. At an error none is left."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        raise


def sync_directory(path: str) -> None:
    """Make the renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- transactions


class Transaction:
    """Writes to several files: at the end of the block all, or, after an error, none.

    A backup of each file that is there, then a temporary file for each, then all renames. An error during these puts
    the backups back. A kill during the renames leaves some files new, some old, and the backups; nobody repairs that.
    """

    def __init__(self, locks: FileLocks, *, durable: bool = False) -> None:
        self._locks = locks
        self._durable = durable
        self._contents: dict[str, bytes] = {}

    def write(self, path: str, content: bytes) -> None:
        """Write it at the end."""
        self._contents[path] = content

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()

    def commit(self) -> None:
        """All of it. Raises ``OSError``, with everything as it was."""
        with contextlib.ExitStack() as held:
            paths = sorted(self._contents)
            for path in paths:
                held.enter_context(self._locks.lock(path))
            backed_up: list[str] = []
            replaced: list[str] = []
            try:
                for path in paths:
                    self._back_up(path, backed_up)
                for path in paths:
                    write_temporary(f"{path}.tmp", self._contents[path], durable=self._durable)
                self._sync_directories()  # backups are to be found after a power cut in what follows
                for path in paths:
                    os.replace(f"{path}.tmp", path)
                    replaced.append(path)
            except BaseException:
                self._roll_back(paths, backed_up, replaced)
                raise
            self._sync_directories()
            for path in backed_up:
                os.unlink(f"{path}.bak")

    def _back_up(self, path: str, backed_up: list[str]) -> None:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return
        write_temporary(f"{path}.bak", content, durable=self._durable)
        backed_up.append(path)

    def _roll_back(self, paths: Sequence[str], backed_up: Sequence[str], replaced: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}.tmp")
            if path in backed_up:
                os.replace(f"{path}.bak", path)
            elif path in replaced:
                os.unlink(path)
        self._sync_directories()

    def _sync_directories(self) -> None:
        if self._durable:
            for directory in {os.path.dirname(path) for path in self._contents}:
                sync_directory(directory)


# ---- a queue


class JsonQueue:
    """Tasks and their results in the JSON file ``path``: ``{"tasks": [{id, path, state, worker, result}, ...]}``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock")

    def fill(self, paths: Iterable[str]) -> None:
        """Make it a queue of these, all pending."""
        tasks = [{"id": i, "path": path, "state": "pending"} for i, path in enumerate(paths)]
        with self._lock:
            self._store({"tasks": tasks})

    def claim(self) -> tuple[int, str] | None:
        """The number and the path of a task that is this worker's now; None where none is pending."""
        with self._lock:
            document = self._load()
            for task in document["tasks"]:
                if task["state"] == "pending":
                    task |= {"state": "running", "worker": os.getpid()}
                    self._store(document)
                    return task["id"], task["path"]
        return None

    def finish(self, number: int, result: object) -> None:
        """Keep the result of a task."""
        with self._lock:
            document = self._load()
            document["tasks"][number] |= {"state": "done", "result": result}
            self._store(document)

    def tasks(self) -> list[dict[str, Any]]:
        """All tasks, as they are now."""
        with self._lock:
            return self._load()["tasks"]

    def _load(self) -> dict[str, list[dict[str, Any]]]:
        with open(self.path, encoding="utf-8") as file:
            return json.load(file)

    def _store(self, document: object) -> None:
        temporary = f"{self.path}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, separators=(",", ":")))  # faster than json.dump
        os.replace(temporary, self.path)


def serve(path: str, call: Callable[[str], object], tasks_max: int, gate: Any) -> None:
    """In a process: take tasks until there are none, or ``tasks_max`` were taken."""
    queue = JsonQueue(path)
    gate.wait(END_S)
    for _ in range(tasks_max):
        task = queue.claim()
        if task is None:
            return
        number, source = task
        queue.finish(number, call(source))


def run_queue(path: str, call: Callable[[str], object], workers: int, tasks_max: int) -> float:
    """Let so many processes take up to ``tasks_max`` tasks each; the seconds that it took, once all had started.

    Raises ``RuntimeError`` where one of them failed.
    """
    context = multiprocessing.get_context("forkserver")
    gate = context.Barrier(workers + 1)
    processes = [context.Process(target=serve, args=(path, call, tasks_max, gate)) for _ in range(workers)]
    for process in processes:
        process.start()
    gate.wait(END_S)
    began_s = time.perf_counter()
    for process in processes:
        process.join()
    spent_s = time.perf_counter() - began_s
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"workers ended with {[process.exitcode for process in processes]}")
    return spent_s


# ---- a status table


PATH_CHARACTERS, STATE_CHARACTERS, PID_DIGITS, TIME_CHARACTERS = 180, 12, 10, 20
LINE_CHARACTERS = PATH_CHARACTERS + STATE_CHARACTERS + PID_DIGITS + TIME_CHARACTERS + 1
_STATE_AT, _PID_AT = PATH_CHARACTERS, PATH_CHARACTERS + STATE_CHARACTERS
_TIME_AT = _PID_AT + PID_DIGITS


def text_line(path: str, state: str) -> bytes:
    """A line. Raises ``ValueError`` where ``path`` is too long."""
    line = f"{path:<{PATH_CHARACTERS}}{state:<{STATE_CHARACTERS}}{os.getpid():>{PID_DIGITS}}{time.time():>20.6f}\n"
    if len(line) != LINE_CHARACTERS:
        raise ValueError(f"no room for {path}")
    return line.encode("ascii")


class TextStatus:
    """The states of up to ``lines_max`` files, as lines of text in a mapped file that processes share.

    ``lock`` is theirs in common: without it two who add lines would write over each other. Raises ``OSError``.
    """

    def __init__(self, path: str, lines_max: int, lock: AnyLock) -> None:
        self._lock = lock
        with open(path, "a+b") as file:
            os.ftruncate(file.fileno(), lines_max * LINE_CHARACTERS)
            self._map = mmap.mmap(file.fileno(), lines_max * LINE_CHARACTERS)

    def close(self) -> None:
        """Detach it."""
        self._map.close()

    def set(self, path: str, state: str) -> None:
        """Write the state of ``path``, and that this process gave it. Raises ``ValueError`` where there is no room."""
        line = text_line(path, state)
        with self._lock:
            at = self._find(path)
            if at < 0:
                at = self._map.find(b"\0" * LINE_CHARACTERS)  # all lines before the first unused one are text
            if at < 0:
                raise ValueError(f"no line is left for {path}")
            self._map[at : at + LINE_CHARACTERS] = line

    def fill(self, paths: Sequence[str], state: str) -> None:
        """Make these the first lines, without looking whether they are there."""
        with self._lock:
            for number, path in enumerate(paths):
                self._map[number * LINE_CHARACTERS : (number + 1) * LINE_CHARACTERS] = text_line(path, state)

    def get(self, path: str) -> tuple[str, int, float] | None:
        """The state of ``path``, who gave it, and when; None where there is no line for it."""
        with self._lock:
            at = self._find(path)
            line = self._map[at : at + LINE_CHARACTERS].decode("ascii") if at >= 0 else ""
        if not line:
            return None
        return line[_STATE_AT:_PID_AT].rstrip(), int(line[_PID_AT:_TIME_AT]), float(line[_TIME_AT:])

    def _find(self, path: str) -> int:
        """Where its line begins, or -1."""
        wanted = path.encode("ascii").ljust(PATH_CHARACTERS)
        at = self._map.find(wanted)
        while at >= 0 and at % LINE_CHARACTERS:
            at = self._map.find(wanted, at + 1)
        return at
