"""Task functions for the coordinator's tests, the hostile ones among them. Worker processes import this module.

They tell where they are by files, never by time: ``begun`` and ``gate`` are paths that appear.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np

from ringpool.errors import RingpoolError

WATCHDOG_S = 300


def wait_for(path: str | Path) -> None:
    """Until ``path`` exists."""
    for _ in range(WATCHDOG_S * 200):
        if os.path.exists(path):
            return
        select.select([], [], [], 0.005)
    raise TimeoutError(f"{path} did not appear")


# ---- plain ones ------------------------------------------------------------------------------------------------------


class Counted:
    """As a parameter: see ``instances``."""

    living: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()

    def __new__(cls) -> Counted:
        self = super().__new__(cls)
        cls.living.add(self)
        return self


def size(src: Path) -> int:
    return src.stat().st_size


def end_of_file() -> None:
    raise EOFError("of a task")


def process_id(src: Path) -> int:
    return os.getpid()


def name(src: Path) -> str:
    return src.name


def typed(src: Path, *, times: int, mark: str = "x") -> str:
    return f"{times!r} {mark!r}"


def anything(src: Path, **parameters: Any) -> dict[str, Any]:
    return parameters


def echo(src: Path, *, value: Any = None) -> Any:
    return value


def instances(src: Path, *, counted: Counted, run: int) -> int:
    """How many parameters of that kind there are in this process."""
    return len(Counted.living)


def many_bytes(src: Path, *, n: int) -> bytes:
    return bytes(n)


def ramp(src: Path, *, n: int) -> np.ndarray:
    return np.arange(n)


def total(src: Path, *, numbers: np.ndarray) -> int:
    return int(numbers.sum())


def unpicklable(src: Path) -> threading.Lock:
    return threading.Lock()


def append_line(src: Path) -> None:
    """One line in ``src`` for each time it is run."""
    with src.open("ab") as file:
        file.write(b"run\n")


# ---- waiting ones ----------------------------------------------------------------------------------------------------


def nap(src: Path, *, seconds: float) -> None:
    select.select([], [], [], seconds)


def hold(src: Path, *, gate: str, begun: str) -> int:
    """Says that it has begun, with its pid, and ends when the gate appears."""
    announce(begun)
    wait_for(gate)
    return os.getpid()


def announce(begun: str) -> None:
    Path(begun + ".new").write_text(str(os.getpid()))
    os.rename(begun + ".new", begun)


def stay(src: Path, *, how: str, begun: str) -> None:
    """Never ends, in one way or another. ``begun`` comes with the pid of what should die with this worker."""
    if how == "python":
        announce(begun)
        while True:
            pass
    elif how == "sleep holding the GIL":
        announce(begun)
        ctypes.PyDLL(None).sleep(WATCHDOG_S)
    elif how == "hopeless match":
        announce(begun)
        re.match("(a*)*b", "a" * 64)
    elif how == "stopped":
        announce(begun)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "process group of a shell":
        os.system(f"timeout 1h sh -c 'echo $PPID > {begun}.new; mv {begun}.new {begun}; exec sleep {WATCHDOG_S}'")
    elif how in ("subprocess", "process group"):
        child = subprocess.Popen([*(["timeout", "1h"] if how == "process group" else []), "sleep", str(WATCHDOG_S)])
        Path(begun + ".new").write_text(str(child.pid))
        os.rename(begun + ".new", begun)
        child.wait()
    elif how == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        announce(begun)
        while True:
            signal.pause()
    raise AssertionError(how)


# ---- failing ones ----------------------------------------------------------------------------------------------------


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class TwoArgumentsError(Exception):
    """Pickles, and cannot be rebuilt: its ``args`` are not what it is called with."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    pass


class RebuiltAsTextError(Exception):
    def __reduce__(self) -> Any:
        return str, ("a text",)


class TaskRefusedError(RingpoolError):
    pass


