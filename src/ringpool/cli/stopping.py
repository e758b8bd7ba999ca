"""What Ctrl-C and SIGTERM do to the command.

    signal   while a job runs                                             at any other time
    first    no new file is begun; those that run have --grace seconds    the command ends
    second   they are killed; what is done is written down                this process ends where it stands
    third    this process ends where it stands, and the kernel its workers

Some send a signal twice for one: ``timeout`` to the command and then to its process group, which it is in; a wrapper
that passes on what the terminal has sent to both. So what comes again within ``SAME_S`` is the same request.

Whoever reads standard output may end too: that is SIGPIPE, and ends the command as well.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from ringpool.coordinator.signals import Patience, is_in_finalizer

if TYPE_CHECKING:
    from types import FrameType

    from ringpool.coordinator.job import Job

AGAIN_S, UNHEARD_MAX_S = 0.005, 0.5  # a signal that comes in a finalizer comes again, for so long
HANDLED = (signal.SIGINT, signal.SIGTERM)
SAME_S = {signal.SIGINT: 0.1, signal.SIGTERM: 0.5}  # nobody presses Ctrl-C twice, and means it, in less
REASONS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """Signal ``number`` asks this process to end. No ``Exception``: nothing on the way may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stopper:
    """What the signals mean now. Attributes: ``number`` (int), of the first signal that came, 0 for none;
    ``is_writing`` (bool), set by who writes to standard output, where nobody may read: a second signal gets through.
    """

    def __init__(self) -> None:
        self.number = 0
        self.is_writing = False
        self._n_signals = 0
        self._asked_s: dict[int, float] = {}  # when each signal last was a request of its own
        self._ends_next = False  # the next request ends this process where it stands
        self._patience = Patience(UNHEARD_MAX_S)
        self._job: Job | None = None

    def install(self) -> None:
        """Handle the signals from now on, but for those that somebody wants ignored (nohup, a background job)."""
        for number in HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def running(self, job: Job) -> Generator[None]:
        """Meanwhile a signal stops ``job``, and raises nothing but what that does."""
        self._job = job
        try:
            yield
        finally:
            self._job = None

    def heed(self) -> None:
        """Raise ``Stopped`` where a signal has come, which was raised where nobody hears of it, as in a ``__del__``."""
        if self.number:
            raise Stopped(self.number)

    def _is_same(self, number: int) -> bool:
        """Whether a signal that comes now is the one before once more."""
        now_s = time.monotonic()
        if now_s - self._asked_s.get(number, -math.inf) < SAME_S[signal.Signals(number)]:
            return True
        self._asked_s[number] = now_s
        return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if is_in_finalizer(frame) and self._patience.lasts():
            signal.signal(signal.SIGALRM, lambda _number, later: self._handle(number, later))
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        if self._is_same(number):
            return
        if self._ends_next:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = self.number or number
        self._n_signals += 1
        job = self._job
        is_stopping = False
        if self._n_signals > 1 or job is None:
            self._ends_next = True
        if job is not None and not (self._n_signals > 1 and self.is_writing):
            is_stopping = job.interrupt(REASONS[number])
        if not is_stopping:
            raise Stopped(number)


stopper = Stopper()
