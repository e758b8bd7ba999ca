"""The items of a map, drawn as they are wanted: what is at hand many at a time, what takes its time one by one.

iterator --draw--> list of items, for the one who asked; put_back: those for which there was no room, next time's first
             |
             +---- send_drawn: while the next one is waited for, the pump sends those before it
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ringpool.coordinator.sizer import VECTOR_ITEMS_MAX

DRAW_S = 0.001  # an iterator that takes longer has its items sent before it is asked for more
DRAW_GROUP_MAX = 32
SLOW_S, SLOW_FOR = 0.02, 20  # one that has taken longer counts as slow, so many times as long as it took


class Items:
    """An ``iterator`` of items; ``at_hand``: it never waits for anything. One thread at a time draws.

    ``exhausted``: nothing more is drawn; ``error``: what the iterator raised, to be raised again when what was drawn
    before it has been given out.
    """

    def __init__(self, iterator: Iterator[Any], *, at_hand: bool) -> None:
        self.at_hand = at_hand
        self.exhausted = False
        self.error: Exception | None = None
        self._iterator = iterator
        self.n_taken = 0  # that the iterator has given, ever
        self._has_ended = False
        self._back: list[Any] = []
        self._group = VECTOR_ITEMS_MAX if at_hand else 1
        self._group_max = VECTOR_ITEMS_MAX if at_hand else DRAW_GROUP_MAX
        self._drawing: list[Any] | None = None  # so far: it grows while its last item is waited for
        self._is_drawing = threading.Lock()  # of who takes from ``_drawing``: the one who draws, or the pump
        self._n_sent_meanwhile = 0  # of ``_drawing``, by the pump
        self._began_s = self._waited_s = self._slow_until_s = 0.0
        self._n_quick = 0  # items that came without a wait

    def draw(self, n: int) -> list[Any]:
        """Up to ``n`` items; fewer where they take long to come. Without those that were sent meanwhile."""
        items = self._back[:n]
        del self._back[:n]
        self._drawing, n_before = items, len(items)
        self._began_s = began_s = time.monotonic()
        try:
            while len(items) < n and not self._has_ended:
                wanted = min(n, len(items) + self._group)
                items.extend(islice(self._iterator, wanted - len(items)))
                if len(items) < wanted:
                    self._has_ended = True
                    break
                if not self.at_hand and time.monotonic() - began_s > DRAW_S:
                    break
                self._n_quick += self._group
                if self._n_quick >= DRAW_GROUP_MAX and (self.at_hand or began_s > self._slow_until_s):
                    self._group = min(self._group_max, 2 * self._group)
        except Exception as error:
            self.end(error)
        except BaseException:  # Ctrl-C
            self._drawing = None
            raise
        self.n_taken += len(items) - n_before
        self.exhausted = self._has_ended and not self._back
        if not self.at_hand:
            self._judge(time.monotonic(), began_s)
        with self._is_drawing:
            self._drawing = None
            n_sent, self._n_sent_meanwhile = self._n_sent_meanwhile, 0
        return items[n_sent:]

    def put_back(self, items: list[Any]) -> None:
        """They were drawn last, and are not sent yet."""
        if items:
            self._back[:0] = items
            self.exhausted = False

    def _judge(self, now_s: float, began_s: float) -> None:
        """An iterator that has taken its time is asked for one item; one that took long, for a while one by one."""
        waited_s = now_s - began_s
        if waited_s > DRAW_S:
            self._group = 1
        if waited_s > SLOW_S and (waited_s >= self._waited_s or now_s > self._slow_until_s):
            self._n_quick = 0
            self._waited_s, self._slow_until_s = waited_s, now_s + SLOW_FOR * waited_s

    def send_drawn(self, send: Callable[[list[Any]], int]) -> None:
        """In the pump's thread: items that were drawn do not wait for the next one, where that takes its time. ``send``
        says how many it has sent.
        """
        drawing = self._drawing
        if not drawing or time.monotonic() - self._began_s < DRAW_S:
            return
        if self._is_drawing.acquire(blocking=False):
            try:
                if self._drawing is drawing:
                    items = drawing[self._n_sent_meanwhile :]
                    self._n_sent_meanwhile += send(items)
            finally:
                self._is_drawing.release()

    @property
    def are_held(self) -> bool:
        """Whether some were drawn, and wait for the next one. A hint, for the pump's thread."""
        return bool(self._drawing)

    def take_longer_than(self, duration_s: float) -> bool:
        """Whether drawing one has lately taken longer."""
        return time.monotonic() < self._slow_until_s and self._waited_s > duration_s

    def end(self, error: Exception | None) -> None:
        """Draw nothing more."""
        self.exhausted = self._has_ended = True
        self.error = error
        self._back.clear()

    def begin_again(self) -> None:
        """Draw from the iterator, although it has raised something."""
        self.exhausted = self._has_ended = False

    def take_error(self) -> Exception | None:
        """``error``, which is None from now on."""
        error, self.error = self.error, None
        return error

    def let_go(self) -> None:
        """Draw nothing more, and do not keep the iterator."""
        self.exhausted = self._has_ended = True
        self._iterator = iter(())
        self._back.clear()
