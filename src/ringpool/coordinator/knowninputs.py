"""Which inputs of a job its tasks have moved away: that such a one is gone is no mistake."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ringpool.coordinator.inputs import OWN_DIRECTORY
from ringpool.coordinator.ledger import LEDGER_NAME, Ledger


class KnownInputs:
    """Those of the job ``identity`` in ``directory``. The ledger is opened by the first question; ``close`` it."""

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory = directory
        self._identity = identity
        self._ledger: Ledger | None = None
        self._job = 0

    def __contains__(self, path: bytes) -> bool:
        """Whether the input at ``path``, absolute, is one of them. Raises ``LedgerError``."""
        ledger = self._opened()
        return ledger is not None and ledger.has_consumed(self._job, path)

    def have(self, matches: Callable[[str], bool]) -> bool:
        """Whether the absolute path of one of them ``matches``. Raises ``LedgerError``."""
        ledger = self._opened()
        return ledger is not None and any(matches(os.fsdecode(path)) for path in ledger.consumed(self._job))

    def _opened(self) -> Ledger | None:
        if self._ledger is None:
            if not (self._directory / OWN_DIRECTORY / LEDGER_NAME).exists():
                return None
            self._ledger = Ledger.open(self._directory, create=False, read_only=True)
            self._job = next((found.id for found in self._ledger.jobs() if found.identity == self._identity), 0)
        return self._ledger

    def close(self) -> None:
        """Close the ledger, if it was opened."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
