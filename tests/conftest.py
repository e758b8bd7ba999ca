"""What tests of several rooms need."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than ``tmp_path``."""
    for place in ("/dev/shm", "/var/tmp", Path.home()):
        with tempfile.TemporaryDirectory(dir=place, prefix="ringpool-test-") as other:
            if os.stat(other).st_dev != os.stat(tmp_path).st_dev:
                yield Path(other)
                return
    pytest.skip("there is one file system")
