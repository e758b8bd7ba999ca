"""Where the outputs of a batch go, and whether two would be the same file.

    field                  the input photos/2020/sea.tar.gz of the source photos/, which is the run's eighth
    {relpath}              2020/sea.tar.gz
    {parent}               2020              empty at the top, where the slash after it goes as well
    {name}                 sea.tar.gz
    {stem} {suffix}        sea.tar  .gz
    {index} {index:06}     7  000007         from 0, in the run's order; width and type as Python's integers have them
    {hash} {hash:2}        32 hex digits, or the first of them: of the relpath, whatever else is listed

    --out                                                names            base, where the ledger is
    t/{relpath}.webp                                     none             t
    thumb=t/{relpath}.webp   meta=m/{relpath}.json       thumb, meta      t, that of the first
    ./a=b/{name}                                         none             a=b; without the ./ its name would be a

    the pattern has, apart from all else        two inputs of one source may have one output
    {relpath}, or {hash} in full, or {index}    never: nothing is remembered
    {parent}/ at the start, names behind it     in one directory: the outputs of one are remembered
    none of these                               anywhere: all outputs are remembered, the most of them on disk

A field stands apart where the output tells what it was: ``{index}-{name}`` is for no two inputs the same, but
``{index}{name}`` is 12 for the input 2 as the second and for the input "" as the thirteenth.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ringpool.coordinator.inputs import InputFile, open_scratch, scratch_error
from ringpool.errors import OutputCollisionError, OutputPatternError

if TYPE_CHECKING:
    import sqlite3

HASH_BYTES = 16
KEPT_MAX = 65_536
MARKS_LOG2 = 27  # 16 MiB of bits: of ten million outputs on disk, a new one is taken for one of them 1 time in 50

_INTEGER_FORMAT = re.compile(r"\d{0,2}[dxXob]?", re.ASCII)
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")

# A pattern in outline, on which its scope depends, has one character for each field: \x01 relpath, \x02 parent, \x03
# suffix change how many directories an output has, so what it is to tell has none of them before it, or none behind it;
# \x04 is a name, never empty and without a slash; \x05 an index, \x06 a whole hash, which a _FOREIGN character ends.
_OUTLINE = {
    "relpath": "\x01",
    "parent": "\x02",
    "suffix": "\x03",
    "name": "\x04",
    "stem": "\x04",
    "index": "\x05",
    "hash": "\x06",
}
_LITERAL, _STEADY, _FOREIGN = r"[^/\x01-\x06]*", r"[^\x01-\x03]*", r"[^0-9A-Fa-f \x01-\x06]"
_RELPATH_APART = re.compile(rf"(?:{_STEADY}/)?{_LITERAL}\x01{_LITERAL}(?:/{_STEADY})?", re.DOTALL)


def _apart(field: str) -> re.Pattern[str]:
    from_the_start = rf"(?:{_STEADY}/)?{_LITERAL}{field}\x03?(?:{_FOREIGN}.*)?"
    from_the_end = rf"(?:.*{_FOREIGN})?{field}{_LITERAL}(?:/{_STEADY})?"
    before_a_suffix = rf"(?:.*/)?{_LITERAL}\x04?{_LITERAL}(?<={_FOREIGN}){field}\x03"  # {stem}-{index}{suffix}
    return re.compile(f"{from_the_start}|{from_the_end}|{before_a_suffix}", re.DOTALL)


_INDEX_APART, _HASH_APART = _apart(r"\x05"), _apart(r"\x06")
_SOLID = re.compile(r"[^.\x02\x03]")  # what makes a part of a path a name, whatever the fields are


class Scope(IntEnum):
    """How far two inputs of one source may lie apart, where a pattern gives both the same output."""

    NOWHERE = 0  # no two have the same output
    DIRECTORY = 1  # they are in one directory
    SOURCE = 2  # they are anywhere in the source


class _Token(NamedTuple):
    """A literal and the field that follows it, with its format; after the last literal there is none."""

    literal: str
    field: str | None
    form: str


# ---- one output ------------------------------------------------------------------------------------------------------


class OutputPattern:
    """Where outputs go: a path with fields in braces (``thumbs/{relpath}.webp``); a brace of its own is written twice.

    Attributes: ``pattern`` (str); ``base`` (``Path``), the directory before the first field, which no output leaves;
    ``base_length`` (int), how many characters of each output that is; ``fields`` (frozenset of str); ``scope``
    (``Scope``), where to look for two inputs with one output; ``is_numbered`` (bool), whether ``{index}`` stands apart,
    so that inputs of several sources are told apart too.

    Raises ``OutputPatternError`` for an unknown field or format, and for a pattern that names no file.
    """

    FIELDS = ("relpath", "parent", "name", "stem", "suffix", "index", "hash")

    def __init__(self, pattern: str | Path) -> None:
        self.pattern = os.fspath(pattern)
        self._tokens = self._parse()
        self.fields = frozenset(token.field for token in self._tokens if token.field)
        leading = self._tokens[0].literal
        self._base = leading[: leading.rfind("/") + 1]
        self.base = Path(self._base)
        self.base_length = len(self._base)
        parts = self._render(dict.fromkeys(self.FIELDS, "x"))[len(self._base) :].split("/")
        if parts[-1] in ("", ".", ".."):
            raise OutputPatternError(self.pattern, "it names a directory; let it end in a file's name, such as {name}")
        if ".." in parts:
            raise OutputPatternError(self.pattern, "`..` may stand before the first field only")
        outline = self._outline()
        self.is_numbered = outline is not None and _INDEX_APART.fullmatch(outline) is not None
        self.scope = self._scope(outline)
        self._render_clean = self._compile() if outline is not None and self._is_solid(outline) else None

    def _parse(self) -> list[_Token]:
        tokens: list[_Token] = []
        literal = ""
        try:
            for text, field, form, conversion in string.Formatter().parse(self.pattern):
                literal += text
                if field is None:  # a doubled brace, or the end
                    continue
                self._require(field, form or "", conversion)
                tokens.append(_Token(literal, field, form or ""))
                literal = ""
        except ValueError as error:
            reason = f"{str(error).lower()}; write a brace that belongs to the path twice, {{{{ or }}}}"
            raise OutputPatternError(self.pattern, reason) from None
        return [*tokens, _Token(literal, None, "")]

    def _require(self, field: str, form: str, conversion: str | None) -> None:
        written = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        if field not in self.FIELDS or conversion:
            known = ", ".join(f"{{{name}}}" for name in self.FIELDS)
            raise OutputPatternError(self.pattern, f"unknown field {{{written}}}; there are {known}")
        if field == "index":
            usable = _INTEGER_FORMAT.fullmatch(form) is not None
        elif field == "hash":
            usable = not form or (form.isascii() and form.isdigit() and 1 <= int(form) <= 2 * HASH_BYTES)
        else:
            usable = not form
        if not usable:
            reason = f"the format in {{{written}}} is not one of those there are, such as {{index:06}} and {{hash:2}}"
            raise OutputPatternError(self.pattern, reason)

    # ---- what follows from the pattern alone ----

    def _outline(self) -> str | None:
        """The pattern with a character for each field; None where its literals have such characters."""
        if re.search(r"[\x01-\x06]", self.pattern):
            return None
        outline = ""
        for literal, field, form in self._tokens:
            outline += literal
            if field == "hash" and form and int(form) < 2 * HASH_BYTES:
                outline += _OUTLINE["name"]
            elif field is not None:
                outline += _OUTLINE[field]
        return outline

    def _scope(self, outline: str | None) -> Scope:
        if outline is None:
            return Scope.SOURCE
        if any(apart.fullmatch(outline) for apart in (_RELPATH_APART, _INDEX_APART, _HASH_APART)):
            return Scope.NOWHERE
        first, rest = self._tokens[0].field, self._tokens[1:]
        if first == "parent" and rest[0].literal.startswith("/") and "relpath" not in self.fields:
            again = any(token.field == "parent" for token in rest)
            deeper = "/" in "".join(token.literal for token in rest)[1:]
            if not again and not deeper:  # each directory of inputs has a directory of outputs to itself
                return Scope.DIRECTORY
        return Scope.SOURCE

    def _is_solid(self, outline: str) -> bool:
        """Whether each part of an output below the base is a name or a parent, for any relpath without odd parts."""
        *directories, name = outline[len(self._base) :].split("/")
        solid = all(part == _OUTLINE["parent"] or _SOLID.search(part) for part in directories)
        return solid and _SOLID.search(name) is not None

    def _compile(self) -> Callable[[str, int], str]:
        """What makes the output of a relpath that needs no repair. All that can be is done here, for all of them."""
        fields, literals = [token.field for token in self._tokens], [token.literal for token in self._tokens]
        if fields == ["relpath", None]:
            head, tail = literals
            return lambda relpath, _index: f"{head}{relpath}{tail}"
        if fields == ["hash", "name", None]:
            head, between, tail = literals
            digits = slice(int(self._tokens[0].form or 2 * HASH_BYTES))
            return lambda relpath, _index: (
                f"{head}{hash_of(relpath)[digits]}{between}{relpath[relpath.rfind('/') + 1 :]}{tail}"
            )
        form = self._as_format()
        splits, hashes = bool(self.fields & {"stem", "suffix"}), "hash" in self.fields

        def render(relpath: str, index: int) -> str:
            cut = relpath.rfind("/") + 1
            name = stem = relpath[cut:]
            suffix = digest = ""
            if splits:
                dot = name.rfind(".")
                if dot > 0:
                    stem, suffix = name[:dot], name[dot:]
            if hashes:
                digest = hash_of(relpath)
            return form(relpath, relpath[: cut - 1] if cut else "", name, stem, suffix, index, digest, relpath[:cut])

        return render

    def _as_format(self) -> Callable[..., str]:
        """The pattern as ``str.format`` has it, with fields by their numbers; the last is a parent with its slash."""
        form = ""
        skip = 0
        for position, (literal, field, spec) in enumerate(self._tokens):
            form += literal[skip:].replace("{", "{{").replace("}", "}}")
            skip = 0
            if field is None:
                break
            begins = literal.endswith("/") or (position == 0 and not literal)
            if field == "parent" and begins and self._tokens[position + 1].literal.startswith("/"):
                form += f"{{{len(self.FIELDS)}}}"
                skip = 1
            else:
                dot = "." if field == "hash" and spec else ""
                form += f"{{{self.FIELDS.index(field)}:{dot}{spec}}}"
        return form.format

    # ---- what it makes of an input ----

    def path_for(self, file: InputFile, index: int) -> str:
        """The output of ``file``, the run's input number ``index`` (from 0).

        Raises ``OutputPatternError`` where that would be no file below ``base``.
        """
        relpath = file.relpath
        if (
            self._render_clean is not None
            and relpath
            and relpath[0] not in "./"
            and relpath[-1] != "/"
            and "/." not in relpath  # a hidden file is as good, but for `.` and `..` one has to look closer
            and "//" not in relpath
        ):
            return self._render_clean(relpath, index)
        return self._path_with_care(file, index)

    def _path_with_care(self, file: InputFile, index: int) -> str:
        relpath = file.relpath
        parent, _, name = relpath.rpartition("/")
        stem, suffix = os.path.splitext(name)
        values = {"relpath": relpath, "parent": parent, "name": name, "stem": stem, "suffix": suffix, "hash": ""}
        if "hash" in self.fields:
            values["hash"] = hash_of(relpath)
        rendered = self._render(values, index)
        parts = rendered[len(self._base) :].split("/")
        if ".." in parts or parts[-1] in ("", ".") or (not self._base and not parts[0]):
            reason = (
                f"it makes {rendered!r} of the input {file.path}, which is no file below {self.base}; use {{relpath}}"
            )
            raise OutputPatternError(self.pattern, reason)
        return self._base + "/".join(part for part in parts if part not in ("", "."))

    def _render(self, values: dict[str, str], index: int = 0) -> str:
        rendered = ""
        nothing_yet = False  # an empty {parent} at the start of a name: {parent}/{name} must not become /name
        for literal, field, form in self._tokens:
            rendered += literal[1:] if nothing_yet and literal.startswith("/") else literal
            if field is not None:
                nothing_yet = field == "parent" and not values[field] and rendered[-1:] in ("", "/")
                if field == "index":
                    rendered += format(index, form)
                else:
                    rendered += values[field][: int(form)] if form else values[field]
        return rendered

    def may_meet(self, other: OutputPattern) -> bool:
        """Whether an output of this pattern may be one of ``other``: they do not begin or end differently."""
        (head, tail), (other_head, other_tail) = self._ends(), other._ends()
        heads_differ = not head.startswith(other_head) and not other_head.startswith(head)
        return not heads_differ and (tail.endswith(other_tail) or other_tail.endswith(tail))

    def _ends(self) -> tuple[str, str]:
        """What all outputs begin and end with, the former from the root; of the latter no more than a name."""
        leading, trailing = self._tokens[0].literal, self._tokens[-1].literal
        head = f"{os.path.realpath(self._base or '.').rstrip('/')}/{leading[len(self._base) :]}"
        return head, head if len(self._tokens) == 1 else trailing[max(trailing.rfind("/"), 0) :]


def hash_of(relpath: str) -> str:
    """The 32 hexadecimal digits that ``{hash}`` is for ``relpath``: its blake2b-128."""
    return blake2b(relpath.encode("utf-8", "surrogateescape"), digest_size=HASH_BYTES).hexdigest()


# ---- several outputs -------------------------------------------------------------------------------------------------


class NamedOutputs:
    """The outputs of each input, as the command line has them: ``NAME=PATTERN`` for each, or one pattern with no name.

    Attributes: ``names`` (tuple of str; empty where there is one pattern without a name); ``patterns`` (tuple of
    ``OutputPattern``); ``bases`` (tuple of ``Path``); ``base`` (``Path``), that of the first: where the ledger is.

    Raises ``OutputPatternError`` for patterns that cannot be used, or not beside each other.
    """

    def __init__(self, words: Sequence[str]) -> None:
        assert words, "no output"
        named = [_NAME.match(word) for word in words]
        unnamed = [word for word, name in zip(words, named, strict=True) if name is None]
        if unnamed and len(words) > 1:
            raise OutputPatternError(unnamed[0], f"each of several outputs needs a name, such as thumb={unnamed[0]}")
        self.names = tuple(name[1] for name in named if name)
        for word, name, position in zip(words, self.names, range(len(words)), strict=False):
            if name in self.names[:position]:
                raise OutputPatternError(word, f"another output is called {name} too; give it a name of its own")
        starts = [name.end() if name else 0 for name in named]
        self.patterns = tuple(OutputPattern(word[start:]) for word, start in zip(words, starts, strict=True))
        self.bases = tuple(pattern.base for pattern in self.patterns)
        self.base = self.bases[0]
        self._roots = [os.path.realpath(base).rstrip("/") for base in self.bases]
        self._cuts = [pattern.base_length for pattern in self.patterns]
        self._require_different(words)
        self._meeting = {
            position
            for pair in combinations(range(len(self.patterns)), 2)
            if self.patterns[pair[0]].may_meet(self.patterns[pair[1]])
            for position in pair
        }

    def _require_different(self, words: Sequence[str]) -> None:
        seen: dict[tuple[str, str], str] = {}
        for word, pattern, root in zip(words, self.patterns, self._roots, strict=True):
            rest = pattern.pattern[pattern.pattern.partition("{")[0].rfind("/") + 1 :]
            if (root, rest) in seen:
                raise OutputPatternError(word, f"it makes the same files as {seen[root, rest]}; change one of them")
            seen[root, rest] = word

    def paths_for(self, file: InputFile, index: int) -> tuple[str, ...]:
        """The outputs of ``file``, the run's input number ``index`` (from 0), in the order of the patterns."""
        return tuple([pattern.path_for(file, index) for pattern in self.patterns])

    def scopes(self, *, one_source: bool, in_walk_order: bool) -> tuple[Scope, ...]:
        """For each pattern, how far two of a run's inputs may lie apart that have the same output."""
        scopes: list[Scope] = []
        for position, pattern in enumerate(self.patterns):
            together = one_source or pattern.is_numbered
            if pattern.scope is Scope.DIRECTORY:
                together = one_source and in_walk_order
            scopes.append(pattern.scope if together and position not in self._meeting else Scope.SOURCE)
        return tuple(scopes)

    def place_of(self, position: int, output: str) -> str:
        """``output`` of the pattern at ``position``, under a name that the same file has for each pattern."""
        if len(self.patterns) == 1:
            return output
        return f"{self._roots[position]}/{output[self._cuts[position] :]}"


