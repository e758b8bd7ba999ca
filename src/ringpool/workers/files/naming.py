"""Names of files that are on their way to their final name.

    .rp-<token><suffixes of the target>       in the target's directory, so that the rename never crosses file systems

    token       16 to 32 hexadecimal digits, then up to two more groups, each after a hyphen:
                <64 random bits>              a plain atomic write
                <pool>-<sequence>-<attempt>   a task's output: tells whose it is, once its writer is dead
    suffixes    those of the target, since tools choose a format by them; of the last ones as many as fit 32 bytes

A name is bytes: Linux promises nothing about their encoding. The target's stem is not part of the name, which therefore
is never longer than 102 bytes; the token makes it unique, so that two writers of one target, or of ``a.txt`` and
``a.csv``, never meet, and no file of a user's is overwritten.
"""

from __future__ import annotations

import os
import re

PREFIX = b".rp-"
SUFFIXES_BYTES_MAX = 32
NAME_BYTES_MAX = 255  # NAME_MAX of every file system that we know of

FilePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_TOKEN = rb"[0-9a-f]{16,32}(?:-[0-9a-f]{1,16}){0,2}"
_token = re.compile(_TOKEN)
_staging_name = re.compile(re.escape(PREFIX) + _TOKEN + rb"(?:\.[^/\0]*)?", re.DOTALL)


def staging_name(target: bytes, token: str) -> bytes:
    """Where the next content of ``target`` is written before it appears there: a path in the target's directory.

    ``token`` must be of the form above, and no other writer's.
    """
    assert _token.fullmatch(token.encode()), f"not a token: {token!r}"
    directory, slash, name = target.rpartition(b"/")
    staged = PREFIX + token.encode() + _suffixes(name)
    assert len(staged) <= NAME_BYTES_MAX
    return directory + slash + staged


def is_staging_name(name: bytes) -> bool:
    """Whether ``name``, without a directory, is one that ``staging_name`` gives.

    Listings leave such files out. It proves nothing about the writer: it may be at work.
    """
    return _staging_name.fullmatch(name) is not None


def random_token() -> str:
    """A token that no other writer has: 64 random bits."""
    return os.urandom(8).hex()


def _suffixes(name: bytes) -> bytes:
    """The last suffixes of ``name``, at most ``SUFFIXES_BYTES_MAX`` bytes. ``.profile`` has none, nor has ``end.``."""
    if name.endswith(b"."):
        return b""
    at = name.find(b".", len(name) - len(name.lstrip(b".")))
    while at >= 0 and len(name) - at > SUFFIXES_BYTES_MAX:
        at = name.find(b".", at + 1)
    return name[at:] if at >= 0 else b""
