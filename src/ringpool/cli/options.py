"""The options of ``run``, ``resume`` and ``retry``, as the command line, a file of settings or a ledger give them.

    defaults of Call  <--  ringpool.toml  <--  what the command line says         run
    the ledger's Call <--------------------  what the command line says           resume, retry

    written as               is
    512M, 2G, 1048576        bytes; K M G T are powers of 1024, a B or iB may follow
    10, 5%                   failures: so many, or such a share of the files
    NAME=VALUE               a pair; once for each name
    OSError,mine:Transient   exceptions: builtins, or module:Class

A ``Call`` is what all of it comes to. Its fields are called as the options are, with their units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import click
import msgspec
from click.core import ParameterSource

from ringpool.shm import layout

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What ``ringpool run`` was told. ``None``: the job's own default."""

    function: str | None = None
    command: str | None = None
    inputs: tuple[str, ...] = ()
    manifest: str | None = None
    out: tuple[str, ...] = ()
    param: dict[str, Any] = {}
    job: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    workers: int | None = None
    attempts: int = 3
    retries: int | None = None
    retry_delay_s: float | None = None
    retry_on: tuple[str, ...] = ()
    timeout_s: float | None = None
    memory_limit_bytes: int | None = None
    nice: int = 0
    max_tasks_per_child: int | None = None
    max_failures: str | None = None
    keep_going: bool = True
    rate_per_s: float | None = None
    largest_first: bool = False
    durability: str = "full"
    checksum: bool = False
    no_digest: bool = False
    names: bool = False
    verify: str = "size"
    dry_run: bool = False
    grace_s: float = 10.0
    quiet: bool = False
    json: bool = False


# ---- what an option's text means -------------------------------------------------------------------------------------


class Filled(click.types.StringParamType):
    """Text that is not empty, as that of a shell's unset variable is; ``remedy``: what to write instead."""

    def __init__(self, name: str, remedy: str) -> None:
        self.name = name
        self._remedy = remedy

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Raises ``click.BadParameter``, which names the option."""
        if not value:
            self.fail(f"it is empty; {self._remedy}", param, ctx)
        return super().convert(value, param, ctx)


class Size(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  (generic in some versions)
    """Bytes, an int: ``512M``."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises ``click.BadParameter``, which names the option."""
        match = _SIZE.fullmatch(str(value).strip())
        n_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
        if n_bytes < 1:
            self.fail(f"{value!r} is no size; write bytes, or such as 512M, 2G", param, ctx)
        return n_bytes


