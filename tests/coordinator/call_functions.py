"""What the tests of calls and maps have run by workers, which import this module.

note     a line in a file for each run: how often an item was run, and which
hazards  items at which something goes wrong, among many at which nothing does
hostile  tasks that bend the process that runs them
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.coordinator.limit_functions import announce, wait_for

import ringpool

LARGE_BYTES = 1 << 20
_NOTE_BYTES = 8
_kept: list[object] = []  # what a task leaves behind in its worker
_left: list[ProcessPoolExecutor] = []


def leave_an_executor() -> int:
    """The process of an executor that the task does not end."""
    own = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    _left.append(own)
    return own.submit(os.getpid).result()


# ---- notes -----------------------------------------------------------------------------------------------------------


def note(path: str, item: int) -> int:
    """Add a line to ``path``, whole, whoever else does the same."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{item:{_NOTE_BYTES - 1}}\n".encode())
    os.close(fd)
    return item


def note_slowly(path: str, item: int) -> int:
    time.sleep(0.001)
    return note(path, item)


def note_first(path: str, row: tuple[int]) -> int:
    return note(path, row[0])


def noted(path: str | Path) -> list[int]:
    """The items noted, in the order in which they were."""
    return [int(line) for line in Path(path).read_text().splitlines()] if os.path.exists(path) else []


def n_noted(path: str | Path) -> int:
    return os.path.getsize(path) // _NOTE_BYTES if os.path.exists(path) else 0


def note_but_one_waits(path: str, slow: int, others: int, item: int) -> int:
    """Item ``slow`` ends when all ``others`` are noted."""
    if item == slow:
        _wait_until(lambda: n_noted(path) >= others)
        return item
    return note(path, item)


def note_and_hold(path: str, gate: str, item: int) -> int:
    """All items but item 0 end when the gate opens."""
    note(path, item)
    if item:
        wait_for(gate)
    return item


def hold(begun: str, gate: str) -> int:
    """``begun`` appears; this process's pid, when the gate has opened."""
    announce(begun)
    wait_for(gate)
    return os.getpid()


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise TimeoutError("in vain")


# ---- items -----------------------------------------------------------------------------------------------------------


def double(x: int) -> int:
    return 2 * x


def slowly(x: int) -> int:
    time.sleep(0.002)  # so that it is still under way when somebody else comes
    return 2 * x


def identity(x: Any) -> Any:
    return x


def add(*terms: Any) -> Any:
    return sum(terms)


def length(item: bytes) -> int:
    """Takes its time over what is large."""
    if len(item) > 1000:
        time.sleep(0.02)
    return len(item)


def work(x: int) -> int:
    """About 5 us of it."""
    return x + sum(range(300)) * 0


def append(items: list[int]) -> list[int]:
    """``items``, and one more."""
    items.append(1)
    return items


def append_to(items: list[int], item: int) -> list[int]:
    items.append(item)
    return items


def are_one(pair: list[list[int]]) -> bool:
    return pair[0] is pair[1]


def wait_for_if(gate: str, wanted: int, item: int) -> int:
    """Item ``wanted`` waits for the gate."""
    if item == wanted:
        wait_for(gate)
    return item


def wait_for_if_and_give(gate: str, wanted: int, kind: str, item: int) -> Any:
    """An int; or a str that is too large for its chunk now and then; or both by turns, from a place within a vector."""
    wait_for_if(gate, wanted, item)
    if kind == "int" or (kind == "mixed" and item % 700 < 350):
        return item
    return f"{item} {'x' * 300_000 if item % 500 == 499 else ''}"


def item_of(result: Any) -> int:
    return int(str(result).split()[0])


def process_id(_item: object = None) -> int:
    return os.getpid()


def raise_at(where: int, item: int) -> int:
    if item == where:
        raise LookupError(item)
    return item


def map_inside(n: int) -> int:
    """With a pool of this task's own."""
    with ringpool.RingPoolExecutor(1, mp_context="fork") as pool:
        return sum(pool.map(double, range(n)))


inherited: list[ringpool.RingPoolExecutor] = []  # pools of the program, in workers that are its forks


