"""The ``ringpool`` command.

    standard output   what the task function returned: ``path<TAB>value``, or with --json an object for each file
    standard error    progress, failures, the summary

    exit status       when
    0                 every file is done
    1                 some files failed, or the pool did
    2                 the command cannot be run as it is written; a mistake that shows only later stops it then
    130, 143, 141     stopped by Ctrl-C, by SIGTERM, by the end of whoever reads standard output

Ctrl-C and SIGTERM end the workers at once: outputs that are there are whole, and what was being written is not there. A
second one ends this process where it stands, and the kernel its workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from ringpool import __version__
from ringpool.coordinator.coordinator import Coordinator, FileResult, FileTask
from ringpool.coordinator.inputs import InputFile, list_inputs, relpaths_are_unique
from ringpool.coordinator.outputs import NamedOutputs, OutputPattern, with_outputs
from ringpool.errors import InputMissingError, PoolError, RingpoolError, SegmentError
from ringpool.shm import layout
from ringpool.workers import tasks
from ringpool.workers.files.locks import PathLock

if TYPE_CHECKING:
    from types import FrameType

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_SIGNAL_BASE = 128  # plus the signal's number, as shells count
PROGRESS_INTERVAL_S = 3.0  # between two lines where standard error is no terminal
REDRAWS_PER_S = 8
FAILURES_SHOWN_MAX = 20
MESSAGE_LENGTH_MAX = 300


# ---- how the command begins and ends ---------------------------------------------------------------------------------


class Stopped(BaseException):
    """Signal ``number`` asks this process to end. No ``Exception``: nothing on the way may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> NoReturn:
    """Run the command that ``sys.argv`` holds, and exit with its status."""
    _stop_at_signals()
    try:
        status = _run_command(sys.argv[1:])
    except Stopped as stop:
        status = EXIT_SIGNAL_BASE + stop.number
        if stop.number != signal.SIGPIPE:
            _say(f"stopped by {signal.Signals(stop.number).name}; every output that is there is whole")
    sys.exit(status)


def _run_command(arguments: list[str]) -> int:
    try:
        return ringpool.main(arguments or ["--help"], prog_name="ringpool", standalone_mode=False) or 0
    except click.ClickException as error:
        _say(f"{error.format_message().rstrip('.')} (ringpool run --help lists what there is)")
        return EXIT_UNUSABLE
    except InputMissingError as error:
        _say(f"input {error.filename}: there is no such file or directory, and no file that matches it as a pattern")
        return EXIT_UNUSABLE
    except (RingpoolError, OSError) as error:
        _say(_one_line(error))
        return EXIT_FAILED if isinstance(error, PoolError | SegmentError) else EXIT_UNUSABLE


def _stop_at_signals() -> None:
    def stop(number: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like: somebody wants it ignored
            signal.signal(number, stop)


def _say(sentence: str) -> None:
    """One line on standard error. Paths in it may be of any bytes."""
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(2, os.fsencode(f"ringpool: {sentence}\n"))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH_MAX else text[: MESSAGE_LENGTH_MAX - 3] + "..."


# ---- ringpool --------------------------------------------------------------------------------------------------------


def _print_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"ringpool {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="The version."
)
def ringpool() -> None:
    """Run a function over very many files, on all cores. Kill any worker: no file is lost."""


# ---- ringpool run ----------------------------------------------------------------------------------------------------


class RunOptions(msgspec.Struct, frozen=True):
    """What ``ringpool run`` was told. ``None``: the coordinator's own default."""

    function: str
    inputs: tuple[str, ...]
    out: str | None
    parameters: dict[str, str]
    workers: int | None
    attempts: int
    durability: str
    quiet: bool
    json: bool


