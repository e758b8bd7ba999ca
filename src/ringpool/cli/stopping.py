"""What Ctrl-C and SIGTERM do to the command.

    signal   while a job runs                                             at any other time
    first    no new file is begun; those that run have --grace seconds    the command ends
    second   they are killed; what is done is written down                this process ends where it stands
    third    this process ends where it stands, and the kernel its workers

Whoever reads standard output may end too: that is SIGPIPE, and ends the command as well.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from ringpool.coordinator.signals import is_in_finalizer

if TYPE_CHECKING:
    from types import FrameType

    from ringpool.coordinator.job import Job

AGAIN_S, UNHEARD_MAX_S = 0.005, 0.5  # a signal that comes in a finalizer comes again, for so long
HANDLED = (signal.SIGINT, signal.SIGTERM)
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
        self._unheard_s = 0.0  # since when
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

    def _may_wait(self) -> bool:
        """Whether a finalizer may still come to its end first; one that hangs is not to keep signals out."""
        self._unheard_s = self._unheard_s or time.monotonic()
        return time.monotonic() - self._unheard_s < UNHEARD_MAX_S

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if is_in_finalizer(frame) and self._may_wait():
            signal.signal(signal.SIGALRM, lambda _number, later: self._handle(number, later))
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        self.number = self.number or number
        self._n_signals += 1
        job = self._job
        is_stopping = False
        if self._n_signals > 1 or job is None:
            for each in HANDLED:
                signal.signal(each, signal.SIG_DFL)
        if job is not None and not (self._n_signals > 1 and self.is_writing):
            is_stopping = job.interrupt(REASONS[number])
        if not is_stopping:
            raise Stopped(number)


stopper = Stopper()
