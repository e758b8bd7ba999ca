"""How a turn comes to its lock: the table of this process's open lock files, and the steps of an acquisition.

    arrive    path -> base, stripe -> the open lock file -> held, or waiting
    finish    what is left to do then, as a generator: the same for threads, which sleep, and for tasks, which await

The table is bounded: the least recently used lock file is closed first, one that is held or awaited never. One that is
opened while it is full of those is closed when nobody holds or awaits it any more. It holds a stripe by the spelling of
its base; two spellings that lead to one file share its stripe.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from contextlib import nullcontext, suppress
from queue import Empty, SimpleQueue

from ringpool.workers.files import lockfiles, recovery, stripes, tickets
from ringpool.workers.files.durability import identity_of
from ringpool.workers.files.holds import OutOfTimeError
from ringpool.workers.files.lockfiles import Place
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.stripes import SoftStripe, StaleError, Stripe, Turn

DESCRIPTORS_MAX = (
    256  # a job locks every stripe of its base again and again; and a quarter of what the process may have open
)
DIRECTORIES_REMEMBERED_MAX = 4096
STUCK_AGAIN_S = 1.0
NO_STRIPE = -1
WITHOUT_BELL_S = 0.005

_stripes: OrderedDict[tuple[bytes, int], Stripe] = OrderedDict()  # the least recently used first
# Where no dead transactions were left: base, and device and inode of the directory, whose spelling may come to mean
# another one.
_looked_at: set[tuple[bytes, int, int]] = set()
# Bases where none were left: whose root it was then, which may be another one now, the base, and its identity.
_recovered: set[tuple[bytes, bytes, tuple[int, int, int]]] = set()
# Where some are that nobody can finish, by base: when to try it again, and the stripes of their paths (``NO_STRIPE``:
# of one whose directory is gone).
_left: dict[bytes, tuple[float, frozenset[int]]] = {}


def arrive(turn: Turn, base: bytes | None, deadline_s: float | None, *, may_wait: bool) -> bool:
    """Whether ``turn`` holds the stripe of its path; otherwise it waits there, if it may.

    Raises ``OSError``; ``OutOfTimeError`` where another recovers that base until ``deadline_s`` (monotonic).
    """
    for _ in range(lockfiles.REOPENS_MAX):
        place = lockfiles.find(turn.path, base)
        if not is_recovered(place):
            recover(place, deadline_s)
        turn.place = root, number = place.root, place.stripe
        with stripes.mutex:
            stripe = _stripes.get((root, number))
            if stripe is None:
                stripe = _open(root, number)
                # This may have made the first .ringpool here, while a neighbour made one further out.
                if base is None and lockfiles.find(turn.path, None).root != root:
                    continue
            else:
                _stripes.move_to_end((root, number))
            turn.stripe = stripe
            try:
                return stripe.arrive(turn, may_wait=may_wait)
            except StaleError:
                _retire(stripe, turn)
    raise OSError(errno.ESTALE, "its lock file is removed again and again", turn.path)


def arrive_at_once(turn: Turn, base: bytes | None) -> bool:
    """Whether ``turn`` holds; otherwise it does not wait, and may still be entered: ``leave`` in any case.

    The short way of ``arrive``, for a path that is no symlink, and a lock file that is open, free and unmarked. Of
    whatever else there is, errors too, it says False; ``arrive`` then finds out.
    """
    directory, _, name = turn.path.rpartition(b"/")
    try:
        found = calls.stat(directory)
        device, inode = found.st_dev, found.st_ino
        root = base or lockfiles.base_of(directory, device, inode)
        if (root, device, inode) not in _looked_at:
            return False
        number = lockfiles.stripe_in(device, inode, name)
        with stripes.mutex:
            stripe = turn.stripe = _stripes.get((root, number))
            return stripe is not None and stripe.arrive(turn, may_wait=False) and not turn.is_marked
    except (OSError, StaleError):
        return False


def lock_files_open() -> int:
    """How many lock files this process has open."""
    with stripes.mutex:
        return len({*_stripes.values(), *stripes.retired})


def descriptors_max() -> int:
    """How many lock files that are neither held nor awaited stay open."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DESCRIPTORS_MAX if allowed == resource.RLIM_INFINITY else max(1, min(DESCRIPTORS_MAX, allowed // 4))


def is_recovered(place: Place) -> bool:
    """Whether ``recover`` has nothing to do."""
    return (place.root, place.device, place.inode) in _looked_at


