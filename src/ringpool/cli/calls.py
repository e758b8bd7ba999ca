"""From what ``ringpool run`` was told to a job, into the ledger, and back when that job is resumed.

    Call --job_of--> Job          function, parameters, patterns: all that can be wrong with them is said here
     |  ^
     v  |
    {"cwd": ..., "call": {...}}   JSON, the job's ``spec`` in the ledger; what is relative in a call is so to ``cwd``

A job that a Python program has made has no spec: that program resumes it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import Any, cast

import click
import msgspec

from ringpool.cli.options import Call, limits_of
from ringpool.coordinator.inputs import InputFile, list_inputs
from ringpool.coordinator.job import Job
from ringpool.coordinator.ledger import JobInfo, Ledger
from ringpool.coordinator.lists import read_list, read_manifest, relpath_of
from ringpool.errors import JobError, OutputPatternError, RingpoolError, UnknownFunctionError
from ringpool.workers import tasks
from ringpool.workers.retry import RetryPolicy
from ringpool.workers.templates import ITS_OWN, NOT_OF_A_FILE, Template

_UNREPEATABLE = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


class Stored(msgspec.Struct, frozen=True):
    """A job as its ledger has it: where it was started, what it was told, and its number."""

    cwd: str
    call: Call
    id: int


# ---- to a job --------------------------------------------------------------------------------------------------------


def job_of(call: Call, own: Call) -> Job:
    """The job of ``call``, here; recorded, with its files, as that of ``own``, which a resume goes by: whoever has
    some of its files done with other parameters takes them for this job's. Raises ``click.UsageError`` and the errors
    of ``Job`` for what is wrong with it.
    """
    digest = b""
    if own.param != call.param:
        with contextlib.suppress(RingpoolError, click.UsageError):  # the function takes those parameters no more
            digest = job_of(own, own).digest
    import_from_here()
    _check_outputs(call)
    limits = limits_of(call)
    return Job(
        call.function,
        _inputs(call),
        _output(call.out),
        command=call.command,
        params=call.param,
        directory=call.job,
        include=call.include,
        exclude=call.exclude,
        spec=spec_of(own),
        digest=digest,
        durability=call.durability,
        retry=_policy(call),
        attempts_max=call.attempts,
        timeout_s=call.timeout_s,
        memory_limit_bytes=call.memory_limit_bytes,
        nice=call.nice,
        max_tasks_per_child=call.max_tasks_per_child,
        max_failures=limits.max_failures,
        max_failure_share=limits.max_failure_share,
        rate_per_s=call.rate_per_s,
        largest_first=call.largest_first,
        fingerprints=not call.names,
        checksums=call.checksum,
        digests=not call.no_digest,
        grace_s=call.grace_s,
    )


def import_from_here() -> None:
    """Find modules of the current directory first, as ``python -m`` does."""
    if not sys.flags.safe_path and sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())


def _check_outputs(call: Call) -> None:
    """What ``Job`` would find too, in the words of the command line; and parameters that nobody gives."""
    if call.command is not None:
        fields = Template(call.command).fields
        has_dst = any(field.partition(".")[0] == "dst" for field in fields)
        if has_dst and not call.out:
            raise click.UsageError("the command has a {dst}: say where with --out, such as --out 'out/{relpath}'")
        if call.out and not has_dst:
            raise click.UsageError("the command has no {dst}: put one where it is to write, or leave --out away")
        for name in sorted(ITS_OWN.intersection(call.param)):
            raise click.UsageError(f"--param {name}: a command has that from --exec and its files; leave it away")
        for name in call.param:
            if name != "shell":  # nor environment: text is none
                raise click.UsageError(f"--param {name}: a command has none but shell; write it into the command")
        shell = call.param.get("shell")
        if isinstance(shell, str) and shutil.which(shell) is None:
            raise click.UsageError(f"--param shell={shell}: there is no such program; name one that is there")
        return
    assert call.function is not None
    try:
        name, signature = tasks.describe(call.function)
    except SystemExit as end:  # no signal's: there is no pool yet
        reason = f"its module, when it is imported, ends the program ({type(end).__name__}: {end.code})"
        way = 'put what it does as a program under `if __name__ == "__main__":`'
        raise UnknownFunctionError(call.function, f"{reason}; {way}") from None
    parameters = tasks.validate(name, signature, call.param)
    if call.manifest is None:
        tasks.require(name, signature, parameters)
    if signature.needs_output and not call.out:
        raise click.UsageError(f"{name} writes an output: say where with --out, such as --out 'out/{{relpath}}'")
    if call.out and not signature.takes_output:
        raise click.UsageError(f"{name} writes no output, for it has no parameter dst: leave --out away")


def _output(words: tuple[str, ...]) -> str | dict[str, str] | None:
    if not words:
        return None
    if len(words) == 1 and not words[0].partition("=")[0].isidentifier():
        return words[0]
    outputs: dict[str, str] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not equals or not name.isidentifier():
            if len(words) == 1:
                return word
            raise OutputPatternError(word, f"each of several outputs needs a name, such as thumb={word}")
        if name in outputs:
            raise OutputPatternError(word, f"another output is called {name} too; give it a name of its own")
        outputs[name] = pattern
    return outputs


def _inputs(call: Call) -> Any:
    if call.manifest is not None:
        return read_manifest(call.manifest, NOT_OF_A_FILE if call.command is not None else ())
    for word in call.inputs:
        if word == "-" or word.startswith("@"):
            read_list(
                word.removeprefix("@")
            )  # nothing is read yet: a list that is not there is a mistake to be said now
    if call.names:
        return chain.from_iterable([_names(word) for word in call.inputs])
    return list(call.inputs)


def _names(word: str) -> Iterable[InputFile]:
    if word == "-" or word.startswith("@"):
        return read_list(word.removeprefix("@"))
    return (InputFile(word, relpath_of(word)),)


def inputs_ahead(call: Call, job: Job) -> Iterator[InputFile] | None:
    """The inputs once more, to count them; None where that would take them away, or is of no use."""
    if call.manifest is not None or call.names or any(word == "-" or word.startswith("@") for word in call.inputs):
        return None
    bases = job.outputs.bases if job.outputs is not None else ()
    return list_inputs(
        call.inputs,
        exclude_under=bases,
        include=call.include,
        exclude=call.exclude,
        is_known=lambda source: not has_magic(source),  # whether it is, the job finds out
        have_matched=lambda _matches: True,  # the same
    )


def _policy(call: Call) -> RetryPolicy | None:
    if call.retries is None:
        return None
    names = [name.strip() for names in call.retry_on for name in names.split(",")]
    on = tuple([_exception(name) for name in names]) or (Exception,)
    return RetryPolicy(call.retries + 1, call.retry_delay_s if call.retry_delay_s is not None else 0.1, on=on)


def _exception(name: str) -> type[Exception]:
    module, colon, qualname = name.rpartition(":")
    found: Any = None
    try:
        found = importlib.import_module(module) if colon else builtins
        for part in qualname.split("."):
            found = getattr(found, part)
    except AttributeError:
        hint = "" if colon else "; one that is not built in is written module:Class"
        raise click.UsageError(f"--retry-on {name}: there is no such exception{hint}") from None
    except Exception as error:  # a module may raise what it likes while it is imported
        raise click.UsageError(f"--retry-on {name}: {module} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise click.UsageError(f"--retry-on {name}: it is no subclass of Exception")
    return found


# ---- into the ledger, and back ---------------------------------------------------------------------------------------


def spec_of(call: Call) -> bytes:
    """``call`` as a ledger keeps it. Paths of any bytes: JSON escapes what is no text."""
    stored = msgspec.to_builtins(msgspec.structs.replace(call, dry_run=False))
    return json.dumps({"cwd": os.getcwd(), "call": stored}).encode()


def last_job(directory: Path) -> Stored:
    """The job that ran last in ``directory``. Raises ``JobError`` where it cannot be resumed from here."""
    with Ledger.open(directory, create=False, read_only=True) as ledger:
        found = ledger.jobs()
    if not found:
        raise JobError(f"{directory}: no job was begun there; `ringpool run` begins one")
    return stored(found[0], directory)


def stored(job: JobInfo, directory: Path) -> Stored:
    """What is stored of ``job``. Raises ``JobError`` where it cannot be resumed from here."""
    if not job.spec:
        raise JobError(f"{directory}: the last job there was run by a Python program; to resume it, run that again")
    try:
        spec = cast("dict[str, Any]", json.loads(job.spec))
        return Stored(spec["cwd"], msgspec.convert(spec["call"], Call), job.id)
    except (ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        reason = f"how the last job there was started cannot be read ({error}); run its command again instead"
        raise JobError(f"{directory}: {reason}") from None


def require_repeatable(call: Call, directory: Path) -> None:
    """Raise ``click.UsageError`` where the inputs came from somewhere that cannot be read again."""
    if not is_repeatable(call):
        raise click.UsageError(
            f"{directory}: the inputs of its last job came from standard input, which cannot be read again; "
            "run its command again with the list in a file, as @list.txt instead of -"
        )


def is_repeatable(call: Call) -> bool:
    """Whether the inputs can be read again later."""
    return are_repeatable(call.inputs, call.manifest)


def are_repeatable(inputs: Iterable[str], manifest: str | None) -> bool:
    """The same, of what stands in a ledger."""
    lists = [word.removeprefix("@") for word in inputs if word == "-" or word.startswith("@")]
    if manifest is not None:
        lists.append(manifest)
    return not any(path == "-" or path.startswith(_UNREPEATABLE) for path in lists)


def require_same_place(job: Job, directory: Path, shown: str) -> None:
    """Raise ``JobError`` where ``job`` has its ledger elsewhere: its directory was moved, or copied."""
    if not os.path.samefile(job.directory, directory) if job.directory.exists() else True:
        raise JobError(
            f"{shown}: its last job has its ledger in {os.path.abspath(job.directory)}; move it back there, or run its "
            "command again where it is now"
        )