class Number(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  (generic in some versions)
    """A float that is finite, and more than 0; or, where ``or_zero``, not less."""

    def __init__(self, name: str, *, or_zero: bool = False) -> None:
        self.name = name
        self._or_zero = or_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raises ``click.BadParameter``, which names the option."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0 or (number == 0 and not self._or_zero):
            wanted = "a number, 0 or more" if self._or_zero else "a number that is more than 0"
            self.fail(f"{value!r} is not {wanted}", param, ctx)
        return number


class FailureLimit(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  (generic in some versions)
    """How many failures are too many, a str: ``10`` or ``5%``."""

    name = "N|P%"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Raises ``click.BadParameter``, which names the option."""
        text = str(value).strip()
        share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text, re.ASCII)
        if share is not None and float(share[1]) <= 100:
            return f"{share[1]}%"
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            self.fail(f"{value!r} is neither a number of files, such as 10, nor a share from 0% to 100%", param, ctx)
        return text


class ExceptionNames(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  (generic in some versions)
    """Names of exceptions with commas in between; a str, looked up later."""

    name = "NAMES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Raises ``click.BadParameter``, which names the option."""
        for name in str(value).split(","):
            if not re.fullmatch(r"\s*(?:[\w.]+:)?[\w.]+\s*", name):
                self.fail(f"{name!r} is no name of an exception; write OSError, or module:Class", param, ctx)
        return str(value)


class Limits(NamedTuple):
    """What ``--max-failures`` comes to: one of both, or none."""

    max_failures: int | None
    max_failure_share: float | None


def limits_of(call: Call) -> Limits:
    """After how many failures a job stops."""
    if call.max_failures is None:
        return Limits(None if call.keep_going else 0, None)
    if call.max_failures.endswith("%"):
        return Limits(None, float(call.max_failures[:-1]) / 100)
    return Limits(int(call.max_failures), None)


def pairs_of(option: str, words: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE``, each name once. Raises ``click.UsageError``, which names ``option``."""
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise click.UsageError(f"{option} {word!r} is not of the form NAME=VALUE")
        if name in pairs:
            raise click.UsageError(f"{option} {name} is given twice")
        pairs[name] = value
    return pairs


# ---- the options -----------------------------------------------------------------------------------------------------


def _option(name: str, field: str = "", **more: Any) -> Callable[[Any], Any]:
    return click.option(name, *([field] if field else []), **more)


DIRECTORY = Filled("DIR", "write . for the current directory")
_GLOB = Filled("GLOB", "write one such as '*.jpg'")
PLACES = (
    _option("--out", metavar="PATTERN", multiple=True, help="Where outputs go; NAME=PATTERN for each of several."),
    _option("--job", type=DIRECTORY, help="Where the ledger is. Default: where outputs go, or else here."),
    _option(
        "--manifest",
        type=Filled("FILE", "name a file"),
        help="Inputs from CSV or JSON lines, with parameters for each.",
    ),
)
WAYS = (
    _option("--param", metavar="NAME=VALUE", multiple=True, help="A parameter of the function."),
    _option("--include", type=_GLOB, multiple=True, help="Of what a walk finds, only what matches one of these."),
    _option("--exclude", type=_GLOB, multiple=True, help="... and nothing that matches one of these."),
    _option("--names/--no-names", help="Inputs are names of anything, not files."),
    _option("--largest-first/--no-largest-first", help="List all inputs, then begin with the largest."),
    _option(
        "--workers", metavar="N", type=click.IntRange(1, layout.WORKERS_MAX), help="Processes. Default: one per core."
    ),
    _option("--nice", metavar="N", type=click.IntRange(0, 19), help="Added to their niceness."),
    _option("--max-tasks-per-child", metavar="N", type=click.IntRange(1), help="A worker is replaced after so many."),
    _option(
        "--memory-limit",
        "memory_limit_bytes",
        type=Size(),
        help="A worker with more is killed: 512M, 2G. What --exec starts is not counted.",
    ),
    _option("--timeout", "timeout_s", type=Number("S"), help="A file that takes longer fails."),
    _option("--rate", "rate_per_s", type=Number("N"), help="Files begun in a second, at most."),
    _option(
        "--attempts",
        metavar="N",
        type=click.IntRange(1, layout.ATTEMPT_MAX),
        help="Tries of a file whose workers die. Default: 3.",
    ),
    _option(
        "--retries", metavar="N", type=click.IntRange(0, 1_000_000), help="More calls where one raises. Default: 0."
    ),
    _option(
        "--retry-delay", "retry_delay_s", type=Number("S", or_zero=True), help="... after S, 2 S, 4 S. Default: 0.1."
    ),
    _option("--retry-on", type=ExceptionNames(), multiple=True, help="... for these errors. Default: all."),
    _option("--max-failures", type=FailureLimit(), help="With more, no new file is begun."),
    _option("--keep-going/--no-keep-going", help="Whether others go on when a file fails. Default: they do."),
    _option(
        "--durability",
        type=click.Choice(["none", "atomic", "data", "full"]),
        help="What has reached the disk when a file counts as done. Default: full.",
    ),
    _option(
        "--checksum/--no-checksum", help="Keep digests of inputs: one that was only touched, or copied, is the same."
    ),
    _option("--no-digest/--digest", help="Whether to record no digests of outputs. Default: they are."),
    _option(
        "--verify",
        type=click.Choice(["size", "digest"]),
        help="What is looked at of outputs that are done. Default: size.",
    ),
    _option("--dry-run", is_flag=True, help="Say what would be done with each file, and why."),
    _option("--grace", "grace_s", type=Number("S", or_zero=True), help="For running files, after Ctrl-C. Default: 10."),
    _option("--quiet/--no-quiet", help="No progress and no summary; failures are listed all the same."),
    _option("--json/--no-json", help="One JSON object per file on standard output, beside what functions print there."),
)


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[_Command], _Command]:
    """A decorator that gives ``options`` to a command."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def given(context: click.Context) -> dict[str, Any]:
    """What the command line says, by the fields of ``Call``. Raises ``click.UsageError``."""
    options = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and name in Call.__struct_fields__
    }
    if "param" in options:
        options["param"] = pairs_of("--param", options["param"])
    return options


def combined(call: Call, options: dict[str, Any]) -> Call:
    """``call`` with ``options`` in place of its own; parameters are added to those that it has, one by one.

    Raises ``click.UsageError`` for options that cannot be used beside each other.
    """
    if "param" in options:
        options = {**options, "param": {**call.param, **options["param"]}}
    if "max_failures" in options and "keep_going" not in options:
        options = {**options, "keep_going": True}
    elif "keep_going" in options and "max_failures" not in options:
        options = {**options, "max_failures": None}  # the one that was said last
    both = msgspec.structs.replace(call, **options)
    if both.max_failures is not None and not both.keep_going:
        raise click.UsageError("--no-keep-going is --max-failures 0: leave one of them away")
    if both.retries is None and (both.retry_delay_s is not None or both.retry_on):
        raise click.UsageError("--retry-delay and --retry-on say how calls are retried: say with --retries how often")
    if both.no_digest and both.verify == "digest":
        raise click.UsageError(
            "--verify digest compares with the digests that --no-digest leaves out: say --digest, or drop one of them"
        )
    if both.names and (both.checksum or both.largest_first):
        of_files = "--checksum" if both.checksum else "--largest-first"
        remedy = f"say --no-{of_files[2:]}, or drop one of them"
        raise click.UsageError(f"--names says that inputs are no files, {of_files} looks at files: {remedy}")
    return both
