"""Where a run stages its outputs: one directory on each file system that they are on, since no rename leads to another.

<directory>/.ringpool/staging/<token>                outputs on the file system of the job's directory
<base>/.ringpool/staging/<token>                     those below <base>, on another one
<directory>/.ringpool/staging/<token>/elsewhere.0    a link to that, made before it: who tidies up finds all
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence

_STAGING = b".ringpool/staging"
_TOKEN = re.compile(rb"[0-9a-f]{16}")
_ELSEWHERE = b"elsewhere."  # what is staged has a name that begins with a number


def staging_directory(base: bytes, token: str) -> bytes:
    """Where the run whose segment has that token stages outputs below ``base``. Source: section 6 of the design."""
    return os.path.join(base, _STAGING, token.encode())


def prepare(directory: bytes, bases: Sequence[bytes], token: str) -> tuple[bytes, ...]:
    """Make the directories of a run; for each base of outputs, the one where these are staged.

    ``directory`` (the job's) and ``bases``: absolute, and there. Raises ``OSError``.
    """
    own = staging_directory(directory, token)
    os.makedirs(own, exist_ok=True)
    device = os.stat(directory).st_dev
    places = [own if os.stat(base).st_dev == device else staging_directory(base, token) for base in bases]
    for number, place in enumerate(dict.fromkeys(place for place in places if place != own)):
        os.symlink(place, os.path.join(own, _ELSEWHERE + b"%d" % number))
        os.makedirs(place, exist_ok=True)
    return tuple(places)


def remove(own: bytes) -> None:
    """Remove what a run that is over has staged: ``own``, its directory, and those elsewhere. Never raises."""
    token = os.path.basename(own)
    with contextlib.suppress(OSError):
        for name in os.listdir(own):
            link = os.path.join(own, name)
            if name.startswith(_ELSEWHERE) and os.path.islink(link):
                place = os.readlink(link)
                if place.endswith(b"/" + _STAGING + b"/" + token):
                    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(own, ignore_errors=True)


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
