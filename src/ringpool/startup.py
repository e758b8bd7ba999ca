"""What is imported first, with Ctrl-C, SIGTERM and SIGHUP held back until it is there.

While ``msgspec`` sets itself up, it takes any exception for an optional feature that is missing. A
``KeyboardInterrupt`` that comes then is lost, and the next decoder that is made is a segmentation fault (seen with
msgspec 0.22: 5 of 1,000 programs that were interrupted in their first half second). So the signals wait these few
milliseconds.
"""

from __future__ import annotations

import signal

_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
try:
    import msgspec as msgspec
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask_before)
