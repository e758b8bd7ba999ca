"""What files a batch consists of: its inputs, streamed, and the output that belongs to each.

    source                 inputs                                                        relpath
    a file                 that file                                                     its name
    a directory            every file below it                                           as seen from that directory
    photos/**/*.jpg        the files that match: * ? [...] within a name, ** any depth   as seen from photos

    output pattern         the input photos/2020/sea.tar.gz of the source photos/
    {relpath}              2020/sea.tar.gz
    {parent}               2020              empty at the top, where the slash after it goes as well
    {name}                 sea.tar.gz
    {stem} {suffix}        sea.tar  .gz

A walk is in order: a directory's files by name, then its subdirectories by name. A directory is read as a whole before
its first file is given out, so that what a run writes beside its inputs is not taken for one of them; memory grows with
the largest directory, not with the number of files. Symbolic links are followed, except to a directory that is being
walked. Left out are ringpool's own files, what vanishes meanwhile, and what is neither file nor directory.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import string
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from fnmatch import translate
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ringpool.errors import InputMissingError, OutputCollisionError, OutputPatternError
from ringpool.workers.files.naming import is_staging_name

OWN_DIRECTORY = ".ringpool"
_MAGIC = re.compile(r"[*?[]")


class InputFile(NamedTuple):
    """A file to work on: its ``path``, as the source was given, and its path relative to that source."""

    path: str
    relpath: str


class _Directory(NamedTuple):
    """A directory to walk. ``path`` and ``relpath`` are empty or end in a slash; ``states`` are those of the glob."""

    path: str
    relpath: str
    ancestors: frozenset[tuple[int, int]]
    states: frozenset[int]


# ---- inputs ----------------------------------------------------------------------------------------------------------


def list_inputs(sources: Iterable[str | Path], *, exclude_under: Path | None = None) -> Iterator[InputFile]:
    """The files that ``sources`` (files, directories, globs) stand for, each found when it is asked for.

    What a source names is taken in any case. A walk does not enter the directory ``exclude_under``, the place of the
    outputs, which need not exist yet.

    Raises ``InputMissingError`` at once where a source is not there or a glob matches nothing; ``OSError`` later where
    a directory cannot be read, since to leave out what is in it would look like success.
    """
    return chain.from_iterable([_open_source(os.fspath(source), exclude_under) for source in sources])


def _open_source(source: str, exclude_under: Path | None) -> Iterable[InputFile]:
    try:
        found = os.stat(source)
    except PermissionError:
        raise
    except (OSError, ValueError):
        if not _MAGIC.search(source):
            raise InputMissingError(source) from None
        return _open_glob(source, exclude_under)
    if not stat.S_ISDIR(found.st_mode):
        return (InputFile(source, os.path.basename(source)),)
    return _walk(_Directory(_as_prefix(source), "", frozenset(), frozenset()), exclude_under, None)


def _open_glob(source: str, exclude_under: Path | None) -> Iterator[InputFile]:
    glob = _Glob(source)
    matches = _walk(_Directory(glob.prefix, "", frozenset(), glob.start), exclude_under, glob)
    first = next(matches, None)
    if first is None:
        raise InputMissingError(source)
    return chain((first,), matches)


def _as_prefix(directory: str) -> str:
    """``directory`` as that to which a name can be added; empty for the current one."""
    bare = directory.rstrip("/")
    return "" if bare == "." else bare + "/"


def _walk(root: _Directory, exclude_under: Path | None, glob: _Glob | None) -> Iterator[InputFile]:
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        identity = _identity(directory.path or ".")
        if identity is None or identity in directory.ancestors:
            continue
        if directory is not root and exclude_under is not None and identity == _identity(exclude_under):
            continue
        files, subdirectories = _list(directory, glob)
        for name in files:
            yield InputFile(directory.path + name, directory.relpath + name)
        ancestors = directory.ancestors | {identity}
        for name in reversed(subdirectories):  # what is put in last is walked first
            states = glob.states_below(directory.states, name) if glob else directory.states
            if states or glob is None:
                path, relpath = f"{directory.path}{name}/", f"{directory.relpath}{name}/"
                waiting.append(_Directory(path, relpath, ancestors, states))


def _identity(directory: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _list(directory: _Directory, glob: _Glob | None) -> tuple[list[str], list[str]]:
    """The names of ``directory``'s files, those that the glob matches, and of its subdirectories; both sorted."""
    files: list[str] = []
    subdirectories: list[str] = []
    try:
        with os.scandir(directory.path or ".") as entries:
            for entry in entries:
                is_directory, is_file = _kind(entry)
                if is_directory:
                    if entry.name != OWN_DIRECTORY:
                        subdirectories.append(entry.name)
                elif not is_file or (entry.name.startswith(".") and is_staging_name(os.fsencode(entry.name))):
                    continue
                elif glob is None or glob.accepts(directory.states, entry.name):
                    files.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):  # it vanished after its parent was read
        return [], []
    files.sort()
    subdirectories.sort()
    return files, subdirectories


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether ``entry``, or what it links to, is a directory, and whether it is a file."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself leads nowhere, like one to a file that is gone
            return False, False
        raise