def map_in_inherited(n: int) -> list[int]:
    return list(inherited[0].map(double, range(n)))


# ---- hazards ---------------------------------------------------------------------------------------------------------


class NeverPickled:
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class PickledOnce:
    """... as ``len`` of ``n_bytes`` bytes; then an error."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.was_pickled = False

    def __reduce__(self) -> tuple[Any, ...]:
        if self.was_pickled:
            raise LookupError("pickled again")
        self.was_pickled = True
        return len, (bytes(self.n_bytes),)


class CountsPickles:
    """How often it was pickled in this process; of about ``n_bytes`` bytes."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.n_pickled = 0

    def __reduce__(self) -> tuple[Any, ...]:
        self.n_pickled += 1
        return len, (bytes(self.n_bytes),)


class NeverRebuilt:
    """Can be pickled."""

    def __reduce__(self) -> Any:
        return _refuse, ("to be rebuilt",)


def _refuse(what: str) -> None:
    raise ArithmeticError(f"refuses {what}")


class NeverPickledError(Exception):
    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.lock = threading.Lock()


class NeverRebuiltError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class RebuiltAsTextError(Exception):
    def __reduce__(self) -> Any:
        return str, ("a text",)


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    pass


class LengthlessError(Exception):
    def __len__(self) -> int:
        raise ArithmeticError("no length")


class CyclicError(Exception):
    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.me = self


def large(item: int) -> bytes:
    return random.Random(item).randbytes(LARGE_BYTES)


def tolerate(path: str, hazard: str, where: frozenset[int], item: int) -> Any:
    """Twice the item; at those in ``where`` the hazard. Each run is noted."""
    note(path, item)
    return meet(hazard, item) if item in where else 2 * item


def measure(path: str, item: Any) -> int:
    """Its size; each run of an ``int`` is noted."""
    return 2 * note(path, item) if isinstance(item, int) else len(item)


def meet(hazard: str, item: int = 0) -> Any:
    """Does or returns what its name says."""
    match hazard:
        case "raise":
            raise LookupError(item)
        case "raise an interrupt":
            raise KeyboardInterrupt(item)
        case "exit":
            sys.exit(item + 1)
        case "raise what cannot be pickled":
            raise NeverPickledError("words of it")
        case "raise what cannot be rebuilt":
            raise NeverRebuiltError("words", "of it")
        case "raise what is rebuilt as a text":
            raise RebuiltAsTextError("words of it")
        case "raise what cannot be changed":
            raise FrozenError
        case "raise what cannot be printed":
            raise LengthlessError
        case "raise what is large":
            raise LookupError(large(item))
        case "return what cannot be pickled":
            return NeverPickled()
        case "return what cannot be rebuilt":
            return NeverRebuilt()
        case "return what is large":
            return large(item)
        case "die by a signal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die by a fault":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            ctypes.string_at(0)
        case "die by os._exit":
            os._exit(5)
    raise AssertionError(hazard)


# ---- calls -----------------------------------------------------------------------------------------------------------


