"""What ties a worker process to its coordinator, and what sets it right again after a task has bent it.

bind            own session, the program's signal handlers without those of its pool and event loop, nothing on
                standard input; and two bonds:
                the guard pipe, whose write end only the coordinator holds: when it closes, the kernel sends SIGKILL
                to the process group (F_SETOWN, F_SETSIG, O_ASYNC), to a stopped process and to one in a C call that
                holds the GIL alike; and PDEATHSIG: SIGKILL for the worker when its parent ends
end_if_forked   before a result is posted: the child of a task that forked has no business here
restore         after each task: signal handlers and working directory are put back. Without its descriptors, or
                any more of them, the process ends; its unstarted claims go back
disarm          after each claim, after each task where SIGALRM has a handler, before outputs are put in place, and
                before a handler is put back: a timer that a task has left running is stopped. Where a task has failed,
                its handler is out of the way from then until ``restore``
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import sys
from _signal import getsignal as _get_handler  # pyright: ignore[reportMissingModuleSource]
from collections.abc import Callable
from types import FrameType
from typing import Any

from ringpool.workers.descriptor import out_of_the_way

_F_SETSIG = 10  # fcntl.h
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # sys/prctl.h
_get_timer = signal.getitimer
_REAL = int(signal.ITIMER_REAL)
_NO_TIMER = (0.0, 0.0)
_RESTORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)  # and SIGALRM, see ``_restore_alarm``
_ALARM, _DEFAULT = signal.SIGALRM, int(signal.SIG_DFL)
_OF_COORDINATORS = ("ringpool", "asyncio")  # packages whose handlers need a pool, or a loop, that a worker has not


EXIT_UNSOUND = 70  # a task closed descriptors that this process needs, or has left it without any that are free
DESCRIPTORS_WANTED = 2  # at a time, to put outputs in their places

_libc = ctypes.CDLL(None, use_errno=True)


def name_process(name: str) -> None:
    """What ``ps`` and ``top`` call this process; at most 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """From now on the kernel sends this process that signal when the thread that made it ends; 0: none."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _drop(_number: int, _frame: FrameType | None) -> None:
    """Handles SIGALRM while a failure is looked after."""


def flush() -> None:
    """What was printed goes out, before ``os._exit``."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed by a task: nothing to flush
            continue


