"""Names of files that are on their way to their final name.

    .rp-<token><suffixes of the target>       in the target's directory, so that the rename never crosses file systems

    token       16 to 32 hexadecimal digits, then up to two more groups, each after a hyphen:
                <64 random bits>              a plain atomic write
                <pool>-<sequence>-<attempt>   a task's output: tells whose it is, once its writer is dead; a<attempt>,
                                              where its input was no file
    suffixes    those of the target, since tools choose a format by them; of the last ones as many as fit 32 bytes

Names of new files. ``unique_name`` makes a file that nobody else has; ``content_name`` tells where content is kept:

    <prefix><64 random bits><suffix>          tried with O_EXCL; never looked up first and made later
    ab/ab...<suffix>                          its blake2b-256 in hexadecimal digits, the first two also a directory

A name is bytes: Linux promises nothing about their encoding. The target's stem is not part of the name, which therefore
is never longer than 102 bytes; the token makes it unique, so that two writers of one target, or of ``a.txt`` and
``a.csv``, never meet, and no file of a user's is overwritten.
"""

from __future__ import annotations

import errno
import os
import random
import re
from binascii import hexlify
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import Protocol, cast

from ringpool.errors import FileOperationError, PathNameError
from ringpool.workers.files.oslayer import calls

PREFIX = b".rp-"
SUFFIXES_BYTES_MAX = 32
TRIES_MAX = 16
CONTENT_PIECE_BYTES = 1 << 18
NAME_BYTES_MAX = 255  # NAME_MAX of every file system that we know of

FilePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# Names have to be new, not secret: O_EXCL guards them. Seeded by the kernel, and again in the child of a fork.
_chance = random.Random()
os.register_at_fork(after_in_child=_chance.seed)


class SupportsRead(Protocol):
    """A binary stream, as far as it is needed to read it."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none: it has ended."""
        ...


_TOKEN = rb"[0-9a-f]{16,32}(?:-[0-9a-f]{1,16}){0,2}"
_token = re.compile(_TOKEN)
_staging_name = re.compile(re.escape(PREFIX) + _TOKEN + rb"(?:\.[^/\0]*)?", re.DOTALL)


def absolute(path: bytes) -> bytes:
    """``path`` from the root, as the system reads it: ``os.path.abspath`` drops a symlink with the ``..`` after it.

    A ``..`` leads where it does now. Nothing else is resolved.
    """
    return os.path.realpath(path) if b".." in path.split(b"/") else os.path.abspath(path)


def staging_name(target: bytes, token: str) -> bytes:
    """Where the next content of ``target`` is written before it appears there: a path in the target's directory.

    ``token`` must be of the form above, and no other writer's.
    """
    assert _token.fullmatch(token.encode()), f"not a token: {token!r}"
    directory, slash, name = target.rpartition(b"/")
    staged = PREFIX + token.encode() + _suffixes(name)
    assert len(staged) <= NAME_BYTES_MAX
    return directory + slash + staged


def random_staging_name(name: bytes) -> bytes:
    """``staging_name`` with a random token, for a name without a directory."""
    return PREFIX + hexlify(_chance.randbytes(8)) + _suffixes(name)


def is_staging_name(name: bytes) -> bool:
    """Whether ``name``, without a directory, is one that ``staging_name`` gives.

    Listings leave such files out. It proves nothing about the writer: it may be at work.
    """
    return _staging_name.fullmatch(name) is not None


def random_token() -> str:
    """A token that no other writer has: 64 random bits."""
    return _chance.randbytes(8).hex()


def unique_name(directory: FilePath, prefix: str | bytes = b"", suffix: str | bytes = b"", *, mode: int = 0o666) -> str:
    """Make an empty file in ``directory``, with a name that no file there has; return its path, ready for os.fsencode.

    The name is ``prefix``, 16 hexadecimal digits, ``suffix``. ``mode`` is what the umask is applied to. The file keeps
    the name for the caller, who may write to it in any way. Raises ``PathNameError`` (prefix and suffix make no name)
    and ``FileOperationError`` (it cannot be made).
    """
    start, end = os.path.join(encoded(directory), encoded(prefix)), encoded(suffix)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if b"/" in encoded(prefix) + end:
        raise unusable(start + end, "a prefix or suffix has no slash")
    try:
        for _ in range(TRIES_MAX):
            path = start + random_token().encode() + end
            check_path(path)
            with suppress(FileExistsError):
                calls.close(calls.open(path, flags, mode))
                return os.fsdecode(path)
    except FileOperationError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileOperationError(os.fsdecode(start), "make a file", error.errno or errno.EIO, reason) from error
    raise FileOperationError(os.fsdecode(start), "make a file", errno.EEXIST, "every name that was tried was there")