# ---- collisions ------------------------------------------------------------------------------------------------------


class Collisions:
    """Which outputs there were, and of which inputs: ``kept_max`` of them in memory, all others in a database on disk.

    Two bits for each output on disk (a Bloom filter) tell of almost every new one that it is not there, since to look
    takes as long as all else. Close it. Raises ``OSError`` where there is no room for the database, in the
    directory for temporary files.
    """

    def __init__(self, kept_max: int = KEPT_MAX) -> None:
        self._kept: dict[str, str] = {}
        self._kept_max = kept_max
        self._scratch: sqlite3.Connection | None = None
        self._marks = bytearray()

    @property
    def n_kept(self) -> int:
        """How many are in memory."""
        return len(self._kept)

    def add(self, output: str, path: str) -> str | None:
        """Note that ``output`` is of the input ``path``. Where it was of another before: that one's path, else None."""
        first = self._kept.get(output)
        if first is None and self._scratch is not None and self._is_marked(output):
            first = self._look_up(self._scratch, output)
        if first is None:
            self._kept[output] = path
            if len(self._kept) >= self._kept_max:
                self._spill()
        return first

    def _is_marked(self, output: str) -> bool:
        marks, (one, other) = self._marks, _marks_of(output)
        return bool(marks[one >> 3] >> (one & 7) & marks[other >> 3] >> (other & 7) & 1)

    def _look_up(self, scratch: sqlite3.Connection, output: str) -> str | None:
        try:
            row = scratch.execute("SELECT path FROM outputs WHERE output = ?", (_as_bytes(output),)).fetchone()
        except scratch.Error as error:
            raise scratch_error(error) from error
        return None if row is None else row[0].decode("utf-8", "surrogatepass")

    def _spill(self) -> None:
        if self._scratch is None:
            self._scratch = open_scratch("CREATE TABLE outputs (output BLOB PRIMARY KEY, path BLOB) WITHOUT ROWID")
            self._marks = bytearray(1 << (MARKS_LOG2 - 3))
        rows = sorted((_as_bytes(output), _as_bytes(path)) for output, path in self._kept.items())  # as the tree is
        try:
            self._scratch.executemany("INSERT INTO outputs VALUES (?, ?)", rows)
        except self._scratch.Error as error:
            raise scratch_error(error) from error
        for output in self._kept:
            for mark in _marks_of(output):
                self._marks[mark >> 3] |= 1 << (mark & 7)
        self._kept.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        self.close()

    def close(self) -> None:
        """Let go of the database, if there is one."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
            self._marks = bytearray()


def _marks_of(output: str) -> tuple[int, int]:
    """The numbers of the two bits for ``output``. Its hash is there already, from the dict."""
    digest = hash(output)
    return digest & ((1 << MARKS_LOG2) - 1), (digest >> MARKS_LOG2) & ((1 << MARKS_LOG2) - 1)


def _as_bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogatepass")


def with_outputs(
    files: Iterable[InputFile], outputs: NamedOutputs, *, one_source: bool, in_walk_order: bool = True
) -> Iterator[tuple[InputFile, tuple[str, ...]]]:
    """Each input with its outputs. Inputs are numbered as they come.

    ``one_source`` (bool): no relpath comes twice, as ``relpaths_are_unique`` tells of sources. ``in_walk_order``
    (bool): the inputs are in the order of ``list_inputs``, a directory's files together.
    Raises ``OutputCollisionError`` when the second of two inputs with one output is drawn, or an input of which two
    outputs are the same. Outputs are remembered only as far as they may come again: not at all, for one directory, or
    all of them; see ``Collisions``.
    """
    scopes = outputs.scopes(one_source=one_source, in_walk_order=in_walk_order)
    remembered = [position for position, scope in enumerate(scopes) if scope is not Scope.NOWHERE]
    by_directory = all(scopes[position] is Scope.DIRECTORY for position in remembered)
    collisions = Collisions()
    current = ""
    try:
        for index, file in enumerate(files):
            paths = outputs.paths_for(file, index)
            if remembered and by_directory:
                parent = file.relpath.rpartition("/")[0]
                if parent != current:
                    collisions.clear()  # a walk gives out a directory's files together
                    current = parent
            for position in remembered:
                first = collisions.add(outputs.place_of(position, paths[position]), file.path)
                if first is not None:
                    raise OutputCollisionError(paths[position], first, file.path)
            yield file, paths
    finally:
        collisions.close()
