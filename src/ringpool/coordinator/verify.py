"""What a resume believes of its ledger, and why a file is done again: fingerprint, parameters, outputs, all looked at.

the ledger says                    and on disk                                the file is
nothing                                                                       new
dead                                                                          set aside
failed                                                                        done again
done, by another function          or with other parameters                   done again
done                               its input is not what it was, or gone       done again
done, and has moved its input      nothing is at the input's name              as if the input were there
done                               an output is missing, or not of its size   done again
done                               one was written since, with other content   done again
done (``--verify digest``)         an output's content is not what it was     done again
done                               all is as it was left                      skipped
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import msgspec

from ringpool.coordinator.ledger import Found, Made, State
from ringpool.errors import InputMissingError
from ringpool.workers.files import output
from ringpool.workers.groupcommit import keep_output
from ringpool.workers.jobtasks import CONSUMED, fingerprint

Level = Literal["size", "digest"]
decode_made = msgspec.msgpack.Decoder(list[Made]).decode

SKIPPED = "done and verified"
SET_ASIDE = "set aside: workers died in it again and again"
NEW = "new"


def reason_to_redo(
    found: Found | None,
    source: bytes,
    targets: Sequence[bytes],
    parameters: bytes,
    *,
    verify: Level,
    fingerprints: bool,
    checksums: bool,
) -> str | None:
    """Why the file at ``source`` is to be done (again), in words; None: it need not be."""
    if found is None:
        return NEW
    if found.state == State.FAILED:
        return "it failed before"
    if found.parameters != parameters:
        return "the function or its parameters have changed"
    if fingerprints and not _is_same_input(found, source, checksums, verify):
        return "its input has changed"
    made = decode_made(found.made)
    if [one.path for one in made] != list(targets):
        return "its outputs go elsewhere now"
    for one in made:
        reason = _reason_of_output(one, verify)
        if reason is not None:
            return reason
    return None


def keep_only_copies(found: Found | None, source: bytes) -> None:
    """Before a file is done again whose task had moved its input away: what it has made of that may be the only copy,
    and goes out of the way of what it will make of the file that has the name since.
    """
    if found is None or found.inode != CONSUMED or not os.path.exists(source):
        return
    for one in decode_made(found.made):
        if os.path.lexists(one.path):
            keep_output(one.path, f"what was made of {os.fsdecode(source)} before, perhaps the only copy of it,")


def _is_same_input(found: Found, source: bytes, checksums: bool, verify: Level) -> bool:
    """By its fingerprint; or, where content was recorded and is asked for, by its content, whatever its times are: also
    where they are the same, if digests are to be verified. Of one that its task has moved away, or removed, nothing is
    to be there.
    """
    if found.inode == CONSUMED:
        return not os.path.exists(source)
    try:
        status = os.stat(source)
        has_content = checksums and found.checksum != b""
        is_same = (status.st_size, status.st_mtime_ns, status.st_ino) == (found.size, found.mtime_ns, found.inode)
        if is_same and not (has_content and verify == "digest"):
            return True
        return (
            has_content
            and status.st_size == found.size
            and fingerprint(source, with_checksum=True).checksum == found.checksum
        )
    except (OSError, InputMissingError):
        return False  # its task says what is wrong


def _reason_of_output(made: Made, verify: Level) -> str | None:
    shown = os.fsdecode(made.path)
    try:
        status = os.stat(made.path)
        size = status.st_size
        if size != made.size:
            return f"its output {shown} has {size} bytes instead of {made.size}"
        was_written = made.mtime_ns not in (0, status.st_mtime_ns)  # or copied, or touched
        if was_written and not made.digest:
            return f"its output {shown} was written since, and no digest of it was recorded"
        if was_written or verify == "digest":
            if not made.digest:
                return f"no digest of its output {shown} was recorded"
            if _digest_of(made.path, size) != made.digest:
                return f"the content of its output {shown} has changed"
    except FileNotFoundError:
        return f"its output {shown} is missing"
    except OSError as error:
        return f"its output {shown} cannot be read: {error.strerror}"
    return None


def _digest_of(path: bytes, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return output.digest_of(fd, size)
    finally:
        os.close(fd)
