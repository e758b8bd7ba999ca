"""What becomes of a slot whose holder is looked at: a pure decision table, in which exactly one row matches.

    list      holder   result       started  disk      deaths    action
    --------  -------  -----------  -------  --------  --------  ----------------------------------------------------
    free      -        -            -        -         -         LEAVE      nothing is there
    ready     -        -            -        -         -         LEAVE      nobody holds it
    retry     -        -            -        -         -         LEAVE
    done      -        -            -        -         -         LEAVE      it will be delivered
    claimed   alive    -            -        -         -         LEAVE      never touch what the living hold
    claimed   dead     finished     -        -         -         DELIVER    its own commit stands, whoever died after it
    claimed   dead     empty        no       -         -         REQUEUE    never started: same attempt, no blame
    claimed   dead     empty        yes      -         may       RETRY      next attempt, one more death
    claimed   dead     empty        yes      -         too many  FAIL       WorkerDiedError
    claimed   dead     staged       -        target    -         COMMIT     what is whole is put in place, once more or
    claimed   dead     staged       -        staged    -         COMMIT     for the first time: it is done
    claimed   dead     staged       -        unknown   -         DOUBT      TaskInDoubtError: never run it again

``result`` is that of this attempt only. ``deaths``: whether the task may be tried again after this death. A task that
is staged was started, whatever the worker's ``running`` word says.
"""

from __future__ import annotations

from enum import Enum, auto

from ringpool.shm.layout import Status


class Where(Enum):
    """Which list holds the slot."""

    FREE = auto()
    READY = auto()
    RETRY = auto()
    DONE = auto()
    CLAIMED = auto()


class Disk(Enum):
    """Where the staged output of an attempt is found."""

    STAGED = auto()
    TARGET = auto()
    UNKNOWN = auto()


class Action(Enum):
    """What to do with the task."""

    LEAVE = auto()
    DELIVER = auto()
    REQUEUE = auto()
    RETRY = auto()
    FAIL = auto()
    COMMIT = auto()
    DOUBT = auto()


def decide(where: Where, *, alive: bool, result: Status, started: bool, disk: Disk, may_retry: bool) -> Action:
    """The table above. ``disk`` counts only while ``result`` is STAGED."""
    if where is not Where.CLAIMED or alive:
        return Action.LEAVE
    match result:
        case Status.EMPTY:
            if not started:
                return Action.REQUEUE
            return Action.RETRY if may_retry else Action.FAIL
        case Status.STAGED:
            return Action.DOUBT if disk is Disk.UNKNOWN else Action.COMMIT
        case _:
            return Action.DELIVER