class _Glob:
    """A glob, as a machine that reads a path name by name.

    State i says that the names so far fit the first i parts of the pattern; a ``**`` may stay in its state. As in a
    shell, a name's leading dot is matched only by a dot. A pattern that ends in a slash stands for all that is in the
    directories which it matches.
    """

    def __init__(self, pattern: str) -> None:
        magic = _MAGIC.search(pattern)
        cut = pattern.rfind("/", 0, magic.start() if magic else len(pattern)) + 1
        parts = [part for part in pattern[cut:].split("/") if part]
        if pattern.endswith("/"):
            parts += ["**", "*"]
        self.prefix = pattern[:cut]
        self._parts = [_matcher(part) for part in parts]
        self._end = len(parts)
        self.start = self._skipping({0}) - {self._end}

    def states_below(self, states: frozenset[int], name: str) -> frozenset[int]:
        """The states in the directory ``name``; none where nothing below it can match."""
        return self._after(states, name) - {self._end}

    def accepts(self, states: frozenset[int], name: str) -> bool:
        """Whether the pattern is matched by the path that led to ``states`` and ends in ``name``."""
        return self._end in self._after(states, name)

    def _after(self, states: frozenset[int], name: str) -> frozenset[int]:
        reached: set[int] = set()
        for state in states:
            matches = self._parts[state]
            if matches is None:
                if not name.startswith("."):
                    reached.add(state)
            elif matches(name):
                reached.add(state + 1)
        return self._skipping(reached)

    def _skipping(self, states: set[int]) -> frozenset[int]:
        """``states`` and those which they lead to where a ``**`` stands for nothing."""
        reached = set(states)
        for state in states:
            while state < self._end and self._parts[state] is None:
                state += 1
                reached.add(state)
        return frozenset(reached)


def _matcher(part: str) -> Callable[[str], object] | None:
    """What says whether a name fits ``part`` of a glob; None for ``**``, which any fits."""
    if part == "**":
        return None
    matches = re.compile(translate(part)).match
    return matches if part.startswith(".") else lambda name: not name.startswith(".") and matches(name)


# ---- outputs ---------------------------------------------------------------------------------------------------------


class Scope(Enum):
    """How far two inputs of one source may lie apart, where a pattern gives both the same output."""

    NOWHERE = "no two have the same output"
    DIRECTORY = "they are in one directory"
    SOURCE = "they are anywhere in the source"


