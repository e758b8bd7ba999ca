"""Where a run stages its outputs: one directory on each mount that they are on, since no rename leads to another.

<directory>/.ringpool/staging/<token>                outputs on the mount of the job's directory
<base>/.ringpool/staging/<token>                     those below <base>, on another one
<directory>/.ringpool/staging/<token>/elsewhere.0    a link to that, made before it: who tidies up finds all
.../staging/<token>.begun                            an empty file beside each of them, as old as the run

A run tidies up after itself; after one that died, the next one does, once it has drained that one's segment. What is
still there then is of tasks that nobody knows any more, since the segment is gone: half an output, as a rule, and
removed. But what is older than the run was not written by it: a task has moved its input there, and it is kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Sequence

from ringpool.workers.files import lockfiles
from ringpool.workers.files.attributes import mount_of
from ringpool.workers.files.target import DEFAULT_ACL
from ringpool.workers.groupcommit import keep

_STAGING = os.path.join(lockfiles.DIRECTORY, b"staging")
_TOKEN = re.compile(rb"[0-9a-f]{16}")
_BEGUN = b".begun"
STAGING_MODE = 0o770  # nobody else: what is staged may go where they may not look
_ELSEWHERE = b"elsewhere."  # what is staged has a name that begins with a number


def staging_directory(base: bytes, token: str) -> bytes:
    """Where the run whose segment has that token stages outputs below ``base``. Source: section 6 of the design."""
    return os.path.join(base, _STAGING, token.encode())


def require_trusted(directory: bytes) -> None:
    """Raise ``PermissionError`` where another user could change what is staged below ``directory``."""
    for inner in (lockfiles.DIRECTORY, _STAGING):
        with contextlib.suppress(FileNotFoundError):
            lockfiles.require_trusted(directory, os.path.join(directory, inner))


def prepare(directory: bytes, bases: Sequence[bytes], token: str) -> tuple[bytes, ...]:
    """Make the directories of a run; for each base of outputs, the one where these are staged.

    ``directory`` (the job's) and ``bases``: absolute, and there. Raises ``OSError``.
    """
    own = staging_directory(directory, token)
    _begin(own)
    mount = _mount_of(own)
    places = [own if _mount_of(base) == mount else staging_directory(base, token) for base in bases]
    for number, place in enumerate(dict.fromkeys(place for place in places if place != own)):
        os.symlink(place, os.path.join(own, _ELSEWHERE + b"%d" % number))
        _begin(place)
    return tuple(places)


def _mount_of(directory: bytes) -> tuple[int, bytes]:
    """The file system that ``directory`` is on, and by which of its mounts: no rename leads from one to another, also
    where both are of one file system, as a container's volumes may be.
    """
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mount_of(fd)
    finally:
        os.close(fd)


def _begin(place: bytes) -> None:
    os.makedirs(place, STAGING_MODE, exist_ok=True)
    with contextlib.suppress(OSError):  # it has none; or its file system
        os.removexattr(place, DEFAULT_ACL)  # outputs have those of the directories where they go
    os.close(os.open(place + _BEGUN, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def remove(own: bytes) -> None:
    """Remove what a run that is over has staged: ``own``, its directory, and those elsewhere. Never raises."""
    token = os.path.basename(own)
    with contextlib.suppress(OSError):
        for name in os.listdir(own):
            link = os.path.join(own, name)
            if name.startswith(_ELSEWHERE) and os.path.islink(link):
                place = os.readlink(link)
                if place.endswith(b"/" + _STAGING + b"/" + token):
                    _remove_one(place)
    _remove_one(own)


def _remove_one(place: bytes) -> None:
    with contextlib.suppress(OSError):
        began_ns = os.lstat(place + _BEGUN).st_mtime_ns
        for name in os.listdir(place):
            path = os.path.join(place, name)
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode) and found.st_mtime_ns < began_ns:
                what = "of a dead run, older than that and perhaps the only copy of an input,"
                keep(path, f"{os.fsdecode(name)} {what}")
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(place + _BEGUN)


def remove_all(directory: bytes) -> None:
    """``remove`` for all runs of the job in ``directory``; nobody alive stages there. Never raises.

    Where a symlink leads elsewhere, nothing goes there but what is called as a run's directory is.
    """
    staging = os.path.join(directory, _STAGING)
    with contextlib.suppress(OSError):
        for token in os.listdir(staging):
            if _TOKEN.fullmatch(token):
                remove(os.path.join(staging, token))
    shutil.rmtree(staging, ignore_errors=True)
