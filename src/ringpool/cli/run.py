"""``ringpool run``, ``resume``, ``retry``: a job, begun or gone on with.

    run       the command line, over the directory's settings    new, failed and changed files; again is a resume
    resume    what the ledger says the last one was told         the same
    retry     ... too                                            of its inputs, those that failed, by kind

What the job needs is imported when one of them is called: ``ringpool --help`` needs none of it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from ringpool.cli import EXIT_FAILED, EXIT_SIGNAL_BASE
from ringpool.cli.config import settings
from ringpool.cli.lines import as_json, as_text, command, counted, one_line, print_line, say
from ringpool.cli.options import DIRECTORY, PLACES, WAYS, Call, Filled, combined, given, with_options
from ringpool.cli.stopping import stopper

if TYPE_CHECKING:
    from ringpool.cli.calls import Stored
    from ringpool.cli.screen import Failures
    from ringpool.coordinator.job import Job
    from ringpool.coordinator.jobwork import Planned, Progress, Work


class Selection:
    """The files of a ledger that a retry is about: ``keys``, hashed; ``others``: of files that are not done either.
    ``kinds``: of errors, with how many files each; ``asked``: by which options. ``n_left``: how many of ``others`` were
    among the inputs.
    """

    def __init__(
        self, keys: frozenset[int], others: frozenset[int], kinds: dict[str, int], asked: tuple[str, ...]
    ) -> None:
        self.keys = keys
        self.others = others
        self.kinds = kinds
        self.asked = asked
        self.n_left = 0

    def __call__(self, work: Work) -> bool:
        """Whether ``work`` is one of them."""
        return _key_of(work) in self.keys

    def only(self, work: Work) -> bool:
        """The same, of each input once."""
        key = _key_of(work)
        self.n_left += key in self.others
        return key in self.keys


def _key_of(work: Work) -> int:
    return hash((work.source, work.targets[0] if work.targets else b""))


class Order(NamedTuple):
    """A job to run. ``directory``: where its ledger is, as its user calls it; ``selection``: None for all inputs."""

    call: Call
    job: Job
    directory: str
    selection: Selection | None = None


# ---- the commands ----------------------------------------------------------------------------------------------------


@click.command(short_help="Call a function, or run a command, for every file.")
@click.argument("words", metavar="MODULE:FUNCTION INPUTS...", nargs=-1)
@click.option("--exec", "command", metavar="COMMAND", help="Instead of a function: 'gzip -9c {src} > {dst}'.")
@with_options(PLACES)
@with_options(WAYS)
@click.pass_context
def run(context: click.Context, words: tuple[str, ...], **_options: Any) -> int:
    """Call MODULE:FUNCTION for every file that INPUTS stand for, or run the shell command of --exec.

    INPUTS are files, directories with all that is below them, globs ('photos/**/*.jpg'), and lists of files (@list.txt,
    or - for standard input). MODULE is looked for in the current directory first. The function is called as fn(src,
    **params); or as fn(src, dst, **params) where it has a dst, and what it writes there appears as its output, whole.
    In --out, {relpath} {parent} {name} {stem} {suffix} {index} {hash} stand for parts of the input's path below its
    source, its number and its hash.

    What is done is written down beside the outputs: the same command again does what is missing, failed or changed.
    The options may stand in ringpool.toml, or below [tool.ringpool] in pyproject.toml, too.
    """
    told = given(context)
    call = combined(Call(), settings(Path(), context.command))
    call = combined(call, {**told, **_function_and_inputs(call, words, told)})
    from ringpool.cli.calls import job_of

    job = job_of(call, call)
    return execute(Order(call, job, str(job.directory)))


def _function_and_inputs(call: Call, words: tuple[str, ...], told: dict[str, Any]) -> dict[str, Any]:
    if "command" in told:
        found: dict[str, Any] = {"inputs": words}
    elif words:
        found = {"function": words[0], "inputs": words[1:]}
    else:
        raise click.UsageError("Missing argument 'MODULE:FUNCTION'; or give --exec COMMAND")
    if found["inputs"] and "manifest" not in told:
        return {**found, "manifest": None}  # that of the settings
    has_manifest = told.get("manifest", call.manifest) is not None
    if has_manifest and found["inputs"]:
        raise click.UsageError("the inputs are given twice, by --manifest and by INPUTS: leave one of them away")
    if not has_manifest and not found["inputs"]:
        raise click.UsageError("Missing argument 'INPUTS...'")
    return found


@click.command(short_help="Go on with the last job of a directory.")
@click.argument("directory", metavar="[DIR]", type=DIRECTORY, default=".")
@with_options(WAYS)
@click.pass_context
def resume(context: click.Context, directory: str, **_options: Any) -> int:
    """Go on with the last job of DIR, the current directory if none is given.

    DIR is where .ringpool is: where its outputs are, or what its --job said. The job is run as it was started, from
    where it was started; options that are given here override those, and are its own from then on.
    """
    stored = _stored(directory)
    call = combined(stored.call, given(context))
    kept = msgspec.structs.replace(
        call, quiet=stored.call.quiet, json=stored.call.json
    )  # what it does, not how it looks
    return execute(_order_again(call, kept, directory, stored.cwd))


@click.command(short_help="Do the failed files of a job again.")
@click.argument("directory", metavar="[DIR]", type=DIRECTORY, default=".")
@click.option(
    "--kind",
    "wanted",
    multiple=True,
    type=Filled("KIND", "name an error, such as ValueError"),
    help="Only what failed by an error of this name, or one that ends in it; may be given several times.",
)
@click.option("--dead", is_flag=True, help="Also what is set aside, because workers died in it again and again.")
@with_options(WAYS)
@click.pass_context
def retry(context: click.Context, directory: str, wanted: tuple[str, ...], dead: bool, **_options: Any) -> int:
    """Do the failed files of DIR's last job again, and nothing else.

    The job is run as it was started, from where it was started; options that are given here hold for this time only,
    and what is done with them is done.
    """
    stored = _stored(directory)
    selection = _selection(Path(directory), stored.id, wanted, dead=dead)
    if not selection.keys:
        which = f" of kind {' or '.join(wanted)}" if wanted else ""
        say(f"{directory}: no file{which} has failed{_others_in_words(selection)}")
        return 0
    call = combined(stored.call, given(context))
    return execute(_order_again(call, stored.call, directory, stored.cwd, selection))


def _stored(directory: str) -> Stored:
    """The last job of ``directory``. Raises ``JobError``, ``click.UsageError`` where it cannot be run again."""
    from ringpool.cli import calls

    found = calls.last_job(Path(directory))
    calls.require_repeatable(found.call, Path(directory))
    return found


def _order_again(call: Call, own: Call, directory: str, cwd: str, selection: Selection | None = None) -> Order:
    """The job of ``call`` from where it was started, recorded as that of ``own``. ``directory`` is as it was called
    from here.
    """
    from ringpool.cli.calls import job_of, require_same_place

    place = Path(os.path.abspath(directory))
    try:
        os.chdir(cwd)
    except OSError as error:
        way = "put it back, or run the job's command again where its inputs are now"
        raise click.UsageError(
            f"{cwd}, where the job was started, cannot be entered ({error.strerror}); {way}"
        ) from None
    job = job_of(call, own)
    require_same_place(job, place, directory)
    return Order(call, job, directory, selection)


def _selection(directory: Path, job: int, wanted: tuple[str, ...], *, dead: bool) -> Selection:
    from ringpool.coordinator.ledger import Ledger, State

    states = (State.FAILED, State.DEAD) if dead else (State.FAILED,)
    keys: set[int] = set()
    others: set[int] = set()
    kinds: Counter[str] = Counter()
    with Ledger.open(directory, create=False, read_only=True) as ledger:
        for cause in ledger.failures_by_cause(job):
            is_meant = cause.state in states and (not wanted or cause.kind.endswith(wanted))
            found = [hash((row.input, row.output)) for row in ledger.failed(job, cause.kind, cause.state)]
            (keys if is_meant else others).update(found)
            kinds["set aside" if cause.state == State.DEAD else cause.kind] += len(found)
    asked = [word for kind in wanted for word in ("--kind", kind)]
    return Selection(frozenset(keys), frozenset(others), kinds, (*asked, "--dead") if dead else tuple(asked))


def _others_in_words(selection: Selection) -> str:
    """What has failed besides, and how that is done again; empty for nothing."""
    if not selection.others:
        return ""
    kinds = dict(selection.kinds)
    n_aside = kinds.pop("set aside", 0)
    words = [f"{n} {name}" for name, n in kinds.items()]
    if n_aside:
        words.append(f"{n_aside} set aside, which --dead does too")
    return f"; besides: {', '.join(words)}"


# ---- running ---------------------------------------------------------------------------------------------------------


def execute(order: Order) -> int:
    """Run a job, show it meanwhile, and say what came of it; the exit status."""
    if order.call.dry_run:
        return _plan(order)
    from ringpool.cli.calls import inputs_ahead
    from ringpool.cli.screen import Failures, shown
    from ringpool.coordinator.contexts import start_server
    from ringpool.coordinator.jobwork import Progress
    from ringpool.errors import JobMissingError

    call, job, _, selection = order
    progress, failures = Progress(), Failures()
    if selection is not None:
        progress.total = len(selection.keys)
    prints = call.json or not call.out
    start_server()
    try:
        with (
            stopper.running(job),
            shown(progress, lambda: inputs_ahead(call, job), quiet=call.quiet, prints=prints) as advance,
        ):
            report = job.run(
                call.workers,
                verify="digest" if call.verify == "digest" else "size",
                only=None if selection is None else selection.only,
                redo=selection,
                on_progress=advance,
                on_row=_writer(order, failures),
                progress=progress,
            )
    except BaseException as error:
        failures.say()
        if progress.seen and not call.quiet:
            _say_summary(progress, order, has_ledger=not isinstance(error, JobMissingError))
        raise
    failures.say()
    if not call.quiet:
        _say_summary(progress, order)
        if not progress.seen and not report.stopped and selection is None:
            filters = "; what there is, --include and --exclude leave out" if call.include or call.exclude else ""
            say(f"the inputs have no file{filters}")
    return _ending(order, progress, report.stopped)


def _say_summary(progress: Progress, order: Order, *, has_ledger: bool = True) -> None:
    from ringpool.cli.calls import is_repeatable
    from ringpool.cli.screen import in_words, ways_on

    say(in_words(progress))
    ways = ways_on(progress, order.directory, is_repeatable=is_repeatable(order.call)) if has_ledger else ""
    if ways:
        say(ways)


def _ending(order: Order, progress: Progress, stopped: str) -> int:
    from ringpool.cli.calls import is_repeatable

    n_left = 0 if order.selection is None or stopped else order.selection.n_left  # of all inputs: not of a part
    if n_left and not order.call.quiet:
        which = f"{counted(n_left, 'file')} not asked for {'is' if n_left == 1 else 'are'} not done either"
        say(f"{which}; `{command('status', order.directory)}` says why")
    is_left = False
    if stopped:
        how = f"by {signal.Signals(stopper.number).name}" if stopper.number else f"({stopped})"
        on = f"`{command('resume', order.directory)}` goes on"
        if order.selection is not None:
            on = f"`{command('retry', order.directory, *order.selection.asked)}` does what is left of it"
        elif not is_repeatable(order.call):
            on = "the same command with the same list goes on"
        say(f"stopped {how}; every output that is there is whole; {on}")
    elif order.selection is not None and progress.seen < len(order.selection.keys):
        n_gone = len(order.selection.keys) - progress.seen
        say(f"{counted(n_gone, 'failed file')} not done again: no longer among the job's inputs")
        is_left = True
    if stopper.number:
        return EXIT_SIGNAL_BASE + stopper.number
    return EXIT_FAILED if stopped or progress.failed or progress.dead or is_left else 0


def _writer(order: Order, failures: Failures) -> Callable[[Work, tuple[Any, ...], Any], None]:
    """What takes note of each file that has ended, and writes it down where that is wanted."""
    from ringpool.cli.filelines import Files, value_of
    from ringpool.coordinator.ledger import Row, State

    call = order.call
    is_relative = bool(call.out) and not os.path.isabs(order.job.directory)
    files = Files(os.getcwd() if is_relative else "")
    done = int(State.DONE)

    def write(work: Work, row: tuple[Any, ...], _value: Any) -> None:
        found = Row(*row)
        if found.state != done:
            failures.add(work.path, found.kind, found.message)
        if call.json:
            print_line(files.as_object(found, work.path))
        elif not call.out and found.state == done:
            print_line(f"{work.path}\t{as_text(value_of(found))}")

    return write


# ---- looking only ----------------------------------------------------------------------------------------------------


def _plan(order: Order) -> int:
    """What would be done with each file, and why."""
    call, job, _, selection = order
    n_by_action: Counter[str] = Counter()
    level = "digest" if call.verify == "digest" else "size"
    plans: Iterator[Planned] = job.plan(verify=level, only=selection, redo=selection)
    for plan in plans:
        n_by_action[plan.action] += 1
        if call.json:
            print_line(as_json(plan._asdict()))
        else:
            print_line(f"{plan.action} {plan.path}: {one_line(plan.reason)}")
    if not call.quiet:
        n_run, n_done, n_aside = (n_by_action[action] for action in ("run", "skip", "set aside"))
        say(f"{counted(n_run, 'file')} to run, {n_done} done before, {n_aside} set aside; nothing was changed")
    return 0
