"""Task functions for the tests of the command line. They are run by worker processes, which import this module."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path


def size(src: Path) -> int:
    return src.stat().st_size


def nothing(src: Path) -> None:
    assert src.exists()


def touch(src: Path, *, times: int, mark: str = "x", loud: bool = False) -> str:
    """What its parameters were, by type."""
    return f"{src.name} {times!r} {mark!r} {loud!r}"


def copy(src: Path, dst: Path) -> int:
    return dst.write_bytes(src.read_bytes())


def copy_or_list(src: Path, dst: Path | None = None) -> int:
    """A function that can do without an output."""
    return len(src.read_bytes()) if dst is None else dst.write_bytes(src.read_bytes())


def fail_on_odd(src: Path) -> int:
    """Fails with two kinds of errors on files whose number is odd."""
    number = int(src.stem)
    if number % 4 == 1:
        raise ValueError(f"number {number}\nis odd")
    if number % 4 == 3:
        raise LookupError(number)
    return number


def die(src: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(src: Path, *, marks: str) -> str:
    """Dies at its first attempt on each file."""
    mark = Path(marks, src.name)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def wait_for_ever(src: Path, *, begun: str) -> None:
    """Says that it has begun, and then is never done."""
    Path(begun, src.name).write_text(str(os.getpid()))
    signal.pause()


def write_half_and_wait(src: Path, dst: Path, *, begun: str) -> None:
    dst.write_text("half")
    wait_for_ever(src, begun=begun)


def write_half_and_fail(src: Path, dst: Path) -> None:
    dst.write_text("half")
    raise ValueError(src.name)


def dawdle(src: Path) -> None:
    select.select([], [], [], 0.05)


def copy_slowly(src: Path, dst: Path) -> int:
    dawdle(src)
    return copy(src, dst)


def odd_keys(src: Path) -> dict[tuple[int, int], bytes]:
    """A value whose keys JSON does not know."""
    return {(1, 2): b"x"}


def raw(src: Path) -> bytes:
    return b"\x00\xff"


@dataclass
class Found:
    words: set[str]
    where: Path


def find(src: Path) -> Found:
    return Found({src.read_text()}, src)
