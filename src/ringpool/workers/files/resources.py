"""What this process uses of what is limited: descriptors, lock files, threads, memory, shared memory.

    descriptors    open / the soft limit (ulimit -n)          EMFILE beyond it
    lock files     open in the table of locks / its bound     the least recently used is closed; one in use never is
    shared memory  free in /dev/shm                           a pool's ring and results live there

Nothing here releases anything: what is bounded bounds itself, and what is held stays held.
"""

from __future__ import annotations

import os
import resource
import threading

import msgspec
import psutil

from ringpool.workers.files import turns

_SHM = "/dev/shm"
_DESCRIPTORS = "/proc/self/fd"


class ResourceStats(msgspec.Struct, frozen=True, kw_only=True):
    """One look. None where it cannot be told: no limit, no such mount, or no descriptor left to look with."""

    descriptors_open: int
    descriptors_max: int | None
    lock_files_open: int
    lock_files_max: int
    threads: int
    rss_bytes: int | None
    rss_peak_bytes: int
    memory_available_bytes: int | None
    shm_free_bytes: int | None
    shm_bytes: int | None


def resource_stats() -> ResourceStats:
    """What this process uses now. Raises nothing, also where it has no descriptor left."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors_max = None if soft == resource.RLIM_INFINITY else soft
    try:
        rss_bytes = psutil.Process().memory_info().rss
        memory_available_bytes = psutil.virtual_memory().available
    except (OSError, psutil.Error):
        rss_bytes = memory_available_bytes = None
    rss_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # which the kernel is late with
    try:
        shm = os.statvfs(_SHM)
        shm_free_bytes, shm_bytes = shm.f_bavail * shm.f_frsize, shm.f_blocks * shm.f_frsize
    except OSError:
        shm_free_bytes = shm_bytes = None
    return ResourceStats(
        descriptors_open=_descriptors_open(descriptors_max or 0),
        descriptors_max=descriptors_max,
        lock_files_open=turns.lock_files_open(),
        lock_files_max=turns.descriptors_max(),
        threads=threading.active_count(),
        rss_bytes=rss_bytes,
        rss_peak_bytes=max(rss_peak_bytes, rss_bytes or 0),
        memory_available_bytes=memory_available_bytes,
        shm_free_bytes=shm_free_bytes,
        shm_bytes=shm_bytes,
    )


def _descriptors_open(at_the_limit: int) -> int:
    """Since Linux 6.2 stat(2) tells it, see proc(5); before, a listing does, which needs a descriptor itself."""
    try:
        return os.stat(_DESCRIPTORS).st_size or len(os.listdir(_DESCRIPTORS)) - 1
    except OSError:
        return at_the_limit