def keywords(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


class Adder:
    """A callable object, with methods of all kinds."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, x: int) -> int:
        return self.n + x

    def bound(self, x: int) -> int:
        return self.n + x

    @classmethod
    def of_class(cls, x: int) -> int:
        return cls(3)(x)

    @staticmethod
    def of_nothing(x: int) -> int:
        return 3 + x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adder) and other.n == self.n

    __hash__ = None  # type: ignore[assignment]


@functools.lru_cache
def cached(x: int) -> int:
    return 2 * x


class Dying:
    """A callable object that ends its worker, and that nobody can print."""

    def __init__(self) -> None:
        self.ballast = "x" * LARGE_BYTES

    def __repr__(self) -> str:
        raise ArithmeticError("not to be printed")

    def __call__(self) -> None:
        meet("die by a signal")

    def method(self) -> None:
        meet("die by a signal")


def look_at_array(array: Any) -> tuple[float, bool, bool]:
    """Its sum, whether it can be written to, and whether it lies in a mapping of shared memory."""
    address = array.__array_interface__["data"][0]
    mapped = False
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, rest = line.partition("-")
        last = rest.split()[0]
        if int(first, 16) <= address < int(last, 16):
            mapped = "/dev/shm/" in line
    return float(array.sum()), bool(array.flags.writeable), mapped


def write_to_array(array: Any) -> None:
    array[0] = 1


def ones(n: int) -> Any:
    import numpy as np

    return np.ones(n)


def raise_from(words: str) -> None:
    """An exception with a cause and notes."""
    try:
        _refuse(words)
    except ArithmeticError as error:
        outer = LookupError("the outer one")
        outer.add_note("a note of the task")
        raise outer from error


def raise_cyclic() -> None:
    error = CyclicError("in a circle")
    error.__context__ = ValueError("the context")
    error.__context__.__context__ = error
    raise error


# ---- hostile ---------------------------------------------------------------------------------------------------------


def close_descriptors(first: int, last: int) -> int:
    os.closerange(first, last)
    return os.getpid()


_taken: list[int] = []


def take_descriptors() -> int:
    """Open files until no more may be, and leave them open."""
    with contextlib.suppress(OSError):
        while True:
            _taken.append(os.open(os.devnull, os.O_RDONLY))
    return os.getpid()


def lower_the_limit_of_descriptors() -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return os.getpid()


def take_descriptors_or_one(takes_all: bool) -> bool:
    """Open a file and close it; or leave none that may be opened."""
    if takes_all:
        take_descriptors()
    else:
        os.close(os.open(os.devnull, os.O_RDONLY))
    return takes_all


def fork_and_return(path: str) -> int:
    """Both processes return; only the parent's result may arrive."""
    parent = os.getpid()
    if os.fork():
        os.wait()
    note(path, int(os.getpid() == parent))
    return os.getpid()


def fork_and_raise() -> int:
    if not os.fork():
        raise LookupError("in the child")
    os.wait()
    return os.getpid()


def leave_child(gate: str, done: str) -> tuple[int, int]:
    """Leaves a child behind, which lives until the gate opens; the pids of both."""
    child = os.fork()
    if not child:
        try:
            wait_for(gate)
            announce(done)
        finally:
            os._exit(0)
    return os.getpid(), child


def leave_child_and_die(pid_path: str, gate: str) -> None:
    child = os.fork()
    if not child:
        try:
            os.setsid()  # out of the worker's process group
            wait_for(gate)
        finally:
            os._exit(0)
    note(pid_path, child)
    os.kill(os.getpid(), signal.SIGKILL)


def print_much(n_bytes: int) -> int:
    """In lines of 100 bytes, the last ones perhaps still in a buffer."""
    line = "." * 99
    for _ in range(n_bytes // 100):
        print(line)
    return n_bytes


def change_directory(path: str) -> str:
    os.chdir(path)
    return os.getcwd()


def install_handlers() -> int:
    """Ignores what a process may ignore."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return os.getpid()


def note_and_die(path: str, gate: str) -> None:
    """Dies once there is a gate."""
    note(path, 0)
    wait_for(gate)
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_timer(i: int, *, with_handler: bool) -> float:
    """What is left of a timer that is found; item 0 leaves one that is long enough for all the others."""
    found_s = signal.getitimer(signal.ITIMER_REAL)[0]
    if i == 0:
        if with_handler:
            signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(3600)
    return found_s


def handler_of(number: int) -> str:
    return str(signal.getsignal(number))


def start_threads(daemon: bool) -> int:
    """Threads that never end."""
    for _ in range(3):
        threading.Thread(target=threading.Event().wait, daemon=daemon).start()
    return os.getpid()


def note_in_a_thread(path: str, seconds: float) -> None:
    """``path`` is noted when the thread ends."""

    def run() -> None:
        time.sleep(seconds)
        note(path, 1)

    threading.Thread(target=run).start()


# ---- initializers ----------------------------------------------------------------------------------------------------


def remember(*values: object) -> None:
    _kept[:] = values


def remembered() -> list[object]:
    return list(_kept)


def tell(queue: Any, word: str) -> None:
    queue.put((word, os.getpid()))


def fail(words: str) -> None:
    raise LookupError(words)


def exit_quietly() -> None:
    os._exit(9)


# ---- arrays that somebody has beyond their call ----------------------------------------------------------------------

_arrays: list[Any] = []


def keep_array(array: Any) -> None:
    _arrays.append(array)


def keep_part(*, array: Any) -> None:
    _arrays.append(array[10:20])


def keep_in_error(array: Any) -> None:
    try:
        raise LookupError(array)
    except LookupError as error:
        _arrays.append(error.args[0])
        raise


def head_of(array: Any) -> Any:
    return array[:10]


def heads_of(array: Any) -> list[Any]:
    return [array[:10]]


class ExitsInPickling:
    def __reduce__(self) -> Any:
        raise SystemExit(3)


def sum_of(array: Any) -> float:
    return float(array.sum())


def first_of_kept() -> list[float]:
    return [float(array[0]) for array in _arrays]


def keep_and_fork(array: Any) -> None:
    """The child returns from the call as well."""
    if os.fork():
        os.wait()
        _arrays.append(array)


def leave_array_to_child_and_die_once(gate: str, told: str, died: str, array: Any) -> None:
    if not os.path.exists(died):
        Path(died).touch()
        if not (child := os.fork()):
            os.setsid()  # what it leaves is not killed with its worker then
            leave_array_to_child(gate, told, array)
            os._exit(0)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGKILL)


def give_bytes_as(user: int, n: int) -> bytes:
    os.seteuid(user)
    return bytes(n)


def leave_array_to_child(gate: str, told: str, array: Any) -> None:
    """A child, which lives on, tells the first of it when the gate opens."""
    if not os.fork():
        try:
            wait_for(gate)
            Path(told).write_text(str(float(array[0])))
        finally:
            os._exit(0)


# ---- what a module keeps ---------------------------------------------------------------------------------------------

_term = 0


def keep(value: int) -> None:
    """An initializer: for ``Keeper``."""
    global _term
    _term = value


class Keeper:
    """Its class method reads a global of this module."""

    @classmethod
    def kept(cls, more: int = 0) -> int:
        """What the initializer has put there, and ``more``."""
        return _term + more


# ---- what travels by a descriptor ------------------------------------------------------------------------------------

_ends: list[Any] = []


def send_to(end: Any, value: object) -> None:
    """``end``: of a pipe, or a socket."""
    if isinstance(end, socket.socket):
        end.sendall(str(value).encode())
    else:
        end.send(value)


def open_pipe() -> Any:
    """One end; ``answer`` writes to the other."""
    _ends[:] = multiprocessing.Pipe()
    return _ends[0]


def answer(value: object) -> None:
    _ends[1].send(value)


class EndError(Exception):
    """``args``: words, and an end of a pipe, or a socket."""


def raise_with_end(kind: str) -> None:
    """With one end; to the other, ``answer`` writes, or ``send_to_kept`` where it is a socket."""
    _ends[:] = multiprocessing.Pipe() if kind == "pipe" else socket.socketpair()
    raise EndError("it has an end", _ends[0])


def send_to_kept(words: str) -> None:
    send_to(_ends[1], words)


class Registered:
    """Tests register a reducer for it, that ``multiprocessing`` uses and pickle does not."""

    def __init__(self, words: str) -> None:
        self.words = words


def reduce_registered(value: Registered) -> tuple[type[Registered], tuple[str]]:
    return Registered, (f"{value.words} by its reducer",)


def words_of_registered(value: Registered) -> str:
    return value.words


def hand_back(value: Any) -> Any:
    return value


def every_other(array: Any) -> dict[str, Any]:
    """A view of its argument."""
    return {"array": array[::2]}


def hand_back_last(*values: Any) -> Any:
    return values[-1]


def die_once_with(end: Any, mark: str) -> None:
    if not os.path.exists(mark):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    end.send(1)


class ByProtocol5:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol < 5:
            raise ValueError("by protocol 5 alone")
        return ByProtocol5, (self.array,)


def read_only_by_protocol_5() -> ByProtocol5:
    array = ones(1000)
    array.flags.writeable = False
    return ByProtocol5(array)
