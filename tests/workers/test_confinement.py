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


def test_a_timer_whose_signal_is_on_its_way_is_stopped() -> None:
    """The kernel starts a periodic one anew when the signal is taken, and until then nothing of it is left to run.

    In a process with one thread, which can hold back its signals.
    """
    done = subprocess.run(
        [sys.executable, "-c", ON_ITS_WAY], cwd=ROOT, capture_output=True, text=True, check=True, timeout=WATCHDOG_S
    )
    assert done.stdout == "1 0.0 0.0\n"
