"""Numbers as callers give them, NumPy's, ``Fraction`` and ``Decimal`` among them: in here, ``int`` and ``float``.

The pump's thread counts with them, and sends them to workers: where it could not, that would be the end of the pool.
"""

from __future__ import annotations

import operator
from typing import Any, SupportsFloat, SupportsIndex


def whole(name: str, value: Any, wanted: str = "an integer") -> int:
    """``value`` as an ``int``. Raises ``TypeError`` where it is no whole number: 2.0 is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {wanted}, not {value!r}") from None


def real(name: str, value: Any) -> float:
    """``value`` as a ``float``. Raises ``TypeError`` where it is no number, ``OverflowError`` where it is too large."""
    if not isinstance(value, SupportsFloat | SupportsIndex):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)
