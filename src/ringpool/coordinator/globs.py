"""Globs, and the filters that are made of them: what says of a name, before anybody looks, whether a walk takes it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import translate
from typing import TypeAlias

FILTERED_KNOWN_MAX = 4096
_MAGIC = re.compile(r"[*?[]")


def may_be_glob(source: str) -> bool:
    """Whether there is one of ``*?[`` in it."""
    return _MAGIC.search(source) is not None


def is_glob(source: str) -> bool:
    """Whether ``source`` is one: nothing has its name."""
    return not os.path.lexists(source) and may_be_glob(source)


class Glob:
    """A glob, as a machine that reads a path name by name.

    State i says that the names so far fit the first i parts of the pattern; a ``**`` may stay in its state. As in a
    shell, a name's leading dot is matched only by a dot, unless ``takes_dots``.
    """

    def __init__(self, parts: list[str], *, takes_dots: bool) -> None:
        if parts[-1:] == ["**"]:
            parts = [*parts, "*"]  # below it, not itself
        self._takes_dots = takes_dots
        self._parts = [_matcher(part, takes_dots) for part in parts]
        self._end = len(parts)
        self.start = self._skipping({0}) - {self._end}

    def states_below(self, states: frozenset[int], name: str) -> frozenset[int]:
        """The states in the directory ``name``; none where nothing below it can match."""
        reached: set[int] = set()
        for state in states:
            matches = self._parts[state]
            if matches is None:
                if self._takes_dots or not name.startswith("."):
                    reached.add(state)
            elif matches(name):
                reached.add(state + 1)
        return self._skipping(reached) - {self._end}

    def accepts(self, states: frozenset[int], name: str) -> bool:
        """Whether the pattern is matched by the path that led to ``states`` and ends in ``name``."""
        matches = self._parts[-1] if self._end - 1 in states else None
        return matches is not None and bool(matches(name))

    def matches(self, relpath: str) -> bool:
        """Whether the pattern is matched by the file ``relpath``."""
        *directories, name = relpath.split("/")
        return self.accepts(functools.reduce(self.states_below, directories, self.start), name)

    def _skipping(self, states: set[int]) -> frozenset[int]:
        """``states`` and those which they lead to where a ``**`` stands for nothing."""
        reached = set(states)
        for state in states:
            while state < self._end and self._parts[state] is None:
                state += 1
                reached.add(state)
        return frozenset(reached)


def split_glob(source: str) -> tuple[str, list[str]]:
    """Where the walk of a glob begins, and the parts of what is to match below that.

    One that ends in a slash stands for all that is in the directories which it matches.
    """
    magic = _MAGIC.search(source)
    cut = source.rfind("/", 0, magic.start() if magic else len(source)) + 1
    parts = [part for part in source[cut:].split("/") if part]
    return source[:cut], [*parts, "**"] if source.endswith("/") else parts


def _matcher(part: str, takes_dots: bool) -> Callable[[str], object] | None:
    """What says whether a name fits ``part`` of a glob; None for ``**``, which any fits."""
    if part == "**":
        return None
    matches = re.compile(translate(part)).match
    if takes_dots or part.startswith("."):
        return matches
    return lambda name: not name.startswith(".") and matches(name)


_Readers: TypeAlias = tuple[Callable[[str], bool], Callable[[str], bool], Callable[[str], bool]]


class Filters:
    """What is taken of a directory's names: those that match an ``include``, if there are any, and no ``exclude``."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._includes_all = not include
        self._include = [_filter(pattern, below=True) for pattern in include]
        self._exclude = [_filter(pattern) for pattern in exclude if not pattern.endswith("/")]
        self._exclude_directories = [*self._exclude, *(_filter(each) for each in exclude if each.endswith("/"))]
        self._entered: dict[str, bool] = {}
        self._last: tuple[str, _Readers] | None = None  # of the directory that was asked for last

    def take(self, relpath: str) -> bool:
        """Whether a walk finds the file ``relpath``."""
        directory, slash, name = relpath.rpartition("/")
        return self.enters(directory + slash) and bool(self.keep(directory + slash, [name], [])[0])

    def enters(self, relpath: str) -> bool:
        """Whether a walk comes to that directory, which has a slash at its end; the root's is empty."""
        if not relpath:
            return True
        known = self._entered.get(relpath)
        if known is None:
            parent, slash, name = relpath[:-1].rpartition("/")
            known = self.enters(parent + slash) and bool(self.keep(parent + slash, [], [name])[1])
            if len(self._entered) >= FILTERED_KNOWN_MAX:
                self._entered.clear()
            self._entered[relpath] = known
        return known

    def keep(self, relpath: str, files: list[str], subdirectories: list[str]) -> tuple[list[str], list[str]]:
        """Those to take of the names in the directory ``relpath``, which is empty or ends in a slash."""
        included, excluded, left_out = self._readers(relpath)
        kept = [name for name in files if (self._includes_all or included(name)) and not excluded(name)]
        return kept, [name for name in subdirectories if not left_out(name)]

    def _readers(self, relpath: str) -> _Readers:
        """What ``include`` matches in that directory, and ``exclude``, of files and of directories."""
        if self._last is None or self._last[0] != relpath:
            parents = relpath.split("/")[:-1]
            patterns = (self._include, self._exclude, self._exclude_directories)
            included, excluded, left_out = [_any(each, parents) for each in patterns]
            self._last = relpath, (included, excluded, left_out)
        return self._last[1]


def _filter(pattern: str, *, below: bool = False) -> Glob:
    """``pattern`` as a glob; ``below``: one that ends in a slash stands for what is below the directory."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if "/" not in pattern.rstrip("/"):
        parts = ["**", *parts] if parts else []
    if below and pattern.endswith("/"):
        parts.append("**")
    return Glob(parts, takes_dots=True)


def _any(globs: list[Glob], parents: list[str]) -> Callable[[str], bool]:
    """What says whether a name in the directory below ``parents`` is matched by one of ``globs``."""
    reading: list[tuple[Glob, frozenset[int]]] = []
    for glob in globs:
        states = glob.start
        for parent in parents:
            states = glob.states_below(states, parent)
        if states:
            reading.append((glob, states))
    return lambda name: any(glob.accepts(states, name) for glob, states in reading)
