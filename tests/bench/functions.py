"""Functions that the tests have measured. They are run by worker processes, which import this module."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path


def size(src: Path, *, times: int = 1) -> int:
    return times * src.stat().st_size


def copy(src: Path, dst: Path) -> int:
    return dst.write_bytes(src.read_bytes())


def copy_twice(src: Path, dst: dict[str, Path]) -> None:
    dst["one"].write_bytes(src.read_bytes())
    dst["two"].write_bytes(src.read_bytes())


def move(src: Path, dst: Path) -> None:
    src.rename(dst)


def move_and_link(src: Path, dst: Path) -> None:
    src.rename(dst)
    src.symlink_to(dst)


def move_and_end(src: Path, dst: Path) -> None:
    src.rename(dst)
    os._exit(3)


def replace(src: Path, dst: Path) -> None:
    dst.write_bytes(src.read_bytes())
    other = src.with_suffix(".new")
    other.write_bytes(b"")
    other.replace(src)


def move_in_pool(src: Path, dst: Path) -> None:
    """Copies in the plain loop, and moves in a pool's workers."""
    if multiprocessing.current_process().name == "no pool":
        dst.write_bytes(src.read_bytes())
    else:
        src.rename(dst)


def write_down(src: Path, dst: Path, *, places: str) -> None:
    """Copies, and leaves a note of where it was told to."""
    dst.write_bytes(src.read_bytes())
    with open(places, "a") as file:
        file.write(f"{dst}\n")


def begin_and_wait(src: Path, dst: Path, *, begun: Path) -> None:
    """Does not end by itself while anybody waits for it."""
    dst.write_bytes(src.read_bytes())
    begun.touch()
    threading.Event().wait(600)


def fail_on_odd(src: Path) -> int:
    number = int(src.stem)
    if number % 2:
        raise ValueError(f"number {number} is odd")
    return number


def fail_on_odd_name(src: Path) -> None:
    if src.name.startswith("odd"):
        raise ValueError("café \x1b[31mred\n" + 5000 * "x")


def fail(src: Path) -> None:
    raise LookupError(src.name)


def end_process_on_7(src: Path) -> None:
    if src.stem == "7":
        os._exit(3)


def double(number: int, *, plus: int = 0) -> int:
    if number == 3:
        raise ValueError("three")
    return 2 * number + plus