class Rebuilt:
    """Pickles, and something happens where it is rebuilt."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return happen, (self.how,)


def happen(how: str) -> str:
    match how:
        case "memory":
            raise MemoryError
        case "exit":
            sys.exit(3)
        case "terminated":  # it comes from elsewhere, at this moment
            os.kill(os.getpid(), signal.SIGTERM)
        case _:
            raise AssertionError(how)
    return how


def fail(src: Path, *, how: str) -> None:
    match how:
        case "value":
            raise ValueError("no good")
        case "chained":
            try:
                raise LookupError("first")
            except LookupError as error:
                raise ValueError("second") from error
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            sys.exit(3)
        case "generator exit":
            raise GeneratorExit
        case "unpicklable":
            raise UnpicklableError
        case "cannot be rebuilt":
            raise TwoArgumentsError("a", "b")
        case "local class":

            class LocalError(Exception):
                pass

            raise LocalError("nobody knows me")
        case "mute":
            raise MuteError
        case "frozen":
            raise FrozenError
        case "rebuilt as a text":
            raise RebuiltAsTextError("words of it")
        case "huge":
            raise ValueError("x" * 10_000_000)
        case "surrogates":
            raise ValueError("\udcff")
        case "recursion":
            fail(src, how=how)
        case "memory":
            raise MemoryError
        case "group":
            raise ExceptionGroup("several", [ValueError("a"), KeyError("b")])
        case "of ringpool":
            raise TaskRefusedError("own")
        case _:
            raise AssertionError(how)


def fail_until(src: Path, dst: Path | None = None, *, attempts: int) -> int:
    """Fail so many times; each leaves a line in ``src``. The number of the attempt that succeeds."""
    with src.open("a") as lines:
        lines.write("x\n")
    n = len(src.read_text().splitlines())
    if n <= attempts:
        raise ConnectionError(f"attempt {n}")
    if dst is not None:
        dst.write_text(str(n))
    return n


def fail_if_marked(src: Path) -> str:
    """Fails where the input says so."""
    if src.read_text() == "fail":
        raise ValueError(src.name)
    return src.name


def move(src: Path, dst: Path, *, ending: str = "") -> None:
    """Its input becomes its output."""
    src.rename(dst)
    _end(src, ending)


def move_and_link(src: Path, dst: Path, *, ending: str) -> None:
    src.rename(dst)
    src.symlink_to(dst)
    _end(src, ending)


def _end(src: Path, ending: str) -> None:
    match ending:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ValueError(src.name)
        case _:
            return


def move_what_it_leads_to(src: Path, dst: Path, *, ending: str) -> None:
    """Its input is a symlink."""
    move(src.resolve(), dst, ending=ending)


def move_and_put_another_there(src: Path, dst: Path, *, ending: str) -> None:
    src.rename(dst)
    src.write_text("a stub")
    _end(src, ending)


def die_half_through_once(src: str, dst: Path, *, mark: str) -> None:
    """Its input is no file."""
    dst.write_text("half")
    if not os.path.exists(mark):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dst.write_text("whole")


def fail_under_alarms(src: Path, dst: Path) -> None:
    """A timer of its own expires all the time while its failure is looked after."""

    def raise_timeout(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("of the task")

    dst.write_text("half")
    signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, 0.0003)
    until_ns = time.monotonic_ns() + 299_000 - int.from_bytes(os.urandom(1), "little") * 1000
    while time.monotonic_ns() < until_ns:
        pass
    raise ValueError(src.name)


def write_unless_there(src: Path, dst: Path) -> None:
    """Fails at its first call, half through; what it finds at a second one it leaves alone."""
    if not dst.exists():
        dst.write_text("half")
        if not src.read_text():
            src.write_text("was called")
            raise ConnectionError(src.name)
        dst.write_text("whole")


# ---- dying ones ------------------------------------------------------------------------------------------------------


def die(src: Path, *, how: str = "kill") -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    match how:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(7)
        case "exit well":
            os._exit(0)
        case "abort":
            os.abort()
        case "segfault":
            ctypes.string_at(0)
        case "group":
            os.killpg(0, signal.SIGKILL)
        case _:
            raise AssertionError(how)


def die_once(src: Path, *, marks: str) -> str:
    """Dies at its first attempt on each file."""
    mark = Path(marks, src.name)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return src.name


def die_if_marked(src: Path) -> str:
    """Kills its worker where the input says so."""
    if src.read_text() == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return src.name


# ---- one among many --------------------------------------------------------------------------------------------------


def text(src: str) -> str:
    return src


def wait_for_gate(src: Path, *, gate: str) -> str:
    wait_for(gate)
    return src.name


def wait_for_gate_and_raise(src: Path, *, gate: str) -> None:
    wait_for(gate)
    raise ValueError(src.name)


def odd(src: Path, *, act: str, more: dict[str, str]) -> Any:
    """The name of ``src``; but where that says that it is odd, what ``act`` says."""
    if src.read_text() != "odd":
        return src.name
    match act:
        case "sleep":
            select.select([], [], [], 0.05)
        case "raise":
            raise ValueError(src.name)
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "raise what is huge":
            raise ValueError("x" * 1_000_000)
        case "raise what cannot be pickled":
            raise UnpicklableError
        case "return a lock":
            return threading.Lock()
        case "return bytes":
            return bytes(int(more["n"]))
        case "return what is rebuilt":
            return Rebuilt(more["how"])
        case "close descriptors":
            os.closerange(0, 4096)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit at once":
            os._exit(5)
        case "kill once":
            if not os.path.exists(more["mark"]):
                Path(more["mark"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            wait_for(more["gate"])
        case _:
            raise AssertionError(act)
    return src.name


def surroundings(src: Path, *, act: str) -> str:
    """Working directory and signal handlers as they are found; where ``src`` says that it is odd, they are changed."""
    timer = "a timer" if any(signal.getitimer(signal.ITIMER_REAL)) else "no timer"
    found = f"{os.getcwd()} {signal.getsignal(signal.SIGTERM)} {timer}"
    if src.read_text() == "odd":
        match act:
            case "chdir":
                os.chdir("/")
            case "ignore signals":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "set a timer":
                signal.alarm(3600)
            case _:
                raise AssertionError(act)
    return found


def interrupted_later(src: Path) -> str:
    """Its worker is interrupted once: when it has the first result of a vector, and has not noted yet that it has."""
    if not _interrupts:
        _interrupts.append(src)
        sys.setprofile(_interrupt)
    return src.name


_interrupts: list[Path] = []  # of a worker: the file that came first
_opened: list[Any] = []  # files of a worker, which stay open


def _interrupt(frame: FrameType, event: str, _: object) -> None:
    if event == "call" and frame.f_code.co_name == "_prefix_of":  # of ``Chunks.run``
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)


# ---- ones that bend their process ------------------------------------------------------------------------------------


def close_descriptors(src: Path) -> str:
    os.closerange(0, 4096)
    return "closed"


def close_streams(src: Path) -> str:
    sys.stdout.close()
    sys.stderr.close()
    return "closed"


def replace_handlers(src: Path) -> str:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    return "replaced"


def handlers(src: Path) -> list[str]:
    found = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD)]
    return [getattr(handler, "name", "python") for handler in found] + [str(signal.getitimer(signal.ITIMER_REAL)[0])]


def wait_while_alarmed(src: Path) -> str:
    """Long enough for an alarm that was left behind to go off."""
    select.select([], [], [], 0.2)
    return "alive"


def change_directory(src: Path, *, to: str) -> str:
    os.chdir(to)
    return os.getcwd()


def directory(src: Path) -> str:
    return os.getcwd()


def fork_here(src: Path, *, then: str) -> int:
    """Forks, and lets the child take a way out of the task function. The original returns its pid."""
    child = os.fork()
    if not child:
        if then == "raise":
            raise ValueError("in the child")
        if then == "exit":
            sys.exit(5)
        if then == "exit at once":
            os._exit(5)
        return -1
    os.waitpid(child, 0)
    return os.getpid()


def leave_child(src: Path) -> int:
    """Leaves a sleeping process behind; its pid."""
    return subprocess.Popen(["sleep", str(WATCHDOG_S)]).pid


def leave_child_and_die(src: Path, *, begun: str) -> None:
    child = subprocess.Popen(["sleep", str(WATCHDOG_S)])
    Path(begun).write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def read_input(src: Path) -> str:
    return sys.stdin.read()


def use_a_pool(src: Path) -> list[int]:
    """Processes of its own, in a worker."""
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as own:
        return own.map(abs, [-1, -2, -3])


# ---- ones with outputs -----------------------------------------------------------------------------------------------


def copy(src: Path, dst: Path) -> int:
    return dst.write_bytes(src.read_bytes())


def copy_counting_staged(src: Path, dst: Path) -> int:
    """How many outputs of others are staged beside its own; a marked input is an adventure."""
    content = src.read_text()
    n_staged = sum(path.name.startswith(".rp-") for path in dst.parent.iterdir())
    dst.write_text(content)
    if content == "nap":
        select.select([], [], [], 0.03)
    elif content == "block":
        (dst.parent / src.name).mkdir()
    elif content == "fail once":
        src.write_text("failed once")
        raise OSError("not yet")
    elif content == "die":
        with Path(src.parent, "..", "log").open("ab") as log:
            log.write(b"%d\n" % n_staged)
        os.kill(os.getpid(), signal.SIGKILL)
    return n_staged


def copy_to_elsewhere(src: Path, dst: Path, *, elsewhere: str) -> None:
    """A link to ``elsewhere`` takes the place of the output's directory."""
    os.rename(dst.parent, dst.parent.with_name("before"))
    dst.parent.symlink_to(elsewhere)
    copy(src, dst)


