"""What sets a worker right again after a task has bent it."""

from __future__ import annotations

import signal

from tests.coordinator.program import wait_until

from ringpool.workers.confinement import Confinement


def test_a_timer_whose_signal_is_on_its_way_is_stopped() -> None:
    """The kernel starts a periodic one anew when the signal is taken, and until then nothing of it is left to run."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: seen.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 3600)
        wait_until(lambda: signal.SIGALRM in signal.sigpending(), "its signal")
        Confinement.disarm()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        assert seen == [signal.SIGALRM]
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, before)
