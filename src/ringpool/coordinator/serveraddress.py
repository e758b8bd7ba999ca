"""The fork server's address: a path in a directory for temporary files, which the kernel wants short.

    $TMPDIR/pymp-12345678/listener-12345678      at most 107 bytes; else bind() fails
    /tmp/pymp-12345678/listener-12345678         then

``multiprocessing`` makes that directory when it first needs it, one for a process. Where the path would be too long, it
is made here, somewhere else, before: as Python 3.14 does (gh-93852).
"""

from __future__ import annotations

import os
import shutil
from multiprocessing import process, util
from typing import Any

PATH_MAX_BYTES = 107  # of sun_path (unix(7)), less the zero at its end
PLACES = ("/tmp", "/var/tmp", "/dev/shm")
_NAMES_BYTES = len("/pymp-12345678/listener-12345678")


def keep_short() -> None:
    """Have the address fit, if that is possible, from now on. Safe to call again."""
    own: dict[str, Any] | None = getattr(process.current_process(), "_config", None)
    if own is None or own.get("tempdir") is not None:
        return
    import tempfile  # here: the fork server's start imports it anyway

    if len(os.fsencode(tempfile.gettempdir())) + _NAMES_BYTES <= PATH_MAX_BYTES:
        return
    for place in PLACES:
        try:
            made = tempfile.mkdtemp(prefix="pymp-", dir=place)
        except OSError:
            continue
        util.Finalize(None, shutil.rmtree, args=(made,), kwargs={"ignore_errors": True}, exitpriority=-100)
        own["tempdir"] = made
        return
