"""Compress a tree of files and list their checksums: what a program that uses ringpool looks like.

    python examples/compress_stdlib.py [SOURCE [TARGET]]      without arguments: the standard library, into ./stdlib.gz

Each input becomes one ``.gz`` below TARGET; TARGET/SHA256SUMS is for ``sha256sum --check`` in SOURCE.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gzip_task import gzip_file
from ringpool import Coordinator, atomic_write


def sources(root: Path) -> Iterator[Path]:
    """The modules below ``root``, one by one: ringpool draws them as it needs them."""
    return (path for path in root.rglob("*.py") if "site-packages" not in path.parts)


def compress(root: Path, target: Path) -> int:
    """Compress what is below ``root``; how many files could not be."""
    checksums: list[str] = []
    failed = 0
    with Coordinator() as coordinator:
        for result in coordinator.run_file_tasks(
            gzip_file,
            sources(root),
            output=lambda path: target / f"{path.relative_to(root)}.gz",
            params={"level": 9},
        ):
            if result.ok:
                checksums.append(f"{result.value}  {result.path.relative_to(root)}\n")
            else:
                failed += 1
                print(f"{result.path}: {result.error}", file=sys.stderr)
    atomic_write(target / "SHA256SUMS", "".join(sorted(checksums, key=lambda line: line.split("  ", 1)[1])))
    print(f"{len(checksums)} files compressed into {target}, {failed} failed")
    return failed


if __name__ == "__main__":  # worker processes import this module, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("target", type=Path, nargs="?", default=Path("stdlib.gz"), help="made where it is missing")
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"{arguments.source} is no directory; name one whose files are to be compressed")
    sys.exit(bool(compress(arguments.source, arguments.target)))
