"""Task functions for the tests of jobs: in a module, because workers import them."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import time
from pathlib import Path

from ringpool.shm.results import Results


def compress(src: Path, dst: Path, *, level: int = 1) -> int:
    """Whole, or not at all; the size is the value."""
    data = src.read_bytes()
    dst.write_bytes(gzip.compress(data, level, mtime=0))
    return len(data)


def copy_with_times(src: Path, dst: Path) -> None:
    """As ``cp -p`` does: what is made of two files of one size and one time cannot be told apart by these."""
    shutil.copy2(src, dst)


def fail_if_bad(src: Path, dst: Path) -> None:
    """A copy, unless that is what it says."""
    if src.read_text() == "bad":
        raise ValueError(src.name)
    shutil.copy2(src, dst)


def slowly(src: Path, dst: Path, *, seconds: float = 0.05) -> None:
    """Half of it, a while, the other half."""
    data = src.read_bytes()
    with dst.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        time.sleep(seconds)
        file.write(data[len(data) // 2 :])


def size_of(src: Path) -> int:
    """A value, and no output."""
    return src.stat().st_size


def name_of(src: str) -> str:
    """Of an input that is no file."""
    return src


def count_calls(src: Path, dst: Path, *, log: Path) -> None:
    """One line more in ``log`` for each call."""
    with log.open("ab") as file:
        file.write(os.fsencode(src.name) + b"\n")
    dst.write_bytes(src.read_bytes())


def fail_at_first(src: Path, dst: Path, *, log: Path) -> None:
    """An error for the first call of each file; what it has written must not be there at the second."""
    assert not dst.exists()
    dst.write_bytes(b"half")
    with log.open("ab") as file:
        file.write(os.fsencode(src.name) + b"\n")
    if log.read_bytes().count(os.fsencode(src.name) + b"\n") == 1:
        raise OSError("not yet")
    dst.write_bytes(src.read_bytes())


def die_once(src: Path, *, marks: Path) -> str:
    """Of "bad", an error once "dies" runs. "dies" is killed, the first time, when the run has been told to stop."""
    begun, stopped, died = (marks / name for name in ("begun", "stopped", "died"))
    if src.name == "bad":
        while not begun.exists():
            time.sleep(0.01)
        raise ValueError("bad")
    if src.name == "dies" and not died.exists():
        begun.touch()
        while not stopped.exists():
            time.sleep(0.01)
        time.sleep(0.5)
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return src.name


def fail_slowly(src: Path, *, seconds: float = 0.0) -> None:
    """An error, or too late for one."""
    time.sleep(seconds)
    raise ValueError(src.name)


def fail_twice(src: Path, dst: Path, *, log: Path) -> None:
    """An error for the first two calls of all."""
    with log.open("ab") as file:
        file.write(b".")
    if log.stat().st_size <= 2:
        raise OSError("not yet")
    shutil.copy2(src, dst)


def fail_by_name(src: Path, dst: Path) -> None:
    """Each kind of ending that a file's name asks for."""
    kind = src.suffix
    if kind == ".bad":
        raise ValueError(f"{src.name} is bad")
    if kind == ".kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == ".silent":
        return
    if kind == ".slow":
        time.sleep(60)
    dst.write_bytes(src.read_bytes())


def change_input(src: Path, dst: Path, *, times: int) -> None:
    """Changes its own input, so many times in all."""
    data = src.read_bytes()
    if len(data) < times:
        src.write_bytes(data + b"x")
    dst.write_bytes(data)


def thumb_and_meta(src: Path, dst: dict[str, Path]) -> None:
    """Two outputs."""
    data = src.read_bytes()
    dst["thumb"].write_bytes(data[:4])
    dst["meta"].write_text(str(len(data)))


_kept: list[bytearray] = []


def keep_or_need(src: Path, *, calls: Path) -> int:
    """``keep*`` leaves much behind in its process, once both of them have run; ``need*`` has no room in such a one, and
    ``grow*`` has none anywhere. The pid of the process.
    """
    (calls / f"{src.name}.{os.getpid()}").touch()
    if src.name.startswith("keep"):
        _kept.append(bytearray(b"x") * KEPT_BYTES)
        while len(list(calls.glob("keep*"))) < 2:
            time.sleep(0.01)
    elif _kept or src.name.startswith("grow"):
        _kept.append(bytearray(b"x") * (2 * KEPT_BYTES))
        time.sleep(60)
    return os.getpid()


KEPT_BYTES = 100 << 20


def begin_time(src: str) -> float:
    """When it began, monotonic, s. The first one takes a while."""
    now_s = time.monotonic()
    if src.startswith("slow"):
        time.sleep(1.5)
    return now_s


def copy(src: Path, dst: Path) -> None:
    """The same again."""
    dst.write_bytes(src.read_bytes())


def kill_before_the_result(src: Path, dst: Path, *, pid: int) -> None:
    """The coordinator, process ``pid``, and so this one, die between the rename and the result."""

    def die(_results: Results, _entry: int) -> None:
        os.kill(pid, signal.SIGKILL)
        time.sleep(60)

    Results.finish = die
    dst.write_bytes(src.read_bytes())


def megabyte(src: str) -> bytes:
    """A value that takes its room."""
    return b"x" * 1_000_000


def copy_to_all(src: Path, dst: dict[str, Path]) -> None:
    """The input, as every output."""
    for path in dst.values():
        path.write_bytes(src.read_bytes())
