"""What dead coordinators have left: their segments, and what their workers had staged of the outputs of file tasks.

A staged file stands beside its output's place, and only the segment's records tell its name. So whoever removes a dead
segment removes these before, whole or not: nobody waits for them, and somebody may have made the outputs since then.
One whose input is gone stays: its task may have moved it there.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress

from ringpool.errors import RingpoolError, SegmentBusyError
from ringpool.shm import layout, segment
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.layout import Form
from ringpool.shm.owner import Owner
from ringpool.shm.ring import Ring

WORKERS_DIE_S = 0.1  # the kernel kills them within milliseconds


def reclaim_dead() -> list[str]:
    """Remove what dead coordinators of this user left, but for jobs' segments; returns the segments' names.

    A segment stays, for the next one who comes, while a worker of it lives: it hangs in the kernel, and might still
    write.
    """
    return segment.reclaim_dead(_remove_staged)


def living_worker(ring: Ring, timeout_s: float) -> int:
    """The pid of a worker of a dead coordinator that is still there after so long; 0: none is."""
    words, deadline_s = ring.words, time.monotonic() + timeout_s
    for worker in range(ring.workers):
        base = ring.worker_word(worker, 0)
        who = Owner(words[base + layout.W_PID], words[base + layout.W_START])
        while who.pid and who.alive:
            if time.monotonic() > deadline_s:
                return who.pid
            time.sleep(0.005)
    return 0


def _remove_staged(name: str) -> bool:
    """Whether segment ``name`` may go."""
    try:
        with closing(Ring(segment.attach(name))) as ring:  # not taken over yet: who does that is alive for long
            if living_worker(ring, WORKERS_DIE_S):
                return False
        end = CoordinatorEnd(segment.attach(name))
    except (
        SegmentBusyError,
        OSError,
        MemoryError,
    ):  # another pool that starts is at it; or there is no descriptor left
        return False
    except Exception:  # not whole, another version's, or damaged: it tells nothing, and must not stop who comes now
        return True
    try:
        for worker in range(end.ring.workers):
            for claim in end.claims_of_dead(worker):
                if end.results.read_task(claim.entry)[3] == Form.FILE:
                    from ringpool.coordinator.staged import StagedOutputs  # here: an executor does without

                    with suppress(RingpoolError, OSError):  # its blob is gone, or its directory
                        StagedOutputs(end).discard_unless_moved(claim.entry)
    except (OSError, MemoryError):
        return False
    except Exception:  # as above
        return True
    finally:
        end.close()
    return True
