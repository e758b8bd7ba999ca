from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

def dumps(
    obj: object, protocol: int | None = None, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None
) -> bytes: ...