def copy_forking(src: Path, dst: Path) -> int:
    """The child has an error, and the output is its parent's. Each call is told in a log."""
    with Path(src.parent, "..", "log").open("ab") as log:
        log.write(b"called\n")
    copy(src, dst)
    child = os.fork()
    if not child:
        raise OSError("what the child did")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copy_closing(src: Path, dst: Path) -> int:
    """A marked input closes all low descriptors; and opens something else in their place."""
    copied, content = copy(src, dst), src.read_text()
    if content.startswith("close"):
        os.closerange(3, 150)
    if content == "close and open":
        _opened.extend(Path("/proc/self/status").open() for _ in range(50))  # noqa: SIM115
    return copied


def copy_leaving_no_descriptor(src: Path, dst: Path) -> int:
    """Afterwards none may be opened any more."""
    copied = copy(src, dst)
    with contextlib.suppress(OSError):
        while True:
            _opened.append(open(os.devnull))  # noqa: SIM115
    return copied


class LateError(Exception):
    """A timer's handler raised."""


def copy_leaving_a_timer(src: Path, dst: Path) -> int:
    """Its handler raises only where outputs are put in their places."""

    def raise_in_commit(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "commit":
                raise LateError
            frame = frame.f_back

    signal.signal(signal.SIGALRM, raise_in_commit)
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    return copy(src, dst)


def copy_or_size(src: Path, dst: Path | None = None) -> int:
    return src.stat().st_size if dst is None else dst.write_bytes(src.read_bytes())


def staging_of(src: Path, dst: Path) -> str:
    dst.write_bytes(b"")
    return str(dst)


def write_nothing(src: Path, dst: Path) -> None:
    pass


def write_directory(src: Path, dst: Path) -> None:
    dst.mkdir()
    (dst / "inside").write_text("x")


def write_half(src: Path, dst: Path, *, then: str, begun: str = "") -> None:
    dst.write_bytes(b"half")
    match then:
        case "raise":
            raise ValueError("half")
        case "exit":
            sys.exit(1)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            announce(begun)
            signal.pause()


def block_target(src: Path, dst: Path, *, target: str, n: int) -> bytes:
    """Writes its output, and puts something in the way of it; returns ``n`` bytes."""
    dst.write_bytes(b"whole")
    os.mkdir(target)
    return bytes(n)


def copy_after_moving(src: Path, dst: Path, *, to: str) -> int:
    os.chdir(to)
    return copy(src, dst)


def die_once_with_output(src: Path, dst: Path, *, marks: str) -> None:
    dst.write_text("first")
    mark = Path(marks, src.name)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dst.write_text("second")
