"""What sets a worker right again after a task has bent it."""

from __future__ import annotations

import subprocess
import sys

from tests.coordinator.program import ROOT, WATCHDOG_S

ON_ITS_WAY = """
import signal, time
from ringpool.workers.confinement import Confinement

seen = []
signal.signal(signal.SIGALRM, lambda number, _frame: seen.append(number))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
signal.setitimer(signal.ITIMER_REAL, 0.0001, 3600)
while not signal.sigpending():
    time.sleep(0.001)
Confinement.disarm()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
print(len(seen), *signal.getitimer(signal.ITIMER_REAL))
"""

DROPPED = """
import signal
from ringpool.workers.confinement import Confinement

seen = []
handler = lambda number, _frame: seen.append(number)
signal.signal(signal.SIGALRM, handler)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
signal.raise_signal(signal.SIGALRM)
confinement = object.__new__(Confinement)
confinement.disarm_for_good()
confinement.disarm_for_good()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
print(seen, signal.getsignal(signal.SIGALRM) is handler)
confinement.rearm()
print(signal.getsignal(signal.SIGALRM) is handler)
"""


def test_a_timer_whose_signal_is_on_its_way_is_stopped() -> None:
    """The kernel starts a periodic one anew when the signal is taken, and until then nothing of it is left to run.

    In a process with one thread, which can hold back its signals.
    """
    assert printed(ON_ITS_WAY) == "1 0.0 0.0\n"


def test_a_signal_on_its_way_does_not_come_into_what_is_done_about_a_failure() -> None:
    assert printed(DROPPED) == "[] False\nTrue\n"


def printed(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=WATCHDOG_S).stdout
