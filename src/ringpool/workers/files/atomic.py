"""Files that are there whole or not at all: one atomic write.

                                        the commit point
    write to a staged file -> owner, xattrs, mode -> fsync -> close -> rename -> fsync of the directory
    `-- an error or Ctrl-C anywhere here: the staged file is dropped --'     '-- DurabilityError: the new content stands

What each level promises stands in ``durability.py``, the steps in ``replacement.py``; many files at once: ``batch.py``.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Literal, overload

from ringpool.errors import FileOperationError, TargetExistsError
from ringpool.workers.files.durability import Durability, level_of
from ringpool.workers.files.naming import FilePath, encoded, unusable
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.replacement import HardLinks, Replacement, check_choices, linked_elsewhere, octets
from ringpool.workers.files.stream import AtomicBinaryFile, AtomicTextFile
from ringpool.workers.files.target import Symlinks, refuse_special

_NONE = Durability.NONE


def atomic_write(
    path: FilePath,
    content: bytes | bytearray | memoryview | str,
    *,
    durability: Durability | str = Durability.FULL,
    mode: int | None = None,
    symlinks: Symlinks = "follow",
    hard_links: HardLinks = "split",
    exclusive: bool = False,
    dir_fd: int | None = None,
) -> None:
    """Make ``content`` (text as UTF-8, line ends untouched) the content of the file at ``path``, whole or not at all.

    ``mode`` is the new file's, exactly; without it that of the file that is replaced, else what the umask leaves of
    0666. Owner and extended attributes are kept as far as this process may set them; set-id bits are not. ``symlinks``
    says what happens to a symlink at ``path``. A file with several hard links loses this one to the new content, unless
    ``hard_links`` is ``"refuse"``. With ``exclusive`` the file must not exist
    (``TargetExistsError``). With ``dir_fd`` the path is a name in that open directory, and a symlink there is not
    followed but refused: see ``Contained``.

    Raises ``AtomicWriteError``: the old content stands. ``DurabilityError``: fsync failed; its ``operation`` says
    whether before the rename (the old content stands) or after it (the new one does). ``PathNameError``: the path can
    name no file. With ``none`` the file is overwritten where it stands, and an error, a ``FileOperationError``, may
    leave it torn. Nothing temporary is left but by a kill.
    """
    target, level = encoded(path), level_of(durability)
    if level is _NONE and symlinks != "replace":
        _write_in_place(target, octets(content), mode, symlinks, hard_links, exclusive, dir_fd)
        return
    one = Replacement()
    try:
        try:
            one.begin(target, level, symlinks, hard_links, mode, exclusive, dir_fd)
            one.write(content if isinstance(content, bytes) else octets(content))
            one.finish()
            one.publish()
        except BaseException:
            one.drop()
            raise
    except BaseException as error:
        one.give_up(error)
        raise
    one.leave_directory()


@overload
def atomic_open(
    path: FilePath,
    mode: Literal["wb", "xb"] = "wb",
    *,
    durability: Durability | str = Durability.FULL,
    permissions: int | None = None,
    symlinks: Symlinks = "follow",
    hard_links: HardLinks = "split",
    dir_fd: int | None = None,
) -> AtomicBinaryFile: ...


@overload
def atomic_open(
    path: FilePath,
    mode: Literal["w", "x"],
    *,
    encoding: str = "utf-8",
    errors: str | None = None,
    newline: str | None = None,
    durability: Durability | str = Durability.FULL,
    permissions: int | None = None,
    symlinks: Symlinks = "follow",
    hard_links: HardLinks = "split",
    dir_fd: int | None = None,
) -> AtomicTextFile: ...


def atomic_open(
    path: FilePath,
    mode: Literal["w", "wb", "x", "xb"] = "wb",
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    durability: Durability | str = Durability.FULL,
    permissions: int | None = None,
    symlinks: Symlinks = "follow",
    hard_links: HardLinks = "split",
    dir_fd: int | None = None,
) -> AtomicBinaryFile | AtomicTextFile:
    """A file for writing that becomes the content of ``path`` at its ``commit``, whole or not at all.

    The end of a ``with`` block commits; an exception in it discards, as ``discard`` does, and losing the last reference
    (with a ``ResourceWarning``). It is a file object for everyone who writes to one. ``mode``: ``w``, ``x`` for text
    (``encoding``, ``errors``, ``newline`` as for ``open``), ``wb``, ``xb`` for bytes; with ``x`` the file must not
    exist. ``permissions`` are what ``mode`` is to ``atomic_write``; all else is as there, but that ``none`` means
    ``atomic``.

    Raises what ``atomic_write`` raises; opening, writing and the commit may.
    """
    if mode not in ("w", "wb", "x", "xb"):
        raise ValueError(f"mode is one of 'w', 'wb', 'x', 'xb', not {mode!r}")
    if mode.endswith("b"):
        for name, value in (("encoding", encoding), ("errors", errors), ("newline", newline)):
            if value is not None:
                raise ValueError(f"mode {mode!r} is for bytes, and takes no {name}; for text it is {mode[0]!r}")
    target, level = encoded(path), level_of(durability)
    one = Replacement()
    try:
        try:
            one.begin(target, level, symlinks, hard_links, permissions, mode.startswith("x"), dir_fd)
            return (
                AtomicBinaryFile(one)
                if mode.endswith("b")
                else AtomicTextFile(one, encoding or "utf-8", errors, newline)
            )
        except BaseException:
            one.drop()
            raise
    except BaseException as error:
        one.give_up(error)
        raise


def _write_in_place(
    path: bytes,
    content: bytes | memoryview,
    mode: int | None,
    symlinks: Symlinks,
    hard_links: HardLinks,
    exclusive: bool,
    dir_fd: int | None,
) -> None:
    check_choices(symlinks, hard_links)
    if not path or b"\0" in path or (dir_fd is not None and b"/" in path):
        raise unusable(path, "it names no file")
    # O_NONBLOCK: a pipe, which is refused, must not stop us.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0)
    if symlinks == "refuse" or dir_fd is not None:
        flags |= os.O_NOFOLLOW
    one = Replacement()
    try:
        one.fd = calls.open(path, flags, 0o666 if mode is None else 0o600, dir_fd=dir_fd)
        found = calls.fstat(one.fd)
        refuse_special(path, found)
        if hard_links == "refuse" and found.st_nlink > 1:
            raise linked_elsewhere(path)
        if found.st_size:
            calls.ftruncate(one.fd, 0)
        if found.st_mode & (stat.S_ISUID | stat.S_ISGID):  # the kernel leaves them where root writes
            calls.fchmod(one.fd, stat.S_IMODE(found.st_mode) & ~(stat.S_ISUID | stat.S_ISGID))
        one.write(content)
        if mode is not None:
            calls.fchmod(one.fd, mode)
        one.close_file()
    except FileOperationError:
        raise
    except FileExistsError as error:
        raise TargetExistsError(os.fsdecode(path)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileOperationError(os.fsdecode(path), "write in place", error.errno or errno.EIO, reason) from error
    finally:
        one.close()