def _parse_parameters(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise click.UsageError(f"--param {word!r} is not of the form NAME=VALUE")
        if name in parameters:
            raise click.UsageError(f"--param {name} is given twice")
        parameters[name] = value
    return parameters


@ringpool.command()
@click.argument("function", metavar="MODULE:FUNCTION")
@click.argument("inputs", metavar="INPUTS...", nargs=-1, required=True)
@click.option("--out", metavar="PATTERN", help="Where outputs go, such as 'thumbs/{relpath}.webp'.")
@click.option(
    "--param", "parameters", metavar="NAME=VALUE", multiple=True, callback=_parse_parameters, help="A parameter."
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, layout.WORKERS_MAX),
    help="Worker processes. Default: one per core.",
)
@click.option(
    "--attempts",
    metavar="N",
    type=click.IntRange(1, layout.ATTEMPT_MAX),
    default=3,
    help="Tries of a file whose workers die. Default: 3.",
)
@click.option(
    "--durability",
    type=click.Choice(["none", "atomic", "data", "full"]),
    default="full",
    help="What has reached the disk when a file counts as done. Default: full.",
)
@click.option("--quiet", is_flag=True, help="No progress and no summary; failures are listed all the same.")
@click.option("--json", is_flag=True, help="One JSON object per file on standard output.")
def run(**options: Any) -> int:
    """Call MODULE:FUNCTION for every file that INPUTS stand for.

    INPUTS are files, directories with all that is below them, and globs ('photos/**/*.jpg'). MODULE is looked for in
    the current directory first. The function is called as fn(src, **params); or as fn(src, dst, **params) where it has
    a dst, and what it writes there appears as its output, whole. In --out, {relpath} {parent} {name} {stem} {suffix}
    stand for parts of the input's path below its source.
    """
    return _run(RunOptions(**options))


def _run(options: RunOptions) -> int:
    pattern = _check_function(options)
    pairs = _pair(options, pattern)
    head = list(islice(pairs, 2))  # two inputs with one output are a likely mistake: seen before anything runs
    if pattern is not None:
        _found_locks(pattern.base)
    tally = Tally()
    try:
        _run_tasks(options, chain(head, pairs), tally, _printer(options, pattern))
    except BaseException:
        _report(tally, quiet=options.quiet or not tally.n_done + tally.n_failed)
        raise
    _report(tally, quiet=options.quiet)
    return EXIT_FAILED if tally.n_failed else 0


def _check_function(options: RunOptions) -> OutputPattern | None:
    """Find what is wrong with function, parameters and pattern before any process is started."""
    if not sys.flags.safe_path and sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    name = options.function
    signature = tasks.signature_of(tasks.resolve(name), name)
    tasks.require(name, signature, tasks.validate(name, signature, options.parameters))
    pattern = None if options.out is None else OutputPattern(options.out)
    if pattern is None and signature.needs_output:
        raise click.UsageError(f"{name} writes an output: say where with --out, such as --out 'out/{{relpath}}'")
    if pattern is not None and not signature.takes_output:
        raise click.UsageError(f"{name} writes no output, for it has no parameter dst: leave --out away")
    return pattern


def _pair(options: RunOptions, pattern: OutputPattern | None) -> Iterator[tuple[InputFile, str | None]]:
    files = list_inputs(options.inputs, exclude_under=() if pattern is None else (pattern.base,))
    if pattern is None:
        return ((file, None) for file in files)
    pairs = with_outputs(files, NamedOutputs([pattern.pattern]), one_source=relpaths_are_unique(options.inputs))
    return ((file, outputs[0]) for file, outputs in pairs)


def _found_locks(base: Path) -> None:
    """Have all lock files of a run below one directory: without it, each directory of outputs would get its own."""
    base.mkdir(parents=True, exist_ok=True)
    with PathLock(base / "any name", base=base):
        pass


def _run_tasks(
    options: RunOptions,
    pairs: Iterator[tuple[InputFile, str | None]],
    tally: Tally,
    print_result: Callable[[FileResult], None] | None,
) -> None:
    with (
        Coordinator(options.workers, attempts_max=options.attempts, durability=options.durability) as coordinator,
        _progress(options, tally, scrolling=print_result is not None and sys.stdout.isatty()) as advance,
    ):
        inputs = (FileTask(file.path, output) for file, output in pairs)
        for result in coordinator.run_file_tasks(options.function, inputs, params=options.parameters):
            tally.count(result)
            if print_result is not None:
                print_result(result)
            advance()


# ---- what is said about a run ----------------------------------------------------------------------------------------


