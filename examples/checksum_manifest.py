"""Checksums of the files that a manifest names, each by the algorithm that its line asks for; values, and no outputs.

    python examples/checksum_manifest.py [DIRECTORY]      without it: in a temporary directory

    DIRECTORY/files.csv                            path,algorithm
        |                                          files/00.bin,sha256
        v                                          files/01.bin,blake2b
    ringpool run checksum_manifest:checksum --manifest files.csv --job job
        |
        v
    job/.ringpool/ledger.db  --ringpool results job --format csv-->  DIRECTORY/checksums.csv

Exits with 1 if a checksum is not what hashlib says here, or if a file has none.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ALGORITHMS = ("sha256", "blake2b", "md5", "sha3_256")
FILES = 80


def checksum(src: Path, *, algorithm: str) -> str:
    """The checksum of ``src``, in hexadecimal digits."""
    with src.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def make_files(place: Path) -> dict[Path, str]:
    """The files, and the manifest; the algorithm for each."""
    chance = random.Random(1)
    (place / "files").mkdir(parents=True, exist_ok=True)
    algorithms: dict[Path, str] = {}
    with (place / "files.csv").open("w", newline="") as manifest:
        writer = csv.writer(manifest)
        writer.writerow(("path", "algorithm"))
        for number in range(FILES):
            path = Path("files") / f"{number:02}.bin"
            (place / path).write_bytes(chance.randbytes(chance.randrange(100_000)))
            algorithms[path] = ALGORITHMS[number % len(ALGORITHMS)]
            writer.writerow((path, algorithms[path]))
    return algorithms


def ringpool(place: Path, *words: str) -> str:
    """Run the command in ``place``; what it writes to standard output."""
    search_path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH"))))
    print("$ ringpool", *words, flush=True)
    command = [sys.executable, "-m", "ringpool", *words]
    environment = {**os.environ, "PYTHONPATH": search_path}
    return subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def demonstrate(place: Path) -> int:
    algorithms = make_files(place)
    ringpool(place, "run", "checksum_manifest:checksum", "--manifest", "files.csv", "--job", "job")
    (place / "checksums.csv").write_text(ringpool(place, "results", "job", "--format", "csv"))
    with (place / "checksums.csv").open(newline="") as file:
        found = {row["path"]: row["value"] for row in csv.DictReader(file)}
    expected = {
        str((place / path).resolve()): hashlib.new(algorithm, (place / path).read_bytes()).hexdigest()
        for path, algorithm in algorithms.items()
    }
    n_right = sum(found.get(path) == value for path, value in expected.items())
    print(f"{n_right} of {len(expected)} checksums are right")
    return 0 if found == expected else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="made where it is missing")
    place = parser.parse_args().directory
    if place is not None:
        return demonstrate(place)
    with tempfile.TemporaryDirectory(prefix="checksum-manifest-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":
    sys.exit(main())
