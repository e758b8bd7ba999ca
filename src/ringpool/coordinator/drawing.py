"""The inputs of a run over files: what of them can be run, and by what path, as they are drawn.

an iterator   --next-->      path and source, one after the other: what it takes to draw one is the caller's code
a list        --together-->  paths and sources of many at once, as long as they are plain ones
"""

from __future__ import annotations

import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path as PathObject
from typing import Any, NamedTuple

from ringpool.coordinator.fileinbox import FileInbox
from ringpool.coordinator.filerun import TOGETHER_PATH_BYTES_MAX, FileResult
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import ParameterError, PathNameError
from ringpool.workers import tasks
from ringpool.workers.files import naming

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_DETOURS = re.compile(rb"/(\.?/)+")  # out//x and out/./x are out/x; out/a/../x need not be, where a is a link
_PLAIN: set[type] = {str, type(PathObject())}  # whose ``__fspath__`` is nobody's code
_SLASH = ord("/")
_first_byte: Callable[[bytes], int] = operator.itemgetter(0)
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class FileTask(NamedTuple):
    """An input with its output: what ``run_file_tasks`` takes besides plain paths."""

    src: Path
    dst: Path | None = None


class Drawing(Iterable[tuple[bytes, Any] | Ticket | FileResult]):
    """Path and source of each input; its ticket, where it has an output; its result, where a path can name no file.

    ``name`` and ``signature`` of the function; ``output``: gives the output of an input that comes without;
    ``ticket_of(path, src, dst, target)``. Raises ``ParameterError`` where an input has an output that the function does
    not take, or lacks one; ``OutputCollisionError`` where two that are under way have the same; what ``inputs`` raises.
    """

    def __init__(
        self,
        inputs: Iterable[Path | FileTask],
        output: Callable[[Any], Path] | None,
        name: str,
        signature: tasks.Signature,
        inbox: FileInbox,
        ticket_of: Callable[[bytes, Any, Any, bytes], Ticket],
    ) -> None:
        self.never_waits = type(inputs) in (list, tuple) and output is None  # both may be code that takes its time
        self._are_plain = self.never_waits and not signature.needs_output  # as far as has been seen
        self._inputs: Iterator[Path | FileTask] = iter(inputs)
        self._output = output
        self._name = name
        self._signature = signature
        self._inbox = inbox
        self._ticket_of = ticket_of
        self._directory = b""
        self._one_by_one = self._draw()

    def __iter__(self) -> Iterator[tuple[bytes, Any] | Ticket | FileResult]:
        """One by one, those that were not drawn yet."""
        return self._one_by_one

    def together(self, n: int) -> tuple[list[bytes], Sequence[Any]] | None:
        """Paths and sources of the next inputs, all of them without an output: of ``n``, or of all that are left.

        None: they are to be drawn one by one, because they come of an iterator, or are not all of them plain.
        """
        if not self._are_plain:
            return None
        drawn = list(islice(self._inputs, n))
        paths = _paths_of(drawn, self._base()) if drawn else []
        if paths is None:
            self._are_plain = False
            self._inputs = chain(drawn, self._inputs)
            self._one_by_one = self._draw()
            return None
        return paths, drawn

    def _base(self) -> bytes:
        """What relative paths are relative to: the working directory when the first input is drawn."""
        self._directory = self._directory or os.getcwdb()
        return self._directory

    def _draw(self) -> Iterator[tuple[bytes, Any] | Ticket | FileResult]:
        """The loop in which a run of an iterator spends its time: what can be known before it, is."""
        directory, output, signature = self._base(), self._output, self._signature
        may_lack_output, may_have_output = not signature.needs_output, signature.takes_output
        fsencode = os.fsencode
        for item in self._inputs:
            src, dst = item if isinstance(item, FileTask) else (item, None)
            if dst is None and output is not None:
                dst = output(src)
            if dst is None:
                if not may_lack_output:
                    check_output(self._name, signature, has_output=False)
            elif not may_have_output:
                check_output(self._name, signature, has_output=True)
            try:
                path = fsencode(src)
                if not path.startswith(b"/") or 0 in path:  # a byte; bytes are looked for at ten times the cost
                    path = usable(src, directory)
                target = None if dst is None else _DETOURS.sub(b"/", usable(dst, directory))
            except (UnicodeEncodeError, PathNameError) as error:
                found = error if isinstance(error, PathNameError) else naming.not_encodable(src)
                yield FileResult(src, dst, None, found, 0, 0.0, -1)
                continue
            if target is None:
                yield path, src
            else:
                self._inbox.expect(target, src)
                yield self._ticket_of(path, src, dst, target)


def _paths_of(sources: Sequence[Any], directory: bytes) -> list[bytes] | None:
    """Their absolute paths; None where one of them is no plain path. All are encoded by one call: each by one of its
    own takes ten times as long.
    """
    if not _PLAIN.issuperset(map(type, sources)):
        return None
    try:
        paths = "\0".join(map(os.fspath, sources)).encode(_ENCODING, _ERRORS).split(b"\0")
    except Exception:  # it is raised again when that one's turn comes
        return None
    if len(paths) != len(sources) or not all(paths):  # a NUL in one of them, or an empty one
        return None
    if set(map(_first_byte, paths)) != {_SLASH}:
        base = os.path.join(directory, b"")
        paths = [path if path[0] == _SLASH else base + path for path in paths]
    return paths if max(map(len, paths)) <= TOGETHER_PATH_BYTES_MAX else None


def usable(path: Path, directory: bytes | None = None) -> bytes:
    """As bytes, and absolute: a task that changes its working directory must not move its neighbours' files. Raises
    ``PathNameError`` where it can name no file anywhere.
    """
    raw = naming.encoded(path)
    if not raw or 0 in raw:
        naming.check_path(raw)
    return raw if raw.startswith(b"/") else os.path.join(directory or os.getcwdb(), raw)


def check_output(name: str, signature: tasks.Signature, *, has_output: bool) -> None:
    """Raise ``ParameterError`` unless the function may be called so."""
    if has_output and not signature.takes_output:
        raise ParameterError(name, "it has no parameter dst, and the task has an output")
    if not has_output and signature.needs_output:
        raise ParameterError(name, "it has a parameter dst, and the task has no output")
