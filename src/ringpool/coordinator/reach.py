"""What the inputs of a run reach: which outputs would be inputs too, of this run or of the next one.

    a source               reaches
    a file                 itself
    a directory, a glob    what its walk would find, should it be there: as links are written, and as they lead
    a list                 not looked at

    a link in a walk       what is found by it among the outputs, now or once outputs are there; from when that link
                           is found, before any file beside it, or below, is given out

It also says which links among the outputs lead to where inputs were found by links: they are not to be followed.

Directories of outputs, and what is below them, are reached only by a walk that begins there, or comes there by a link.
An output may be anywhere: links among the outputs lead elsewhere.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ringpool.coordinator.globs import Filters, Glob, is_glob, split_glob
from ringpool.coordinator.inputs import OWN_DIRECTORY, list_of, place_of

DIRECTORIES_KNOWN_MAX = 1024
LED_TO_MAX = 16_384
_SLASH = re.compile("/")


class _Walk(NamedTuple):
    """A walk below a root, which it calls ``relpath``: empty, or with a slash at its end. It does not enter
    ``left_out``, absolute and with a slash as well.
    """

    relpath: str
    left_out: tuple[str, ...]
    glob: Glob | None
    filters: Filters | None

    def finds(self, relpath: str) -> bool:
        """Whether it takes a file of that name, should there be one."""
        if self.glob is not None and not self.glob.matches(relpath):
            return False
        return self.filters is None or self.filters.take(relpath)


_Walks: TypeAlias = dict[str, list[_Walk]]


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
        self._filters = Filters(include, exclude) if include or exclude else None
        self._files: set[str] = set()
        self._walks: _Walks = {}  # by root; of paths as links lead
        self._spelled: _Walks = {}  # and as they are written
        self._known: dict[str, tuple[str, list[tuple[_Walk, str]]]] = {}  # directories, see ``_find_out``
        self._entered: set[str] = set()  # directories that links lead to; all with a slash, here and below
        self._taken_in: set[str] = set()  # those of files that links lead to
        self._is_anywhere = False  # there are too many of both to be remembered
        ways: tuple[tuple[_Walks, Callable[[str], str]], ...] = ((self._walks, _real), (self._spelled, place_of))
        bases = [tuple(os.path.join(spell(os.fspath(place)), "") for place in places) for _, spell in ways]
        self._bases = bases[0]
        self._real_of = real_of = functools.lru_cache(maxsize=DIRECTORIES_KNOWN_MAX)(_real)
        for named in [os.fspath(source) for source in sources if places and list_of(source) is None]:
            is_directory = os.path.isdir(named)
            if not is_directory and not is_glob(named):
                directory, name = os.path.split(named)
                self._files.add(os.path.join(real_of(directory or "."), name))
                if os.path.islink(named):
                    real = self._led_to(named)
                    self._files.add(real)
                    self._taken_in.add(os.path.join(os.path.dirname(real), ""))
            elif not names_only:
                prefix, parts = (named, []) if is_directory else split_glob(named)
                glob = Glob(parts, takes_dots=False) if parts else None
                for (walks, spell), those in zip(ways, bases, strict=True):
                    self._add(walks, os.path.join(spell(prefix), ""), "", those, glob)

    def _add(self, walks: _Walks, root: str, relpath: str, bases: Sequence[str], glob: Glob | None) -> None:
        left_out = tuple([base for base in bases if base.startswith(root) and base != root])
        walk = _Walk(relpath, left_out, glob, self._filters)
        known = walks.setdefault(root, [])
        known += [walk] if walk not in known else []
        self._known.clear()

    def follow(self, path: str, relpath: str, glob: Glob | None) -> None:
        """A walk, of a glob perhaps, has found a link at ``path``, and is to take the file to which that leads, or with
        a slash at the end, to enter the directory.
        """
        if not self._bases:
            return
        real = self._led_to(path.rstrip("/"))
        self._note(path, relpath, real, glob)
        if not real.startswith(self._bases):
            return
        if not path.endswith("/"):
            self._files.add(real)
        elif real + "/" not in self._bases:  # which it would not enter
            self._add(self._walks, real + "/", relpath, self._bases, glob)

    def _note(self, path: str, relpath: str, real: str, glob: Glob | None) -> None:
        """That inputs are where the link leads, if anything is there, and the walk takes it."""
        if len(self._taken_in) + len(self._entered) >= LED_TO_MAX:
            self._is_anywhere = True  # from then on, links among the outputs lead to inputs
        elif not path.endswith("/"):
            if os.path.exists(path):
                self._taken_in.add(os.path.join(os.path.dirname(real), ""))
        elif (
            os.path.isdir(path)
            and (self._filters is None or self._filters.enters(relpath))
            and (glob is None or functools.reduce(glob.states_below, relpath[:-1].split("/"), glob.start))
        ):
            self._entered.add(os.path.join(real, ""))

    def _led_to(self, link: str) -> str:
        """Where ``link`` leads: of many in a directory, nearly all to few others."""
        try:
            target = os.path.join(os.path.dirname(link), os.readlink(link))
        except (OSError, ValueError):
            return _real(link)
        directory, name = os.path.split(target)
        found = os.path.join(self._real_of(directory or "."), name)
        return _real(link) if name in ("", ".", "..") or os.path.islink(found) else found

    def takes(self, path: str) -> bool:
        """Whether an output at that absolute path would be an input, now or of the next run."""
        directory, slash, name = path.rpartition("/")
        known = self._known.get(directory)
        if known is None:
            if len(self._known) >= DIRECTORIES_KNOWN_MAX:
                self._known.clear()
            known = self._known[directory] = self._find_out(directory + slash)
        real, walks = known
        return real + name in self._files or any(walk.finds(relpath + name) for walk, relpath in walks)

    def leads_to_inputs(self, output: str) -> bool:
        """Whether what stands at that absolute path is a link to a place where others have found inputs by links."""
        if not (self._taken_in or self._entered) or not os.path.islink(output):
            return False
        if self._is_anywhere:
            return True
        directory = os.path.join(os.path.dirname(_real(output)), "")
        above = (directory[: slash.end()] for slash in _SLASH.finditer(directory))
        return directory in self._taken_in or any(each in self._entered for each in above)

    def _find_out(self, directory: str) -> tuple[str, list[tuple[_Walk, str]]]:
        """Where a directory is, without links, and the walks that come there, by which relpath; all with a slash."""
        real = os.path.join(_real(directory), "")
        found: list[tuple[_Walk, str]] = []
        for walks, place in ((self._walks, real), (self._spelled, directory)):
            at = 0
            while (at := place.find("/", at) + 1) and f"/{OWN_DIRECTORY}/" not in place:
                for walk in walks.get(place[:at], ()):
                    if not place.startswith(walk.left_out):
                        found.append((walk, walk.relpath + place[at:]))
        return real, found


def _real(path: str) -> str:
    """Without links; as it is, where no file can have it: that is told when its turn comes."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return path


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
