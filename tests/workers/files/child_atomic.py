"""What the tests of writes share: the writers under test, and what records, fails, interrupts or kills them."""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.workers.files.child import say

from ringpool.errors import BatchWriteError
from ringpool.workers.files import atomic, batch, durability, output, replacement, stream, target
from ringpool.workers.files.atomic import atomic_open, atomic_write
from ringpool.workers.files.attributes import born_ns
from ringpool.workers.files.batch import write_batch
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.naming import is_staging_name, random_token, staging_name
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.output import discard_staged, finish_staged, prepare_target
from ringpool.workers.groupcommit import StagedOutput, StagedTask, StagingBeside

Call = tuple[str, tuple[Any, ...], Any]


@contextmanager
def traced() -> Iterator[list[Call]]:
    """The calls of the block: name, positional arguments, result."""
    trace: list[Call] = []

    def record(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(*args, **kwargs)
        trace.append((name, args, result))
        return result

    with intercepted(record):
        yield trace


@contextmanager
def one_inode(path: Path) -> Iterator[None]:
    """Whatever is at ``path`` has one and the same inode in the block, as after a removal it often has. Skips where the
    file system does not say when a file was made.
    """
    if not born_ns(os.fsencode(path.parent)):
        pytest.skip("this file system does not say when a file was made")

    def with_one(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(*args, **kwargs)
        if not isinstance(result, os.stat_result):
            return result
        where = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fstat" else os.fsdecode(args[0])
        return os.stat_result((result[0], 1, *result[2:])) if where == str(path) else result

    with intercepted(with_one):
        yield


@contextmanager
def failing(wanted: Callable[[int, str], bool], error: int) -> Iterator[list[str]]:
    """The calls for which ``wanted(n, name)`` fail with ``error``; yields the names of all calls."""
    seen: list[str] = []

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(name)
        if wanted(len(seen), name):
            if name == "close":
                call(*args, **kwargs)  # the kernel closes, whatever it says
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    with intercepted(fail):
        yield seen


def names(directory: Path) -> set[str]:
    """What is there, without the lock files."""
    return {entry.name for entry in directory.iterdir()} - {".ringpool"}


def open_files() -> int:
    """How many, without lock files, which are kept."""
    n = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            n += not os.readlink(f"/proc/self/fd/{fd}").endswith(".lock")
    return n


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def untouched(path: Path) -> tuple[int, ...]:
    """What stays the same while nobody changes the entry: its status, but for the time of the last access."""
    status = path.lstat()
    what = (status.st_dev, status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_gid)
    return (*what, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def run_task(target: bytes, content: bytes, level: Durability) -> None:
    """What a worker does with a task that has an output."""
    target = prepare_target(os.path.abspath(target), level)  # as it reaches a worker
    staging = StagingBeside()
    try:
        staging.expect(target)
        staged = staging_name(target, random_token())
        with open(staged, "wb") as output:
            output.write(content)
        try:
            file = finish_staged(staged, target)
        except BaseException:
            discard_staged(staged)
            raise
        task = StagedTask(0, (StagedOutput(staged, target, file.n_links > 1, file.dev, file.ino),))
        staging.commit((task,), level)
    finally:
        staging.close()
    if task.error is not None:
        raise task.error


def run_stream(path: Path, content: bytes, level: Durability) -> None:
    """Write in pieces, out of order."""
    with atomic_open(path, durability=level) as file:
        file.write(b"?" + content[1:])
        file.flush()
        file.seek(0)
        file.write(content[:1])


def run_batch(path: Path, content: bytes, level: Durability) -> None:
    """A batch of one, with that one's error."""
    try:
        write_batch([(path, content)], durability=level)
    except BatchWriteError as error:
        raise error.__cause__ or error from None


Writer = Callable[[Path, bytes, Durability], None]
WRITERS: dict[str, Writer] = {
    "write": lambda path, content, level: atomic_write(path, content, durability=level),
    "task": lambda path, content, level: run_task(os.fsencode(path), content, level),
    "stream": run_stream,
    "batch": run_batch,
}
LEVELS = [Durability.ATOMIC, Durability.DATA, Durability.FULL]


def synced(trace: list[Call]) -> list[str]:
    """The trace as a story: which kind of file was synced, and the rename."""
    kinds: dict[int, str] = {}
    story: list[str] = []
    for name, args, result in trace:
        if name == "open":
            kinds[result] = "directory" if args[1] & os.O_DIRECTORY else "file"
        elif name == "fsync":
            story.append(kinds[args[0]])
        elif name in ("rename", "write", "fchmod"):
            story.append(name)
    return story


def interrupt_at(nth: int, action: Callable[[], None]) -> bool:
    """Run ``action``, and raise KeyboardInterrupt before the nth bytecode of ours; whether it came to that.

    In a thread of its own: what a trace function raises while another exception is handled may leave its thread
    handling that one for ever.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_interrupt_at, nth, action).result()


def _interrupt_at(nth: int, action: Callable[[], None]) -> bool:
    left = nth
    modules = (atomic, batch, durability, output, replacement, stream, target)
    sources = {str(module.__file__) for module in modules}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in sources:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for one such frame when tracing begins
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def die_at_every_call(directory: str, writer: str) -> None:
    path = Path(directory, "a.bin")
    committed = False
    for nth in count(1):
        path.write_bytes(b"old")
        pid = os.fork()
        if pid == 0:
            die_at(nth, lambda: WRITERS[writer](path, b"new", Durability.FULL))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        content = path.read_bytes()
        assert content in (b"old", b"new"), content
        assert content == b"new" or not committed, "killed later, and less done"
        committed = content == b"new"
        left = names(Path(directory)) - {"a.bin"}
        assert len(left) <= 1
        assert all(is_staging_name(name.encode()) for name in left)
        for name in left:
            Path(directory, name).unlink()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert committed


def die_at(nth: int, action: Callable[[], None]) -> None:
    left = nth

    def die(_: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    with intercepted(die):
        action()


def write_for_ever(path: str) -> None:
    for n in count(1):
        atomic_write(path, bytes([n % 256]) * 50_000, durability="atomic")
        if n == 1:
            say("writing")
