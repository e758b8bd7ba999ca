"""Lists and manifests: files that name the inputs of a batch, read as they come.

    list          -, or @files.txt        one path after the other, ended by newlines (or CR LF); by NUL bytes where the
                                          first 64 KiB have one (find -print0): the only way for a name with a newline
    manifest      .csv  .tsv              a header line, then a line for each file; cells are text, an empty one is no
                                          parameter; quoting as in RFC 4180
                  .jsonl  .ndjson         a JSON object in each line; parameters keep their types
                  -, or another name      JSON where the first byte that is no space is a {, else CSV

    path                                  relpath
    2020/sea.jpg    ./2020/sea.jpg        2020/sea.jpg
    /data/2020/sea.jpg                    data/2020/sea.jpg     as tar and rsync -R have it: two directories' files of
    ../data/sea.jpg                       data/sea.jpg          one name stay apart
    a/../sea.jpg    a//sea.jpg            sea.jpg               a/sea.jpg

The file is the manifest's column or key ``path``, or else ``src``, or else ``input``; all others are its parameters. A
relative path is one below the current directory. Empty lines are skipped. Paths are of any bytes; in JSON, as Python
writes them (``\\udce9`` for the byte e9).

Nothing is looked up: a path that leads nowhere is given out all the same, and its task says so. Each line is given out
when it is there, so that a pipe may stay open. Memory is one block and one line, and lines have a limit.
"""

from __future__ import annotations

import csv
import json
import os
import select
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from itertools import chain, repeat
from typing import Any, NamedTuple, cast

import msgspec

from ringpool.errors import ListError

STANDARD_INPUT = "-"
BLOCK_BYTES = 1 << 16
WAIT_MS = 50
LINE_BYTES_MAX = 1 << 24  # far more than a path has; parameters may be long
PATH_COLUMNS = ("path", "src", "input")
_NO_HEADER: tuple[int, list[str]] = (1, [])
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
while_waiting: ContextVar[Callable[[], None] | None] = ContextVar("while_waiting", default=None)
"""What is called again and again while a list has no more to read for now; what it raises comes out of the list."""


class InputFile(NamedTuple):
    """A file to work on.

    ``path`` (str), as the source was given; ``relpath`` (str), its path relative to that source; ``parameters`` (dict,
    or None for none), what a manifest says about this file alone.
    """

    path: str
    relpath: str
    parameters: dict[str, Any] | None = None


def relpath_of(path: str) -> str:
    """The relpath of a ``path`` that has no source: without what leads to the root or out of the directory."""
    relpath = os.path.normpath(path).lstrip("/")
    while relpath.startswith("../"):
        relpath = relpath[3:]
    return "." if relpath in ("", "..") else relpath


# ---- lists -----------------------------------------------------------------------------------------------------------


def read_list(path: str) -> Iterator[InputFile]:
    """The files that the list at ``path`` (str, ``-`` for standard input) names, each when its line is there.

    Raises ``ListError``: at once where there is no such list, or where it may not be read; later for a line that is no
    path, and where reading fails.
    """
    _require_readable(path, "; an input whose name begins with @ is written ./@name")
    return _read_list(path)


def _read_list(path: str) -> Iterator[InputFile]:
    blocks = _blocks(path)
    head = _first_block(blocks)
    separator = b"\0" if b"\0" in head else b"\n"
    for number, line in enumerate(_split(chain((head,), blocks), separator, path), 1):
        if separator == b"\n":
            line = line.removesuffix(b"\r")
            if b"\0" in line:
                raise ListError(path, number, "it has a NUL byte, which no path has; is this a list of paths?")
        if line:
            name = os.fsdecode(line)
            yield InputFile(name, relpath_of(name))


def _first_block(blocks: Iterator[bytes]) -> bytes:
    """What tells how paths are separated, and no more: the next block may be long in coming."""
    head = b""
    for block in blocks:
        head += block
        if b"\0" in head or b"\n" in head or len(head) >= BLOCK_BYTES:
            break
    return head


# ---- manifests -------------------------------------------------------------------------------------------------------


def read_manifest(path: str, refused: Collection[str] = ()) -> Iterator[InputFile]:
    """The files that the manifest at ``path`` (str, ``-`` for standard input) names, each when its line is there.

    ``refused``: names of columns or keys that it must not have.

    Raises ``ListError``: at once where there is no such manifest, or where it may not be read; later for a line that is
    not as it must be, named by the number of the line where it begins.
    """
    _require_readable(path)
    return _read_manifest(path, refused)


def _read_manifest(path: str, refused: Collection[str]) -> Iterator[InputFile]:
    suffix = "" if path == STANDARD_INPUT else os.path.splitext(path)[1].lower()
    lines = _split(_blocks(path), b"\n", path)
    first = next(lines, None)
    lines = iter(()) if first is None else chain((first.removeprefix(_BYTE_ORDER_MARK),), lines)
    is_json = suffix in (".jsonl", ".ndjson")
    if not is_json and suffix not in (".csv", ".tsv"):
        is_json, lines = _look(lines)
    if is_json:
        yield from _read_json(path, lines, refused)
    else:
        yield from _read_csv(path, lines, "\t" if suffix == ".tsv" else ",", refused)


