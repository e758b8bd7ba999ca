"""How a job is run: what may be chosen, and what of that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ringpool.coordinator import numbers
from ringpool.shm import layout
from ringpool.workers.files.durability import Durability
from ringpool.workers.retry import RetryPolicy


class JobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a job is run.

    ``durability`` of outputs: ``"none"``, ``"atomic"``, ``"data"`` or ``"full"`` (the default, at which many outputs
    share their syncs). ``retry``: how a call that raises is tried again. ``attempts_max``: how often a file is begun
    whose workers die, until it is set aside. ``timeout_s`` of each file, ``memory_limit_bytes`` of each worker: it is
    killed. ``nice``: added to the workers' niceness. ``max_tasks_per_child``: a worker is replaced after so many.
    ``max_failures``, ``max_failure_share`` (0 to 1): with more, the run takes no new file. ``rate_per_s``: at most so
    many files are begun. ``largest_first``: list all, then begin with the largest. ``fingerprints``: inputs are files,
    and their size, mtime and inode tell whether they changed (False: they are names, of anything). ``checksums``: of
    the inputs' content too. ``digests`` of outputs, for ``verify="digest"``. ``grace_s``: how long running files have
    when the run is stopped.
    """

    durability: str = "full"
    retry: RetryPolicy | None = None
    attempts_max: int = 3
    timeout_s: float | None = None
    memory_limit_bytes: int | None = None
    nice: int = 0
    max_tasks_per_child: int | None = None
    max_failures: int | None = None
    max_failure_share: float | None = None
    rate_per_s: float | None = None
    largest_first: bool = False
    fingerprints: bool = True
    checksums: bool = False
    digests: bool = True
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        Durability(self.durability)
        if not isinstance(self.retry, RetryPolicy | None):  # pyright: ignore[reportUnnecessaryIsInstance]  (as tasks.pack_policy)
            raise TypeError(f"retry of a job must be a RetryPolicy or None, not {self.retry!r}")
        for name in ("largest_first", "fingerprints", "checksums", "digests"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} of a job must be True or False, not {getattr(self, name)!r}")
        for name, convert, accepts, wanted in _RULES:
            value = getattr(self, name)
            if value is None:
                continue
            number = convert(name, value)
            if not accepts(number):
                raise ValueError(f"{name} of a job must be {wanted}, not {value!r}")
            msgspec.structs.force_setattr(self, name, number)


_RULES: tuple[tuple[str, Callable[[str, Any], float], Callable[[Any], bool], str], ...] = (
    ("attempts_max", numbers.whole, lambda n: 1 <= n <= layout.ATTEMPT_MAX, f"from 1 to {layout.ATTEMPT_MAX}"),
    ("timeout_s", numbers.real, lambda s: s > 0, "more than 0 seconds"),
    ("memory_limit_bytes", numbers.whole, lambda n: n > 0, "more than 0 bytes"),
    ("nice", numbers.whole, lambda _n: True, "an integer"),
    ("max_tasks_per_child", numbers.whole, lambda n: n >= 1, "1 or more"),
    ("max_failures", numbers.whole, lambda n: n >= 0, "0 or more"),
    ("max_failure_share", numbers.real, lambda share: 0 <= share <= 1, "a share from 0 to 1"),
    ("rate_per_s", numbers.real, lambda rate: rate > 0, "more than 0 files a second"),
    ("grace_s", numbers.real, lambda s: s >= 0, "0 seconds or more"),
)
