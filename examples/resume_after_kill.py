"""A job that SIGKILLs its own coordinator in the middle, and is run again: each output is put in its place once.

    python examples/resume_after_kill.py [DIRECTORY]      without it: in a temporary directory

    first run     another process; kills itself when 300 of 1500 files have ended, some of them not in the ledger yet
    then          its workers are gone; outputs are whole or missing; each is noted: inode, and time of its last change
    second run    here; what the first had done stays, the rest is done

A file that is put in its place a second time is another inode, with another time (rename(2) changes it). Exits with 1
if an output is so, or is wrong; or if the kill left nothing to do.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ringpool import Job

FILES, FILES_BEFORE_KILL = 1500, 300
RUN_AND_DIE = "--run-and-die"


def compress(src: Path, dst: Path) -> None:
    """``src``, compressed."""
    dst.write_bytes(gzip.compress(src.read_bytes(), mtime=0))


def job_in(place: Path) -> Job:
    """The same job in both processes."""
    return Job(compress, place / "in", f"{place}/out/{{relpath}}.gz")


def run_and_die(place: Path) -> None:
    """The first run."""
    n_ended = 0

    def count(*_: object) -> None:
        nonlocal n_ended
        n_ended += 1
        if n_ended == FILES_BEFORE_KILL:
            os.kill(os.getpid(), signal.SIGKILL)

    job_in(place).run(on_row=count)


def make_inputs(directory: Path) -> None:
    chance = random.Random(1)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        (directory / f"{number:04}.bin").write_bytes(chance.randbytes(5_000))


def outputs_in(place: Path) -> dict[str, tuple[int, int]]:
    """The outputs that are there, with what tells whether one was put there again."""
    outputs: dict[str, tuple[int, int]] = {}
    for path in (place / "out").glob("*.gz"):
        status = path.stat()
        outputs[path.name] = (status.st_ino, status.st_ctime_ns)
    return outputs


def wrong_outputs(place: Path, names: list[str]) -> list[str]:
    """Those of ``names`` that do not give their inputs back."""
    return [
        name
        for name in names
        if gzip.decompress((place / "out" / name).read_bytes())
        != (place / "in" / name.removesuffix(".gz")).read_bytes()
    ]


def demonstrate(place: Path) -> int:
    shutil.rmtree(place / "out", ignore_errors=True)
    make_inputs(place / "in")
    # Its workers hold its standard output too: the end of that is the end of them all.
    first = subprocess.run([sys.executable, __file__, str(place), RUN_AND_DIE], stdout=subprocess.PIPE)
    print(f"first run    ended by {signal.Signals(-first.returncode).name if first.returncode < 0 else 'itself'}")
    before = outputs_in(place)
    wrong = wrong_outputs(place, list(before))
    print(f"             {len(before)} outputs are in their places, {len(wrong)} of them not whole")

    progress = job_in(place).run().progress
    print(f"second run   {progress.skipped} done before, {progress.done} done now")
    print(f"             of those before, {progress.drained} were not in the ledger: found in what the kill had left")

    after = outputs_in(place)
    again = [name for name in before if after.get(name) != before[name]]
    wrong += wrong_outputs(place, list(after))
    print(f"at the end   {len(after)} outputs, {len(wrong)} wrong, {len(again)} put in their places twice")
    is_whole = len(after) == progress.skipped + progress.done == FILES and not wrong and not again
    return 0 if first.returncode == -signal.SIGKILL and progress.done and is_whole else 1


def main() -> int:
    if RUN_AND_DIE in sys.argv:
        run_and_die(Path(sys.argv[1]))
        return 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="made where it is missing")
    place = parser.parse_args().directory
    if place is not None:
        return demonstrate(place.absolute())
    with tempfile.TemporaryDirectory(prefix="resume-after-kill-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":  # worker processes import this module, too
    sys.exit(main())
