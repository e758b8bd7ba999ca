"""A world whose workers do as a job's do: they stage what a claim's tasks make, and commit it at the claim's end."""

from __future__ import annotations

from tests.crash.harness import World, value_of

from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import Results


class StagingWorld(World):
    """A world whose workers stage the effects of a claim's tasks, and have all at its end. Every third has none."""

    def __init__(self) -> None:
        super().__init__()
        self._staged: list[int] = []

    def stage(self, results: Results, entry: int) -> None:
        results.post(entry, Status.STAGED, Encoding.MSGPACK, value_of(entry), 1)
        self._staged.append(entry)

    def commit(self, results: Results, entry: int) -> None:
        """Not yet: at the end of the claim."""

    def end_claim(self, results: Results) -> None:
        self.commit_some(results, len(self._staged))

    def commit_some(self, results: Results, n: int) -> None:
        """The first ``n`` of what is staged."""
        for entry in self._staged[:n]:
            self.effect(entry)
            results.finish(entry)
        del self._staged[:n]
