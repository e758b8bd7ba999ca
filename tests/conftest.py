"""What tests of several rooms need."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On a machine under load an example may take any time, and so may making it up.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """Nothing that other tests have left behind is collected, and closed, in the midst of this one."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than ``tmp_path``."""
    for place in ("/dev/shm", "/var/tmp", Path.home()):
        with tempfile.TemporaryDirectory(dir=place, prefix="ringpool-test-") as other:
            if os.stat(other).st_dev != os.stat(tmp_path).st_dev:
                yield Path(other)
                return
    pytest.skip("there is one file system")