def _look(lines: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether ``lines`` are JSON, or nothing at all, which is JSON of no files; and all of them."""
    for n_empty, line in enumerate(lines):
        if line and not line.isspace():
            return line.lstrip().startswith(b"{"), chain(repeat(b"", n_empty), (line,), lines)
    return True, iter(())


def _read_json(path: str, lines: Iterable[bytes], refused: Collection[str]) -> Iterator[InputFile]:
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        parameters = _decode_json(path, number, line)
        _refuse(path, number, parameters, refused)
        column = next((name for name in PATH_COLUMNS if name in parameters), None)
        if column is None:
            raise ListError(path, number, "it has no key path (or src, input), which would name the file")
        yield _input_file(path, number, parameters.pop(column), parameters)


def _decode_json(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        decoded: object = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:  # bytes that are no UTF-8, raw or escaped, are none to msgspec; slower, and for few lines
            decoded = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise ListError(path, number, f"it is no JSON: {error}") from None
    if not isinstance(decoded, dict):
        raise ListError(path, number, f"it is no JSON object with a key path, but {type(decoded).__name__}")
    return cast("dict[str, Any]", decoded)  # the keys of a JSON object are text


def _read_csv(path: str, lines: Iterable[bytes], delimiter: str, refused: Collection[str]) -> Iterator[InputFile]:
    rows = _rows(path, lines, delimiter)
    number, header = next(rows, _NO_HEADER)
    column, names = _columns(path, number, header)
    _refuse(path, number, names, refused)
    for number, row in rows:
        if len(row) > len(names):
            raise ListError(path, number, f"it has {len(row)} cells, and the header has {len(names)}")
        cells = dict(zip(names, row, strict=False))
        source = cells.pop(column, "")
        yield _input_file(path, number, source, {name: cell for name, cell in cells.items() if cell})


def _rows(path: str, lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, and the number of the line where each begins."""
    texts = (f"{line.decode('utf-8', 'surrogateescape')}\n" for line in lines)  # the newline may be one in a cell
    reader = csv.reader(texts, delimiter=delimiter, strict=True)  # or a quote that nothing ends would be passed over
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ListError(path, number, f"it is no CSV: {error}") from None
        if row is None:
            return
        if row:
            yield number, row


def _columns(path: str, number: int, header: list[str]) -> tuple[str, list[str]]:
    """The name of the column that has the path, and the names of all."""
    names = [name.strip() for name in header]
    column = next((name for name in PATH_COLUMNS if name in names), None)
    if column is None:
        there = ", ".join(names) or "none"
        raise ListError(path, number, f"it must be a header with a column path (or src, input); its columns: {there}")
    for index, name in enumerate(names):
        if not name:
            raise ListError(path, number, f"column {index + 1} has no name; give it one, or leave it out")
        if name in names[:index]:
            raise ListError(path, number, f"two columns are called {name}; rename one, or leave it out")
    return column, names


def _refuse(path: str, number: int, names: Iterable[str], refused: Collection[str]) -> None:
    name = next((name for name in names if name in refused), None)
    if name is not None:
        raise ListError(path, number, f"it has a {name}, and a list has no say in what a command runs; leave it out")


def _input_file(path: str, number: int, source: object, parameters: dict[str, Any]) -> InputFile:
    if not isinstance(source, str):
        raise ListError(path, number, f"the path is {source!r}, which is no text")
    if not source or "\0" in source:
        raise ListError(path, number, f"the path is {source!r}, which names no file")
    try:
        os.fsencode(source)
    except UnicodeEncodeError:
        raise ListError(path, number, f"the path is {source!r}, which no file can be called here") from None
    return InputFile(source, relpath_of(source), parameters or None)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _require_readable(path: str, remedy: str = "") -> None:
    """Look before anything runs. Nothing stays open, and a pipe is opened once, when its first line is wanted."""
    try:
        found = os.fstat(0) if path == STANDARD_INPUT else os.stat(path)
    except (OSError, ValueError) as error:
        if path == STANDARD_INPUT:
            raise ListError(path, 0, "standard input is closed") from None
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ListError(path, 0, reason + remedy) from None
    if stat.S_ISDIR(found.st_mode):
        raise ListError(path, 0, f"it is a directory{remedy}")
    if path != STANDARD_INPUT and not os.access(path, os.R_OK, effective_ids=True):
        raise ListError(path, 0, f"you may not read it{remedy}")


def _blocks(path: str) -> Iterator[bytes]:
    """What is at ``path``, in pieces as they come, none of them empty."""
    try:
        descriptor = 0 if path == STANDARD_INPUT else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while block := _read(descriptor):
                yield block
        finally:
            if path != STANDARD_INPUT:
                os.close(descriptor)
    except OSError as error:
        raise ListError(path, 0, f"it cannot be read: {error.strerror}") from error


def _read(descriptor: int) -> bytes:
    meanwhile = while_waiting.get()
    if meanwhile is not None:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        while not waiting.poll(WAIT_MS):
            meanwhile()
    while True:
        try:
            return os.read(descriptor, BLOCK_BYTES)
        except BlockingIOError:  # whoever shares the other end has asked not to wait
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            waiting.poll()


def _split(blocks: Iterable[bytes], separator: bytes, path: str) -> Iterator[bytes]:
    """``blocks`` as lines, without their ``separator``; one that nothing ends may be the last."""
    held: list[bytes] = []
    held_bytes = n_lines = 0
    for block in blocks:
        *lines, rest = block.split(separator)
        if lines:
            lines[0] = b"".join((*held, lines[0]))
            n_lines += len(lines)
            yield from lines
            held, held_bytes = [], 0
        held.append(rest)
        held_bytes += len(rest)
        if held_bytes > LINE_BYTES_MAX:
            raise ListError(path, n_lines + 1, f"it has more than {LINE_BYTES_MAX:,} bytes; is this a list of inputs?")
    last = b"".join(held)
    if last:
        yield last
