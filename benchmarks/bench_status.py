"""The status table beside what people use: operations a second, and how soon a sleeper wakes.

    case        contestants                                                              unit
    operations  set, get, set of one process: table / JSON file under filelock / dict of a multiprocessing.Manager
    contended   the same by two processes on the paths of both
    wake        from release, or from the owner's death, to the return of wait_available; polling at 0.1 s beside it

    python -m benchmarks [--quick] status

The JSON file is rewritten whole and replaced at each change, as such code does it, and holds 100 paths a
process. A polling waiter is not run: it wakes half its interval late in the median, and all of it at the worst.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from ringpool.bench import measure
from ringpool.bench.measure import Case
from ringpool.shm.status import FileState, FileStatusTable

POLL_S = 0.1
OURS = "FileStatusTable"
N_PATHS = 100


class Table(Protocol):
    """What the contestants have in common."""

    def set(self, path: str, state: FileState) -> None: ...
    def get(self, path: str) -> object: ...


class OfStatusTable:
    """Ours."""

    def __init__(self, table: FileStatusTable) -> None:
        self.table = table

    def set(self, path: str, state: FileState) -> None:
        self.table.set(path, state)

    def get(self, path: str) -> object:
        return self.table.get(path)


class OfJsonFile:
    """A JSON file under a lock, rewritten at each change."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.make_lock()
        os.register_at_fork(after_in_child=self.make_lock)

    def make_lock(self) -> None:
        """A FileLock belongs to the process that made it."""
        self.lock = FileLock(f"{self.file}.lock")

    def set(self, path: str, state: FileState) -> None:
        with self.lock:
            states = self._read()
            states[path] = [state, os.getpid(), time.time()]
            temporary = self.file.with_name(f"{self.file.name}.new")
            temporary.write_text(json.dumps(states))
            os.replace(temporary, self.file)

    def get(self, path: str) -> object:
        with self.lock:
            return self._read().get(path)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}


class OfManager:
    """A dict in a server process."""

    def __init__(self, states: Any) -> None:
        self.states = states

    def set(self, path: str, state: FileState) -> None:
        self.states[path] = (state, os.getpid(), time.time())

    def get(self, path: str) -> object:
        return self.states.get(path)


def operate(table: Table, paths: Sequence[str]) -> None:
    """Three operations a path."""
    for path in paths:
        table.set(path, FileState.PROCESSING)
        table.get(path)
        table.set(path, FileState.DONE)


def rate_per_s(table: Table, n: int, n_processes: int) -> Callable[[], float]:
    """Operations a second of so many processes together, each with ``n`` rounds over paths of its own."""

    def turn() -> float:
        paths = [[f"/data/in/batch/{process}/{i % N_PATHS:08}.tif" for i in range(n)] for process in range(n_processes)]
        if n_processes == 1:
            began_s = time.perf_counter()
            operate(table, paths[0])
            return 3 * n / (time.perf_counter() - began_s)
        context = multiprocessing.get_context("fork")
        gate = context.Barrier(n_processes + 1)

        def body(own: Sequence[str]) -> None:
            gate.wait()
            operate(table, own)

        processes = [context.Process(target=body, args=(own,)) for own in paths]
        for process in processes:
            process.start()
        gate.wait()
        began_s = time.perf_counter()
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a contestant failed with status {process.exitcode}")
        return 3 * n * n_processes / (time.perf_counter() - began_s)

    return turn


# ---- waking ----------------------------------------------------------------------------------------------------------


def latencies_s(table: FileStatusTable, n: int, *, by_death: bool) -> list[float]:
    """From just before the release, or the kill, to the return of ``wait_available`` in another process."""
    found: list[float] = []
    for _ in range(n):
        go, ready, began, ended = (os.pipe() for _ in range(4))
        holder = os.fork()
        if holder == 0:
            table.set("/w", FileState.PROCESSING)
            os.write(ready[1], b"!")
            os.read(go[0], 1)
            began_s = time.perf_counter()
            table.release("/w")
            os.write(began[1], f"{began_s:.9f}".encode())
            os._exit(0)
        os.read(ready[0], 1)
        waiter = os.fork()
        if waiter == 0:
            table.wait_available("/w", 30)
            os.write(ended[1], f"{time.perf_counter():.9f}".encode())
            os._exit(0)
        until_asleep(waiter)
        if by_death:
            began_s = time.perf_counter()
            os.kill(holder, signal.SIGKILL)
        else:
            os.write(go[1], b"!")
            began_s = float(os.read(began[0], 64))
        found.append(float(os.read(ended[0], 64)) - began_s)
        for pid in (holder, waiter):
            os.waitpid(pid, 0)
        for fd in (*go, *ready, *began, *ended):
            os.close(fd)
        table.remove("/w")
    return found


def until_asleep(pid: int) -> None:
    """Wait until a process sleeps in poll(2)."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            if file.read().split()[0] in ("7", "271", "73"):
                return
        time.sleep(0.0005)
    raise TimeoutError(f"process {pid} does not wait")


def bench_status(quick: bool) -> Iterator[Case]:
    """Operations a second, and wake-ups."""
    rounds, n, n_wakes = (measure.QUICK_ROUNDS, 1000, 10) if quick else (measure.ROUNDS, 10_000, 40)
    with ExitStack() as stack:
        table = stack.enter_context(FileStatusTable(f"bench-{os.getpid()}-{secrets.token_hex(4)}", 1024))
        stack.callback(table.unlink)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm")))
        manager = stack.enter_context(multiprocessing.get_context("fork").Manager())
        tables: dict[str, tuple[Table, int]] = {
            "JSON file under filelock": (OfJsonFile(directory / "status.json"), max(20, n // 50)),
            "dict of a Manager": (OfManager(manager.dict()), max(100, n // 5)),
            OURS: (OfStatusTable(table), n),
        }
        for n_processes in (1, 2):
            contestants = {name: rate_per_s(each, n_each, n_processes) for name, (each, n_each) in tables.items()}
            series, others = measure.take_turns(contestants, rounds)
            claims = [measure.Claim(OURS, name) for name in tables if name != OURS]
            title = f"status: set, get, set, by {n_processes} process{'es' * (n_processes > 1)}"
            yield Case(title, "operations/s", series, claims, others)
        wakes = {
            "after a release": lambda: 1e6 * statistics.median(latencies_s(table, n_wakes, by_death=False)),
            "after the owner's death": lambda: 1e6 * statistics.median(latencies_s(table, n_wakes, by_death=True)),
        }
        series, others = measure.take_turns(wakes, rounds)
        title = f"status, wake: until a sleeper goes on, median of {n_wakes} (by polling: {1e6 * POLL_S / 2:,.0f})"
        yield Case(title, "us", series, [measure.Claim(name, None) for name in wakes], others)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {"status": bench_status}
