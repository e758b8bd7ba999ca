"""Ctrl-C while ringpool is imported: it is neither lost nor does it leave something half made."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys

def interrupt(event, arguments):
    if event == "import" and arguments[0] == "msgspec._core" and not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.{name})

sent = []
for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in a background job
    signal.signal(number, signal.default_int_handler)
sys.addaudithook(interrupt)
try:
    import ringpool
except KeyboardInterrupt:
    assert sent
    msgspec = sys.modules["msgspec"]
    print(msgspec.json.Decoder(list[int]).decode(b"[1]"), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_in_the_import_of_msgspec_comes_when_that_is_whole(name: str) -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{name}", name)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (program.returncode, program.stdout, program.stderr) == (0, "[1] set()\n", "")
