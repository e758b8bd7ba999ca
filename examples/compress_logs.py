"""Compress a tree of logs as a job: run it, let one log grow, run it again.

    python examples/compress_logs.py [DIRECTORY]      without it: in a temporary directory

    DIRECTORY/logs/HOST/DAY.log  --gzip_file-->  DIRECTORY/packed/HOST/DAY.log.gz
                                                 DIRECTORY/packed/.ringpool         the ledger

The second run finds all but one of the files done: it reads none of them, and compresses the one that has grown.
Exits with 1 if an output does not give its log back, or if a file was done that had no need.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gzip_task import gzip_file
from ringpool import Job, Report

HOSTS, DAYS, LINES = 4, 25, 400


def make_logs(logs: Path) -> None:
    """A hundred logs of web servers, the same each time."""
    chance = random.Random(1)
    for host in range(HOSTS):
        (logs / f"web{host}").mkdir(parents=True, exist_ok=True)
        for day in range(DAYS):
            (logs / f"web{host}/2026-11-{day + 1:02}.log").write_text("".join(lines(chance)))


def lines(chance: random.Random) -> Iterator[str]:
    for second in range(LINES):
        status, n_bytes = chance.choice([200, 200, 200, 304, 404]), chance.randrange(100_000)
        yield f"{second // 60:02}:{second % 60:02} GET /item/{chance.randrange(10_000)} {status} {n_bytes}\n"


def compress(logs: Path, packed: Path) -> Report:
    """Compress what is not compressed yet."""
    report = Job(gzip_file, logs, f"{packed}/{{relpath}}.gz", params={"level": 9}).run()
    for failure in report.failures:
        print(f"{failure.path}: {failure.kind}: {failure.message}", file=sys.stderr)
    progress = report.progress
    print(f"{progress.done} compressed, {progress.skipped} done before, {progress.failed} failed")
    return report


def wrong_outputs(logs: Path, packed: Path) -> list[Path]:
    """The logs whose output does not give them back."""
    return [
        log
        for log in sorted(logs.rglob("*.log"))
        if gzip.decompress((packed / f"{log.relative_to(logs)}.gz").read_bytes()) != log.read_bytes()
    ]


def demonstrate(place: Path) -> int:
    logs, packed = place / "logs", place / "packed"
    make_logs(logs)
    compress(logs, packed)
    with (logs / "web0/2026-11-25.log").open("a") as log:
        log.write("23:59 GET / 200 1\n")
    second = compress(logs, packed)
    wrong = wrong_outputs(logs, packed)
    print(f"{HOSTS * DAYS - len(wrong)} of {HOSTS * DAYS} outputs give their logs back")
    return 0 if second.ok and second.progress.done == 1 and not wrong else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="made where it is missing")
    place = parser.parse_args().directory
    if place is not None:
        return demonstrate(place)
    with tempfile.TemporaryDirectory(prefix="compress-logs-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":  # worker processes import this module, too
    sys.exit(main())
