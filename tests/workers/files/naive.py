"""File code as it is often written, with its mistakes: what test_known_mistakes.py holds ours against."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from ringpool.workers.files.oslayer import calls


def write_in_steps(path: Path, content: str) -> Iterator[None]:
    """Temp and rename, with the temp name of everybody. Stops before the rename."""
    temp = path.with_suffix(".tmp")
    temp.write_text(content)
    yield
    os.replace(temp, path)


def write_unsynced(path: Path, content: bytes) -> None:
    """Temp and rename, without fsync; through oslayer, so that the model of the page cache sees it."""
    temp = os.fsencode(path) + b".new"
    fd = calls.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    calls.write(fd, content)
    calls.close(fd)
    calls.rename(temp, os.fsencode(path))


def write_once(path: Path, content: bytes) -> None:
    """One write(2), whose result nobody looks at."""
    fd = calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    calls.write(fd, content)
    calls.close(fd)


def write_and_retry_fsync(path: Path, content: bytes) -> None:
    fd = calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    calls.write(fd, content)
    for _ in range(3):
        with contextlib.suppress(OSError):
            calls.fsync(fd)
            break
    calls.close(fd)


def write_leaving_temp(path: Path, content: bytes) -> None:
    temp = os.fsencode(path) + b".tmp"
    fd = calls.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    calls.write(fd, content)
    calls.close(fd)
    calls.rename(temp, os.fsencode(path))


def write_synced(path: Path, content: bytes) -> None:
    """An error after the rename looks like any other."""
    temp = os.fsencode(path) + b".new"
    fd = calls.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    calls.write(fd, content)
    calls.fsync(fd)
    calls.close(fd)
    calls.rename(temp, os.fsencode(path))
    directory = calls.open(os.path.dirname(os.fsencode(path)), os.O_RDONLY)
    try:
        calls.fsync(directory)
    finally:
        calls.close(directory)


def backup_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.{int(time.time())}.bak")


class TextTransaction:
    """Keeps the old contents in memory, as text, and a list of what it did."""

    def __init__(self) -> None:
        self.backups: dict[Path, str] = {}
        self.renames: list[dict[str, str]] = []

    def write(self, path: Path, content: str) -> None:
        self.backups[path] = path.read_text()
        path.unlink()
        path.write_text(content)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)
        self.renames.append({"operation": "rename", "path": str(new)})

    def rollback(self) -> None:
        for path, content in self.backups.items():
            path.unlink()
            path.write_text(content)
        for entry in self.renames:
            os.replace(entry["path"], entry["old_path"])


def replay(journal: Path) -> None:
    for entry in json.loads(journal.read_text()):
        if entry["operation"] == "delete":
            Path(entry["path"]).unlink(missing_ok=True)


class PollingLock:
    """A lock file made with O_EXCL, tried again every 0.1 s; False where it is not had in time."""

    def __init__(self, path: Path) -> None:
        self.lock_path = path.with_name(path.name + ".lock")

    def acquire(self, timeout_s: float, sleep: Callable[[float], None] = time.sleep) -> bool:
        for _ in range(max(1, int(timeout_s / 0.1))):
            try:
                os.close(os.open(self.lock_path, os.O_CREAT | os.O_EXCL))
                return True
            except FileExistsError:
                sleep(0.1)
        return False

    def release(self) -> None:
        self.lock_path.unlink()


class FlockTable:
    """A dictionary of locks, which only grows, until a clean-up drops them all."""

    def __init__(self) -> None:
        self.locks: dict[str, int] = {}

    def acquire(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self.locks[path] = fd

    def release(self, path: str) -> None:
        fcntl.flock(self.locks[path], fcntl.LOCK_UN)

    def clean_up(self) -> None:
        for fd in self.locks.values():
            os.close(fd)
        self.locks.clear()


def is_free(path: Path | str) -> bool:
    """Whether a flock on the file at ``path`` could be had now."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


class TextTable:
    """Path and status, a line each, in 1,024 bytes."""

    def __init__(self) -> None:
        self.block = bytearray(1024)

    def set(self, path: str, status: str) -> None:
        statuses = self.all() | {path: status}
        text = "\n".join(f"{path}:{status}:{os.getpid()}" for path, status in statuses.items())
        octets = text.encode()[:1024]
        self.block[: len(octets)] = octets

    def all(self) -> dict[str, str]:
        lines = self.block.rstrip(b"\0").decode().splitlines()
        return {fields[0]: fields[1] for fields in (line.split(":") for line in lines) if len(fields) >= 2}


def push(queue: Path, item: str) -> None:
    """The whole queue again for each item, in place; through oslayer, so that it can be killed."""
    items = json.loads(queue.read_text()) if queue.exists() else []
    fd = calls.open(queue, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    calls.write(fd, json.dumps([*items, item]).encode())
    calls.close(fd)


def write_below(base: Path, path: str, content: bytes) -> None:
    (base / path).write_bytes(content)


def write_checked(base: Path, path: str, content: bytes, between: Callable[[], Any]) -> None:
    """Looks where the path leads, and then writes to where it leads by then."""
    if not os.path.realpath(base / path).startswith(os.fspath(base)):
        raise PermissionError(errno.EPERM, "outside")
    between()
    (base / path).write_bytes(content)


def replace_from_temporary_directory(path: Path, content: bytes, temporary: Path) -> None:
    temp = temporary / f"ringpool-test-{os.getpid()}"
    temp.write_bytes(content)
    try:
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def flocked(path: Path, mode: int = fcntl.LOCK_EX) -> Generator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, mode)
        yield fd
    finally:
        os.close(fd)
