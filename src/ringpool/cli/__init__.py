"""The ``ringpool`` command.

    run resume retry          a job                     ``run``: options, config, calls, screen
    status results clean      what jobs have left       ``look``

    standard output   what was asked for: values, ``path<TAB>value``, or with --json an object for each file
    standard error    progress, failures, the summary

    exit status       when
    0                 every file is done
    1                 some are not; or the pool, the job or its ledger cannot go on
    2                 the command cannot be run as it is written; a mistake that shows only later stops it then
    130, 143, 129     stopped by Ctrl-C, by SIGTERM, by SIGHUP; see ``stopping``
    141               ... by the end of whoever reads standard output

Nothing is imported here before ``main`` runs: the fork server and the workers import this module too, as that of the
program's main module, and need none of it.
"""

from __future__ import annotations

from typing import NoReturn

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_SIGNAL_BASE = 128  # plus the signal's number, as shells count


def main() -> NoReturn:
    """Run the command that ``sys.argv`` holds, and exit with its status."""
    import signal
    import sys

    from ringpool.cli.stopping import Stopped, stopper

    _open_what_is_closed()
    stopper.install()
    try:
        exit_status = _run_command(sys.argv[1:])
    except Stopped as stop:
        from ringpool.cli.lines import say

        exit_status = EXIT_SIGNAL_BASE + stop.number
        if stop.number != signal.SIGPIPE:
            say(f"stopped by {signal.Signals(stop.number).name}; every output that is there is whole")
    sys.exit(exit_status)


def _open_what_is_closed() -> None:
    """A standard stream that is closed becomes /dev/null: the next file to be opened would get its number."""
    import os
    import sys

    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _is_nowhere(error: Exception) -> bool:
    """Whether it says, of no file, that there is no such file: the current directory was removed."""
    import os

    if not isinstance(error, FileNotFoundError) or error.filename is not None:
        return False
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _said(error: Exception) -> str:
    """In words; of a bare ``OSError``, the path, which may be bytes, and what is wrong with it."""
    import errno
    import os

    if type(error).__module__ != "builtins" or not isinstance(error, OSError):
        return str(error)
    path = error.filename
    if error.errno == errno.EAGAIN and error.strerror == os.strerror(errno.EAGAIN):  # of fork: it names nothing
        return f"no process can be started: {error.strerror}; see `ulimit -u`, and a container's limit of processes"
    if not isinstance(path, str | bytes):
        return str(error)
    remedy = ""
    if isinstance(error, FileExistsError):
        remedy = "; it is no directory, and one is needed: name another"
    elif isinstance(error, NotADirectoryError):
        remedy = "; a file is in the place of a directory there: move it away, or name another"
    return f"{os.fsdecode(path)}: {error.strerror}{remedy}"


def _run_command(arguments: list[str]) -> int:
    import signal

    import click

    from ringpool.cli.group import ringpool, verb_of
    from ringpool.cli.lines import one_line, say
    from ringpool.cli.stopping import Stopped
    from ringpool.errors import (
        InputMissingError,
        JobError,
        PoolError,
        RingpoolError,
        SegmentError,
        WorkingDirectoryError,
    )

    try:
        return ringpool.main(arguments or ["--help"], prog_name="ringpool", standalone_mode=False) or 0
    except click.ClickException as error:
        say(f"{error.format_message().rstrip('.')} (ringpool {verb_of(error, arguments)}--help lists what there is)")
        return EXIT_UNUSABLE
    except SystemExit as end:
        if end.code != EXIT_FAILED:  # from SIGHUP, see ``coordinator.signals``
            raise
        raise Stopped(signal.SIGPIPE) from None  # what click makes of EPIPE, for a help that nobody reads
    except click.Abort:  # a question was answered by Ctrl-C, or by the end of the terminal
        return EXIT_FAILED
    except InputMissingError as error:
        say(f"input {error.filename}: there is no such file or directory, and no file that matches it as a pattern")
        return EXIT_UNUSABLE
    except (RingpoolError, OSError) as error:
        say(one_line(WorkingDirectoryError("was removed") if _is_nowhere(error) else _said(error)))
        return EXIT_FAILED if isinstance(error, PoolError | SegmentError | JobError) else EXIT_UNUSABLE
