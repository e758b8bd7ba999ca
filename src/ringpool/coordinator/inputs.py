"""What files a batch consists of: its inputs, streamed.

    source                 inputs                                                        relpath
    a file                 that file                                                     its name
    a directory            every file below it                                           as seen from that directory
    photos/**/*.jpg        the files that match: * ? [...] within a name, ** any depth   as seen from photos
    -, @files.txt          what that list names, there or not; - is standard input       see ``lists``

    filter                 is matched by                                                 examples
    no slash               the name                                                      *.jpg   .git
    a slash                the relpath; ** any depth                                     raw/*.jpg   2020/**   /top.txt
    a slash at the end     a directory, and so is all that is below it                   build/   raw/old/

A walk is in order: a directory's files by name, then its subdirectories by name. A directory is read as a whole before
its first file is given out, so that what a run writes beside its inputs is not taken for one of them; memory grows with
the largest directory, not with the number of files. Symbolic links are followed, except to a directory that is being
walked. Left out are ringpool's own files, what vanishes meanwhile, and what is neither file nor directory.

Filters are for what a walk or a glob finds; a file that a source or a list names is an input in any case, and so is a
directory entered that a source names. Of what is found, an input is what matches one ``include`` (if there are any)
and no ``exclude``. A directory that matches an ``exclude`` is not entered. Unlike in a source, * and ** take names with
a leading dot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ringpool.coordinator.globs import Filters, Glob, may_be_glob, split_glob
from ringpool.coordinator.lists import STANDARD_INPUT, InputFile as InputFile, read_list
from ringpool.errors import InputMissingError, ListError
from ringpool.workers.files import naming

if TYPE_CHECKING:
    import sqlite3

OWN_DIRECTORY = ".ringpool"
SCRATCH_CACHE_KIB = 16_384
_PATH_BYTES_MAX = 4096  # PATH_MAX, with a zero at the end: what is longer says nothing of where it leads
_LEADS_NOWHERE = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)  # a link, like one to a file that is gone


class _Directory(NamedTuple):
    """A directory to walk. ``path`` and ``relpath`` are empty or end in a slash; ``states`` are those of the glob."""

    path: str
    relpath: str
    ancestors: frozenset[tuple[int, int]]
    states: frozenset[int]


class _Gone(NamedTuple):
    """What says of a path, and of what it may match, whether a file that is not there is known: see ``list_inputs``."""

    is_known: Callable[[str], bool]
    have_matched: Callable[[Callable[[str], bool]], bool]


class _Limits(NamedTuple):
    """Where a walk does not go, what it leaves out, and why it could not read what it could not."""

    exclude_under: tuple[Path, ...]
    filters: Filters | None
    refused: list[OSError]
    on_link: Callable[[str, str, Glob | None], None]


# ---- inputs ----------------------------------------------------------------------------------------------------------


def list_inputs(
    sources: Iterable[str | Path],
    *,
    exclude_under: Sequence[Path] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    is_known: Callable[[str], bool] = lambda _source: False,
    have_matched: Callable[[Callable[[str], bool]], bool] = lambda _matches: False,
    on_link: Callable[[str, str, Glob | None], None] = lambda _path, _relpath, _glob: None,
) -> Iterator[InputFile]:
    """The files that ``sources`` (files, directories, globs, lists) stand for, each found when it is asked for.

    What a source names is taken in any case. A walk does not enter the directories ``exclude_under``, the places of the
    outputs, which need not exist yet. ``include`` and ``exclude`` are filters. A ``Path`` is never a list:
    ``Path("-")`` is the file of that name, which as text is ``./-``. ``on_link`` is told of each link that a walk may
    follow, before a file beside it is given out: its path and relpath, with a slash at the end where it leads to a
    directory, and the walk's glob. Of one that leads nowhere it is told as of both.

    Raises at once ``InputMissingError`` where a source is not there, unless it ``is_known`` to be a file all the same
    (its task may have moved it away), or a glob matches nothing, unless files that were moved away ``have_matched``
    (asked with what says it of an absolute path), and ``ListError`` where
    a list is not there or standard input is named twice; ``ListError`` later where a list cannot be read on, and at the
    end of all the first ``OSError`` of a directory that cannot be read: to leave out what is in it would look like
    success.
    """
    named = list(sources)
    if sum(list_of(source) == STANDARD_INPUT for source in named) > 1:
        raise ListError(STANDARD_INPUT, 0, "it is named twice, and can be read once")
    limits = _Limits(tuple(exclude_under), Filters(include, exclude) if include or exclude else None, [], on_link)
    gone = _Gone(is_known, have_matched)
    return chain.from_iterable([*(_open_source(source, limits, gone) for source in named), _refusal(limits)])


def _refusal(limits: _Limits) -> Iterator[InputFile]:
    """No file; an error, when all walks are at their end, if one of them had any."""
    if limits.refused:
        raise limits.refused[0]
    yield from ()


def relpaths_are_unique(sources: Sequence[str | Path]) -> bool:
    """Whether ``list_inputs`` gives no relpath twice: one file, directory or glob. A list may name a file twice."""
    return len(sources) == 1 and list_of(sources[0]) is None


def place_of(directory: str) -> str:
    """``directory`` from the root; links in it stay, but where a ``..`` follows."""
    return os.fsdecode(naming.absolute(naming.encoded(directory)))


def list_of(source: str | Path) -> str | None:
    """The path of the list that ``source`` stands for, None where it is no list."""
    if isinstance(source, Path):
        return None
    return source[1:] if source.startswith("@") else STANDARD_INPUT if source == STANDARD_INPUT else None


def _open_source(source: str | Path, limits: _Limits, gone: _Gone) -> Iterable[InputFile]:
    listed = list_of(source)
    if listed is not None:
        return read_list(listed)
    source = os.fspath(source)
    try:
        found = os.stat(source)
    except PermissionError:
        raise
    except (OSError, ValueError):
        naming.encoded(source)  # or its name could not be shown either
        if gone.is_known(source):
            return (InputFile(source, os.path.basename(source)),)
        if not may_be_glob(source):
            raise InputMissingError(source) from None
        return _open_glob(source, limits, gone)
    if not stat.S_ISDIR(found.st_mode):
        return (InputFile(source, os.path.basename(source)),)
    return _walk(_Directory(_as_prefix(source), "", frozenset(), frozenset()), limits, None)


def _open_glob(source: str, limits: _Limits, gone: _Gone) -> Iterator[InputFile]:
    prefix, parts = split_glob(source)
    glob = Glob(parts, takes_dots=False)
    root = _Directory(prefix, "", frozenset(), glob.start)
    asked = limits if limits.filters is None else limits._replace(filters=None, refused=[], on_link=_ignore)
    matches = _walk(root, asked, glob)
    first = next(matches, None)
    if first is None and limits.filters is not None:
        asked = limits._replace(refused=[], on_link=_ignore)  # what they leave out need not be read
        first = next(_walk(root, asked, glob), None)
    if first is None:
        place = os.path.join(place_of(prefix or "."), "")
        if not asked.refused and gone.have_matched(
            lambda path: path.startswith(place) and glob.matches(path[len(place) :])
        ):
            return matches
        raise asked.refused[0] if asked.refused else InputMissingError(source)
    if limits.filters is None:
        return chain((first,), matches)
    return _walk(root, limits, glob)  # what matches may all be filtered out: that is no mistake in the source


def _ignore(_path: str, _relpath: str, _glob: Glob | None) -> None:
    """An ``on_link`` for a walk that gives no inputs."""


def _as_prefix(directory: str) -> str:
    """``directory`` as that to which a name can be added; empty for the current one."""
    bare = directory.rstrip("/")
    return "" if bare == "." else bare + "/"


def _walk(root: _Directory, limits: _Limits, glob: Glob | None) -> Iterator[InputFile]:
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        try:
            identity = _identity(directory.path or ".")
            if identity is None or identity in directory.ancestors:
                continue
            if directory is not root and any(identity == _identity(place) for place in limits.exclude_under):
                continue
            files, subdirectories, links, closed = _list(directory, glob)
        except OSError as error:  # the others are walked all the same, and then it is said
            limits.refused.append(_with_remedy(error, "the files in it are not known: get the right to read it"))
            continue
        limits.refused.extend(
            _with_remedy(error, "what this link leads to is not known: get the right to look there")
            for name, error in closed
            if _may_find(directory, name, limits.filters, glob)
        )
        if limits.filters is not None:
            files, subdirectories = limits.filters.keep(directory.relpath, files, subdirectories)
        ancestors = directory.ancestors | {identity}
        _tell_of_links(directory, links, ancestors, limits, glob)
        for name in files:
            yield InputFile(directory.path + name, directory.relpath + name)
        for name in reversed(subdirectories):  # what is put in last is walked first
            states = glob.states_below(directory.states, name) if glob else directory.states
            if states or glob is None:
                path, relpath = f"{directory.path}{name}/", f"{directory.relpath}{name}/"
                waiting.append(_Directory(path, relpath, ancestors, states))


def _with_remedy(error: OSError, remedy: str) -> OSError:
    if error.errno == errno.EACCES:
        error.strerror = f"{error.strerror}; {remedy}, or exclude it"
    return error


def _may_find(directory: _Directory, name: str, filters: Filters | None, glob: Glob | None) -> bool:
    """Whether a walk would take, or enter, whatever has that name."""
    if glob is not None and not (glob.accepts(directory.states, name) or glob.states_below(directory.states, name)):
        return False
    return filters is None or any(filters.keep(directory.relpath, [name], [name]))


class _Link(NamedTuple):
    name: str
    may_be_directory: bool
    may_be_file: bool


def _tell_of_links(
    directory: _Directory,
    links: list[_Link],
    ancestors: frozenset[tuple[int, int]],
    limits: _Limits,
    glob: Glob | None,
) -> None:
    """What ``on_link`` is to know of those in ``directory``, but of directories that are being walked."""
    for name, may_be_directory, may_be_file in links:
        path, relpath = directory.path + name, directory.relpath + name
        if may_be_directory:
            with contextlib.suppress(OSError):  # it leads to itself, or where nobody may look
                if _identity(path) not in ancestors:
                    limits.on_link(path + "/", relpath + "/", glob)
        if limits.filters is not None and not limits.filters.keep(directory.relpath, [name], [])[0]:
            continue
        if may_be_file and (glob is None or glob.accepts(directory.states, name)):
            limits.on_link(path, relpath, glob)


def _identity(directory: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


_Closed: TypeAlias = list[tuple[str, OSError]]


def _list(directory: _Directory, glob: Glob | None) -> tuple[list[str], list[str], list[_Link], _Closed]:
    """The names of ``directory``'s files, those that the glob matches, and of its subdirectories; both sorted. And the
    links in it; and those of which nobody can say where they lead, each with the reason.
    """
    files: list[str] = []
    subdirectories: list[str] = []
    links: list[_Link] = []
    closed: _Closed = []
    try:
        with os.scandir(directory.path or ".") as entries:
            for entry in entries:
                is_link = entry.is_symlink()
                try:
                    is_directory, is_file = _kind(entry, is_link)
                except OSError as error:
                    if not is_link:
                        raise
                    closed.append((entry.name, error))
                    continue
                if is_link:
                    links.append(_Link(entry.name, not is_file, not is_directory))
                if is_directory:
                    if entry.name != OWN_DIRECTORY:
                        subdirectories.append(entry.name)
                elif not is_file or (entry.name.startswith(".") and naming.is_staging_name(os.fsencode(entry.name))):
                    continue
                elif glob is None or glob.accepts(directory.states, entry.name):
                    files.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):  # it vanished after its parent was read
        return [], [], [], []
    files.sort()
    subdirectories.sort()
    return files, subdirectories, links, closed


def _kind(entry: os.DirEntry[str], is_link: bool) -> tuple[bool, bool]:
    """Whether ``entry``, or what it links to, is a directory, and whether it is a file."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError as error:
        if is_link and error.errno in _LEADS_NOWHERE and len(os.fsencode(entry.path)) < _PATH_BYTES_MAX:
            return False, False
        raise


