"""How a turn comes to its lock: the table of this process's open lock files, and the steps of an acquisition.

    arrive    path -> base, stripe -> the open lock file -> held, or waiting
    finish    what is left to do then, as a generator: the same for threads, which sleep, and for tasks, which await

The table is bounded: the least recently used lock file is closed first, one that is held or awaited never. It holds a
stripe by the spelling of its base; two spellings that lead to one file share its stripe.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from queue import Empty, SimpleQueue

from ringpool.workers.files import journal, lockfiles, stripes, tickets
from ringpool.workers.files.stripes import OutOfTimeError, SoftStripe, StaleError, Stripe, Turn

DESCRIPTORS_MAX = 64
ROOTS_REMEMBERED_MAX = 4096
WITHOUT_BELL_S = 0.005

_stripes: OrderedDict[tuple[bytes, int], Stripe] = OrderedDict()  # the least recently used first
_recovered: set[bytes] = set()  # the bases that this process has looked at for dead transactions


def arrive(turn: Turn, base: bytes | None, *, may_wait: bool) -> bool:
    """Whether ``turn`` holds the stripe of its path; otherwise it waits there, if it may. Raises ``OSError``."""
    for _ in range(lockfiles.REOPENS_MAX):
        root, number = lockfiles.find(turn.path, base)
        if root not in _recovered:
            recover_root(root)
        with stripes.mutex:
            stripe = _stripes.get((root, number))
            if stripe is None:
                stripe = _open(root, number)
                # This may have made the first .ringpool here, while a neighbour made one further out.
                if base is None and lockfiles.find(turn.path, None)[0] != root:
                    continue
            else:
                _stripes.move_to_end((root, number))
            turn.stripe = stripe
            try:
                return stripe.arrive(turn, may_wait=may_wait)
            except StaleError:
                _retire(stripe, turn)
    raise OSError(errno.ESTALE, "its lock file is removed again and again", turn.path)


def lock_files_open() -> int:
    """How many lock files this process has open."""
    with stripes.mutex:
        return len({*_stripes.values(), *stripes.retired})


def is_recovered(root: bytes) -> bool:
    """Whether ``recover_root`` has nothing to do."""
    return root in _recovered


def recover_root(root: bytes) -> None:
    """Finish what died transactions left below a base, the first time that this process comes there.

    Marks tell of them as well, but are not durable.
    """
    journal.recover_root(root)
    if len(_recovered) >= ROOTS_REMEMBERED_MAX:
        _recovered.clear()
    _recovered.add(root)


def _open(root: bytes, number: int) -> Stripe:
    path = lockfiles.lock_file(root, number)
    fd = lockfiles.open_lock_file(path)
    kind = SoftStripe if lockfiles.is_network(lockfiles.file_system_of(fd)) else Stripe
    opened = kind(root, path, fd)
    for stripe in _stripes.values():
        if (stripe.inode, stripe.device) == (opened.inode, opened.device):  # another spelling of the base
            opened.close()
            opened = stripe
            opened.path = path
            break
    _stripes[root, number] = opened
    if len(_stripes) > DESCRIPTORS_MAX:
        for key, stripe in [*_stripes.items()][: len(_stripes) - 1]:
            if not stripe.holds and not stripe.queue and len(_stripes) > DESCRIPTORS_MAX and key in _stripes:
                _unlist(stripe)
    return opened


def _unlist(stripe: Stripe) -> None:
    stripe.is_listed = False
    for key in [key for key, each in _stripes.items() if each is stripe]:
        del _stripes[key]
    if stripe.holds or stripe.queue:
        stripes.retired.add(stripe)
    else:
        stripe.close()


def _retire(stripe: Stripe, turn: Turn) -> None:
    """Its file is gone: who comes from now on opens the new one, and who waits finds out."""
    with stripes.mutex:
        stripe.leave(turn)
        if stripe.is_listed:
            _unlist(stripe)


def _forget() -> None:
    """In the child of a fork: close the descriptors, unlock nothing, begin anew."""
    for stripe in {*_stripes.values(), *stripes.retired}:
        stripe.abandon()
    _stripes.clear()
    stripes.retired.clear()
    tickets.close_ringer()
    stripes.mutex = threading.RLock()  # the old one is held, by the thread that forked


os.register_at_fork(
    before=lambda: stripes.mutex.acquire(), after_in_parent=lambda: stripes.mutex.release(), after_in_child=_forget
)


# ---- from arriving to holding ----------------------------------------------------------------------------------------


def finish(
    turn: Turn, base: bytes | None, deadline_s: float | None, idle_s: float
) -> Generator[float | None, bool, None]:
    """After ``arrive``: what is left to do until ``turn`` holds, for any kind of caller.

    Yields how long it may sleep at most, and wants to be sent whether it was woken; ``idle_s`` for one who is not the
    first of its process. Yields None where ``recover`` is to be called. Raises ``OutOfTimeError`` at ``deadline_s``
    (monotonic), ``OSError``.
    """
    rung = True
    while True:
        stripe = turn.stripe
        assert stripe is not None
        if turn.is_marked:
            yield None
        with stripes.mutex:
            if turn in stripe.holds:
                return
            try:
                if turn.is_waiting and stripe.look(turn, rung=rung):
                    continue
                if turn.is_waiting and stripe.hang_bell(turn):
                    continue
                is_first = stripe.queue[:1] == [turn]
            except StaleError:
                _retire(stripe, turn)
                arrive(turn, base, may_wait=True)
                continue
        pause_s = idle_s if not is_first else stripe.look_s if turn.bell is not None else WITHOUT_BELL_S
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not turn.is_waiting:
                raise OutOfTimeError
            pause_s = min(pause_s, left_s)
        rung = yield pause_s


def sleep(turn: Turn, gate: SimpleQueue[None], pause_s: float) -> bool:
    """Sleep in this thread; whether it was woken. ``gate.put`` is the turn's alarm."""
    if turn.bell is None:
        try:
            gate.get(timeout=pause_s)
        except Empty:
            return False
        return True
    if not turn.bell.sleep(pause_s):
        return False
    answer(turn)
    return True


def answer(turn: Turn) -> None:
    """Silence the bell of ``turn``, and go back in the queue where it was overtaken."""
    if turn.bell is not None and turn.stripe is not None and tickets.OVERTAKEN in turn.bell.heard():
        with stripes.mutex:
            turn.stripe.send_back(turn)
