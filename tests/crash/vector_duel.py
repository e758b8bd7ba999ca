"""A worker and the publisher of its vector, of whom either can be stopped at any bytecode for the other's sake.

    worker      Chunks.run of three items, in a fork             up to N_RUN bytecodes
    publisher   two splits: half of what follows, then all       up to N_SPLIT

What the one has taken, the publisher runs itself in the end, so that every item is run: once.
"""

from __future__ import annotations

import mmap
import pickle
import secrets
from types import TracebackType
from typing import Any

from tests.crash.harness import Child
from tests.crash.opcodes import Bytecodes
from tests.crash.test_kill_worker import Stage

from ringpool.shm import barrier, owner, segment, vectors
from ringpool.shm.layout import OutcomeKind
from ringpool.shm.vectors import Arena, Chunks, Span

N_ITEMS = 3
N_RUN, N_SPLIT = 480, 150
ITEMS = [10, 20, "three"]  # two plain words, and a stream


def encode(value: object, _room: int) -> tuple[int, bytes]:
    return OutcomeKind.PICKLE, pickle.dumps(value)


class Duel:
    """One arena, for any number of meetings. ``n_run``, ``n_split``: bytecodes of the last one."""

    def __init__(self) -> None:
        me = owner.this_process()
        self.segment = f"rp.{owner.pid_namespace()}.{me.pid}.{me.start}.{secrets.token_hex(4)}"
        self.arena = Arena(self.segment, 2)
        self.counts = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # runs of each item; n done, n_run
        self.n_run = self.n_split = 0

    def __enter__(self) -> Duel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.arena.close()
        segment.unlink(self.segment)

    def call(self, item: int) -> Any:
        """What the items of the vector are called with: their index."""
        self.counts[item] += 1
        return ITEMS[item]

    def run(self, chunks: Chunks, span: Span) -> int:
        """Run the items of a span, by whoever it is."""
        return chunks.run(span, range(N_ITEMS), self.call, encode, encode, N_ITEMS)

    def work(self, span: Span, stage: Stage, at: int) -> None:
        """The worker: it stops before bytecode ``at``, but not where it waits for the publisher."""
        assert barrier.register()
        chunks, stops = Chunks.attach(self.segment), True
        wait = chunks._may_run

        def may_run(limit: int, i: int) -> bool:
            nonlocal stops
            if stops:
                stops = False
                stage.say(stops=False)
            return wait(limit, i)

        def act(n: int) -> None:
            nonlocal stops
            if n == at and stops:
                stage.say(stops=True)
                stage.wait()

        chunks._may_run = may_run  # type: ignore[method-assign]
        stage.wait()
        with Bytecodes(act) as bytecodes:
            self.counts[N_ITEMS] = self.run(chunks, span)
        self.counts[N_ITEMS + 1] = bytecodes.n
        if stops:
            stage.say(stops=False)
        stage.wait()

    def meet(self, at_run: int, at_split: int, *, worker_first: bool) -> bool:
        """A run and two splits, interleaved; whether the splits have a bytecode ``at_split``.

        Whoever is first goes to its stop, then the other to its own, then the first to its end, then the other.
        """
        for i in range(N_ITEMS + 2):
            self.counts[i] = 0
        span, stage = Span(0, 0, N_ITEMS, 8, 0), Stage()
        self.arena.write(span, bytes(8))
        child = Child(lambda: self.work(span, stage, at_run))
        try:

            def act(n: int) -> None:
                if n == at_split:
                    stage.let_go(child)

            if worker_first:
                stage.let_go(child)
            with Bytecodes(act) as bytecodes:
                end = self.arena.split(span, lambda n: n // 2)
                end = self.arena.split(span._replace(end=end), lambda n: 0)
            stage.let_go_for_good(child)
            assert child.wait() == 0
        finally:
            if child.exitcode is None:
                child.kill()
                child.wait()
            stage.close()
        self.n_run, self.n_split = self.counts[N_ITEMS + 1], bytecodes.n
        self._check(span, end)
        return bytecodes.n >= at_split

    def _check(self, span: Span, end: int) -> None:
        n = self.counts[N_ITEMS]
        assert n == end, f"the worker has done {n} items, and was left {end}"
        assert list(self.counts[:N_ITEMS]) == [1] * n + [0] * (N_ITEMS - n)
        assert self.arena.progress(span) == end
        rest = Span(1, end, N_ITEMS, 8, 0)
        self.arena.write(rest, bytes(8))
        assert self.run(self.arena, rest) == N_ITEMS - n
        assert list(self.counts[:N_ITEMS]) == [1] * N_ITEMS
        assert self._read(span, n) + self._read(rest, N_ITEMS - n) == ITEMS

    def _read(self, span: Span, n: int) -> list[Any]:
        plain, stream = self.arena.outcomes(span, vectors.Done(n, self.arena.done(span).packed_bytes))
        return plain + [pickle.loads(body) for _, body in vectors.stream(stream)]
