"""Counts how often a file appears under its name, by inotify(7): what was committed, and how often."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

_IN_MOVED_TO, _IN_Q_OVERFLOW = 0x80, 0x4000
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Arrivals:
    """``counts``: for each path below ``directories``, how often a file was renamed to it. A context manager."""

    def __init__(self, directories: Iterable[Path]) -> None:
        self.counts: Counter[Path] = Counter()
        self.overflowed = False
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        self._watches: dict[int, Path] = {}
        for directory in directories:
            watch = _libc.inotify_add_watch(self._fd, os.fsencode(directory), _IN_MOVED_TO)
            assert watch >= 0, directory
            self._watches[watch] = directory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._fd)

    def _read(self) -> None:
        while True:
            ended = self._ended.is_set()  # looked at before the last events are read
            readable, _, _ = select.select([self._fd], [], [], 0.05)
            if readable:
                self._count(os.read(self._fd, 1 << 18))
            elif ended:
                return

    def _count(self, events: bytes) -> None:
        at = 0
        while at < len(events):
            watch, mask, _, length = _EVENT.unpack_from(events, at)
            at += _EVENT.size
            if mask & _IN_Q_OVERFLOW:
                self.overflowed = True
            elif mask & _IN_MOVED_TO:
                self.counts[self._watches[watch] / os.fsdecode(events[at : at + length].rstrip(b"\0"))] += 1
            at += length
