"""SIGTERM and SIGHUP end a program that has a pool as Ctrl-C does: by an exception in its main thread.

    KeyboardInterrupt   from SIGINT, Python's own; while a job runs, ``held_for`` it
    SystemExit(128 + n) from SIGTERM and SIGHUP, while a pool lives, unless the program handles or ignores them itself

The exception unwinds the program's ``with`` block, or its ``atexit``, and that stops the pool. A signal's default
action would end the process with the segment left in ``/dev/shm`` until the next start removes it. Only the main
thread may give that back: where the last pool was closed by another one, a signal that comes before the main thread has
had occasion to ends the program as if it had been.

A fork of the program has no pool, and the default action, from its first instruction on: a pool of ``multiprocessing``
sends SIGTERM to processes that have just begun. CPython forgets what comes before the first bytecode of a fork, and an
exception in a hook of ``os.fork`` is lost. So signals that somebody handles are held back from before the fork until
the child has the default action, and until the parent is through. What another thread is given comes to the parent's
main thread all the same: an exception that is raised then, by Ctrl-C or a handler of the program, is lost, and nothing
else.

A terminal that goes away says so several times: the kernel to the job in the foreground, the shell to all its jobs. So
once a program ends because of SIGHUP, another one does not interrupt that.

Python handles a signal when the main thread goes on. One that has come as that was just going to sleep for a lock, or
that the kernel gave to another thread, does not wake it: so nobody here sleeps for longer than ``SLEEP_MAX_S``.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingModuleSource]  (in C, within the interpreter)
import _thread
import contextlib
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, cast

from ringpool import startup

SLEEP_MAX_S = 1.0
RESEND_S = 0.001
UNHEARD_MAX_S = 1.0
EXIT_MAX_S = 10.0
_HANDLED = (signal.SIGTERM, signal.SIGHUP)
_OUTERMOST = ("<module>", "_run_module_as_main")  # of a main module; what is called at exit has none
_ALL = [int(number) for number in signal.valid_signals()]
_libc: Any = ctypes.CDLL(None)
_set_mask = cast("Any", _signal).pthread_sigmask  # without Python code, amid which it might be interrupted
_lock = threading.Lock()
_pools: set[int] = set()
_installed: list[signal.Signals] = []
_forking: dict[int, set[int]] = {}  # threads that are about it, with the masks that they had
_n_ended = 0
_late = 0  # the number of one that came after main had ended
_has_main_ended = False
_hooks: list[tuple[Callable[[], None], Callable[[], None], Callable[[], None]]] = []
_hung_up = False


class Patience:
    """With a finalizer in which a signal has come, for ``max_s`` seconds: what is raised there is lost, and one that
    hangs is not to keep signals out.
    """

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._since_s = 0.0

    def lasts(self) -> bool:
        """Whether the finalizer may still come to its end first."""
        self._since_s = self._since_s or time.monotonic()
        return time.monotonic() - self._since_s < self._max_s

    def renew(self) -> None:
        """The signal was heard: the next one waits anew."""
        self._since_s = 0.0


_patience = Patience(UNHEARD_MAX_S)


def _end_program(number: int, frame: FrameType | None) -> None:
    global _n_ended, _hung_up
    if _is_forking(frame) or (not _has_main_ended and is_in_finalizer(frame) and _patience.lasts()):
        with contextlib.suppress(RuntimeError):  # no more threads: lost, as it was
            _thread.start_new_thread(_send_again, (number,))
            return
    if number == signal.SIGHUP and _hung_up:
        return
    if not _pools:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    _patience.renew()
    _n_ended += 1
    _hung_up = _hung_up or number == signal.SIGHUP
    if _has_main_ended or _outermost(frame) == ("_shutdown", "threading"):
        _end_by(number)
    raise SystemExit(128 + number)


def n_ended() -> int:
    """How often such a signal has ended the program: more than once where it has caught that, and goes on."""
    return _n_ended


def is_caught() -> bool:
    """Whether the caller shows that the program has caught its end, and goes on, as pytest and unittest do for each
    test: it is in the main thread, in code that the main module has called, and the exception is not on its way. In a
    finalizer, and at exit, that cannot be told: no.
    """
    if threading.current_thread() is not threading.main_thread() or sys.exc_info()[1] is not None:
        return False
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]  (nothing else tells who has called this)
    return not is_in_finalizer(frame) and _outermost(frame)[0] in _OUTERMOST


def _outermost(frame: FrameType | None) -> tuple[str, str]:
    """The names of the function that nothing had called, and of its module."""
    name = module = ""
    while frame is not None:
        name, module, frame = frame.f_code.co_name, frame.f_globals.get("__name__", ""), frame.f_back
    return name, module


def main_has_ended() -> None:
    """From now on, what a signal's handler raises is printed and lost, and does not become the exit status."""
    global _has_main_ended
    _has_main_ended = True


