"""One record of an error log: what it tells, its bytes, and how records are found among damaged ones.

    b"RPE1" | u32 length | u32 crc | u32 seal | body: ``length`` bytes of msgpack, a map of the fields of ErrorRecord

    crc     crc32 of the body
    seal    crc32 of the 12 bytes before it, then of the segment's number and of the record's offset there (u64 each)
            all little-endian

The seal ties a record to its place. Bytes of a record that stand in another one's message, a segment under a wrong name
and a block that the disk put elsewhere are therefore no records. Whatever is not one is skipped: the reader goes on at
the next magic that begins a valid record.

What is too long is clipped: a traceback loses its beginning, any other text its end, and ``clipped`` says so.
"""

from __future__ import annotations

import os
import struct
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, cast
from zlib import crc32

import msgspec

from ringpool.errors import words_of

MAGIC = b"RPE1"
RECORD_BYTES_MAX = 1 << 16  # header and body
_TYPE_CHARACTERS_MAX = 200
_OPERATION_CHARACTERS_MAX = 200
_MESSAGE_CHARACTERS_MAX = 1000
_PATH_BYTES_MAX = 4096  # PATH_MAX
_CONTEXT_CHARACTERS_MAX = 1000  # of one value

_header = struct.Struct("<4sIII")
_place = struct.Struct("<QQ")
HEADER_BYTES = _header.size