def content_name(content: bytes | bytearray | memoryview | SupportsRead, suffix: str = "") -> str:
    """The name under which ``content`` is kept by what it is: ``ab/ab...``, its blake2b-256, and ``suffix``.

    A stream is read to its end, in bounded memory; the name is relative to where such content is kept. Raises what the
    stream does, and ``BlockingIOError`` where it has nothing to read yet.
    """
    digest = blake2b(digest_size=32)
    if isinstance(content, memoryview) and not content.c_contiguous:
        content = content.tobytes()
    if isinstance(content, bytes | bytearray | memoryview):
        digest.update(content)
    else:
        for piece in stream_pieces(content, CONTENT_PIECE_BYTES):
            digest.update(piece)
    return digest_name(digest.digest(), suffix)


def stream_pieces(stream: SupportsRead, piece_bytes: int) -> Iterator[bytes]:
    """What the stream reads, to its end. Raises ``BlockingIOError`` where it has nothing yet, ``TypeError``."""
    while True:
        piece = cast("object", stream.read(piece_bytes))
        if piece is None:
            raise BlockingIOError(errno.EAGAIN, "a stream that has nothing to read yet: it must be a blocking one")
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            raise TypeError(f"a stream of bytes is needed; this one reads {type(piece).__name__}")
        if not piece:
            return
        yield cast("bytes", piece)


def digest_name(digest: bytes, suffix: str = "") -> str:
    """``content_name`` of what has that digest, for whoever has computed it on the way."""
    return f"{digest[:1].hex()}/{digest.hex()}{suffix}"


def encoded(path: FilePath) -> bytes:
    """``path`` as the kernel takes it. Raises ``PathNameError`` for text that stands for no bytes: a lone surrogate."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        raise not_encodable(path) from None


def check_several(paths: object) -> None:
    """Raise ``TypeError`` where ``paths`` is one path, of which each character would be taken for a path."""
    if isinstance(paths, (str, bytes, bytearray, os.PathLike)):
        raise TypeError(f"{paths!r} is one path, where several are wanted: give a list of paths")


def not_encodable(path: FilePath) -> PathNameError:
    """The error of text that stands for no bytes; to be raised."""
    shown = str(path).encode("utf-8", "backslashreplace").decode()
    return PathNameError(shown, "use the name", errno.EILSEQ, os.strerror(errno.EILSEQ))


def check_path(path: bytes) -> None:
    """Raise ``PathNameError`` where ``path`` can name no file: empty, a NUL byte, or a component that is too long."""
    if not path:
        raise unusable(path, "it is empty")
    if b"\0" in path:
        raise unusable(path, "it holds a NUL byte")
    if len(path) > NAME_BYTES_MAX and max(map(len, path.split(b"/"))) > NAME_BYTES_MAX:
        raise PathNameError(
            os.fsdecode(path), "use the name", errno.ENAMETOOLONG, f"a name has at most {NAME_BYTES_MAX} bytes"
        )


def unusable(path: bytes, reason: str) -> PathNameError:
    """The error of a path that can name no file here; to be raised."""
    return PathNameError(os.fsdecode(path), "use the name", errno.EINVAL, reason)


def _suffixes(name: bytes) -> bytes:
    """The last suffixes of ``name``, at most ``SUFFIXES_BYTES_MAX`` bytes. ``.profile`` has none, nor has ``end.``."""
    at = name.find(b".", 1)
    if at < 0 or name.endswith(b"."):
        return b""
    if name.startswith(b".."):  # dots that hide it begin no suffix
        at = name.find(b".", len(name) - len(name.lstrip(b".")))
    while at >= 0 and len(name) - at > SUFFIXES_BYTES_MAX:
        at = name.find(b".", at + 1)
    return name[at:] if at >= 0 else b""