# ---- order -----------------------------------------------------------------------------------------------------------


def largest_first(files: Iterable[InputFile]) -> Iterator[InputFile]:
    """``files``, the largest first; those of one size in the order in which they came. All are listed before the first.

    A file that is not there comes last. Memory is bounded: names and sizes are in a database on disk, in the directory
    for temporary files. Raises ``OSError`` where that has no room.
    """
    scratch = open_scratch("CREATE TABLE inputs (n INTEGER PRIMARY KEY, size_bytes INTEGER, file BLOB)")
    try:
        rows = ((_size_bytes(file.path), pickle.dumps(tuple(file))) for file in files)
        scratch.executemany("INSERT INTO inputs (size_bytes, file) VALUES (?, ?)", rows)
        for (file,) in scratch.execute("SELECT file FROM inputs ORDER BY size_bytes DESC, n"):
            yield InputFile(*pickle.loads(file))
    except scratch.Error as error:
        raise scratch_error(error) from error
    finally:
        scratch.close()


def _size_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def open_scratch(schema: str) -> sqlite3.Connection:
    """A database for this process alone, with ``schema``. Beyond its cache it is in a file that has no name.

    Close it. It never commits: nobody else reads it, and nothing of it outlives the process.
    """
    import sqlite3  # half of the listings need none

    database = sqlite3.connect("", check_same_thread=False)
    database.executescript(
        f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE;"
        f"PRAGMA cache_size = -{SCRATCH_CACHE_KIB}; {schema};"
    )
    return database


def scratch_error(error: Exception) -> OSError:
    """What to raise for an ``error`` of such a database."""
    reason = f"temporary database of inputs: {error}; make room there, or set SQLITE_TMPDIR to another directory"
    return OSError(errno.ENOSPC, reason, os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp")
