"""A map under way: items are drawn lazily, sent together while they are short, and come back in order or as they end.

    items --draw--> n of them --send--> tickets --> pump --> workers
                      ^ Sizer: 8 to 32 ms of work to a vector, 40 ms and more under way
    next() <- piece <- held (in order) <- arrived <--------- pump

Bounds: items under way, by the work in them, at most 32,768, and of large ones, with their results, about 16 MiB; items
drawn and not given out, at most 16,384, or half as many again as may be under way, and about 64 MiB of results.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import msgspec

from ringpool.coordinator.ending import Ending
from ringpool.coordinator.items import Items
from ringpool.coordinator.pieces import Failure, MapInbox, Piece
from ringpool.coordinator.pool import Pool
from ringpool.coordinator.sizer import REFILL_AT, Sizer
from ringpool.coordinator.tickets import Part, Ticket
from ringpool.errors import CoordinatorClosedError
from ringpool.shm import vectors
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import Form
from ringpool.workers import calls

HELD_ITEMS_MAX = 16_384
HELD_BYTES_MAX = 1 << 26
UNDER_WAY_BYTES_MAX = 1 << 24  # of items and their results: more would only fill /dev/shm
VECTOR_BYTES_MAX = vectors.CHUNK_BYTES * 7 // 16  # of items: there is room for half a chunk, and some are larger
ITEMS_MAX = vectors.CHUNK_BYTES // 16  # to a vector, of a chunksize that is larger: beside half a chunk of outcomes
ENOUGH_BYTES, ENOUGH_ITEMS = 32 << 10, 64  # to share what a vector costs: so many bytes, of at least so many items
BUFFER_PARTS = 8  # a buffer whose size is given is filled again when so small a part of it is free
TURN_S = 1.0  # how long who closes the pool waits for a thread that draws
FILL_S = 0.001  # how long items are drawn while results wait to be taken


class MapOptions(msgspec.Struct, frozen=True):
    """How the items of a map are run. ``chunksize``: items to a vector; None: by itself. ``buffersize``: most items
    drawn and not given out; None: by itself.
    """

    ordered: bool
    chunksize: int | None
    buffersize: int | None
    return_exceptions: bool
    timeout_s: float | None
    retries: int
    priority: int


class MapRun:
    """The caller's side of a map: draws, sends, gives out. One thread at a time uses it.

    ``items``: an iterator of items; ``starred``: each is a tuple of arguments; ``at_hand``: it never waits for
    anything. ``function``: what they are called with, for messages; ``function_id``: as the workers know it.
    """

    def __init__(
        self,
        pool: Pool,
        function: Callable[..., Any],
        function_id: int,
        items: Iterator[Any],
        *,
        starred: bool,
        at_hand: bool,
        options: MapOptions,
        on_retired: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._function = function
        self._function_id = function_id
        self._items = Items(items, at_hand=at_hand)
        self._starred = starred
        self._options = options
        self.inbox = MapInbox(on_retired, options.retries)
        self._sizer = Sizer(1 if options.timeout_s is not None else options.chunksize, pool.n_workers)
        self._item_bytes = self._result_bytes = 0.0  # of those that were sent, and came, last, about
        self._large_bytes = 0  # of those that were sent by themselves, and in blobs
        self._held: dict[int, Piece] = {}
        self._held_bytes = 0
        self._next_index = 0
        self._n_drawn = self._n_given = self._n_unsent = 0
        self._n_taken = 0  # pieces
        self._closed = self._begun = self._unbounded = False
        # Of who draws: the caller, the pump, or the one who closes the pool; who may do so in a signal handler, which
        # comes while its own thread has it.
        self._turn = threading.RLock()
        self._is_filling = self._is_missed = False
        self._ending: Ending | None = None  # of the thread that draws what is left, where nobody takes results
        self._is_bound = False  # that thread failed before it had drawn anything: the items may be another thread's
        self._pid = os.getpid()
        if at_hand and options.buffersize is None:
            self.inbox.refill = self._fill_meanwhile
        pool.runs.add(self)
        if not at_hand:
            pool.pump.feeders.add(self)

    # ---- sending

    def fill(self) -> None:
        """Draw items and send them, as far as they may be under way; but not for long while results wait.

        One thread at a time, or items would be sent by other indexes than those by which they were drawn.
        """
        self._pool.check_process()
        with self._turn:
            self._fill()
        self._make_up()

    def _fill(self) -> None:
        try:
            self._is_filling = True
            self._draw_and_send()
        finally:
            self._is_filling = False

    def _draw_and_send(self) -> None:
        arrived, sent = self.inbox.arrived, False
        began_s = time.monotonic()
        if not self._wants_more():
            return
        self.inbox.overdue_ns = self._sizer.overdue_ns
        while not self._items.exhausted and (n := self._room()) > 0:
            items = self._items.draw(n)
            if items:
                self._items.put_back(items[self._send_next(items) :])
                sent = True
            if sent and (not self._items.at_hand or time.monotonic() - began_s > FILL_S):  # to draw more may take long
                self._pool.pump.wake()
                if arrived and time.monotonic() - began_s > FILL_S:
                    return
                sent = False
        if sent:
            self._pool.pump.wake()

    def _fill_meanwhile(self) -> None:
        """In the pump's thread, while nobody takes results: items that are at hand need not wait for that."""
        self._is_missed = True  # and then try: who has the turn looks after giving it up
        if self._turn.acquire(blocking=False):
            self._is_missed = False
            try:
                self._sort()
                self._fill()
            finally:
                self._turn.release()

    def _make_up(self) -> None:
        """After a turn: the pump, if it came meanwhile, comes again. Where nothing is under way it might not."""
        if self._is_missed:
            self._is_missed = False
            if not self._items.exhausted and self._wants_more():
                self._pool.pump.call_soon(self.inbox.settle)

    def _wants_more(self) -> bool:
        """Whether so few items are under way that it is time to send some: several vectors at once, not one by one."""
        buffersize = self._options.buffersize
        if buffersize is not None:
            return self._unbounded or buffersize - self._n_drawn + self._n_given >= self._refill(buffersize)
        return self._n_drawn - self.inbox.n_arrived - self._n_unsent <= self._under_way_max * REFILL_AT

    @property
    def _n_of_vector(self) -> int:
        """How many items go together: as many as take the time that a vector should, if there is room for them; and no
        more than are enough, or all that are under way would take memory for nothing.
        """
        n, n_bytes = min(self._sizer.n, ITEMS_MAX), self._item_bytes
        if n * n_bytes <= ENOUGH_BYTES:
            return n
        return min(n, max(ENOUGH_ITEMS, int(ENOUGH_BYTES / n_bytes)), max(1, int(VECTOR_BYTES_MAX / n_bytes)))

    @property
    def _under_way_max(self) -> int:
        most, n_bytes = self._sizer.under_way_max, self._item_bytes + self._result_bytes
        if most * n_bytes <= UNDER_WAY_BYTES_MAX:
            return most
        return min(most, max(2 * self._pool.n_workers + 2, int(UNDER_WAY_BYTES_MAX / n_bytes)))

    def _refill(self, buffersize: int) -> int:
        """So much of the buffer is to be free before more is drawn: one by one, items would cost a vector each."""
        return max(1, min(self._n_of_vector, buffersize // BUFFER_PARTS))

    def _room(self) -> int:
        """How many items may be drawn now."""
        n_under_way = self._n_drawn - self.inbox.n_arrived - self._n_unsent
        is_enough = n_under_way > 2 * self._pool.n_workers + 1
        if is_enough and self._large_bytes - self.inbox.large_arrived > UNDER_WAY_BYTES_MAX:
            return 0
        n_given_out = self._n_drawn - self._n_given
        if self._options.buffersize is not None and not self._unbounded:
            return min(self._n_of_vector, self._options.buffersize - n_given_out)
        n, most = self._n_of_vector, self._under_way_max
        if n_under_way >= most:
            return 0
        full = n_given_out >= max(HELD_ITEMS_MAX, most * 3 // 2) or self._held_bytes > HELD_BYTES_MAX
        return 0 if full and not self._unbounded else n

    def send_drawn(self) -> None:
        """In the pump's thread: items that were drawn do not wait for the next one, where that takes its time."""
        if not self._closed:
            self._items.send_drawn(self._send_next)

    def _send_next(self, items: list[Any]) -> int:
        """Send as many of them as go together, by the next indexes; how many these were."""
        if not items:
            return 0
        index, n_all = self._n_drawn, len(items)
        self._n_drawn += n_all
        n = self._send(items, index)
        while n < n_all and self._n_drawn != index + n_all:  # a signal handler has sent some that come behind these
            n += self._send(items[n:], index + n)
        self._n_drawn -= n_all - n
        return n

    @property
    def holds_items(self) -> bool:
        """Whether items were drawn, and wait for the next one. A hint, for the pump's thread."""
        return self._items.are_held

    @property
    def _waits_long(self) -> bool:
        """Whether drawing has lately taken longer than an item does: then results that are there are given out first.
        Otherwise more is drawn first, or the workers might run out of items.
        """
        return self._items.take_longer_than(self._sizer.mean_ns / 1e9)

    def _send(self, items: list[Any], index: int) -> int:
        """Send the first of them, which has this ``index``, and those that go together with it; how many they are."""
        if len(items) > 1:
            room = vectors.room_for_items(len(items))
            encoding, body, n = calls.encode_items(items, starred=self._starred, room_bytes=room)
            if n > 1:
                self._item_bytes = len(body) / n
                part = Part(body, encoding, index, 0, n, splits=self._options.chunksize is None)
                task = Task(self._function_id, b"", 0, Form.VECTOR)
                self._queue(Ticket(task, self.inbox, self._function, None, part=part))
                return n
        self._send_one(items[0], index)
        return 1

    def _send_one(self, item: Any, index: int) -> None:
        try:
            call = calls.encode_call(None, item if self._starred else (item,), {})
            n_bytes = len(call.encoded.body) + sum(buffer.nbytes for buffer in call.encoded.buffers)
            task = self._pool.task(self._function_id, call.encoded, call.form)
        except BaseException as error:  # it cannot be sent, or there is no room for it
            if not calls.is_of_item(error):
                raise
            self._n_unsent += 1
            self.inbox.arrived.append(Piece(index, 1, [Failure(error)], failed=True))
            return
        self._item_bytes = n_bytes
        if task.blob:
            self._large_bytes += n_bytes
            self.inbox.large[index] = n_bytes
        self._queue(Ticket(task, self.inbox, self._function, None, index=index))

    def _queue(self, ticket: Ticket) -> None:
        ticket.attempts_max = self._options.retries + 1
        ticket.timeout_s = self._options.timeout_s
        ticket.priority = self._options.priority
        self._pool.pump.queue(ticket)

    # ---- giving out

    def results(self, timeout_s: float | None) -> Iterator[Any]:
        """The results; raises the error of an item when it is its turn, and ``TimeoutError`` after ``timeout_s``."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        results = self._results(end_s)
        weakref.finalize(results, self._let_go).atexit = False
        return results

    def _results(self, end_s: float | None) -> Iterator[Any]:
        self._begun = True
        try:
            while (piece := self._next_piece(end_s)) is not None:
                outcomes, failed = piece.values, piece.failed
                del piece
                outcomes.reverse()
                if failed or self._options.buffersize is not None:
                    yield from self._one_by_one(outcomes)
                else:
                    while outcomes:
                        yield outcomes.pop()  # which keeps nothing that the caller has let go of
            error = self._items.take_error()
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # see ``PoolFuture.result``
        finally:
            self.close()

    def _one_by_one(self, outcomes: list[Any]) -> Iterator[Any]:
        buffersize, n_given = self._options.buffersize, 0
        refill = self._refill(buffersize) if buffersize is not None else 0
        while outcomes:
            if refill:
                n_given += 1
                if n_given >= refill or len(outcomes) == 1:
                    self._n_given += n_given
                    n_given = 0
                    if not self._waits_long:
                        self.fill()
            if type(outcomes[-1]) is not Failure:
                yield outcomes.pop()
            elif self._options.return_exceptions:
                yield outcomes.pop().error
            else:
                raise outcomes.pop().error

    def _next_piece(self, end_s: float | None) -> Piece | None:
        """The next piece to be given out, decoded, and more items on their way; None after the last."""
        self._pool.check_process()
        try:
            with self._turn:
                return self._await_piece(end_s)
        finally:
            self._make_up()

    def _await_piece(self, end_s: float | None) -> Piece | None:
        while True:
            self._sort()
            piece = self._take()
            if piece is not None:
                if self._options.buffersize is None:
                    self._n_given += piece.n
                    if not self._waits_long:
                        self._fill()
                piece.decode()
                return piece
            self._fill()
            if self.inbox.arrived or (not self._items.exhausted and self._n_drawn == self._n_given):
                continue
            if self._n_drawn == self._n_given:
                return None
            self._pool.pump.check_thread()
            timeout_s = -1 if end_s is None else max(0.0, end_s - time.monotonic())
            if not self.inbox.wait(timeout_s):
                raise TimeoutError

    def _sort(self) -> None:
        """What has arrived is held until its turn comes; in the order of items, or of arrival."""
        arrived = self.inbox.arrived
        while arrived:
            piece = arrived.popleft()
            self._sizer.observe(piece.spent_ns, piece.n, piece.n_bytes, piece.is_large)
            self._held[piece.index if self._options.ordered else len(self._held) + self._n_taken] = piece
            self._held_bytes += piece.size_bytes
            self._result_bytes += (piece.size_bytes / piece.n - self._result_bytes) / 4

    def _take(self) -> Piece | None:
        piece = self._held.pop(self._next_index if self._options.ordered else self._n_taken, None)
        if piece is not None:
            self._n_taken += 1
            self._next_index += piece.n
            self._held_bytes -= piece.size_bytes
        return piece

    # ---- the end

    def _let_go(self) -> None:
        """Nobody has the iterator any more. One that nobody has begun means: run it, I do not want the results."""
        if self._begun or self._closed or os.getpid() != self._pid:
            self.close()
            return
        self.inbox.discards = True
        if self._items.exhausted:
            self._report()
            self._retire()
            return
        self._ending = ending = Ending()
        try:
            threading.Thread(target=self._run_out, args=(ending,), name="ringpool-map", daemon=True).start()
        except RuntimeError:  # the interpreter ends: whoever closes the pool does it
            self._ending = None

    def _run_out(self, ending: Ending) -> None:
        n_taken = self._items.n_taken
        try:
            self._send_rest()
        finally:
            self._is_bound = self._items.error is not None and n_taken == self._items.n_taken
            if not self._is_bound:
                self._report()
                self._retire()
            ending.reached()

    def _retire(self) -> None:
        """Nobody takes the results, and all items are drawn: when the last has arrived, nothing of this map is left."""
        self._leave()
        # In the pump's thread, which may be about to send what it has drawn.
        self._pool.pump.call_soon(lambda: self.inbox.retire_after(self._n_drawn - self._n_unsent))

    def _leave(self) -> None:
        """The pool need not know of this map any more."""
        self._pool.runs.discard(self)
        self._pool.pump.feeders.discard(self)

    def _draw_bound(self) -> None:
        """What this map's own thread could not begin to draw may belong to the thread that closes the pool."""
        items, n_taken = self._items, self._items.n_taken
        error = items.take_error()
        self._is_bound = False
        items.begin_again()
        self._send_rest()
        if items.error is None and n_taken == items.n_taken:
            items.error = error  # a generator that has raised says the next time that it is at its end

    def _report(self) -> None:
        """Nobody will take the results, and with them the error of the input."""
        error = self._items.take_error()
        if error is not None and not isinstance(error, CancelledError | CoordinatorClosedError):  # these: by us
            text = "".join(traceback.format_exception(error))
            reason = (
                "ringpool: drawing the items of a map whose results nobody takes; what was left of them was not run"
            )
            print(f"{reason}:\n{text}", end="", file=sys.stderr, flush=True)

    def end(self, *, cancel: bool) -> None:
        """The pool closes. What was not drawn yet is sent, as if it had been from the start; or cancelled.

        An iterator over an iterator, once begun, is drawn as results are taken, and may have no end: its rest is left.
        So is that of a map whose items are just being drawn by this very thread, where a signal handler closes the
        pool, or an item as it is drawn.
        """
        ending = self._ending
        if cancel or (self._begun and not self._items.at_hand) or self._is_filling_here():
            has_turn = self._turn.acquire(timeout=TURN_S)  # or another thread has it, whose next item may never come
            try:
                if not self._items.exhausted:
                    self._items.end(
                        CancelledError()
                        if cancel
                        else RuntimeError(
                            "the executor was shut down before this map had drawn all its items; take the results first"
                        )
                    )
            finally:
                if has_turn:
                    self._turn.release()
        elif ending is None:
            self._send_rest()
        while ending is not None and not ending.wait(1.0):
            continue
        if self._is_bound and not cancel:
            self._draw_bound()
        if self.inbox.discards and not cancel:
            self._report()
        self._leave()

    def _is_filling_here(self) -> bool:
        if not self._turn.acquire(blocking=False):  # another thread has it
            return False
        try:
            return self._is_filling
        finally:
            self._turn.release()

    def _send_rest(self) -> None:
        """Draw and send until the items are at their end."""
        self._unbounded = True
        while not self._items.exhausted:
            with self._turn:
                if self._pool.closed:  # meanwhile, by another thread that did not wait
                    self._items.end(self._pool.pump.ended_error())
                    break
                self._sort()
                if self.inbox.discards:
                    self._held.clear()
                    self._held_bytes = 0
                self._fill()
            if not self._items.exhausted:
                self.inbox.wait_beside(1.0)
        self.inbox.tell_taken()

    def close(self) -> None:
        """Take no more: what has not started is cancelled, what runs is left to end, and its result is dropped."""
        if self._closed or os.getpid() != self._pid:  # in a fork of the program, the results are its parent's
            return
        self._closed = self.inbox.closed = True
        self._items.let_go()
        self.inbox.refill = None  # which leads back here: without a garbage collection, all would stay
        self.inbox.arrived.clear()
        self._held.clear()
        self._leave()
        self._pool.pump.abandon(self.inbox)
