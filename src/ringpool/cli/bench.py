"""``ringpool bench``: how one's own function scales over workers; or, without one, what pools cost on this machine.

    standard output   tables        standard error   whose turn it is, failures of the command
    --json FILE       all figures   --plot FILE      speed-up and latency, as SVG

What is measured with is imported when the command is called.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import click

from ringpool.cli import EXIT_FAILED
from ringpool.cli.lines import may_redraw, say, written
from ringpool.cli.options import Call, Number, pairs_of
from ringpool.cli.stopping import stopper
from ringpool.coordinator import signals

if TYPE_CHECKING:
    from ringpool.bench.scaling import BenchmarkReport

DEFAULT_WORKERS = "1,2,4"
POOL_CASES = ("one", "mapped", "trip", "start", "files", "lock")  # those of ``ringpool.bench.quick``
SAY_EVERY_S = 3.0  # whose turn it is, where standard error is no terminal
_ONLY_FOR_FUNCTIONS = ("workers", "param", "out", "turn_s", "sample", "durability", "plot")

OnTurn = Callable[[int, str], None]


@click.command(short_help="Measure a function of yours, or this machine's pools.")
@click.argument("words", metavar="[MODULE:FUNCTION INPUTS...]", nargs=-1)
@click.option("--workers", metavar="N,N...", help=f"Numbers of workers to compare. Default: {DEFAULT_WORKERS}.")
@click.option("--param", metavar="NAME=VALUE", multiple=True, help="A parameter of the function.")
@click.option(
    "--out", metavar="PATTERN", multiple=True, help="Where outputs would go; NAME=PATTERN for each of several."
)
@click.option(
    "--rounds", metavar="N", type=click.IntRange(1), help="Default: 5; without a function 9, or 3 if --quick."
)
@click.option("--turn", "turn_s", type=Number("S"), help="Seconds that a turn lasts at least. Default: 1.")
@click.option(
    "--sample",
    metavar="N",
    type=click.IntRange(1),
    help="Use so many of the inputs, drawn evenly; at least 2 for each worker.",
)
@click.option(
    "--durability", type=click.Choice(["none", "atomic", "data", "full"]), help="Of outputs, as in run. Default: full."
)
@click.option("--json", "json_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write all figures there.")
@click.option("--plot", metavar="FILE.svg", type=click.Path(dir_okay=False), help="Draw speed-up and latency there.")
@click.option("--quick", is_flag=True, help="Without a function: less work, about a minute.")
@click.option("--case", "cases", type=click.Choice(POOL_CASES), multiple=True, help="Without a function: only these.")
@click.pass_context
def bench(context: click.Context, words: tuple[str, ...], **options: Any) -> int:
    """Measure how MODULE:FUNCTION scales over workers: throughput, latency, CPU and memory, beside a plain loop.

    MODULE:FUNCTION and INPUTS are those of `ringpool run`. With --out, outputs are written to a temporary directory
    beside where they would go, on the same file system, and removed after each turn: your own outputs stay as they are.
    A function with other effects has them many times: it is called for each input in each turn. Do not measure one
    that moves, changes or removes its inputs. Where one has moved a file to its output, the benchmark stops, and keeps
    the temporary directory.

    Without a function: what a task costs in ringpool and in the pools that are installed beside it. Cases: no-ops, one
    by one and mapped, a round trip, the start of a pool, 1 KiB files, a lock for each output.
    """
    reconfigure: Callable[..., object] | None = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")  # names, and what errors say, are of any characters
    for option in ("json_file", "plot"):
        _require_directory(options[option])
    if options["plot"] and not options["plot"].endswith(".svg"):
        raise click.UsageError(f"--plot {options['plot']}: it is drawn as SVG; write a name that ends in .svg")
    if words:
        for name in ("quick", "cases"):
            if options[name]:
                raise click.UsageError(
                    f"{_option(context, name)} is for a benchmark without a function: leave one of both away"
                )
        return _bench_own(words, options)
    given = [name for name in _ONLY_FOR_FUNCTIONS if options[name] not in (None, ())]
    if given:
        option = _option(context, given[0])
        raise click.UsageError(f"{option} needs a function to measure: give MODULE:FUNCTION and INPUTS")
    with signals.handled():  # a closed terminal leaves no scratch directory, in the turns of others either
        return _bench_pools(options)


def _option(context: click.Context, name: str) -> str:
    """What an option is called on the command line."""
    return next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)


def _require_directory(file: str | None) -> None:
    """Now, not when all is measured."""
    if file is None:
        return
    directory = os.path.dirname(file) or "."
    if not file or not os.path.isdir(directory):
        remedy = f"make the directory {directory} first" if file else "give the name of a file"
    elif not os.access(file if os.path.exists(file) else directory, os.W_OK):
        remedy = "you have no right to write there; name another file"
    else:
        return
    raise click.UsageError(f"{file or repr(file)} cannot be written: {remedy}")


# ---- one's own function ----------------------------------------------------------------------------------------------


def _bench_own(words: tuple[str, ...], options: dict[str, Any]) -> int:
    function, *inputs = words
    if not inputs:
        raise click.UsageError("Missing argument 'INPUTS...': the files to call it for")
    workers = _numbers(DEFAULT_WORKERS if options["workers"] is None else options["workers"])
    call = Call(
        function=function, inputs=tuple(inputs), out=options["out"], param=pairs_of("--param", options["param"])
    )
    if options["plot"]:
        from ringpool.bench.plots import require_matplotlib

        try:
            require_matplotlib()
        except ModuleNotFoundError as error:
            raise click.UsageError(f"--plot: {error}") from None
    from ringpool.bench.own import ROUNDS, TURN_S, benchmark
    from ringpool.bench.tables import show
    from ringpool.cli.calls import job_of
    from ringpool.coordinator.contexts import start_server
    from ringpool.errors import BenchmarkError

    job = job_of(call, call)  # whatever is wrong with function, parameters and patterns, in the command's words
    if options["durability"] and not call.out:
        raise click.UsageError("--durability is that of outputs, and there are none: leave it away, or say --out")
    rounds = options["rounds"] or ROUNDS
    start_server({signal.SIGINT})  # pools of others end their workers by SIGTERM
    try:
        with _shown(rounds) as on_turn:
            report = benchmark(
                function,
                inputs,
                workers,
                output=_output_of(job),
                params=call.param,
                rounds=rounds,
                turn_s=TURN_S if options["turn_s"] is None else options["turn_s"],
                sample=options["sample"],
                durability=options["durability"] or "full",
                on_turn=on_turn,
            )
    except BenchmarkError as error:
        say(" ".join(str(error).split()))  # whole: it may say where files are kept
        return EXIT_FAILED
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    are_kept = _keep("--json", options["json_file"], report.write_json)  # first: printing may fail
    are_kept &= _keep("--plot", options["plot"], report.plot)
    with written():
        print(_machine_of(report), end="\n\n")
        for table in report.as_tables():
            show(table)
    return 0 if report.ok and are_kept else EXIT_FAILED


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--workers {text!r} is no list of numbers; write it like {DEFAULT_WORKERS}") from None


def _output_of(job: Any) -> str | dict[str, str] | None:
    outputs = job.outputs
    if outputs is None:
        return None
    patterns = [pattern.pattern for pattern in outputs.patterns]
    return dict(zip(outputs.names, patterns, strict=True)) if outputs.names else patterns[0]


def _machine_of(report: BenchmarkReport) -> str:
    from ringpool.bench.measure import machine_in_words

    return machine_in_words(report.machine, report.rounds)


def _keep(option: str, file: str | None, write: Callable[[str], object]) -> bool:
    """Have ``file`` written, if there is to be one; whether that worked."""
    try:
        if file is not None:
            write(file)
    except OSError as error:
        say(f"{option} {file} cannot be written: {error.strerror or error}; the figures are on standard output")
        return False
    return True


# ---- pools -----------------------------------------------------------------------------------------------------------


def _bench_pools(options: dict[str, Any]) -> int:
    from pathlib import Path

    from ringpool.bench import measure, quick
    from ringpool.bench.tables import show
    from ringpool.coordinator.contexts import start_server

    scale = quick.QUICK if options["quick"] else quick.FULL
    rounds = options["rounds"] or scale.rounds
    scale = scale._replace(rounds=rounds)
    machine = quick.describe()
    with written():
        measure.print_machine(machine, rounds)
        print(quick.peers_in_words(machine), end="\n\n", flush=True)
    start_server({signal.SIGINT})  # pools of others end their workers by SIGTERM
    cases: list[measure.Case] = []
    for name in options["cases"] or POOL_CASES:
        with _shown(rounds) as on_turn:
            found = quick.CASES[name](scale, on_turn)
        cases += found
        with written():
            for case in found:
                show(quick.as_table(case))
    is_kept = _keep("--json", options["json_file"], lambda file: measure.write_json(Path(file), machine, cases))
    return 0 if is_kept else EXIT_FAILED


# ---- whose turn it is ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _shown(rounds: int) -> Generator[OnTurn]:
    """Say whose turn it is meanwhile: in one line that changes, or where that cannot be, now and then."""
    began_s = time.monotonic()
    names: set[str] = set()
    n_ended = -1

    def sentence(number: int, name: str) -> str:
        nonlocal n_ended
        names.add(name)
        n_ended += 1
        if not number:
            return f"warming up: {name}"
        left_s = (time.monotonic() - began_s) / n_ended * max(0, len(names) * (rounds + 1) - n_ended)
        return f"round {number} of {rounds}: {name}; about {left_s:.0f} s left"

    if may_redraw():
        from rich.console import Console

        with Console(stderr=True, emoji=False).status("warming up") as status:

            def show(number: int, name: str) -> None:
                stopper.heed()
                status.update(sentence(number, name))

            yield show
        stopper.heed()
        return
    said_s = began_s

    def on_turn(number: int, name: str) -> None:
        nonlocal said_s
        stopper.heed()
        words = sentence(number, name)
        if time.monotonic() - said_s >= SAY_EVERY_S:
            said_s = time.monotonic()
            say(words)

    yield on_turn
    stopper.heed()
