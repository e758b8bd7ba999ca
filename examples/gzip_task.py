"""The task function of the examples. It has a module of its own, so that worker processes import nothing but it."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

CHUNK_BYTES = 1 << 18


def gzip_file(src: Path, dst: Path, *, level: int = 6) -> str:
    """Compress ``src`` into ``dst``; the SHA-256 of ``src``, in hexadecimal digits.

    The same input always gives the same output: neither the time nor a name is in it.
    """
    digest = hashlib.sha256()
    with (
        src.open("rb") as plain,
        dst.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0) as packed,
    ):
        while chunk := plain.read(CHUNK_BYTES):
            digest.update(chunk)
            packed.write(chunk)
    return digest.hexdigest()
