"""The examples, run as a stranger runs them. Each checks its own results; here is looked at what it says of them.

demo.py   is ``make demo``, and too long for a test
*_task.py task functions of others
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WATCHDOG_S = 90

# What each says last, of results that it has checked without ringpool.
SAYS = {
    "compress_stdlib.py": r"\d+ files compressed into .*, 0 failed",
    "compress_logs.py": r"100 of 100 outputs give their logs back",
    "thumbnails.py": r"36 thumbnails are of their pictures' shape and colour",
    "csv_to_parquet.py": r"0 tables differ from their CSV files",
    "checksum_manifest.py": r"80 of 80 checksums are right",
    "exec_tool.sh": r"70 files are the same, byte for byte",
    "resume_after_kill.py": r"at the end   1500 outputs, 0 wrong, 0 put in their places twice",
}


def run_example(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it in another directory than its own, with this Python's ``ringpool`` first on the PATH."""
    search_path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    return subprocess.run(
        ["sh" if name.endswith(".sh") else sys.executable, EXAMPLES / name, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": search_path},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )


def test_every_example_is_run() -> None:
    programs = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert {name for name in programs if not name.endswith("_task.py")} - {"demo.py"} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_an_example_does_what_it_says(name: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    source = [Path(json.__file__).parent] if name == "compress_stdlib.py" else []
    for _ in ("anew", "where its files are already"):
        done = run_example(name, *source, place, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.fullmatch(SAYS[name], done.stdout.splitlines()[-1])
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]


@pytest.mark.parametrize("name", [*SAYS, "demo.py"])
def test_an_example_takes_no_option_and_no_surplus_word_for_a_directory(name: str, tmp_path: Path) -> None:
    asked = run_example(name, "--help", cwd=tmp_path)
    assert "usage: " in asked.stdout + asked.stderr
    for words in (("--hepl",), ("one", "two", "three")):
        refused = run_example(name, *words, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "usage: " in refused.stderr
    assert not os.listdir(tmp_path)