def recover(place: Place, deadline_s: float | None) -> None:
    """Finish what died transactions left there, the first time that this process comes to that directory; and again
    while there is one that cannot be finished, which keeps nobody from other files.

    Marks tell of them as well, but are not durable, and those of a base further in are seen by nobody any more. Raises
    ``OSError``; ``OutOfTimeError`` as ``arrive`` does.
    """
    if len(_looked_at) + len(_recovered) >= DIRECTORIES_REMEMBERED_MAX:
        _looked_at.clear()
        _recovered.clear()
    is_done = True
    for base in (place.root, *lockfiles.bases_between(place.root, place.directory)):
        served = place.root, base, identity_of(calls.stat(base), base)
        if served in _recovered:
            continue
        if base != place.root:  # whose marks nobody sees any more: all of it has to be finished
            recovery.recover_root(base, deadline_s)
        elif not _recover_own(place, deadline_s):
            is_done = False
            continue
        _recovered.add(served)
    if is_done:
        _looked_at.add((place.root, place.device, place.inode))


def _recover_own(place: Place, deadline_s: float | None) -> bool:
    """``recover`` its base; whether nothing is left there. What is has nothing to do with that place, and is tried
    again now and then, without waiting for others who try.
    """
    again_s, stuck = _left.get(place.root, (0.0, frozenset[int]()))
    is_spared = bool(stuck) and place.stripe not in stuck
    if is_spared and time.monotonic() < again_s:
        return False
    stripes_left = set[int]()

    def spares(path: bytes) -> bool:
        stripes_left.add(NO_STRIPE)
        with suppress(OSError):
            stripes_left.add(number := lockfiles.stripe_of(path))
            return number != place.stripe
        return True  # its directory is gone

    with suppress(OutOfTimeError) if is_spared else nullcontext():
        recovery.recover_root(place.root, time.monotonic() if is_spared else deadline_s, spares)
        if not stripes_left:
            _left.pop(place.root, None)
            return True
        stuck = frozenset(stripes_left)
    _left[place.root] = time.monotonic() + STUCK_AGAIN_S, stuck
    return False


def _open(root: bytes, number: int) -> Stripe:
    path = lockfiles.lock_file(root, number)
    try:
        fd = lockfiles.open_lock_file(path)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        _close_idle(0)
        fd = lockfiles.open_lock_file(path)
    kind = SoftStripe if lockfiles.is_network(lockfiles.file_system_of(fd)) else Stripe
    opened = kind(root, path, fd)
    for stripe in (*_stripes.values(), *stripes.retired):
        if (stripe.inode, stripe.device) == (opened.inode, opened.device):  # another spelling of the base, or renamed
            opened.close()
            opened = stripe
            opened.path = path
            opened.is_listed = True
            stripes.retired.discard(opened)
            break
    _close_idle(descriptors_max() - 1)
    _stripes[root, number] = opened
    if len(_stripes) > descriptors_max():
        opened.when_idle = functools.partial(_close_above_bound, opened)
    return opened


def _close_idle(left_max: int) -> None:
    """Close lock files that are neither held nor awaited, until at most so many, of all, are left."""
    for key, stripe in [*_stripes.items()]:
        if len(_stripes) <= left_max:
            return
        if not stripe.holds and not stripe.queue and key in _stripes:
            _unlist(stripe)


def _close_above_bound(stripe: Stripe) -> None:
    """Close ``stripe``, which is idle now, unless the table has room for it meanwhile."""
    if len(_stripes) > descriptors_max():
        _unlist(stripe)
    else:
        stripe.when_idle = None


def _unlist(stripe: Stripe) -> None:
    for key in [key for key, each in _stripes.items() if each is stripe]:
        del _stripes[key]
    stripe.is_listed = False  # after that: a Ctrl-C in between must not leave one in the table that will be closed
    if stripe.holds or stripe.queue:
        stripes.retired.add(stripe)
    else:
        stripe.close()


def drop(stripe: Stripe, turn: Turn) -> None:
    """The kernel refuses to unlock for ``turn``. To close the descriptor frees it in any case. Raises nothing."""
    with stripes.mutex:
        stripe.forget(turn)
        if stripe.is_listed:
            with suppress(OSError):
                _unlist(stripe)


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
            is_held, is_stale, is_first = turn in stripe.holds, False, False
            try:
                if not is_held and turn.is_waiting and (stripe.look(turn, rung=rung) or stripe.hang_bell(turn)):
                    continue
                is_first = stripe.queue[:1] == [turn]
            except StaleError:
                _retire(stripe, turn)
                is_stale = True
        if is_held and not is_stale:
            if lockfiles.find(turn.path, base)[:2] == turn.place:
                return
            stripe.leave(turn)  # a .ringpool was made further out, or the directory replaced, while it waited
            is_stale = True
        if is_stale:
            arrive(turn, base, deadline_s, may_wait=True)
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
