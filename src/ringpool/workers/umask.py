"""The umask, which umask(2) tells only by changing it, for all threads."""

from __future__ import annotations


def umask() -> int | None:
    """That of this process; None where the kernel does not say it. Source: proc(5), ``status``."""
    try:
        with open("/proc/self/status", "rb") as facts:
            return next((int(line.split()[1], 8) for line in facts if line.startswith(b"Umask:")), None)
    except OSError:
        return None
