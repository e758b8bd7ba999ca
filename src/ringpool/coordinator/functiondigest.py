"""What is done to each file of a job, in 16 bytes: where they change, all files are done again."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from hashlib import blake2b
from typing import Any

import msgspec

from ringpool.workers import tasks
from ringpool.workers.jobtasks import COMMAND

encode_sorted = functools.partial(msgspec.msgpack.encode, order="deterministic", enc_hook=repr)


def function_digest(name: str, parameters: dict[str, Any]) -> bytes:
    """What is done to each file, in 16 bytes: the function, by its name and its own source, and its parameters."""
    return blake2b(encode_sorted((name, _source_of(name), parameters)), digest_size=16).digest()


def _source_of(name: str) -> str:
    """The text of a function without comments, and in one form: what it does, as far as it stands in itself."""
    if name == COMMAND:
        return ""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(tasks.resolve(name))))))
    except (OSError, TypeError, SyntaxError, ValueError):  # a builtin, or typed at a prompt
        return ""
