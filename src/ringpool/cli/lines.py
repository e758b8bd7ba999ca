"""What the command writes, line by line, and how values look in it.

    say          standard error    ringpool: a sentence
    print_line   standard output   a value, an object; at once: whoever reads it may act on it while the run goes on

    a value      as text           as JSON
    None         nothing           null
    bytes        as they are       base64
    a dataclass  str() of it       an object, as msgspec sees it; so with sets, dates, ...
    others       str() of it       what JSON has, else repr() of it
    NaN          nan               "NaN"; so "Infinity", "-Infinity": JSON has no such numbers

One whose str() or repr() raises is said to be one that cannot be shown.

Paths are of any bytes: a line is written as they are, and in JSON the byte e9 is ``\\udce9``, as Python has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import PurePath
from typing import Any

import msgspec

from ringpool.cli.stopping import Stopped, stopper
from ringpool.errors.words import one_line as one_line, printable as printable

AS_FILE = "the same command with the list in a file, as @FILE"  # from where it can be read again

# ---- lines -----------------------------------------------------------------------------------------------------------


def say(sentence: str) -> None:
    """One line on standard error. Paths in it may be of any bytes."""
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(2, _as_bytes(f"ringpool: {printable(sentence)}\n"))


def may_redraw() -> bool:
    """Whether standard error is a terminal on which lines can change."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def print_line(line: str) -> None:
    """``line`` on standard output, at once. Raises as ``written`` does."""
    with written():
        sys.stdout.buffer.write(_as_bytes(line) + b"\n")
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def written() -> Generator[None]:
    """Standard output is written meanwhile. Raises ``Stopped`` where nobody reads it any more, ``JobError`` where it
    cannot be written.
    """
    stopper.is_writing = True
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        if isinstance(error, BrokenPipeError):
            raise Stopped(signal.SIGPIPE) from None
        from ringpool.errors import JobError

        raise JobError(f"standard output: {error.strerror}; make room, or let it go somewhere else") from error
    finally:
        stopper.is_writing = False


def _as_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, which no path has
        return text.encode("utf-8", "backslashreplace")


def counted(n: int, noun: str, nouns: str = "") -> str:
    """``n`` of something, such as ``1 file``, ``2 files``."""
    return f"{n} {noun if n == 1 else nouns or noun + 's'}"


def size_in_words(n_bytes: float) -> str:
    """Such as ``36 B``, ``1.5 kB``, ``2.13 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:  # which is written as 1e+03
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def command(verb: str, directory: str, *words: str) -> str:
    """A command line that a shell takes as it stands: bash, ksh or zsh, where there are control characters in it."""
    where = f"./{directory}" if directory.startswith("-") else directory
    return " ".join(map(_quoted, ["ringpool", verb, where, *words]))


def _quoted(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    from ringpool.workers.templates import ansi_quoted

    return ansi_quoted(os.fsencode(word))


# ---- values ----------------------------------------------------------------------------------------------------------


def as_text(value: object) -> str:
    """A value as one reads it."""
    if value is None:
        return ""
    return os.fsdecode(value) if isinstance(value, bytes) else _shown(str, value)


def as_json(line: dict[str, Any]) -> str:
    """``line`` as a JSON object; what JSON cannot hold of its ``value`` as text."""
    try:
        return json.dumps(line, default=_as_builtin, allow_nan=False)
    except Exception:
        return _as_odd_json(line)


def _as_odd_json(line: dict[str, Any]) -> str:
    try:
        return json.dumps(json.loads(json.dumps(line, default=_as_builtin), parse_constant=str))
    except Exception:  # keys that are no text, a circle, an int too long to be written
        return json.dumps({**line, "value": _shown(repr, line["value"])})


def _as_builtin(value: object) -> object:
    """What json has no notion of, as msgspec sees it (dataclasses, sets, dates, ...); anything else as its repr."""
    try:
        return msgspec.to_builtins(value, enc_hook=_path_or_repr)
    except Exception:
        return _shown(repr, value)


def _shown(how: Callable[[object], str], value: object) -> str:
    """``how(value)``, which may run anything."""
    try:
        return how(value)
    except Exception as error:
        return f"(a value that cannot be shown: {type(error).__name__})"


def _path_or_repr(value: object) -> str:
    return str(value) if isinstance(value, PurePath) else repr(value)