Scalar = None | bool | int | float | str | bytes


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as it was recorded. ``time_ns`` is wall clock, since 1970; ``type`` is ``module.qualname``."""

    time_ns: int
    pid: int
    type: str
    message: str
    path_bytes: bytes | None = None
    operation: str | None = None
    errno: int | None = None
    context: dict[str, Any] = {}  # of scalars; msgspec knows no union with both str and bytes
    traceback: str = ""
    clipped: bool = False

    @property
    def path(self) -> str | None:
        """The path as text, as ``os.fsdecode`` gives it."""
        return None if self.path_bytes is None else os.fsdecode(self.path_bytes)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ErrorRecord)


# ---- from an exception to bytes --------------------------------------------------------------------------------------


def body_of(
    error: BaseException,
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None,
    operation: str | None,
    context: Mapping[str, object],
    bytes_max: int,
) -> bytes:
    """The body of the record of ``error``, at most ``bytes_max`` bytes (10,000 or more). Raises nothing of its own.

    ``path`` and ``operation`` default to those of the error. An exception whose ``__str__`` fails is recorded as such,
    and one whose attribute cannot be looked at as if it had none.
    """
    if path is None:
        path = _attribute(error, "path") or _attribute(error, "filename")
    if operation is None:
        operation = _attribute(error, "operation")
    kind = type(error)
    texts = (f"{kind.__module__}.{kind.__qualname__}", _words(error), "" if operation is None else _words(operation))
    limits = (_TYPE_CHARACTERS_MAX, _MESSAGE_CHARACTERS_MAX, _OPERATION_CHARACTERS_MAX)
    octets = _path_bytes(path)
    clipped = any(len(text) > limit for text, limit in zip(texts, limits, strict=True))
    number = _attribute(error, "errno")
    record = ErrorRecord(
        time_ns=time.time_ns(),
        pid=os.getpid(),
        type=texts[0][: limits[0]],
        message=texts[1][: limits[1]],
        path_bytes=octets[:_PATH_BYTES_MAX] if octets else None,
        operation=None if operation is None else texts[2][: limits[2]],
        errno=number if type(number) is int and abs(number) < 1 << 31 else None,
        clipped=clipped or len(octets) > _PATH_BYTES_MAX,
    )
    return _filled(record, context, _trace(error), bytes_max)


def _filled(record: ErrorRecord, context: Mapping[str, object], trace: str, bytes_max: int) -> bytes:
    """The record with as much of the context, then of the end of the traceback, as fits."""
    clipped = record.clipped
    kept: dict[str, Scalar] = {}
    room = bytes_max - len(_encoder.encode(record)) - 64  # 64: the fields' names and lengths that are still to come
    for key, value in context.items():
        scalar, is_whole = _scalar(value)
        entry = _words(key)[:_OPERATION_CHARACTERS_MAX], scalar
        size = len(_encoder.encode(entry))
        if size > room:
            clipped = True
            continue
        kept[entry[0]] = scalar
        clipped = clipped or not is_whole
        room -= size
    octets = trace.encode()
    if len(octets) > room:
        trace = octets[len(octets) - room :].decode(errors="ignore") if room > 0 else ""
        clipped = True
    body = _encoder.encode(msgspec.structs.replace(record, context=kept, traceback=trace, clipped=clipped))
    assert len(body) <= bytes_max
    return body


def _attribute(error: BaseException, name: str) -> Any:
    """None also where it is a property that raises, or a value that does not say whether it is true."""
    try:
        value = getattr(error, name, None)
        bool(value)
    except Exception:
        return None
    return value


def _words(value: object) -> str:
    """``words_of``, without what UTF-8 cannot hold."""
    return words_of(value).encode(errors="backslashreplace").decode()


def _trace(error: BaseException) -> str:
    try:
        return _words("".join(traceback.format_exception(error)))
    except Exception:
        return ""


def _path_bytes(path: object) -> bytes:
    try:
        return os.fsencode(cast("str", path))  # which it may not be: then fsencode says so
    except Exception:  # no path; or a surrogate that stands for no byte; or whatever its __fspath__ raises
        return b"" if path is None else _words(path).encode()


def _scalar(value: object) -> tuple[Scalar, bool]:
    """What is kept of a value of the context, and whether that is all of it."""
    if value is None or type(value) in (bool, float) or (type(value) is int and -(1 << 63) <= value < 1 << 63):
        return cast("Scalar", value), True  # the types that were just compared
    whole = value if isinstance(value, bytes) else _words(value)
    return whole[:_CONTEXT_CHARACTERS_MAX], len(whole) <= _CONTEXT_CHARACTERS_MAX


# ---- from bytes to records -------------------------------------------------------------------------------------------


def pack(body: bytes, segment: int, offset: int) -> bytes:
    """The bytes of a record that will stand at ``offset`` in segment number ``segment``."""
    header = _header.pack(MAGIC, len(body), crc32(body), 0)[:12]
    return header + crc32(_place.pack(segment, offset), crc32(header)).to_bytes(4, "little") + body


def scan(octets: bytes, segment: int) -> Iterator[tuple[ErrorRecord, int]]:
    """The valid records of a whole segment, each with its size in bytes."""
    at = 0
    while (at := octets.find(MAGIC, at)) >= 0:
        body = _body_at(octets, at, segment, at)
        try:
            if body is not None:
                yield _decoder.decode(body), HEADER_BYTES + len(body)
                at += HEADER_BYTES + len(body)
                continue
        except msgspec.DecodeError:  # written by another version
            pass
        at += 1


def last_end(octets: bytes, segment: int, offset: int) -> int | None:
    """Where the last whole record ends in ``octets``, which begin at ``offset`` of the segment; None: there is none."""
    at = octets.rfind(MAGIC)
    while at >= 0:
        body = _body_at(octets, at, segment, offset + at)
        if body is not None:
            return at + HEADER_BYTES + len(body)
        at = octets.rfind(MAGIC, 0, at + len(MAGIC) - 1)
    return None


def _body_at(octets: bytes, at: int, segment: int, offset: int) -> bytes | None:
    if len(octets) - at < HEADER_BYTES:
        return None
    _, length, crc, seal = _header.unpack_from(octets, at)
    if seal != crc32(_place.pack(segment, offset), crc32(octets[at : at + 12])):
        return None
    body = octets[at + HEADER_BYTES : at + HEADER_BYTES + length]
    return body if len(body) == length and crc32(body) == crc else None
