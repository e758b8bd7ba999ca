"""What the inputs of a run reach: which outputs would be inputs too, of this run or of the next one.

    a source               reaches
    a file                 itself
    a directory, a glob    what its walk would find, should it be there: as links are written, and as they lead
    a list                 not looked at

    a link in a walk       what is found by it among the outputs; from when that link is found, before any file beside
                           it, or below, is given out

Directories of outputs, and what is below them, are reached only by a walk that begins there, or comes there by a link.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ringpool.coordinator.inputs import OWN_DIRECTORY, Filters, Glob, is_glob, list_of, place_of, split_glob

DIRECTORIES_KNOWN = 1024


class _Walk(NamedTuple):
    """A walk below ``root``, which is absolute and ends in a slash, as are those that it does not enter, ``left_out``.
    ``relpath``: what it calls its root, empty or with a slash at its end.
    """

    root: str
    relpath: str
    left_out: tuple[str, ...]
    glob: Glob | None
    filters: Filters | None

    def finds(self, path: str) -> bool:
        """Whether it finds a file at ``path``, which is below its root, should there be one."""
        if path.startswith(self.left_out) or f"/{OWN_DIRECTORY}/" in path:
            return False
        relpath = self.relpath + path[len(self.root) :]
        if self.glob is not None and not self.glob.matches(relpath):
            return False
        return self.filters is None or self.filters.take(relpath)


class Reach:
    """What ``sources`` reach of what is below ``places``, those of the outputs.

    ``include``, ``exclude``: the filters of walks; ``names_only``: no source is walked. Links are asked for once: what
    another run has found is nothing to this one.
    """

    def __init__(
        self,
        sources: Iterable[str | Path],
        places: Sequence[Path],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        names_only: bool = False,
    ) -> None:
        self._real = functools.lru_cache(maxsize=DIRECTORIES_KNOWN)(_real)
        self._filters = Filters(include, exclude) if include or exclude else None
        self._files: set[str] = set()
        self._walks: dict[str, list[_Walk]] = {}  # by root; of paths as links lead
        self._spelled: dict[str, list[_Walk]] = {}  # and as they are written
        ways: tuple[tuple[dict[str, list[_Walk]], Callable[[str], str]], ...] = (
            (self._walks, _real),
            (self._spelled, place_of),
        )
        bases = [[os.path.join(spell(os.fspath(place)), "") for place in places] for _, spell in ways]
        self._bases = bases[0]
        for named in [os.fspath(source) for source in sources if places and list_of(source) is None]:
            is_directory = os.path.isdir(named)
            if not is_directory and not is_glob(named):
                self._files.add(self._in_real_directory(_spelled(named)))
            elif not names_only:
                prefix, parts = (named, []) if is_directory else split_glob(named)
                glob = Glob(parts, takes_dots=False) if parts else None
                for (walks, spell), those in zip(ways, bases, strict=True):
                    self._add(walks, os.path.join(spell(prefix), ""), "", those, glob)

    def _add(self, walks: dict[str, list[_Walk]], root: str, relpath: str, bases: list[str], glob: Glob | None) -> None:
        if any(root.startswith(base) for base in bases):  # others are not entered, or lie elsewhere
            left_out = tuple([base for base in bases if base.startswith(root) and base != root])
            walk = _Walk(root, relpath, left_out, glob, self._filters)
            known = walks.setdefault(root, [])
            known += [walk] if walk not in known else []

    def follow(self, path: str, relpath: str, glob: Glob | None) -> None:
        """A walk, of a glob perhaps, is to enter the directory ``relpath``, at ``path``, which is a link."""
        root = os.path.join(os.path.realpath(path), "")
        if root not in self._bases:  # which it would not enter
            self._add(self._walks, root, relpath, self._bases, glob)

    def takes(self, path: str) -> bool:
        """Whether an output at that absolute path would be an input, now or of the next run."""
        if not self._files and not self._walks and not self._spelled:
            return False
        real = self._in_real_directory(path)
        return real in self._files or _finds(self._walks, real) or _finds(self._spelled, path)

    def _in_real_directory(self, path: str) -> str:
        directory, slash, name = path.rpartition("/")
        return self._real(directory or "/").rstrip("/") + slash + name


def _finds(walks: dict[str, list[_Walk]], path: str) -> bool:
    at = 0
    while walks and (at := path.find("/", at) + 1):
        for walk in walks.get(path[:at], ()):
            if walk.finds(path):
                return True
    return False


def _real(path: str) -> str:
    """Without links; as it is, where no file can have it: that is told when its turn comes."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return path


def _spelled(path: str) -> str:
    """An absolute path, whose last name is not looked at."""
    directory, name = os.path.split(path)
    return os.path.join(place_of(directory or "."), name)


def roots_of(sources: Iterable[str | Path]) -> list[str]:
    """The directories that the walks of ``sources`` begin in, and those of files that they name; none of lists. Without
    links, each ending in a slash, none below another.
    """
    directories: set[str] = set()
    for source in [os.fspath(source) for source in sources if list_of(source) is None]:
        directory = source
        if not os.path.isdir(source):
            directory = split_glob(source)[0] if is_glob(source) else os.path.dirname(source)
        directories.add(directory or ".")
    roots: list[str] = []
    for root in sorted(os.path.join(_real(directory), "") for directory in directories):
        if not roots or not root.startswith(roots[-1]):
            roots.append(root)
    return roots
