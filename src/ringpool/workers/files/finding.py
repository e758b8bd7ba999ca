"""Files below a base whose path matches a pattern.

    pattern    what it matches
    *  ? []    within one name, as fnmatch(3) has it; a leading dot is no exception
    **         as a whole part: any number of directories, also none; as the last part every file below

    docs/*.txt    **/*.txt    a/**/b/?.bin    a/**

Each directory that can hold a match is listed once, when its turn comes, and one is open at a time. The parts of the
pattern that may come next are a set, so that no file is found twice. What vanishes meanwhile is skipped; symlinks
are neither shown nor entered. Files on their way to their name, and what is in ``.ringpool``, never
show.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from collections.abc import Callable, Generator, Iterator

from ringpool.errors import FileOperationError, PathOutsideError
from ringpool.workers.files.contained import OWN_DIRECTORY, Contained
from ringpool.workers.files.durability import close_quietly
from ringpool.workers.files.naming import FilePath, is_staging_name
from ringpool.workers.files.oslayer import calls

_Match = Callable[[str], object] | None  # None: **

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def find(contained: Contained, pattern: FilePath) -> Generator[str]:
    """The paths, relative to the base, of the files that match now, in no order. They are listed as they are drawn.

    A file is a regular one; symlinks do not show. Names that are not UTF-8 are text as ``os.fsdecode`` gives it. Raises
    ``PathOutsideError`` for a pattern that leads out, and ``FileOperationError`` where a directory cannot be read.
    """
    parts = _parts(os.fsdecode(pattern))
    pending = [("", _reached(parts, {0}))]
    while pending:
        directory, states = pending.pop()
        for entry in _entries(contained, directory):
            name = entry.name
            after = {state for state in states if state < len(parts) and parts[state] is None}
            for state in states:
                match = parts[state] if state < len(parts) else None
                if match is not None and match(name):
                    after.add(state + 1)
            after = _reached(parts, after)
            if len(parts) in after and entry.is_file(follow_symlinks=False):
                yield directory + name
            if after - {len(parts)} and entry.is_dir(follow_symlinks=False):
                pending.append((f"{directory}{name}/", after))


def is_internal(name: bytes) -> bool:
    """Whether ``name``, one part of a path, is one that users neither see nor may use."""
    return name == OWN_DIRECTORY or is_staging_name(name)


def _parts(pattern: str) -> list[_Match]:
    names = [name for name in pattern.split("/") if name not in ("", ".")]
    if pattern.startswith("/") or ".." in names or not names:
        reason = "a pattern is relative to the base, and stays below it"
        raise PathOutsideError(pattern, "find", errno.EXDEV, reason)
    if names[-1] == "**":
        names.append("*")  # below it, and not what the part before it matches
    return [None if name == "**" else re.compile(fnmatch.translate(name)).match for name in names]


def _reached(parts: list[_Match], states: set[int]) -> set[int]:
    """``states``, and those after each ``**`` among them, which may match nothing."""
    reached = set(states)
    for state in range(len(parts)):
        if state in reached and parts[state] is None:
            reached.add(state + 1)
    return reached


def _entries(contained: Contained, directory: str) -> Iterator[os.DirEntry[str]]:
    """Those of ``directory`` (relative; empty, or with a slash at its end) that users see."""
    try:
        fd = contained.open_directory(os.fsencode(directory).rstrip(b"/") or b".")
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    try:
        with calls.scandir(fd) as entries:
            for entry in entries:
                if not is_internal(os.fsencode(entry.name)):
                    yield entry
    except OSError as error:
        shown = os.path.join(os.fsdecode(contained.base), directory)
        raise FileOperationError(shown, "list", error.errno or errno.EIO, error.strerror or str(error)) from error
    finally:
        close_quietly(fd)