class Tally:
    """What has come of a run so far. Its size does not depend on how many files there are."""

    def __init__(self) -> None:
        self.n_done = self.n_failed = self.n_retried = self.input_bytes = 0
        self.failures: list[str] = []
        self.kinds: Counter[str] = Counter()
        self._began = time.monotonic()

    def count(self, result: FileResult) -> None:
        """One file has come to its end."""
        self.n_retried += result.attempts > 1
        if result.error is None:
            self.n_done += 1
            with contextlib.suppress(OSError):  # the function has moved or removed it
                self.input_bytes += os.stat(result.path).st_size
            return
        self.n_failed += 1
        kind = type(result.error).__name__
        self.kinds[kind] += 1
        if len(self.failures) < FAILURES_SHOWN_MAX:
            self.failures.append(f"{result.path}: {kind}: {_one_line(result.error)}")

    def in_words(self) -> str:
        """Files, failures, bytes, time and rates, in one line."""
        spent_s = time.monotonic() - self._began
        words = [f"{self.n_done} {'file' if self.n_done == 1 else 'files'} done", f"{self.n_failed} failed"]
        if self.n_retried:
            words.append(f"{self.n_retried} retried")
        words += [f"{_size(self.input_bytes)} of input", f"{spent_s:.1f} s"]
        rate_per_s = (self.n_done + self.n_failed) / max(spent_s, 1e-3)
        words.append(f"{rate_per_s:.0f} files/s" if rate_per_s >= 10 else f"{rate_per_s:.2g} files/s")
        return ", ".join(words)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def _report(tally: Tally, *, quiet: bool) -> None:
    """The failures, and the summary unless ``quiet``."""
    for failure in tally.failures:
        _say(f"failed: {failure}")
    unlisted = tally.n_failed - len(tally.failures)
    if unlisted:
        _say(f"failed: {unlisted} more")
    if tally.n_failed > 1:
        _say("failures by kind: " + ", ".join(f"{n} {kind}" for kind, n in tally.kinds.most_common()))
    if not quiet:
        _say(tally.in_words())


@contextlib.contextmanager
def _progress(options: RunOptions, tally: Tally, *, scrolling: bool) -> Generator[Callable[[], None]]:
    """Show ``tally`` meanwhile; the caller calls what it gives after each result. ``scrolling``: results fill it."""
    if options.quiet or (scrolling and sys.stderr.isatty()):
        yield lambda: None
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        spinner = Spinner("dots")

        def draw() -> Spinner:
            spinner.update(text=tally.in_words())
            return spinner

        console = Console(stderr=True)
        with Live(
            console=console,
            get_renderable=draw,
            refresh_per_second=REDRAWS_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield lambda: None
    else:
        yield _line_progress(tally)


def _line_progress(tally: Tally) -> Callable[[], None]:
    said = time.monotonic()

    def advance() -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_INTERVAL_S:
            said = now
            _say(tally.in_words())

    return advance


# ---- what the function returned --------------------------------------------------------------------------------------


def _printer(options: RunOptions, pattern: OutputPattern | None) -> Callable[[FileResult], None] | None:
    """What prints a result; None where nothing is to be printed: outputs are what was wanted."""
    if options.json:
        return lambda result: _print(_as_json(result))
    if pattern is None:
        return lambda result: _print(f"{result.path}\t{_as_text(result.value)}") if result.ok else None
    return None


def _print(line: str) -> None:
    """``line`` on standard output, at once: whoever reads it may act on it while the run goes on."""
    try:
        sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape") + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        raise Stopped(signal.SIGPIPE) from None


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _as_json(result: FileResult) -> str:
    error = result.error
    line = {
        "path": result.path,
        "output": result.output,
        "ok": result.ok,
        "value": result.value,
        "error": error and {"type": type(error).__name__, "message": str(error)},
        "attempts": result.attempts,
        "duration_s": result.duration_s,
        "worker": result.worker,
    }
    try:
        return json.dumps(line, default=_as_builtin)
    except (TypeError, ValueError):  # keys that are no text, or a circle
        return json.dumps({**line, "value": repr(result.value)})


def _as_builtin(value: object) -> object:
    """What json has no notion of, as msgspec sees it (dataclasses, sets, dates, ...); anything else as its repr."""
    try:
        return msgspec.to_builtins(value, enc_hook=_path_or_repr)
    except Exception:
        return repr(value)


def _path_or_repr(value: object) -> str:
    return str(value) if isinstance(value, PurePath) else repr(value)