def is_late(error: BaseException) -> bool:
    """Whether ``error`` is of a signal that has come since main ended: by that this process will end."""
    if isinstance(error, SystemExit):
        return bool(_late)
    if not (isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        return False
    if _has_main_ended:
        _end_by(signal.SIGINT)
    return _has_main_ended


def _end_by(number: int) -> None:
    """A signal has killed tasks since main ended, and the exit status would say that all went well: have this process
    end by that signal when the interpreter has come to its end, as ever; or before, where that takes too long.
    """
    global _late
    if _late:
        return
    _late = number
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    for name, argument in (("_exit", 128 + number), ("raise", number), ("fflush", None)):  # the last is called first
        # Python's own handlers are gone by then. Process 1 of a container the kernel spares: it exits.
        _libc.__cxa_atexit(getattr(_libc, name), ctypes.c_void_p(argument), None)
    with contextlib.suppress(RuntimeError):  # CPython 3.12.0 to 3.12.2 start no thread any more: it takes its time
        _thread.start_new_thread(_insist, (number,))


def _insist(number: int) -> None:
    time.sleep(EXIT_MAX_S)  # in a thread of its own, of which the process does not wait for the end
    _libc.signal(number, None)  # its default action
    os.kill(os.getpid(), number)
    time.sleep(RESEND_S)  # process 1 is spared, and who is stopped in the kernel takes a moment
    os._exit(128 + number)


def is_in_finalizer(frame: FrameType | None) -> bool:
    """Whether ``frame`` is a finalizer's, or was called by one: what is raised there is printed and lost."""
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
        if name == "__del__" or module in ("weakref", "_weakrefset"):
            return True
        if module == "multiprocessing.util" and name == "__call__" and frame.f_locals.get("wr") is not None:
            return True
        frame = frame.f_back
    return False


def install(pool: object) -> None:
    """There is that pool, until ``uninstall``: ``handle``. Either may be called again."""
    _pools.add(id(pool))
    handle()


def handle() -> None:
    """Handle the signals, if this is the main thread and nobody else does; until there is no pool."""
    if threading.current_thread() is not threading.main_thread():
        return
    with _lock:
        for number in _HANDLED:
            if signal.getsignal(number) is signal.SIG_DFL:
                _installed.append(number)  # first: it may come as soon as it is handled
                signal.signal(number, _end_program)


def uninstall(pool: object) -> None:
    """The pool that called ``install`` is closed. After the last one, ``restore``."""
    _pools.discard(id(pool))


def restore() -> None:
    """Give the signals their default action again, if this is the main thread and there is no pool."""
    if threading.current_thread() is not threading.main_thread() or not _installed:
        return
    with _lock:
        while _installed and not _pools:
            number = _installed.pop()
            if number == signal.SIGHUP and _hung_up:
                continue  # what ends after the pool is not to be interrupted either
            if signal.getsignal(number) is _end_program:
                signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def handled() -> Generator[None]:
    """As while a pool lives, meanwhile: what makes pools now and then leaves nothing in between either."""
    who = object()
    install(who)
    try:
        yield
    finally:
        uninstall(who)
        restore()


def around_forks(before: Callable[[], None], in_parent: Callable[[], None], in_child: Callable[[], None]) -> None:
    """As ``os.register_at_fork``, for what a signal is not to interrupt. None of them may raise; ``in_parent`` may be
    called again, where it was interrupted all the same.
    """
    _hooks.append((before, in_parent, in_child))


def _is_forking(frame: FrameType | None) -> bool:
    """Whether this thread is in a hook of a fork, ours or another's; or shows the warning with which CPython 3.12 and
    later end one, and loses what is raised meanwhile.
    """
    while frame is not None:
        if frame.f_code in _CODE_OF_HOOKS or _warns_of_fork(frame):
            return True
        frame = frame.f_back
    mask = _forking.pop(threading.get_ident(), None)
    if mask is not None:  # another's hook, between ours; or ours were interrupted, each of them
        _set_mask(signal.SIG_SETMASK, mask)
    return mask is not None


def _warns_of_fork(frame: FrameType) -> bool:
    if frame.f_code.co_name != "_showwarnmsg" or frame.f_globals.get("__name__") != "warnings":
        return False
    shown = frame.f_locals.get("msg")
    return "fork()" in str(getattr(shown, "message", ""))


def _send_again(number: int) -> None:
    time.sleep(RESEND_S)  # nobody tells when a fork is through
    os.kill(os.getpid(), number)


def _hold_back() -> None:
    """A thread is about to fork."""
    me = threading.get_ident()
    if _installed and me not in _forking:  # it may be, where a handler forks amid a fork
        _forking[me] = _set_mask(signal.SIG_BLOCK, ())  # asked first: the next call may be interrupted
        _set_mask(signal.SIG_BLOCK, [*_HANDLED, *filter(_is_handled, _ALL)])
    for before, _, _ in reversed(_hooks):
        before()


def _is_handled(number: int) -> bool:
    """Whether the program has a handler for it, which may raise."""
    return callable(_signal.getsignal(number))


def _let_through() -> None:
    """It has. What is pending comes here, and finds that it is too early."""
    try:
        _go_on()
    except BaseException:  # of another signal's handler; it is lost, and nothing else
        _go_on()
        raise
    finally:
        _unmask()


def _go_on() -> None:
    for _, in_parent, _ in _hooks:
        in_parent()


def _unmask() -> None:
    me = threading.get_ident()
    if (mask := _forking.get(me)) is not None:
        _set_mask(signal.SIG_SETMASK, mask)
        _forking.pop(me, None)


def _let_go() -> None:
    """In a fork of the program, before any code of its own: the handlers are its parent's, and so may the lock be."""
    global _lock, _n_ended, _late, _hung_up, _has_main_ended
    _lock = threading.Lock()
    if _late:  # this one ends with its own status
        _libc.on_exit(_libc._exit, None)
        _libc.__cxa_atexit(_libc.fflush, None, None)
    _pools.clear()
    _n_ended, _late, _hung_up, _has_main_ended = 0, 0, False, False
    _patience.renew()
    for number in _installed:
        if signal.getsignal(number) is _end_program:
            signal.signal(number, signal.SIG_DFL)
    _installed.clear()
    for _, _, in_child in _hooks:
        in_child()
    _unmask()
    _forking.clear()


_CODE_OF_HOOKS = {hook.__code__ for hook in (startup.after_fork, _hold_back, _let_through, _unmask, _let_go)}
os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_let_go)
os.register_at_fork(after_in_parent=_unmask)  # once more: the first may have been interrupted before its first step


def acquire(lock: threading.Lock, timeout_s: float = -1) -> bool:
    """``lock.acquire``, up to ``timeout_s`` seconds (-1: for ever), in which signals are handled."""
    if 0 <= timeout_s <= SLEEP_MAX_S:
        return lock.acquire(timeout=timeout_s)
    end_s = math.inf if timeout_s < 0 else time.monotonic() + timeout_s
    while (left_s := end_s - time.monotonic()) > 0:
        if lock.acquire(timeout=min(left_s, SLEEP_MAX_S)):
            return True
    return False


@contextlib.contextmanager
def held_for(interrupt: Callable[[str], None]) -> Generator[Callable[[], None]]:
    """In the main thread, Ctrl-C calls ``interrupt("Ctrl-C")`` meanwhile, where it would raise ``KeyboardInterrupt``;
    what is given raises that later.
    """
    n_presses = 0

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal n_presses
        n_presses += 1
        interrupt("Ctrl-C")

    def raise_if_interrupted() -> None:
        if n_presses:
            raise KeyboardInterrupt

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, press)
    try:
        yield raise_if_interrupted
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
