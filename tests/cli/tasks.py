"""Task functions for the tests of the command line. They are run by worker processes, which import this module."""

from __future__ import annotations

import math
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


def stem(src: Path) -> str:
    return src.stem


class Unshown:
    def __repr__(self) -> str:
        raise LookupError("no repr")


def unshown(src: Path) -> object:
    """Values that cannot be written, by the file's number."""
    return [Unshown(), [Unshown()], {"a": Unshown()}, 10**5000, [10**5000], {(1, 2): Unshown()}, "\ud800", 1][
        int(src.stem)
    ]


def odd_numbers(src: Path) -> object:
    return [math.nan, math.inf, -math.inf, [1.5, math.nan], {"a": {"b": math.nan}}, (1, math.inf), Loss(math.nan), 1][
        int(src.stem)
    ]


@dataclass
class Loss:
    value: float


def raw(src: Path) -> bytes:
    return b"\x00\xff"


@dataclass
class Found:
    words: set[str]
    where: Path


def find(src: Path) -> Found:
    return Found({src.read_text()}, src)


# ---- of jobs ---------------------------------------------------------------------------------------------------------


class TransientError(Exception):
    """Goes away when the call is tried again."""


def fail_once(src: Path, *, marks: str) -> int:
    """Fails at its first call for each file."""
    mark = Path(marks, src.name)
    if mark.exists():
        return 2
    mark.touch()
    raise TransientError(src.name)


def wait_for_gate(src: Path, dst: Path, *, begun: str, gate: str) -> None:
    """Says that it has begun, and is done when there is a file ``gate``."""
    dst.write_text("half")
    Path(begun, src.name).write_text(str(os.getpid()))
    while not Path(gate).exists():
        select.select([], [], [], 0.01)
    dst.write_text("whole")


def fail_unless(src: Path, *, healed: str) -> str:
    """Fails as the file's name says, until there is a file ``healed``."""
    if Path(healed).exists() or src.stem == "fine":
        return "well"
    if src.stem.startswith("slow"):
        raise TimeoutError("too slow")
    if src.stem.startswith("dead"):
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(f"{src.name} is bad")


def thumb_and_meta(src: Path, dst: dict[str, Path]) -> dict[str, int]:
    """Two outputs, and a value that is no plain one."""
    dst["thumb"].write_text(src.read_text()[:1])
    dst["meta"].write_text(str(src.stat().st_size))
    return {"size": src.stat().st_size}


def grow(src: Path) -> int:
    """Takes more memory than it may."""
    held = bytearray(1 << 30)
    held[::4096] = b"x" * len(held[::4096])
    select.select([], [], [], 60)
    return len(held)


def niceness(src: Path) -> int:
    return os.nice(0)


def worker_pid(src: Path) -> int:
    return os.getpid()


def name(src: str) -> str:
    """Of an input that is no file."""
    return src.upper()
