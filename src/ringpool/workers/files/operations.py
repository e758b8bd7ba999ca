"""What a transaction's operations, one after the other, make of its paths. Pure: no file is looked at.

    write a            a: Original(a)      a: New                 and so the order in which the outcome is
    rename a -> b      b: nothing          b: New, a: nothing     put in place does not matter any more:
    rename c -> a      c: Original(c)      a: Original(c), ...    each path gets its file once

A path that ends with the file that it began with is not part of the outcome.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ringpool.errors import TransactionError


class Original(NamedTuple):
    """The file that stood at ``path`` before the transaction."""

    path: bytes


class New(NamedTuple):
    """A new file. It keeps owner, mode and attributes of the file that stood at ``like``, where it replaced one."""

    content: bytes
    like: bytes | None


class Write(NamedTuple):
    path: bytes
    content: bytes


class Delete(NamedTuple):
    path: bytes


class Rename(NamedTuple):
    source: bytes
    target: bytes


File = Original | New | None
Operation = Write | Delete | Rename


def outcome(operations: Iterable[Operation], existing: Iterable[bytes]) -> dict[bytes, File]:
    """What the operations, one after the other, make of the paths that are files now: the paths that change.

    Raises ``TransactionError`` (ENOENT) where one needs a file that is not there at its turn.
    """
    before: dict[bytes, File] = {path: Original(path) for path in existing}
    after = dict(before)
    for operation in operations:
        advance(after, operation)
    return {path: file for path, file in after.items() if file != before.get(path)}


def advance(files: dict[bytes, File], operation: Operation) -> None:
    """Do one operation in ``files``. Raises as ``outcome`` does, and has changed nothing then."""
    match operation:
        case Write(path, content):
            replaced = files.get(path)
            like = replaced.path if isinstance(replaced, Original) else replaced and replaced.like
            files[path] = New(content, like)
        case Delete(path):
            _needed(files, path, "delete")
            files[path] = None
        case Rename(source, target):
            moved = _needed(files, source, "rename")
            files[source] = None
            files[target] = moved


def _needed(files: Mapping[bytes, File], path: bytes, operation: str) -> Original | New:
    file = files.get(path)
    if file is None:
        raise TransactionError(os.fsdecode(path), operation, errno.ENOENT, os.strerror(errno.ENOENT))
    return file


def paths_of(operation: Operation) -> tuple[bytes, ...]:
    """The paths that it names."""
    return (operation.source, operation.target) if isinstance(operation, Rename) else (operation.path,)
