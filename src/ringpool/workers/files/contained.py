"""Containment: paths relative to a base, which never lead out of it, whatever is renamed or linked meanwhile.

    Contained(base).open_parent(b"a/b/name")     -->   a descriptor of <base>/a/b, and b"name"
                                                      |
                    all that follows is done by        atomic_write(name, ..., dir_fd=fd), calls.unlink(name, dir_fd=fd)

A path that was checked as text proves nothing: a symlink may take a directory's place between the check and the open.
So the way is walked by descriptors, and the check is the open.

    way                            where
    openat2(2), RESOLVE_BENEATH    Linux 5.6 and newer: the kernel stays below the base
    one component after another    before that, where a sandbox forbids openat2, and where renames elsewhere disturb it
                                   again and again: O_NOFOLLOW, links read by us, ``..`` goes back to a descriptor

    refused                                                                   with
    "", a NUL byte, a component over 255 bytes, names of ringpool's own       PathNameError
    an absolute path, "..", a symlink that leads out                          PathOutsideError

A symlink with an absolute target counts as leading out, even if it points back in. One that stays inside is followed,
also as the last component, so that the name that is returned is no link unless one was put there since: what is then
done by that name must not follow it, as ``atomic_write`` with ``dir_fd`` does not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ringpool.errors import FileOperationError, PathNameError, PathOutsideError
from ringpool.workers.files.durability import close_quietly, make_durable
from ringpool.workers.files.naming import FilePath, absolute, check_path, encoded, is_staging_name
from ringpool.workers.files.oslayer import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, calls

OWN_DIRECTORY = b".ringpool"
LINKS_MAX = 40  # as in the kernel, path_resolution(7)
TRIES_MAX = 16  # of openat2, disturbed by renames, before we walk

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS


class Contained:
    """The paths below ``base``, which is looked up at each call, its own symlinks followed.

    Paths are str, bytes or ``Path``. Every method raises ``PathNameError``, ``PathOutsideError`` (see the table above),
    or ``FileOperationError`` where a directory cannot be opened or made.
    """

    def __init__(self, base: FilePath) -> None:
        self.base = absolute(encoded(base))

    def path(self, relative: FilePath) -> bytes:
        """The absolute path, checked like the others; for locks and messages. What is on its way may be missing."""
        parts = self._parts(relative)
        path = os.path.join(self.base, *parts)
        try:
            fd, _ = self.open_parent(relative)
            close_quietly(fd)
        except FileOperationError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
        return path

    def open_parent(self, relative: FilePath, *, create: bool = False, follow: bool = True) -> tuple[int, bytes]:
        """The directory that ``relative`` is in, as a descriptor for the caller to close, and the name there.

        With ``create`` missing directories are made, and are on disk when this returns. Without ``follow`` the name may
        be that of a symlink, which is not looked at: to remove or rename the link itself.
        """
        parts = self._parts(relative)
        base_fd = self._open_base()
        try:
            for _ in range(LINKS_MAX + 1):
                fd = self._open_directory(base_fd, parts[:-1], create)
                try:
                    link = _link(fd, parts[-1]) if follow else None
                except BaseException:
                    close_quietly(fd)
                    raise
                if link is None:
                    return fd, parts[-1]
                close_quietly(fd)
                parts = [*parts[:-1], *self._steps(link)]
                if parts[-1] == b"..":
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        except FileOperationError:
            raise
        except OSError as error:
            raise self._error(relative, error) from error
        finally:
            close_quietly(base_fd)

    def open_directory(self, relative: FilePath = b".", *, create: bool = False) -> int:
        """The directory at ``relative`` (``"."``: the base), as a descriptor for the caller to close.

        It may end with a slash.
        """
        parts = self._parts(relative, of_directory=True)
        base_fd = self._open_base()
        try:
            return self._open_directory(base_fd, parts, create)
        except FileOperationError:
            raise
        except OSError as error:
            raise self._error(relative, error) from error
        finally:
            close_quietly(base_fd)

    def _parts(self, relative: FilePath, *, of_directory: bool = False) -> list[bytes]:
        """The components, checked as text; none for the base."""
        path = encoded(relative)
        check_path(path)
        shown = os.fsdecode(path)
        if path.startswith(b"/"):
            raise PathOutsideError(shown, "use the path", errno.EXDEV, "it is absolute; give it relative to the base")
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise PathOutsideError(shown, "use the path", errno.EXDEV, "it holds '..'")
        if not of_directory and (not parts or path.endswith((b"/", b"/."))):
            raise PathNameError(shown, "use the path", errno.EISDIR, "it names a directory")
        if any(part == OWN_DIRECTORY or is_staging_name(part) for part in parts):
            raise PathNameError(shown, "use the path", errno.EINVAL, "ringpool keeps such names for itself")
        return parts

    def _steps(self, link: bytes) -> list[bytes]:
        """The components of a symlink's target."""
        if link.startswith(b"/"):
            raise OSError(errno.EXDEV, "a symbolic link leads out of the base")
        return [part for part in link.split(b"/") if part not in (b"", b".")] or [b".."]

    def _open_base(self) -> int:
        try:
            return calls.open(self.base, _DIRECTORY)
        except OSError as error:
            raise self._error(self.base, error) from error

    def _open_directory(self, base_fd: int, parts: Sequence[bytes], create: bool) -> int:
        """The directory at ``parts`` below the base. Raises ``OSError``."""
        try:
            fd = _open_beneath(base_fd, parts)
        except FileNotFoundError:
            if not create or not parts:
                raise
            fd = self._make_directory(base_fd, parts)
        if create and parts:
            try:
                make_durable(fd, os.path.join(self.base, *parts))
            except BaseException:
                close_quietly(fd)
                raise
        return fd

    def _make_directory(self, base_fd: int, parts: Sequence[bytes]) -> int:
        above = self._open_directory(base_fd, parts[:-1], create=True)
        try:
            calls.mkdir(parts[-1], 0o777, dir_fd=above)
        except FileExistsError:
            pass  # a neighbour was faster; or it is a link to nowhere, which is not followed here
        finally:
            close_quietly(above)
        return _open_beneath(base_fd, parts)

    def _error(self, relative: FilePath, error: OSError) -> FileOperationError:
        shown = os.fsdecode(os.path.join(self.base, encoded(relative)))
        number, reason = error.errno or errno.EIO, error.strerror or str(error)
        if number == errno.EXDEV:
            return PathOutsideError(shown, "open its directory", number, "a symbolic link leads out of the base")
        return FileOperationError(shown, "open its directory", number, reason)


