"""What a run of a job deals in: files to be done, what would be done with each, and what has come of them."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Work(NamedTuple):
    """A file to be done. ``source``, ``targets``: absolute; ``own``: its own parameters, pickled, and ``own_digest``;
    ``parameters``: the digest of function and all parameters; ``apart``: see ``JobPayload``.
    """

    path: str
    source: bytes
    targets: tuple[bytes, ...]
    own: bytes
    own_digest: bytes
    parameters: bytes
    apart: tuple[int, ...]


class Planned(NamedTuple):
    """What a run would do with a file: ``run``, ``skip`` or ``set aside``, and why."""

    path: str
    outputs: tuple[str, ...]
    action: str
    reason: str


class Failure(NamedTuple):
    """A file that failed: its path, the kind of its error, and the error in words."""

    path: str
    kind: str
    message: str


class Progress(msgspec.Struct):
    """What has come of a run so far. ``total``: how many inputs there are; None: not known (yet)."""

    total: int | None = None
    done: int = 0
    skipped: int = 0
    failed: int = 0
    dead: int = 0  # set aside, in this run or before
    retried: int = 0
    drained: int = 0  # done by an earlier run that was killed, found in what it left
    worker_deaths: int = 0
    workers: int = 0
    under_way: int = 0  # begun, or about to be
    input_bytes: int = 0
    output_bytes: int = 0
    began_s: float = 0.0  # time.monotonic()
    stopping: str = ""  # why no new input is taken

    @property
    def seen(self) -> int:
        """How many inputs have come to their end, in whatever way."""
        return self.done + self.skipped + self.failed + self.dead


class Stops:
    """How often a run was asked to stop, and why: ``n``, and the ``reason`` of the first time. Made before the run is,
    so that who asks while it starts is heard.
    """

    def __init__(self) -> None:
        self.n = 0
        self.reason = ""

    def ask(self, reason: str) -> None:
        """Once more. From any thread, and from a signal handler."""
        self.reason = self.reason or reason
        self.n += 1
