"""What the executor's tests call. Worker processes import this module."""

from __future__ import annotations

import contextvars
import decimal
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringpool import RingPoolExecutor

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def identity(x: Any) -> Any:
    return x


def kind_of_process() -> str:
    return type(multiprocessing.current_process()).__name__


def variables() -> tuple[str, str]:
    """Two that belong to the context of a thread."""
    return variable.get(), str(decimal.Decimal(1) / 3)


def main_thread() -> tuple[str, bool, bool]:
    """Its name, whether it is a daemon, and whether it is this one."""
    this = threading.current_thread()
    return this.name, this.daemon, this is threading.main_thread()


def loaded(names: list[str]) -> list[str]:
    """Which of the modules this process has imported."""
    return [name for name in names if name in sys.modules]


def assorted(i: int) -> Any:
    """Most of them short integers; none, large, long and structured ones among them."""
    if i == 3:
        return "x" * 100_000
    if i % 10 == 0:
        return {"i": i}
    if i % 7 == 0:
        return 1 << 70
    return (i, None) if i % 11 == 0 else i


def raise_at_seven(i: int) -> int:
    if i % 1000 == 7:
        raise ValueError(i)
    return i


def die_at_fifty(i: int) -> int:
    if i % 100 == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def die_twice(path: str) -> int:
    """How often this was called with that path, if its worker did not die."""
    with open(path, "a") as file:
        file.write("x")
    n = os.path.getsize(path)
    if n < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def sleep_at_three(i: int) -> int:
    if i == 3:
        sleep_for_ever()
    return i


def take_memory(n_bytes: int) -> int:
    taken = bytearray(n_bytes)
    taken[::4096] = b"x" * len(taken[::4096])
    if n_bytes > 1 << 20:
        sleep_for_ever()  # whoever looks at the memory may be late
    return len(taken)


def sum_of_lengths(words: list[str]) -> int:
    with RingPoolExecutor(1) as pool:
        return sum(pool.map(len, words))


def leave_thread(seconds: float) -> int:
    """This process, which will end when its thread has slept."""
    threading.Thread(target=time.sleep, args=(seconds,)).start()
    return os.getpid()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


_kept: list[RingPoolExecutor] = []


def keep_a_pool() -> int:
    """For as long as this worker lives; its pid."""
    _kept.append(RingPoolExecutor(1))
    _kept[0].submit(abs, -1).result()
    return os.getpid()


def in_a_list(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    return [function(*arguments)]


def wait_for(path: Path) -> None:
    """Until it is there; fails after 30 s."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