class OutputPattern:
    """Where outputs go: a path with fields in braces (``thumbs/{relpath}.webp``); a brace of its own is written twice.

    Attributes: ``pattern`` (str); ``base`` (``Path``), the directory before the first field, which no output leaves;
    ``fields`` (frozenset of str); ``scope`` (``Scope``), where to look for two inputs with one output.

    Raises ``OutputPatternError`` for an unknown field, and for a pattern that names no file.
    """

    FIELDS = ("relpath", "parent", "name", "stem", "suffix")

    def __init__(self, pattern: str | Path) -> None:
        self.pattern = os.fspath(pattern)
        self._tokens = self._parse()
        self.fields = frozenset(field for _, field in self._tokens if field)
        leading = self._tokens[0][0]
        self._base = leading[: leading.rfind("/") + 1]
        self.base = Path(self._base)
        parts = self._render(dict.fromkeys(self.FIELDS, "x"))[len(self._base) :].split("/")
        if parts[-1] in ("", ".", ".."):
            raise OutputPatternError(self.pattern, "it names a directory; let it end in a file's name, such as {name}")
        if ".." in parts:
            raise OutputPatternError(self.pattern, "`..` may stand before the first field only")
        self.scope = self._scope()

    def _parse(self) -> list[tuple[str, str | None]]:
        """The pattern as pairs of a literal and the field that follows it, None after the last."""
        tokens: list[tuple[str, str | None]] = []
        literal = ""
        try:
            for text, field, form, conversion in string.Formatter().parse(self.pattern):
                literal += text
                if field is None:  # a doubled brace, or the end
                    continue
                if field not in self.FIELDS or form or conversion:
                    written = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                    known = ", ".join(f"{{{name}}}" for name in self.FIELDS)
                    raise OutputPatternError(self.pattern, f"unknown field {{{written}}}; there are {known}")
                tokens.append((literal, field))
                literal = ""
        except ValueError as error:
            reason = f"{str(error).lower()}; write a brace that belongs to the path twice, {{{{ or }}}}"
            raise OutputPatternError(self.pattern, reason) from None
        return [*tokens, (literal, None)]

    def _scope(self) -> Scope:
        if [field for _, field in self._tokens] == ["relpath", None]:
            return Scope.NOWHERE
        (_, first), rest = self._tokens[0], self._tokens[1:]
        if first == "parent" and rest[0][0].startswith("/") and self.fields <= {"parent", "name", "stem", "suffix"}:
            again = any(field == "parent" for _, field in rest)
            deeper = "/" in "".join(literal for literal, _ in rest)[1:]
            if not again and not deeper:  # each directory of inputs has a directory of outputs to itself
                return Scope.DIRECTORY
        return Scope.SOURCE

    def _render(self, values: dict[str, str]) -> str:
        rendered = ""
        nothing_yet = False  # an empty {parent} at the start of a name: {parent}/{name} must not become /name
        for literal, field in self._tokens:
            rendered += literal[1:] if nothing_yet and literal.startswith("/") else literal
            if field is not None:
                nothing_yet = field == "parent" and not values[field] and rendered[-1:] in ("", "/")
                rendered += values[field]
        return rendered

    def path_for(self, file: InputFile) -> str:
        """The output of ``file``. Raises ``OutputPatternError`` where that would be no file below ``base``."""
        parent, _, name = file.relpath.rpartition("/")
        stem, suffix = os.path.splitext(name)
        values = {"relpath": file.relpath, "parent": parent, "name": name, "stem": stem, "suffix": suffix}
        rendered = self._render(values)
        parts = rendered[len(self._base) :].split("/")
        if ".." in parts or parts[-1] in ("", ".") or (not self._base and not parts[0]):
            reason = (
                f"it makes {rendered!r} of the input {file.path}, which is no file below {self.base}; use {{relpath}}"
            )
            raise OutputPatternError(self.pattern, reason)
        return self._base + "/".join(part for part in parts if part not in ("", "."))


def with_outputs(
    inputs: Iterable[InputFile], pattern: OutputPattern, *, one_source: bool
) -> Iterator[tuple[InputFile, str]]:
    """Each input with its output.

    ``one_source`` (bool): ``inputs`` are what ``list_inputs`` gives for a single source, so no relpath comes twice.
    Raises ``OutputCollisionError`` when the second of two inputs with one output is drawn. Outputs are remembered only
    as far as they may come again: not at all, for one directory, or all of them.
    """
    scope = pattern.scope if one_source else Scope.SOURCE
    first_with: dict[str, str] = {}
    current = ""
    for file in inputs:
        output = pattern.path_for(file)
        if scope is not Scope.NOWHERE:
            parent = file.relpath.rpartition("/")[0]
            if scope is Scope.DIRECTORY and parent != current:
                first_with.clear()  # a walk gives out a directory's files together
                current = parent
            if output in first_with:
                raise OutputCollisionError(output, first_with[output], file.path)
            first_with[output] = file.path
        yield file, output