def _link(fd: int, name: bytes) -> bytes | None:
    """Where the symlink ``name`` in the open directory leads; None: there is no link of that name."""
    try:
        return calls.readlink(name, dir_fd=fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # EINVAL: it is something else
            raise
    return None


def _open_beneath(base_fd: int, parts: Sequence[bytes]) -> int:
    """A directory below ``base_fd``. Raises ``OSError``: EXDEV where a link leads out, ELOOP where links turn round."""
    path = b"/".join(parts) or b"."
    for _ in range(TRIES_MAX):
        try:
            return calls.openat2(path, _DIRECTORY, base_fd, _BENEATH)
        except OSError as error:
            if error.errno == errno.EAGAIN:  # something was renamed, anywhere, while ``..`` was looked up
                continue
            if error.errno in (errno.ENOSYS, errno.EPERM):
                break
            raise
    return _walk(base_fd, parts)


def _walk(base_fd: int, parts: Sequence[bytes]) -> int:
    """What openat2 does, component by component: the same results, and the same errors."""
    left = list(reversed(parts))
    way = [calls.open(b".", _DIRECTORY, dir_fd=base_fd)]  # the directories from the base to where we are
    n_links = 0
    try:
        while left:
            part = left.pop()
            if part == b"..":
                if len(way) == 1:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
                close_quietly(way.pop())
                continue
            try:
                way.append(calls.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=way[-1]))
            except NotADirectoryError:
                link = _link(way[-1], part)
                if link is None:
                    raise
                n_links += 1
                if n_links > LINKS_MAX:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
                if link.startswith(b"/"):
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV)) from None
                left.extend(step for step in reversed(link.split(b"/")) if step not in (b"", b"."))
        return way.pop()
    finally:
        for fd in way:
            close_quietly(fd)
