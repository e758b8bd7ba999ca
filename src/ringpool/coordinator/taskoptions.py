"""How one call is run: what ``RingPoolExecutor.submit_with`` takes besides the call."""

from __future__ import annotations

import msgspec

from ringpool.coordinator import numbers
from ringpool.shm import layout


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a task is run.

    ``timeout``: seconds that it may run; then its worker is killed, and it fails with ``TaskTimeoutError``.
    ``retries``: how often (0 to 62) it is started again whose worker died in it, or was killed for a limit.
    ``priority``: higher first. Numbers of any type (NumPy's, ``Fraction``) are kept as ``float`` and ``int``. Raises
    ``TypeError`` and ``ValueError``.
    """

    timeout: float | None = None
    retries: int = 0
    priority: int = 0

    def __post_init__(self) -> None:
        for name in ("retries", "priority"):
            msgspec.structs.force_setattr(self, name, numbers.whole(name, getattr(self, name)))
        if self.timeout is not None:
            msgspec.structs.force_setattr(self, "timeout", numbers.real("timeout", self.timeout))
            if not self.timeout > 0:
                raise ValueError(f"timeout must be above 0 seconds, not {self.timeout!r}")
        if not 0 <= self.retries < layout.ATTEMPT_MAX:
            raise ValueError(f"retries must be from 0 to {layout.ATTEMPT_MAX - 1}, not {self.retries!r}")
