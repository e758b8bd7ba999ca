"""``python -m tests.conformance [PATTERN ...]``: CPython's own executor tests, run against ringpool's executor.

--context forkserver         one start method; all three where none is named
--quick                      without the tests that sleep for seconds
--executor module:Class      another executor: concurrent.futures:ProcessPoolExecutor passes, so the harness is right
--list                       what would be run, and what is left out, with its reason
PATTERN                      a shell pattern for names as --list prints them: '*test_shutdown.*'
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import sys
from collections.abc import Sequence

from tests.conformance import suite
from tests.conformance.left_out import START_METHODS

DEFAULT_EXECUTOR = "ringpool:RingPoolExecutor"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 where all passed, 1 where not, 77 where this interpreter comes without the tests."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only tests whose names match one of these")
    parser.add_argument("--context", choices=START_METHODS, action="append", help="only this start method")
    parser.add_argument("--quick", action="store_true", help="without the tests that sleep for seconds")
    parser.add_argument("--executor", default=DEFAULT_EXECUTOR, metavar="MODULE:CLASS", help="what is under test")
    parser.add_argument("--list", action="store_true", help="print names and reasons, and run nothing")
    chosen = parser.parse_args(arguments)
    if not suite.is_installed():
        print(f"Python {sys.version.split()[0]} at {sys.executable} comes without {suite.PACKAGE}")
        return 77
    module, _, name = chosen.executor.partition(":")
    executor = getattr(importlib.import_module(module), name)
    cases = [
        case
        for case in suite.cases(executor)
        if case.context in (chosen.context or START_METHODS)
        and not (chosen.quick and case.test in suite.SLOW)
        and any(fnmatch.fnmatchcase(str(case), pattern) for pattern in chosen.patterns or ["*"])
    ]
    # What is left out is left out for ringpool: ProcessPoolExecutor passes that as well.
    runs = [case for case in cases if case.left_out is None or chosen.executor != DEFAULT_EXECUTOR]
    if chosen.list:
        for case in cases:
            print(case, "" if case in runs else f" -- left out: {case.left_out}")
        return 0
    return 0 if suite.run(runs, sys.stderr) else 1


if __name__ == "__main__":
    sys.exit(main())