class Confinement:
    """The bonds of the calling process; ``guard``: the read end of its guard pipe.

    Raises ``ProcessLookupError`` where the coordinator is gone already.
    """

    _alarm_aside: Callable[[int, FrameType | None], Any] | None = None

    def __init__(self, guard: int) -> None:
        end_with_parent()
        with contextlib.suppress(PermissionError):  # it leads its session already
            os.setsid()
        self._reset_signals()
        self._redirect_input()
        self.guard = out_of_the_way(guard)
        os.close(guard)
        self._arm()
        self.lacks_descriptors = False
        self.forked = False
        self.n_forks = 0
        os.register_at_fork(before=self._count_fork, after_in_child=self._mark_forked)
        self._poll = select.poll()
        for fd in (0, 1, 2, self.guard):
            with contextlib.suppress(OSError):  # a daemon may run without standard output
                os.fstat(fd)
                self._poll.register(fd, 0)
        self.remember()

    def remember(self) -> None:
        """Take signal handlers and working directory, as they are now, for those to put back after each task."""
        self._directory = os.getcwdb()
        self._handlers = [_get_handler(number) for number in _RESTORED]
        self._alarm_handler = _get_handler(_ALARM)

    def _arm(self) -> None:
        fcntl.fcntl(self.guard, fcntl.F_SETOWN, -os.getpid())  # negative: the process group, so children go too
        fcntl.fcntl(self.guard, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(self.guard, fcntl.F_SETFL, fcntl.fcntl(self.guard, fcntl.F_GETFL) | os.O_ASYNC)
        hung_up = select.poll()
        hung_up.register(self.guard, 0)
        if hung_up.poll(0):  # it closed before the signal was armed
            raise ProcessLookupError("the coordinator is gone")

    @staticmethod
    def _reset_signals() -> None:
        """Undo what a coordinator had installed for itself, and its event loop. The program's own handlers stay, and
        so does what is ignored or held back; but SIGINT has Python's own handler, and it and SIGTERM
        get through.
        """
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if str(getattr(_get_handler(number), "__module__", "")).partition(".")[0] in _OF_COORDINATORS:
                signal.signal(number, signal.SIG_DFL)
        held_back = (signal.SIGINT, signal.SIGTERM)
        at_term = signal.getsignal(signal.SIGTERM)
        for number in held_back:  # drops what came meanwhile: it was the coordinator's
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held_back)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if at_term is None else at_term)  # None: a handler of C code

    @staticmethod
    def _redirect_input() -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        if null:
            os.close(null)

    def end_if_forked(self) -> None:
        """End, quietly, where a task forked and let the child return or raise: the original posts the result."""
        if self.forked:
            os._exit(0)

    def _mark_forked(self) -> None:
        self.forked = True

    def _count_fork(self) -> None:
        self.n_forks += 1

    @staticmethod
    def disarm() -> None:
        """Stop the timer of ``signal.alarm`` and ``setitimer``."""
        if _get_timer(_REAL) != _NO_TIMER:  # the interval, too: a signal on its way starts the timer anew
            signal.setitimer(signal.ITIMER_REAL, 0)

    def disarm_for_good(self) -> None:
        """``disarm``, where an error is at hand already: what the timer's handler raises meanwhile is dropped. So is a
        signal on its way, until ``rearm``: the last may come a microsecond after the timer says that it is off (seen
        on Linux 6.18).
        """
        while True:
            try:
                found = _get_handler(_ALARM)
                if callable(found) and found is not _drop:
                    self._alarm_aside = found
                    signal.signal(_ALARM, _drop)
                self.disarm()
                return
            except BaseException:  # at most once for each time that it expires
                continue

    def rearm(self) -> None:
        """Put back the handler of SIGALRM that ``disarm_for_good`` has put aside."""
        aside, self._alarm_aside = self._alarm_aside, None
        if aside is not None and _get_handler(_ALARM) is _drop:
            signal.signal(_ALARM, aside)

    def note(self, error: BaseException) -> None:
        """A task has failed with ``error``: where that was for want of descriptors, which it may have left open, the
        next one is to have a new process.
        """
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            self.lacks_descriptors = True

    def end_if_exhausted(self) -> None:
        """End where no more descriptors may be opened: the coordinator, which has some, does what is to be done with
        what is staged.
        """
        taken: list[int] = []
        try:
            for _ in range(DESCRIPTORS_WANTED):
                taken.append(os.dup(self.guard))
        except OSError as error:
            self.note(error)
        finally:
            for fd in taken:
                os.close(fd)
        if self.lacks_descriptors:
            flush()
            os._exit(EXIT_UNSOUND)

    def renew(self) -> bool:
        """``disarm`` and ``restore``."""
        self.disarm()
        return self.restore()

    def restore(self) -> bool:
        """Put back signal handlers and working directory; whether the process still has its descriptors, and may have
        more.
        """
        if self._alarm_aside is not None:
            self.rearm()
        if list(map(_get_handler, _RESTORED)) != self._handlers:
            self.disarm()  # a task that installs handlers may have set one, too
            for number, handler in zip(_RESTORED, self._handlers, strict=True):
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  (what getsignal gave)
        alarm_handler = _get_handler(_ALARM)
        if alarm_handler != _DEFAULT or self._alarm_handler != _DEFAULT:
            self._restore_alarm(alarm_handler)
        try:
            moved = os.getcwdb() != self._directory
        except FileNotFoundError:  # a task has removed it, under itself
            moved = True
        if moved:
            with contextlib.suppress(OSError):
                os.chdir(self._directory)
        events = self._poll.poll(0)
        if self.lacks_descriptors:
            return False
        return not events or not any(event & select.POLLNVAL for _, event in events)

    def _restore_alarm(self, found: object) -> None:
        """Stop the timer, and put back its handler. Where there was none, one that is ``found`` stays: without a timer
        it does nothing, and a module that has installed it when a task imported it will not do so again.
        """
        self.disarm()
        if found != self._alarm_handler and not (callable(found) and self._alarm_handler == _DEFAULT):
            signal.signal(_ALARM, self._alarm_handler)  # pyright: ignore[reportArgumentType]  (as above)
